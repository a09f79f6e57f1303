"""Mean and covariance of the training images, by their eigenvectors; computed once per database.

With D = C H W coordinates of a clean image in [-1, 1], mean mu and covariance S (over N - 1)::

    S = U diag(lam) U^T

Sums are of integers that a float64 holds exactly. Of fewer images than coordinates the eigenvectors
come from the N x N matrix of their inner products.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from els.index.database import DatabaseError, PatchDatabase, Progress
from els.storage import files
from els.storage.manifests import read_json, sealed

_FOLDER = "statistics"
_FORMAT = "els-image-statistics"
_VERSION = 1
_ARRAYS = ("mean", "variances", "components")
# Bytes of images that are summed at once, as float64.
_CHUNK_BYTES = 64 << 20
# Share of the largest variance below which an eigenvalue is rounding.
_ROUNDING = 1e-10
# Bytes of the matrices from which their size is said before work begins.
_LARGE_BYTES = 1 << 30
# Floating-point operations of an eigendecomposition, in cubes of its side (LAPACK's syevd).
_CUBES = 9.0
# What two cores of an AMD EPYC (AVX2) do of them a second, in float64: 3,072 wide took 4.0 s.
_OPERATIONS = 6e10

logger = logging.getLogger("els")


@final
@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigendecomposition of the images' covariance.

    Attributes:
        mean: of the clean images, in [-1, 1], float64 ``[D]``, D = C H W.
        variances: eigenvalues, descending, > 0, float64 ``[r]``, r <= min(D, N - 1).
        components: their eigenvectors, float32 ``[r, D]``.
    """

    mean: NDArray[np.float64]
    variances: NDArray[np.float64]
    components: NDArray[np.float32]


def image_spectrum(db: PatchDatabase, label: int | None = None) -> Spectrum:
    """The spectrum of all images of a database, or of one class.

    That of all is read from the database's folder if it is there, else computed and stored in it.

    Args:
        db: the training images.
        label: of the class; its spectrum is not stored.

    Raises:
        DatabaseError: the stored one is damaged.
        ValueError: no image has the label.
    """
    if label is not None:
        return _computed(db, db.class_members(label))
    if db.path is None:
        return _computed(db, None)
    folder = db.path / _FOLDER
    if not folder.exists():
        found = _computed(db, None)
        try:
            _write(folder, found, db.content_hash)
        except OSError as error:
            logger.warning("%s cannot be written (%s): computed again next time", folder, error)
        return found
    return _read(folder, db)


