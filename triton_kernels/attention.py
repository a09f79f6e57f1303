"""Exact posteriors as attention: query rows times keys, a softmax, times values.

A program owns a tile of rows and a part of the keys of a block. Scores are matrix products of
float16 in float32 (see :mod:`.bank` and :mod:`.queries` for why that is exact enough), or sums of
squared differences in float64; the softmax goes on from tile to tile as in FlashAttention (arXiv
2205.14135), and its sums go on in float64 from block to block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from els.triton_kernels.bank import Bank, bank_of
from els.triton_kernels.configurations import CHUNK, FP_FUSION, Configuration
from els.triton_kernels.pixel_groups import Layout, PixelGroups
from els.triton_kernels.queries import Rows

# Finite, yet below every score: exp2 of it is 0, and differences of it are not nan. In float32:
LOWEST = tl.constexpr(-1e30)
# In float64, where sigma may be tiny:
LOWEST_FLOAT64 = tl.constexpr(-1e300)
# Weights are at most 2^14 in a product, so that half precision reaches 2^-38 of the largest.
WEIGHT_BITS = tl.constexpr(14)
WEIGHT_UNIT = tl.constexpr(2.0**-14)


@triton.jit
def load_chunks(pointer, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """The columns of rows that start at ``pointer`` ``[rows, 1]``: chunks, then the rest."""
    chunks = ()
    for c in tl.static_range(COLUMNS // CHUNK):
        chunks = chunks + (tl.load(pointer + c * CHUNK + tl.arange(0, CHUNK)[None, :]),)
    if COLUMNS % CHUNK > 0:
        o_rest = COLUMNS // CHUNK * CHUNK + tl.arange(0, COLUMNS % CHUNK)
        chunks = chunks + (tl.load(pointer + o_rest[None, :]),)
    return chunks


@triton.jit
def scores(
    parts,  # tuple of the resident parts' chunks; empty if not RESIDENT
    p_row,  # [BM, 1]
    part_stride,
    slope,  # [BM]
    p_key,  # [BN, 1]
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of a tile: ``[BM, BN]`` float32; with no parts, logits in float64."""
    if PARTS == 0:
        total = tl.zeros([BM, BN], tl.float64)
        for d in tl.range(0, D):
            column = d // SEGMENT * WIDTH + d % SEGMENT
            key = tl.trans(tl.load(p_key + column)).to(tl.float64)
            difference = tl.load(p_row + d) - slope[:, None] * key
            total -= difference * difference
    elif RESIDENT:
        total = tl.zeros([BM, BN], tl.float32)
        keys = load_chunks(p_key, COLUMNS, CHUNK)
        # All whole parts first: their sums are exact, and near zero for the candidates that matter
        # when the fractions are added.
        for c in tl.static_range(PARTS * len(keys)):
            total = tl.dot(parts[c], tl.trans(keys[c % len(keys)]), total)
    else:
        whole = tl.zeros([BM, BN], tl.float32)
        fractions = tl.zeros([BM, BN], tl.float32)
        o_chunk = tl.arange(0, CHUNK)[None, :]
        for k in tl.range(0, COLUMNS, CHUNK, num_stages=STAGES):
            key = tl.trans(tl.load(p_key + k + o_chunk))
            whole = tl.dot(tl.load(p_row + k + o_chunk), key, whole)
            for part in tl.static_range(1, PARTS):
                p_part = p_row + part * part_stride + k + o_chunk
                fractions = tl.dot(tl.load(p_part), key, fractions)
        total = whole + fractions
    return total


