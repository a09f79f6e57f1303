"""The cheapest estimate that meets a tolerance (docs/theory.md, auto).

A first subset of the images shows how errors fall. The interior is then computed from a larger
subset, a head and a subset, lists, or everything, and the cheapest is chosen again after every
step: a few heavy patches are often not in small subsets, so that errors fall more slowly than the
square root of their size. Border pixels (:mod:`els.engine.approximate.border`) share the tolerance
with the interior such that both together cost least.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import final

import numpy as np
import torch

from els.engine.approximate import border
from els.engine.approximate.allotments import Allotments, images_needed, share_allotments
from els.engine.approximate.costs import (
    BORDER_MARGIN,
    CHEAP_LISTS,
    EFFORTS,
    HEAD_POWER,
    LARGEST_GROWTH,
    LARGEST_LIST_GROWTH,
    LARGEST_POWER,
    LARGEST_SHARE,
    LEAST_GPU_PAIRS,
    LEAST_LIST_GROWTH,
    LEAST_PAIRS,
    LEAST_POWER,
    LIST_POWER,
    LOADED_IMAGE,
    MARGIN,
    PILOT_IMAGES,
    PILOT_PIXELS,
    SUBSET_POWER,
)
from els.engine.approximate.estimate import Array, Estimate, Mask, Problem
from els.engine.approximate.head import Head, can_search, nearest, search_cost
from els.engine.approximate.lists import can_sample, first_share, least_share, list_cost, sampled
from els.engine.approximate.subset import Subset, drawn, extrapolated, with_safety
from els.engine.state import summed


def estimate_to(tolerance: float, problem: Problem, k: int) -> Estimate:
    """The cheapest estimate whose expected error is at most the tolerance.

    Args:
        tolerance: mean absolute error of the posterior mean over the pixels.
        problem: of which image.
        k: size of a head.
    """
    if len(problem.order) <= 2 * PILOT_IMAGES or _is_little(problem):
        return problem.exact()
    aim, interior = MARGIN * tolerance, problem.interior
    lists = _Lists(problem) if can_sample(problem) else None
    subset, estimate, of_border = None, None, None
    if lists is None or list_cost(problem, least_share(problem)) > CHEAP_LISTS * PILOT_IMAGES:
        estimate, subset = _from_subsets(aim, problem, k, lists)
    if estimate is None and lists is not None:
        start, interior_aim = sampled(problem, lists.share, interior), aim
        if problem.has_border:
            at_border = border.first_subset(problem, subset)
            of_border = border.border_estimate(problem, at_border)
            border_aim = _border_aim(aim, problem, lists, start, at_border, of_border)
            of_border = border.estimate_to(border_aim, problem, at_border, of_border)
            interior_aim = _left(aim, of_border, ~interior)
        estimate = lists.estimate_to(interior_aim, start)
    if estimate is None:
        return _everything(problem, subset)
    if not problem.has_border:
        return estimate
    if of_border is None:
        assert subset is not None
        of_border = border.border_estimate(problem, subset)
        left = _left(aim, estimate, interior)
        of_border = border.estimate_to(left, problem, subset, of_border)
    return estimate.with_others(interior, of_border)


def _is_little(problem: Problem) -> bool:
    """Whether everything takes so little time that subsets cannot save any to speak of."""
    candidates = problem.pairs_per_image if problem.query.kind.is_equivariant else 1
    each = problem.interior.size * (candidates + LOADED_IMAGE)
    least = LEAST_GPU_PAIRS if problem.query.x.is_cuda else LEAST_PAIRS
    return len(problem.order) * each < least


@final
class _Lists:
    """The interior from lists that are read more and more."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    @cached_property
    def share(self) -> float:
        """Share of the codes that every pixel reads at first."""
        return first_share(self._problem)

    def allotments(self, estimate: Estimate, shares: Array) -> Allotments:
        """Larger shares of the lists for the interior's pixels."""
        nothing = list_cost(self._problem, 0.0)
        return share_allotments(
            estimate.errors()[self._problem.interior],
            shares,
            LIST_POWER,
            LEAST_LIST_GROWTH,
            LARGEST_LIST_GROWTH,
            (nothing, list_cost(self._problem, 1.0) - nothing),
        )

    def estimate_to(self, aim: float, estimate: Estimate) -> Estimate | None:
        """The interior, read until its error is the aim; None where everything is cheaper.

        Args:
            aim: of the expected error.
            estimate: from the first share; pixels with large errors are read anew.
        """
        interior = self._problem.interior
        shares = np.full(int(interior.sum()), self.share)
        while estimate.error(interior) > aim:
            allotments = self.allotments(estimate, shares)
            chosen = allotments.cheapest(aim)
            larger = allotments.sizes[chosen]
            # If all has been read, the rest of the error is that of the codes.
            is_all = not (larger > shares).any()
            if is_all or allotments.costs[chosen] > LARGEST_SHARE * len(self._problem.order):
                return None
            again = interior.copy()
            again[interior] = larger > shares
            fresh = sampled(self._problem, larger[larger > shares], again)
            estimate = fresh.with_others(again, estimate)
            shares = larger
        return estimate if estimate.is_known(interior) else None


