"""Disks that fill up, and what is on them."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def everything_in(folder: Path) -> list[str]:
    return sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*"))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A quota that the kernel enforces on this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
