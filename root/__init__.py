"""Equivariant local score machines (arXiv 2412.20292): the packages are imported on first use.

`els.index` has the training images, `els.engine` the machines and the sampler, `els.runs` samples
on disk, `els.explain` where they came from, `els.networks` trained networks.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from els import engine as engine
    from els import explain as explain
    from els import index as index
    from els import networks as networks
    from els import runs as runs

    __version__: str

_PACKAGES = ("engine", "explain", "index", "networks", "runs")

__all__ = ["__version__", "engine", "explain", "index", "networks", "runs"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from els.storage.manifests import package_version

        return package_version()
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
