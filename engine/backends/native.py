"""The native backend: fused C++ kernels for local machines, one build per instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends.backend import Costs, Images, Members
from els.engine.backends.cores import available_cores
from els.engine.backends.image_machines import image_state
from els.engine.backends.native_border import border_states, is_precise
from els.engine.backends.native_kernels import instruction_sets, kernel_module
from els.engine.backends.native_lists import ListSampling
from els.engine.kinds import Kind
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, TopPatches, merge_all, stack, state_of
from els.engine.watching import advance

# Largest number of groups of image blocks, which have states of their own and are merged in order.
# It depends on the database and the shape of a query alone, so that neither threads nor batches
# change bits.
_MOST_GROUPS = 32
# Fewest blocks of a group: each group finds the nearest patches anew before it can skip others.
_LEAST_BLOCKS = 4
# Memory for the states of all groups of a chunk of the batch, in bytes.
_STATES_BYTES = 64 << 20
# Costs of sampling lists, in pairs of the exact kernel: medians of six measurements on an AMD EPYC
# (AVX2), 5 to 18 for a list and 2 to 5 for a code (P = 3 to 7; 6,000 and 60,000 images of 28 x 28,
# 20,000 of 32 x 32 x 3, 3,722 of 64 x 64 x 3).
LIST_COSTS = Costs(list_ranked=9.0, code_read=3.0)
# Cost of a border pair on the matrix unit, in pairs of the exact kernel; fitted by hand to timings.
_PRODUCT_PAIR = 1.1
# Cost of an image that is read for few border pixels there, as a share of serving all; likewise.
_PRODUCT_IMAGE = 0.6
# Parts of a single group on the matrix unit, merged in order.
_PRODUCT_PARTS = 16


@final
class NativeBackend(ListSampling):
    """Exact LS and ELS posteriors on the CPU (docs/performance.md); IS and ES through torch.

    Float32 chooses the candidates that can matter, and weighs them where it knows their logits to
    1e-5; elsewhere float64 does, so that every noise level is exact.

    Args:
        threads: how many to use; None for one per core that this process may run on.
        instruction_set: one of :func:`instruction_sets`; None for the best.

    Raises:
        RuntimeError: if the extension was not compiled, or the processor lacks the set.
    """

    def __init__(self, threads: int | None = None, instruction_set: str | None = None) -> None:
        self._arguments = threads, instruction_set
        self._kernel = kernel_module(instruction_set)
        self.instruction_set = instruction_set
        self.threads = threads or available_cores()
        self.name = f"native ({instruction_set or instruction_sets()[-1]}, {self.threads} threads)"
        self.device = torch.device("cpu")

    def __reduce__(self) -> tuple[type[NativeBackend], tuple[int | None, str | None]]:
        return NativeBackend, self._arguments

    def supports(self, kind: Kind) -> bool:
        """See :class:`els.engine.backends.backend.Backend`."""
        return kind.window is None

    def costs(self, query: PosteriorQuery) -> Costs:
        """See :class:`els.engine.backends.backend.Backend`."""
        if self._multiplies(query):
            return replace(LIST_COSTS, border_pair=_PRODUCT_PAIR, border_image=_PRODUCT_IMAGE)
        return LIST_COSTS

    def _multiplies(self, query: PosteriorQuery) -> bool:
        """Whether border pixels with the query's logit error are computed on the matrix unit."""
        return self._kernel.can_use_tiles() and is_precise(query)

    def states(
        self, images: Images, query: PosteriorQuery, groups: Sequence[Members]
    ) -> list[PosteriorState]:
        """See :class:`els.engine.backends.backend.Backend`; all groups share the threads."""
        if not query.kind.is_local:
            return [image_state(images, query, group) for group in groups]
        if query.border_only and self._multiplies(query):
            return self._border_states(images, query, groups)
        _, channels, height, width = query.x.shape
        image_bytes = height * width * (8 * (3 + channels) + 16 * query.top)
        most = min(_STATES_BYTES // (image_bytes * len(groups)), _MOST_GROUPS)
        parts = [self._parts(len(group), most) for group in groups]
        chunk = max(1, _STATES_BYTES // (image_bytes * sum(map(len, parts))))
        members = np.concatenate(groups)
        starts = np.cumsum([0, *(size for sizes in parts for size in sizes)])
        chunks = [
            self._chunk_states(images, query, slice(start, start + chunk), members, starts)
            for start in range(0, len(query.x), chunk)
        ]
        whole = chunks[0] if len(chunks) == 1 else list(map(stack, zip(*chunks, strict=True)))
        of_parts = iter(whole)
        return [merge_all(islice(of_parts, len(sizes))) for sizes in parts]

    def _border_states(
        self, images: Images, query: PosteriorQuery, groups: Sequence[Members]
    ) -> list[PosteriorState]:
        """The border pixels by products; a single group in parts, for as many threads as asked."""
        if len(groups) > 1:
            return border_states(self._kernel, images, query, groups, threads=self.threads)
        parts = np.array_split(groups[0], _PRODUCT_PARTS)
        return [merge_all(border_states(self._kernel, images, query, parts, threads=self.threads))]

    def _parts(self, count: int, most: int) -> list[int]:
        """Sizes of the parts of a group of images that have states of their own."""
        blocks = -(-count // self._kernel.LANES)
        parts = max(1, min(most, blocks // _LEAST_BLOCKS))
        ends = [min(blocks * part // parts * self._kernel.LANES, count) for part in range(parts)]
        sizes: list[int] = np.diff([*ends, count]).tolist()
        return sizes

    def weigh(
        self, images: Images, query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """See :class:`els.engine.backends.backend.Backend`."""
        batch, channels, height, width = query.x.shape
        shape = (batch, height * width, addresses.shape[-1])
        logits = np.empty(shape)
        centres = np.empty((*shape, channels), dtype=np.uint8)
        self._kernel.weigh(
            images=images,
            x=_as_float64(query.x),
            alpha=query.alpha.numpy(),
            sigma=query.sigma.numpy(),
            patch_size=query.patch_size,
            circular=query.boundary == "circular",
            threads=self.threads,
            addresses=addresses.reshape(shape).contiguous().numpy(),
            logits=logits,
            centres=centres,
        )
        found = torch.from_numpy(logits).reshape(addresses.shape)
        bytes_ = torch.from_numpy(centres).reshape(*addresses.shape, channels)
        return state_of(found, bytes_.to(torch.float64) / 127.5 - 1), found

    def _chunk_states(
        self,
        images: Images,
        query: PosteriorQuery,
        rows: slice,
        members: Members,
        starts: npt.NDArray[np.int64],
    ) -> list[PosteriorState]:
        """The states of some of the queries over members ``starts[g]`` to ``starts[g + 1]``."""
        x = query.x[rows]
        batch, channels, height, width = x.shape
        groups = len(starts) - 1
        reference = np.empty((groups, batch, height, width))
        mass = np.empty_like(reference)
        centre = np.empty((groups, batch, channels, height, width))
        logit_sum = np.empty_like(reference) if query.entropy else None
        top_shape = (groups, batch, height, width, query.top)
        top_logits = np.empty(top_shape) if query.top else None
        top_addresses = np.empty(top_shape, dtype=np.int64) if query.top else None
        done = 0
        images_of_task = len(members) / groups

        def progress(tasks: int) -> None:
            nonlocal done
            advance((tasks - done) * images_of_task)
            done = tasks

        self._kernel.posterior(
            images=images,
            members=members,
            starts=starts,
            x=_as_float64(x),
            alpha=query.alpha[rows].numpy(),
            sigma=query.sigma[rows].numpy(),
            patch_size=query.patch_size,
            equivariant=query.kind.is_equivariant,
            circular=query.boundary == "circular",
            border_only=query.border_only,
            threads=self.threads,
            reference=reference,
            mass=mass,
            centre=centre,
            logit_sum=logit_sum,
            top_logits=top_logits,
            top_addresses=top_addresses,
            progress=progress,
        )
        progress(groups * batch)
        return [
            PosteriorState(
                torch.from_numpy(reference[group]),
                torch.from_numpy(mass[group]),
                torch.from_numpy(centre[group]),
                None if logit_sum is None else torch.from_numpy(logit_sum[group]),
                None
                if top_logits is None or top_addresses is None
                else TopPatches(
                    torch.from_numpy(top_logits[group]), torch.from_numpy(top_addresses[group])
                ),
            )
            for group in range(groups)
        ]


def _as_float64(x: Tensor) -> npt.NDArray[np.float64]:
    return x.to(torch.float64).contiguous().numpy()
