"""Training images on disk: built once, opened instantly, addressed by patch."""

from .arrays import decode, encode
from .database import DatabaseError, PatchDatabase
from .sources import ImageSource, SourceError, open_source

__all__ = [
    "DatabaseError",
    "ImageSource",
    "PatchDatabase",
    "SourceError",
    "decode",
    "encode",
    "open_source",
]
