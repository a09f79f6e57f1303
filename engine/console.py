"""What the commands of ``els`` share: choices, errors as one message, tables, progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps
from typing import ParamSpec

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_Arguments = ParamSpec("_Arguments")


class BoundaryOption(StrEnum):
    """What is read beyond an image's border, by a machine or a convolution."""

    ZEROS = "zeros"
    CIRCULAR = "circular"


class ScheduleOption(StrEnum):
    """Noise over time."""

    COSINE = "cosine"
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


def reported(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Turns expected failures into one message and an exit code."""

    @wraps(command)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt as interruption:
            _fail("stopped", interruption)
            raise typer.Exit(130) from None
        except (ValueError, RuntimeError, OSError) as error:
            _fail(f"error: {error}", error)
            raise typer.Exit(1) from None

    return run


def print_table(table: Table) -> None:
    """A table to stdout, no cell cut."""
    # A pipe has no width: as wide as needed.
    width = None if sys.stdout.isatty() else 200
    Console(markup=False, highlight=False, width=width).print(table)


@contextmanager
def progress_bar(unit: str, *extra: TextColumn) -> Iterator[Progress]:
    """A progress bar on stderr: how many units of how many, and how long still."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn(unit),
        *extra,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        yield progress


def _fail(message: str, error: BaseException) -> None:
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        message = f"[rank {os.environ['RANK']}] {message}"
    typer.echo("\n".join([message, *getattr(error, "__notes__", [])]), err=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # torchrun's summary then shows this error in place of an exit code.
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
