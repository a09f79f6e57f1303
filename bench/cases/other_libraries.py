"""What a user would pick instead: the same ELS (circular) posterior mean with common libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from els.bench import baselines
from els.bench.workloads import Workload

Baseline = Callable[[Workload], Tensor]


def query_patches(work: Workload) -> Tensor:
    """Cyclic patches around every pixel, float32 ``[B * H * W, C * P^2]``."""
    return baselines.query_patches(work.x, work.patch_size, "circular")


def training_patches(work: Workload) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (scaled patches ``[M, C * P^2]``, their clean centres ``[M, C]``)."""
    chunks = baselines.training_patches(work.db.images, work.patch_size, work.x.device)
    return ((work.alpha * patches, centres) for patches, centres in chunks)


def chunked_matmul(work: Workload) -> Tensor:
    """Matrix product and running softmax over chunks of unfolded patches."""
    means = baselines.chunked_torch(
        work.db.images,
        query_patches(work),
        alpha=work.alpha,
        sigma=work.sigma,
        patch_size=work.patch_size,
    )
    return _image(means, work)


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


def _image(rows: Tensor, work: Workload) -> Tensor:
    batch, channels, height, width = work.x.shape
    return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
