"""The parts of an approximate posterior: build, search, exact distances, merging head and tail.

``OMP_NUM_THREADS=1 pytest bench/cases/bench_parts.py --benchmark-timer=time.process_time``, on
1,024
Fashion-MNIST images: processor time, on one thread. Each case first passes a gate: against brute
force in float64, or against the exact posterior.
"""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from els.bench.nearest import least_distances, noisy_patches, squared_distances
from els.bench.workloads import BETA, Workload, workload
from els.engine.approximate import head
from els.engine.approximate.estimate import Problem
from els.engine.approximate.subset import drawn, extrapolated
from els.engine.backends import BackendName, choose
from els.engine.kinds import ELS
from els.engine.query import PosteriorQuery
from els.engine.state import merge, state_of
from els.index import PatchDatabase

Images = npt.NDArray[np.uint8]

HALVES = slice(0, 20), slice(20, 40)

_QUERIES = 784
_K = 256


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory, fashion: Images) -> PatchDatabase:
    return PatchDatabase.build(fashion[:-1], path=tmp_path_factory.mktemp("parts") / "db")


@pytest.fixture(scope="module")
def queries(db: PatchDatabase) -> dict[int, npt.NDArray[np.float32]]:
    return {size: noisy_patches(db, BETA[size], size, _QUERIES) for size in (3, 7)}


@pytest.fixture(scope="module")
def nearest(
    db: PatchDatabase, queries: dict[int, npt.NDArray[np.float32]]
) -> dict[int, npt.NDArray[np.float64]]:
    return {size: least_distances(db, patches, _K) for size, patches in queries.items()}


def checked_recall(
    db: PatchDatabase,
    patch_size: int,
    effort: int,
    queries: npt.NDArray[np.float32],
    nearest: npt.NDArray[np.float64],
) -> float:
    """Of a search whose distances are right."""
    found, addresses = db.open_index(patch_size).search(queries, _K, effort=effort)
    own = squared_distances(db, queries, addresses)
    # float32 sums of C P^2 squares.
    np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-9)
    assert (np.sort(own) >= nearest * (1 - 1e-12)).all()
    return float((own <= nearest[:, -1:]).mean())


def question(work: Workload) -> PosteriorQuery:
    return PosteriorQuery(
        work.x,
        torch.tensor([work.alpha], dtype=torch.float64),
        torch.tensor([work.sigma], dtype=torch.float64),
        ELS,
        "circular",
        work.patch_size,
        entropy=True,
    )


def around(work: Workload) -> npt.NDArray[np.float64]:
    """Cyclic patches around every pixel of one query over alpha, ``[H * W, C, P, P]``."""
    radius = work.patch_size // 2
    x = torch.nn.functional.pad(work.x.double() / work.alpha, (radius,) * 4, "circular")[0]
    windows = x.unfold(1, work.patch_size, 1).unfold(2, work.patch_size, 1).movedim(0, 2)
    return np.asarray(windows.flatten(0, 1).numpy())


@pytest.mark.parametrize("patch_size", [3, 7], ids="P{}".format)
def test_build(
    benchmark: BenchmarkFixture,
    db: PatchDatabase,
    queries: dict[int, npt.NDArray[np.float32]],
    nearest: dict[int, npt.NDArray[np.float64]],
    patch_size: int,
) -> None:
    index = benchmark.pedantic(db.build_index, (patch_size,), {"overwrite": True}, rounds=3)
    recall = checked_recall(db, patch_size, 32, queries[patch_size], nearest[patch_size])
    assert recall >= 0.75
    benchmark.extra_info |= {
        "gate": f"recall {recall:.2f}",
        "size": f"{index.count:,} patches",
        "factory": index.factory,
    }


