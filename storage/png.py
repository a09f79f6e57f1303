"""Pixels as PNG files, and how images of 1 to 4 channels are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from els.storage.files import atomic_file

Pixels = npt.NDArray[np.uint8]

# Pixels between the tiles of a grid, and around them.
GAP = 2
# Pixels that the longer side of an enlarged grid has at most.
_ENLARGED_SIDE = 512
# Pixels of a grid that a tile's pixel is wide, at most.
_MOST_ENLARGED = 8


def require_suffix(path: str | Path, suffixes: Sequence[str]) -> None:
    """Check the suffix of a path.

    Raises:
        ValueError: naming the suffixes that serve.
    """
    if Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in one of {', '.join(suffixes)}")


def panels(image: Pixels) -> Pixels:
    """All values of an image, whatever its channels, in a form that a PNG viewer shows.

    Args:
        image: uint8 ``[C, H, W]``.

    Returns:
        ``[H, W]`` for one channel, ``[H, W, 3]`` for three (RGB), otherwise the channels side by
        side in grey, ``[H, C * W]``.
    """
    if len(image) == 3:
        return np.moveaxis(image, 0, -1)
    return np.concatenate(list(image), axis=1)


def colours(image: Pixels) -> Pixels:
    """An image as RGB in place, ``[H, W, 3]``, for the eye.

    Args:
        image: uint8 ``[C, H, W]``: grey, red against cyan (C = 2), RGB, or RGB dimmed by half of
            what the fourth channel lacks.
    """
    match len(image):
        case 1:
            picked = image[[0, 0, 0]]
        case 2:
            picked = image[[0, 1, 1]]
        case 3:
            picked = image
        case _:
            picked = (image[:3] * (0.5 + image[3:] / 510.0)).round().astype(np.uint8)
    return np.moveaxis(picked, 0, -1)


def enlargement(tiles: Sequence[Pixels], columns: int, side: int = _ENLARGED_SIDE) -> int:
    """How many pixels wide a pixel of the tiles is where their grid is to be some size.

    Args:
        tiles: as in :func:`grid`.
        columns: tiles per row.
        side: that the grid's longer side is not to exceed, in pixels.

    Returns:
        1, where the tiles are large or many, to 8.
    """
    height, width = map(int, tiles[0].shape[:2])
    longer = max(-(-len(tiles) // columns) * height, columns * width)
    return max(1, min(_MOST_ENLARGED, side // longer))


def grid(
    tiles: Sequence[Pixels], columns: int, *, scale: int | None = None, above: int = 0
) -> Pixels:
    """Tiles of one shape, row by row with white gaps, enlarged while the whole is small.

    Args:
        tiles: uint8, all ``[H, W]`` or all ``[H, W, 3]``.
        columns: tiles per row.
        scale: how many pixels wide a pixel of the tiles is; None for :func:`enlargement`.
        above: more white above every row, in pixels.

    Returns:
        uint8 ``[H', W']`` or ``[H', W', 3]``.
    """
    height, width, *colour = tiles[0].shape
    rows = -(-len(tiles) // columns)
    if scale is None:
        scale = enlargement(tiles, columns)
    step_y, step_x = height * scale + GAP + above, width * scale + GAP
    canvas = np.full((rows * step_y + GAP, columns * step_x + GAP, *colour), 255, np.uint8)
    for place, tile in enumerate(tiles):
        y, x = GAP + above + place // columns * step_y, GAP + place % columns * step_x
        enlarged = tile.repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[y : y + height * scale, x : x + width * scale] = enlarged
    return canvas


def write_png(path: Path, picture: Pixels) -> None:
    """Write ``[H, W]`` or ``[H, W, 3]`` as PNG, whole or not at all."""
    with atomic_file(path) as stream:
        Image.fromarray(np.ascontiguousarray(picture)).save(stream, format="PNG")
