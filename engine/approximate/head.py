"""The head of a posterior: the k nearest patches that an index finds, weighed exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.approximate.costs import (
    INDEX_ROUNDING,
    LARGEST_QUERY,
    RANGE,
)
from els.engine.approximate.estimate import Estimate, Mask, Problem, Situation
from els.engine.kinds import Kind
from els.engine.result import ErrorKind, Uncertainty
from els.engine.state import PosteriorState, where


@final
@dataclass(frozen=True, eq=False)
class Head:
    """The retrieved patches of an image's interior pixels, on the CPU.

    Attributes:
        is_exact: whether they are the nearest for certain.
        addresses: int64 ``[1, H, W, k]``, -1 for none.
        logits: exact, float64 ``[1, H, W, k]``.
        state: over them.
        patches: noisy patches of the pixels that were searched, over alpha, ``[Q, C, P, P]``.
    """

    is_exact: bool
    addresses: Tensor
    logits: Tensor
    state: PosteriorState
    patches: npt.NDArray[np.float32]


def serves(kind: Kind) -> bool:
    """Whether a patch index holds the candidates of a kind of machine: square patches anywhere."""
    return kind.is_local and kind.is_equivariant and kind.window is None


def obstacle(situation: Situation) -> str | None:
    """Why an index cannot be searched for a query, but for its absence."""
    if not serves(situation.kind):
        return (
            "needs kind='ELS', whose patches an index holds; this machine is "
            f"{situation.kind.name}: use mode='subset' or 'exact'"
        )
    if bool((situation.alpha == 0).any()):
        return "with alpha=0: every patch is as near; use mode='subset'"
    return None


def can_search(problem: Problem) -> bool:
    """Whether there is an index, and its float32 distances can tell the query's patches apart."""
    largest = float(problem.query.x.abs().max())
    is_there = problem.index is not None and obstacle(problem.situation) is None
    return is_there and largest < LARGEST_QUERY * problem.alpha


def nearest(
    problem: Problem, k: int, pixels: Mask | None = None, effort: int | None = None
) -> Head:
    """The k nearest patches of each interior pixel, or of some of them.

    Args:
        problem: with an index.
        k: how many.
        pixels: which, bool ``[H, W]``; None for all.
        effort: inverted lists to probe; None for the index's default.
    """
    index = problem.index
    assert index is not None
    chosen = problem.interior if pixels is None else problem.interior & pixels
    is_everyone = len(problem.members) == len(problem.db)
    addresses = torch.full((1, *chosen.shape, k), -1, dtype=torch.int64, device="cpu")
    patches = problem.patches(chosen)
    _, found = index.search(
        patches,
        k,
        members=None if is_everyone else problem.members,
        effort=effort,
        threads=problem.backend.threads,
    )
    addresses[0, torch.from_numpy(chosen)] = torch.from_numpy(found)
    state, logits = problem.backend.weigh(problem.images, problem.query, addresses)
    return Head(index.is_exact, addresses, logits, state, patches)


def truncated(problem: Problem, k: int) -> Estimate:
    """The head as the whole posterior, with a bound (docs/theory.md, (11)); the border exact.

    If the index has found nothing for a pixel, everything is computed.
    """
    head, interior = nearest(problem, k), problem.interior
    if not bool(head.state.is_known[0].numpy()[interior].all()):
        return problem.exact()
    query, pixels = problem.query, torch.from_numpy(interior)
    state = head.state
    if problem.has_border:
        border = replace(query, pixels=~interior)
        (exact,) = problem.backend.states(problem.images, border, [problem.members])
        state = where(pixels, state, exact)
    log_mass = head.state.reference + head.state.mass.log()
    # A full list may leave out candidates as heavy as its last one, and no heavier.
    places = problem.query.pairs_per_image * len(problem.members)
    found = (head.addresses >= 0).sum(-1)
    last = head.logits.masked_fill(head.addresses < 0, torch.inf).amin(-1)
    norms = torch.zeros(interior.shape, dtype=torch.float64, device="cpu")
    norms[pixels] = torch.from_numpy(head.patches).double().square().sum((1, 2, 3))
    terms = query.x.shape[1] * query.patch_size**2
    rounding = INDEX_ROUNDING * problem.alpha**2 * (norms + terms) / (2 * problem.sigma**2)
    left = (places - found).clamp(min=0)
    log_ratio = left.double().log() + last + rounding - log_mass
    # With nothing left log 0 is -inf, of which the sigmoid is 0.
    omitted = torch.where(pixels, torch.sigmoid(log_ratio), 0.0)
    kind: ErrorKind = "bound" if head.is_exact else "estimate"
    bound = RANGE * omitted
    return Estimate(state, Uncertainty(omitted, bound, kind, "topk", 0, bound, None))


def recall(problem: Problem, k: int) -> float:
    """Share of the k nearest patches that the index finds, by exact distance, over pixels."""
    head = nearest(problem, k)
    query = replace(problem.query, top=k)
    (state,) = problem.backend.states(problem.images, query, [problem.members])
    assert state.top is not None
    kth = state.top.logits[..., -1:]
    # Equal patches are equally good: what counts is the distance.
    near_enough = head.logits >= kth - 1e-5 * kth.abs()
    return float(near_enough.double().mean(-1)[0].numpy()[problem.interior].mean())
