"""What an index costs as the data set grows: build, disk, memory, search, recall.

``pytest bench/bench_growth.py --fashion-mnist SOURCE --cifar SOURCE``. One thread, and processes of
their own, so that memory is theirs. The gates: what a search says of a patch's distance is what the
images say, nothing is nearer than the nearest, and most of the nearest are found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from els.bench.index_growth import K
from els.index import PatchDatabase, decode, open_source
from els.index.retrieval import DEFAULT_EFFORT

BETAS = (0.006, 0.05)
PATCH_SIZE = 3

# Noisy images, their pixels that are asked for, and those whose recall is told.
_IMAGES, _QUERIES, _JUDGED = 4, 784, 196
_LEAST_RECALL = 0.75
_CHUNK = 250

Floats = npt.NDArray[np.float64]


def measured(*arguments: object) -> dict[str, Any]:
    """What a process of els.bench.index_growth says."""
    command = [sys.executable, "-m", "els.bench.index_growth", *map(str, arguments)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def squared_distances(
    db: PatchDatabase, queries: npt.NDArray[np.float32], addresses: npt.NDArray[np.int64]
) -> Floats:
    """Of queries [Q, C, P, P] to patches [Q, k] of the images; infinity for the address -1."""
    image, y, x = db.locate(addresses.clip(min=0))
    radius = queries.shape[-1] // 2
    total = np.zeros(addresses.shape)
    for down, right in np.ndindex(queries.shape[2:]):
        pixels = db.images[image, :, y + down - radius, x + right - radius] / 127.5 - 1
        total += ((pixels - queries[:, None, :, down, right]) ** 2).sum(-1)
    return np.where(addresses < 0, np.inf, total)


def noisy_patches(db: PatchDatabase, beta: float) -> npt.NDArray[np.float32]:
    """Around random pixels of noisy images, read cyclically, over alpha, [Q, C, P, P].

    The images are mirrored ones of the database, the same for every size of it.
    """
    alpha, sigma = (1 - beta) ** 0.5, beta**0.5
    clean = torch.from_numpy(decode(db.images[:_IMAGES, ..., ::-1].copy()))
    x = alpha * clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x.double() / alpha, (PATCH_SIZE // 2,) * 4, "circular")
    windows = padded.unfold(2, PATCH_SIZE, 1).unfold(3, PATCH_SIZE, 1).movedim(1, 3)
    patches: npt.NDArray[np.float32] = windows.flatten(0, 2).float().numpy()
    return patches[np.random.default_rng(0).permutation(len(patches))[:_QUERIES]]


def least_distances(db: PatchDatabase, queries: npt.NDArray[np.float32]) -> Floats:
    """The K least squared distances to any patch of the database, ascending, [Q, K]."""
    flat = queries.reshape(len(queries), -1)
    radius = PATCH_SIZE // 2
    # float32 chooses some more than K, of which float64 ranks the nearest.
    distances: npt.NDArray[Any] = np.empty((len(queries), 0), np.float32)
    addresses: npt.NDArray[Any] = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(db), _CHUNK):
        images = decode(db.images[start : start + _CHUNK])
        windows = np.lib.stride_tricks.sliding_window_view(images, (PATCH_SIZE,) * 2, axis=(2, 3))
        patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, flat.shape[1])
        near, position = faiss.knn(flat, np.ascontiguousarray(patches), K + K // 4)
        image, y, x = np.unravel_index(position, (len(images), *windows.shape[2:4]))
        here = db.address(start + image, y + radius, x + radius)
        distances, addresses = np.hstack([distances, near]), np.hstack([addresses, here])
        kept = np.argpartition(distances, K + K // 4 - 1)[:, : K + K // 4]
        distances = np.take_along_axis(distances, kept, 1)
        addresses = np.take_along_axis(addresses, kept, 1)
    return np.sort(squared_distances(db, queries, addresses))[:, :K]


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

    queries: dict[str, Any] = {f"{beta:g}": noisy_patches(db, beta) for beta in BETAS}
    nearest = {name: least_distances(db, each[:_JUDGED]) for name, each in queries.items()}
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
