"""The import arrows: which package may import which, and what an import must not need."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    *("storage", "index", "triton_kernels", "engine", "runs"),
    *("explain", "networks", "cli", "bench"),
)
# What each package may import beside itself, whether when it is imported, within functions or under
# TYPE_CHECKING.
ALLOWED = {
    "storage": set(),
    "index": {"storage"},
    "triton_kernels": set(),
    "engine": {"index", "triton_kernels"},
    "runs": {"engine", "index", "storage"},
    "explain": {"runs", "engine", "index", "storage"},
    "networks": {"runs", "engine", "index", "storage"},
    "cli": {"bench", "networks", "explain", "runs", "engine", "index", "storage"},
    "bench": {"networks", "explain", "runs", "engine", "index", "triton_kernels", "storage"},
}
# The same within the engine: module or sub-package, and what it may import of the engine.
ALLOWED_IN_ENGINE = {
    "kinds": set(),
    "query": {"kinds"},
    "state": {"query"},
    "pictures": {"query"},
    "result": {"query", "state", "pictures"},
    "schedule": set(),
    "patch_sizes": {"schedule"},
    "progress": set(),
    "watching": set(),
    "sampler": {"schedule", "patch_sizes", "progress", "watching", "result", "devices"},
    "devices": set(),
    "mesh": {"state"},
    "backends": {"kinds", "query", "state", "mesh", "watching"},
    "approximate": {"backends.backend", "kinds", "query", "state", "result"},
    "gradients": {"kinds", "query", "state", "result", "backends"},
}
# Imports that go against the arrows: `python -m els.engine`, for torchrun, is the command line; a
# database builds and opens its indices.
EXCEPTIONS = {
    ("els.engine.__main__", "els.cli"),
    ("els.index.database", "els.index.patches.build"),
    ("els.index.database", "els.index.patches.files"),
    ("els.index.database", "els.index.patches.index"),
}
# Imported by the functions that need them: they are optional, or slow to import.
LAZY = {
    "index": {"datasets", "els.index.notebook_figure", "faiss", "PIL"},
    "engine": {"diffusers", "els.triton_kernels", "faiss", "rich", "triton"},
    "networks": {"diffusers", "matplotlib", "safetensors", "tensorboard", "wandb"},
    "storage": {"matplotlib"},
}
# torch itself probes for triton, so the engine has to do without both of them for good.
COLD_IMPORT = """
import sys
for name in ("faiss", "triton"):
    sys.modules[name] = None
import els.engine
from els.engine import ScoreMachine, sample
eager = {"matplotlib", "typer", "PIL", "rich", "datasets"} & set(sys.modules)
assert not eager, eager
"""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("els", *(part for part in parts if part != "__init__")))


MODULES = {
    module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}


@cache
def imported(path: Path) -> tuple[tuple[str, bool], ...]:
    """Every module that a file imports, with whether that happens when the file is imported."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[tuple[str, bool]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        eager = id(node) not in later
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                # What is imported may be a module or a name in one.
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else str(node.module)), eager


def arrows() -> Iterator[tuple[str, str]]:
    """Pairs of a module of the package and one that it imports, but for the exceptions."""
    for module, path in MODULES.items():
        for other, _ in imported(path):
            if other.split(".")[0] == "els" and (module, other) not in EXCEPTIONS:
                yield module, other


def lies_in(module: str, places: Iterable[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_what_is_below_them(package: str) -> None:
    allowed = {f"els.{name}" for name in (package, *ALLOWED[package])}
    wrong = [
        (module, other)
        for module, other in arrows()
        if lies_in(module, [f"els.{package}"]) and not lies_in(other, allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("part", ALLOWED_IN_ENGINE)
def test_modules_of_the_engine_import_what_is_below_them(part: str) -> None:
    allowed = {f"els.engine.{name}" for name in (part, *ALLOWED_IN_ENGINE[part])}
    wrong = [
        (module, other)
        for module, other in arrows()
        if lies_in(module, [f"els.engine.{part}"])
        and lies_in(other, ["els.engine"])
        and not lies_in(other, allowed)
    ]
    assert not wrong


def test_only_the_triton_backend_imports_the_kernels() -> None:
    users = {
        module
        for module, other in arrows()
        if lies_in(other, ["els.triton_kernels"])
        and not lies_in(module, ["els.triton_kernels", "els.bench"])
    }
    assert users == {"els.engine.backends.triton"}


def test_there_are_no_circles() -> None:
    """Modules whose imports are all removed are removed in turn, until none is left."""
    below = {module: {other for one, other in arrows() if one == module} for module in MODULES}
    while ready := [module for module, others in below.items() if not others & below.keys()]:
        for module in ready:
            del below[module]
    assert not below, {module: others & below.keys() for module, others in below.items()}


def test_every_exception_is_needed() -> None:
    found = {(module, other) for module, path in MODULES.items() for other, _ in imported(path)}
    assert found >= EXCEPTIONS


@pytest.mark.parametrize("package", LAZY)
def test_optional_packages_are_imported_lazily(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        for module, eager in imported(path):
            assert not (eager and lies_in(module, LAZY[package])), (
                f"{path} imports {module} at once"
            )


def test_the_engine_imports_cold() -> None:
    result = subprocess.run(
        [sys.executable, "-c", COLD_IMPORT], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
