"""Sampling of a patch index's inverted lists by the native kernel (``csrc/lists.h``).

A list's centroid determines roughly what its patches weigh. A pixel reads random blocks of 16
patches of a list with inclusion probability 2^-j, j = 0, 1, ..., and divides their sums by it:
every sum over patches is estimated without bias (docs/theory.md, equation 13). Pixels that are
weighed together (16 with AVX-512) read the blocks of the nearest of them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from els.engine.backends.backend import ESTIMATE_LOGIT_ERROR, ListQuery
from els.engine.backends.native_kernels import Kernels, instruction_sets, kernel_module
from els.engine.state import PosteriorState, SamplingSums, only_where, summed
from els.index.patches.lists import InvertedLists

# Largest j: with fewer blocks the spread of a list would be unknown.
COARSEST = 10
# Radius that centroids are taken to have, in mean squared distances of their codes.
_BLUR = 4.0
# Codes of one list that a query reads at most, unless it is to read everything: some thousands
# determine the mass of millions of equal patches, such as black ones.
_MOST_READ = 8192
# Parts of the lists with sums of their own, merged in order; fixed, whatever the number of threads.
_PARTS = 64
# Queries whose parts are merged at once: so few that torch uses one thread. Its other threads would
# wait actively afterwards, and take a core from the kernel.
_MERGED_QUERIES = 128
# Memory for the ranks of all lists for a chunk of queries, in bytes.
_RANK_BYTES = 32 << 20
# Error of a float32 sum of products, as a share of its terms: four times the unit roundoff.
_ROUNDING = 2.0**-22
# Queries are rounded to integers up to this, either way (`kLargestQuery` of the kernel).
LARGEST_QUERY = 32512
# Largest variance of a logit that codes may leave unknown: beyond it the correction is not small.
_MISFIT = 0.1
# Stored levels of a unit of a clean pixel: 255 levels span [-1, 1].
_LEVEL = 127.5
_LN2 = math.log(2.0)


def obstacle(
    lists: InvertedLists, alpha: float, sigma: float, largest_query: float = 0.0
) -> str | None:
    """Why float32 sums and the lists' codes do not tell logits well enough; None where they do.

    Args:
        lists: of an index.
        alpha: signal scale.
        sigma: noise standard deviation.
        largest_query: largest norm of a query's components; 0 if it is not known yet.
    """
    ratio = (alpha / sigma) ** 2 / _LEVEL**2
    largest = math.sqrt(lists.largest_norm)
    rounding = ratio * largest * max(largest, largest_query) * _ROUNDING
    if rounding < ESTIMATE_LOGIT_ERROR and ratio * lists.misfit < _MISFIT:
        return None
    return (
        f"with sigma={sigma:g}, alpha={alpha:g}: the index's codes do not tell weights well enough "
        "at so little noise; use mode='topk+subset', or an index with larger codes"
    )


def least_beta(lists: InvertedLists) -> float:
    """Noise variance from which :func:`obstacle` finds none, where ``alpha^2 + sigma^2 = 1``."""
    rounding = lists.largest_norm * _ROUNDING / ESTIMATE_LOGIT_ERROR
    noise = max(rounding, lists.misfit / _MISFIT) / _LEVEL**2
    return noise / (1 + noise)


class ListSampling:
    """What backends inherit that sample lists on the CPU, by the native kernel.

    Attributes:
        threads: how many to use. Results do not depend on it.
        instruction_set: of the kernel; None for the best.
        tiles: whether to use the matrix unit; None where there is one.
    """

    threads: int
    instruction_set: str | None = None
    tiles: bool | None = None

    @property
    def estimate_kernel(self) -> str:
        """See :class:`els.engine.backends.backend.Backend`."""
        kernels = self._kernels()
        if kernels is None:
            return "none"
        used = self.instruction_set or instruction_sets()[-1]
        return used + ("+tiles" if self._has_tiles(kernels) else "")

    def lists_obstacle(self, lists: InvertedLists, alpha: float, sigma: float) -> str | None:
        """See :class:`els.engine.backends.backend.Backend`."""
        if self._kernels() is None:
            return (
                "needs the compiled extension; reinstall els-machine where a C++17 compiler is "
                "found, or use mode='topk+subset'"
            )
        return obstacle(lists, alpha, sigma)

    def sample_lists(self, query: ListQuery) -> PosteriorState:
        """See :class:`els.engine.backends.backend.Backend`."""
        lists, y, rest, alpha, sigma = query.lists, query.y, query.rest, query.alpha, query.sigma
        shares = np.broadcast_to(np.asarray(query.share, dtype=np.float64), len(y))
        chunk = max(64, _RANK_BYTES // (2 * len(lists.sizes)) // 64 * 64)
        ratio = (alpha / sigma) ** 2 / _LEVEL**2
        noise = None
        if not lists.is_lossless:
            noise = np.expm1(np.minimum(ratio * lists.misfits, 8)).astype(np.float32)
        count, channels = lists.centres.shape
        precision = ratio / (2 * _LN2)
        kernels = kernel_module(self.instruction_set)
        y = _rounded(y, lists.unit)
        chunks, states = [], []
        # Queries that read everything read all of every list.
        for everything in (False, True):
            those = np.flatnonzero((shares >= 1) == everything)
            for start in range(0, len(those), chunk):
                some = those[start : start + chunk]
                results = np.zeros((_PARTS, 5 + 3 * channels, len(some)))
                kernels.sample_lists(
                    data=np.asarray(lists.data),
                    sizes=lists.sizes,
                    offsets=lists.offsets,
                    centroids=lists.centroids,
                    norms=np.asarray(lists.norms),
                    centres=np.asarray(lists.centres),
                    unit=lists.unit,
                    zero=lists.zero,
                    residual=lists.residual,
                    noise=noise,
                    allowed=query.allowed,
                    pixels=query.pixels,
                    y=np.ascontiguousarray(y[some]),
                    precision=precision,
                    blur=precision / (1 + _BLUR * ratio * lists.component_spread),
                    budget=shares[some] * float(count),
                    most_read=count if everything else _MOST_READ,
                    coarsest=COARSEST,
                    seed=query.seed,
                    tiles=self._has_tiles(kernels),
                    threads=self.threads,
                    results=results,
                )
                powers = np.square(y[some].astype(np.float64)).sum(1) + rest[some]
                for first in range(0, len(some), _MERGED_QUERIES):
                    few = slice(first, first + _MERGED_QUERIES)
                    parts = _states(results[:, :, few], precision * powers[few], channels)
                    chunks.append(some[few])
                    states.append(summed(parts))
        order = torch.from_numpy(np.concatenate(chunks).argsort())

        def joined(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(parts, dim=-1)[..., order]

        sampling = [state.sampling for state in states if state.sampling is not None]
        state = PosteriorState(
            joined([each.reference for each in states]),
            joined([each.mass for each in states]),
            joined([each.centre for each in states]),
            joined([each.logit_sum for each in states if each.logit_sum is not None]),
            sampling=SamplingSums(
                joined([each.seen for each in sampling]),
                joined([each.squares for each in sampling]),
            ),
        )
        largest = math.sqrt(float(np.square(y.astype(np.float64)).sum(1).max()))
        is_precise = obstacle(lists, alpha, sigma, largest) is None
        is_finite = torch.isfinite(state.mass) & torch.isfinite(state.reference)
        return only_where(is_finite & is_precise, state)

    def _kernels(self) -> Kernels | None:
        try:
            return kernel_module(self.instruction_set)
        except RuntimeError:
            return None

    def _has_tiles(self, kernels: Kernels) -> bool:
        return kernels.can_use_tiles() if self.tiles is None else self.tiles


def _states(
    results: npt.NDArray[np.float64], offset: npt.NDArray[np.float64], channels: int
) -> PosteriorState:
    """The kernel's sums as states, one of each part; B = parts, H = 1, W = queries.

    Args:
        results: of each part its reference, mass, seen mass and logit sum, to base 2; its centre
            sums and squares, of stored levels; ``[parts, 5 + 3 C, Q]``.
        offset: what logits to base 2 lack, ``[Q]``.
        channels: C.
    """
    sums = torch.from_numpy(results).unsqueeze(2)
    reference, mass, seen, logit_sum = sums[:, :4].unbind(1)
    centre, squares = sums[:, 4 : 4 + channels], sums[:, 4 + channels :]
    # From levels k to clean values k / 127.5 - 1.
    of_mass = squares[:, :1]
    crossed, squared = squares[:, 1:].chunk(2, dim=1)
    crossed, squared = crossed / _LEVEL, squared / _LEVEL**2
    squares = torch.cat([of_mass, crossed - of_mass, squared - 2 * crossed + of_mass], dim=1)
    reference = _LN2 * (reference - torch.from_numpy(offset))
    return PosteriorState(
        torch.where(mass > 0, reference, -torch.inf),
        mass,
        centre / _LEVEL - mass.unsqueeze(1),
        _LN2 * logit_sum,
        sampling=SamplingSums(seen, squares),
    )


def _rounded(y: npt.NDArray[np.float32], unit: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Queries as the kernel rounds them, to 16 bits, so that distances are of one and the same."""
    scaled = y.astype(np.float64) * unit
    step = np.maximum(np.abs(scaled).max(1, keepdims=True), 1e-30) / LARGEST_QUERY
    rounded: npt.NDArray[np.float64] = np.rint(scaled / step) * step
    return (rounded / unit).astype(np.float32)
