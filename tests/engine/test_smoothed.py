"""A machine's answers averaged over moves of the query."""

import copy
import pickle

import numpy as np
import pytest
import torch

from els.engine import ELSModel, ScoreMachine, SmoothedDenoiser, sample
from els.index import PatchDatabase

IMAGES = np.random.default_rng(3).integers(0, 256, (30, 2, 6, 7), dtype=np.uint8)
DB = PatchDatabase.from_arrays(IMAGES, np.arange(30) % 2)
ASKED = {"alpha": 0.8, "sigma": 0.5, "patch_size": 3}


def test_it_is_the_mean_of_moved_answers() -> None:
    machine = ScoreMachine(DB, "ELS", "zeros")
    smoothed = SmoothedDenoiser(machine, std=0.2, copies=3, seed=5)
    x = torch.randn(2, 2, 6, 7, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for number in range(3):
        stream = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(number,)))
        moved = x + 0.2 * torch.from_numpy(stream.standard_normal((2, 6, 7)))
        expected += machine.posterior(moved, **ASKED).mean / 3
    torch.testing.assert_close(smoothed.posterior(x, **ASKED).mean, expected, rtol=0, atol=1e-12)
    # Neither the batch nor the query's place in it matters.
    alone = smoothed.posterior(x[1:], **ASKED).mean
    torch.testing.assert_close(alone[0], expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["ELS", "LS", "IS", "PCA", "Wiener", "nearest"])
def test_it_stands_wherever_a_machine_does(kind: str) -> None:
    smoothed = SmoothedDenoiser(ScoreMachine(DB, kind), std=0.1, copies=2)
    sizes = 3 if kind in ("ELS", "LS") else None
    drawn = sample(smoothed, n=2, steps=3, patch_sizes=sizes, labels=1)
    assert drawn.shape == (2, 2, 6, 7)
    kept = torch.linspace(0.99, 0.01, 10)
    x = torch.randn(1, 2, 6, 7)
    assert ELSModel(smoothed, sizes, scheduler=kept)(x, 3).sample.shape == x.shape
    for again in (copy.copy(smoothed), pickle.loads(pickle.dumps(smoothed))):
        assert torch.equal(
            sample(again, n=1, steps=3, patch_sizes=sizes),
            sample(smoothed, n=1, steps=3, patch_sizes=sizes),
        )


def test_score_and_noise_are_of_the_smoothed_mean() -> None:
    smoothed = SmoothedDenoiser(ScoreMachine(DB), std=0.3, copies=2)
    x = torch.randn(2, 2, 6, 7, dtype=torch.float64)
    mean = smoothed.posterior(x, **ASKED).mean
    expected = (x - 0.8 * mean) / 0.5
    torch.testing.assert_close(smoothed.epsilon(x, **ASKED), expected)
    torch.testing.assert_close(smoothed.score(x, **ASKED), -expected / 0.5)
    with pytest.raises(ValueError, match="no divergence"):
        smoothed.divergence(x, **ASKED)


def test_it_takes_a_canvas_and_a_tolerance() -> None:
    smoothed = SmoothedDenoiser(ScoreMachine(DB), std=0.1, copies=2)
    assert sample(smoothed, n=1, steps=2, patch_sizes=3, canvas=(9, 11)).shape == (1, 2, 9, 11)
    assert sample(smoothed, n=1, steps=2, patch_sizes=3, tolerance=0.1).shape == (1, 2, 6, 7)


def test_what_is_wrong_is_said() -> None:
    machine = ScoreMachine(DB)
    with pytest.raises(TypeError, match="ScoreMachine"):
        SmoothedDenoiser(DB, std=0.1)
    for name, value in (("std", 0), ("std", "x"), ("copies", 0), ("copies", 2.0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}="):
            SmoothedDenoiser(machine, **({"std": 0.1} | {name: value}))
    smoothed = SmoothedDenoiser(machine, std=0.1)
    with pytest.raises(ValueError, match="no heaviest"):
        smoothed.posterior(torch.zeros(1, 2, 6, 7), top=1, **ASKED)
    with pytest.raises(ValueError, match="x has shape"):
        smoothed.posterior(torch.zeros(1, 1, 6, 7), **ASKED)
    with pytest.raises(AttributeError):
        smoothed.nothing_of_the_kind  # noqa: B018
