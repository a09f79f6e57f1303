"""The bank of patches: keys and values of a block of training images, for :mod:`.attention`.

With v the D bytes of a training patch less 128 and u those of a query (real numbers), the logit to
base 2 is, but for what is the same for all candidates,

    slope * (<u, v> - |v|^2 / 2),    slope = log2(e) * (alpha / (127.5 sigma))^2.

A *key* holds v, three digits of ``|v|^2`` and two constants, of which the query's row makes its own
constant: all whole numbers up to 4096, exact in float16, so that one matrix product gives the
score. The lowest digit is the norm's last bit: without it, half the norm is a whole number. Long
patches are cut into segments with digits and constants each, so that sums return to near zero after
each segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from els.triton_kernels.configurations import FP_FUSION, VALUES
from els.triton_kernels.pixel_groups import Layout, PixelGroups

# What is subtracted from bytes.
MIDDLE = tl.constexpr(128)
# Base of the digits of half a segment's squared norm: float16 holds whole numbers up to 2048.
NORM_BASE = tl.constexpr(2048)
# The first of a key's constants; the other, behind it, is 1.
CONSTANT = tl.constexpr(4096)
# Its place behind the coordinates of a segment.
HIGH = tl.constexpr(2)
# Keys that a program of the bank's kernel makes.
KEYS_PER_PROGRAM = 32
# The same where they are interpreted, and every operation takes as long.
_INTERPRETED_KEYS = 1024


@dataclass(frozen=True, eq=False)
class Bank:
    """Keys and values of the patches of a block of images, for each group of pixels.

    Attributes:
        keys: float16 ``[G, L, K]``; key l is of image ``l // S`` and candidate ``l % S``; those
            from ``count`` on repeat the last one.
        values: bytes of the centre less 128, 1, zeros; only zeros from ``count`` on; for each tile
            of keys, float16 ``[G, L / tile, 8, tile]``.
        count: of keys that are patches.
    """

    keys: Tensor
    values: Tensor
    count: int


@triton.jit(do_not_specialize=["candidates", "count", "padded", "image_bytes"])
def bank_kernel(
    images,  # uint8 [n, H * W * 4]
    windows,  # int32 [G, S, D]
    centres,  # int64 [G, S]
    keys,  # float16 [G, L, K]
    values,  # float16 [G, L / TILE, 8, TILE]
    candidates,  # S
    count,  # n * S
    padded,  # L
    image_bytes,  # H * W * 4
    C: tl.constexpr,
    D: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, at least WIDTH
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make the keys and values of a block of patches of a group."""
    i_group = tl.program_id(1)
    o_key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_key = (o_key < padded)[:, None]
    o_patch = tl.minimum(o_key, count - 1)
    o_candidate = i_group * candidates + o_patch % candidates
    p_image = images + (o_patch // candidates).to(tl.int64)[:, None] * image_bytes
    p_window = windows + o_candidate[:, None] * D
    o_row = (i_group.to(tl.int64) * padded + o_key)[:, None]
    o_column = tl.arange(0, COLUMNS)[None, :]
    for i in tl.range(0, SEGMENTS):
        o_coordinate = i * SEGMENT + o_column
        m_coordinate = m_key & (o_column < SEGMENT) & (o_coordinate < D)
        b_address = tl.load(p_window + o_coordinate, mask=m_coordinate, other=-1)
        b_byte = tl.load(p_image + b_address, mask=b_address >= 0, other=MIDDLE)
        b_column = b_byte.to(tl.int32) - MIDDLE
        norm = tl.sum(b_column * b_column, 1)[:, None]
        half = norm // 2
        b_column = tl.where(o_column == SEGMENT, half % NORM_BASE, b_column)
        b_column = tl.where(o_column == SEGMENT + 1, half // NORM_BASE, b_column)
        # What lies outside altogether adds nothing.
        known = (tl.max(b_address, 1) >= 0).to(tl.int32)[:, None]
        b_column = tl.where(o_column == SEGMENT + HIGH, CONSTANT * known, b_column)
        b_column = tl.where(o_column == SEGMENT + HIGH + 1, known, b_column)
        b_column = tl.where(o_column == SEGMENT + HIGH + 2, norm % 2, b_column)
        p_key = keys + o_row * (SEGMENTS * WIDTH) + i * WIDTH + o_column
        tl.store(p_key, b_column.to(tl.float16), mask=m_key & (o_column < WIDTH))
    o_value = tl.arange(0, 8)[None, :]
    m_value = m_key & (o_key < count)[:, None]
    p_centre = p_image + 4 * tl.load(centres + o_candidate)[:, None] + o_value
    b_value = tl.load(p_centre, mask=m_value & (o_value < C), other=MIDDLE).to(tl.int32) - MIDDLE
    b_value = tl.where(m_value & (o_value == C), 1, b_value)
    # What a tile multiplies at once is transposed, so that its copy to shared memory is not.
    o_tile = (o_row - o_row % TILE) * 8 + o_row % TILE
    tl.store(values + o_tile + o_value * TILE, b_value.to(tl.float16), mask=m_key)


def key_bytes(groups: PixelGroups) -> int:
    """Bytes that the bank has for each image."""
    return groups.candidates.numel() * 2 * (groups.layout.columns + VALUES)


def bank_of(images: Tensor, groups: PixelGroups, channels: int, tile: int) -> Bank:
    """The bank of a block of images.

    Args:
        images: pixels of 4 bytes, channel 0 lowest, int32 ``[n, H * W]``.
        groups: whose candidates, on the same device.
        channels: C.
        tile: keys of a tile; L is a multiple of it.
    """
    group_count, candidates = groups.candidates.shape
    count = len(images) * candidates
    padded = -(-count // tile) * tile
    keys, values = (
        images.new_empty((group_count, *shape), dtype=torch.float16)
        for shape in ((padded, groups.layout.columns), (padded // tile, VALUES, tile))
    )
    block = KEYS_PER_PROGRAM if images.is_cuda else _INTERPRETED_KEYS
    bank_kernel[(triton.cdiv(padded, block), group_count)](
        images.view(torch.uint8),
        groups.candidate_windows,
        groups.candidates,
        keys,
        values,
        candidates,
        count,
        padded,
        4 * images.shape[1],
        **constants(groups.layout),
        C=channels,
        TILE=tile,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )
    return Bank(keys, values, count)


def constants(layout: Layout) -> dict[str, int]:
    """The kernel's compile-time constants that follow from the layout of keys."""
    return {
        "D": layout.coordinates,
        "SEGMENTS": layout.segments,
        "SEGMENT": layout.segment,
        "WIDTH": layout.width,
        "COLUMNS": triton.next_power_of_2(layout.width),
    }
