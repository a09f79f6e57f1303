"""Sources on the command line: one line for what cannot be built, and nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
from commands import els
from pictures import (
    STRANGE,
    claiming,
    csv_table,
    dataset_json,
    four_pictures,
    make_images,
    png,
    write_folder,
    write_zip,
)


def test_labels_beside_pictures_are_the_classes(tmp_path: Path) -> None:
    rows = dataset_json(dict(zip(four_pictures(), [7, 3, 3, 3], strict=True)))
    source = write_zip(tmp_path / "edm.zip", four_pictures() | {"dataset.json": rows})
    result = els("build", source, "-o", tmp_path / "db")
    assert result.exit_code == 0, result.stderr
    shown = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert shown == [["classes", "3", "3"], ["7", "1"]]


def test_a_label_of_billions_is_shown_at_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=make_images(2, 3, 3), labels=[0, 2**40])
    result = els("build", tmp_path / "x.npz", "-o", tmp_path / "db")
    assert result.exit_code == 0, result.stderr
    assert [line.split()[-2:] for line in result.stdout.splitlines()[-2:]] == [
        ["0", "1"],
        ["1099511627776", "1"],
    ]


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a.png": STRANGE["EPS"]}, "no picture of the formats"),
        ({"a.png": claiming(13000, 13000)}, "13,000 x 13,000 pixels, more than"),
        (four_pictures() | {"metadata.csv": csv_table({"no.png": 1})}, "not among the pictures"),
    ],
    ids=["EPS", "pixels", "labels"],
)
def test_what_cannot_be_built_is_one_line(
    tmp_path: Path, entries: dict[str, bytes], says: str
) -> None:
    result = els("build", write_folder(tmp_path / "x", entries), "-o", tmp_path / "db")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert not (tmp_path / "db").exists()
    assert not result.stdout


def test_labels_beyond_the_class_names(tmp_path: Path) -> None:
    arrays = {"images": make_images(2, 3, 3), "labels": [0, 5], "class_names": ["a", "b"]}
    np.savez(tmp_path / "x.npz", **arrays)
    result = els("build", tmp_path / "x.npz", "-o", tmp_path / "db")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path}/x.npz: class_names must name every class 0..5, got 2 names; give 6, in "
        "the order of the labels"
    ]


@pytest.mark.parametrize("size", ["0", "3x-1", "3x4x5", "x", "two"])
def test_a_size_of_nothing(tmp_path: Path, size: str) -> None:
    result = els("build", "embedded:fashion-mnist", "--resize", size, "-o", tmp_path / "db")
    assert result.exit_code == 1
    assert f"error: --resize '{size}' must be" in result.stderr


def test_what_was_done_to_pictures_is_said_in_options(tmp_path: Path) -> None:
    """And what is wrong with the options, before anything is read."""
    half = np.full((4, 8, 4), 128, np.uint8)
    source = write_folder(tmp_path / "x", {"a/1.png": png(half), "b/2.png": b"none"})
    options = ("--skip-bad", "--resize", "2x3", "--limit", "2")
    result = els("build", source, "-o", tmp_path / "db", *options)
    assert result.exit_code == 0, result.stderr
    notes = result.stderr[result.stderr.index("note: ") :].splitlines()
    assert notes[0].startswith("note: 1 of 1 pictures have transparency, and #ffffff shows")
    assert "--background takes another colour, --background keep keeps it" in notes[0]
    assert notes[1] == (
        "note: 1 of 1 pictures are stretched to 2 x 3; --crop keeps their proportions"
    )
    assert notes[2] == "note: left out, because they cannot be read (1):"
    assert "b/2.png cannot be used" in notes[3]
    for wrong, says in (
        (("--crop",), "--crop cuts to the proportions of a size; add --resize"),
        (("--background", "red"), "--background 'red' must be white, black"),
        (("--limit", "2", "--per-class", "1"), "--limit and --per-class exclude each other"),
        (("--seed", "2"), "--seed 2 draws some of the images; add --limit or --per-class"),
        (("--split", "test"), "has no part 'test'"),
    ):
        refused = els("build", source, "-o", tmp_path / "other", *wrong)
        assert refused.exit_code == 1
        assert says in refused.stderr


def test_sizes_from_the_data_alone(tmp_path: Path) -> None:
    """Printed from noise to clean, as sampling goes; the file is what --sizes reads."""
    db, file = tmp_path / "db", tmp_path / "sizes.json"
    assert els("build", "embedded:fashion-mnist", "--limit", 40, "-o", db).exit_code == 0
    told = els("sizes", db, "--steps", 4)
    assert told.exit_code == 0, told.stderr
    rows = [line.split() for line in told.stdout.splitlines()[1:5]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    assert told.stdout.splitlines()[-1] == f"--sizes {','.join(row[2] for row in rows[::-1])}"
    written = els("sizes", db, "--steps", 4, "-o", file)
    assert written.stdout.splitlines()[-1] == f"--sizes {file}"
    options = ("--steps", 4, "--sizes", file, "-n", 1, "-o", tmp_path / "run")
    assert els("sample", db, *options).exit_code == 0
    for wrong, says in (
        (("-o", tmp_path / "sizes.txt"), "must end in .json"),
        (("-o", tmp_path / "none" / "sizes.json"), "folder is not there"),
        (("--excess", 0), "--excess 0.0 must be a number above 0"),
        (("--steps", 0), "--steps 0 must be at least 1"),
    ):
        refused = els("sizes", db, *wrong)
        assert refused.exit_code == 1
        assert says in refused.stderr
