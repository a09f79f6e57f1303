"""What an index costs as the data set grows: build, disk, memory, search, recall.

``pytest bench/cases/bench_growth.py --fashion-mnist SOURCE --cifar SOURCE``. One thread, and
processes of
their own, so that memory is theirs. The gates: what a search says of a patch's distance is what the
images say, nothing is nearer than the nearest, and most of the nearest are found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from els.bench.index_growth import K
from els.bench.nearest import least_distances, noisy_patches, squared_distances
from els.index import PatchDatabase, open_source
from els.index.patches.index import DEFAULT_EFFORT

BETAS = (0.006, 0.05)
PATCH_SIZE = 3

# Queries of a search.
_QUERIES = 784
# Queries whose recall is computed.
_JUDGED = 196
_LEAST_RECALL = 0.75


def measured(*arguments: object) -> dict[str, Any]:
    """What a process of els.bench.index_growth says."""
    command = [sys.executable, "-m", "els.bench.index_growth", *map(str, arguments)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("data", "count"),
    [
        *(("fashion-mnist", count) for count in (1000, 4000, 16000)),
        *(("cifar", count) for count in (1000, 4000)),
        ("fashion-mnist", 60000),
    ],
)
def test_index(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    data: str,
    count: int,
) -> None:
    spec = request.config.getoption(f"--{data}")
    if spec is None:
        pytest.skip(f"needs --{data} SOURCE")
    images = np.concatenate(list(open_source(spec).chunks(1024)))
    images = images[np.random.default_rng(0).permutation(len(images))[:count]]
    assert len(images) == count
    db = PatchDatabase.build(images, path=tmp_path / "db")
    built = benchmark.pedantic(measured, ("build", db.path, PATCH_SIZE), rounds=1)

    queries: dict[str, Any] = {
        f"{beta:g}": noisy_patches(db, beta, PATCH_SIZE, _QUERIES) for beta in BETAS
    }
    nearest = {name: least_distances(db, each[:_JUDGED], K) for name, each in queries.items()}
    questions, found = tmp_path / "questions.npz", tmp_path / "found.npz"
    np.savez(questions, **queries)
    searched = measured("search", db.path, PATCH_SIZE, questions, found)
    with np.load(found) as file:
        for row in searched["searches"]:
            name, least = row["queries"], nearest[row["queries"]]
            said = file[f"{name} {row['effort']} distances"]
            own = squared_distances(db, queries[name], file[f"{name} {row['effort']} addresses"])
            # float32 sums of C P^2 squares.
            np.testing.assert_allclose(said, own, rtol=4e-6, atol=1e-9)
            judged = np.sort(own[:_JUDGED])
            assert (judged >= least * (1 - 1e-12)).all()
            row["recall"] = float((judged <= least[:, -1:]).mean())
            if row["effort"] == DEFAULT_EFFORT:
                assert row["recall"] >= _LEAST_RECALL
    benchmark.extra_info |= {"patch_size": PATCH_SIZE, "k": K, "build": built, "search": searched}
