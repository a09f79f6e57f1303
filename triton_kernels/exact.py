"""Exact LS and ELS posteriors: window sums on tensor cores, softmax in registers.

A program owns one tile of (query pixel, training pixel) pairs (:mod:`.tiles`) of one query and
loops over training images. So the query's pixels stay in registers, every image is read at the
same offsets, nothing in the loop depends on the displacement, and each pair has its accumulators
in registers. The states of tiles are merged per query pixel afterwards (:mod:`.merge`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from els.triton_kernels.configurations import FP_FUSION, Configuration, images_per_split
from els.triton_kernels.merge import Totals, merge_partial
from els.triton_kernels.primitives import (
    LOWEST,
    LOWEST_FLOAT64,
    channel_scale,
    clean_values,
    exponents,
    load_tile,
    tile_distances,
)
from els.triton_kernels.tiles import DevicePlan

# States of tiles on their way to the merge: of one query, and of all queries taken at once.
_QUERY_BYTES = 64 << 20
_BATCH_BYTES = 512 << 20


@triton.jit(do_not_specialize=["count", "images_per_split", "first_row_tile", "column_tiles"])
def exact_kernel(
    images,  # [n, H * W] of C packed bytes
    x,  # [B, C, H * W], scaled: see accumulate
    scales,  # [B, 2]: slope and bias
    row_tables,
    column_tables,
    partial,  # [B, splits, tiles, fields, ROW_BLOCK * COLUMN_BLOCK]
    count,
    images_per_split,
    first_row_tile,
    column_tiles,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    COLUMN_CHUNKS: tl.constexpr,
    TOGETHER: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state of every pair of a tile over the images of a split."""
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_query = tl.program_id(2).to(tl.int64)
    slope = tl.load(scales + 2 * i_query)
    bias = tl.load(scales + 2 * i_query + 1)
    tile, centre = load_tile(
        x + i_query * C * PIXELS,
        row_tables,
        column_tables,
        first_row_tile + i_tile // column_tiles,
        i_tile % column_tiles,
        WIDTH,
        PIXELS,
        C,
        ROW_BLOCK,
        COLUMN_BLOCK,
        ROW_CHUNKS,
        COLUMN_CHUNKS,
        PRECISE,
    )

    REAL: tl.constexpr = tl.float64 if PRECISE else tl.float32
    largest = tl.full([ROW_BLOCK, COLUMN_BLOCK], LOWEST_FLOAT64 if PRECISE else LOWEST, REAL)
    mass = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], tl.float32)
    logit_sum = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], tl.float32)
    sums = ()
    for c in tl.static_range(C):
        sums = sums + (tl.zeros([ROW_BLOCK, COLUMN_BLOCK], tl.float32),)

    begin = i_split * images_per_split
    end = tl.minimum(begin + images_per_split, count)
    for n in tl.range(begin, end, TOGETHER, num_stages=STAGES):
        logits = ()
        cleans = ()
        highest = largest
        for j in tl.static_range(TOGETHER):
            image = images + tl.minimum(n + j, end - 1) * PIXELS
            # An image past the end has weight 0: its distances are large.
            b_bias = bias if j == 0 else tl.where(n + j < end, bias, LOWEST)
            b_clean = clean_values(tl.load(image + centre), C)
            distance = tile_distances(
                tile,
                image,
                b_clean,
                slope,
                b_bias,
                WIDTH,
                PIXELS,
                C,
                ROW_BLOCK,
                COLUMN_BLOCK,
                ROW_CHUNKS,
                COLUMN_CHUNKS,
                PRECISE,
            )
            highest = tl.maximum(highest, -distance)
            logits = logits + (-distance,)
            cleans = cleans + (b_clean,)
        # Online softmax: what was summed so far is rescaled to the new reference.
        shift = exponents(largest, highest, PRECISE)
        rescale = tl.exp2(shift)
        if ENTROPY:
            logit_sum = rescale * (logit_sum + shift * mass)
        mass = rescale * mass
        rescaled = ()
        for c in tl.static_range(C):
            rescaled = rescaled + (rescale * sums[c],)
        for j in tl.static_range(TOGETHER):
            excess = exponents(logits[j], highest, PRECISE)
            weight = tl.exp2(excess)
            mass += weight
            if ENTROPY:
                logit_sum += weight * excess
            added = ()
            for c in tl.static_range(C):
                added = added + (rescaled[c] + weight * cleans[j][c],)
            rescaled = added
        sums = rescaled
        largest = highest

    SIZE: tl.constexpr = ROW_BLOCK * COLUMN_BLOCK
    FIELDS: tl.constexpr = 2 + C + (1 if ENTROPY else 0)
    slot = (i_query * tl.num_programs(1) + i_split) * tl.num_programs(0) + i_tile
    o_pair = tl.arange(0, ROW_BLOCK)[:, None] * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)[None, :]
    p_out = partial + slot * FIELDS * SIZE + o_pair
    tl.store(p_out, largest)
    tl.store(p_out + SIZE, mass)
    for c in tl.static_range(C):
        tl.store(p_out + (2 + c) * SIZE, sums[c] * channel_scale(c))
    if ENTROPY:
        tl.store(p_out + (2 + C) * SIZE, logit_sum)


