"""Derivatives of exact posteriors: vector-Jacobian products, and the trace of the Jacobian.

A posterior's answers are functions of sums over candidates c of a pixel p (docs/theory.md), whose
logits ``l_c`` depend on the query. With the sums relative to a fixed reference m and
``w_c = exp(l_c - m)``, a loss L that depends on them has

    dL/dl_c = w_c (dL/dmass + sum_channels dL/dcentre * k_c[p'] + dL/dlogit_sum (1 + l_c - m)),

and the logits are quadratic: ``dl_c/dx = (alpha k_c - x) / sigma^2`` over the patch around p. So a
gradient takes one more pass over the candidates, whichever backend gave the answer. The pass is
chunked torch in float64.

For the mean of one pixel with itself this is ``dmean/dx = alpha / sigma^2 * variance``: the trace
of the Jacobian needs the posterior variance of the pixels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.functional import pad

from els.engine.backends.image_blocks import blocks, merged_in_order
from els.engine.backends.image_machines import image_state
from els.engine.backends.pytorch import aligned, local_state, padded, patch_distances, patch_sums
from els.engine.query import PosteriorQuery
from els.engine.result import LocalPosterior, finish
from els.engine.state import PosteriorState

# Temporary memory of one block of training images.
_BLOCK_BYTES = 32 << 20

Images = npt.NDArray[np.uint8]
Members = npt.NDArray[np.int64]


class Inputs(NamedTuple):
    """The inputs of a posterior: x ``[B, C, H, W]``, alpha and sigma float64 ``[B]``."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def want_gradients(self) -> bool:
        """Whether autograd follows any of them."""
        return torch.is_grad_enabled() and any(value.requires_grad for value in self)

    def require_no_tangents(self) -> None:
        """Refuse derivatives in forward mode, which would lack the posterior's part.

        Raises:
            ValueError: if one of them carries a tangent.
        """
        duals = map(unpack_dual, self)
        if any(dual.tangent is not None for dual in duals):
            raise ValueError(
                "a posterior has no derivatives in forward mode (torch.func.jvp, jacfwd, "
                "forward_ad): use reverse mode, as torch.autograd.grad and torch.func.vjp do"
            )


def differentiable(
    answer: Callable[[PosteriorQuery], LocalPosterior],
    images: Images,
    query: PosteriorQuery,
    members: Sequence[Members],
    inputs: Inputs,
) -> LocalPosterior:
    """An exact posterior whose mean, log evidence and effective patches autograd can follow.

    Args:
        answer: computes the posterior.
        images: the whole database, uint8 ``[N, C, H, W]``.
        query: what to compute; its x, alpha and sigma do not matter.
        members: numbers of the images that are candidates, for each of the B queries.
        inputs: of the answer. The addresses and weights of the heaviest patches have no gradient.
    """
    given: list[LocalPosterior] = []

    def answered(x: Tensor, alpha: Tensor, sigma: Tensor) -> LocalPosterior:
        given.append(answer(replace(query, x=x, alpha=alpha, sigma=sigma)))
        return given[-1]

    pulled = partial(_pulled_back, images, query, members)
    made = _Differentiable.apply(*inputs, answered, pulled)  # type: ignore[no-untyped-call]
    mean, log_evidence, *effective = made
    return replace(
        given[-1],
        mean=mean,
        log_evidence=log_evidence,
        effective_patches=effective[0] if effective else None,
    )


def variances(images: Images, query: PosteriorQuery, members: Sequence[Members]) -> Tensor:
    """Posterior variances (docs/theory.md, (8)), float64 ``[B, C, H, W]``, on the query's device.

    Args:
        images: the whole database, uint8 ``[N, C, H, W]``.
        query: B noisy images; its members do not matter.
        members: numbers of the images that are candidates, for each of them.
    """
    family = _Local if query.kind.is_local else _Whole
    found = []
    for row, numbers in enumerate(members):
        one = _one(query, row)
        sums = family(images, one, _state(images, one, numbers))
        found.append(_over_blocks(sums.variance, one, numbers))
    return torch.stack(found)


