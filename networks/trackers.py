"""The loss of a training in TensorBoard or Weights & Biases, through their own libraries."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

Tracker: TypeAlias = Literal["tensorboard", "wandb"]

Log: TypeAlias = Callable[[int, float, float], None]
"""Called with the step, counted from 1, its loss and its learning rate."""

# What is imported for each, and the project that Weights & Biases shows trainings in.
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
_PROJECT = "els-machine"


def require_tracker(log: Tracker | None) -> None:
    """Fail before long work rather than at its first step.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the library is not installed.
    """
    if log is not None:
        _library(log)


@contextmanager
def tracked(
    log: Tracker | None, folder: Path, settings: Mapping[str, Any], done: int
) -> Iterator[Log]:
    """Context that gives what is to be called after every step.

    A training that resumes goes on in the same curve; what was logged of steps that were lost is
    replaced (TensorBoard) or stays (Weights & Biases).

    Args:
        log: which library; None for neither.
        folder: of the network; TensorBoard's files go into ``tensorboard/`` in it.
        settings: of the network and the training, plain values.
        done: steps that are done.

    Raises:
        ValueError, RuntimeError: as :func:`require_tracker`.
    """
    if log is None:
        yield lambda step, loss, rate: None
        return
    library = _library(log)
    if log == "tensorboard":
        writer = library.SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

        def write(step: int, loss: float, rate: float) -> None:
            writer.add_scalar("loss", loss, step)
            writer.add_scalar("learning rate", rate, step)

        try:
            yield write
        finally:
            writer.close()
        return
    # The same folder is the same training.
    name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "replace")).hexdigest()[:16]
    run = library.init(
        project=_PROJECT,
        name=folder.name,
        id=name,
        resume="allow",
        dir=str(folder),
        config=dict(settings),
    )
    try:
        yield lambda step, loss, rate: run.log({"loss": loss, "learning rate": rate}, step=step)
    finally:
        run.finish()


def _library(log: Tracker) -> Any:
    if log not in get_args(Tracker):
        raise ValueError(f"log={log!r} is not known; choose one of {', '.join(get_args(Tracker))}")
    try:
        return importlib.import_module(_MODULES[log])
    except ImportError as error:
        raise RuntimeError(
            f"log={log} needs {log}, which is not installed: pip install {log}"
        ) from error
