"""The package as others install it: what is in it, what it needs, that it works from elsewhere."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
# Sampling must need none of them; torch itself probes for triton.
BLOCKED = ("datasets", "diffusers", "faiss", "matplotlib", "PIL", "pybind11", "rich", "safetensors")
NUMPY_AND_TORCH = f"""
import sys
for name in {(*BLOCKED, "triton", "typer", "yaml")!r}:
    sys.modules[name] = None
import numpy as np
from els.engine import ScoreMachine, sample
from els.index import PatchDatabase
db = PatchDatabase.from_arrays(np.arange(5 * 36, dtype=np.uint8).reshape(5, 1, 6, 6))
for backend in ("torch", "auto"):
    machine = ScoreMachine(db, "ELS", "zeros", backend)
    assert sample(machine, n=2, steps=2, patch_sizes=3).shape == (2, 1, 6, 6)
"""
EVERY_MODULE = """
import importlib, pkgutil, els
found = [module.name for module in pkgutil.walk_packages(els.__path__, "els.")]
for name in found:
    # The command line starts when these are imported; kernels may lack their instruction set.
    if not name.endswith("__main__") and "._native_" not in name and ".triton" not in name:
        importlib.import_module(name)
print(len(found))
"""


def test_every_package_is_listed() -> None:
    folders = set(FOLDERS.values()) - {"root"}
    found = {
        ".".join(("els", *path.parent.relative_to(ROOT).parts))
        for folder in folders
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {"els", *found}
    for package, folder in FOLDERS.items():
        assert package == ("els" if folder == "root" else f"els.{folder}")
        assert (ROOT / folder / "py.typed").exists()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^FOLDERS := (.*)$", makefile, re.MULTILINE)
    assert listed
    assert set(listed[1].split()) == folders


def test_the_package_itself_is_light_and_names_its_packages() -> None:
    code = """
import sys, els
assert not {"torch", "numpy", "typer"} & set(sys.modules)
assert els.__version__ == "VERSION", els.__version__
assert dir(els) == ["__version__", "engine", "explain", "index", "networks", "runs"], dir(els)
assert els.engine.sample is els.engine.sampler.sample
try:
    els.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    code = code.replace("VERSION", PROJECT["project"]["version"])
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "els", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert PROJECT["project"]["version"] in done.stdout


@pytest.mark.parametrize("name", ["engine", "explain", "index", "networks", "runs"])
def test_packages_list_their_public_names(name: str) -> None:
    package = importlib.import_module(f"els.{name}")
    assert dir(package) == sorted(package.__all__)
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def test_the_engine_needs_numpy_and_torch_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NUMPY_AND_TORCH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def run(*command: object, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of what git knows, and the wheel made from it."""
    pytest.importorskip("build")
    pytest.importorskip("pybind11")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout of git")
    source = tmp_path_factory.mktemp("source") / "els-machine"
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, cwd=source)
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def clean_environment(folder: Path) -> Path:
    """A Python that has this one's packages, but for els."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    there = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # A .pth file of a folder that is added by another, such as an editable install's, is not read.
    (Path(there.strip()) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def install(distribution: Path, python: Path, **variables: str) -> None:
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"),
        *("--no-index", "--no-build-isolation", distribution),
        cwd=python.parent,
        **variables,
    )


def use(python: Path, folder: Path) -> str:
    """Build, sample and explain with the installed command; the backend that computed."""
    els = python.parent / "els"
    assert "site-packages" in run(
        python, "-c", "import els.engine; print(els.engine.__file__)", cwd=folder
    )
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    run(els, "build", "images.npy", "-o", "db", cwd=folder)
    run(els, "build", "embedded:fashion-mnist", "-o", "embedded", cwd=folder)
    run(els, "sample", "db", "-n", 1, "--steps", 2, "--sizes", 3, "-o", "run", cwd=folder)
    run(els, "explain", "run", "--sample", 0, "--html", "-o", "page.html", cwd=folder)
    run(els, "calibrate", "--help", cwd=folder)
    assert int(run(python, "-c", EVERY_MODULE, cwd=folder)) > 80
    return run(els, "status", "run", cwd=folder)


@pytest.mark.slow
def test_a_wheel_works_elsewhere(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    _, wheel = distributions
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("els/engine/_native_baseline.pyi", "els/explain/web/", "els/index/data/"):
        assert any(name.startswith(needed) for name in names), needed
    assert not any(name.startswith(("tests/", "docs/")) for name in names)
    python = clean_environment(tmp_path / "venv")
    install(wheel, python)
    status = use(python, tmp_path)
    compiled = any(name.startswith("els/engine/_native_baseline.cpython") for name in names)
    assert ("native" in status) == compiled


@pytest.mark.slow
def test_an_sdist_works_without_a_compiler(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    places = (*FOLDERS.values(), "tests", "docs", "examples")
    folders = tuple(f"{folder}/" for folder in places)
    missing = [name for name in tracked if name.startswith(folders) and name not in names]
    assert not [name for name in missing if not name.startswith("bench/")], missing
    python = clean_environment(tmp_path / "venv")
    install(sdist, python, CC="false", CXX="false")
    assert "torch" in use(python, tmp_path)
