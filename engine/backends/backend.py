"""What every backend does: the contract between score machines and what computes for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.kinds import Kind
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState
from els.index.patches.lists import InvertedLists

Images = npt.NDArray[np.uint8]
Members = npt.NDArray[np.int64]

# Largest error of a logit that estimates may have: a weight is then known to 2 %, which is small
# beside the sampling errors of estimates.
ESTIMATE_LOGIT_ERROR = 0.02


@dataclass(frozen=True)
class Costs:
    """What work costs, in pairs of a pixel and a candidate of the backend's exact kernel.

    They are constants of the backend and of what the processor has, not measured when they are
    used: what is chosen by them depends on the input alone.

    Attributes:
        list_ranked: comparing a pixel with the centroid of an inverted list.
        code_read: weighing a code of a list; infinite where sampling lists does not pay.
        border_pair: a pair of a pixel near the border, with ``query.logit_error``.
        border_image: what an image costs that is read for a few border pixels, as a share of what
            it costs beside to serve all of them.
    """

    list_ranked: float = math.inf
    code_read: float = math.inf
    border_pair: float = 2.0
    border_image: float = 0.0


@dataclass(frozen=True, eq=False)
class ListQuery:
    """Q pixels of one noisy image, and the lists to sample for them.

    Attributes:
        lists: of an index.
        y: noisy patches over alpha in the codes' components, float32 ``[Q, D]``.
        rest: their squared distances from what components can say, float64 ``[Q]``.
        alpha: signal scale, > 0.
        sigma: noise standard deviation, > 0.
        share: of all codes, that a pixel reads at least, > 0, or of each pixel, ``[Q]``; 1 or more
            for everything.
        seed: of the blocks that are read, 0 to 2^64 - 1.
        allowed: by image, 1 for those whose patches count, uint8 ``[N]``; None for all.
        pixels: of an image.
    """

    lists: InvertedLists
    y: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float64]
    alpha: float
    sigma: float
    share: float | npt.NDArray[np.float64]
    seed: int
    allowed: npt.NDArray[np.uint8] | None = None
    pixels: int = 1


class Backend(Protocol):
    """Computes partial posterior states; trusts its inputs, which the machine has validated."""

    @property
    def name(self) -> str:
        """What ran, with its instruction set or device: ``native (avx512, 2 threads)``."""

    @property
    def device(self) -> torch.device:
        """Where queries must live."""

    @property
    def threads(self) -> int:
        """How many CPU threads work around the backend may use, such as searching an index."""

    @property
    def estimate_kernel(self) -> str:
        """The kernel of estimates, which a resumed run must have again; ``none`` for none."""

    def supports(self, kind: Kind) -> bool:
        """Whether the backend computes machines of a kind."""

    def costs(self, query: PosteriorQuery) -> Costs:
        """What answering a query by the methods that the backend has would cost."""

    def states(
        self, images: Images, query: PosteriorQuery, groups: Sequence[Members]
    ) -> list[PosteriorState]:
        """The posterior states over the patches of each of some groups of images.

        Args:
            images: the whole database, uint8 ``[N, C, H, W]``, possibly memory-mapped.
            query: what to compute; ``query.x`` is on :attr:`device`.
            groups: ascending image numbers of each group; a group may be empty.

        Returns:
            A state of each group, float64 on the CPU.
        """

    def weigh(
        self, images: Images, query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """The posterior state over given candidates of a local machine, and each one's logit.

        Args:
            images: the whole database.
            query: what to compute, exactly; its entropy, top, pixels and logit_error do not matter.
            addresses: of the candidates' centres, int64 ``[B, H, W, k]`` on the CPU, -1 for none.

        Returns:
            The state, with logit_sum and without top, and logits, ``[B, H, W, k]``, ``-inf`` for no
            candidate; float64 on the CPU.
        """

    def lists_obstacle(self, lists: InvertedLists, alpha: float, sigma: float) -> str | None:
        """Why :meth:`sample_lists` cannot serve this noise here; None where it can."""

    def sample_lists(self, query: ListQuery) -> PosteriorState:
        """The state of Q pixels, estimated from a sample of inverted lists' codes (docs/theory.md).

        Args:
            query: of lists for which there is no :meth:`lists_obstacle`.

        Returns:
            A state with ``B = 1, H = 1, W = Q`` and with ``sampling``. Pixels for which nothing was
            read, or whose sums float32 cannot hold, have no candidates.

        Raises:
            IndexError: the lists name an image that ``query.allowed`` does not have.
        """
