"""``els doctor``: what it finds, also where things are missing, broken or wrong."""

import json
import sys
from pathlib import Path

import pytest
from commands import els

from els.cli import doctor


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examined()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TIMED_SECONDS", 0.0)


def test_it_says_what_is_there_and_checks_the_backend(quick: None) -> None:
    result = els("doctor")
    assert result.exit_code == 0, result.output
    for word in ("Python", "processor", "memory", "disk", "torch", "kernels", "GPU", "faiss"):
        assert f"\n{word} " in result.stdout
    assert "right: off by" in result.stdout
    assert "pairs of a pixel and a patch a second" in result.stdout


def test_its_json(quick: None) -> None:
    result = els("doctor", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert {"name", "found", "state", "remedy"} == set(content["findings"][0])
    check = content["check"]
    assert check["is_right"]
    assert 0 <= check["error"] <= check["allowed"] == 2e-5
    assert check["pairs_per_second"] > 0
    assert check["reason"]
    assert content["problem"] is None


def test_what_is_missing_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("faiss", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    found = findings()
    assert (found["faiss"].state, found["faiss"].found) == ("missing", "not installed")
    assert "pip install 'els-machine[cpu]'" in found["faiss"].remedy
    assert "els-machine[hf]" in found["datasets"].remedy


def test_what_is_broken_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text("raise RuntimeError('first line\\nsecond')")
    (tmp_path / "faiss.py").write_text("import no_such_library")
    for name in ("datasets", "faiss"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = findings()
    assert found["datasets"].found == "broken: first line"
    assert found["faiss"].found == "broken: No module named 'no_such_library'"
    assert {found["datasets"].state, found["faiss"].state} == {"broken"}


def test_without_torch_the_rest_is_still_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = findings()
    assert found["torch"].state == "missing"
    assert found["GPU"].state == "missing"
    assert found["Python"].state == "there"


def test_without_a_compiler_or_kernels(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr("els.engine.backends.native_kernels.is_compiled", lambda: False)
    monkeypatch.setattr("els.engine.backends.is_compiled", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    result = els("doctor")
    assert result.exit_code == 0
    assert "not compiled" in result.stdout
    assert "  compiler: " in result.stdout
    assert "  kernels: pip install" in result.stdout
    assert "no C++ compiler at installation" in result.stdout


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_answer_is_a_failure(monkeypatch, quick, error: float) -> None:
    monkeypatch.setattr(doctor, "_error", lambda machine: error)
    result = els("doctor")
    assert result.exit_code == 1
    assert "WRONG: off by" in result.stdout


def test_a_wrong_kernel_is_found(monkeypatch, quick) -> None:
    from els.engine.machines import ScoreMachine

    machine = ScoreMachine(doctor._some_database())
    posterior = ScoreMachine.posterior

    def wrong(self, x, **arguments):
        return posterior(self, x * (1 + 1e-2 * (self is machine)), **arguments)

    assert doctor._error(machine) <= doctor._ALLOWED_ERROR
    monkeypatch.setattr(ScoreMachine, "posterior", wrong)
    assert doctor._error(machine) > doctor._ALLOWED_ERROR


def test_a_backend_that_cannot_be_asked_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libgomp.so.1 is not there\nmore")

    monkeypatch.setattr(doctor, "checked", broken)
    result = els("doctor")
    assert result.exit_code == 1
    assert "none can be asked: libgomp.so.1 is not there" in result.stdout
    assert json.loads(els("doctor", "--json").stdout)["check"] is None
