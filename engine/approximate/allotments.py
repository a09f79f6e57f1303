"""How work is allotted to pixels: larger samples for those whose errors are largest.

The sum of all pixels' errors is least for given work where the fall of the error per unit of work,
its price, is the same for every pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from els.engine.approximate.costs import NEARLY_ALL, PRICE_STEP, PRICES
from els.engine.approximate.estimate import Array


@final
@dataclass(frozen=True, eq=False)
class Allotments:
    """Alternatives of larger samples for some of Q pixels, the cheapest first.

    Attributes:
        sizes: of their samples, ``[L, Q]``.
        errors: to be expected of all pixels on average, ``[L]``.
        costs: likewise, ``[L]``.
    """

    sizes: Array
    errors: Array
    costs: Array

    def cheapest(self, aim: float) -> int:
        """The first at some cost whose expected error is at most ``aim``; the last if none is."""
        good = np.flatnonzero((self.errors <= aim) & (self.costs > 0))
        return int(good[0]) if len(good) else len(self.errors) - 1


def subset_allotments(
    error: Array, sizes: Array, first: int, total: int, power: float, image_cost: float
) -> Allotments:
    """Larger subsets for the pixels that err most; costs are images more.

    The largest subset is limited, too: an image costs something even if it serves a single pixel.

    Args:
        error: of each pixel, ``[Q]``.
        sizes: of their subsets, ``[Q]``.
        first: of which sizes are multiples, by powers of two.
        total: images that there are.
        power: with which errors fall (:func:`images_needed`).
        image_cost: what an image costs, whatever it serves, to what it costs beside to serve all.
    """
    wanted = _worth_alike(error, sizes, power)
    larger = np.maximum(first * np.exp2(np.rint(np.log2(wanted / first))), sizes)
    largest = first * np.exp2(np.arange(math.ceil(math.log2(total / first)) + 1))
    larger = np.minimum(larger, np.maximum(largest[:, None, None], sizes)).reshape(-1, len(sizes))
    larger = np.where(larger > NEARLY_ALL * total, total, larger)
    larger = np.concatenate([larger, np.full((1, len(sizes)), total)])
    left = np.maximum(1 / sizes - 1 / total, 1e-30)
    errors = (error * np.power((1 / larger - 1 / total) / left, power)).mean(1)
    grown = larger > sizes
    images = np.where(grown, larger, 0.0).max(1) - np.where(grown, sizes, total).min(1)
    costs = (larger - sizes).mean(1) + image_cost * np.maximum(images, 0.0)
    # Only those whose error is below that of all cheaper ones.
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
    """For each price of an error, the sizes beyond which growing costs more, ``[L, Q]``."""
    worth = error / sizes
    prices = float(worth.max()) * PRICE_STEP ** np.arange(PRICES)
    ratio = np.maximum(worth / np.maximum(prices, 1e-300)[:, None], 1.0)
    wanted: Array = sizes * np.power(ratio, 1 / (1 + power))
    return wanted


def images_needed(error: float, aim: float, images: int, total: int, power: float) -> int:
    """The size of a subset that has the error aimed at, from that of another.

    Errors are taken to fall as ``(1 / n - 1 / N) ** power``: power 1 / 2 for means of many alike.
    """
    inverse = math.pow(aim / error, 1 / power) * (1 / images - 1 / total) + 1 / total
    return math.ceil(1 / inverse)
