"""The page of a walkthrough: one HTML file in which a sample is explored pixel by pixel."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from els.explain.explanation import Walkthrough
from els.index import PatchDatabase, encode
from els.storage.figures import require_matplotlib
from els.storage.files import atomic_file
from els.storage.png import Pixels, colours, require_suffix

MOST_EMBEDDED_PIXELS = 16_000_000
"""Most pixels of training images in a page: 20,408 images of 28 x 28, 15,625 of 32 x 32."""
# Bytes of training images that are kept without loss; more are compressed as JPEG.
_MOST_LOSSLESS = 4_000_000
# Of JPEG, without subsampled colours: pixels of photographs are off by some 1.3 of 255.
_JPEG_QUALITY = 90
# Radius of the surroundings of a pixel at the machines that compare whole images.
_WHOLE_IMAGE_REACH = 1

_SUFFIXES = (".html", ".htm")
_PARTS = Path(__file__).with_name("web")
_SHADES = "magma"


def require_page(path: str | Path) -> None:
    """Refuse a path whose suffix is not that of a page.

    Raises:
        ValueError: naming the suffixes that are.
    """
    require_suffix(path, _SUFFIXES)


def write_page(walkthrough: Walkthrough, db: PatchDatabase, path: str | Path) -> None:
    """Write the page, whole or not at all; it needs no other file and no network.

    Every training image that the page names is inside. Where those of all patches are more than
    ``MOST_EMBEDDED_PIXELS``, those of every pixel's heaviest patch go first, then those that weigh
    most; patches of the others are left out, and the page says so.

    Args:
        walkthrough: what to show.
        db: the training images that it refers to.
        path: of the page; its folder is made.

    Raises:
        ValueError: for a suffix that is not ``.html`` or ``.htm``.
        OSError: if it cannot be written.
    """
    path = Path(path)
    require_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(page(walkthrough, db).encode())


def page(walkthrough: Walkthrough, db: PatchDatabase) -> str:
    """The HTML of :func:`write_page`."""
    data = json.dumps(_data(walkthrough, db), separators=(",", ":"), allow_nan=False)
    parts = {
        "TITLE": html.escape(f"Where sample {walkthrough.index} came from"),
        "STYLE": (_PARTS / "explanation.css").read_text(encoding="utf-8"),
        "SCRIPT": (_PARTS / "explanation.js").read_text(encoding="utf-8"),
        # Only "<" could end the script element, whatever the class names are.
        "DATA": data.replace("<", "\\u003c"),
    }
    template = (_PARTS / "explanation.html").read_text(encoding="utf-8")
    return re.sub(r"@(TITLE|STYLE|SCRIPT|DATA)@", lambda match: parts[match[1]], template)


@dataclass(frozen=True)
class _Sources:
    """The training images that a page shows, and where its patches are in them.

    Attributes:
        numbers: in the database, int64 ``[M]``.
        place: of each entry's image among them, int32 ``[S, H, W, k]``; -1 for none.
        pixel: ``y * W + x`` of each entry's centre, int32 ``[S, H, W, k]``.
        left_out: how many more images the walkthrough's patches come from.
        weight: share of the weight of all patches that those of the images have, 0 to 1.
    """

    numbers: npt.NDArray[np.int64]
    place: npt.NDArray[np.int32]
    pixel: npt.NDArray[np.int32]
    left_out: int
    weight: float


def _sources(walkthrough: Walkthrough, db: PatchDatabase) -> _Sources:
    _, height, width = db.shape
    there = walkthrough.addresses >= 0
    addresses = np.where(there, walkthrough.addresses, 0)
    image, y, x = db.locate(addresses)
    used, inverse = np.unique(image[there], return_inverse=True)
    weights = np.bincount(inverse, walkthrough.weights[there].astype(np.float64))
    is_heaviest = np.isin(used, image[..., 0])
    order = np.lexsort((-weights, ~is_heaviest))
    shown = min(len(used), max(1, MOST_EMBEDDED_PIXELS // (height * width)))
    rank = np.full(len(used), -1, dtype=np.int32)
    rank[order[:shown]] = np.arange(shown)
    place = np.full(addresses.shape, -1, dtype=np.int32)
    place[there] = rank[inverse]
    return _Sources(
        used[order[:shown]],
        place,
        (y * width + x).astype(np.int32),
        len(used) - shown,
        float(weights[order[:shown]].sum() / weights.sum()),
    )


def _telling_pixel(walkthrough: Walkthrough, row: int) -> tuple[int, int]:
    """The pixel around which the denoised image of a step varies most, ``(y, x)``.

    Around a pixel is its patch. Squared deviations are summed over the part of it that lies in the
    image, so that pixels near the border, whose patches have less of it, come last.
    """
    size = int(walkthrough.patch_sizes[row])
    reach = size // 2 if size else _WHOLE_IMAGE_REACH
    values = walkthrough.predicted[row].astype(np.float64)
    _, height, width = values.shape
    # Sums over windows, by cumulative sums: of one, of the values and of their squares.
    terms = np.stack([np.ones_like(values), values, values**2])
    sums = np.pad(terms, ((0, 0), (0, 0), (1, 0), (1, 0))).cumsum(2).cumsum(3)
    (top, bottom), (left, right) = (
        (np.maximum(at - reach, 0), np.minimum(at + reach + 1, side))
        for at, side in ((np.arange(height), height), (np.arange(width), width))
    )
    rows = sums[:, :, bottom] - sums[:, :, top]
    count, total, squares = rows[..., right] - rows[..., left]
    deviations = (squares - total**2 / count).sum(0)
    y, x = np.unravel_index(int(deviations.argmax()), deviations.shape)
    return int(y), int(x)


def _data(walkthrough: Walkthrough, db: PatchDatabase) -> dict[str, Any]:
    """The data that the script reads; arrays are little-endian, in base64."""
    require_matplotlib()
    from matplotlib import colormaps

    sources = _sources(walkthrough, db)
    sprite, columns = _sprite(db, sources.numbers)
    opens_at = int(np.flatnonzero(walkthrough.steps == walkthrough.step)[0])
    heaviest = zip(*db.locate(walkthrough.addresses[..., 0]), strict=True)
    mosaic = [colours(np.moveaxis(db.images[image, :, y, x], -1, 0)) for image, y, x in heaviest]
    most = max(2.0, float(walkthrough.effective_patches.max()))
    shades = colormaps[_SHADES]
    shared = shades(np.log(walkthrough.effective_patches.clip(1.0)) / np.log(most), bytes=True)
    return {
        "sample": walkthrough.index,
        "kind": walkthrough.kind,
        "boundary": walkthrough.boundary,
        "height": walkthrough.values.shape[1],
        "width": walkthrough.values.shape[2],
        "imageHeight": db.shape[1],
        "imageWidth": db.shape[2],
        "top": walkthrough.weights.shape[-1],
        "planSteps": walkthrough.plan_steps,
        "tolerance": walkthrough.tolerance,
        "opensAt": opens_at,
        "pixelAtFirst": _telling_pixel(walkthrough, opens_at),
        "steps": walkthrough.steps.tolist(),
        "sigma": walkthrough.sigma.tolist(),
        "sizes": walkthrough.patch_sizes.tolist(),
        "effective": _array(walkthrough.effective_patches, "<f4"),
        "weights": _array(walkthrough.weights, "<f4"),
        "place": _array(sources.place, "<i4"),
        "pixel": _array(sources.pixel, "<i4"),
        "images": len(db),
        "numbers": sources.numbers.tolist(),
        "labels": None if db.labels is None else db.labels[sources.numbers].tolist(),
        "classNames": None if db.class_names is None else list(db.class_names),
        "leftOut": sources.left_out,
        "weightShown": sources.weight,
        "sprite": sprite,
        "spriteColumns": columns,
        "noisy": _strip([colours(encode(values)) for values in walkthrough.noisy]),
        "predicted": _strip([colours(encode(values)) for values in walkthrough.predicted]),
        "mosaic": _strip(mosaic),
        "shared": _strip(list(shared[..., :3])),
        "mostShared": most,
        "shades": [
            "#" + bytes(shade[:3]).hex() for shade in shades(np.linspace(0, 1, 9), bytes=True)
        ],
    }


def _sprite(db: PatchDatabase, numbers: npt.NDArray[np.int64]) -> tuple[str, int]:
    """Images as one picture, row by row; how many are in a row."""
    columns = int(np.ceil(np.sqrt(len(numbers))))
    _, height, width = db.shape
    canvas = np.zeros((-(-len(numbers) // columns) * height, columns * width, 3), np.uint8)
    for place, number in enumerate(numbers):
        top, left = place // columns * height, place % columns * width
        canvas[top : top + height, left : left + width] = colours(db.images[number])
    return _picture(canvas, most_lossless=_MOST_LOSSLESS), columns


def _strip(tiles: list[Pixels]) -> str:
    """Pictures of the steps, one below the other."""
    return _picture(np.concatenate(tiles))


def _picture(pixels: Pixels, most_lossless: int | None = None) -> str:
    """A picture as a data URI, in grey where it is grey.

    Args:
        pixels: ``[H, W, 3]``.
        most_lossless: bytes of a PNG in place of which a smaller JPEG may stand; None for no limit.
    """
    is_grey = bool((pixels == pixels[..., :1]).all())
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if is_grey else pixels))
    kind, content = "png", _encoded(picture, format="PNG", optimize=True)
    if most_lossless is not None and len(content) > most_lossless:
        lossy = _encoded(picture, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
        kind, content = min(("jpeg", lossy), (kind, content), key=lambda each: len(each[1]))
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _encoded(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()


def _array(values: npt.NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()
