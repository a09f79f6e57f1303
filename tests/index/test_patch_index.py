"""The patch index: against brute force, whole or not at all, refused when damaged."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from disks import file_size_limit
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from els.cli import app as cli
from els.index import DatabaseError, PatchDatabase, PatchIndex, choose_factory, decode
from els.index.patches import build, factory, faiss_library, rows
from els.index.patches.layout import LayoutError, check_layout
from els.storage.files import DiskFullError
from els.storage.manifests import sealed

faiss = pytest.importorskip("faiss")

Floats = NDArray[np.float32]


def make_images(*shape: int, seed: int = 0, levels: int = 256) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, levels, shape, dtype=np.uint8)


def smooth_images(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """Images whose patches lie near a few dimensions, as those of photographs do."""
    coarse = np.random.default_rng(seed).normal(size=(count, 1, 6, 6))
    spread = np.kron(coarse, np.ones((1, 1, side // 6 + 1, side // 6 + 1)))[..., :side, :side]
    for axis in (2, 3):
        spread = sum(np.roll(spread, shift, axis) for shift in range(-2, 3)) / 5
    return (spread * 60 + 128).clip(0, 255).astype(np.uint8)


def all_patches(db: PatchDatabase, size: int) -> tuple[Floats, NDArray[np.int64]]:
    """Every whole patch [M, C, P, P] and its address, by loops over plain slices."""
    images, patches, addresses = decode(db.images), [], []
    count, _, height, width = images.shape
    radius = size // 2
    for n in range(count):
        for y in range(radius, height - radius):
            for x in range(radius, width - radius):
                rows = slice(y - radius, y + radius + 1)
                patches.append(images[n, :, rows, x - radius : x + radius + 1])
                addresses.append((n * height + y) * width + x)
    return np.array(patches), np.array(addresses)


def squared_distances(queries: Floats, patches: Floats) -> NDArray[np.float64]:
    difference = queries[:, None].astype(np.float64) - patches[None]
    return np.asarray((difference**2).sum((2, 3, 4)))


def noisy(patches: Floats, count: int, sigma: float = 0.1, seed: int = 1) -> Floats:
    random = np.random.default_rng(seed)
    chosen = patches[random.integers(0, len(patches), count)]
    return (chosen + sigma * random.normal(size=chosen.shape)).astype(np.float32)


def contents(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The work is too small to share, and threads that wait for each other take their time."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few images, blocks of one, several chunks in each."""
    monkeypatch.setattr(faiss_library, "_CHUNK_NUMBERS", 700)
    monkeypatch.setattr(rows, "BUILD_CHUNK_PATCHES", 300)
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 1)


@pytest.fixture
def db(tmp_path: Path) -> PatchDatabase:
    """Forty images 2 x 9 x 7 of classes 0, 1, 3, sorted by class."""
    labels = np.repeat([0, 1, 3], [13, 13, 14])
    return PatchDatabase.build(make_images(40, 2, 9, 7, levels=6), labels, path=tmp_path / "db")


# Search

SHAPES = [
    pytest.param((1, 1, 1, 1), 1, id="one pixel"),
    pytest.param((1, 3, 5, 5), 5, id="one patch"),
    pytest.param((7, 1, 9, 6), 3, id="grey 9x6"),
    pytest.param((5, 3, 4, 11), 3, id="colour 4x11"),
    pytest.param((6, 3, 8, 7), 5, id="colour 8x7"),
]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("factory", ["Flat", "IVF1,SQ8_direct"])
def test_search_equals_brute_force(
    tmp_path: Path, shape: tuple[int, ...], size: int, factory: str
) -> None:
    db = PatchDatabase.build(make_images(*shape), path=tmp_path / "db")
    index = db.build_index(size, factory=factory)
    patches, addresses = all_patches(db, size)
    assert (index.count, index.patch_size, index.factory) == (len(patches), size, factory)
    assert index.is_exact == (factory == "Flat")
    index.verify()
    queries = noisy(patches, 25)
    k = min(10, len(patches))
    # One list is scanned up to max_codes, twice its length: all of it.
    found, where = index.search(queries, k)
    assert (found.dtype, where.dtype) == (np.float32, np.int64)
    expected = squared_distances(queries, patches)
    # float32 with |q|^2 + |k|^2 - 2 q k of levels up to 255: 2^-24 of 4 * 4 * C P^2, rounded up.
    tolerance = 2**-24 * 16 * patches[0].size * 4
    np.testing.assert_allclose(found, np.sort(expected, axis=1)[:, :k], rtol=1e-5, atol=tolerance)
    position = np.searchsorted(addresses, where)
    np.testing.assert_array_equal(addresses[position], where)
    own = np.take_along_axis(expected, position, axis=1)
    np.testing.assert_allclose(found, own, rtol=1e-5, atol=tolerance)
    assert all(len(set(row)) == k for row in where.tolist())


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("factory", ["Flat", "IVF1,SQ8_direct"])
def test_restrictions_leave_their_images_only(db: PatchDatabase, factory: str) -> None:
    index = db.build_index(3, factory=factory)
    patches, addresses = all_patches(db, 3)
    image, _, _ = db.locate(addresses)
    queries = noisy(patches, 20)
    for label in (1, 3, 1):
        kept = patches[np.isin(image, db.class_members(label))]
        found, where = index.search(queries, 5, label=label)
        assert np.isin(db.locate(where)[0], db.class_members(label)).all()
        expected = np.sort(squared_distances(queries, kept), axis=1)[:, :5]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    members = [2, 39, 7, 2]
    kept = patches[np.isin(image, members)]
    found, where = index.search(queries, len(kept) + 2, members=members)
    expected = np.sort(squared_distances(queries, kept), axis=1)
    np.testing.assert_allclose(found[:, :-2], expected, rtol=1e-5, atol=1e-4)
    assert (where[:, -2:] == -1).all()
    assert np.isinf(found[:, -2:]).all()


