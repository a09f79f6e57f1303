"""Random subsets of the images: their states, scaled to all images, and the jackknife's error.

Sums over a subset of n of N images, times N / n, estimate those over all images; what a head counts
already is left out. The standard error is that of the jackknife over 16 groups of images: the
spread of the means without each group in turn, also where one group holds most of the mass. Pixels
need not share one subset: the first n images of one random order are a subset for every n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

import numpy as np
import torch

from els.engine.approximate.costs import (
    CANCELLATION,
    FIRST_IMAGES,
    GROUPS,
    LARGEST_EXCESS,
    SAFETY,
)
from els.engine.approximate.estimate import Array, Estimate, Mask, Problem
from els.engine.approximate.growth import Samples
from els.engine.approximate.head import Head
from els.engine.backends.backend import Members
from els.engine.query import PosteriorQuery
from els.engine.result import Mode, Uncertainty
from els.engine.state import (
    PosteriorState,
    empty,
    merge,
    moved,
    only_where,
    rescaled,
    scaled,
    stack,
    summed,
    where,
    without_each,
)


@final
@dataclass(frozen=True, eq=False)
class SubsetPart:
    """Some pixels of an image from a subset of the images, or from all (:class:`.growth.Part`).

    Attributes:
        problem: of which image.
        pixels: the interior's, or those of the border, ``[H, W]``.
        subset: of the images.
        estimate: from it, or exact.
    """

    problem: Problem
    pixels: Mask
    subset: Subset
    estimate: Estimate

    @classmethod
    def first(cls, problem: Problem, pixels: Mask) -> SubsetPart:
        """The smallest that knows its error; see the attributes."""
        is_border = not pixels[problem.interior].any()
        subset = drawn(problem, FIRST_IMAGES, border_only=is_border)
        return cls(problem, pixels, subset, _judged(problem, subset))

    @property
    def samples(self) -> Samples:
        """A subset of each pixel where the backend serves few border pixels, else one of all."""
        total = len(self.problem.order)
        count, errors = np.array([float(self.pixels.sum())]), self.estimate.errors()[self.pixels]
        sizes = np.broadcast_to(self.subset.sizes, self.pixels.shape)[self.pixels]
        if not self._are_apart:
            errors, sizes = errors.mean(keepdims=True), sizes[:1]
        if self.estimate.is_exact:
            sizes = np.full_like(sizes, total)
        everything = np.full_like(sizes, total)
        cost = self.problem.border_image_cost if self._is_border else 1.0
        return Samples(
            np.ones_like(sizes) if self._are_apart else count,
            errors,
            sizes,
            np.full_like(sizes, cost),
            everything,
            everything,
        )

    @property
    def work(self) -> float:
        """See :class:`.growth.Part`; images of the pixels' mean subset."""
        samples = self.samples
        return float((samples.pixels * samples.sizes).sum() / samples.pixels.sum())

    def grown(self, sizes: Array) -> SubsetPart:
        """See :class:`.growth.Part`."""
        problem, now, total = self.problem, self.samples.sizes, len(self.problem.order)
        if (sizes <= now).all():
            return self
        if not self._are_apart:
            if sizes[0] >= total:
                return replace(self, estimate=_completed(problem, self.subset, self._is_border))
            subset = drawn(problem, int(sizes[0]), self.subset, border_only=self._is_border)
            return replace(self, subset=subset, estimate=_judged(problem, subset))
        # Few different sizes, since each is a pass over some images.
        doubled = FIRST_IMAGES * np.exp2(np.ceil(np.log2(sizes / FIRST_IMAGES)))
        wanted = np.broadcast_to(self.subset.sizes, self.pixels.shape).copy()
        wanted[self.pixels] = np.where(sizes > now, np.minimum(doubled, total), now)
        subset = grown(problem, self.subset, wanted)
        estimate = _judged(problem, subset)
        if (wanted[self.pixels] >= total).all():
            estimate = Estimate.exact(estimate.state)
        return replace(self, subset=subset, estimate=estimate)

    def joined(self, other: SubsetPart) -> SubsetPart:
        """The same from the other part's subset, which serves all pixels, if it is no smaller."""
        if other.samples.sizes.max() < self.samples.sizes.max():
            return self
        return replace(self, subset=other.subset, estimate=other.estimate)

    @property
    def _is_border(self) -> bool:
        return not self.pixels[self.problem.interior].any()

    @property
    def _are_apart(self) -> bool:
        return self._is_border and self.problem.costs.border_image > 0


@final
@dataclass(frozen=True, eq=False)
class Subset:
    """A subset of the images in groups, or one for each pixel.

    Attributes:
        groups: their states, ``B = 16``.
        sizes: images of each pixel, float64 ``[1, 1]``, or ``[H, W]`` where pixels differ.
        group_of: group of each image of the database, -1 for none; None where pixels differ.
    """

    groups: PosteriorState
    sizes: Array
    group_of: Members | None

    def __len__(self) -> int:
        return int(self.sizes.max())


def drawn(
    problem: Problem, images: int, before: Subset | None = None, *, border_only: bool = False
) -> Subset:
    """A subset of so many images, those of ``before`` among them.

    Args:
        problem: of which images.
        images: how many, at most all of them.
        before: whose states are known.
        border_only: whether only the border pixels' states are wanted.
    """
    query = problem.border_query if border_only else problem.query
    groups = _groups(problem, 0 if before is None else len(before), images, query)
    if before is not None:
        groups = merge(before.groups, groups)
    chosen = problem.order[:images]
    group_of = np.full(len(problem.db), -1, dtype=np.int64)
    group_of[chosen] = np.arange(len(chosen)) % GROUPS
    return Subset(groups, np.full((1, 1), float(len(chosen))), group_of)


