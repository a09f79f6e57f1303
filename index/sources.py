"""Where training images come from: arrays, pictures, archives and data sets, all as one stream.

`open_source` reads enough to know the count, the shape and the labels; `ImageSource.chunks` then
streams the pixels. No pickle is ever loaded.
"""

import gzip
import importlib
import io
import math
import os
import struct
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self, cast, final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from els.index.arrays import check_class_names, check_labels
from els.index.foreign import (
    DAMAGED,
    MAX_DEFLATE_RATIO,
    SourceError,
    explained,
    open_member,
    open_regular,
    read_exactly,
)
from els.index.picture_labels import (
    LABEL_COLUMNS,
    LABEL_FILES,
    MAX_LABEL_FILE_BYTES,
    ClassLabels,
    class_labels,
    read_label_files,
)
from els.index.pictures import FORMATS, MAX_PIXELS, decode_picture, is_picture, read_header

_EMBEDDED = {"fashion-mnist": "fashion-mnist-4096.npz"}
_IMAGE_KEYS = ("images", "x_train", "x", "data")
_LABEL_KEYS = ("labels", "y_train", "y")
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_SPLITS |= {"extra", "unlabeled", "unlabelled"}
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4"}
# Bytes of an encoded picture.
_MAX_PICTURE_BYTES = 1 << 28
# Bytes of the names of all classes.
_MAX_NAMES_BYTES = 1 << 26
# Bytes of an npy file that are searched for its header; numpy takes 10,000.
_MAX_NPY_HEADER = 1 << 14
_PICTURE_REMEDY = "fetch that picture again, or take it out"

