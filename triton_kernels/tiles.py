"""Tiles: the pairs of a query pixel and a training pixel that a program weighs.

A machine's candidates are a product of two axes (docs/theory.md): query row p is compared with
training row q, and columns likewise. Pairs with one displacement q - p form a *diagonal*, along
which patch distances are window sums. A tile holds, for each axis, a fixed number of slots; a slot
is a pair (q, p) whose pixelwise squared difference is formed, and pieces of diagonals, each with
the halo that its windows need, are packed into them. So a tile is always full, whatever the
displacements are, and a window sum is a product with a banded 0/1 matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Instructions of a thread for a slot that stays in registers, fitted to the compiled kernels
# (docs/performance.md).
_SLOT_COST = 43.0
# The same for a slot that is loaded again for every image.
_RELOADED_SLOT_COST = 74.0
# The same for a pair.
_PAIR_COST = 12.0
# Blocks of slots of a tile, at most, whose operands stay in registers.
RESIDENT_CHUNKS = 4
# Plans that are kept for the next call: those of a few machines, and of single pixels.
PLANS_KEPT = 256


class Diagonal(NamedTuple):
    """Pairs (q, p) = (start + i, start + i - displacement), 0 <= i < length, of one axis."""

    start: int
    displacement: int
    length: int


@dataclass(frozen=True, eq=False)
class AxisPlan:
    """The tiles of one axis; T tiles of S slots, of which the pairs use O (a block).

    Attributes:
        training: training coordinate of each slot, int32 ``[T, S]``; 0 where unused.
        query: query coordinate of each slot, int32 ``[T, S]``; 0 where unused.
        pair_training: training coordinate of each pair, int32 ``[T, O]``; 0 where there is none.
        pair_query: query coordinate of each pair, int32 ``[T, O]``; -1 where there is none.
        first: first slot of each pair's window, int32 ``[T, O]``; 0 where there is none.
        last: one past the last, int32 ``[T, O]``; 0 where there is none.
        pairs_of: for each query coordinate the pairs ``tile * O + i`` it is in, int32 ``[L, K]``,
            -1 behind the last.
        terms: how many coordinates a window has, for each query coordinate, int32 ``[L]``.
    """

    training: npt.NDArray[np.int32]
    query: npt.NDArray[np.int32]
    pair_training: npt.NDArray[np.int32]
    pair_query: npt.NDArray[np.int32]
    first: npt.NDArray[np.int32]
    last: npt.NDArray[np.int32]
    pairs_of: npt.NDArray[np.int32]
    terms: npt.NDArray[np.int32]

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return len(self.training)

    @property
    def chunks(self) -> int:
        """Blocks of slots per block of pairs."""
        return int(self.training.shape[1] // self.pair_training.shape[1])


def diagonals(*, equivariant: bool, circular: bool, length: int, patch_size: int) -> list[Diagonal]:
    """All pairs of one axis, each exactly once.

    Args:
        equivariant: ELS, or else LS.
        circular: the query (for LS: both) is read cyclically, else zeros lie beyond the border.
        length: of the axis.
        patch_size: odd side of the patch.
    """
    if not equivariant:
        return [Diagonal(0, 0, length)]
    radius = patch_size // 2
    inside = length - 2 * radius
    if circular:
        return [Diagonal(radius, shift, inside) for shift in range(length)] if inside > 0 else []
    found = [Diagonal(0, 0, length)]
    for shift in range(1, inside):
        found.append(Diagonal(radius + shift, shift, inside - shift))
        found.append(Diagonal(radius, -shift, inside - shift))
    return found


@lru_cache(PLANS_KEPT)
def plan_axis(
    *,
    equivariant: bool,
    circular: bool,
    length: int,
    patch_size: int,
    block: int,
    chunks: int,
    wanted: frozenset[int] | None = None,
) -> AxisPlan | None:
    """Pack the diagonals of one axis into tiles of ``block * chunks`` slots.

    With one chunk a pair lies in the slot of its own (q, p): the centre pixel is the one whose
    difference was formed.

    Args:
        equivariant: see :func:`diagonals`; so ``circular``, ``length`` and ``patch_size``.
        circular: see ``equivariant``.
        length: see ``equivariant``.
        patch_size: see ``equivariant``.
        block: pairs of a tile.
        chunks: blocks of slots of a tile.
        wanted: the query coordinates whose pairs are packed; None for all.

    Returns:
        The plan, or None if a window does not fit into a tile.
    """
    radius = patch_size // 2
    # LS on a torus wraps both images; zeros clip windows at the border.
    wraps = circular and not equivariant
    clips = not circular
    slots = block * chunks

    def window(q: int) -> tuple[int, int]:
        low, high = q - radius, q + radius + 1
        return (max(0, low), min(length, high)) if clips else (low, high)

    def is_wanted(q: int, displacement: int) -> bool:
        return wanted is None or (q - displacement) % length in wanted

    # A piece: displacement, first and one past the last training coordinate.
    pieces: list[tuple[int, int, int]] = []
    for diagonal in diagonals(
        equivariant=equivariant, circular=circular, length=length, patch_size=patch_size
    ):
        begin, end = diagonal.start, diagonal.start + diagonal.length
        while begin < end:
            if not is_wanted(begin, diagonal.displacement):
                begin += 1
                continue
            stop = begin
            while stop < end and stop - begin < block and is_wanted(stop, diagonal.displacement):
                if window(stop)[1] - window(begin)[0] > slots:
                    break
                stop += 1
            if stop == begin:
                return None
            pieces.append((diagonal.displacement, begin, stop))
            begin = stop

    def extent(piece: tuple[int, int, int]) -> int:
        return window(piece[2] - 1)[1] - window(piece[1])[0]

    tiles: list[list[tuple[int, int, int]]] = []
    room: list[tuple[int, int]] = []  # slots and pairs left in each tile
    for piece in sorted(pieces, key=extent, reverse=True):
        needed, pairs = extent(piece), piece[2] - piece[1]
        fitting = [
            (left, i) for i, (left, free) in enumerate(room) if left >= needed and free >= pairs
        ]
        if fitting:
            _, tile = min(fitting)
        else:
            tile = len(tiles)
            tiles.append([])
            room.append((slots, block))
        tiles[tile].append(piece)
        room[tile] = (room[tile][0] - needed, room[tile][1] - pairs)

    shape = (len(tiles), block)
    training, query = (np.zeros((len(tiles), slots), dtype=np.int32) for _ in range(2))
    pair_training, first, last = (np.zeros(shape, dtype=np.int32) for _ in range(3))
    pair_query = np.full(shape, -1, dtype=np.int32)
    pairs_of: list[list[int]] = [[] for _ in range(length)]
    terms = np.zeros(length, dtype=np.int32)
    for number, tile_pieces in enumerate(tiles):
        slot = pair = 0
        for displacement, begin, stop in tile_pieces:
            low, high = window(begin)[0], window(stop - 1)[1]
            coordinates = np.arange(low, high)
            here = slice(slot, slot + high - low)
            training[number, here] = coordinates % length if wraps else coordinates
            query[number, here] = (coordinates - displacement) % length
            for q in range(begin, stop):
                i = slot + q - low if chunks == 1 else pair
                p = (q - displacement) % length
                pair_training[number, i], pair_query[number, i] = q, p
                first[number, i] = slot + window(q)[0] - low
                last[number, i] = slot + window(q)[1] - low
                terms[p] = window(q)[1] - window(q)[0]
                pairs_of[p].append(number * block + i)
                pair += 1
            slot += high - low
    most = max(map(len, pairs_of))
    padded = np.array([sorted(found) + [-1] * (most - len(found)) for found in pairs_of])
    return AxisPlan(
        training, query, pair_training, pair_query, first, last, padded.astype(np.int32), terms
    )


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The tiles of a machine: every tile of the rows with every tile of the columns.

    Attributes:
        rows: the rows' tiles.
        columns: the columns' tiles.
        row_block: pairs of rows in a tile.
        column_block: pairs of columns in a tile.
    """

    rows: AxisPlan
    columns: AxisPlan
    row_block: int
    column_block: int

    @property
    def candidates(self) -> int:
        """The most locations in one training image that a query pixel is compared with."""
        return int(self.rows.pairs_of.shape[1] * self.columns.pairs_of.shape[1])

    @property
    def cost(self) -> float:
        """Instructions per thread and training image, up to a factor."""
        chunks = self.rows.chunks * self.columns.chunks
        size = self.row_block * self.column_block
        tiles = self.rows.tiles * self.columns.tiles
        slot_cost = _SLOT_COST if chunks <= RESIDENT_CHUNKS else _RELOADED_SLOT_COST
        return tiles * size * (chunks * slot_cost + _PAIR_COST)


