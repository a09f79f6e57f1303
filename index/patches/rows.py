"""All patches of a database as rows of numbers, block by block."""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

from els.index.database import PatchDatabase

# Seed of the order of the images and of the training sample.
_SEED = 0
# Patches of a build chunk, a checkpoint of the build.
BUILD_CHUNK_PATCHES = 1 << 21
# Memory of a block of patches, in bytes.
_BLOCK_BYTES = 1 << 25


@final
@dataclass(frozen=True, eq=False)
class PatchRows:
    """The patches of one size that lie wholly inside their image, in the order of the index."""

    db: PatchDatabase
    size: int

    @classmethod
    def of(cls, db: PatchDatabase, patch_size: int) -> Self:
        """The patches of a database; raises for a size that is not odd or does not fit."""
        try:
            size = operator.index(patch_size)
        except TypeError as error:
            raise TypeError(f"patch_size must be an integer, got {patch_size!r}") from error
        _, height, width = db.shape
        most = min(height, width)
        if size % 2 == 0 or not 1 <= size <= most:
            raise ValueError(
                f"patch_size must be odd and in 1..{most}, so that a patch fits into an image of "
                f"{height} x {width}; got {size}"
            )
        return cls(db, size)

    @property
    def sites(self) -> tuple[int, int]:
        """Rows and columns of centres per image."""
        _, height, width = self.db.shape
        return height - self.size + 1, width - self.size + 1

    @property
    def count(self) -> int:
        """How many patches there are."""
        return len(self.db) * math.prod(self.sites)

    @property
    def dimension(self) -> int:
        """Numbers of one patch, C * P * P."""
        return self.db.shape[0] * self.size**2

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Order of the images: random, so that the start of a long list is a random sample."""
        return np.random.default_rng(_SEED).permutation(len(self.db))

    @property
    def build_chunks(self) -> int:
        """How many parts the build writes one by one."""
        return math.ceil(len(self.db) / self._images_per_build_chunk)

    @property
    def _images_per_build_chunk(self) -> int:
        return max(1, BUILD_CHUNK_PATCHES // math.prod(self.sites))

    def blocks(self, chunk: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Levels float32 [n, C * P * P] and addresses int64 [n], a bounded number at once."""
        images = self.order[chunk * self._images_per_build_chunk :][: self._images_per_build_chunk]
        step = max(1, _BLOCK_BYTES // (4 * self.dimension * math.prod(self.sites)))
        rows, columns = (np.arange(length) + self.size // 2 for length in self.sites)
        for start in range(0, len(images), step):
            chosen = images[start : start + step]
            windows = np.lib.stride_tricks.sliding_window_view(
                self.db.images[chosen], (self.size, self.size), axis=(2, 3)
            )
            levels = windows.transpose(0, 2, 3, 1, 4, 5).astype(np.float32)
            addresses = self.db.address(chosen[:, None, None], rows[:, None], columns)
            yield levels.reshape(-1, self.dimension), addresses.ravel()

    def sample(self, most: int) -> NDArray[np.uint8]:
        """Distinct patches among `most` random ones, uint8 [n, C * P * P], in random order."""
        random = np.random.default_rng(_SEED)
        count = min(most, self.count)
        chosen = np.sort(random.choice(self.count, count, replace=False))
        found = np.empty((count, self.db.shape[0], self.size, self.size), np.uint8)
        image, site = np.divmod(chosen, math.prod(self.sites))
        y, x = np.divmod(site, self.sites[1])
        for dy, dx in np.ndindex(self.size, self.size):
            found[:, :, dy, dx] = self.db.images[image, :, y + dy, x + dx]
        rows = found.reshape(count, self.dimension).view(f"V{self.dimension}").ravel()
        # Many equal patches (black ones) would attract many centroids.
        _, first = np.unique(rows, return_index=True)
        random.shuffle(first)
        return found.reshape(count, self.dimension)[first]
