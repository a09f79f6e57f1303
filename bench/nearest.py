"""The nearest patches by brute force, for the recall of an index."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from els.index import PatchDatabase, decode

Floats = npt.NDArray[np.float64]
Patches = npt.NDArray[np.float32]

_CHUNK_IMAGES = 250
_NOISY_IMAGES = 4


def noisy_patches(db: PatchDatabase, beta: float, patch_size: int, count: int) -> Patches:
    """Around random pixels of noisy images, read cyclically, over alpha, ``[count, C, P, P]``.

    The images are the database's first four mirrored, the same for every size of it.
    """
    alpha, sigma = (1 - beta) ** 0.5, beta**0.5
    clean = torch.from_numpy(decode(db.images[:_NOISY_IMAGES, ..., ::-1].copy()))
    x = alpha * clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x.double() / alpha, (patch_size // 2,) * 4, "circular")
    windows = padded.unfold(2, patch_size, 1).unfold(3, patch_size, 1).movedim(1, 3)
    patches: Patches = windows.flatten(0, 2).float().numpy()
    return patches[np.random.default_rng(0).permutation(len(patches))[:count]]


def squared_distances(
    db: PatchDatabase, queries: npt.NDArray[Any], addresses: npt.NDArray[np.int64]
) -> Floats:
    """Of queries ``[Q, C, P, P]`` to patches ``[Q, k]``, float64; infinity for the address -1."""
    image, y, x = db.locate(addresses.clip(min=0))
    radius = queries.shape[-1] // 2
    total = np.zeros(addresses.shape)
    for down, right in np.ndindex(queries.shape[2:]):
        pixels = db.images[image, :, y + down - radius, x + right - radius] / 127.5 - 1
        total += ((pixels - queries[:, None, :, down, right]) ** 2).sum(-1)
    return np.where(addresses < 0, np.inf, total)


def least_distances(db: PatchDatabase, queries: Patches, k: int) -> Floats:
    """The k least squared distances to any patch of the database, ascending, ``[Q, k]``."""
    flat = queries.reshape(len(queries), -1)
    size = queries.shape[-1]
    # float32 chooses some more than k, of which float64 ranks the nearest.
    more = k + k // 4
    distances: npt.NDArray[Any] = np.empty((len(queries), 0), np.float32)
    addresses: npt.NDArray[Any] = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(db), _CHUNK_IMAGES):
        images = decode(db.images[start : start + _CHUNK_IMAGES])
        windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(2, 3))
        patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, flat.shape[1])
        near, position = faiss.knn(flat, np.ascontiguousarray(patches), more)
        image, y, x = np.unravel_index(position, (len(images), *windows.shape[2:4]))
        here = db.address(start + image, y + size // 2, x + size // 2)
        distances, addresses = np.hstack([distances, near]), np.hstack([addresses, here])
        kept = np.argpartition(distances, more - 1)[:, :more]
        distances = np.take_along_axis(distances, kept, 1)
        addresses = np.take_along_axis(addresses, kept, 1)
    return np.sort(squared_distances(db, queries, addresses))[:, :k]
