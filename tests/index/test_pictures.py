"""One picture: turned as its EXIF says, transparency, 16 bits; what is never opened."""

import gzip
import io
import os
import socket
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import (
    STRANGE,
    claiming,
    encoded,
    make_images,
    open_rows,
    png,
    read,
    write_folder,
    write_zip,
)
from PIL import Image, ImageOps

from els.index import SourceError, open_source


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(
    pixels: NDArray[np.uint8], width: int, depth: int, colour: int, clear: bytes = b""
) -> bytes:
    """A PNG of packed rows of any depth, with a transparent colour."""
    header = struct.pack(">IIBBBBB", width, len(pixels), depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", clear) if clear else b""]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def only(folder: Path, data: bytes, name: str = "a.png") -> NDArray[np.uint8]:
    """The only picture of a folder, [C, H, W]."""
    return read(open_source(write_folder(folder, {name: data})))[0]


# Orientation

LYING = Image.fromarray(make_images(6, 8, 3))
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0%c\0\0\0\0\0\0\0"
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def behind_the_pixels(*chunks: bytes) -> bytes:
    whole = encoded(LYING)
    return whole[:-12] + b"".join(chunks) + whole[-12:]


def exif_text(orientation: int) -> bytes:
    data = EXIF % orientation
    return b"Raw profile type exif\0\0" + zlib.compress(
        f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()
    )


ORIENTED: dict[str, Callable[[int], bytes]] = {
    "png": lambda o: encoded(LYING, exif=EXIF % o),
    "jpg": lambda o: encoded(LYING, "JPEG", exif=EXIF % o),
    "webp": lambda o: encoded(LYING, "WEBP", exif=EXIF % o, lossless=True),
    "tiff": lambda o: encoded(LYING, "TIFF", tiffinfo={274: o}),
    "lzw.tiff": lambda o: encoded(LYING, "TIFF", tiffinfo={274: o}, compression="tiff_lzw"),
    "xmp.jpg": lambda o: encoded(LYING, "JPEG", xmp=XMP % o),
    "late.png": lambda o: behind_the_pixels(
        chunk(b"tEXt", b"date\0x"), chunk(b"eXIf", EXIF[6:] % o)
    ),
    "text.png": lambda o: behind_the_pixels(chunk(b"zTXt", exif_text(o))),
    "xmp.png": lambda o: behind_the_pixels(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % o)
    ),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ORIENTED)
def test_pictures_are_turned_as_viewers_turn_them(
    tmp_path: Path, form: str, orientation: int
) -> None:
    data = ORIENTED[form](orientation)
    with Image.open(io.BytesIO(data)) as picture:
        seen = np.asarray(ImageOps.exif_transpose(picture))
    assert seen.shape == ((6, 8, 3) if orientation < 5 else (8, 6, 3))
    np.testing.assert_array_equal(only(tmp_path, data, f"a.{form}"), np.moveaxis(seen, -1, 0))


@pytest.mark.parametrize("where", ["folder", "zip", "hf", "resized"])
def test_the_size_is_that_of_the_turned_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    standing = LYING.transpose(Image.Transpose.ROTATE_90)
    entries = {"a.png": encoded(LYING), "b.png": encoded(standing, exif=EXIF % 6)}
    match where:
        case "folder":
            source = open_source(write_folder(tmp_path, entries))
        case "zip":
            source = open_source(write_zip(tmp_path / "x.zip", entries))
        case "hf":
            rows = [{"bytes": data, "path": None} for data in entries.values()]
            source = open_rows(monkeypatch, {}, image=rows)
        case _:
            source = open_source(write_folder(tmp_path, entries), resize=(6, 8))
    images = read(source)
    np.testing.assert_array_equal(images[0], images[1])


