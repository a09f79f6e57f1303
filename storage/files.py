"""Writing that is whole or not at all: files and folders, through a power cut or a full disk.

A file or folder is written under a hidden temporary name beside its target and renamed when it is
complete. The writer holds a lock on the temporary; one without a lock belongs to a dead process,
and `remove_stale` (every build calls it) removes it.

Some file systems of clusters cannot lock files or flush folders. Writing goes on there, and the
logger ``els`` warns once per process that this protection is missing. A temporary that could not be
locked has a name of its own, which `remove_stale` leaves alone.
"""

import ctypes
import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from els.storage.locks import TEMPORARY_PREFIX, UNLOCKED_SUFFIX, lock_descriptor, warn_without

_SUFFIX = ".partial"  # of what is being written, a hidden file or folder beside its target
# Errors of a full disk; EFBIG is that of a file size limit (ulimit -f, FAT), with the same remedy.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors of opening or flushing a folder on file systems that cannot: CIFS, FUSE, 9p, AFS.
_NO_FLUSH = {
    errno.EACCES,
    errno.EBADF,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
}


class DiskFullError(OSError):
    """No room for what was to be written; nothing half-written is left at the path."""

    def __init__(self, path: Path, reason: str, code: int = errno.ENOSPC) -> None:
        super().__init__(
            f"no room to write {path} ({reason}); nothing half-written was left: free some space "
            f"(df -h {path.parent}) or choose another place, then start again"
        )
        self.errno = code


def visible_names(folder: Path) -> list[str]:
    """Names in a folder, but for hidden ones, such as locks and temporaries."""
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
    with _explained(path):
        temporary, lock = _create(path, folder=False)
        try:
            with os.fdopen(lock, "w+b") as stream:
                yield stream
                stream.flush()
                _flush(stream.fileno(), path)
                # Renamed while still locked, so that remove_stale cannot come between.
                _rename(temporary, path)
            _flush(path.parent, path)
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
    with _explained(path):
        if path.exists() and not (overwrite and path.is_dir()):
            raise FileExistsError(errno.EEXIST, "choose another path, or remove it", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        temporary, lock = _create(path, folder=True)
        try:
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                _flush(entry, path)
            if not path.exists():
                _rename(temporary, path)
            elif overwrite:
                _exchange(temporary, path)
            else:
                raise FileExistsError(errno.EEXIST, "it appeared meanwhile", str(path))
            _flush(path.parent, path)
        finally:
            # Gone by now, or the failed build, or the folder that was replaced.
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def remove_stale(folder: str | Path) -> None:
    """Removes temporaries in `folder` whose writers died; those of live writers stay.

    Temporaries that could not be locked stay, too: their writers may be alive.
    """
    for entry in Path(folder).glob(f"{TEMPORARY_PREFIX}*{_SUFFIX}"):
        try:
            # NFS locks files only that are open for writing. A fifo must not be waited for.
            access = os.O_RDONLY if entry.is_dir() else os.O_RDWR
            descriptor = os.open(entry, access | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if not lock_descriptor(descriptor, entry):
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def require_place(path: str | Path) -> None:
    """Checks, before long work, that a file can be at `path`.

    Raises:
        FileNotFoundError: its folder is not there.
        IsADirectoryError: it is a folder.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder; give the name of a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            "its folder is not there; make the folder, or choose another path",
            str(path),
        )


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
def _explained(path: Path) -> Iterator[None]:
    """Turns errors of a full disk into one that says what to do."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(path, os.strerror(error.errno), error.errno) from error
        raise


def _create(path: Path, *, folder: bool) -> tuple[Path, int]:
    """Makes a temporary beside a path, and its locked descriptor."""
    if not folder:
        require_place(path)
    while True:
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}{_SUFFIX}")
        try:
            if folder:
                temporary.mkdir()
        except OSError as error:
            # The error names the path that was asked for, not the temporary.
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            flags = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(temporary, flags, 0o666)
        except FileNotFoundError:
            if folder:
                continue
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            if not lock_descriptor(descriptor, path):
                temporary = temporary.rename(temporary.with_suffix(UNLOCKED_SUFFIX))
            # Another process's remove_stale may have removed it before it was locked.
            if temporary.exists():
                return temporary, descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)


def _flush(target: Path | int, path: Path) -> None:
    """Flushes a path or a descriptor to the disk; a warning where the file system cannot.

    Args:
        target: what to flush.
        path: what is being written, for the warning.
    """
    opened = None
    try:
        if isinstance(target, Path):
            target = opened = os.open(target, os.O_RDONLY)
        os.fsync(target)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
        warn_without(
            "flush",
            f"the file system of {path} cannot flush files or folders to the disk "
            f"({os.strerror(error.errno)}): what was just written may be lost in a power cut",
        )
    finally:
        if opened is not None:
            os.close(opened)


def _rename(temporary: Path, path: Path) -> None:
    """Renames what is complete; an error names the path that was asked for."""
    try:
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders: in one step where the system can, else in two renames."""
    if sys.platform == "linux":
        at_cwd, exchange = -100, 2
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
        if renameat2 and not renameat2(
            at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange
        ):
            return
    aside = new.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}{_SUFFIX}")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)
