"""Estimates where processes share the images: every rank asks the same and gets the same."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from els.engine import LocalPosterior, ScoreMachine
from els.engine.backends.backend import Costs
from els.engine.backends.native import NativeBackend
from els.engine.backends.native_kernels import is_compiled
from els.engine.backends.pytorch import TorchBackend
from els.engine.backends.sharded import ShardedBackend
from els.engine.state import PosteriorState, merge_all
from els.index import PatchDatabase

RANKS = 3
ARGUMENTS = {"alpha": 0.8, "sigma": 0.6, "patch_size": 3, "k": 20, "subset": 100, "share": 0.2}


class ThreadMesh:
    """Ranks in threads, with the part of a mesh that a sharded backend uses."""

    database_shards = RANKS

    def __init__(self, shard: int, meeting: threading.Barrier, place: list[Any]) -> None:
        self.shard = shard
        self.questions = 0
        self._meeting, self._place = meeting, place

    def merge(self, state: PosteriorState) -> PosteriorState:
        return self._met(state, merge_all)

    def largest(self, values: Tensor) -> Tensor:
        return self._met(values, lambda parts: torch.stack(list(parts)).amax(0))

    def _met(self, own: Any, together: Callable[[list[Any]], Any]) -> Any:
        self.questions += 1
        self._place[self.shard] = own
        self._meeting.wait(timeout=60)
        result = together(list(self._place))
        self._meeting.wait(timeout=60)
        return result


def on_ranks(
    db: PatchDatabase, work: Callable[[ScoreMachine], LocalPosterior]
) -> tuple[list[LocalPosterior], list[int]]:
    """What each rank gets, and how often it met the others."""
    meeting, place = threading.Barrier(RANKS), [None] * RANKS
    meshes = [ThreadMesh(rank, meeting, place) for rank in range(RANKS)]
    results: list[Any] = [None] * RANKS

    def run(rank: int) -> None:
        inner = NativeBackend(1) if is_compiled() else TorchBackend()
        backend = ShardedBackend(inner, meshes[rank])  # type: ignore[arg-type]
        machine = ScoreMachine(db, "ELS", "zeros", backend)
        try:
            results[rank] = work(machine)
        except BaseException as error:
            meeting.abort()
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, BaseException)]
    broken = (error for error in errors if not isinstance(error, threading.BrokenBarrierError))
    for error in (*broken, *errors):
        raise error
    return results, [mesh.questions for mesh in meshes]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> PatchDatabase:
    """Enough images for auto to take a part of them; class 2 is with one rank only."""
    images = np.random.default_rng(22).integers(0, 256, (900, 1, 6, 7)).astype(np.uint8)
    labels = np.where(np.arange(900) >= 860, 2, np.arange(900) % 2)
    path: Path = tmp_path_factory.mktemp("sharded") / "db"
    PatchDatabase.build(images, labels, path=path)
    PatchDatabase.open(path).build_index(3, factory="IVF16,SQ8_direct")
    return PatchDatabase.open(path)


@pytest.mark.parametrize("label", [None, 2])
@pytest.mark.parametrize(
    "mode",
    [
        "topk",
        "subset",
        "topk+subset",
        pytest.param("lists", marks=pytest.mark.native),
        "auto",
    ],
)
def test_ranks_agree_with_each_other_and_with_one(
    db: PatchDatabase, monkeypatch: pytest.MonkeyPatch, mode: str, label: int | None
) -> None:
    def no_products(*_: object, **__: object) -> None:
        raise AssertionError("products read all images")

    monkeypatch.setattr("els.engine.approximate.auto.FIRST_IMAGES", 48)
    monkeypatch.setattr("els.engine.approximate.auto.LEAST_PAIRS", 0)
    monkeypatch.setattr("els.engine.approximate.subset.FIRST_IMAGES", 48)
    # On a processor with a matrix unit, the border's products; here as if it had one.
    with_errors = lambda _, query: query.logit_error > 0  # noqa: E731
    monkeypatch.setattr(NativeBackend, "_multiplies", with_errors)
    monkeypatch.setattr("els.engine.backends.native.border_states", no_products)
    x = torch.from_numpy(np.random.default_rng(24).standard_normal((1, 1, 6, 7))).float()
    options = ARGUMENTS | {"mode": mode, "tolerance": 0.1 if mode == "auto" else None}

    def ask(machine: ScoreMachine) -> LocalPosterior:
        return machine.posterior(x, labels=label, seed=5, **options)

    answers, questions = on_ranks(db, ask)
    assert len(set(questions)) == 1
    assert questions[0] > 0
    for answer in answers[1:]:
        assert torch.equal(answer.mean, answers[0].mean)
        assert torch.equal(answer.mean_error, answers[0].mean_error)
    monkeypatch.setattr(NativeBackend, "_multiplies", lambda _, query: False)
    alone = ScoreMachine(db, "ELS", "zeros", threads=1)
    if mode == "auto":
        exact = alone.posterior(x, labels=label, alpha=0.8, sigma=0.6, patch_size=3)
        assert (answers[0].mean - exact.mean).abs().mean() <= 0.1
        return
    if mode == "lists":
        # Which pixels are sampled together matters, unless everything is read.
        exact = alone.posterior(x, labels=label, alpha=0.8, sigma=0.6, patch_size=3)
        error = float((answers[0].mean - exact.mean).abs().mean())
        assert 0 < error <= 2 * float(answers[0].expected_error.mean())
        options["share"] = 1.0
        answers, _ = on_ranks(db, ask)
    expected = ask(alone)
    assert answers[0].modes == expected.modes
    torch.testing.assert_close(answers[0].mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers[0].mean_error, expected.mean_error, rtol=1e-3, atol=1e-5)
    assert answers[0].subset_images == expected.subset_images


@pytest.mark.native
@pytest.mark.parametrize("pays", [True, False])
def test_auto_samples_lists_where_that_pays(
    db: PatchDatabase, monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    """It does not on other devices."""
    sampled = []

    class Priced:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def costs(self, _: object) -> Costs:
            return Costs(list_ranked=0.1, code_read=4.0) if pays else Costs()

        def sample_lists(self, *arguments: Any, **options: Any) -> PosteriorState:
            sampled.append(1)
            return self._inner.sample_lists(*arguments, **options)

    monkeypatch.setattr("els.engine.approximate.auto.FIRST_IMAGES", 48)
    monkeypatch.setattr("els.engine.approximate.subset.FIRST_IMAGES", 48)
    monkeypatch.setattr("els.engine.approximate.auto.LEAST_PAIRS", 0)
    machine = ScoreMachine(db, "ELS", "circular", Priced(NativeBackend(1)))
    x = torch.zeros(1, 1, 6, 7)
    machine.posterior(x, alpha=0.8, sigma=0.6, patch_size=3, mode="auto", tolerance=0.002)
    assert bool(sampled) == pays