def test_pictures_that_are_alike_but_for_their_turn_are_refused(tmp_path: Path) -> None:
    entries = {"a.png": encoded(LYING), "b.png": encoded(LYING, exif=EXIF % 6)}
    with pytest.raises(SourceError, match=r"b\.png is 8 x 6 .*, a\.png is 6 x 8"):
        open_source(write_folder(tmp_path, entries))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0xxxxxxxx", EXIF[:20], EXIF % 200, EXIF % 0],
    ids=["empty", "cut", "no header", "cut entry", "200", "0"],
)
def test_damaged_exif_stops_nothing(tmp_path: Path, form: str, exif: bytes) -> None:
    image = only(tmp_path, encoded(LYING, form, exif=exif), f"a.{form.lower()}")
    assert image.shape == (3, 6, 8)


# Transparency

HALF = np.array([[[200, 0, 0, 255], [9, 8, 7, 0], [0, 0, 0, 51]]], np.uint8)
SHOWN = [[200, 0, 0], [255, 255, 255], [204, 204, 204]]


def with_palette() -> bytes:
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    picture.putpalette(HALF[0, :, :3].tobytes())
    return encoded(picture, transparency=bytes([255, 0, 51]))


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        pytest.param(png(HALF), SHOWN, id="RGBA"),
        pytest.param(with_palette(), SHOWN, id="palette"),
        pytest.param(
            png(np.array([[[9, 0], [200, 255], [0, 51]]], np.uint8)),
            [[255] * 3, [200] * 3, [204] * 3],
            id="LA",
        ),
        pytest.param(
            raw_png(np.array([[3, 4, 5]], np.uint8), 3, 8, 0, b"\0\4"),
            [[3] * 3, [255] * 3, [5] * 3],
            id="L",
        ),
        pytest.param(
            raw_png(np.array([[0x34, 0xF0]], np.uint8), 3, 4, 0, b"\0\4"),
            [[51] * 3, [255] * 3, [255] * 3],
            id="4 bits",
        ),
        pytest.param(
            raw_png(np.array([[0b00011000]], np.uint8), 3, 2, 0, b"\0\1"),
            [[0] * 3, [255] * 3, [170] * 3],
            id="2 bits",
        ),
        pytest.param(
            raw_png(np.array([[0b01000000]], np.uint8), 3, 1, 0, b"\0\0"),
            [[255] * 3, [255] * 3, [255] * 3],
            id="1 bit",
        ),
        pytest.param(
            raw_png(np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9]], np.uint8), 3, 8, 2, b"\0\4\0\5\0\6"),
            [[1, 2, 3], [255] * 3, [7, 8, 9]],
            id="RGB",
        ),
        pytest.param(
            raw_png(np.array([[0, 1, 0x12, 0x34, 0xFF, 0xFF]], np.uint8), 3, 16, 0, b"\x12\x34"),
            [[0] * 3, [255] * 3, [255] * 3],
            id="16 bits",
        ),
        pytest.param(
            raw_png(
                np.array([[1, 0, 2, 0, 3, 0, 9, 9, 8, 8, 7, 7, 0, 0, 0, 0, 0, 0]], np.uint8),
                3,
                16,
                2,
                bytes([9, 9, 8, 8, 7, 7]),
            ),
            [[1, 2, 3], [255] * 3, [0] * 3],
            id="RGB of 16 bits",
        ),
    ],
)
def test_transparency_shows_white_among_opaque_pictures(
    tmp_path: Path, data: bytes, shown: list[list[int]]
) -> None:
    opaque = png(np.zeros((1, 3, 3), np.uint8))
    source = open_source(write_folder(tmp_path, {"a.png": data, "b.png": opaque}))
    np.testing.assert_array_equal(read(source)[0, :, 0].T, shown)
    (tmp_path / "b.png").unlink()
    assert read(open_source(tmp_path, background="keep")).shape == (1, 4, 1, 3)


def test_alpha_is_kept_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(HALF))
    (image,) = read(open_source(tmp_path, background="keep"))
    np.testing.assert_array_equal(image, np.moveaxis(HALF, -1, 0))


# More than 8 bits

