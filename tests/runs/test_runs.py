"""Run folders: killed, filled up, started twice, and the same images in the end."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed import HashStore

from els.engine import ScoreMachine, sample
from els.engine.mesh import ProcessMesh
from els.engine.schedule import Linear
from els.explain.replay import explain_run
from els.index import PatchDatabase, encode
from els.runs.folder import GRID_MOST, RunFolder, read_settings
from els.runs.run import StepProgress, sample_run
from els.runs.stores import DEFAULT_SHARD_SIZE, RunError

RNG = np.random.default_rng(8)
IMAGES = RNG.integers(0, 256, (6, 1, 6, 8), dtype=np.uint8)
DB = PatchDatabase.from_arrays(IMAGES, [0, 1, 0, 1, 0, 1])
OPTIONS = {"n": 5, "steps": 3, "patch_sizes": [1, 3, 5], "eta": 0.5, "batch_size": 2}
STEPS = {"steps": 3, "patch_sizes": [1, 3, 5], "eta": 0.5}
# Five samples in files of their own, in a shard that one batch fills, and in parts of shards.
LAYOUTS = pytest.mark.parametrize("shard_size", [1, 2, 3], ids=lambda size: f"shards-of-{size}")


@pytest.fixture
def machine() -> ScoreMachine:
    return ScoreMachine(DB, "ELS", "zeros", "torch")


def outputs(folder: Path) -> dict[str, bytes]:
    """What must not depend on how a run got there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", ".lock")
    }


def test_a_run_holds_the_samples(machine: ScoreMachine, tmp_path: Path) -> None:
    report = sample_run(machine, tmp_path / "deep" / "run", **OPTIONS)
    run = report.folder
    assert report.computed == 5
    direct = sample(machine, n=5, steps=3, patch_sizes=[1, 3, 5], eta=0.5).numpy()
    for index in range(5):
        np.testing.assert_array_equal(run.load(index), direct[index])
        with Image.open(run.picture(index)) as picture:
            np.testing.assert_array_equal(np.asarray(picture), encode(direct[index])[0])
    with Image.open(run.grid) as picture:
        assert picture.width > 3 * 8
    assert set(outputs(run.path)) == {"grid.png"} | {
        f"samples/{index:06d}.{suffix}" for index in range(5) for suffix in ("npy", "png")
    }


@pytest.mark.parametrize(
    ("shard_size", "shards"), [(2, (2, 2, 1)), (3, (3, 2)), (5, (5,)), (9, (5,))]
)
def test_a_run_in_shards_holds_the_samples(machine, tmp_path: Path, shard_size, shards) -> None:
    run = sample_run(machine, tmp_path, **OPTIONS, shard_size=shard_size).folder
    direct = sample(machine, n=5, steps=3, patch_sizes=[1, 3, 5], eta=0.5).numpy()
    files = [run.shards(shard_size).shard(number) for number in range(len(shards))]
    assert set(outputs(tmp_path)) == {"grid.png"} | {f"shards/{file.name}" for file in files}
    start = 0
    for file, count in zip(files, shards, strict=True):
        with np.load(file) as arrays:
            np.testing.assert_array_equal(arrays["samples"], direct[start : start + count])
        start += count
    for index in range(5):
        np.testing.assert_array_equal(run.load(index), direct[index])
    np.testing.assert_array_equal(np.concatenate(list(run.samples(range(1, 5)))), direct[1:])
    assert run.finished(read_settings(tmp_path)) == [range(5)]
    sample_run(machine, tmp_path / "files", **OPTIONS)
    assert run.grid.read_bytes() == RunFolder(tmp_path / "files").grid.read_bytes()


def test_large_runs_are_in_shards_unless_told_otherwise(tmp_path: Path, monkeypatch) -> None:
    assert DEFAULT_SHARD_SIZE == 1000
    monkeypatch.setattr("els.runs.run.DEFAULT_SHARD_SIZE", 10)
    tiny = ScoreMachine(PatchDatabase.from_arrays(IMAGES[:, :, :1, :1]), "IS", backend="torch")
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, n, size in ((few, 10, 1), (many, 11, 10)):
        sample_run(tiny, folder, n=n, steps=1)
        assert read_settings(folder).shard_size == size
    assert len(list((many / "shards").glob("*.npz"))) == 2
    # A run keeps the layout that it has.
    assert sample_run(tiny, few, n=11, steps=1).computed == 1
    assert read_settings(few).shard_size == 1
    with pytest.raises(RunError, match="shard_size is 10 there, 1 here"):
        sample_run(tiny, many, n=11, steps=1, shard_size=1)


