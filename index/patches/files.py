"""The files of a patch index."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from els.index.database import DatabaseError, PatchDatabase
from els.index.patches.faiss_library import faiss_module
from els.index.patches.layout import LayoutError, check_layout
from els.index.patches.lists import (
    TABLES,
)
from els.index.patches.rows import PatchRows
from els.storage import files
from els.storage.manifests import checksum

FORMAT = "els-patch-index"
VERSION = 2
_FOLDER = "indices"
INDEX = "index.faiss"
MANIFEST = "manifest.json"


def index_folder(db: PatchDatabase, patch_size: int) -> Path:
    """Where the index of a patch size is or will be; ValueError for a database in memory."""
    if db.path is None:
        raise ValueError(
            "an index lives inside its database, and this one is in memory; write it with "
            "PatchDatabase.build(images, labels, path=...) first"
        )
    return db.path / _FOLDER / f"patch-{patch_size:03d}"


def write_index(path: Path, index: Any) -> tuple[int, str]:
    """Writes an index whole or not at all; returns its size in bytes and SHA-256."""
    faiss = faiss_module()
    digest = hashlib.sha256()
    with files.atomic_file(path) as stream:
        failures: list[OSError] = []

        def write(data: bytes) -> int:
            digest.update(data)
            try:
                stream.write(data)
            except OSError as error:
                failures.append(error)
                return 0
            return len(data)

        try:
            faiss.write_index(index, faiss.PyCallbackIOWriter(write, 1 << 20))
        except RuntimeError:
            # FAISS reports that writing failed, the system why.
            if failures:
                raise failures[0] from None
            raise
        size = stream.tell()
    return size, digest.hexdigest()


def read_index(
    path: Path, patches: PatchRows, flags: int | None = None, *, full: bool = False
) -> Any:
    """An index or checkpoint of some patches; of all of them if it is to be full."""
    faiss = faiss_module()
    try:
        with readable(path.parent):
            check_layout(path, patches.dimension, patches.count if full else None)
    except LayoutError as error:
        raise damaged(path.parent, f"FAISS cannot read {path.name} ({error})") from error
    if flags is None:
        # Nothing is searched during a build, and search tables would be made for every build chunk.
        flags = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
    try:
        return faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        raise damaged(path.parent, f"FAISS cannot read {path.name} ({error})") from error


def read_manifest(path: Path, patches: PatchRows) -> dict[str, Any]:
    """The manifest of an index, checked against the patches that it should hold."""
    place = path / MANIFEST
    build = f"build it with build_index({patches.size}) (els index --patch-sizes {patches.size})"
    if not path.exists():
        raise DatabaseError(f"there is no index of patch size {patches.size} at {path}; {build}")
    with readable(path):
        text = place.read_bytes()
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damaged(path, f"{MANIFEST} is not of a patch index (no format {FORMAT!r})")
    version = manifest.get("version")
    if type(version) is int and version > VERSION:
        raise DatabaseError(
            f"{path} has format version {version}, this els-machine reads {VERSION}; upgrade "
            "els-machine (pip install -U els-machine)"
        )
    if version != VERSION or manifest.get("checksum") != checksum(manifest):
        raise damaged(path, f"the text of {MANIFEST} does not match its checksum")
    match manifest:
        case {
            "content_hash": str(content),
            "patch_size": int(size),
            "count": int(count),
            "factory": str(),
            "lists": int(),
            "files": dict() as stored,
        } if stored.keys() in ({INDEX}, {INDEX, *TABLES}) and all(map(_is_entry, stored.values())):
            found = (content, size, count)
        case _:
            raise damaged(path, f"the fields of {MANIFEST} are not those of a patch index")
    if found != (patches.db.content_hash, patches.size, patches.count):
        raise DatabaseError(
            f"{path} is the index of other images or another patch size (content {found[0]}, "
            f"patch size {found[1]}); {build} and --overwrite"
        )
    return manifest


def _is_entry(entry: object) -> bool:
    """Whether an entry of the manifest describes a file."""
    match entry:
        case {"size": int(), "sha256": str()}:
            return True
    return False


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an OSError of reading into a DatabaseError that names the remedy."""
    try:
        yield
    except OSError as error:
        raise damaged(path, f"{error.filename} cannot be read ({error.strerror})") from error


def damaged(path: Path, reason: str) -> DatabaseError:
    """The error for an index that is damaged."""
    return DatabaseError(
        f"{path} is damaged: {reason}; remove that folder and build the index again (els index)"
    )
