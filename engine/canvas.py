"""A canvas of another size than the training images, from windows of their size (ELS).

An ELS machine compares patches, so a pixel's answer depends on its patch and, with zeros beyond the
border, on its place relative to the border. Every pixel of the canvas is answered by a window of
the training size in which it sees the same: one whose own border it does not reach, or, near a
border of the canvas, one that shares this border (docs/theory.md). So every backend and mode works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from els.engine.kinds import Boundary
from els.engine.result import LocalPosterior, joint_claims
from els.engine.watching import portion

# Windows that are asked for at once.
_MOST_WINDOWS = 16


@final
@dataclass(frozen=True)
class Axis:
    """Windows along one side of the canvas.

    Attributes:
        starts: first coordinate of each window, which may lie outside.
        owners: the window that answers for each coordinate.
        length: of the canvas.
        side: of a window.
        wraps: whether coordinates outside are those of the opposite end, else nothing.
    """

    starts: tuple[int, ...]
    owners: tuple[int, ...]
    length: int
    side: int
    wraps: bool

    @classmethod
    def of(cls, length: int, side: int, radius: int, *, wraps: bool) -> Axis:
        """Windows of a side for a canvas of a length, whose patches reach so far from a pixel."""
        if length == side:
            return cls((0,), (0,) * length, length, side, wraps)
        inner = side - 2 * radius
        places = range(length)
        if wraps:
            owners = [y // inner for y in places]
            starts = [i * inner - radius for i in range(max(owners) + 1)]
            return cls(tuple(starts), tuple(owners), length, side, wraps)
        # The last window ends where the canvas does. Of a canvas that is smaller than a window it
        # answers for what is near that end alone, since the rest is near its own beginning.
        last = length - side + radius if length > side else length - radius
        owners = [max(0, (y - radius) // inner) for y in places if y < last]
        starts = [i * inner for i in range(max(owners, default=-1) + 1)]
        owners += [len(starts)] * (length - len(owners))
        if owners[-1] == len(starts):
            starts.append(length - side)
        return cls(tuple(starts), tuple(owners), length, side, wraps)

    def coordinates(self, window: int) -> Tensor:
        """Of a window on the canvas, int64 ``[side]``; -1 outside."""
        places = self.starts[window] + torch.arange(self.side)
        if self.wraps:
            return places % self.length
        return torch.where((places >= 0) & (places < self.length), places, -1)

    def served(self, window: int) -> Tensor:
        """Coordinates of the canvas that a window answers for, int64."""
        return torch.from_numpy(np.flatnonzero(np.array(self.owners) == window))


def on_canvas(
    x: Tensor,
    image: tuple[int, int],
    patch_size: int,
    boundary: Boundary,
    ask: Callable[[Tensor, Tensor, Sequence[int], Tensor], LocalPosterior],
) -> LocalPosterior:
    """The posterior of noisy canvases.

    Args:
        x: ``[B, C, H', W']``.
        image: height and width of the training images.
        patch_size: P, at most the shortest of all sides.
        boundary: of the machine.
        ask: gives the posterior of windows ``[M, C, H, W]``, of which image of the batch each is,
            int64 ``[M]``, the number of each window, and the pixels that it answers for, bool
            ``[M, H, W]``.
    """
    radius, wraps = patch_size // 2, boundary == "circular"
    rows, columns = (
        Axis.of(length, side, radius, wraps=wraps)
        for length, side in zip(x.shape[2:], image, strict=True)
    )
    pairs = [(i, j) for i in range(len(rows.starts)) for j in range(len(columns.starts))]
    pieces = [(number, pair, b) for number, pair in enumerate(pairs) for b in range(len(x))]
    answers: list[LocalPosterior] = []
    for start in range(0, len(pieces), _MOST_WINDOWS):
        some = pieces[start : start + _MOST_WINDOWS]
        windows = torch.stack([_window(x[b], rows, columns, pair) for _, pair, b in some])
        served = torch.stack([_served(rows, columns, pair) for _, pair, _ in some])
        of_image = torch.tensor([b for *_, b in some])
        with portion(start / len(pieces), (start + len(some)) / len(pieces)):
            answers.append(ask(windows, of_image, [n for n, *_ in some], served))
    return _together(x, rows, columns, pieces, answers)


def _window(x: Tensor, rows: Axis, columns: Axis, pair: tuple[int, int]) -> Tensor:
    """A window of one canvas ``[C, H', W']``; zeros outside."""
    y, column = (
        axis.coordinates(i).to(x.device) for axis, i in zip((rows, columns), pair, strict=True)
    )
    inside = (y >= 0).unsqueeze(1) & (column >= 0)
    found = x[:, y.clamp(min=0)][:, :, column.clamp(min=0)]
    return torch.where(inside, found, torch.zeros((), dtype=x.dtype, device=x.device))


def _served(rows: Axis, columns: Axis, pair: tuple[int, int]) -> Tensor:
    """The pixels of a window that it answers for, bool ``[H, W]``."""
    masks = []
    for axis, i in zip((rows, columns), pair, strict=True):
        mask = torch.zeros(axis.side, dtype=torch.bool)
        mask[axis.served(i) - axis.starts[i]] = True
        masks.append(mask)
    return masks[0].unsqueeze(1) & masks[1]


def _together(
    x: Tensor,
    rows: Axis,
    columns: Axis,
    pieces: Sequence[tuple[int, tuple[int, int], int]],
    answers: Sequence[LocalPosterior],
) -> LocalPosterior:
    """What the windows' posteriors say of the pixels that each of them answers for."""
    first = answers[0]
    batch, _, height, width = x.shape
    y_places, x_places = (
        [(axis.served(i), axis.served(i) - axis.starts[i]) for i in range(len(axis.starts))]
        for axis in (rows, columns)
    )

    def assembled(name: str, *, of_mean: bool = False) -> Any:
        parts = [getattr(answer, name) for answer in answers]
        if parts[0] is None:
            return None
        values = torch.cat(parts)
        if of_mean:
            values = values.movedim(1, -1)
        whole = values.new_zeros(batch, height, width, *values.shape[3:])
        for value, (_, (i, j), b) in zip(values, pieces, strict=True):
            (y, down), (column, right) = y_places[i], x_places[j]
            part = value[down.unsqueeze(1), right.unsqueeze(0)]
            whole[b, y.unsqueeze(1), column.unsqueeze(0)] = part
        return whole.movedim(-1, 1) if of_mean else whole

    rows_of = [(answer, b) for answer in answers for b in range(len(answer.mean))]
    of_images = [
        [row for row, (*_, b) in zip(rows_of, pieces, strict=True) if b == i] for i in range(batch)
    ]
    tensors = ("log_evidence", "effective_patches", "top_weights", "top_addresses")
    errors = ("omitted_mass", "mean_error", "expected_error")
    return replace(
        first,
        mean=assembled("mean", of_mean=True),
        **{name: assembled(name) for name in (*tensors, *errors)},
        **joint_claims(of_images),
    )
