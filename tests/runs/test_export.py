"""Finished samples, collected: one file, one picture, how far the run is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from els.cli import app as cli
from els.engine import ScoreMachine
from els.index import PatchDatabase, encode
from els.runs.export import draw_grid, merge_run
from els.runs.folder import RunFolder
from els.runs.novelty import nearest_images
from els.runs.run import StepProgress, sample_run
from els.runs.status import run_status
from els.runs.stores import RunError
from els.storage.files import DiskFullError
from els.storage.labelled import PICTURE_FORMATS, Labels
from els.storage.png import grid

RNG = np.random.default_rng(31)
DB = PatchDatabase.from_arrays(RNG.integers(0, 256, (6, 1, 4, 5), dtype=np.uint8))
OPTIONS = {"n": 11, "steps": 2, "patch_sizes": 3, "batch_size": 2}
LAYOUTS = pytest.mark.parametrize("shard_size", [1, 6], ids=["files", "shards"])


def els(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def sampled(folder: Path, shard_size: int, stop_after: int | None = None) -> RunFolder:
    """A run, or what is left of it when it is interrupted."""

    def stop(step: StepProgress) -> None:
        if step.finished == stop_after:
            raise KeyboardInterrupt

    machine = ScoreMachine(DB, "ELS", "zeros", "torch")
    options = OPTIONS | {"shard_size": shard_size}
    if stop_after is None:
        return sample_run(machine, folder, **options).folder
    with pytest.raises(KeyboardInterrupt):
        sample_run(machine, folder, **options, progress=stop)
    return RunFolder(folder)


@LAYOUTS
def test_merged_samples_are_those_of_the_run(tmp_path: Path, shard_size: int) -> None:
    run = sampled(tmp_path / "run", shard_size)
    seen: list[tuple[int, int]] = []
    output = tmp_path / "all.npz"
    assert merge_run(run.path, output, progress=lambda *done: seen.append(done)) == 11
    assert seen[-1] == (11, 11)
    with np.load(output, allow_pickle=False) as arrays:
        assert set(arrays) == {"samples", "indices"}
        assert arrays["samples"].dtype == np.float32
        np.testing.assert_array_equal(arrays["indices"], np.arange(11))
        expected = np.stack([run.load(index) for index in range(11)])
        np.testing.assert_array_equal(arrays["samples"], expected)


@LAYOUTS
def test_an_incomplete_run_is_merged_only_when_asked(tmp_path: Path, shard_size: int) -> None:
    run = sampled(tmp_path / "run", shard_size, stop_after=6)
    output = tmp_path / "all.npz"
    with pytest.raises(RunError, match=r"has 6 of 11 samples.*--partial"):
        merge_run(run.path, output)
    assert not output.exists()
    assert merge_run(run.path, output, partial=True) == 6
    with np.load(output) as arrays:
        assert arrays["samples"].shape == (6, 1, 4, 5)
        np.testing.assert_array_equal(arrays["indices"], np.arange(6))


def test_gaps_are_merged_with_the_right_numbers(tmp_path: Path) -> None:
    run = sampled(tmp_path / "run", 5)
    expected = run.load(10)
    run.shards(5).shard(1).unlink()
    assert merge_run(run.path, tmp_path / "all.npz", partial=True) == 6
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["indices"].tolist() == [0, 1, 2, 3, 4, 10]
        np.testing.assert_array_equal(arrays["samples"][-1], expected)


def test_a_merge_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    run = sampled(tmp_path / "run", 5)
    output = tmp_path / "all.npz"
    output.write_bytes(b"mine")
    shard = run.shards(5).shard(1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-200] + bytes(50) + whole[-150:])
    with pytest.raises(RunError, match="damaged"):
        merge_run(run.path, output, overwrite=True)
    shard.write_bytes(whole)
    with pytest.raises(FileExistsError, match="is there already"):
        merge_run(run.path, output)

    def no_room(path: Path, size: int) -> None:
        assert size >= 11 * 20 * 4
        raise DiskFullError(path, "test")

    monkeypatch.setattr("els.runs.export.require_space", no_room)
    with pytest.raises(DiskFullError):
        merge_run(run.path, output, overwrite=True)
    assert output.read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        merge_run(run.path, tmp_path / "all.zip")
    with pytest.raises(FileNotFoundError, match="its folder is not there; make the folder"):
        merge_run(run.path, tmp_path / "none" / "all.npz")
    monkeypatch.undo()
    assert merge_run(run.path, output, overwrite=True) == 11
    assert output.read_bytes() != b"mine"


@LAYOUTS
def test_a_grid_shows_the_samples_asked_for(tmp_path: Path, shard_size: int) -> None:
    run = sampled(tmp_path / "run", shard_size)
    tiles = [encode(run.load(index))[0] for index in range(11)]
    cases = [
        ({"rows": 2, "columns": 3}, tiles[:6], 3),
        ({"rows": 2, "columns": 3, "first": 8}, tiles[8:], 3),
        ({}, tiles, 8),
        ({"indices": [7, 2, 7]}, [tiles[7], tiles[2], tiles[7]], 3),
    ]
    for options, shown, columns in cases:
        drawn = draw_grid(run.path, tmp_path / "grid.png", **options, numbers="none")
        assert len(drawn) == len(shown)
        np.testing.assert_array_equal(grey(tmp_path / "grid.png"), grid(shown, columns))


def grey(path: Path) -> np.ndarray:
    """A picture without colours, uint8 ``[H, W]``."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def test_a_grid_says_which_samples_it_shows(tmp_path: Path, monkeypatch) -> None:
    run = sampled(tmp_path / "run", 6)
    seen: list[Labels] = []
    monkeypatch.setattr(
        "els.runs.export.write_grid", lambda path, tiles, columns, labels: seen.append(labels)
    )
    output = tmp_path / "grid.png"
    draw_grid(run.path, output, rows=2, columns=3, first=4)
    draw_grid(run.path, output, rows=2, columns=3, numbers="all")
    draw_grid(run.path, output, indices=[7, 2, 7])
    draw_grid(run.path, output, indices=[7, 2, 7], columns=2, numbers="rows")
    assert seen == [
        Labels(rows=("4", "7")),
        Labels(tiles=("0", "1", "2", "3", "4", "5")),
        Labels(tiles=("7", "2", "7")),
        Labels(rows=("7", "7")),
    ]


