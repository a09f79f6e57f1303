"""The engine: score machines over a patch database, and a thin sampler on top."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from els.engine.machines import ScoreMachine as ScoreMachine
    from els.engine.posterior import LocalPosterior as LocalPosterior
    from els.engine.posterior import PosteriorState as PosteriorState
    from els.engine.posterior import merge as merge
    from els.engine.sampler import sample as sample

# Looked up on first use: the command line answers --help without waiting for torch.
_HOMES = {
    "LocalPosterior": "posterior",
    "PosteriorState": "posterior",
    "ScoreMachine": "machines",
    "merge": "posterior",
    "sample": "sampler",
}

__all__ = ["LocalPosterior", "PosteriorState", "ScoreMachine", "merge", "sample"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
