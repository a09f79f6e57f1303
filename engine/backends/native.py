"""The native backend: a fused C++ kernel for LS and ELS, one build per instruction set."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Protocol, TypeAlias, cast, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends.cores import available_cores
from els.engine.backends.image_machines import equivariant_state, ideal_state
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, TopPatches, merge_all, stack, state_of

# Groups of image blocks have states of their own, merged in order. How many there are depends on
# the database and the shape of one query, so that neither threads nor batches change any bit.
_MOST_GROUPS = 32
# Every group has to find the nearest patches anew before it can skip the others.
_LEAST_BLOCKS = 4
_STATES_BYTES = 64 << 20

_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Ints: TypeAlias = npt.NDArray[np.int64]
_Floats: TypeAlias = npt.NDArray[np.float32]
_Doubles: TypeAlias = npt.NDArray[np.float64]


class Kernels(Protocol):
    """The compiled module of one instruction set (``csrc/bindings.cpp``); arrays are C-contiguous.

    Shapes and dtypes are checked, never converted. Results go into the arrays given last.
    """

    @property
    def LANES(self) -> int:  # noqa: N802 - a constant of the module
        """Training images that are computed at once."""

    def instruction_sets(self) -> list[str]:
        """The sets that this processor runs, worst first; asked of the baseline module only."""

    def can_use_tiles(self) -> bool:
        """Whether there is a matrix unit (AMX) that this process may use."""

    def posterior(
        self,
        *,
        images: _Bytes,
        members: _Ints,
        starts: _Ints,
        x: _Doubles,
        alpha: _Doubles,
        sigma: _Doubles,
        patch_size: int,
        equivariant: bool,
        circular: bool,
        border_only: bool,
        threads: int,
        maximum: _Doubles,
        mass: _Doubles,
        centre: _Doubles,
        tilt: _Doubles | None,
        top_logits: _Doubles | None,
        top_addresses: _Ints | None,
    ) -> None:
        """States of groups of images; see ``Problem`` of ``csrc/exact.h``."""

    def given(
        self,
        *,
        images: _Bytes,
        x: _Doubles,
        alpha: _Doubles,
        sigma: _Doubles,
        patch_size: int,
        circular: bool,
        threads: int,
        addresses: _Ints,
        logits: _Doubles,
        centres: _Bytes,
    ) -> None:
        """Logits of given candidates; see ``GivenProblem`` of ``csrc/candidates.h``."""

    def scan(
        self,
        *,
        codes: npt.NDArray[np.uint64],
        ids: npt.NDArray[np.uint64],
        sizes: _Ints,
        offsets: _Ints,
        centroids: _Floats,
        norms: _Floats,
        centres: _Bytes,
        unit: _Floats,
        zero: _Floats,
        residual: bool,
        noise: _Floats | None,
        allowed: _Bytes | None,
        pixels: int,
        y: _Floats,
        precision: float,
        blur: float,
        budget: _Doubles,
        most_read: int,
        coarsest: int,
        seed: int,
        tiles: bool,
        threads: int,
        results: _Doubles,
    ) -> None:
        """Sums over inverted lists; see ``Scan`` of ``csrc/lists.h``."""

    def border(
        self,
        *,
        images: _Bytes,
        members: _Ints,
        starts: _Ints,
        x: _Floats,
        wanted: _Bytes,
        alpha: float,
        sigma: float,
        patch_size: int,
        threads: int,
        maximum: _Doubles,
        mass: _Doubles,
        centre: _Doubles,
        tilt: _Doubles,
    ) -> None:
        """States of the border's pixels; see ``Border`` of ``csrc/border.h``; needs AMX."""


