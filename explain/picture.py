"""The picture of an explanation: the mosaic of training patches that a sample is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from els.explain.explanation import Contributor, Explanation
from els.index import PatchDatabase, encode
from els.runs.novelty import nearest_images
from els.storage.figures import neutral_style, printable, write_figure
from els.storage.files import atomic_file
from els.storage.labelled import PICTURE_FORMATS
from els.storage.png import colours, require_suffix

# Imported inside neutral_style: whether matplotlib can be imported depends on MPLBACKEND.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MOST_STEPS = 20
MOST_CONTRIBUTORS = 8

_Rgb = npt.NDArray[np.float64]

# Okabe and Ito's palette, which colour-blind people can distinguish.
_PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#F0E442",
    "#7B4FA3",
)
_MARK = "#FF2D6F"
_WIDTH = 16.0
_FEWEST_COLUMNS = 10
_GOLDEN = (5**0.5 - 1) / 2


def require_picture(path: str | Path) -> None:
    """Refuse a path whose suffix is not that of a picture.

    Raises:
        ValueError: naming the suffixes that are.
    """
    require_suffix(path, PICTURE_FORMATS)


def write_explanation(explanation: Explanation, db: PatchDatabase, path: str | Path) -> Path:
    """Write the picture and, beside it, its data as ``.npz``.

    Args:
        explanation: what to draw.
        db: the training images that it refers to.
        path: of the picture, of any of ``els.storage.labelled.PICTURE_FORMATS``; its folder is
            made.

    Returns:
        The path of the data: every field of the explanation under its name, and the numbers and
        shares of the contributing images.

    Raises:
        ValueError: for a suffix that is no picture format.
        OSError: if it cannot be written.
    """
    path = Path(path)
    require_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_suffix(".npz")
    contributors = explanation.contributors()
    arrays: dict[str, Any] = {
        field.name: getattr(explanation, field.name) for field in fields(Explanation)
    }
    with atomic_file(data) as stream:
        np.savez_compressed(
            stream,
            **arrays,
            contributor_images=[contributor.image for contributor in contributors],
            contributor_shares=[contributor.share for contributor in contributors],
        )
    write_figure(lambda: draw(explanation, db), path)
    return data


@neutral_style()
def draw(explanation: Explanation, db: PatchDatabase) -> Figure:
    """Draw the sample, its mosaic, the steps, and the training images that contribute most."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    contributors = explanation.contributors()[:MOST_CONTRIBUTORS]
    palette = {c.image: to_rgb(_PALETTE[i]) for i, c in enumerate(contributors)}
    rows = _shown_steps(len(explanation.sigma))
    columns = max(_FEWEST_COLUMNS, len(rows))
    aspect = explanation.values.shape[1] / explanation.values.shape[2]
    # Inches: what the text of each part takes, and its rows of panels, as wide as they can be.
    heights = (
        1.7 + aspect * _WIDTH / 5,
        1.2 + 2 * aspect * _WIDTH / (columns + 1),
        1.4 + 2 * aspect * _WIDTH / MOST_CONTRIBUTORS,
    )
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    mosaic, steps, images = figure.subfigures(3, 1, squeeze=False, height_ratios=heights).flat
    _draw_mosaic(mosaic, explanation, db, palette)
    _draw_steps(steps, explanation, palette, rows, columns)
    _draw_contributors(images, explanation, db, contributors, palette)
    return figure


def _title(explanation: Explanation) -> str:
    row, steps = explanation.row, len(explanation.sigma)
    size = explanation.patch_sizes[row]
    compared = f"{size} x {size} patches" if size else "whole images"
    return (
        f"Sample {explanation.index}, {explanation.kind} machine: step {explanation.step} of "
        f"{steps} (noise sigma = {explanation.sigma[row]:.3f}, {compared})"
    )


def _shown_steps(steps: int) -> list[int]:
    """At most ``MOST_STEPS`` of the steps, evenly spread, the first and the last among them."""
    return sorted(set(np.linspace(0, steps - 1, min(steps, MOST_STEPS)).round().astype(int)))


