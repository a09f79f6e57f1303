"""Devices by name, checked before any work, and how much memory there is."""

from __future__ import annotations

import os

import torch


def device_named(name: str | None) -> torch.device:
    """A device that torch can compute on; a GPU, if there is one, for None.

    Args:
        name: such as ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.

    Raises:
        ValueError: if it is not there; the message lists those that are.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # There and back: "meta" takes values and has none to give.
        torch.zeros(1, device=device).cpu()
    # Each kind of device that torch was built without has an exception of its own.
    except (AssertionError, AttributeError, ImportError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={name} is not here; choose one of {', '.join(_there())}"
        ) from error
    return device


def physical_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _there() -> list[str]:
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
