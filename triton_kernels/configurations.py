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
_LEAST_TILES = 4
# Columns of values: the centre's channels, 1, zeros; the least that a matrix product has.
VALUES = 8
# Bytes of a float16.
_BYTES = 2
# Shared memory for sums across warps; compiled kernels take up to 7 KiB.
_SCRATCH_BYTES = 8 << 10
# Columns of all parts of a row that a program keeps; more would fill its registers.
_RESIDENT_COLUMNS = 512
# Columns of one product.
CHUNK = 64
# Keys of a tile that is not made smaller where shared memory is short, but has fewer in flight.
_FEW_KEYS = 32
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
        resident: whether a program keeps its rows, or loads them for every tile of keys.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    resident: bool = False

    def shared_bytes(self, columns: int, parts: int) -> int:
        """Shared memory of a launch.

        Args:
            columns: of a row and of a key, or of the chunk of them that is loaded at a time.
            parts: float16 parts of a row.
        """
        rows, keys = parts * self.rows * columns, self.keys * (columns + VALUES)
        numbers = (1 if self.resident else self.stages) * rows + self.stages * keys
        return _BYTES * numbers + _SCRATCH_BYTES

    def fitting(self, columns: int, parts: int, shared: int) -> Configuration:
        """The same with smaller tiles, or fewer in flight, if it needs more shared memory.

        Args:
            columns: see :meth:`shared_bytes`.
            parts: likewise.
            shared: bytes of shared memory that a program may have.
        """
        fitting = self
        while fitting.shared_bytes(columns, parts) > shared:
            if fitting.keys > _FEW_KEYS:
                fitting = replace(fitting, keys=fitting.keys // 2)
            elif fitting.stages > 1:
                fitting = replace(fitting, stages=1)
            elif fitting.rows > _LEAST_SIDE:
                fitting = replace(fitting, rows=fitting.rows // 2)
            else:
                break
        return fitting

    def weighing(self, columns: int, parts: int, shared: int) -> Configuration:
        """A launch of the kernels that multiply whole rows: whether it keeps them, and fits.

        Args:
            columns: of a row and of a key.
            parts: float16 parts of a row, 0 for float64.
            shared: bytes of shared memory that a program may have.
        """
        if parts == 0:
            return replace(self, resident=False)
        kept = replace(self, resident=True).fitting(columns, parts, shared)
        if parts * columns <= _RESIDENT_COLUMNS and kept.rows == self.rows:
            return kept
        return replace(self, resident=False).fitting(min(columns, CHUNK), parts, shared)

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
        sliding_detailed: the same where the entropy is wanted.
        precise: for distances in float64.
    """

    plain: Configuration
    detailed: Configuration
    few_rows: Configuration
    sliding: Configuration
    sliding_detailed: Configuration
    precise: Configuration

    def chosen(
        self, rows: int, keys: int, *, columns: int, parts: int, detailed: bool, shared: int
    ) -> Configuration:
        """The launch for rows of a group and keys of a block; smaller tiles for few keys.

        Args:
            rows: of a group.
            keys: of a block.
            columns: of a row and of a key.
            parts: of a row; 0 for float64.
            detailed: whether the entropy or the heaviest candidates are wanted.
            shared: bytes of shared memory that a program may have.
        """
        if parts == 0:
            chosen = self.precise
        elif rows <= _LEAST_SIDE:
            chosen = self.few_rows
        else:
            chosen = self.detailed if detailed else self.plain
        few = max(_LEAST_SIDE, _power_of_two(keys))
        return replace(chosen, keys=min(chosen.keys, few)).weighing(columns, parts, shared)


def _power_of_two(number: int) -> int:
    """The least that is not below a number."""
    return 1 << (number - 1).bit_length()


SHIPPED = Configurations(
    plain=Configuration(64, 128, warps=4, stages=2),
    detailed=Configuration(64, 64, warps=4, stages=2),
    few_rows=Configuration(16, 64, warps=1, stages=2),
    sliding=Configuration(128, 64, warps=8, stages=2),
    sliding_detailed=Configuration(128, 32, warps=8, stages=2),
    precise=Configuration(32, 64, warps=4, stages=1),
)
# What bench/gpu_check.py measures instead of SHIPPED.plain.
CANDIDATES = (
    Configuration(64, 128, warps=4, stages=3),
    Configuration(64, 64, warps=4, stages=3),
    Configuration(128, 128, warps=8, stages=2),
)
