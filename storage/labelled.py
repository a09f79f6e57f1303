"""Grids of images with words beside them, in every format that people ask for."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from els.storage.figures import neutral_style, printable, write_figure
from els.storage.files import require_place
from els.storage.png import GAP, Pixels, enlargement, grid, require_suffix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg")
"""Suffixes of the pictures that can be written."""

# Pixels of a side, at most: of WebP and JPEG by their definitions, of the others by matplotlib.
_MOST_PIXELS = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500}
_MOST_DRAWN = 65_535
# Dots per inch: a figure's pixels are those of its tiles.
_DPI = 100
_POINTS_PER_INCH = 72
# Size of the labels in points, and pixels of a line of them.
_POINTS = 8
_LINE = 15
# Pixels between a label and what it belongs to.
_MARGIN = 5
# Pixels that the longer side of the enlarged tiles has at most.
_SIDE = 1200
_INK = "0.25"
# Labels that are measured, of those with most letters: of ten thousand it takes a minute.
_MEASURED = 20
# How formats are compressed: tiles are small, and their pixels are to be seen.
_COMPRESSION: dict[str, dict[str, Any]] = {
    ".webp": {"lossless": True},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".tif": {"compression": "tiff_deflate"},
    ".tiff": {"compression": "tiff_deflate"},
}


def require_picture(path: str | Path) -> None:
    """Check, before the work, that a picture can be written.

    Raises:
        ValueError: naming the suffixes that serve.
        FileNotFoundError: its folder is not there.
        IsADirectoryError: it is a folder.
    """
    require_suffix(path, PICTURE_FORMATS)
    require_place(path)


@dataclass(frozen=True)
class Labels:
    """Words of a grid; an empty tuple for none of a sort.

    Attributes:
        title: above everything.
        rows: left of each row.
        columns: above each column.
        tiles: above each tile.
    """

    title: str = ""
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    tiles: tuple[str, ...] = ()


def write_grid(
    path: str | Path, tiles: Sequence[Pixels], columns: int, labels: Labels = Labels()
) -> None:
    """Write tiles row by row, with their labels, whole or not at all.

    Args:
        path: of the picture; its suffix is one of ``PICTURE_FORMATS``.
        tiles: uint8, all ``[H, W]`` or all ``[H, W, 3]``; enlarged while the whole is small.
        columns: tiles per row.
        labels: the words.

    Raises:
        ValueError: for another suffix, or more pixels than the format has.
        OSError: if it cannot be written.
    """
    path = Path(path)
    require_picture(path)
    suffix = path.suffix.lower()
    with neutral_style():
        layout = _Layout.of(tiles, columns, labels)
        most = _MOST_PIXELS.get(suffix, _MOST_DRAWN)
        if max(layout.width, layout.height) > most:
            raise ValueError(
                f"{path} would have {layout.width:,} x {layout.height:,} pixels, and {suffix} has "
                f"at most {most:,} a side; draw fewer images, or as many rows as columns"
            )
        write_figure(
            lambda: layout.figure(tiles, columns, labels),
            path,
            dpi=_DPI,
            compression=_COMPRESSION.get(suffix),
        )


@neutral_style()
def draw_grid(tiles: Sequence[Pixels], columns: int, labels: Labels = Labels()) -> Pixels:
    """The picture of :func:`write_grid` as pixels, uint8 ``[H, W, 3]``."""
    figure = _Layout.of(tiles, columns, labels).figure(tiles, columns, labels)
    stream = io.BytesIO()
    figure.savefig(stream, format="rgba", dpi=_DPI)
    width, height = figure.canvas.get_width_height()
    pixels = np.frombuffer(stream.getbuffer(), np.uint8).reshape(height, width, 4)
    return pixels[..., :3].copy()


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a labelled grid are, in pixels from its upper left corner.

    Attributes:
        scale: pixels of the picture that a tile's pixel is wide.
        above: room above every row, for the labels of its tiles.
        left: room for the labels of the rows.
        top: room for the title and the labels of the columns.
        width: of the picture.
        height: of the picture.
        is_turned: whether the columns' labels are written upwards, being wider than the columns.
    """

    scale: int
    above: int
    left: int
    top: int
    width: int
    height: int
    is_turned: bool

    @classmethod
    def of(cls, tiles: Sequence[Pixels], columns: int, labels: Labels) -> _Layout:
        """The layout of some tiles; called in the neutral style."""
        tall, wide = tiles[0].shape[:2]
        scale = enlargement(tiles, columns)
        if labels != Labels():
            # Tiles are made at least as wide as their labels.
            needed = -(-_longest(labels.tiles) // wide)
            scale = max(enlargement(tiles, columns, _SIDE), needed)
        above = _LINE if labels.tiles else 0
        left = _longest(labels.rows) + 2 * _MARGIN if labels.rows else 0
        head = _longest(labels.columns)
        is_turned = head > wide * scale
        top = _LINE + _MARGIN if labels.title else 0
        if labels.columns:
            top += head + _MARGIN if is_turned else _LINE
        rows = -(-len(tiles) // columns)
        width = left + GAP + max(columns * (wide * scale + GAP), _longest((labels.title,)))
        height = top + GAP + rows * (tall * scale + GAP + above)
        return cls(scale, above, left, top, width, height, is_turned)

    def figure(self, tiles: Sequence[Pixels], columns: int, labels: Labels) -> Figure:
        """The figure; at ``_DPI`` the pixels of the tiles are its own."""
        from matplotlib.figure import Figure

        pixels = grid(tiles, columns, scale=self.scale, above=self.above)
        tall, wide = pixels.shape[:2]
        # Matplotlib rounds inches down to pixels.
        figure = Figure(((self.width + 0.01) / _DPI, (self.height + 0.01) / _DPI), dpi=_DPI)
        lower = self.height - self.top - tall
        axes = figure.add_axes(
            (
                self.left / self.width,
                lower / self.height,
                wide / self.width,
                tall / self.height,
            )
        )
        axes.set_axis_off()
        # As colours, which are drawn as they are; a colour map rounds.
        shown = pixels if pixels.ndim == 3 else pixels[..., np.newaxis].repeat(3, axis=2)
        axes.imshow(shown, interpolation="none", aspect="auto")

        def write(x: float, y: float, words: str, **how: Any) -> None:
            style = {"fontsize": _POINTS, "color": _INK, "ha": "center", "va": "bottom", **how}
            figure.text(x / self.width, 1 - y / self.height, printable(words), **style)

        height, width = (side * self.scale for side in tiles[0].shape[:2])
        lefts = [self.left + GAP + place * (width + GAP) for place in range(columns)]
        tops = [
            self.top + GAP + self.above + place * (height + GAP + self.above)
            for place in range(-(-len(tiles) // columns))
        ]
        if labels.title:
            write(self.left + GAP, _LINE, labels.title, ha="left")
        for x, words in zip(lefts, labels.columns, strict=False):
            write(x + width / 2, self.top, words, rotation=90 if self.is_turned else 0)
        for y, words in zip(tops, labels.rows, strict=False):
            write(self.left - _MARGIN, y + height / 2, words, ha="right", va="center_baseline")
        for place, words in enumerate(labels.tiles):
            row, column = divmod(place, columns)
            write(lefts[column] + width / 2, tops[row], words)
        return figure


def _longest(labels: Sequence[str]) -> int:
    """Width of the longest label, in pixels; 0 without labels."""
    from matplotlib.textpath import TextPath

    most_letters = sorted({words for words in labels if words}, key=len)[-_MEASURED:]
    paths = [TextPath((0, 0), printable(words), size=_POINTS) for words in most_letters]
    points = max((path.get_extents().x1 for path in paths), default=0.0)
    return math.ceil(points * _DPI / _POINTS_PER_INCH)
