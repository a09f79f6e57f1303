"""A canvas of another size than the training images."""

from itertools import product

import numpy as np
import pytest
import torch
from backends import BackendUnderTest, backends

from els.engine import ScoreMachine, sample
from els.engine.canvas import Axis
from els.index import PatchDatabase, decode

RNG = np.random.default_rng(0)
ALPHA, SIGMA = 0.8, 0.6
CANVASES = [(8, 9), (13, 20), (7, 8), (8, 30), (9, 7), (16, 7), (5, 5)]
CASES = [
    (side, canvas, channels, boundary, size)
    for side, canvas, channels, boundary, size in product(
        [(8, 9), (7, 7)], CANVASES, [1, 3], ["zeros", "circular"], [1, 3, 5, 7]
    )
    if size <= min(*side, *canvas) and side != canvas
]


def oracle(images: np.ndarray, x: np.ndarray, patch_size: int, boundary: str) -> np.ndarray:
    """Straight from the definition: candidates have the pixel's depth from the same border."""
    (_, _, *sides), radius = images.shape, patch_size // 2
    clean = decode(images).astype(np.float64)
    beyond = ((radius, radius), (radius, radius))
    mode = "wrap" if boundary == "circular" else "constant"
    patches = np.lib.stride_tricks.sliding_window_view(
        np.pad(clean, ((0, 0), (0, 0), *beyond)), (patch_size, patch_size), (2, 3)
    )
    noisy = np.pad(x, ((0, 0), *beyond), mode)

    def place(i: int, length: int) -> tuple[str, int]:
        if boundary == "circular" or radius <= i < length - radius:
            return "inside", 0
        return ("low", i) if i < radius else ("high", length - 1 - i)

    def allowed(i: int, canvas: int, length: int) -> list[int]:
        inside = range(radius, length - radius) if boundary == "circular" else range(length)
        return [j for j in inside if place(j, length) == place(i, canvas)]

    mean = np.zeros_like(x)
    for y, z in np.ndindex(*x.shape[1:]):
        rows, columns = (
            allowed(i, canvas, length)
            for i, canvas, length in zip((y, z), x.shape[1:], sides, strict=True)
        )
        candidates = patches[:, :, rows][:, :, :, columns]
        window = noisy[:, y : y + patch_size, z : z + patch_size]
        distances = (window[None, :, None, None] - ALPHA * candidates) ** 2
        logits = -distances.sum((1, 4, 5)) / (2 * SIGMA**2)
        weights = np.exp(logits - logits.max())
        centres = clean[:, :, rows][:, :, :, columns]
        mean[:, y, z] = (weights[:, None] * centres).sum((0, 2, 3)) / weights.sum()
    return mean


@pytest.mark.parametrize(("side", "canvas", "channels", "boundary", "patch_size"), CASES)
@pytest.mark.thinned
def test_every_pixel_has_its_own_candidates(
    side: tuple[int, int],
    canvas: tuple[int, int],
    channels: int,
    boundary: str,
    patch_size: int,
) -> None:
    check(side, canvas, channels, boundary, patch_size, "auto")


def check(
    side: tuple[int, int],
    canvas: tuple[int, int],
    channels: int,
    boundary: str,
    patch_size: int,
    backend: object,
) -> None:
    """Two images on a canvas against the oracle."""
    images = RNG.integers(0, 256, (5, channels, *side), dtype=np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "ELS", boundary, backend)
    x = RNG.standard_normal((2, channels, *canvas))
    query = torch.from_numpy(x).to(machine.device)
    found = machine.posterior(query, alpha=ALPHA, sigma=SIGMA, patch_size=patch_size, top=2)
    for one, of_one in zip(x, found.mean.cpu(), strict=True):
        expected = oracle(images, one, patch_size, boundary)
        # Float32 logits of up to some hundred.
        np.testing.assert_allclose(of_one, expected, rtol=0, atol=2e-5)
    assert found.top_addresses.shape == (2, *canvas, 2)
    assert found.effective_patches.shape == found.log_evidence.shape == (2, *canvas)


@pytest.mark.parametrize("under_test", list(backends()))
@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_all_backends(under_test: BackendUnderTest | None, boundary: str) -> None:
    assert under_test is not None, "the native extension is missing"
    check((8, 9), (13, 6), 3, boundary, 3, under_test.make(2))


