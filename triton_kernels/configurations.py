"""Launch configurations of the kernels.

They are a function of the query alone. The choice is a table and not a tuner at run time: the last
bits of a result depend on the configuration, and the same input must give the same bits.
``bench/gpu_check.py`` measures the entries of :data:`CANDIDATES`; what it finds best is written
into :data:`SHIPPED`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Whether a product and a sum may be rounded once. Named at every launch, since errors and
# instruction counts depend on it and Triton's default is not the same in all versions.
FP_FUSION = True
# Programs of a launch, if there are so many tiles: some for each multiprocessor of the largest GPU.
_PROGRAMS = 2048
# Tiles of keys that a program weighs at least, so that loading its rows is little beside them.
_LEAST_TILES = 8
# Rows or columns of the smallest matrix product.
_LEAST_SIDE = 16


@dataclass(frozen=True)
class Configuration:
    """A launch: the tile of scores of a program, and how it is computed.

    Attributes:
        rows: of queries in a tile, a power of two, at least 16.
        keys: in a tile, likewise.
        warps: per program.
        stages: tiles of keys in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def padded_rows(self, rows: int) -> int:
        """A number of rows as whole tiles."""
        return -(-rows // self.rows) * self.rows

    def padded_keys(self, keys: int) -> int:
        """A number of keys as whole tiles."""
        return -(-keys // self.keys) * self.keys

    def keys_per_program(self, rows: int, keys: int) -> int:
        """How many keys of a block one program weighs, a multiple of ``self.keys``.

        Args:
            rows: of all groups.
            keys: of a block.
        """
        tiles = -(-keys // self.keys)
        programs = -(-_PROGRAMS * self.rows // rows)
        return min(tiles, max(_LEAST_TILES, -(-tiles // programs))) * self.keys


@dataclass(frozen=True)
class Configurations:
    """Which launch is taken when.

    Attributes:
        plain: for exact means.
        detailed: where the entropy or the heaviest candidates are wanted, which fills registers.
        few_rows: where a group has no more rows than the smallest product, as at corners.
        sliding: for long patches.
        precise: for distances in float64.
    """

    plain: Configuration
    detailed: Configuration
    few_rows: Configuration
    sliding: Configuration
    precise: Configuration

    def chosen(self, rows: int, keys: int, *, parts: int, detailed: bool) -> Configuration:
        """The launch for rows of a group and keys of a block; smaller tiles for few keys."""
        if parts == 0:
            chosen = self.precise
        elif rows <= _LEAST_SIDE:
            chosen = self.few_rows
        else:
            chosen = self.detailed if detailed else self.plain
        return replace(chosen, keys=min(chosen.keys, max(_LEAST_SIDE, _power_of_two(keys))))


def _power_of_two(number: int) -> int:
    """The least that is not below a number."""
    return 1 << (number - 1).bit_length()


SHIPPED = Configurations(
    plain=Configuration(64, 128, warps=4, stages=2),
    detailed=Configuration(64, 64, warps=4, stages=2),
    few_rows=Configuration(16, 64, warps=1, stages=2),
    sliding=Configuration(64, 64, warps=4, stages=2),
    precise=Configuration(32, 64, warps=4, stages=1),
)
# What bench/gpu_check.py measures instead of SHIPPED.plain.
CANDIDATES = (
    Configuration(64, 128, warps=4, stages=3),
    Configuration(64, 64, warps=4, stages=3),
    Configuration(128, 128, warps=8, stages=2),
)
