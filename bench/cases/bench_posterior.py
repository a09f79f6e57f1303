"""Speed of the exact posterior: ``pytest bench/cases/bench_posterior.py --cifar SOURCE``.

Each case first passes a gate: its mean must agree with the float64 torch backend.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from els.bench.cases.other_libraries import BASELINES
from els.bench.workloads import Workload, workload
from els.engine import ScoreMachine
from els.engine.kinds import Boundary

Images = npt.NDArray[np.uint8]


def native(work: Workload, boundary: Boundary, threads: int) -> Callable[[], torch.Tensor]:
    machine = ScoreMachine(work.db, "ELS", boundary, backend="native", threads=threads)

    def run() -> torch.Tensor:
        return machine.posterior(
            work.x,
            alpha=work.alpha,
            sigma=work.sigma,
            patch_size=work.patch_size,
            entropy=False,
        ).mean

    return run


def reference(work: Workload, boundary: Boundary) -> torch.Tensor:
    machine = ScoreMachine(work.db, "ELS", boundary, backend="torch")
    return machine.posterior(
        work.x.double(), alpha=work.alpha, sigma=work.sigma, patch_size=work.patch_size
    ).mean


@pytest.mark.parametrize("threads", [1, 2], ids="threads{}".format)
@pytest.mark.parametrize("batch", [1, 16], ids="batch{}".format)
@pytest.mark.parametrize("boundary", ["circular", "zeros"])
@pytest.mark.parametrize("patch_size", [3, 5, 11, 17], ids="P{}".format)
@pytest.mark.parametrize("data", ["cifar", "fashion"])
def test_pairs(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    data: str,
    patch_size: int,
    boundary: Boundary,
    batch: int,
    threads: int,
) -> None:
    images: Images = request.getfixturevalue(data)
    gate = workload(images[:33], patch_size, 1)
    error = (native(gate, boundary, threads)() - reference(gate, boundary)).abs().max()
    assert error <= 2e-5
    work = workload(images[: (512 if batch == 1 else 64) + batch], patch_size, batch)
    benchmark.pedantic(native(work, boundary, threads), rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {
        "data": data,
        "pairs": work.pairs(boundary),
        "max_error": float(error),
        "backend": ScoreMachine(work.db, backend="native", threads=threads).backend,
    }


@pytest.mark.parametrize("method", ["native", *BASELINES])
@pytest.mark.parametrize("patch_size", [3, 5, 9, 17], ids="P{}".format)
def test_alternatives(
    benchmark: BenchmarkFixture, cifar: Images, patch_size: int, method: str
) -> None:
    work = workload(cifar[:129], patch_size, 1)
    run = (
        native(work, "circular", torch.get_num_threads())
        if method == "native"
        else lambda: BASELINES[method](work)
    )
    error = (run() - reference(work, "circular")).abs().max()
    # The nearest patch alone is no posterior: it is here for its time only.
    assert method == "faiss k=1" or error <= (2e-5 if method == "native" else 2e-3)
    benchmark.pedantic(run, rounds=3 if method == "keops" else 7, warmup_rounds=1)
    benchmark.extra_info |= {"pairs": work.pairs("circular"), "max_error": float(error)}
