"""Whether FAISS can read and search an index file without harm.

FAISS does not check what it reads: a wrong size allocates gigabytes, a wrong link or list makes it
read beyond its memory. So the whole structure of a file is checked here before FAISS reads it:
every size against the file's own, every list and link against the number of its targets. Unchecked
are numbers that only change results (codes, centroids, addresses of patches).

Known are the indices that `els.index.patches.index` builds, in the format of FAISS's
``index_write.cpp`` (little-endian; an array is its length, 8 bytes, and its elements)::

    IxMp              header, Flat, int64 ids
    IxPT              header, transforms, IwFl or IwSq or IwPQ
    IwFl, IwSq, IwPQ  header, number of lists, quantizer (Flat or HNSW), codec, inverted lists
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Bits of a component and trained numbers (per component, or 2 in all) of FAISS's ScalarQuantizer,
# by its QuantizerType.
_SCALAR_BITS = {0: 8, 1: 4, 2: 8, 3: 4, 4: 16, 5: 8, 6: 6, 7: 16, 8: 8}
# QuantizerTypes with trained numbers for each component.
_SCALAR_PER_COMPONENT = (0, 1, 6)
# QuantizerTypes with two trained numbers in all.
_SCALAR_UNIFORM = (2, 3)
# Bits of a component of a product quantizer, at most: it has a table of 2^bits centroids.
_MOST_PQ_BITS = 16
# FAISS's efSearch and efConstruction of an HNSW graph, at most: memory of a search grows with them.
_MOST_SEARCHED = 1 << 16
# FAISS's METRIC_L2.
_L2 = 1


class LayoutError(ValueError):
    """A file that is not such an index; the message says where."""


def check_layout(path: Path, dimension: int, count: int | None = None) -> int:
    """Checks the structure of an index file.

    Args:
        path: of the file.
        dimension: of the vectors that it takes.
        count: how many it holds; None for any number.

    Returns:
        The number of inverted lists; 0 for a flat index.

    Raises:
        LayoutError: it is not such an index.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        reader = _Reader(stream)
        kind = reader.kind("IxMp", "IxPT", "IwFl", "IwSq", "IwPQ")
        count = reader.header(dimension, count)
        lists = 0
        if kind == "IxMp":
            reader.kind("IxF2")
            _check_flat(reader, dimension, count)
            reader.array("ids", "<i8", count, read=False)
        else:
            if kind == "IxPT":
                for _ in range(reader.number("transforms", "i", range(1, 16))):
                    dimension = _check_transform(reader, dimension)
                kind = reader.kind("IwFl", "IwSq", "IwPQ")
                reader.header(dimension, count)
            lists = _check_lists(reader, kind, dimension, count)
        reader.require(reader.left == 0, f"{reader.left} bytes follow its end")
    return lists


