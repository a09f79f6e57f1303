"""Patch sizes from the data alone: how far the best linear denoiser has to see."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from els.engine.schedule import Cosine, Schedule, require
from els.index import PatchDatabase
from els.index.database import Progress
from els.index.statistics import autocovariance

# A window's error that counts as good as the largest window's: this part above it.
EXCESS = 0.1
# Coordinates of the largest window that is tried: an eigendecomposition of a few seconds.
_MOST_COORDINATES = 2_000


def sizes_of_data(
    db: PatchDatabase,
    steps: int = 20,
    schedule: Schedule | None = None,
    *,
    excess: float = EXCESS,
    progress: Progress | None = None,
) -> tuple[int, ...]:
    """One patch size per step, lowest noise first, for those who have no network to calibrate on.

    The size of a step is the smallest whose best linear denoiser of the centre pixel, from a patch
    with noise, has at most ``1 + excess`` times the mean squared error of the largest window's
    (docs/theory.md, equation 15). Covariances are averages over all places, as the candidates of
    ELS are; sizes never shrink as noise grows. Windows have at most 2,000 coordinates.

    Args:
        db: the training images.
        steps: of the sampler, >= 1.
        schedule: noise over time; the paper's by default.
        excess: error that a smaller window may add, as a part of the least, > 0.
        progress: called with (images done, images in all).

    Returns:
        ``steps`` odd sizes, entry i - 1 for t = i / steps.

    Raises:
        ValueError: an argument out of range.
    """
    require(steps >= 1, f"steps={steps} must be at least 1")
    require(0 < excess < math.inf, f"excess={excess} must be a number above 0")
    schedule = schedule or Cosine()
    times = [i / steps for i in range(1, steps + 1)]
    noise = np.array([(schedule.sigma(t) / schedule.alpha(t)) ** 2 for t in times])
    covariances = autocovariance(db, progress)
    channels = len(covariances)
    most = min(*db.shape[1:], math.isqrt(_MOST_COORDINATES // channels))
    sizes = np.arange(1, most + 1, 2)
    errors = np.stack([_errors(covariances, int(size), noise) for size in sizes])
    enough = errors <= (1 + excess) * errors[-1]
    chosen = np.maximum.accumulate(sizes[enough.argmax(0)])
    return tuple(chosen.tolist())


def _errors(
    covariances: NDArray[np.float64], size: int, noise: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean squared error of the best linear denoiser of a patch's centre.

    Args:
        covariances: see :func:`~els.index.statistics.autocovariance`.
        size: P of the patch.
        noise: its variance where pixels have not been scaled, ``(sigma / alpha)^2``, ``[S]``.

    Returns:
        float64 ``[S]``.
    """
    channels = len(covariances)
    y, x = (axis.ravel() for axis in np.mgrid[:size, :size])
    matrix = covariances[:, :, y - y[:, None], x - x[:, None]].transpose(0, 2, 1, 3)
    matrix = matrix.reshape(channels * size**2, -1)
    variances, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    # Averages over fewer and fewer places are not exactly a covariance.
    variances = variances.clip(min=0.0)
    centre = vectors[np.arange(channels) * size**2 + size**2 // 2]
    # Of each component the part noise / (variance + noise) is lost.
    lost = variances * noise[:, None] / (variances + noise[:, None])
    return np.asarray((centre**2).sum(0) @ lost.T)