def _completed(problem: Problem, subset: Subset, is_border: bool) -> Estimate:
    """Everything, of which a subset is done already."""
    query = problem.border_query if is_border else problem.query
    left = np.sort(problem.order[len(subset) :])
    (rest,) = problem.backend.states(problem.images, query, [left])
    return Estimate.exact(merge(summed(subset.groups), rest))


def _judged(problem: Problem, subset: Subset) -> Estimate:
    """A subset's estimate, with its safety factor."""
    return extrapolated(problem, None, subset).enlarged(SAFETY)


def grown(problem: Problem, subset: Subset, sizes: Array) -> Subset:
    """A subset of such a size for each border pixel, ``[H, W]``, the given one in it."""
    before = np.broadcast_to(subset.sizes, sizes.shape)
    groups = subset.groups
    steps = np.unique(np.concatenate([before[sizes > before], sizes[sizes > before]]))
    for first, last in pairwise(steps.astype(np.int64)):
        wanted = (before <= first) & (sizes >= last)
        if wanted.any():
            query = replace(problem.border_query, pixels=wanted & ~problem.interior)
            fresh = _groups(problem, first, last, query)
            groups = where(torch.from_numpy(wanted), merge(groups, fresh), groups)
    return Subset(groups, sizes, None)


def extrapolated(problem: Problem, head: Head | None, subset: Subset) -> Estimate:
    """Head and scaled subset as one state, with the jackknife's error (docs/theory.md, (12))."""
    groups = subset.groups if head is None else _without(problem, head, subset)
    apart = moved(empty(problem.query), "cpu") if head is None else head.state
    total, sizes = len(problem.order), subset.sizes
    ratio = torch.from_numpy(total / sizes)
    ratios = torch.from_numpy(total / (sizes - counts_of(sizes)))
    together = summed(groups)
    state = merge(apart, scaled(together, ratio))
    seen = merge(apart, together)
    less = merge(apart, scaled(without_each(groups), ratios))
    means = (less.centre / torch.where(less.is_known, less.mass, 1.0).unsqueeze(1)).clamp(-1, 1)
    spread = (means - means.mean(0)).square().sum(0) * (GROUPS - 1) / GROUPS
    all_mass = torch.where(state.is_known, state.mass, 1.0)
    omitted = (1 - rescaled(seen, state.reference).mass / all_mass).clamp(0, 1)
    # One image in so many may have a patch that differs, and weighs as much as each of those that
    # matter in the subset.
    left = torch.from_numpy(1 - sizes / total)
    least = left / torch.from_numpy(sizes) / (1 + state.effective / ratio)
    if head is not None:
        least = least * _share(scaled(summed(subset.groups), ratio), head.state)
    deviation = torch.hypot((spread * left).sqrt(), least)
    mode: Mode = "subset" if head is None else "topk+subset"
    worst, typical = deviation.amax(0, keepdim=True), deviation.mean(0, keepdim=True)
    work = None if head is not None else len(subset) / total
    return Estimate(
        state, Uncertainty(omitted, worst, "estimate", mode, len(subset), typical, work)
    )


def counts_of(sizes: Array) -> Array:
    """How many of the first so many images are in each group, ``[G, H, W]`` for ``[H, W]``."""
    groups = np.arange(GROUPS).reshape(-1, 1, 1)
    counts: Array = np.ceil((sizes - groups) / GROUPS)
    return counts


def _groups(problem: Problem, first: int, last: int, query: PosteriorQuery) -> PosteriorState:
    """The groups of a part of the images in their order, ``B = 16``."""
    number = np.arange(first, min(last, len(problem.order)))
    members = [np.sort(problem.order[number[number % GROUPS == g]]) for g in range(GROUPS)]
    return stack(problem.backend.states(problem.images, query, members))


def _share(part: PosteriorState, other: PosteriorState) -> torch.Tensor:
    """What a state weighs of itself and another together, ``[1, H, W]``."""
    together = merge(part, other)
    mass = rescaled(part, together.reference).mass
    return mass / torch.where(together.is_known, together.mass, 1.0)


def _without(problem: Problem, head: Head, subset: Subset) -> PosteriorState:
    """The groups' sums less what the head counts already."""
    groups = subset.groups
    _, height, width = groups.mass.shape
    pixels = height * width
    addresses = head.addresses[0].numpy().reshape(pixels, -1)
    assert subset.group_of is not None
    group = np.where(addresses >= 0, subset.group_of[addresses // pixels], -1)
    pixel, place = np.nonzero(group >= 0)
    flat = addresses[pixel, place]
    clean = problem.images[flat // pixels, :, flat % pixels // width, flat % width]
    centres = clean / 127.5 - 1  # [M, C]
    slot = group[pixel, place] * pixels + pixel
    logits = head.logits[0].numpy().reshape(pixels, -1)[pixel, place]
    # A candidate of a group is no heavier than its heaviest but for rounding, which in float32 may
    # be much where logits are huge.
    shifted = np.minimum(logits - groups.reference.numpy().ravel()[slot], LARGEST_EXCESS)
    weights = np.exp(shifted)

    def sums(values: Array) -> torch.Tensor:
        counted = np.bincount(slot, values, GROUPS * pixels).astype(np.float64)
        return torch.from_numpy(counted.reshape(GROUPS, height, width))

    assert groups.logit_sum is not None
    rest = PosteriorState(
        groups.reference,
        groups.mass - sums(weights),
        groups.centre - torch.stack([sums(weights * c) for c in centres.T], dim=1),
        groups.logit_sum - sums(np.where(weights > 0, weights * shifted, 0.0)),
    )
    # Below the rounding of the sums nothing is known to be left.
    return only_where(rest.mass > CANCELLATION * groups.mass, rest)
