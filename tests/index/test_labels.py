"""Labels beside pictures: dataset.json, metadata.csv, metadata.jsonl, and columns of data sets."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import (
    ClassLabel,
    Label,
    csv_table,
    dataset_json,
    four_pictures,
    make_images,
    open_rows,
    pictures,
    png,
    read,
    write_folder,
    write_zip,
)

from els.index import PatchDatabase, SourceError, open_source

Writer = Callable[[Path, dict[str, bytes]], Path]


def jsonl(rows: dict[str, Label], column: str = "label") -> bytes:
    return "\n".join(
        json.dumps({"file_name": k, "text": "ü", column: v}) for k, v in rows.items()
    ).encode()


FILES = {"dataset.json": dataset_json, "metadata.csv": csv_table, "metadata.jsonl": jsonl}
WRITERS = [
    pytest.param(write_folder, id="folder"),
    pytest.param(write_zip, id="zip"),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("prefix", ["", "set/"], ids=["top", "below"])
@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([3, 0, 3, 1], [3, 0, 3, 1], None),
        (["cat", "ant", "cat", "ü"], [1, 0, 1, 2], ("ant", "cat", "ü")),
        ([-1, -1, -1, -1], None, None),
    ],
    ids=["integers", "names", "none"],
)
def test_labels_beside_pictures(
    tmp_path: Path,
    write: Writer,
    file: str,
    prefix: str,
    labels: list[Label],
    numbers: list[int] | None,
    names: tuple[str, ...] | None,
) -> None:
    entries = four_pictures(prefix)
    inside = [name.removeprefix(prefix) for name in entries]
    # Their order is not that of the pictures.
    rows = dict(reversed(list(zip(inside, labels, strict=True))))
    source = open_source(write(tmp_path / "x", entries | {f"{prefix}{file}": FILES[file](rows)}))
    assert source.class_names == names
    if numbers is None:
        assert source.labels is None
    else:
        np.testing.assert_array_equal(source.labels, numbers)
    np.testing.assert_array_equal(read(source)[:, 0], make_images(4, 3, 5))


@pytest.mark.parametrize("header", ["file_name, label", "File_Name,Label"])
def test_columns_however_they_are_written(tmp_path: Path, header: str) -> None:
    pictures = four_pictures()
    rows = "".join(f"{name}, {label}\n" for name, label in zip(pictures, "abba", strict=True))
    entries = pictures | {"metadata.csv": f"{header}\n{rows}".encode()}
    source = open_source(write_zip(tmp_path / "x", entries))
    assert source.class_names == ("a", "b")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1, 0]


def test_columns_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    entries = four_pictures() | {"metadata.csv": b"file_name,label,Label\n1.png,1,2\n"}
    with pytest.raises(SourceError, match="2 columns 'label'"):
        open_source(write_zip(tmp_path / "x", entries))


@pytest.mark.parametrize("form", ["./{}/{}", "{}//{}", "/{}/{}", "{}\\{}", ".\\{}\\{}"])
@pytest.mark.parametrize("labelled", [True, False])
def test_zips_separate_folders_in_many_ways(tmp_path: Path, form: str, labelled: bool) -> None:
    images = make_images(4, 3, 5)
    names = [("b", "1.png"), ("a", "2.png"), ("a", "1.png"), ("b", "2.png")]
    entries = {form.format(*name): png(image) for name, image in zip(names, images, strict=True)}
    if labelled:
        table = "file_name,label\n" + "".join(f"{'/'.join(name)},7\n" for name in names)
        entries["metadata.csv"] = table.encode()
    source = open_source(write_zip(tmp_path / "x", entries))
    assert source.labels is not None
    assert source.labels.tolist() == ([7] * 4 if labelled else [0, 0, 1, 1])
    found = np.concatenate(list(source.chunks(4)))
    assert np.array_equal(found.reshape(4, -1), images[[2, 1, 0, 3]].reshape(4, -1))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "entry",
    [
        ("dataset.json", b'{"labels": null}'),
        (
            "metadata.jsonl",
            "\n".join(json.dumps({"file_name": n}) for n in four_pictures()).encode(),
        ),
        ("metadata.csv", "\n".join(["file_name", *four_pictures()]).encode()),
    ],
    ids=lambda entry: entry[0],
)
def test_a_file_without_labels_means_none(
    tmp_path: Path, write: Writer, entry: tuple[str, bytes]
) -> None:
    source = open_source(write(tmp_path / "x", four_pictures() | dict([entry])))
    assert (source.labels, source.class_names) == (None, None)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("file", ["metadata.csv", "metadata.jsonl"])
def test_a_part_has_its_own_labels(tmp_path: Path, write: Writer, file: str) -> None:
    images = pictures(4, 2, 2)
    names = ["test/1.png", "test/2.png", "train/a/1.png", "train/b/2.png"]
    entries = dict(zip(names, map(png, images), strict=True))
    entries[f"train/{file}"] = FILES[file]({"a/1.png": "x", "./b/2.png": "y"})
    entries[f"test/{file}"] = FILES[file]({"1.png": 5, "2.png": 0})
    path = write(tmp_path / "x", entries)
    train, test = open_source(f"{path}:train"), open_source(f"{path}:test")
    np.testing.assert_array_equal(train.labels, [0, 1])
    assert train.class_names == ("x", "y")
    np.testing.assert_array_equal(test.labels, [5, 0])
    np.testing.assert_array_equal(read(test)[:, 0], images[:2])


def test_one_file_may_label_every_part(tmp_path: Path) -> None:
    entries = dict(zip(["test/1.png", "train/1.png"], map(png, pictures(2, 2, 2)), strict=True))
    entries["metadata.csv"] = csv_table({"train/1.png": 4, "test/1.png": 7})
    np.testing.assert_array_equal(
        open_source(f"{write_folder(tmp_path, entries)}:train").labels, [4]
    )


def test_several_files_may_label_folders(tmp_path: Path) -> None:
    entries = four_pictures() | {
        "00000/metadata.csv": csv_table({"img0.png": 2, "img1.png": 0}),
        "00001/metadata.jsonl": jsonl({"img2.png": 1, "img3.png": 1}),
    }
    np.testing.assert_array_equal(open_source(write_folder(tmp_path, entries)).labels, [2, 0, 1, 1])


@pytest.mark.parametrize("column", ["label", "labels", "fine_label", "class", "category", "target"])
def test_columns_of_labels(tmp_path: Path, column: str) -> None:
    rows: dict[str, Label] = dict(zip(four_pictures(), [1, 0, 2, 2], strict=True))
    for file, write in [("metadata.csv", csv_table), ("metadata.jsonl", jsonl)]:
        folder = write_folder(tmp_path / file, four_pictures() | {file: write(rows, column)})
        np.testing.assert_array_equal(open_source(folder).labels, [1, 0, 2, 2])


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        pytest.param([0, 1, 2], "no label for 00001/img3.png .1 of 4", id="missing"),
        pytest.param([0, 1, 2, 1, 0], "names 'other.png', which is not", id="stray"),
        pytest.param([0, 1, -1, 0], "00001/img2.png has the label -1; number", id="negative"),
        pytest.param([0, 1, 2**63, 0], "has the label 9223372036854775808", id="huge"),
        pytest.param([0, "cat", 0, 0], "int .00000/img0.png., str .00000/img1.png", id="mixed"),
        pytest.param([0, 1, 0.5, 0], "float .00001/img2.png.*no fractions", id="fractions"),
    ],
)
def test_labels_that_do_not_fit(
    tmp_path: Path, write: Writer, file: str, labels: list[Any], says: str
) -> None:
    names = [*four_pictures(), "other.png"]
    rows = dict(zip(names, labels, strict=False))
    path = write(tmp_path / "x", four_pictures() | {file: FILES[file](rows)})
    with pytest.raises(SourceError, match=says) as error:
        open_source(path)
    assert f"{path}: {file}" in str(error.value)
    assert "\n" not in str(error.value)


ROWS: dict[str, Label] = dict.fromkeys(four_pictures(), 0)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("dataset.json", b"[", "cannot be used"),
        ("dataset.json", b"[]", "it is not {"),
        ("dataset.json", b"{}", "it is not {"),
        ("dataset.json", b'{"labels": {"a": 1}}', "it is not {"),
        ("dataset.json", b'{"labels": []}', "names no picture"),
        ("dataset.json", b'{"labels": ["ab"]}', "ab is not .file name, label"),
        ("dataset.json", b'{"labels": [[1, 1]]}', "is not .file name, label"),
        ("dataset.json", b'{"labels": [' * 5000, "cannot be used"),
        ("dataset.json", dataset_json({name: [0.5, 1] for name in ROWS}), "list .*no vectors"),
        ("dataset.json", dataset_json(dict.fromkeys(ROWS, True)), "bool"),
        ("dataset.json", dataset_json(ROWS | {"00001/img3.png": None}), "none .00001/img3"),
        ("dataset.json", dataset_json(ROWS | {"00000//img0.png": 1}), "img0.png has a second"),
        ("dataset.json", dataset_json(ROWS | {"../00000/img0.png": 1}), "not among"),
        ("dataset.json", dataset_json(ROWS | {"/00000/img0.png": 1}), "not among"),
        ("metadata.csv", b"", "names no picture"),
        ("metadata.csv", b"file_name,label", "names no picture"),
        ("metadata.csv", b"image,label\na.png,1", "no file_name: {'image': 'a.png'"),
        ("metadata.csv", b"file_name,label\n\xff,1", "cannot be used"),
        ("metadata.csv", b'file_name,label\n"a,1', "cannot be used"),
        ("metadata.csv", b"file_name,label\n" + b"x" * 200000, "cannot be used"),
        ("metadata.csv", csv_table(ROWS | {"00001/img3.png": ""}), "none .00001/img3"),
        ("metadata.csv", csv_table(ROWS) + b"\n00000/img0.png,,1", "img0.png has a second"),
        ("metadata.jsonl", b"\n", "names no picture"),
        ("metadata.jsonl", b"5", "no file_name: 5"),
        ("metadata.jsonl", b'{"file_name": 5}', "no file_name"),
        ("metadata.jsonl", b'{"file_name": ', "cannot be used"),
        ("metadata.parquet", b"PAR1", "save it as metadata.csv"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, bytes) else "",
)
def test_malformed_files_are_one_clear_error(
    tmp_path: Path, write: Writer, file: str, content: bytes, says: str
) -> None:
    path = write(tmp_path / "x", four_pictures() | {file: content})
    with pytest.raises(SourceError, match=says) as error:
        open_source(path)
    assert f"{path}: {file}" in str(error.value)


def test_two_files_that_label_the_same_pictures(tmp_path: Path) -> None:
    both = {"dataset.json": dataset_json(ROWS), "metadata.csv": csv_table(ROWS)}
    with pytest.raises(SourceError, match=r"metadata\.csv.*has a second label"):
        open_source(write_folder(tmp_path, four_pictures() | both))


@pytest.mark.parametrize("write", WRITERS)
def test_a_huge_file_of_labels_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Writer
) -> None:
    monkeypatch.setattr("els.index.sources.pictures.MAX_LABEL_FILE_BYTES", 10)
    path = write(tmp_path / "x", four_pictures() | {"dataset.json": dataset_json(ROWS)})
    with pytest.raises(SourceError, match=r"dataset\.json has .* bytes, more than the 10"):
        open_source(path)


@pytest.mark.parametrize("file", FILES)
def test_a_pipe_of_labels_does_not_hang(tmp_path: Path, file: str) -> None:
    os.mkfifo(write_folder(tmp_path, four_pictures()) / file)
    with pytest.raises(SourceError, match=f"{file} is not a regular file"):
        open_source(tmp_path)


def test_hidden_files_of_labels_are_left_out(tmp_path: Path) -> None:
    hidden = {".x/dataset.json": b"x", "__MACOSX/._dataset.json": b"x"}
    source = open_source(write_zip(tmp_path / "x", four_pictures() | hidden))
    assert source.class_names == ("00000", "00001")


class Value:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


@pytest.mark.parametrize("dtype", ["int64", "uint8", "string", "large_string"])
@pytest.mark.parametrize("column", ["label", "fine_label", "labels"])
def test_columns_of_integers_and_text(
    monkeypatch: pytest.MonkeyPatch, dtype: str, column: str
) -> None:
    values = ["b", "a", "b"] if "string" in dtype else [1, 0, 1]
    source = open_rows(monkeypatch, {column: Value(dtype)}, **{column: values})
    np.testing.assert_array_equal(source.labels, [1, 0, 1])
    assert source.class_names == (("a", "b") if "string" in dtype else None)


@pytest.mark.parametrize("values", [[-1] * 3, [None] * 3], ids=["-1", "None"])
def test_columns_without_labels(monkeypatch: pytest.MonkeyPatch, values: list[Label]) -> None:
    for feature in (Value("int64"), ClassLabel(["a"])):
        assert open_rows(monkeypatch, {"label": feature}, label=values).labels is None


def test_other_columns_are_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"label": Value("float32"), "n": Value("int64")}
    assert open_rows(monkeypatch, features, label=[0.5] * 3, n=[1, 2, 3]).labels is None


def test_a_column_of_classes_comes_before_others(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"label": Value("string"), "kind": ClassLabel(["a", "b"])}
    source = open_rows(monkeypatch, features, label=["x"] * 3, kind=[1, 0, 1])
    assert source.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("feature", "values", "says"),
    [
        (Value("int64"), [0, -1, 0], "row 1 has the label -1"),
        (Value("int64"), [0, None, 0], "int .row 0., none .row 1"),
        (ClassLabel(["a", "b"]), [0, 5, 0], "every class 0..5, got 2 names"),
        (ClassLabel(["a", "a"]), [0, 1, 0], "distinct"),
    ],
    ids=["negative", "gap", "beyond the names", "twice"],
)
def test_columns_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, feature: Any, values: list[Label], says: str
) -> None:
    with pytest.raises(SourceError, match=f"^hf:x:train: label: .*{says}"):
        open_rows(monkeypatch, {"label": feature}, label=values)


# Names of classes


@pytest.mark.parametrize("build", [PatchDatabase.build, PatchDatabase.from_arrays])
@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (["a", "b"], ValueError, "every class 0..5, got 2 names"),
        (5, TypeError, "sequence of strings, got 5"),
        ({"a", "b"}, TypeError, "sequence of strings"),
        ([1, 2], TypeError, "sequence of strings"),
    ],
    ids=["few", "number", "set", "numbers"],
)
def test_class_names_that_do_not_fit(
    tmp_path: Path, build: Any, names: Any, error: type[Exception], says: str
) -> None:
    where = {"path": tmp_path / "db"} if build == PatchDatabase.build else {}
    with pytest.raises(error, match=says):
        build(make_images(2, 1, 3, 3), [0, 5], class_names=names, **where)
    assert not list(itertools.chain(tmp_path.iterdir()))
