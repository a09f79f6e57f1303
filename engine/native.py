"""The native backend: a fused C++ kernel for LS and ELS, one build per instruction set."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.posterior import (
    PosteriorQuery,
    PosteriorState,
    TopPatches,
    best,
    merge_all,
)
from els.engine.whole_image import equivariant_state, ideal_state

# Groups of image blocks have states of their own, merged in order: how many there are depends on
# the query alone, so that the bits of the result do not depend on the number of threads.
_MOST_GROUPS = 32
_GROUP_STATES_BYTES = 64 << 20


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
        available = instruction_sets()
        chosen = instruction_set or available[-1]
        if chosen not in available:
            raise RuntimeError(
                f"instruction set {chosen!r} cannot run here; available: {', '.join(available)}"
            )
        self._kernel = _module(chosen)
        self._threads = threads or len(os.sched_getaffinity(0))
        self.name = f"native ({chosen}, {self._threads} threads)"
        self.device = torch.device("cpu")

    def state(self, images: npt.NDArray[np.uint8], query: PosteriorQuery) -> PosteriorState:
        """See :class:`els.engine.backends.Backend`."""
        match query.kind:
            case "IS":
                return ideal_state(images, query)
            case "ES":
                return equivariant_state(images, query)
        batch, channels, height, width = query.x.shape
        per_pixel = 8 * (3 + channels) + 16 * query.top
        groups = _GROUP_STATES_BYTES // (batch * height * width * per_pixel)
        blocks = -(-len(query.members) // self._kernel.LANES)
        groups = max(1, min(groups, blocks, _MOST_GROUPS))
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
            x=query.x.to(torch.float32).contiguous().numpy(),
            alpha=query.alpha.numpy(),
            sigma=query.sigma.numpy(),
            patch_size=query.patch_size,
            equivariant=query.kind == "ELS",
            circular=query.boundary == "circular",
            threads=self._threads,
            maximum=maximum,
            mass=mass,
            centre=centre,
            tilt=tilt,
            top_logits=top_logits,
            top_addresses=top_addresses,
        )
        tops: list[TopPatches | None] = [None] * groups
        if top_logits is not None and top_addresses is not None:
            tops = [
                best(_tensor(logits), _tensor(addresses), query.top)
                for logits, addresses in zip(top_logits, top_addresses, strict=True)
            ]
        return merge_all(
            PosteriorState(
                _tensor(maximum[group]),
                _tensor(mass[group]),
                _tensor(centre[group]),
                None if tilt is None else _tensor(tilt[group]),
                tops[group],
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


def _tensor(array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array)
