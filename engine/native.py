"""The native backend: a fused C++ kernel for LS and ELS, one build per instruction set."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends import available_cores
from els.engine.posterior import (
    PosteriorQuery,
    PosteriorState,
    TopPatches,
    merge_all,
    stack,
    state_of,
)
from els.engine.whole_image import equivariant_state, ideal_state

# Groups of image blocks have states of their own, merged in order. How many there are depends on
# the database and the shape of one query, so that neither threads nor batches change any bit.
_MOST_GROUPS = 32
# Every group has to find the nearest patches anew before it can skip the others.
_LEAST_BLOCKS = 4
_STATES_BYTES = 64 << 20


@final
class NativeBackend:
    """Exact LS and ELS posteriors on the CPU (design, section 3); IS and ES through torch.

    Args:
        threads: how many to use; None for one per core that this process may run on.
        instruction_set: one of :func:`instruction_sets`; None for the best.

    Raises:
        RuntimeError: if the extension was not compiled, or the processor lacks the set.
    """

    def __init__(self, threads: int | None = None, instruction_set: str | None = None) -> None:
        chosen = instruction_set or instruction_sets()[-1]
        self._kernel = kernel_module(chosen)
        self._threads = threads or available_cores()
        self.name = f"native ({chosen}, {self._threads} threads)"
        self.device = torch.device("cpu")
        self.workers = self._threads

    def state(self, images: npt.NDArray[np.uint8], query: PosteriorQuery) -> PosteriorState:
        """See :class:`els.engine.backends.Backend`."""
        match query.kind:
            case "IS":
                return ideal_state(images, query)
            case "ES":
                return equivariant_state(images, query)
        _, channels, height, width = query.x.shape
        image_bytes = height * width * (8 * (3 + channels) + 16 * query.top)
        blocks = -(-len(query.members) // self._kernel.LANES)
        most = min(_STATES_BYTES // image_bytes, blocks // _LEAST_BLOCKS, _MOST_GROUPS)
        groups = max(1, most)
        chunk = max(1, _STATES_BYTES // (groups * image_bytes))
        states = [
            self._chunk_state(images, query, slice(start, start + chunk), groups)
            for start in range(0, len(query.x), chunk)
        ]
        return states[0] if len(states) == 1 else stack(states)

    def given(
        self, images: npt.NDArray[np.uint8], query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """See :class:`els.engine.backends.Backend`."""
        batch, channels, height, width = query.x.shape
        shape = (batch, height * width, addresses.shape[-1])
        logits = np.empty(shape)
        centres = np.empty((*shape, channels), dtype=np.uint8)
        self._kernel.given(
            images=images,
            x=query.x.to(torch.float64).contiguous().numpy(),
            alpha=query.alpha.numpy(),
            sigma=query.sigma.numpy(),
            patch_size=query.patch_size,
            circular=query.boundary == "circular",
            threads=self._threads,
            addresses=addresses.reshape(shape).contiguous().numpy(),
            logits=logits,
            centres=centres,
        )
        found = torch.from_numpy(logits).reshape(addresses.shape)
        bytes_ = torch.from_numpy(centres).reshape(*addresses.shape, channels)
        return state_of(found, bytes_.to(torch.float64) / 127.5 - 1), found

    def _chunk_state(
        self, images: npt.NDArray[np.uint8], query: PosteriorQuery, rows: slice, groups: int
    ) -> PosteriorState:
        x = query.x[rows]
        batch, channels, height, width = x.shape
        maximum = np.empty((groups, batch, height, width))
        mass = np.empty_like(maximum)
        centre = np.empty((groups, batch, channels, height, width))
        tilt = np.empty_like(maximum) if query.entropy else None
        top_shape = (groups, batch, height, width, query.top)
        top_logits = np.empty(top_shape) if query.top else None
        top_addresses = np.empty(top_shape, dtype=np.int64) if query.top else None
        self._kernel.posterior(
            images=images,
            members=query.members,
            x=x.to(torch.float32).contiguous().numpy(),
            alpha=query.alpha[rows].numpy(),
            sigma=query.sigma[rows].numpy(),
            patch_size=query.patch_size,
            equivariant=query.kind == "ELS",
            circular=query.boundary == "circular",
            border_only=query.border_only,
            threads=self._threads,
            maximum=maximum,
            mass=mass,
            centre=centre,
            tilt=tilt,
            top_logits=top_logits,
            top_addresses=top_addresses,
        )
        return merge_all(
            PosteriorState(
                torch.from_numpy(maximum[group]),
                torch.from_numpy(mass[group]),
                torch.from_numpy(centre[group]),
                None if tilt is None else torch.from_numpy(tilt[group]),
                None
                if top_logits is None or top_addresses is None
                else TopPatches(
                    torch.from_numpy(top_logits[group]), torch.from_numpy(top_addresses[group])
                ),
            )
            for group in range(groups)
        )


@cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that were compiled and that this processor runs, worst first.

    Raises:
        RuntimeError: if the extension was not compiled.
    """
    supported: list[str] = _module("baseline").instruction_sets()
    return tuple(name for name in supported if importlib.util.find_spec(_qualified(name)))


def kernel_module(instruction_set: str | None = None) -> ModuleType:
    """The compiled kernels of an instruction set, None for the best of :func:`instruction_sets`.

    Raises:
        RuntimeError: if they were not compiled, or the processor lacks the set.
    """
    available = instruction_sets()
    chosen = instruction_set or available[-1]
    if chosen not in available:
        raise RuntimeError(
            f"instruction set {chosen!r} cannot run here; available: {', '.join(available)}"
        )
    return _module(chosen)


def _module(instruction_set: str) -> ModuleType:
    try:
        return importlib.import_module(_qualified(instruction_set))
    except ImportError as error:
        raise RuntimeError(
            "the native backend was not compiled; reinstall els-machine where a C++17 compiler "
            "is found, or use backend='torch'"
        ) from error


def _qualified(instruction_set: str) -> str:
    return f"els.engine._native_{instruction_set}"
