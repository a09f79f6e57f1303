"""Exact posteriors over long patches: window sums that slide inside the accumulators.

The score of a query pixel and a candidate is a sum over the rows of their windows. One row further
down in both images, it is the same sum, more the row that enters, less the row that leaves:

    T(p + 1, c + 1) = T(p, c) + <entering rows> - <leaving rows>.

So a program owns row displacements d, columns of the query, and columns of training images, and
walks down the training rows. Keys and query rows are windows of a single row; see :mod:`.bank` and
:mod:`.queries`. Sums of whole parts are multiples of a row's power of two, hence exact up to 2^24
times that power, and what was added is subtracted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from els.triton_kernels.attention import (
    LOWEST,
    WEIGHT_BITS,
    WEIGHT_UNIT,
    halves,
    load_chunks,
)
from els.triton_kernels.bank import bank_of
from els.triton_kernels.configurations import FP_FUSION, Configuration
from els.triton_kernels.pixel_groups import Layout, PixelGroups
from els.triton_kernels.queries import AT_ONCE, Rows

# What sums of whole parts start from, in units of a row's power. Candidates that matter end near
# it, farther ones lower: from here to -2^24 there is more room for them than from 0.
_START = 1.2e7
# Columns of one product: more would be no faster, and fill more registers.
_CHUNK = 32
# Whole numbers up to this are exact in float32.
_EXACT = 2.0**24


@triton.jit(
    do_not_specialize=["count", "padded", "per_program", "queries", "row_count", "first", "last"]
)
def sliding_kernel(
    rows,  # float16 [PARTS, H, Q, K]: a row that enters, minus the one that leaves
    slopes,  # float32 [Q]
    starts,  # float32 [Q]: what sums of whole parts start from
    keys,  # float16 [H, L, K]: likewise, zeros where none leaves
    values,  # float16 [H, L / BN, 8, BN]
    states,  # float64 [fields, splits, H - P + 1, M]: reference, C centres, mass, logit_sum
    lowest,  # float32 [splits, M]: the least sum of whole parts
    count,  # of keys of a training row that are patches
    padded,  # L
    per_program,  # keys
    queries,  # Q
    row_count,  # B * H * W of images, displacements and columns; M is as many tiles
    first,  # of the query rows that are wanted
    last,  # after the last of them
    H: tl.constexpr,
    W: tl.constexpr,  # columns of the query
    P: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    C: tl.constexpr,
    ENTROPY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the candidates of a block to the states of some displacements."""
    i_split = tl.program_id(1)
    M = tl.num_programs(0) * BM
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_known = tl.minimum(o_row, row_count - 1)
    o_displacement = (o_known // W) % H
    o_query = o_known // (H * W) * W + o_known % W
    o_key = tl.arange(0, BN)
    o_value = tl.arange(0, 8)[None, :]
    m_sum = o_value <= C
    slope = tl.load(slopes + o_query)
    start = tl.load(starts + o_query)
    part_stride = H * queries * COLUMNS
    field = tl.num_programs(1).to(tl.int64) * (H - P + 1) * M
    p_lowest = lowest + i_split * M + o_row
    least = tl.load(p_lowest)
    begin = tl.multiple_of(i_split * per_program, BN)
    end = tl.minimum(begin + per_program, padded)
    for n in tl.range(begin, end, BN):
        whole = start[:, None] + tl.zeros([BM, BN], tl.float32)
        fractions = tl.zeros([BM, BN], tl.float32)
        for i in tl.range(0, H, num_stages=STAGES):
            p_row = rows + ((i + o_displacement) % H * queries + o_query)[:, None] * COLUMNS
            key = load_chunks(keys + (i * padded + n + o_key)[:, None] * COLUMNS, COLUMNS, CHUNK)
            for part in tl.static_range(PARTS):
                row = load_chunks(p_row + part * part_stride, COLUMNS, CHUNK)
                for c in tl.static_range(len(key)):
                    if part == 0:
                        whole = tl.dot(row[c], tl.trans(key[c]), whole)
                    else:
                        fractions = tl.dot(row[c], tl.trans(key[c]), fractions)
            o_wanted = (i + o_displacement + (H - P // 2)) % H
            wanted = (o_wanted >= first) & (o_wanted < last)
            if (i >= P - 1) & (tl.max(wanted.to(tl.int32), 0) > 0):
                least = tl.minimum(least, tl.min(whole, 1))
                score = (whole - start[:, None]) + fractions
                p_value = values + ((i - P // 2) * padded + n) * 8
                p_value = p_value + tl.arange(0, 8)[:, None] * BN + o_key[None, :]
                value = tl.trans(tl.load(p_value))
                p_state = states + (i_split * (H - P + 1) + i - (P - 1)).to(tl.int64) * M + o_row
                p_sum = p_state[:, None] + (1 + o_value) * field
                before = tl.load(p_state).to(tl.float32)
                sums = tl.load(p_sum, mask=m_sum, other=0.0)
                highest = tl.maximum(before, tl.max(score, 1))
                # Logits to base 2, relative to the reference.
                shift = (before - highest) * slope
                relative = score * slope[:, None] + (highest * -slope + WEIGHT_BITS)[:, None]
                weight = tl.exp2(relative)
                rescale = tl.exp2(shift).to(tl.float64)
                high, low = halves(weight)
                added = tl.dot(low, value, tl.dot(high, value)) * WEIGHT_UNIT
                if ENTROPY:
                    p_logits = p_state + (C + 2) * field
                    known = tl.where((n + o_key < count)[None, :], weight, 0.0) * WEIGHT_UNIT
                    mass = tl.sum(tl.where(o_value == C, sums, 0.0), 1)
                    moved = tl.load(p_logits) + shift.to(tl.float64) * mass
                    found = tl.sum(known * (relative - WEIGHT_BITS), 1)
                    tl.store(p_logits, rescale * moved + found)
                tl.store(p_sum, rescale[:, None] * sums + added, mask=m_sum)
                tl.store(p_state, highest.to(tl.float64))
    tl.store(p_lowest, least)


@dataclass(frozen=True, eq=False)
class Sliding:
    """Query rows, and the states of the candidates that were added for them.

    Attributes:
        groups: of windows of a single row; a group is a row, of queries and of training images.
        row_windows: their rows, of all images of a batch.
        radius: of the patch.
        first: of the rows of queries that are wanted; the last is as far from the other end.
        batch: B.
        channels: C.
        sums: see :func:`sliding_kernel`.
        lowest: likewise.
        block_keys: keys of a training row of the largest block.
        configuration: of the launches.
    """

    groups: PixelGroups
    row_windows: Rows
    radius: int
    first: int
    batch: int
    channels: int
    sums: Tensor
    lowest: Tensor
    block_keys: int
    configuration: Configuration

    @classmethod
    def of(
        cls,
        groups: PixelGroups,
        row_windows: Rows,
        *,
        radius: int,
        first: int,
        batch: int,
        channels: int,
        block_images: int,
        configuration: Configuration,
    ) -> Self:
        """States of no candidates; see the attributes.

        Args:
            groups: of windows of a single row.
            row_windows: ``image * W + column`` in their order for each row, none missing.
            radius: of the patch.
            first: of the wanted rows.
            batch: B.
            channels: C.
            block_images: images of the largest block.
            configuration: of the launches.
        """
        height, width = groups.queries.shape
        keys = configuration.padded_keys(block_images * groups.candidates.shape[1])
        count = configuration.padded_rows(batch * height * width)
        splits = triton.cdiv(keys, configuration.keys_per_program(count, keys))
        shape = (channels + 3, splits, height - 2 * radius, count)
        sums = row_windows.constant.new_zeros(shape)
        sums[0] = LOWEST.value
        lowest = sums.new_zeros((splits, count), dtype=torch.float32)
        leaving = -row_windows.coordinates.roll(2 * radius + 1, dims=1)
        coordinates = torch.cat([row_windows.coordinates, leaving], dim=-1)
        rows = replace(row_windows, coordinates=coordinates)
        return cls(groups, rows, radius, first, batch, channels, sums, lowest, keys, configuration)

    def fresh(self) -> Self:
        """The same rows and a copy of their states."""
        return replace(self, sums=self.sums.clone(), lowest=self.lowest.clone())

    def add(self, images: Tensor, *, entropy: bool) -> None:
        """Add the candidates of a block of images to the states, in place.

        Args:
            images: packed, int32 ``[n, H * W]``.
            entropy: whether the logit_sum is wanted; without, it is left alone.
        """
        height, width = self.groups.queries.shape
        configuration, rows = self.configuration, self.row_windows
        bank = bank_of(images, self.groups, self.channels, configuration.keys)
        patch_size, parts = 2 * self.radius + 1, len(rows.coordinates)
        sliding_kernel[(self.sums.shape[3] // configuration.rows, self.sums.shape[1])](
            rows.coordinates,
            rows.slopes[0],
            self.starts.to(torch.float32),
            bank.keys,
            bank.values,
            self.sums,
            self.lowest,
            bank.count,
            bank.keys.shape[1],
            configuration.keys_per_program(self.sums.shape[3], self.block_keys),
            rows.slopes.shape[1],
            self.batch * height * width,
            self.first,
            height - self.first,
            **constants(height, width, self.channels, patch_size, parts, configuration),
            ENTROPY=entropy,
            num_warps=configuration.warps,
            enable_fp_fusion=FP_FUSION,
        )

    @property
    def states(self) -> Tensor:
        """As of :class:`.attention.Attention`, of one group: every (split, training row) apart."""
        height, width = self.groups.queries.shape
        rows = torch.arange(self.first, height - self.first, device=self.sums.device)
        training = torch.arange(self.sums.shape[2], device=self.sums.device)
        # The displacement between a query row and the training row of a window's middle.
        displacement = (rows - self.radius - training[:, None]) % height
        used = self.sums[..., : self.batch * height * width]
        used = used.reshape(*self.sums.shape[:3], self.batch, height, width)
        found = used[:, :, training[:, None], :, displacement]
        # The indexed axes come first: training row, query row.
        return found.permute(2, 3, 0, 4, 1, 5).reshape(len(self.sums), -1, 1, self._pixels)

    @property
    def rows(self) -> Rows:
        """Of the whole windows of the wanted pixels, one group."""
        height, width = self.groups.queries.shape
        rows, radius = self.row_windows, self.radius
        assert rows.fractions is not None
        assert rows.power is not None

        def of_pixels(values: Tensor) -> Tensor:
            by_image = values.reshape(height, self.batch, width)[self.first : height - self.first]
            return by_image.movedim(0, 1).reshape(1, -1)

        def of_windows(values: Tensor) -> Tensor:
            shifted = (values.roll(-down, 0) for down in range(-radius, radius + 1))
            return of_pixels(torch.stack(list(shifted)).sum(0))

        def by_column(values: Tensor) -> Tensor:
            """The largest over displacements, ``[Q]``."""
            used = values[: self.batch * height * width].reshape(self.batch, height, width)
            return used.amax(1).flatten()

        # Where sums of whole parts left what is exact, every step may have rounded.
        highest = by_column(self.sums[0].amax((0, 1))) + self.starts
        farthest = torch.maximum(highest, by_column(-self.lowest.amin(0)))
        inexact = torch.where(farthest > _EXACT * rows.power[0], farthest, 0.0) / 2
        fractions = of_windows(rows.fractions.square()).sqrt()
        return Rows(
            rows.coordinates,
            of_pixels(rows.slopes),
            of_windows(rows.constant),
            of_pixels(rows.images),
            of_pixels(rows.pixels),
            fractions=fractions + of_pixels(inexact.expand(height, -1)),
            power=of_pixels(rows.power),
            steps=height * rows.coordinates.shape[3] * rows.parts / AT_ONCE,
        )

    @property
    def starts(self) -> Tensor:
        """What sums of whole parts start from, float64 ``[Q]``."""
        assert self.row_windows.power is not None
        return _START * self.row_windows.power[0]

    @property
    def _pixels(self) -> int:
        height, width = self.groups.queries.shape
        return self.batch * (height - 2 * self.first) * width


def constants(
    height: int,
    width: int,
    channels: int,
    patch_size: int,
    parts: int,
    configuration: Configuration,
) -> dict[str, int]:
    """The kernel's compile-time constants.

    Args:
        height: of the images.
        width: columns of queries.
        channels: C.
        patch_size: odd side of the patch.
        parts: float16 parts of a row.
        configuration: of the launch.
    """
    columns = Layout.of(channels * patch_size, windows=2).columns
    return {
        "H": height,
        "W": width,
        "P": patch_size,
        "COLUMNS": columns,
        "CHUNK": _CHUNK,
        "PARTS": parts,
        "C": channels,
        "BM": configuration.rows,
        "BN": configuration.keys,
        "STAGES": configuration.stages,
    }
