"""The compiled kernels (``csrc``): one module per instruction set."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Ints: TypeAlias = npt.NDArray[np.int64]
_Floats: TypeAlias = npt.NDArray[np.float32]
_Doubles: TypeAlias = npt.NDArray[np.float64]


class Kernels(Protocol):
    """The compiled module of one instruction set (``csrc/bindings.cpp``); arrays are C-contiguous.

    Shapes and dtypes are checked, never converted. Results are written to the last arrays.
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
        reference: _Doubles,
        mass: _Doubles,
        centre: _Doubles,
        logit_sum: _Doubles | None,
        top_logits: _Doubles | None,
        top_addresses: _Ints | None,
        progress: Callable[[int], object],
    ) -> None:
        """States of groups of images; see ``Problem`` of ``csrc/sweeps.h``.

        ``progress`` is called now and then with how many of the groups, times the batch, are done.
        """

    def weigh(
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
        """Logits of candidates by address; see ``Candidates`` of ``csrc/candidates.h``."""

    def sample_lists(
        self,
        *,
        data: _Bytes,
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
        """Sums over inverted lists; see ``ListSample`` of ``csrc/lists.h``."""

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
        reference: _Doubles,
        mass: _Doubles,
        centre: _Doubles,
        logit_sum: _Doubles,
    ) -> None:
        """States of the border's pixels; see ``Border`` of ``csrc/border.h``; needs AMX."""


@cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that were compiled and that this processor runs, worst first.

    Raises:
        RuntimeError: if the extension was not compiled.
    """
    supported = _module("baseline").instruction_sets()
    return tuple(name for name in supported if importlib.util.find_spec(_qualified(name)))


def is_compiled() -> bool:
    """Whether the extension was compiled."""
    return importlib.util.find_spec(_qualified("baseline")) is not None


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
