"""The patch database: built whole or not at all, opened at once, refused when damaged."""

import copy
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import everything_in, file_size_limit
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import make_images, mutations

from els.index import DatabaseError, ImageSource, PatchDatabase, decode, encode
from els.index import database as module
from els.storage.files import DiskFullError
from els.storage.manifests import checksum


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 100)


@pytest.fixture
def built(tmp_path: Path) -> PatchDatabase:
    """Seven images 2 x 3 x 5 of classes 0, 2, 5."""
    labels = [2, 0, 5, 2, 2, 0, 5]
    return PatchDatabase.build(make_images(7, 2, 3, 5), labels, path=tmp_path / "db")


# Pixels


def test_decode_and_encode_are_inverse() -> None:
    levels = np.arange(256, dtype=np.uint8)
    values = decode(levels)
    assert values.dtype == np.float32
    assert values[0] == -1
    assert values[255] == 1
    np.testing.assert_allclose(values, np.arange(256) / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(encode(values), levels)
    np.testing.assert_array_equal(encode(torch.from_numpy(values)), levels)
    np.testing.assert_array_equal(decode(torch.from_numpy(levels)), values)


def test_encode_rounds_to_nearest_and_clips() -> None:
    middle = (np.arange(255) + 0.5) / 127.5 - 1
    np.testing.assert_array_equal(encode(middle - 1e-6), np.arange(255))
    np.testing.assert_array_equal(encode(middle + 1e-6), np.arange(1, 256))
    np.testing.assert_array_equal(encode(np.array([-np.inf, -1.1, 1.1, np.inf])), [0, 0, 255, 255])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        pytest.param(lambda: decode(np.zeros(2)), TypeError, "uint8.*float64", id="decode float"),
        pytest.param(lambda: encode(np.zeros(2, int)), TypeError, "floating", id="encode int"),
        pytest.param(lambda: encode(np.array([np.nan])), ValueError, "NaN", id="encode NaN"),
    ],
)
def test_wrong_pixels_are_refused(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


# What is stored


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 1, 1, 1), (3, 4, 5, 7), (37, 3, 9, 4), (6, 28, 28), (2, 2, 1, 300)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.usefixtures("small_chunks")
def test_round_trip(tmp_path: Path, shape: tuple[int, ...], labelled: bool) -> None:
    images = make_images(*shape)
    labels = np.arange(shape[0]) % 3 if labelled else None
    expected = images.reshape(shape[0], *((1, *shape[1:]) if len(shape) == 3 else shape[1:]))
    built = PatchDatabase.build(images, labels, path=tmp_path / "db")
    built.verify()
    for db in (
        built,
        PatchDatabase.open(str(tmp_path / "db")),
        PatchDatabase.from_arrays(images, labels),
    ):
        np.testing.assert_array_equal(db.images, expected)
        assert db.images.dtype == np.uint8
        assert not db.images.flags.writeable
        assert len(db) == shape[0]
        assert db.shape == expected.shape[1:]
        assert db.content_hash == built.content_hash
        assert db.size_bytes == images.nbytes + (8 * len(images) if labelled else 0)
        if labels is None:
            assert db.labels is None
            assert db.num_classes == 0
        else:
            assert db.labels is not None
            np.testing.assert_array_equal(db.labels, labels)
            assert db.labels.dtype == np.int64
            assert not db.labels.flags.writeable
    assert isinstance(built.images, np.memmap)
    assert built.path == tmp_path / "db"
    assert everything_in(tmp_path)[0] == "db"
    np.testing.assert_array_equal(np.load(tmp_path / "db" / "images.npy"), expected)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda a: a[::2], id="step"),
        pytest.param(lambda a: a[..., ::-1], id="mirror"),
        pytest.param(lambda a: a.transpose(0, 1, 3, 2), id="transpose"),
        pytest.param(lambda a: np.asfortranarray(a), id="fortran"),
        pytest.param(lambda a: torch.from_numpy(a).permute(0, 1, 3, 2), id="torch"),
    ],
)
@pytest.mark.usefixtures("small_chunks")
def test_layout_in_memory_does_not_matter(tmp_path: Path, view: Any) -> None:
    images = view(make_images(9, 2, 5, 6))
    db = PatchDatabase.build(images, torch.arange(len(images)), path=tmp_path / "db")
    np.testing.assert_array_equal(db.images, np.asarray(images))
    copy = PatchDatabase.from_arrays(np.ascontiguousarray(images), range(len(images)))
    assert db.content_hash == copy.content_hash