DEEP = np.array([[0, 257, 128, 129], [65535, 32896, 65407, 65406]], np.uint16)
SCALED = [[0, 1, 0, 1], [255, 128, 255, 254]]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", encoded(Image.fromarray(DEEP))),
        ("a.tiff", encoded(Image.fromarray(DEEP), "TIFF")),
        ("b.tiff", encoded(Image.frombytes("I;16B", (4, 2), DEEP.astype(">u2").tobytes()), "TIFF")),
        ("a.pgm", b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes()),
    ],
    ids=["PNG", "TIFF", "TIFF, big-endian", "PGM"],
)
def test_16_bits_are_scaled_to_8(tmp_path: Path, name: str, data: bytes) -> None:
    np.testing.assert_array_equal(only(tmp_path, data, name), [SCALED])


def test_16_bits_among_8(tmp_path: Path) -> None:
    entries = {"a.png": png(DEEP), "b.png": png(np.array(SCALED, np.uint8))}
    images = read(open_source(write_folder(tmp_path, entries)))
    np.testing.assert_array_equal(images[0], images[1])


# What is never opened


@pytest.mark.parametrize("behind_a_link", [False, True], ids=["itself", "link"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("what", ["picture", "source", "labels", "labels beside"])
def test_only_regular_files_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, what: str, behind_a_link: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    np.save("train-images-idx3.npy", make_images(3, 4, 4))
    Path("folder").mkdir()
    name = {"picture": "folder/a.png", "labels beside": "train-labels-idx1.npy"}.get(what, "x")
    path = Path("real") if behind_a_link else Path(name)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case _:
            path.symlink_to("/dev/zero")
    if behind_a_link:
        Path(name).symlink_to(path.absolute())
    spec, labels = {
        "picture": ("folder", None),
        "source": ("x", None),
        "labels": ("train-images-idx3.npy", "x"),
        "labels beside": ("train-images-idx3.npy", None),
    }[what]
    with pytest.raises(SourceError, match=f"{name} is not a regular file"):
        open_source(spec, labels=labels)


@pytest.mark.parametrize("form", STRANGE)
@pytest.mark.parametrize("write", [write_folder, write_zip], ids=["folder", "zip"])
def test_other_formats_are_not_tried(tmp_path: Path, write: Any, form: str) -> None:
    for name in ("innocent.png", "a.jpg"):
        path = write(tmp_path / name, {name: STRANGE[form]})
        with pytest.raises(SourceError, match=f"{name} cannot be used: it is no picture of"):
            open_source(path)
    with pytest.raises(SourceError, match="no pictures"):
        open_source(write(tmp_path / form, {f"a.{form.lower()}": STRANGE[form]}))


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    with pytest.raises(SourceError, match="no picture of"):
        open_source(write_folder(tmp_path, {"innocent.png": STRANGE["EPS"]}))


def tiled(width: int, height: int) -> bytes:
    """A TIFF of 8 x 4 pixels in one compressed tile of a claimed size."""
    tags = {256: 8, 257: 4, 258: 8, 259: 5, 262: 1, 277: 1, 322: width, 323: height, 324: 200}
    tags[325] = 64
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(200)


@pytest.mark.parametrize(
    "data",
    [
        claiming(13000, 13000),
        claiming(8193, 8192),
        claiming(1, (1 << 26) + 1),
        claiming(2**31 - 1, 2**31 - 1),
        b"P5 13000 13000 255\n",
        tiled(65536, 30000),
        b"GIF89a" + struct.pack("<HH", 60000, 60000) + bytes(3) + b",\0\0\0\0\1\0\1\0\0\2\2L\1\0;",
    ],
    ids=["13000 x 13000", "one too many", "a line", "huge", "PPM", "TIFF tile", "GIF"],
)
@pytest.mark.parametrize("resize", [None, 4])
def test_too_many_pixels_are_refused_undecoded(
    tmp_path: Path, data: bytes, resize: int | None
) -> None:
    with pytest.raises(SourceError, match=r"a\.png cannot be used: it has .* pixels, more than"):
        open_source(write_folder(tmp_path, {"a.png": data}), resize=resize)


def test_the_limit_of_pixels_itself_is_no_error(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, {"a.png": claiming(8192, 8192)}))
    assert source.shape == (1, 8192, 8192)


def test_pil_does_not_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        only(tmp_path, encoded(Image.fromarray(make_images(3, 4))))
    assert not said


def test_a_huge_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_folder(tmp_path, {"a.png": b""}) / "a.png"
    os.truncate(path, (1 << 28) + 1)
    with pytest.raises(SourceError, match=r"a\.png has 268,435,457 bytes, more than"):
        open_source(tmp_path)


@pytest.mark.parametrize("write", [write_folder, write_zip], ids=["folder", "zip"])
def test_errors_are_one_line_whatever_names_hold(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "x", {"a\n\x1b[2J\xad.png": b"x"})
    with pytest.raises(SourceError, match=r"a\\n\\x1b\[2J\\xad\.png cannot be used"):
        open_source(path)


def test_errors_do_not_quote_the_data(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(npy_header("-" * 5000))
    with pytest.raises(SourceError, match=r"-\.\.\.; it seems damaged") as error:
        open_source(tmp_path / "x.npy")
    assert len(str(error.value)) < 500 + len(str(tmp_path))


# Headers that lie


def npy_header(text: str, length: int | None = None) -> bytes:
    body = text.encode()
    return b"\x93NUMPY\2\0" + struct.pack("<I", len(body) if length is None else length) + body


def described(shape: str, descr: str = "|u1", fortran: bool = False) -> bytes:
    return npy_header(f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}}}\n")


