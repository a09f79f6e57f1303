"""JSON files and manifests: read in bounded time, sealed by a checksum."""

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

MOST_JSON_BYTES = 1 << 26
"""Most bytes of a JSON file that is read: 64 MB, more than the names of a million classes take."""


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, in bounded time and memory.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no regular file, too large, or not JSON; without the path.
        OSError: if it cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MOST_JSON_BYTES:
            raise ValueError(f"its {size:,} bytes are more than the {MOST_JSON_BYTES:,} allowed")
        text = stream.read()
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of its other fields."""
    return manifest | {"checksum": checksum(manifest)}


def checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of all fields but the checksum."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def package_version() -> str:
    """The version of this package, or that it is not installed."""
    try:
        return metadata.version("els-machine")
    except metadata.PackageNotFoundError:
        return "not installed"