def test_from_arrays_copies() -> None:
    images, labels = make_images(2, 1, 3, 3), np.array([0, 1])
    db = PatchDatabase.from_arrays(images, labels)
    images[:], labels[:] = 0, 0
    db.verify()
    assert db.path is None
    assert "2 images 1x3x3, 2 classes" in repr(db)


def test_the_hash_tells_content_apart_but_not_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = make_images(4, 1, 4, 4), [0, 1, 0, 1]
    variants = [
        (images, labels),
        (images, None),
        (images, labels[::-1]),
        (images[::-1], labels),
        (images.reshape(4, 2, 2, 4), labels),
        (images.reshape(4, 1, 2, 8), labels),
    ]
    hashes = [PatchDatabase.from_arrays(*variant).content_hash for variant in variants]
    assert len(set(hashes)) == len(variants)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    assert PatchDatabase.from_arrays(images, labels, ["a", "b"]).content_hash == hashes[0]
    built = [PatchDatabase.build(images, labels, path=tmp_path / name) for name in "ab"]
    for name in ("images.npy", "labels.npy", "manifest.json"):
        first, second = ((tmp_path / db / name).read_bytes() for db in "ab")
        assert first == second
    assert built[0].content_hash == hashes[0]


def test_class_names_and_members(tmp_path: Path) -> None:
    names = ("left", "none of these", "grün", "\udcff")
    db = PatchDatabase.build(
        make_images(5, 3, 3), [2, 0, 2, 3, 0], class_names=names, path=tmp_path / "db"
    )
    assert db.class_names == names
    assert db.num_classes == 4
    np.testing.assert_array_equal(db.class_members(2), [0, 2])
    np.testing.assert_array_equal(db.class_members(0), [1, 4])
    assert db.class_members(0).dtype == np.int64
    assert not db.class_members(0).flags.writeable
    for label in (1, 4, -1):
        with pytest.raises(ValueError, match=rf"no image has label {label}.*0 \(left\), 2"):
            db.class_members(label)


def test_members_without_labels() -> None:
    with pytest.raises(ValueError, match="no labels"):
        PatchDatabase.from_arrays(make_images(2, 3, 3)).class_members(0)


def test_many_unnamed_classes_are_listed_in_part() -> None:
    db = PatchDatabase.from_arrays(make_images(50, 1, 1), np.arange(50) * 10**16)
    assert db.num_classes == 49 * 10**16 + 1
    with pytest.raises(ValueError, match=r"190000000000000000, \.\.\.$"):
        db.class_members(1)


@settings(deadline=None)
@given(st.data())
def test_addresses_round_trip(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    db = PatchDatabase.from_arrays(np.zeros(shape, np.uint8))
    addresses = np.arange(np.prod(shape))
    n, y, x = db.locate(addresses)
    for axis, found in zip(np.unravel_index(addresses, shape), (n, y, x), strict=True):
        np.testing.assert_array_equal(found, axis)
        assert found.dtype == np.int64
    np.testing.assert_array_equal(db.address(n, y, x), addresses)


def test_addresses_broadcast_and_refuse_what_is_outside(built: PatchDatabase) -> None:
    assert built.address(np.arange(7)[:, None], 2, np.arange(5)).shape == (7, 5)
    assert built.address(6, 2, 4) == 7 * 15 - 1
    assert built.address([], [], []).shape == (0,)
    outside: list[tuple[Any, str]] = [
        ((7, 0, 0), "n must be in 0..6"),
        ((0, -1, 0), "y must be in 0..2"),
        ((0, 0, [1, 5]), "x must be in 0..4"),
        ((0.5, 0, 0), "n must be integers"),
    ]
    for place, says in outside:
        with pytest.raises(ValueError, match=says):
            built.address(*place)
    for address in ([0, -1], 105):
        with pytest.raises(ValueError, match=r"address must be in 0..104"):
            built.locate(address)


def test_progress_and_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2 * 9)
    calls: list[tuple[int, int]] = []
    db = PatchDatabase.build(
        make_images(5, 3, 3), path=tmp_path / "db", progress=lambda *call: calls.append(call)
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]
    db.verify(progress=lambda *call: calls.append(call))
    assert calls[3:] == calls[:3]


