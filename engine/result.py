"""Posteriors as they are returned: normalised, with what is known of their error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Mean absolute value of a normal variable of standard deviation 1.
_MEAN_ABSOLUTE = math.sqrt(2 / math.pi)

Mode: TypeAlias = Literal["exact", "topk", "subset", "topk+subset", "lists", "auto"]
ErrorKind: TypeAlias = Literal["exact", "bound", "estimate"]


@dataclass(frozen=True)
class Uncertainty:
    """How far the posterior of one image may be from the exact one, per pixel; float64.

    Attributes:
        omitted_mass: share of the posterior mass that was not computed, ``[1, H, W]``.
        mean_error: of the posterior mean, the worst channel, ``[1, H, W]``: a bound or a standard
            error, as ``kind`` says.
        kind: ``exact``; ``bound``, which always holds; or ``estimate``.
        mode: what was computed.
        images: how many images the subset had; 0 without one.
        typical: the mean over channels of the standard error, ``[1, H, W]``.
        work: share of the exact posterior's pairs that were weighed or cost as much, by the fixed
            prices of the approximations; None where what was done has no price.
    """

    omitted_mass: Tensor
    mean_error: Tensor
    kind: ErrorKind
    mode: Mode
    images: int
    typical: Tensor
    work: float | None = 1.0

    @property
    def expected(self) -> Tensor:
        """Absolute error to be expected, the mean over channels, ``[1, H, W]``; or its bound."""
        return (_MEAN_ABSOLUTE if self.kind == "estimate" else 1.0) * self.typical

    @classmethod
    def none(cls, like: Tensor) -> Uncertainty:
        """That of an exact posterior; ``like`` has its shape, ``[1, H, W]``."""
        zero = torch.zeros_like(like, dtype=torch.float64)
        return cls(zero, zero, "exact", "exact", 0, zero)


@dataclass(frozen=True)
class Claim:
    """What the posterior of one image says of itself.

    Attributes:
        mode: what was computed.
        error: mean absolute error of the posterior mean that is to be expected, or its bound: what
            a tolerance limits.
        work: see :class:`LocalPosterior`.
    """

    mode: Mode
    error: float
    work: float | None


@dataclass(frozen=True)
class LocalPosterior:
    """Posterior of the clean image under a score machine.

    The mean has the dtype of the query, everything else at least float32: a log evidence of -1e9
    is beyond float16.

    Attributes:
        mean: posterior mean of the clean pixels, in [-1, 1], ``[B, C, H, W]``.
        log_evidence: ``log sum_c exp(logit_c)``, natural logarithm, ``[B, H, W]``.
        effective_patches: exp(entropy of the weights), 1 to the number of candidates,
            ``[B, H, W]``; None if the entropy was not asked for.
        top_weights: posterior weights of the heaviest candidates, best first, ``[B, H, W, k]``,
            0 where there are fewer than k; None if they were not asked for.
        top_addresses: their addresses ``(n * H + y) * W + x``, int64 ``[B, H, W, k]``, -1 for none.
        omitted_mass: share of the posterior mass that was not computed but bounded or
            extrapolated, 0 to 1, ``[B, H, W]``; 0 where the posterior is exact.
        mean_error: error of the mean, in units of a pixel in [-1, 1], the worst channel,
            ``[B, H, W]``: a bound or a standard error; see ``error_kinds``.
        error_kinds: of each image: ``exact``; ``bound``: the error is never larger; ``estimate``:
            it is a standard error, measured or, for ``topk`` with an inexact index, what would
            bound the error if the index had found the nearest.
        modes: what was computed for each image, ``auto`` resolved.
        subset_images: how many training images each image's subset had, 0 without one; with
            ``lists``, that of the border pixels.
        expected_error: absolute error of the mean that is to be expected, averaged over channels,
            ``[B, H, W]``; where ``mean_error`` is a bound, one of this error. Its average over
            the pixels of an image is what a tolerance limits. None where a posterior was made by
            other code, which does not say.
        work: of each image, the share of the exact posterior's pairs that were weighed or cost as
            much: not measured, but by the fixed prices with which ``auto`` compares methods. None
            for ``topk`` and ``topk+subset``, whose search has no price; empty for a posterior that
            was made by other code.
        query: what was asked; None for a posterior that was made by other code.
    """

    mean: Tensor
    log_evidence: Tensor
    effective_patches: Tensor | None
    top_weights: Tensor | None
    top_addresses: Tensor | None
    omitted_mass: Tensor
    mean_error: Tensor
    error_kinds: tuple[ErrorKind, ...]
    modes: tuple[Mode, ...]
    subset_images: tuple[int, ...]
    expected_error: Tensor | None = None
    work: tuple[float | None, ...] = ()
    query: PosteriorQuery | None = None

    def __repr__(self) -> str:
        batch, *image = self.mean.shape
        parts = [] if self.query is None else [self.query.machine]
        parts.append(f"{batch} image{'s' * (batch != 1)} {'x'.join(map(str, image))}")
        parts.append(str(self.mean.dtype).removeprefix("torch."))
        parts.append("/".join(dict.fromkeys(self.modes)))
        if self.effective_patches is not None:
            count = float(self.effective_patches.detach().mean())
            parts.append(f"{count:.4g} effective patches on average")
        if self.top_weights is not None:
            parts.append(f"top {self.top_weights.shape[-1]}")
        if self.expected_error is not None and set(self.error_kinds) != {"exact"}:
            parts.append(f"expected error {float(self.expected_error.mean()):.2g}")
        return f"LocalPosterior({', '.join(parts)})"

    def _repr_html_(self) -> str | None:
        from els.engine.pictures import posterior_html

        return posterior_html(repr(self), self.mean)

    def show(self, i: int = 0) -> Figure:
        """Draw one image of the batch: the noisy image, the mean, how many patches share a pixel.

        Where the posterior is approximate, also the error that is to be expected.

        Args:
            i: number of the image in the batch.

        Returns:
            A matplotlib figure, which notebooks show; ``savefig`` writes it.

        Raises:
            ValueError: if there is no such image.
            RuntimeError: without matplotlib.
        """
        from els.engine.pictures import posterior_figure

        if not 0 <= i < len(self.mean):
            raise ValueError(f"i={i} is out of range 0 to {len(self.mean) - 1}")
        is_exact = self.expected_error is None or self.error_kinds[i] == "exact"
        return posterior_figure(
            self.query,
            i,
            self.mean[i],
            None if self.effective_patches is None else self.effective_patches[i],
            None if is_exact or self.expected_error is None else self.expected_error[i],
        )

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Mode, error and work of each image; empty for a posterior that was made by other code."""
        if self.expected_error is None:
            return ()
        errors = self.expected_error.double().mean((1, 2)).tolist()
        return tuple(
            Claim(mode, error, work)
            for mode, error, work in zip(self.modes, errors, self.work, strict=True)
        )