OpenPictures = Callable[[], AbstractContextManager[Callable[[int], IO[bytes]]]]
"""Opens a set of encoded pictures, to be read by number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource(ABC):
    """A stream of images of one shape, with their labels.

    Attributes:
        count: number of images, at least 1.
        shape: (C, H, W) of every image, C in 1..4.
        labels: int64 [count] >= 0, or None.
        class_names: name of class 0, 1, ..., or None.
    """

    count: int
    shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    @abstractmethod
    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Streams the images in order, from the first; may be called again.

        Args:
            size: images per chunk, at least 1.

        Yields:
            uint8 [n, C, H, W], n = size but for the last.

        Raises:
            SourceError: the data is damaged.
        """


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource(ImageSource):
    """Images that are an array already: uint8 [N, C, H, W]."""

    images: NDArray[np.uint8]

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> Self:
        """Makes a source of checked images, uint8 [N, C, H, W]."""
        count, channels, height, width = images.shape
        return cls(count=count, shape=(channels, height, width), images=images)

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`; the chunks are views."""
        for start in range(0, self.count, size):
            yield self.images[start : start + size]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StreamSource(ImageSource):
    """Raw pixels after a header: an `.npy`, an idx file (gzip or not) or a member of an `.npz`.

    Attributes:
        path: the file.
        member: the member of a zip, or None where the file itself is the stream.
        offset: bytes of header.
        channels_last: pixels are stored [H, W, C].
    """

    path: Path
    member: str | None
    offset: int
    channels_last: bool

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`."""
        channels, height, width = self.shape
        stored = (height, width, channels) if self.channels_last else self.shape
        with explained(self.path, DAMAGED), _open_stream(self.path, self.member) as stream:
            stream.read(self.offset)
            for start in range(0, self.count, size):
                n = min(size, self.count - start)
                block = read_exactly(stream, n * math.prod(stored))
                images = np.frombuffer(block, np.uint8).reshape(n, *stored)
                yield np.moveaxis(images, -1, 1) if self.channels_last else images
            # Also makes zip and gzip compare their check sums.
            if stream.read(1):
                raise SourceError(f"{self.path} has bytes after its last image; {DAMAGED}")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PictureSource(ImageSource):
    """Encoded pictures.

    Attributes:
        where: what they are in, for messages.
        names: name of every picture, for messages.
        opener: opens the set, to be read by number.
        mode: "L", "RGB" or "RGBA": what every picture becomes.
        resize: (H, W) to scale every picture to, or None.
    """

    where: str
    names: Sequence[str]
    opener: OpenPictures
    mode: str
    resize: tuple[int, int] | None

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`."""
        with self.opener() as read:
            for start in range(0, self.count, size):
                numbers = range(start, min(start + size, self.count))
                with warnings.catch_warnings(action="ignore"):
                    images = [self._decoded(read, number) for number in numbers]
                yield np.stack(images)

    def _decoded(self, read: Callable[[int], IO[bytes]], number: int) -> NDArray[np.uint8]:
        # Read whole, so that an archive compares its check sum.
        with (
            explained(f"{self.where}: {self.names[number]}", _PICTURE_REMEDY),
            read(number) as stream,
        ):
            planes = decode_picture(io.BytesIO(stream.read()), self.mode)
            image = planes if self.resize is None else _resized(planes, self.resize)
            if image.shape != self.shape:
                raise SourceError(
                    f"{self.where}: {self.names[number]} is {image.shape} now and was "
                    f"{self.shape} before; keep the pictures unchanged during a build"
                )
            return image


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ResizedSource(ImageSource):
    """Another source's images, each scaled to `shape`."""

    source: ImageSource

    def chunks(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """As in `ImageSource`."""
        for chunk in self.source.chunks(size):
            yield np.stack([_resized(image, self.shape[1:]) for image in chunk])


def open_source(
    spec: str | Path,
    *,
    labels: str | Path | None = None,
    resize: int | tuple[int, int] | None = None,
) -> ImageSource:
    """Opens a set of training images of any supported kind, told by its content.

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
        return _open_hugging_face(name, size)
    if kind == "embedded":
        if name not in _EMBEDDED:
            raise SourceError(f"no embedded data set {name!r}; there is: {', '.join(_EMBEDDED)}")
        return _with_size(_open_npz(Path(__file__).with_name("data") / _EMBEDDED[name]), size)

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
            return _open_pictures(path, part, size)
        case "npz":
            return _with_size(_open_npz(path), size)
        case _:
            return _with_size(_open_raw(path, kind, labels), size)


# Arrays


def _open_npz(path: Path) -> ImageSource:
    with explained(path, DAMAGED), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        image_key = _one_of(path, "images", keys, _IMAGE_KEYS)
        if image_key is None:
            raise SourceError(
                f"{path} has no array named {', '.join(_IMAGE_KEYS)}; it has: "
                f"{', '.join(keys[:20]) or 'nothing'}; save it as np.savez(path, images=...)"
            )
        label_key = _one_of(path, "labels", keys, _LABEL_KEYS)
        member = f"{image_key}.npy"
        with open_member(archive, member) as stream:
            shape, dtype = _read_npy_header(stream, f"{path}: {image_key}")
            source = _raw_source(path, member, stream.tell(), shape, dtype)
        expected = source.offset + source.count * math.prod(source.shape)
        if archive.getinfo(member).file_size != expected:
            raise SourceError(
                f"{path}: {image_key} has {archive.getinfo(member).file_size:,} bytes, its header "
                f"says {expected:,}; {DAMAGED}"
            )
        labels = names = None
        if label_key is not None:
            with open_member(archive, f"{label_key}.npy") as stream:
                labels = _read_label_array(stream, f"{path}: {label_key}", source.count)
        if "class_names" in keys:
            with open_member(archive, "class_names.npy") as stream:
                names = _read_class_names(stream, f"{path}: class_names")
    return replace(source, labels=labels, class_names=_checked_names(path, names, labels))


def _checked_labels(where: object, labels: object, count: int) -> NDArray[np.int64]:
    try:
        return check_labels(labels, count)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}: {error}") from error


def _checked_names(
    where: object, names: Sequence[str] | None, labels: NDArray[np.int64] | None
) -> tuple[str, ...] | None:
    try:
        return check_class_names(names, labels)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}: {error}") from error


def _one_of(path: Path, what: str, keys: Sequence[str], wanted: Sequence[str]) -> str | None:
    found = [key for key in wanted if key in keys]
    if len(found) > 1:
        raise SourceError(
            f"{path} has several arrays that could be the {what}: {', '.join(found)}; save it with "
            "one of them"
        )
    return found[0] if found else None


def _open_raw(path: Path, kind: str, labels: str | Path | None) -> ImageSource:
    """An `.npy` or idx file of images."""
    with explained(path, DAMAGED):
        compressed = _is_gzip(path)
        with _open_stream(path) as stream:
            header = _read_npy_header if kind == "npy" else _read_idx_header
            shape, dtype = header(stream, str(path))
            if kind == "idx" and len(shape) == 1:
                raise SourceError(f"{path} holds labels, not images; give the images file instead")
            source = _raw_source(path, None, stream.tell(), shape, dtype)
        expected = source.offset + source.count * math.prod(source.shape)
        size = path.stat().st_size
        if expected > size * MAX_DEFLATE_RATIO if compressed else expected != size:
            raise SourceError(
                f"{path} has {size:,} bytes, too {'few' if size < expected else 'many'} for the "
                f"{source.count} images {source.shape} of its header; {DAMAGED}"
            )
    labels_path = Path(labels) if labels is not None else _idx_labels_beside(path)
    if labels_path is None:
        return source
    with explained(labels_path, DAMAGED), _open_stream(labels_path) as stream:
        return replace(source, labels=_read_label_array(stream, str(labels_path), source.count))


def _idx_labels_beside(path: Path) -> Path | None:
    """`train-labels-idx1-ubyte` for `train-images-idx3-ubyte`, each with or without `.gz`."""
    if "images" not in path.name or "idx3" not in path.name:
        return None
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    places = (path.with_name(name), path.with_name(f"{name}.gz"))
    return next((place for place in places if place.exists()), None)


def _raw_source(
    path: Path, member: str | None, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> StreamSource:
    """Decides what the axes mean."""
    where = str(path) if member is None else f"{path}: {member.removesuffix('.npy')}"
    if dtype != np.uint8:
        raise SourceError(
            f"{where} is {dtype}, expected uint8; convert it to 0..255, or values in [-1, 1] with "
            "els.index.encode"
        )
    layouts = "[N, H, W], [N, C, H, W] or [N, H, W, C] with C in 1..4"
    if len(shape) not in (3, 4):
        raise SourceError(f"{where} has shape {shape}, expected {layouts}; reshape it")
    first, last = (len(shape) == 3 or 1 <= shape[1] <= 4), (len(shape) == 4 and 1 <= shape[3] <= 4)
    if first and last:
        raise SourceError(
            f"{where} has shape {shape}, which may be [N, C, H, W] or [N, H, W, C]; load it and "
            "give the array to PatchDatabase.build as [N, C, H, W]"
        )
    if not (first or last):
        raise SourceError(f"{where} has shape {shape}, expected {layouts}; transpose it")
    if min(shape) < 1 or math.prod(shape) > 1 << 60:
        raise SourceError(f"{where} has shape {shape}; it is empty or damaged: export it again")
    count, *side = shape
    channels, height, width = (1, *side) if len(side) == 2 else side
    if last:
        height, width, channels = side
    if height * width > MAX_PIXELS:
        raise SourceError(
            f"{where} has images of {height:,} x {width:,} pixels, more than the {MAX_PIXELS:,} of "
            "the limit; scale them down"
        )
    return StreamSource(
        count=count,
        shape=(channels, height, width),
        path=path,
        member=member,
        offset=offset,
        channels_last=last,
    )


def _read_npy_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    # A part of the file, because numpy reads a header whatever length it claims.
    head = io.BytesIO(stream.read(_MAX_NPY_HEADER))
    # numpy warns of old types and of headers that Python 2 wrote.
    with warnings.catch_warnings(action="ignore"):
        match npy.read_magic(head):
            case (1, 0):
                shape, fortran, dtype = npy.read_array_header_1_0(head)
            case (2, 0):
                shape, fortran, dtype = npy.read_array_header_2_0(head)
            case version:
                raise SourceError(f"{where} has npy version {version}; save it again with np.save")
    stream.seek(head.tell())
    if dtype.hasobject:
        raise SourceError(
            f"{where} holds Python objects, which are never loaded; save it as a plain array "
            "(uint8 images, integer labels, fixed-width text)"
        )
    if fortran and len(shape) > 1:
        raise SourceError(
            f"{where} is stored column by column; save np.ascontiguousarray(array) instead"
        )
    # True is an int to Python.
    return tuple(map(int, shape)), dtype


def _read_idx_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    zeros, code, rank = struct.unpack(">HBB", read_exactly(stream, 4))
    if zeros != 0 or code not in _IDX_DTYPES or not 1 <= rank <= 4:
        raise SourceError(
            f"{where} starts as no idx file of bytes does (type {code}, {rank} axes); {DAMAGED}"
        )
    shape = struct.unpack(f">{rank}I", read_exactly(stream, 4 * rank))
    return shape, np.dtype(_IDX_DTYPES[code])


def _read_label_array(stream: IO[bytes], where: str, count: int) -> NDArray[np.int64]:
    """Labels of an idx file or npy stream: integers [count] or [count, 1]."""
    magic = stream.read(1)
    stream.seek(0)
    header = _read_idx_header if magic == b"\0" else _read_npy_header
    shape, dtype = header(stream, where)
    if dtype.kind not in "iu" or shape not in ((count,), (count, 1)):
        raise SourceError(
            f"{where} has {dtype} {shape}, expected integers [{count}], one label for each image; "
            "give the labels of the same split"
        )
    values = np.frombuffer(read_exactly(stream, count * dtype.itemsize), dtype)
    if stream.read(1):
        raise SourceError(f"{where} has bytes after its last label; {DAMAGED}")
    return _checked_labels(where, values, count)


def _read_class_names(stream: IO[bytes], where: str) -> list[str]:
    shape, dtype = _read_npy_header(stream, where)
    if dtype.kind != "U" or len(shape) != 1 or dtype.itemsize * shape[0] > _MAX_NAMES_BYTES:
        raise SourceError(
            f"{where} has {dtype} {shape}, expected text, one name for each class; save it as "
            "np.array(names)"
        )
    block = read_exactly(stream, shape[0] * dtype.itemsize)
    if stream.read(1):
        raise SourceError(f"{where} has bytes after its last name; {DAMAGED}")
    return [str(name) for name in np.frombuffer(block, dtype)]


# Pictures


def _open_pictures(path: Path, part: str | None, resize: tuple[int, int] | None) -> ImageSource:
    """A folder or zip of pictures."""
    is_folder = path.is_dir()
    with explained(path, DAMAGED):
        found = _folder_files(path) if is_folder else _zip_files(path)
        visible = [parts for parts in found if parts and not _is_hidden(parts)]
        paths = sorted(parts for parts in visible if is_picture(parts[-1]))
        if not paths:
            raise SourceError(
                f"{path} holds no pictures ({len(found)} files); expected names that end in .png, "
                f".jpg or as other files of {', '.join(FORMATS)} do"
            )
        chosen, depth = _chosen_part(paths, part, str(path))
    names = ["/".join(parts) for parts in chosen]
    # With labels beside the pictures, folders are no classes.
    above = {parts[:depth] for parts in chosen for depth in range(len(parts))}
    files = sorted(
        "/".join(parts) for parts in visible if parts[-1] in LABEL_FILES and parts[:-1] in above
    )
    if files:
        stored = {"/".join(parts): name for parts, name in found.items()}
        labels, class_names = read_label_files(
            str(path),
            files,
            {"/".join(parts) for parts in paths},
            names,
            lambda file: _opened(path, stored[file]),
        )
    else:
        labels, class_names = _folder_classes(chosen, depth, str(path))
    members = [found[parts] for parts in chosen]
    opener = partial(_open_folder if is_folder else _open_zip, path, members)
    return _survey(str(path), names, opener, resize, labels, class_names)


def _folder_files(path: Path) -> dict[tuple[str, ...], str]:
    """Files below a folder, through links (but not in circles): their parts and relative names."""

    def refuse(error: OSError) -> None:
        raise error

    names, seen = [], set()
    for folder, subfolders, entries in os.walk(path, onerror=refuse, followlinks=True):
        identity = (Path(folder).stat().st_dev, Path(folder).stat().st_ino)
        if identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        names += [Path(folder, entry).relative_to(path).as_posix() for entry in entries]
    return {PurePosixPath(name).parts: name for name in names}


def _zip_files(path: Path) -> dict[tuple[str, ...], str]:
    """Files in a zip: their parts, however archivers separate them, and names in the zip."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith(("/", "\\"))]
    # Leading slashes and dots say nothing.
    return {PurePosixPath(name.replace("\\", "/").lstrip("/")).parts: name for name in names}


def _is_hidden(parts: Sequence[str]) -> bool:
    """Whether a file is hidden, or one of those that archivers add."""
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _chosen_part(
    paths: Sequence[tuple[str, ...]], part: str | None, where: str
) -> tuple[Sequence[tuple[str, ...]], int]:
    """The pictures of a part, and how many leading folders they share."""
    depth = _shared_folders(paths)
    tops = sorted({path[depth] for path in paths if len(path) > depth + 1})
    if part is None:
        if len(tops) > 1 and _SPLITS.issuperset(top.lower() for top in tops):
            raise SourceError(
                f"{where} has several parts: {', '.join(tops)}; choose one, as in {where}:{tops[0]}"
            )
        return paths, depth
    chosen = [path for path in paths if path[depth] == part and len(path) > depth + 1]
    if not chosen:
        raise SourceError(f"{where} has no part {part!r}; it has: {', '.join(tops) or 'none'}")
    return chosen, _shared_folders(chosen)


def _folder_classes(paths: Sequence[tuple[str, ...]], depth: int, where: str) -> ClassLabels:
    """Classes by the first folders that differ."""
    classes = [path[depth] for path in paths if len(path) > depth + 1]
    if not classes:
        return None, None
    if len(classes) < len(paths):
        stray = next(path for path in paths if len(path) == depth + 1)
        raise SourceError(
            f"{where} has pictures in class folders and beside them, such as {'/'.join(stray)}; "
            "move those into a class, or take them out"
        )
    names = ["/".join(path) for path in paths]
    return class_labels(where, classes, names)


def _shared_folders(paths: Sequence[tuple[str, ...]]) -> int:
    """How many leading folders all of some sorted paths share."""
    first, last = paths[0][:-1], paths[-1][:-1]
    shared = (a == b for a, b in zip(first, last, strict=False))
    return next((i for i, same in enumerate(shared) if not same), min(len(first), len(last)))


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """A file of labels in a folder or zip."""
    if path.is_dir():
        with open_regular(path / name, MAX_LABEL_FILE_BYTES) as stream:
            yield stream
        return
    with zipfile.ZipFile(path) as archive, open_member(archive, name, MAX_LABEL_FILE_BYTES) as file:
        yield file


@contextmanager
def _open_folder(path: Path, names: Sequence[str]) -> Iterator[Callable[[int], IO[bytes]]]:
    yield lambda number: open_regular(path / names[number], _MAX_PICTURE_BYTES)


@contextmanager
def _open_zip(path: Path, names: Sequence[str]) -> Iterator[Callable[[int], IO[bytes]]]:
    with explained(path, DAMAGED):
        archive = zipfile.ZipFile(path)
    with archive:
        yield lambda number: open_member(archive, names[number], _MAX_PICTURE_BYTES)


def _survey(
    where: str,
    names: Sequence[str],
    opener: OpenPictures,
    resize: tuple[int, int] | None,
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...] | None,
) -> PictureSource:
    """Reads the header of every picture: their common size and mode."""
    modes: set[str] = set()
    first: tuple[int, int] | None = resize
    with opener() as read, warnings.catch_warnings(action="ignore"):
        for number, name in enumerate(names):
            with explained(f"{where}: {name}", _PICTURE_REMEDY), read(number) as stream:
                mode, size = read_header(stream)
            modes.add(mode)
            first = first or size
            if resize is None and size != first:
                raise SourceError(
                    f"{where}: {name} is {size[0]} x {size[1]} (height x width), {names[0]} is "
                    f"{first[0]} x {first[1]}; scale all with --resize (resize=...)"
                )
    assert first is not None
    common = modes.pop() if len(modes) == 1 else "RGB"
    return PictureSource(
        count=len(names),
        shape=(len(common), *first),
        labels=labels,
        class_names=class_names,
        where=where,
        names=names,
        opener=opener,
        mode=common,
        resize=resize,
    )


