"""Folders and zip files of pictures."""

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from els.index.sources.decoding import FORMATS, decode_picture, is_picture, read_header
from els.index.sources.foreign import (
    DAMAGED,
    SourceError,
    explained,
    open_member,
    open_regular,
)
from els.index.sources.labels import (
    LABEL_FILES,
    MAX_LABEL_FILE_BYTES,
    ClassLabels,
    class_labels,
    read_label_files,
)
from els.index.sources.selection import Selection
from els.index.sources.source import (
    MAX_PICTURE_BYTES,
    PARTS,
    PICTURE_REMEDY,
    ImageSource,
    OpenPictures,
    PictureSource,
    Preparation,
)

_BLACK = (0, 0, 0)


# Pictures


def open_pictures(
    path: Path, part: str | None, preparation: Preparation, selection: Selection
) -> ImageSource:
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
    return survey(str(path), names, opener, preparation, selection, labels, class_names)


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
        if len(tops) > 1 and set(PARTS).issuperset(top.lower() for top in tops):
            raise SourceError(
                f"{where} has several parts: {', '.join(tops)}; choose one, as in "
                f"{where}:{tops[0]} (split={tops[0]})"
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
    yield lambda number: open_regular(path / names[number], MAX_PICTURE_BYTES)


@contextmanager
def _open_zip(path: Path, names: Sequence[str]) -> Iterator[Callable[[int], IO[bytes]]]:
    with explained(path, DAMAGED):
        archive = zipfile.ZipFile(path)
    with archive:
        yield lambda number: open_member(archive, names[number], MAX_PICTURE_BYTES)


def survey(
    where: str,
    names: Sequence[str],
    opener: OpenPictures,
    preparation: Preparation,
    selection: Selection,
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...] | None,
) -> PictureSource:
    """Reads the header of every picture that is taken: their common size and mode.

    Where bad ones are left out, their pixels are read as well.
    """
    modes: set[str] = set()
    first: tuple[str, tuple[int, int]] | None = None
    transparent = stretched = 0
    numbers, notes = selection.of(where, len(names), labels)
    taken, bad = [], []
    resize = preparation.resize
    with opener() as read, warnings.catch_warnings(action="ignore"):
        for number in range(len(names)) if numbers is None else numbers.tolist():
            name = names[number]
            try:
                with explained(f"{where}: {name}", PICTURE_REMEDY), read(number) as stream:
                    mode, has_alpha, size = read_header(stream)
                    if preparation.skip_bad:
                        stream.seek(0)
                        decode_picture(io.BytesIO(stream.read()), mode, _BLACK)
            except SourceError as error:
                if not preparation.skip_bad:
                    raise
                bad.append(str(error))
                continue
            taken.append(number)
            modes.add(mode)
            transparent += has_alpha
            stretched += preparation.stretches(size)
            first = first or (name, size)
            if resize is None and size != first[1]:
                raise SourceError(
                    f"{where}: {name} is {size[0]} x {size[1]} (height x width), {first[0]} is "
                    f"{first[1][0]} x {first[1][1]}; scale all with resize=N"
                )
    if first is None:
        raise SourceError(f"{where} has no picture that can be read: {bad[0]}")
    height, width = resize or first[1]
    keeps = transparent > 0 and preparation.background is None
    background = preparation.background or _BLACK
    is_coloured = transparent > 0 and len(set(background)) > 1
    common = "RGBA" if keeps else "L" if modes == {"L"} and not is_coloured else "RGB"
    if transparent and not keeps:
        notes += (
            f"{transparent:,} of {len(taken):,} pictures have transparency, and "
            f"#{bytes(background).hex()} shows through; background= takes another colour, "
            "background=keep keeps it as a fourth channel",
        )
    if stretched:
        notes += (
            f"{stretched:,} of {len(taken):,} pictures are stretched to {height} x {width}; "
            "crop=True keeps their proportions",
        )
    if bad:
        listed = "".join(f"\n  {reason}" for reason in bad)
        notes += (f"left out, because they cannot be read ({len(bad):,}):{listed}",)
    return PictureSource(
        count=len(taken),
        shape=(len(common), height, width),
        labels=None if labels is None else labels[taken],
        class_names=class_names,
        notes=notes,
        where=where,
        names=[names[number] for number in taken],
        opener=partial(_renumbered, opener, taken),
        mode=common,
        preparation=preparation,
    )


@contextmanager
def _renumbered(
    opener: OpenPictures, numbers: Sequence[int]
) -> Iterator[Callable[[int], IO[bytes]]]:
    with opener() as read:
        yield lambda number: read(numbers[number])