def test_labels_levels_and_estimates_follow() -> None:
    images = RNG.integers(0, 256, (900, 1, 8, 8), dtype=np.uint8)
    db = PatchDatabase.from_arrays(images, np.arange(900) % 2)
    machine = ScoreMachine(db, "ELS", "circular")
    x = torch.from_numpy(RNG.standard_normal((2, 1, 11, 9)))
    alpha, sigma = torch.tensor([0.9, 0.7]), torch.tensor([0.4, 0.7])
    labels = torch.tensor([0, 1])
    both = machine.posterior(x, alpha=alpha, sigma=sigma, patch_size=3, labels=labels)
    for b in range(2):
        few = ScoreMachine(PatchDatabase.from_arrays(images[b::2]), "ELS", "circular")
        alone = few.posterior(x[b : b + 1], alpha=alpha[b], sigma=sigma[b], patch_size=3)
        torch.testing.assert_close(both.mean[b], alone.mean[0], rtol=0, atol=2e-5)
    part = machine.posterior(x, alpha=0.9, sigma=0.5, patch_size=3, mode="subset", subset=128)
    exact = machine.posterior(x, alpha=0.9, sigma=0.5, patch_size=3)
    assert part.modes == ("subset",) * 2
    assert part.expected_error.shape == (2, 11, 9)
    assert 0 < (part.mean - exact.mean).abs().mean() <= 2 * part.expected_error.mean()
    assert 0 < part.claims[0].work < 1


def test_a_tolerance_is_of_the_pixels_that_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("els.engine.approximate.auto.LEAST_PAIRS", 0)
    images = RNG.integers(0, 256, (1200, 1, 12, 12), dtype=np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "ELS", "zeros")
    x = torch.from_numpy(RNG.standard_normal((1, 1, 17, 14)))
    asked = {"alpha": 0.8, "sigma": 0.9, "patch_size": 7}
    exact = machine.posterior(x, **asked).mean
    for tolerance in (0.05, 0.1, 0.2):
        part = machine.posterior(x, mode="auto", tolerance=tolerance, **asked)
        assert part.claims[0].error <= tolerance
        assert (part.mean - exact).abs().mean() <= 1.5 * tolerance


def test_a_side_of_the_training_size_takes_one_window() -> None:
    for wraps in (False, True):
        assert Axis.of(12, 12, 5, wraps=wraps).starts == (0,)


def test_a_gradient_follows_the_windows() -> None:
    images = RNG.integers(0, 256, (4, 1, 7, 7), dtype=np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "ELS", "zeros", "torch")
    x = torch.from_numpy(RNG.standard_normal((1, 1, 10, 8))).requires_grad_()
    ask = lambda x: machine.posterior(x, alpha=0.8, sigma=0.6, patch_size=3).mean  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: ask(x)[..., ::3, ::3], x, atol=1e-6)


def test_what_cannot_be_is_said() -> None:
    images = RNG.integers(0, 256, (4, 1, 7, 7), dtype=np.uint8)
    db = PatchDatabase.from_arrays(images)
    x = torch.zeros(1, 1, 9, 9)
    for kind in ("LS", "IS", "ES", "PCA", "Wiener"):
        with pytest.raises(ValueError, match="other sizes are for ELS"):
            ScoreMachine(db, kind).posterior(x, alpha=1.0, sigma=1.0, patch_size=3)
        with pytest.raises(ValueError, match=r"canvas=\(9, 9\).*ELS"):
            sample(ScoreMachine(db, kind), n=1, steps=2, patch_sizes=3, canvas=(9, 9))
    with pytest.raises(ValueError, match="patch_size=5 is larger than the shorter side of x, 4"):
        ScoreMachine(db).posterior(x[..., :4], alpha=1.0, sigma=1.0, patch_size=5)
    with pytest.raises(ValueError, match="shorter side is 4"):
        sample(ScoreMachine(db), n=1, steps=2, patch_sizes=5, canvas=(4, 9))
    for wrong in ((0, 3), (3,), "9x9", (3.5, 3)):
        with pytest.raises((TypeError, ValueError), match="canvas"):
            sample(ScoreMachine(db), n=1, steps=2, patch_sizes=1, canvas=wrong)
    with pytest.raises(ValueError, match=r"canvas=\(9000000, 9000000\) needs .* GB and more"):
        sample(ScoreMachine(db), n=1, steps=2, patch_sizes=1, canvas=(9_000_000, 9_000_000))


def test_samples_of_any_size() -> None:
    images = RNG.integers(0, 256, (6, 3, 7, 8), dtype=np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "ELS", "zeros")
    wide = sample(machine, n=2, steps=3, patch_sizes=3, canvas=(9, 21), eta=0.5)
    assert wide.shape == (2, 3, 9, 21)
    alone = sample(machine, indices=[1], steps=3, patch_sizes=3, canvas=(9, 21), eta=0.5)
    torch.testing.assert_close(alone[0], wide[1])
    usual = sample(machine, n=1, steps=3, patch_sizes=3, canvas=(7, 8))
    assert torch.equal(usual, sample(machine, n=1, steps=3, patch_sizes=3))
