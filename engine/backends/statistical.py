"""Denoisers that know the images' covariance: the Wiener filter, and locality by PCA.

With the covariance ``S = U diag(lam) U^T`` of the clean images and mean mu (docs/theory.md), the
best linear denoiser is

    mean = mu + L (x / alpha - mu),   L = U diag(alpha^2 lam / (alpha^2 lam + sigma^2)) U^T.

Locality by PCA (arXiv 2509.09672) takes from L which coordinates n matter to an output coordinate
m, ``M[n, m]``, and gives m the posterior over all images k with

    logit(m, k) = -sum_n M[n, m] (x_n - alpha k_n)^2 / (2 sigma^2).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends.image_blocks import blocks
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, TopPatches, best, empty, merge, stack
from els.engine.watching import counted
from els.index.statistics import Spectrum

# Diagonal of L below which it is taken for 1, as in published code (arXiv 2509.09672).
_LEAST_DIAGONAL = 1e-6
# Temporary memory of one block of images, in bytes.
_BLOCK_BYTES = 64 << 20
# Error of float32 logits beyond which they are computed in float64.
_LARGEST_ERROR = 1e-3
# Relative error of a float32 sum of squares: four units of roundoff.
_SUM_ROUNDING = 2.0**-22
# Relative error of a float32 pixel.
_PIXEL_ROUNDING = 2.0**-24


def wiener_state(query: PosteriorQuery) -> PosteriorState:
    """The Wiener filter's mean as a state of one candidate, of weight 1; see the module."""
    spectrum = _spectrum(query)
    x = query.x.double().flatten(1)
    mean, variances, components = (
        torch.from_numpy(values).to(x.device, torch.float64)
        for values in (spectrum.mean, spectrum.variances, spectrum.components)
    )
    alpha, sigma = (scale.to(x.device).unsqueeze(1) for scale in (query.alpha, query.sigma))
    # Without a division by alpha, which may be 0.
    gain = alpha * variances / (alpha**2 * variances + sigma**2)
    found = mean + (gain * ((x - alpha * mean) @ components.T)) @ components
    zero = torch.zeros_like(query.x[:, 0], dtype=torch.float64)
    return PosteriorState(
        zero,
        torch.ones_like(zero),
        found.reshape(query.x.shape),
        zero.clone() if query.entropy else None,
    )


def folded(query: PosteriorQuery) -> PosteriorQuery:
    """The query with channels one above the other, ``[B, 1, C * H, W]``.

    Each of them has a posterior of its own.
    """
    batch, channels, height, width = query.x.shape
    return replace(query, x=query.x.reshape(batch, 1, channels * height, width))


def locality_state(
    images: npt.NDArray[np.uint8], query: PosteriorQuery, members: npt.NDArray[np.int64]
) -> PosteriorState:
    """The state of every channel of every pixel over ``images[members]``, as of :func:`folded`.

    Args:
        images: the whole database, uint8 ``[N, C, H, W]``.
        query: what to compute, with a spectrum.
        members: ascending image numbers, also none.
    """
    if len(members) == 0:
        return empty(folded(query))
    states = []
    mask, level = torch.empty(0), (-1.0, -1.0)
    for b in range(len(query.x)):
        one = replace(query, x=query.x[b : b + 1], alpha=query.alpha[[b]], sigma=query.sigma[[b]])
        if level != (float(one.alpha), float(one.sigma)):
            level = (float(one.alpha), float(one.sigma))
            mask = coordinate_mask(_spectrum(query), *level, query.mask_threshold, query.x.device)
        state = None
        if query.mask_threshold > 0:
            state = _of_images(images, one, members, mask)
        if state is None or not _is_precise(one, state):
            state = _of_images(images, one, members, mask.double())
        states.append(state)
    return stack(states)


def coordinate_mask(
    spectrum: Spectrum, alpha: float, sigma: float, threshold: float, device: torch.device
) -> Tensor:
    """Which coordinates n matter to coordinate m, and how much, float32 ``[n, m]``.

    ``L[n, m] / L[n, n]``, where ``L[n, n]`` is 1 if it is below 1e-6; with a threshold above 0, 1
    where the absolute value is at least the threshold times the largest, else 0.
    """
    variances = torch.from_numpy(spectrum.variances).to(device)
    components = torch.from_numpy(spectrum.components).to(device)
    gain = (alpha**2 * variances / (alpha**2 * variances + sigma**2)).float()
    mask = (components * gain.unsqueeze(1)).T @ components
    diagonal = mask.diagonal().clone().unsqueeze(1)
    is_dead = diagonal.abs() < _LEAST_DIAGONAL
    mask.div_(torch.where(is_dead, 1.0, diagonal))
    mask.diagonal().masked_fill_(is_dead.squeeze(1), 1.0)
    if threshold == 0:
        return mask
    largest = mask.abs().amax()
    return (mask.abs_() >= threshold * largest).float()


def _of_images(
    images: npt.NDArray[np.uint8],
    query: PosteriorQuery,
    members: npt.NDArray[np.int64],
    mask: Tensor,
) -> PosteriorState:
    """The state of one noisy image, in the mask's precision."""
    device, dtype = mask.device, mask.dtype
    _, channels, height, width = query.x.shape
    x = query.x.to(device, dtype).flatten(1)
    alpha, scale = float(query.alpha), -1 / (2 * float(query.sigma) ** 2)
    pixel = torch.arange(channels * height * width, device=device) % (height * width)
    shape = (1, channels * height, width)
    state = None
    for block in counted(blocks(members, max(1, _BLOCK_BYTES // (16 * x.shape[1]))), 1):
        clean = torch.from_numpy(images[block]).to(device, dtype).flatten(1).div_(127.5).sub_(1)
        logits = (x - alpha * clean).square_() @ mask
        logits.mul_(scale)
        reference = logits.amax(0)
        top = None
        if query.top:
            values, rows = logits.topk(min(query.top, len(block)), dim=0)
            numbers = torch.tensor(block, device=device)[rows] * (height * width) + pixel
            found = best(values.T.double(), numbers.T, query.top)
            top = TopPatches(
                found.logits.reshape(*shape, query.top), found.addresses.reshape(*shape, query.top)
            )
        shifted = logits.sub_(reference)
        weights = shifted.exp()
        logit_sum = None
        if query.entropy:
            logit_sum = (weights * shifted).sum(0).double().reshape(shape)
        part = PosteriorState(
            reference.double().reshape(shape),
            weights.sum(0).double().reshape(shape),
            (weights * clean).sum(0).double().reshape(1, *shape),
            logit_sum,
            top,
        )
        state = part if state is None else merge(state, part)
    assert state is not None
    return state


def _is_precise(query: PosteriorQuery, state: PosteriorState) -> bool:
    """Whether float32 told the logits that matter, those near the largest, well enough."""
    largest = float(state.reference.abs().max())
    sums = _SUM_ROUNDING * largest
    # Of sum (x - alpha k)^2 / (2 sigma^2) by rounding of x and alpha k (Cauchy-Schwarz).
    values = float(query.x.abs().max()) + float(query.alpha)
    pixels = _PIXEL_ROUNDING * values * (2 * largest) ** 0.5 / float(query.sigma)
    return bool(sums + pixels <= _LARGEST_ERROR)


def _spectrum(query: PosteriorQuery) -> Spectrum:
    if query.spectrum is None:
        raise ValueError(f"a query of {query.kind.name} needs the images' spectrum")
    return query.spectrum
