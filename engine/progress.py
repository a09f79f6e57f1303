"""A bar on standard error while images are drawn, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], object]
"""Called with (image-steps done, image-steps in all)."""


@contextmanager
def shown(progress: bool | Progress | None, total: int) -> Iterator[Callable[[float, int], object]]:
    """Context that gives what is to be called as the work goes on.

    It takes image-steps done, whole or not, and in all; a function hears of whole ones alone.

    Args:
        progress: see :func:`els.engine.sample`.
        total: image-steps in all.

    Raises:
        TypeError: for anything else.
        RuntimeError: if a bar is asked for that cannot be drawn.
    """
    if progress is not None and not isinstance(progress, bool):
        if not callable(progress):
            raise TypeError(
                f"progress={progress!r} must be True, False, None, or a function of (done, total)"
            )
        tell = progress
        yield lambda done, total: tell(done, total) if isinstance(done, int) else None
        return
    if progress is False or (progress is None and not _is_watched()):
        yield lambda done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError as error:
        if progress is None:
            yield lambda done, total: None
            return
        raise RuntimeError(
            "progress=True draws a bar with rich: pip install rich, or give a function of "
            "(done, total)"
        ) from error
    # Without its widgets rich would warn at every call, in place of a bar.
    has_widgets = find_spec("ipywidgets") is not None
    console = Console(stderr=True, force_jupyter=None if has_widgets else False)
    with Bar(console=console) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _is_watched() -> bool:
    """Whether this is a notebook, or an interactive Python on a terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        return True
    is_interactive = shell is not None or hasattr(sys, "ps1") or bool(sys.flags.interactive)
    return is_interactive and sys.stderr is not None and sys.stderr.isatty()
