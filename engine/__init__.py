"""The engine: score machines over a patch database, and a thin sampler on top."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from els.engine.adapters.diffusers import ELSModel as ELSModel
    from els.engine.adapters.diffusers import trained_betas as trained_betas
    from els.engine.adapters.edm import EDMDenoiser as EDMDenoiser
    from els.engine.machines import ScoreMachine as ScoreMachine
    from els.engine.machines import WienerDenoiser as WienerDenoiser
    from els.engine.result import LocalPosterior as LocalPosterior
    from els.engine.sampler import sample as sample
    from els.engine.smoothed import SmoothedDenoiser as SmoothedDenoiser
    from els.engine.state import PosteriorState as PosteriorState
    from els.engine.state import merge as merge

# Looked up on first use: the command line answers --help without waiting for torch.
_HOMES = {
    "EDMDenoiser": "adapters",
    "ELSModel": "adapters",
    "LocalPosterior": "result",
    "PosteriorState": "state",
    "ScoreMachine": "machines",
    "SmoothedDenoiser": "smoothed",
    "WienerDenoiser": "machines",
    "merge": "state",
    "sample": "sampler",
    "trained_betas": "adapters",
}

__all__ = [
    "EDMDenoiser",
    "ELSModel",
    "LocalPosterior",
    "PosteriorState",
    "ScoreMachine",
    "SmoothedDenoiser",
    "WienerDenoiser",
    "merge",
    "sample",
    "trained_betas",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
