"""Explanations: who won, by how much, and a picture of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from els.engine import ScoreMachine, SmoothedDenoiser
from els.engine.approximate import auto
from els.engine.approximate.costs import FIRST_IMAGES
from els.engine.sampler import plan_sampling
from els.engine.schedule import Cosine
from els.explain.explanation import Explanation
from els.explain.picture import draw, require_picture, write_explanation
from els.explain.replay import explain_run, explain_sample, walk_run
from els.index import PatchDatabase, decode
from els.runs.folder import RunFolder
from els.runs.run import sample_run
from els.runs.stores import RunError
from els.storage.png import colours, grid, panels

RNG = np.random.default_rng(21)
COUNT, HEIGHT, WIDTH = 5, 7, 9
CASES = [
    pytest.param(kind, boundary, channels, id=f"{kind}-{boundary}-C{channels}")
    for kind, boundary, channels in [
        ("ELS", "zeros", 1),
        ("ELS", "zeros", 3),
        ("ELS", "circular", 4),
        ("LS", "zeros", 1),
        ("LS", "circular", 3),
        ("IS", "zeros", 1),
        ("IS", "zeros", 3),
        ("ES", "zeros", 2),
    ]
]


def made(path: Path, kind: str, boundary: str, channels: int, **options) -> tuple[Path, Path]:
    """A database and a run of two samples in three steps."""
    images = RNG.integers(0, 256, (COUNT, channels, HEIGHT, WIDTH), dtype=np.uint8)
    db = PatchDatabase.build(
        images, [0, 1, 0, 1, 1], path=path / "db", class_names=["left", "right"]
    )
    machine = ScoreMachine(db, kind, boundary, "torch")
    sample_run(machine, path / "run", n=2, steps=3, patch_sizes=[3, 3, 5], **options)
    return path / "db", path / "run"


@pytest.mark.parametrize(("kind", "boundary", "channels"), CASES)
@pytest.mark.thinned
def test_an_explanation_is_what_the_machine_saw(kind, boundary, channels, tmp_path: Path) -> None:
    _, run = made(tmp_path, kind, boundary, channels, eta=0.5, trajectory=True)
    explanation, db = explain_run(run, 1, step=2, top=400)
    np.testing.assert_array_equal(explanation.values, RunFolder(run).load(1))
    assert explanation.patch_sizes.tolist() == ([5, 3, 3] if "LS" in kind else [0, 0, 0])
    assert explanation.sigma.tolist() == [Cosine().sigma(i / 3) for i in (3, 2, 1)]
    candidates = COUNT * (1 if kind in ("IS", "LS") else HEIGHT * WIDTH)
    assert explanation.effective_patches.shape == (3, HEIGHT, WIDTH)
    assert explanation.effective_patches.min() > 1 - 1e-6
    assert explanation.effective_patches.max() < candidates * (1 + 1e-6)
    # All candidates were asked for, so nothing is missing.
    np.testing.assert_allclose(explanation.weights.sum(-1), 1, rtol=1e-5)
    assert sum(c.share for c in explanation.contributors()) == pytest.approx(1, rel=1e-5)
    shares = [contributor.share for contributor in explanation.contributors()]
    assert shares == sorted(shares, reverse=True)
    if kind in ("IS", "LS"):
        assert not explanation.offsets().any()
        y, x = np.indices((HEIGHT, WIDTH))[..., None]
        # Every candidate is there, so the weights make the mean that the run predicted.
        places = np.where(explanation.sources < 0, 0, explanation.sources)
        centres = decode(db.images)[places, :, y, x]
        with np.load(RunFolder(run).trajectory(1, ".npz")) as arrays:
            mean = (explanation.weights[..., None] * centres).sum(axis=2)
            np.testing.assert_allclose(np.moveaxis(mean, -1, 0), arrays["predicted"][1], atol=1e-5)
    if kind == "ES":
        # Whole images shift as one, and by half a side at most.
        offsets = explanation.offsets()
        assert (offsets == offsets[:, :1, :1]).all()
        assert np.abs(offsets[..., 0]).max() <= HEIGHT // 2
        assert np.abs(offsets[..., 1]).max() <= WIDTH // 2
    write_explanation(explanation, db, tmp_path / "why.png")
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.width > 1000


def test_the_ideal_machines_winner_is_the_nearest_image(tmp_path: Path) -> None:
    _, run = made(tmp_path, "IS", "zeros", 3)
    explanation, db = explain_run(run, 0)
    distances = ((decode(db.images) - explanation.values) ** 2).sum(axis=(1, 2, 3))
    assert (explanation.heaviest[-1, ..., 0] == distances.argmin()).all()
    winner = explanation.contributors()[0]
    assert winner.image == distances.argmin()
    assert winner.share == pytest.approx(1, abs=1e-3)


def test_one_label_gives_from_one_class(tmp_path: Path) -> None:
    _, run = made(tmp_path, "ELS", "zeros", 1, label=0)
    explanation, db = explain_run(run, 0)
    assert set(db.labels[explanation.heaviest[..., 0]].flat) == {0}


def test_a_run_with_a_tolerance_is_explained_by_what_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "LEAST_PAIRS", 0)
    images = np.random.default_rng(1).integers(0, 256, (1500, 1, HEIGHT, WIDTH), dtype=np.uint8)
    db = PatchDatabase.build(images, path=tmp_path / "db")
    machine = ScoreMachine(db, "ELS", "circular")
    options = {"steps": 3, "patch_sizes": [3, 3, 5], "tolerance": 0.3}
    report = sample_run(machine, tmp_path / "run", n=1, **options)
    assert [list(step.modes) for step in report.by_step()] == [["subset"]] * 3
    explanation, _ = explain_run(tmp_path / "run", 0, top=4)
    # The random order of every step's question is its own.
    for row in range(3):
        assert len(np.unique(explanation.heaviest[row, ..., 0])) <= FIRST_IMAGES
    walkthrough, _ = walk_run(tmp_path / "run", 0, top=4)
    np.testing.assert_array_equal(
        np.stack(db.locate(walkthrough.addresses[..., 0]), -1), explanation.heaviest
    )
    assert walkthrough.effective_patches.max() <= 1500 * HEIGHT * WIDTH * (1 + 1e-6)


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_a_canvas_is_explained(tmp_path: Path, boundary: str) -> None:
    _, run = made(tmp_path, "ELS", boundary, 3, canvas=(12, 17))
    explanation, db = explain_run(run, 1, step=2, top=3)
    np.testing.assert_array_equal(explanation.values, RunFolder(run).load(1))
    assert explanation.values.shape == (3, 12, 17)
    assert explanation.heaviest.shape == (3, 12, 17, 3)
    # Patches are of the training images, whose sides are others.
    assert explanation.heaviest[..., 1].max() < HEIGHT
    assert explanation.heaviest[..., 2].max() < WIDTH
    write_explanation(explanation, db, tmp_path / "why.png")
    walkthrough, _ = walk_run(run, 1, top=3)
    assert walkthrough.weights.shape == (3, 12, 17, 3)


def test_what_weighs_no_patches_is_not_explained(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (COUNT, 1, HEIGHT, WIDTH), dtype=np.uint8)
    db = PatchDatabase.build(images, path=tmp_path / "db")
    sample_run(ScoreMachine(db, "Wiener"), tmp_path / "wiener", n=1, steps=2)
    with pytest.raises(RunError, match="Wiener filter, which weighs no patches"):
        explain_run(tmp_path / "wiener", 0)
    smoothed = SmoothedDenoiser(ScoreMachine(db, "IS"), std=0.1, copies=3)
    sample_run(smoothed, tmp_path / "smoothed", n=1, steps=2)
    with pytest.raises(RunError, match="smoothed machine"):
        explain_run(tmp_path / "smoothed", 0)


@pytest.mark.parametrize("kind", ["PCA", "nearest"])
def test_baselines_are_explained_by_their_images(tmp_path: Path, kind: str) -> None:
    _, run = made(tmp_path, kind, "zeros", 3)
    explanation, db = explain_run(run, 0, top=2)
    assert not explanation.offsets().any()
    write_explanation(explanation, db, tmp_path / "why.png")


def test_the_data_is_beside_the_picture(tmp_path: Path) -> None:
    _, run = made(tmp_path, "ELS", "zeros", 1)
    explanation, db = explain_run(run, 0, step=1, top=4)
    data = write_explanation(explanation, db, tmp_path / "new" / "why.svg")
    assert data == tmp_path / "new" / "why.npz"
    assert (tmp_path / "new" / "why.svg").read_bytes().startswith(b"<?xml")
    with np.load(data) as arrays:
        np.testing.assert_array_equal(arrays["heaviest"], explanation.heaviest)
        assert arrays["weights"].shape == arrays["sources"].shape == (HEIGHT, WIDTH, 4)
        assert str(arrays["kind"]) == "ELS"
        contributors = explanation.contributors()
        assert arrays["contributor_images"].tolist() == [c.image for c in contributors]


@pytest.mark.parametrize(
    ("count", "shape", "steps"),
    [
        pytest.param(1, (1, 1, 1), 1, id="one-pixel-one-image"),
        pytest.param(12, (1, 3, 12), 30, id="wide-many-steps"),
        pytest.param(12, (3, 12, 3), 2, id="tall-unlabelled"),
    ],
)
def test_awkward_shapes_are_drawn(count: int, shape, steps: int) -> None:
    db = PatchDatabase.from_arrays(RNG.integers(0, 256, (count, *shape), dtype=np.uint8))
    machine = ScoreMachine(db, "ELS", "zeros", "torch")
    options = {"steps": steps, "patch_sizes": 1, "seed": 0, "schedule": Cosine(), "eta": 0.0}
    explanation = explain_sample(machine, plan_sampling(machine, **options), 0)
    assert isinstance(explanation, Explanation)
    draw(explanation, db).canvas.draw()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"index": 2}, "sample 2", id="no-sample"),
        pytest.param({"step": 0}, "step=0", id="step-low"),
        pytest.param({"step": 4}, "step=4", id="step-high"),
        pytest.param({"top": 0}, "top=0", id="top-low"),
        pytest.param({"top": 10**6}, "top=1000000", id="top-high"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, options, words: str) -> None:
    _, run = made(tmp_path, "IS", "zeros", 1)
    with pytest.raises((ValueError, RunError), match=words):
        explain_run(run, **({"index": 0} | options))


def test_another_database_is_refused(tmp_path: Path) -> None:
    db, run = made(tmp_path, "IS", "zeros", 1)
    PatchDatabase.build(PatchDatabase.open(db).images[:2], path=tmp_path / "other")
    with pytest.raises(RunError, match="another database than that of") as caught:
        explain_run(run, 0, database=tmp_path / "other")
    for each in (db, tmp_path / "other"):
        assert PatchDatabase.open(each).summary in str(caught.value)
    db.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is not at .*db any more; .*database=PATH") as caught:
        explain_run(run, 0)
    assert "els build" not in str(caught.value)
    explain_run(run, 0, database=tmp_path / "moved")


def test_a_sample_that_cannot_be_reproduced_is_not_explained(tmp_path: Path) -> None:
    _, run = made(tmp_path, "LS", "zeros", 1)
    np.save(RunFolder(run).values(0), RunFolder(run).load(0) + np.float32(0.5))
    with pytest.raises(RunError, match="came out differently"):
        explain_run(run, 0)


def test_steps_count_from_the_noise(tmp_path: Path) -> None:
    _, run = made(tmp_path, "ELS", "zeros", 1)
    last, _ = explain_run(run, 0, top=3)
    assert (last.step, last.row) == (3, 2)
    first, _ = explain_run(run, 0, step=1, top=3)
    assert first.row == 0
    assert first.sigma.tolist() == last.sigma.tolist() == sorted(last.sigma, reverse=True)
    # At the last step fewer patches share a pixel than in the noise.
    assert last.weights[..., 0].mean() > first.weights[..., 0].mean()
    np.testing.assert_array_equal(last.heaviest, first.heaviest)


def test_only_pictures_are_drawn() -> None:
    with pytest.raises(ValueError, match=r"\.png"):
        require_picture("why.txt")


@pytest.mark.parametrize("channels", [1, 2, 3, 4], ids=lambda c: f"C{c}")
def test_channels_are_shown(channels: int) -> None:
    image = RNG.integers(0, 256, (channels, 4, 5), dtype=np.uint8)
    assert colours(image).shape == (4, 5, 3)
    assert colours(image).dtype == np.uint8
    shown = panels(image)
    assert shown.size == image.size
    assert set(shown.flat) == set(image.flat)


def test_grids_keep_their_order() -> None:
    tiles = [np.full((300, 300), level, np.uint8) for level in (10, 20, 30)]
    picture = grid(tiles, columns=2)
    assert [picture[150, 150], picture[150, 450], picture[450, 150]] == [10, 20, 30]
    assert picture[450, 450] == 255
