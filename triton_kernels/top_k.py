"""Exact top-k by distance: the candidates of a block of images below a pixel's threshold.

The engine streams blocks: what passes the k-th nearest so far is ranked in float64
(:mod:`.truncated`) and the k best are kept, ties to the lower address. Blocks double in size, so
that each brings about k candidates that pass, and the whole costs one pass of distances and a few
sorts. The order in which programs append does not matter, since the ranking is a sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from els.triton_kernels.configurations import FP_FUSION, Configuration, images_per_split
from els.triton_kernels.primitives import clean_values, load_tile, tile_distances
from els.triton_kernels.tiles import DevicePlan


@triton.jit(do_not_specialize=["count", "images_per_split", "room", "column_tiles"])
def select_kernel(
    images,  # [n, H * W] of C packed bytes
    x,  # [B, C, H * W], scaled: see exact.accumulate
    scales,  # [B, 2]: slope and bias
    thresholds,  # [B, H * W]: biased distances, like x
    row_tables,
    column_tables,
    counts,  # [B, H * W]
    found,  # [B, H * W, room]: image * H * W + pixel
    count,
    images_per_split,
    room,
    column_tiles,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    COLUMN_CHUNKS: tl.constexpr,
    PRECISE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Append the candidates of a tile that are nearer than their pixel's threshold."""
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_query = tl.program_id(2).to(tl.int64)
    i_row = i_tile // column_tiles
    i_column = i_tile % column_tiles
    slope = tl.load(scales + 2 * i_query)
    bias = tl.load(scales + 2 * i_query + 1)
    tile, centre = load_tile(
        x + i_query * C * PIXELS,
        row_tables,
        column_tables,
        i_row,
        i_column,
        WIDTH,
        PIXELS,
        C,
        ROW_BLOCK,
        COLUMN_BLOCK,
        ROW_CHUNKS,
        COLUMN_CHUNKS,
        PRECISE,
    )
    rows = tl.load(row_tables[5] + i_row * ROW_BLOCK + tl.arange(0, ROW_BLOCK))
    columns = tl.load(column_tables[5] + i_column * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK))
    m_pair = (rows >= 0)[:, None] & (columns >= 0)[None, :]
    pixel = tl.maximum(rows, 0)[:, None] * WIDTH + tl.maximum(columns, 0)[None, :]
    threshold = tl.load(thresholds + i_query * PIXELS + pixel)
    p_count = counts + i_query * PIXELS + pixel
    p_found = found + (i_query * PIXELS + pixel) * room
    begin = i_split * images_per_split
    end = tl.minimum(begin + images_per_split, count)
    for n in tl.range(begin, end, num_stages=STAGES):
        image = images + n * PIXELS
        distance = tile_distances(
            tile,
            image,
            clean_values(tl.load(image + centre), C),
            slope,
            bias,
            WIDTH,
            PIXELS,
            C,
            ROW_BLOCK,
            COLUMN_BLOCK,
            ROW_CHUNKS,
            COLUMN_CHUNKS,
            PRECISE,
        )
        nearer = m_pair & (distance < threshold)
        slot = tl.atomic_add(p_count, 1, mask=nearer, sem="relaxed")
        tl.store(p_found + slot, n * PIXELS + centre, mask=nearer & (slot < room))


def select(
    images: Tensor,
    x: Tensor,
    scales: Tensor,
    thresholds: Tensor,
    plan: DevicePlan,
    configuration: Configuration,
    room: int,
) -> tuple[Tensor, Tensor]:
    """Every candidate of a block of images that is nearer than its pixel's threshold.

    Args:
        images: as in :func:`els.triton_kernels.exact.accumulate`; so ``x``, ``scales``, ``plan``
            and ``configuration``.
        x: see ``images``.
        scales: see ``images``.
        thresholds: biased distances, ``[B, H * W]``, like ``x``.
        plan: see ``images``.
        configuration: see ``images``.
        room: for how many candidates of a pixel there is room.

    Returns:
        How many there are, int32 ``[B, H * W]``, and ``image * H * W + pixel`` of as many as there
        is room for, in any order, int32 ``[B, H * W, room]``, -1 behind the last.
    """
    configuration = configuration.for_windows(plan.row_chunks, plan.column_chunks)
    batch, channels, pixels = x.shape
    tiles = plan.row_tiles * plan.column_tiles
    per_split = images_per_split(tiles, len(images))
    counts = torch.zeros((batch, pixels), dtype=torch.int32, device=x.device)
    found = torch.full((batch, pixels, room), -1, dtype=torch.int32, device=x.device)
    select_kernel[(tiles, -(-len(images) // per_split), batch)](
        images,
        x,
        scales,
        thresholds,
        plan.row_tables,
        plan.column_tables,
        counts,
        found,
        len(images),
        per_split,
        room,
        plan.column_tiles,
        WIDTH=plan.width,
        PIXELS=pixels,
        C=channels,
        ROW_BLOCK=plan.row_block,
        COLUMN_BLOCK=plan.column_block,
        ROW_CHUNKS=plan.row_chunks,
        COLUMN_CHUNKS=plan.column_chunks,
        PRECISE=x.dtype == torch.float64,
        STAGES=configuration.stages,
        num_warps=configuration.warps,
        enable_fp_fusion=FP_FUSION,
    )
    return counts, found