def test_trajectories_need_samples_with_files_of_their_own(machine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give shard_size=1"):
        sample_run(machine, tmp_path / "run", **OPTIONS, trajectory=True, shard_size=2)
    assert not (tmp_path / "run").exists()
    tiny = ScoreMachine(PatchDatabase.from_arrays(IMAGES[:, :, :1, :1]), "IS", backend="torch")
    options = {"n": 1001, "steps": 1, "trajectory": True}

    def stop(_: StepProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_run(tiny, tmp_path / "run", **options, progress=stop)
    assert read_settings(tmp_path / "run").shard_size == 1


@LAYOUTS
@pytest.mark.parametrize("batch_size", [None, 2])
def test_long_samples_go_on_at_the_step_where_they_were(
    machine: ScoreMachine,
    tmp_path: Path,
    shard_size: int,
    batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {**OPTIONS, "batch_size": batch_size, "shard_size": shard_size}
    sample_run(machine, tmp_path / "whole", **options)
    monkeypatch.setattr("els.runs.run._MOST_LOST_SECONDS", 0.0)
    done: list[int] = []

    def stop(progress: StepProgress) -> None:
        done.append(progress.images)
        if len(done) % 2 == 0:
            raise KeyboardInterrupt

    folder = tmp_path / "interrupted"
    notes = []
    while not (folder / "grid.png").exists():
        try:
            sample_run(machine, folder, **options, progress=stop)
        except KeyboardInterrupt as interruption:
            notes += interruption.__notes__
    assert len(notes) > 3
    assert any("and so are steps of" in note for note in notes)
    # A step is saved before it is reported, but for the last: that one is done at most twice.
    assert sum(done) <= 5 * 3 + 5
    assert outputs(folder) == outputs(tmp_path / "whole")
    assert not (folder / "steps").exists()


@pytest.mark.usefixtures("small_pieces")
def test_a_step_under_way_is_told(
    machine: ScoreMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of a batch which goes on where it was interrupted."""
    monkeypatch.setattr("els.runs.run._MOST_LOST_SECONDS", 0.0)
    options = {**OPTIONS, "n": 1}
    seen: list[StepProgress] = []

    def stop(done: StepProgress) -> None:
        assert done.share == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_run(machine, tmp_path, **options, progress=stop, under_way=seen.append)
    assert {(told.step, told.patch_size) for told in seen} == {(1, 5)}
    assert [told.share for told in seen] == sorted({told.share for told in seen})
    assert all(0 < told.share < 1 and told.images == 1 for told in seen)
    seen.clear()
    sample_run(machine, tmp_path, **options, under_way=seen.append)
    assert {(told.step, told.patch_size) for told in seen} == {(2, 3), (3, 1)}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the torch backend in pieces, all of which are told."""
    monkeypatch.setattr("els.engine.watching._SECONDS", 0.0)
    monkeypatch.setattr("els.engine.backends.pytorch._BLOCK_BYTES", 1 << 12)


DAMAGES = [
    pytest.param(lambda x, step: b"", id="empty"),
    pytest.param(lambda x, step: b"PK no archive", id="no-archive"),
    pytest.param(lambda x, step: {"x_t": x}, id="no-step"),
    pytest.param(lambda x, step: {"x_t": x, "step": [step]}, id="list-of-steps"),
    pytest.param(lambda x, step: {"x_t": x, "step": 3}, id="first-step"),
    pytest.param(lambda x, step: {"x_t": x, "step": 0}, id="step-0"),
    pytest.param(lambda x, step: {"x_t": x[0], "step": step}, id="shape"),
    pytest.param(lambda x, step: {"x_t": x.astype(np.float32), "step": step}, id="dtype"),
    pytest.param(lambda x, step: {"x_t": x * np.nan, "step": step}, id="nan"),
    pytest.param(lambda x, step: {"x_t": np.array([{}]), "step": step}, id="pickle"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_steps_are_done_again(machine: ScoreMachine, tmp_path: Path, damage: Any) -> None:
    options = {**OPTIONS, "n": 1}
    sample_run(machine, tmp_path / "whole", **options)

    def stop(_: StepProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_run(machine, tmp_path / "run", **options, progress=stop)
    (tmp_path / "run/steps").mkdir()
    content = damage(np.zeros(DB.shape), 1)
    if isinstance(content, bytes):
        (tmp_path / "run/steps/000000.npz").write_bytes(content)
    else:
        np.savez(tmp_path / "run/steps/000000.npz", **content)
    sample_run(machine, tmp_path / "run", **options)
    assert outputs(tmp_path / "run") == outputs(tmp_path / "whole")


def test_timings_of_a_long_run_do_not_pile_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("els.runs.run._TIMINGS_KEPT", 7)
    tiny = ScoreMachine(PatchDatabase.from_arrays(IMAGES[:, :, :1, :1]), "IS", backend="torch")
    seen: list[StepProgress] = []
    report = sample_run(tiny, tmp_path, n=5, steps=4, batch_size=1, progress=seen.append)
    assert report.steps == tuple(seen[-7:])


def test_timings_are_per_image_and_by_patch_size(machine: ScoreMachine, tmp_path: Path) -> None:
    seen: list[StepProgress] = []
    report = sample_run(machine, tmp_path / "run", **OPTIONS, progress=seen.append)
    assert tuple(seen) == report.steps
    assert [step.images for step in seen] == [2] * 6 + [1] * 3
    assert [step.finished for step in seen] == [0] * 3 + [2] * 3 + [4] * 3
    assert list(report.seconds_by_patch_size()) == [1, 3, 5]
    assert report.seconds_per_image_step() > 0
    again = sample_run(machine, tmp_path / "run", **OPTIONS)
    assert again.computed == 0
    assert again.seconds_per_image_step() is None
    assert again.seconds_by_patch_size() == {}


def test_the_manifest_says_everything(machine: ScoreMachine, tmp_path: Path) -> None:
    sample_run(machine, tmp_path / "run", **OPTIONS, schedule=Linear(), label=1, seed=2**65)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["settings"] == {
        "database": "(in memory)",
        "content_hash": DB.content_hash,
        "machine": "ELS",
        "boundary": "zeros",
        "backend": "torch",
        "patch_sizes": [1, 3, 5],
        "schedule": {"name": "linear", "rate_min": 0.1, "rate_max": 20.0},
        "steps": 3,
        "eta": 0.5,
        "seed": 2**65,
        "label": 1,
        "trajectory": False,
        "n": 5,
        "tolerance": None,
        "shard_size": 1,
    }
    (session,) = manifest["sessions"]
    assert session["backend"] == machine.backend
    assert session["computed"] == 5
    assert session["started"] <= session["finished"]
    assert set(session["versions"]) == {"els-machine", "torch", "numpy", "python"}
    settings = read_settings(tmp_path / "run")
    assert settings.plan.schedule == Linear()
    assert settings.plan.patch_sizes == (1, 3, 5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4], ids=lambda c: f"C{c}")
def test_trajectories_are_kept(channels: int, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (3, channels, 4, 5), dtype=np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "IS", backend="torch")
    run = sample_run(machine, tmp_path / "run", n=2, steps=3, trajectory=True).folder
    with np.load(run.trajectory(1, ".npz")) as arrays:
        assert arrays["x_t"].shape == arrays["predicted"].shape == (3, channels, 4, 5)
        np.testing.assert_array_equal(arrays["predicted"][-1], run.load(1))
        assert arrays["t"].tolist() == [1.0, 2 / 3, 1 / 3]
        np.testing.assert_allclose(arrays["alpha"] ** 2 + arrays["sigma"] ** 2, 1)
    panels_per_tile = 1 if channels in (1, 3) else channels
    with Image.open(run.trajectory(1, ".png")) as strip, Image.open(run.picture(1)) as picture:
        assert strip.width / strip.height > panels_per_tile
        assert picture.size == (5 * panels_per_tile, 4)
        assert picture.mode == ("RGB" if channels == 3 else "L")


@LAYOUTS
def test_growing_goes_on(machine: ScoreMachine, tmp_path: Path, shard_size: int) -> None:
    sample_run(machine, tmp_path / "grown", **(OPTIONS | {"n": 2}), shard_size=shard_size)
    assert sample_run(machine, tmp_path / "grown", **OPTIONS).computed == 3
    options = OPTIONS | {"batch_size": None, "shard_size": shard_size}
    sample_run(machine, tmp_path / "whole", **options)
    assert outputs(tmp_path / "grown") == outputs(tmp_path / "whole")
    assert read_settings(tmp_path / "grown").n == 5


def test_a_grid_of_fewer_samples_never_stays(machine, tmp_path: Path, monkeypatch) -> None:
    sample_run(machine, tmp_path / "grown", **(OPTIONS | {"n": 2}))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("els.runs.run._write_grid", die)
        with pytest.raises(KeyboardInterrupt):
            sample_run(machine, tmp_path / "grown", **OPTIONS)
    assert sample_run(machine, tmp_path / "grown", **OPTIONS).computed == 0
    sample_run(machine, tmp_path / "whole", **OPTIONS)
    assert outputs(tmp_path / "grown") == outputs(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["grid.png", "samples/000003.png", "samples/000003.npy"])
def test_what_is_missing_is_made_again(machine: ScoreMachine, tmp_path: Path, lost: str) -> None:
    sample_run(machine, tmp_path, **OPTIONS)
    before = outputs(tmp_path)
    (tmp_path / lost).unlink()
    assert sample_run(machine, tmp_path, **OPTIONS).computed == (0 if lost == "grid.png" else 1)
    assert outputs(tmp_path) == before


def test_a_lost_shard_is_made_again(machine: ScoreMachine, tmp_path: Path) -> None:
    run = sample_run(machine, tmp_path, **OPTIONS, shard_size=2).folder
    before = outputs(tmp_path)
    run.shards(2).shard(1).unlink()
    with pytest.raises(RunError, match=r"sample 2 of .* is not there"):
        run.load(2)
    assert sample_run(machine, tmp_path, **OPTIONS).computed == 2
    assert outputs(tmp_path) == before


def test_a_shard_whose_writer_was_killed_is_completed(machine, tmp_path, monkeypatch) -> None:
    sample_run(machine, tmp_path / "whole", **OPTIONS, shard_size=5)
    run = RunFolder(tmp_path / "killed")
    parts = run.shards(5).parts

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("els.runs.stores.ShardFolder.complete", die)
        with pytest.raises(KeyboardInterrupt) as caught:
            sample_run(machine, run.path, **OPTIONS, shard_size=5)
    assert caught.value.__notes__[0].startswith("5 of 5 samples are finished")
    left = {path: path.read_bytes() for path in parts.iterdir()}
    assert len(left) == 3
    np.testing.assert_array_equal(run.load(4), RunFolder(tmp_path / "whole").load(4))
    assert sample_run(machine, run.path, **OPTIONS).computed == 0
    assert outputs(run.path) == outputs(tmp_path / "whole")
    # Killed a moment later, when the shard was there, but its parts were, too.
    for path, content in left.items():
        path.write_bytes(content)
    assert sample_run(machine, run.path, **OPTIONS).computed == 0
    assert outputs(run.path) == outputs(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut"),
        pytest.param(lambda content: b"\x93NUMPY" + content[6:], id="not-a-zip"),
        pytest.param(lambda content: content.replace(b"samples", b"pickles"), id="foreign"),
    ],
)
def test_an_unreadable_shard_is_named_and_nothing_else_lost(machine, tmp_path, damage) -> None:
    run = sample_run(machine, tmp_path, **OPTIONS, shard_size=2).folder
    before = outputs(tmp_path)
    shard = run.shards(2).shard(1)
    shard.write_bytes(damage(shard.read_bytes()))
    for use in (lambda: run.load(3), lambda: sample_run(machine, tmp_path, **OPTIONS)):
        with pytest.raises(RunError, match=r"samples-000001\.npz is damaged .* remove it"):
            use()
    np.testing.assert_array_equal(run.load(1), sample(machine, indices=[1], **STEPS)[0])
    shard.unlink()
    assert sample_run(machine, tmp_path, **OPTIONS).computed == 2
    assert outputs(tmp_path) == before


def test_flipped_bits_in_a_shard_are_found(machine: ScoreMachine, tmp_path: Path) -> None:
    run = sample_run(machine, tmp_path, **OPTIONS, shard_size=2).folder
    shard = run.shards(2).shard(0)
    content = bytearray(shard.read_bytes())
    content[300] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        run.load(0)


def test_leftovers_of_a_dead_writer_go(machine: ScoreMachine, tmp_path: Path) -> None:
    sample_run(machine, tmp_path, **(OPTIONS | {"n": 2}))
    before = set(outputs(tmp_path))
    for place in (tmp_path, tmp_path / "samples"):
        (place / ".els-0123456789ab.partial").write_bytes(b"half")
    sample_run(machine, tmp_path, **(OPTIONS | {"n": 3}))
    assert set(outputs(tmp_path)) - before == {"samples/000002.npy", "samples/000002.png"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"steps": 1, "patch_sizes": 3}, "steps is 3 there, 1 here", id="steps"),
        pytest.param({"patch_sizes": 3}, "patch_sizes is 1 3 5 there, 3 3 3 here", id="sizes"),
        pytest.param({"seed": 1}, "seed is 0 there, 1 here", id="seed"),
        pytest.param({"eta": 0.0}, r"eta is 0\.5 there, 0\.0 here", id="eta"),
        pytest.param({"label": 0}, "label is none there, 0 here", id="label"),
        pytest.param({"canvas": (9, 7)}, "canvas is none there, 9x7 here", id="canvas"),
        pytest.param({"schedule": Linear()}, "schedule is .*cosine.* there", id="schedule"),
        pytest.param({"trajectory": True}, "trajectory is False there", id="trajectory"),
        pytest.param({"n": 4}, "n is 5 there, 4 here .*grow", id="fewer"),
        pytest.param({"seed": 1, "eta": 0.0}, "eta is .*; seed is", id="two"),
    ],
)
def test_other_settings_are_refused(machine, tmp_path: Path, change, words: str) -> None:
    sample_run(machine, tmp_path, **OPTIONS)
    before = outputs(tmp_path)
    with pytest.raises(RunError, match=words):
        sample_run(machine, tmp_path, **(OPTIONS | change))
    assert outputs(tmp_path) == before


@pytest.mark.parametrize(
    ("other", "words"),
    [
        pytest.param(ScoreMachine(DB, "LS", "zeros", "torch"), "machine is ELS", id="kind"),
        pytest.param(ScoreMachine(DB, "ELS", "circular", "torch"), "boundary is", id="boundary"),
        pytest.param(
            ScoreMachine(PatchDatabase.from_arrays(IMAGES[::-1].copy()), "ELS", "zeros", "torch"),
            "its database is .*; the one here is",
            id="database",
        ),
    ],
)
def test_other_machines_are_refused(machine, tmp_path: Path, other, words: str) -> None:
    sample_run(machine, tmp_path, **OPTIONS)
    with pytest.raises(RunError, match=words):
        sample_run(other, tmp_path, **OPTIONS)


def test_a_boundary_does_not_matter_to_whole_images(tmp_path: Path) -> None:
    for boundary in ("zeros", "circular"):
        sample_run(ScoreMachine(DB, "IS", boundary, "torch"), tmp_path, n=1, steps=2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("notes.txt", b"mine", "not empty", id="foreign-folder"),
        pytest.param("run.json", b"{", "not JSON", id="cut"),
        pytest.param("run.json", b"[]", "format", id="foreign-json"),
        pytest.param("run.json", b'{"format": "els-run", "version": 9}', "version 9", id="newer"),
        pytest.param("run.json", b'{"format": "els-run", "version": 1}', "sessions", id="empty"),
        pytest.param(
            "run.json",
            b'{"format": "els-run", "version": 1, "sessions": [], "settings": {"n": 3}}',
            "settings are malformed",
            id="settings",
        ),
    ],
)
def test_other_folders_are_refused(machine, tmp_path: Path, name, content, words) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=words):
        sample_run(machine, tmp_path, **OPTIONS)
    assert (tmp_path / name).read_bytes() == content


