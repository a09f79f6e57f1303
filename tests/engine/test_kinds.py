"""A kind of machine of one's own: one definition, registered from outside the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from els.engine import ScoreMachine, sample
from els.engine.kinds import ELS, Kind, kind_named, register
from els.explain.replay import explain_run
from els.index import PatchDatabase
from els.runs import RunFolder, read_settings, sample_run

IMAGES = np.random.default_rng(0).integers(0, 256, (17, 2, 6, 7), dtype=np.uint8)


def cross(patch_size: int) -> NDArray[np.bool_]:
    """The middle row and column of a patch."""
    middle = np.arange(patch_size) == patch_size // 2
    return middle | middle[:, np.newaxis]


CROSS = register(Kind("cross", is_local=True, is_equivariant=False, window=cross))
SLIDING = register(Kind("sliding cross", is_local=True, is_equivariant=True, window=cross))


@pytest.fixture
def db(tmp_path: Path) -> PatchDatabase:
    return PatchDatabase.build(IMAGES, np.arange(17) % 3, path=tmp_path / "db")


def logits_of(
    x: NDArray[np.float64], sites: list[tuple[int, int]], y: int, v: int, alpha: float, sigma: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits and clean centres of the candidates of pixel (y, v): patches at some sites."""
    clean = IMAGES / 127.5 - 1
    noisy = np.pad(x, ((0, 0), (2, 2), (2, 2)))
    padded = np.pad(clean, ((0, 0), (0, 0), (2, 2), (2, 2)))
    logits, centres = [], []
    for row, column in sites:
        distance = np.zeros(len(IMAGES))
        for down, right in np.argwhere(cross(5)):
            difference = (
                noisy[:, y + down, v + right] - alpha * padded[:, :, row + down, column + right]
            )
            distance += np.square(difference).sum(1)
        logits.append(-distance / (2 * sigma**2))
        centres.append(clean[:, :, row, column])
    return np.concatenate(logits), np.concatenate(centres)


@pytest.mark.parametrize("kind", [CROSS, SLIDING], ids=lambda kind: kind.name)
@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_the_posterior_is_that_of_the_definition(
    db: PatchDatabase, kind: Kind, sigma: float
) -> None:
    machine = ScoreMachine(db, kind, "zeros")
    assert machine.backend.startswith("torch")
    alpha, x = 0.8, np.random.default_rng(1).standard_normal((2, 6, 7))
    answer = machine.posterior(torch.from_numpy(x[None]), alpha=alpha, sigma=sigma, patch_size=5)
    inside = [(y, v) for y in (2, 3) for v in (2, 3, 4)]
    for y, v in np.ndindex(6, 7):
        # Where a border is seen along both axes, in a corner, nothing slides.
        if kind.is_equivariant and (y, v) not in inside:
            continue
        sites = inside if kind.is_equivariant else [(y, v)]
        logits, centres = logits_of(x, sites, y, v, alpha, sigma)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        np.testing.assert_allclose(answer.mean[0, :, y, v], weights @ centres, atol=1e-12)
        evidence = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        assert answer.log_evidence[0, y, v].item() == pytest.approx(evidence, rel=1e-12)


def test_its_gradient_is_that_of_the_posterior(db: PatchDatabase) -> None:
    machine = ScoreMachine(db, "sliding cross", "zeros")
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((1, 2, 6, 7))).requires_grad_()
    direction = torch.from_numpy(np.random.default_rng(3).standard_normal(x.shape))

    def value(x: torch.Tensor) -> torch.Tensor:
        return machine.posterior(x, alpha=0.8, sigma=1.1, patch_size=3).mean.square().sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    step = 1e-5
    with torch.no_grad():
        difference = value(x + step * direction) - value(x - step * direction)
    assert (gradient * direction).sum().item() == pytest.approx(
        difference.item() / (2 * step), rel=1e-6
    )
    flat = x.detach()
    trace = machine.divergence(flat, alpha=0.8, sigma=1.1, patch_size=3)
    basis = torch.eye(flat.numel(), dtype=torch.float64).reshape(-1, *flat.shape)
    probes = basis * flat.numel() ** 0.5
    estimate = machine.divergence(flat, alpha=0.8, sigma=1.1, patch_size=3, probes=probes)
    torch.testing.assert_close(trace, estimate)


def test_it_is_sampled_explained_and_run_resumably(db: PatchDatabase, tmp_path: Path) -> None:
    machine = ScoreMachine(db, "cross", "circular")
    images = sample(machine, n=3, steps=3, patch_sizes=5, seed=4)
    assert images.shape == (3, 2, 6, 7)

    def stop(progress: object) -> None:
        if progress.finished == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    settings = {"n": 3, "steps": 3, "patch_sizes": 5, "seed": 4}
    with pytest.raises(KeyboardInterrupt):
        sample_run(machine, tmp_path / "run", **settings, batch_size=1, progress=stop)
    done = sample_run(machine, tmp_path / "run", **settings)
    assert done.computed == 2
    assert read_settings(tmp_path / "run").machine == "cross"
    for index in range(3):
        found = RunFolder(tmp_path / "run").load(index)
        np.testing.assert_array_equal(found, images[index].float().numpy())
    explanation, _ = explain_run(tmp_path / "run", 1)
    assert explanation.kind == "cross"
    # Candidates of a local machine stand at the pixel's own place.
    assert (explanation.offsets() == 0).all()


def test_subsets_serve_it_and_indices_do_not(db: PatchDatabase) -> None:
    machine = ScoreMachine(db, "sliding cross", "circular")
    x = torch.zeros(1, 2, 6, 7)
    options = {"alpha": 0.8, "sigma": 1.1, "patch_size": 3}
    answer = machine.posterior(x, **options, mode="subset", subset=32)
    assert answer.modes == ("exact",)  # of 17 images all are drawn
    with pytest.raises(ValueError, match=r"needs kind='ELS'.*sliding cross"):
        machine.posterior(x, **options, mode="topk")


@pytest.mark.native
def test_a_backend_says_what_it_does_not_compute(db: PatchDatabase) -> None:
    with pytest.raises(ValueError, match="does not compute the window of kind 'cross'"):
        ScoreMachine(db, "cross", backend="native")


def test_definitions_are_checked() -> None:
    assert kind_named("ELS") is ELS
    assert register(Kind("cross", is_local=True, is_equivariant=False, window=cross)) == CROSS
    with pytest.raises(ValueError, match="another kind is registered as 'cross'"):
        register(Kind("cross", is_local=True, is_equivariant=True))
    with pytest.raises(ValueError, match="compares whole images"):
        register(Kind("odd", is_local=False, is_equivariant=True, window=cross))
    with pytest.raises(ValueError, match=r"window\(3\) of kind 'odd' must be a bool array"):
        register(Kind("odd", is_local=True, is_equivariant=True, window=lambda size: np.eye(size)))
    with pytest.raises(ValueError, match=r"kind='odd' is not known.*ELS"):
        kind_named("odd")
