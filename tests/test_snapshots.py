"""What users rely on is still there: public names, commands, and files of version 1.

``tests/snapshots`` holds the names and commands of version 0.1.0, and a database with indices and
runs that it wrote. Names and commands may be added, not lost; ``python tests/test_snapshots.py``
writes those of today. The files of ``v1`` are never written again.
"""

import dataclasses
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

SNAPSHOTS = Path(__file__).parent / "snapshots"
V1 = SNAPSHOTS / "v1"
ROOT = Path(__file__).parent.parent
MODULES = ("els.index", "els.engine")
# Named anew since version 0.1.0 (CHANGELOG.md).
RENAMED = {"maximum": "reference", "tilt": "logit_sum"}
# Options that mean something else since version 0.1.0 (CHANGELOG.md): steps count from the noise.
MEANT_ANEW = {("els explain", "step")}


def parameters(function: Any) -> list[list[str]]:
    """Name, kind and default of every parameter; none of what is written in C."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return []
    return [
        [parameter.name, parameter.kind.name, repr(parameter.default)]
        for parameter in signature.parameters.values()
    ]


def public_names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            entry: dict[str, Any] = {"parameters": parameters(value)}
            if inspect.isclass(value):
                members = {
                    member: getattr(value, member) for member in dir(value) if member[0] != "_"
                }
                entry["members"] = {
                    member: parameters(one) if callable(one) else None
                    for member, one in members.items()
                }
                if dataclasses.is_dataclass(value):
                    entry["fields"] = [field.name for field in dataclasses.fields(value)]
            found[f"{module.__name__}.{name}"] = entry
    return found


def default_of(parameter: Any) -> str:
    default = parameter.default
    return repr(default.value if isinstance(default, Enum) else default)


def choices_of(parameter: Any) -> list[str]:
    default = parameter.default
    return [member.value for member in type(default)] if isinstance(default, Enum) else []


def commands() -> dict[str, Any]:
    """Arguments and options of every command, by its words."""
    module = importlib.import_module("els.cli.app")
    found: dict[str, Any] = {}

    def walk(command: Any, words: str) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk(inner, f"{words} {name}")
            return
        found[words] = {
            parameter.name: {
                "spellings": sorted([*parameter.opts, *parameter.secondary_opts]),
                "required": parameter.required,
                "default": default_of(parameter),
                "choices": choices_of(parameter),
            }
            for parameter in command.params
        }

    walk(typer.main.get_command(module.command_line()), "els")
    return found


def snapshot(name: str) -> Any:
    return json.loads((SNAPSHOTS / f"{name}.json").read_text(encoding="utf-8"))


def missing_parameters(before: list[list[str]], now: list[list[str]]) -> list[Any]:
    """Parameters that are not where they were, and new ones that a call must give."""
    before = [[RENAMED.get(name, name), *rest] for name, *rest in before]
    kept = [each for each in now if each[0] in {name for name, *_ in before}]
    added = [each for each in now if each not in kept]
    required = [each for each in added if each[2].endswith("_empty'>") and "VAR" not in each[1]]
    return [*([] if kept == before else [before, kept]), *required]


def test_public_names_are_there() -> None:
    now = public_names()
    for name, before in snapshot("names").items():
        entry = now[name]
        assert not missing_parameters(before["parameters"], entry["parameters"]), name
        for member, of_before in before.get("members", {}).items():
            of_now = entry["members"].get(RENAMED.get(member, member), "lost")
            assert of_now != "lost", f"{name}.{member}"
            if of_before is not None:
                assert not missing_parameters(of_before, of_now), f"{name}.{member}"
        fields = [RENAMED.get(field, field) for field in before.get("fields", [])]
        assert entry.get("fields", [])[: len(fields)] == fields, name


def test_commands_and_options_are_there() -> None:
    now = commands()
    for words, before in snapshot("commands").items():
        for name, option in before.items():
            there = now[words][name]
            assert set(there["spellings"]) >= set(option["spellings"]), (words, name)
            assert set(there["choices"]) >= set(option["choices"]), (words, name)
            if (words, name) not in MEANT_ANEW:
                assert there["default"] == option["default"], (words, name)
            assert there["required"] <= option["required"], (words, name)
        assert not [
            name for name, option in now[words].items() if option["required"] and name not in before
        ]


def test_the_documentation_imports_what_there_is() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    pattern = re.compile(r"^\s*from (els[\w.]*) import ([\w, ]+)$", re.MULTILINE)
    found = [match for page in pages for match in pattern.findall(page.read_text("utf-8"))]
    assert found
    for module, names in found:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}: {name}"


def test_the_engine_is_a_program() -> None:
    """As torchrun starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "els.engine", "--help"], capture_output=True, check=False
    )
    assert done.returncode == 0


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """A copy of what version 1 wrote."""
    return shutil.copytree(V1, tmp_path / "v1")


IMAGES = (np.arange(12 * 36, dtype=np.int64).reshape(12, 1, 6, 6) * 37 % 251).astype(np.uint8)


def test_a_database_opens(v1: Path) -> None:
    from els.index import PatchDatabase

    db = PatchDatabase.open(v1 / "db")
    db.verify()
    np.testing.assert_array_equal(db.images, IMAGES)
    assert db.labels is not None
    assert db.labels.tolist() == [0, 1, 2] * 4
    assert db.class_names == ("a", "b", "c")


