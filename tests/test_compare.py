"""els bench: what it reports is what the posteriors say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from els.engine import ScoreMachine
from els.engine.cli import app
from els.engine.compare import compare_posteriors, compare_samples, held_out
from els.index import PatchDatabase


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> PatchDatabase:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (700, 1, 7, 6)).astype(np.uint8)
    built = PatchDatabase.build(images, path=tmp_path_factory.mktemp("compare") / "db")
    built.build_index(3, factory="Flat")
    return built


def test_every_method_is_compared_with_the_exact_posterior(db: PatchDatabase) -> None:
    clean = held_out(db, 2, seed=1)
    rows = list(compare_posteriors(db, clean, [(0.2, 3), (0.5, 1)], seed=3, with_torch=True))
    named = {(row.beta, row.method): row for row in rows}
    methods = [row.method for row in rows if row.beta == 0.2]
    assert methods == [
        "exact",
        "subset 256",
        "topk 64",
        "topk 256",
        "topk 1024",
        "topk+subset 256 1024",
        "auto 0.01",
        "torch backend",
    ]
    # Without an index there is no head.
    assert [row.method for row in rows if row.beta == 0.5][1:3] == ["subset 256", "auto 0.01"]
    for beta in (0.2, 0.5):
        exact = named[beta, "exact"]
        assert (exact.mean_error, exact.max_error, exact.omitted, exact.claimed) == (0, 0, 0, 0)
        assert exact.speed_up == 1
        assert named[beta, "torch backend"].max_error <= 2e-5
    assert all(named[0.2, f"topk {k}"].recall == 1 for k in (64, 256, 1024))
    assert named[0.2, "topk 1024"].mean_error <= named[0.2, "topk 64"].mean_error
    # A bound.
    assert named[0.2, "topk 64"].mean_error <= named[0.2, "topk 64"].claimed
    # All pixels share one error where patches are single pixels: beyond three times its mean
    # absolute value (2.4 standard errors) is one in 60.
    subset = named[0.5, "subset 256"]
    assert 0 < subset.mean_error <= 3 * subset.claimed


def test_queries_are_not_in_the_database(db: PatchDatabase) -> None:
    mirrored = held_out(db, 3, seed=1)
    assert mirrored.shape == (3, 1, 7, 6)
    pixels = {image.tobytes() for image in db.images}
    shown = ((mirrored + 1) * 127.5).round().to(torch.uint8).numpy()
    assert all(image.tobytes() not in pixels for image in shown)
    assert all(image[..., ::-1].tobytes() in pixels for image in shown)


def test_samples_of_no_tolerance_would_be_the_same(db: PatchDatabase) -> None:
    near = compare_samples(db, 3, n=2, steps=3, tolerance=1e-6)
    assert near.r_squared == pytest.approx(1)
    assert near.psnr > 80
    assert 0.9 < near.r_squared_of_moved <= 1
    assert math.isfinite(near.speed_up)


def test_the_command(db: PatchDatabase, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    arguments = ["bench", str(db.path), "-o", str(out), "--noise", "0.3:3", "-n", "1"]
    done = CliRunner().invoke(app, [*arguments, "--samples", "1", "--sizes", "3"])
    assert done.exit_code == 0, done.output
    assert "auto 0.01" in done.output
    assert "whole samples to 0.01" in done.output
    written = json.loads((out / "bench.json").read_text())
    assert written["database"]["content_hash"] == db.content_hash
    assert {row["method"] for row in written["posteriors"]} >= {"exact", "topk 64", "auto 0.01"}
    assert written["samples"]["r_squared"] <= 1
    with Image.open(out / "pareto.png") as picture:
        assert picture.size[0] > 100


@pytest.mark.parametrize("noise", ["0.3", "0.3:x", "0:3", "2:3"])
def test_a_wrong_noise_is_said(db: PatchDatabase, tmp_path: Path, noise: str) -> None:
    done = CliRunner().invoke(app, ["bench", str(db.path), "-o", str(tmp_path), "--noise", noise])
    assert done.exit_code == 1
    assert "--noise" in done.output


def test_the_recall_of_one_query_at_a_time(db: PatchDatabase) -> None:
    machine = ScoreMachine(db, "ELS", "circular")
    x = held_out(db, 2, seed=1)
    with pytest.raises(ValueError, match="x has 2 images"):
        machine.recall(x, alpha=1.0, sigma=0.3, patch_size=3, k=4)
    assert machine.recall(x[:1], alpha=1.0, sigma=0.3, patch_size=3, k=4) == 1