HOSTILE: dict[str, bytes] = {
    "header of 1.5 GB": npy_header("{}", 1_500_000_000),
    "nested": npy_header("(" * 9000),
    "unary": npy_header("-" * 9000 + "1"),
    "negative": described("(-3, 4, 4)"),
    "negative pair": described("(-3, -4, 4)"),
    "huge": described("(1000000000000, 4, 4)"),
    "beyond int64": described("(10**30, 4, 4)".replace("10**30", "1" + "0" * 30)),
    "image": described("(1, 100000, 100000)"),
    "true": described("(True, True, True)"),
    "object": described("(3, 4, 4)", "|O"),
    "text": described("(3, 4, 4)", "<U4"),
    "columns first": described("(3, 4, 4)", fortran=True),
    "float": described("(3, 4, 4)", ">f8"),
    "sub-array": described("(3, 4, 4)", "(1000000000,)u1"),
    "idx": b"\0\0\x08\3" + struct.pack(">3I", 2**32 - 1, 4, 4),
    "idx image": b"\0\0\x08\3" + struct.pack(">3I", 1, 2**32 - 1, 2**32 - 1),
    "idx, empty": b"\0\0\x08\3" + bytes(12),
}

LIMITED = """
import resource, sys, warnings
from pathlib import Path
import numpy, PIL.Image
from els.index import SourceError, open_source
from els.index.sources.decoding import is_picture

PIL.Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
warnings.simplefilter("error")
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        for chunk in open_source(path).chunks(100):
            pass
    except SourceError as error:
        assert "\\n" not in str(error), error
    else:
        print("accepted", path.name)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 100_000, f"{grown} KB more"
"""


