"""Datasets of the Hugging Face hub."""

import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from els.index.sources.foreign import (
    SourceError,
    explained,
    open_regular,
)
from els.index.sources.labels import (
    LABEL_COLUMNS,
    class_labels,
)
from els.index.sources.pictures import survey
from els.index.sources.selection import Selection
from els.index.sources.source import (
    MAX_PICTURE_BYTES,
    ImageSource,
    Preparation,
    checked_names,
)

# The Hugging Face library


def open_hugging_face(
    name: str, part: str | None, preparation: Preparation, selection: Selection
) -> ImageSource:
    """A data set of the `datasets` library."""
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise SourceError(
            f"hf:{name} needs the package datasets; install it with pip install 'els-machine[hf]'"
        ) from error
    split = part or "train"
    where = f"hf:{name}:{split}"
    with explained(where, "check the name, the split and the network"):
        rows = library.load_dataset(name, split=split)
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
            class_names = checked_names(f"{where}: {label_column}", given, labels)
    opener = partial(_open_rows, rows, image_column)
    return survey(where, names, opener, preparation, selection, labels, class_names)


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
        return open_regular(Path(picture["path"]), MAX_PICTURE_BYTES)

    yield read
