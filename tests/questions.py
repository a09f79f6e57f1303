"""Questions put to every backend, their true answers, and what an answer may be off by."""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import oracle
import pytest
import torch
from backends import BackendUnderTest
from numpy.typing import NDArray
from oracle import OraclePosterior

from els.engine import ScoreMachine
from els.engine.result import LocalPosterior

FLOAT64_ERROR = 16 * 2.0**-52

MACHINES = [
    pytest.param("IS", "zeros", id="IS"),
    pytest.param("ES", "zeros", id="ES"),
    pytest.param("LS", "zeros", id="LS-zeros"),
    pytest.param("LS", "circular", id="LS-circular"),
    pytest.param("ELS", "circular", id="ELS-circular"),
    pytest.param("ELS", "zeros", id="ELS-zeros"),
]
LOCAL_MACHINES = MACHINES[2:]
every_machine = pytest.mark.parametrize(("kind", "boundary"), MACHINES)


@dataclass(frozen=True)
class Question:
    """What to ask of a machine; the noisy images are float32 numbers for every backend.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        x: noisy images, float32 ``[B, C, H, W]``.
        alpha: ``[B]``.
        sigma: ``[B]``.
        patch_size: side of the patch.
        image_labels: ``[N]``, or None for a database without.
        labels: ``[B]``, or None for no condition.
    """

    images: NDArray[np.uint8]
    x: NDArray[np.float32]
    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]
    patch_size: int
    image_labels: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None

    def of(self, rows: list[int]) -> "Question":
        """The same for some images of the batch."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(
            self, x=self.x[rows], alpha=self.alpha[rows], sigma=self.sigma[rows], labels=labels
        )

    def ask(self, machine: ScoreMachine, dtype: torch.dtype, **options: object) -> LocalPosterior:
        answer = machine.posterior(
            torch.from_numpy(self.x).to(machine.device, dtype),
            alpha=torch.from_numpy(self.alpha),
            sigma=torch.from_numpy(self.sigma),
            patch_size=self.patch_size,
            labels=None if self.labels is None else torch.from_numpy(self.labels),
            **options,
        )
        return on_cpu(answer)

    def expected(self, kind: str, boundary: str) -> list[OraclePosterior]:
        return [
            oracle.posterior(
                self.images,
                self.x[b],
                alpha=self.alpha[b],
                sigma=self.sigma[b],
                kind=kind,
                boundary=boundary,
                patch_size=self.patch_size,
                members=None
                if self.labels is None
                else np.flatnonzero(self.image_labels == self.labels[b]),
            )
            for b in range(len(self.x))
        ]


def on_cpu(answer: LocalPosterior) -> LocalPosterior:
    return LocalPosterior(
        *(value.cpu() if torch.is_tensor(value) else value for value in vars(answer).values())
    )


def make_question(
    shape: tuple[int, int, int],
    count: int,
    patch_size: int,
    *,
    alpha: list[float],
    sigma: list[float],
    levels: int = 256,
    seed: int = 0,
) -> Question:
    """Even images of the batch lie on the manifold, odd ones are random.

    ``levels`` grey levels; few make exact ties. From five images on, the last repeats the first.
    """
    rng = np.random.default_rng(seed)
    images = rng.integers(0, levels, (count, *shape)) * (255 // (levels - 1))
    if count >= 5:
        images[-1] = images[0]
    alphas, sigmas = np.array(alpha), np.array(sigma)
    x = rng.uniform(-1.5, 1.5, (len(alphas), *shape))
    scale = sigmas[::2, None, None, None]
    source = images[rng.integers(0, count, len(scale))] / 127.5 - 1
    x[::2] = alphas[::2, None, None, None] * source + scale * rng.standard_normal(source.shape)
    return Question(images.astype(np.uint8), x.astype(np.float32), alphas, sigmas, patch_size)


def assert_matches(
    answer: LocalPosterior,
    question: Question,
    expected: list[OraclePosterior],
    budget: BackendUnderTest,
) -> None:
    """Whether an answer is within the error budget of the oracle's."""
    rounding = float(torch.finfo(answer.mean.dtype).eps)
    for b, truth in enumerate(expected):
        candidates = max(len(logits) for logits in truth.logits.values())
        evidence = np.abs(truth.log_evidence)
        sigma = question.sigma[b]
        error = budget.logit_error + FLOAT64_ERROR * evidence
        if truth.terms == question.x[b].size:
            parts = np.square(question.x[b], dtype=np.float64).sum() + truth.terms
            error = error + FLOAT64_ERROR * parts / (2 * sigma**2)
        assert_within(answer.mean[b], truth.mean, 2 * error + rounding, "mean")
        spread = np.sqrt(2 * truth.terms * (evidence + math.log(candidates)))
        evidence_error = (
            error
            + (budget.relative + rounding) * evidence
            + budget.difference_error / sigma * spread
        )
        assert_within(answer.log_evidence[b], truth.log_evidence, evidence_error, "log_evidence")
        if answer.effective_patches is not None:
            relative = 2 * error * (1 + math.log(candidates)) + 4 * rounding
            effective = answer.effective_patches[b]
            assert_within(
                effective, truth.effective_patches, relative * truth.effective_patches, "effective"
            )
            assert effective.min() >= 1 - 4 * rounding
            assert effective.max() <= candidates * (1 + 4 * rounding + relative.max())
        if answer.top_addresses is not None:
            weight_error = evidence_error + 2 * error + 4 * rounding
            assert_top_matches(answer, b, truth, evidence_error, weight_error)


