"""Arrays of images in files: .npz, .npy and idx."""

import io
import math
import struct
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from els.index.arrays import check_labels
from els.index.sources.decoding import MAX_PIXELS
from els.index.sources.foreign import (
    DAMAGED,
    MAX_DEFLATE_RATIO,
    SourceError,
    explained,
    open_member,
    read_exactly,
)
from els.index.sources.source import (
    PARTS,
    ImageSource,
    StreamSource,
    checked_names,
    is_gzip,
    open_stream,
)

_IMAGE_KEYS = ("images", "x", "data")
_LABEL_KEYS = ("labels", "y")
# Names of the arrays of one part, as Keras and MedMNIST have them.
_PART_IMAGES = ("x_{}", "images_{}", "{}_images", "{}_x")
_PART_LABELS = ("y_{}", "labels_{}", "{}_labels", "{}_y")
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4"}
# Bytes of the names of all classes.
_MAX_NAMES_BYTES = 1 << 26
# Bytes of an npy file that are searched for its header; numpy takes 10,000.
_MAX_NPY_HEADER = 1 << 14


# Arrays


def open_npz(path: Path, part: str | None) -> ImageSource:
    """The images, labels and class names of an .npz file, or of one part of it."""
    with explained(path, DAMAGED), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        image_key, label_key, notes = _array_keys(path, keys, part)
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
    class_names = checked_names(path, names, labels)
    return replace(source, labels=labels, class_names=class_names, notes=notes)


def _array_keys(
    path: Path, keys: Sequence[str], part: str | None
) -> tuple[str, str | None, tuple[str, ...]]:
    """The arrays of images and labels, and what to say of the choice."""
    parts = [each for each in PARTS if any(form.format(each) in keys for form in _PART_IMAGES)]
    whole = _one_of(path, "images", keys, _IMAGE_KEYS)
    notes: tuple[str, ...] = ()
    if part is None and whole is None and parts:
        if len(parts) > 1 and "train" not in parts:
            raise SourceError(
                f"{path} has several parts: {', '.join(parts)}; choose one, as in split={parts[0]}"
            )
        part = "train" if "train" in parts else parts[0]
        if len(parts) > 1:
            notes = (f"took {part} of the parts {', '.join(parts)}; split= takes another",)
    if part is None and whole is None:
        raise SourceError(
            f"{path} has no array named {', '.join(_IMAGE_KEYS)}; it has: "
            f"{', '.join(keys[:20]) or 'nothing'}; save it as np.savez(path, images=...)"
        )
    if part is None:
        # Arrays named `images` beside labels named as those of a part belong together.
        labels = _one_of(path, "labels", keys, (*_LABEL_KEYS, "y_train"))
        return str(whole), labels, notes
    if part not in parts:
        raise SourceError(
            f"{path} has no part {part!r}; it has: {', '.join(parts) or 'none to choose from'}"
        )
    images = _one_of(path, "images", keys, [form.format(part) for form in _PART_IMAGES])
    labels = _one_of(path, "labels", keys, [form.format(part) for form in _PART_LABELS])
    return str(images), labels, notes


def _checked_labels(where: object, labels: object, count: int) -> NDArray[np.int64]:
    try:
        return check_labels(labels, count)
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


def open_raw(path: Path, kind: str, labels: str | Path | None) -> ImageSource:
    """An `.npy` or idx file of images."""
    with explained(path, DAMAGED):
        compressed = is_gzip(path)
        with open_stream(path) as stream:
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
    with explained(labels_path, DAMAGED), open_stream(labels_path) as stream:
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
