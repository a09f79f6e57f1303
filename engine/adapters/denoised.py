"""The part that the adapters share: the posterior mean of noisy images at a noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from els.engine.machines import ScoreMachine
from els.engine.patch_sizes import SizesByNoise, levels_of
from els.engine.result import require_tolerance
from els.engine.sampler import require_count, sizes_for_machine
from els.engine.schedule import Schedule
from els.engine.smoothed import SmoothedDenoiser

PatchSizes: TypeAlias = str | int | Sequence[int]


@final
class PosteriorMean:
    """The mean at any noise: chooses patch sizes, and computes the images of each size at once."""

    def __init__(
        self,
        machine: ScoreMachine | SmoothedDenoiser,
        patch_sizes: PatchSizes | None,
        labels: int | str | None,
        sizes_schedule: Schedule,
        tolerance: float | None,
        seed: int,
    ) -> None:
        if not isinstance(machine, ScoreMachine | SmoothedDenoiser):
            raise TypeError(
                "machine must be a ScoreMachine or a SmoothedDenoiser, got "
                f"{type(machine).__name__}"
            )
        if not isinstance(sizes_schedule, Schedule):
            raise TypeError(
                f"sizes_schedule must be a Schedule such as Cosine(), got {sizes_schedule!r}"
            )
        levels = 1 if patch_sizes is None else levels_of(patch_sizes)
        sizes = sizes_for_machine(machine, patch_sizes, levels)
        label: int | None = machine.db.class_numbers(labels)
        if label is not None:
            require_count("labels", label, 0, most=None)
            machine.db.class_members(label)
        if tolerance is not None:
            require_tolerance(tolerance)
        require_count("seed", seed, 0, most=None)
        self.machine = machine
        self._sizes = None if sizes is None else SizesByNoise(sizes, sizes_schedule)
        self._labels = label
        self._tolerance = tolerance
        self._seed = seed

    def __repr__(self) -> str:
        sizes = () if self._sizes is None else self._sizes.sizes
        parts = [repr(self.machine), *([f"P={' '.join(map(str, sizes))}"] if sizes else [])]
        parts += [f"label {self._labels}"] if self._labels is not None else []
        parts += [f"tolerance {self._tolerance:g}"] if self._tolerance is not None else []
        return ", ".join(parts)

    def __call__(self, x: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The mean ``[B, C, H, W]``, in the dtype of x; alpha and sigma are float64 ``[B]``."""
        given = self._labels if labels is None else labels
        if isinstance(given, Tensor) and given.ndim == 1 and len(given) != len(x):
            raise ValueError(f"class_labels has {len(given)} values; give [B] = [{len(x)}]")
        levels = list(zip(alpha.tolist(), sigma.tolist(), strict=True))
        sizes = [None if self._sizes is None else self._sizes.at(*level) for level in levels]
        if len(set(sizes)) == 1:
            return self._ask(x, alpha, sigma, sizes[0], given, range(len(x)))
        mean = torch.empty_like(x)
        for size in sorted(set(sizes), key=lambda size: size or 0):
            rows = [row for row, of_row in enumerate(sizes) if of_row == size]
            of_rows = given[rows] if isinstance(given, Tensor) and given.ndim == 1 else given
            mean[rows] = self._ask(x[rows], alpha[rows], sigma[rows], size, of_rows, rows)
        return mean

    def _ask(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        size: int | None,
        labels: int | Tensor | None,
        rows: Sequence[int],
    ) -> Tensor:
        approximation: dict[str, Any] = {}
        if self._tolerance is not None:
            seeds = [_seed_of(self._seed, row, float(sigma[i])) for i, row in enumerate(rows)]
            approximation = {"mode": "auto", "tolerance": self._tolerance, "seed": seeds}
        return self.machine.posterior(
            x,
            alpha=alpha,
            sigma=sigma,
            patch_size=size,
            labels=labels,
            entropy=False,
            **approximation,
        ).mean


def widened(x: Tensor) -> Tensor:
    """The same numbers in float64: x minus the mean may nearly cancel."""
    if not isinstance(x, Tensor):
        raise TypeError(f"the noisy images must be a tensor, got {type(x).__name__}")
    return x.double() if x.is_floating_point() else x


def one_per_image(argument: str, value: Tensor | float | int, batch: int) -> Tensor:
    """One number for all, or one per image, as float64 ``[B]`` on the CPU."""
    numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten()
    if len(numbers) not in (1, batch):
        raise ValueError(f"{argument} has {len(numbers)} values; give one, or [B] = [{batch}]")
    return numbers.expand(batch)


def _seed_of(seed: int, row: int, sigma: float) -> int:
    """A seed for each row and noise level, so that errors average out along a trajectory."""
    bits = int(np.float64(sigma).view(np.uint64))
    return int(np.random.SeedSequence([seed, row, bits]).generate_state(1, np.uint64)[0])