RECALL = [
    # Found: 1.0, 1.0, 0.967 and 0.88, of the 10 nearest.
    pytest.param("IVF64,SQ8_direct", 16, 0.95, id="SQ8_direct"),
    pytest.param("Pad24,IVF64,SQ8_direct", 16, 0.95, id="padded"),
    pytest.param("IVF64_HNSW32,Flat", 16, 0.95, id="HNSW"),
    pytest.param("PCA16,IVF64,SQ8", 16, 0.9, id="PCA"),
    pytest.param("PCA16,IVF64,PQ16x4", 16, 0.8, id="PQ"),
]


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> PatchDatabase:
    return PatchDatabase.build(smooth_images(30, 18), path=tmp_path_factory.mktemp("smooth") / "db")


@pytest.mark.parametrize(("factory", "effort", "least"), RECALL)
def test_recall_of_approximate_indices(
    smooth: PatchDatabase, factory: str, effort: int, least: float
) -> None:
    index = smooth.build_index(5, factory=factory, overwrite=True)
    assert not index.is_exact
    patches, addresses = all_patches(smooth, 5)
    queries = noisy(patches, 100, sigma=0.05)
    _, where = index.search(queries, 10, effort=effort)
    expected = squared_distances(queries, patches)
    found = np.take_along_axis(expected, np.searchsorted(addresses, where), axis=1)
    tenth = np.sort(expected, axis=1)[:, 9:10]
    recall = (found <= tenth * (1 + 1e-6)).mean()
    assert recall >= least
    assert index.list_sizes().sum() == index.count
    more, _ = index.search(queries, 10, effort=10**6)
    fewer, _ = index.search(queries, 10, effort=1)
    assert more.mean() <= fewer.mean()


