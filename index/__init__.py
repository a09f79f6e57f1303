"""Training images on disk: built once, opened instantly, addressed by patch."""

from els.index.arrays import decode, encode
from els.index.database import DatabaseError, PatchDatabase
from els.index.foreign import SourceError
from els.index.retrieval import PatchIndex, choose_factory
from els.index.sources import ImageSource, open_source

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
