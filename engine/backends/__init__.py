"""The backends: one contract, one explicit match, imports only of what was chosen."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState

BackendName: TypeAlias = Literal["auto", "native", "torch", "triton"]

logger = logging.getLogger("els")


class Backend(Protocol):
    """Computes partial posterior states; trusts its inputs, which the machine has validated."""

    @property
    def name(self) -> str:
        """What ran, with its instruction set or device: ``native (avx512, 2 threads)``."""

    @property
    def device(self) -> torch.device:
        """Where queries must live and states are returned."""

    @property
    def threads(self) -> int:
        """How many CPU threads work around the backend may use, such as reading an index."""

    @property
    def shards(self) -> int:
        """Among how many processes, each of which asks the same, the images are divided."""

    def state(self, images: npt.NDArray[np.uint8], query: PosteriorQuery) -> PosteriorState:
        """The posterior state over the patches of ``images[query.members]``.

        Args:
            images: the whole database, uint8 ``[N, C, H, W]``, possibly memory-mapped.
            query: what to compute; ``query.x`` is on :attr:`device`.
        """

    def states(
        self,
        images: npt.NDArray[np.uint8],
        query: PosteriorQuery,
        groups: Sequence[npt.NDArray[np.int64]],
    ) -> list[PosteriorState]:
        """The posterior states over the patches of each of some groups of images.

        Args:
            images: the whole database.
            query: what to compute; its members do not matter.
            groups: ascending image numbers of each group; a group may be empty.

        Returns:
            A state of each group, on the CPU.
        """

    def given(
        self, images: npt.NDArray[np.uint8], query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """The posterior state over given candidates of LS or ELS, and each one's logit, exact.

        Args:
            images: the whole database.
            query: what to compute; its members, entropy and top do not matter.
            addresses: of the candidates' centres, int64 ``[B, H, W, k]``, -1 for none.

        Returns:
            The state, with tilt and without top, and logits, float64 ``[B, H, W, k]``, ``-inf``
            for no candidate.
        """


def choose(name: BackendName, *, threads: int | None, device: str | None) -> tuple[Backend, str]:
    """The backend of that name, and why it was chosen.

    A backend asked for by name runs or raises; only ``"auto"`` chooses: Triton where it and a CUDA
    or ROCm device are there, else native, else torch.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the backend cannot run here; the message says what would help.
    """
    match name:
        case "native":
            return _native(threads), "asked for by name"
        case "torch":
            return _torch(device or "cpu"), "asked for by name"
        case "triton":
            return _triton(device), "asked for by name"
        case "auto":
            backend, reason = _choose_automatically(threads, device)
            logger.info("backend %s: %s", backend.name, reason)
            return backend, reason
    raise ValueError(f"backend={name!r} is not known; choose 'auto', 'native', 'torch' or 'triton'")


def _choose_automatically(threads: int | None, device: str | None) -> tuple[Backend, str]:
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    has_triton = importlib.util.find_spec("triton") is not None
    if wanted.type == "cuda" and torch.cuda.is_available() and has_triton:
        return _triton(str(wanted)), "a GPU and Triton are there"
    if wanted.type != "cpu" and device is not None:
        missing = "" if has_triton else " (pip install 'els-machine[gpu]' for kernels of its own)"
        return _torch(device), f"the queries live on {device}{missing}"
    if importlib.util.find_spec("els.engine._native_baseline") is None:
        reason = "the compiled extension is missing (no C++ compiler at installation)"
        return _torch("cpu"), f"{reason}; reinstall with one for a kernel 20 times faster"
    return _native(threads), "the compiled kernel is the fastest on a CPU"


def _native(threads: int | None) -> Backend:
    from els.engine.backends.native import NativeBackend

    return NativeBackend(threads)


def _torch(device: str) -> Backend:
    from els.engine.backends.pytorch import TorchBackend

    return TorchBackend(device)


def _triton(device: str | None) -> Backend:
    from els.engine.backends.triton import TritonBackend

    return TritonBackend(device)