def test_a_huge_list_of_duplicates_is_scanned_in_part(tmp_path: Path) -> None:
    images = np.zeros((64, 12, 12), np.uint8)
    images[:32, 6:] = make_images(32, 6, 12)
    labels = np.repeat([0, 1, 2, 3], 16)
    db = PatchDatabase.build(images, labels, path=tmp_path / "db")
    index = db.build_index(3, factory="IVF32,SQ8_direct")
    assert index.list_sizes().max() > 0.6 * index.count
    black = np.full((3, 1, 3, 3), -1, np.float32)
    faiss.cvar.indexIVF_stats.reset()
    found, _ = index.search(black, 10, effort=4)
    np.testing.assert_array_equal(found, 0)
    # A list is cut where the bound is reached.
    assert faiss.cvar.indexIVF_stats.ndis <= 3 * 2 * 4 * index.count / 32 + 3
    # Images were sorted by class, the list is not.
    for label in range(4):
        found, where = index.search(black, 10, label=label)
        np.testing.assert_array_equal(found, 0)
        assert (where >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        pytest.param({"queries": np.zeros((1, 2, 3, 3))}, TypeError, "float64", id="dtype"),
        pytest.param({"queries": np.zeros((1, 2, 5, 5), "f4")}, ValueError, "5, 5", id="size"),
        pytest.param({"queries": np.zeros((2, 3, 3), "f4")}, ValueError, r"\[Q", id="one patch"),
        pytest.param({"queries": np.full((1, 2, 3, 3), np.nan, "f4")}, ValueError, "NaN", id="NaN"),
        pytest.param({"k": 0}, ValueError, "k must be at least 1", id="k 0"),
        pytest.param({"k": 2.0}, TypeError, "k must be an integer", id="k float"),
        pytest.param({"effort": 0}, ValueError, "effort", id="effort"),
        pytest.param({"threads": 0}, ValueError, "threads", id="threads"),
        pytest.param({"label": 2}, ValueError, "no image has label 2", id="label"),
        pytest.param({"members": []}, ValueError, "at least one", id="no members"),
        pytest.param({"members": [40]}, ValueError, r"0\.\.39", id="members range"),
        pytest.param({"members": [1.0]}, ValueError, "float64", id="members float"),
        pytest.param({"members": [1], "label": 1}, ValueError, "not both", id="both"),
    ],
)
def test_wrong_queries_are_refused(
    db: PatchDatabase, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    index = db.build_index(3)
    with pytest.raises(error, match=says):
        index.search(**{"queries": np.zeros((1, 2, 3, 3), np.float32), "k": 1} | arguments)


def test_no_queries_and_strided_queries(db: PatchDatabase) -> None:
    index = db.build_index(3)
    found, where = index.search(np.zeros((0, 2, 3, 3), np.float32), 4)
    assert found.shape == where.shape == (0, 4)
    queries = noisy(all_patches(db, 3)[0], 8)
    strided = np.asfortranarray(queries)[::2]
    np.testing.assert_array_equal(index.search(strided, 3)[1], index.search(queries, 3)[1][::2])


def test_threads_are_restored(db: PatchDatabase) -> None:
    before = faiss.omp_get_max_threads()
    index = db.build_index(3, threads=before + 1)
    index.search(np.zeros((1, 2, 3, 3), np.float32), 1, threads=before + 2)
    assert faiss.omp_get_max_threads() == before


# The factory that is chosen


@pytest.mark.parametrize(
    ("count", "dimension", "distinct", "reduced", "memory", "expected"),
    [
        pytest.param(1, 9, 1, 9, 10**9, "Flat", id="one patch"),
        pytest.param(1 << 17, 9, 10**5, 9, 10**9, "Flat", id="small"),
        pytest.param(4 * 10**5, 9, 10**5, 9, 10**9, "IVF2048,SQ8_direct", id="few lists"),
        pytest.param(2 * 10**5, 9, 1, 9, 10**9, "IVF1,SQ8_direct", id="all equal"),
        pytest.param(2 * 10**5, 81, 80, 9, 10**9, "Pad88,IVF2,SQ8_direct", id="nearly equal"),
        pytest.param(
            40_560_000, 9, 3 * 10**6, 9, 4 * 10**9, "IVF65536_HNSW32,SQ8_direct", id="grey P 3"
        ),
        pytest.param(
            29_040_000, 49, 10**6, 49, 4 * 10**9, "Pad56,IVF16384_HNSW32,SQ8_direct", id="grey P 7"
        ),
        pytest.param(
            18_000_000,
            27,
            2 * 10**6,
            27,
            4 * 10**9,
            "Pad40,IVF32768_HNSW32,SQ8_direct",
            id="colour",
        ),
        pytest.param(
            40_560_000, 9, 3 * 10**6, 9, 10**9, "PCA8,IVF65536_HNSW32,PQ1", id="little memory"
        ),
        pytest.param(
            45_000_000, 243, 10**6, 40, 8 * 10**9, "PCA40,IVF16384_HNSW32,SQ8", id="colour P 9"
        ),
        pytest.param(
            45_000_000, 243, 10**6, 40, 3 * 10**9, "PCA40,IVF16384_HNSW32,PQ20", id="colour, less"
        ),
    ],
)
def test_the_factory_suits_the_patches(
    count: int, dimension: int, distinct: int, reduced: int, memory: int, expected: str
) -> None:
    chosen = choose_factory(count, dimension, distinct=distinct, reduced=reduced, memory=memory)
    assert chosen == expected
    faiss.index_factory(dimension, chosen)


def test_too_little_memory_says_how_much() -> None:
    with pytest.raises(ValueError, match=r"at least [\d,]+ bytes .*--memory 2GB"):
        choose_factory(45_000_000, 243, distinct=10**6, reduced=40, memory=10**8)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        pytest.param({"patch_size": 4}, ValueError, "odd", id="even"),
        pytest.param({"patch_size": 9}, ValueError, r"1\.\.7", id="too large"),
        pytest.param({"patch_size": "3"}, TypeError, "'3'", id="text"),
        pytest.param({"memory": 0}, ValueError, "memory", id="memory"),
        pytest.param({"factory": "nonsense"}, ValueError, "nonsense", id="nonsense"),
        pytest.param({"factory": "HNSW32"}, ValueError, "IndexHNSW", id="graph"),
        pytest.param({"factory": "PCA4,Flat"}, ValueError, "IndexFlat", id="PCA Flat"),
        pytest.param({"factory": "IMI2x4,Flat"}, ValueError, "MultiIndex", id="multi-index"),
        pytest.param({"factory": "IVF100000,Flat"}, ValueError, "100000 lists", id="lists"),
        pytest.param({"factory": "Pad32,IVF2,SQ8_direct"}, ValueError, "take Pad40", id="rounds"),
        pytest.param({"factory": "PCA4,IVF2,SQ8_direct"}, ValueError, "take SQ8 ", id="direct"),
        pytest.param({"factory": "L2norm,IVF2,Flat"}, ValueError, "Normalization", id="norms"),
        pytest.param({"factory": "ITQ4,IVF2,Flat"}, ValueError, "ITQTransform", id="ITQ"),
        pytest.param({"threads": 0}, ValueError, "threads", id="threads"),
    ],
)
def test_wrong_builds_are_refused_and_leave_nothing(
    db: PatchDatabase, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        db.build_index(**{"patch_size": 3} | arguments)
    assert db.path is not None
    assert not list(db.path.glob("indices/*"))


def test_an_untrainable_factory_is_refused(tmp_path: Path) -> None:
    db = PatchDatabase.build(np.zeros((4, 1, 5, 5), np.uint8), path=tmp_path / "db")
    with pytest.raises(ValueError, match="1 distinct patches"):
        db.build_index(3, factory="PCA4,IVF1,PQ2")


def test_a_database_in_memory_has_no_index() -> None:
    db = PatchDatabase.from_arrays(make_images(2, 5, 5))
    assert not db.has_index(3)
    for call in (db.build_index, db.open_index):
        with pytest.raises(ValueError, match="in memory"):
            call(3)


def test_without_faiss(db: PatchDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (db.build_index, db.open_index):
        with pytest.raises(RuntimeError, match=r"pip install 'els-machine\[cpu\]'"):
            call(3)


# Whole or not at all, and the same every time


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "IVF64,SQ8_direct",
        "Pad24,IVF64,SQ8_direct",
        "IVF32_HNSW8,SQ8",
        "PCA8,IVF16,PQ4x4",
        "PCA8,IVF16,SQ8",
        "OPQ1_4,IVF16,SQ8",
    ],
)
@pytest.mark.thinned
def test_the_bytes_do_not_depend_on_threads(smooth: PatchDatabase, factory: str) -> None:
    assert smooth.path is not None
    made = []
    for threads in (1, 2):
        smooth.build_index(5, factory=factory, overwrite=True, threads=threads)
        made.append(contents(smooth.path / "indices" / "patch-005"))
    assert made[0] == made[1]


