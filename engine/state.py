"""Partial posteriors, and their merge.

A local posterior is a softmax over candidate training patches (arXiv 2412.20292, the ELS machine).
Partial states over disjoint candidate sets form a monoid: threads, image blocks, processes, border
classes, a retrieved head and a sampled tail all meet in :func:`merge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from els.engine.query import PosteriorQuery


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
