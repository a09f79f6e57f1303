"""The cheapest estimate that meets a tolerance (docs/theory.md, auto).

The interior is estimated from a random subset of the images, or from the lists of an index where
they cost less; the border pixels, whose candidates no index holds, from a subset of their own. All
samples grow together until the error meets the tolerance, in the end to everything.
"""

from __future__ import annotations

from collections.abc import Sequence

from els.engine.approximate.costs import (
    FIRST_IMAGES,
    LEAST_GPU_PAIRS,
    LEAST_PAIRS,
    LOADED_IMAGE,
    MARGIN,
)
from els.engine.approximate.estimate import Estimate, Problem
from els.engine.approximate.growth import Part, error, larger_sizes
from els.engine.approximate.lists import ListPart, can_sample, first_cost
from els.engine.approximate.subset import SubsetPart
from els.engine.query import PosteriorQuery


def estimate_to(tolerance: float, problem: Problem) -> Estimate:
    """The cheapest estimate whose expected error is at most the tolerance.

    It begins with a part of the images: :func:`wants_all` says where that cannot pay.

    Args:
        tolerance: mean absolute error of the posterior mean over the pixels.
        problem: of which image.
    """
    aim, lists_cost = MARGIN * tolerance, None
    if can_sample(problem):
        lists_cost = first_cost(problem)
    interior: Part
    # Whether a first subset suffices is not known. At worst lists take L / F times as long as it,
    # and both together (F + L) / L times as long as lists.
    if lists_cost is not None and lists_cost / FIRST_IMAGES <= 1 + FIRST_IMAGES / lists_cost:
        interior = ListPart.first(problem)
    else:
        interior = SubsetPart.first(problem, problem.interior)
    border = _first_border(problem, interior)
    while not _meet(parts := [interior] if border is None else [interior, border], aim):
        sizes = larger_sizes(parts, aim)
        if isinstance(interior, ListPart):
            # Where all codes are read, the rest of the error is that of the codes.
            grow = [
                (larger > part.samples.sizes).any()
                for part, larger in zip(parts, sizes, strict=True)
            ]
            if any(grow) and interior.can_afford(sizes[0]):
                interior = interior.grown(sizes[0])
            else:
                lists_cost, interior = None, SubsetPart.first(problem, problem.interior)
        elif lists_cost is not None and lists_cost < float(sizes[0][0]):
            # Before more than lists cost is spent on a subset, however often it falls short of what
            # was expected of it: together they cost no more than twice the cheaper.
            interior = ListPart.first(problem)
        else:
            interior = interior.grown(sizes[0])
        if border is None:
            continue
        if isinstance(interior, SubsetPart):
            border = border.joined(interior)
        # What serves the interior serves the border, too, so that its own images come last; beside
        # lists that have just been read, it may err enough.
        both_read_lists = isinstance(interior, ListPart) and isinstance(parts[0], ListPart)
        if interior is parts[0] or both_read_lists:
            border = border.grown(sizes[1])
    return _together(problem, interior, border)


def _meet(parts: Sequence[Part], aim: float) -> bool:
    """Whether the error is met, and lists have read something for every pixel."""
    is_known = all(
        part.estimate.is_known(part.pixels) for part in parts if isinstance(part, ListPart)
    )
    return is_known and error(parts) <= aim


def _together(problem: Problem, interior: Part, border: SubsetPart | None) -> Estimate:
    """Interior and border as one, with the work of both."""
    total = len(problem.order)
    if border is None:
        return interior.estimate.with_work(interior.work / total)
    inside = int(problem.interior.sum()) * problem.query.pairs_per_image
    all_pairs = inside + problem.border_pairs
    work = (inside * interior.work + problem.border_pairs * border.work) / all_pairs / total
    if interior.estimate.is_exact:
        estimate = border.estimate.with_others(border.pixels, interior.estimate)
    else:
        estimate = interior.estimate.with_others(interior.pixels, border.estimate)
    images = max(part.estimate.uncertainty.images for part in (interior, border))
    return estimate.with_work(work, images)


def wants_all(query: PosteriorQuery, images: int) -> bool:
    """Whether an image's posterior is computed at once, from all of so many images.

    IS and ES read and transform an image once for a whole batch, of which estimates would save
    nothing.
    """
    if not query.kind.is_local:
        return True
    least = LEAST_GPU_PAIRS if query.x.is_cuda else LEAST_PAIRS
    return is_little(images, query.x[0, 0].numel(), query.pairs_per_image, least)


def is_little(images: int, pixels: int, candidates: int, least: float = LEAST_PAIRS) -> bool:
    """Whether everything takes so little time that it is computed at once.

    Args:
        images: whose patches are candidates.
        pixels: of an image.
        candidates: of a pixel in each of them.
        least: pairs from which on a part is tried, by default on a CPU.
    """
    # A pixel near a border has fewer candidates, of which each costs more.
    pairs = images * pixels * (candidates + LOADED_IMAGE)
    return images <= 2 * FIRST_IMAGES or pairs < least


def _first_border(problem: Problem, interior: Part) -> SubsetPart | None:
    """The border pixels, from the interior's subset if it has one; None where there are none."""
    if not problem.has_border:
        return None
    if isinstance(interior, SubsetPart):
        return SubsetPart(problem, ~problem.interior, interior.subset, interior.estimate)
    return SubsetPart.first(problem, ~problem.interior)
