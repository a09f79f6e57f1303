"""The query rows that keys of :mod:`.bank` are multiplied with, in float16 parts or in float64.

A row's coordinates are ``u = 127.5 x / alpha - 0.5`` (x in the units of bytes, less 128), cut into
the nearest whole numbers and one or two float16 *fractions*. Products of whole parts are whole
numbers: their sums are exact. The row's constant is the whole number that brings the scores of
candidates that matter near zero, so that adding the fractions rounds little: at first of those at
the distance that true noise makes. Rows of large u (alpha near 0) are scaled by a power of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from els.triton_kernels.bank import CONSTANT, HIGH, NORM_BASE
from els.triton_kernels.pixel_groups import Layout, PixelGroups

_LOG2E = 1 / math.log(2.0)
# Bytes for each unit of a clean pixel, and the byte of the pixel 0.
_BYTES_PER_UNIT = 127.5
# Largest error of a logit to base 2.
MOST_ERROR = 3e-5
# What the parts' rounding may make of it for candidates at the distance that true noise makes: the
# nearest ones of a real query are up to twice as far.
_USUAL_ERROR = 0.5 * MOST_ERROR
# Largest coordinate of a row: float16 holds whole numbers up to it.
_LARGEST = 2048.0
# Root-mean-square rounding of a number up to 0.5 to float16.
_HALF_ROUNDING = 2.0**-12 / math.sqrt(12)
# Rounding of a sum in float32 by a matrix unit, which may cut what a processor would round.
_SUM_ROUNDING = 2.0**-23
# Logits to base 2 by which candidates that matter differ: an emulated matrix unit errs less than
# what this makes of it (tests/triton_kernels/test_rows.py).
_HEAVY_LOGITS = 4.0
# Products that a matrix unit adds at once, at least.
AT_ONCE = 8
# Largest of a key's coordinates.
_LARGEST_BYTE = 128.0
# Logits up to this are known to a bit, or so, in float32.
_MOST_LOGIT = 2.0**22
# Whole numbers up to this are exact in float32.
_EXACT = 2.0**24


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of G groups, M each, as the kernels read them.

    Attributes:
        coordinates: float16 ``[parts, G, M, K]``; or, for distances in float64, ``[G, M, D]``.
        slopes: what a score is multiplied with to be a logit to base 2, float32 ``[G, M]``; or what
            a byte of a key is multiplied with, float64.
        constant: what is added to it then, float64 ``[G, M]``.
        images: whose row it is, int64 ``[G, M]``.
        pixels: likewise.
        fractions: root-mean-square of the fractions' sums, in units of scores, float64 ``[G, M]``;
            None for rows in float64.
        power: of two, which a coordinate is multiplied with, likewise.
        steps: how many times the sum of the fractions is rounded.
        is_one_sum: whether it goes on from that of the whole parts.
    """

    coordinates: Tensor
    slopes: Tensor
    constant: Tensor
    images: Tensor
    pixels: Tensor
    fractions: Tensor | None = None
    power: Tensor | None = None
    steps: float = 1.0
    is_one_sum: bool = False

    @property
    def parts(self) -> int:
        """Float16 parts of a row; 0 for float64."""
        return 0 if self.fractions is None else len(self.coordinates)

    @property
    def are_held(self) -> bool:
        """Whether float16 holds all of them; always in float64."""
        return self.fractions is None or not bool(self.fractions.isnan().any())

    def scores(self, logits: Tensor) -> Tensor:
        """Scores of logits to base 2, ``[..., G, M]``, float64; logits themselves with no parts."""
        return logits if self.parts == 0 else (logits - self.constant) / self.slopes

    def logits(self, scores: Tensor) -> Tensor:
        """Logits to base 2 of scores ``[..., G, M]``, float64."""
        scores = scores.to(torch.float64)
        return scores if self.parts == 0 else self.slopes * scores + self.constant

    def centred(self, logits: Tensor, layout: Layout) -> Rows:
        """The same rows with constants that bring candidates of given logits near the score zero.

        Args:
            logits: to base 2, float64 ``[G, M]``; rows whose logit is not finite stay.
            layout: of the rows, of one segment.
        """
        scores = self.scores(logits)
        shift = torch.where(scores.isfinite(), scores, 0.0).round()
        place = layout.segment + HIGH.value
        before = self.coordinates[0, ..., place : place + 2].to(torch.float64)
        before = CONSTANT.value * before[..., 0] + before[..., 1]
        digits, after = _digits(before - shift)
        coordinates = self.coordinates.clone()
        coordinates[0, ..., place : place + 2] = digits.to(torch.float16)
        constant = self.constant - self.slopes * (after - before)
        return replace(self, coordinates=coordinates, constant=constant)

    def errors(self, scores: Tensor) -> Tensor:
        """Root-mean-square errors of the logits of scores, ``[..., G, M]``, in float64.

        Of differences of the logits of candidates as near as that, in units of log2. Not a number
        where the score is not known at all.
        """
        scores = scores.to(torch.float64)
        if self.fractions is None or self.power is None:
            return torch.zeros_like(scores)
        slopes = self.slopes.to(torch.float64)
        # Two patches as far from the noisy one are sqrt(2) times as far from each other.
        apart = (-2 * self.logits(scores) / slopes).clamp(min=0).mul(2).sqrt()
        each = _SUM_ROUNDING * math.sqrt(self.steps)
        of_score = each if self.is_one_sum else _SUM_ROUNDING
        # Others that matter may have larger scores than the nearest, where its own is near zero.
        largest = torch.maximum(scores.abs(), _HEAVY_LOGITS / slopes)
        sums = each * self.fractions + of_score * largest
        # A coordinate's rounding is that of its last part; distances of scores are shrunk by the
        # power's root.
        rounding = _HALF_ROUNDING * (1.0 if self.parts == 2 else 2.0**-12) / self.power.sqrt()
        return slopes * (sums + rounding * apart)


