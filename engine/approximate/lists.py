"""Posteriors from a sample of all patches of an index: its inverted lists (docs/theory.md).

The backend reads every list with a density that falls with the distance of its centroid, in blocks
that are evenly spread over it, and divides their sums by it. The error of a mean is linearised
(docs/theory.md, equation 13). It does not contain heavy patches that were not read: ``auto``
multiplies it by a safety factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.approximate import head
from els.engine.approximate.costs import (
    LARGEST_FIRST_SHARE,
    LARGEST_SHARE,
    LEAST_BLOCKS,
    LEAST_SHARE,
    RANGE,
    SAFETY,
)
from els.engine.approximate.estimate import Array, Estimate, Mask, Problem, Situation
from els.engine.approximate.growth import Samples
from els.engine.backends.backend import ListQuery
from els.engine.result import Uncertainty
from els.engine.state import PosteriorState
from els.index.patches.index import DEFAULT_EFFORT


@final
@dataclass(frozen=True, eq=False)
class ListPart:
    """The interior from lists that are read more and more (:class:`.growth.Part`).

    Attributes:
        problem: with an index whose lists can be sampled.
        shares: of the codes, that each interior pixel has read, float64 ``[Q]``.
        estimate: from them.
        work: of everything read until now, in images of the exact kernel.
    """

    problem: Problem
    shares: Array
    estimate: Estimate
    work: float

    @classmethod
    def first(cls, problem: Problem) -> ListPart:
        """With the first share for every pixel."""
        share = first_share(problem)
        shares = np.full(int(problem.interior.sum()), share)
        estimate = sampled(problem, share, problem.interior, safety=SAFETY)
        return cls(problem, shares, estimate, list_cost(problem, share))

    @property
    def pixels(self) -> Mask:
        """See :class:`.growth.Part`."""
        return self.problem.interior

    @property
    def samples(self) -> Samples:
        """Of each pixel; all codes together still err, as codes do."""
        one = np.ones_like(self.shares)
        whole = list_cost(self.problem, 1.0) - list_cost(self.problem, 0.0)
        errors = self.estimate.errors()[self.pixels]
        return Samples(one, errors, self.shares, whole * one, one, np.inf * one)

    def can_afford(self, shares: Array) -> bool:
        """Whether reading so much costs less than everything."""
        return self.work + self._cost(shares) <= LARGEST_SHARE * len(self.problem.order)

    def grown(self, sizes: Array) -> ListPart:
        """See :class:`.growth.Part`; pixels that read more are read anew."""
        is_larger = sizes > self.shares
        if not is_larger.any():
            return self
        again = self.pixels.copy()
        again[self.pixels] = is_larger
        fresh = sampled(self.problem, sizes[is_larger], again, safety=SAFETY)
        estimate = fresh.with_others(again, self.estimate)
        work = self.work + self._cost(sizes)
        return replace(self, shares=sizes, estimate=estimate, work=work)

    def _cost(self, shares: Array) -> float:
        nothing = list_cost(self.problem, 0.0)
        each = nothing + (list_cost(self.problem, 1.0) - nothing) * shares
        return float(np.where(shares > self.shares, each, 0.0).mean())


def obstacle(situation: Situation) -> str | None:
    """Why lists cannot be sampled for a query, but for the absence of an index."""
    found = head.obstacle(situation)
    if found is not None or situation.index is None:
        return found
    inverted = situation.index.inverted
    if inverted is None:
        return (
            f"needs an index with codes of one byte per component; "
            f"{situation.index.factory!r} has none: use mode='topk+subset', or build one such "
            "as IVF1024,SQ8_direct"
        )
    for alpha, sigma in zip(situation.alpha.tolist(), situation.sigma.tolist(), strict=True):
        found = situation.backend.lists_obstacle(inverted, alpha, sigma)
        if found is not None:
            return found
    return None


def can_sample(problem: Problem) -> bool:
    """Whether lists tell the posterior well enough here, and sampling them can pay."""
    is_cheap = math.isfinite(problem.costs.code_read)
    return is_cheap and head.can_search(problem) and obstacle(problem.situation) is None


def list_cost(problem: Problem, share: float) -> float:
    """What reading so much of the lists costs, in images of the exact kernel."""
    assert problem.index is not None
    costs, index = problem.costs, problem.index
    read = costs.list_ranked * index.lists + costs.code_read * share * index.count
    return read / problem.query.pairs_per_image


def first_share(problem: Problem) -> float:
    """The share that is read at first: as many lists as a search probes, within limits.

    Where few patches share a pixel they must be found.
    """
    assert problem.index is not None
    probed = DEFAULT_EFFORT / problem.index.lists
    return min(max(probed, LEAST_SHARE), LARGEST_FIRST_SHARE)


def first_cost(problem: Problem) -> float:
    """What reading it costs, in images of the exact kernel."""
    return list_cost(problem, first_share(problem))


def sampled(
    problem: Problem, share: float | Array, pixels: Mask, *, safety: float = 1.0
) -> Estimate:
    """Of some of the interior's pixels, each with its share of the codes.

    Others, and those of which nothing was read, have no mass and the largest error.

    Args:
        problem: of which image.
        share: of the codes, or of each pixel.
        pixels: which, bool ``[H, W]``.
        safety: factor of the standard errors.

    Raises:
        DatabaseError: the index names patches that are not there.
    """
    index = problem.index
    assert index is not None
    lists = index.inverted
    assert lists is not None
    patches = problem.patches(pixels)
    y, rest = index.components(patches)
    allowed = None
    if len(problem.members) < len(problem.db):
        allowed = np.zeros(len(problem.db), dtype=np.uint8)
        allowed[problem.members] = 1
    query = ListQuery(
        lists,
        y,
        rest,
        alpha=problem.alpha,
        sigma=problem.sigma,
        share=share,
        seed=problem.list_seed,
        allowed=allowed,
        pixels=pixels.size,
    )
    try:
        state = problem.backend.sample_lists(query)
    except IndexError as error:
        raise index.damaged(str(error)) from error
    sums = state.sampling
    assert sums is not None
    assert state.logit_sum is not None
    is_known = state.is_known
    mass = torch.where(is_known, state.mass, 1.0)
    omitted = torch.where(is_known, (1 - sums.seen / mass).clamp(0, 1), 1.0)
    deviation = safety * standard_error(state)
    # A spread needs several blocks. Of fewer, it is bounded by how much what was not read can
    # differ, which is more than it does, so that the bound needs no safety factor.
    blocks = effective_blocks(state).clamp(min=1.0)
    unread = torch.where(blocks < LEAST_BLOCKS, omitted / blocks, 0.0)
    differs = _unread_difference(problem, patches, state)
    deviation = torch.hypot(deviation, unread.unsqueeze(1) * differs)
    deviation = torch.where(is_known.unsqueeze(1), deviation, RANGE)
    worst, typical = deviation.amax(1), deviation.mean(1)

    def placed(values: Tensor, elsewhere: float) -> Tensor:
        """``[1, 1, Q]`` or ``[1, C, 1, Q]`` as images with another value elsewhere."""
        shape = (*values.shape[:-2], *pixels.shape)
        room = torch.full(shape, elsewhere, dtype=torch.float64, device="cpu")
        room[..., torch.from_numpy(pixels)] = values.squeeze(-2)
        return room

    return Estimate(
        PosteriorState(
            placed(state.reference, -math.inf),
            placed(state.mass, 0.0),
            placed(state.centre, 0.0),
            placed(state.logit_sum, 0.0),
        ),
        Uncertainty(
            placed(omitted, 1.0),
            placed(worst, RANGE),
            "estimate",
            "lists",
            0,
            placed(typical, RANGE),
            list_cost(problem, float(np.mean(share))) / len(problem.order),
        ),
    )


def _unread_difference(
    problem: Problem, patches: npt.NDArray[np.float32], state: PosteriorState
) -> Tensor:
    """How much the mean of what was not read can differ from that of what was, ``[1, C, 1, Q]``.

    Patches that are heavier than those that were read are no further from the noisy patch, and no
    two clean pixels differ from their middle by more than half the range.

    Args:
        problem: of which image.
        patches: noisy, over alpha, ``[Q, C, P, P]``.
        state: of what was read.
    """
    assert state.logit_sum is not None
    _, channels, size, _ = patches.shape
    middle = size // 2
    noisy = torch.from_numpy(patches[:, :, middle, middle].T.astype(np.float64))[None, :, None]
    mass = torch.where(state.is_known, state.mass, 1.0)
    logits = torch.where(state.is_known, state.reference + state.logit_sum / mass, -torch.inf)
    # Per component, by equation (1); rounding puts a clean patch below zero.
    squares = -2 * logits * (problem.sigma / problem.alpha) ** 2 / (channels * size**2)
    squares = squares.clamp(min=0)
    mean = state.centre / mass.unsqueeze(1)
    difference: Tensor = (mean - noisy).abs() + squares.sqrt().unsqueeze(1)
    return difference.clamp(max=RANGE / 2)


def with_exact_border(problem: Problem, share: float) -> Estimate:
    """The lists' posterior, and all images' of the pixels that the index does not serve.

    If nothing was read for a pixel, everything is computed.
    """
    estimate = sampled(problem, share, problem.interior)
    if not estimate.is_known(problem.interior):
        # The exact state of some pixels costs as much as that of all.
        return problem.exact()
    if not problem.has_border:
        return estimate
    query = problem.border_query
    (border,) = problem.backend.states(problem.images, query, [problem.members])
    return estimate.with_others(problem.interior, Estimate.exact(border))


def effective_blocks(state: PosteriorState) -> Tensor:
    """Effective number of blocks that stand for what was not read, ``[1, 1, Q]``; inf for none."""
    assert state.sampling is not None
    spread = state.sampling.squares[:, 0]
    return torch.where(spread > 0, (state.mass - state.sampling.seen).square() / spread, torch.inf)


def standard_error(state: PosteriorState) -> Tensor:
    """The standard error of each channel's mean, ``[1, C, 1, Q]`` (docs/theory.md, (13))."""
    assert state.sampling is not None
    channels = state.centre.shape[1]
    of_mass, crossed, squared = torch.split(state.sampling.squares, [1, channels, channels], dim=1)
    mass = torch.where(state.is_known, state.mass, 1.0).unsqueeze(1)
    mean = state.centre / mass
    variance = squared - 2 * mean * crossed + mean.square() * of_mass
    deviation: Tensor = variance.clamp(min=0).sqrt() / mass
    return deviation
