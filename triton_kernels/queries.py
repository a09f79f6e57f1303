"""Queries as the kernels take them: scaled so that a squared difference is a logit to base 2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_LOG2E = 1.0 / math.log(2.0)
_MIDDLE = 127.5  # clean value -1 is byte 0, +1 is byte 255


@dataclass(frozen=True, eq=False)
class Queries:
    """Noisy images, scaled; float64, on the device that computes.

    With ``scale = sqrt(log2(e) / 2) / sigma`` and v the byte of a clean pixel,
    ``(x - slope * v)^2`` is the pixel's share of minus the logit to base 2.

    Attributes:
        x: ``scale * (x + alpha)``, ``[B, C, H * W]``.
        slope: ``scale * alpha / 127.5``, ``[B]``.
        bias: what a pixel's distance is counted from, ``[B]``; see :mod:`.primitives`.
        size: root-mean-square of ``x``, ``[B]``: by it a float32 is rounded.
    """

    x: Tensor
    slope: Tensor
    bias: Tensor
    size: Tensor

    @classmethod
    def of(cls, x: Tensor, alpha: Tensor, sigma: Tensor) -> Self:
        """Scale a batch.

        Args:
            x: noisy images ``[B, C, H, W]``.
            alpha: signal scale, float64 ``[B]``, on any device.
            sigma: noise standard deviation, likewise.
        """
        scale = (math.sqrt(0.5 * _LOG2E) / sigma).to(x.device)
        alpha = alpha.to(x.device)
        flat = x.to(torch.float64).contiguous().flatten(2)
        power = (scale[:, None, None] * flat).square().sum(1).mean(1)
        # What noise adds to a pixel's distance, or all of it where the noise is far above x.
        bias = power.clamp(max=0.5 * _LOG2E * x.shape[1])
        scaled = scale[:, None, None] * (flat + alpha[:, None, None])
        return cls(
            x=scaled,
            slope=scale * alpha / _MIDDLE,
            bias=bias.to(torch.float32).to(torch.float64),
            size=scaled.square().mean((1, 2)).sqrt(),
        )

    def rows(self, which: Tensor | slice) -> Self:
        """Some of the queries."""
        return type(self)(self.x[which], self.slope[which], self.bias[which], self.size[which])

    def arguments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``x`` and ``scales`` (slope, bias) of the kernels, in float32 or float64."""
        scales = torch.stack([self.slope, self.bias], dim=1)
        return self.x.to(dtype).contiguous(), scales.to(dtype).contiguous()

    def distance_error(self, biased: Tensor, terms: Tensor) -> Tensor:
        """Root-mean-square error of float32 kernels' distances, to base 2, ``[B, H * W]``.

        Two float16 hold 22 bits of what is summed, and ``x`` is rounded to 24, which shows in
        proportion to a difference and, at little noise, in its square. In interpreted runs
        (C = 1, 3; P = 1 to 9; sigma = 0.02 to 4) errors were 0.15 to 1 of this; tensor cores cut
        their sums where the interpreter rounds them, for which the first term leaves room.

        Args:
            biased: distances less ``bias * terms``, ``[B, H * W]``.
            terms: pixels of a window, ``[H * W]``.
        """
        bias = self.bias[:, None]
        rounded_x = self._rounding[:, None]
        distance = (biased + bias * terms).clamp(min=0)
        rounded_sums = biased.abs() + terms.sqrt() * bias
        rounded_squares = rounded_x * distance.sqrt() + self.x.shape[1] * terms * rounded_x**2
        return 2.0**-22 * rounded_sums + rounded_squares

    @property
    def least_error(self) -> Tensor:
        """What :meth:`distance_error` is at least, for any distance and any window, ``[B]``."""
        return 2.0**-22 * self.bias + self.x.shape[1] * self._rounding**2

    @property
    def _rounding(self) -> Tensor:
        """Root-mean-square error of a difference of ``x`` and a training pixel, ``[B]``."""
        return 2.0**-24 * 1.5 * self.size
