"""Training images on disk: built once, opened instantly, addressed by patch."""

from .arrays import decode, encode
from .database import DatabaseError, PatchDatabase
from .foreign import SourceError
from .retrieval import PatchIndex, choose_factory
from .sources import ImageSource, open_source

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
