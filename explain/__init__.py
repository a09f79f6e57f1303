"""Explanations: which training patches every pixel of a sample came from."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from els.explain import explanation as explanation
    from els.explain import page as page
    from els.explain import picture as picture
    from els.explain import replay as replay

__all__ = ["explanation", "page", "picture", "replay"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
