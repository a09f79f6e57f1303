"""Gradients of exact posteriors against central differences of the float64 oracle."""

import math

import numpy as np
import oracle
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from backends import FLOAT64, BackendUnderTest
from questions import every_machine

from els.engine import EDMDenoiser, ELSModel, ScoreMachine
from els.index import PatchDatabase

# Step of the central differences: their error is about its square, rounding 1e-16 over it.
STEP = 1e-5
MOST_ERROR = 1e-6


def machine_of(
    kind: str = "ELS", boundary: str = "zeros", shape: tuple[int, int, int] = (2, 5, 4)
) -> ScoreMachine:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (9, *shape), dtype=np.uint8)
    db = PatchDatabase.from_arrays(images, np.arange(9) % 2)
    return ScoreMachine(db, kind, boundary, backend="torch")


def noisy(machine: ScoreMachine, count: int = 2) -> torch.Tensor:
    rng = np.random.default_rng(2)
    return torch.from_numpy(rng.standard_normal((count, *machine.db.shape)) * 0.7)


def central_difference(function: object, x: torch.Tensor, direction: torch.Tensor) -> float:
    return float(function(x + STEP * direction) - function(x - STEP * direction)) / (2 * STEP)


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(1e-3, abs(expected))


@every_machine
@pytest.mark.parametrize("patch_size", [1, 3])
@pytest.mark.parametrize("labels", [None, [1, 0]], ids=["all", "labels"])
@pytest.mark.thinned
def test_every_answer_to_every_input(
    backend: BackendUnderTest, kind: str, boundary: str, patch_size: int, labels: list[int] | None
) -> None:
    plain = machine_of(kind, boundary)
    machine = backend.machine(plain.db.images, kind, boundary, plain.db.labels)
    x = noisy(machine)
    alpha, sigma = torch.tensor([0.9, 0.4]).double(), torch.tensor([0.8, 1.3]).double()
    rng = np.random.default_rng(3)
    of_mean, of_evidence, of_effective = (
        rng.standard_normal(shape) for shape in (x.shape, x[:, 0].shape, x[:, 0].shape)
    )

    def loss(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> float:
        total = 0.0
        for b in range(len(x)):
            truth = oracle.posterior(
                machine.db.images,
                x[b].numpy(),
                alpha=float(alpha[b]),
                sigma=float(sigma[b]),
                kind=kind,
                boundary=boundary,
                patch_size=patch_size,
                members=None if labels is None else machine.db.class_members(labels[b]),
            )
            total += (truth.mean * of_mean[b]).sum() + (truth.log_evidence * of_evidence[b]).sum()
            total += (truth.effective_patches * of_effective[b]).sum()
        return total

    inputs = [value.clone().requires_grad_() for value in (x, alpha, sigma)]
    post = machine.posterior(
        inputs[0],
        alpha=inputs[1],
        sigma=inputs[2],
        patch_size=patch_size,
        labels=None if labels is None else torch.tensor(labels),
    )
    weighted = (
        (post.mean * torch.from_numpy(of_mean)).sum()
        + (post.log_evidence * torch.from_numpy(of_evidence)).sum()
        + (post.effective_patches * torch.from_numpy(of_effective)).sum()
    )
    of_x, of_alpha, of_sigma = torch.autograd.grad(weighted, inputs)
    for _ in range(3):
        direction = torch.from_numpy(rng.standard_normal(x.shape))
        expected = central_difference(lambda x: loss(x, alpha, sigma), x, direction)
        assert relative(float((of_x * direction).sum()), expected) < MOST_ERROR
    for b in range(len(x)):
        one = torch.eye(len(x), dtype=torch.float64)[b]
        expected = central_difference(lambda alpha: loss(x, alpha, sigma), alpha, one)
        assert relative(float(of_alpha[b]), expected) < MOST_ERROR
        expected = central_difference(lambda sigma: loss(x, alpha, sigma), sigma, one)
        assert relative(float(of_sigma[b]), expected) < MOST_ERROR


@every_machine
@pytest.mark.parametrize("name", ["score", "epsilon"])
@pytest.mark.thinned
def test_scores_have_the_whole_jacobian(kind: str, boundary: str, name: str) -> None:
    machine = machine_of(kind, boundary)
    x = noisy(machine, 1)

    def answer(x: torch.Tensor) -> torch.Tensor:
        return getattr(machine, name)(x, alpha=0.8, sigma=0.6, patch_size=3)

    jacobian = torch.autograd.functional.jacobian(answer, x).reshape(x.numel(), x.numel())
    for i, direction in enumerate(torch.eye(x.numel(), dtype=torch.float64)):
        moved = direction.reshape(x.shape) * STEP
        expected = ((answer(x + moved) - answer(x - moved)) / (2 * STEP)).flatten()
        assert (jacobian[:, i] - expected).abs().max() < MOST_ERROR * expected.abs().max()


@pytest.mark.parametrize("sizes", [3, [1, 3, 5]], ids=["one-size", "size-per-noise"])
def test_denoiser_of_edm(sizes: int | list[int]) -> None:
    machine = machine_of(shape=(1, 6, 5))
    denoiser = EDMDenoiser(machine, sizes)
    sigma = torch.tensor([0.1, 3.0], dtype=torch.float64)
    check_vector_jacobian(lambda x: denoiser(x, sigma), noisy(machine))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_unet_of_diffusers(prediction: str) -> None:
    machine = machine_of(shape=(1, 6, 5))
    kept = torch.linspace(0.99, 0.02, 10, dtype=torch.float64)
    model = ELSModel(machine, [1, 3, 5], scheduler=kept, prediction_type=prediction)
    check_vector_jacobian(
        lambda x: model(x, torch.tensor([0, 7]), class_labels=torch.tensor([1, 0])).sample,
        noisy(machine),
    )


def check_vector_jacobian(function: object, x: torch.Tensor) -> None:
    rng = np.random.default_rng(4)
    weights, direction = (torch.from_numpy(rng.standard_normal(x.shape)) for _ in range(2))
    attached = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((function(attached) * weights).sum(), attached)
    expected = central_difference(lambda x: (function(x) * weights).sum(), x, direction)
    assert relative(float((found * direction).sum()), expected) < MOST_ERROR


@every_machine
@pytest.mark.parametrize("labels", [None, 1])
@pytest.mark.thinned
def test_divergence_is_the_trace(kind: str, boundary: str, labels: int | None) -> None:
    machine = machine_of(kind, boundary)
    x = noisy(machine)
    options = {"alpha": torch.tensor([0.8, 0.3]), "sigma": 0.6, "patch_size": 3, "labels": labels}
    exact = machine.divergence(x, **options)
    dimension = x[0].numel()
    trace = torch.zeros(2, dtype=torch.float64)
    for i, direction in enumerate(torch.eye(dimension, dtype=torch.float64)):
        moved = direction.reshape(1, *x.shape[1:]) * STEP
        change = machine.score(x + moved, **options) - machine.score(x - moved, **options)
        trace += change.flatten(1)[:, i] / (2 * STEP)
    assert (exact - trace).abs().max() < MOST_ERROR * trace.abs().max()
    # Hutchinson's estimator over an orthogonal basis is the trace itself.
    basis = math.sqrt(dimension) * torch.eye(dimension, dtype=torch.float64)
    probes = basis.reshape(dimension, 1, *x.shape[1:])
    estimated = machine.divergence(x, probes=probes.repeat(1, 2, 1, 1, 1), **options)
    assert (exact - estimated).abs().max() < 1e-9 * trace.abs().max()


def test_log_evidence_of_the_ideal_machine_has_the_score_as_its_gradient() -> None:
    machine = machine_of("IS")
    x = noisy(machine, 1).requires_grad_()
    post = machine.posterior(x, alpha=0.7, sigma=0.5)
    (gradient,) = torch.autograd.grad(post.log_evidence[0, 0, 0], x)
    with torch.no_grad():
        score = machine.score(x, alpha=0.7, sigma=0.5)
    assert (gradient - score).abs().max() < 1e-9 * score.abs().max()


@every_machine
@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gradients_are_finite(kind: str, boundary: str, sigma: float, size: float) -> None:
    machine = machine_of(kind, boundary)
    x = (noisy(machine) * size).requires_grad_()
    options = {"alpha": 0.9, "sigma": sigma, "patch_size": 3}
    machine.posterior(x, **options).mean.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(machine.divergence(x.detach(), **options)).all()


def test_float32_queries_have_float32_gradients() -> None:
    machine = machine_of()
    wide = noisy(machine).requires_grad_()
    narrow = wide.detach().float().requires_grad_()
    options = {"alpha": 0.9, "sigma": 0.7, "patch_size": 3}
    for x in (wide, narrow):
        machine.posterior(x, **options).mean.square().sum().backward()
    assert narrow.grad.dtype == torch.float32
    assert (narrow.grad - wide.grad).abs().max() < 1e-5 * wide.grad.abs().max()


def test_blocks_of_images_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from els.engine import gradients

    found = []
    for size in (1 << 30, 1):
        monkeypatch.setattr(gradients, "_BLOCK_BYTES", size)
        machine = machine_of()
        x = noisy(machine).requires_grad_()
        machine.score(x, alpha=0.9, sigma=0.7, patch_size=3).square().sum().backward()
        found.append(x.grad)
    assert (found[0] - found[1]).abs().max() < 1e-12 * found[0].abs().max()


def test_nothing_is_half_connected() -> None:
    machine = machine_of()
    x = noisy(machine).requires_grad_()
    options = {"alpha": 0.9, "sigma": 0.7, "patch_size": 3}
    for mode in ({"mode": "subset", "subset": 32}, {"mode": "auto", "tolerance": 0.01}):
        with pytest.raises(ValueError, match="gradient"):
            machine.posterior(x, **options, **mode)
    with pytest.raises(ValueError, match="gradient"):
        EDMDenoiser(machine, 3, tolerance=0.01)(x, 0.5)
    with pytest.raises(ValueError, match="gradient"):
        machine.divergence(x, **options)
    with torch.no_grad():
        assert not machine.score(x, **options).requires_grad
        machine.posterior(x, **options, mode="auto", tolerance=0.01)
    # The score depends on x directly, too: its second derivative must not be of that part alone.
    score = machine.score(x, **options)
    (first,) = torch.autograd.grad(score.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(first.sum(), x, allow_unused=True)


# What torch imports to make a dual tensor.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["score", "epsilon"])
def test_forward_mode_is_refused(name: str) -> None:
    """It would see x, but not the mean."""
    machine = machine_of()
    x = noisy(machine)

    def answer(x: torch.Tensor) -> torch.Tensor:
        return getattr(machine, name)(x, alpha=0.9, sigma=0.7, patch_size=3)

    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            with pytest.raises(ValueError, match="forward mode"):
                answer(forward_ad.make_dual(x, torch.ones_like(x)))
            with pytest.raises(ValueError, match="forward mode"):
                EDMDenoiser(machine, 3)(forward_ad.make_dual(x, torch.ones_like(x)), 0.5)
    with pytest.raises(ValueError, match="forward mode"):
        torch.func.jvp(answer, (x,), (torch.ones_like(x),))


def test_the_divergence_works_in_inference_mode() -> None:
    machine = machine_of()
    x = noisy(machine)
    options = {"alpha": 0.9, "sigma": 0.7, "patch_size": 3, "labels": 1}
    probes = torch.ones(1, *x.shape)
    expected = machine.divergence(x, probes=probes, **options)
    with torch.inference_mode():
        inside = x.clone()
        assert torch.equal(machine.divergence(inside, probes=probes, **options), expected)
        exact = machine.divergence(inside, **options)
    assert torch.equal(machine.divergence(inside, probes=probes, **options), expected)
    assert torch.equal(machine.divergence(x, **options), exact)


@pytest.mark.parametrize("probes", [torch.zeros(2, 3), torch.zeros(0, 2, 2, 5, 4), "many"])
def test_probes_of_another_shape(probes: object) -> None:
    machine = machine_of()
    with pytest.raises(ValueError, match=r"probes .* \[K, B, C, H, W\]"):
        machine.divergence(noisy(machine), alpha=0.9, sigma=0.7, patch_size=3, probes=probes)


def test_the_transform_of_torch_func() -> None:
    machine = machine_of()
    x = noisy(machine)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return machine.score(x, alpha=0.9, sigma=0.7, patch_size=3).square().sum()

    expected = torch.autograd.functional.vjp(loss, x)[1]
    assert torch.equal(torch.func.grad(loss)(x), expected)


def test_the_oracle_of_float64_is_the_machine() -> None:
    """What the differences are taken of is what is differentiated."""
    machine = FLOAT64.machine(machine_of().db.images, "ELS", "zeros")
    x = noisy(machine)
    mean = machine.posterior(x, alpha=0.9, sigma=0.7, patch_size=3).mean[0].numpy()
    truth = oracle.posterior(
        machine.db.images, x[0].numpy(), alpha=0.9, sigma=0.7, kind="ELS", boundary="zeros",
        patch_size=3,
    )  # fmt: skip
    np.testing.assert_allclose(mean, truth.mean, atol=1e-9)