# What is refused


@pytest.mark.parametrize(
    ("images", "labels", "names", "error", "says"),
    [
        pytest.param([[[0]]], None, None, TypeError, "got list", id="list"),
        pytest.param("db.zip", None, None, TypeError, "open_source", id="path"),
        pytest.param(np.zeros((2, 3, 3)), None, None, TypeError, "encode", id="float"),
        pytest.param(torch.zeros(2, 3, 3).bfloat16(), None, None, TypeError, "bfloat16", id="bf16"),
        pytest.param(np.zeros((2, 3, 3), np.int8), None, None, TypeError, "got int8", id="int8"),
        pytest.param(np.zeros((3, 3), np.uint8), None, None, ValueError, r"\(3, 3\)", id="2 axes"),
        pytest.param(np.zeros((1,) * 5, np.uint8), None, None, ValueError, "reshape", id="5 axes"),
        pytest.param(make_images(2, 5, 6, 6), None, None, ValueError, r"1\.\.4", id="C = 5"),
        pytest.param(make_images(2, 6, 6, 3), None, None, ValueError, "transpose", id="NHWC"),
        pytest.param(make_images(0, 6, 6), None, None, ValueError, "at least one", id="N = 0"),
        pytest.param(make_images(1, 1, 0, 6), None, None, ValueError, "at least one", id="H = 0"),
        pytest.param(make_images(2, 0, 6, 6), None, None, ValueError, "at least one", id="C = 0"),
        pytest.param(make_images(2, 3, 3), [0], None, ValueError, r"\[2\]", id="few labels"),
        pytest.param(make_images(2, 3, 3), [[0, 1]], None, ValueError, r"\[2\]", id="2-d labels"),
        pytest.param(make_images(2, 3, 3), 1, None, ValueError, r"\[2\]", id="one label"),
        pytest.param(make_images(2, 3, 3), [0, -1], None, ValueError, "-1 for image 1", id="-1"),
        pytest.param(
            make_images(1, 3, 3),
            np.array([2**63], np.uint64),
            None,
            ValueError,
            "9223372036854775808",
            id="huge label",
        ),
        pytest.param(make_images(2, 3, 3), [0, 1.5], None, TypeError, "float64", id="float labels"),
        pytest.param(make_images(2, 3, 3), ["a", "b"], None, TypeError, "integers", id="text"),
        pytest.param(make_images(2, 3, 3), [0, None], None, TypeError, "object", id="None label"),
        pytest.param(make_images(2, 3, 3), None, ["a"], ValueError, "labels", id="names alone"),
        pytest.param(make_images(2, 3, 3), [0, 2], ["a"], ValueError, "give 3", id="few names"),
        pytest.param(make_images(2, 3, 3), [0, 0], "a", TypeError, "strings", id="one name"),
        pytest.param(make_images(2, 3, 3), [0, 0], [1], TypeError, "strings", id="int name"),
        pytest.param(make_images(2, 3, 3), [0, 1], ["a", "a"], ValueError, "distinct", id="twice"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
    tmp_path: Path, images: Any, labels: Any, names: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        PatchDatabase.build(images, labels, class_names=names, path=tmp_path / "db")
    with pytest.raises(error, match=says):
        PatchDatabase.from_arrays(images, labels, names)
    assert everything_in(tmp_path) == []


class WrongSource(ImageSource):
    """Announces three images 1 x 2 x 2 and gives something else."""

    given: tuple[NDArray[Any], ...] = ()

    def chunks(self, size: int) -> Iterator[NDArray[Any]]:
        yield from self.given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        pytest.param((make_images(2, 1, 2, 2),), "gave 2", id="few"),
        pytest.param((make_images(2, 1, 2, 2),) * 2, "gave more", id="many"),
        pytest.param((make_images(3, 1, 2, 3),), r"\(1, 2, 3\)", id="shape"),
        pytest.param((np.zeros((3, 1, 2, 2)),), "float64", id="dtype"),
    ],
)
def test_a_source_that_breaks_its_word(
    tmp_path: Path, given: tuple[NDArray[Any], ...], says: str
) -> None:
    source = WrongSource(count=3, shape=(1, 2, 2))
    object.__setattr__(source, "given", given)
    with pytest.raises(ValueError, match=says):
        PatchDatabase.build(source, path=tmp_path / "db")
    assert everything_in(tmp_path) == []


def test_an_existing_path_is_refused_or_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "db"
    old, new = make_images(3, 4, 4), make_images(2, 1, 5, 5, seed=1)
    opened = PatchDatabase.build(old, [0, 1, 2], path=path)
    with pytest.raises(DatabaseError, match=r"exists already.*--overwrite"):
        PatchDatabase.build(new, path=path)
    np.testing.assert_array_equal(PatchDatabase.open(path).images[:, 0], old)
    db = PatchDatabase.build(new, path=path, overwrite=True)
    np.testing.assert_array_equal(db.images, new)
    np.testing.assert_array_equal(opened.images[:, 0], old, "an open database stays readable")
    assert everything_in(tmp_path) == ["db", "db/images.npy", "db/manifest.json"]


def test_a_path_that_appears_during_a_build_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "db"

    def appear(done: int, total: int) -> None:
        PatchDatabase.build(make_images(1, 1, 1), path=path)

    with pytest.raises(FileExistsError, match="meanwhile"):
        PatchDatabase.build(make_images(9, 3, 3), path=path, progress=appear)
    assert len(PatchDatabase.open(path)) == 1
    assert everything_in(tmp_path) == ["db", "db/images.npy", "db/manifest.json"]


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", '{"format": "other"}', "[" * 10**5],
    ids=["no manifest", "empty", "a list", "foreign", "deep JSON"],
)
def test_what_is_not_a_database_is_never_overwritten(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "keep").touch()
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DatabaseError, match="not overwritten"):
        PatchDatabase.build(make_images(1, 1, 1), path=tmp_path, overwrite=True)
    assert (tmp_path / "keep").exists()


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Changes fields as a careful forger would, check sum and all."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["checksum"] = changes.get("checksum", checksum(manifest))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def truncate(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(shutil.rmtree, "there is no database", id="nothing there"),
        pytest.param(lambda db: (db / "manifest.json").unlink(), "no manifest", id="no manifest"),
        pytest.param(lambda db: (db / "images.npy").unlink(), "images.npy", id="no images"),
        pytest.param(lambda db: (db / "labels.npy").unlink(), "labels.npy", id="no labels"),
        pytest.param(lambda db: truncate(db / "images.npy"), r"401 bytes.*402", id="short"),
        pytest.param(lambda db: truncate(db / "labels.npy"), "labels.npy", id="short labels"),
        pytest.param(lambda db: append(db / "images.npy"), "403 bytes", id="long"),
        pytest.param(lambda db: (db / "images.npy").write_bytes(b""), "0 bytes", id="empty"),
        pytest.param(
            lambda db: (db / "images.npy").write_bytes(bytes(402)), "header", id="zeroed header"
        ),
        pytest.param(lambda db: truncate(db / "manifest.json", 2), "JSON", id="cut manifest"),
        pytest.param(
            lambda db: (db / "manifest.json").write_bytes(b"\xff{}"), "JSON", id="not UTF-8"
        ),
        pytest.param(
            lambda db: (db / "manifest.json").write_text("[" * 10**5), "JSON", id="deep JSON"
        ),
        pytest.param(lambda db: (db / "manifest.json").write_text("[]"), "format", id="a list"),
        pytest.param(lambda db: rewrite_manifest(db, format="x"), "format", id="foreign"),
        pytest.param(lambda db: rewrite_manifest(db, version=2), "upgrade", id="newer"),
        pytest.param(lambda db: rewrite_manifest(db, version="1"), "checksum", id="version text"),
        pytest.param(lambda db: rewrite_manifest(db, version=True, checksum=""), "check", id="sum"),
        pytest.param(lambda db: rewrite_manifest(db, shape=[7, 2, 3]), "contradict", id="3 axes"),
        pytest.param(lambda db: rewrite_manifest(db, shape=[7, 2, 3, 6]), "contra", id="shape"),
        pytest.param(lambda db: rewrite_manifest(db, num_classes=0), "contradict", id="classes"),
        pytest.param(lambda db: rewrite_manifest(db, class_names=[1]), "contradict", id="names"),
    ],
)
def test_damage_is_refused(built: PatchDatabase, damage: Any, says: str) -> None:
    assert built.path is not None
    damage(built.path)
    with pytest.raises(DatabaseError, match=f"{built.path.name}.*") as caught:
        PatchDatabase.open(built.path)
    assert caught.match(says)


