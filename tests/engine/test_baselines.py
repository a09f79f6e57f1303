"""The Wiener filter, locality by PCA and the nearest image, from their definitions in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from backends import BackendUnderTest, backends

from els.engine import ELSModel, ScoreMachine, sample
from els.engine.adapters.edm import EDMDenoiser
from els.index import PatchDatabase, decode

RNG = np.random.default_rng(7)
NOISE = [1e-3, 0.05, 0.5, 1.0, 30.0]


def database(count: int, channels: int) -> PatchDatabase:
    images = RNG.integers(0, 256, (count, channels, 5, 6), dtype=np.uint8)
    images[:, :, 0, 0] = 0  # a pixel without variance
    return PatchDatabase.from_arrays(images, np.arange(count) % 2)


def flat(db: PatchDatabase) -> np.ndarray:
    return decode(db.images).reshape(len(db), -1).astype(np.float64)


def noisy(db: PatchDatabase, alpha: float, sigma: float, batch: int = 2) -> torch.Tensor:
    clean = decode(db.images[:batch]).astype(np.float64)
    return torch.from_numpy(alpha * clean + sigma * RNG.standard_normal(clean.shape))


def linear_filter(clean: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """L of the definition, from numpy's covariance."""
    variances, vectors = np.linalg.eigh(np.cov(clean.T))
    variances = variances.clip(min=0)
    gain = alpha**2 * variances / (alpha**2 * variances + sigma**2)
    return (vectors * gain) @ vectors.T


def local_mean(
    clean: np.ndarray, x: np.ndarray, alpha: float, sigma: float, threshold: float, members: slice
) -> tuple[np.ndarray, np.ndarray]:
    """The posterior mean of every coordinate, and its weights ``[D, N]``."""
    matrix = linear_filter(clean, alpha, sigma)
    is_dead = np.abs(np.diag(matrix)) < 1e-6
    matrix[is_dead, is_dead] = 1.0
    mask = matrix / np.diag(matrix)[:, None]
    if threshold > 0:
        mask = (np.abs(mask) >= threshold * np.abs(mask).max()).astype(float)
    candidates = clean[members]
    logits = -(mask.T @ ((x - alpha * candidates) ** 2).T) / (2 * sigma**2)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return (weights * candidates.T).sum(1), weights


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [12, 150])
@pytest.mark.parametrize("sigma", NOISE)
def test_the_wiener_filter(count: int, channels: int, sigma: float) -> None:
    db, alpha = database(count, channels), 0.8
    clean, x = flat(db), noisy(db, alpha, sigma)
    found = ScoreMachine(db, "wiener").posterior(x, alpha=alpha, sigma=sigma)
    mean = clean.mean(0)
    matrix = linear_filter(clean, alpha, sigma)
    for one, answer in zip(x, found.mean, strict=True):
        expected = mean + matrix @ (one.numpy().ravel() / alpha - mean)
        # Eigenvectors in float32.
        np.testing.assert_allclose(answer.ravel(), expected, atol=3e-6 * (1 + sigma))
    assert (found.effective_patches == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [12, 150])
@pytest.mark.parametrize("threshold", [0.02, 0.3, 0.0])
@pytest.mark.parametrize("sigma", NOISE)
def test_locality(count: int, channels: int, threshold: float, sigma: float) -> None:
    if threshold == 0 and sigma < 0.05:
        pytest.skip("weights in float32 do not tell logits of 10^5 apart")
    db, alpha = database(count, channels), 0.8
    clean, x = flat(db), noisy(db, alpha, sigma)
    machine = ScoreMachine(db, "PCA", mask_threshold=threshold)
    found = machine.posterior(x, alpha=alpha, sigma=sigma, top=3)
    _, _, height, width = x.shape
    for b, one in enumerate(x):
        expected, weights = local_mean(
            clean, one.numpy().ravel(), alpha, sigma, threshold, slice(None)
        )
        np.testing.assert_allclose(found.mean[b].ravel(), expected, atol=2e-4)
        if channels == 1:
            heaviest = -np.sort(-weights, axis=1)[:, :3]
            np.testing.assert_allclose(found.top_weights[b].reshape(-1, 3), heaviest, atol=2e-4)
        else:
            # The image that weighs most in the mean over channels.
            averaged = weights.reshape(channels, height * width, -1).mean(0).max(1)
            top = found.top_weights[b].reshape(-1, 3)
            assert (top[:, 0].numpy() <= averaged + 2e-4).all()
            assert (
                top[:, 0].numpy()
                >= weights.reshape(channels, height * width, -1).max(2).max(0) / channels - 2e-4
            ).all()
        pixel = found.top_addresses[b] % (height * width)
        there = torch.arange(height * width).reshape(height, width, 1)
        assert (pixel == there).all()


