"""The local posterior: what is asked of a backend, the partial state it answers with, the merge.

A local posterior is a softmax over candidate training patches (arXiv 2412.20292, the ELS machine).
Partial states over disjoint candidate sets form a monoid: threads, image blocks, processes, border
classes, a retrieved head and a sampled tail all meet in :func:`merge`, which is written only here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Kind: TypeAlias = Literal["IS", "ES", "LS", "ELS"]
Boundary: TypeAlias = Literal["zeros", "circular"]
Mode: TypeAlias = Literal["exact", "topk", "subset", "topk+subset", "lists", "auto"]
ErrorKind: TypeAlias = Literal["exact", "bound", "estimate"]


@dataclass(frozen=True)
class PosteriorQuery:
    """A validated batch of noisy images and the candidates to weigh for each of their pixels.

    Attributes:
        x: noisy images ``alpha * x0 + sigma * eps``, floating, ``[B, C, H, W]``.
        alpha: signal scale per image, float64 on the CPU, ``[B]``.
        sigma: noise standard deviation per image, float64 on the CPU, ``[B]``, > 0.
        kind: which machine (docs/theory.md).
        boundary: what a patch reads beyond the image's border; ignored by IS and ES.
        patch_size: odd side P of the patch, 1 to the image's shorter side; ignored by IS and ES.
        members: ascending image numbers whose patches are candidates, int64 ``[M]``, M >= 1.
        entropy: whether the state's ``tilt`` is wanted.
        top: how many of the heaviest candidates to return per pixel (0 for none).
        border_only: with ELS and zeros beyond the border, only border pixels are wanted, those
            within P // 2 of an edge; others may get anything.
    """

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    kind: Kind
    boundary: Boundary
    patch_size: int
    members: npt.NDArray[np.int64]
    entropy: bool = False
    top: int = 0
    border_only: bool = False


@dataclass(frozen=True)
class TopPatches:
    """The heaviest candidates of each pixel, best first; ties go to the lower address.

    Attributes:
        logits: float64 ``[B, H, W, k]``; ``-inf`` where there are fewer than k candidates.
        addresses: of the patch's centre, ``(n * H + y) * W + x``, int64 ``[B, H, W, k]``; -1 for
            none.
    """

    logits: Tensor
    addresses: Tensor


@dataclass(frozen=True)
class PosteriorState:
    """Partial posterior of every pixel over some set of candidates; all sums are float64.

    With ``logit = -||x_patch - alpha * k_patch||^2 / (2 sigma^2)`` (natural logarithm):

    Attributes:
        maximum: reference logit m, at or near the largest, ``[B, H, W]``; ``-inf`` for no
            candidate.
        mass: ``sum exp(logit - m)``, ``[B, H, W]``.
        centre: ``sum exp(logit - m) * k_n[p']``, the clean centre pixels, ``[B, C, H, W]``.
        tilt: ``sum exp(logit - m) * (logit - m)``, ``[B, H, W]``, or None where it was not asked
            for.
        top: the heaviest candidates, or None where they were not asked for.
    """

    maximum: Tensor
    mass: Tensor
    centre: Tensor
    tilt: Tensor | None = None
    top: TopPatches | None = None


@dataclass(frozen=True)
class Error:
    """How far an approximate posterior may be from the exact one, per pixel; float64.

    Attributes:
        omitted_mass: share of the posterior mass that was not computed, ``[B, H, W]``.
        mean_error: of the posterior mean, the worst channel, ``[B, H, W]``: a bound or a standard
            error, as ``kind`` says.
        kind: ``exact``; ``bound``, which always holds; or ``estimate``.
        mode: what was computed.
        images: how many images the subset had; 0 without one.
        typical: the mean over channels of the standard error, ``[B, H, W]``.
    """

    omitted_mass: Tensor
    mean_error: Tensor
    kind: ErrorKind
    mode: Mode
    images: int
    typical: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Error:
        """That of an exact posterior; ``like`` has its shape, ``[B, H, W]``."""
        zero = torch.zeros_like(like, dtype=torch.float64)
        return cls(zero, zero, "exact", "exact", 0, zero)


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
        subset_images: how many training images each image's subset had, 0 without one.
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


def state_of(logits: Tensor, centres: Tensor) -> PosteriorState:
    """The state of candidates one by one.

    Args:
        logits: float64 ``[B, H, W, k]``, ``-inf`` for no candidate.
        centres: their clean centre pixels, float64 ``[B, H, W, k, C]``.
    """
    maximum = logits.amax(-1)
    # Where there is no candidate, -inf - -inf would be nan.
    shifted = logits - maximum.clamp(min=torch.finfo(torch.float64).min).unsqueeze(-1)
    weights = shifted.exp()
    tilt = torch.where(weights > 0, weights * shifted, 0.0).sum(-1)
    centre = (weights.unsqueeze(-1) * centres).sum(-2).movedim(-1, 1)
    return PosteriorState(maximum, weights.sum(-1), centre, tilt)


def merge(first: PosteriorState, second: PosteriorState) -> PosteriorState:
    """Combine the states of two disjoint candidate sets exactly (log-sum-exp).

    Both states must carry the same optional fields.
    """
    maximum = torch.maximum(first.maximum, second.maximum)
    first_sums, second_sums = rescaled(first, maximum), rescaled(second, maximum)
    tilt = None
    if first_sums.tilt is not None and second_sums.tilt is not None:
        tilt = first_sums.tilt + second_sums.tilt
    top = None
    if first.top is not None and second.top is not None:
        top = best(
            torch.cat([first.top.logits, second.top.logits], dim=-1),
            torch.cat([first.top.addresses, second.top.addresses], dim=-1),
            first.top.logits.shape[-1],
        )
    return PosteriorState(
        maximum,
        first_sums.mass + second_sums.mass,
        first_sums.centre + second_sums.centre,
        tilt,
        top,
    )


def rescaled(state: PosteriorState, maximum: Tensor) -> PosteriorState:
    """The sums of a state relative to another reference logit; states that share one just add up.

    Args:
        state: of any candidates, also of none.
        maximum: the reference, at least the state's own, float64 ``[B, H, W]``.

    Returns:
        The state without its top.
    """
    # An empty side has maximum -inf: its shift would be nan (both empty) or -inf (times mass 0).
    shift = torch.where(torch.isneginf(state.maximum), 0.0, state.maximum - maximum)
    scale = shift.exp()
    return PosteriorState(
        maximum,
        scale * state.mass,
        scale.unsqueeze(1) * state.centre,
        None if state.tilt is None else scale * (state.tilt + shift * state.mass),
    )


def empty(query: PosteriorQuery) -> PosteriorState:
    """The state of no candidates, the identity of :func:`merge`."""
    x = query.x.to(torch.float64)
    none = torch.full_like(x[:, 0], -torch.inf)
    top = None
    if query.top:
        logits = none.unsqueeze(-1).repeat(1, 1, 1, query.top)
        top = TopPatches(logits, torch.full_like(logits, -1, dtype=torch.int64))
    zero = torch.zeros_like(none)
    return PosteriorState(
        none, zero, torch.zeros_like(x), zero.clone() if query.entropy else None, top
    )


def merge_into(
    total: PosteriorState, part: PosteriorState, images: slice, rows: slice, columns: slice
) -> None:
    """Merge a state of some of the pixels into ``total``, in place."""
    pixels = (images, rows, columns)
    every_channel = (images, slice(None), rows, columns)
    merged = merge(
        PosteriorState(
            total.maximum[pixels],
            total.mass[pixels],
            total.centre[every_channel],
            None if total.tilt is None else total.tilt[pixels],
            None
            if total.top is None
            else TopPatches(total.top.logits[pixels], total.top.addresses[pixels]),
        ),
        part,
    )
    total.maximum[pixels] = merged.maximum
    total.mass[pixels] = merged.mass
    total.centre[every_channel] = merged.centre
    if total.tilt is not None and merged.tilt is not None:
        total.tilt[pixels] = merged.tilt
    if total.top is not None and merged.top is not None:
        total.top.logits[pixels] = merged.top.logits
        total.top.addresses[pixels] = merged.top.addresses


def stack(states: Sequence[PosteriorState]) -> PosteriorState:
    """The states of disjoint parts of a batch as one, in their order."""

    def together(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    tops = [state.top for state in states if state.top is not None]
    return PosteriorState(
        torch.cat([state.maximum for state in states]),
        torch.cat([state.mass for state in states]),
        torch.cat([state.centre for state in states]),
        together([state.tilt for state in states]),
        TopPatches(
            torch.cat([top.logits for top in tops]), torch.cat([top.addresses for top in tops])
        )
        if tops
        else None,
    )


def moved(state: PosteriorState, device: torch.device | str) -> PosteriorState:
    """The state on another device."""
    return PosteriorState(
        state.maximum.to(device),
        state.mass.to(device),
        state.centre.to(device),
        None if state.tilt is None else state.tilt.to(device),
        None
        if state.top is None
        else TopPatches(state.top.logits.to(device), state.top.addresses.to(device)),
    )


def take(state: PosteriorState, order: Tensor) -> PosteriorState:
    """The images of a batch in another order; ``order`` is int64 ``[B]``."""
    order = order.to(state.maximum.device)
    return PosteriorState(
        state.maximum[order],
        state.mass[order],
        state.centre[order],
        None if state.tilt is None else state.tilt[order],
        None
        if state.top is None
        else TopPatches(state.top.logits[order], state.top.addresses[order]),
    )


def merge_all(states: Iterable[PosteriorState]) -> PosteriorState:
    """Merge in the order given: the same order gives the same bits."""
    return reduce(merge, states)


def best(logits: Tensor, addresses: Tensor, count: int) -> TopPatches:
    """The ``count`` largest of the last axis, best first, ties to the lower address.

    Args:
        logits: ``[..., n]``, ``-inf`` for none.
        addresses: int64 ``[..., n]``, -1 for none.
        count: how many to keep; missing ones are padded with ``-inf`` and -1.
    """
    by_address = addresses.argsort(dim=-1, stable=True)
    by_logit = logits.gather(-1, by_address).argsort(dim=-1, descending=True, stable=True)
    order = by_address.gather(-1, by_logit)[..., :count]
    missing = (0, count - order.shape[-1])
    return TopPatches(
        torch.nn.functional.pad(logits.gather(-1, order), missing, value=-torch.inf),
        torch.nn.functional.pad(addresses.gather(-1, order), missing, value=-1),
    )


def finish(
    state: PosteriorState, dtype: torch.dtype, errors: Sequence[Error] | None = None
) -> LocalPosterior:
    """Normalise a state that has seen all candidates, or is an estimate of one that has.

    Args:
        state: of B images.
        dtype: of the mean.
        errors: of each image; None for exact states.
    """
    wide = torch.promote_types(dtype, torch.float32)
    log_mass = state.mass.log()
    mean = state.centre / state.mass.unsqueeze(1)
    effective = None
    if state.tilt is not None:
        effective = (log_mass - state.tilt / state.mass).exp().to(wide)
    weights = addresses = None
    if state.top is not None:
        log_weights = state.top.logits - (state.maximum + log_mass).unsqueeze(-1)
        weights, addresses = log_weights.exp().to(wide), state.top.addresses
    if errors is None:
        errors = [Error.none(mass.unsqueeze(0)) for mass in state.mass]
    return LocalPosterior(
        mean.to(dtype),
        (state.maximum + log_mass).to(wide),
        effective,
        weights,
        addresses,
        torch.cat([error.omitted_mass for error in errors]).to(mean.device, wide),
        torch.cat([error.mean_error for error in errors]).to(mean.device, wide),
        tuple(error.kind for error in errors),
        tuple(error.mode for error in errors),
        tuple(error.images for error in errors),
    )
