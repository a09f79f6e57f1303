"""The question put to a backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from els.engine.kinds import Boundary, Kind
from els.index.statistics import Spectrum


@dataclass(frozen=True)
class PosteriorQuery:
    """A validated batch of noisy images, and what to compute for each of their pixels.

    Attributes:
        x: noisy images ``alpha * x0 + sigma * eps``, floating, ``[B, C, H, W]``.
        alpha: signal scale per image, float64 on the CPU, ``[B]``.
        sigma: noise standard deviation per image, float64 on the CPU, ``[B]``, > 0.
        kind: which machine.
        boundary: what a patch reads beyond the image's border; ignored where whole images are
            compared.
        patch_size: odd side P of the patch, 1 to the image's shorter side; 1 where whole images are
            compared.
        entropy: whether the state's ``logit_sum`` is wanted.
        top: how many of the heaviest candidates to return per pixel (0 for none).
        pixels: the pixels that are wanted, bool ``[H, W]``, None for all; the state of others may
            hold anything.
        logit_error: largest error that logits may have, such that a backend may take a faster
            kernel; 0 for exact ones.
        spectrum: of the images' covariance, where the kind's rule needs it.
        mask_threshold: of the rule ``local``: share of the largest entry from which a coordinate
            matters to another; 0 to weigh it by the entry itself.
    """

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    kind: Kind
    boundary: Boundary
    patch_size: int
    entropy: bool = False
    top: int = 0
    pixels: npt.NDArray[np.bool_] | None = None
    logit_error: float = 0.0
    spectrum: Spectrum | None = None
    mask_threshold: float = 0.0

    @property
    def machine(self) -> str:
        """The machine that is asked, in words: kind, boundary and patch size where they matter."""
        if not self.kind.is_local:
            return self.kind.name
        return f"{self.kind.name} {self.boundary} P={self.patch_size}"

    def __repr__(self) -> str:
        batch, *image = self.x.shape
        dtype = str(self.x.dtype).removeprefix("torch.")
        return (
            f"PosteriorQuery({self.machine}, {batch} images {'x'.join(map(str, image))}, {dtype})"
        )

    @property
    def has_border(self) -> bool:
        """Whether pixels near the border have candidates of their own (ELS, zeros beyond it)."""
        return self.kind.is_local and self.kind.is_equivariant and self.boundary == "zeros"

    @property
    def interior(self) -> npt.NDArray[np.bool_]:
        """Pixels but those with candidates of their own, bool ``[H, W]``."""
        height, width = self.x.shape[2:]
        radius = self.patch_size // 2 if self.has_border else 0
        inside = np.zeros((height, width), dtype=np.bool_)
        inside[radius : height - radius, radius : width - radius] = True
        return inside

    @property
    def pairs_per_image(self) -> int:
        """Candidates of an interior pixel in one image: the pairs that an image costs it."""
        if not self.kind.is_equivariant:
            return 1
        height, width = (length - self.patch_size + 1 for length in self.x.shape[2:])
        return int(height * width)

    @property
    def border_only(self) -> bool:
        """Whether only pixels near the border are wanted, and they have candidates of their own."""
        return self.has_border and self.pixels is not None and not self.pixels[self.interior].any()
