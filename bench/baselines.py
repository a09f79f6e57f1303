"""What a user would pick instead: the same ELS (circular) posterior mean with common libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention, unfold

from els.bench.workloads import Workload
from els.index import decode

Baseline = Callable[[Workload], Tensor]

_CHUNK_IMAGES = 32


def query_patches(work: Workload) -> Tensor:
    """Cyclic patches around every pixel, float32 ``[B * H * W, C * P^2]``."""
    r = work.patch_size // 2
    return _flat(unfold(pad(work.x, (r, r, r, r), mode="circular"), work.patch_size))


def training_patches(work: Workload) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (scaled patches ``[M, C * P^2]``, their clean centres ``[M, C]``)."""
    r = work.patch_size // 2
    _, height, width = work.db.shape
    for start in range(0, len(work.db), _CHUNK_IMAGES):
        images = torch.from_numpy(decode(work.db.images[start : start + _CHUNK_IMAGES]))
        images = images.to(work.x.device)
        centres = images[:, :, r : height - r, r : width - r].flatten(2)
        yield work.alpha * _flat(unfold(images, work.patch_size)), _flat(centres)


def chunked_matmul(work: Workload) -> Tensor:
    """Matrix product and running softmax over chunks of unfolded patches."""
    queries = query_patches(work)
    maximum = queries.new_full((len(queries), 1), -torch.inf)
    mass = queries.new_zeros(len(queries), 1)
    total = queries.new_zeros(len(queries), work.db.shape[0])
    for patches, centres in training_patches(work):
        logits = queries @ patches.T
        logits -= 0.5 * patches.square().sum(1)
        logits /= work.sigma**2
        new = torch.maximum(maximum, logits.amax(1, keepdim=True))
        weights = logits.sub_(new).exp_()
        scale = (maximum - new).exp()
        mass = mass * scale + weights.sum(1, keepdim=True)
        total = total * scale + weights @ centres
        maximum = new
    return _image(total / mass, work)


def attention(work: Workload) -> Tensor:
    """``scaled_dot_product_attention``; one more coordinate carries the norms of the patches."""
    patches, centres = (torch.cat(parts) for parts in zip(*training_patches(work), strict=True))
    queries = query_patches(work)
    queries = torch.cat([queries, queries.new_ones(len(queries), 1)], dim=1)
    keys = torch.cat([patches, -0.5 * patches.square().sum(1, keepdim=True)], dim=1)
    result = scaled_dot_product_attention(
        queries[None, None], keys[None, None], centres[None, None], scale=1 / work.sigma**2
    )
    return _image(result[0, 0], work)


def keops(work: Workload) -> Tensor:
    """KeOps, which forms distances in registers and never the matrix."""
    from pykeops.torch import LazyTensor

    patches, centres = (torch.cat(parts) for parts in zip(*training_patches(work), strict=True))
    q = LazyTensor(query_patches(work)[:, None, :])
    k = LazyTensor(patches[None, :, :])
    logits = -((q - k) ** 2).sum(-1) / (2 * work.sigma**2)
    return _image(logits.sumsoftmaxweight(LazyTensor(centres[None, :, :]), axis=1), work)


def faiss_nearest(work: Workload) -> Tensor:
    """One exact FAISS search for the nearest patch alone: less work, and a biased answer."""
    import faiss

    patches, centres = (torch.cat(parts) for parts in zip(*training_patches(work), strict=True))
    index = faiss.IndexFlatL2(patches.shape[1])
    index.add(patches.numpy())
    _, nearest = index.search(query_patches(work).numpy(), 1)
    return _image(centres[torch.from_numpy(np.ascontiguousarray(nearest[:, 0]))], work)


BASELINES: dict[str, Baseline] = {
    "chunked matmul": chunked_matmul,
    "attention": attention,
    "keops": keops,
    "faiss k=1": faiss_nearest,
}


def _flat(columns: Tensor) -> Tensor:
    """``[N, D, L]`` as ``[N * L, D]``."""
    return columns.transpose(1, 2).flatten(0, 1).contiguous()


def _image(rows: Tensor, work: Workload) -> Tensor:
    batch, channels, height, width = work.x.shape
    return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
