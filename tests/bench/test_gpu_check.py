"""The program that checks a GPU, rehearsed on tiny images: what it measures, notes and writes."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from els.bench import gpu_check
from els.bench.gpu_check import Check, Scale
from els.bench.workloads import workload
from els.engine import ScoreMachine
from els.index import PatchDatabase

TINY = Scale(4, 5, (3,), (1, 2), 3, 4, 2, 2, 2, 1, 4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check_for(folder: Path, seconds: float = math.inf) -> Check:
    return Check(TINY, DEVICE, folder / "gpu-check.json", seconds)


def written(check: Check) -> dict[str, object]:
    return json.loads(check.path.read_text())


def exact_rows(check: Check) -> None:
    images = gpu_check.smooth_images(5, TINY.side, seed=1)
    db = PatchDatabase.from_arrays(images[:-2])
    machine = ScoreMachine(db, "ELS", "zeros", backend="triton")
    works = gpu_check.works_of(check, db, images[-2:])
    gpu_check.exact(check, machine, "smooth", works, (1,), {"exp2": 1.0, "matrix": 1.0})


@pytest.mark.slow
def test_a_rehearsal_measures_everything(tmp_path: Path) -> None:
    check = check_for(tmp_path)
    gpu_check.measure(check)
    assert check.failures == check.skipped == []
    rows = written(check)["rows"]
    assert rows == check.rows
    assert [row["what"] for row in rows[:4]] == ["ceiling", "ceiling", "ceiling", "exact"]
    assert {row["what"] for row in rows} == {
        "ceiling",
        "exact",
        "top-k",
        "truncated",
        "alternative",
        "tuning",
    }
    noises = {round(row["beta"], 6) for row in rows if row["what"] == "exact"}
    assert noises == {0.05, 0.006}


def test_what_there_is_no_time_for_is_noted(tmp_path: Path) -> None:
    check = check_for(tmp_path, seconds=0.0)
    exact_rows(check)
    result = written(check)
    assert result["rows"] == []
    assert len(result["skipped"]) == 2
    assert "P = 3" in result["skipped"][0]
    assert result["failure"] is None


def test_no_timing_of_a_wrong_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gpu_check.sampled_means
    monkeypatch.setattr(gpu_check, "sampled_means", lambda *given: plain(*given) + 0.001)
    check = check_for(tmp_path)
    exact_rows(check)
    assert written(check)["rows"] == []
    assert "off by 0.001" in written(check)["failure"]


def test_a_failure_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    check = check_for(tmp_path)

    def broken() -> None:
        raise RuntimeError("out of memory")

    check.attempt("tuning", broken)
    check.attempt("exact", lambda: check.add(what="exact"))
    assert written(check)["rows"] == [{"what": "exact"}]
    assert "tuning: RuntimeError: out of memory" in written(check)["failure"]


@pytest.mark.parametrize(("rc", "code"), [(0, 0), (1, 1), (None, 1)])
def test_the_exit_code_says_whether_the_tests_passed(
    rc: int | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where git is missing and the tests ran out of time."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        if command[0] == "git":
            raise FileNotFoundError("git")
        if rc is None:
            raise subprocess.TimeoutExpired(command, 1.0, b"....")
        return subprocess.CompletedProcess(command, rc, b"the last line\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu_check, "measure", lambda check: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse"])
    monkeypatch.setenv("OUT", str(tmp_path))
    try:
        gpu_check.main()
        found = 0
    except SystemExit as exit_:
        found = exit_.code
    assert found == code
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["rows"][0]["passed"] == (rc == 0)
    assert (result["failure"] is None) == (rc == 0)
    assert result["commit"] == "unknown"
    assert result["versions"]["torch"] == torch.__version__


def test_the_reference_of_a_gate() -> None:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (7, 2, 6, 5), dtype=np.uint8)
    work = workload(images, 3, 2)
    rows, columns = torch.tensor([1, 4, 2]), torch.tensor([1, 3, 2])
    means = gpu_check.sampled_means(work.db.images, work, rows, columns)
    for b in range(2):
        truth = oracle.posterior(
            work.db.images,
            work.x[b].numpy(),
            alpha=work.alpha,
            sigma=work.sigma,
            kind="ELS",
            boundary="zeros",
            patch_size=3,
        )
        np.testing.assert_allclose(means[b], truth.mean[:, rows, columns], atol=1e-12)
