"""Whether samples are new: the training image nearest to each, and how near the second is.

The usual test calls a sample memorised where the distance to its nearest training image is below a
third of that to the second nearest (arXiv 2303.00848, Yoon et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from els.index import PatchDatabase

# Ratio of the distances to the nearest and second nearest image below which a sample is memorised.
MEMORISED = 1 / 3
# Bytes of images that are compared at once, as float64.
_CHUNK_BYTES = 64 << 20
# Numbers of 8 bytes that a pair of a sample and an image takes meanwhile.
_PAIR_NUMBERS = 12


@dataclass(frozen=True)
class Nearest:
    """The training image that is nearest to a sample.

    Attributes:
        image: its number.
        distance: root of the mean squared difference of pixels in [-1, 1].
        second: the same of the second nearest image; inf where there is one image alone.
        shift: ``(dy, dx)`` by which the image was moved, cyclically, to be as near; (0, 0) where
            shifts were not tried.
    """

    image: int
    distance: float
    second: float
    shift: tuple[int, int] = (0, 0)

    @property
    def ratio(self) -> float:
        """Of the distance to the second; 1 where both are 0."""
        return self.distance / self.second if self.second > 0 else 1.0

    @property
    def is_memorised(self) -> bool:
        """Whether the ratio is below a third."""
        return self.ratio < MEMORISED


def nearest_images(
    db: PatchDatabase, samples: npt.NDArray[np.float32], *, shifted: bool = False
) -> list[Nearest]:
    """The nearest training image of each sample.

    Args:
        db: the training images.
        samples: ``[n, C, H, W]``, in [-1, 1].
        shifted: also try all cyclic shifts of every image.

    Raises:
        ValueError: if the samples are not of the training images' shape.
    """
    if samples.ndim != 4 or samples.shape[1:] != db.shape:
        raise ValueError(
            f"samples are {samples.shape}, but the training images {db.shape}: nearest images are "
            "of the same shape"
        )
    count, size = len(samples), int(np.prod(db.shape))
    places = np.full((count, 2), -1, dtype=np.int64)
    squares = np.full((count, 2), np.inf)
    shifts = np.zeros((count, 2), dtype=np.int64)
    found = _shifted if shifted else _in_place
    for start, distances, moved in found(db, samples.astype(np.float64), size):
        several = np.concatenate([squares, distances], axis=1)
        numbers = np.broadcast_to(start + np.arange(distances.shape[1]), distances.shape)
        numbers = np.concatenate([places, numbers], axis=1)
        moves = np.concatenate([np.repeat(shifts[:, None], 2, axis=1), moved], axis=1)
        order = np.argsort(several, axis=1, kind="stable")[:, :2]
        squares = np.take_along_axis(several, order, axis=1)
        places = np.take_along_axis(numbers, order, axis=1)
        shifts = np.take_along_axis(moves, order[:, :1, None], axis=1)[:, 0]
    roots = np.sqrt(squares.clip(min=0) / size)
    return [
        Nearest(int(places[i, 0]), float(roots[i, 0]), float(roots[i, 1]), (int(y), int(x)))
        for i, (y, x) in enumerate(shifts)
    ]


def count_memorised(db: PatchDatabase, samples: Iterable[npt.NDArray[np.float32]]) -> int:
    """How many samples are memorised.

    Args:
        db: the training images.
        samples: ``[n, C, H, W]`` at a time, in [-1, 1]; all images are read once for each.

    Raises:
        ValueError: if the samples are not of the training images' shape.
    """
    return sum(found.is_memorised for part in samples for found in nearest_images(db, part))


def _blocks(db: PatchDatabase, size: int) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    chunk = max(1, _CHUNK_BYTES // (8 * size))
    for start in range(0, len(db), chunk):
        yield start, db.images[start : start + chunk] / 127.5 - 1


def _in_place(
    db: PatchDatabase, samples: npt.NDArray[np.float64], size: int
) -> Iterator[tuple[int, npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """First image, squared distances ``[n, images]`` and shifts ``[n, images, 2]`` of blocks."""
    flat = samples.reshape(len(samples), -1)
    energy = np.square(flat).sum(1)[:, None]
    for start, clean in _blocks(db, max(size, _PAIR_NUMBERS * len(samples))):
        other = clean.reshape(len(clean), -1)
        squares = energy - 2 * flat @ other.T + np.square(other).sum(1)
        yield start, squares, np.zeros((*squares.shape, 2), dtype=np.int64)


def _shifted(
    db: PatchDatabase, samples: npt.NDArray[np.float64], size: int
) -> Iterator[tuple[int, npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """The same of the best cyclic shift of every image."""
    _, height, width = db.shape
    spectra = np.fft.rfft2(samples)
    energy = np.square(samples).sum((1, 2, 3))
    for start, clean in _blocks(db, max(4 * size, _PAIR_NUMBERS * len(samples))):
        spectrum = np.fft.rfft2(clean)
        norms = np.square(clean).sum((1, 2, 3))
        squares = np.empty((len(samples), len(clean)))
        moved = np.empty((len(samples), len(clean), 2), dtype=np.int64)
        for i, one in enumerate(spectra):
            products = np.fft.irfft2((one * spectrum.conj()).sum(1), s=(height, width))
            best = products.reshape(len(clean), -1).argmax(1)
            squares[i] = energy[i] + norms - 2 * products.reshape(len(clean), -1).max(1)
            moved[i] = np.stack(np.divmod(best, width), axis=1)
        yield start, squares, moved
