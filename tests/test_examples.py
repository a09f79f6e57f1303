"""The notebooks of examples/ run, are committed without what they print, and are on the site."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 5


@every_notebook
def test_it_is_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None, cell["id"]


@every_notebook
@pytest.mark.slow
def test_it_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    pytest.importorskip("nbconvert")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", str(path)]
    # Nothing is left behind where the user keeps what is theirs.
    places = {"TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"}
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)],
        env={**os.environ, **dict.fromkeys(places, str(tmp_path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("nbconvert")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "EXECUTE_EXAMPLES": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    commands = (tmp_path / "commands.html").read_text(encoding="utf-8")
    engine = (tmp_path / "reference" / "engine.html").read_text(encoding="utf-8")
    # Those of another distribution's entry point are there, too; and names that others import.
    assert 'id="els-sample"' in commands
    assert 'id="els-train"' in commands
    assert 'id="els.engine.ScoreMachine.posterior"' in engine
    for path in NOTEBOOKS:
        assert (tmp_path / "examples" / f"{path.stem}.html").exists()
    # It is complete without a network.
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text, page
        assert 'rel="stylesheet" href="http' not in text, page