@pytest.mark.parametrize("sigma", NOISE)
def test_the_nearest(sigma: float) -> None:
    db, alpha = database(150, 3), 0.7
    clean, x = flat(db), noisy(db, alpha, sigma)
    found = ScoreMachine(db, "nearest").posterior(x, alpha=alpha, sigma=sigma)
    for one, answer in zip(x, found.mean, strict=True):
        distances = ((one.numpy().ravel() / alpha - clean) ** 2).sum(1)
        np.testing.assert_allclose(answer.ravel(), clean[distances.argmin()], atol=1e-7)


def test_no_signal_is_the_mean_of_all() -> None:
    db = database(40, 1)
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    for kind in ("Wiener", "PCA", "nearest"):
        found = ScoreMachine(db, kind).posterior(x, alpha=0.0, sigma=1.0).mean
        np.testing.assert_allclose(found.ravel(), flat(db).mean(0), atol=1e-6)


def test_a_class_is_its_own_images() -> None:
    db, alpha, sigma = database(60, 1), 0.8, 0.5
    clean, x = flat(db), noisy(db, alpha, sigma)
    labels = torch.tensor([1, 0])
    wiener = ScoreMachine(db, "Wiener").posterior(x, alpha=alpha, sigma=sigma, labels=labels).mean
    local = ScoreMachine(db, "PCA").posterior(x, alpha=alpha, sigma=sigma, labels=labels).mean
    near = ScoreMachine(db, "nearest").posterior(x, alpha=alpha, sigma=sigma, labels=labels).mean
    for b, label in enumerate(labels.tolist()):
        one, members = x[b].numpy().ravel(), clean[label::2]
        mean = members.mean(0)
        expected = mean + linear_filter(members, alpha, sigma) @ (one / alpha - mean)
        np.testing.assert_allclose(wiener[b].ravel(), expected, atol=1e-5)
        # Which coordinates matter is known from all images.
        expected, _ = local_mean(clean, one, alpha, sigma, 0.02, slice(label, None, 2))
        np.testing.assert_allclose(local[b].ravel(), expected, atol=2e-4)
        distances = ((one / alpha - members) ** 2).sum(1)
        np.testing.assert_allclose(near[b].ravel(), members[distances.argmin()], atol=1e-7)


@pytest.mark.parametrize("under_test", list(backends()))
def test_every_backend_has_them(under_test: BackendUnderTest | None) -> None:
    assert under_test is not None, "the native extension is missing"
    db, alpha, sigma = database(60, 3), 0.8, 0.4
    x = noisy(db, alpha, sigma).float()
    for kind in ("Wiener", "PCA", "nearest"):
        expected = ScoreMachine(db, kind, backend="torch", device="cpu")
        machine = ScoreMachine(db, kind, backend=under_test.make(2))
        asked = {"alpha": alpha, "sigma": sigma}
        found = machine.posterior(x.to(machine.device), **asked).mean.cpu()
        torch.testing.assert_close(found, expected.posterior(x, **asked).mean, rtol=0, atol=1e-5)


def test_they_sample_and_serve_other_libraries() -> None:
    db = database(60, 1)
    kept = torch.linspace(0.99, 0.01, 10)
    for kind in ("wiener", "pca", "NEAREST"):
        machine = ScoreMachine(db, kind)
        both = sample(machine, n=2, steps=4, seed=3)
        alone = sample(machine, indices=[1], steps=4, seed=3, batch_size=1)
        torch.testing.assert_close(alone[0], both[1], rtol=0, atol=1e-5)
        x = noisy(db, 0.9, 0.3)
        assert ELSModel(machine, scheduler=kept)(x, 4).sample.shape == x.shape
        assert EDMDenoiser(machine)(x, torch.tensor([0.5])).shape == x.shape
        with_tolerance = sample(machine, n=2, steps=4, seed=3, tolerance=0.01)
        torch.testing.assert_close(with_tolerance, both, rtol=0, atol=1e-5)


def test_what_they_cannot_is_said(tmp_path: Path) -> None:
    db = database(20, 1)
    x = noisy(db, 0.9, 0.3)
    asked = {"alpha": 0.9, "sigma": 0.3}
    for kind in ("Wiener", "PCA", "nearest"):
        machine = ScoreMachine(db, kind)
        with pytest.raises(ValueError, match="gradient"):
            machine.posterior(x.clone().requires_grad_(), **asked)
        with pytest.raises(ValueError, match="divergence"):
            machine.divergence(x, **asked)
        with pytest.raises(ValueError, match="mode='exact' only"):
            machine.posterior(x, mode="subset", **asked)
    with pytest.raises(ValueError, match="weighs no patches"):
        ScoreMachine(db, "Wiener").posterior(x, top=1, **asked)
    with pytest.raises(ValueError, match=r"mask_threshold=0.1 is of kind='PCA'"):
        ScoreMachine(db, "ELS", mask_threshold=0.1)
    for wrong in (-0.1, 2, "x", True):
        with pytest.raises(ValueError, match="mask_threshold"):
            ScoreMachine(db, "PCA", mask_threshold=wrong)
