"""One encoded picture: its size and mode from its header, its pixels as a viewer shows them.

PIL is imported on first use: opening a database does not need it. It warns of damage that changes
no pixel; callers ignore these warnings.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image, ImageFile

# Formats that PIL may try, whatever the name. All are decoded in this process (PIL starts
# Ghostscript for EPS); TGA is last, because nothing marks its beginning.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "TGA")
# Pixels of a picture: 8,192 x 8,192, which is 256 MiB as RGBA.
MAX_PIXELS = 1 << 26
# The modes of PIL that have transparency, whatever else the picture says.
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# The mode of PIL in which every picture of a mode is read, but for its transparency.
_MODE_OF = {
    **dict.fromkeys(("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"), "L"),
    **dict.fromkeys(
        ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"), "RGB"
    ),
}
# Tags of TIFF and EXIF (TIFF 6.0, sections 8 and 15).
_WIDTH = 256
_HEIGHT = 257
_BITS = 258
_ORIENTATION = 274
_TILE_WIDTH = 322
_TILE_HEIGHT = 323
# Where PIL keeps what may hold an orientation: EXIF, and XMP, of PNG or other formats.
_ORIENTED_BY = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
_PNG_ORIENTED_BY = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# What undoes an orientation, but for 1, which is upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# The place of the bits a channel in the header of a PNG.
_PNG_DEPTH = 24


def is_picture(name: str) -> bool:
    """Whether the end of a name is that of a format that is read (`FORMATS`)."""
    from PIL import Image

    return Image.registered_extensions().get(PurePosixPath(name).suffix.lower()) in FORMATS


def read_header(stream: IO[bytes]) -> tuple[str, bool, tuple[int, int]]:
    """Reads the size, mode and depth of a picture without its pixels.

    Args:
        stream: the encoded picture, seekable.

    Returns:
        Its mode without transparency, "L" or "RGB", whether it has some, and its (height, width)
        as a viewer shows it.

    Raises:
        ValueError: no picture of `FORMATS`, too many pixels, or values of no known range.
        Exception: whatever else PIL throws at damaged bytes.
    """
    with _opened(stream) as picture:
        if picture.mode not in _MODE_OF or (_is_deep(picture) and _top_level(picture) is None):
            raise ValueError(
                f"it has mode {picture.mode}, whose range of values is not known (convert it to "
                "8 bits a channel)"
            )
        width, height = picture.size
        if picture.format == "TIFF":
            # PIL swaps the size for the orientation, or not, by its version.
            tags = picture.tag_v2  # type: ignore[attr-defined]
            width, height = tags[_WIDTH], tags[_HEIGHT]
        if picture.format == "PNG" and _is_oriented_late(stream):
            picture.load()
        turned = _orientation(picture) in (5, 6, 7, 8)
        size = (width, height) if turned else (height, width)
        return _MODE_OF[picture.mode], _has_alpha(picture), size


def decode_picture(
    stream: IO[bytes], mode: str, background: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Decodes a picture (the first frame, if there are several), turned as its EXIF says.

    Args:
        stream: the encoded picture, seekable.
        mode: "L", "RGB" or "RGBA".
        background: (R, G, B) that shows through transparency, unless the mode has it.

    Returns:
        uint8 [C, H, W]; values of 16 bits are scaled to 8.

    Raises:
        ValueError: as `read_header`.
        Exception: whatever else PIL throws at damaged bytes.
    """
    from PIL import Image

    with _opened(stream) as picture:
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        colour: Image.Image = picture
        if _is_deep(picture):
            colour = _eight_bits(picture)
        if _has_alpha(colour):
            if picture.format == "PNG" and colour.mode in ("L", "RGB"):
                _scale_clear_colour(colour, stream)
            colour = colour.convert("RGBA")
            if mode != "RGBA":
                behind = Image.new("RGBA", colour.size, background)
                colour = Image.alpha_composite(behind, colour)
        if turn is not None:
            colour = colour.transpose(Image.Transpose[turn])
        pixels = np.asarray(colour.convert(mode))
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


@contextmanager
def _opened(stream: IO[bytes]) -> Iterator["ImageFile.ImageFile"]:
    from PIL import Image, UnidentifiedImageError

    Image.init()
    too_many = f"it has {{}} pixels, more than the {MAX_PIXELS:,} of the limit (scale it down)"
    try:
        # PIL may be built without some.
        picture = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no picture of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(too_many.format("far too many")) from error
    with picture:
        sizes = [picture.size]
        if picture.format == "TIFF":
            # A tile, which may be larger, is decoded whole.
            tags = picture.tag_v2  # type: ignore[attr-defined]
            sizes.append((tags.get(_TILE_WIDTH, 1), tags.get(_TILE_HEIGHT, 1)))
        for width, height in sizes:
            if width * height > MAX_PIXELS:
                raise ValueError(too_many.format(f"{height:,} x {width:,}"))
        yield picture


def _is_oriented_late(stream: IO[bytes]) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels, where PIL finds it only with those.

    The stream is where PIL leaves it: behind the length and kind of the first chunk of pixels.
    """
    place = stream.tell()
    stream.seek(place - 8)
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        start = b""
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            start = stream.read(min(length, max(map(len, _PNG_ORIENTED_BY))))
        if kind == b"eXIf" or start.startswith(_PNG_ORIENTED_BY):
            stream.seek(place)
            return True
        # Four bytes of check sum follow.
        stream.seek(length - len(start) + 4, os.SEEK_CUR)
    return False


def _orientation(picture: "ImageFile.ImageFile") -> int:
    """1 to 8, as EXIF numbers them; others mean nothing."""
    from PIL import Image

    if picture.format != "TIFF" and not _ORIENTED_BY & picture.info.keys():
        return 1
    try:
        # The base class: that of PNG decodes the whole picture.
        return int(Image.Image.getexif(picture).get(_ORIENTATION, 1))
    except Exception:
        # Damaged EXIF, which PIL reports by exceptions of many kinds, is ignored.
        return 1


def _has_alpha(picture: "Image.Image") -> bool:
    return picture.mode in _ALPHA_MODES or "transparency" in picture.info


def _is_deep(picture: "Image.Image") -> bool:
    return picture.mode.startswith("I")


def _top_level(picture: "ImageFile.ImageFile") -> int | None:
    """The value of white in a grey picture of more than 8 bits, if its format says."""
    if picture.format == "TIFF":
        bits: int = picture.tag_v2[_BITS][0]  # type: ignore[attr-defined]
        return (1 << bits) - 1 if picture.mode.startswith("I;16") else None
    # PIL scales those of other formats to 16 bits.
    return (1 << 16) - 1


def _eight_bits(picture: "ImageFile.ImageFile") -> "Image.Image":
    from PIL import Image

    top = _top_level(picture)
    assert top is not None
    levels = np.asarray(picture)
    scaled = np.multiply(levels, 255 / top, dtype=np.float32)
    np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled)
    grey = Image.fromarray(scaled.astype(np.uint8))
    if "transparency" not in picture.info:
        return grey
    alpha = np.where(levels == picture.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _scale_clear_colour(picture: "Image.Image", stream: IO[bytes]) -> None:
    """Scales the transparent colour of a PNG to 8 bits, which PIL does only with the pixels."""
    stream.seek(_PNG_DEPTH)
    depth = stream.read(1)[0]

    def scaled(level: int) -> int:
        return level >> 8 if depth == 16 else level * 255 // ((1 << depth) - 1)

    colour = picture.info["transparency"]
    picture.info["transparency"] = (
        tuple(map(scaled, colour)) if isinstance(colour, tuple) else scaled(colour)
    )