class _Reader:
    """Numbers and arrays of a file, one after another, none of them larger than the file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.left = os.fstat(stream.fileno()).st_size

    def require(self, holds: bool | np.bool_, otherwise: str) -> None:
        if not holds:
            raise LayoutError(otherwise)

    def kind(self, *known: str) -> str:
        found = self._bytes(4)
        names = {name.encode(): name for name in known}
        self.require(found in names, f"{found!r} stands where one of {', '.join(known)} should")
        return names[found]

    def number(self, what: str, form: str, among: range | Sequence[int]) -> int:
        """An integer in the form of `struct`, if it is among those."""
        (value,) = struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))
        self.require(value in among, f"{what} cannot be {value}")
        return int(value)

    def skip(self, count: int) -> None:
        self._take(count)
        self._stream.seek(count, os.SEEK_CUR)

    def array(
        self, what: str, dtype: DTypeLike, length: int | None = None, *, read: bool = True
    ) -> NDArray[Any]:
        """An array of a length, None for any; floats must be finite. Empty where it is skipped."""
        (found,) = struct.unpack("<Q", self._bytes(8))
        self.require(
            length is None or found == length, f"there are {found} {what}, and should be {length}"
        )
        size = np.dtype(dtype).itemsize
        if not read:
            self.skip(found * size)
            return np.empty(0, dtype)
        values = np.frombuffer(self._bytes(found * size), dtype)
        if values.dtype.kind == "f":
            self.require(np.isfinite(values).all(), f"{what} hold NaN or infinity")
        return values

    def header(self, dimension: int, count: int | None = None) -> int:
        """Of any index; the number of vectors."""
        self.number("the dimension", "i", (dimension,))
        among = range(1 << 62) if count is None else (count,)
        count = self.number("the number of vectors", "q", among)
        self.skip(16)
        self.number("is_trained", "B", (1,))
        self.number("the metric", "i", (_L2,))
        return count

    def _bytes(self, count: int) -> bytes:
        self._take(count)
        found = self._stream.read(count)
        self.require(len(found) == count, "it ends too early")
        return found

    def _take(self, count: int) -> None:
        self.require(count <= self.left, "it ends too early")
        self.left -= count


def _check_flat(reader: _Reader, dimension: int, count: int) -> None:
    reader.header(dimension, count)
    # Their number is given in units of 4 bytes.
    reader.array("floats", "<f4", dimension * count, read=False)


def _check_transform(reader: _Reader, dimension: int) -> int:
    """A linear transform of vectors; the dimension of its result."""
    kind = reader.kind("Pcam", "LTra", "rrot", "RmDT")
    mapped = means = None
    if kind == "Pcam":
        reader.skip(4 + 4 + 1 + 4)  # eigen_power, epsilon, random_rotation, balanced_bins
        means = reader.array("means", "<f4")
        reader.array("eigenvalues", "<f4")
        reader.array("principal components", "<f4")
    if kind == "RmDT":
        mapped = reader.array("components", "<i4")
    else:
        has_bias = reader.number("have_bias", "B", (0, 1))
        matrix, bias = reader.array("factors", "<f4"), reader.array("biases", "<f4")
    reader.number("the dimension of a transform", "i", (dimension,))
    result = reader.number("the dimension of a transform", "i", range(1, 1 << 24))
    reader.number("is_trained", "B", (1,))
    if mapped is not None:
        reader.require(
            len(mapped) == result and mapped.min() >= -1 and mapped.max() < dimension,
            "a transform takes components that are not there",
        )
        return result
    reader.require(
        len(matrix) == dimension * result
        and len(bias) == (result if has_bias else 0)
        and (means is None or len(means) in (0, dimension)),
        "a transform has not the size of its vectors",
    )
    return result


def _check_lists(reader: _Reader, kind: str, dimension: int, count: int) -> int:
    """Inverted lists behind their header; how many there are."""
    lists = reader.number("the number of lists", "Q", range(1, reader.left))
    reader.number("nprobe", "Q", (1,))
    if reader.kind("IxF2", "IHNf") == "IHNf":
        reader.header(dimension, lists)
        _check_graph(reader, lists)
        reader.kind("IxF2")
    reader.header(dimension, lists)
    reader.array("centroids", "<f4", dimension * lists)
    reader.number("the direct map", "B", (0,))
    reader.array("entries of the direct map", "<i8", 0)
    code_size = 4 * dimension
    if kind == "IwSq":
        code_size = _check_scalar_quantizer(reader, dimension)
    elif kind == "IwPQ":
        code_size = _check_product_quantizer(reader, dimension)
    reader.kind("ilar")
    reader.number("the number of lists", "Q", (lists,))
    reader.number("the size of a code", "Q", (code_size,))
    if reader.kind("full", "sprs") == "full":
        sizes = reader.array("lists", "<u8", lists)
    else:  # of the lists that are not empty
        numbers, sizes = reader.array("lists", "<u8").reshape(-1, 2).T
        in_order = (numbers < lists).all() and (numbers[1:] > numbers[:-1]).all()
        reader.require(in_order, "a list is not there")
    reader.require(sum(sizes.tolist()) == count, "the lists do not hold all vectors")
    reader.skip(count * (code_size + 8))
    return lists


def _check_scalar_quantizer(reader: _Reader, dimension: int) -> int:
    """The size of a code."""
    kind = reader.number("the scalar quantizer", "i", tuple(_SCALAR_BITS))
    code_size = (dimension * _SCALAR_BITS[kind] + 7) // 8
    reader.skip(4 + 4)  # rangestat and its argument, of the training
    reader.number("the dimension of codes", "Q", (dimension,))
    reader.number("the size of a code", "Q", (code_size,))
    trained = 2 * dimension if kind in _SCALAR_PER_COMPONENT else 2 * (kind in _SCALAR_UNIFORM)
    reader.array("trained numbers", "<f4", trained)
    reader.number("the size of a code", "Q", (code_size,))
    reader.number("by_residual", "B", (0, 1))
    return code_size


def _check_product_quantizer(reader: _Reader, dimension: int) -> int:
    """The size of a code."""
    reader.number("by_residual", "B", (0, 1))
    code_size = reader.number("the size of a code", "Q", range(1, 4 * dimension * _MOST_PQ_BITS))
    reader.number("the dimension of codes", "Q", (dimension,))
    parts = reader.number("the number of sub-quantizers", "Q", range(1, dimension + 1))
    bits = reader.number("bits of a sub-quantizer", "Q", range(1, _MOST_PQ_BITS + 1))
    reader.require(
        dimension % parts == 0 and code_size == (parts * bits + 7) // 8,
        f"{parts} sub-quantizers of {bits} bits do not make codes of {code_size} bytes",
    )
    reader.array("centroids of sub-quantizers", "<f4", dimension << bits)
    return code_size


def _check_graph(reader: _Reader, count: int) -> None:
    """The links of an HNSW graph of so many points."""
    reader.array("probabilities", "<f8")
    ends = reader.array("numbers of links", "<i4").astype(np.int64)  # of a point, level by level
    reader.require(
        len(ends) > 1 and ends[0] == 0 and (np.diff(ends) >= 0).all(), "numbers of links descend"
    )
    levels = reader.array("levels", "<i4", count)
    reader.require(
        levels.min() >= 1 and levels.max() < len(ends), "a point has a level that is not there"
    )
    offsets = reader.array("offsets of links", "<u8", count + 1)
    expected = np.concatenate([[0], np.cumsum(ends[levels])])
    reader.require(np.array_equal(offsets, expected), "links do not begin where they should")
    links = reader.array("links", "<i4", int(expected[-1]))
    reader.require(
        links.size == 0 or (links.min() >= -1 and links.max() < count),
        "a link leads to a point that is not there",
    )
    # The links of a level are followed to those of the same level.
    for level in range(1, int(levels.max())):
        begins = expected[:-1][levels > level] + ends[level]
        at = begins[:, None] + np.arange(ends[level + 1] - ends[level])
        reached = links[at]
        reader.require(
            (levels[reached[reached >= 0]] > level).all(), "a link leads to a point of less levels"
        )
    entry = reader.number("the entry point", "i", range(count))
    reader.number("the highest level", "i", (int(levels.max()) - 1,))
    reader.require(levels[entry] == levels.max(), "the entry point is not on the highest level")
    for what in ("efConstruction", "efSearch"):
        reader.number(what, "i", range(1, _MOST_SEARCHED + 1))
    reader.skip(4)
