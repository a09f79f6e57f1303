"""Workloads: real images, queries at the paper's noise for a patch size, numbers of pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.index import PatchDatabase, decode, open_source

# Noise variance at which the paper's CIFAR-10 ResNet sees about P pixels (arXiv 2412.20292).
BETA = {1: 0.006, 3: 0.05, 5: 0.2, 7: 0.3, 9: 0.5, 11: 0.6, 13: 0.7, 15: 0.8, 17: 0.9}


@dataclass(frozen=True)
class Workload:
    """A database and a batch of noisy images of the same data that are not in it.

    Attributes:
        db: the training images.
        x: noisy queries, float32 ``[B, C, H, W]``.
        alpha: signal scale.
        sigma: noise standard deviation.
        patch_size: P.
    """

    db: PatchDatabase
    x: Tensor
    alpha: float
    sigma: float
    patch_size: int

    def of(self, batch: int) -> Self:
        """The same with the first queries only."""
        return replace(self, x=self.x[:batch])

    def pairs(self, boundary: str) -> int:
        """Pixel-candidate pairs of one ELS posterior of the whole batch."""
        _, height, width = self.db.shape
        p = self.patch_size
        per_axis = []
        for length in (height, width):
            middle = length - p + 1
            if boundary == "circular":
                per_axis.append(length * middle)
            else:
                per_axis.append(middle * middle + (length - middle))
        return len(self.x) * len(self.db) * per_axis[0] * per_axis[1]


def load_images(spec: str | Path, count: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """``count`` images of a source, drawn without replacement, uint8 ``[count, C, H, W]``."""
    source = open_source(spec)
    if count > source.count:
        raise ValueError(f"{spec} holds {source.count} images; {count} were asked for")
    images = np.concatenate(list(source.chunks(1024)))
    chosen = np.random.default_rng(seed).permutation(source.count)[:count]
    return np.ascontiguousarray(images[chosen])


def workload(
    images: npt.NDArray[np.uint8],
    patch_size: int,
    batch: int,
    *,
    db: PatchDatabase | None = None,
    device: str = "cpu",
    seed: int = 1,
) -> Workload:
    """The last ``batch`` images, noised as a patch of this size meets them.

    They are asked of ``db``, or of the other images.
    """
    beta = BETA[patch_size]
    alpha, sigma = (1 - beta) ** 0.5, beta**0.5
    noise = np.random.default_rng(seed).standard_normal((batch, *images.shape[1:]))
    x = alpha * decode(images[-batch:]) + sigma * noise
    return Workload(
        PatchDatabase.from_arrays(images[:-batch]) if db is None else db,
        torch.from_numpy(x.astype(np.float32)).to(device),
        alpha,
        sigma,
        patch_size,
    )
