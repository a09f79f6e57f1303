"""Sources: every kind of data set arrives as the same stream, and damage is one clear error."""

import gzip
import io
import itertools
import os
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from pictures import (
    ClassLabel,
    HfImage,
    fake_library,
    make_images,
    mutations,
    pictures,
    png,
    read,
    write_folder,
    write_zip,
)
from PIL import Image

from els.index import ImageSource, PatchDatabase, SourceError, open_source


def idx(array: NDArray[Any]) -> bytes:
    code = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13}[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


# Arrays


@pytest.mark.parametrize(
    ("images_key", "labels_key"),
    [("images", "labels"), ("x_train", "y_train"), ("x", "y"), ("data", "labels"), ("x", None)],
    ids=str,
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_npz(tmp_path: Path, save: Any, images_key: str, labels_key: str | None) -> None:
    images, labels = make_images(7, 3, 5, 6), np.arange(7, dtype=np.uint8)[:, None] % 3
    arrays: dict[str, Any] = {images_key: images, "other": np.zeros(3)}
    if labels_key:
        arrays |= {labels_key: labels, "class_names": np.array(["a", "bc", "ü"])}
    save(tmp_path / "data.npz", **arrays)
    source = open_source(tmp_path / "data.npz")
    for _ in "twice":
        np.testing.assert_array_equal(read(source), images)
    if labels_key:
        np.testing.assert_array_equal(source.labels, labels[:, 0])
        assert source.class_names == ("a", "bc", "ü")
    else:
        assert source.labels is None
        assert source.class_names is None


@pytest.mark.parametrize(
    ("stored", "order"),
    [
        ((5, 6, 7), (0, None, 1, 2)),
        ((1, 1, 1), (0, None, 1, 2)),
        ((5, 3, 6, 7), (0, 1, 2, 3)),
        ((5, 1, 6, 7), (0, 1, 2, 3)),
        ((5, 6, 7, 3), (0, 3, 1, 2)),
        ((5, 6, 1, 4), (0, 3, 1, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("compressed", [True, False], ids=["gz", "plain"])
def test_npy_layouts(
    tmp_path: Path, stored: tuple[int, ...], order: tuple[int | None, ...], compressed: bool
) -> None:
    images = make_images(*stored)
    stream = io.BytesIO()
    np.save(stream, images)
    data = gzip.compress(stream.getvalue()) if compressed else stream.getvalue()
    (tmp_path / "any name").write_bytes(data)
    axes = images.transpose([axis for axis in order if axis is not None])
    expected = axes[:, None] if None in order else axes
    np.testing.assert_array_equal(read(open_source(tmp_path / "any name"), 2), expected)


@pytest.mark.parametrize("form", ["npy", "idx"])
def test_labels_of_an_array_may_be_given(tmp_path: Path, form: str) -> None:
    np.save(tmp_path / "x.npy", make_images(3, 4, 4))
    labels = np.array([5, 0, 300], np.int32)
    np.save(tmp_path / "y.npy", labels)
    (tmp_path / "y.idx").write_bytes(idx(labels))
    source = open_source(tmp_path / "x.npy", labels=tmp_path / f"y.{form}")
    np.testing.assert_array_equal(source.labels, labels)


@pytest.mark.parametrize("images_gz", [".gz", ""], ids=["images gz", "images plain"])
@pytest.mark.parametrize("labels_gz", [".gz", "", None], ids=["gz", "plain", "no labels"])
@pytest.mark.parametrize("names", ["train-{}-idx{}-ubyte", "t10k-{}.idx{}-ubyte"], ids=str)
def test_idx_pair(tmp_path: Path, images_gz: str, labels_gz: str | None, names: str) -> None:
    images, labels = make_images(4, 5, 6), np.array([3, 1, 0, 1], np.uint8)
    path = tmp_path / (names.format("images", 3) + images_gz)
    path.write_bytes(gzip.compress(idx(images)) if images_gz else idx(images))
    if labels_gz is not None:
        data = gzip.compress(idx(labels)) if labels_gz else idx(labels)
        (tmp_path / (names.format("labels", 1) + labels_gz)).write_bytes(data)
    source = open_source(path)
    np.testing.assert_array_equal(read(source)[:, 0], images)
    if labels_gz is None:
        assert source.labels is None
    else:
        np.testing.assert_array_equal(source.labels, labels)


def test_embedded_fashion_mnist() -> None:
    source = open_source("embedded:fashion-mnist")
    assert source.shape == (1, 28, 28)
    assert source.labels is not None
    assert np.bincount(source.labels).tolist() == [410] * 6 + [409] * 4
    assert source.class_names is not None
    assert source.class_names[9] == "Ankle boot"
    assert 70 < read(source, 1000).mean() < 76
    folder = Path(sys.modules["els.index"].__path__[0]) / "data"
    assert "Copyright (c) 2017 Zalando SE" in (folder / "LICENSE-fashion-mnist").read_text()


def test_a_source_streams_into_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("els.index.database._CHUNK_BYTES", 100)
    images, labels = make_images(50, 5, 4, 3), np.arange(50) % 4
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=labels)
    source = open_source(tmp_path / "x.npz")
    db = PatchDatabase.build(source, path=tmp_path / "db")
    np.testing.assert_array_equal(db.images, images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(db.labels, labels)
    other = PatchDatabase.build(
        source, np.zeros(50, int), class_names=["all"], path=tmp_path / "other"
    )
    assert other.class_names == ("all",)
    assert len(other.class_members(0)) == 50


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "prefix", ["", "train/", "a/b c/"], ids=["flat", "one folder", "two folders"]
)
def test_pictures_in_class_folders(tmp_path: Path, kind: str, prefix: str) -> None:
    a, b, c, d = pictures(4, 5, 7, 3)
    entries = {
        f"{prefix}zebra/1.png": png(c),
        f"{prefix}ant/2.PNG": png(b),
        f"{prefix}ant/1.bmp": png(a, form="BMP"),
        f"{prefix}zebra/deeper/0.webp.tiff": png(d, form="TIFF"),
        f"{prefix}zebra/notes.txt": b"not a picture",
        f"{prefix}.hidden/x.png": b"not a picture",
        "__MACOSX/zebra/1.png": b"not a picture",
    }
    write = write_folder if kind == "folder" else write_zip
    source = open_source(write(tmp_path / "set.data", entries))
    assert source.shape == (3, 5, 7)
    np.testing.assert_array_equal(read(source), np.stack([a, b, c, d]).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 1])
    assert source.class_names == ("ant", "zebra")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_without_classes(tmp_path: Path, kind: str) -> None:
    (image,) = pictures(1, 1, 1)
    write = write_folder if kind == "folder" else write_zip
    source = open_source(str(write(tmp_path / "set", {"images/only.png": png(image)})))
    assert (source.count, source.shape, source.labels) == (1, (1, 1, 1), None)
    np.testing.assert_array_equal(read(source), image[None, None])


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("top", ["", "set/"], ids=["top", "below"])
def test_parts_are_chosen_by_name(tmp_path: Path, kind: str, top: str) -> None:
    images = pictures(4, 2, 2)
    names = [f"{top}test/cat/1.png", f"{top}test/dog/2.png", f"{top}train/cat/1.png"]
    names.append(f"{top}train/dog/2.png")
    entries = dict(zip(names, map(png, images), strict=True))
    path = (write_folder if kind == "folder" else write_zip)(tmp_path / "set.x", entries)
    with pytest.raises(SourceError, match=r"several parts: test, train.*set\.x:test"):
        open_source(path)
    source = open_source(f"{path}:train")
    np.testing.assert_array_equal(read(source)[:, 0], images[2:])
    assert source.class_names == ("cat", "dog")
    with pytest.raises(SourceError, match=r"no part 'val'; it has: test, train"):
        open_source(f"{path}:val")


@pytest.mark.parametrize(
    ("modes", "channels"),
    [
        (["L", "1"], 1),
        (["L", "L"], 1),
        (["L", "RGB"], 3),
        (["P", "CMYK"], 3),
        (["LA", "L"], 4),
        (["RGBA", "RGBA"], 4),
        (["RGBA", "LA"], 4),
        (["RGBA", "RGB"], 4),
        (["RGBA", "L"], 4),
    ],
    ids=str,
)
def test_modes_become_one(tmp_path: Path, modes: list[str], channels: int) -> None:
    entries = {f"{i}.tif": png(make_images(3, 4, 3), mode, "TIFF") for i, mode in enumerate(modes)}
    source = open_source(write_folder(tmp_path, entries), background="keep")
    assert source.shape == (channels, 3, 4)
    images = read(source)
    for name, image in zip(entries, images, strict=True):
        with Image.open(tmp_path / name) as picture:
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
            np.testing.assert_array_equal(
                image.transpose(1, 2, 0).squeeze(), np.asarray(picture.convert(mode))
            )


def test_a_palette_with_transparency_keeps_it(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    picture.save(tmp_path / "a.png", transparency=bytes([0, 255, 128]))
    source = open_source(tmp_path, background="keep")
    assert source.shape == (4, 2, 2)
    np.testing.assert_array_equal(read(source)[0, 3], [[0, 255], [128, 255]])
    (tmp_path / "b.png").write_bytes(png(make_images(2, 2, 3)))
    both = read(open_source(tmp_path, background="keep"))
    np.testing.assert_array_equal(both[1, 3], 255)
    source = open_source(tmp_path)
    assert source.shape == (3, 2, 2)
    assert "1 of 2 pictures have transparency, and #ffffff shows through" in source.notes[0]
    read(source)


@pytest.mark.parametrize(
    ("background", "shown"),
    [("white", [255] * 3), ("black", [0] * 3), ("#1020ff", [16, 32, 255])],
)
def test_a_background_shows_through_transparency(
    tmp_path: Path, background: str, shown: list[int]
) -> None:
    """Also where all pictures have some; grey ones stay grey before a grey background."""
    grey = np.array([[[70, 255], [70, 0]]], np.uint8)
    (tmp_path / "a.png").write_bytes(png(grey, "LA"))
    source = open_source(tmp_path, background=background)
    is_grey = len(set(shown)) == 1
    assert source.shape == ((1 if is_grey else 3), 1, 2)
    np.testing.assert_array_equal(read(source)[0, :, 0, 0], 70)
    np.testing.assert_array_equal(read(source)[0, :, 0, 1], shown[: source.shape[0]])


@pytest.mark.parametrize("background", ["red", "#12345", "", "#12345g"])
def test_a_background_of_no_colour_is_refused(background: str) -> None:
    with pytest.raises(ValueError, match=r"background=.*must be white, black or a colour"):
        open_source("embedded:fashion-mnist", background=background)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    a, b = pictures(2, 2, 2)
    write_folder(tmp_path, {"set/a/1.png": png(a), "elsewhere/2.png": png(b)})
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert source.class_names == ("a", "b")
    np.testing.assert_array_equal(read(source)[:, 0], [a, b])


# Sizes


def test_pictures_of_different_sizes_are_refused_unless_resized(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"a.png": png(make_images(4, 6, 3)), "sub.png": png(make_images(8, 9, 3))}
    )
    with pytest.raises(
        SourceError, match=r"sub\.png is 8 x 9 .*a\.png is 4 x 6; scale all with resize="
    ):
        open_source(tmp_path)
    assert read(open_source(tmp_path, resize=(2, 3))).shape == (2, 3, 2, 3)
    assert read(open_source(tmp_path, resize=5)).shape == (2, 3, 5, 5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4], ids=lambda c: f"C={c}")
def test_resize_takes_area_means_for_whole_factors(tmp_path: Path, channels: int) -> None:
    images = make_images(3, channels, 8, 6)
    np.save(tmp_path / "x.npy", images)
    source = open_source(tmp_path / "x.npy", resize=(4, 2))
    means = images.reshape(3, channels, 4, 2, 2, 3).mean((3, 5))
    assert np.abs(read(source, 2) - means).max() <= 1
    same = open_source(tmp_path / "x.npy", resize=(8, 6))
    np.testing.assert_array_equal(read(same), images)


@pytest.mark.parametrize("size", [(3, 5), (16, 12), (1, 1)], ids=str)
def test_resize_keeps_a_constant(tmp_path: Path, size: tuple[int, int]) -> None:
    np.savez(tmp_path / "x.npz", images=np.full((2, 8, 6), 77, np.uint8), labels=[0, 1])
    source = open_source(tmp_path / "x.npz", resize=size)
    assert source.labels is not None
    np.testing.assert_array_equal(read(source), np.full((2, 1, *size), 77))


@pytest.mark.parametrize(
    ("resize", "error"),
    [
        (0, ValueError),
        ((3, -1), ValueError),
        (2.0, TypeError),
        ((2, 2, 2), TypeError),
        ("8", TypeError),
    ],
    ids=str,
)
def test_wrong_resize(resize: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="resize must be"):
        open_source("embedded:fashion-mnist", resize=resize)


@pytest.mark.parametrize("kind", ["pictures", "array"])
@pytest.mark.parametrize(("shape", "kept"), [((4, 8), (slice(0, 4), slice(2, 6)))], ids=["wide"])
def test_crop_keeps_the_proportions(
    tmp_path: Path, kind: str, shape: tuple[int, int], kept: tuple[slice, slice]
) -> None:
    for turned in (False, True):
        image = make_images(*shape)
        image = np.ascontiguousarray(image.T) if turned else image
        if kind == "pictures":
            path = write_folder(tmp_path / str(turned), {"a.png": png(image)})
        else:
            path = tmp_path / f"{turned}.npy"
            np.save(path, image[None])
        cropped = open_source(path, resize=2, crop=True)
        assert cropped.notes == ()
        middle = image[kept[::-1] if turned else kept]
        means = middle.reshape(2, 2, 2, 2).mean((1, 3))
        assert np.abs(read(cropped)[0, 0] - means).max() <= 1
        stretched = open_source(path, resize=2)
        assert "stretched to 2 x 2; crop=True keeps" in stretched.notes[0]
        assert open_source(path, resize=(2, 4) if not turned else (4, 2)).notes == ()
    with pytest.raises(ValueError, match=r"crop=True .*add resize="):
        open_source(path, crop=True)


# Selections


@pytest.fixture(params=["pictures", "array"])
def labelled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Forty images whose pixels say their number: 24 of class 0, then 12, then 4."""
    labels = np.repeat([0, 1, 2], [24, 12, 4])
    images = np.arange(40, dtype=np.uint8)[:, None, None] + np.zeros((2, 3), np.uint8)
    if request.param == "array":
        np.savez(tmp_path / "x.npz", images=images, labels=labels)
        return tmp_path / "x.npz"
    names = [f"{label}/{number:02}.png" for number, label in enumerate(labels)]
    return write_folder(tmp_path / "set", dict(zip(names, map(png, images), strict=True)))


def taken(source: ImageSource) -> list[int]:
    images = read(source)
    assert len(images) == source.count
    return [int(number) for number in images[:, 0, 0, 0]]


def test_a_limit_takes_the_first(labelled: Path) -> None:
    source = open_source(labelled, limit=30)
    assert taken(source) == list(range(30))
    np.testing.assert_array_equal(source.labels, [0] * 24 + [1] * 6)
    assert "the first 30 images have 2 of 3 classes; seed=0 draws" in source.notes[0]
    assert open_source(labelled, limit=37).notes == ()
    assert taken(open_source(labelled, limit=40)) == list(range(40))
    assert "there are 40 images" in open_source(labelled, limit=41).notes[0]


def test_a_seed_draws_in_proportion(labelled: Path) -> None:
    source = open_source(labelled, limit=10, seed=3)
    numbers = taken(source)
    assert source.labels is not None
    assert np.bincount(source.labels).tolist() == [6, 3, 1]
    assert numbers == sorted(set(numbers))
    assert numbers != list(range(10))
    assert taken(open_source(labelled, limit=10, seed=3)) == numbers
    assert taken(open_source(labelled, limit=10, seed=4)) != numbers
    # Written once; the same seed takes the same images ever after.
    assert numbers == [0, 1, 4, 7, 9, 20, 28, 31, 34, 39]


def test_so_many_of_each_class(labelled: Path) -> None:
    source = open_source(labelled, per_class=5)
    assert taken(source) == [*range(5), *range(24, 29), *range(36, 40)]
    assert "1 of 3 classes have fewer" in source.notes[0]
    drawn = open_source(labelled, per_class=2, seed=0)
    assert drawn.labels is not None
    assert np.bincount(drawn.labels).tolist() == [2, 2, 2]
    assert taken(drawn) != taken(open_source(labelled, per_class=2))


def test_a_selection_without_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(9, dtype=np.uint8)[:, None, None])
    drawn = taken(open_source(tmp_path / "x.npy", limit=4, seed=1))
    assert len(set(drawn)) == 4
    with pytest.raises(SourceError, match=r"has no labels.*\(per_class=2\)"):
        open_source(tmp_path / "x.npy", per_class=2)
    for wrong in (
        {"limit": 0},
        {"per_class": -1},
        {"limit": 2.0},
        {"limit": 1, "per_class": 1},
        {"seed": 1},
        {"limit": 1, "seed": -1},
    ):
        with pytest.raises(ValueError, match=r"limit|per_class|seed"):
            open_source(tmp_path / "x.npy", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_bad_pictures_are_left_out_on_request(tmp_path: Path, kind: str) -> None:
    a, b = pictures(2, 9, 7)
    whole = png(b)
    cut = png(make_images(9, 7, seed=5))[:-30]
    entries = {"x/1.png": png(a), "x/2.png": b"none", "y/3.png": cut, "y/4.png": whole}
    path = (write_folder if kind == "folder" else write_zip)(tmp_path / "set", entries)
    with pytest.raises(SourceError, match=r"x/2\.png .*skip_bad=True"):
        open_source(path)
    source = open_source(path, skip_bad=True)
    np.testing.assert_array_equal(read(source)[:, 0], [a, b])
    np.testing.assert_array_equal(source.labels, [0, 1])
    (note,) = source.notes
    assert "left out, because they cannot be read (2):" in note
    assert [line.split(" ")[3] for line in note.split("\n")[1:]] == ["x/2.png", "y/3.png"]
    only_bad = (write_folder if kind == "folder" else write_zip)(
        tmp_path / "bad", {"1.png": b"none"}
    )
    with pytest.raises(SourceError, match="no picture that can be read"):
        open_source(only_bad, skip_bad=True)


# Parts of arrays, and well-known names


@pytest.mark.parametrize("form", ["x_{}/y_{}", "{}_images/{}_labels"], ids=["keras", "medmnist"])
def test_parts_of_an_npz(tmp_path: Path, form: str) -> None:
    arrays = {}
    for number, part in enumerate(("train", "test")):
        images, labels = (name.format(part) for name in form.split("/"))
        arrays |= {images: np.full((3, 2, 2), number, np.uint8), labels: np.full(3, number)}
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    for source in (open_source(f"{path}:test"), open_source(path, split="test")):
        assert taken(source) == [1, 1, 1]
        np.testing.assert_array_equal(source.labels, [1, 1, 1])
        assert source.notes == ()
    source = open_source(path)
    assert taken(source) == [0, 0, 0]
    assert source.notes == ("took train of the parts train, test; split= takes another",)
    with pytest.raises(SourceError, match="no part 'val'; it has: train, test"):
        open_source(path, split="val")
    with pytest.raises(ValueError, match="names the part train, and split=test another"):
        open_source(f"{path}:train", split="test")


def test_standard_names_are_found_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for stem, value in (("train", 1), ("t10k", 2)):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(np.full((2, 3, 3), value, np.uint8)))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(np.array([0, 1], np.uint8)))
    source = open_source("mnist")
    assert taken(source) == [1, 1]
    np.testing.assert_array_equal(source.labels, [0, 1])
    assert taken(open_source("mnist:test")) == taken(open_source("mnist", split="test")) == [2, 2]
    with pytest.raises(SourceError, match="mnist has no part 'val'; it has: train, test"):
        open_source("mnist", split="val")
    elsewhere = tmp_path / "elsewhere"
    np.savez(tmp_path / "mnist.npz", x_train=np.full((2, 3, 3), 7, np.uint8))
    monkeypatch.setenv("ELS_DATA", f"{elsewhere}{os.pathsep}{tmp_path}")
    assert taken(open_source("mnist")) == [7, 7]
    write_folder(tmp_path / "afhq", {"train/cat/1.png": PNG, "train/dog/2.png": PNG})
    assert open_source("afhq").class_names == ("cat", "dog")
    # A folder of that name is that folder.
    write_folder(tmp_path / "celeba", {"1.png": PNG})
    assert open_source("celeba").count == 1


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "celeba", "afhq"])
def test_standard_names_say_where_they_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("ELS_DATA", str(tmp_path))
    with pytest.raises(SourceError, match=r"ELS_DATA names other.*els-machine\[hf\].*data/"):
        open_source(name)


def test_cifar_of_torchvision_is_read_without_unpickling(tmp_path: Path) -> None:
    """Files as Python 2 wrote them; one that would run something is only read."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value + b"q\x01"

    def batch(pixels: bytes, labels: list[int]) -> bytes:
        numbers = b"".join(b"K" + bytes([label]) for label in labels)
        runs = b"cos\nsystem\n" + text(b"touch ran") + b"\x85R"
        head = b"\x80\x02}(" + text(b"data") + runs
        long = b"T" + struct.pack("<I", len(pixels)) + pixels
        return head + long + text(b"labels") + b"](" + numbers + b"e" + text(b"batch_label") + b"u."

    pixels = make_images(6, 2, 3, 32, 32)
    for number in range(6):
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        (folder / name).write_bytes(batch(pixels[number].tobytes(), [number, 9]))
    names = b"".join(text(b"name%d" % number) for number in range(10))
    meta = b"\x80\x02}(" + text(b"num_cases_per_batch") + text(b"label_names") + b"](" + names
    (folder / "batches.meta").write_bytes(meta + b"eu.")
    source = open_source(folder)
    np.testing.assert_array_equal(read(source), pixels[:5].reshape(10, 3, 32, 32))
    np.testing.assert_array_equal(source.labels, [0, 9, 1, 9, 2, 9, 3, 9, 4, 9])
    assert source.class_names is not None
    assert source.class_names[3] == "name3"
    test = open_source(folder, split="test")
    np.testing.assert_array_equal(read(test), pixels[5])
    (folder / "data_batch_3").write_bytes(batch(pixels[2].tobytes()[:-1], [2, 9]))
    with pytest.raises(SourceError, match="damaged"):
        open_source(folder)
    (folder / "data_batch_3").unlink()
    with pytest.raises(SourceError, match="4 of the 5 files"):
        open_source(folder)


def test_hugging_face_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pictures(2, 4, 5, 3)
    (tmp_path / "b.png").write_bytes(png(b))
    rows = [
        {"img": {"bytes": png(a), "path": "a.png"}, "label": 1, "n": 0},
        {"img": {"bytes": None, "path": str(tmp_path / "b.png")}, "label": 0, "n": 0},
    ]
    features = {"img": HfImage(), "label": ClassLabel(["no", "yes"]), "n": object()}
    monkeypatch.setitem(sys.modules, "datasets", fake_library(rows, features))
    for spec in ("hf:some/name", "hf:some/name:test"):
        source = open_source(spec)
        np.testing.assert_array_equal(read(source), np.stack([a, b]).transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(source.labels, [1, 0])
        assert source.class_names == ("no", "yes")
    with pytest.raises(SourceError, match=r"hf:name:x cannot be used: Unknown split"):
        open_source("hf:name:x")

    rows[0]["label"] = rows[1]["label"] = -1
    assert open_source("hf:name").labels is None
    rows[0]["label"] = 0
    with pytest.raises(SourceError, match="label: row 1 has the label -1; number"):
        open_source("hf:name")
    del features["label"]
    assert open_source("hf:name").labels is None
    features |= {"coarse_label": ClassLabel([]), "other": ClassLabel([])}
    with pytest.raises(SourceError, match="several ClassLabel columns: coarse_label, other"):
        open_source("hf:name")
    del features["img"]
    with pytest.raises(SourceError, match="no Image column, only n, coarse_label, other"):
        open_source("hf:name")


def test_hugging_face_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = pictures(3, 4, 5, 3)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"image": [Image.fromarray(image) for image in images], "label": [1, 0, 1]}
    (tmp_path / "set").mkdir()
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "set" / "train.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_source(f"hf:{tmp_path}/set")
        np.testing.assert_array_equal(read(source), np.stack(images).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(source.labels, [1, 0, 1])
    assert source.class_names == ("a", "b")


def test_hugging_face_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"pip install 'els-machine\[hf\]'"):
        open_source("hf:mnist")


# What is refused


def save_npz(**arrays: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        np.savez(folder / "x.npz", **arrays)
        return str(folder / "x.npz")

    return make


def save_npy(array: NDArray[Any]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        np.save(folder / "x.npy", array)
        return str(folder / "x.npy")

    return make


def save_bytes(data: bytes, name: str = "x") -> Callable[[Path], str]:
    return lambda folder: str(write_folder(folder, {name: data}) / name)


def save_files(**entries: bytes) -> Callable[[Path], str]:
    return lambda folder: str(
        write_folder(folder, {k.replace("_", "."): entries[k] for k in entries})
    )


def save_zip(entries: dict[str, bytes]) -> Callable[[Path], str]:
    return lambda folder: str(write_zip(folder / "x.zip", entries))


def truncated_member(folder: Path) -> str:
    """An npz whose member is shorter than its header says, zip and all in order."""
    stream = io.BytesIO()
    np.save(stream, make_images(3, 4, 4))
    return str(write_zip(folder / "x.npz", {"images.npy": stream.getvalue()[:-1]}))


def encrypted(folder: Path) -> str:
    path = write_zip(folder / "x.zip", {"a.png": png(make_images(2, 2))})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return str(path)


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


GREY = make_images(3, 4, 4)
PNG = png(GREY[0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(lambda folder: f"{folder}/no", "no file or folder", id="missing"),
        pytest.param(lambda folder: f"{folder}/no:train", "no file or folder", id="missing part"),
        pytest.param(lambda folder: f"{folder}/\0", "no file or folder", id="null byte"),
        pytest.param(lambda folder: "embedded:cifar", "there is: fashion-mnist", id="embedded"),
        pytest.param(fifo, "not a regular file", id="pipe"),
        pytest.param(save_bytes(b""), "none of", id="empty file"),
        pytest.param(save_bytes(PNG, "x.png"), "a folder of pictures", id="one picture"),
        pytest.param(save_bytes(b"\x1f\x8b1"), "cannot be used", id="gzip header"),
        pytest.param(save_npz(a=GREY), "no array named.*it has: a", id="npz key"),
        pytest.param(save_npz(x=GREY, data=GREY), "several arrays.*: x, data", id="npz keys"),
        pytest.param(save_npz(x=GREY, y=[1], labels=[1]), "the labels", id="npz label keys"),
        pytest.param(save_npz(x=GREY, y=[1, 2]), r"integers \[3\]", id="few labels"),
        pytest.param(save_npz(x=GREY, y=[0.5] * 3), "float64", id="float labels"),
        pytest.param(save_npz(x=GREY, y=[0, -1, 0]), "-1 for image 1", id="negative label"),
        pytest.param(
            save_npz(x=GREY, y=[0, 1, 0], class_names=["a"]), "every class 0..1", id="few names"
        ),
        pytest.param(
            save_npz(x=GREY, y=[0] * 3, class_names=[1]), "expected text", id="names of numbers"
        ),
        pytest.param(
            save_npz(x=GREY, y=[0] * 3, class_names=np.array(["a"], object)),
            "Python objects",
            id="pickled names",
        ),
        pytest.param(save_npz(x=np.array([None])), "Python objects", id="pickled images"),
        pytest.param(truncated_member, "its header says", id="short member"),
        pytest.param(save_npy(GREY.astype(np.float32)), "float32, expected uint8", id="float"),
        pytest.param(save_npy(GREY.reshape(3, 16)), r"\(3, 16\), expected", id="flat"),
        pytest.param(save_npy(make_images(5, 3072)), r"\(5, 3072\), expected", id="flat CIFAR"),
        pytest.param(save_npy(make_images(2, 3, 5, 3)), "may be", id="ambiguous"),
        pytest.param(save_npy(make_images(2, 5, 6, 7)), "transpose", id="no channels"),
        pytest.param(save_npy(make_images(0, 4, 4)), "empty", id="N = 0"),
        pytest.param(save_npy(np.asfortranarray(GREY)), "ascontiguousarray", id="columns first"),
        pytest.param(save_npy(np.array([None])), "Python objects", id="pickle"),
        pytest.param(save_bytes(b"\x93NUMPY\x03\x00"), "npy version", id="npy 3.0"),
        pytest.param(save_bytes(b"\x93NUMPY\x01\x00"), "cannot be used", id="npy cut"),
        pytest.param(save_bytes(idx(GREY)[:-1]), "too few", id="idx cut"),
        pytest.param(save_bytes(idx(GREY)[:6]), "10 bytes early", id="idx header cut"),
        pytest.param(save_bytes(idx(GREY) + b"x"), "too many", id="idx long"),
        pytest.param(save_bytes(gzip.compress(idx(GREY)[:-1])), "1 bytes early", id="gz idx cut"),
        pytest.param(save_bytes(gzip.compress(idx(GREY))[:-1]), "cannot be used", id="gz cut"),
        pytest.param(save_bytes(gzip.compress(idx(GREY) + b"x")), "bytes after", id="gz long"),
        pytest.param(
            save_bytes(gzip.compress(b"\0\0\x08\3" + b"\0\0\x0f\xff" * 3)),
            "too few",
            id="gz claim",
        ),
        pytest.param(save_bytes(b"\0\0\x08\4" + b"\xff" * 16), "expected", id="idx claim"),
        pytest.param(save_bytes(b"\0\0\x08\5"), "no idx file", id="idx axes"),
        pytest.param(save_bytes(b"\0\0\x07\1"), "no idx file", id="idx type"),
        pytest.param(save_bytes(idx(GREY.astype(np.int16))), "int16|>i2", id="idx int16"),
        pytest.param(save_bytes(idx(np.arange(3, dtype=np.uint8))), "labels, not", id="idx labels"),
        pytest.param(lambda folder: str(folder), "no pictures .0 files.", id="empty folder"),
        pytest.param(save_files(a_txt=b"x"), "no pictures .1 files.", id="text"),
        pytest.param(save_zip({}), "no pictures .0 files.", id="empty zip"),
        pytest.param(save_zip({"a.txt": b"x"}), "no pictures .1 files.", id="zip of text"),
        pytest.param(save_zip({"a.png": b"x"}), "a.png cannot be used", id="not a picture"),
        pytest.param(save_zip({"a.png": PNG[:50]}), "a.png cannot be used", id="picture cut"),
        pytest.param(save_zip({"c/a.png": PNG, "b.png": PNG}), "such as b.png", id="stray"),
        pytest.param(save_bytes(b"PK\3\4" + bytes(50)), "not a zip file", id="zip header"),
        pytest.param(encrypted, "a.png is encrypted", id="encrypted"),
        pytest.param(
            save_zip({"a.tiff": png(np.zeros((2, 2), np.float32), form="TIFF")}),
            "mode F, whose range",
            id="floats",
        ),
        pytest.param(
            save_zip({"a.tiff": png(np.zeros((2, 2), np.int32), form="TIFF")}),
            "mode I, whose range",
            id="32 bits",
        ),
    ],
)
def test_malformed_sources_are_one_clear_error(
    tmp_path: Path, make: Callable[[Path], str], says: str
) -> None:
    with pytest.raises(SourceError, match=says):
        read(open_source(make(tmp_path)))


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    write_folder(tmp_path, {"x.npy": b"", "a.png": PNG})
    np.savez(tmp_path / "x.npz", images=GREY)
    for spec, says in [
        (str(tmp_path), "idx and .npy"),
        (f"{tmp_path}/x.npz", "idx and .npy"),
        ("embedded:fashion-mnist", "its own labels"),
        ("hf:mnist", "its own labels"),
    ]:
        with pytest.raises(SourceError, match=says):
            open_source(spec, labels="y.npy")
    with pytest.raises(SourceError, match="no part 'train'; it has: none to choose from"):
        open_source(f"{tmp_path / 'x.npz'}:train")
    np.save(tmp_path / "x.npy", GREY)
    with pytest.raises(SourceError, match="no parts to choose from"):
        open_source(f"{tmp_path / 'x.npy'}:train")
    with pytest.raises(SourceError, match=r"y\.npy cannot be used"):
        open_source(tmp_path / "x.npy", labels=tmp_path / "y.npy")


def test_a_huge_picture_in_a_zip_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("els.index.sources.pictures.MAX_PICTURE_BYTES", 1000)
    path = write_zip(tmp_path / "x.zip", {"a.png": bytes(1001), "big.txt": bytes(2000)})
    with pytest.raises(SourceError, match=r"a\.png has 1,001 bytes, more than the 1,000"):
        open_source(path)


def test_a_picture_that_changes_during_a_build(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": PNG})
    source = open_source(tmp_path)
    (tmp_path / "a.png").write_bytes(png(make_images(5, 5)))
    with pytest.raises(SourceError, match="keep the pictures unchanged"):
        read(source)
    (tmp_path / "a.png").unlink()
    with pytest.raises(SourceError, match=r"a\.png cannot be used"):
        read(source)


def samples() -> Iterator[tuple[str, bytes]]:
    """A small valid source of every kind of file."""
    stream = io.BytesIO()
    np.savez_compressed(stream, images=GREY, labels=[0, 1, 1], class_names=["a", "b"])
    yield "npz", stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, GREY)
    yield "npy", stream.getvalue()
    yield "idx", idx(GREY)
    yield "idx-gz", gzip.compress(idx(GREY), mtime=0)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number, form in itertools.product(range(2), ("PNG", "JPEG", "GIF")):
            name = f"class {number}/{form}.{form.lower()}"
            archive.writestr(zipfile.ZipInfo(name), png(GREY[number], form=form))
    yield "zip", stream.getvalue()


@pytest.mark.parametrize(("kind", "data"), list(samples()), ids=[k for k, _ in samples()])
def test_malformed_bytes_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "file"

    @settings(max_examples=100, deadline=None)
    @given(mutations(data))
    def check(mutated: bytes) -> None:
        path.write_bytes(mutated)
        try:
            images = read(open_source(path))
        except SourceError as error:
            assert str(path) in str(error)  # noqa: PT017
            return
        if kind in ("npz", "idx-gz"):
            np.testing.assert_array_equal(images[:, 0], GREY)

    check()


@pytest.mark.parametrize("name", ["1.png", "1.jpeg", "1.gif", "1.tiff", "1.bmp", "1.webp"])
def test_malformed_pictures_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / name
    form = name.split(".")[1].upper()

    @settings(max_examples=40, deadline=None)
    @given(mutations(png(make_images(9, 7, 3), form=form)))
    def check(mutated: bytes) -> None:
        path.write_bytes(mutated)
        try:
            read(open_source(path.parent))
        except SourceError as error:
            assert name in str(error)  # noqa: PT017

    check()
