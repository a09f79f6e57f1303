"""FAISS: imported when it is needed, silent, and by chunks of one thread each."""

import operator
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers of the vectors that one thread transforms or assigns to lists at once. Results may depend
# on it, but not on the number of threads. FAISS 1.15 finds the nearest of some thousand centroids
# two to ten times as fast from 2^17 numbers on.
_CHUNK_NUMBERS = 1 << 18


def check_count(name: str, value: int) -> int:
    """An argument that must be an integer of at least 1, as an int."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}") from error
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def check_threads(threads: int | None) -> int:
    """The number of threads to use; None for as many as FAISS would."""
    return (
        int(faiss_module().omp_get_max_threads())
        if threads is None
        else check_count("threads", threads)
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Context in which FAISS and its BLAS use one thread for calls of this thread."""
    faiss = faiss_module()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def chunk_rows(vectors: NDArray[np.float32]) -> int:
    """How many vectors a chunk has: about :data:`_CHUNK_NUMBERS` numbers."""
    _, dimension = vectors.shape
    return max(1, _CHUNK_NUMBERS // int(dimension))


def by_chunks(
    work: Callable[[slice], tuple[NDArray[Any], ...]], count: int, rows: int, threads: int
) -> list[NDArray[Any]]:
    """The arrays that ``work`` gives for chunks of so many rows, put together.

    Each chunk is computed by one thread, with one thread of OpenMP and so of FAISS's BLAS, and
    chunks do not depend on the number of threads: so neither do the results.
    """
    chunks = [slice(start, start + rows) for start in range(0, max(count, 1), rows)]
    set_threads = faiss_module().omp_set_num_threads  # of the thread that calls it
    with ThreadPoolExecutor(threads, initializer=set_threads, initargs=(1,)) as pool:
        parts = list(pool.map(work, chunks))
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def has_gpu(faiss: Any) -> bool:
    """Whether this build of FAISS finds a GPU."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


def faiss_module() -> Any:
    """FAISS, imported on first use; a RuntimeError names the remedy where it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise RuntimeError(
            "a patch index needs FAISS, which is not installed: pip install 'els-machine[cpu]'"
        ) from error
    return faiss
