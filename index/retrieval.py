"""The FAISS index of all patches of one size: built once, serving every noise level.

``argmin_k ||x - alpha k|| = argmin_k ||x / alpha - k||``, so clean patches are indexed and queries
are divided by alpha. An index lives inside its database, as ``indices/patch-PPP/{manifest.json,
index.faiss, ...}``. It holds every patch that lies wholly inside its training image; patches that
reach over the border are few and are the exact backends' work.

Beside it lie tables that let its lists be read whole (`els.index.lists`), where its codes are of
one byte per component.

Inside FAISS a pixel is its stored level 0..255, not ``v / 127.5 - 1``: the nearest neighbours are
the same, and one byte per pixel then stores a patch without loss. `PatchIndex` converts.

While it is built, ``indices/patch-PPP.partial`` holds what is finished: the trained, empty index
and shards of added patches, each written whole or not at all. The next build goes on from there.
"""

import hashlib
import json
import math
import operator
import platform
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from els.index.database import DatabaseError, PatchDatabase
from els.index.layout import LayoutError, check_layout
from els.index.lists import (
    NORMS,
    TABLES,
    InvertedLists,
    can_read,
    open_tables,
    transforms,
    write_tables,
)
from els.storage import files, locks
from els.storage.manifests import checksum, package_version, sealed

IndexProgress = Callable[[str, int, int], object]
"""Called with (stage, done, in all): training, adding, merging, writing, tabulating."""

DEFAULT_EFFORT = 32

