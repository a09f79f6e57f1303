"""Posteriors over candidates by address: distances from the images, without storing patches.

For candidates that an index retrieved, and to rank those that :mod:`.attention` selected. A program
owns a few query pixels, its lanes are their candidates; everything is float64, since the loads of
scattered training pixels, not the arithmetic, take the time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from els.triton_kernels.attention import LOWEST_FLOAT64
from els.triton_kernels.configurations import FP_FUSION

# Candidates of a pixel that are weighed at a time.
_MOST_LANES = 128
# Of all pixels of a program; every operation of an interpreted one takes as long.
_LANES_ON_GPU = 128
_LANES_INTERPRETED = 16384


class Totals(NamedTuple):
    """States of queries, float64, to base 2.

    Attributes:
        reference: the largest logit, ``[B, H * W]``.
        mass: ``sum 2^(logit - reference)``, ``[B, H * W]``.
        centre: ``sum 2^(logit - reference) * v``, v the bytes of the centre pixels,
            ``[B, C, H * W]``.
        logit_sum: ``sum 2^(logit - reference) * (logit - reference)``, ``[B, H * W]``.
    """

    reference: Tensor
    mass: Tensor
    centre: Tensor
    logit_sum: Tensor


@triton.jit
def window_places(
    y, v, down, right, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, CIRCULAR: tl.constexpr
):
    """Where a window's pixel lies, and whether that is inside the image."""
    if CIRCULAR:
        place = ((y + down + HEIGHT) % HEIGHT) * WIDTH + (v + right + WIDTH) % WIDTH
        inside = place >= 0
    else:
        row = y + down
        column = v + right
        inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
        place = tl.where(inside, row * WIDTH + column, 0)
    return place, inside


@triton.jit
def byte_of(packed, c: tl.constexpr):
    """Channel c of packed pixels, float64."""
    return ((packed >> (8 * c)) & 0xFF).to(tl.float64)


