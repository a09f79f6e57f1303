"""Explanations of a sample: the training images and patches behind every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from els.engine.kinds import Boundary, kind_named


@dataclass(frozen=True)
class Contributor:
    """A training image that contributes to a sample.

    Attributes:
        image: its number in the database.
        share: of the sample: posterior weight of its patches, averaged over the pixels, 0 to 1.
    """

    image: int
    share: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """The posteriors behind one sample, step by step from noise to clean (S steps).

    Attributes:
        index: the sample's number in its run.
        kind: the machine.
        values: the sample, float32 ``[C, H, W]``, nominally in [-1, 1].
        step: the step that is looked at closely; steps count from 1, the noise, to S.
        sigma: standard deviation of the noise, float64 ``[S]``.
        patch_sizes: int64 ``[S]``; 0 for IS and ES, which compare whole images.
        effective_patches: exp(entropy of the weights), float32 ``[S, H, W]``.
        heaviest: image number and centre of every pixel's heaviest patch, ``(n, y, x)``, int64
            ``[S, H, W, 3]``.
        weights: at :attr:`step`, posterior weights of the k heaviest patches, best first, float32
            ``[H, W, k]``.
        sources: their image numbers, int64 ``[H, W, k]``; -1 where there are fewer than k.
    """

    index: int
    kind: str
    values: npt.NDArray[np.float32]
    step: int
    sigma: npt.NDArray[np.float64]
    patch_sizes: npt.NDArray[np.int64]
    effective_patches: npt.NDArray[np.float32]
    heaviest: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    sources: npt.NDArray[np.int64]

    def __repr__(self) -> str:
        side = "x".join(map(str, self.values.shape))
        return (
            f"Explanation(sample {self.index}, {self.kind}, {side}, {len(self.sigma)} steps, "
            f"step {self.step} closely, top {self.weights.shape[-1]})"
        )

    @property
    def row(self) -> int:
        """The row of :attr:`step` in the arrays."""
        return self.step - 1

    def offsets(self) -> npt.NDArray[np.int64]:
        """``(dy, dx)`` from every pixel to the centre of its heaviest patch, ``[S, H, W, 2]``.

        The shifts of whole images (ES) are cyclic: of the two ways round, the shorter.
        """
        sides = np.array(self.values.shape[1:])
        here = np.moveaxis(np.indices(self.values.shape[1:]), 0, -1)
        offsets: npt.NDArray[np.int64] = self.heaviest[..., 1:] - here
        kind = kind_named(self.kind)
        if kind.is_equivariant and not kind.is_local:
            offsets = (offsets + sides // 2) % sides - sides // 2
        return offsets

    def contributors(self) -> tuple[Contributor, ...]:
        """The training images among the heaviest patches at :attr:`step`, largest share first.

        Shares count the k heaviest patches of each pixel; what is missing to a sum of 1 is the
        mass beyond them.
        """
        there = self.sources >= 0
        numbers, places = np.unique(self.sources[there], return_inverse=True)
        pixels = self.values[0].size
        sums = np.bincount(places, self.weights[there]) / pixels
        order = np.argsort(-sums, kind="stable")
        return tuple(Contributor(int(numbers[i]), float(sums[i])) for i in order)


@dataclass(frozen=True, eq=False)
class Walkthrough:
    """The heaviest patches of every pixel of one sample, at S of the steps.

    Attributes:
        index: the sample's number in its run.
        kind: the machine.
        boundary: of the machine.
        values: the sample, float32 ``[C, H, W]``, nominally in [-1, 1].
        plan_steps: how many steps drew it.
        tolerance: of the posteriors that drew it; None for exact ones. With one, weights and
            effective patches are those posteriors' estimates, and the heaviest patches are of what
            they read or the index found.
        step: where to begin to look; one of :attr:`steps`.
        steps: which are kept, counting from 1, the noise, to :attr:`plan_steps`, int64 ``[S]``.
        sigma: standard deviation of the noise, float64 ``[S]``.
        patch_sizes: int64 ``[S]``; 0 for IS and ES, which compare whole images.
        noisy: x_t, float32 ``[S, C, H, W]``.
        predicted: posterior mean of the clean image, float32 ``[S, C, H, W]``.
        effective_patches: exp(entropy of the weights), float32 ``[S, H, W]``.
        weights: posterior weights of the k heaviest patches, best first, float32 ``[S, H, W, k]``.
        addresses: of their centres, ``(n * H + y) * W + x``, int64 ``[S, H, W, k]``; -1 where
            there are fewer than k.
    """

    index: int
    kind: str
    boundary: Boundary
    values: npt.NDArray[np.float32]
    plan_steps: int
    tolerance: float | None
    step: int
    steps: npt.NDArray[np.int64]
    sigma: npt.NDArray[np.float64]
    patch_sizes: npt.NDArray[np.int64]
    noisy: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.float32]
    effective_patches: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    addresses: npt.NDArray[np.int64]

    def __repr__(self) -> str:
        side = "x".join(map(str, self.values.shape))
        return (
            f"Walkthrough(sample {self.index}, {self.kind} {self.boundary}, {side}, "
            f"{len(self.steps)} of {self.plan_steps} steps, top {self.weights.shape[-1]})"
        )
