"""The patch database: training images stored once; a patch is an address into them.

A database is a folder of three files that anyone can read without this package:
`images.npy` (uint8 [N, C, H, W]), `labels.npy` (int64 [N], if there are labels) and
`manifest.json`. It is opened by memory map, and nothing in it is ever unpickled.
"""

import hashlib
import json
import math
import operator
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from els.index.arrays import ArrayData, check_class_names, check_images, check_labels
from els.index.sources.source import ArraySource, ImageSource
from els.storage import files
from els.storage.manifests import checksum, package_version, sealed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from els.index.patches.build import IndexProgress
    from els.index.patches.index import PatchIndex

Progress = Callable[[int, int], object]
"""Called with (images done, images in all)."""

_FORMAT = "els-patch-database"
_VERSION = 1
_IMAGES = "images.npy"
_LABELS = "labels.npy"
_MANIFEST = "manifest.json"
_HEADER_BYTES = 192
_CHUNK_BYTES = 1 << 24
# Most classes that a message lists.
_MOST_LISTED = 20
# Digits of a content hash that messages show: enough to tell databases apart.
_SHOWN_DIGITS = 12
# Side of an image that `show` draws, and of the title above it, in inches.
_SHOWN_SIDE = 1.3
_SHOWN_TITLE = 0.35