# The Hugging Face library


def _open_hugging_face(name: str, resize: tuple[int, int] | None) -> ImageSource:
    """A data set of the `datasets` library: `NAME` or `NAME:SPLIT`."""
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise SourceError(
            f"hf:{name} needs the package datasets; install it with pip install 'els-machine[hf]'"
        ) from error
    name, _, split = name.partition(":")
    where = f"hf:{name}:{split or 'train'}"
    with explained(where, "check the name, the split and the network"):
        rows = library.load_dataset(name, split=split or "train")
        image_column = _one_column(where, rows.features, "Image", ("image", "img"))
        if image_column is None:
            raise SourceError(
                f"{where} has no Image column, only {', '.join(rows.features)}; choose a data set "
                "of images"
            )
        label_column = _one_column(where, rows.features, "ClassLabel", LABEL_COLUMNS)
        if label_column is None:
            columns = (name for name in LABEL_COLUMNS if _holds_classes(rows.features, name))
            label_column = next(columns, None)
        values = None if label_column is None else list(rows[label_column])
        rows = rows.cast_column(image_column, library.Image(decode=False))
    names = tuple(f"row {number}" for number in range(len(rows)))
    labels = class_names = None
    if values is not None:
        labels, class_names = class_labels(f"{where}: {label_column}", values, names)
        if labels is not None and class_names is None:
            given = getattr(rows.features[label_column], "names", None)
            class_names = _checked_names(f"{where}: {label_column}", given, labels)
    return _survey(
        where, names, partial(_open_rows, rows, image_column), resize, labels, class_names
    )