def assert_within(
    values: torch.Tensor, truth: NDArray[np.float64], tolerance: object, what: str
) -> None:
    excess = np.abs(values.double().numpy() - truth) - tolerance
    assert np.isfinite(values.numpy()).all(), f"{what} is not finite"
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, f"{what} at {worst}: {values[worst]} instead of {truth[worst]}"


def assert_top_matches(
    answer: LocalPosterior,
    b: int,
    truth: OraclePosterior,
    logit_error: NDArray[np.float64],
    weight_error: NDArray[np.float64],
) -> None:
    """Compared by logits, so that ties pass whichever way they were resolved."""
    for pixel, logits in truth.logits.items():
        addresses = answer.top_addresses[b][pixel].tolist()
        weights = answer.top_weights[b][pixel].double().numpy()
        count = min(len(addresses), len(logits))
        assert addresses[count:] == [-1] * (len(addresses) - count)
        assert not weights[count:].any()
        assert len(set(addresses[:count])) == count
        reported = np.array([logits[address] for address in addresses[:count]])
        heaviest = np.sort(list(logits.values()))[::-1][:count]
        # The error grows with the distance as that of the log evidence does.
        lighter = np.abs(heaviest) / max(1.0, abs(truth.log_evidence[pixel]))
        slack = 2 * logit_error[pixel] * np.maximum(1, lighter)
        assert (np.abs(reported - heaviest) <= slack).all(), f"top at {pixel}"
        true_weights = np.exp(reported - truth.log_evidence[pixel])
        assert (np.abs(weights[:count] - true_weights) <= weight_error[pixel]).all()


# Shape [C, H, W], images, patch size.
GEOMETRIES = {
    "one-pixel": ((1, 1, 1), 1, 1),
    "one-image": ((3, 5, 4), 1, 3),
    "one-row": ((1, 1, 7), 5, 1),
    "single-pixel-patches": ((2, 4, 5), 33, 1),
    "patch-is-the-image": ((4, 5, 5), 5, 5),
    "patch-is-the-shorter-side": ((1, 9, 3), 17, 3),
    "wide": ((3, 4, 11), 5, 3),
    "17-images": ((1, 7, 6), 17, 5),
    "33-images": ((1, 12, 11), 33, 5),
    "large-patch": ((3, 9, 9), 5, 7),
}


@cache
def geometry(name: str) -> Question:
    shape, count, patch_size = GEOMETRIES[name]
    # Broad enough for several candidates to share a pixel, whatever the number of terms.
    sigma = 0.35 * math.sqrt(shape[0]) * patch_size
    return make_question(
        shape, count, patch_size, alpha=[0.8, 0.6], sigma=[sigma, 0.5 * sigma], seed=count
    )


@cache
def noise(sigma: float) -> Question:
    preserving = math.sqrt(max(0.0, 1 - sigma**2))
    alpha = [0.0, 0.0, 1.0, 1.0, preserving, preserving]
    return make_question((3, 6, 5), 9, 3, alpha=alpha, sigma=[sigma] * 6, seed=3)


def fields(answer: LocalPosterior) -> list[torch.Tensor]:
    return [
        answer.mean,
        answer.log_evidence,
        answer.effective_patches,
        answer.top_weights,
        answer.top_addresses,
    ]