def test_headers_that_lie_cost_little(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, data in HOSTILE.items():
        (folder / name).write_bytes(data)
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        write_zip(folder / f"{name}.npz", {"images.npy": data})
        # Sparse, so that there is as much as the header claims.
        os.truncate(folder / name, 2_000_000_000)
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stdout


def lying_zip(file_size: int, compress_size: int, method: int = 0, flags: int = 0) -> bytes:
    """An npz whose directory says something else of its only member than is there."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("images.npy", described("(3, 4, 4)") + bytes(48))
    data = bytearray(stream.getvalue())
    at = data.index(b"PK\1\2")
    struct.pack_into("<HH", data, at + 8, flags, method)
    struct.pack_into("<II", data, at + 20, compress_size, file_size)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lying_zip(2**31, 2**31), "claims 2,147,483,648 bytes, more than"),
        (lying_zip(2**31, 100), "claims 2,147,483,648 bytes, more than"),
        (lying_zip(2**31, 100, zipfile.ZIP_DEFLATED), "claims 2,147,483,648 bytes, more than"),
        (lying_zip(100, 100, zipfile.ZIP_BZIP2), "packed by method 12"),
        (lying_zip(100, 100, zipfile.ZIP_LZMA), "packed by method 14"),
        (lying_zip(100, 100, flags=1), "is encrypted"),
    ],
    ids=["stored", "stored in less", "deflated", "bzip2", "lzma", "encrypted"],
)
def test_directories_of_zips_that_lie(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(SourceError, match=rf"x\.npz: images\.npy (is|claims)? ?.*{says}"):
        open_source(tmp_path / "x.npz")


def test_numpy_does_not_warn(tmp_path: Path) -> None:
    header = npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (3L, 4L, 4L)}\n")
    (tmp_path / "x.npy").write_bytes(header + bytes(48))
    assert open_source(tmp_path / "x.npy").shape == (1, 4, 4)


@pytest.mark.parametrize("dtype", [">i4", "<u2", "|i1", ">u8"])
def test_labels_of_any_byte_order(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "x.npy", make_images(3, 4, 4))
    np.save(tmp_path / "y.npy", np.array([2, 0, 1], dtype))
    source = open_source(tmp_path / "x.npy", labels=tmp_path / "y.npy")
    np.testing.assert_array_equal(source.labels, [2, 0, 1])


# Damage


def valid_sets() -> dict[str, dict[str, bytes]]:
    """Small sets of pictures, each a folder of files."""
    names = [f"{i}.png" for i in range(2)]
    plain = dict(zip(names, map(png, make_images(2, 5, 6)), strict=True))
    turned = encoded(LYING, "JPEG", exif=EXIF % 6)
    return {
        "dataset.json": plain | {"dataset.json": b'{"labels": [["0.png", 1], ["1.png", 0]]}'},
        "metadata.csv": plain | {"metadata.csv": b"file_name,label\n0.png,cat\n1.png,dog\n"},
        "metadata.jsonl": plain
        | {"metadata.jsonl": b'{"file_name": "0.png", "label": 1}\n{"file_name": "1.png"}\n'},
        "a.jpg": {"a.jpg": turned},
        "a.png": {"a.png": encoded(LYING, exif=EXIF % 6)},
        "b.png": {"b.png": with_palette()},
        "c.png": {"c.png": ORIENTED["late.png"](6)},
        "d.png": {"d.png": png(DEEP)},
        "a.tiff": {"a.tiff": ORIENTED["lzw.tiff"](6)},
        "a.webp": {"a.webp": ORIENTED["webp"](6)},
    }


FUZZED = """
import resource, shutil, sys, warnings
from pathlib import Path
import numpy as np
from PIL import Image
from els.index import SourceError, open_source
Image.init()
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
warnings.simplefilter("error")
random = np.random.default_rng(int(sys.argv[2]))
root = Path(sys.argv[1])
refused = 0
for path in [path for path in sorted(root.rglob("*")) if path.is_file()] * int(sys.argv[3]):
    whole = path.read_bytes()
    data = bytearray(whole)
    for _ in range(random.integers(1, 4)):
        data[random.integers(len(data))] = random.integers(256)
    if random.integers(4) == 0:
        del data[random.integers(len(data)):]
    path.write_bytes(data)
    try:
        for chunk in open_source(root / path.relative_to(root).parts[0]).chunks(10):
            pass
    except SourceError as error:
        assert "\\n" not in str(error), error
        refused += 1
    path.write_bytes(whole)
print(refused)
"""


@pytest.mark.parametrize("seed", [1])
def test_damage_is_one_error_or_harmless(tmp_path: Path, seed: int) -> None:
    for name, entries in valid_sets().items():
        write_folder(tmp_path / name, entries)
        write_zip(tmp_path / f"{name}.zip", entries)
    result = subprocess.run(
        [sys.executable, "-c", FUZZED, str(tmp_path), str(seed), "10"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50