@pytest.mark.parametrize("effort", [8, 32, 128], ids="effort{}".format)
@pytest.mark.parametrize("patch_size", [3, 7], ids="P{}".format)
def test_search(
    benchmark: BenchmarkFixture,
    db: PatchDatabase,
    queries: dict[int, npt.NDArray[np.float32]],
    nearest: dict[int, npt.NDArray[np.float64]],
    patch_size: int,
    effort: int,
) -> None:
    if not db.has_index(patch_size):
        db.build_index(patch_size)
    patches = queries[patch_size]
    recall = checked_recall(db, patch_size, effort, patches, nearest[patch_size])
    assert recall >= (0.4 if effort < 32 else 0.75)
    index = db.open_index(patch_size)
    benchmark.pedantic(index.search, (patches, _K), {"effort": effort}, rounds=7, warmup_rounds=1)
    benchmark.extra_info |= {
        "gate": f"recall {recall:.2f}",
        "size": f"{_QUERIES} queries, k = {_K}, effort {effort}",
    }


@pytest.mark.parametrize("k", [64, 256, 1024], ids="k{}".format)
@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("patch_size", [3, 7], ids="P{}".format)
def test_weigh(
    benchmark: BenchmarkFixture,
    db: PatchDatabase,
    fashion: Images,
    patch_size: int,
    name: BackendName,
    k: int,
) -> None:
    """Exact distances of retrieved patches, here of random ones, as scattered as they can be."""
    work = workload(fashion, patch_size, 1, db=db)
    query, backend = question(work), choose(name, ELS, threads=1, device=None)[0]
    _, _, height, width = work.x.shape
    inside = db.address(
        *np.ix_(
            range(len(db)),
            range(patch_size // 2, height - patch_size // 2),
            range(patch_size // 2, width - patch_size // 2),
        )
    ).ravel()
    chosen = np.random.default_rng(0).choice(inside, (1, height, width, k))
    addresses = torch.from_numpy(chosen)
    _, logits = backend.weigh(db.images, query, addresses)
    distances = squared_distances(db, around(work), chosen.reshape(-1, k))
    own = distances * (-(work.alpha**2) / (2 * work.sigma**2))
    error = np.abs(logits.reshape(own.shape).numpy() / own - 1).max()
    # float64 throughout.
    assert error <= 1e-12
    benchmark.pedantic(backend.weigh, (db.images, query, addresses), rounds=7, warmup_rounds=1)
    benchmark.extra_info |= {
        "gate": f"logits to {error:.0e}",
        "size": f"784 pixels, k = {k}, {name}",
    }


@pytest.mark.parametrize("images", [256, 1000])
@pytest.mark.parametrize("patch_size", [3, 7], ids="P{}".format)
def test_head_and_subset(
    benchmark: BenchmarkFixture, db: PatchDatabase, fashion: Images, patch_size: int, images: int
) -> None:
    """The head left out of the subset's groups, all merged, and the jackknife error."""
    if not db.has_index(patch_size):
        db.build_index(patch_size)
    work = workload(fashion, patch_size, 1, db=db)
    backend = choose("native", ELS, threads=1, device=None)[0]
    everyone = np.arange(len(db))
    problem = Problem(backend, db, db.open_index(patch_size), question(work), everyone, (0,))
    found = head.nearest(problem, _K)
    # A subset of all images less the head, and the head, are everything.
    whole = extrapolated(problem, found, drawn(problem, len(db)))
    error = float((whole.state.mean - problem.exact().state.mean).abs().max())
    assert error <= 2e-5
    subset = drawn(problem, images)
    benchmark.pedantic(extrapolated, (problem, found, subset), rounds=15, warmup_rounds=1)
    benchmark.extra_info |= {
        "gate": f"mean to {error:.0e}",
        "size": f"784 pixels, k = {_K}, {images:,} images",
    }


@pytest.mark.parametrize("batch", [1, 16], ids="batch{}".format)
def test_merge(benchmark: BenchmarkFixture, batch: int) -> None:
    """Two states of disjoint candidates as one (log-sum-exp)."""
    generator = torch.Generator().manual_seed(0)
    logits = -300 * torch.rand(batch, 28, 28, 40, generator=generator, dtype=torch.float64)
    centres = 2 * torch.rand(*logits.shape, 1, generator=generator, dtype=torch.float64) - 1
    parts = [state_of(logits[..., part], centres[..., part, :]) for part in HALVES]
    whole = state_of(logits, centres)
    error = float((merge(*parts).mean - whole.mean).abs().max())
    assert error <= 1e-14
    benchmark(merge, *parts)
    benchmark.extra_info |= {"gate": f"mean to {error:.0e}", "size": f"{784 * batch:,} pixels"}
