"""The sharded backend: every rank computes its images, and the states of all ranks are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends import Backend
from els.engine.mesh import ProcessMesh
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, TopPatches, empty, moved, stack, take


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
        self._whole: npt.NDArray[np.uint8] | None = None
        self._own: npt.NDArray[np.uint8] | None = None
        self.name = f"{inner.name}, the images on {mesh.database_shards} ranks"
        self.device = inner.device
        self.threads = inner.threads
        self.shards = mesh.database_shards

    def state(self, images: npt.NDArray[np.uint8], query: PosteriorQuery) -> PosteriorState:
        """See :class:`els.engine.backends.Backend`."""
        own, first = self._shard(images)
        members = _members_between(query.members, first, first + len(own))
        if len(members) == 0:
            return self._mesh.merge(moved(empty(query), self.device))
        state = self._inner.state(own, replace(query, members=members))
        return self._mesh.merge(_addressed(state, first * _pixels(images)))

    def states(
        self,
        images: npt.NDArray[np.uint8],
        query: PosteriorQuery,
        groups: Sequence[npt.NDArray[np.int64]],
    ) -> list[PosteriorState]:
        """See :class:`els.engine.backends.Backend`; all groups meet in one merge."""
        own, first = self._shard(images)
        mine = [_members_between(group, first, first + len(own)) for group in groups]
        together = stack(self._inner.states(own, query, mine))
        merged = self._mesh.merge(_addressed(together, first * _pixels(images)))
        rows = torch.arange(len(merged.maximum), device="cpu").chunk(len(groups))
        return [take(merged, of_group) for of_group in rows]

    def given(
        self, images: npt.NDArray[np.uint8], query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """See :class:`els.engine.backends.Backend`."""
        own, first = self._shard(images)
        local = addresses - first * _pixels(images)
        is_own = (addresses >= 0) & (local >= 0) & (local < len(own) * _pixels(images))
        state, logits = self._inner.given(own, query, torch.where(is_own, local, -1))
        return self._mesh.merge(state), self._mesh.largest(logits)

    def _shard(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], int]:
        """This rank's images, always as the same array, and the number of the first."""
        shard, shards = self._mesh.shard, self._mesh.database_shards
        first, stop = (len(images) * i // shards for i in (shard, shard + 1))
        if self._own is None or self._whole is not images:
            self._whole, self._own = images, images[first:stop]
        return self._own, first


def _members_between(
    members: npt.NDArray[np.int64], first: int, stop: int
) -> npt.NDArray[np.int64]:
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


def _pixels(images: npt.NDArray[np.uint8]) -> int:
    return int(images.shape[2] * images.shape[3])
