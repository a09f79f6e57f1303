"""The FAISS index of all patches of one size: built once, serving every noise level.

``argmin_k ||x - alpha k|| = argmin_k ||x / alpha - k||``, so clean patches are indexed and queries
are divided by alpha. An index lives inside its database, as ``indices/patch-PPP/{manifest.json,
index.faiss, ...}``. It holds every patch that lies wholly inside its training image; patches that
reach over the border are few, and are weighed exactly.

Beside it lie tables for sampling its lists (`els.index.patches.lists`), where its codes have one
byte per component.

Inside FAISS a pixel is its stored level 0..255, not ``v / 127.5 - 1``: the nearest neighbours are
the same, and one byte per pixel then stores a patch without loss. `PatchIndex` converts.

While it is built, ``indices/patch-PPP.partial`` holds checkpoints: the trained, empty index and
build chunks of added patches, each written whole or not at all. The next build resumes from them.
"""

import hashlib
import math
import operator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from els.index.database import DatabaseError, PatchDatabase
from els.index.patches.faiss_library import (
    by_chunks,
    check_count,
    check_threads,
    faiss_module,
    has_gpu,
    one_thread,
)
from els.index.patches.files import (
    INDEX,
    MANIFEST,
    damaged,
    index_folder,
    read_index,
    read_manifest,
    readable,
)
from els.index.patches.lists import (
    NORMS,
    InvertedLists,
    can_read,
    open_tables,
)
from els.index.patches.rows import PatchRows

DEFAULT_EFFORT = 32
# Queries that one thread searches at once: few, so that one image occupies several threads.
_CHUNK_QUERIES = 64
_LEVEL = np.float32(127.5)


