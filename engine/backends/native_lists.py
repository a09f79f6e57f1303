"""Posteriors from the inverted lists of a patch index, each read as densely as it matters.

A list's centroid tells roughly what its patches weigh. A pixel reads all of the lists that matter
most to it and 2^-j of others, in random blocks of 16 patches, j = 0, 1, ..., and what it reads
counts 2^j fold: every sum over patches is estimated without bias (Horvitz and Thompson, 1952).
Pixels that are weighed together (16 with AVX-512) share what the nearest of them reads of a list.
The error of a mean v = a / l, with block sums a_b, l_b as they count, is the linearised

    se^2 = sum_b (1 - 2^-j) (a_b - v l_b)^2 / l^2,

plus, where codes are not whole patches (PCA), what their misfit adds: an unknown difference of
squared distances makes logits normal with a variance of alpha^2 / sigma^2 times the misfit.

Budgets steer how much is read. The kernel is native; without it there is none of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from els.engine.backends.cores import available_cores
from els.engine.backends.native import instruction_sets, kernel_module
from els.index.patches.lists import InvertedLists

COARSEST = 10  # 2^-10 of a list is the least that is read
# How wide centroids are taken to be, in mean squared distances of codes from theirs.
_BLUR = 4.0
# Codes of one list that a query reads at most, unless it is to read everything: twelve million
# black patches are as good as some thousands.
_MOST_READ = 8192
# Of lists, each with sums of its own, merged in order: fixed, whatever the number of threads.
_PARTS = 64
_RANK_BYTES = 32 << 20
# Logits are float32 sums; what is not known to this is not asked (see :func:`is_precise`).
LOGIT_ERROR = 0.02
# Queries on the matrix unit are integers up to this, either way (`kLargestQuery` of the kernel).
LARGEST_QUERY = 32512
# Variance of a logit that codes may leave unknown, beyond which it is no small correction.
_MISFIT = 0.1
_LEVEL = 127.5
_LN2 = math.log(2.0)


@final
@dataclass(frozen=True, eq=False)
class ListSums:
    """Estimated sums over all patches, for Q pixels; natural logarithms, clean values in [-1, 1].

    Attributes:
        maximum: reference logit, ``[Q]``.
        mass: ``[Q]``, relative to it, as all below.
        centre: ``[Q, C]``.
        tilt: ``[Q]``.
        seen: the part of the mass that was read, ``[Q]``.
        blocks: effective number of blocks that stand for what was not read, infinite where
            everything was, ``[Q]``.
        deviation: standard error of the mean, ``[Q, C]``.
    """

    maximum: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]
    centre: npt.NDArray[np.float64]
    tilt: npt.NDArray[np.float64]
    seen: npt.NDArray[np.float64]
    blocks: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Which pixels have met a patch, ``[Q]``; the sums of others say nothing."""
        return (self.mass > 0) & np.isfinite(self.mass) & np.isfinite(self.maximum)

    @property
    def effective(self) -> npt.NDArray[np.float64]:
        """Effective number of patches, exp(entropy of the weights), ``[Q]``; 0 for none."""
        known = self.known
        mass = np.where(known, self.mass, 1.0)
        return np.where(known, mass * np.exp(-self.tilt / mass), 0.0)


def can_scan() -> bool:
    """Whether the native kernel is there."""
    try:
        return bool(instruction_sets())
    except RuntimeError:
        return False


def has_tiles(instruction_set: str | None = None) -> bool:
    """Whether the kernel multiplies on a matrix unit (AMX)."""
    return bool(kernel_module(instruction_set).can_use_tiles())


def is_precise(
    lists: InvertedLists, alpha: float, sigma: float, largest_query: float = 0.0
) -> bool:
    """Whether float32 sums and the lists' codes tell logits well enough at this noise.

    Args:
        lists: of an index.
        alpha: signal scale.
        sigma: noise.
        largest_query: largest norm of a query's components; 0 if it is not known yet.
    """
    ratio = (alpha / sigma) ** 2 / _LEVEL**2
    largest = math.sqrt(lists.largest_norm)
    rounding = ratio * largest * max(largest, largest_query) * 2.0**-22
    return rounding < LOGIT_ERROR and ratio * lists.misfit < _MISFIT


def can_read(lists: InvertedLists | None, alpha: float, sigma: float) -> bool:
    """Whether there are lists that tell a posterior at this noise, and the kernel for them."""
    return lists is not None and alpha > 0 and can_scan() and is_precise(lists, alpha, sigma)