@triton.jit
def halves(values):
    """Two float16 whose sum has 22 of the value's 24 bits; ``values`` at most 65504."""
    # Cut, not rounded: one logical operation, and what is left over is exact.
    high = (values.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high.to(tl.float16), (values - high).to(tl.float16)


@triton.jit(do_not_specialize=["per_program", "count", "padded"])
def attention_kernel(
    rows,  # float16 [PARTS, G, M, K]; float64 [G, M, D] with no parts
    slopes,  # float32 [G, M]; float64 with no parts
    keys,  # float16 [G, L, K]
    values,  # float16 [G, L / BN, 8, BN]
    states,  # float64 [fields, splits, G, M]: reference, C centres, mass, logit_sum
    per_program,  # keys
    count,  # of keys that are patches
    padded,  # L
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    C: tl.constexpr,
    ENTROPY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the candidates of a block to the states of a tile of rows.

    References are scores, or logits with no parts; centres are sums of bytes less 128.
    """
    i_split = tl.program_id(1)
    i_group = tl.program_id(2)
    PRECISE: tl.constexpr = PARTS == 0
    M = tl.num_programs(0) * BM
    o_row = i_group.to(tl.int64) * M + tl.program_id(0) * BM + tl.arange(0, BM)
    o_key = tl.arange(0, BN)
    o_value = tl.arange(0, 8)[None, :]
    part_stride = tl.num_programs(2).to(tl.int64) * M * COLUMNS
    p_row = rows + o_row[:, None] * (D if PRECISE else COLUMNS)
    slope = tl.load(slopes + o_row)
    parts = ()
    if RESIDENT:
        for part in tl.static_range(PARTS):
            parts = parts + load_chunks(p_row + part * part_stride, COLUMNS, CHUNK)
    begin = tl.multiple_of(i_split * per_program, BN)
    end = tl.minimum(begin + per_program, padded)
    p_key = keys + (i_group.to(tl.int64) * padded + begin) * COLUMNS
    p_value = values + (i_group.to(tl.int64) * padded + begin) * 8
    p_value = p_value + tl.arange(0, 8)[:, None] * BN + o_key[None, :]

    if PRECISE:
        reference = tl.full([BM], LOWEST_FLOAT64, tl.float64)
    else:
        reference = tl.full([BM], LOWEST, tl.float32)
    sums = tl.zeros([BM, 8], tl.float32)
    mass = tl.zeros([BM], tl.float32)
    logit_sum = tl.zeros([BM], tl.float32)
    for n in tl.range(0, end - begin, BN, num_stages=STAGES):
        score = scores(
            parts,
            p_row,
            part_stride,
            slope,
            p_key + (n + o_key)[:, None] * COLUMNS,
            D,
            SEGMENT,
            WIDTH,
            COLUMNS,
            CHUNK,
            PARTS,
            RESIDENT,
            BM,
            BN,
            STAGES,
        )
        value = tl.trans(tl.load(p_value + n * 8))
        highest = tl.maximum(reference, tl.max(score, 1))
        # Logits to base 2, relative to the reference. In float64 they may be beyond float32.
        if PRECISE:
            shift = tl.maximum(reference - highest, LOWEST).to(tl.float32)
            relative = tl.maximum(score - highest[:, None], LOWEST).to(tl.float32) + WEIGHT_BITS
        else:
            shift = (reference - highest) * slope
            relative = score * slope[:, None] + (highest * -slope + WEIGHT_BITS)[:, None]
        rescale = tl.exp2(shift)
        weight = tl.exp2(relative)
        if ENTROPY:
            known = tl.where((begin + n + o_key < count)[None, :], weight, 0.0)
            moved = logit_sum + shift * mass
            logit_sum = rescale * moved + tl.sum(known * (relative - WEIGHT_BITS), 1)
            mass = rescale * mass + tl.sum(known, 1)
        high, low = halves(weight)
        sums = sums * rescale[:, None] + tl.dot(low, value, tl.dot(high, value))
        reference = highest

    if begin < end:
        field = tl.num_programs(1).to(tl.int64) * tl.num_programs(2) * M
        p_state = states + i_split.to(tl.int64) * tl.num_programs(2) * M + o_row
        p_sum = p_state[:, None] + (1 + o_value) * field
        before = tl.load(p_state)
        found = reference.to(tl.float64)
        highest = tl.maximum(before, found)
        if PRECISE:
            old = tl.maximum(before - highest, LOWEST)
            new = tl.maximum(found - highest, LOWEST)
        else:
            old = tl.maximum((before - highest) * slope, LOWEST)
            new = tl.maximum((found - highest) * slope, LOWEST)
        m_sum = o_value <= C
        added = (tl.exp2(new) * WEIGHT_UNIT)[:, None] * sums
        old_sums = tl.load(p_sum, mask=m_sum, other=0.0)
        if ENTROPY:
            p_logits = p_state + (C + 2) * field
            old_mass = tl.sum(tl.where(o_value == C, old_sums, 0.0), 1)
            old_logits = tl.load(p_logits) + old * old_mass
            new_logits = (logit_sum + new * mass) * WEIGHT_UNIT
            tl.store(p_logits, tl.exp2(old) * old_logits + tl.exp2(new) * new_logits)
        tl.store(p_sum, tl.exp2(old)[:, None] * old_sums + added, mask=m_sum)
        tl.store(p_state, highest)


@triton.jit(do_not_specialize=["per_program", "count", "padded", "room"])
def select_kernel(
    rows,  # as of attention_kernel
    slopes,
    keys,
    thresholds,  # [G, M], scores in float32, or logits in float64
    counts,  # int32 [G, M]
    found,  # int32 [G, M, room]
    per_program,
    count,
    padded,
    room,
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Append the keys above a row's threshold to what was found for it, in any order."""
    i_split = tl.program_id(1)
    i_group = tl.program_id(2)
    PRECISE: tl.constexpr = PARTS == 0
    M = tl.num_programs(0) * BM
    o_row = i_group.to(tl.int64) * M + tl.program_id(0) * BM + tl.arange(0, BM)
    o_key = tl.arange(0, BN)
    part_stride = tl.num_programs(2).to(tl.int64) * M * COLUMNS
    p_row = rows + o_row[:, None] * (D if PRECISE else COLUMNS)
    slope = tl.load(slopes + o_row)
    threshold = tl.load(thresholds + o_row)
    parts = ()
    if RESIDENT:
        for part in tl.static_range(PARTS):
            parts = parts + load_chunks(p_row + part * part_stride, COLUMNS, CHUNK)
    begin = tl.multiple_of(i_split * per_program, BN)
    end = tl.minimum(begin + per_program, padded)
    p_key = keys + (i_group.to(tl.int64) * padded + begin) * COLUMNS
    for n in tl.range(0, end - begin, BN, num_stages=STAGES):
        score = scores(
            parts,
            p_row,
            part_stride,
            slope,
            p_key + (n + o_key)[:, None] * COLUMNS,
            D,
            SEGMENT,
            WIDTH,
            COLUMNS,
            CHUNK,
            PARTS,
            RESIDENT,
            BM,
            BN,
            STAGES,
        )
        key = begin + n + o_key
        wanted = (score > threshold[:, None]) & (key < count)[None, :]
        each = wanted.to(tl.int32)
        total = tl.sum(each, 1)
        if tl.max(total, 0) > 0:
            first = tl.atomic_add(counts + o_row, total, mask=total > 0)
            place = first[:, None] + tl.cumsum(each, 1) - each
            p_found = found + o_row[:, None] * room + place
            tl.store(p_found, (key + tl.zeros_like(each)), mask=wanted & (place < room))


@dataclass(frozen=True, eq=False)
class Attention:
    """Rows of queries, and the states of the candidates that were added for them.

    Attributes:
        groups: of the pixels whose rows they are.
        rows: of the queries.
        states: float64 ``[C + 3, splits, G, M]``: reference, C centres, mass, logit_sum; see
            :func:`attention_kernel`.
        block_keys: L of the largest block.
        configuration: of the launches.
    """

    groups: PixelGroups
    rows: Rows
    states: Tensor
    block_keys: int
    configuration: Configuration

    @classmethod
    def of(
        cls,
        groups: PixelGroups,
        rows: Rows,
        channels: int,
        block_images: int,
        configuration: Configuration,
    ) -> Self:
        """States of no candidates.

        Args:
            groups: of pixels.
            rows: of the queries, whole tiles of the configuration.
            channels: C.
            block_images: images of the largest block.
            configuration: of the launches.
        """
        group_count, count = rows.slopes.shape
        keys = configuration.padded_keys(block_images * groups.candidates.shape[1])
        splits = triton.cdiv(keys, configuration.keys_per_program(rows.slopes.numel(), keys))
        states = rows.constant.new_zeros((channels + 3, splits, group_count, count))
        states[0] = LOWEST_FLOAT64.value
        return cls(groups, rows, states, keys, configuration)

    def fresh(self) -> Self:
        """The same rows and a copy of their states."""
        return replace(self, states=self.states.clone())

    def add(self, images: Tensor, *, entropy: bool) -> None:
        """Add the candidates of a block of images to the states, in place.

        Args:
            images: packed, int32 ``[n, H * W]``.
            entropy: whether the logit_sum is wanted; without, it is left alone.
        """
        bank, configuration = self._bank(images), self.configuration
        attention_kernel[(self._tiles, self.states.shape[1], len(bank.keys))](
            self.rows.coordinates,
            self.rows.slopes,
            bank.keys,
            bank.values,
            self.states,
            configuration.keys_per_program(self.rows.slopes.numel(), self.block_keys),
            bank.count,
            bank.keys.shape[1],
            **self._constants,
            C=self._channels,
            ENTROPY=entropy,
            num_warps=configuration.warps,
            enable_fp_fusion=FP_FUSION,
        )

    def select(self, images: Tensor, thresholds: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """The candidates of a block of images whose scores are above a threshold.

        Args:
            images: packed, int32 ``[n, H * W]``.
            thresholds: of scores, or of logits where rows are float64; ``[G, M]``.
            room: for how many candidates of a row.

        Returns:
            How many there are, int32 ``[G, M]``, and as many of them as there is room for, in any
            order: ``image * H * W + pixel`` of the block, int64 ``[G, M, room]``, -1 for none.
        """
        bank, configuration = self._bank(images), self.configuration
        counts = torch.zeros_like(self.rows.slopes, dtype=torch.int32)
        found = counts.new_full((*counts.shape, room), -1)
        keys = bank.keys.shape[1]
        per_program = configuration.keys_per_program(counts.numel(), keys)
        select_kernel[(self._tiles, triton.cdiv(keys, per_program), len(bank.keys))](
            self.rows.coordinates,
            self.rows.slopes,
            bank.keys,
            thresholds.to(self.rows.slopes.dtype),
            counts,
            found,
            per_program,
            bank.count,
            keys,
            room,
            **self._constants,
            num_warps=configuration.warps,
            enable_fp_fusion=FP_FUSION,
        )
        candidates = self.groups.candidates
        number, which = found.clamp(min=0) // candidates.shape[1], found % candidates.shape[1]
        group = torch.arange(len(found), device=found.device).reshape(-1, 1, 1)
        addresses = number.to(torch.int64) * images.shape[1] + candidates[group, which]
        return counts, torch.where(found < 0, -1, addresses)

    @property
    def _channels(self) -> int:
        return len(self.states) - 3

    @property
    def _tiles(self) -> int:
        """Of rows, in a group."""
        return self.rows.slopes.shape[1] // self.configuration.rows

    @property
    def _constants(self) -> dict[str, int]:
        return constants(self.groups.layout, self.rows.parts, self.configuration)

    def _bank(self, images: Tensor) -> Bank:
        return bank_of(images, self.groups, self._channels, self.configuration.keys)


def constants(layout: Layout, parts: int, configuration: Configuration) -> dict[str, int]:
    """The compile-time constants that both kernels have.

    Args:
        layout: of rows and keys.
        parts: float16 parts of a row, 0 for float64.
        configuration: of the launch.
    """
    return {
        "D": layout.coordinates,
        "SEGMENT": layout.segment,
        "WIDTH": layout.width,
        "COLUMNS": layout.columns,
        "CHUNK": chunk_of(layout.columns, with_rest=configuration.resident),
        "PARTS": parts,
        "RESIDENT": configuration.resident,
        "BM": configuration.rows,
        "BN": configuration.keys,
        "STAGES": configuration.stages,
    }


def chunk_of(columns: int, *, with_rest: bool) -> int:
    """How many columns a product takes: a power of two.

    Args:
        columns: of a row, a multiple of 16.
        with_rest: whether a rest may be left that is a power of two, too.
    """
    chunk = CHUNK
    while columns % chunk and not (with_rest and _is_power(columns % chunk)):
        chunk //= 2
    return chunk


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
