"""How far a posterior is, told while it is computed."""

import numpy as np
import pytest
import torch

from els.engine import ScoreMachine, sample, watching
from els.engine.backends import native, pytorch
from els.engine.backends.native_kernels import is_compiled, kernel_module
from els.index import PatchDatabase

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 1, 8, 9), dtype=np.uint8)
DB = PatchDatabase.from_arrays(IMAGES, [0, 1] * 20)
NOISE = {"alpha": 0.8, "sigma": 0.6}
COMPILED = pytest.mark.skipif(not is_compiled(), reason="the extension was not compiled")
BACKENDS = [pytest.param("native", marks=COMPILED), "torch"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of work is told of, and there are several."""
    monkeypatch.setattr(watching, "_SECONDS", 0.0)
    monkeypatch.setattr(native, "_STATES_BYTES", 1)
    monkeypatch.setattr(pytorch, "_BLOCK_BYTES", 1 << 16)


def noisy(count: int, height: int = 8, width: int = 9) -> torch.Tensor:
    values = RNG.standard_normal((count, 1, height, width), dtype=np.float32)
    return torch.from_numpy(values)


def told(machine: ScoreMachine, x: torch.Tensor, **asked: object) -> list[float]:
    shares: list[float] = []
    with watching.watched(shares.append):
        watched = machine.posterior(x, **NOISE, **asked).mean
    assert torch.equal(watched, machine.posterior(x, **NOISE, **asked).mean)
    assert shares == sorted(shares)
    assert all(0 < share < 1 for share in shares)
    return shares


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 1])], ids=["all", "classes"])
def test_exact_posteriors_tell(backend, labels) -> None:
    machine = ScoreMachine(DB, "ELS", "zeros", backend)
    shares = told(machine, noisy(4), patch_size=3, labels=labels)
    assert len(shares) >= 2
    assert min(shares) < 0.3
    assert max(shares) > 0.7


@pytest.mark.parametrize("kind", ["IS", "ES", "PCA"])
def test_machines_of_whole_images_tell(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("image_machines", "statistical"):
        monkeypatch.setattr(f"els.engine.backends.{module}._BLOCK_BYTES", 1 << 10)
    shares = told(ScoreMachine(DB, kind), noisy(2), patch_size=3 if kind == "PCA" else None)
    assert len(shares) >= 2


def test_canvases_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("els.engine.canvas._MOST_WINDOWS", 1)
    machine = ScoreMachine(DB, "ELS", "zeros", "torch")
    shares = told(machine, noisy(1, 8, 16), patch_size=3)
    assert min(shares) < 0.5 < max(shares)


def test_estimates_tell() -> None:
    """Images of a batch one after the other; a subset and then everything is no more than all."""
    machine = ScoreMachine(DB, "ELS", "zeros", "torch")
    shares = told(machine, noisy(3), patch_size=3, mode="subset", subset=32)
    assert shares
    assert max(shares) <= 32 / 40 + 1e-9


def test_nobody_is_told_outside() -> None:
    shares: list[float] = []
    machine = ScoreMachine(DB, "ELS", "zeros", "torch")
    with watching.watched(shares.append):
        pass
    machine.posterior(noisy(4), **NOISE, patch_size=3)
    assert not shares


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_watches_may_end_it(backend) -> None:
    def stop(share: float) -> None:
        raise KeyboardInterrupt

    machine = ScoreMachine(DB, "ELS", "zeros", backend)
    with pytest.raises(KeyboardInterrupt), watching.watched(stop):
        machine.posterior(noisy(4), **NOISE, patch_size=3)


@COMPILED
def test_an_exception_ends_a_kernel_that_runs() -> None:
    """One thread weighs 4 * 10^9 pairs in more than the tenth of a second after which it tells."""
    calls: list[int] = []

    def stop(tasks: int) -> None:
        calls.append(tasks)
        raise KeyError("stop")

    images = RNG.integers(0, 256, (6000, 1, 28, 28), dtype=np.uint8)
    arrays = {
        name: np.empty((8, 1, *planes, 28, 28))
        for name, planes in (("reference", ()), ("mass", ()), ("centre", (1,)))
    }
    with pytest.raises(KeyError, match="stop"):
        kernel_module().posterior(
            images=images,
            members=np.arange(6000),
            starts=np.linspace(0, 6000, 9).astype(np.int64),
            x=RNG.standard_normal((1, 1, 28, 28)),
            alpha=np.array([0.8]),
            sigma=np.array([0.6]),
            patch_size=9,
            equivariant=True,
            circular=True,
            border_only=False,
            threads=1,
            **arrays,
            logit_sum=None,
            top_logits=None,
            top_addresses=None,
            progress=stop,
        )
    assert calls == [0]


def test_a_bar_moves_within_steps_and_a_function_hears_of_whole_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = ScoreMachine(DB, "ELS", "zeros", "torch")
    whole: list[tuple[int, int]] = []
    sample(machine, n=4, steps=2, patch_sizes=3, progress=lambda *done: whole.append(done))
    assert whole == [(4, 8), (8, 8)]
    assert all(isinstance(done, int) for done, _ in whole)
    drawn: list[float] = []
    monkeypatch.setattr(
        "rich.progress.Progress.update",
        lambda self, task, completed, total: drawn.append(completed),
    )
    sample(machine, n=4, steps=2, patch_sizes=3, progress=True)
    assert drawn == sorted(drawn)
    assert {4, 8} < set(drawn)
    assert any(4 < done < 8 for done in drawn)
