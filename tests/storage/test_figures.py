"""Drawings: whatever the user's settings of matplotlib are, and whatever goes wrong."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from els.storage.figures import neutral_style, optional_picture, write_figure

COMMANDS = """
import sys
from typer.testing import CliRunner
from els.cli.app import command_line
for arguments in (
    "build images.npz -o db",
    "train db -o net --steps 2 --channels 4",
    "calibrate db net --steps 2 --seeds 1 --sizes 1,3 -o sizes.json",
    "evaluate db net --sizes sizes.json -n 2 -o evaluation",
    "bench db --noise 0.5:3 --no-baselines -n 1 -o bench",
    "sample db --sizes 3 --steps 2 -n 1 -o run --trajectory",
    "grid run -o grid.pdf --nearest",
    "trajectory run --sample 0 -o movie.webp",
    "explain run --sample 0",
    "explain run --sample 0 -o explained.svg",
    "explain run --sample 0 --html",
):
    done = CliRunner().invoke(command_line(), arguments.split(), catch_exceptions=False)
    sys.stderr.write(done.stderr)
    assert done.exit_code == 0, (arguments, done.output)
"""
PICTURES = (
    "net/loss.png",
    "sizes.png",
    "evaluation/scatter.png",
    "evaluation/grid.png",
    "bench/pareto.png",
    "grid.pdf",
    "movie.webp",
    "run/explain-000000-step02.png",
    "explained.svg",
    "run/explain-000000.html",
)


def test_settings_of_the_user_stop_nothing(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    # Signs that the font lacks, a formula that is none, and a folder's name that is not text.
    names = ["\u65e5\u672c", "$\\nonsense{$"]
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(6) % 2, class_names=names)
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.family: no-such-font\nfigure.dpi: 7000\nnonsense: nonsense\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMMANDS],
        cwd=tmp_path,
        env={
            **os.environ,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MPLCONFIGDIR": "/dev/null/nowhere",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [name for name in PICTURES if not (tmp_path / name).exists()] == []
    assert "no picture" not in done.stderr
    assert "Glyph" not in done.stderr


@pytest.mark.parametrize("backend", ["module://no_such_module", "nonsense", "svg"])
def test_any_backend_may_be_asked_for_and_stays_asked_for(tmp_path: Path, backend: str) -> None:
    code = """
import os, sys
from els.storage.figures import write_figure
def draw():
    from matplotlib.figure import Figure
    figure = Figure()
    figure.subplots().plot([1, 2])
    return figure
write_figure(draw, "a.png")
assert os.environ["MPLBACKEND"] == sys.argv[1]
assert "matplotlib.pyplot" not in sys.modules
if sys.argv[1] != "nonsense":
    import matplotlib
    assert matplotlib.rcParams["backend"] == sys.argv[1]
"""
    done = subprocess.run(
        [sys.executable, "-c", code, backend],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()


def figure() -> Figure:
    drawn = Figure(figsize=(2, 2))
    drawn.subplots().set_title("title")
    return drawn


def test_a_style_in_use_changes_nothing_and_is_kept(tmp_path: Path) -> None:
    write_figure(figure, tmp_path / "a.png")
    with matplotlib.rc_context({"axes.facecolor": "red", "savefig.dpi": 10, "font.size": 30}):
        write_figure(figure, tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        assert np.array_equal(first, second)


def test_the_style_is_restored_after_an_error() -> None:
    with matplotlib.rc_context({"font.size": 30}):
        with pytest.raises(KeyError), neutral_style():
            raise KeyError
        assert matplotlib.rcParams["font.size"] == 30


def test_a_picture_that_fails_is_one_warning_and_no_file(tmp_path: Path, caplog) -> None:
    def fail() -> Figure:
        raise RuntimeError("no font\nat all")

    (tmp_path / "a.png").write_text("an earlier state")
    for _ in range(2):
        with optional_picture(tmp_path / "a.png"):
            write_figure(fail, tmp_path / "a.png")
    assert caplog.messages == [f"warning: no picture {tmp_path / 'a.png'}: no font"]
    assert list(tmp_path.iterdir()) == []
    with optional_picture(tmp_path / "no" / "a.png"):
        write_figure(figure, tmp_path / "no" / "a.png")
    assert "no/a.png" in caplog.messages[-1]


@pytest.mark.parametrize("span", [(1e-5, 1e2), (2.0, 7.0)], ids=["decades", "within-one"])
def test_logarithmic_axes_have_numbers(tmp_path: Path, span: tuple[float, float]) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot(span, span)
    axes.set(xscale="log", yscale="log")
    write_figure(lambda: figure, tmp_path / "f.png")
    labels = [axes.get_xticklabels(which=which) for which in ("major", "minor")]
    texts = [label.get_text() for both in labels for label in both]
    assert any(texts)
    assert not any("$" in text for text in texts)
