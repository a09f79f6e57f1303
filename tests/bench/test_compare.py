"""els bench: what it reports is what the posteriors say."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from els.bench import baselines, compare
from els.bench.compare import (
    Comparison,
    _front,
    _kind,
    _typical,
    compare_posteriors,
    compare_samples,
    held_out,
)
from els.cli.app import app
from els.engine import ScoreMachine
from els.engine.kinds import Boundary
from els.index import PatchDatabase, decode


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> PatchDatabase:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (700, 1, 7, 6)).astype(np.uint8)
    built = PatchDatabase.build(images, path=tmp_path_factory.mktemp("compare") / "db")
    built.build_index(3, factory="Flat")
    return built


def test_every_method_is_compared_with_the_exact_posterior(db: PatchDatabase) -> None:
    clean = held_out(db, 2, seed=1)
    noise = [(0.2, 3), (0.5, 1)]
    rows = list(compare_posteriors(db, clean, noise, seed=3, with_torch=True, with_baselines=True))
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
        "chunked torch",
        "FAISS flat 256",
    ]
    # Without an index there is no head.
    assert [row.method for row in rows if row.beta == 0.5][1:3] == ["subset 256", "auto 0.01"]
    for beta in (0.2, 0.5):
        exact = named[beta, "exact"]
        assert (exact.mean_error, exact.max_error, exact.omitted, exact.claimed) == (0, 0, 0, 0)
        assert exact.speed_up == 1
        assert named[beta, "torch backend"].max_error <= 2e-5
        # Logits up to 9 * 4 / 0.4 in float32, from three terms of that size.
        assert named[beta, "chunked torch"].max_error <= 2e-4
    assert all(named[0.2, f"topk {k}"].recall == 1 for k in (64, 256, 1024))
    assert named[0.2, "topk 1024"].mean_error <= named[0.2, "topk 64"].mean_error
    # The same 256 patches, of a Flat index too.
    flat = named[0.2, "FAISS flat 256"]
    assert flat.mean_error == pytest.approx(named[0.2, "topk 256"].mean_error, rel=1e-3)
    assert (flat.claimed, flat.omitted, flat.note) == (None, None, None)
    # A bound.
    assert named[0.2, "topk 64"].mean_error <= named[0.2, "topk 64"].claimed
    # All pixels share one error where patches are single pixels: beyond three times its mean
    # absolute value (2.4 standard errors) is one in 60.
    subset = named[0.5, "subset 256"]
    assert 0 < subset.mean_error <= 3 * subset.claimed


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
@pytest.mark.parametrize("patch_size", [1, 3, 5])
def test_baselines_are_the_posterior(boundary: Boundary, patch_size: int) -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (37, 2, 6, 7)).astype(np.uint8)
    x = torch.randn(1, 2, 6, 7, generator=torch.Generator().manual_seed(0))
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "ELS", boundary, backend="torch")
    noise = {"alpha": 0.8, "sigma": 0.6}
    mean = machine.posterior(x.double(), patch_size=patch_size, **noise).mean
    rows, columns = baselines.answered((2, 6, 7), patch_size, boundary)
    expected = mean[0, :, rows, columns].flatten(1).T.numpy()
    queries = baselines.query_patches(x, patch_size, boundary)
    patches = len(images) * (7 - patch_size) * (8 - patch_size)
    assert baselines.pairs((2, 6, 7), patch_size, boundary) * len(images) == len(queries) * patches
    chunked = baselines.chunked_torch(images, queries, patch_size=patch_size, **noise)
    flat = baselines.FlatNearest(images, patch_size).means(queries, k=patches, **noise)
    # Logits up to some hundred in float32.
    np.testing.assert_allclose(chunked, expected, atol=1e-4)
    np.testing.assert_allclose(flat, expected, atol=1e-4)
    assert flat.abs().max() < 1
    nearest = baselines.FlatNearest(images, patch_size).means(queries, k=1, **noise)
    top = machine.posterior(x.double(), patch_size=patch_size, top=1, **noise).top_addresses
    assert top is not None
    n, row, column = machine.db.locate(top[0, rows, columns].flatten().numpy())
    np.testing.assert_allclose(nearest, decode(images)[n, :, row, column], atol=1e-6)


def test_baselines_see_what_fits(db: PatchDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = held_out(db, 1, seed=1)
    noise = [(0.3, 3)]

    def baseline_rows(memory: int) -> dict[str, Comparison]:
        rows = compare_posteriors(
            db, clean, noise, boundary="circular", with_baselines=True, memory=memory
        )
        return {row.method: row for row in rows if row.method.startswith(("chunked", "FAISS"))}

    # An image is 20 patches of 9 float32, twice.
    limited = baseline_rows(100 * 20 * 36 * 2 + 1)
    assert list(limited) == ["chunked torch", "FAISS flat 256, 100 images"]
    row = limited["FAISS flat 256, 100 images"]
    assert (row.speed_up, row.note) == (
        None,
        "the first 100 of 700 images only: all are more than 144,001 bytes of patches",
    )
    monkeypatch.setattr(compare, "_MOST_PAIRS", 42 * 20 * 50)
    limited = baseline_rows(4 * 10**9)
    assert list(limited) == ["chunked torch, 50 images", "FAISS flat 256, 50 images"]
    row = limited["chunked torch, 50 images"]
    assert row.note == "the first 50 of 700 images only: all are more than 42,000 pairs a query"
    # It is the posterior of those images.
    alpha, sigma = 0.7**0.5, 0.3**0.5
    x = alpha * clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    whole, few = (
        ScoreMachine(of, "ELS", "circular").posterior(x, alpha=alpha, sigma=sigma, patch_size=3)
        for of in (db, PatchDatabase.from_arrays(db.images[:50]))
    )
    assert row.mean_error == pytest.approx(float((few.mean - whole.mean).abs().mean()), rel=1e-3)


def test_a_baseline_that_cannot_be_is_left_out_aloud(
    db: PatchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(**options: Any) -> str:
        said: list[str] = []
        rows = compare_posteriors(
            db, held_out(db, 1, seed=1), with_baselines=True, progress=said.append, **options
        )
        methods = [row.method for row in rows]
        assert methods[-1] == "chunked torch"
        return said[-1]

    assert "one image exceeds 100 bytes" in without(noise=[(0.3, 3)], memory=100)
    assert "without a signal" in without(noise=[(1.0, 1)])
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'els-machine[cpu]'" in without(noise=[(0.3, 1)])


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
    assert "recall         share of the K nearest" in done.output
    assert "whole samples to 0.01" in done.output
    written = json.loads((out / "bench.json").read_text())
    assert written["database"]["content_hash"] == db.content_hash
    methods = {row["method"] for row in written["posteriors"]}
    assert methods >= {"exact", "topk 64", "auto 0.01", "chunked torch", "FAISS flat 256"}
    assert written["samples"]["r_squared"] <= 1
    assert all(row["spread"] >= 0 for row in written["posteriors"])
    with Image.open(out / "pareto.png") as picture:
        assert picture.size[0] > 100


def test_uneven_times_and_a_busy_machine_are_said(
    db: PatchDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bench", str(db.path), "-o", str(tmp_path), "--noise", "0.3:3", "-n", "1"]
    monkeypatch.setattr(compare.os, "getloadavg", lambda: (3.2, 0.0, 0.0), raising=False)
    monkeypatch.setattr(compare, "BUSY_SPREAD", -1.0)
    done = CliRunner().invoke(app, [*arguments, "--no-baselines"])
    assert done.exit_code == 0, done.output
    assert "load average 3.2" in done.output
    assert "times of 7 of 7 rows vary" in done.output
    monkeypatch.setattr(compare.os, "getloadavg", lambda: (0.1, 0.0, 0.0), raising=False)
    monkeypatch.setattr(compare, "BUSY_SPREAD", 1e9)
    done = CliRunner().invoke(app, [*arguments, "--no-baselines"])
    assert "warning" not in done.output


def test_the_spread_is_of_repeats_and_not_of_queries() -> None:
    assert _typical([[1.0, 1.1, 1.2], [10.0, 10.0, 10.0]]) == (5.55, pytest.approx(0.1 / 1.1))


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


def test_the_front_is_what_no_other_beats() -> None:
    def row(method: str, seconds: float, error: float) -> Comparison:
        return Comparison(0.1, 3, method, seconds, 0.0, None, error, error, None, None, None)

    rows = [row("b", 2, 0.1), row("a", 1, 0.3), row("slow", 3, 0.2), row("c", 4, 0.05)]
    assert _front(rows) == [(1, 0.3), (2, 0.1), (4, 0.05)]


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("subset 256", "subset"),
        ("topk+subset 256 1024", "topk+subset"),
        ("auto 0.01", "auto"),
        ("FAISS flat 256, 1,000 images", "FAISS flat"),
        ("chunked torch, 128 images", "chunked torch"),
        ("torch backend", "torch backend"),
    ],
)
def test_a_method_without_its_sizes(method: str, kind: str) -> None:
    assert _kind(method) == kind
