"""Runs of the baselines, of smoothed machines and on a canvas: resumed, refused, read again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from els.engine import ScoreMachine, SmoothedDenoiser, sample
from els.index import PatchDatabase
from els.runs.folder import RunFolder, read_settings
from els.runs.run import sample_run
from els.runs.stores import RunError


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> PatchDatabase:
    images = np.random.default_rng(1).integers(0, 256, (40, 1, 6, 7), dtype=np.uint8)
    return PatchDatabase.build(images, path=tmp_path_factory.mktemp("denoisers") / "db")


@pytest.mark.parametrize("kind", ["PCA", "Wiener", "nearest"])
def test_a_baseline_goes_on(db: PatchDatabase, tmp_path: Path, kind: str) -> None:
    machine = ScoreMachine(db, kind)
    sample_run(machine, tmp_path / "run", n=2, steps=3, seed=4)
    sample_run(machine, tmp_path / "run", n=3, steps=3, seed=4)
    stored = np.stack([RunFolder(tmp_path / "run").load(i) for i in range(3)])
    np.testing.assert_allclose(stored, sample(machine, n=3, steps=3, seed=4), atol=1e-5)
    settings = read_settings(tmp_path / "run")
    assert settings.machine == kind
    assert settings.mask_threshold == (0.02 if kind == "PCA" else None)
    again = settings.machine_over(db)
    assert (again.kind, again.mask_threshold) == (kind, settings.mask_threshold)
    if kind == "PCA":
        other = ScoreMachine(db, kind, mask_threshold=0.1)
        with pytest.raises(RunError, match="mask_threshold"):
            sample_run(other, tmp_path / "run", n=4, steps=3, seed=4)


def test_a_smoothed_run_goes_on(db: PatchDatabase, tmp_path: Path) -> None:
    def machine(std: float = 0.1, seed: int = 4) -> SmoothedDenoiser:
        return SmoothedDenoiser(ScoreMachine(db, "IS"), std=std, copies=3, seed=seed)

    options = {"steps": 3, "seed": 4}
    sample_run(machine(), tmp_path / "run", n=1, **options)
    sample_run(machine(), tmp_path / "run", n=2, **options)
    settings = read_settings(tmp_path / "run")
    again = settings.machine_over(db)
    assert isinstance(again, SmoothedDenoiser)
    stored = torch.from_numpy(RunFolder(tmp_path / "run").load(1))
    torch.testing.assert_close(sample(again, indices=[1], **options)[0], stored)
    with pytest.raises(RunError, match=r"smoothing is 0\.1x3 there"):
        sample_run(machine(std=0.2), tmp_path / "run", n=3, **options)
    with pytest.raises(ValueError, match="smoothed with seed=5"):
        sample_run(machine(seed=5), tmp_path / "other", n=1, **options)


def test_a_canvas_goes_on(db: PatchDatabase, tmp_path: Path) -> None:
    machine = ScoreMachine(db, "ELS", "circular")
    options = {"steps": 3, "patch_sizes": 3, "canvas": (9, 15), "trajectory": True}
    sample_run(machine, tmp_path / "run", n=1, **options)
    sample_run(machine, tmp_path / "run", n=2, **options)
    run = RunFolder(tmp_path / "run")
    assert run.load(1).shape == (1, 9, 15)
    assert read_settings(tmp_path / "run").canvas == (9, 15)
    with pytest.raises(RunError, match="canvas"):
        sample_run(machine, tmp_path / "run", n=3, **(options | {"canvas": None}))