def test_many_lists_are_trained_in_two_levels(
    smooth: PatchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly as good as in one, and the same whatever the number of threads."""
    patches, _ = all_patches(smooth, 5)
    sample = np.random.default_rng(1).permutation(
        np.unique(patches.reshape(len(patches), -1), axis=0)
    )
    reported: list[tuple[int, int]] = []

    def trained(threads: int) -> NDArray[np.float32]:
        ivf = SimpleNamespace(nlist=100, quantizer=faiss.IndexFlatL2(sample.shape[1]))
        build._train_lists(
            ivf, sample, threads, lambda _, done, total: reported.append((done, total))
        )
        centroids: NDArray[np.float32] = ivf.quantizer.reconstruct_n(0, 100)
        return centroids

    def misfit(centroids: NDArray[np.float32]) -> float:
        distances, _ = build._nearest(centroids, 1)(sample)
        return float(distances.mean())

    one = trained(1)
    assert not reported
    monkeypatch.setattr(build, "_TWO_LEVELS_FROM", 100)
    two = trained(1)
    assert reported == [(done, 10) for done in range(1, 11)]
    assert len(np.unique(two, axis=0)) == 100
    assert misfit(two) <= 1.1 * misfit(one)
    np.testing.assert_array_equal(trained(2), two)


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(lambda s: sum(s) > 0),
    share=st.floats(0, 1),
)
def test_parts_in_proportion(sizes: list[int], share: float) -> None:
    count = round(share * sum(sizes))
    parts = build._proportional(np.array(sizes), count)
    assert parts.sum() == count
    assert (parts <= sizes).all()
    assert (np.abs(parts - count * np.array(sizes) / sum(sizes)) < 1).all()


def test_the_factory_does_not_depend_on_threads(
    smooth: PatchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of components is counted by a BLAS, and is part of what is built."""
    monkeypatch.setattr(factory, "_FLAT_MOST", 0)
    assert smooth.path is not None
    made = []
    for threads in (1, 2):
        index = smooth.build_index(9, overwrite=True, threads=threads)
        made.append((index.factory, contents(index.path)))
    assert made[0] == made[1]
    assert made[0][0].startswith("PCA")


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF64,SQ8_direct", "IVF64_HNSW8,SQ8", "PCA8,IVF9,SQ8"]
)
def test_what_is_found_does_not_depend_on_threads(smooth: PatchDatabase, factory: str) -> None:
    index = smooth.build_index(5, factory=factory, overwrite=True)
    queries = noisy(all_patches(smooth, 5)[0], 200)
    one = index.search(queries, 7, effort=3, threads=1)
    for threads in (2, 5):
        for found, same in zip(
            index.search(queries, 7, effort=3, threads=threads), one, strict=True
        ):
            np.testing.assert_array_equal(found, same)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("factory", ["IVF8,SQ8_direct", "PCA8,IVF8,SQ8"])
