"""A source of images: its protocol and implementations."""

import gzip
import io
import math
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, cast, final

import numpy as np
from numpy.typing import NDArray

from els.index.arrays import check_class_names
from els.index.sources.decoding import decode_picture
from els.index.sources.foreign import (
    DAMAGED,
    SourceError,
    explained,
    open_member,
    open_regular,
    read_exactly,
)

# Bytes of an encoded picture.
MAX_PICTURE_BYTES = 1 << 28
PICTURE_REMEDY = "fetch that picture again, take it out, or leave out all such by skip_bad=True"
# What parts of a data set are called.
PARTS = (
    *("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"),
    *("extra", "unlabeled", "unlabelled"),
)

OpenPictures = Callable[[], AbstractContextManager[Callable[[int], IO[bytes]]]]
"""Opens a set of encoded pictures, to be read by number."""


@dataclass(frozen=True)
class Preparation:
    """What is done to pictures on their way into a database.

    Attributes:
        resize: (H, W) to scale every picture to, or None.
        crop: cut off what does not fit the proportions of `resize`, about the centre, instead of
            stretching.
        background: (R, G, B) behind transparency; None keeps it as a fourth channel.
        skip_bad: leave out pictures that cannot be read.
    """

    resize: tuple[int, int] | None = None
    crop: bool = False
    background: tuple[int, int, int] | None = (255, 255, 255)
    skip_bad: bool = False

    def scaled(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image [C, h, w], scaled to [C, H, W] if it has to be."""
        if self.resize is None or image.shape[1:] == self.resize:
            return image
        return _resized(_cropped(image, self.resize) if self.crop else image, self.resize)

    def stretches(self, size: tuple[int, int]) -> bool:
        """Whether an image of (height, width) changes its proportions."""
        if self.resize is None or self.crop:
            return False
        return size[0] * self.resize[1] != size[1] * self.resize[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource(ABC):
    """A stream of images of one shape, with their labels.

    Attributes:
        count: number of images, at least 1.
        shape: (C, H, W) of every image, C in 1..4.
        labels: int64 [count] >= 0, or None.
        class_names: name of class 0, 1, ..., or None.
        notes: what was done that a user should know: pictures stretched, transparency lost.
    """

    count: int
    shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @abstractmethod
    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Streams the images in order, from the first; may be called again.

        Args:
            size: images per chunk, at least 1.

        Yields:
            uint8 [n, C, H, W], n = size but for the last.

        Raises:
            SourceError: the data is damaged.
        """


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource(ImageSource):
    """Images that are an array already: uint8 [N, C, H, W]."""

    images: NDArray[np.uint8]

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> Self:
        """Makes a source of checked images, uint8 [N, C, H, W]."""
        count, channels, height, width = images.shape
        return cls(count=count, shape=(channels, height, width), images=images)

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`; the chunks are views."""
        for start in range(0, self.count, size):
            yield self.images[start : start + size]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StreamSource(ImageSource):
    """Raw pixels after a header: an `.npy`, an idx file (gzip or not) or a member of an `.npz`.

    Attributes:
        path: the file.
        member: the member of a zip, or None where the file itself is the stream.
        offset: bytes of header.
        channels_last: pixels are stored [H, W, C].
    """

    path: Path
    member: str | None
    offset: int
    channels_last: bool

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`."""
        channels, height, width = self.shape
        stored = (height, width, channels) if self.channels_last else self.shape
        with explained(self.path, DAMAGED), open_stream(self.path, self.member) as stream:
            stream.read(self.offset)
            for start in range(0, self.count, size):
                n = min(size, self.count - start)
                block = read_exactly(stream, n * math.prod(stored))
                images = np.frombuffer(block, np.uint8).reshape(n, *stored)
                yield np.moveaxis(images, -1, 1) if self.channels_last else images
            # Also makes zip and gzip compare their check sums.
            if stream.read(1):
                raise SourceError(f"{self.path} has bytes after its last image; {DAMAGED}")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PictureSource(ImageSource):
    """Encoded pictures.

    Attributes:
        where: what they are in, for messages.
        names: name of every picture, for messages.
        opener: opens the set, to be read by number.
        mode: "L", "RGB" or "RGBA": what every picture becomes.
        preparation: what is done to every picture.
    """

    where: str
    names: Sequence[str]
    opener: OpenPictures
    mode: str
    preparation: Preparation

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`."""
        with self.opener() as read:
            for start in range(0, self.count, size):
                numbers = range(start, min(start + size, self.count))
                with warnings.catch_warnings(action="ignore"):
                    images = [self._decoded(read, number) for number in numbers]
                yield np.stack(images)

    def _decoded(self, read: Callable[[int], IO[bytes]], number: int) -> NDArray[np.uint8]:
        # Read whole, so that an archive compares its check sum.
        with (
            explained(f"{self.where}: {self.names[number]}", PICTURE_REMEDY),
            read(number) as stream,
        ):
            background = self.preparation.background or (0, 0, 0)
            planes = decode_picture(io.BytesIO(stream.read()), self.mode, background)
            image = self.preparation.scaled(planes)
            if image.shape != self.shape:
                raise SourceError(
                    f"{self.where}: {self.names[number]} is {image.shape} now and was "
                    f"{self.shape} before; keep the pictures unchanged during a build"
                )
            return image


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ResizedSource(ImageSource):
    """Another source's images, each scaled to `shape`."""

    source: ImageSource
    preparation: Preparation

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`."""
        for chunk in self.source.chunks(size):
            yield np.stack([self.preparation.scaled(image) for image in chunk])


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SelectedSource(ImageSource):
    """Some of another source's images.

    Attributes:
        source: all of them.
        numbers: those that are taken, int64 [count], ascending.
    """

    source: ImageSource
    numbers: NDArray[np.int64]

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`; what comes after the last that is taken is not read."""
        start, kept = 0, np.empty((0, *self.shape), np.uint8)
        for chunk in self.source.chunks(size):
            first, last = np.searchsorted(self.numbers, [start, start + len(chunk)])
            kept = np.concatenate([kept, chunk[self.numbers[first:last] - start]])
            start += len(chunk)
            if len(kept) >= size:
                yield kept[:size]
                kept = kept[size:]
            if last == self.count:
                break
        if len(kept):
            yield kept


def checked_names(
    where: object, names: Sequence[str] | None, labels: NDArray[np.int64] | None
) -> tuple[str, ...] | None:
    """Class names that fit the labels; a SourceError says where they do not."""
    try:
        return check_class_names(names, labels)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}: {error}") from error


def is_gzip(path: Path) -> bool:
    """Whether a file begins as gzip files do."""
    with open_regular(path) as stream:
        return stream.read(2) == b"\x1f\x8b"


@contextmanager
def open_stream(path: Path, member: str | None = None) -> Iterator[IO[bytes]]:
    """The bytes of a file (unpacked, if gzip) or of a member of a zip."""
    with ExitStack() as stack:
        if member is not None:
            archive = stack.enter_context(zipfile.ZipFile(path))
            yield stack.enter_context(open_member(archive, member))
        elif is_gzip(path):
            yield cast(IO[bytes], stack.enter_context(gzip.open(path)))
        else:
            yield stack.enter_context(open_regular(path))


def _cropped(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The largest part of [C, h, w] about its centre that has the proportions of a size."""
    _, height, width = image.shape
    # Rounded, but never to nothing.
    rows = min(height, max(1, round(width * size[0] / size[1])))
    columns = min(width, max(1, round(height * size[1] / size[0])))
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]


def _resized(image: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Scales [C, H, W] plane by plane, against aliasing."""
    from PIL import Image

    height, width = size
    whole = image.shape[1] % height == 0 and image.shape[2] % width == 0
    method = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
    planes = [Image.fromarray(plane).resize((width, height), method) for plane in image]
    return np.stack([np.asarray(plane) for plane in planes])
