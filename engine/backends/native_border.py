"""Posteriors of the pixels near a border of zeros, as products on a matrix unit (AMX).

The candidates of such a pixel are the patches with the same place relative to the border, so that
no index serves it. They are few enough to weigh all of them: the kernel (``csrc/border.h``) takes
an edge's patches and queries as matrices, with queries rounded to 16 bits and float32 logits. It is
two to four times as fast as the exact kernel, and good for estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from els.engine.backends.cores import available_cores
from els.engine.backends.native import kernel_module
from els.engine.backends.native_lists import LARGEST_QUERY, LOGIT_ERROR, can_scan, has_tiles
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState

_LARGEST_PATCH = 33
# Noisy distance, in standard deviations, within which candidates matter.
_NEAR = 8.0


def can_multiply(query: PosteriorQuery) -> bool:
    """Whether the matrix unit is there and tells the border's posterior well enough."""
    if query.kind != "ELS" or query.boundary != "zeros" or not can_scan() or not has_tiles():
        return False
    if not 3 <= query.patch_size <= _LARGEST_PATCH:
        return False
    alpha, sigma = float(query.alpha[0]), float(query.sigma[0])
    bytes_of_patch = query.x.shape[1] * query.patch_size * (query.patch_size - 1)
    of_sums = 4 * (alpha / sigma) ** 2 * bytes_of_patch * 2.0**-22
    largest = float((query.x + alpha).abs().max())
    of_query = _NEAR * largest / sigma / (LARGEST_QUERY * math.sqrt(12))
    return max(of_sums, of_query) < LOGIT_ERROR


def border_states(
    images: npt.NDArray[np.uint8],
    query: PosteriorQuery,
    groups: Sequence[npt.NDArray[np.int64]],
    *,
    wanted: npt.NDArray[np.bool_] | None = None,
    threads: int | None = None,
) -> list[PosteriorState]:
    """The border's pixels over each of some groups of images; other pixels have anything.

    Args:
        images: of the whole database.
        query: one image, ``B = 1``, for which :func:`can_multiply`; its members do not matter.
        groups: the members of each.
        wanted: of the border's pixels, ``[H, W]``; None for all. Others may have anything.
        threads: None for one per core. Results do not depend on it.

    Returns:
        A state of each group, with tilt.
    """
    _, channels, height, width = query.x.shape
    shape = (len(groups), 1, height, width)
    # Elsewhere some finite state, so that nothing that is computed from it warns.
    maximum, mass, tilt = np.zeros(shape), np.ones(shape), np.zeros(shape)
    centre = np.zeros((len(groups), 1, channels, height, width))
    if wanted is None:
        wanted = np.ones((height, width), dtype=np.bool_)
    kernel_module().border(
        images=images,
        members=np.concatenate(groups),
        starts=np.cumsum([0, *map(len, groups)], dtype=np.int64),
        x=query.x[0].to(device="cpu", dtype=torch.float32).contiguous().numpy(),
        wanted=wanted.view(np.uint8),
        alpha=float(query.alpha[0]),
        sigma=float(query.sigma[0]),
        patch_size=query.patch_size,
        threads=threads or available_cores(),
        maximum=maximum[:, 0],
        mass=mass[:, 0],
        centre=centre[:, 0],
        tilt=tilt[:, 0],
    )
    sums = map(torch.from_numpy, (maximum, mass, centre, tilt))
    return [PosteriorState(*group) for group in zip(*sums, strict=True)]
