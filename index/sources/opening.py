"""Where training images come from: arrays, pictures, archives and data sets, all as one stream.

`open_source` reads enough to know the count, the shape and the labels; `ImageSource.chunks` then
streams the pixels. No pickle is ever loaded.
"""

import math
import zipfile
from pathlib import Path

from els.index.sources.decoding import MAX_PIXELS
from els.index.sources.foreign import (
    SourceError,
    explained,
)
from els.index.sources.hub import open_hugging_face
from els.index.sources.pictures import open_pictures
from els.index.sources.raw import open_npz, open_raw
from els.index.sources.source import ImageSource, ResizedSource, open_stream

_EMBEDDED = {"fashion-mnist": "fashion-mnist-4096.npz"}


def open_source(
    spec: str | Path,
    *,
    labels: str | Path | None = None,
    resize: int | tuple[int, int] | None = None,
) -> ImageSource:
    """Opens a set of training images of any supported kind, recognised by its content.

    ==============================  ===========================================================
    spec                            what it is
    ==============================  ===========================================================
    a folder, or a zip of one       pictures; subfolders are classes, in sorted order, unless
                                    there are labels beside the pictures; leading folders that
                                    all share are skipped
    ``PATH:PART``                   one part (``train``) of a folder or zip that has several
    an ``.npz``                     uint8 under `images`, `x_train`, `x` or `data`; integers under
                                    `labels`, `y_train` or `y`, if any; names under `class_names`
    an ``.npy``                     uint8
    an idx file, ``.gz`` or not     the images of an idx pair; labels by the standard name beside
    ``hf:NAME`` / ``hf:NAME:PART``  a data set of the Hugging Face library `datasets` (part
                                    ``train`` unless named); labels in its ClassLabel column, or
                                    in a column of integers or text that is named as below
    ``embedded:fashion-mnist``      4,096 images that come with this package
    ==============================  ===========================================================

    Arrays are [N, H, W], [N, C, H, W] or [N, H, W, C], C in 1..4.

    Pictures are PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF, JPEG 2000, QOI or TGA, of at most
    8,192 x 8,192 pixels; of several frames the first. They are read as a viewer shows them:
    turned as their EXIF says, and grey values of 16 bits scaled to 8. They become one mode: grey,
    RGB or RGBA where all are alike, otherwise RGB, in which transparency shows white.

    Labels beside pictures are read from ``dataset.json``, as the dataset_tool of StyleGAN and EDM
    writes it (class numbers, or null for none; vectors are not supported), or from a
    ``metadata.csv`` or ``metadata.jsonl`` of Hugging Face image folders: the picture in
    `file_name`, relative to that file, its class in the first of the columns `label`, `labels`,
    `fine_label`, `class`, `category`, `target` that is there. Classes are integers, or names, which
    are numbered in sorted order.

    Args:
        spec: what to open, as above.
        labels: a file of labels (idx or ``.npy``) for an idx or ``.npy`` file of images.
        resize: scale every image to this height and width (an int: square), by area means where
            both sides shrink by whole factors, otherwise by Lanczos.

    Returns:
        The source; its pixels are not read yet.

    Raises:
        SourceError: there is no such source, or it cannot be used; says why and what to do.
        TypeError: an argument of the wrong type.
        ValueError: `resize` out of range.
    """
    size = _check_resize(resize)
    kind, _, name = str(spec).partition(":")
    if kind in ("hf", "embedded") and labels is not None:
        raise SourceError(f"{spec} has its own labels; leave out --labels (labels={str(labels)!r})")
    if kind == "hf":
        return open_hugging_face(name, size)
    if kind == "embedded":
        if name not in _EMBEDDED:
            raise SourceError(f"no embedded data set {name!r}; there is: {', '.join(_EMBEDDED)}")
        return _with_size(open_npz(Path(__file__).parents[1] / "data" / _EMBEDDED[name]), size)

    path, part = _split_spec(str(spec))
    with explained(path, "check the path and its permissions"):
        kind = _file_kind(path)
    if part is not None and kind not in ("folder", "zip"):
        raise SourceError(f"{path} has no parts to choose from; leave out ':{part}'")
    if labels is not None and kind not in ("npy", "idx"):
        raise SourceError(
            f"{path} has its own labels; --labels (labels={str(labels)!r}) is for idx and .npy "
            "files"
        )
    match kind:
        case "folder" | "zip":
            return open_pictures(path, part, size)
        case "npz":
            return _with_size(open_npz(path), size)
        case _:
            return _with_size(open_raw(path, kind, labels), size)


# Files


def _split_spec(spec: str) -> tuple[Path, str | None]:
    with explained(spec, "check the path and its permissions"):
        if Path(spec).exists():
            return Path(spec), None
        path, colon, part = spec.rpartition(":")
        if colon and Path(path).exists():
            return Path(path), part
    raise SourceError(f"there is no file or folder {spec}; check the path")


def _file_kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
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


def _with_size(source: ImageSource, size: tuple[int, int] | None) -> ImageSource:
    if size is None or source.shape[1:] == size:
        return source
    return ResizedSource(
        count=source.count,
        shape=(source.shape[0], *size),
        labels=source.labels,
        class_names=source.class_names,
        source=source,
    )