def test_what_a_gpu_would_do_gives_the_same(
    db: PatchDatabase, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    """The path for GPUs, with its flat indices left on the CPU."""
    index = db.build_index(3, factory=factory)
    queries = noisy(all_patches(db, 3)[0], 9)
    expected = index.search(queries, 5, effort=8)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda flat: flat, raising=False)
    other = db.build_index(3, factory=factory, overwrite=True)
    monkeypatch.undo()
    np.testing.assert_array_equal(other.list_sizes(), index.list_sizes())
    for found, same in zip(other.search(queries, 5, effort=8), expected, strict=True):
        np.testing.assert_array_equal(found, same)


class _StopError(Exception):
    pass


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("factory", ["Flat", "IVF8_HNSW8,SQ8_direct", "PCA8,IVF4,SQ8"])
def test_an_interrupted_build_goes_on(db: PatchDatabase, factory: str) -> None:
    assert db.path is not None
    place = db.path / "indices" / "patch-003"
    calls: list[tuple[str, int, int]] = []

    def count(stage: str, done: int, total: int) -> None:
        calls.append((stage, done, total))

    db.build_index(3, factory=factory, progress=count)
    assert list(dict.fromkeys(call[0] for call in calls)) == [
        "training",
        "adding",
        "merging",
        "writing",
        *([] if factory == "Flat" else ["tabulating"]),
    ]
    assert all(0 <= done <= total for _, done, total in calls)
    undisturbed = contents(place)
    for stop in range(1, len(calls), 5):
        left = stop

        def interrupt(stage: str, done: int, total: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise _StopError

        with pytest.raises(_StopError):
            db.build_index(3, factory=factory, overwrite=True, progress=interrupt)
        assert contents(place) == undisturbed
        db.open_index(3).verify()
        db.build_index(3, factory=factory, overwrite=True)
        assert contents(place) == undisturbed
        assert [entry.name for entry in place.parent.iterdir()] == ["patch-003"]


KILLED = """
import os, signal, sys
from els.index import PatchDatabase
from els.index.patches import rows
rows.BUILD_CHUNK_PATCHES, rows._BLOCK_BYTES = 300, 1
stage, at = sys.argv[2], int(sys.argv[3])
def kill(now, done, total):
    if now == stage and done >= at:
        os.kill(os.getpid(), signal.SIGKILL)
PatchDatabase.open(sys.argv[1]).build_index(3, factory="IVF8,SQ8_direct", progress=kill)
"""


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("stage", "at"),
    [("training", 1), ("adding", 700), ("writing", 1)],
    ids=str,
)
def test_a_killed_build_goes_on(db: PatchDatabase, stage: str, at: int) -> None:
    assert db.path is not None
    place = db.path / "indices" / "patch-003"
    done = subprocess.run([sys.executable, "-c", KILLED, db.path, stage, str(at)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not place.exists()
    with pytest.raises(DatabaseError, match="no index"):
        db.open_index(3)
    shards = list(place.parent.glob("*.partial/shard-*"))
    assert len(shards) == {"training": 0, "adding": 2, "writing": 5}[stage]
    again: list[int] = []
    db.build_index(
        3,
        factory="IVF8,SQ8_direct",
        progress=lambda name, done, total: again.append(done) if name == "adding" else None,
    )
    resumed = contents(place)
    # Each finished shard was reported at once, each other one image by image.
    assert len(again) == 1 + len(shards) + (40 - 8 * len(shards))
    assert [entry.name for entry in place.parent.iterdir()] == ["patch-003"]
    db.build_index(3, factory="IVF8,SQ8_direct", overwrite=True)
    assert contents(place) == resumed


@pytest.mark.usefixtures("small_shards")
def test_checkpoints_of_another_plan_are_not_used(db: PatchDatabase) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "merging":
            raise _StopError

    with pytest.raises(_StopError):
        db.build_index(3, factory="IVF8,SQ8_direct", progress=stop)
    index = db.build_index(3, factory="IVF4,Flat")
    assert index.factory == "IVF4,Flat"
    assert index.lists == 4


@pytest.mark.usefixtures("small_shards")
def test_a_resumed_build_asks_for_no_room_that_it_has(
    db: PatchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "els.index.patches.build.files.require_space", lambda path, size: asked.append(size)
    )

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "merging":
            raise _StopError

    with pytest.raises(_StopError):
        db.build_index(3, factory="IVF8,SQ8_direct", progress=stop)
    assert db.path is not None
    work = db.path / "indices" / "patch-003.partial"
    kept = sum(path.stat().st_size for path in work.glob("*.faiss"))
    db.build_index(3, factory="IVF8,SQ8_direct")
    assert asked == [asked[0], max(0, asked[0] - kept)]
    assert asked[1] < asked[0]


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_checkpoint_is_refused(db: PatchDatabase) -> None:
    def damage(stage: str, done: int, total: int) -> None:
        if stage == "merging" and done == 0:
            assert db.path is not None
            shard = db.path / "indices" / "patch-003.partial" / "shard-00001.faiss"
            shard.write_bytes(shard.read_bytes()[:-50])

    with pytest.raises(DatabaseError, match=r"patch-003\.partial is damaged.*remove that folder"):
        db.build_index(3, factory="IVF8,SQ8_direct", progress=damage)


def test_a_full_disk_leaves_nothing_half_written(db: PatchDatabase) -> None:
    with file_size_limit(3000), pytest.raises(DiskFullError):
        db.build_index(3, factory="IVF4,SQ8_direct")
    with pytest.raises(DatabaseError, match="no index"):
        db.open_index(3)
    db.build_index(3, factory="IVF4,SQ8_direct").verify()


def test_two_builds_at_once_are_refused(db: PatchDatabase) -> None:
    def again(stage: str, done: int, total: int) -> None:
        db.build_index(3)

    with pytest.raises(DatabaseError, match="another process"):
        db.build_index(3, progress=again)


def test_an_index_is_not_replaced_unasked(db: PatchDatabase) -> None:
    db.build_index(3)
    with pytest.raises(DatabaseError, match="overwrite"):
        db.build_index(3)


# Refused when damaged


def edited(path: Path, **fields: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(sealed(manifest | fields)))


def cut(path: Path) -> None:
    data = (path / "index.faiss").read_bytes()
    (path / "index.faiss").write_bytes(data[:-1])


def overwritten(path: Path) -> None:
    data = (path / "index.faiss").read_bytes()
    (path / "index.faiss").write_bytes(b"X" * len(data))


def unsealed(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"lists": 4', '"lists": 5'))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(cut, "is damaged: index.faiss has .* bytes", id="truncated"),
        pytest.param(overwritten, "is damaged: FAISS cannot read", id="overwritten"),
        pytest.param(unsealed, "checksum", id="manifest edited"),
        pytest.param(lambda path: (path / "index.faiss").unlink(), "cannot be read", id="no index"),
        pytest.param(
            lambda path: (path / "manifest.json").unlink(), "cannot be read", id="no manifest"
        ),
        pytest.param(
            lambda path: (path / "manifest.json").write_text("{"), "not JSON", id="not JSON"
        ),
        pytest.param(lambda path: edited(path, format="x"), "not of a patch index", id="format"),
        pytest.param(lambda path: edited(path, version=3), "upgrade", id="too new"),
        pytest.param(lambda path: edited(path, content_hash="0"), "other images", id="foreign"),
        pytest.param(lambda path: edited(path, patch_size=5), "another patch size", id="size"),
        pytest.param(lambda path: edited(path, files={}), "fields", id="fields"),
    ],
)
def test_damage_is_refused(db: PatchDatabase, damage: Callable[[Path], Any], says: str) -> None:
    index = db.build_index(3, factory="IVF4,SQ8_direct")
    damage(index.path)
    with pytest.raises(DatabaseError, match=says):
        db.open_index(3)
    PatchDatabase.open(str(db.path)).verify()
    assert isinstance(db.build_index(3, overwrite=True), PatchIndex)


def test_a_flipped_bit_is_found_by_verify(db: PatchDatabase) -> None:
    index = db.build_index(3, factory="IVF4,SQ8_direct")
    data = bytearray((index.path / "index.faiss").read_bytes())
    data[-3] ^= 1
    (index.path / "index.faiss").write_bytes(data)
    with pytest.raises(DatabaseError, match="SHA-256"):
        db.open_index(3).verify()


def resealed(path: Path, **damaged: bytes) -> None:
    """Writes files of an index, and a manifest that fits them."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    for name, data in damaged.items():
        (path / name).write_bytes(data)
        manifest["files"][name] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(sealed(manifest)))


KINDS = [
    "Flat",
    "IVF4,Flat",
    "IVF4,SQ8_direct",
    "PCA8,IVF32_HNSW4,SQ8",
    "Pad24,IVF4,SQ8_direct",
    "OPQ2_8,IVF4,PQ2x4",
    "RR6,IVF4,SQ4",
]


@pytest.mark.parametrize("factory", KINDS)
def test_a_sound_layout_is_known(db: PatchDatabase, factory: str) -> None:
    index = db.build_index(3, factory=factory)
    assert check_layout(index.path / "index.faiss", 18, index.count) == index.lists


@pytest.mark.parametrize("factory", KINDS)
def test_a_damaged_layout_costs_nothing(db: PatchDatabase, factory: str, tmp_path: Path) -> None:
    """Whatever the sizes in a file, nothing larger than the file is asked for."""
    index = db.build_index(3, factory=factory)
    sound, place = (index.path / "index.faiss").read_bytes(), tmp_path / "damaged"
    codes = int(index.count) * 8  # and more, at the end: they may be anything
    head = len(sound) - codes
    numbers = [
        0,
        1,
        12345,
        1 << 24,
        1 << 31,
        1 << 33,
        (1 << 40) - 1,
        1 << 62,
        1 << 63,
        (1 << 64) - 1,
    ]
    random, refused = np.random.default_rng(5), 0
    tracemalloc.start()
    for _ in range(400):
        data = bytearray(sound)
        at = int(random.integers(min(head, 900)))
        data[at : at + 8] = numbers[random.integers(len(numbers))].to_bytes(8, "little")
        place.write_bytes(data[: len(sound)])
        try:
            assert check_layout(place, 18, index.count) == index.lists
        except LayoutError:
            refused += 1
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * len(sound) + (1 << 20)
    assert refused > 20
    for at in range(0, head, 1 + head // 50):
        place.write_bytes(sound[:at])
        with pytest.raises(LayoutError):
            check_layout(place, 18, index.count)


def test_links_of_a_graph_are_checked(db: PatchDatabase) -> None:
    index = db.build_index(3, factory="IVF64_HNSW2,SQ8_direct")
    sound = (index.path / "index.faiss").read_bytes()
    read = faiss.read_index(str(index.path / "index.faiss"))
    graph = faiss.downcast_index(read.quantizer).hnsw
    levels, offsets = map(faiss.vector_to_array, (graph.levels, graph.offsets))
    assert levels.max() > 1
    first = np.flatnonzero(levels > 1)[0]
    begin = sound.index(offsets.tobytes()) + offsets.nbytes + 8
    end = begin + 4 * int(offsets[-1])
    # What follows the links: the entry point and the highest level.
    (entry,) = np.frombuffer(sound[end : end + 4], np.int32)
    assert entry == graph.entry_point
    lowest = int(np.flatnonzero(levels == 1)[0])
    for at, value, says in (
        (begin, 64, "a link leads to a point that is not there"),
        (begin, -2, "a link leads to a point that is not there"),
        # The last links of a point are those of its highest level.
        (begin + 4 * int(offsets[first + 1]) - 4, lowest, "of less levels"),
        (end, 64, "entry point cannot be 64"),
        (end, lowest, "not on the highest level"),
        (end + 4, 40, "highest level cannot be 40"),
    ):
        damaged = bytearray(sound)
        damaged[at : at + 4] = value.to_bytes(4, "little", signed=True)
        resealed(index.path, **{"index.faiss": bytes(damaged)})
        with pytest.raises(DatabaseError, match=says):
            db.open_index(3)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8_direct"])
@pytest.mark.parametrize("address", [-1 << 62, -2, 40 * 9 * 7, 1 << 62])
def test_addresses_are_checked_before_they_are_followed(
    db: PatchDatabase, factory: str, address: int
) -> None:
    index = db.build_index(3, factory=factory)
    sound = (index.path / "index.faiss").read_bytes()
    # Any patch: a whole class has it.
    at = sound.index((40 * 9 * 7 - 7 - 2).to_bytes(8, "little", signed=True))
    data = sound[:at] + address.to_bytes(8, "little", signed=True) + sound[at + 8 :]
    resealed(index.path, **{"index.faiss": data})
    damaged = db.open_index(3)
    everything = {"k": index.count, "effort": 4}
    with pytest.raises(DatabaseError, match=f"names a patch at {address}"):
        damaged.search(np.zeros((1, 2, 3, 3), np.float32), **everything)
    # Restricted to images, such a patch is none of theirs.
    found, _ = damaged.search(np.zeros((1, 2, 3, 3), np.float32), **everything, label=3)
    assert np.isfinite(found).any()


@pytest.mark.parametrize(
    ("name", "table", "says"),
    [
        pytest.param(
            "norms.npy", np.zeros(3, np.float32), r"norms\.npy is float32 \(3,\)", id="short"
        ),
        pytest.param("norms.npy", np.zeros(1400, np.float64), "float64", id="dtype"),
        pytest.param("centres.npy", np.zeros((2, 1400), np.uint8).T, r"centres\.npy", id="order"),
        pytest.param("misfits.npy", np.full(4, np.nan, np.float32), "squared distance", id="NaN"),
        pytest.param("spread.npy", np.full(4, -1, np.float32), "squared distance", id="negative"),
        pytest.param("spread.npy", np.array([{}, 1, 2, 3]), r"spread\.npy", id="objects"),
    ],
)
def test_tables_must_fit_the_index(
    db: PatchDatabase, name: str, table: NDArray[Any], says: str
) -> None:
    index = db.build_index(3, factory="IVF4,SQ8_direct")
    assert index.count == 1400
    np.save(index.path / name, table)
    resealed(index.path, **{name: (index.path / name).read_bytes()})
    damaged = db.open_index(3)
    with pytest.raises(DatabaseError, match=says):
        _ = damaged.inverted


def test_a_header_that_is_no_python_is_refused(db: PatchDatabase) -> None:
    index = db.build_index(3, factory="IVF4,SQ8_direct")
    data = (index.path / "norms.npy").read_bytes()
    resealed(index.path, **{"norms.npy": data.replace(b"}", b"(", 1)})
    with pytest.raises(DatabaseError, match=r"norms\.npy cannot be read"):
        _ = db.open_index(3).inverted


# Uses an index in a forked process for each of many damages, of the files named.
FUZZED = """
import json, os, resource, signal, sys
from pathlib import Path
import numpy as np, torch
from els.engine import ScoreMachine
from els.index import DatabaseError, PatchDatabase
from test_patch_index import faiss, resealed
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)
path, tries = Path(sys.argv[1]), int(sys.argv[2])
folder = path / "indices" / "patch-003"
sound = {file.name: file.read_bytes() for file in folder.iterdir()}
random = np.random.default_rng(6)

