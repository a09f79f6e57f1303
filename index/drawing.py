"""What `show` and notebooks draw: figures that need no pyplot, and images beside a line of text."""

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from els.storage.figures import neutral_style, require_matplotlib
from els.storage.figures import printable as printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_INLINE = 16
"""Images in what a notebook shows of a database or a posterior by itself."""

# Columns of these.
_INLINE_COLUMNS = 8


@contextmanager
def drawing(width: float, height: float) -> "Iterator[Figure]":
    """Context that gives an empty figure, to be drawn in matplotlib's default style.

    Args:
        width: inches.
        height: inches.

    Raises:
        RuntimeError: without matplotlib.
    """
    try:
        require_matplotlib()
        from els.index.notebook_figure import NotebookFigure
    except ImportError as error:
        raise RuntimeError("pictures are drawn with matplotlib: pip install matplotlib") from error
    with neutral_style():
        yield NotebookFigure(figsize=(width, height), layout="constrained")


def draw_image(axes: "Axes", image: NDArray[np.uint8], title: str, *, fontsize: float = 10) -> None:
    """Draws an image without ticks.

    Args:
        axes: where.
        image: uint8 [C, H, W], C in 1..4.
        title: above it.
        fontsize: of the title, points.
    """
    from els.storage.png import colours

    axes.imshow(colours(image), interpolation="nearest")
    axes.set_title(title, fontsize=fontsize)
    axes.set(xticks=[], yticks=[])


def inline_html(text: str, images: Sequence[NDArray[np.uint8]]) -> str | None:
    """A line of text above small images, as HTML; None without Pillow.

    Args:
        text: any.
        images: uint8 [C, H, W], all of one shape, at least one.
    """
    try:
        from PIL import Image

        from els.storage.png import grid, panels
    except ImportError:
        return None
    tiles: list[Any] = [panels(np.asarray(image)) for image in images[:MOST_INLINE]]
    stream = BytesIO()
    Image.fromarray(grid(tiles, columns=min(_INLINE_COLUMNS, len(tiles)))).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<div>{escape(printable(text))}</div><img src="data:image/png;base64,{data}">'
