"""Posteriors from a sample of all patches of an index: its inverted lists (docs/theory.md).

The backend reads every list with a density that falls with the distance of its centroid. The error
of a mean v = a / l, with block sums a_b and l_b divided by their inclusion probability p, is the
linearised

    se^2 = sum_b (1 - p) (a_b - v l_b)^2 / l^2.

It does not contain heavy patches that were not read; a safety factor accounts for them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from els.engine.approximate import head
from els.engine.approximate.costs import (
    LARGEST_FIRST_SHARE,
    LEAST_SHARE,
    LIST_POWER,
    LIST_SAFETY,
    LIST_SAFETY_PATCHES,
    LIST_SAFETY_POWER,
    LIST_SAFETY_REDUCED,
    LOOK_IMAGES,
    MANY_PATCHES,
    RANGE,
    SHARE_CODE_BYTES,
    SHARE_CODE_POWER,
    SHARE_OF_SMALL_CODES,
)
from els.engine.approximate.estimate import Array, Estimate, Mask, Problem, Situation
from els.engine.backends.backend import ListQuery
from els.engine.result import Uncertainty
from els.engine.state import PosteriorState
from els.index.patches.index import DEFAULT_EFFORT


def obstacle(situation: Situation) -> str | None:
    """Why lists cannot be sampled for a query, but for the absence of an index."""
    found = head.obstacle(situation)
    if found is not None or situation.index is None:
        return found
    inverted = situation.index.inverted
    if inverted is None:
        return (
            f"needs an index with codes of one byte per component; "
            f"{situation.index.factory!r} has none: use mode='topk+subset', or build one such "
            "as IVF1024,SQ8_direct"
        )
    for alpha, sigma in zip(situation.alpha.tolist(), situation.sigma.tolist(), strict=True):
        found = situation.backend.lists_obstacle(inverted, alpha, sigma)
        if found is not None:
            return found
    return None


def can_sample(problem: Problem) -> bool:
    """Whether lists tell the posterior well enough here, and sampling them can pay."""
    is_cheap = math.isfinite(problem.costs.code_read)
    return is_cheap and head.can_search(problem) and obstacle(problem.situation) is None


def list_cost(problem: Problem, share: float) -> float:
    """What reading so much of the lists costs, in images of the exact kernel."""
    assert problem.index is not None
    costs, index = problem.costs, problem.index
    read = costs.list_ranked * index.lists + costs.code_read * share * index.count
    return read / problem.pairs_per_image


def least_share(problem: Problem) -> float:
    """The share of the codes that suffices where many patches share a pixel.

    Lists of long codes say less about their patches. Where the interior is a part of the image, so
    is its error.
    """
    assert problem.index is not None
    _, size = problem.index.codes_read()
    inside = float(problem.interior.mean())
    share = math.pow(size / SHARE_CODE_BYTES, SHARE_CODE_POWER) * SHARE_OF_SMALL_CODES
    return max(min(share * math.pow(inside, 1 / LIST_POWER), LARGEST_FIRST_SHARE), LEAST_SHARE)


def first_share(problem: Problem) -> float:
    """The share that is read at first.

    Where few patches share a pixel they must be found, which takes as many lists as a search would
    probe. If that costs much, a few images tell whether it is so.
    """
    assert problem.index is not None
    share, probed = least_share(problem), min(DEFAULT_EFFORT / problem.index.lists, 1.0)
    if list_cost(problem, probed) - list_cost(problem, share) < LOOK_IMAGES:
        return max(share, probed)
    some = np.sort(problem.order[:LOOK_IMAGES])
    (state,) = problem.backend.states(problem.images, problem.query, [some])
    effective = np.median(state.effective[0].numpy()[problem.interior])
    return share if effective > MANY_PATCHES else probed


def sampled(problem: Problem, share: float | Array, pixels: Mask) -> Estimate:
    """Of some of the interior's pixels, bool ``[H, W]``, each with its share of the codes.

    Others, and those of which nothing was read, have no mass and the largest error.

    Raises:
        DatabaseError: the index names patches that are not there.
    """
    index = problem.index
    assert index is not None
    lists = index.inverted
    assert lists is not None
    y, rest = index.components(problem.patches(pixels))
    allowed = None
    if len(problem.members) < len(problem.db):
        allowed = np.zeros(len(problem.db), dtype=np.uint8)
        allowed[problem.members] = 1
    query = ListQuery(
        lists,
        y,
        rest,
        alpha=problem.alpha,
        sigma=problem.sigma,
        share=share,
        seed=problem.list_seed,
        allowed=allowed,
        pixels=pixels.size,
    )
    try:
        state = problem.backend.sample_lists(query)
    except IndexError as error:
        raise index.damaged(str(error)) from error
    sums = state.sampling
    assert sums is not None
    assert state.logit_sum is not None
    is_known = state.is_known
    mass = torch.where(is_known, state.mass, 1.0)
    omitted = torch.where(is_known, (1 - sums.seen / mass).clamp(0, 1), 1.0)
    deviation = standard_error(state) * safety_factor(state.effective, lists.is_lossless).unsqueeze(
        1
    )
    # A spread needs several blocks, and knows as little of what is between them.
    unread = omitted / effective_blocks(state).clamp(min=1.0)
    deviation = torch.hypot(deviation, unread.unsqueeze(1))
    deviation = torch.where(is_known.unsqueeze(1), deviation, RANGE)
    worst, typical = deviation.amax(1), deviation.mean(1)

    def placed(values: Tensor, elsewhere: float) -> Tensor:
        """``[1, 1, Q]`` or ``[1, C, 1, Q]`` as images with another value elsewhere."""
        shape = (*values.shape[:-2], *pixels.shape)
        room = torch.full(shape, elsewhere, dtype=torch.float64, device="cpu")
        room[..., torch.from_numpy(pixels)] = values.squeeze(-2)
        return room

    return Estimate(
        PosteriorState(
            placed(state.reference, -math.inf),
            placed(state.mass, 0.0),
            placed(state.centre, 0.0),
            placed(state.logit_sum, 0.0),
        ),
        Uncertainty(
            placed(omitted, 1.0),
            placed(worst, RANGE),
            "estimate",
            "lists",
            0,
            placed(typical, RANGE),
        ),
    )


def with_exact_border(problem: Problem, share: float) -> Estimate:
    """The lists' posterior, and all images' of the pixels that the index does not serve.

    If nothing was read for a pixel, everything is computed.
    """
    estimate = sampled(problem, share, problem.interior)
    if not estimate.is_known(problem.interior):
        # The exact state of some pixels costs as much as that of all.
        return problem.exact()
    if not problem.has_border:
        return estimate
    query = problem.border_query
    (border,) = problem.backend.states(problem.images, query, [problem.members])
    return estimate.with_others(problem.interior, Estimate.exact(border))


def safety_factor(effective: Tensor, is_lossless: bool) -> Tensor:
    """Factor of the standard error, for a number of effective patches.

    A spread does not contain heavy patches that were not read, which matters the more the fewer
    patches share a pixel. Where codes are not whole patches, the variance that they leave unknown
    is larger than that.
    """
    if not is_lossless:
        return torch.full_like(effective, LIST_SAFETY_REDUCED)
    return 1 + LIST_SAFETY / (1 + (effective / LIST_SAFETY_PATCHES) ** LIST_SAFETY_POWER)


def effective_blocks(state: PosteriorState) -> Tensor:
    """Effective number of blocks that stand for what was not read, ``[1, 1, Q]``; inf for none."""
    assert state.sampling is not None
    spread = state.sampling.squares[:, 0]
    return torch.where(spread > 0, (state.mass - state.sampling.seen).square() / spread, torch.inf)


def standard_error(state: PosteriorState) -> Tensor:
    """The standard error of each channel's mean, ``[1, C, 1, Q]`` (docs/theory.md, (13))."""
    assert state.sampling is not None
    channels = state.centre.shape[1]
    of_mass, crossed, squared = torch.split(state.sampling.squares, [1, channels, channels], dim=1)
    mass = torch.where(state.is_known, state.mass, 1.0).unsqueeze(1)
    mean = state.centre / mass
    variance = squared - 2 * mean * crossed + mean.square() * of_mass
    deviation: Tensor = variance.clamp(min=0).sqrt() / mass
    return deviation