def _draw_mosaic(
    figure: SubFigure,
    explanation: Explanation,
    db: PatchDatabase,
    palette: dict[int, tuple[float, float, float]],
) -> None:
    from matplotlib.collections import LineCollection

    row = explanation.row
    heaviest, offsets = explanation.heaviest[row], explanation.offsets()[row]
    pixels = db.images[heaviest[..., 0], :, heaviest[..., 1], heaviest[..., 2]]
    figure.suptitle(_title(explanation), fontsize=15)
    has_shape = explanation.values.shape == db.shape
    sample, collage, sources, moves, *others = figure.subplots(1, 5 if has_shape else 4)
    _show(sample, colours(encode(explanation.values)), "the sample")
    for panel in others:
        (found,) = nearest_images(db, explanation.values[None])
        memorised = ", memorised" if found.is_memorised else ""
        _show(
            panel,
            colours(db.images[found.image]),
            f"nearest image, {found.image}: {found.distance:.2f} off,\n"
            f"{found.ratio:.2f} of the second{memorised}",
        )
    _show(collage, colours(np.moveaxis(pixels, -1, 0)), "heaviest patch's centre, tile by tile")
    collage.add_collection(
        LineCollection(_seams(heaviest[..., 0], offsets), colors=_MARK, linewidths=0.7, alpha=0.7)
    )
    _show(sources, _source_colours(heaviest[..., 0], palette), "which training image it is from")
    _show(moves, _offset_colours(offsets), "how far the patch was moved")
    _draw_wheel(moves, offsets)


def _draw_steps(
    figure: SubFigure,
    explanation: Explanation,
    palette: dict[int, tuple[float, float, float]],
    rows: Sequence[int],
    columns: int,
) -> None:
    """Small multiples over the steps: the source images, and how many patches share a pixel."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    norm = LogNorm(1.0, max(2.0, float(explanation.effective_patches.max())))
    panels = figure.subplots(2, columns, squeeze=False)
    for panel in panels[:, len(rows) :].flat:
        panel.set_axis_off()
    for column, row in enumerate(rows):
        size = explanation.patch_sizes[row]
        title = f"{row + 1}\n{explanation.sigma[row]:.2f}" + (f"\nP {size}" if size else "")
        image_numbers = explanation.heaviest[row, :, :, 0]
        _show(panels[0, column], _source_colours(image_numbers, palette), title, fontsize=9)
        _show(panels[1, column], None, "", fontsize=9)
        panels[1, column].imshow(
            explanation.effective_patches[row].clip(1.0), norm=norm, cmap="magma"
        )
        if row == explanation.row:
            for panel in panels[:, column]:
                panel.spines[:].set(color=_MARK, linewidth=2.5)
    figure.suptitle(
        "from noise to clean (number, noise sigma and patch size above each step): "
        "which training image, and how many patches effectively share the pixel",
        fontsize=12,
    )
    bar = figure.colorbar(ScalarMappable(norm, "magma"), ax=panels, aspect=12, pad=0.01)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.set_label("effective patches", fontsize=10)


def _draw_contributors(
    figure: SubFigure,
    explanation: Explanation,
    db: PatchDatabase,
    contributors: Sequence[Contributor],
    palette: dict[int, tuple[float, float, float]],
) -> None:
    """Training images with their contributing pixels lit; below, the pixels of the sample."""
    from matplotlib.collections import LineCollection

    heaviest = explanation.heaviest[explanation.row]
    sample = colours(encode(explanation.values)) / 255.0
    panels = figure.subplots(2, MOST_CONTRIBUTORS, squeeze=False)
    for panel in panels[:, len(contributors) :].flat:
        panel.set_axis_off()
    for (above, below), contributor in zip(panels.T, contributors, strict=False):
        image, colour = contributor.image, palette[contributor.image]
        given = heaviest[..., 0] == image
        taken = np.zeros(db.shape[1:], dtype=np.bool_)
        taken[heaviest[given, 1], heaviest[given, 2]] = True
        name = _class_name(db, image)
        title = f"image {image}{name}\ngave {contributor.share:.1%}"
        _show(above, _lit(colours(db.images[image]) / 255.0, taken), title, fontsize=11)
        _show(below, _lit(sample, given), "", fontsize=11)
        for panel, mask in ((above, taken), (below, given)):
            panel.add_collection(LineCollection(_outline(mask), colors=[colour], linewidths=1.8))
            panel.spines[:].set(color=colour, linewidth=3)
    panels[0, 0].set_ylabel("training image\nand the pixels it gave", fontsize=11)
    panels[1, 0].set_ylabel("where they are\nin the sample", fontsize=11)
    figure.suptitle("the training images that gave most", fontsize=12)


def _class_name(db: PatchDatabase, image: int) -> str:
    if db.labels is None:
        return ""
    label = int(db.labels[image])
    if not db.class_names:
        return f", class {label}"
    return "\n" + printable(db.class_names[label])


def _show(axes: Axes, picture: npt.NDArray[Any] | None, title: str, *, fontsize: int = 12) -> None:
    if picture is not None:
        axes.imshow(picture, interpolation="nearest")
    axes.set_title(title, fontsize=fontsize)
    axes.set(xticks=[], yticks=[])


def _lit(picture: _Rgb, mask: npt.NDArray[np.bool_]) -> _Rgb:
    """The picture, grey where the mask is off, so that black and white differ from it."""
    return np.where(mask[..., None], picture, 0.45 + 0.3 * picture)


def _source_colours(
    images: npt.NDArray[np.int64], palette: dict[int, tuple[float, float, float]]
) -> _Rgb:
    """A colour per image number: the palette's where it has one, else a pastel of its own."""
    from matplotlib.colors import hsv_to_rgb

    hue = images * _GOLDEN % 1.0
    # A second irrational step, so that neighbours in hue still differ in lightness.
    value = 0.80 + 0.17 * (images * 2**0.5 % 1.0)
    picture = hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.22), value], axis=-1))
    for image, colour in palette.items():
        picture[images == image] = colour
    return np.asarray(picture)


