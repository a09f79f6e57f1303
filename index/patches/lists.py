"""The inverted lists of a patch index as arrays, to be sampled and not only searched.

The index's file ends with codes and addresses of patches, list by list; they are mapped. Sampling a
list for a posterior also needs the squared norm of every code, its patch's centre pixel, and the
distances of codes from their centroids and from their patches. These *tables* are written beside
the index when it is built::

    norms.npy     float32 [count]     squared norm of a code's components
    centres.npy   uint8 [count, C]    centre pixel of its patch
    misfits.npy   float32 [lists]     mean squared distance of patches and their codes
    spread.npy    float32 [lists]     mean squared distance of codes from their centroid

in the order of the lists. Components and distances are in stored levels, 0..255.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from els.index.database import PatchDatabase
from els.storage import files

NORMS = "norms.npy"
CENTRES = "centres.npy"
MISFITS = "misfits.npy"
SPREAD = "spread.npy"
TABLES = (NORMS, CENTRES, MISFITS, SPREAD)

# Bytes of a patch's address, behind the codes of a list.
_ADDRESS_BYTES = 8
# Patches of each list on which its misfit is measured.
_MISFIT_PATCHES = 16
# Lists between two reports of progress.
_REPORT = 512


@final
@dataclass(frozen=True, eq=False)
class InvertedLists:
    """Every code of an index, list by list; arrays may be memory maps.

    Component d of a code is ``unit[d] * byte + zero[d]``, plus its list's ``centroids[list, d]`` if
    ``residual``.

    Attributes:
        data: of each list its codes, uint8 ``[size, D]``, and then its patches' addresses,
            little-endian int64 ``[size]``; all of them as bytes, uint8 ``[count * (D + 8)]``.
        sizes: codes in each list, int64 ``[lists]``.
        offsets: how many codes are in the lists before each, int64 ``[lists]``.
        centroids: float32 ``[lists, D]``.
        norms: float32 ``[count]``; see the module for these four.
        centres: uint8 ``[count, C]``.
        misfits: float32 ``[lists]``.
        spread: float32 ``[lists]``.
        unit: float32 ``[D]``.
        zero: float32 ``[D]``.
        residual: whether codes are of differences from the centroid.
        is_lossless: whether a code is its patch, byte by byte.
    """

    data: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    centroids: NDArray[np.float32]
    norms: NDArray[np.float32]
    centres: NDArray[np.uint8]
    misfits: NDArray[np.float32]
    spread: NDArray[np.float32]
    unit: NDArray[np.float32]
    zero: NDArray[np.float32]
    residual: bool
    is_lossless: bool
    _transforms: tuple[Any, ...]

    @classmethod
    def of(cls, faiss: Any, index: Any, path: Path, tables: Mapping[str, NDArray[Any]]) -> Self:
        """Those of an index that :func:`can_read` accepts.

        Args:
            faiss: the module.
            index: the index.
            path: its file, whose structure was checked (:mod:`.layout`).
            tables: written for it.
        """
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        inverted = ivf.invlists
        sizes = np.array([inverted.list_size(number) for number in range(ivf.nlist)], np.int64)
        is_lossless = ivf.sq.qtype == faiss.ScalarQuantizer.QT_8bit_direct
        unit, zero = np.ones(ivf.d, np.float32), np.zeros(ivf.d, np.float32)
        if not is_lossless:
            least, width = faiss.vector_to_array(ivf.sq.trained).reshape(2, ivf.d)
            # A byte stands for the middle of its interval.
            unit, zero = width / np.float32(255), least + width / np.float32(510)
        centroids = faiss.downcast_index(ivf.quantizer).reconstruct_n(0, ivf.nlist)
        count = int(sizes.sum())
        return cls(
            # The file ends with them.
            data=np.memmap(path, np.uint8, "r")[-count * (ivf.d + _ADDRESS_BYTES) :],
            sizes=sizes,
            offsets=np.cumsum(sizes) - sizes,
            centroids=centroids.reshape(ivf.nlist, ivf.d),
            norms=tables[NORMS],
            centres=tables[CENTRES],
            misfits=tables[MISFITS],
            spread=tables[SPREAD],
            unit=unit,
            zero=zero,
            residual=bool(ivf.by_residual),
            is_lossless=is_lossless,
            _transforms=tuple(transforms(faiss, index)),
        )

    def read(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """A list's codes, uint8 ``[size, D]``, and its patches' addresses, int64 ``[size]``."""
        size, width = int(self.sizes[number]), self.centroids.shape[1]
        begin = int(self.offsets[number]) * (width + _ADDRESS_BYTES)
        middle, end = begin + size * width, begin + size * (width + _ADDRESS_BYTES)
        addresses = self.data[middle:end].view("<i8").astype(np.int64)
        return self.data[begin:middle].reshape(size, width), addresses

    @cached_property
    def largest_norm(self) -> float:
        """Squared norm of the centroid that is furthest out."""
        return float(np.square(self.centroids).sum(1).max())

    @cached_property
    def misfit(self) -> float:
        """Mean squared distance of patches and their codes."""
        return float(np.average(self.misfits, weights=self.sizes))

    @cached_property
    def component_spread(self) -> float:
        """Mean squared distance of codes from their centroid, per component."""
        return float(np.average(self.spread, weights=self.sizes) / self.centroids.shape[1])

    def components(
        self, levels: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Patches as codes see them.

        Args:
            levels: float32 ``[Q, C * P * P]``, in stored levels, of any value.

        Returns:
            Their components, float32 ``[Q, D]``, and the squared distance from what the components
            can say, float64 ``[Q]``.
        """
        rest = np.zeros(len(levels))
        components = levels
        for transform in self._transforms:
            before, components = components, np.asarray(transform.apply(components), np.float32)
            if hasattr(transform, "mean") and transform.mean.size():
                import faiss

                # A rotation that drops components, after the mean was taken away.
                centred = before.astype(np.float64) - faiss.vector_to_array(transform.mean)
                kept = np.square(components.astype(np.float64)).sum(1)
                rest += np.maximum(np.square(centred).sum(1) - kept, 0)
        return components, rest


