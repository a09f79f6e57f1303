"""Images, pictures and their labels as users have them on disk."""

import io
import json
import struct
import sys
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from els.index import ImageSource, open_source


def make_images(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """One to three cuts, flips, insertions or blanks."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.integers(1, 8))
        match draw(st.sampled_from(["truncate", "flip", "insert", "delete", "blank"])):
            case "truncate":
                del changed[start:]
            case "flip":
                changed[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                changed[start:start] = draw(st.binary(min_size=1, max_size=length))
            case "delete":
                del changed[start : start + length]
            case "blank":
                changed[start : start + length] = bytes(len(changed[start : start + length]))
    return bytes(changed)


def read(source: ImageSource, size: int = 3) -> NDArray[np.uint8]:
    """All images, after the checks that every source must pass."""
    chunks = list(source.chunks(size))
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    images = np.concatenate(chunks)
    assert images.dtype == np.uint8
    assert images.shape == (source.count, *source.shape)
    if source.labels is not None:
        assert source.labels.dtype == np.int64
        assert source.labels.shape == (source.count,)
    return images


def png(pixels: NDArray[Any], mode: str | None = None, form: str = "PNG") -> bytes:
    """One encoded picture of [H, W] or [H, W, C]; mode converts it."""
    stream = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(stream, form)
    return stream.getvalue()


def write_folder(folder: Path, entries: dict[str, bytes]) -> Path:
    for name, data in entries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


# Pictures


def pictures(count: int, *shape: int) -> list[NDArray[np.uint8]]:
    return list(make_images(count, *shape))


# Hugging Face


class HfImage:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


def fake_library(rows: list[dict[str, Any]], features: dict[str, Any]) -> types.ModuleType:
    """A module with the part of the interface of `datasets` that is used."""

    class Dataset:
        def __init__(self, decode: bool) -> None:
            self.decode, self.features = decode, features

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, key: int | str) -> Any:
            assert not (self.decode and isinstance(key, int)), "pictures are not to be decoded"
            return rows[key] if isinstance(key, int) else iter([row[key] for row in rows])

        def cast_column(self, column: str, feature: Any) -> "Dataset":
            return Dataset(feature.decode)

    def load_dataset(name: str, split: str) -> Dataset:
        if split not in ("train", "test"):
            raise ValueError(f'Unknown split "{split}". Should be one of ["train", "test"].')
        return Dataset(decode=True)

    library = types.ModuleType("datasets")
    vars(library).update(load_dataset=load_dataset, Image=HfImage)
    return library


HfImage.__name__ = "Image"


class ClassLabel:
    def __init__(self, names: list[str]) -> None:
        self.names = names


Label = int | str | list[float] | None


def dataset_json(rows: dict[str, Label]) -> bytes:
    return json.dumps({"labels": list(rows.items())}).encode()


def csv_table(rows: dict[str, Label], column: str = "label") -> bytes:
    lines = [f"file_name,text,{column}", *(f'{k},"a, b",{v}' for k, v in rows.items())]
    return b"\xef\xbb\xbf" + "\r\n".join(lines).encode()


def four_pictures(prefix: str = "") -> dict[str, bytes]:
    """Two in each of two folders, which are no classes."""
    names = [f"{prefix}0000{i // 2}/img{i}.png" for i in range(4)]
    return dict(zip(names, map(png, make_images(4, 3, 5)), strict=True))


# Columns of data sets

THREE = pictures(3, 2, 2)


def open_rows(monkeypatch: pytest.MonkeyPatch, features: dict[str, Any], **columns: Any) -> Any:
    columns.setdefault("image", [{"bytes": png(image), "path": None} for image in THREE])
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    library = fake_library(rows, {"image": HfImage(), **features})
    monkeypatch.setitem(sys.modules, "datasets", library)
    return open_source("hf:x")


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


STRANGE = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n",
    "PDF": b"%PDF-1.4\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "FITS": b"SIMPLE  =                    T" + b" " * 2850,
    "ICO": encoded(Image.fromarray(make_images(16, 16, 3)), "ICO"),
    "XBM": b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x00};",
    "PCX": encoded(Image.fromarray(make_images(8, 8)), "PCX"),
}


def claiming(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds few pixels."""
    whole = bytearray(png(make_images(1, 1)))
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


def find_tile(picture: NDArray[np.uint8], tile: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Row and column of an enlarged tile in a picture, both [H, W], and how much it is enlarged."""
    for scale in range(8, 0, -1):
        large = tile.repeat(scale, 0).repeat(scale, 1)
        tall, wide = large.shape
        for y, x in np.argwhere(picture == large[0, 0]):
            if np.array_equal(picture[y : y + tall, x : x + wide], large):
                return int(y), int(x), scale
    raise AssertionError("the tile is not in the picture")