@triton.jit(do_not_specialize=["k"])
def truncated_kernel(
    images,  # [n, H * W] of C packed bytes
    x,  # [B, C, H * W] float64: scale * (x + alpha), scale = sqrt(log2(e) / 2) / sigma
    slopes,  # [B] float64: scale * alpha / 127.5
    addresses,  # [B, H * W, k]: image * H * W + pixel, -1 for none
    reference,  # [B, H * W]
    mass,  # [B, H * W]
    centre,  # [B, C, H * W]
    logit_sum,  # [B, H * W]
    logits,  # [B, H * W, k]
    k,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    PIXEL_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Logits to base 2 of the candidates of a block of pixels, and the pixels' states."""
    PIXELS: tl.constexpr = WIDTH * HEIGHT
    i_query = tl.program_id(1).to(tl.int64)
    o_pixel = tl.program_id(0) * PIXEL_BLOCK + tl.arange(0, PIXEL_BLOCK)
    m_pixel = o_pixel < PIXELS
    p_pixel = i_query * PIXELS + o_pixel
    p_x = x + i_query * C * PIXELS
    slope = tl.load(slopes + i_query)
    # A pixel beyond the border is 0, of which ``scale * (x + alpha)`` is ``slope * 127.5``.
    outside = slope * 127.5
    largest = tl.full([PIXEL_BLOCK, LANES], LOWEST_FLOAT64, tl.float64)
    sum_mass = tl.zeros([PIXEL_BLOCK, LANES], tl.float64)
    sum_logits = tl.zeros([PIXEL_BLOCK, LANES], tl.float64)
    sums = ()
    for c in tl.static_range(C):
        sums = sums + (tl.zeros([PIXEL_BLOCK, LANES], tl.float64),)
    for first in tl.range(0, k, LANES):
        o_lane = first + tl.arange(0, LANES)[None, :]
        m_lane = m_pixel[:, None] & (o_lane < k)
        b_address = tl.load(addresses + p_pixel[:, None] * k + o_lane, mask=m_lane, other=-1)
        m_candidate = b_address >= 0
        b_address = tl.maximum(b_address, 0)
        b_place = (b_address % PIXELS).to(tl.int32)
        p_image = images + (b_address - b_place)
        distance = tl.zeros([PIXEL_BLOCK, LANES], tl.float64)
        for i in tl.range(0, WINDOW_ROWS * WINDOW_COLUMNS):
            down = FIRST + i // WINDOW_COLUMNS
            right = FIRST + i % WINDOW_COLUMNS
            query_place, query_inside = window_places(
                o_pixel // WIDTH, o_pixel % WIDTH, down, right, WIDTH, HEIGHT, CIRCULAR
            )
            clean_place, clean_inside = window_places(
                b_place // WIDTH, b_place % WIDTH, down, right, WIDTH, HEIGHT, CIRCULAR
            )
            b_clean = tl.load(p_image + clean_place)
            for c in tl.static_range(C):
                b_query = tl.load(p_x + c * PIXELS + query_place, mask=m_pixel, other=0.0)
                b_query = tl.where(query_inside, b_query, outside)
                scaled = slope * byte_of(b_clean, c)
                difference = b_query[:, None] - tl.where(clean_inside, scaled, outside)
                distance += difference * difference
        logit = tl.where(m_candidate, -distance, LOWEST_FLOAT64)
        tl.store(logits + p_pixel[:, None] * k + o_lane, logit, mask=m_lane)
        highest = tl.maximum(largest, logit)
        rescale = tl.exp2(largest - highest)
        weight = tl.where(m_candidate, tl.exp2(logit - highest), 0.0)
        sum_logits = rescale * (sum_logits + (largest - highest) * sum_mass) + weight * (
            logit - highest
        )
        sum_mass = rescale * sum_mass + weight
        b_clean = tl.load(p_image + b_place)
        added = ()
        for c in tl.static_range(C):
            added = added + (rescale * sums[c] + weight * byte_of(b_clean, c),)
        sums = added
        largest = highest

    highest = tl.max(largest, 1)
    scale = tl.exp2(largest - highest[:, None])
    moved = sum_logits + (largest - highest[:, None]) * sum_mass
    tl.store(reference + p_pixel, highest, mask=m_pixel)
    tl.store(logit_sum + p_pixel, tl.sum(scale * moved, 1), mask=m_pixel)
    tl.store(mass + p_pixel, tl.sum(scale * sum_mass, 1), mask=m_pixel)
    for c in tl.static_range(C):
        p_sum = centre + (i_query * C + c) * PIXELS + o_pixel
        tl.store(p_sum, tl.sum(scale * sums[c], 1), mask=m_pixel)


def truncated(
    images: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    addresses: Tensor,
    *,
    patch_size: int | None,
    circular: bool,
) -> tuple[Totals, Tensor]:
    """The posterior over the given candidates, and the logit of each.

    Args:
        images: pixels of C bytes, channel 0 lowest, int32 ``[n, H * W]``.
        x: noisy images, float64 ``[B, C, H, W]``.
        alpha: signal scale, float64 ``[B]``, on the same device.
        sigma: noise standard deviation, likewise.
        addresses: ``image * H * W + pixel`` of the candidates' centres, int64 ``[B, H * W, k]``,
            -1 for none.
        patch_size: odd side of the patch; None to compare whole images, cyclically.
        circular: both patches are read cyclically, else both read 0 outside (which for a patch
            that lies inside, as those of circular ELS do, is the same).

    Returns:
        The states, to base 2, and logits to base 2, float64 ``[B, H * W, k]``, ``-inf`` where there
        is no candidate.
    """
    batch, channels, height, width = x.shape
    pixels = height * width
    count = addresses.shape[-1]
    scale = math.sqrt(0.5 / math.log(2.0)) / sigma
    noisy = scale[:, None, None] * (x.flatten(2) + alpha[:, None, None])
    of_pixels = torch.empty_like(noisy[:, 0])
    totals = Totals(of_pixels, *map(torch.empty_like, (of_pixels, noisy, of_pixels)))
    logits = torch.empty(addresses.shape, dtype=torch.float64, device=x.device)
    rows, columns, first = height, width, 0
    if patch_size is not None:
        rows, columns, first = patch_size, patch_size, -(patch_size // 2)
    lanes = max(16, min(_MOST_LANES, triton.next_power_of_2(count)))
    block = max(1, (_LANES_ON_GPU if x.is_cuda else _LANES_INTERPRETED) // lanes)
    truncated_kernel[(triton.cdiv(pixels, block), batch)](
        images,
        noisy,
        scale * alpha / 127.5,
        addresses.contiguous(),
        *totals,
        logits,
        count,
        WIDTH=width,
        HEIGHT=height,
        C=channels,
        FIRST=first,
        WINDOW_ROWS=rows,
        WINDOW_COLUMNS=columns,
        CIRCULAR=circular or patch_size is None,
        PIXEL_BLOCK=block,
        LANES=lanes,
        num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )
    return totals, torch.where(addresses < 0, -torch.inf, logits)