def use():
    db = PatchDatabase.open(path)
    index = db.open_index(3)
    queries = random.normal(size=(20, 2, 3, 3)).astype(np.float32)
    for restriction in ({}, {"label": 1}, {"members": [3]}):
        index.search(queries, 5, **restriction)
    machine = ScoreMachine(db, backend="native", threads=1)
    modes = ["topk+subset"] + ["lists"] * (index.inverted is not None)
    for mode in modes:
        for labels in (None, 3):
            post = machine.posterior(
                torch.zeros(1, *db.shape), alpha=0.7, sigma=3.0, patch_size=3, mode=mode,
                labels=labels, share=1.0, subset=32
            )
            assert torch.isfinite(post.mean).all()

def attempt():
    use_of_memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (use_of_memory + (1 << 30),) * 2)
    signal.alarm(60)
    try:
        use()
    except (DatabaseError, ValueError):
        return 0
    return 0

names = sorted(set(sound) - {"manifest.json"})
for number in range(tries):
    name = names[random.integers(len(names))]
    data = bytearray(sound[name])
    at = int(random.integers(min(len(data), [200, 1500, 1 << 30][number % 3])))
    kind = number % 4
    if kind == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        data[at : at + 8] = random.bytes(8)
    elif kind == 2:
        data[at : at + 8] = (1 << int(random.integers(64))).to_bytes(8, "little")
    else:
        del data[at:]
    for other, whole in sound.items():
        (folder / other).write_bytes(whole)
    resealed(folder, **{name: bytes(data)})
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = attempt()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        print(f"try {number}: {name}, byte {at}, kind {kind}: status {status}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by what /proc says")
@pytest.mark.parametrize("factory", ["IVF4,SQ8_direct", "PCA8,IVF32_HNSW4,SQ8"])
@pytest.mark.thinned
def test_no_damage_ends_a_process(db: PatchDatabase, factory: str) -> None:
    """Each try has a second GB of memory, and a manifest that fits."""
    pytest.importorskip("els.engine._native_baseline")
    db.build_index(3, factory=factory)
    done = subprocess.run(
        [sys.executable, "-c", FUZZED, db.path, "40"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},  # the helpers
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]


