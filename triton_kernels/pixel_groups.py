"""Which pixels share their candidates, and which bytes of packed images their windows read.

Packed images have four bytes a pixel, channel c the c-th. A window's *coordinates* are the channels
of its pixels; the address of one is ``4 * pixel + channel``, or -1 outside the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Columns of a segment that are not coordinates: three digits, two constants.
EXTRAS = 5
# Columns of the longest patch that is one segment: three digits hold its norm.
_LONGEST_SEGMENT = 256
# Columns of each segment of a longer one.
_SEGMENT = 64


@dataclass(frozen=True)
class Layout:
    """Where a patch's coordinates stand in a key or in a query's row.

    Attributes:
        coordinates: D of a patch.
        segment: coordinates of a segment.
        width: columns of a segment, a multiple of 16; coordinates, then extras, then zeros.
    """

    coordinates: int
    segment: int
    width: int

    @classmethod
    def of(cls, coordinates: int, windows: int = 1) -> Self:
        """The layout of windows of D coordinates, one behind the other; several start segments."""
        if coordinates + EXTRAS <= _LONGEST_SEGMENT:
            width = -(-(coordinates + EXTRAS) // 16) * 16
            return cls(windows * coordinates, coordinates, width)
        return cls(windows * coordinates, _SEGMENT - EXTRAS, _SEGMENT)

    @property
    def segments(self) -> int:
        """How many there are."""
        return -(-self.coordinates // self.segment)

    @property
    def columns(self) -> int:
        """Of a key."""
        return self.segments * self.width

    def cut(self, coordinates: Tensor) -> Tensor:
        """Coordinates ``[..., D]`` as ``[..., segments, segment]``, zeros behind the last."""
        missing = self.segments * self.segment - self.coordinates
        padded = torch.nn.functional.pad(coordinates, (0, missing))
        return padded.reshape(*coordinates.shape[:-1], self.segments, self.segment)

    def arranged(self, coordinates: Tensor, extras: Tensor) -> Tensor:
        """Columns ``[..., K]`` of coordinates ``[..., D]`` and extras ``[..., segments, 4]``."""
        unused = self.width - self.segment - EXTRAS
        return torch.nn.functional.pad(
            torch.cat([self.cut(coordinates), extras], -1), (0, unused)
        ).flatten(-2)


@dataclass(frozen=True, eq=False)
class PixelGroups:
    """G groups of R query pixels each; the S candidates of a group in a training image are shared.

    Attributes:
        queries: pixels ``y * W + x``, int64 ``[G, R]``.
        candidates: pixels likewise, int64 ``[G, S]``.
        query_windows: addresses of the D coordinates of their windows, int32 ``[G, R, D]``.
        candidate_windows: likewise, int32 ``[G, S, D]``.
        layout: of the keys of candidates.
    """

    queries: Tensor
    candidates: Tensor
    query_windows: Tensor
    candidate_windows: Tensor
    layout: Layout

    @property
    def query_layout(self) -> Layout:
        """Of the rows of queries."""
        return replace(self.layout, coordinates=self.query_windows.shape[2])

    def to(self, device: torch.device) -> PixelGroups:
        """The same on a device."""
        tables = ((name, value) for name, value in vars(self).items() if name != "layout")
        return replace(self, **{name: table.to(device) for name, table in tables})


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
    layout = Layout.of(channels * patch_size, windows=2)
    return replace(groups, candidate_windows=windows.contiguous(), layout=layout)


def _groups(
    queries: NDArray[np.int64],
    candidates: NDArray[np.int64],
    shape: tuple[int, int, int],
    window: NDArray[np.bool_],
    *,
    circular: bool,
) -> PixelGroups:
    """Groups of these pixels of images of a shape, with their windows."""

    def table(numbers: NDArray[Any]) -> Tensor:
        # Kernels read plain rows.
        return torch.from_numpy(np.ascontiguousarray(numbers))

    return PixelGroups(
        table(queries),
        table(candidates),
        table(_addresses(queries, shape, window, circular)),
        table(_addresses(candidates, shape, window, circular)),
        Layout.of(shape[0] * int(window.sum())),
    )


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
