"""Where training images come from: arrays, pictures, archives and data sets, all as one stream.

`open_source` reads enough to know the count, the shape and the labels; `ImageSource.chunks` then
streams the pixels. No pickle is ever loaded.
"""

import math
import re
import zipfile
from dataclasses import replace
from pathlib import Path

from els.index.sources.decoding import MAX_PIXELS
from els.index.sources.foreign import (
    SourceError,
    explained,
)
from els.index.sources.hub import open_hugging_face
from els.index.sources.pictures import open_pictures
from els.index.sources.raw import open_npz, open_raw
from els.index.sources.selection import Selection
from els.index.sources.source import (
    ImageSource,
    Preparation,
    ResizedSource,
    SelectedSource,
    open_stream,
)
from els.index.sources.standard import STANDARD, files_of, is_cifar, not_here, open_cifar

_EMBEDDED = {"fashion-mnist": "fashion-mnist-4096.npz"}
_COLOURS = {"white": "#ffffff", "black": "#000000"}
# In place of a colour: transparency becomes a channel.
_KEEP = "keep"


def open_source(
    spec: str | Path,
    *,
    split: str | None = None,
    labels: str | Path | None = None,
    resize: int | tuple[int, int] | None = None,
    crop: bool = False,
    background: str = "white",
    limit: int | None = None,
    per_class: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
) -> ImageSource:
    """Opens a set of training images of any supported kind, recognised by its content.

    What `spec` may be:

    - a folder, or a zip of one: pictures; subfolders are classes, in sorted order, unless there are
      labels beside the pictures; leading folders that all share are skipped
    - ``PATH:PART``: one part (``train``) of a folder, a zip or an ``.npz``
    - an ``.npz``: uint8 under `images`, `x` or `data`; integers under `labels` or `y`, if any;
      names under `class_names`; of parts `x_train`, `y_train`, or `train_images`, `train_labels`
    - an ``.npy``: uint8
    - an idx file, ``.gz`` or not: the images of an idx pair; labels by the standard name beside
    - ``hf:NAME`` / ``hf:NAME:PART``: a data set of the Hugging Face library `datasets` (part
      ``train`` unless named); labels in its ClassLabel column, or in a column of integers or text
      that is named as below
    - ``embedded:fashion-mnist``: 4,096 images that come with this package
    - ``mnist``, ``fashion-mnist``, ``cifar10``, ``celeba``, ``afhq``, each also ``:PART``: files of
      torchvision or Keras in data/ or the folders of ELS_DATA, else the Hugging Face hub; part
      ``train`` unless named

    Arrays are [N, H, W], [N, C, H, W] or [N, H, W, C], C in 1..4.

    Pictures are PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF, JPEG 2000, QOI or TGA, of at most
    8,192 x 8,192 pixels; of several frames the first. They are read as a viewer shows them:
    turned as their EXIF says, and grey values of 16 bits scaled to 8. They become one mode: grey
    where all are, otherwise RGB; transparency shows a background or becomes a fourth channel.

    Labels beside pictures are read from ``dataset.json``, as the dataset_tool of StyleGAN and EDM
    writes it (class numbers, or null for none; vectors are not supported), or from a
    ``metadata.csv`` or ``metadata.jsonl`` of Hugging Face image folders: the picture in
    `file_name`, relative to that file, its class in the first of the columns `label`, `labels`,
    `fine_label`, `class`, `category`, `target` that is there. Classes are integers, or names, which
    are numbered in sorted order.

    Args:
        spec: what to open, as above.
        split: the part, in place of ``:PART``.
        labels: a file of labels (idx or ``.npy``) for an idx or ``.npy`` file of images.
        resize: scale every image to this height and width (an int: square), by area means where
            both sides shrink by whole factors, otherwise by Lanczos.
        crop: with `resize`, cut images to its proportions about their centres first; otherwise
            they are stretched.
        background: what shows through transparency: ``white``, ``black`` or ``#rrggbb``; or
            ``keep``, which keeps transparency as a fourth channel of all pictures if any has it.
        limit: take the first so many images, or draw as many by `seed`.
        per_class: take the first so many images of each class, or draw as many by `seed`.
        seed: draws images at random, with `limit` in proportion to the classes.
        skip_bad: leave out pictures that cannot be read, and list them in the source's `notes`;
            every picture is read twice.

    Returns:
        The source; its pixels are not read yet. `notes` says what was done to them.

    Raises:
        SourceError: there is no such source, or it cannot be used; says why and what to do.
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """
    size = _check_resize(resize)
    if crop and size is None:
        raise ValueError("crop=True cuts to the proportions of a size; add resize=")
    preparation = Preparation(size, crop, _check_background(background), skip_bad)
    selection = Selection(limit, per_class, seed)
    kind, _, name = str(spec).partition(":")
    if kind in ("hf", "embedded", *STANDARD) and labels is not None and not Path(spec).exists():
        raise SourceError(f"{spec} has its own labels; leave out labels={str(labels)!r}")
    if kind == "hf":
        name, _, named = name.partition(":")
        part = _one_part(str(spec), named, split)
        return open_hugging_face(name, part, preparation, selection)
    if kind == "embedded":
        if name not in _EMBEDDED:
            raise SourceError(f"no embedded data set {name!r}; there is: {', '.join(_EMBEDDED)}")
        embedded = Path(__file__).parents[1] / "data" / _EMBEDDED[name]
        return _prepared(str(spec), open_npz(embedded, split), preparation, selection)
    if kind in STANDARD and not Path(spec).exists():
        wanted = _one_part(str(spec), name, split) or "train"
        if (here := files_of(kind, wanted)) is None:
            try:
                return open_hugging_face(STANDARD[kind].hub, wanted, preparation, selection)
            except SourceError as error:
                raise not_here(kind, wanted, error) from error
        spec, split = here, None

    path, inner = _split_spec(str(spec))
    part = _one_part(str(spec), inner, split)
    with explained(path, "check the path and its permissions"):
        kind = _file_kind(path)
    if part is not None and kind not in ("folder", "zip", "npz", "cifar"):
        raise SourceError(f"{path} has no parts to choose from; leave out ':{part}' (split={part})")
    if labels is not None and kind not in ("npy", "idx"):
        raise SourceError(
            f"{path} has its own labels; labels={str(labels)!r} is for idx and .npy files"
        )
    match kind:
        case "folder" | "zip":
            return open_pictures(path, part, preparation, selection)
        case "npz":
            source = open_npz(path, part)
        case "cifar":
            source = open_cifar(path, part)
        case _:
            source = open_raw(path, kind, labels)
    return _prepared(str(path), source, preparation, selection)