def scan(
    lists: InvertedLists,
    y: npt.NDArray[np.float32],
    rest: npt.NDArray[np.float64],
    *,
    alpha: float,
    sigma: float,
    share: float | npt.NDArray[np.float64],
    seed: int,
    allowed: npt.NDArray[np.uint8] | None = None,
    pixels: int = 1,
    threads: int | None = None,
    instruction_set: str | None = None,
    tiles: bool | None = None,
) -> ListSums:
    """Reads the lists for Q pixels.

    Args:
        lists: of an index.
        y: noisy patches over alpha in the codes' components, float32 ``[Q, D]``.
        rest: their squared distances from what components can say, float64 ``[Q]``.
        alpha: signal scale, > 0.
        sigma: noise, > 0.
        share: of all codes, that a pixel reads at least, > 0, or of each pixel, ``[Q]``; 1 or more
            for everything.
        seed: of the blocks that are read, 0 to 2^64 - 1.
        allowed: by image, 1 for those whose patches count, uint8 ``[N]``; None for all.
        pixels: of an image.
        threads: None for one per core. Results do not depend on it.
        instruction_set: of the kernel; None for the best.
        tiles: whether to use the matrix unit; None where there is one. Sums with it differ by the
            rounding of queries to 16 bits.

    Raises:
        IndexError: the lists name an image that ``allowed`` does not have.
    """
    shares = np.broadcast_to(np.asarray(share, dtype=np.float64), len(y))
    chunk = max(64, _RANK_BYTES // (2 * len(lists.sizes)) // 64 * 64)
    ratio = (alpha / sigma) ** 2 / _LEVEL**2
    noise = None
    if not lists.is_lossless:
        noise = np.expm1(np.minimum(ratio * lists.misfits, 8)).astype(np.float32)
    count, channels = lists.centres.shape
    precision = ratio / (2 * _LN2)
    kernel = kernel_module(instruction_set)
    if tiles is None:
        tiles = has_tiles(instruction_set)
    if tiles:
        y = _rounded(y, lists.unit)
    sums = np.empty((5 + 3 * channels, len(y)))
    # Those who read everything read all of every list.
    for everything in (False, True):
        those = np.flatnonzero((shares >= 1) == everything)
        for start in range(0, len(those), chunk):
            some = those[start : start + chunk]
            results = np.zeros((_PARTS, len(sums), len(some)))
            kernel.scan(
                codes=lists.codes,
                ids=lists.ids,
                sizes=lists.sizes,
                offsets=lists.offsets,
                centroids=lists.centroids,
                norms=np.asarray(lists.norms),
                centres=np.asarray(lists.centres),
                unit=lists.unit,
                zero=lists.zero,
                residual=lists.residual,
                noise=noise,
                allowed=allowed,
                pixels=pixels,
                y=np.ascontiguousarray(y[some]),
                precision=precision,
                blur=precision / (1 + _BLUR * ratio * lists.component_spread),
                budget=shares[some] * float(count),
                most_read=count if everything else _MOST_READ,
                coarsest=COARSEST,
                seed=seed,
                tiles=tiles,
                threads=threads or available_cores(),
                results=results,
            )
            sums[:, some] = _merged(results)
    maximum, mass, seen, tilt = sums[:4]
    centre, squares = sums[4 : 4 + channels], sums[4 + channels :]
    powers = np.square(y.astype(np.float64)).sum(1) + rest
    # Levels as they are stored; then values in [-1, 1].
    mean = centre / np.maximum(mass, np.finfo(np.float64).tiny)
    crossed, squared = squares[1 : 1 + channels], squares[1 + channels :]
    variance = squared - 2 * mean * crossed + mean**2 * squares[0]
    deviation = np.sqrt(np.maximum(variance, 0)) / np.maximum(mass, 1e-300) / _LEVEL
    blocks = np.full(len(y), np.inf)
    np.divide(np.square(mass - seen), squares[0], out=blocks, where=squares[0] > 0)
    return ListSums(
        maximum=_LN2 * (maximum - precision * powers),
        mass=mass,
        centre=(centre / _LEVEL - mass).T,
        tilt=_LN2 * tilt,
        seen=seen,
        blocks=blocks,
        deviation=deviation.T,
    )


def _rounded(y: npt.NDArray[np.float32], unit: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Queries as the matrix unit takes them, in 16 bits, so that distances are of one and the same.

    As ``TileProducts`` rounds them.
    """
    scaled = y.astype(np.float64) * unit
    step = np.maximum(np.abs(scaled).max(1, keepdims=True), 1e-30) / LARGEST_QUERY
    rounded: npt.NDArray[np.float64] = np.rint(scaled / step) * step
    return (rounded / unit).astype(np.float32)


def _merged(results: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sums of all parts on one reference, in their order; ``[parts, fields, Q]``."""
    reference = results[:, 0].max(0)
    shift = results[:, 0] - reference
    scale = np.exp2(shift)
    squares = results.shape[1] - (results.shape[1] - 5) // 3 * 2 - 1
    sums = np.empty(results.shape[1:])
    sums[0] = reference
    sums[1:squares] = (scale[:, None] * results[:, 1:squares]).sum(0)
    # Where there is no mass the shift may be as good as infinite.
    moved = np.where(results[:, 1] > 0, shift * results[:, 1], 0.0)
    sums[3] += (scale * moved).sum(0)
    sums[squares:] = (np.square(scale)[:, None] * results[:, squares:]).sum(0)
    return sums
