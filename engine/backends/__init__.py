"""The backends, chosen by name; a backend's module is imported when it is chosen."""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal, TypeAlias

import torch

from els.engine.backends.backend import Backend
from els.engine.backends.native_kernels import is_compiled
from els.engine.kinds import Kind

BackendName: TypeAlias = Literal["auto", "native", "torch", "triton"]

__all__ = ["Backend", "BackendName", "choose"]

logger = logging.getLogger("els")


def choose(
    name: BackendName, kind: Kind, *, threads: int | None, device: str | None
) -> tuple[Backend, str]:
    """The backend of that name, in any case, and why it was chosen.

    A backend asked for by name runs or raises; only ``"auto"`` chooses: Triton where it and a CUDA
    or ROCm device are there, else native, else torch; torch also where the others do not compute
    the kind of machine.

    Raises:
        ValueError: for an unknown name, or a kind that the backend does not compute.
        RuntimeError: if the backend cannot run here; the message says what would help.
    """
    if name.lower() == "auto":
        backend, reason = _choose_automatically(threads, device)
        if not backend.supports(kind):
            reason = f"{backend.name} does not compute the window of kind {kind.name}"
            backend = _torch(str(backend.device))
        logger.info("backend %s: %s", backend.name, reason)
        return backend, reason
    match name.lower():
        case "native":
            backend = _native(threads)
        case "torch":
            backend = _torch(device or "cpu")
        case "triton":
            backend = _triton(device)
        case _:
            raise ValueError(
                f"backend={name!r} is not known; choose 'auto', 'native', 'torch' or 'triton', or "
                "give a Backend"
            )
    require_support(backend, kind)
    return backend, "asked for by name"


def require_support(backend: Backend, kind: Kind) -> None:
    """Check that a backend computes a kind of machine.

    Raises:
        ValueError: if it does not.
    """
    if not backend.supports(kind):
        raise ValueError(
            f"backend {backend.name} does not compute the window of kind {kind.name!r}; use "
            "backend='torch'"
        )


def _choose_automatically(threads: int | None, device: str | None) -> tuple[Backend, str]:
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    has_triton = importlib.util.find_spec("triton") is not None
    if wanted.type == "cuda" and torch.cuda.is_available() and has_triton:
        return _triton(str(wanted)), "a GPU and Triton are there"
    if wanted.type != "cpu" and device is not None:
        missing = "" if has_triton else " (pip install 'els-machine[gpu]' for kernels of its own)"
        return _torch(device), f"the queries live on {device}{missing}"
    if not is_compiled():
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
