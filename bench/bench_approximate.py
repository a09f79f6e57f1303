"""Approximate posteriors as the data set grows: ``--fashion-mnist SOURCE``, all of its images.

Subsets alone, without an index. Each case first passes a gate: the error that the exact posterior
shows must be within one and a half tolerances.
"""

import time
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from els.bench.workloads import BETA, Workload, workload
from els.engine import ScoreMachine
from els.index import open_source

_QUERIES = 4


@pytest.fixture(scope="session")
def shuffled(request: pytest.FixtureRequest) -> npt.NDArray[np.uint8]:
    spec = request.config.getoption("--fashion-mnist")
    if spec is None:
        pytest.skip("needs --fashion-mnist SOURCE")
    images = np.concatenate(list(open_source(spec).chunks(1024)))
    return images[np.random.default_rng(0).permutation(len(images))]


@cache
def exact(machine: ScoreMachine, work: Workload) -> tuple[torch.Tensor, float]:
    """The mean, and seconds per image-step."""
    before = time.perf_counter()
    mean = ask(machine, work)
    return mean, (time.perf_counter() - before) / _QUERIES


def ask(machine: ScoreMachine, work: Workload, **options: object) -> torch.Tensor:
    return machine.posterior(
        work.x,
        alpha=work.alpha,
        sigma=work.sigma,
        patch_size=work.patch_size,
        entropy=False,
        **options,  # type: ignore[arg-type]
    ).mean


@pytest.mark.parametrize("tolerance", [0.01, 0.02, 0.04])
@pytest.mark.parametrize("count", [2000, 15000, 59000])
@pytest.mark.parametrize("patch_size", [3, 7])
def test_growth(
    benchmark: BenchmarkFixture,
    shuffled: npt.NDArray[np.uint8],
    patch_size: int,
    count: int,
    tolerance: float,
) -> None:
    images = np.concatenate([shuffled[:count], shuffled[-_QUERIES:]])
    work = workload(images, patch_size, _QUERIES)
    machine = ScoreMachine(work.db, "ELS", "zeros", backend="native")
    mean, exact_seconds = exact(machine, work)
    options = {"mode": "auto", "tolerance": tolerance, "seed": 1}
    error = float((ask(machine, work, **options) - mean).abs().mean())
    assert error <= 1.5 * tolerance
    benchmark.pedantic(ask, (machine, work), options, rounds=3)
    benchmark.extra_info |= {
        "beta": BETA[patch_size],
        "queries": _QUERIES,
        "exact_seconds": exact_seconds,
        "mean_error": error,
        "backend": machine.backend,
    }