@final
class _Differentiable(torch.autograd.Function):
    """A posterior, and its vector-Jacobian product."""

    @staticmethod
    def forward(
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        answered: Callable[[Tensor, Tensor, Tensor], LocalPosterior],
        pulled: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        post = answered(x.detach(), alpha.detach(), sigma.detach())
        parts = (post.mean, post.log_evidence, post.effective_patches)
        return tuple(part for part in parts if part is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *differentiated, _, ctx.pulled = inputs
        ctx.save_for_backward(*differentiated)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = (*ctx.saved_tensors, ctx.pulled, *gradients)
        found = _Gradient.apply(*given)  # type: ignore[no-untyped-call]
        return (*found, None, None)


@final
class _Gradient(torch.autograd.Function):
    """The gradients of :class:`_Differentiable`, whose differentiation is an error.

    Torch's ``once_differentiable`` is not connected to the inputs: a second derivative that reaches
    them by another path would silently lack this part.
    """

    @staticmethod
    def forward(
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        pulled: Callable[..., tuple[Tensor, Tensor, Tensor]],
        *gradients: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return pulled((x, alpha, sigma), gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "a posterior has first derivatives only; leave out create_graph=True, or difference "
            "the gradients"
        )


def _pulled_back(
    images: Images,
    query: PosteriorQuery,
    members: Sequence[Members],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, alpha and sigma from those of mean, log evidence and effective patches."""
    x, alpha, sigma = inputs
    query = replace(query, x=x, alpha=alpha, sigma=sigma, entropy=len(gradients) > 2, top=0)
    family = _Local if query.kind.is_local else _Whole
    found = []
    for row, numbers in enumerate(members):
        one = _one(query, row)
        state = _state(images, one, numbers)
        adjoint = _adjoint(state, [gradient[row : row + 1] for gradient in gradients])
        sums = family(images, one, state)
        of_x, *others = _over_blocks(partial(sums.gradient, adjoint), one, numbers)
        found.append((sums.unpadded(of_x), *others))
    of_x, of_alpha, of_sigma = (torch.stack(parts) for parts in zip(*found, strict=True))
    return of_x.to(x), of_alpha.to(alpha), of_sigma.to(sigma)


def _one(query: PosteriorQuery, row: int) -> PosteriorQuery:
    rows = slice(row, row + 1)
    return replace(
        query,
        x=query.x[rows].detach().double(),
        alpha=query.alpha[rows].detach(),
        sigma=query.sigma[rows].detach(),
    )


@torch.no_grad()
def _state(images: Images, query: PosteriorQuery, members: Members) -> PosteriorState:
    """In float64: gradients are differences of weights that nearly cancel."""
    state = local_state if query.kind.is_local else image_state
    return state(images, query, members)


class _Adjoint(NamedTuple):
    """Gradients of the sums of one image: ``[H, W]``, ``[C, H, W]`` and ``[H, W]``."""

    mass: Tensor
    centre: Tensor
    logit_sum: Tensor


def _adjoint(state: PosteriorState, gradients: Sequence[Tensor]) -> _Adjoint:
    """Gradients of the sums from those of mean, log evidence and effective patches."""
    with torch.enable_grad():
        sums = [state.mass.clone().requires_grad_(), state.centre.clone().requires_grad_()]
        logit_sum = None if state.logit_sum is None else state.logit_sum.clone().requires_grad_()
        post = finish(
            replace(state, mass=sums[0], centre=sums[1], logit_sum=logit_sum), torch.float64
        )
        made = [post.mean, post.log_evidence]
        if logit_sum is not None and post.effective_patches is not None:
            sums.append(logit_sum)
            made.append(post.effective_patches)
        found = torch.autograd.grad(
            made, sums, [gradient.to(of) for gradient, of in zip(gradients, made, strict=True)]
        )
    of_logit_sum = found[2] if len(found) > 2 else torch.zeros_like(found[0])
    return _Adjoint(found[0][0], found[1][0], of_logit_sum[0])


def _over_blocks(
    function: Callable[[Members], Iterator[Any]], query: PosteriorQuery, members: Members
) -> Any:
    """Sums over all blocks of the members, in order; a tensor or a tuple of them."""
    _, channels, height, width = query.x.shape
    halo = query.patch_size - 1
    planes = 8 * channels + 8
    count = _BLOCK_BYTES // (8 * planes * (height + 2 * halo) * (width + 2 * halo))

    def added(first: Any, second: Any) -> Any:
        if isinstance(first, Tensor):
            return first + second
        return tuple(a + b for a, b in zip(first, second, strict=True))

    return merged_in_order(function, blocks(members, count), added, query.x.device)


def _decoded(images: Images, members: Members, device: torch.device) -> Tensor:
    return torch.from_numpy(images[members]).to(device, torch.float64) / 127.5 - 1


@final
class _Local:
    """Sums over the candidates of LS and ELS.

    Args:
        images: the whole database.
        query: one noisy image.
        state: over all candidates.
    """

    def __init__(self, images: Images, query: PosteriorQuery, state: PosteriorState) -> None:
        self._images, self._query = images, query
        self._reference, self._mass = state.reference[0], state.mass[0]
        self._mean = state.mean[0]
        self._alpha, self._sigma = float(query.alpha[0]), float(query.sigma[0])
        self._x = padded(query.x, query)[0]

    def gradient(
        self, adjoint: _Adjoint, members: Members
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Gradients of the padded x, alpha and sigma, through the logits of a block of members."""
        query, precision = self._query, self._sigma**-2
        size, mask = query.patch_size, query.kind.mask(query.patch_size)
        clean = _decoded(self._images, members, self._x.device)
        around = padded(clean, query)
        of_padded = torch.zeros_like(self._x)
        of_alpha, of_sigma = self._x.new_zeros(()), self._x.new_zeros(())
        for rows, columns in aligned(query):
            distances = patch_distances(self._x, self._alpha * around, rows, columns, mask)
            here = (rows.queries(), columns.queries())
            shifted = (-0.5 * precision * distances - self._reference[here]).clamp(max=0)
            centres = clean[:, :, rows.candidates(), columns.candidates()]
            of_logits = adjoint.mass[here] + (adjoint.centre[:, *here] * centres).sum(1)
            of_logits = shifted.exp() * (of_logits + adjoint.logit_sum[here] * (1 + shifted))
            # A pixel's gradient is a sum over the patches that contain it.
            spread = pad(of_logits, (size - 1,) * 4)
            spread = patch_sums(spread, mask[::-1, ::-1]).unsqueeze(1)
            down, right = rows.widened(size), columns.widened(size)
            k = around[:, :, down.candidates(), right.candidates()]
            x = self._x[:, down.queries(), right.queries()]
            moved = spread * (self._alpha * k - x)
            of_padded[:, down.queries(), right.queries()] += precision * moved.sum(0)
            of_alpha = of_alpha - precision * (moved * k).sum()
            of_sigma = of_sigma + precision / self._sigma * (of_logits * distances).sum()
            yield of_padded, of_alpha, of_sigma

    def variance(self, members: Members) -> Iterator[Tensor]:
        """A block's part of the variance of each pixel, ``[C, H, W]``."""
        query, precision = self._query, self._sigma**-2
        mask = query.kind.mask(query.patch_size)
        clean = _decoded(self._images, members, self._x.device)
        training = padded(self._alpha * clean, query)
        found = torch.zeros_like(self._mean)
        for rows, columns in aligned(query):
            distances = patch_distances(self._x, training, rows, columns, mask)
            here = (rows.queries(), columns.queries())
            shifted = (-0.5 * precision * distances - self._reference[here]).clamp(max=0)
            weights = (shifted.exp() / self._mass[here]).unsqueeze(1)
            centres = clean[:, :, rows.candidates(), columns.candidates()]
            found[:, *here] += (weights * (centres - self._mean[:, *here]).square()).sum(0)
            yield found

    def unpadded(self, gradient: Tensor) -> Tensor:
        """The gradient of x from that of the padded x."""
        with torch.enable_grad():
            x = torch.zeros_like(self._query.x, requires_grad=True)
            (found,) = torch.autograd.grad(padded(x, self._query), x, gradient.unsqueeze(0))
        return found[0]


@final
class _Whole:
    """Sums over the candidates of IS and ES, which all pixels share; arguments as of `_Local`."""

    def __init__(self, images: Images, query: PosteriorQuery, state: PosteriorState) -> None:
        self._images, self._query, self._x = images, query, query.x[0]
        self._reference, self._mass = state.reference[0, 0, 0], state.mass[0, 0, 0]
        self._mean = state.mean[0]
        self._alpha, self._sigma = float(query.alpha[0]), float(query.sigma[0])

    def gradient(
        self, adjoint: _Adjoint, members: Members
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `_Local.gradient`."""
        clean = _decoded(self._images, members, self._x.device)
        product, norms, logits = self._logits(clean)
        shifted = (logits - self._reference).clamp(max=0)
        of_logits = shifted.exp() * (
            adjoint.mass.sum()
            + self._products(adjoint.centre, clean)
            + adjoint.logit_sum.sum() * (1 + shifted)
        )
        precision, total = self._sigma**-2, of_logits.sum()
        of_x = precision * (self._alpha * self._combined(of_logits, clean) - total * self._x)
        of_alpha = precision * (of_logits * (product - self._alpha * norms)).sum()
        of_sigma = (of_logits * logits).sum() * (-2 / self._sigma)
        yield of_x, of_alpha, of_sigma

    def unpadded(self, gradient: Tensor) -> Tensor:
        """The same: whole images are not padded."""
        return gradient

    def variance(self, members: Members) -> Iterator[Tensor]:
        """As `_Local.variance`."""
        clean = _decoded(self._images, members, self._x.device)
        _, _, logits = self._logits(clean)
        weights = (logits - self._reference).clamp(max=0).exp() / self._mass
        first, second = (self._combined(weights, values) for values in (clean, clean.square()))
        yield second - 2 * self._mean * first + self._mean.square() * weights.sum()

    def _logits(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Products with x, squared norms, and logits, of each image and shift."""
        product = self._products(self._x, clean)
        norms = clean.square().sum((1, 2, 3)).reshape(-1, *[1] * (product.ndim - 1))
        distances = self._x.square().sum() - 2 * self._alpha * product + self._alpha**2 * norms
        return product, norms, distances / (-2 * self._sigma**2)

    def _products(self, x: Tensor, clean: Tensor) -> Tensor:
        """``sum_p x[p] k_n[p + s]``: ``[n]`` for IS, ``[n, H, W]`` for the shifts of ES."""
        if not self._query.kind.is_equivariant:
            return torch.einsum("chw,nchw->n", x, clean)
        spectrum = torch.fft.rfft2(x).conj() * torch.fft.rfft2(clean)
        products: Tensor = torch.fft.irfft2(spectrum.sum(1), s=x.shape[1:])
        return products

    def _combined(self, weights: Tensor, values: Tensor) -> Tensor:
        """``sum_{n, s} weights[n, s] values_n[p + s]``, ``[C, H, W]``."""
        if not self._query.kind.is_equivariant:
            return torch.einsum("n,nchw->chw", weights, values)
        spectrum = torch.fft.rfft2(weights).conj().unsqueeze(1) * torch.fft.rfft2(values)
        combined: Tensor = torch.fft.irfft2(spectrum.sum(0), s=values.shape[2:])
        return combined