# Command line


def els(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command_builds_and_goes_on(db: PatchDatabase) -> None:
    made = els("index", db.path, "--patch-sizes", "3", "--factory", "IVF4,SQ8_direct")
    assert made.exit_code == 0, made.stderr
    assert "IVF4,SQ8_direct" in made.stdout
    assert "P  3 adding" in made.stderr
    more = els("index", db.path, "--patch-sizes", "3,5", "--memory", "1 GB", "--threads", 1)
    assert more.exit_code == 0, more.stderr
    assert "IVF4,SQ8_direct" in more.stdout
    assert "P  3" not in more.stderr
    assert db.open_index(5).is_exact
    anew = els("index", db.path, "--patch-sizes", "3", "--overwrite")
    assert anew.exit_code == 0, anew.stderr
    assert db.open_index(3).factory == "Flat"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(("--patch-sizes", "4"), "must be odd", id="even"),
        pytest.param(("--patch-sizes", "three"), "'three'", id="word"),
        pytest.param(("--patch-sizes", "5", "--memory", "much"), "4GB or 800MB", id="memory"),
        pytest.param(("--patch-sizes", "5", "--memory", "1MB"), "--memory 1GB", id="too little"),
        pytest.param(("--patch-sizes", "3", "--factory", "IVF2,Flat"), "--overwrite", id="there"),
    ],
)
def test_the_command_explains_refusals(
    db: PatchDatabase, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], says: str
) -> None:
    db.build_index(3)
    monkeypatch.setattr(factory, "_FLAT_MOST", 0)
    result = els("index", db.path, *options)
    assert result.exit_code == 1
    assert says in result.stderr