@final
@dataclass(frozen=True, eq=False, repr=False)
class PatchIndex:
    """All patches of one size that lie wholly inside their training image, searchable.

    Made by `PatchDatabase.build_index` and `PatchDatabase.open_index`, never directly.

    Attributes:
        patch_size: P, odd.
        factory: the FAISS factory string that makes such an index.
        is_exact: whether a search returns the true nearest patches (rounding in float32 aside):
            a ``Flat`` index does.
        count: number of patches, ``N * (H - P + 1) * (W - P + 1)``.
        lists: number of inverted lists; 0 if there are none.
        size_bytes: of the index on disk. It is memory-mapped: a search reads the lists it probes.
        path: the folder, absolute.
    """

    patch_size: int
    factory: str
    is_exact: bool
    count: int
    lists: int
    size_bytes: int
    path: Path
    _db: PatchDatabase
    _index: Any
    _sha256: dict[str, str]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as its path: it is opened again."""
        return open_index, (self._db, self.patch_size)

    def __repr__(self) -> str:
        return (
            f"PatchIndex(P={self.patch_size}, {self.count} patches, {self.factory!r}, "
            f"path={str(self.path)!r})"
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 of the index's file, in hexadecimal, as its manifest has it."""
        return self._sha256[INDEX]

    def search(
        self,
        queries: ArrayLike,
        k: int,
        *,
        label: int | None = None,
        members: ArrayLike | None = None,
        effort: int | None = None,
        threads: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k nearest patches of each query, nearest first.

        At most ``2 * effort * count / lists`` codes are scanned for a query (the list in which
        that number is reached is cut short), because patches that occur very often make huge
        lists: 12 million of the 40 million 3 x 3 patches of Fashion-MNIST are black. Lists are in
        random order of the images, so the part that is scanned is a random sample, of every class.

        On a CPU the number of threads changes no bit of the result.

        Where FAISS sees a GPU, searches among all images with k <= 2048 run there. That path has
        not been tested on a GPU.

        Args:
            queries: float32 [Q, C, P, P], noisy patches divided by alpha, pixels nominally in
                [-1, 1] plus noise of standard deviation sigma / alpha.
            k: how many to find, at least 1.
            label: find patches of images of this class only.
            members: find patches of these images only, integers; not together with `label`. For
                a few images an exact backend is faster.
            effort: inverted lists to probe, at least 1; more is slower and finds more. By default
                32, and under a restriction more: 32 / sqrt(the share of images allowed). An
                exact index ignores it.
            threads: how many work; by default as many as FAISS is set to use.

        Returns:
            (squared distances float32 [Q, k], addresses int64 [Q, k]). The distances are the
            index's: rounded in Flat and SQ8_direct, approximate with other codes. Where fewer
            than k were found: inf and -1.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: wrong shape, NaN or infinity, or a value out of range.
            DatabaseError: the index names patches that are not there.
        """
        faiss = faiss_module()
        levels = self._check_queries(queries)
        k = check_count("k", k)
        bits, share = self._allowed(label, members)
        if effort is None:
            effort = math.ceil(DEFAULT_EFFORT / math.sqrt(share))
        parameters = self._parameters(check_count("effort", effort), bits)
        on_gpu = bits is None and self.lists and k <= 2048 and has_gpu(faiss)
        if on_gpu:
            distances, addresses = self._on_gpu.search(levels, k, params=parameters)
        else:
            distances, addresses = by_chunks(
                lambda chunk: self._index.search(levels[chunk], k, params=parameters),
                len(levels),
                _CHUNK_QUERIES,
                check_threads(threads),
            )
        self.check_addresses(addresses, least=-1)
        # Rounding makes some distances of Flat slightly negative.
        distances = np.maximum(distances, 0) / _LEVEL**2
        distances[addresses < 0] = np.inf
        return distances, addresses

    def check_addresses(self, addresses: NDArray[np.int64], *, least: int = 0) -> None:
        """Whether there are patches at addresses of this index, or ``least`` for none.

        Raises:
            DatabaseError: if not.
        """
        _, height, width = self._db.shape
        wrong = (addresses < least) | (addresses >= len(self._db) * height * width)
        if wrong.any():
            raise self.damaged(f"it names a patch at {addresses[wrong][0]}, where none is")

    def damaged(self, reason: str) -> DatabaseError:
        """The error for an index that is damaged, with the remedy."""
        return damaged(self.path, reason)

    def verify(self) -> None:
        """Reads the whole index and compares it with the hash made when it was built.

        Raises:
            DatabaseError: it is not what was built.
        """
        for name, built in self._sha256.items():
            with readable(self.path), (self.path / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != built:
                raise damaged(self.path, f"the SHA-256 of {name} is {found}, built as {built}")

    def codes_read(self, effort: int = DEFAULT_EFFORT) -> tuple[int, int]:
        """How many codes a query reads at most at an effort, and of how many bytes each."""
        ivf = faiss_module().try_extract_index_ivf(self._index)
        if ivf is None:
            return self.count, 4 * self._index.d
        return math.ceil(2 * min(effort, self.lists) * self.count / self.lists), int(ivf.code_size)

    @cached_property
    def inverted(self) -> InvertedLists | None:
        """The lists, to be read whole; None where codes are not one byte per component.

        Raises:
            DatabaseError: the tables beside the index are damaged.
        """
        if len(self._sha256) == 1:
            return None
        try:
            tables = open_tables(self.path, self.count, self.lists, self._db.shape[0])
        except (OSError, ValueError) as error:
            raise damaged(self.path, str(error)) from error
        return InvertedLists.of(faiss_module(), self._index, self.path / INDEX, tables)

    def components(self, queries: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Noisy patches as the codes of :attr:`inverted` see them.

        Args:
            queries: as for `search`.

        Returns:
            Components, float32 [Q, D], and the squared distance from what they can say, float64
            [Q], both in stored levels.

        Raises:
            TypeError, ValueError: as `search`.
        """
        inverted = self.inverted
        assert inverted is not None
        with one_thread():
            return inverted.components(self._check_queries(queries))

    def list_sizes(self) -> NDArray[np.int64]:
        """Patches in each inverted list, int64 [lists]: how evenly the index is divided."""
        if not self.lists:
            return np.zeros(0, np.int64)
        inverted = faiss_module().extract_index_ivf(self._index).invlists
        return np.array([inverted.list_size(number) for number in range(self.lists)])

    def _check_queries(self, queries: ArrayLike) -> NDArray[np.float32]:
        array = np.asarray(queries)
        if array.dtype != np.float32:
            raise TypeError(f"queries must be float32, got {array.dtype}; convert them first")
        expected = (self._db.shape[0], self.patch_size, self.patch_size)
        if array.ndim != 4 or array.shape[1:] != expected:
            raise ValueError(
                f"queries must be [Q, C, P, P] with C, P, P = {expected}, got shape "
                f"{array.shape}; cut one patch around each pixel, as open_index({self.patch_size})"
                " holds them"
            )
        if not np.isfinite(array).all():
            raise ValueError("queries hold NaN or infinity; look where they come from")
        flat = array.reshape(len(array), math.prod(expected))
        return np.ascontiguousarray((flat + np.float32(1)) * _LEVEL)

    def _allowed(
        self, label: int | None, members: ArrayLike | None
    ) -> tuple[NDArray[np.uint8] | None, float]:
        """One bit per address (None: all), and the share of images allowed."""
        if label is not None and members is not None:
            raise ValueError("give label or members, not both; intersect them yourself")
        if label is not None:
            label = operator.index(label)
            share = len(self._db.class_members(label)) / len(self._db)
            # Sampling asks for one class again and again.
            if label not in self._class_bits:
                self._class_bits.clear()
                self._class_bits[label] = self._bits(self._db.class_members(label))
            return self._class_bits[label], share
        if members is None:
            return None, 1.0
        array = np.asarray(members)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise ValueError(
                f"members must be a list of at least one image number, got {array.dtype} of shape "
                f"{array.shape}; leave it out to search all images"
            )
        if array.min() < 0 or array.max() >= len(self._db):
            raise ValueError(
                f"members must be in 0..{len(self._db) - 1}, got {array.min()}..{array.max()}"
            )
        return self._bits(array), len(np.unique(array)) / len(self._db)

    @cached_property
    def _class_bits(self) -> dict[int, NDArray[np.uint8]]:
        return {}

    def _bits(self, members: NDArray[Any]) -> NDArray[np.uint8]:
        _, height, width = self._db.shape
        images = np.zeros(len(self._db), np.uint8)
        images[members] = 1
        # Eight images fill whole bytes, so blocks of them can be packed one by one.
        blocks = [
            np.packbits(np.repeat(images[start : start + 4096], height * width), bitorder="little")
            for start in range(0, len(images), 4096)
        ]
        return np.concatenate(blocks)

    def _parameters(self, effort: int, bits: NDArray[np.uint8] | None) -> Any:
        faiss = faiss_module()
        selector = {} if bits is None else {"sel": faiss.IDSelectorBitmap(bits)}
        if not self.lists:
            return faiss.SearchParameters(**selector)
        probes = min(effort, self.lists)
        most, _ = self.codes_read(probes)
        ivf = faiss.extract_index_ivf(self._index)
        if isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW):
            selector["quantizer_params"] = faiss.SearchParametersHNSW(
                efSearch=max(16, probes + probes // 2)
            )
        parameters = faiss.SearchParametersIVF(nprobe=probes, max_codes=most, **selector)
        if isinstance(self._index, faiss.IndexPreTransform):
            return faiss.SearchParametersPreTransform(index_params=parameters)
        return parameters

    @cached_property
    def _on_gpu(self) -> Any:
        faiss = faiss_module()
        options = faiss.GpuClonerOptions()
        options.allowCpuCoarseQuantizer = True
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self._index, options)


