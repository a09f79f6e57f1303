"""Partial posteriors, and their merge.

A posterior is a softmax over candidate training patches (docs/theory.md). Partial states over
disjoint sets of candidates form a monoid: what is computed apart, by threads, blocks of images,
processes, or from a retrieved head and a random subset, is combined by the functions of this
module. They all put states on a common reference logit (:func:`rescaled`) and add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from els.engine.query import PosteriorQuery

_Parts = TypeVar("_Parts", "PosteriorState", "TopPatches", "SamplingSums")


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
class SamplingSums:
    """What a sample of the candidates says of its own error (docs/theory.md, lists).

    A stratum's block b of candidates is read with inclusion probability p; a_b and l_b are its sums
    of centre and mass, divided by p.

    Attributes:
        seen: mass of what was read, each candidate counted once, ``[B, H, W]``.
        squares: sums over blocks of ``(1 - p) l_b^2``, ``(1 - p) l_b a_b`` and ``(1 - p) a_b^2``,
            ``[B, 1 + 2 C, H, W]``.
    """

    seen: Tensor
    squares: Tensor


@dataclass(frozen=True)
class PosteriorState:
    """Partial posterior of every pixel over some set of candidates (docs/theory.md, equation 6).

    All sums are float64. With ``logit = -||x_patch - alpha * k_patch||^2 / (2 sigma^2)`` (natural
    logarithm):

    Attributes:
        reference: reference logit m, at or near the largest, ``[B, H, W]``; ``-inf`` for no
            candidate.
        mass: ``sum exp(logit - m)``, ``[B, H, W]``.
        centre: ``sum exp(logit - m) * k_n[p']``, the clean centre pixels, ``[B, C, H, W]``.
        logit_sum: ``sum exp(logit - m) * (logit - m)``, ``[B, H, W]``, or None where it was not
            asked for.
        top: the heaviest candidates, or None where they were not asked for.
        sampling: where the sums are estimates from a sample of the candidates, what their error
            follows from; else None.
    """

    reference: Tensor
    mass: Tensor
    centre: Tensor
    logit_sum: Tensor | None = None
    top: TopPatches | None = None
    sampling: SamplingSums | None = None

    def __repr__(self) -> str:
        batch, *image = self.centre.shape
        has = [f"{batch} images {'x'.join(map(str, image))}"]
        has += ["logit_sum"] if self.logit_sum is not None else []
        has += [f"top {self.top.addresses.shape[-1]}"] if self.top is not None else []
        has += ["sampling"] if self.sampling is not None else []
        return f"PosteriorState({', '.join(has)})"

    @property
    def mean(self) -> Tensor:
        """The posterior mean ``[B, C, H, W]``; not a number where there is no candidate."""
        return self.centre / self.mass.unsqueeze(1)

    @property
    def is_known(self) -> Tensor:
        """Which pixels have candidates, bool ``[B, H, W]``."""
        return self.mass > 0

    @property
    def effective(self) -> Tensor:
        """Effective number of candidates, exp(entropy of the weights), ``[B, H, W]``; 0 for none.

        Raises:
            ValueError: if the state has no ``logit_sum``.
        """
        if self.logit_sum is None:
            raise ValueError("the state has no logit_sum: query with entropy=True")
        mass = torch.where(self.is_known, self.mass, 1.0)
        return torch.where(self.is_known, mass * (-self.logit_sum / mass).exp(), 0.0)


def state_of(logits: Tensor, centres: Tensor) -> PosteriorState:
    """The state of candidates one by one.

    Args:
        logits: float64 ``[B, H, W, k]``, ``-inf`` for no candidate.
        centres: their clean centre pixels, float64 ``[B, H, W, k, C]``.
    """
    reference = logits.amax(-1)
    # Where there is no candidate, -inf - -inf would be nan.
    shifted = logits - reference.clamp(min=torch.finfo(torch.float64).min).unsqueeze(-1)
    weights = shifted.exp()
    logit_sum = torch.where(weights > 0, weights * shifted, 0.0).sum(-1)
    centre = (weights.unsqueeze(-1) * centres).sum(-2).movedim(-1, 1)
    return PosteriorState(reference, weights.sum(-1), centre, logit_sum)


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


def rescaled(state: PosteriorState, reference: Tensor) -> PosteriorState:
    """The sums relative to another reference logit; states that share one just add up.

    Args:
        state: of any candidates, also of none.
        reference: at least the state's own, float64, broadcast to ``[B, H, W]``.

    Returns:
        The state without its top.
    """
    # A state of no candidates has -inf: its shift would be nan (both empty) or -inf (times 0).
    is_none = torch.isneginf(state.reference)
    shift = torch.where(is_none, 0.0, state.reference - reference)
    scale = shift.exp()
    sampling = state.sampling
    if sampling is not None:
        squares = scale.square().unsqueeze(1) * sampling.squares
        sampling = SamplingSums(scale * sampling.seen, squares)
    return PosteriorState(
        reference.expand_as(scale),
        scale * state.mass,
        scale.unsqueeze(1) * state.centre,
        None if state.logit_sum is None else scale * (state.logit_sum + shift * state.mass),
        sampling=sampling,
    )


def merge(first: PosteriorState, second: PosteriorState) -> PosteriorState:
    """Combine the states of two disjoint candidate sets exactly (docs/theory.md, equation 7).

    Fields that one of them lacks are left out.
    """
    reference = torch.maximum(first.reference, second.reference)
    sums = _each(torch.add, rescaled(first, reference), rescaled(second, reference))
    top = None
    if first.top is not None and second.top is not None:
        top = best(
            torch.cat([first.top.logits, second.top.logits], dim=-1),
            torch.cat([first.top.addresses, second.top.addresses], dim=-1),
            first.top.logits.shape[-1],
        )
    return replace(sums, reference=reference, top=top)


def merge_all(states: Iterable[PosteriorState]) -> PosteriorState:
    """Merge in the order given: the same order gives the same bits."""
    return reduce(merge, states)


def summed(state: PosteriorState) -> PosteriorState:
    """Merge along the batch: states of B disjoint candidate sets of one image as one, B = 1.

    The result has no top.
    """
    reference = state.reference.amax(0, keepdim=True)
    sums = _each(lambda part: part.sum(0, keepdim=True), rescaled(state, reference))
    return replace(sums, reference=reference)


def scaled(state: PosteriorState, factor: Tensor) -> PosteriorState:
    """The sums with every candidate counted ``factor`` times, without top.

    Args:
        state: of B images.
        factor: > 0, float64, broadcast to ``[B, H, W]``.
    """
    of_pixel = factor if factor.ndim == 2 else factor.unsqueeze(1)
    return PosteriorState(
        state.reference,
        factor * state.mass,
        of_pixel * state.centre,
        None if state.logit_sum is None else factor * state.logit_sum,
    )


def without_each(state: PosteriorState) -> PosteriorState:
    """Merge along the batch all states but one, for each of them: ``[B, ...]`` again.

    Sums of what is left, not differences, which may cancel. Beside the heaviest state the others
    may be too light to be seen; they get a reference of their own where it is left out.
    """
    reference = state.reference.amax(0, keepdim=True)

    def others(values: Tensor) -> Tensor:
        sums = torch.zeros_like(values)
        sums[1:] = values[:-1].cumsum(0)
        sums[:-1] += values[1:].flip(0).cumsum(0).flip(0)
        return sums

    sums = replace(_each(others, rescaled(state, reference)), reference=reference)
    heaviest = state.reference.argmax(0, keepdim=True)
    numbers = torch.arange(len(state.mass), device=state.mass.device).reshape(-1, 1, 1)
    rest = summed(only_where(numbers != heaviest, state))
    shape = state.reference.shape
    sums = replace(sums, reference=reference.expand(shape))
    rest = _each(lambda values: values.expand(len(numbers), *values.shape[1:]), rest)
    return where(numbers == heaviest, rest, sums)


def merge_into(
    total: PosteriorState, part: PosteriorState, images: slice, rows: slice, columns: slice
) -> None:
    """Merge a state of some of the pixels into ``total``, in place."""

    def pixels(state: PosteriorState) -> PosteriorState:
        here = (images, rows, columns)
        return replace(
            _each(lambda values: values[here], replace(state, centre=state.mass)),
            centre=state.centre[images, :, rows, columns],
        )

    place = pixels(total)
    _each(lambda whole, merged: whole.copy_(merged), place, merge(place, part))


def put(total: PosteriorState, part: PosteriorState, columns: Tensor) -> None:
    """Write a state into some columns of ``total``, int64 ``[W']``, in place."""
    _each(lambda whole, values: whole.index_copy_(-1, columns, values), total, part)


def where(condition: Tensor, first: PosteriorState, second: PosteriorState) -> PosteriorState:
    """Pixel by pixel one state or the other, without tops.

    Args:
        condition: bool, broadcast to ``[B, H, W]``.
        first: taken where the condition holds.
        second: taken elsewhere.
    """
    condition = condition.expand_as(first.reference)

    def chosen(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(condition if one.ndim == 3 else condition.unsqueeze(1), one, other)

    return _each(chosen, replace(first, top=None), replace(second, top=None))


def only_where(condition: Tensor, state: PosteriorState) -> PosteriorState:
    """The state, but of no candidates where the condition does not hold; without top."""
    nothing = _each(torch.zeros_like, replace(state, top=None))
    nothing = replace(nothing, reference=torch.full_like(state.reference, -torch.inf))
    return where(condition, state, nothing)


def stack(states: Sequence[PosteriorState]) -> PosteriorState:
    """The states of disjoint parts of a batch as one, in their order."""
    return _each(lambda *parts: torch.cat(parts), *states)


def moved(state: PosteriorState, device: torch.device | str) -> PosteriorState:
    """The state on another device."""
    return _each(lambda values: values.to(device), state)


def take(state: PosteriorState, order: Tensor) -> PosteriorState:
    """The images of a batch in another order; ``order`` is int64 ``[B]``."""
    order = order.to(state.mass.device)
    return _each(lambda values: values[order], state)


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


def _each(function: Callable[..., Tensor], *parts: _Parts) -> _Parts:
    """Apply a function to the same tensor of every state; what one of them lacks is left out."""

    def of(values: tuple[Any, ...]) -> Any:
        if any(value is None for value in values):
            return None
        return function(*values) if isinstance(values[0], Tensor) else _each(function, *values)

    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(*(of(tuple(getattr(part, name) for part in parts)) for name in names))
