"""The parts that commands of ``els`` share: streams, choices, error messages, tables, bars."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import ParamSpec, get_type_hints

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Table
from rich.text import Text
from typer.models import OptionInfo

_Arguments = ParamSpec("_Arguments")

# Seconds whose work tells how long the rest takes: a step of a large image may take a minute.
_SPEED_SECONDS = 300.0
# Seconds between two lines of progress where there is no terminal.
_LOG_SECONDS = 30.0
# An argument of the library that has another name on the command line.
_SIZES = "patch_sizes"


class BoundaryOption(StrEnum):
    """Pixels beyond an image's border, for a machine or a convolution."""

    ZEROS = "zeros"
    CIRCULAR = "circular"


class ScheduleOption(StrEnum):
    """Noise over time."""

    COSINE = "cosine"
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


def prepare_streams() -> None:
    """Makes standard output and error accept every text, also where they are closed.

    Characters that their encoding lacks are written as escape sequences.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file that is opened would get this descriptor, and the output.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
        except BrokenPipeError:
            _discard_output()
            raise typer.Exit(1) from None
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            given = " ".join(map(str, kwargs.values()))
            message = in_options(_described(error), command, given)
            _fail(f"error: {_option_of(error, command, kwargs)}{message}", error)
            _discard_output()
            raise typer.Exit(1) from None

    return run


def print_table(table: Table) -> None:
    """A table to stdout, no cell cut."""
    # A pipe has no width: as wide as needed.
    width = None if sys.stdout.isatty() else 200
    Console(markup=False, highlight=False, width=width).print(table)


def counted(number: int, thing: str) -> str:
    """A number of things in words: ``1 sample``, ``1,024 samples``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def size_in_words(size: float) -> str:
    """A number of bytes: ``340 bytes``, ``12.5 kB``, ``1,024.0 MB``."""
    if size < 1e3:
        return counted(round(size), "byte")
    return f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """A time: ``0.12 s``, ``79 s``, ``12 min``, ``1.5 h``."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _Times(ProgressColumn):
    """``16 s elapsed, 79 s left``."""

    # Seconds between two estimates of the time left, which would flicker otherwise.
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """The times of a task; without an estimate, the time that has elapsed alone."""
        elapsed = task.finished_time if task.finished else task.elapsed
        words = f"{duration(round(elapsed or 0))} elapsed"
        if not task.finished and task.time_remaining is not None:
            words += f", {duration(round(task.time_remaining))} left"
        return Text(words, style="progress.remaining")


@contextmanager
def progress_bar(unit: str, *extra: TextColumn) -> Iterator[Progress]:
    """A progress bar on stderr: units done, units in all, time elapsed and left."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn(unit),
        *extra,
        _Times(),
        speed_estimate_period=_SPEED_SECONDS,
        console=Console(stderr=True),
    ) as progress:
        if progress.console.is_terminal:
            yield progress
            return
        # A log file has no bar that moves: a line now and then instead.
        stopped = threading.Event()
        log = threading.Thread(target=_logged, args=(progress, unit, stopped), daemon=True)
        log.start()
        try:
            yield progress
        finally:
            stopped.set()
            log.join()


def _logged(progress: Progress, unit: str, stopped: threading.Event) -> None:
    """Print how far the last of the tasks is, until stopped."""
    while not stopped.wait(_LOG_SECONDS):
        if progress.tasks:
            task = progress.tasks[-1]
            total = "" if task.total is None else f" of {task.total:,.0f}"
            elapsed = round(task.elapsed or 0.0)
            decimals = 0 if float(task.completed).is_integer() else 2
            typer.echo(
                f"{task.description}: {task.completed:,.{decimals}f}{total} {unit} "
                f"after {elapsed} s",
                err=True,
            )


@contextmanager
def counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function of the units done and in all."""
    with progress_bar(unit) as progress:
        task = progress.add_task("reading", total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def _described(error: Exception) -> str:
    """An error in words."""
    match error:
        case MemoryError():
            return f"not enough memory; free some, or ask for less at once. {error}".rstrip(". ")
        # As open and rename raise it: a number, a reason and a path.
        case OSError(filename=str() | bytes() | os.PathLike() as path, strerror=str() as reason):
            return f"{os.fsdecode(path)}: {reason}"
        case OSError(strerror=str() as reason):
            return reason
        case _:
            return str(error) or type(error).__name__


def _option_of(error: Exception, command: Callable[..., None], given: Mapping[str, object]) -> str:
    """The option whose file or folder the system refuses, as a prefix of the error; "" for none."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | os.PathLike):
        return ""
    refused = Path(os.fsdecode(error.filename)).absolute()
    for argument, option in _options(command).items():
        value = given.get(argument)
        if isinstance(value, Path):
            path = value.absolute()
            if (
                refused.is_relative_to(path)
                or path.is_relative_to(refused)
                or refused.parent == path.parent
            ):
                return f"{option} {value}: " if str(value) != error.filename else f"{option} "
    return ""


def _options(command: Callable[..., None]) -> dict[str, str]:
    """The option of each argument of a command that is given by one, such as ``--batch-size``."""
    found = {}
    for argument, hint in get_type_hints(command, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                # Typer takes the first declaration of an Annotated option for a default.
                declared = [
                    name
                    for name in (info.default, *(info.param_decls or ()))
                    if isinstance(name, str) and name.startswith("-")
                ]
                usual = "--" + argument.replace("_", "-")
                found[argument] = max(declared, key=len, default=usual)
    return found


def in_options(message: str, command: Callable[..., None], given: str) -> str:
    """A message of the library, with the command's options in place of the library's arguments.

    Args:
        message: names arguments as ``steps=3`` or, where they have an underscore, ``shard_size``.
        command: whose options they are.
        given: the values of the command's own arguments, in which nothing is replaced.
    """
    options = _options(command)
    for argument, option in options.items():
        is_sizes = argument == "sizes" and _SIZES not in options
        for name in (argument, _SIZES) if is_sizes else (argument,):
            message = _renamed(message, name, option, given)
    return message


def _renamed(message: str, name: str, option: str, given: str) -> str:
    # A word without an underscore may be just that word.
    value = r"(=True\b|=|\b)" if "_" in name else r"(=True\b|=)"
    if re.search(rf"\b{name}{value}", given):
        return message

    def as_option(found: re.Match[str]) -> str:
        # In "add limit= or ..." no value follows the argument.
        follows = message[found.end() : found.end() + 1].strip()
        return f"{option} " if found[1] == "=" and follows else option

    return re.sub(rf"(?<![\w/-]){name}{value}", as_option, message)


def _discard_output() -> None:
    """Discards output that cannot be written: a pipe without a reader, a full disk."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Python flushes once more when it ends.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(message: str, error: BaseException) -> None:
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        message = f"[rank {os.environ['RANK']}] {message}"
    # The reader of the messages may have closed them, too.
    with suppress(BrokenPipeError):
        typer.echo("\n".join([message, *getattr(error, "__notes__", [])]), err=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # torchrun's summary then shows this error in place of an exit code.
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