def can_read(faiss: Any, index: Any) -> bool:
    """Whether codes are one byte per component, of patches as they are or rotated (PCA)."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return False
    inner = faiss.downcast_index(ivf)
    known = (faiss.ScalarQuantizer.QT_8bit, faiss.ScalarQuantizer.QT_8bit_direct)
    return (
        isinstance(inner, faiss.IndexIVFScalarQuantizer)
        and inner.sq.qtype in known
        and all(_keeps_distances(faiss, step) for step in transforms(faiss, index))
    )


def transforms(faiss: Any, index: Any) -> list[Any]:
    """What is applied to vectors, in order, before they reach the inverted lists."""
    if not isinstance(index, faiss.IndexPreTransform):
        return []
    chain = index.chain
    return [faiss.downcast_VectorTransform(chain.at(step)) for step in range(chain.size())]


def write_tables(
    faiss: Any,
    db: PatchDatabase,
    patch_size: int,
    index: Any,
    path: Path,
    progress: Callable[[int, int], object],
) -> dict[str, dict[str, Any]]:
    """Writes the tables of an index beside it, and returns the manifest's entries for them.

    Args:
        faiss: the module.
        db: the images.
        patch_size: P.
        index: one that :func:`can_read` accepts, with all its codes.
        path: its file.
        progress: called with (lists done, in all).
    """
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    count, channels = int(index.ntotal), db.shape[0]
    tables: dict[str, NDArray[Any]] = {
        NORMS: np.zeros(count, np.float32),
        CENTRES: np.zeros((count, channels), np.uint8),
        MISFITS: np.zeros(ivf.nlist, np.float32),
        SPREAD: np.zeros(ivf.nlist, np.float32),
    }
    lists = InvertedLists.of(faiss, index, path, tables)
    images = np.asarray(db.images)
    for number in np.flatnonzero(lists.sizes).tolist():
        if number % _REPORT == 0:
            progress(number, len(lists.sizes))
        codes, addresses = lists.read(number)
        begin = lists.offsets[number]
        place = slice(begin, begin + len(codes))
        image, y, x = db.locate(addresses)
        tables[CENTRES][place] = images[image, :, y, x]
        components = codes.astype(np.float32) * lists.unit + lists.zero
        if lists.residual:
            components += lists.centroids[number]
        tables[NORMS][place] = np.einsum("nd,nd->n", components, components)
        far = np.square(components - lists.centroids[number]).mean()
        tables[SPREAD][number] = far * components.shape[1]
        if not lists.is_lossless:
            chosen = slice(0, _MISFIT_PATCHES)
            levels = _patches(images, patch_size, image[chosen], y[chosen], x[chosen])
            exact, rest = lists.components(levels)
            misfits = np.square(exact - components[chosen]).sum(1) + rest
            tables[MISFITS][number] = misfits.mean()
    progress(len(lists.sizes), len(lists.sizes))
    return {name: _write(path.parent / name, table) for name, table in tables.items()}


def open_tables(folder: Path, count: int, lists: int, channels: int) -> dict[str, NDArray[Any]]:
    """The tables of an index of so many patches in so many lists, memory-mapped.

    Raises:
        ValueError: a table has the wrong type or shape, or tells a distance that is none.
        OSError: one cannot be read.
    """
    expected = {
        NORMS: (np.float32, (count,)),
        CENTRES: (np.uint8, (count, channels)),
        MISFITS: (np.float32, (lists,)),
        SPREAD: (np.float32, (lists,)),
    }
    tables = {}
    for name, (dtype, shape) in expected.items():
        try:
            table = np.load(folder / name, mmap_mode="r")
        except OSError:
            raise
        except Exception as error:  # numpy evaluates the header as Python and documents no errors
            raise ValueError(f"{name} cannot be read ({error})") from error
        if table.dtype != dtype or table.shape != shape or not table.flags.c_contiguous:
            raise ValueError(
                f"{name} is {table.dtype} {table.shape}, and should be {np.dtype(dtype)} {shape}"
            )
        if shape == (lists,) and not (np.isfinite(table) & (table >= 0)).all():
            raise ValueError(f"{name} holds what is not a squared distance")
        tables[name] = table
    return tables


def _write(path: Path, table: NDArray[Any]) -> dict[str, Any]:
    with files.atomic_file(path) as stream:
        np.save(stream, table)
        size = stream.tell()
        stream.seek(0)
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    return {"size": size, "sha256": sha256}


def _patches(
    images: NDArray[np.uint8],
    size: int,
    image: NDArray[np.int64],
    y: NDArray[np.int64],
    x: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Patches around some pixels as levels, float32 ``[n, C * P * P]``."""
    reach = np.arange(size) - size // 2
    rows, columns = y[:, None, None] + reach[:, None], x[:, None, None] + reach
    found = images[image[:, None, None], :, rows, columns]  # [n, P, P, C]
    return found.transpose(0, 3, 1, 2).reshape(len(image), -1).astype(np.float32)


def _keeps_distances(faiss: Any, transform: Any) -> bool:
    if isinstance(transform, faiss.PCAMatrix):
        return bool(transform.eigen_power == 0 and not transform.random_rotation)
    return type(transform) is faiss.RemapDimensionsTransform