def test_a_file_is_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseError, match="not a patch database"):
        PatchDatabase.open(tmp_path / "file")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_verify_finds_a_flipped_bit(built: PatchDatabase, name: str) -> None:
    assert built.path is not None
    data = bytearray((built.path / name).read_bytes())
    data[-1] ^= 1
    (built.path / name).write_bytes(data)
    db = PatchDatabase.open(built.path)
    with pytest.raises(DatabaseError, match=r"content hash.*--overwrite"):
        db.verify()
    truncate(built.path / name)
    with pytest.raises(DatabaseError, match="damaged"):
        db.verify()


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "manifest.json"])
def test_malformed_files_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "db"
    images, labels = make_images(3, 1, 2, 2), np.array([0, 1, 1])
    PatchDatabase.build(images, labels, class_names=["a", "b"], path=path)
    original = (path / name).read_bytes()

    @settings(max_examples=100, deadline=None)
    @given(mutations(original))
    def check(data: bytes) -> None:
        (path / name).write_bytes(data)
        try:
            db = PatchDatabase.open(path)
            db.verify()
        except DatabaseError as error:
            assert str(path) in str(error)  # noqa: PT017
            return
        np.testing.assert_array_equal(db.images, images)
        np.testing.assert_array_equal(db.labels, labels)
        assert db.class_names == ("a", "b")

    check()


