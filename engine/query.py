"""What is asked of a backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from els.engine.kinds import Boundary, Kind


@dataclass(frozen=True)
class PosteriorQuery:
    """A validated batch of noisy images and the candidates to weigh for each of their pixels.

    Attributes:
        x: noisy images ``alpha * x0 + sigma * eps``, floating, ``[B, C, H, W]``.
        alpha: signal scale per image, float64 on the CPU, ``[B]``.
        sigma: noise standard deviation per image, float64 on the CPU, ``[B]``, > 0.
        kind: which machine (docs/theory.md).
        boundary: what a patch reads beyond the image's border; ignored by IS and ES.
        patch_size: odd side P of the patch, 1 to the image's shorter side; ignored by IS and ES.
        members: ascending image numbers whose patches are candidates, int64 ``[M]``, M >= 1.
        entropy: whether the state's ``tilt`` is wanted.
        top: how many of the heaviest candidates to return per pixel (0 for none).
        border_only: with ELS and zeros beyond the border, only border pixels are wanted, those
            within P // 2 of an edge; others may get anything.
    """

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    kind: Kind
    boundary: Boundary
    patch_size: int
    members: npt.NDArray[np.int64]
    entropy: bool = False
    top: int = 0
    border_only: bool = False
