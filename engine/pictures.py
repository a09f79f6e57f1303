"""Pictures of a posterior, for notebooks and scripts; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.query import PosteriorQuery
from els.index import PatchDatabase, encode
from els.index.drawing import MOST_INLINE, draw_image, drawing, inline_html, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Side of a picture, and of the title above it, in inches.
_SIDE = 2.6
_TITLE = 0.6
# Side of a patch below it, likewise.
_PATCH_SIDE = 1.5
# Patches in a row.
_COLUMNS = 8
# Share of a noisy image's values that its grey levels span; the rest is black or white.
_SPAN = 0.99
# Marks a pixel and its patch.
_MARK = "#FF2D6F"


class Patch(NamedTuple):
    """One of the heaviest training patches of a pixel.

    Attributes:
        weight: posterior weight, 0 to 1.
        image: number of the training image.
        y: row of the patch's centre.
        x: its column.
    """

    weight: float
    image: int
    y: int
    x: int


def posterior_html(text: str, mean: Tensor) -> str | None:
    """The first images of a mean ``[B, C, H, W]`` below a line of text; None without Pillow."""
    shown = mean[:MOST_INLINE].detach().to("cpu", torch.float32)
    return inline_html(text, list(encode(shown.nan_to_num())))


def posterior_figure(
    query: PosteriorQuery | None,
    i: int,
    mean: Tensor,
    effective: Tensor | None,
    error: Tensor | None,
) -> Figure:
    """One image's posterior.

    Args:
        query: what was asked, if that is known.
        i: number of the image in the query's batch.
        mean: ``[C, H, W]``.
        effective: effective patches, ``[H, W]``; None if they were not asked for.
        error: to be expected of the mean, ``[H, W]``; None for an exact posterior.
    """
    count = sum(each is not None for each in (query, mean, effective, error))
    with drawing(_SIDE * count, _tall(mean, _SIDE)) as figure:
        panels = list(figure.subplots(1, count, squeeze=False).flat)
        _draw_posterior(panels, query, i, mean, effective, error)
    return figure


def explained_figure(
    query: PosteriorQuery,
    mean: Tensor,
    effective: Tensor | None,
    error: Tensor | None,
    db: PatchDatabase,
    pixel: tuple[int, int],
    patches: Sequence[Patch],
) -> Figure:
    """The posterior of one image, and below it the heaviest training patches of a pixel.

    Args:
        query: what was asked, about one image.
        mean: see :func:`posterior_figure`; so are effective and error.
        effective: see there.
        error: see there.
        db: the training images.
        pixel: row and column.
        patches: heaviest first, at least one.
    """
    count = sum(each is not None for each in (query, mean, effective, error))
    cells = 1 + len(patches)
    columns = min(_COLUMNS, cells)
    rows = -(-cells // columns)
    is_local = query.kind.is_local
    below = _PATCH_SIDE + _TITLE if is_local else _tall(mean, _PATCH_SIDE)
    heights = [_tall(mean, _SIDE), below * rows + _TITLE]
    with drawing(max(_SIDE * count, _PATCH_SIDE * columns), sum(heights)) as figure:
        above, under = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
        panels = list(above.subplots(1, count, squeeze=False).flat)
        _draw_posterior(panels, query, 0, mean, effective, error)
        for panel in panels:
            _mark(panel, pixel, query.patch_size if is_local else 1)
        under.suptitle(
            f"pixel {pixel}: its patch, and the heaviest of the training images"
            if is_local
            else f"pixel {pixel}: the noisy image, and the heaviest training images",
            fontsize=11,
        )
        cut = list(under.subplots(rows, columns, squeeze=False).flat)
        for panel in cut:
            panel.set_axis_off()
        noisy = _greys(query.x[0])
        draw_image(cut[0], _cut(noisy, *pixel, query) if is_local else noisy, "noisy", fontsize=9)
        for panel, patch in zip(cut[1:], patches, strict=False):
            image = db.images[patch.image]
            picture = _cut(image, patch.y, patch.x, query) if is_local else image
            draw_image(panel, picture, _title(db, patch), fontsize=9)
            if not is_local:
                _mark(panel, (patch.y, patch.x), 1)
    return figure


def _tall(image: Tensor, width: float) -> float:
    """Height of a picture of that width with its title, in inches."""
    return width * image.shape[-2] / image.shape[-1] + _TITLE


def _draw_posterior(
    panels: Sequence[Axes],
    query: PosteriorQuery | None,
    i: int,
    mean: Tensor,
    effective: Tensor | None,
    error: Tensor | None,
) -> None:
    from matplotlib.colors import LogNorm

    following = iter(panels)
    if query is not None:
        noise = f"alpha {float(query.alpha[i]):.3g}, sigma {float(query.sigma[i]):.3g}"
        draw_image(next(following), _greys(query.x[i]), f"noisy image\n{noise}")
    name = "" if query is None else f"\n{query.machine}"
    shown = encode(mean.detach().to("cpu", torch.float32).nan_to_num())
    draw_image(next(following), shown, f"posterior mean{name}")
    if effective is not None:
        values = effective.detach().cpu().double().clamp(min=1.0)
        title = f"effective patches\nentropy {float(values.log().mean()):.3g} nats on average"
        norm = LogNorm(1.0, max(2.0, float(values.max())))
        _draw_map(next(following), values.numpy(), title, norm=norm, cmap="magma")
    if error is not None:
        of_mean = error.detach().cpu().double()
        title = f"expected error of the mean\n{float(of_mean.mean()):.2g} on average"
        _draw_map(next(following), of_mean.numpy(), title, vmin=0.0, cmap="viridis")


def _draw_map(axes: Axes, values: npt.NDArray[Any], title: str, **arguments: Any) -> None:
    drawn = axes.imshow(values, interpolation="nearest", **arguments)
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])
    axes.figure.colorbar(drawn, ax=axes, shrink=0.8)


def _greys(x: Tensor) -> npt.NDArray[np.uint8]:
    """A noisy image as pixels: its values scaled, at most, to black and white."""
    values = x.detach().to("cpu", torch.float64).numpy()
    largest = max(1.0, float(np.quantile(np.abs(values), _SPAN)))
    return encode(values / largest)


def _mark(axes: Axes, pixel: tuple[int, int], side: int) -> None:
    """A square around a pixel and its patch."""
    from matplotlib.patches import Rectangle

    y, x = pixel
    radius = side / 2
    axes.add_patch(Rectangle((x - radius, y - radius), side, side, fill=False, color=_MARK))


def _cut(
    image: npt.NDArray[np.uint8], y: int, x: int, query: PosteriorQuery
) -> npt.NDArray[np.uint8]:
    """A patch ``[C, P, P]``; zeros beyond the border are the grey of a 0."""
    radius = query.patch_size // 2
    margins = ((0, 0), (radius, radius), (radius, radius))
    if query.boundary == "circular":
        padded = np.pad(image, margins, mode="wrap")
    else:
        padded = np.pad(image, margins, constant_values=encode(np.zeros(1))[0])
    return padded[:, y : y + query.patch_size, x : x + query.patch_size]


def _title(db: PatchDatabase, patch: Patch) -> str:
    name = ""
    if db.labels is not None and db.class_names is not None:
        name = f"\n{printable(db.class_names[int(db.labels[patch.image])])}"
    return f"{patch.weight:.1%}\nimage {patch.image}{name}"