def joint_claims(answers: Sequence[Sequence[tuple[LocalPosterior, int]]]) -> dict[str, Any]:
    """What several posteriors together say of each image, as fields of a :class:`LocalPosterior`.

    Modes and kinds of error are those of the first that is not exact, if any is not; work is a
    mean.

    Args:
        answers: of each image the posteriors that speak of it, and its place in their batches.
    """

    def of(name: str) -> list[list[Any]]:
        return [[getattr(answer, name)[b] for answer, b in image] for image in answers]

    def told(name: str) -> tuple[Any, ...]:
        return tuple(next((v for v in each if v != "exact"), "exact") for each in of(name))

    work = of("work") if all(answer.work for image in answers for answer, _ in image) else []
    return {
        "error_kinds": told("error_kinds"),
        "modes": told("modes"),
        "subset_images": tuple(max(each) for each in of("subset_images")),
        "work": tuple(None if None in each else sum(each) / len(each) for each in work),
    }


def require_tolerance(tolerance: object) -> None:
    """Whether it can be the tolerance of ``mode="auto"``.

    Raises:
        ValueError: if not.
    """
    if not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise ValueError(
            f"tolerance={tolerance!r} must be a finite number above 0, such as 0.01: the mean "
            "absolute error that a posterior mean may have"
        )


def finish(
    state: PosteriorState,
    dtype: torch.dtype,
    uncertainties: Sequence[Uncertainty] | None = None,
) -> LocalPosterior:
    """Normalise a state that has seen all candidates, or is an estimate of one that has.

    Args:
        state: of B images.
        dtype: of the mean.
        uncertainties: of each image; None for exact states.
    """
    wide = torch.promote_types(dtype, torch.float32)
    log_mass = state.mass.log()
    mean = state.mean
    effective = None
    if state.logit_sum is not None:
        effective = (log_mass - state.logit_sum / state.mass).exp().to(wide)
    weights = addresses = None
    if state.top is not None:
        log_weights = state.top.logits - (state.reference + log_mass).unsqueeze(-1)
        weights, addresses = log_weights.exp().to(wide), state.top.addresses
    if uncertainties is None:
        uncertainties = [Uncertainty.none(mass.unsqueeze(0)) for mass in state.mass]
    return LocalPosterior(
        mean.to(dtype),
        (state.reference + log_mass).to(wide),
        effective,
        weights,
        addresses,
        torch.cat([each.omitted_mass for each in uncertainties]).to(mean.device, wide),
        torch.cat([each.mean_error for each in uncertainties]).to(mean.device, wide),
        tuple(each.kind for each in uncertainties),
        tuple(each.mode for each in uncertainties),
        tuple(each.images for each in uncertainties),
        torch.cat([each.expected for each in uncertainties]).to(mean.device, wide),
        tuple(each.work for each in uncertainties),
    )