def accumulate(
    totals: Totals,
    images: Tensor,
    x: Tensor,
    scales: Tensor,
    plan: DevicePlan,
    configuration: Configuration,
) -> None:
    """Merge the posterior over a block of images into ``totals``, in place.

    Everything lives on one device. The images' order and number, the plan and the configuration
    decide every bit of the result; the batch does not.

    Args:
        totals: states of the queries, to base 2 and biased.
        images: pixels of C bytes, channel 0 lowest, int32 ``[n, H * W]``, n * H * W < 2^31.
        x: ``scale * (x + alpha)`` with ``scale = sqrt(log2(e) / 2) / sigma``, ``[B, C, H * W]``;
            float64 for float64 distances, else float32.
        scales: slope, ``scale * alpha / 127.5``, and bias of each query, ``[B, 2]``, like ``x``.
        plan: tiles of the machine, made for ``configuration``'s blocks.
        configuration: of the launch.
    """
    configuration = configuration.for_windows(plan.row_chunks, plan.column_chunks)
    batch, channels, pixels = x.shape
    fields = 2 + channels + (totals.logit_sum is not None)
    blocks = plan.row_block * plan.column_block
    per_split = images_per_split(plan.row_tiles * plan.column_tiles, len(images))
    splits = -(-len(images) // per_split)
    row_bytes = x.element_size() * fields * blocks * plan.column_tiles * splits
    rows = max(1, min(plan.row_tiles, _QUERY_BYTES // row_bytes))
    queries = max(1, _BATCH_BYTES // (row_bytes * rows))
    for first_query in range(0, batch, queries):
        here = slice(first_query, first_query + queries)
        for first_row in range(0, plan.row_tiles, rows):
            row_tiles = min(rows, plan.row_tiles - first_row)
            tiles = row_tiles * plan.column_tiles
            partial = torch.empty(
                (len(x[here]), splits, tiles, fields, blocks), dtype=x.dtype, device=x.device
            )
            exact_kernel[(tiles, splits, len(partial))](
                images,
                x[here],
                scales[here],
                plan.row_tables,
                plan.column_tables,
                partial,
                len(images),
                per_split,
                first_row,
                plan.column_tiles,
                WIDTH=plan.width,
                PIXELS=pixels,
                C=channels,
                ROW_BLOCK=plan.row_block,
                COLUMN_BLOCK=plan.column_block,
                ROW_CHUNKS=plan.row_chunks,
                COLUMN_CHUNKS=plan.column_chunks,
                TOGETHER=configuration.together,
                ENTROPY=totals.logit_sum is not None,
                PRECISE=x.dtype == torch.float64,
                STAGES=configuration.stages,
                num_warps=configuration.warps,
                enable_fp_fusion=FP_FUSION,
            )
            merge_partial(totals.of(here), partial, plan, first_row, row_tiles)