class DatabaseError(ValueError):
    """A database is missing, damaged, of another format or newer version, or exists already."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class PatchDatabase:
    """Training images, read-only, with labels and a content hash.

    Made by `build` (on disk), `open` (from disk) and `from_arrays` (in memory), never directly.
    Image n's pixel (y, x) has the address ``(n * H + y) * W + x``, and so has the patch centred
    there. Pixels are stored as uint8 and mean ``v / 127.5 - 1`` (`els.index.decode`).

    Attributes:
        images: uint8 [N, C, H, W], read-only; an `np.memmap` unless made by `from_arrays`.
        labels: int64 [N], read-only, all >= 0; None for images without classes.
        class_names: name of class 0, 1, ...; None where they have none.
        num_classes: labels are below this number; 0 without labels.
        content_hash: SHA-256 (hex) of shape, labels and images, however they are stored.
        path: the folder, absolute; None for a database in memory.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    num_classes: int
    content_hash: str
    path: Path | None

    @classmethod
    def build(
        cls,
        images: ArrayData | ImageSource,
        labels: ArrayData | Sequence[int] | None = None,
        *,
        path: str | Path,
        class_names: Sequence[str] | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Writes a database, whole or not at all, and opens it.

        Images are streamed: a source (`els.index.open_source`) may be larger than memory.
        An interrupted build, even by SIGKILL, leaves nothing at `path`.

        Args:
            images: uint8 [N, C, H, W] or [N, H, W], C in 1..4, numpy or torch; or a source.
            labels: integers [N] >= 0; by default those of the source.
            path: the folder to make; its parents are made too.
            class_names: distinct names of classes 0, 1, ...; by default those of the source.
            overwrite: replace a database at `path`, which stays until the new one is complete.
            progress: called with (images done, images in all) after every chunk.

        Returns:
            The database, opened.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: an argument of the wrong shape, length or range.
            DatabaseError: `path` exists, or is not a database that may be replaced.
            SourceError: the source turned out to be damaged.
            DiskFullError: (an OSError) no room at `path`.
        """
        if isinstance(images, ImageSource):
            source = images
            if labels is None:
                labels = source.labels
                class_names = source.class_names if class_names is None else class_names
        else:
            source = ArraySource.of(check_images(images))
        checked = None if labels is None else check_labels(labels, source.count)
        names = check_class_names(class_names, checked)

        path = Path(path)
        _check_target(path, overwrite)
        shape = (source.count, *source.shape)
        sizes = _file_sizes(shape, labelled=checked is not None)
        files.require_space(path, sum(sizes.values()))
        with files.atomic_directory(path, overwrite=overwrite) as folder:
            digest = _start_hash(shape, checked)
            with (folder / _IMAGES).open("wb") as stream:
                stream.write(_npy_header("|u1", shape))
                for chunk in _checked_chunks(source, progress):
                    digest.update(chunk)
                    stream.write(chunk)
            if checked is not None:
                with (folder / _LABELS).open("wb") as stream:
                    stream.write(_npy_header("<i8", shape[:1]))
                    stream.write(checked.astype("<i8").data)
            _write_manifest(
                folder, shape, _count_classes(checked, names), names, digest.hexdigest()
            )
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a database at once, whatever its size.

        Checks the manifest, the format version, the file headers and the exact file sizes;
        `verify` reads everything.

        Args:
            path: the folder that `build` made.

        Returns:
            The database, memory-mapped.

        Raises:
            DatabaseError: there is none, or it is damaged, truncated, foreign or too new.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        shape: tuple[int, ...] = tuple(manifest["shape"])
        labelled = _LABELS in manifest["files"]
        return cls(
            images=_open_npy(path / _IMAGES, "|u1", shape),
            labels=_open_npy(path / _LABELS, "<i8", shape[:1]) if labelled else None,
            class_names=manifest["class_names"] and tuple(manifest["class_names"]),
            num_classes=manifest["num_classes"],
            content_hash=manifest["content_hash"],
            path=path.absolute(),
        )

    @classmethod
    def from_arrays(
        cls,
        images: ArrayData,
        labels: ArrayData | Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Self:
        """Makes a database in memory, from copies of the arguments.

        Args:
            images: uint8 [N, C, H, W] or [N, H, W], C in 1..4, numpy or torch.
            labels: integers [N] >= 0, or None.
            class_names: distinct names of classes 0, 1, ..., or None.

        Returns:
            A database without a path.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: an argument of the wrong shape, length or range.
        """
        pixels = np.array(check_images(images), order="C")
        checked = None if labels is None else check_labels(labels, len(pixels))
        names = check_class_names(class_names, checked)
        for array in (pixels, checked):
            if array is not None:
                array.setflags(write=False)
        digest = _content_hash(pixels, checked, progress=None)
        return cls(pixels, checked, names, _count_classes(checked, names), digest, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as its path; in memory, as its arrays."""
        if self.path is not None:
            return _opened_again, (self.path, self.content_hash)
        fields = (self.images, self.labels, self.class_names, self.num_classes, self.content_hash)
        return _made_again, fields

    def verify(self, progress: Progress | None = None) -> None:
        """Reads the whole database and compares it with its content hash.

        Args:
            progress: called with (images done, images in all) after every chunk.

        Raises:
            DatabaseError: the content is not what was built.
        """
        # Opened again: reading an old memory map of a file that was truncated is a bus error.
        now = self if self.path is None else PatchDatabase.open(self.path)
        found = _content_hash(now.images, now.labels, progress)
        if found != self.content_hash:
            where = self.path or "the database in memory"
            raise DatabaseError(
                f"{where} is damaged: its content hash is {found}, built as {self.content_hash}; "
                "check the disk and build it again (els build --overwrite)"
            )

    def build_index(
        self,
        patch_size: int,
        *,
        factory: str | None = None,
        memory: int = 4 * 10**9,
        threads: int | None = None,
        overwrite: bool = False,
        progress: "IndexProgress | None" = None,
    ) -> "PatchIndex":
        """Builds the FAISS index of all patches of one size, and opens it.

        See `els.index.patches.build.build_index`, which this calls.
        """
        from els.index.patches.build import build_index

        return build_index(
            self,
            patch_size,
            factory=factory,
            memory=memory,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
        )

    def open_index(self, patch_size: int) -> "PatchIndex":
        """Opens the index that `build_index` made; see `els.index.patches.index.open_index`."""
        from els.index.patches.index import open_index

        return open_index(self, patch_size)

    @property
    def index_sizes(self) -> tuple[int, ...]:
        """Patch sizes that have an index, ascending."""
        sizes = range(1, min(self.shape[1:]) + 1, 2)
        return tuple(size for size in sizes if self.path is not None and self.has_index(size))

    def has_index(self, patch_size: int) -> bool:
        """Whether there is an index of this patch size; `open_index` checks it."""
        from els.index.patches.files import index_folder

        return self.path is not None and index_folder(self, patch_size).exists()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def size_bytes(self) -> int:
        """Bytes of images and labels together."""
        return self.images.nbytes + (0 if self.labels is None else self.labels.nbytes)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        side = "x".join(map(str, self.shape))
        classes = f", {self.num_classes} classes" if self.labels is not None else ""
        return f"PatchDatabase({len(self)} images {side}{classes}, path={str(self.path)!r})"

    def _repr_html_(self) -> str | None:
        from els.index.drawing import MOST_INLINE, inline_html

        return inline_html(repr(self), [self.images[n] for n in _spread(MOST_INLINE, len(self))])

    @property
    def summary(self) -> str:
        """Number and shape of the images, path and the first digits of the content hash."""
        side = "x".join(map(str, self.shape))
        place = "in memory" if self.path is None else str(self.path)
        return f"{len(self):,} images {side}, {place}, content {short_hash(self.content_hash)}"

    def show(
        self,
        n: int = 32,
        *,
        indices: Sequence[int] | None = None,
        label: int | str | None = None,
        columns: int = 8,
    ) -> "Figure":
        """Draws some of the images, each with its number and class.

        Args:
            n: how many at most, evenly spread over the database, or over the class.
            indices: image numbers instead, in this order.
            label: of this class only: its number or name.
            columns: images in a row.

        Returns:
            A matplotlib figure, which notebooks show; `savefig` writes it.

        Raises:
            ValueError: a number out of range, an unknown class, or nothing to draw.
            RuntimeError: without matplotlib.
        """
        from els.index.drawing import draw_image, drawing

        if min(n, columns) < 1:
            raise ValueError(f"n={n} and columns={columns} must be at least 1")
        if indices is not None:
            if label is not None:
                raise ValueError("give indices or a label, not both")
            chosen = _check_range("indices", list(indices), len(self)).tolist()
        elif label is not None:
            members = self.class_members(self.class_numbers(label))
            chosen = members[_spread(n, len(members))].tolist()
        else:
            chosen = _spread(n, len(self))
        if not chosen:
            raise ValueError("indices is empty; give at least one image number")
        columns = min(columns, len(chosen))
        rows = -(-len(chosen) // columns)
        _, height, width = self.shape
        tall = _SHOWN_SIDE * height / width + _SHOWN_TITLE
        with drawing(_SHOWN_SIDE * columns, tall * rows) as figure:
            panels = list(figure.subplots(rows, columns, squeeze=False).flat)
            for panel in panels:
                panel.set_axis_off()
            for panel, number in zip(panels, chosen, strict=False):
                draw_image(panel, self.images[number], self._title(number), fontsize=8)
        return figure

    def _title(self, number: int) -> str:
        """Number and class of an image."""
        from els.storage.figures import printable

        if self.labels is None:
            return str(number)
        label = int(self.labels[number])
        name = self.class_names[label] if self.class_names else f"class {label}"
        return f"{number}: {printable(name)}"

    def class_numbers(self, labels: Any) -> Any:
        """Labels with the names of classes replaced by their numbers; all else as it is.

        Args:
            labels: a name or a list with names in it, as stored or, where that is not ambiguous, in
                any case; or numbers in any form.

        Raises:
            ValueError: no class has the name; the message lists those that there are.
        """
        if isinstance(labels, str):
            return self._class_number(labels)
        if isinstance(labels, list | tuple):
            return [self._class_number(each) if isinstance(each, str) else each for each in labels]
        return labels

    def _class_number(self, name: str) -> int:
        names = self.class_names or ()
        if name in names:
            return names.index(name)
        alike = [n for n, known in enumerate(names) if known.lower() == name.lower()]
        if len(alike) == 1:
            return alike[0]
        if not names:
            raise ValueError(
                f"class {name!r} was asked for, but the classes of this database have no names; "
                "give a number"
            )
        close = get_close_matches(name, names, n=_MOST_LISTED, cutoff=0.5)
        listed = [*close, *(known for known in names if known not in close)]
        more = ", ..." if len(listed) > _MOST_LISTED else ""
        raise ValueError(
            f"no class is called {name!r}; there are {', '.join(listed[:_MOST_LISTED])}{more}"
        )

    def class_members(self, label: int) -> NDArray[np.int64]:
        """Numbers of the images of one class.

        Args:
            label: the class, 0 <= label < num_classes.

        Returns:
            int64, ascending, at least one, read-only.

        Raises:
            ValueError: no labels here, or no image with this one.
        """
        if self.labels is None:
            raise ValueError(
                f"class {label!r} was asked for, but this database has no labels; build it again "
                "with labels, or ask for no class"
            )
        members = self._members.get(operator.index(label))
        if members is None:
            known = [
                f"{number} ({self.class_names[number]})" if self.class_names else str(number)
                for number in list(self._members)[:_MOST_LISTED]
            ]
            more = ", ..." if len(self._members) > _MOST_LISTED else ""
            raise ValueError(f"no image has label {label!r}; labels here: {', '.join(known)}{more}")
        return members

    @cached_property
    def _members(self) -> dict[int, NDArray[np.int64]]:
        assert self.labels is not None
        # A stable sort keeps image numbers ascending within a class.
        labels = np.asarray(self.labels)
        order = np.argsort(labels, kind="stable")
        order.setflags(write=False)
        known, starts = np.unique(labels[order], return_index=True)
        return dict(zip(known.tolist(), np.split(order, starts[1:]), strict=True))

    @overload
    def address(self, n: int, y: int, x: int) -> int: ...
    @overload
    def address(self, n: ArrayLike, y: ArrayLike, x: ArrayLike) -> NDArray[np.int64]: ...
    def address(self, n: ArrayLike, y: ArrayLike, x: ArrayLike) -> int | NDArray[np.int64]:
        """Addresses ``(n * H + y) * W + x`` of pixels.

        Args:
            n: image numbers, integers in 0..N-1.
            y: rows, integers in 0..H-1.
            x: columns, integers in 0..W-1; n, y, x broadcast together.

        Returns:
            int64 of the common shape; an int for three integers.

        Raises:
            ValueError: a coordinate outside the images.
        """
        _, height, width = self.shape
        image = _check_range("n", n, len(self))
        row = _check_range("y", y, height)
        column = _check_range("x", x, width)
        address = (image * height + row) * width + column
        if all(isinstance(each, int | np.integer) for each in (n, y, x)):
            return int(address)
        return np.asarray(address)

    @overload
    def locate(self, address: int) -> tuple[int, int, int]: ...
    @overload
    def locate(
        self, address: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
    def locate(
        self, address: ArrayLike
    ) -> tuple[int, int, int] | tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Image number, row and column of addresses: the inverse of `address`.

        Args:
            address: integers in 0..N*H*W-1.

        Returns:
            (n, y, x), int64, each of the shape of `address`; ints for one integer.

        Raises:
            ValueError: an address outside the database.
        """
        _, height, width = self.shape
        checked = _check_range("address", address, len(self) * height * width)
        row, x = np.divmod(checked, width)
        n, y = np.divmod(row, height)
        if isinstance(address, int | np.integer):
            return int(n), int(y), int(x)
        return np.asarray(n), np.asarray(y), np.asarray(x)


def _spread(n: int, count: int) -> list[int]:
    """At most n numbers below a count, evenly spread."""
    return [int(each) for each in np.linspace(0, count - 1, min(n, count))]


def short_hash(content_hash: str) -> str:
    """The first digits of a content hash, for messages."""
    return content_hash[:_SHOWN_DIGITS]


def _opened_again(path: Path, content_hash: str) -> PatchDatabase:
    """The database of a pickle, at its path."""
    db = PatchDatabase.open(path)
    if db.content_hash != content_hash:
        raise DatabaseError(
            f"{path} holds other images than when it was pickled: it was built again since; "
            "open it anew with PatchDatabase.open(path)"
        )
    return db


def _made_again(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...] | None,
    num_classes: int,
    content_hash: str,
) -> PatchDatabase:
    """The database of a pickle, in memory."""
    for array in (images, labels):
        if array is not None:
            array.setflags(write=False)
    return PatchDatabase(images, labels, class_names, num_classes, content_hash, None)


def _check_range(name: str, values: ArrayLike, stop: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= stop):
        raise ValueError(f"{name} must be in 0..{stop - 1}, got {array.min()}..{array.max()}")
    return array.astype(np.int64)


def _count_classes(labels: NDArray[np.int64] | None, names: tuple[str, ...] | None) -> int:
    if labels is None:
        return 0
    return len(names) if names is not None else int(labels.max()) + 1


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise DatabaseError(
            f"{path} exists already; choose another path, or replace it with overwrite=True "
            "(els build --overwrite)"
        )
    # Only a database is ever replaced, whatever `overwrite` says.
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        ours = isinstance(manifest, dict) and manifest.get("format") == _FORMAT
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise DatabaseError(
            f"{path} is not a patch database, so it is not overwritten; remove it yourself, or "
            "choose another path"
        )


def _checked_chunks(source: ImageSource, progress: Progress | None) -> Iterable[memoryview]:
    """The pixels of a source in storage order, checked against its announced shape."""
    done = 0
    for chunk in source.chunks(_images_per_chunk(source.shape)):
        if chunk.dtype != np.uint8 or chunk.shape[1:] != source.shape:
            raise ValueError(
                f"the source announced uint8 images {source.shape} but gave {chunk.dtype} "
                f"{chunk.shape[1:]}; its chunks() is wrong"
            )
        done += len(chunk)
        if done > source.count:
            break
        yield np.ascontiguousarray(chunk).data
        if progress:
            progress(done, source.count)
    if done != source.count:
        raise ValueError(
            f"the source announced {source.count} images but gave "
            f"{'more' if done > source.count else done}; its count or chunks() is wrong"
        )


def _images_per_chunk(shape: Sequence[int]) -> int:
    return max(1, _CHUNK_BYTES // math.prod(shape))


def _start_hash(shape: tuple[int, ...], labels: NDArray[np.int64] | None) -> "hashlib._Hash":
    dtype = "none" if labels is None else "int64"
    digest = hashlib.sha256(f"uint8 {list(shape)} labels {dtype}\n".encode())
    if labels is not None:
        digest.update(labels.astype("<i8").data)
    return digest


def _content_hash(
    images: NDArray[np.uint8], labels: NDArray[np.int64] | None, progress: Progress | None
) -> str:
    digest = _start_hash(images.shape, labels)
    for chunk in _checked_chunks(ArraySource.of(images), progress):
        digest.update(chunk)
    return digest.hexdigest()


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """A version 1.0 header of a length and layout that no numpy release will change."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (_HEADER_BYTES - 10).to_bytes(2, "little")
        + text.encode().ljust(_HEADER_BYTES - 11)
        + b"\n"
    )


def _file_sizes(shape: tuple[int, ...], *, labelled: bool) -> dict[str, int]:
    count, channels, height, width = shape
    sizes = {_IMAGES: _HEADER_BYTES + count * channels * height * width}
    return sizes | {_LABELS: _HEADER_BYTES + 8 * count} if labelled else sizes


def _open_npy(path: Path, dtype: str, shape: tuple[int, ...]) -> Any:
    header = _npy_header(dtype, shape)
    try:
        with path.open("rb") as stream:
            found = stream.read(len(header))
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    expected = len(header) + np.dtype(dtype).itemsize * math.prod(shape)
    if size != expected:
        raise _damaged(path, f"it has {size:,} bytes, the manifest says {expected:,}")
    if found != header:
        raise _damaged(path, "its header is not the one that was written")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise _unreadable(path, error) from error


def _write_manifest(
    folder: Path,
    shape: tuple[int, ...],
    num_classes: int,
    class_names: tuple[str, ...] | None,
    content_hash: str,
) -> None:
    # Without a time stamp: the same images make the same files, byte for byte.
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "shape": shape,
        "dtype": "uint8",
        "num_classes": num_classes,
        "class_names": class_names,
        "content_hash": content_hash,
        "files": _file_sizes(shape, labelled=num_classes > 0),
        "made_with": {
            "els-machine": package_version(),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    files.write_json(folder / _MANIFEST, sealed(manifest))


def _read_manifest(path: Path) -> dict[str, Any]:
    place = path / _MANIFEST
    try:
        manifest = json.loads(place.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.exists():
            raise DatabaseError(
                f"there is no database at {path}; make one with els build"
            ) from error
        raise DatabaseError(
            f"{path} is not a patch database (it has no {_MANIFEST}); give the folder that "
            "els build made"
        ) from error
    except OSError as error:
        raise _unreadable(place, error) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(place, f"it is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise DatabaseError(
            f"{place} is not of a patch database (its format is not {_FORMAT!r}); give the folder "
            "that els build made"
        )
    version = manifest.get("version")
    if type(version) is int and version > _VERSION:
        raise DatabaseError(
            f"{path} has format version {version}, this els-machine reads {_VERSION}; upgrade "
            "els-machine (pip install -U els-machine)"
        )
    if version != _VERSION or manifest.get("checksum") != checksum(manifest):
        raise _damaged(place, "its text does not match its checksum")
    if not _is_consistent(manifest):
        raise _damaged(place, "its fields contradict each other")
    return manifest


def _is_consistent(manifest: dict[str, Any]) -> bool:
    """Whether the fields are consistent; only a manifest that was edited is not."""
    match manifest:
        case {
            "shape": [int(), int(), int(), int()] as shape,
            "dtype": "uint8",
            "num_classes": int(classes),
            "class_names": None | list() as names,
            "content_hash": str(),
            "files": dict(sizes),
        }:
            named = names is None or all(isinstance(name, str) for name in names)
            return (
                min(shape) >= 1
                and shape[1] <= 4
                and named
                and (names is None or len(names) == classes)
                and sizes == _file_sizes(tuple(shape), labelled=classes > 0)
            )
        case _:
            return False


def _damaged(path: Path, reason: str) -> DatabaseError:
    return DatabaseError(
        f"{path} is damaged: {reason}; restore it from a copy, or build the database again"
    )


def _unreadable(path: Path, error: OSError) -> DatabaseError:
    return DatabaseError(
        f"{path} cannot be read ({error.strerror}); check the disk, its permissions and that no "
        "file of the database was moved"
    )
