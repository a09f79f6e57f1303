"""Score machines as the denoiser that EDM samplers call."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from els.engine.adapters.denoised import PatchSizes, PosteriorMean, one_per_image, widened
from els.engine.machines import ScoreMachine
from els.engine.schedule import Cosine, Schedule
from els.engine.smoothed import SmoothedDenoiser


@final
class EDMDenoiser:
    """A score machine as the denoiser ``D(x, sigma)`` of EDM (arXiv 2206.00364) and k-diffusion.

    ``x = x_0 + sigma * eps`` with ``x_0`` in [-1, 1]; ``D`` is the posterior mean of ``x_0``. It is
    what k-diffusion's samplers call ``model``, ``sample_euler(denoiser, x, sigmas)``, and EDM's
    ``net``. The patch size follows the noise as in :class:`ELSModel`. Autograd can follow the
    answer to ``x`` and ``sigma``, but not with a tolerance.

    Args:
        machine: as of :class:`ELSModel`; so are the others.
        patch_sizes: see there.
        labels: see there.
        sizes_schedule: see there.
        tolerance: see there.
        seed: see there.

    Attributes:
        sigma_min: least noise that a sampler may ask for: any above 0.
        sigma_max: largest noise that a sampler may ask for: any.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a value out of range.
    """

    sigma_min = 0.0
    sigma_max = float("inf")

    def __init__(
        self,
        machine: ScoreMachine | SmoothedDenoiser,
        patch_sizes: PatchSizes | None = None,
        *,
        labels: int | str | None = None,
        sizes_schedule: Schedule = Cosine(),  # noqa: B008 - frozen, as in els.engine.sample
        tolerance: float | None = None,
        seed: int = 0,
    ) -> None:
        self._posterior = PosteriorMean(
            machine, patch_sizes, labels, sizes_schedule, tolerance, seed
        )

    def __repr__(self) -> str:
        return f"EDMDenoiser({self._posterior!r})"

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The noise level nearest to ``sigma``: itself, since every number is one."""
        return torch.as_tensor(sigma, device=sigma.device if isinstance(sigma, Tensor) else "cpu")

    def __call__(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None
    ) -> Tensor:
        """The posterior mean of the clean images.

        Args:
            x: ``x_0 + sigma * eps``, floating, ``[B, C, H, W]``.
            sigma: one for all, or ``[B]``; > 0.
            class_labels: ints ``[B]``, or one-hot ``[B, number of classes]`` as EDM gives them.

        Returns:
            ``[B, C, H, W]`` in the dtype of ``x``.

        Raises:
            TypeError: for a wrong type.
            ValueError: for a wrong shape, or a value out of range.
        """
        wide = widened(x)
        levels = one_per_image("sigma", sigma, len(x))
        if isinstance(class_labels, Tensor) and class_labels.ndim == 2:
            class_labels = _from_one_hot(class_labels)
        mean = self._posterior(wide, torch.ones_like(levels), levels, class_labels)
        return mean.to(x.dtype)


def _from_one_hot(labels: Tensor) -> Tensor:
    if not bool(((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()):
        raise ValueError("class_labels [B, number of classes] must be one-hot: a single 1 a row")
    return labels.argmax(dim=1)