# What the machine does to it


def test_open_does_not_read_the_images(tmp_path: Path) -> None:
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("no /proc/self/io to count reads with")
    count, side = 32_000_000, 32
    shape = (count, 3, side, side)
    with (tmp_path / "images.npy").open("wb") as stream:
        stream.write(module._npy_header("|u1", shape))
        stream.truncate(module._HEADER_BYTES + count * 3 * side * side)
    module._write_manifest(tmp_path, shape, 0, None, "0" * 64)

    def bytes_read() -> int:
        return int(counters.read_text().split()[1])

    before = bytes_read()
    db = PatchDatabase.open(tmp_path)
    assert bytes_read() - before < 1 << 16
    assert db.size_bytes == 98_304_000_000
    assert db.images[count - 1, 2, side - 1, side - 1] == 0
    last = [int(axis) for axis in db.locate(count * side * side - 1)]
    assert last == [count - 1, side - 1, side - 1]


@pytest.mark.usefixtures("small_chunks")
def test_a_size_limit_leaves_nothing_or_the_old(tmp_path: Path) -> None:
    path = tmp_path / "db"
    big = make_images(100, 1, 32, 32)
    for overwrite, left in [(False, []), (True, ["db", "db/images.npy", "db/manifest.json"])]:
        if overwrite:
            PatchDatabase.build(big[:1], path=path)
        with file_size_limit(1 << 15), pytest.raises(DiskFullError, match=str(path)):
            PatchDatabase.build(big, path=path, overwrite=overwrite)
        assert everything_in(tmp_path) == left
    PatchDatabase.open(path).verify()


