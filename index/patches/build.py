"""Building a patch index, resumably."""

import json
import math
import platform
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from els.index.database import DatabaseError, PatchDatabase
from els.index.patches.factory import (
    BESIDE_CODES,
    LANES,
    LEAST_PATCHES_PER_LIST,
    PATCHES_PER_LIST,
    REDUCED_MOST,
    ROUNDING_LANES,
    choose_factory,
    choose_lists,
)
from els.index.patches.faiss_library import (
    by_chunks,
    check_count,
    check_threads,
    chunk_rows,
    faiss_module,
    has_gpu,
    one_thread,
    silent,
)
from els.index.patches.files import (
    FORMAT,
    INDEX,
    MANIFEST,
    VERSION,
    index_folder,
    read_index,
    write_index,
)
from els.index.patches.index import PatchIndex, open_index
from els.index.patches.lists import (
    can_read,
    transforms,
    write_tables,
)
from els.index.patches.rows import PatchRows
from els.storage import files, locks
from els.storage.manifests import package_version, sealed

IndexProgress = Callable[[str, int, int], object]
"""Called with (stage, done, in all): training, adding, merging, writing, tabulating."""
_Nearest = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.int64]]]
_PLAN = "plan.json"
_TRAINED = "trained.faiss"
_LOCK = "lock"
_VARIANCE = 0.9995
_ITERATIONS = 10
# Lists from which on k-means has two levels.
_TWO_LEVELS_FROM = 1024


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
    fixed random sample of distinct patches. Killed at any moment, even by SIGKILL, the build
    resumes from the last finished checkpoint (the training, or a build chunk of 2 million patches)
    when it is called again; an existing index is usable until the new one is complete.

    The same images, factory and versions make the same files, byte for byte, on the same kind of
    processor, whatever ``threads`` is, and interrupted or not. No BLAS or k-means promises to round
    alike with several threads: training uses one, and vectors are transformed and assigned to lists
    in chunks of a fixed size, each by one thread. This holds where FAISS's BLAS takes its number of
    threads from OpenMP, as in the wheels of ``faiss-cpu``; with another BLAS the bytes may depend
    on its own number of threads. Where FAISS sees a GPU, k-means and the assignment to lists run
    there and the file differs from one made without. That path has not been tested on a GPU.

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
    faiss = faiss_module()
    patches = PatchRows.of(db, patch_size)
    memory, threads = check_count("memory", memory), check_threads(threads)
    target = index_folder(db, patch_size)
    if target.exists() and not overwrite:
        raise DatabaseError(
            f"{target} exists already; open it with open_index({patch_size}), or replace it with "
            "overwrite=True (els index --overwrite)"
        )
    report = progress or silent
    work = target.with_name(f"{target.name}.partial")
    with _claimed(work), one_thread():
        plan = _Plan.of(patches, factory, memory, report)
        # Build chunks, and the index that they are merged into; what is there is used or removed.
        most = 2 * patches.count * (plan.code_bytes + BESIDE_CODES)
        there = sum(path.stat().st_size for path in work.glob("*.faiss"))
        files.require_space(target, max(0, most - there))
        if _written_plan(work) != plan.described:
            _clear(work)
            files.write_json(work / _PLAN, plan.described)
        if not (work / _TRAINED).exists():
            write_index(work / _TRAINED, plan.trained(threads, report))
        _add_build_chunks(work, patches, threads, report)
        with files.atomic_directory(target, overwrite=overwrite) as folder:
            index = _merge_build_chunks(work, patches, report)
            ivf = faiss.try_extract_index_ivf(index)
            report("writing", 0, 1)
            size, sha256 = write_index(folder / INDEX, index)
            written = {INDEX: {"size": size, "sha256": sha256}}
            if can_read(faiss, index):
                report_lists = partial(report, "tabulating")
                written |= write_tables(faiss, db, patch_size, index, folder / INDEX, report_lists)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                **plan.described,
                "lists": 0 if ivf is None else ivf.nlist,
                "files": written,
            }
            files.write_json(folder / MANIFEST, sealed(manifest))
            report("writing", 1, 1)
        shutil.rmtree(work)
    return open_index(db, patch_size)


