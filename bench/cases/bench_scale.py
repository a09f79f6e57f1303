"""Whole data sets: ``pytest bench/cases/bench_scale.py --cifar SOURCE --fashion-mnist SOURCE``."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from els.engine import ScoreMachine
from els.index import PatchDatabase, open_source
from els.runs.run import RunReport, sample_run

SCORE = textwrap.dedent(
    """
    import resource, sys
    import torch
    from els.engine import ScoreMachine
    from els.index import PatchDatabase

    machine = ScoreMachine(PatchDatabase.open(sys.argv[1]), "ELS", "zeros", backend="native")
    x = torch.randn(1, *machine.db.shape, generator=torch.Generator().manual_seed(0))
    machine.score(x, alpha=0.8**0.5, sigma=0.2**0.5, patch_size=5)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    """
)


def built(request: pytest.FixtureRequest, option: str, folder: Path) -> PatchDatabase:
    spec = request.config.getoption(option)
    if spec is None:
        pytest.skip(f"needs {option} SOURCE")
    return PatchDatabase.build(open_source(spec), path=folder / "db")


def test_scoring_memory(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Peak memory of a process that scores one query against all of CIFAR-10."""
    db = built(request, "--cifar", tmp_path)

    def score() -> int:
        command = [sys.executable, "-c", SCORE, str(db.path)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    peak = benchmark.pedantic(score, rounds=1)
    assert peak <= 3 * db.images.nbytes + 300e6
    benchmark.extra_info |= {
        "images": len(db),
        "image_bytes": db.images.nbytes,
        "peak_bytes": peak,
    }


def test_sampling(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """``els sample`` on all of Fashion-MNIST: boundary-broken ELS, 20 steps, the paper's sizes."""
    db = built(request, "--fashion-mnist", tmp_path)
    machine = ScoreMachine(db, "ELS", "zeros", backend="native")

    def draw() -> RunReport:
        return sample_run(machine, tmp_path / "run", n=2, patch_sizes="fashion-mnist-resnet")

    report = benchmark.pedantic(draw, rounds=1)
    benchmark.extra_info |= {
        "images": len(db),
        "backend": machine.backend,
        "seconds_by_patch_size": report.seconds_by_patch_size(),
    }
