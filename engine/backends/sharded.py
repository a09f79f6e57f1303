"""The sharded backend: every rank computes its images, and the states of all ranks are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from els.engine.backends.backend import Backend, Costs, Images, ListQuery, Members
from els.engine.kinds import Kind
from els.engine.mesh import ProcessMesh
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, SamplingSums, TopPatches, put, stack, take
from els.index.patches.lists import InvertedLists

# Pixels of one row or so, which a rank samples together: the kernels weigh up to so many at once.
_PIXELS_TOGETHER = 16


@final
class ShardedBackend:
    """A backend whose states are over one rank's images and merged with those of its group.

    Every rank of the group must ask the same questions in the same order.

    Args:
        inner: computes the states.
        mesh: of the ranks, S > 1.
    """

    def __init__(self, inner: Backend, mesh: ProcessMesh) -> None:
        self._inner = inner
        self._mesh = mesh
        self._whole: Images | None = None
        self._own: Images | None = None
        self.name = f"{inner.name}, the images on {mesh.database_shards} ranks"
        self.device = inner.device
        self.threads = inner.threads
        # Pixels that are sampled together share what they read, so the division matters.
        self.estimate_kernel = f"{inner.estimate_kernel}, {mesh.database_shards} shards"

    def supports(self, kind: Kind) -> bool:
        """See :class:`els.engine.backends.backend.Backend`."""
        return self._inner.supports(kind)

    def costs(self, query: PosteriorQuery) -> Costs:
        """See :class:`els.engine.backends.backend.Backend`; all of it is divided by S alike."""
        return self._inner.costs(replace(query, logit_error=0.0))

    def states(
        self, images: Images, query: PosteriorQuery, groups: Sequence[Members]
    ) -> list[PosteriorState]:
        """See :class:`els.engine.backends.backend.Backend`; all groups meet in one merge."""
        own, first = self._shard(images)
        mine = [_members_between(group, first, first + len(own)) for group in groups]
        # Products on a matrix unit would be of other bits than in a single process.
        states = self._inner.states(own, replace(query, logit_error=0.0), mine)
        merged = self._mesh.merge(_addressed(stack(states), first * _pixels(images)))
        rows = torch.arange(len(merged.mass), device="cpu").chunk(len(groups))
        return [take(merged, of_group) for of_group in rows]

    def weigh(
        self, images: Images, query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """See :class:`els.engine.backends.backend.Backend`."""
        own, first = self._shard(images)
        local = addresses - first * _pixels(images)
        is_own = (addresses >= 0) & (local >= 0) & (local < len(own) * _pixels(images))
        state, logits = self._inner.weigh(own, query, torch.where(is_own, local, -1))
        return self._mesh.merge(state), self._mesh.largest(logits)

    def lists_obstacle(self, lists: InvertedLists, alpha: float, sigma: float) -> str | None:
        """See :class:`els.engine.backends.backend.Backend`."""
        return self._inner.lists_obstacle(lists, alpha, sigma)

    def sample_lists(self, query: ListQuery) -> PosteriorState:
        """See :class:`els.engine.backends.backend.Backend`; every rank serves some of the pixels.

        Any list may be near any pixel, so that lists divided among the ranks would be read as
        unevenly as they are heavy.
        """
        pixels, mesh = np.arange(len(query.y)), self._mesh
        mine = np.flatnonzero(pixels // _PIXELS_TOGETHER % mesh.database_shards == mesh.shard)
        state = _unknown(len(pixels), query.lists.centres.shape[1])
        if len(mine):
            shares = np.broadcast_to(np.asarray(query.share, dtype=np.float64), len(pixels))
            few = replace(query, y=query.y[mine], rest=query.rest[mine], share=shares[mine])
            put(state, self._inner.sample_lists(few), torch.from_numpy(mine))
        return mesh.merge(state)

    def _shard(self, images: Images) -> tuple[Images, int]:
        """This rank's images, always as the same array, and the number of the first."""
        shard, shards = self._mesh.shard, self._mesh.database_shards
        first, stop = (len(images) * i // shards for i in (shard, shard + 1))
        if self._own is None or self._whole is not images:
            self._whole, self._own = images, images[first:stop]
        return self._own, first


def _unknown(pixels: int, channels: int) -> PosteriorState:
    """The state of pixels for which nothing was sampled, ``H = 1``."""

    def zeros(*planes: int) -> Tensor:
        return torch.zeros(1, *planes, 1, pixels, dtype=torch.float64, device="cpu")

    return PosteriorState(
        torch.full_like(zeros(), -torch.inf),
        zeros(),
        zeros(channels),
        zeros(),
        sampling=SamplingSums(zeros(), zeros(1 + 2 * channels)),
    )


def _members_between(members: Members, first: int, stop: int) -> Members:
    """Those of some ascending image numbers that are in a shard, counted from its first."""
    start, end = np.searchsorted(members, [first, stop])
    return members[start:end] - first


def _addressed(state: PosteriorState, offset: int) -> PosteriorState:
    """The state of a shard with addresses in the whole database."""
    if state.top is None:
        return state
    addresses = state.top.addresses
    addresses = torch.where(addresses < 0, -1, addresses + offset)
    return replace(state, top=TopPatches(state.top.logits, addresses))


def _pixels(images: Images) -> int:
    return int(images.shape[2] * images.shape[3])