def autocovariance(db: PatchDatabase, progress: Progress | None = None) -> NDArray[np.float64]:
    """Covariance of a pixel and another at a displacement, averaged over images and places.

    Pixels are in [-1, 1], less their mean by channel. Both lie inside the image; circular
    displacements are not counted.

    Args:
        db: the training images.
        progress: called with (images done, images in all).

    Returns:
        float64 ``[C, C, 2 H, 2 W]``; entry (a, b, dy mod 2 H, dx mod 2 W) is that of channel a at a
        pixel and channel b at (dy, dx) from it, abs(dy) < H, abs(dx) < W.
    """
    count, channels, height, width = db.images.shape
    padded = (2 * height, 2 * width)
    chunk = max(1, _CHUNK_BYTES // (32 * channels * height * width))
    starts = range(0, count, chunk)
    # Sums of levels are whole numbers.
    totals = [db.images[start : start + chunk].sum((0, 2, 3), dtype=np.int64) for start in starts]
    mean = np.sum(totals, 0) / (count * height * width)
    power = np.zeros((channels, channels, 2 * height, width + 1), np.complex128)
    for start in starts:
        centred = db.images[start : start + chunk] - mean[:, None, None]
        waves = np.fft.rfft2(centred, padded)
        power += np.einsum("nayx,nbyx->abyx", waves.conj(), waves)
        if progress is not None:
            progress(min(start + chunk, count), count)
    inside = np.abs(np.fft.rfft2(np.ones((height, width)), padded)) ** 2
    pairs = np.maximum(np.rint(np.fft.irfft2(inside, padded)), 1)
    return np.asarray(np.fft.irfft2(power, padded) / (count * pairs) / 127.5**2)


def _computed(db: PatchDatabase, members: NDArray[np.int64] | None) -> Spectrum:
    chosen = np.arange(len(db), dtype=np.int64) if members is None else members
    count, size = len(chosen), int(np.prod(db.shape))
    side = min(count, size)
    _announce(side, size)
    chunk = max(1, _CHUNK_BYTES // (8 * size))
    # Levels 0 to 255: sums of products are whole numbers below 2^53 up to 10^11 images.
    total = np.zeros(size)
    for start in range(0, count, chunk):
        total += _levels(db, chosen[start : start + chunk]).sum(0)
    average = total / count
    if count == 1:
        nothing = np.zeros((0, size), np.float32)
        return Spectrum(average / 127.5 - 1, np.zeros(0), nothing)
    products = np.zeros((side, side))
    if side == size:
        for start in range(0, count, chunk):
            levels = _levels(db, chosen[start : start + chunk])
            products += levels.T @ levels
        products -= np.outer(total, total) / count
    else:
        for start in range(0, count, chunk):
            rows = _levels(db, chosen[start : start + chunk])
            for other in range(0, start + 1, chunk):
                part = rows @ _levels(db, chosen[other : other + chunk]).T
                products[start : start + len(part), other : other + part.shape[1]] = part
                products[other : other + part.shape[1], start : start + len(part)] = part.T
        with_mean = products.mean(1)
        products -= with_mean[:, None] + with_mean[None, :] - with_mean.mean()
    values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = values > _ROUNDING * max(float(values[0]), 0.0)
    kept[count - 1 :] = False
    values, vectors = values[kept], vectors[:, kept]
    if side == size:
        components = vectors.T
    else:
        components = np.zeros((len(values), size))
        for start in range(0, count, chunk):
            centred = _levels(db, chosen[start : start + chunk]) - average
            components += vectors[start : start + chunk].T @ centred
        components /= np.sqrt(values)[:, None]
    return Spectrum(
        average / 127.5 - 1,
        values / (count - 1) / 127.5**2,
        np.ascontiguousarray(components, dtype=np.float32),
    )


def _levels(db: PatchDatabase, members: NDArray[np.int64]) -> NDArray[np.float64]:
    return db.images[members].reshape(len(members), -1).astype(np.float64)


def _announce(side: int, size: int) -> None:
    """Say what a large decomposition takes, before it begins."""
    memory = 8 * (3 * side**2 + side * size)
    if memory >= _LARGE_BYTES:
        logger.warning(
            "statistics of images of %s coordinates: some %.1f GB of memory, %.0f s, and %.1f GB "
            "of disk, once per database",
            f"{size:,}",
            memory / 1e9,
            _CUBES * side**3 / _OPERATIONS,
            4 * side * size / 1e9,
        )


def _write(folder: Path, spectrum: Spectrum, content_hash: str) -> None:
    with files.atomic_directory(folder, overwrite=True) as temporary:
        entries = {}
        for name in _ARRAYS:
            place = temporary / f"{name}.npy"
            np.save(place, getattr(spectrum, name), allow_pickle=False)
            entries[name] = _sha256(place)
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "content_hash": content_hash,
            "files": entries,
        }
        (temporary / "manifest.json").write_text(json.dumps(sealed(manifest)))


def _read(folder: Path, db: PatchDatabase) -> Spectrum:
    remedy = "remove that folder: it is computed again"
    try:
        manifest = read_json(folder / "manifest.json")
        if sealed(manifest) != manifest or manifest["format"] != _FORMAT:
            raise ValueError("its manifest is not that of image statistics")
        if manifest["content_hash"] != db.content_hash:
            raise ValueError("it is of other images")
        for name in _ARRAYS:
            if _sha256(folder / f"{name}.npy") != manifest["files"][name]:
                raise ValueError(f"{name}.npy is not what was written")
        arrays = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in _ARRAYS)
        return Spectrum(*arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatabaseError(f"{folder} cannot be used: {error}; {remedy}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
