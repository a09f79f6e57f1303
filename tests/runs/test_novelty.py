"""Nearest training images of samples, and two runs compared."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from els.cli.app import app
from els.engine import ScoreMachine
from els.index import PatchDatabase, decode
from els.runs import agreement, export, novelty, stores
from els.runs.agreement import compare_runs, compared
from els.runs.export import draw_grid
from els.runs.folder import RunFolder
from els.runs.novelty import Nearest, nearest_images
from els.runs.run import sample_run
from els.runs.stores import RunError
from els.storage.labelled import Labels

RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (23, 3, 5, 6), dtype=np.uint8)
DB = PatchDatabase.from_arrays(IMAGES)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_nearest_by_brute_force(
    shifted: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "_CHUNK_BYTES", chunk)
    samples = RNG.uniform(-1, 1, (4, 3, 5, 6)).astype(np.float32)
    clean = decode(IMAGES).astype(np.float64)
    moves = [(dy, dx) for dy in range(5) for dx in range(6)] if shifted else [(0, 0)]
    for sample, found in zip(samples, nearest_images(DB, samples, shifted=shifted), strict=True):
        moved = np.stack([np.roll(clean, move, (2, 3)) for move in moves], axis=1)
        squares = ((moved - sample) ** 2).mean((2, 3, 4))
        order = squares.min(1).argsort()
        assert found.image == order[0]
        assert found.shift == moves[squares[order[0]].argmin()]
        assert found.distance == pytest.approx(squares[order[0]].min() ** 0.5)
        assert found.second == pytest.approx(squares[order[1]].min() ** 0.5)


def test_a_copy_is_memorised_wherever_it_is_moved() -> None:
    copy = np.roll(decode(IMAGES[7]), (2, 3), (1, 2))[None]
    (moved,) = nearest_images(DB, copy, shifted=True)
    assert (moved.image, moved.shift, moved.is_memorised) == (7, (2, 3), True)
    assert moved.distance == pytest.approx(0, abs=1e-6)
    (in_place,) = nearest_images(DB, copy)
    assert not in_place.is_memorised
    (alone,) = nearest_images(PatchDatabase.from_arrays(IMAGES[:1]), copy)
    assert alone.second == np.inf
    assert Nearest(0, 0.0, 0.0).ratio == 1
    with pytest.raises(ValueError, match="same shape"):
        nearest_images(DB, copy[..., :5])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("novelty")
    db = PatchDatabase.build(IMAGES, path=path / "db")
    for kind in ("IS", "ELS", "nearest"):
        sizes = 3 if kind == "ELS" else None
        sample_run(ScoreMachine(db, kind), path / kind, n=3, steps=3, patch_sizes=sizes)
    sample_run(ScoreMachine(db, "IS"), path / "other", n=3, steps=3, seed=1)
    return path


def test_runs_are_compared(runs: Path, tmp_path: Path) -> None:
    found = compare_runs(runs / "IS", runs / "ELS", tmp_path / "out")
    assert list(found) == [0, 1, 2]
    same = compare_runs(runs / "IS", runs / "IS")
    assert all(figures.r == pytest.approx(1) and figures.mse == 0 for figures in same.values())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["summary"]["r"]["median"] == pytest.approx(
        np.median([f.r for f in found.values()])
    )
    assert (tmp_path / "out" / "grid.png").exists()
    samples = RunFolder(runs / "IS").load(1), RunFolder(runs / "ELS").load(1)
    assert found[1] == compared(*samples)
    with pytest.raises(RunError, match="different noise"):
        compare_runs(runs / "IS", runs / "other")
    done = CliRunner().invoke(
        app, ["compare", str(runs / "IS"), str(runs / "ELS"), "-o", str(tmp_path / "cli")]
    )
    assert done.exit_code == 0, done.output
    assert "median" in done.output
    done = CliRunner().invoke(app, ["compare", str(runs / "IS"), str(runs / "db")])
    assert done.exit_code == 1


def test_a_comparison_reads_every_file_once(runs: Path, tmp_path: Path, monkeypatch) -> None:
    machine = ScoreMachine(PatchDatabase.open(runs / "db"), "IS")
    options = {"n": 17, "steps": 2}
    sample_run(machine, tmp_path / "shards", **options, shard_size=5)
    sample_run(machine, tmp_path / "files", **options)
    sample_run(machine, tmp_path / "more", **(options | {"n": 30}), shard_size=7)
    expected = compare_runs(tmp_path / "files", tmp_path / "files")
    RunFolder(tmp_path / "files").values(11).unlink()
    read: list[Path] = []
    load = stores._load
    monkeypatch.setattr(stores, "_load", lambda path: (read.append(path), load(path))[1])
    labels: list[Labels] = []
    write = agreement.write_grid

    def keep(path: Path, tiles: list[np.ndarray], columns: int, words: Labels) -> None:
        labels.append(words)
        write(path, tiles, columns, words)

    monkeypatch.setattr(agreement, "write_grid", keep)
    found = compare_runs(tmp_path / "shards", tmp_path / "more", tmp_path / "out")
    assert list(found) == list(range(17))
    # 4 shards of 5 and 3 of 7, also for the picture.
    assert len(read) == 4 + 3
    assert labels == [
        Labels("samples", ("shards", "more"), tuple(map(str, range(12)))),
    ]
    # With a gap, and samples of whose two folders one is sharded.
    partly = compare_runs(tmp_path / "shards", tmp_path / "files")
    assert partly == {number: expected[number] for number in range(17) if number != 11}


def test_a_grid_shows_the_nearest(runs: Path, tmp_path: Path, monkeypatch) -> None:
    found = draw_grid(runs / "nearest", tmp_path / "grid.png", nearest=True)
    # What the nearest-image denoiser draws is an image.
    assert all(each is not None and each.is_memorised for _, each in found)
    done = CliRunner().invoke(
        app, ["grid", str(runs / "IS"), "-o", str(tmp_path / "two.png"), "--nearest"]
    )
    assert done.exit_code == 0, done.output
    assert "memorised: 3 of 3" in done.output
    words: list[Labels] = []
    monkeypatch.setattr(export, "write_grid", lambda path, tiles, columns, made: words.append(made))
    for numbers in (None, "all", "none"):
        found = draw_grid(
            runs / "IS", tmp_path / "two.png", columns=2, nearest=True, numbers=numbers
        )
    heads = ("sample", "nearest") * 2
    images = [f"image {each.image}" for _, each in found if each is not None]
    assert words == [
        Labels(rows=("0", "2"), columns=heads),
        Labels(columns=heads, tiles=("0", images[0], "1", images[1], "2", images[2])),
        Labels(),
    ]