@final
class NativeBackend:
    """Exact LS and ELS posteriors on the CPU (docs/performance.md); IS and ES through torch.

    Float32 chooses the candidates that can matter, and weighs them where it knows their logits to
    1e-5; elsewhere float64 does, so that any noise will do.

    Args:
        threads: how many to use; None for one per core that this process may run on.
        instruction_set: one of :func:`instruction_sets`; None for the best.

    Raises:
        RuntimeError: if the extension was not compiled, or the processor lacks the set.
    """

    def __init__(self, threads: int | None = None, instruction_set: str | None = None) -> None:
        chosen = instruction_set or instruction_sets()[-1]
        self._arguments = threads, instruction_set
        self._kernel = kernel_module(chosen)
        self.threads = threads or available_cores()
        self.name = f"native ({chosen}, {self.threads} threads)"
        self.device = torch.device("cpu")
        self.shards = 1

    def __reduce__(self) -> tuple[type[NativeBackend], tuple[int | None, str | None]]:
        return NativeBackend, self._arguments

    def state(self, images: npt.NDArray[np.uint8], query: PosteriorQuery) -> PosteriorState:
        """See :class:`els.engine.backends.Backend`."""
        return self.states(images, query, [query.members])[0]

    def states(
        self,
        images: npt.NDArray[np.uint8],
        query: PosteriorQuery,
        groups: Sequence[npt.NDArray[np.int64]],
    ) -> list[PosteriorState]:
        """See :class:`els.engine.backends.Backend`; all groups share the threads."""
        if query.kind in ("IS", "ES"):
            of_whole_images = ideal_state if query.kind == "IS" else equivariant_state
            return [of_whole_images(images, replace(query, members=group)) for group in groups]
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

    def _parts(self, count: int, most: int) -> list[int]:
        """Sizes of the parts of a group of images that have states of their own."""
        blocks = -(-count // self._kernel.LANES)
        parts = max(1, min(most, blocks // _LEAST_BLOCKS))
        ends = [min(blocks * part // parts * self._kernel.LANES, count) for part in range(parts)]
        sizes: list[int] = np.diff([*ends, count]).tolist()
        return sizes

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
        images: npt.NDArray[np.uint8],
        query: PosteriorQuery,
        rows: slice,
        members: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
    ) -> list[PosteriorState]:
        """The states of some of the queries over members ``starts[g]`` to ``starts[g + 1]``."""
        x = query.x[rows]
        batch, channels, height, width = x.shape
        groups = len(starts) - 1
        maximum = np.empty((groups, batch, height, width))
        mass = np.empty_like(maximum)
        centre = np.empty((groups, batch, channels, height, width))
        tilt = np.empty_like(maximum) if query.entropy else None
        top_shape = (groups, batch, height, width, query.top)
        top_logits = np.empty(top_shape) if query.top else None
        top_addresses = np.empty(top_shape, dtype=np.int64) if query.top else None
        self._kernel.posterior(
            images=images,
            members=members,
            starts=starts,
            x=_as_float64(x),
            alpha=query.alpha[rows].numpy(),
            sigma=query.sigma[rows].numpy(),
            patch_size=query.patch_size,
            equivariant=query.kind == "ELS",
            circular=query.boundary == "circular",
            border_only=query.border_only,
            threads=self.threads,
            maximum=maximum,
            mass=mass,
            centre=centre,
            tilt=tilt,
            top_logits=top_logits,
            top_addresses=top_addresses,
        )
        return [
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
        ]


def _as_float64(x: Tensor) -> npt.NDArray[np.float64]:
    return x.to(torch.float64).contiguous().numpy()


@cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that were compiled and that this processor runs, worst first.

    Raises:
        RuntimeError: if the extension was not compiled.
    """
    supported = _module("baseline").instruction_sets()
    return tuple(name for name in supported if importlib.util.find_spec(_qualified(name)))


def kernel_module(instruction_set: str | None = None) -> Kernels:
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


def _module(instruction_set: str) -> Kernels:
    try:
        return cast(Kernels, importlib.import_module(_qualified(instruction_set)))
    except ImportError as error:
        raise RuntimeError(
            "the native backend was not compiled; reinstall els-machine where a C++17 compiler "
            "is found, or use backend='torch'"
        ) from error


def _qualified(instruction_set: str) -> str:
    return f"els.engine._native_{instruction_set}"
