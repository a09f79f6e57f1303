"""The progress of `sample`: a function, a bar, or nothing."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from els.engine import ScoreMachine, sample
from els.index import PatchDatabase

IMAGES = np.random.default_rng(3).integers(0, 256, (6, 1, 6, 6), dtype=np.uint8)
MACHINE = ScoreMachine(PatchDatabase.from_arrays(IMAGES), "IS", backend="torch")
ARGUMENTS = {"n": 3, "steps": 2, "batch_size": 2}


def test_a_function_is_told_how_many_image_steps_are_done() -> None:
    told: list[tuple[int, int]] = []
    steps: list[int] = []
    images = sample(
        MACHINE,
        **ARGUMENTS,
        progress=lambda *done: told.append(done),
        callback=lambda state: steps.append(state.step),
    )
    assert told == [(2, 6), (4, 6), (5, 6), (6, 6)]
    assert steps == [2, 1, 2, 1]
    assert torch.equal(images, sample(MACHINE, **ARGUMENTS, progress=False))


def test_scripts_and_pipes_get_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sample(MACHINE, **ARGUMENTS)
    sample(MACHINE, **ARGUMENTS, progress=False)
    assert capsys.readouterr() == ("", "")
    sample(MACHINE, **ARGUMENTS, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "sampling" in err
    assert "100%" in err


@pytest.mark.parametrize(
    ("is_interactive", "is_terminal", "is_shown"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_an_interactive_python_on_a_terminal_gets_one(
    monkeypatch, capsys, is_interactive: bool, is_terminal: bool, is_shown: bool
) -> None:
    if is_interactive:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    sample(MACHINE, **ARGUMENTS)
    assert ("sampling" in capsys.readouterr().err) == is_shown


def test_a_notebook_gets_one(monkeypatch, capsys) -> None:
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    sample(MACHINE, **ARGUMENTS)
    assert "sampling" in capsys.readouterr().err


def test_a_notebook_without_widgets_gets_a_plain_one_and_no_warning(monkeypatch, capsys) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    sample(MACHINE, **ARGUMENTS, progress=True)
    assert "100%" in capsys.readouterr().err


def test_without_rich_only_an_explicit_bar_is_refused(monkeypatch) -> None:
    for name in ("rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert sample(MACHINE, **ARGUMENTS).shape == (3, 1, 6, 6)
    with pytest.raises(RuntimeError, match="pip install rich"):
        sample(MACHINE, **ARGUMENTS, progress=True)


def test_anything_else_is_refused_before_any_work() -> None:
    with pytest.raises(TypeError, match="progress='yes' must be True, False, None"):
        sample(MACHINE, **ARGUMENTS, progress="yes")
