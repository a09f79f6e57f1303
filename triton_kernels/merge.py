"""The merge of partial states of tiles, per query pixel, in float64.

The rule is that of ``els.engine.state.merge``; here it takes the states of all pairs of a
pixel, which lie scattered over tiles and splits, in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from els.triton_kernels.configurations import FP_FUSION
from els.triton_kernels.primitives import LOWEST_FLOAT64
from els.triton_kernels.tiles import DevicePlan


class Totals(NamedTuple):
    """States of queries, float64, to base 2; distances may be biased.

    Attributes:
        reference: the largest logit, ``[B, H * W]``.
        mass: ``sum 2^(logit - reference)``, ``[B, H * W]``.
        centre: ``sum 2^(logit - reference) * v``, v the bytes of the centre pixels,
            ``[B, C, H * W]``.
        logit_sum: ``sum 2^(logit - reference) * (logit - reference)``, ``[B, H * W]``, or None.
    """

    reference: Tensor
    mass: Tensor
    centre: Tensor
    logit_sum: Tensor | None

    @classmethod
    def empty(cls, x: Tensor, *, entropy: bool) -> Self:
        """The states of no candidates for queries ``[B, C, H * W]``."""
        zero = torch.zeros_like(x[:, 0], dtype=torch.float64)
        return cls(
            torch.full_like(zero, LOWEST_FLOAT64.value),
            zero,
            torch.zeros_like(x, dtype=torch.float64),
            zero.clone() if entropy else None,
        )

    def of(self, queries: slice) -> Self:
        """Views of some queries."""
        return type(self)(
            self.reference[queries],
            self.mass[queries],
            self.centre[queries],
            None if self.logit_sum is None else self.logit_sum[queries],
        )


@triton.jit(
    do_not_specialize=[
        "splits",
        "tiles",
        "column_tiles",
        "first_row_tile",
        "row_tiles",
        "row_pair_count",
        "column_pair_count",
    ]
)
def merge_kernel(
    partial,  # [B, splits, tiles, fields, ROW_BLOCK * COLUMN_BLOCK]
    row_pairs,  # [H, K]: pairs of a query row, see AxisPlan.pairs_of
    column_pairs,  # [W, K]
    reference,  # [B, H * W], to base 2 and biased
    mass,  # [B, H * W]
    centre,  # [B, C, H * W], sums of bytes
    logit_sum,  # [B, H * W], to base 2
    splits,
    tiles,
    column_tiles,
    first_row_tile,
    row_tiles,
    row_pair_count,
    column_pair_count,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    PIXEL_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Merge a block of pixels; lanes are the pairs of a pixel's column."""
    i_query = tl.program_id(1).to(tl.int64)
    SIZE: tl.constexpr = ROW_BLOCK * COLUMN_BLOCK
    FIELDS: tl.constexpr = 2 + C + (1 if ENTROPY else 0)
    o_pixel = tl.program_id(0) * PIXEL_BLOCK + tl.arange(0, PIXEL_BLOCK)
    m_pixel = o_pixel < PIXELS
    o_lane = tl.arange(0, LANES)[None, :]
    b_column = tl.load(
        column_pairs + (o_pixel % WIDTH)[:, None] * column_pair_count + o_lane,
        mask=m_pixel[:, None] & (o_lane < column_pair_count),
        other=-1,
    )
    m_column = b_column >= 0
    b_column = tl.maximum(b_column, 0)
    o_column = (b_column // COLUMN_BLOCK) * FIELDS * SIZE + b_column % COLUMN_BLOCK

    largest = tl.full([PIXEL_BLOCK, LANES], LOWEST_FLOAT64, tl.float64)
    sum_mass = tl.zeros([PIXEL_BLOCK, LANES], tl.float64)
    sum_logits = tl.zeros([PIXEL_BLOCK, LANES], tl.float64)
    sums = ()
    for c in tl.static_range(C):
        sums = sums + (tl.zeros([PIXEL_BLOCK, LANES], tl.float64),)
    for i in tl.range(0, splits * row_pair_count):
        b_row = tl.load(
            row_pairs + (o_pixel // WIDTH) * row_pair_count + i % row_pair_count,
            mask=m_pixel,
            other=-1,
        )[:, None]
        row_tile = b_row // ROW_BLOCK - first_row_tile
        m_pair = m_column & (b_row >= 0) & (row_tile >= 0) & (row_tile < row_tiles)
        slot = (i_query * splits + i // row_pair_count) * tiles + row_tile * column_tiles
        p_pair = partial + slot * FIELDS * SIZE + (b_row % ROW_BLOCK) * COLUMN_BLOCK + o_column
        found = tl.load(p_pair, mask=m_pair, other=0.0).to(tl.float64)
        found = tl.where(m_pair, found, LOWEST_FLOAT64)
        highest = tl.maximum(largest, found)
        old = tl.exp2(largest - highest)
        new = tl.exp2(found - highest)
        b_mass = tl.load(p_pair + SIZE, mask=m_pair, other=0.0).to(tl.float64)
        if ENTROPY:
            b_logits = tl.load(p_pair + (2 + C) * SIZE, mask=m_pair, other=0.0).to(tl.float64)
            sum_logits = old * (sum_logits + (largest - highest) * sum_mass) + new * (
                b_logits + (found - highest) * b_mass
            )
        sum_mass = old * sum_mass + new * b_mass
        merged = ()
        for c in tl.static_range(C):
            b_sum = tl.load(p_pair + (2 + c) * SIZE, mask=m_pair, other=0.0).to(tl.float64)
            merged = merged + (old * sums[c] + new * b_sum,)
        sums = merged
        largest = highest

    # All lanes together, and with what was there before.
    p_pixel = i_query * PIXELS + o_pixel
    before = tl.load(reference + p_pixel, mask=m_pixel, other=LOWEST_FLOAT64)
    highest = tl.maximum(before, tl.max(largest, 1))
    old = tl.exp2(before - highest)
    new = tl.exp2(largest - highest[:, None])
    old_mass = tl.load(mass + p_pixel, mask=m_pixel, other=0.0)
    if ENTROPY:
        moved = sum_logits + (largest - highest[:, None]) * sum_mass
        old_logits = (
            tl.load(logit_sum + p_pixel, mask=m_pixel, other=0.0) + (before - highest) * old_mass
        )
        tl.store(logit_sum + p_pixel, old * old_logits + tl.sum(new * moved, 1), mask=m_pixel)
    tl.store(mass + p_pixel, old * old_mass + tl.sum(new * sum_mass, 1), mask=m_pixel)
    for c in tl.static_range(C):
        p_sum = centre + (i_query * C + c) * PIXELS + o_pixel
        old_sum = tl.load(p_sum, mask=m_pixel, other=0.0)
        tl.store(p_sum, old * old_sum + tl.sum(new * sums[c], 1), mask=m_pixel)
    tl.store(reference + p_pixel, highest, mask=m_pixel)


def pixel_block(lanes: int, x: Tensor) -> int:
    """Pixels of a program that has so many lanes for each; more where it is interpreted."""
    return max(1, (128 if x.is_cuda else 16384) // lanes)


def merge_partial(
    totals: Totals, partial: Tensor, plan: DevicePlan, first_row_tile: int, row_tiles: int
) -> None:
    """Merge the states of some rows of tiles into ``totals``, in place.

    Args:
        totals: float64, of B queries.
        partial: ``[B, splits, tiles, fields, row_block * column_block]``, fields being reference,
            mass, the centre's channels and, where the totals have one, the logit_sum.
        plan: the tiles.
        first_row_tile: the first row of tiles in ``partial``.
        row_tiles: how many there are.
    """
    batch, channels, pixels = totals.centre.shape
    lanes = triton.next_power_of_2(plan.column_pairs.shape[1])
    block = pixel_block(lanes, partial)
    merge_kernel[(triton.cdiv(pixels, block), batch)](
        partial,
        plan.row_pairs,
        plan.column_pairs,
        totals.reference,
        totals.mass,
        totals.centre,
        totals.mass if totals.logit_sum is None else totals.logit_sum,
        partial.shape[1],
        partial.shape[2],
        plan.column_tiles,
        first_row_tile,
        row_tiles,
        plan.row_pairs.shape[1],
        plan.column_pairs.shape[1],
        WIDTH=plan.width,
        PIXELS=pixels,
        C=channels,
        ROW_BLOCK=plan.row_block,
        COLUMN_BLOCK=plan.column_block,
        PIXEL_BLOCK=block,
        LANES=lanes,
        ENTROPY=totals.logit_sum is not None,
        num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )
