"""Training images on disk: built once, opened instantly, addressed by patch."""

from els.index.arrays import decode, encode
from els.index.database import DatabaseError, PatchDatabase
from els.index.patches.factory import choose_factory
from els.index.patches.index import PatchIndex
from els.index.sources.foreign import SourceError
from els.index.sources.opening import open_source
from els.index.sources.source import ImageSource

__all__ = [
    "DatabaseError",
    "ImageSource",
    "PatchDatabase",
    "PatchIndex",
    "SourceError",
    "choose_factory",
    "decode",
    "encode",
    "open_source",
]


def __dir__() -> list[str]:
    return sorted(__all__)
