"""How samples grow: most where errors fall most for the work (docs/theory.md, auto)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Protocol, final

import numpy as np

from els.engine.approximate.costs import LARGEST_GROWTH, LARGEST_SHARE, LEAST_GROWTH
from els.engine.approximate.estimate import Array, Estimate, Mask

# Halvings of the interval in which the level of all samples is sought.
_HALVINGS = 60


@final
@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of candidates, of a pixel or shared by many; float64 ``[U]`` each.

    Attributes:
        pixels: that share it.
        errors: expected of one of them.
        sizes: in images, or shares of what there is.
        costs: of a unit of size for one pixel, in images of the exact kernel.
        most: the largest size.
        population: size at which nothing is left out; inf where the sample never tells everything.
    """

    pixels: Array
    errors: Array
    sizes: Array
    costs: Array
    most: Array
    population: Array


class Part(Protocol):
    """Some pixels of an image that are estimated in one way, from samples that can grow."""

    @property
    def pixels(self) -> Mask:
        """Which, ``[H, W]``."""

    @property
    def estimate(self) -> Estimate:
        """What is known of them; of others nothing."""

    @property
    def samples(self) -> Samples:
        """From what."""

    @property
    def work(self) -> float:
        """Images of the exact kernel that all of it cost."""

    def grown(self, sizes: Array) -> Part:
        """The same from samples of other sizes, ``[U]``, none smaller."""


def error(parts: Sequence[Part]) -> float:
    """The expected error of the mean, averaged over all pixels."""
    return sum(part.estimate.error(part.pixels) * float(part.pixels.mean()) for part in parts)


def larger_sizes(parts: Sequence[Part], aim: float) -> list[Array]:
    """Sizes of all samples that have the error aimed at for the least work, or are the next step.

    Errors are taken to fall as those of means of independent draws, with the square root of the
    size. The work is least where ``e(n') / (n' c)`` is the same for all samples that grow, so that
    ``n' ~ (e sqrt(n) / c)^(2/3)``. None grows by less than what another step is worth, and none
    beyond what its error can tell, unless even this leads to everything.

    Args:
        parts: whose error is larger than the aim.
        aim: error of the mean over all pixels.
    """
    each = [part.samples for part in parts]
    joined = Samples(*(np.concatenate([getattr(s, f.name) for s in each]) for f in fields(Samples)))
    sizes, most = joined.sizes, joined.most
    scale = np.power(joined.errors * np.sqrt(sizes) / joined.costs, 2 / 3)
    left = np.maximum(1 / sizes - 1 / joined.population, 1e-300)
    shares = joined.pixels / joined.pixels.sum()

    def at(level: float) -> Array:
        wanted = np.clip(level * scale, sizes, most)
        wanted = np.where(wanted < np.minimum(LEAST_GROWTH * sizes, most), sizes, wanted)
        is_all = (wanted > LARGEST_SHARE * most) & np.isfinite(joined.population)
        larger: Array = np.where(is_all, most, wanted)
        return larger

    def misses(level: float) -> bool:
        falls = np.sqrt(np.maximum(1 / at(level) - 1 / joined.population, 0.0) / left)
        return float((shares * joined.errors * falls).sum()) > aim

    worth = scale > 0
    low = float((sizes[worth] / scale[worth]).min())
    high = float((most[worth] / scale[worth]).max()) * LEAST_GROWTH
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if misses(middle) else (low, middle)
    wanted = at(high)
    is_step = (wanted < most) | np.isinf(joined.population)
    larger = np.where(is_step, np.minimum(wanted, LARGEST_GROWTH * sizes), wanted)
    ends = np.cumsum([0, *(len(s.sizes) for s in each)])
    return [larger[first:last] for first, last in pairwise(ends)]