def _offset_colours(offsets: npt.NDArray[Any]) -> _Rgb:
    """Displacements ``[..., 2]`` as RGB: direction as hue, length as saturation, 0 as white."""
    from matplotlib.colors import hsv_to_rgb

    dy, dx = offsets[..., 0], offsets[..., 1]
    length = np.hypot(dy, dx)
    strength = np.sqrt(length / max(1.0, length.max()))
    hue = np.arctan2(dy, dx) / (2 * np.pi) % 1.0
    return np.asarray(hsv_to_rgb(np.stack([hue, strength, 1 - 0.12 * strength], axis=-1)))


def _draw_wheel(axes: Axes, offsets: npt.NDArray[np.int64]) -> None:
    """The legend of the offset colours: a disc whose rim is the longest move."""
    longest = float(np.hypot(offsets[..., 0], offsets[..., 1]).max())
    if longest == 0:
        axes.set_xlabel("every patch is from the same place", fontsize=10)
        return
    disc = axes.inset_axes((0.80, -0.30, 0.26, 0.26))
    grid = np.moveaxis(np.mgrid[-1:1:101j, -1:1:101j], 0, -1)
    outside = np.hypot(grid[..., 0], grid[..., 1]) > 1
    picture = _offset_colours(np.where(outside[..., None], 0, grid) * longest)
    disc.imshow(np.dstack([picture, ~outside]), extent=(-1, 1, 1, -1))
    disc.set_axis_off()
    axes.set_xlabel(f"from the pixel to the patch's place;\nrim: {longest:.0f} pixels", fontsize=10)


def _seams(
    images: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Seams between neighbouring pixels of different images or different displacements."""
    key = np.concatenate([images[..., None], offsets], axis=-1)
    return _edges((key[1:] != key[:-1]).any(-1), (key[:, 1:] != key[:, :-1]).any(-1))


def _outline(mask: npt.NDArray[np.bool_]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The border of a mask, the image's own border included."""
    padded = np.pad(mask, 1)
    edges = _edges(padded[1:] != padded[:-1], padded[:, 1:] != padded[:, :-1])
    return [((x0 - 1, y0 - 1), (x1 - 1, y1 - 1)) for (x0, y0), (x1, y1) in edges]


def _edges(
    below: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Line segments under the pixels of ``below`` and to the right of those of ``right``."""
    horizontal = [((x - 0.5, y + 0.5), (x + 0.5, y + 0.5)) for y, x in np.argwhere(below)]
    vertical = [((x + 0.5, y - 0.5), (x + 0.5, y + 0.5)) for y, x in np.argwhere(right)]
    return horizontal + vertical