def _border_aim(
    aim: float,
    problem: Problem,
    lists: _Lists,
    start: Estimate,
    subset: Subset,
    of_border: Estimate,
) -> float:
    """How large the border's error may be, so that it and the interior together cost least.

    Args:
        aim: for the mean over all pixels.
        problem: of which image.
        lists: of the interior.
        start: the interior from their first share.
        subset: a subset for the border pixels.
        of_border: the border from it.
    """
    inside = float(problem.interior.mean())
    of_lists = lists.allotments(start, np.full(int(problem.interior.sum()), lists.share))
    of_subset = border.allotments(problem, subset, of_border)
    border_errors = of_subset.errors / BORDER_MARGIN
    errors = inside * of_lists.errors[:, None] + (1 - inside) * border_errors
    border_costs = border.image_cost(problem) * of_subset.costs
    costs = inside * of_lists.costs[:, None] + (1 - inside) * border_costs
    is_good = errors <= aim
    if not is_good.any():
        return aim / 2 / (1 - inside)
    best = int(np.argmin(np.where(is_good, costs, np.inf)))
    # A little more, so that rounding does not call for another step.
    return float(border_errors[best % len(border_errors)]) * (1 + 1e-9)


def _left(aim: float, done: Estimate, pixels: Mask) -> float:
    """The error that each of the other pixels may have, for a mean error over all of them."""
    part = float(pixels.mean())
    return (aim - part * done.error(pixels)) / (1 - part)


def _everything(problem: Problem, subset: Subset | None) -> Estimate:
    """The exact posterior, of which a subset is done already."""
    if subset is None:
        return problem.exact()
    return Estimate.exact(summed(drawn(problem, len(problem.order), subset).groups))


