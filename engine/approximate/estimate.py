"""An estimate of a posterior: its state and its uncertainty, and what all estimates start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends.backend import ESTIMATE_LOGIT_ERROR, Backend, Costs, Images, Members
from els.engine.kinds import Kind
from els.engine.query import PosteriorQuery
from els.engine.result import Uncertainty
from els.engine.state import PosteriorState, where
from els.index import PatchDatabase, PatchIndex

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Of numpy's independent streams of a seed. The order of the images in an index is that of seed 0,
# and must tell nothing of a subset: a search that is cut short finds patches of the first.
_STREAM = 1


@final
@dataclass(frozen=True)
class Estimate:
    """The estimated state of one image's posterior, on the CPU, and how far it may be off."""

    state: PosteriorState
    uncertainty: Uncertainty

    @classmethod
    def exact(cls, state: PosteriorState) -> Estimate:
        """That of an exact state."""
        return cls(state, Uncertainty.none(state.mass))

    @property
    def is_exact(self) -> bool:
        """Whether it is no estimate."""
        return self.uncertainty.kind == "exact"

    def errors(self) -> Array:
        """Expected absolute errors of the mean, ``[H, W]``."""
        errors: Array = self.uncertainty.expected[0].numpy()
        return errors

    def error(self, pixels: Mask | None = None) -> float:
        """The mean of :meth:`errors` over all pixels, or those of a mask ``[H, W]``."""
        errors = self.errors()
        return float((errors if pixels is None else errors[pixels]).mean())

    def is_known(self, pixels: Mask) -> bool:
        """Whether each of some pixels, ``[H, W]``, has candidates."""
        return bool(self.state.is_known[0].numpy()[pixels].all())

    def with_work(self, work: float, images: int | None = None) -> Estimate:
        """The same with another share of the exact work, and another number of images."""
        now = self.uncertainty
        images = now.images if images is None else images
        return replace(self, uncertainty=replace(now, work=work, images=images))

    def enlarged(self, factor: float) -> Estimate:
        """The same with errors times a factor."""
        now = self.uncertainty
        larger = replace(now, mean_error=factor * now.mean_error, typical=factor * now.typical)
        return replace(self, uncertainty=larger)

    def with_others(self, pixels: Mask, others: Estimate) -> Estimate:
        """This estimate at some pixels, ``[H, W]``, another elsewhere, under this one's mode."""
        condition = torch.from_numpy(pixels)
        mine, theirs = self.uncertainty, others.uncertainty
        uncertainty = replace(
            mine,
            omitted_mass=torch.where(condition, mine.omitted_mass, theirs.omitted_mass),
            mean_error=torch.where(condition, mine.mean_error, theirs.mean_error),
            typical=torch.where(condition, mine.typical, theirs.typical),
        )
        return Estimate(where(condition, self.state, others.state), uncertainty)


@dataclass(frozen=True)
class Situation:
    """What decides whether a method can be used for a query.

    Attributes:
        kind: of the machine.
        index: of the query's patch size; None if there is none.
        backend: that computes.
        alpha: signal scale per image, ``[B]``.
        sigma: noise standard deviation per image, ``[B]``.
    """

    kind: Kind
    index: PatchIndex | None
    backend: Backend
    alpha: Tensor
    sigma: Tensor


@final
class Problem:
    """One noisy image whose posterior is estimated, and what its estimates share.

    Args:
        backend: weighs candidates.
        db: the training images.
        index: of the query's patch size; None if there is none, or it does not serve the machine.
        query: one image, ``B = 1``.
        members: ascending image numbers whose patches are candidates.
        seed: of what is drawn: the same seed, the same result.

    Attributes:
        order: the members in a random order, of which every beginning has its share of every class.
        list_seed: of the sampling of lists.
    """

    def __init__(
        self,
        backend: Backend,
        db: PatchDatabase,
        index: PatchIndex | None,
        query: PosteriorQuery,
        members: Members,
        seed: Sequence[int],
    ) -> None:
        self.backend = backend
        self.db = db
        self.index = index
        # The logit sum costs little, and a state without it could not be scaled.
        self.query = replace(query, entropy=True, top=0)
        self._top = query.top
        self.members = members
        self.rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
        self.order = stratified(members, db.labels, self.rng)
        self.list_seed = int(self.rng.integers(1 << 63))
        self.alpha, self.sigma = float(query.alpha[0]), float(query.sigma[0])
        self.interior = query.interior

    @property
    def images(self) -> Images:
        """All training images, uint8 ``[N, C, H, W]``."""
        return self.db.images

    @property
    def has_border(self) -> bool:
        """Whether there are border pixels with candidates of their own."""
        return not bool(self.interior.all())

    @property
    def border_query(self) -> PosteriorQuery:
        """The question for the border pixels, of which an estimate will do."""
        return replace(self.query, pixels=~self.interior, logit_error=ESTIMATE_LOGIT_ERROR)

    @property
    def situation(self) -> Situation:
        """What decides which methods can be used."""
        query = self.query
        return Situation(query.kind, self.index, self.backend, query.alpha, query.sigma)

    @cached_property
    def costs(self) -> Costs:
        """What the backend's work costs, border pixels by :attr:`border_query`."""
        return self.backend.costs(self.border_query)

    @property
    def border_pairs(self) -> int:
        """Pairs of all border pixels with their candidates in one image."""
        rows, columns = (int((~self.interior).all(axis).sum()) for axis in (1, 0))
        height, width = self.interior.shape
        inside = height - rows, width - columns
        return int(rows * inside[1] ** 2 + columns * inside[0] ** 2 + rows * columns)

    @property
    def border_image_cost(self) -> float:
        """What an image costs a border pixel, in images of the exact kernel for another pixel."""
        pairs = self.border_pairs / int((~self.interior).sum())
        return self.costs.border_pair * pairs / self.query.pairs_per_image

    def exact(self) -> Estimate:
        """The exact posterior, with as many of its heaviest patches as the query asks for."""
        query = replace(self.query, top=self._top)
        return Estimate.exact(self.backend.states(self.images, query, [self.members])[0])

    def patches(self, pixels: Mask) -> npt.NDArray[np.float32]:
        """Noisy patches around some pixels, over alpha, ``[Q, C, P, P]``."""
        query = self.query
        radius, size = query.patch_size // 2, query.patch_size
        around = ((0, 0), (radius, radius), (radius, radius))
        x: Array = query.x[0].cpu().double().numpy() / self.alpha
        x = np.pad(x, around, "wrap" if query.boundary == "circular" else "constant")
        windows: Array = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
        return np.moveaxis(windows, 0, 2)[pixels].astype(np.float32)


def stratified(members: Members, labels: Members | None, rng: np.random.Generator) -> Members:
    """The members in a random order of which every beginning has its share of every class."""
    shuffled = rng.permutation(members)
    if labels is None:
        return shuffled
    classes = np.asarray(labels[shuffled])
    # Small integers are sorted by their digits, which is much faster.
    if len(classes) and classes.min() >= 0 and classes.max() < 1 << 15:
        classes = classes.astype(np.int16)
    by_class = np.argsort(classes, kind="stable")
    _, starts, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
    rank = np.empty(len(members))
    rank[by_class] = np.arange(len(members)) - np.repeat(starts, counts)
    size = np.empty(len(members))
    size[by_class] = np.repeat(counts, counts)
    return shuffled[np.argsort((rank + rng.random(len(members))) / size)]
