"""Class labels from files beside pictures."""

import csv
import io
import json
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from els.index.sources.foreign import SourceError, explained

# dataset.json is that of StyleGAN's and EDM's dataset_tool, the others are those of Hugging Face
# image folders.
LABEL_FILES = ("dataset.json", "metadata.csv", "metadata.jsonl", "metadata.parquet")
# Columns that hold the label of a picture; the first that is there counts.
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "target")
# Bytes of such a file; that of the 1,281,167 pictures of ImageNet has 45 MB.
MAX_LABEL_FILE_BYTES = 1 << 27
_NAME_COLUMN = "file_name"
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

ClassLabels = tuple[NDArray[np.int64] | None, tuple[str, ...] | None]
"""int64 [N] >= 0 or None, and the name of class 0, 1, ... or None."""


def read_label_files(
    where: str,
    files: Sequence[str],
    pictures: Collection[str],
    chosen: Sequence[str],
    opener: Callable[[str], AbstractContextManager[IO[bytes]]],
) -> ClassLabels:
    """Reads the labels of pictures from the files beside them.

    Args:
        where: the folder or zip, for messages.
        files: the label files in it that lie above chosen pictures.
        pictures: every picture in it.
        chosen: the pictures to label.
        opener: opens one of the files.

    Returns:
        The labels of the chosen pictures and their class names; (None, None) if the files have no
        labels.

    Raises:
        SourceError: a file is damaged, does not fit the pictures, or has labels of no class.
    """
    given: dict[str, object] = {}
    for file in files:
        remedy = "correct that file, or move it away if it is not about these pictures"
        with explained(f"{where}: {file}", remedy), opener(file) as stream:
            for name, label in _entries(posixpath.basename(file), stream):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
                if path not in pictures:
                    raise ValueError(f"it names {name!r}, which is not among the pictures")
                if path in given:
                    raise ValueError(f"{path} has a second label")
                given[path] = label
    if all(label is None for label in given.values()):
        return None, None
    missing = [name for name in chosen if name not in given]
    if missing:
        raise SourceError(
            f"{where}: {', '.join(files)} has no label for {missing[0]} ({len(missing):,} of "
            f"{len(chosen):,} pictures have none); add them, or take those pictures out"
        )
    return class_labels(f"{where}: {', '.join(files)}", [given[name] for name in chosen], chosen)


def class_labels(where: str, values: Sequence[object], items: Sequence[str]) -> ClassLabels:
    """Makes class labels of integers, or of names (numbered in sorted order).

    Args:
        where: what the values are in, for messages.
        values: one for each item. None or -1 throughout is how data sets mark a part without
            labels.
        items: what the values belong to, for messages.

    Returns:
        The labels and, for names, the class names; (None, None) for a part without labels.

    Raises:
        SourceError: values of another kind, of several kinds, or out of range.
    """
    of_kind: dict[str, str] = {}
    for value, item in zip(values, items, strict=True):
        of_kind.setdefault("none" if value is None else type(value).__name__, item)
    match sorted(of_kind):
        case ["none"]:
            return None, None
        case ["str"]:
            names = tuple(sorted({str(value) for value in values}))
            numbers: dict[object, int] = {name: number for number, name in enumerate(names)}
            return np.array([numbers[value] for value in values], np.int64), names
        case ["int"]:
            integers: list[Any] = list(values)
            if set(integers) == {-1}:
                return None, None
            for place in (integers.index(min(integers)), integers.index(max(integers))):
                if not 0 <= integers[place] < 2**63 - 1:
                    raise SourceError(
                        f"{where}: {items[place]} has the label {integers[place]}; number the "
                        "classes from 0"
                    )
            return np.array(integers, np.int64), None
    kinds = ", ".join(f"{kind} ({item})" for kind, item in sorted(of_kind.items()))
    raise SourceError(
        f"{where}: labels of type {kinds}; only integers throughout, or names throughout, are "
        "supported (no vectors, no fractions, no gaps): give one class for each picture"
    )


def _entries(kind: str, stream: IO[bytes]) -> Iterator[tuple[str, object]]:
    """The labels of a file: (name of a picture, label); none if it has no labels."""
    match kind:
        case "dataset.json":
            content = json.load(stream)
            pairs = content.get("labels", 0) if isinstance(content, dict) else 0
            if pairs is None:
                return
            if not isinstance(pairs, list):
                raise ValueError('it is not {"labels": [[file name, label], ...]}, nor of null')
            for pair in _some(pairs):
                if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
                    raise ValueError(f"{str(pair)[:80]} is not [file name, label]")
                yield pair[0], pair[1]
        case "metadata.csv":
            with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
                reader = csv.DictReader(text, strict=True)
                reader.fieldnames = _columns(reader.fieldnames or ())
                for row in _some(reader):
                    name, label = _labelled(row)
                    yield name, _typed(label.strip()) if isinstance(label, str) else label
        case "metadata.jsonl":
            with io.TextIOWrapper(stream, "utf-8-sig") as lines:
                rows = (json.loads(line) for line in lines if line.strip())
                yield from map(_labelled, _some(rows))
        case _:
            raise ValueError("it is not read; save it as metadata.csv or metadata.jsonl")


def _columns(names: Sequence[str]) -> list[str]:
    """The columns of a table by their known names, however they are capitalised."""
    columns = [name.strip() for name in names]
    for known in (_NAME_COLUMN, *LABEL_COLUMNS):
        alike = [place for place, name in enumerate(columns) if name.lower() == known]
        if len(alike) > 1:
            raise ValueError(f"it has {len(alike)} columns {known!r}")
        for place in alike:
            columns[place] = known
    return columns


def _some(rows: Iterable[Any]) -> Iterator[Any]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError("it names no picture")


def _labelled(row: Any) -> tuple[str, object]:
    if not isinstance(row, dict) or not isinstance(row.get(_NAME_COLUMN), str):
        raise ValueError(f"a row has no {_NAME_COLUMN}: {str(row)[:80]}")
    column = next((name for name in LABEL_COLUMNS if name in row), None)
    return row[_NAME_COLUMN], None if column is None else row[column]


def _typed(text: str) -> object:
    """The value of a cell of an untyped table: an integer, a number, a name or None."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    return text or None
