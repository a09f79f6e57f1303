"""Patch sizes by noise: tables that were calibrated on trained networks, and a user's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import numpy as np

from els.engine.schedule import Cosine, Schedule, require

TABLE_LEVELS = 20
"""Noise levels of the calibrated tables: size i of 1..20 belongs to t = i / 20."""

_EQUALLY_NEAR = 1e-4


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split())


PATCH_SIZES: dict[str, tuple[int, ...]] = {
    "cifar10-resnet-zeros": _sizes("3 3 3 3 5 5 5 7 7 7 7 9 9 11 11 13 15 17 17 17"),
    "cifar10-resnet-circular": _sizes("3 3 3 3 5 5 5 5 7 7 7 9 9 11 11 13 13 15 15 15"),
    "cifar10-unet-zeros": _sizes("3 3 3 3 5 5 5 5 7 7 7 7 9 9 11 13 13 15 17 25"),
    "celeba-resnet-zeros": _sizes("3 3 3 5 5 5 5 5 7 7 9 9 9 11 11 11 13 15 19 19"),
    "fashion-mnist-resnet-zeros": _sizes("3 3 5 5 7 7 9 9 9 11 11 11 13 13 13 15 15 15 17 17"),
    "fashion-mnist-unet-zeros": _sizes("3 3 5 5 7 7 7 9 11 11 11 13 15 15 21 23 25 25 25 25"),
    "mnist-resnet-zeros": _sizes("3 3 5 5 5 7 7 7 9 9 11 11 11 11 13 15 15 15 15 15"),
    "mnist-resnet-circular": _sizes("3 3 5 5 5 7 7 9 9 9 11 11 11 11 9 9 7 7 3 3"),
    "mnist-unet-zeros": _sizes("3 3 3 5 5 7 7 7 9 9 9 11 13 15 17 21 23 23 25 27"),
}
"""The paper's calibrated sizes, named data-network-padding; lowest noise first."""


def patch_sizes_for(sizes: str | int | Sequence[int], steps: int) -> tuple[int, ...]:
    """One patch size per step, **lowest noise first**: entry i - 1 belongs to t = i / steps.

    Args:
        sizes: the name of a calibrated table (``PATCH_SIZES``; a padding may be left off where a
            data set and network have only one), or one size for all steps, or ``steps`` sizes,
            lowest noise first. A table has 20 levels; for another number of steps each step takes
            the size of the level whose t is nearest, the lower noise of two equally near.
        steps: number of sampling steps, >= 1.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for an unknown or ambiguous name, a wrong number of sizes, or a size that is
            even or below 1.
    """
    if isinstance(sizes, str):
        table = _table(sizes)
        return tuple(table[_nearest_level(i, steps) - 1] for i in range(1, steps + 1))
    listed: list[object] = [*sizes] if isinstance(sizes, Sequence) else [sizes] * steps
    checked: list[int] = []
    for size in listed:
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"patch_sizes must be integers, got {size!r}")
        checked.append(int(size))
        require(
            checked[-1] >= 1 and checked[-1] % 2 == 1,
            f"patch_sizes has {size}; a patch has a centre pixel: sizes are odd and at least 1",
        )
    require(
        len(listed) == steps,
        f"patch_sizes has {len(listed)} entries for steps={steps}; give one per step, lowest "
        f"noise first, or a single int, or one of {', '.join(PATCH_SIZES)}",
    )
    return tuple(checked)


def levels_of(sizes: str | int | Sequence[int]) -> int:
    """Number of noise levels of such sizes: 20 for a table, 1 for a single size."""
    if isinstance(sizes, str):
        return TABLE_LEVELS
    return len(sizes) if isinstance(sizes, Sequence) else 1


@final
@dataclass(frozen=True)
class SizesByNoise:
    """Patch sizes for samplers that choose their own noise levels.

    A noise level is its angle ``atan2(sigma, alpha)``, from 0 (clean) to pi/2 (noise): it is the
    same for ``x`` and for any multiple of ``x``, and proportional to t on the paper's schedule. The
    size is that of the calibrated level whose angle is nearest, the lower noise of two that are
    equally near (to 1e-4: samplers round). At t = i / S of the schedule below, these are the sizes
    that :func:`patch_sizes_for` gives.

    Attributes:
        sizes: odd, one per level, lowest noise first: entry i - 1 is calibrated at t = i / S.
        schedule: on which they were calibrated.
    """

    sizes: tuple[int, ...]
    schedule: Schedule = field(default_factory=Cosine)

    @cached_property
    def _angles(self) -> tuple[float, ...]:
        times = [i / len(self.sizes) for i in range(1, len(self.sizes) + 1)]
        return tuple(math.atan2(self.schedule.sigma(t), self.schedule.alpha(t)) for t in times)

    def at(self, alpha: float, sigma: float) -> int:
        """The size to compare in ``x = alpha * x_0 + sigma * eps``; alpha, sigma >= 0."""
        away = [abs(math.atan2(sigma, alpha) - angle) for angle in self._angles]
        nearest = min(away) + _EQUALLY_NEAR
        return next(size for size, far in zip(self.sizes, away, strict=True) if far <= nearest)


def _table(name: str) -> tuple[int, ...]:
    matches = [full for full in PATCH_SIZES if name.lower() in (full, full.rpartition("-")[0])]
    require(
        bool(matches), f"patch_sizes={name!r} is not known; choose one of {', '.join(PATCH_SIZES)}"
    )
    require(len(matches) == 1, f"patch_sizes={name!r} has several paddings: {' or '.join(matches)}")
    return PATCH_SIZES[matches[0]]


def _nearest_level(i: int, steps: int) -> int:
    """The level 1..20 nearest to t = i / steps, the lower of two, in exact arithmetic."""
    return max(1, -((steps - 2 * TABLE_LEVELS * i) // (2 * steps)))
