"""The heaviest patches of an estimated posterior, of those that it is made of or an index finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from els.engine.approximate import head
from els.engine.approximate.estimate import Estimate, Problem
from els.engine.state import PosteriorState, TopPatches, best


def with_heaviest(problem: Problem, estimate: Estimate, k: int) -> PosteriorState:
    """The estimate's state with the k heaviest patches of every pixel.

    Of all images where everything was computed; of the subset's where there was one; else of those
    that the index finds nearest. Their logits are exact, so weights are shares of the estimated
    mass.

    Args:
        problem: of which image.
        estimate: its posterior.
        k: how many patches.
    """
    state, uncertainty = estimate.state, estimate.uncertainty
    if state.top is not None:
        return state
    if uncertainty.mode in ("exact", "subset"):
        return replace(state, top=_of_images(problem, uncertainty.images, k))
    found = head.nearest(problem, k)
    if not bool(found.state.is_known[0].numpy()[problem.interior].all()):
        return replace(state, top=_of_images(problem, 0, k))
    top = best(found.logits.masked_fill(found.addresses < 0, -torch.inf), found.addresses, k)
    if problem.has_border:
        border = _of_images(problem, uncertainty.images, k, is_border=True)
        interior = torch.from_numpy(problem.interior).unsqueeze(-1)
        top = TopPatches(
            torch.where(interior, top.logits, border.logits),
            torch.where(interior, top.addresses, border.addresses),
        )
    return replace(state, top=top)


def _of_images(problem: Problem, images: int, k: int, *, is_border: bool = False) -> TopPatches:
    """Of the first so many images in their order, 0 for all; of all pixels, or of the border's."""
    query = replace(problem.query, entropy=False, top=k)
    if is_border:
        query = replace(query, pixels=~problem.interior)
    members = np.sort(problem.order[: images or None])
    (state,) = problem.backend.states(problem.images, query, [members])
    assert state.top is not None
    return TopPatches(state.top.logits.cpu(), state.top.addresses.cpu())
