"""Posteriors of the pixels near a border of zeros, as products on a matrix unit (AMX).

The candidates of such a pixel are the patches with the same place relative to the border, so that
no index serves it. They are few enough to weigh all of them: the kernel (``csrc/border.h``) takes
an edge's patches and queries as matrices, with queries rounded to 16 bits and float32 logits. It is
two to four times as fast as the exact kernel, and precise enough for estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from els.engine.backends.native_kernels import Kernels
from els.engine.backends.native_lists import LARGEST_QUERY
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState

# Largest patch side whose matrices the kernel's buffers hold.
_LARGEST_PATCH = 33
# Noisy distance, in standard deviations, within which candidates matter.
_NEAR = 8.0
# Standard deviation of a rounding to integers.
_OF_ROUNDING = 1 / math.sqrt(12)


def is_precise(query: PosteriorQuery) -> bool:
    """Whether the kernel computes the query's patches, with the logit errors that it allows."""
    if not query.has_border or not 3 <= query.patch_size <= _LARGEST_PATCH:
        return False
    bytes_of_patch = query.x.shape[1] * query.patch_size * (query.patch_size - 1)
    shifted = query.x.detach().cpu().double() + query.alpha.reshape(-1, 1, 1, 1)
    largest = shifted.abs().amax((1, 2, 3))
    of_sums = 4 * (query.alpha / query.sigma) ** 2 * bytes_of_patch * 2.0**-22
    of_query = _NEAR * largest / query.sigma * _OF_ROUNDING / LARGEST_QUERY
    return float(torch.maximum(of_sums, of_query).max()) < query.logit_error


def border_states(
    kernels: Kernels,
    images: npt.NDArray[np.uint8],
    query: PosteriorQuery,
    groups: Sequence[npt.NDArray[np.int64]],
    *,
    threads: int = 1,
) -> list[PosteriorState]:
    """The border's pixels over each of some groups of images; other pixels have anything.

    Args:
        kernels: with a matrix unit.
        images: of the whole database.
        query: one image, ``B = 1``, for which :func:`is_precise`.
        groups: the members of each.
        threads: how many to use. Results do not depend on it.

    Returns:
        A state of each group, with logit_sum.
    """
    _, channels, height, width = query.x.shape
    shape = (len(groups), 1, height, width)
    # Elsewhere some finite state, so that nothing that is computed from it warns.
    reference, mass, logit_sum = np.zeros(shape), np.ones(shape), np.zeros(shape)
    centre = np.zeros((len(groups), 1, channels, height, width))
    wanted = query.pixels
    if wanted is None:
        wanted = np.ones((height, width), dtype=np.bool_)
    kernels.border(
        images=images,
        members=np.concatenate(groups),
        starts=np.cumsum([0, *map(len, groups)], dtype=np.int64),
        x=query.x[0].to(device="cpu", dtype=torch.float32).contiguous().numpy(),
        wanted=np.ascontiguousarray(wanted).view(np.uint8),
        alpha=float(query.alpha[0]),
        sigma=float(query.sigma[0]),
        patch_size=query.patch_size,
        threads=threads,
        reference=reference[:, 0],
        mass=mass[:, 0],
        centre=centre[:, 0],
        logit_sum=logit_sum[:, 0],
    )
    sums = map(torch.from_numpy, (reference, mass, centre, logit_sum))
    return [PosteriorState(*group) for group in zip(*sums, strict=True)]