@lru_cache(PLANS_KEPT)
def plan_tiles(
    *,
    equivariant: bool,
    circular: bool,
    height: int,
    width: int,
    patch_size: int,
    row_block: int,
    column_block: int,
    wanted_rows: frozenset[int] | None = None,
    wanted_columns: frozenset[int] | None = None,
) -> TilePlan:
    """The cheapest plan with blocks of this size.

    Args:
        equivariant: ELS, or else LS.
        circular: see :func:`diagonals`.
        height: of the images, in pixels; so ``width``.
        width: see ``height``.
        patch_size: odd side of the patch, at most the image's shorter side.
        row_block: pairs of rows in a tile.
        column_block: pairs of columns in a tile.
        wanted_rows: rows of the query whose pairs are packed; None for all.
        wanted_columns: columns, likewise.
    """

    def axis(length: int, block: int, wanted: frozenset[int] | None) -> list[AxisPlan]:
        # The longest window is that of LS on a torus.
        most = -(-(2 * length + patch_size) // block)
        plans = (
            plan_axis(
                equivariant=equivariant,
                circular=circular,
                length=length,
                patch_size=patch_size,
                block=block,
                chunks=chunks,
                wanted=wanted,
            )
            for chunks in range(1, most + 1)
        )
        return [plan for plan in plans if plan is not None]

    return min(
        (
            TilePlan(rows, columns, row_block, column_block)
            for rows in axis(height, row_block, wanted_rows)
            for columns in axis(width, column_block, wanted_columns)
        ),
        key=lambda plan: plan.cost,
    )


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """A plan whose tables lie on a device, as the kernels take them.

    Attributes:
        row_tables: training, query, pair_training, first, last and pair_query of the rows.
        column_tables: those of the columns.
        row_pairs: the rows' ``pairs_of``, int32 ``[H, K]``.
        column_pairs: the columns' ``pairs_of``, int32 ``[W, K]``.
        terms: how many pixels a window has, float64 ``[H * W]``.
        cost: see :class:`TilePlan`.
    """

    row_tables: tuple[Tensor, ...]
    column_tables: tuple[Tensor, ...]
    row_pairs: Tensor
    column_pairs: Tensor
    terms: Tensor
    row_tiles: int
    column_tiles: int
    row_block: int
    column_block: int
    row_chunks: int
    column_chunks: int
    width: int
    candidates: int
    cost: float

    @classmethod
    def of(cls, plan: TilePlan, device: torch.device) -> Self:
        """The tables of ``plan``, copied."""

        def tables(axis: AxisPlan) -> tuple[Tensor, ...]:
            arrays = (
                axis.training,
                axis.query,
                axis.pair_training,
                axis.first,
                axis.last,
                axis.pair_query,
            )
            return tuple(torch.from_numpy(array).to(device) for array in arrays)

        rows, columns = plan.rows, plan.columns
        return cls(
            row_tables=tables(rows),
            column_tables=tables(columns),
            row_pairs=torch.from_numpy(rows.pairs_of).to(device),
            column_pairs=torch.from_numpy(columns.pairs_of).to(device),
            terms=torch.from_numpy(np.outer(rows.terms, columns.terms).reshape(-1))
            .to(device)
            .double(),
            row_tiles=rows.tiles,
            column_tiles=columns.tiles,
            row_block=plan.row_block,
            column_block=plan.column_block,
            row_chunks=rows.chunks,
            column_chunks=columns.chunks,
            width=len(columns.pairs_of),
            candidates=plan.candidates,
            cost=plan.cost,
        )