def parts_needed(coordinates: int, alpha: Tensor, sigma: Tensor) -> Tensor:
    """In how many float16 parts rows must be cut, 2 or 3, int64 like ``alpha``.

    So that most pixels of a noisy image err by less than :data:`MOST_ERROR`.

    Args:
        coordinates: D.
        alpha: signal scale, any shape.
        sigma: noise standard deviation, likewise.
    """
    slope = _LOG2E * (alpha / (_BYTES_PER_UNIT * sigma)).square()
    apart = math.sqrt(2 * coordinates) * _BYTES_PER_UNIT * sigma / alpha
    return torch.where(slope * _HALF_ROUNDING * apart > _USUAL_ERROR, 3, 2)


def rows_of(
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    groups: PixelGroups,
    which: Tensor,
    parts: int,
    *,
    are_added: bool = False,
) -> Rows:
    """Rows of some pixels of a batch.

    Args:
        x: noisy images, float64 ``[B, C, H, W]``.
        alpha: signal scale, float64 ``[B]``, on the device of ``x``.
        sigma: noise standard deviation, likewise.
        groups: of pixels, likewise.
        which: the rows of each group, ``image * R + r`` for its r-th pixel, int64 ``[G, M]``.
        parts: float16 parts, 2 or 3; 0 for float64.
        are_added: whether scores of the m-th rows of all groups are added. Such rows have the same
            power, and float16 holds all of them or none.
    """
    length, layout = groups.queries.shape[1], groups.query_layout
    # Kernels read plain rows, and what follows has the strides of ``which``.
    which = which.contiguous()
    images, places = which // length, which % length
    group = torch.arange(len(which), device=which.device).unsqueeze(1)
    pixels, windows = groups.queries[group, places], groups.query_windows[group, places]
    addresses = windows.to(torch.int64)
    is_inside = addresses >= 0
    flat = x.flatten(2).movedim(1, 2)
    flat = torch.nn.functional.pad(flat, (0, 4 - x.shape[1])).flatten(1)
    values = flat[images.unsqueeze(-1), addresses.clamp(min=0)]
    alpha, sigma = alpha[images], sigma[images]
    if parts == 0:
        scale = math.sqrt(0.5 * _LOG2E) / sigma
        # Keys are 0 at the byte 128, which is half a byte above the pixel 0.
        middle = (0.5 / _BYTES_PER_UNIT) * alpha.unsqueeze(-1)
        scaled = torch.where(is_inside, scale.unsqueeze(-1) * (values - middle), 0.0)
        return Rows(
            scaled, scale * alpha / _BYTES_PER_UNIT, torch.zeros_like(scale), images, pixels
        )
    bytes_of_x = torch.where(is_inside, _BYTES_PER_UNIT * values / alpha.unsqueeze(-1) - 0.5, 0.0)
    slopes = _LOG2E * (alpha / (_BYTES_PER_UNIT * sigma)).square()
    farthest = (bytes_of_x.square() + _LARGEST_BYTE**2).sum(-1)
    largest = bytes_of_x.abs().amax(-1)
    if are_added:
        farthest, largest = (each.amax(0).expand_as(each) for each in (farthest, largest))
    # Rows that float16 does not hold become zeros, of which nothing is known.
    is_held = (slopes * farthest < _MOST_LOGIT) & (slopes > torch.finfo(torch.float32).tiny)
    slopes = torch.where(is_held, slopes, 1.0)
    bytes_of_x = torch.where(is_held.unsqueeze(-1), bytes_of_x, 0.0)
    power = torch.exp2(-(largest.where(is_held, 1.0) / _LARGEST).log2().ceil().clamp(min=0))
    scale = power.unsqueeze(-1)
    scaled = scale * bytes_of_x
    halves = [scaled.round().to(torch.float16)]
    for _ in range(1, parts):
        halves.append((scaled - sum(halves, torch.zeros_like(scaled))).to(torch.float16))

    # Half the squared norm, and what of it true noise makes, in units of scores.
    stored = sum(halves, torch.zeros_like(scaled))
    norm = 0.5 * layout.cut(stored.square()).sum(-1) / scale
    noise = torch.where(is_held, (_BYTES_PER_UNIT * sigma / alpha).square(), 0.0).unsqueeze(-1)
    noise = 0.5 * scale * noise * layout.cut(is_inside.to(torch.float64)).sum(-1)
    digits, constant = _digits((torch.minimum(norm, noise) - norm).round())
    unit, nothing = scale.expand_as(norm), torch.zeros_like(norm)
    norms = [-unit, -NORM_BASE.value * unit]
    extras = [torch.stack([*norms, *digits.unbind(-1), nothing], dim=-1)]
    # Sums of whole parts stay whole numbers without the norm's last bit, a half.
    extras.append(torch.stack([*[nothing] * 4, -0.5 * unit], dim=-1))
    extras += [torch.zeros_like(extras[0])] * (parts - 2)
    coordinates = torch.stack(
        [
            layout.arranged(half, extra.to(torch.float16))
            for half, extra in zip(halves, extras, strict=True)
        ]
    )
    slopes = (slopes / power).to(torch.float32)
    # Sums of whole parts, near zero after each segment, are multiples of the power. Where they are
    # not exact, they round too.
    bound = _LARGEST_BYTE * layout.cut(halves[0].to(torch.float64).abs()).sum(-1).amax(-1)
    inexact = torch.where(bound > _EXACT * power, bound, 0.0) / 2
    fractions = _LARGEST_BYTE * halves[1].to(torch.float64).square().sum(-1).sqrt() + inexact
    return Rows(
        coordinates,
        slopes,
        -slopes * (constant.sum(-1) + norm.sum(-1)),
        images,
        pixels,
        fractions=torch.where(is_held, fractions, torch.nan),
        is_one_sum=layout.segments == 1,
        steps=(parts - 1) * layout.columns / AT_ONCE,
        power=power,
    )


def _digits(constant: Tensor) -> tuple[Tensor, Tensor]:
    """A whole number as what a key's constants are multiplied with, ``[..., 2]``, and their sum.

    Float16 holds both digits; what is beyond them is left away.
    """
    low = (constant + CONSTANT.value // 2).remainder(CONSTANT.value) - CONSTANT.value // 2
    high = ((constant - low) / CONSTANT.value).clamp(-_LARGEST, _LARGEST)
    return torch.stack([high, low], dim=-1), CONSTANT.value * high + low