# Files


def _split_spec(spec: str) -> tuple[Path, str | None]:
    with explained(spec, "check the path and its permissions"):
        if Path(spec).exists():
            return Path(spec), None
        path, colon, part = spec.rpartition(":")
        if colon and Path(path).exists():
            return Path(path), part
    raise SourceError(f"there is no file or folder {spec}; check the path")


def _one_part(spec: str, part: str | None, split: str | None) -> str | None:
    """The part that a source and `split` say together."""
    if part and split and part != split:
        raise ValueError(f"{spec} names the part {part}, and split={split} another; leave out one")
    return split or part or None


def _file_kind(path: Path) -> str:
    if path.is_dir():
        return "cifar" if is_cifar(path) else "folder"
    with open_stream(path) as stream:
        magic = stream.read(6)
    if magic == b"\x93NUMPY":
        return "npy"
    if magic[:2] == b"\0\0":
        return "idx"
    if magic[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        arrays = bool(names) and all(name.endswith(".npy") for name in names)
        return "npz" if arrays or path.suffix == ".npz" else "zip"
    raise SourceError(
        f"{path} is none of .npz, .npy, zip and idx (it starts with {magic!r}); give one of those, "
        "a folder of pictures, hf:NAME or embedded:fashion-mnist"
    )


# Sizes


def _check_resize(resize: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if resize is None:
        return None
    size = (resize, resize) if isinstance(resize, int) else resize
    if not isinstance(size, tuple) or [type(side) for side in size] != [int, int]:
        raise TypeError(f"resize must be an int or (height, width), got {resize!r}")
    if min(size) < 1 or math.prod(size) > MAX_PIXELS:
        raise ValueError(
            f"resize must be at least 1 and give at most {MAX_PIXELS:,} pixels, got {resize!r}"
        )
    return size


def _check_background(background: str) -> tuple[int, int, int] | None:
    if background == _KEEP:
        return None
    text = _COLOURS.get(background, background)
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise ValueError(
            f"background={background!r} must be white, black or a colour such as #ff8000; or "
            f"{_KEEP}, for transparency as a fourth channel"
        )
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def _prepared(
    where: str, source: ImageSource, preparation: Preparation, selection: Selection
) -> ImageSource:
    """Images of an array: some of them, scaled."""
    numbers, notes = selection.of(where, source.count, source.labels)
    if numbers is not None:
        source = SelectedSource(
            count=len(numbers),
            shape=source.shape,
            labels=None if source.labels is None else source.labels[numbers],
            class_names=source.class_names,
            notes=source.notes,
            source=source,
            numbers=numbers,
        )
    size = preparation.resize
    if size is not None and source.shape[1:] != size:
        if preparation.stretches(source.shape[1:]):
            height, width = size
            notes += (
                f"images of {source.shape[1]} x {source.shape[2]} are stretched to "
                f"{height} x {width}; crop=True keeps their proportions",
            )
        source = ResizedSource(
            count=source.count,
            shape=(source.shape[0], *size),
            labels=source.labels,
            class_names=source.class_names,
            notes=source.notes,
            source=source,
            preparation=preparation,
        )
    return replace(source, notes=(*source.notes, *notes))