def _one_column(
    where: str, features: Mapping[str, Any], kind: str, preferred: Sequence[str]
) -> str | None:
    """The only column of a kind, or the first preferred one of several."""
    # By name, because the library is not there when types are checked.
    columns = [name for name, feature in features.items() if type(feature).__name__ == kind]
    best = [name for name in preferred if name in columns]
    if len(columns) > 1 and not best:
        raise SourceError(
            f"{where} has several {kind} columns: {', '.join(columns)}; rename the one to use to "
            f"{preferred[0]!r}, save the data set and open that"
        )
    return next(iter(best or columns), None)


def _holds_classes(features: Mapping[str, Any], column: str) -> bool:
    """Whether a column is of integers or text."""
    form = str(getattr(features.get(column), "dtype", ""))
    return form.startswith(("int", "uint", "string", "large_string"))


@contextmanager
def _open_rows(rows: Any, column: str) -> Iterator[Callable[[int], IO[bytes]]]:
    def read(number: int) -> IO[bytes]:
        picture = rows[number][column]
        if picture["bytes"] is not None:
            return io.BytesIO(picture["bytes"])
        return open_regular(Path(picture["path"]), _MAX_PICTURE_BYTES)

    yield read


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
    with _open_stream(path) as stream:
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


def _is_gzip(path: Path) -> bool:
    with open_regular(path) as stream:
        return stream.read(2) == b"\x1f\x8b"


@contextmanager
def _open_stream(path: Path, member: str | None = None) -> Iterator[IO[bytes]]:
    """The bytes of a file (unpacked, if gzip) or of a member of a zip."""
    with ExitStack() as stack:
        if member is not None:
            archive = stack.enter_context(zipfile.ZipFile(path))
            yield stack.enter_context(open_member(archive, member))
        elif _is_gzip(path):
            yield cast(IO[bytes], stack.enter_context(gzip.open(path)))
        else:
            yield stack.enter_context(open_regular(path))


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


def _resized(image: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Scales [C, H, W] plane by plane, against aliasing."""
    from PIL import Image

    height, width = size
    whole = image.shape[1] % height == 0 and image.shape[2] % width == 0
    method = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
    planes = [Image.fromarray(plane).resize((width, height), method) for plane in image]
    return np.stack([np.asarray(plane) for plane in planes])
