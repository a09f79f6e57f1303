"""Launch configurations of the kernels: blocks, warps, stages, splits.

They are a function of the query alone. The choice is a table and not a tuner at run time: the last
bits of a result depend on the configuration, and the same input must give the same bits.
``bench/gpu_check.py`` measures every entry of :data:`CANDIDATES`; what it finds best is written
into :data:`SHIPPED`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from els.triton_kernels.tiles import TilePlan, plan_tiles

# Programs that keep the largest GPU busy; fewer and longer ones where there are more tiles anyway.
_PROGRAMS = 4096
# float32 sums inside a program: a float64 merge takes over after so many images.
_MOST_IMAGES = 1024
_LEAST_IMAGES = 16
# Whether a product and a sum may be rounded once. Named at every launch, since errors and
# instruction counts depend on it and Triton's default is not the same in all versions.
FP_FUSION = True


@dataclass(frozen=True)
class Configuration:
    """A launch of the exact kernel, where windows are short.

    Attributes:
        row_block: rows of pairs in a tile, a power of two, at least 16.
        column_block: columns of pairs in a tile, likewise.
        together: images whose weights share one rescaling.
        warps: per program.
        stages: images in flight.
    """

    row_block: int
    column_block: int
    together: int
    warps: int
    stages: int

    def for_windows(self, row_chunks: int, column_chunks: int) -> Configuration:
        """The same where windows take so many blocks of slots, which fill more registers."""
        if row_chunks * column_chunks == 1:
            return self
        warps = self.warps if row_chunks * column_chunks == 2 else 2 * self.warps
        return replace(self, together=1, warps=warps)


# From these the cheapest is taken: a large block has less halo, a small one less idle room. They
# compile without spills for 1 to 4 channels, with and without the entropy, which
# els.bench.ahead_of_time checks.
SHIPPED = (
    Configuration(64, 16, together=2, warps=4, stages=2),
    Configuration(16, 16, together=2, warps=1, stages=2),
)
# What bench/gpu_check.py measures besides. The first has the least halo, but leaves room for eight
# warps on a multiprocessor.
CANDIDATES = (
    *SHIPPED,
    Configuration(64, 32, together=1, warps=4, stages=2),
    Configuration(64, 16, together=1, warps=4, stages=2),
    Configuration(32, 16, together=1, warps=2, stages=2),
    Configuration(32, 16, together=2, warps=2, stages=2),
    Configuration(16, 16, together=1, warps=1, stages=2),
)
# For distances in float64.
PRECISE = Configuration(16, 16, together=1, warps=2, stages=1)


def cheapest(
    choices: Sequence[Configuration],
    *,
    equivariant: bool,
    circular: bool,
    height: int,
    width: int,
    patch_size: int,
    wanted_rows: frozenset[int] | None = None,
    wanted_columns: frozenset[int] | None = None,
) -> tuple[Configuration, TilePlan]:
    """The configuration whose tiles cost least, and its plan; arguments as of `plan_tiles`."""
    plans = [
        plan_tiles(
            equivariant=equivariant,
            circular=circular,
            height=height,
            width=width,
            patch_size=patch_size,
            row_block=choice.row_block,
            column_block=choice.column_block,
            wanted_rows=wanted_rows,
            wanted_columns=wanted_columns,
        )
        for choice in choices
    ]
    return min(zip(choices, plans, strict=True), key=lambda pair: pair[1].cost)


def images_per_split(tiles: int, images: int) -> int:
    """How many images one program takes, from the number of tiles and of images."""
    splits = -(-_PROGRAMS // tiles)
    return min(max(_LEAST_IMAGES, -(-images // splits)), _MOST_IMAGES)