_FORMAT = "els-patch-index"
_VERSION = 2
_FOLDER, _INDEX, _MANIFEST = "indices", "index.faiss", "manifest.json"
_PLAN, _TRAINED, _LOCK = "plan.json", "trained.faiss", "lock"
_SEED = 0
_SHARD_PATCHES = 1 << 21
_BLOCK_BYTES = 1 << 25
_FLAT_MOST = 1 << 17
_REDUCED_MOST = 64
_VARIANCE = 0.9995
_REDUCED_SHARE = 0.75
_LISTS_MOST = 1 << 16
_PER_LIST, _PER_LIST_LEAST = 64, 32
_HNSW_FROM, _HNSW_LINKS = 4096, 32
_ITERATIONS = 10
# A chunk is what one thread works on at once; results may depend on its size, but not on the number
# of threads. Numbers in a chunk of vectors that are transformed or assigned to a list: FAISS finds
# the nearest of some thousand centroids two to ten times as fast from 2^17 numbers on (1.15).
_CHUNK_NUMBERS = 1 << 18
# Queries in a chunk: few, so that those of one image keep several threads busy.
_CHUNK_QUERIES = 64
_LEVEL = np.float32(127.5)
# FAISS reads codes of whole vectors of 8 several times as fast as others. With SQ8_direct and a
# multiple of 16 it would round queries to bytes, which noisy ones are not.
_LANES, _ROUNDING_LANES = 8, 16


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
        """Pickled and copied as its place: it is opened again."""
        return open_index, (self._db, self.patch_size)

    def __repr__(self) -> str:
        return (
            f"PatchIndex(P={self.patch_size}, {self.count} patches, {self.factory!r}, "
            f"path={str(self.path)!r})"
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 of the index's file, in hexadecimal, as its manifest has it."""
        return self._sha256[_INDEX]

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
        faiss = _faiss()
        levels = self._check_queries(queries)
        k = _check_count("k", k)
        bits, share = self._allowed(label, members)
        if effort is None:
            effort = math.ceil(DEFAULT_EFFORT / math.sqrt(share))
        parameters = self._parameters(_check_count("effort", effort), bits)
        on_gpu = bits is None and self.lists and k <= 2048 and _has_gpu(faiss)
        if on_gpu:
            distances, addresses = self._on_gpu.search(levels, k, params=parameters)
        else:
            distances, addresses = _by_chunks(
                lambda chunk: self._index.search(levels[chunk], k, params=parameters),
                len(levels),
                _CHUNK_QUERIES,
                _check_threads(threads),
            )
        self.check_addresses(addresses, least=-1)
        # Rounding makes some distances of Flat slightly negative.
        distances = np.maximum(distances, 0) / _LEVEL**2
        distances[addresses < 0] = np.inf
        return distances, addresses

    def check_addresses(self, addresses: NDArray[np.int64], *, least: int = 0) -> None:
        """Whether there are patches at addresses that this index has given, or ``least`` for none.

        Raises:
            DatabaseError: if not.
        """
        _, height, width = self._db.shape
        wrong = (addresses < least) | (addresses >= len(self._db) * height * width)
        if wrong.any():
            raise self.damaged(f"it names a patch at {addresses[wrong][0]}, where none is")

    def damaged(self, reason: str) -> DatabaseError:
        """The error that says what to do with an index that is damaged."""
        return _damaged(self.path, reason)

    def verify(self) -> None:
        """Reads the whole index and compares it with the hash made when it was built.

        Raises:
            DatabaseError: it is not what was built.
        """
        for name, built in self._sha256.items():
            with _readable(self.path), (self.path / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != built:
                raise _damaged(self.path, f"the SHA-256 of {name} is {found}, built as {built}")

    def codes_read(self, effort: int = DEFAULT_EFFORT) -> tuple[int, int]:
        """How many codes a query reads at most at an effort, and of how many bytes each."""
        ivf = _faiss().try_extract_index_ivf(self._index)
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
            raise _damaged(self.path, str(error)) from error
        return InvertedLists.of(_faiss(), self._index, tables)

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
        with _one_thread():
            return inverted.components(self._check_queries(queries))

    def list_sizes(self) -> NDArray[np.int64]:
        """Patches in each inverted list, int64 [lists]: how evenly the index is divided."""
        if not self.lists:
            return np.zeros(0, np.int64)
        inverted = _faiss().extract_index_ivf(self._index).invlists
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
        faiss = _faiss()
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
        faiss = _faiss()
        options = faiss.GpuClonerOptions()
        options.allowCpuCoarseQuantizer = True
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self._index, options)


def choose_factory(
    count: int, dimension: int, *, distinct: int, reduced: int, memory: int = 4 * 10**9
) -> str:
    """Chooses the FAISS factory string of an index.

    - Up to 2^17 patches ``Flat``: exact, and as fast as anything at that size.
    - Then inverted lists (IVF), about ``8 sqrt(count)`` of them: many short ones, because a
      low-dimensional search that probes 32 short lists finds more per code scanned than one that
      probes 4 long ones. At most 2^16 and at most ``2^20 / dimension``, since the cost of
      k-means grows with both, and at most one for 32 distinct patches, so that k-means has
      something to average.
    - From 4,096 lists on the nearest are found by an HNSW graph: finding them by brute force
      would cost more than scanning them.
    - Up to 64 dimensions ``SQ8_direct``: one byte per pixel, which is what a pixel is, so that
      nothing is lost; smaller and faster than floats. Zeros fill the code up to an odd multiple
      of 8 bytes (``Pad``): FAISS reads such codes with whole vectors, two to three times as fast.
    - Above, PCA first where that drops a quarter of the components, since neighbouring pixels say
      much the same, then one byte (``SQ8``) per component; else again all pixels. Codes must tell
      what a patch weighs, and not only which are near: what PCA drops is noise in every logit. If
      that exceeds the memory, the first 64 components, then product codes (``PQ``) of 2, 4 or 8
      components per byte: the fewest that fit.

    Args:
        count: number of patches.
        dimension: C * P * P.
        distinct: number of distinct patches to train on.
        reduced: components that explain 99.95 % of the variance.
        memory: bytes that the build may take, the index in memory included.

    Returns:
        The factory string.

    Raises:
        ValueError: not even the smallest fits `memory`.
    """
    if count <= _FLAT_MOST and 2 * count * (4 * dimension + 8) <= memory:
        return "Flat"
    smallest = 0
    for prefix, components, code, code_bytes in _code_choices(dimension, reduced, distinct):
        lists = _choose_lists(count, components, distinct)
        graph = f"_HNSW{_HNSW_LINKS}" if lists >= _HNSW_FROM else ""
        smallest = _needed_bytes(count, dimension, components, lists, code_bytes)
        if code.startswith("PQ"):
            # FAISS makes tables of 256 floats per list and byte, if they fit into 2 GB.
            smallest += min(lists * code_bytes << 10, 1 << 31)
        if smallest <= memory:
            return f"{prefix}IVF{lists}{graph},{code}"
    raise ValueError(
        f"an index of {count:,} patches of dimension {dimension} needs at least {smallest:,} bytes "
        f"of memory, allowed are {memory:,}; allow more (--memory {math.ceil(smallest / 1e9)}GB), "
        "or build the database from fewer images"
    )


def _code_choices(
    dimension: int, reduced: int, distinct: int
) -> Iterator[tuple[str, int, str, int]]:
    """(prefix, components, code, bytes per code), from the best to the smallest."""
    # PCA and PQ (256 centroids a byte) cannot be trained on fewer.
    trainable = distinct >= max(256, dimension)
    components = math.ceil(reduced / 8) * 8
    if dimension <= _REDUCED_MOST or not trainable or components > _REDUCED_SHARE * dimension:
        padded = _padded(dimension)
        prefix = "" if padded == dimension else f"Pad{padded},"
        yield prefix, dimension, "SQ8_direct", padded
    elif components > _REDUCED_MOST:
        yield f"PCA{components},", components, "SQ8", components
    if not trainable:
        return
    components = min(components, _REDUCED_MOST)
    if components > dimension:
        components = 8
    if components > dimension:
        return
    prefix = f"PCA{components},"
    if dimension > _REDUCED_MOST:
        yield prefix, components, "SQ8", components
    for per_byte in (2, 4, 8):
        yield prefix, components, f"PQ{components // per_byte}", components // per_byte


def _padded(dimension: int) -> int:
    """Bytes of an ``SQ8_direct`` code: an odd number of eights, or unchanged if that is short."""
    if dimension <= 2 * _LANES:
        return dimension
    eights = math.ceil(dimension / _LANES)
    return _LANES * (eights + (eights + 1) % 2)


def _choose_lists(count: int, components: int, distinct: int) -> int:
    wanted = 2 ** round(math.log2(8 * math.sqrt(count)))
    bounds = (_LISTS_MOST, (1 << 20) // components, max(1, distinct // _PER_LIST_LEAST))
    return int(min(wanted, 2 ** int(math.log2(min(bounds)))))


def _needed_bytes(count: int, dimension: int, components: int, lists: int, code_bytes: int) -> int:
    """Memory of the build at its peak: merging, or training if that takes more."""
    # Lists grow while they are merged; a list's capacity is up to twice its length.
    merging = round(1.4 * count * (code_bytes + 8)) + _SHARD_PATCHES * (code_bytes + 8)
    sample = min(count, _PER_LIST * lists)
    training = sample * 5 * dimension + sample * 4 * components
    links = 4 * (2 * _HNSW_LINKS + 8)
    return max(merging, training) + lists * (4 * components + links) + (1 << 28)


def build_index(
    db: PatchDatabase,
    patch_size: int,
    *,
    factory: str | None = None,
    memory: int = 4 * 10**9,
    threads: int | None = None,
    overwrite: bool = False,
    progress: IndexProgress | None = None,
) -> PatchIndex:
    """Builds the FAISS index of all patches of one size, and opens it.

    Patches are streamed from the images in a fixed random order of the images; training takes a
    fixed random sample of distinct patches. Killed at any moment, even by SIGKILL, the build goes
    on from the last finished checkpoint (the training, or a shard of 2 million patches) when it is
    called again; an index at the same place is usable until the new one is complete.

    The same images, factory and versions make the same files, byte for byte, on the same kind of
    processor, whatever ``threads`` is, and interrupted or not. Nothing here relies on a BLAS or a
    k-means to round alike with several threads: learning is done by one, and vectors are
    transformed and assigned to lists in chunks of a fixed size, each by one thread. This holds
    where FAISS's BLAS takes its number of threads from OpenMP, as in the wheels on PyPI; another
    one may make other bytes when its own number of threads is changed.
    Where FAISS sees a GPU, k-means and the assignment to lists run there and the file differs from
    one made without. That path has not been tested on a GPU.

    Args:
        db: a database on disk.
        patch_size: P, odd, at least 1, at most H and W.
        factory: a FAISS factory string: ``Flat``, or ``IVF...`` with ``Flat``, ``SQ`` or ``PQ``
            codes, after PCA, OPQ, random rotations or padding; by default `choose_factory` chooses.
        memory: bytes that the build may take; guides the choice and bounds the training sample.
        threads: how many work; by default as many as FAISS is set to use.
        overwrite: replace the index of this size, if there is one.
        progress: called with (stage, done, in all).

    Returns:
        The index, opened.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a patch size, factory or amount of memory that does not serve.
        DatabaseError: the index exists, or another process is building it.
        DiskFullError: (an OSError) no room; what is finished is kept.
        RuntimeError: FAISS is not installed.
    """
    faiss = _faiss()
    patches = _Patches.of(db, patch_size)
    memory, threads = _check_count("memory", memory), _check_threads(threads)
    target = index_folder(db, patch_size)
    if target.exists() and not overwrite:
        raise DatabaseError(
            f"{target} exists already; open it with open_index({patch_size}), or replace it with "
            "overwrite=True (els index --overwrite)"
        )
    report = progress or _silent
    work = target.with_name(f"{target.name}.partial")
    with _claimed(work), _one_thread():
        plan = _Plan.of(patches, factory, memory, report)
        files.require_space(target, 2 * patches.count * (plan.code_bytes + 8))
        if _written_plan(work) != plan.described:
            _clear(work)
            files.write_json(work / _PLAN, plan.described)
        if not (work / _TRAINED).exists():
            _write_index(work / _TRAINED, plan.trained(threads, report))
        _add_shards(work, patches, threads, report)
        with files.atomic_directory(target, overwrite=overwrite) as folder:
            index = _merge_shards(work, patches, report)
            ivf = faiss.try_extract_index_ivf(index)
            report("writing", 0, 1)
            size, sha256 = _write_index(folder / _INDEX, index)
            written = {_INDEX: {"size": size, "sha256": sha256}}
            if can_read(faiss, index):
                report_lists = partial(report, "tabulating")
                written |= write_tables(faiss, db, patch_size, index, folder, report_lists)
            manifest = {
                "format": _FORMAT,
                "version": _VERSION,
                **plan.described,
                "lists": 0 if ivf is None else ivf.nlist,
                "files": written,
            }
            files.write_json(folder / _MANIFEST, sealed(manifest))
            report("writing", 1, 1)
        shutil.rmtree(work)
    return open_index(db, patch_size)


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
    faiss = _faiss()
    patches = _Patches.of(db, patch_size)
    path = index_folder(db, patch_size)
    manifest = _read_manifest(path, patches)
    for name, stored in manifest["files"].items():
        with _readable(path):
            size = (path / name).stat().st_size
        if size != stored["size"]:
            raise _damaged(path, f"{name} has {size:,} bytes, built with {stored['size']:,}")
    index = _read_index(path / _INDEX, patches, faiss.IO_FLAG_MMAP, full=True)
    ivf = faiss.try_extract_index_ivf(index)
    if manifest["lists"] != (0 if ivf is None else ivf.nlist) or can_read(faiss, index) != (
        NORMS in manifest["files"]
    ):
        raise _damaged(path, f"{_INDEX} is not of the kind that {_MANIFEST} says")
    if ivf is not None:
        inverted = faiss.downcast_InvertedLists(ivf.invlists)
        if isinstance(inverted, faiss.OnDiskInvertedLists):
            # Prefetching would read the lists whole, that of the black patches too.
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


@final
@dataclass(frozen=True, eq=False)
class _Patches:
    """The patches of one size that lie wholly inside their image, in the order of the index."""

    db: PatchDatabase
    size: int

    @classmethod
    def of(cls, db: PatchDatabase, patch_size: int) -> Self:
        try:
            size = operator.index(patch_size)
        except TypeError as error:
            raise TypeError(f"patch_size must be an integer, got {patch_size!r}") from error
        _, height, width = db.shape
        most = min(height, width)
        if size % 2 == 0 or not 1 <= size <= most:
            raise ValueError(
                f"patch_size must be odd and in 1..{most}, so that a patch fits into an image of "
                f"{height} x {width}; got {size}"
            )
        return cls(db, size)

    @property
    def sites(self) -> tuple[int, int]:
        """Rows and columns of centres per image."""
        _, height, width = self.db.shape
        return height - self.size + 1, width - self.size + 1

    @property
    def count(self) -> int:
        return len(self.db) * math.prod(self.sites)

    @property
    def dimension(self) -> int:
        return self.db.shape[0] * self.size**2

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Order of the images: random, so that the start of a long list is a random sample."""
        return np.random.default_rng(_SEED).permutation(len(self.db))

    @property
    def shards(self) -> int:
        return math.ceil(len(self.db) / self._images_per_shard)

    @property
    def _images_per_shard(self) -> int:
        return max(1, _SHARD_PATCHES // math.prod(self.sites))

    def blocks(self, shard: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Levels float32 [n, C * P * P] and addresses int64 [n], a bounded number at once."""
        images = self.order[shard * self._images_per_shard :][: self._images_per_shard]
        step = max(1, _BLOCK_BYTES // (4 * self.dimension * math.prod(self.sites)))
        rows, columns = (np.arange(length) + self.size // 2 for length in self.sites)
        for start in range(0, len(images), step):
            chosen = images[start : start + step]
            windows = np.lib.stride_tricks.sliding_window_view(
                self.db.images[chosen], (self.size, self.size), axis=(2, 3)
            )
            levels = windows.transpose(0, 2, 3, 1, 4, 5).astype(np.float32)
            addresses = self.db.address(chosen[:, None, None], rows[:, None], columns)
            yield levels.reshape(-1, self.dimension), addresses.ravel()

    def sample(self, most: int) -> NDArray[np.uint8]:
        """Distinct patches among `most` random ones, uint8 [n, C * P * P], in random order."""
        random = np.random.default_rng(_SEED)
        count = min(most, self.count)
        chosen = np.sort(random.choice(self.count, count, replace=False))
        found = np.empty((count, self.db.shape[0], self.size, self.size), np.uint8)
        image, site = np.divmod(chosen, math.prod(self.sites))
        y, x = np.divmod(site, self.sites[1])
        for dy, dx in np.ndindex(self.size, self.size):
            found[:, :, dy, dx] = self.db.images[image, :, y + dy, x + dx]
        rows = found.reshape(count, self.dimension).view(f"V{self.dimension}").ravel()
        # Many equal patches (black ones) would take many centroids to one place.
        _, first = np.unique(rows, return_index=True)
        random.shuffle(first)
        return found.reshape(count, self.dimension)[first]


@final
@dataclass(frozen=True, eq=False)
class _Plan:
    """What is built, and the sample to train it on."""

    patches: _Patches
    factory: str
    empty: Any
    sample: NDArray[np.uint8]

    @classmethod
    def of(cls, patches: _Patches, factory: str | None, memory: int, report: IndexProgress) -> Self:
        report("training", 0, _ITERATIONS)
        lists = _choose_lists(patches.count, min(patches.dimension, _REDUCED_MOST), patches.count)
        # A fifth of the memory for the sample as bytes and, while training, as floats.
        most = max(1, memory // 5 // (5 * patches.dimension))
        sample = patches.sample(min(most, _PER_LIST * lists))
        if factory is None:
            factory = choose_factory(
                patches.count,
                patches.dimension,
                distinct=len(sample),
                reduced=_explaining(sample),
                memory=memory,
            )
        return cls(patches, factory, _empty_index(factory, patches.dimension, len(sample)), sample)

    @property
    def code_bytes(self) -> int:
        ivf = _faiss().try_extract_index_ivf(self.empty)
        return 4 * self.patches.dimension if ivf is None else int(ivf.code_size)

    @property
    def described(self) -> dict[str, Any]:
        """All that the bytes of the index depend on."""
        faiss = _faiss()
        return {
            "content_hash": self.patches.db.content_hash,
            "patch_size": self.patches.size,
            "factory": self.factory,
            "count": self.patches.count,
            "shards": self.patches.shards,
            "sample": len(self.sample),
            "made_with": {
                "els-machine": package_version(),
                "faiss": faiss.__version__,
                "gpu": _has_gpu(faiss),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def trained(self, threads: int, report: IndexProgress) -> Any:
        """The index that patches are added to."""
        faiss = _faiss()
        index, sample = self.empty, self.sample.astype(np.float32)
        ivf = faiss.try_extract_index_ivf(index)
        try:
            for transform in transforms(faiss, index):
                transform.train(sample)
                sample = transform.apply(sample)
            if ivf is not None:
                _train_lists(ivf, sample, threads, report)
                ivf.train(sample)
                index.is_trained = True
        except RuntimeError as error:
            raise ValueError(
                f"factory {self.factory!r} cannot be trained on {len(sample)} distinct patches of "
                f"dimension {self.patches.dimension} ({error}); leave it out to have one chosen"
            ) from error
        report("training", _ITERATIONS, _ITERATIONS)
        return index


def _train_lists(
    ivf: Any, sample: NDArray[np.float32], threads: int, report: IndexProgress
) -> None:
    """Puts centroids into the coarse quantizer: k-means by Lloyd's iterations.

    Args:
        ivf: the inverted lists.
        sample: vectors in random order, ``[n, d]``.
        threads: how many work.
        report: called after every iteration.
    """
    faiss = _faiss()
    centroids = sample[: ivf.nlist].copy()
    for iteration in range(_ITERATIONS):
        report("training", iteration, _ITERATIONS)
        flat = faiss.IndexFlatL2(ivf.d)
        flat.add(centroids)
        distances, lists = _nearest(flat, threads)(sample)
        sizes = np.bincount(lists, minlength=ivf.nlist)
        sums = np.stack([np.bincount(lists, column, ivf.nlist) for column in sample.T], axis=1)
        centroids = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
        # A list without vectors moves to one that is far from its centroid.
        empty = np.flatnonzero(sizes == 0)
        centroids[empty] = sample[np.argsort(-distances, kind="stable")[: len(empty)]]
    ivf.quantizer.train(centroids)
    ivf.quantizer.add(centroids)


def _nearest(
    quantizer: Any, threads: int
) -> Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Finds squared distance and number of vectors' nearest centroids; on a GPU if there is one."""
    faiss = _faiss()
    if _has_gpu(faiss):
        flat = faiss.IndexFlatL2(quantizer.d)
        flat.add(quantizer.reconstruct_n(0, quantizer.ntotal))
        quantizer, threads = faiss.index_cpu_to_all_gpus(flat), 1

    def search(
        vectors: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        distances, lists = _by_chunks(
            lambda chunk: quantizer.search(vectors[chunk], 1),
            len(vectors),
            _chunk_rows(vectors),
            threads,
        )
        return distances[:, 0], lists[:, 0]

    return search


def _add_shards(work: Path, patches: _Patches, threads: int, report: IndexProgress) -> None:
    done = 0
    report("adding", 0, patches.count)
    for number in range(patches.shards):
        place = _shard(work, number)
        if place.exists():
            done += int(_read_index(place, patches).ntotal)
            report("adding", done, patches.count)
            continue
        shard = _read_index(work / _TRAINED, patches)
        add = _adder(shard, threads)
        for levels, addresses in patches.blocks(number):
            add(levels, addresses)
            done += len(addresses)
            report("adding", done, patches.count)
        _write_index(place, shard)


def _adder(index: Any, threads: int) -> Callable[[NDArray[np.float32], NDArray[np.int64]], object]:
    """Adds vectors and their addresses to an index."""
    faiss = _faiss()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        add: Callable[[NDArray[np.float32], NDArray[np.int64]], object] = index.add_with_ids
        return add
    nearest, steps = (
        _nearest(faiss.downcast_index(ivf.quantizer), threads),
        transforms(faiss, index),
    )

    def add_assigned(levels: NDArray[np.float32], addresses: NDArray[np.int64]) -> None:
        for step in steps:
            levels = _transformed(step, levels, threads)
        _, lists = nearest(levels)
        pointers = map(faiss.swig_ptr, (levels, addresses, np.ascontiguousarray(lists)))
        ivf.add_core(len(levels), *pointers)
        index.ntotal = ivf.ntotal

    return add_assigned


def _transformed(step: Any, vectors: NDArray[np.float32], threads: int) -> NDArray[np.float32]:
    (result,) = _by_chunks(
        lambda chunk: (step.apply(vectors[chunk]),), len(vectors), _chunk_rows(vectors), threads
    )
    return result


def _merge_shards(work: Path, patches: _Patches, report: IndexProgress) -> Any:
    """One index of all shards, in their order."""
    faiss = _faiss()
    index = _read_index(work / _TRAINED, patches)
    for number in range(patches.shards):
        report("merging", number, patches.shards)
        shard = _read_index(_shard(work, number), patches)
        into = faiss.try_extract_index_ivf(index)
        if into is None:
            index.merge_from(shard, 0)
            continue
        into.merge_from(faiss.extract_index_ivf(shard), 0)
        index.ntotal = into.ntotal
    report("merging", patches.shards, patches.shards)
    return index


def _empty_index(factory: str, dimension: int, distinct: int) -> Any:
    """The untrained index of a factory string, if it is of a kind that serves."""
    faiss = _faiss()
    try:
        index = faiss.index_factory(dimension, factory)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"factory {factory!r} is not one that FAISS makes of vectors of dimension {dimension} "
            f"({error}); leave it out to have one chosen"
        ) from error
    if type(index) is faiss.IndexFlat:
        return faiss.IndexIDMap(index)
    inner = index
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)
    if type(inner) not in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ):
        raise ValueError(
            f"factory {factory!r} makes a {type(inner).__name__}, which cannot be built in "
            "shards here; take Flat, or IVF with Flat, SQ or PQ codes, as in IVF1024,SQ8_direct"
        )
    quantizer = faiss.downcast_index(inner.quantizer)
    if type(quantizer) not in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexHNSWFlat):
        raise ValueError(
            f"factory {factory!r} finds lists by a {type(quantizer).__name__}, which is not "
            "trained here; take IVF1024 or IVF65536_HNSW32"
        )
    if inner.nlist > distinct:
        raise ValueError(
            f"factory {factory!r} wants {inner.nlist} lists, but there are {distinct} distinct "
            f"patches to train them; ask for at most {max(1, distinct // _PER_LIST_LEAST)}"
        )
    known = (faiss.PCAMatrix, faiss.OPQMatrix, faiss.RandomRotationMatrix)
    for step in transforms(faiss, index):
        if type(step) not in (*known, faiss.RemapDimensionsTransform):
            raise ValueError(
                f"factory {factory!r} transforms vectors by a {type(step).__name__}; take PCA, "
                "OPQ, RR or Pad"
            )
    if isinstance(inner, faiss.IndexIVFScalarQuantizer):
        direct = inner.sq.qtype == faiss.ScalarQuantizer.QT_8bit_direct
        pads = all(
            type(step) is faiss.RemapDimensionsTransform for step in transforms(faiss, index)
        )
        if direct and not pads:
            raise ValueError(
                f"factory {factory!r} stores transformed pixels as bytes unscaled; take SQ8 after "
                "a transformation, or SQ8_direct without one but Pad"
            )
        if direct and inner.d % _ROUNDING_LANES == 0:
            raise ValueError(
                f"factory {factory!r} has codes of {inner.d} bytes: with a multiple of "
                f"{_ROUNDING_LANES} FAISS rounds queries to bytes, which noisy patches are not; "
                f"take Pad{inner.d + _LANES}"
            )
        # Bytes hold a pixel, not its difference from a centroid.
        inner.by_residual = bool(inner.by_residual and not direct)
    return index


def _explaining(sample: NDArray[np.uint8]) -> int:
    """Principal components that explain nearly all of the variance, 1 to the dimension."""
    _, dimension = sample.shape
    if dimension <= _REDUCED_MOST or len(sample) < 2:
        return int(dimension)
    faiss = _faiss()
    spectrum = faiss.PCAMatrix(dimension, 1)
    # 2^16 patches tell the spectrum; the rest would only cost time.
    spectrum.train(sample[: 1 << 16].astype(np.float32))
    explained = np.cumsum(faiss.vector_to_array(spectrum.eigenvalues).astype(np.float64).clip(0))
    return min(int(dimension), 1 + int(np.searchsorted(explained, _VARIANCE * explained[-1])))


def index_folder(db: PatchDatabase, patch_size: int) -> Path:
    """Where the index of a patch size is or will be; ValueError for a database in memory."""
    if db.path is None:
        raise ValueError(
            "an index lives inside its database, and this one is in memory; write it with "
            "PatchDatabase.build(images, labels, path=...) first"
        )
    return db.path / _FOLDER / f"patch-{patch_size:03d}"


def _shard(work: Path, number: int) -> Path:
    return work / f"shard-{number:05d}.faiss"


@contextmanager
def _claimed(work: Path) -> Iterator[None]:
    """Makes the folder of checkpoints and keeps other processes out of it until the end."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = locks.take_lock(work / _LOCK)
    except BlockingIOError as error:
        raise DatabaseError(
            f"another process is building the index in {work}; wait for it to finish"
        ) from error
    with lock:
        files.remove_stale(work)
        try:
            yield
        except (KeyboardInterrupt, OSError) as interruption:
            if _has_checkpoint(work):
                interruption.add_note(
                    f"what is finished is kept in {work}; "
                    "start again with the same arguments to go on"
                )
            raise
        finally:
            if not _has_checkpoint(work):
                shutil.rmtree(work, ignore_errors=True)


def _has_checkpoint(work: Path) -> bool:
    return any(work.glob("*.faiss"))


def _clear(work: Path) -> None:
    """Removes checkpoints of another plan; the lock stays."""
    for entry in work.iterdir():
        if entry.name != _LOCK:
            entry.unlink()


def _written_plan(work: Path) -> Any:
    try:
        return json.loads((work / _PLAN).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _write_index(path: Path, index: Any) -> tuple[int, str]:
    """Writes an index whole or not at all; its size in bytes and SHA-256."""
    faiss = _faiss()
    digest = hashlib.sha256()
    with files.atomic_file(path) as stream:
        failures: list[OSError] = []

        def write(data: bytes) -> int:
            digest.update(data)
            try:
                stream.write(data)
            except OSError as error:
                failures.append(error)
                return 0
            return len(data)

        try:
            faiss.write_index(index, faiss.PyCallbackIOWriter(write, 1 << 20))
        except RuntimeError:
            # FAISS only knows that writing failed; the system knows why.
            if failures:
                raise failures[0] from None
            raise
        size = stream.tell()
    return size, digest.hexdigest()


def _read_index(
    path: Path, patches: _Patches, flags: int | None = None, *, full: bool = False
) -> Any:
    """An index or checkpoint of some patches; of all of them if it is to be full."""
    faiss = _faiss()
    try:
        with _readable(path.parent):
            check_layout(path, patches.dimension, patches.count if full else None)
    except LayoutError as error:
        raise _damaged(path.parent, f"FAISS cannot read {path.name} ({error})") from error
    if flags is None:
        # While building nothing is searched, and tables for it would be made for every shard.
        flags = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
    try:
        return faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        raise _damaged(path.parent, f"FAISS cannot read {path.name} ({error})") from error


def _read_manifest(path: Path, patches: _Patches) -> dict[str, Any]:
    place = path / _MANIFEST
    build = f"build it with build_index({patches.size}) (els index --patch-sizes {patches.size})"
    if not path.exists():
        raise DatabaseError(f"there is no index of patch size {patches.size} at {path}; {build}")
    with _readable(path):
        text = place.read_bytes()
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{_MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise _damaged(path, f"{_MANIFEST} is not of a patch index (no format {_FORMAT!r})")
    version = manifest.get("version")
    if type(version) is int and version > _VERSION:
        raise DatabaseError(
            f"{path} has format version {version}, this els-machine reads {_VERSION}; upgrade "
            "els-machine (pip install -U els-machine)"
        )
    if version != _VERSION or manifest.get("checksum") != checksum(manifest):
        raise _damaged(path, f"the text of {_MANIFEST} does not match its checksum")
    match manifest:
        case {
            "content_hash": str(content),
            "patch_size": int(size),
            "count": int(count),
            "factory": str(),
            "lists": int(),
            "files": dict() as stored,
        } if stored.keys() in ({_INDEX}, {_INDEX, *TABLES}) and all(
            map(_is_entry, stored.values())
        ):
            found = (content, size, count)
        case _:
            raise _damaged(path, f"the fields of {_MANIFEST} are not those of a patch index")
    if found != (patches.db.content_hash, patches.size, patches.count):
        raise DatabaseError(
            f"{path} is the index of other images or another patch size (content {found[0]}, "
            f"patch size {found[1]}); {build} and --overwrite"
        )
    return manifest


def _is_entry(entry: object) -> bool:
    """Whether it says of a file what the manifest should."""
    match entry:
        case {"size": int(), "sha256": str()}:
            return True
    return False


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _damaged(path, f"{error.filename} cannot be read ({error.strerror})") from error


def _damaged(path: Path, reason: str) -> DatabaseError:
    return DatabaseError(
        f"{path} is damaged: {reason}; remove that folder and build the index again (els index)"
    )


def _check_count(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}") from error
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def _check_threads(threads: int | None) -> int:
    return (
        int(_faiss().omp_get_max_threads()) if threads is None else _check_count("threads", threads)
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS and its BLAS use one thread for what this thread asks of them."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _chunk_rows(vectors: NDArray[np.float32]) -> int:
    _, dimension = vectors.shape
    return max(1, _CHUNK_NUMBERS // int(dimension))


def _by_chunks(
    work: Callable[[slice], tuple[NDArray[Any], ...]], count: int, rows: int, threads: int
) -> list[NDArray[Any]]:
    """The arrays that ``work`` gives for chunks of so many rows, put together.

    Each chunk is the work of one thread, with one thread of OpenMP and so of FAISS's BLAS, and
    where chunks end does not depend on the number of threads: so neither do the results.
    """
    chunks = [slice(start, start + rows) for start in range(0, max(count, 1), rows)]
    set_threads = _faiss().omp_set_num_threads  # of the thread that calls it
    with ThreadPoolExecutor(threads, initializer=set_threads, initargs=(1,)) as pool:
        parts = list(pool.map(work, chunks))
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _has_gpu(faiss: Any) -> bool:
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _silent(stage: str, done: int, total: int) -> None:
    """Takes the place of a progress callback that was not given."""


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise RuntimeError(
            "a patch index needs FAISS, which is not installed: pip install 'els-machine[cpu]'"
        ) from error
    return faiss
