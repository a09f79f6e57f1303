"""Which pixels share their candidates, and which bytes of packed images their windows read.

Packed images have four bytes a pixel, channel c the c-th. A window's *coordinates* are the channels
of its pixels; the address of one is ``4 * pixel + channel``, or -1 outside the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PixelGroups:
    """G groups of R query pixels each; the S candidates of a group in a training image are shared.

    Attributes:
        queries: pixels ``y * W + x``, int64 ``[G, R]``.
        candidates: pixels likewise, int64 ``[G, S]``.
        query_windows: addresses of the D coordinates of their windows, int32 ``[G, R, D]``.
        candidate_windows: likewise, int32 ``[G, S, D]``.
    """

    queries: Tensor
    candidates: Tensor
    query_windows: Tensor
    candidate_windows: Tensor

    def to(self, device: torch.device) -> PixelGroups:
        """The same on a device."""
        return replace(self, **{name: table.to(device) for name, table in vars(self).items()})


def pixel_groups(
    height: int,
    width: int,
    channels: int,
    window: NDArray[np.bool_],
    *,
    equivariant: bool,
    circular: bool,
) -> Iterator[PixelGroups]:
    """All pixels of an image in as few sets of groups as there are shapes of groups.

    Args:
        height: of the images.
        width: of the images.
        channels: of the images, 1 to 4.
        window: which pixels of a patch are compared, ``[P, P]``.
        equivariant: whether candidates stand anywhere. Those of circular machines lie inside; with
            zeros beyond the border, pixels whose window reaches over an edge have candidates at the
            same distance from that edge only.
        circular: whether windows continue at the opposite edge.
    """

    def groups(queries: NDArray[np.int64], candidates: NDArray[np.int64]) -> PixelGroups:
        return _groups(queries, candidates, (channels, height, width), window, circular=circular)

    numbers = np.arange(height * width).reshape(height, width)
    if not equivariant:
        yield groups(numbers.reshape(-1, 1), numbers.reshape(-1, 1))
        return
    radius = len(window) // 2
    inside = numbers[radius : height - radius, radius : width - radius]
    if circular:
        yield groups(numbers.reshape(1, -1), inside.reshape(1, -1))
        return
    for rows, columns in product(
        _edges_and_inside(height, radius), _edges_and_inside(width, radius)
    ):
        pixels = rows[:, None, :, None] * width + columns[None, :, None, :]
        pixels = pixels.reshape(len(rows) * len(columns), -1)
        yield groups(pixels, pixels)


def row_groups(
    height: int, width: int, channels: int, patch_size: int, *, circular: bool
) -> PixelGroups:
    """Windows of a single row, a group for each row of an image.

    Candidates are all that lie inside, queries too unless windows continue at the opposite edge. A
    candidate has two windows: its own, and the one ``patch_size`` rows above, if there is one.

    Args:
        height: of the images.
        width: of the images.
        channels: of the images, 1 to 4.
        patch_size: odd length of the windows.
        circular: whether windows continue at the opposite edge.
    """
    radius = patch_size // 2
    numbers = np.arange(height * width).reshape(height, width)
    inside = numbers[:, radius : width - radius]
    window = np.ones((1, patch_size), dtype=np.bool_)
    queries = numbers if circular else inside
    groups = _groups(queries, inside, (channels, height, width), window, circular=circular)
    above = torch.full_like(groups.candidate_windows, -1)
    above[patch_size:] = groups.candidate_windows[: height - patch_size]
    windows = torch.cat([groups.candidate_windows, above], dim=-1)
    return replace(groups, candidate_windows=windows.contiguous())


def _groups(
    queries: NDArray[np.int64],
    candidates: NDArray[np.int64],
    shape: tuple[int, int, int],
    window: NDArray[np.bool_],
    *,
    circular: bool,
) -> PixelGroups:
    """Groups of these pixels of images of a shape, with their windows."""
    windows = [_addresses(pixels, shape, window, circular) for pixels in (queries, candidates)]
    # Kernels read plain rows.
    tables = map(np.ascontiguousarray, (queries, candidates, *windows))
    return PixelGroups(*map(torch.from_numpy, tables))


def _edges_and_inside(length: int, radius: int) -> list[NDArray[np.int64]]:
    """Coordinates of an axis in groups ``[G, R]``: each of the edges' alone, those inside."""
    inside = np.arange(radius, length - radius).reshape(1, -1)
    edges = np.setdiff1d(np.arange(length), inside).reshape(-1, 1)
    return [edges, inside] if radius else [inside]


def _addresses(
    pixels: NDArray[np.int64],
    shape: tuple[int, int, int],
    window: NDArray[np.bool_],
    circular: bool,
) -> NDArray[np.int32]:
    """The coordinates' addresses of windows around pixels, ``[G, R]`` to ``[G, R, D]``."""
    channels, height, width = shape
    down, right = (np.argwhere(window) - np.array(window.shape) // 2).T
    y, x = pixels[..., None] // width + down, pixels[..., None] % width + right
    is_outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
    places = (y % height) * width + x % width
    addresses: NDArray[np.int32] = (4 * places[..., None] + np.arange(channels)).astype(np.int32)
    if not circular:
        addresses[is_outside] = -1
    return addresses.reshape(*pixels.shape, -1)
