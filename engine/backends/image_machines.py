"""IS and ES posteriors: whole images, compared by matrix products and FFTs in float64.

A clean pixel is an integer over 255, so a correlation with it is exact once the other factor is
written as two fixed-point halves: the sums are integers that a double holds, in any order and with
any BLAS. Hence the logits of duplicates are equal, and the rest of the batch does not change any
bit. Neither does the number of threads: one thread computes a block of images, and blocks are
merged in order. Results of different processors or builds of torch agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends.image_blocks import blocks, merged_in_order
from els.engine.backends.statistical import locality_state
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, TopPatches, best, empty, merge, stack
from els.engine.watching import counted

# Bytes of one block: of its pixels, or with shifts of its temporary memory. Few enough that large
# images have blocks for many threads, and that an interruption is noticed soon.
_BLOCK_BYTES = 16 << 20
# Bytes of images as float64 that are multiplied at once: best of 0.5, 2 and 8 MB on an AMD EPYC.
_CACHED_BYTES = 2 << 20
# Images of a block, at most.
_MOST_IMAGES = 4096
# Bits of an integer that float64 holds exactly.
_EXACT_BITS = 53
# Bits of |2 v - 255|, a pixel times 255.
_PIXEL_BITS = 8
# Largest value of a row that is taken for 0: the scale of a smaller one would overflow.
_SMALLEST = 1e-200
# Log weight, relative to the heaviest image of a block, below which a weight is left out: a
# thousand million of them change no bit of a float64.
_LEAST_SHIFTED = -60.0


def image_state(
    images: npt.NDArray[np.uint8], query: PosteriorQuery, members: npt.NDArray[np.int64]
) -> PosteriorState:
    """The posterior state of a machine that compares whole images, over ``images[members]``.

    Args:
        images: the whole database, uint8 ``[N, C, H, W]``.
        query: what to compute, on any device with float64.
        members: ascending image numbers, also none.
    """
    if query.kind.rule == "local":
        return locality_state(images, query, members)
    if len(members) == 0:
        return empty(query)
    if query.kind.is_equivariant:
        return _equivariant_state(images, query, members)
    return _ideal_state(images, query, members)


def _ideal_state(
    images: npt.NDArray[np.uint8], query: PosteriorQuery, members: npt.NDArray[np.int64]
) -> PosteriorState:
    """The same of the ideal score machine."""
    height, width = query.x.shape[2:]
    x = query.x.to(torch.float64).flatten(1)
    block_state = partial(_ideal_block, images, query, x, _energy(x))
    count = min(_MOST_IMAGES, _BLOCK_BYTES // x.shape[1])
    some = counted(blocks(members, count), len(x))
    state = merged_in_order(block_state, some, merge, x.device)
    if state.top is not None:
        # Every pixel's candidates are the same pixel of the heaviest images.
        pixel = torch.arange(height * width, device=x.device).reshape(height, width, 1)
        addresses = state.top.addresses * (height * width) + pixel
        top = TopPatches(
            state.top.logits.expand(addresses.shape),
            torch.where(state.top.addresses < 0, -1, addresses),
        )
        state = replace(state, top=top)
    return _everywhere(state, height, width)


def _equivariant_state(
    images: npt.NDArray[np.uint8], query: PosteriorQuery, members: npt.NDArray[np.int64]
) -> PosteriorState:
    """The same of the equivariant machine.

    Shift s of image n has the pixels ``k_n[(p + s) mod (H, W)]``.
    """
    x = query.x.to(torch.float64)
    noisy = _noisy_spectra(x)
    count = _BLOCK_BYTES // (8 * (5 * x.shape[1] + 8) * x.shape[2] * x.shape[3])
    block_states = partial(_equivariant_block, images, query, noisy)
    states = merged_in_order(
        block_states,
        counted(blocks(members, count), len(x)),
        lambda first, second: list(map(merge, first, second)),
        x.device,
    )
    return _everywhere(stack(states), *x.shape[2:])


def _ideal_block(
    images: npt.NDArray[np.uint8],
    query: PosteriorQuery,
    x: Tensor,
    energy: Tensor,
    members: npt.NDArray[np.int64],
) -> Iterator[PosteriorState]:
    """The state of noisy images ``x`` ``[B, C * H * W]`` over ``images[members]``, in one piece.

    All pixels share reference, mass, logit_sum and top, ``[B, 1, 1]``, whose addresses are image
    numbers.
    """
    product, norms = _products(x, images, members)
    logits = _logits(
        energy.unsqueeze(1),
        product,
        norms,
        query.alpha.to(x.device).unsqueeze(1),
        query.sigma.to(x.device).unsqueeze(1),
    )
    reference = logits.amax(1, keepdim=True)
    shifted = logits - reference
    weights = torch.where(shifted >= _LEAST_SHIFTED, shifted.exp(), 0.0)
    top = None
    if query.top:
        numbers = torch.tensor(members, device=x.device).expand(logits.shape)
        top = best(logits[:, None, None], numbers[:, None, None], query.top)
    yield PosteriorState(
        reference=reference.unsqueeze(2),
        mass=_exact_sum(weights).unsqueeze(2),
        centre=_centre(weights, images, members).reshape(query.x.shape),
        logit_sum=_exact_sum(weights * shifted).unsqueeze(2) if query.entropy else None,
        top=top,
    )


def _levels(
    images: npt.NDArray[np.uint8], members: npt.NDArray[np.int64], device: torch.device
) -> Iterator[tuple[npt.NDArray[np.uint8], Tensor]]:
    """A few images at a time, as uint8 and float64 ``[n, D]``, the same memory each time.

    A processor's cache holds them, and memory that is asked for again and again would take longer
    than the products.
    """
    size = images[0].size
    rows = max(1, min(len(members), _CACHED_BYTES // (8 * size)))
    buffer = torch.empty((rows, size), dtype=torch.float64, device=device)
    for start in range(0, len(members), rows):
        levels = np.asarray(images)[members[start : start + rows]].reshape(-1, size)
        yield levels, buffer[: len(levels)].copy_(torch.from_numpy(levels))


def _products(
    x: Tensor, images: npt.NDArray[np.uint8], members: npt.NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """``x . k`` and ``|k|^2`` of clean images ``k = (2 v - 255) / 255``, without rounding a sum.

    Args:
        x: noisy images, float64 ``[B, D]``.
        images: v of all images, uint8 ``[N, C, H, W]``.
        members: n image numbers.

    Returns:
        float64 ``[B, n]`` and ``[n]``.
    """
    size = x.shape[1]
    bits = _EXACT_BITS - _PIXEL_BITS - size.bit_length()
    high, low, scale = _halves(x, bits)
    rows = torch.cat([high, low, torch.ones_like(x[:1])])
    # numpy squares and adds whole numbers without a copy; 255^2 D fits 32 bits up to 33,000 pixels.
    whole = np.int32 if 255**2 * size < 1 << 31 else np.int64
    products, squares = [], []
    for levels, values in _levels(images, members, x.device):
        products.append(rows @ values.T)
        squares.append(np.einsum("nd,nd->n", levels, levels, dtype=whole))
    found = torch.cat(products, dim=1)
    square = torch.from_numpy(np.concatenate(squares)).to(x.device, torch.float64)
    # Whole numbers again: the sums of x (2 v - 255), and of (2 v - 255)^2.
    sums = rows[:-1] @ torch.ones_like(x[0]).unsqueeze(1)
    high, low = (2 * found[:-1] - 255 * sums).chunk(2)
    norms = (4 * square - 1020 * found[-1] + 255**2 * size) / 255**2
    return (high + low * 2.0**-bits) / scale / 255, norms


def _centre(
    weights: Tensor, images: npt.NDArray[np.uint8], members: npt.NDArray[np.int64]
) -> Tensor:
    """``sum_n w_n k_n``, float64 ``[B, D]``, without rounding a sum.

    Images that weigh nothing, most of them in so many dimensions, are not read.
    """
    bits = _EXACT_BITS - _PIXEL_BITS - len(members).bit_length()
    high, low, scale = _halves(weights, bits)
    heavy = torch.nonzero(weights.amax(0) > 0).squeeze(1)
    rows = torch.cat([high, low])[:, heavy]
    sums = weights.new_zeros(len(rows), images[0].size)
    start = 0
    for _, values in _levels(images, members[heavy.cpu().numpy()], weights.device):
        sums += rows[:, start : start + len(values)] @ values.mul_(2).sub_(255)
        start += len(values)
    high, low = sums.chunk(2)
    return (high + low * 2.0**-bits) / scale / 255


class _NoisySpectra(NamedTuple):
    """The batch as an ES block needs it.

    Attributes:
        halves: spectra of the fixed-point halves, ``[B, 2, C, H, W // 2 + 1]``.
        scale: what the fixed-point numbers are multiples of, inverted, ``[B]``.
        bits: each half has this many.
        energy: squared norm of the noisy image, ``[B]``.
    """

    halves: Tensor
    scale: Tensor
    bits: int
    energy: Tensor


def _noisy_spectra(x: Tensor) -> _NoisySpectra:
    flat = x.flatten(1)
    # The error of an FFT correlation, about 10 ulp of the product of the norms, must stay below
    # a half, so that rounding gives the integer.
    bits = _EXACT_BITS - _PIXEL_BITS - 6 - flat.shape[1].bit_length()
    high, low, scale = _halves(flat, bits)
    halves = torch.stack([high, low], dim=1).reshape(len(x), 2, *x.shape[1:])
    return _NoisySpectra(torch.fft.rfft2(halves), scale.flatten(), bits, _energy(flat))


def _equivariant_block(
    images: npt.NDArray[np.uint8],
    query: PosteriorQuery,
    noisy: _NoisySpectra,
    members: npt.NDArray[np.int64],
) -> Iterator[list[PosteriorState]]:
    """The states of the noisy images over all shifts of ``images[members]``, one more each time."""
    device = query.x.device
    pixels = _integers(images, members, device)
    spectrum = torch.fft.rfft2(pixels)
    norms = _norms(pixels.flatten(1)).reshape(-1, 1, 1)
    numbers = torch.tensor(members, device=device)
    states: list[PosteriorState] = []
    for image in range(query.x.shape[0]):
        correlated = noisy.halves[image].conj().unsqueeze(1) * spectrum
        high, low = torch.fft.irfft2(correlated.sum(2), s=pixels.shape[2:]).round()
        logits = _logits(
            noisy.energy[image],
            (high + low * 2.0**-noisy.bits) / noisy.scale[image] / 255,
            norms,
            query.alpha[image].to(device),
            query.sigma[image].to(device),
        )
        states.append(_equivariant_image(query, logits, spectrum, numbers))
        yield states


def _equivariant_image(
    query: PosteriorQuery, logits: Tensor, spectrum: Tensor, numbers: Tensor
) -> PosteriorState:
    """The state of logits ``[n, H, W]``, of each image and shift.

    All pixels share reference, mass and logit_sum, ``[1, 1, 1]``.
    """
    reference = logits.amax()
    shifted = logits - reference
    weights = shifted.exp()
    shifted_back = torch.fft.rfft2(weights).conj().unsqueeze(1) * spectrum
    centre = torch.fft.irfft2(shifted_back.sum(0), s=logits.shape[1:]) / 255
    return PosteriorState(
        reference=reference.reshape(1, 1, 1),
        mass=weights.sum().reshape(1, 1, 1),
        centre=centre.unsqueeze(0),
        logit_sum=(weights * shifted).sum().reshape(1, 1, 1) if query.entropy else None,
        top=_top_shifts(logits, numbers, query.top) if query.top else None,
    )


def _top_shifts(logits: Tensor, numbers: Tensor, count: int) -> TopPatches:
    """The heaviest (image, shift) pairs as addresses of the pixels that land on each pixel."""
    height, width = logits.shape[1:]
    least = logits.flatten().topk(min(count, logits.numel())).values[-1]
    chosen = torch.nonzero(logits > least)
    # Which of an image's tied shifts has the lower address differs from pixel to pixel, so that all
    # ties of as many images as might be needed are kept.
    tied = torch.nonzero(logits == least)
    last_image = tied[min(count, len(tied)) - 1, 0]
    image, down, right = torch.cat([chosen, tied[tied[:, 0] <= last_image]]).unbind(1)
    y = torch.arange(height, device=logits.device).reshape(-1, 1, 1)
    x = torch.arange(width, device=logits.device).reshape(1, -1, 1)
    addresses = (numbers[image] * height + (y + down) % height) * width + (x + right) % width
    values = logits[image, down, right].expand(addresses.shape)
    return best(values.unsqueeze(0), addresses.unsqueeze(0), count)


def _everywhere(state: PosteriorState, height: int, width: int) -> PosteriorState:
    """The sums that all pixels share, ``[B, 1, 1]``, expanded to each of them."""

    def spread(values: Tensor) -> Tensor:
        return values.expand(-1, height, width)

    logit_sum = None if state.logit_sum is None else spread(state.logit_sum)
    return replace(
        state, reference=spread(state.reference), mass=spread(state.mass), logit_sum=logit_sum
    )


def _logits(energy: Tensor, product: Tensor, norms: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``-||x - alpha k||^2 / (2 sigma^2)`` from ``|x|^2``, ``x . k`` and ``|k|^2``."""
    return (energy - 2 * alpha * product + alpha**2 * norms) / (-2 * sigma**2)


def _energy(x: Tensor) -> Tensor:
    """Squared norm of each row; numpy's sum of a row depends on nothing but the row."""
    return torch.from_numpy(np.square(x.cpu().numpy()).sum(axis=1)).to(x.device)


def _norms(pixels: Tensor) -> Tensor:
    """Squared norm of each row of clean pixels, given as integers."""
    return pixels.square().sum(1) / 255**2


def _halves(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """``values = (high + low / 2^bits) / scale`` row by row, in integers up to ``2^bits``."""
    largest = values.abs().amax(1, keepdim=True)
    scale = 2.0**bits / largest.clamp(min=_SMALLEST)
    scaled = values * scale
    high = scaled.round()
    return high, ((scaled - high) * 2.0**bits).round(), scale


def _exact_sum(values: Tensor) -> Tensor:
    """The sum of each row ``[m, k]``, float64 ``[m, 1]``, in which no sum is rounded."""
    bits = _EXACT_BITS - values.shape[1].bit_length()
    high, low, scale = _halves(values, bits)
    return (high.sum(1, keepdim=True) + low.sum(1, keepdim=True) * 2.0**-bits) / scale


def _integers(
    images: npt.NDArray[np.uint8], members: npt.NDArray[np.int64], device: torch.device
) -> Tensor:
    """Pixels as ``2 v - 255``, 255 times their clean value, float64 ``[n, C, H, W]``."""
    return torch.from_numpy(images[members]).to(device, torch.float64).mul_(2).sub_(255)
