"""Random subsets of the images: sums in groups, their spread, and how large subsets must be.

What a subset says of everything is as wrong as the means without each of its groups in turn spread
(the jackknife), also where one group holds most of the mass. Pixels need not share one subset: the
first so many images of one random order are a subset of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from els.engine.state import PosteriorState

Members = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]

# Groups of images whose spread is the error.
GROUPS = 16
# Prices that are tried for an error, each so many times the one before.
_PRICES, _PRICE_STEP = 24, 0.5
# A subset that would be so large a part of the images may as well be all of them.
_NEARLY_ALL = 2 / 3


@final
@dataclass(frozen=True, eq=False)
class Groups:
    """States of groups of images, float64 ``[G, H, W]``, centres ``[G, C, H, W]``."""

    maximum: Array
    mass: Array
    centre: Array
    tilt: Array

    @classmethod
    def of(cls, states: Sequence[PosteriorState]) -> Groups:
        """Of states on the CPU with tilt, each of one query."""
        tilts = [state.tilt for state in states if state.tilt is not None]
        return cls(
            np.concatenate([state.maximum.numpy() for state in states]),
            np.concatenate([state.mass.numpy() for state in states]),
            np.concatenate([state.centre.numpy() for state in states]),
            np.concatenate([tilt.numpy() for tilt in tilts]),
        )

    def on(self, reference: Array) -> Groups:
        """The same relative to other logits, ``[H, W]`` or ``[G, H, W]``."""
        with np.errstate(invalid="ignore"):  # groups of none have -inf
            shift = np.where(np.isneginf(self.maximum), 0.0, self.maximum - reference)
        scale = np.exp(shift)
        return Groups(
            np.broadcast_to(reference, self.maximum.shape),
            scale * self.mass,
            scale[:, None] * self.centre,
            scale * (self.tilt + shift * self.mass),
        )

    def first(self) -> Groups:
        """The first group alone."""
        return Groups(self.maximum[:1], self.mass[:1], self.centre[:1], self.tilt[:1])

    def where(self, condition: npt.NDArray[np.bool_]) -> Groups:
        """The same, but of no candidates where the condition ``[G, H, W]`` does not hold."""
        return Groups(
            np.where(condition, self.maximum, -np.inf),
            np.where(condition, self.mass, 0.0),
            np.where(condition[:, None], self.centre, 0.0),
            np.where(condition, self.tilt, 0.0),
        )

    def merged(self, other: Groups, where: npt.NDArray[np.bool_]) -> Groups:
        """Group by group, with the states of other images, at some pixels, ``[H, W]``."""
        reference = np.maximum(self.maximum, other.maximum)
        ours, theirs = self.on(reference), other.on(reference)
        return Groups(
            np.where(where, reference, self.maximum),
            np.where(where, ours.mass + theirs.mass, self.mass),
            np.where(where, ours.centre + theirs.centre, self.centre),
            np.where(where, ours.tilt + theirs.tilt, self.tilt),
        )


@final
@dataclass(frozen=True, eq=False)
class Tail:
    """A subset of the images in groups, or one for each pixel.

    Attributes:
        groups: their states.
        sizes: images of each pixel, float64 ``[1, 1]``, or ``[H, W]`` where pixels differ.
        group_of: group of each image of the database, -1 for none; None where pixels differ.
    """

    groups: Groups
    sizes: Array
    group_of: Members | None

    def __len__(self) -> int:
        return int(self.sizes.max())


def counts_of(sizes: Array) -> Array:
    """How many of the first so many images are in each group, ``[G, H, W]`` for ``[H, W]``."""
    groups = np.arange(GROUPS).reshape(-1, 1, 1)
    counts: Array = np.ceil((sizes - groups) / GROUPS)
    return counts


def sums_without_each(values: Array) -> Array:
    """Sums over all groups but one, for each of them: not differences, which may cancel."""
    sums = np.zeros_like(values)
    sums[1:] = np.cumsum(values[:-1], axis=0)
    sums[:-1] += np.cumsum(values[:0:-1], axis=0)[::-1]
    return sums


@final
@dataclass(frozen=True, eq=False)
class Allotments:
    """Ways to spend more on some of Q pixels, the cheapest first.

    Attributes:
        sizes: of their samples, ``[L, Q]``.
        errors: to be expected of all pixels on average, ``[L]``.
        costs: likewise, ``[L]``.
    """

    sizes: Array
    errors: Array
    costs: Array

    def cheapest(self, aim: float) -> int:
        """The first that costs anything and is expected to be as good; the last if none is."""
        good = np.flatnonzero((self.errors <= aim) & (self.costs > 0))
        return int(good[0]) if len(good) else len(self.errors) - 1


def subset_allotments(
    error: Array, sizes: Array, first: int, total: int, power: float, passing: float
) -> Allotments:
    """Larger subsets for the pixels that err most; costs are images more.

    An image more is worth the less the more there are, so that the best subsets are those to all
    of which one more is worth the same, but for the largest: an image costs something even if it
    serves a single pixel.

    Args:
        error: of each pixel, ``[Q]``.
        sizes: of their subsets, ``[Q]``.
        first: of which sizes are multiples, by powers of two.
        total: images that there are.
        power: with which errors fall (:func:`images_needed`).
        passing: what an image costs, whatever it serves, to what it costs beside to serve all.
    """
    wanted = _worth_alike(error, sizes, power)
    larger = np.maximum(first * np.exp2(np.rint(np.log2(wanted / first))), sizes)
    largest = first * np.exp2(np.arange(math.ceil(math.log2(total / first)) + 1))
    larger = np.minimum(larger, np.maximum(largest[:, None, None], sizes)).reshape(-1, len(sizes))
    larger = np.where(larger > _NEARLY_ALL * total, total, larger)
    larger = np.concatenate([larger, np.full((1, len(sizes)), total)])
    left = np.maximum(1 / sizes - 1 / total, 1e-30)
    errors = (error * np.power((1 / larger - 1 / total) / left, power)).mean(1)
    grown = larger > sizes
    images = np.where(grown, larger, 0.0).max(1) - np.where(grown, sizes, total).min(1)
    costs = (larger - sizes).mean(1) + passing * np.maximum(images, 0.0)
    # Those that are no worse than all that cost less.
    order = np.argsort(costs, kind="stable")
    least = np.minimum.accumulate(errors[order])
    order = order[np.concatenate([[True], errors[order][1:] < least[:-1]])]
    return Allotments(larger[order], errors[order], costs[order])


def share_allotments(
    error: Array, shares: Array, power: float, least: float, most: float, costs: tuple[float, float]
) -> Allotments:
    """Larger shares of lists, up to 1, for the pixels that err most, which are read anew.

    Args:
        error: of each pixel, ``[Q]``.
        shares: that they have read, at most 1, ``[Q]``.
        power: with which errors fall with it.
        least: growth that is worth reading anew.
        most: growth that such an error can tell.
        costs: of reading anew, and of a share of 1.
    """
    ceiling = np.minimum(1 / shares, most)
    growth = np.minimum(_worth_alike(error, shares, power) / shares, ceiling)
    growth = np.where(growth < np.minimum(least, ceiling), 1.0, growth)
    growth = np.concatenate([np.ones((1, len(shares))), growth, ceiling[None]])
    larger = np.where(growth >= 1 / shares, 1.0, shares * growth)
    each = np.where(larger > shares, costs[0] + costs[1] * larger, 0.0)
    return Allotments(larger, (error * growth**-power).mean(1), each.mean(1))


def _worth_alike(error: Array, sizes: Array, power: float) -> Array:
    """For each price of an error, the sizes at which it is worth to grow no more, ``[L, Q]``."""
    worth = error / sizes
    prices = float(worth.max()) * _PRICE_STEP ** np.arange(_PRICES)
    ratio = np.maximum(worth / np.maximum(prices, 1e-300)[:, None], 1.0)
    wanted: Array = sizes * np.power(ratio, 1 / (1 + power))
    return wanted


def images_needed(error: float, aim: float, images: int, total: int, power: float) -> int:
    """The size of a subset that has the error aimed at, from that of another.

    Errors are taken to fall as ``(1 / n - 1 / N) ** power``: power 1 / 2 for means of many alike.
    """
    inverse = math.pow(aim / error, 1 / power) * (1 / images - 1 / total) + 1 / total
    return math.ceil(1 / inverse)


def stratified(
    members: Members, labels: npt.NDArray[np.int64] | None, rng: np.random.Generator
) -> Members:
    """The members in a random order of which every beginning has its share of every class."""
    shuffled = rng.permutation(members)
    if labels is None:
        return shuffled
    classes = np.asarray(labels[shuffled])
    # Small integers are sorted by their digits, which is much faster.
    if len(classes) and classes.min() >= 0 and classes.max() < 1 << 15:
        classes = classes.astype(np.int16)
    by_class = np.argsort(classes, kind="stable")
    _, starts, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
    rank = np.empty(len(members))
    rank[by_class] = np.arange(len(members)) - np.repeat(starts, counts)
    size = np.empty(len(members))
    size[by_class] = np.repeat(counts, counts)
    return shuffled[np.argsort((rank + rng.random(len(members))) / size)]