def _from_subsets(
    aim: float, problem: Problem, k: int, lists: _Lists | None
) -> tuple[Estimate | None, Subset]:
    """Head and subset, enlarged until the error is met; None where all or lists are cheaper.

    Also the subset itself.
    """
    pilot, subset = None, drawn(problem, PILOT_IMAGES)
    if can_search(problem) and lists is None:
        pilot = _Pilot(problem, k)
    total, most = len(problem.order), math.floor(LARGEST_SHARE * len(problem.order))
    head, effort, power = None, 0, SUBSET_POWER

    def judged() -> tuple[Estimate, float]:
        """Head and subset, and their expected error, enlarged by the pilot pixels' check."""
        estimate = extrapolated(problem, head, subset)
        if head is None:
            estimate = with_safety(estimate, subset, total)
        if pilot is not None:
            estimate = estimate.enlarged(pilot.safety_factor(estimate, subset))
        return estimate, estimate.error(problem.interior)

    estimate, error = judged()
    while error > aim:
        needed = images_needed(error, aim, len(subset), total, power)
        if lists is not None:
            most = min(most, len(subset) + math.ceil(list_cost(problem, lists.share)))
        if pilot is not None:
            best = pilot.cheapest(effort, min(needed, most), error, aim, estimate, subset)
            if best != effort:
                head, effort, power = nearest(problem, k, effort=best), best, HEAD_POWER
                estimate, error = judged()
                continue
        if needed > most:
            return None, subset
        size = min(max(needed, 2 * len(subset)), LARGEST_GROWTH * len(subset))
        before, larger = len(subset), error
        subset = drawn(problem, size, subset)
        estimate, error = judged()
        fallen = math.log(larger / max(error, 1e-30)) / math.log(len(subset) / before)
        power = min(max(fallen, LEAST_POWER), LARGEST_POWER)
    return estimate, subset


@final
class _Pilot:
    """Heads of a few pixels: they show what a head would gain, and which patches were missed."""

    def __init__(self, problem: Problem, k: int) -> None:
        self._problem = problem
        self._k = k
        places = np.flatnonzero(problem.interior)
        pixels = np.zeros(problem.interior.size, dtype=np.bool_)
        pixels[problem.rng.permutation(places)[:PILOT_PIXELS]] = True
        self._pixels = pixels.reshape(problem.interior.shape)
        self._heads: dict[int, Head] = {}
        self._subset: Subset | None = None
        self._estimates: dict[int, Estimate] = {}

    def safety_factor(self, estimate: Estimate, subset: Subset) -> float:
        """How much larger the error is than it seems, at least 1.

        A spread does not contain heavy patches that are in neither head nor subset; the largest
        head contains most of them.
        """
        seems = estimate.error(self._pixels)
        return max(1.0, self._error(estimate, subset) / max(seems, 1e-30))

    def cheapest(
        self, effort: int, needed: int, error: float, aim: float, estimate: Estimate, subset: Subset
    ) -> int:
        """The effort that costs least from here on, ``effort`` or a larger one.

        Args:
            effort: of the head that there is; 0 without one.
            needed: size of the subset that would do with it, or at which everything is cheaper.
            error: of what there is, over the interior.
            aim: at which error.
            estimate: what there is, enlarged by :meth:`safety_factor`.
            subset: what there is.
        """
        best, least = effort, needed - len(subset)
        now = estimate.error(self._pixels)
        total = len(self._problem.order)
        for more in (each for each in EFFORTS if each > effort):
            cost = math.ceil(search_cost(self._problem, more))
            if cost >= least:
                break
            there = self._error(self._answer(more, subset), subset)
            expected = error * there / max(now, 1e-30)
            images = images_needed(expected, aim, len(subset), total, HEAD_POWER)
            cost += max(images - len(subset), 0)
            if cost < least:
                best, least = more, cost
        return best

    def _error(self, estimate: Estimate, subset: Subset) -> float:
        """By the spread, or by the difference that the largest head makes, if that is more."""
        reference = self._answer(EFFORTS[-1], subset)
        difference = (estimate.state.mean - reference.state.mean).abs().mean(1)[0]
        of_pixels = difference[torch.from_numpy(self._pixels)]
        return max(estimate.error(self._pixels), float(of_pixels.mean()))

    def _answer(self, effort: int, subset: Subset) -> Estimate:
        """The pilot pixels' head of an effort with a subset, made once for each subset."""
        if subset is not self._subset:
            self._subset, self._estimates = subset, {}
        if effort not in self._heads:
            self._heads[effort] = nearest(self._problem, self._k, self._pixels, effort)
        if effort not in self._estimates:
            head = self._heads[effort]
            self._estimates[effort] = extrapolated(self._problem, head, subset)
        return self._estimates[effort]
