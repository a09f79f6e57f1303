"""Writing that is whole or not at all: files and folders, through a power cut or a full disk.

What is being written lives under a hidden temporary name beside its target and is renamed when
complete. The writer holds a lock on the temporary; one without a lock belongs to a dead process,
and `remove_stale` (every build calls it) takes it away.
"""

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_BETWEEN_TRIES = 0.02  # seconds
_PREFIX, _SUFFIX = ".els-", ".partial"
# EFBIG: past a file size limit (ulimit -f, or FAT), which calls for the same remedy.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(OSError):
    """No room for what was to be written; nothing half-written is left at the path."""

    def __init__(self, path: Path, reason: str, code: int = errno.ENOSPC) -> None:
        super().__init__(
            f"no room to write {path} ({reason}); nothing half-written was left: free some space "
            f"(df -h {path.parent}) or choose another place, then start again"
        )
        self.errno = code


def take_lock(path: Path, patience: float = 0.0) -> IO[bytes]:
    """The lock file at a path, made and locked for as long as it is open.

    Args:
        path: of the lock file; its folder is there.
        patience: seconds to wait for another process to let go.

    Raises:
        BlockingIOError: another process has it.
    """
    until = time.monotonic() + patience
    lock = path.open("ab")
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() >= until:
                lock.close()
                raise
        time.sleep(_BETWEEN_TRIES)


def visible_names(folder: Path) -> list[str]:
    """What is in a folder but for hidden entries, such as locks and what is being written."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears at `path`, replacing any old one, on a clean exit.

    Args:
        path: the file; its folder must exist.

    Yields:
        A binary stream, writable and seekable. After an exception nothing has changed at `path`.

    Raises:
        DiskFullError: no space, quota or file size left.
        OSError: `path` cannot be written for another reason.
    """
    path = Path(os.path.realpath(path))
    with _full_disk_explained(path):
        temporary, lock = _create(path.parent, folder=False)
        try:
            with os.fdopen(lock, "w+b") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                # Renamed while still locked, so that remove_stale cannot come between.
                temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: str | Path, data: bytes | bytearray | memoryview) -> None:
    """Writes `data` to `path` whole or not at all; errors as in `atomic_file`."""
    with atomic_file(path) as stream:
        stream.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path` whole or not at all; errors as in `atomic_file`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path` whole or not at all; errors as in `atomic_file`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fills a folder that appears at `path` on a clean exit.

    Args:
        path: the folder to make; missing parents are made.
        overwrite: replace a folder at `path`; it stays until the new folder is complete (on Linux
            the two are exchanged in one step).

    Yields:
        A hidden folder beside `path` to write into. After an exception it is removed, and nothing
        has changed at `path`.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False.
        DiskFullError: no space, quota or file size left.
        OSError: `path` cannot be written for another reason.
    """
    path = Path(os.path.realpath(path))
    with _full_disk_explained(path):
        if path.exists() and not (overwrite and path.is_dir()):
            raise FileExistsError(errno.EEXIST, "choose another path, or remove it", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        temporary, lock = _create(path.parent, folder=True)
        try:
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                _sync(entry)
            if not path.exists():
                temporary.rename(path)
            elif overwrite:
                _exchange(temporary, path)
            else:
                raise FileExistsError(errno.EEXIST, "it appeared meanwhile", str(path))
            _sync(path.parent)
        finally:
            # Gone by now, or the failed build, or the folder that was replaced.
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def remove_stale(folder: str | Path) -> None:
    """Removes temporaries in `folder` whose writers died; those of live writers stay."""
    for entry in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"):
        try:
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if not _lock(descriptor):
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def require_space(path: str | Path, size: int) -> None:
    """Checks, before long work, that `size` bytes fit where `path` is to be.

    Raises:
        DiskFullError: they do not.
    """
    path = Path(os.path.realpath(path))
    folder = next(parent for parent in path.parents if parent.exists())
    usage = shutil.disk_usage(folder)
    # Some network file systems do not know their size and say 0.
    if usage.total and usage.free < size:
        raise DiskFullError(path, f"{size:,} bytes are needed, {usage.free:,} are free")


@contextmanager
def _full_disk_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(path, os.strerror(error.errno), error.errno) from error
        raise


def _create(parent: Path, *, folder: bool) -> tuple[Path, int]:
    """Makes a temporary and its locked descriptor."""
    while True:
        temporary = parent / f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}"
        if folder:
            temporary.mkdir()
        try:
            flags = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(temporary, flags, 0o666)
        except FileNotFoundError:
            if folder:
                continue
            raise
        _lock(descriptor)
        # Another process's remove_stale may have met it before it was locked.
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks it if nobody else has; False as well where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders: in one step where the system can, else in two renames."""
    if sys.platform == "linux":
        at_cwd, exchange = -100, 2
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
        if renameat2 and not renameat2(
            at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange
        ):
            return
    aside = new.with_name(f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)
