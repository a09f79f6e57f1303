"""Blocks of training images, one thread each: the number of threads does not change any bit."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, reduce
from itertools import islice
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

# Blocks that are computed at a time, at most; it bounds temporary memory.
_MOST_THREADS = 8
# Functions that limit OpenMP and MKL in the calling thread alone. `torch.set_num_threads` would
# also change the default of every thread that starts later.
_LIMITS = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")

_Block = npt.NDArray[np.int64]
_Result = TypeVar("_Result")


def blocks(members: _Block, count: int) -> Iterator[_Block]:
    """The members in their order, ``count`` (at least 1) at a time."""
    size = max(1, count)
    return (members[start : start + size] for start in range(0, len(members), size))


def merged_in_order(
    function: Callable[[_Block], Iterable[_Result]],
    blocks: Iterator[_Block],
    merge: Callable[[_Result, _Result], _Result],
    device: torch.device,
) -> _Result:
    """Merge the results of all blocks in their order, each computed by one thread.

    An exception in the calling thread, such as KeyboardInterrupt, or in a block stops every block
    after its current piece of work, and so does the end of the program.

    Args:
        function: computes a block in pieces that take milliseconds; what it yields last is the
            block's result.
        blocks: at least one.
        merge: combines the result of earlier blocks with that of a later one.
        device: where the blocks are computed; on others than the CPU, one after another.
    """
    threads = min(torch.get_num_threads(), _MOST_THREADS) if device.type == "cpu" else 1
    if threads == 1 or not _limits():
        return reduce(merge, (deque(function(block), maxlen=1)[0] for block in blocks))
    return reduce(merge, _in_threads(function, blocks, threads))


def _in_threads(
    function: Callable[[_Block], Iterable[_Result]], blocks: Iterator[_Block], threads: int
) -> Iterator[_Result]:
    """The blocks' results, so many blocks at a time."""
    while group := list(islice(blocks, threads)):
        ended: SimpleQueue[_BlockThread[_Result]] = SimpleQueue()
        work = [_BlockThread(function, block, ended) for block in group]
        try:
            for thread in work:
                thread.start()
            for _ in work:
                ended.get().result()
        except BaseException:
            # They end by themselves: an interrupted Thread.join marks its thread as ended.
            for thread in work:
                thread.is_stopped = True
            raise
        for thread in work:
            yield thread.result()


class _BlockThread(threading.Thread, Generic[_Result]):
    """Computes one block in a thread in which torch starts no others."""

    def __init__(
        self,
        function: Callable[[_Block], Iterable[_Result]],
        block: _Block,
        ended: SimpleQueue[_BlockThread[_Result]],
    ) -> None:
        super().__init__(name="els-block", daemon=False)
        self.is_stopped = False
        self._function = function
        self._block = block
        self._results: list[_Result] = []
        self._error: BaseException | None = None
        self._ended = ended

    def run(self) -> None:
        try:
            # Torch limits a thread when it first uses torch, and leaves it alone afterwards.
            torch.get_num_threads()
            for limit in _limits():
                limit(1)
            for result in self._function(self._block):
                self._results = [result]
                # At the end of the program the main thread waits for this one.
                if self.is_stopped or not threading.main_thread().is_alive():
                    raise SystemExit
        except BaseException as error:
            self._error = error
        finally:
            self._ended.put(self)

    def result(self) -> _Result:
        """What the block's function yielded last; its error is raised."""
        if self._error is not None:
            raise self._error
        return self._results[0]


@cache
def _limits() -> tuple[Callable[[int], object], ...]:
    """The functions of :data:`_LIMITS` that torch's libraries have; none without OpenMP."""
    library = ctypes.CDLL(torch._C.__file__)
    if not hasattr(library, _LIMITS[0]):
        return ()
    return tuple(getattr(library, name) for name in _LIMITS if hasattr(library, name))