def test_wrong_arguments_leave_no_folder(machine: ScoreMachine, tmp_path: Path) -> None:
    for wrong in ({"n": 0}, {"patch_sizes": 7}, {"label": 9}, {"batch_size": 0}, {"eta": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample_run(machine, tmp_path / "run", **(OPTIONS | wrong))
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_refused(machine: ScoreMachine, tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(RunError, match="is a file"):
        sample_run(machine, tmp_path / "run", **OPTIONS)


def test_a_missing_or_damaged_sample_says_so(machine: ScoreMachine, tmp_path: Path) -> None:
    run = sample_run(machine, tmp_path, **OPTIONS).folder
    with pytest.raises(RunError, match="sample 5"):
        run.load(5)
    run.values(1).write_bytes(b"\x93NUMPY")
    with pytest.raises(RunError, match="damaged"):
        run.load(1)
    with pytest.raises(RunError, match=r"no run\.json"):
        read_settings(tmp_path / "samples")


def test_a_second_writer_is_refused(machine: ScoreMachine, tmp_path: Path) -> None:
    def start_again(_: StepProgress) -> None:
        with pytest.raises(RunError, match="another process"):
            sample_run(machine, tmp_path, **OPTIONS)

    assert sample_run(machine, tmp_path, **OPTIONS, progress=start_again).computed == 5


@LAYOUTS
@pytest.mark.parametrize("writes", [0, 1, 3, 8], ids=lambda writes: f"after-{writes}")
@pytest.mark.thinned
def test_a_full_disk_loses_nothing(
    machine, tmp_path: Path, monkeypatch, shard_size: int, writes: int
) -> None:
    options = OPTIONS | {"shard_size": shard_size}
    sample_run(machine, tmp_path / "whole", **options)
    left, sync = writes, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    run = RunFolder(tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="no room to write") as caught:
            sample_run(machine, run.path, **options)
    finished = 0
    if run.manifest.exists():
        finished = sum(map(len, run.finished(read_settings(run.path))))
    (note,) = caught.value.__notes__
    assert note.startswith(f"{finished} of 5 samples are finished and safe")
    assert not list(run.path.rglob("*.partial"))
    assert sample_run(machine, run.path, **options).computed == 5 - finished
    assert outputs(run.path) == outputs(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on(machine: ScoreMachine, tmp_path: Path) -> None:
    def stop(progress: StepProgress) -> None:
        if progress.finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        sample_run(machine, tmp_path, **OPTIONS, progress=stop)
    assert caught.value.__notes__[0].startswith("2 of 5 samples")
    assert sample_run(machine, tmp_path, **OPTIONS).computed == 3


class Clock:
    """A clock on which every step of a batch takes as long, whatever the batch."""

    def __init__(self, step_seconds: float) -> None:
        self._step = step_seconds
        self._now = 0.0

    def perf_counter(self) -> float:
        self._now += self._step
        return self._now


@pytest.mark.parametrize(
    ("kind", "step_seconds", "batches"),
    [
        pytest.param("ELS", 11.0, [1, 1, 1, 1, 1, 1, 1, 1], id="slow"),
        pytest.param("LS", 5.0, [1, 2, 4, 1], id="as-long-as-fits"),
        pytest.param("ELS", 0.01, [1, 7], id="fast"),
        # They read every image once for a batch, so that fewer would hardly be faster.
        pytest.param("IS", 11.0, [4, 4], id="shared-slow"),
        pytest.param("ES", 0.01, [4, 4], id="shared-fast"),
    ],
)
def test_a_batch_takes_no_longer_than_an_interruption_may_lose(
    tmp_path: Path, monkeypatch, kind: str, step_seconds: float, batches: list[int]
) -> None:
    monkeypatch.setattr("els.runs.run.time", Clock(step_seconds))
    machine = ScoreMachine(DB, kind, "zeros", "torch")
    options = {"n": 8, "steps": 2, "patch_sizes": 3}
    seen: list[StepProgress] = []
    sample_run(machine, tmp_path / "run", **options, progress=seen.append)
    assert [step.images for step in seen[::2]] == batches
    sample_run(machine, tmp_path / "whole", **options, batch_size=8)
    assert outputs(tmp_path / "run") == outputs(tmp_path / "whole")


def test_large_batches_come_with_fast_samples_and_have_a_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("els.runs.run.time", Clock(1e-6))
    seen: list[StepProgress] = []
    tiny = ScoreMachine(PatchDatabase.from_arrays(IMAGES[:, :, :1, :1]), "LS", backend="torch")
    sample_run(tiny, tmp_path, n=40, steps=1, patch_sizes=1, progress=seen.append)
    assert [step.images for step in seen] == [1, 16, 16, 7]


def test_ranks_that_share_the_database_have_batches_that_no_clock_changes(
    tmp_path: Path, monkeypatch
) -> None:
    """The size of a batch changes the order in which three ranks or more add."""
    monkeypatch.setattr("els.runs.run.time", Clock(11.0))
    # A mesh without a group merges nothing.
    mesh = ProcessMesh(HashStore(), world_size=2, database_shards=2)
    machine = ScoreMachine(DB, "LS", "zeros", "torch", mesh=mesh)
    seen: list[StepProgress] = []

    def stop(step: StepProgress) -> None:
        seen.append(step)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_run(machine, tmp_path, n=40, steps=2, patch_sizes=3, progress=stop)
    assert [step.images for step in seen] == [16] * 4


def test_an_interruption_of_slow_samples_loses_only_the_last(machine, tmp_path, monkeypatch):
    monkeypatch.setattr("els.runs.run.time", Clock(11.0))

    def stop(step: StepProgress) -> None:
        if step.finished == 3 and step.step == OPTIONS["steps"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        sample_run(machine, tmp_path, **(OPTIONS | {"batch_size": None}), progress=stop)
    assert caught.value.__notes__[0].startswith("3 of 5 samples are finished and safe")


@pytest.mark.parametrize("shard_size", [1, 3, 4], ids=lambda size: f"shards-of-{size}")
@pytest.mark.parametrize("batch_size", [1, 3, 9, None])
@pytest.mark.thinned
def test_scattered_gaps_are_filled_in_any_batches(machine, tmp_path, shard_size, batch_size):
    options = OPTIONS | {"n": 9, "shard_size": shard_size, "trajectory": shard_size == 1}
    run = sample_run(machine, tmp_path, **options).folder
    before = outputs(tmp_path)
    shards = run.shards(shard_size)
    lost = [shards.shard(0), shards.shard(2)] if shard_size > 1 else []
    lost += [run.values(index) for index in (0, 3, 4, 7) if shard_size == 1]
    for path in lost:
        path.unlink()
    missing = {1: 4, 3: 6, 4: 5}[shard_size]
    again = sample_run(machine, tmp_path, **(options | {"batch_size": batch_size}))
    assert again.computed == missing
    assert outputs(tmp_path) == before


def test_large_grids_stop_somewhere(tmp_path: Path) -> None:
    tiny = ScoreMachine(PatchDatabase.from_arrays(IMAGES[:, :, :1, :1]), "IS", backend="torch")
    run = RunFolder(tmp_path)
    sample_run(tiny, tmp_path, n=1, steps=1)
    for index in range(1, GRID_MOST + 1):
        run.values(index).write_bytes(run.values(0).read_bytes())
        run.picture(index).write_bytes(run.picture(0).read_bytes())
    sample_run(tiny, tmp_path, n=GRID_MOST + 1, steps=1, batch_size=512)
    with Image.open(run.grid) as picture:
        assert picture.width == picture.height


@pytest.mark.slow
def test_killed_again_and_again_the_run_is_the_same(tmp_path: Path) -> None:
    PatchDatabase.build(IMAGES, path=tmp_path / "db")
    count, chance = 120, random.Random(3)
    run = RunFolder(tmp_path / "killed")

    def start(folder: Path) -> subprocess.Popen[bytes]:
        arguments = f"-n {count} --steps 3 --sizes 3 --eta 1 --batch-size 3 --trajectory"
        command = [sys.executable, "-m", "els.engine", "sample", tmp_path / "db", "-o", folder]
        return subprocess.Popen(
            [*command, *arguments.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    killed = 0
    for kill in range(6):
        process = start(run.path)
        # In the midst of the work, wherever the machine's speed has brought it.
        reached = chance.randrange(kill * count // 8, (kill + 2) * count // 8)
        while process.poll() is None and not run.values(reached).exists():
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for index in range(count):
            if run.values(index).exists():
                run.load(index)
    assert killed >= 3
    for folder in (run.path, tmp_path / "whole"):
        process = start(folder)
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert outputs(run.path) == outputs(tmp_path / "whole")


def test_an_approximate_run_goes_on_and_is_explained(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1200, 1, 5, 5)).astype(np.uint8)
    machine = ScoreMachine(PatchDatabase.build(images, path=tmp_path / "db"), "ELS", "zeros")
    options = {"steps": 3, "patch_sizes": 3, "tolerance": 0.1}
    sample_run(machine, tmp_path / "run", n=1, **options)
    sample_run(machine, tmp_path / "run", n=2, **options)
    assert read_settings(tmp_path / "run").tolerance == 0.1
    sample_run(machine, tmp_path / "other", n=2, **options, shard_size=2)
    at_once = RunFolder(tmp_path / "other")
    for index in range(2):
        assert np.array_equal(RunFolder(tmp_path / "run").load(index), at_once.load(index))
    with pytest.raises(RunError, match="tolerance"):
        sample_run(machine, tmp_path / "run", n=2, **(options | {"tolerance": None}))
    # The explanation follows the run's trajectory: it warns where values differ from the stored.
    for run in ("run", "other"):
        explanation, _ = explain_run(tmp_path / run, 1, step=1)
        assert np.abs(explanation.values - at_once.load(1)).max() <= 1e-6


@pytest.fixture
def estimated(tmp_path: Path) -> tuple[ScoreMachine, RunFolder, dict[str, Any]]:
    """A machine, a run with a tolerance of 2 samples that uses one index, and its arguments."""
    images = np.random.default_rng(0).integers(0, 256, (300, 1, 6, 6)).astype(np.uint8)
    db = PatchDatabase.build(images, path=tmp_path / "db")
    db.build_index(3)
    machine = ScoreMachine(db, "ELS", "zeros")
    options = {"steps": 2, "patch_sizes": [3, 5], "tolerance": 0.2, "batch_size": 1}
    run = sample_run(machine, tmp_path / "run", n=2, **options).folder
    return machine, run, options


def change_estimates(run: RunFolder, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(run.manifest.read_text())
    change(manifest["settings"])
    run.manifest.write_text(json.dumps(manifest))


def test_a_run_says_what_its_estimates_depend_on(estimated, tmp_path: Path) -> None:
    machine, run, options = estimated
    estimates = json.loads(run.manifest.read_text())["settings"]["estimates"]
    manifest = json.loads((machine.db.open_index(3).path / "manifest.json").read_text())
    assert estimates["indices"] == {"3": manifest["files"]["index.faiss"]["sha256"]}
    assert estimates["kernel"]
    for kind in ("LS", "IS"):
        other = ScoreMachine(machine.db, kind, "zeros")
        sample_run(other, tmp_path / kind, n=1, **options)
        assert read_settings(tmp_path / kind).estimates is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda settings: settings["estimates"].update(kernel="avx1024+tiles"),
            r"the kernel is avx1024\+tiles there, .* here",
            id="kernel",
        ),
        pytest.param(
            lambda settings: settings["estimates"]["indices"].update({"3": "0" * 64}),
            "the index of patch size 3 is another one",
            id="other-index",
        ),
        pytest.param(
            lambda settings: settings["estimates"]["indices"].pop("3"),
            "patch size 3 had no index then",
            id="new-index",
        ),
        pytest.param(
            lambda settings: settings["estimates"]["indices"].update({"5": "0" * 64}),
            "the index of patch size 5 is not there",
            id="lost-index",
        ),
        pytest.param(
            lambda settings: settings.pop("estimates"), "an older version began it", id="older"
        ),
    ],
)
def test_estimates_of_two_kinds_are_never_mixed(estimated, change, words: str) -> None:
    machine, run, options = estimated
    change_estimates(run, change)
    before = outputs(run.path)
    with pytest.raises(RunError, match=words):
        sample_run(machine, run.path, n=3, **options)
    assert outputs(run.path) == before
    # What is whole needs no more estimates.
    assert sample_run(machine, run.path, n=2, **options).computed == 0
    run.grid.unlink()
    assert sample_run(machine, run.path, n=2, **options).computed == 0
    assert run.grid.exists()
    explain_run(run.path, 0, step=1)


def test_an_index_that_appears_during_a_run_stops_it(estimated) -> None:
    machine, run, options = estimated

    def build(step: StepProgress) -> None:
        if step.finished == 3 and step.step == 1:
            machine.db.build_index(5)

    with pytest.raises(RunError, match="index of patch size 5 was built during the run"):
        sample_run(machine, run.path, n=5, **options, progress=build)
    assert run.finished(read_settings(run.path)) == [range(3)]


def test_runs_of_older_versions_go_on_without_estimates(machine, tmp_path: Path) -> None:
    run = sample_run(machine, tmp_path, **(OPTIONS | {"n": 2})).folder
    content = run.manifest.read_text()
    assert "estimates" not in content
    assert sample_run(machine, tmp_path, **OPTIONS).computed == 3


@pytest.mark.parametrize(
    "content",
    [
        {"unit": "AMX"},
        {"kernel": 3, "indices": {}},
        {"kernel": "avx2", "indices": ["3"]},
        {"kernel": "avx2", "indices": {"three": "0"}},
        {"kernel": "avx2", "indices": {"3": None}},
        "avx2",
    ],
    ids=str,
)
def test_damaged_estimates_are_refused(machine: ScoreMachine, tmp_path: Path, content) -> None:
    run = sample_run(machine, tmp_path, **OPTIONS).folder
    change_estimates(run, lambda settings: settings.update(estimates=content))
    with pytest.raises(RunError, match="settings are malformed"):
        read_settings(run.path)


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {name: value}
            for name in ("n", "steps", "seed", "label")
            for value in (-1, 2.0, "2", [])
        ),
        *({name: 3} for name in ("database", "content_hash", "backend", "schedule", "patch_sizes")),
        *({name: "x"} for name in ("machine", "boundary", "eta", "tolerance", "trajectory")),
        *({"patch_sizes": value} for value in ("33", [3], [3.0, 3.0], [4, 4], [None, 3])),
        *({"schedule": value} for value in ({}, {"name": []}, {"name": "cosine", "offset": "x"})),
        {"steps": 2**64},
        {"eta": None},
    ],
    ids=str,
)
def test_settings_that_no_run_has_are_damage(machine: ScoreMachine, tmp_path, changes) -> None:
    sample_run(machine, tmp_path, n=1, steps=2, patch_sizes=3)
    manifest = tmp_path / "run.json"
    content = json.loads(manifest.read_bytes())
    content["settings"] |= changes
    manifest.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        read_settings(tmp_path)


def test_a_run_of_any_number_of_samples_is_counted(machine: ScoreMachine, tmp_path) -> None:
    run = sample_run(machine, tmp_path, n=3, steps=2, patch_sizes=3).folder
    run.values(1).unlink()
    settings = dataclasses.replace(read_settings(tmp_path), n=2**64)
    assert run.finished(settings) == [range(0, 1), range(2, 3)]
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="nested too deeply"):
        read_settings(tmp_path)


def test_a_run_with_a_tolerance_says_what_its_steps_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("els.engine.approximate.auto.LEAST_PAIRS", 0)
    images = np.random.default_rng(5).integers(0, 256, (1500, 1, 6, 6)).astype(np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "ELS", "circular")
    report = sample_run(machine, tmp_path / "run", n=2, steps=3, patch_sizes=3, tolerance=0.05)
    steps = report.by_step()
    assert [step.step for step in steps] == [1, 2, 3]
    assert all(sum(step.modes.values()) == 2 for step in steps)
    assert all(0 <= step.error <= 0.05 for step in steps)
    assert any(0 < step.work < 1 for step in steps)
    written = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"][-1]["steps"]
    assert written == [dataclasses.asdict(step) for step in steps]
    exact = sample_run(machine, tmp_path / "exact", n=1, steps=1, patch_sizes=3)
    assert [(step.modes, step.work) for step in exact.by_step()] == [({}, 1.0)]
    assert "steps" not in json.loads((tmp_path / "exact" / "run.json").read_text())["sessions"][-1]
