"""Where images come from: arrays in files, folders and zips of pictures, the Hugging Face hub."""

from els.index.sources.foreign import SourceError
from els.index.sources.opening import open_source
from els.index.sources.source import ImageSource

__all__ = ["ImageSource", "SourceError", "open_source"]
