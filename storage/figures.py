"""Figures by matplotlib that do not depend on the user's settings, and whose failure stops no work.

MPLBACKEND, a matplotlibrc and a style in use are ignored: figures are drawn without pyplot, in
matplotlib's own default style, with text as it is (no TeX, no formulas).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from els.storage.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger("els")


def require_matplotlib() -> None:
    """Imports matplotlib, also where MPLBACKEND names a backend that is not there.

    Raises:
        ImportError: without matplotlib.
        OSError: if it finds no folder that it could write to.
    """
    if "matplotlib" in sys.modules:
        return
    # With an unknown backend the import of matplotlib fails, and a second import fails, too.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


@contextmanager
def neutral_style() -> Iterator[None]:
    """Matplotlib's default style inside; no warning of signs that its fonts do not have."""
    require_matplotlib()
    import matplotlib

    # The backend is not part of a style, and figures without pyplot do not ask for it.
    style = {name: matplotlib.rcParamsDefault[name] for name in matplotlib.rcParamsDefault}
    style.pop("backend", None)
    # A name that has dollar signs is no formula.
    style["text.parse_math"] = False
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def write_figure(
    draw: Callable[[], Figure],
    path: str | Path,
    *,
    dpi: int = 110,
    compression: Mapping[str, Any] | None = None,
) -> None:
    """Draws a figure in the default style and writes it, whole or not at all.

    Args:
        draw: makes the figure.
        path: where to; its suffix is the format, such as ``.png``, ``.pdf`` or ``.svg``.
        dpi: dots per inch.
        compression: options of the format that Pillow writes.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    with neutral_style(), atomic_file(path) as stream:
        # Formats that Pillow does not write know no such argument.
        options: dict[str, Any] = {"pil_kwargs": dict(compression)} if compression else {}
        figure = draw()
        _write_plain_numbers(figure)
        figure.savefig(stream, format=path.suffix[1:].lower(), dpi=dpi, **options)


def printable(words: str) -> str:
    """Words as fonts can show them: the name of a folder need not be valid text."""
    return words.encode("utf-8", "replace").decode("utf-8")


def _write_plain_numbers(figure: Figure) -> None:
    """Label logarithmic axes with numbers: matplotlib does with formulas, which are text here."""
    from matplotlib.ticker import LogFormatter, LogFormatterMathtext

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                axis.set_major_formatter("{x:g}")
            if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
                axis.set_minor_formatter(LogFormatter())


@contextmanager
def optional_picture(path: str | Path) -> Iterator[None]:
    """Context in which a picture of finished work is made: a failure is a warning.

    After a failure there is no picture at the path, not even one of an earlier state.
    """
    try:
        yield
    except Exception as error:  # Whatever matplotlib, fonts or the disk do: the work is done.
        with suppress(OSError):
            Path(path).unlink(missing_ok=True)
        reason = str(error).strip() or type(error).__name__
        _warn_once(f"warning: no picture {path}: {reason.splitlines()[0]}")


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)
