"""The engine: score machines over a patch database, and a thin sampler on top."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from els.engine.adapters import EDMDenoiser as EDMDenoiser
    from els.engine.adapters import ELSModel as ELSModel
    from els.engine.adapters import trained_betas as trained_betas
    from els.engine.machines import ScoreMachine as ScoreMachine
    from els.engine.posterior import LocalPosterior as LocalPosterior
    from els.engine.posterior import PosteriorState as PosteriorState
    from els.engine.posterior import merge as merge
    from els.engine.sampler import sample as sample

# Looked up on first use: the command line answers --help without waiting for torch.
_HOMES = {
    "EDMDenoiser": "adapters",
    "ELSModel": "adapters",
    "LocalPosterior": "posterior",
    "PosteriorState": "posterior",
    "ScoreMachine": "machines",
    "merge": "posterior",
    "sample": "sampler",
    "trained_betas": "adapters",
}

__all__ = [
    "EDMDenoiser",
    "ELSModel",
    "LocalPosterior",
    "PosteriorState",
    "ScoreMachine",
    "merge",
    "sample",
    "trained_betas",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