@final
@dataclass(frozen=True, eq=False)
class _Plan:
    """The index to build, and the sample to train it on."""

    patches: PatchRows
    factory: str
    empty: Any
    sample: NDArray[np.uint8]

    @classmethod
    def of(
        cls, patches: PatchRows, factory: str | None, memory: int, report: IndexProgress
    ) -> Self:
        report("training", 0, 1)
        lists = choose_lists(patches.count, min(patches.dimension, REDUCED_MOST), patches.count)
        # A fifth of the memory for the sample as bytes and, while training, as floats.
        most = max(1, memory // 5 // (5 * patches.dimension))
        sample = patches.sample(min(most, PATCHES_PER_LIST * lists))
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
        ivf = faiss_module().try_extract_index_ivf(self.empty)
        return 4 * self.patches.dimension if ivf is None else int(ivf.code_size)

    @property
    def described(self) -> dict[str, Any]:
        """Everything that the bytes of the index depend on."""
        faiss = faiss_module()
        return {
            "content_hash": self.patches.db.content_hash,
            "patch_size": self.patches.size,
            "factory": self.factory,
            "count": self.patches.count,
            "shards": self.patches.build_chunks,
            "sample": len(self.sample),
            "made_with": {
                "els-machine": package_version(),
                "faiss": faiss.__version__,
                "gpu": has_gpu(faiss),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def trained(self, threads: int, report: IndexProgress) -> Any:
        """The index that patches are added to."""
        faiss = faiss_module()
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
        report("training", 1, 1)
        return index


def _train_lists(
    ivf: Any, sample: NDArray[np.float32], threads: int, report: IndexProgress
) -> None:
    """Puts centroids into the coarse quantizer, by k-means in two levels if there are many.

    The second level divides each cluster of the first, so that a vector is compared with about
    ``2 sqrt(lists)`` centroids in an iteration and not with all of them.

    Args:
        ivf: the inverted lists.
        sample: vectors in random order, ``[n, d]``.
        threads: how many work.
        report: called as clusters are divided.
    """
    if ivf.nlist < _TWO_LEVELS_FROM:
        centroids = _centroids(sample, ivf.nlist, threads)
    else:
        count = round(math.sqrt(ivf.nlist))
        coarse = _centroids(sample[: PATCHES_PER_LIST * count], count, threads)
        _, clusters = _nearest(coarse, threads)(sample)
        lists = _proportional(np.bincount(clusters, minlength=count), ivf.nlist)

        def divided(cluster: int) -> NDArray[np.float32]:
            return _centroids(sample[clusters == cluster], int(lists[cluster]), 1)

        parts = []
        with ThreadPoolExecutor(threads) as pool:
            try:
                for part in pool.map(divided, range(count)):
                    parts.append(part)
                    report("training", len(parts), count)
            except BaseException:
                # An interruption does not wait for all clusters.
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        centroids = np.concatenate(parts)
    ivf.quantizer.train(centroids)
    ivf.quantizer.add(centroids)


def _centroids(sample: NDArray[np.float32], count: int, threads: int) -> NDArray[np.float32]:
    """k-means by Lloyd's iterations, from the first vectors: ``[count, d]``."""
    centroids = sample[:count].copy()
    for _ in range(_ITERATIONS if count else 0):
        distances, nearest = _nearest(centroids, threads)(sample)
        sizes = np.bincount(nearest, minlength=count)
        sums = np.stack([np.bincount(nearest, column, count) for column in sample.T], axis=1)
        centroids = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
        # A centroid without vectors moves to one that is far from its own.
        empty = np.flatnonzero(sizes == 0)
        centroids[empty] = sample[np.argsort(-distances, kind="stable")[: len(empty)]]
    return centroids


def _proportional(sizes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Parts of a count in proportion to sizes, whose sum is no smaller; none above its size."""
    parts: NDArray[np.int64] = sizes * count // sizes.sum()
    remainders = sizes * count % sizes.sum()
    parts[np.argsort(-remainders, kind="stable")[: count - parts.sum()]] += 1
    return parts


def _nearest(centroids: Any, threads: int) -> _Nearest:
    """Finds squared distance and number of vectors' nearest centroids; on a GPU if there is one.

    Args:
        centroids: float32 ``[n, d]``, or an index of them.
        threads: how many work.
    """
    faiss = faiss_module()
    index = centroids
    if isinstance(centroids, np.ndarray):
        index = faiss.IndexFlatL2(centroids.shape[1])
        index.add(centroids)
    if has_gpu(faiss):
        flat = faiss.IndexFlatL2(index.d)
        flat.add(index.reconstruct_n(0, index.ntotal))
        index, threads = faiss.index_cpu_to_all_gpus(flat), 1

    def search(
        vectors: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        distances, lists = by_chunks(
            lambda chunk: index.search(vectors[chunk], 1),
            len(vectors),
            chunk_rows(vectors),
            threads,
        )
        return distances[:, 0], lists[:, 0]

    return search


def _add_build_chunks(work: Path, patches: PatchRows, threads: int, report: IndexProgress) -> None:
    done = 0
    report("adding", 0, patches.count)
    for number in range(patches.build_chunks):
        place = _build_chunk_path(work, number)
        if place.exists():
            done += int(read_index(place, patches).ntotal)
            report("adding", done, patches.count)
            continue
        chunk = read_index(work / _TRAINED, patches)
        add = _adder(chunk, threads)
        for levels, addresses in patches.blocks(number):
            add(levels, addresses)
            done += len(addresses)
            report("adding", done, patches.count)
        write_index(place, chunk)


def _adder(index: Any, threads: int) -> Callable[[NDArray[np.float32], NDArray[np.int64]], object]:
    """Adds vectors and their addresses to an index."""
    faiss = faiss_module()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        add: Callable[[NDArray[np.float32], NDArray[np.int64]], object] = index.add_with_ids
        return add
    nearest = _nearest(faiss.downcast_index(ivf.quantizer), threads)
    steps = transforms(faiss, index)

    def add_assigned(levels: NDArray[np.float32], addresses: NDArray[np.int64]) -> None:
        for step in steps:
            levels = _transformed(step, levels, threads)
        _, lists = nearest(levels)
        pointers = map(faiss.swig_ptr, (levels, addresses, np.ascontiguousarray(lists)))
        ivf.add_core(len(levels), *pointers)
        index.ntotal = ivf.ntotal

    return add_assigned


def _transformed(step: Any, vectors: NDArray[np.float32], threads: int) -> NDArray[np.float32]:
    (result,) = by_chunks(
        lambda chunk: (step.apply(vectors[chunk]),), len(vectors), chunk_rows(vectors), threads
    )
    return result


def _merge_build_chunks(work: Path, patches: PatchRows, report: IndexProgress) -> Any:
    """One index of all build chunks, in their order."""
    faiss = faiss_module()
    index = read_index(work / _TRAINED, patches)
    for number in range(patches.build_chunks):
        report("merging", number, patches.build_chunks)
        chunk = read_index(_build_chunk_path(work, number), patches)
        into = faiss.try_extract_index_ivf(index)
        if into is None:
            index.merge_from(chunk, 0)
            continue
        into.merge_from(faiss.extract_index_ivf(chunk), 0)
        index.ntotal = into.ntotal
    report("merging", patches.build_chunks, patches.build_chunks)
    return index


def _empty_index(factory: str, dimension: int, distinct: int) -> Any:
    """The untrained index of a factory string, if it is of a kind that serves."""
    faiss = faiss_module()
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
            "build chunks here; take Flat, or IVF with Flat, SQ or PQ codes, as in "
            "IVF1024,SQ8_direct"
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
            f"patches to train them; ask for at most {max(1, distinct // LEAST_PATCHES_PER_LIST)}"
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
        if direct and inner.d % ROUNDING_LANES == 0:
            raise ValueError(
                f"factory {factory!r} has codes of {inner.d} bytes: with a multiple of "
                f"{ROUNDING_LANES} FAISS rounds queries to bytes, which noisy patches are not; "
                f"take Pad{inner.d + LANES}"
            )
        # Bytes hold a pixel, not its difference from a centroid.
        inner.by_residual = bool(inner.by_residual and not direct)
    return index


def _explaining(sample: NDArray[np.uint8]) -> int:
    """Principal components that explain nearly all of the variance, 1 to the dimension."""
    _, dimension = sample.shape
    if dimension <= REDUCED_MOST or len(sample) < 2:
        return int(dimension)
    faiss = faiss_module()
    spectrum = faiss.PCAMatrix(dimension, 1)
    # 2^16 patches determine the spectrum well enough.
    spectrum.train(sample[: 1 << 16].astype(np.float32))
    explained = np.cumsum(faiss.vector_to_array(spectrum.eigenvalues).astype(np.float64).clip(0))
    return min(int(dimension), 1 + int(np.searchsorted(explained, _VARIANCE * explained[-1])))


def _build_chunk_path(work: Path, number: int) -> Path:
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
                    "start again with the same arguments to resume"
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
