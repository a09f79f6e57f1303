"""Advisory locks of files, and what happens on file systems that have none."""

import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO

# Seconds between two tries for a lock.
_BETWEEN_TRIES = 0.02
# Prefix of files and folders that are being written.
TEMPORARY_PREFIX = ".els-"
# Suffix of temporaries on a file system without locks.
UNLOCKED_SUFFIX = ".unlocked"
# Errors of flock where there are no locks: Lustre without -o flock, NFS without lockd (or of a
# descriptor that is open for reading), FUSE.
_NO_LOCKS = {
    errno.EBADF,
    errno.EINVAL,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
}

_log = logging.getLogger("els")
_warned: set[str] = set()  # the missing protections that this process has reported


def take_lock(path: Path, patience: float = 0.0) -> IO[bytes]:
    """The lock file at a path, made and locked for as long as it is open.

    Where the file system has no locks the file is not locked, and a warning says so.

    Args:
        path: of the lock file; its folder is there.
        patience: seconds to wait for another process to let go.

    Raises:
        BlockingIOError: another process has it.
    """
    until = time.monotonic() + patience
    lock = path.open("ab")
    try:
        while True:
            try:
                lock_descriptor(lock.fileno(), path)
                return lock
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise
            time.sleep(_BETWEEN_TRIES)
    except BaseException:
        lock.close()
        raise


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file at a path; False where there are no locks."""
    try:
        with path.open("rb") as stream:
            lock_descriptor(stream.fileno(), path, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def lock_descriptor(descriptor: int, path: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks it; False, and a warning, where the file system has no locks.

    Raises:
        BlockingIOError: another process has it.
        OSError: another failure.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warn_without(
            "locks",
            f"the file system of {path.parent} has no file locks ({os.strerror(error.errno)}): "
            "nothing keeps two processes from writing to one place, so start only one, and what "
            f"killed processes leave ({TEMPORARY_PREFIX}*) is not removed",
        )
        return False
    return True


def warn_without(protection: str, message: str) -> None:
    """Log, once per process, that the file system lacks a protection."""
    if protection not in _warned:
        _warned.add(protection)
        _log.warning("warning: %s", message)