@pytest.mark.parametrize("suffix", PICTURE_FORMATS)
def test_a_grid_in_every_format(tmp_path: Path, suffix: str) -> None:
    run = sampled(tmp_path / "run", 6)
    output = tmp_path / f"grid{suffix.upper()}"
    draw_grid(run.path, output)
    content = output.read_bytes()
    if suffix in (".pdf", ".svg"):
        assert content.startswith(b"%PDF" if suffix == ".pdf" else b"<?xml")
        return
    # Left of the tiles are the numbers, so that the picture is wider than they are.
    tiles = [encode(run.load(index))[0] for index in range(11)]
    picture = grey(output)
    plain = grid(tiles, 8)
    shown = picture[:, -plain.shape[1] :]
    assert np.abs(shown.astype(int) - plain).max() <= (12 if "jp" in suffix else 0)
    assert picture.shape[1] > plain.shape[1]
    assert picture[:, : -plain.shape[1]].min() < 128


def test_a_grid_that_cannot_be_written_is_refused_before_work(tmp_path: Path, monkeypatch) -> None:
    run = sampled(tmp_path / "run", 6)

    def read(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(RunFolder, "samples", read)
    with pytest.raises(ValueError, match=r"g\.bmp must end in one of \.png, \.jpg, .*\.svg"):
        draw_grid(run.path, tmp_path / "g.bmp")
    with pytest.raises(FileNotFoundError, match="its folder is not there; make the folder"):
        draw_grid(run.path, tmp_path / "none" / "g.png")
    (tmp_path / "g.png").mkdir()
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        draw_grid(run.path, tmp_path / "g.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"first": 11}, "not 0; the run has numbers 0 to 10", id="beyond"),
        pytest.param({"indices": [3, 11]}, "sample 11 is not in the run", id="no-such-sample"),
        pytest.param({"indices": [-1]}, "indices=-1", id="negative"),
        pytest.param({"columns": 0}, "columns=0", id="no-columns"),
        pytest.param({"indices": [0] * 10_001}, "not 10001", id="too-many"),
    ],
)
def test_grids_that_cannot_be(tmp_path: Path, options, words: str) -> None:
    run = sampled(tmp_path / "run", 5)
    with pytest.raises(ValueError, match=words):
        draw_grid(run.path, tmp_path / "grid.png", **options)
    assert not (tmp_path / "grid.png").exists()


@LAYOUTS
def test_status_of_a_run_that_goes_on_and_of_one_that_does_not(tmp_path, shard_size) -> None:
    seen = []

    def look(step: StepProgress) -> None:
        status = run_status(tmp_path / "run")
        assert status.finished == step.finished
        assert status.is_running
        seen.append(status)
        if step.finished == 6:
            raise KeyboardInterrupt

    machine = ScoreMachine(DB, "ELS", "zeros", "torch")
    options = OPTIONS | {"shard_size": shard_size}
    with pytest.raises(KeyboardInterrupt):
        sample_run(machine, tmp_path / "run", **options, progress=look)
    assert seen[0].samples_per_second is None
    assert seen[0].seconds_left is None
    last = seen[-1]
    assert last.seconds_left == pytest.approx(5 / last.samples_per_second)
    stopped = run_status(tmp_path / "run")
    assert (stopped.finished, stopped.n, stopped.is_running) == (6, 11, False)
    assert stopped.seconds_left is None
    sampled(tmp_path / "run", shard_size)
    complete = run_status(tmp_path / "run")
    assert (complete.finished, complete.is_running) == (11, False)
    # Of the latest session alone, which found 6.
    assert complete.samples_per_second > 0
    assert (complete.processes, complete.database_shards) == (1, 1)
    assert complete.backend == machine.backend