def open_index(db: PatchDatabase, patch_size: int) -> PatchIndex:
    """Opens the index of one patch size at once, by memory map.

    Checks the manifest, that it belongs to this database, the files' sizes and the structure of
    the index, so that no damage makes FAISS or the kernels allocate or read what is not there;
    addresses are checked when they are read. Damage that only changes what is found is noticed by
    `PatchIndex.verify`, which reads everything.

    Args:
        db: the database on disk.
        patch_size: P.

    Returns:
        The index.

    Raises:
        ValueError: a patch size that does not serve.
        DatabaseError: there is no index, or it is damaged, of other images, or too new.
        RuntimeError: FAISS is not installed.
    """
    faiss = faiss_module()
    patches = PatchRows.of(db, patch_size)
    path = index_folder(db, patch_size)
    manifest = read_manifest(path, patches)
    for name, stored in manifest["files"].items():
        with readable(path):
            size = (path / name).stat().st_size
        if size != stored["size"]:
            raise damaged(path, f"{name} has {size:,} bytes, built with {stored['size']:,}")
    index = read_index(path / INDEX, patches, faiss.IO_FLAG_MMAP, full=True)
    ivf = faiss.try_extract_index_ivf(index)
    if manifest["lists"] != (0 if ivf is None else ivf.nlist) or can_read(faiss, index) != (
        NORMS in manifest["files"]
    ):
        raise damaged(path, f"{INDEX} is not of the kind that {MANIFEST} says")
    if ivf is not None:
        inverted = faiss.downcast_InvertedLists(ivf.invlists)
        if isinstance(inverted, faiss.OnDiskInvertedLists):
            # Prefetching would read whole lists, also that of the black patches.
            inverted.prefetch_nthread = 0
    return PatchIndex(
        patch_size=patches.size,
        factory=manifest["factory"],
        is_exact=not manifest["lists"],
        count=patches.count,
        lists=manifest["lists"],
        size_bytes=sum(stored["size"] for stored in manifest["files"].values()),
        path=path.absolute(),
        _db=db,
        _index=index,
        _sha256={name: stored["sha256"] for name, stored in manifest["files"].items()},
    )
