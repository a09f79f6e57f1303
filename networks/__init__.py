"""Trained diffusion networks, and how well the score machines predict what they draw."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from els.networks import architecture as architecture
    from els.networks import calibrate as calibrate
    from els.networks import denoiser as denoiser
    from els.networks import evaluate as evaluate
    from els.networks import training as training

__all__ = ["architecture", "calibrate", "denoiser", "evaluate", "training"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
