"""Opening what a stranger sent: regular files of bounded size, and one error for every failure."""

import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

DAMAGED = "it seems damaged: fetch or export it again"
# Bytes that deflate makes of one, at most (zlib's documentation); a header that claims more is
# damaged.
MAX_DEFLATE_RATIO = 1032


class SourceError(ValueError):
    """A source of images is missing, damaged, ambiguous or of an unsupported kind."""


@contextmanager
def explained(where: object, remedy: str) -> Iterator[None]:
    """Makes one `SourceError` of whatever a decoder throws at foreign bytes.

    There is no list of those: zipfile, zlib, PIL and numpy throw some twenty kinds between them.
    """
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
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
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path} is not a regular file; replace it by one, or take it out")
    if limit is not None and status.st_size > limit:
        raise SourceError(_too_large(path, status.st_size, limit))
    return path.open("rb")


def check_member(path: Path, entry: zipfile.ZipInfo, limit: int | None = None) -> None:
    """Checks what the directory of a zip says of one member, before that is unpacked.

    Args:
        path: the zip.
        entry: the member.
        limit: the most bytes it may unpack to.

    Raises:
        SourceError: encrypted, packed in a way that has no bound, larger than the limit, or
            larger than it can be.
    """
    where = f"{path}: {entry.filename}"
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
    if entry.file_size > ratio * min(entry.compress_size, path.stat().st_size):
        raise SourceError(
            f"{where} claims {entry.file_size:,} bytes, more than the zip can hold; {DAMAGED}"
        )


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """Reads `size` bytes; EOFError if there are fewer."""
    block = stream.read(size)
    if len(block) != size:
        raise EOFError(f"it ends {size - len(block):,} bytes early")
    return block


def _too_large(where: object, size: int, limit: int) -> str:
    return f"{where} has {size:,} bytes, more than the {limit:,} of the limit; take it out"
