"""Blocks of training images, one thread each: how many threads there are does not show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

# At most so many blocks are in work at a time: it bounds temporary memory.
_MOST_WORKERS = 8

_Result = TypeVar("_Result")


def blocks(members: npt.NDArray[np.int64], count: int) -> Iterator[npt.NDArray[np.int64]]:
    """The members in their order, ``count`` (at least 1) at a time."""
    size = max(1, count)
    return (members[start : start + size] for start in range(0, len(members), size))


def in_order(
    function: Callable[[npt.NDArray[np.int64]], _Result],
    blocks: Iterator[npt.NDArray[np.int64]],
    device: torch.device,
) -> Iterator[_Result]:
    """Results block after block, each computed by one thread."""
    threads = torch.get_num_threads()
    workers = min(threads, _MOST_WORKERS) if device.type == "cpu" else 1
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            while group := list(islice(blocks, workers)):
                yield from pool.map(function, group)
    finally:
        # The workers' setting is their own, but also the default of threads to come.
        torch.set_num_threads(threads)
