"""Border pixels: with ELS and zeros beyond the border, they have candidates of their own.

A pixel within P // 2 of an edge has the patches with the same place relative to the border as
candidates: few, which no index holds. It needs more images than the others, and an image costs less
there, so that border pixels get subsets of their own.
"""

from __future__ import annotations

import numpy as np

from els.engine.approximate.allotments import Allotments, subset_allotments
from els.engine.approximate.costs import (
    BORDER_IMAGES,
    BORDER_MARGIN,
    BORDER_POWER,
    PILOT_IMAGES,
)
from els.engine.approximate.estimate import Estimate, Problem
from els.engine.approximate.subset import Subset, drawn, extrapolated, grown, with_safety


def first_subset(problem: Problem, before: Subset | None) -> Subset:
    """A first subset for the border pixels, ``before`` in it."""
    images = _first_images(problem)
    if before is not None and len(before) >= images:
        return before
    return drawn(problem, images, before, border_only=True)


def border_estimate(problem: Problem, subset: Subset) -> Estimate:
    """The border pixels from a subset."""
    return with_safety(extrapolated(problem, None, subset), subset, len(problem.order))


def estimate_to(aim: float, problem: Problem, subset: Subset, start: Estimate) -> Estimate:
    """The border pixels from growing subsets of the images, in the end all of them.

    Args:
        aim: expected error of the border pixels.
        problem: of which image.
        subset: a first subset.
        start: the estimate from it.
    """
    border, estimate = ~problem.interior, start
    while estimate.error(border) > max(aim, 0.0):
        larger = allotments(problem, subset, estimate)
        sizes = np.broadcast_to(subset.sizes, border.shape).copy()
        sizes[border] = larger.sizes[larger.cheapest(BORDER_MARGIN * aim)]
        subset = grown(problem, subset, sizes)
        estimate = border_estimate(problem, subset)
    return estimate


def allotments(problem: Problem, subset: Subset, estimate: Estimate) -> Allotments:
    """Larger subsets for the border pixels, from what there is."""
    border, image_cost = ~problem.interior, problem.costs.border_image
    sizes = np.broadcast_to(subset.sizes, border.shape)[border]
    errors = estimate.errors()[border]
    if not image_cost:  # the kernel serves all border pixels alike
        errors = np.full_like(errors, errors.mean())
    first, total = _first_images(problem), len(problem.order)
    return subset_allotments(errors, sizes, first, total, BORDER_POWER, image_cost)


def image_cost(problem: Problem) -> float:
    """What an image costs a border pixel, in images of the exact kernel for an interior pixel."""
    _, _, height, width = problem.query.x.shape
    reach = problem.query.patch_size - 1
    inside = (height - reach) * (width - reach)
    edges = reach * ((height - reach) ** 2 + (width - reach) ** 2) + reach**2
    pairs = edges / (height * width - inside)
    return problem.costs.border_pair * pairs / inside


def _first_images(problem: Problem) -> int:
    """Images of the first subset for the border pixels."""
    if not problem.costs.border_image:
        return PILOT_IMAGES
    return max(PILOT_IMAGES, min(BORDER_IMAGES, len(problem.order) // 8))