def test_indices_open(v1: Path) -> None:
    pytest.importorskip("faiss")
    from els.index import PatchDatabase

    db = PatchDatabase.open(v1 / "db")
    flat, lists = db.open_index(3), db.open_index(5)
    flat.verify()
    lists.verify()
    assert (flat.factory, flat.count, lists.factory, lists.count) == (
        *("Flat", 12 * 16),
        *("IVF1,SQ8_direct", 12 * 4),
    )
    assert lists.inverted is not None
    patch = IMAGES[7, :, 1:4, 2:5] / 127.5 - 1
    distances, addresses = flat.search(patch[None].astype(np.float32), 1)
    assert addresses.tolist() == [[7 * 36 + 2 * 6 + 3]]
    assert distances[0, 0] <= 1e-9


@pytest.mark.parametrize("run", ["run", "shards", "trajectory"])
def test_runs_are_read(v1: Path, run: str) -> None:
    from els.runs.export import merge_run
    from els.runs.folder import RunFolder, read_settings
    from els.runs.status import run_status

    settings = read_settings(v1 / run)
    assert (settings.n, settings.steps, settings.machine) == (3, 2, "ELS")
    status = run_status(v1 / run)
    assert status.finished == 3
    samples = np.stack([RunFolder(v1 / run).load(index) for index in range(3)])
    merge_run(v1 / run, v1 / "merged.npz")
    with np.load(v1 / "merged.npz") as merged:
        assert any(np.array_equal(merged[name], samples) for name in merged.files)
    np.testing.assert_array_equal(samples, np.load(V1 / "samples.npy"))


@pytest.mark.parametrize("run", ["run", "shards", "trajectory", "interrupted"])
def test_runs_go_on(v1: Path, run: str) -> None:
    """With the same settings, also from where they were interrupted, to the same samples."""
    from els.engine import ScoreMachine
    from els.index import PatchDatabase
    from els.runs.folder import RunFolder, read_sessions
    from els.runs.run import sample_run

    sessions = len(read_sessions(v1 / run))
    if run != "interrupted":
        (v1 / run / "grid.png").unlink()
    machine = ScoreMachine(PatchDatabase.open(v1 / "db"), "ELS", "zeros", backend="torch")
    trajectory = run == "trajectory"
    done = sample_run(machine, v1 / run, n=3, steps=2, patch_sizes=3, trajectory=trajectory)
    assert done.computed == (2 if run == "interrupted" else 0)
    assert len(read_sessions(v1 / run)) == sessions + 1
    samples = np.stack([RunFolder(v1 / run).load(index) for index in range(3)])
    # Float64 sums; processors and libraries round them in their own way.
    np.testing.assert_allclose(samples, np.load(V1 / "samples.npy"), atol=1e-5)


def files_of(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("."))


def json_keys(folder: Path) -> dict[str, list[str]]:
    """The keys of every JSON file and of the objects in it, as paths."""

    def keys(value: Any, path: str) -> list[str]:
        if isinstance(value, dict):
            inner = [key for name in value for key in keys(value[name], f"{path}/{name}")]
            return [*(f"{path}/{name}" for name in value), *inner]
        if isinstance(value, list) and value:
            return keys(value[0], f"{path}[]")
        return []

    return {
        name: sorted(set(keys(json.loads((folder / name).read_text("utf-8")), "")))
        for name in files_of(folder)
        if name.endswith(".json")
    }


def test_what_is_written_has_the_same_files_and_keys(v1: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    write_v1(tmp_path / "new")
    for folder in ("db", "run", "shards", "trajectory"):
        assert files_of(tmp_path / "new" / folder) == files_of(v1 / folder)
        now = json_keys(tmp_path / "new" / folder)
        for name, keys in json_keys(v1 / folder).items():
            # What a file says of FAISS's index may depend on the version of FAISS.
            assert set(now[name]) >= set(keys), (folder, name)
    for name in files_of(v1 / "db"):
        if name.endswith(".npy"):
            before, after = (np.load(each / "db" / name) for each in (v1, tmp_path / "new"))
            assert (before.dtype, before.shape) == (after.dtype, after.shape)


def write_v1(folder: Path) -> None:
    """A database with two indices, and runs of it, as version 1 wrote them."""
    from els.engine import ScoreMachine
    from els.index import PatchDatabase

    try:
        from els.runs.run import sample_run
    except ModuleNotFoundError:  # version 0.1.0
        from els.engine.runs import sample_run

    db = PatchDatabase.build(
        IMAGES, np.array([0, 1, 2] * 4), path=folder / "db", class_names=["a", "b", "c"]
    )
    db.build_index(3)
    db.build_index(5, factory="IVF1,SQ8_direct")
    machine = ScoreMachine(db, "ELS", "zeros", backend="torch")
    settings = {"n": 3, "steps": 2, "patch_sizes": 3}
    sample_run(machine, folder / "run", **settings)
    sample_run(machine, folder / "shards", **settings, shard_size=2)
    sample_run(machine, folder / "trajectory", **settings, trajectory=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, content in (("names", public_names()), ("commands", commands())):
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        (SNAPSHOTS / f"{name}.json").write_text(text, encoding="utf-8")
