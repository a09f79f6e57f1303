"""What the manifests of databases and indices have in common: a seal against damage."""

import hashlib
import json
from importlib import metadata
from typing import Any


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
