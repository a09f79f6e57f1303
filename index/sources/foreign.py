"""Opening untrusted files: regular files of bounded size, and one error for every failure."""

import errno
import io
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

DAMAGED = "it seems damaged: fetch or export it again"
# Bytes that deflate makes of one, at most (zlib's documentation); a header that claims more is
# damaged.
MAX_DEFLATE_RATIO = 1032
# Characters of a decoder's own message; some quote the data.
_MAX_REASON = 300


class SourceError(ValueError):
    """A source of images is missing, damaged, ambiguous or of an unsupported kind."""

    def __init__(self, message: str) -> None:
        # Names and reasons are untrusted, too: one line, no control characters.
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(shown))


@contextmanager
def explained(where: object, remedy: str) -> Iterator[None]:
    """Makes one `SourceError` of every exception that a decoder raises for untrusted bytes.

    They have no common base class: zipfile, zlib, PIL and numpy raise some twenty kinds.
    """
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        if len(reason) > _MAX_REASON:
            reason = f"{reason[:_MAX_REASON]}..."
        raise SourceError(f"{where} cannot be used: {reason}; {remedy}") from error


def open_regular(path: Path, limit: int | None = None) -> IO[bytes]:
    """Opens a file to read; a pipe, a device or a socket would block or never end.

    Args:
        path: the file; links are followed.
        limit: the most bytes it may have.

    Raises:
        SourceError: not a regular file, or a larger one.
        OSError: it cannot be opened.
    """
    refused = f"{path} is not a regular file; replace it by one, or take it out"
    try:
        # Without O_NONBLOCK a pipe waits for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise SourceError(refused) from error
        raise
    # Sized here, because otherwise Python asks whether it is a terminal.
    stream = os.fdopen(handle, "rb", io.DEFAULT_BUFFER_SIZE)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        stream.close()
        raise SourceError(refused)
    if limit is not None and status.st_size > limit:
        stream.close()
        raise SourceError(_too_large(path, status.st_size, limit))
    return stream


def open_member(archive: zipfile.ZipFile, name: str, limit: int | None = None) -> IO[bytes]:
    """Opens a member of a zip, after a check of what the directory says of it.

    Args:
        archive: the zip, open.
        name: the member.
        limit: the most bytes it may unpack to.

    Raises:
        SourceError: encrypted, packed in a way that has no bound, larger than the limit, or
            larger than it can be.
        Exception: whatever else zipfile throws at damaged bytes.
    """
    entry = archive.getinfo(name)
    where = f"{archive.filename}: {name}"
    # Bit 0 marks encryption (the zip format, APPNOTE 4.4.4).
    if entry.flag_bits & 1:
        raise SourceError(f"{where} is encrypted; unpack the zip, and zip it without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SourceError(
            f"{where} is packed by method {entry.compress_type}; zip it with deflate, or unpacked"
        )
    if limit is not None and entry.file_size > limit:
        raise SourceError(_too_large(where, entry.file_size, limit))
    ratio = 1 if entry.compress_type == zipfile.ZIP_STORED else MAX_DEFLATE_RATIO
    # The directory comes after all members.
    if entry.file_size > ratio * min(entry.compress_size, archive.start_dir):
        raise SourceError(
            f"{where} claims {entry.file_size:,} bytes, more than the zip can hold; {DAMAGED}"
        )
    # zipfile's own stream is slow to read in small pieces.
    return io.BufferedReader(cast(io.RawIOBase, archive.open(entry)))


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """Reads `size` bytes; EOFError if there are fewer."""
    block = stream.read(size)
    if len(block) != size:
        raise EOFError(f"it ends {size - len(block):,} bytes early")
    return block


def _too_large(where: object, size: int, limit: int) -> str:
    return f"{where} has {size:,} bytes, more than the {limit:,} of the limit; take it out"
