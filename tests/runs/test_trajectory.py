"""Strips and moving pictures of the steps of a sample."""

from pathlib import Path

import numpy as np
import pytest
from commands import els
from pictures import find_tile
from PIL import Image

from els.engine import ScoreMachine
from els.index import PatchDatabase, encode
from els.runs import trajectory
from els.runs.folder import RunFolder
from els.runs.run import sample_run
from els.runs.stores import RunError
from els.runs.trajectory import ANIMATIONS, draw_trajectory, read_trajectory
from els.storage.labelled import PICTURE_FORMATS, Labels
from els.storage.png import panels

RNG = np.random.default_rng(8)
STEPS = 4


def sampled(path: Path, channels: int = 1, **options: object) -> RunFolder:
    images = RNG.integers(0, 256, (5, channels, 5, 8), dtype=np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "ELS", "zeros", "torch")
    settings = {"n": 2, "steps": STEPS, "patch_sizes": 3, "trajectory": True} | options
    return sample_run(machine, path / "run", **settings).folder


@pytest.mark.parametrize(
    ("channels", "canvas"),
    [
        pytest.param(1, None, id="grey"),
        pytest.param(2, (9, 6), id="C2-canvas"),
        pytest.param(3, (9, 6), id="colour-canvas"),
        pytest.param(4, None, id="C4"),
    ],
)
def test_steps_are_drawn_from_noise_to_clean(
    tmp_path: Path, channels: int, canvas: tuple[int, int] | None
) -> None:
    run = sampled(tmp_path, channels, canvas=canvas)
    for suffix in (".png", ".webp", ".gif"):
        assert draw_trajectory(run.path, 1, tmp_path / f"steps{suffix}") == STEPS
    with np.load(run.trajectory(1, ".npz")) as arrays:
        rows = [[panels(encode(each)) for each in arrays[name]] for name in ("x_t", "predicted")]
    with Image.open(tmp_path / "steps.png") as picture:
        places = [placed(picture, tile) for row in rows for tile in row]
    above, below = places[:STEPS], places[STEPS:]
    assert len({y for y, _ in above}) == len({y for y, _ in below}) == 1
    assert above[0][0] < below[0][0]
    assert [x for _, x in above] == [x for _, x in below] == sorted({x for _, x in above})
    for suffix in (".webp", ".gif"):
        with Image.open(tmp_path / f"steps{suffix}") as picture:
            assert picture.n_frames == STEPS
            for step in range(STEPS):
                picture.seek(step)
                picture.load()
                assert picture.info["duration"] == (2000 if step == STEPS - 1 else 200)
                # A GIF has but 256 colours, of which some are the words'.
                if suffix == ".webp":
                    noisy, predicted = (placed(picture, row[step]) for row in rows)
                    assert noisy[0] == predicted[0]
                    assert noisy[1] < predicted[1]


def placed(picture: Image.Image, tile: np.ndarray) -> tuple[int, int]:
    """Where a tile is in a picture: the red of both is compared."""
    red = np.asarray(picture.convert("RGB"))[..., 0]
    return find_tile(red, tile if tile.ndim == 2 else tile[..., 0])[:2]


def test_steps_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sampled(tmp_path)
    strips: list[Labels] = []
    frames: list[Labels] = []
    monkeypatch.setattr(
        trajectory, "write_grid", lambda path, tiles, columns, labels: strips.append(labels)
    )
    draw = trajectory.draw_grid

    def keep(tiles: list[np.ndarray], columns: int, labels: Labels) -> np.ndarray:
        frames.append(labels)
        return draw(tiles, columns, labels)

    monkeypatch.setattr(trajectory, "draw_grid", keep)
    draw_trajectory(run.path, 0, tmp_path / "s.svg")
    draw_trajectory(run.path, 0, tmp_path / "s.gif")
    names = ("noisy x_t", "predicted x_0")
    title = "sample 0, from noise (step 1) to clean (step 4)"
    assert strips == [Labels(title, names, ("1", "2", "3", "4"))]
    sigma = read_trajectory(run.path, 0).sigma
    assert (np.diff(sigma) < 0).all()
    assert frames == [
        Labels(f"sample 0, step {step} of 4, sigma {sigma[step - 1]:.3f}", columns=names)
        for step in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("suffix", sorted({*PICTURE_FORMATS, *ANIMATIONS}))
def test_every_format(tmp_path: Path, suffix: str) -> None:
    run = sampled(tmp_path)
    made = els("trajectory", run.path, "--sample", 1, "-o", tmp_path / f"s{suffix}")
    assert made.exit_code == 0, made.stderr
    assert "4 steps: " in made.stdout
    assert (tmp_path / f"s{suffix}").stat().st_size > 0


def test_what_cannot_be_drawn_is_one_message(tmp_path: Path) -> None:
    run = sampled(tmp_path / "kept")
    without = sampled(tmp_path / "not", trajectory=False)
    for folder, sample, output, words in (
        (run.path, 2, "s.png", "sample 2 of"),
        (run.path, 0, "s.bmp", ".png, .jpg, .jpeg, .webp"),
        (run.path, 0, "none/s.png", "its folder is not there; make the folder"),
        (without.path, 0, "s.png", "els sample --trajectory keeps them"),
        (tmp_path, 0, "s.png", "is not a run"),
    ):
        result = els("trajectory", folder, "--sample", sample, "-o", tmp_path / output)
        assert result.exit_code == 1, output
        assert words in result.stderr
        assert result.stderr.count("error: ") == 1
    assert not (tmp_path / "s.png").exists()
    kept = run.trajectory(0, ".npz")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-100])
    with pytest.raises(RunError, match="is damaged"):
        read_trajectory(run.path, 0)
    np.savez(kept, x_t=np.zeros((2, 1, 5, 8)), predicted=np.zeros((3, 1, 5, 8)), sigma=[1, 2])
    with pytest.raises(RunError, match="is damaged"):
        read_trajectory(run.path, 0)
    kept.unlink()
    with pytest.raises(RunError, match="is not there"):
        read_trajectory(run.path, 0)


def test_too_many_steps_for_a_format_are_refused(tmp_path: Path) -> None:
    run = sampled(tmp_path)
    count = 20_000
    values = np.zeros((count, 1, 1, 4), np.float32)
    np.savez(run.trajectory(0, ".npz"), x_t=values, predicted=values, sigma=np.ones(count))
    with pytest.raises(ValueError, match=r"\.png has at most 65,535 a side; draw fewer"):
        draw_trajectory(run.path, 0, tmp_path / "s.png")