@pytest.mark.usefixtures("small_chunks")
def test_a_disk_that_is_full_or_fills_up(small_disk: Path) -> None:
    path, images = small_disk / "db", make_images(500, 1, 32, 32)
    with pytest.raises(DiskFullError, match="bytes are needed"):
        PatchDatabase.build(np.broadcast_to(images[:1], (2000, 1, 32, 32)), path=path)

    def fill(done: int, total: int) -> None:
        if done == 1:
            (small_disk / "filler").write_bytes(bytes(900_000))

    with pytest.raises(DiskFullError, match="nothing half-written was left"):
        PatchDatabase.build(images, path=path, progress=fill)
    assert everything_in(small_disk) == ["filler"]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PatchDatabase.build(make_images(2, 3, 3), path=tmp_path / "db", progress=interrupt)
    assert everything_in(tmp_path) == []


BUILD = """
import itertools, sys, time
import numpy as np
from els.index import PatchDatabase, database

database._CHUNK_BYTES = 1 << 10
print("ready", flush=True)
for number in itertools.count() if sys.argv[2] == "overwrite" else [0]:
    images = np.full((40, 1, 32, 32), number % 256, np.uint8)
    PatchDatabase.build(images, np.arange(40), path=sys.argv[1],
        overwrite=sys.argv[2] == "overwrite", progress=lambda done, total: time.sleep(0.001))
print("done", flush=True)
"""


@pytest.mark.parametrize("seed", range(8), ids=lambda seed: f"kill {seed}")
def test_a_killed_build_leaves_nothing_or_a_whole_database(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "db"
    mode = "overwrite" if seed % 2 else "new"
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path), mode], stdout=subprocess.PIPE, text=True
    ) as build:
        assert build.stdout is not None
        assert build.stdout.readline() == "ready\n"
        time.sleep(random.Random(seed).uniform(0, 0.08 if mode == "new" else 0.4))
        build.send_signal(signal.SIGKILL)
    if path.exists():
        db = PatchDatabase.open(path)
        db.verify()
        assert len(np.unique(db.images)) == 1
    rebuilt = PatchDatabase.build(make_images(3, 2, 2), path=path, overwrite=True)
    rebuilt.verify()
    assert everything_in(tmp_path) == ["db", "db/images.npy", "db/manifest.json"]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_pickle_of_a_database_on_disk_is_its_path(tmp_path: Path, labelled: bool) -> None:
    images = np.arange(4 * 3 * 16 * 16, dtype=np.uint8).reshape(4, 3, 16, 16)
    db = PatchDatabase.build(images, [0, 1, 1, 0] if labelled else None, path=tmp_path / "db")
    pickled = pickle.dumps(db)
    assert len(pickled) < 1000 < images.nbytes
    for again in (pickle.loads(pickled), copy.deepcopy(db), copy.copy(db)):
        assert again.path == db.path
        assert not again.images.flags.writeable
        assert np.array_equal(again.images, images)
    PatchDatabase.build(255 - images, path=tmp_path / "db", overwrite=True)
    with pytest.raises(DatabaseError, match="other images than when it was pickled"):
        pickle.loads(pickled)


def test_a_pickle_of_a_database_in_memory_is_read_only() -> None:
    images = np.arange(4 * 9, dtype=np.uint8).reshape(4, 1, 3, 3)
    db = PatchDatabase.from_arrays(images, [0, 2, 1, 0], class_names=["a", "b", "c"])
    for again in (pickle.loads(pickle.dumps(db)), copy.deepcopy(db), copy.copy(db)):
        assert np.array_equal(again.images, db.images)
        assert np.array_equal(again.labels, db.labels)
        assert again.class_names == db.class_names
        assert again.content_hash == db.content_hash
        assert not again.images.flags.writeable
        assert not again.labels.flags.writeable