def test_status_when_the_clock_counts(tmp_path: Path) -> None:
    run = sampled(tmp_path / "run", 5)
    manifest = json.loads(run.manifest.read_text())
    session = manifest["sessions"][0]
    session |= {"started": "2026-01-01T00:00:00.500+00:00", "finished_before": 3}
    session["finished"] = "2026-01-01T00:00:04.500+00:00"
    run.manifest.write_text(json.dumps(manifest))
    assert run_status(run.path).samples_per_second == pytest.approx(2.0)
    del session["started"]
    run.manifest.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="last session"):
        run_status(run.path)


def test_status_counts_the_memorised(tmp_path: Path) -> None:
    db = PatchDatabase.build(DB.images, path=tmp_path / "db")
    options = OPTIONS | {"patch_sizes": None, "shard_size": 3}
    sample_run(ScoreMachine(db, "nearest"), tmp_path / "run", **options)
    # What the nearest-image denoiser draws is a training image.
    assert run_status(tmp_path / "run", memorised=True).memorised == 11
    assert run_status(tmp_path / "run").memorised is None
    machine = ScoreMachine(db, "ELS", "zeros", "torch")
    sample_run(machine, tmp_path / "mixed", **OPTIONS)
    samples = np.stack([RunFolder(tmp_path / "mixed").load(index) for index in range(11)])
    expected = sum(found.is_memorised for found in nearest_images(db, samples))
    assert run_status(tmp_path / "mixed", memorised=True).memorised == expected
    shown = els("status", tmp_path / "run", "--memorised")
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"memorised +11 of 11 \(100\.0%\)", shown.stdout)
    assert "memorised" not in els("status", tmp_path / "run").stdout
    told = json.loads(els("status", tmp_path / "run", "--json", "--memorised").stdout)
    assert told["memorised"] == 11
    assert els("status", tmp_path / "run", "--watch", "--memorised").exit_code == 1
    (tmp_path / "db").rename(tmp_path / "moved")
    lost = els("status", tmp_path / "run", "--memorised")
    assert lost.exit_code == 1
    assert "say where it is now with --db PATH" in lost.stderr
    found = els("status", tmp_path / "run", "--memorised", "--db", tmp_path / "moved")
    assert "11 of 11" in found.stdout
    sample_run(machine, tmp_path / "wide", **OPTIONS, canvas=(6, 9))
    with pytest.raises(ValueError, match="of the same shape"):
        run_status(tmp_path / "wide", memorised=True, database=tmp_path / "moved")


def test_the_commands(tmp_path: Path) -> None:
    run = sampled(tmp_path / "run", 6, stop_after=6)
    shown = els("status", run.path)
    assert shown.exit_code == 0, shown.stderr
    assert "6 of 11 (54.5%)" in shown.stdout
    assert "stopped" in shown.stdout
    refused = els("merge", run.path, "-o", tmp_path / "all.npz")
    assert refused.exit_code == 1
    assert "--partial" in refused.stderr
    assert "6 samples" in els("merge", run.path, "-o", tmp_path / "all.npz", "--partial").stdout
    refused = els("merge", run.path, "-o", tmp_path / "all.npz", "--partial")
    assert refused.exit_code == 1
    assert "replace it with --overwrite" in refused.stderr
    again = els("merge", run.path, "-o", tmp_path / "all.npz", "--partial", "--overwrite")
    assert again.exit_code == 0, again.stderr
    sampled(tmp_path / "run", 6)
    told = json.loads(els("status", run.path, "--json").stdout)
    assert (told["finished"], told["n"], told["is_running"]) == (11, 11, False)
    watched = els("status", run.path, "--watch")
    assert watched.exit_code == 0
    assert re.search(r"state +complete", watched.stdout)
    assert els("status", run.path, "--watch", "--json").exit_code == 1
    assert "3 samples" in els("grid", run.path, "-o", tmp_path / "g.png", "--first", 8).stdout
    assert "2 samples" in els("grid", run.path, "-o", tmp_path / "g.png", "--indices", "4,1").stdout
    assert "1 sample: " in els("grid", run.path, "-o", tmp_path / "g.jpg", "--indices", "4").stdout
    numbered = els("grid", run.path, "-o", tmp_path / "g.pdf", "--numbers", "ALL")
    assert numbered.exit_code == 0, numbered.stderr
    unknown = els("grid", run.path, "-o", tmp_path / "g.bmp")
    assert unknown.exit_code == 1
    assert ".webp" in unknown.stderr
    nowhere = els("grid", run.path, "-o", tmp_path / "none" / "g.png")
    assert "its folder is not there; make the folder" in nowhere.stderr
    wrong = els("grid", run.path, "-o", tmp_path / "g.png", "--indices", "4;1")
    assert wrong.exit_code == 1
    assert "3,17,5" in wrong.stderr
    assert els("status", tmp_path).exit_code == 1
