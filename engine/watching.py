"""How far the posterior under way is, for whoever waits for one that takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

Tell = Callable[[float], object]
"""Called with the share of a posterior that is done, 0 to 1."""

_Block = TypeVar("_Block", bound=Sized)


# Seconds between two calls.
_SECONDS = 0.1


@dataclass
class _Watch:
    tell: Tell
    total: float = 0.0
    done: float = 0.0
    told: float = field(default_factory=time.monotonic)


_watch: ContextVar[_Watch | None] = ContextVar("els-watch", default=None)


@contextmanager
def watched(tell: Tell) -> Iterator[None]:
    """Context in which a posterior of some duration tells how far it is, until it is ready.

    An approximate one tells how much of the exact work it has done, and is ready before all.
    """
    token = _watch.set(_Watch(tell))
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def portion(before: float, after: float) -> Iterator[None]:
    """Context of one of several posteriors that are one answer, between two shares of it."""
    watch = _watch.get()
    if watch is None:
        yield
        return
    tell = watch.tell
    with watched(lambda share: tell(before + share * (after - before))):
        yield


def begin(images: int) -> None:
    """A posterior begins that weighs at most so many images, each of its queries' counted."""
    watch = _watch.get()
    if watch is not None:
        watch.total, watch.done = images, 0.0


def advance(images: float) -> None:
    """So many images more are weighed, each query's counted."""
    watch = _watch.get()
    if watch is None or not watch.total:
        return
    watch.done += images
    now = time.monotonic()
    if now - watch.told >= _SECONDS and watch.done < watch.total:
        watch.told = now
        watch.tell(watch.done / watch.total)


def counted(blocks: Iterable[_Block], queries: int) -> Iterator[_Block]:
    """The blocks of images, each of which is weighed for all queries before the next is taken."""
    for block in blocks:
        yield block
        advance(len(block) * queries)
