"""Baselines of els bench: posteriors by common libraries.

They answer for the pixels of an ELS machine whose candidates are all patches inside the training
images: every pixel where the query is read cyclically, else those whose own patch lies inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from els.engine.kinds import Boundary
from els.index import decode

Images = npt.NDArray[np.uint8]

_CHUNK_IMAGES = 32


def query_patches(x: Tensor, patch_size: int, boundary: Boundary) -> Tensor:
    """Patches around the pixels that are answered, ``[B * h * w, C * P * P]``.

    Args:
        x: noisy images, ``[B, C, H, W]``.
        patch_size: P, odd.
        boundary: ``circular``, every pixel, h, w = H, W; or ``zeros``, those whose patch lies
            inside, h, w = H - P + 1, W - P + 1.
    """
    radius = patch_size // 2
    return _rows(
        unfold(pad(x, (radius,) * 4, "circular") if boundary == "circular" else x, patch_size)
    )


def training_patches(
    images: Images, patch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (patches ``[M, C * P * P]``, their centres ``[M, C]``), clean, float32.

    Args:
        images: uint8 ``[N, C, H, W]``.
        patch_size: P, odd.
        device: where they go.
    """
    radius = patch_size // 2
    height, width = images.shape[2:]
    for start in range(0, len(images), _CHUNK_IMAGES):
        clean = torch.from_numpy(decode(images[start : start + _CHUNK_IMAGES])).to(device)
        centres = clean[:, :, radius : height - radius, radius : width - radius].flatten(2)
        yield _rows(unfold(clean, patch_size)), _rows(centres)


def chunked_torch(
    images: Images, queries: Tensor, *, alpha: float, sigma: float, patch_size: int
) -> Tensor:
    """Posterior means ``[Q, C]``: matrix products and a running softmax over chunks of patches.

    In float32 as usual, with ``|q|^2 - 2 q k + |k|^2``, which cancels at small sigma.

    Args:
        images: the training images, uint8 ``[N, C, H, W]``.
        queries: noisy patches, float32 ``[Q, C * P * P]``.
        alpha: signal scale.
        sigma: noise standard deviation.
        patch_size: P.
    """
    maximum = queries.new_full((len(queries), 1), -torch.inf)
    mass = queries.new_zeros(len(queries), 1)
    total = queries.new_zeros(len(queries), images.shape[1])
    for clean, centres in training_patches(images, patch_size, queries.device):
        patches = alpha * clean
        logits = queries @ patches.T
        logits -= 0.5 * patches.square().sum(1)
        logits /= sigma**2
        new = torch.maximum(maximum, logits.amax(1, keepdim=True))
        weights = logits.sub_(new).exp_()
        scale = (maximum - new).exp()
        mass = mass * scale + weights.sum(1, keepdim=True)
        total = total * scale + weights @ centres
        maximum = new
    return total / mass


@final
class FlatNearest:
    """A FAISS ``IndexFlatL2`` of all patches in float32, and a softmax over the k nearest.

    Args:
        images: the training images, uint8 ``[N, C, H, W]``.
        patch_size: P, odd.

    Raises:
        RuntimeError: FAISS is not installed.
    """

    def __init__(self, images: Images, patch_size: int) -> None:
        faiss = _faiss()
        self._images, self._patch_size = images, patch_size
        self._index = faiss.IndexFlatL2(images.shape[1] * patch_size**2)
        for patches, _ in training_patches(images, patch_size, torch.device("cpu")):
            self._index.add(patches.numpy())

    @staticmethod
    def most_images(shape: tuple[int, int, int], patch_size: int, memory: int) -> int:
        """How many images of a shape fit: FAISS's array grows by doubling."""
        channels, height, width = shape
        places = (height - patch_size + 1) * (width - patch_size + 1)
        return memory // (2 * 4 * channels * patch_size**2 * places)

    def means(self, queries: Tensor, *, alpha: float, sigma: float, k: int) -> Tensor:
        """Posterior means ``[Q, C]`` over the k nearest patches alone, biased where many matter.

        Args:
            queries: noisy patches, float32 ``[Q, C * P * P]``.
            alpha: signal scale, > 0.
            sigma: noise standard deviation.
            k: how many.
        """
        k = min(k, self._index.ntotal)
        distances, places = self._index.search((queries.cpu() / alpha).numpy(), k)
        logits = torch.from_numpy(distances) * (-0.5 * (alpha / sigma) ** 2)
        radius = self._patch_size // 2
        height, width = (length - 2 * radius for length in self._images.shape[2:])
        image, y, x = np.unravel_index(places, (len(self._images), height, width))
        centres = torch.from_numpy(decode(self._images[image, :, y + radius, x + radius]))
        return (logits.softmax(1).unsqueeze(-1) * centres).sum(1)


def answered(shape: tuple[int, int, int], patch_size: int, boundary: Boundary) -> tuple[slice, ...]:
    """Where in ``[H, W]`` the pixels are that are answered."""
    radius = 0 if boundary == "circular" else patch_size // 2
    return tuple(slice(radius, length - radius) for length in shape[1:])


def pairs(shape: tuple[int, int, int], patch_size: int, boundary: Boundary) -> int:
    """Pairs of a pixel that is answered and a patch of one training image."""
    inside = math.prod(length - patch_size + 1 for length in shape[1:])
    return inside * (math.prod(shape[1:]) if boundary == "circular" else inside)


def _rows(columns: Tensor) -> Tensor:
    """``[N, D, L]`` as ``[N * L, D]``."""
    return columns.transpose(1, 2).flatten(0, 1).contiguous()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise RuntimeError(
            "this baseline needs FAISS, which is not installed: pip install 'els-machine[cpu]'"
        ) from error
    return faiss
