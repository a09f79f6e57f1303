"""The import arrow: who may import whom, and what `import els.engine` must not need."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "storage": {"els.storage"},
    "index": {"els.index", "els.storage"},
    "triton_kernels": {"els.triton_kernels"},
    "engine": {"els.engine", "els.index", "els.triton_kernels"},
    "networks": {"els.networks", "els.engine", "els.index"},
}
LAZY = {"diffusers", "faiss", "triton"}
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


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, package: str) -> Iterator[tuple[str, bool]]:
    """Every module imported, with whether that happens when the file is imported."""
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
            module = node.module or ""
            if node.level:
                # A file's package, its parent, and so on: els.<package>.<folders>.
                folders = ["els", package, *path.relative_to(ROOT / package).parts[:-1]]
                parent = folders[: len(folders) - node.level + 1]
                module = ".".join([*parent, *filter(None, [module])])
            if module == "els":
                yield from ((f"els.{alias.name}", eager) for alias in node.names)
            else:
                yield module, eager


@pytest.mark.parametrize("package", ALLOWED)
def test_the_import_arrow(package: str) -> None:
    for path in sources(package):
        for module, _ in imported(path, package):
            if module.split(".")[0] == "els":
                owner = ".".join(module.split(".")[:2])
                assert owner in ALLOWED[package], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("package", ["index", "engine"])
def test_optional_packages_are_imported_lazily(package: str) -> None:
    for path in sources(package):
        for module, eager in imported(path, package):
            lazy = module.split(".")[0] in LAZY or module.startswith("els.triton_kernels")
            assert not (lazy and eager), f"{path.relative_to(ROOT)} imports {module} at once"


def test_networks_import_their_extras_lazily() -> None:
    for path in sources("networks"):
        for module, eager in imported(path, "networks"):
            lazy = module.split(".")[0] in {"diffusers", "matplotlib", "safetensors"}
            assert not (lazy and eager), f"{path.relative_to(ROOT)} imports {module} at once"


def test_the_engine_imports_cold() -> None:
    result = subprocess.run(
        [sys.executable, "-c", COLD_IMPORT], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
