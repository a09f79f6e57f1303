"""How many threads a process may use, and what happens where they cannot start."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from els.engine.backends import cores as core_count
from els.engine.backends.cores import available_cores

ALONE = """
import resource, sys
import numpy as np, torch
from els.engine import ScoreMachine
from els.index import PatchDatabase
images = np.random.default_rng(0).integers(0, 256, (640, 1, 12, 12), dtype=np.uint8)
x = torch.zeros(1, 1, 12, 12)
def mean(threads):
    machine = ScoreMachine(PatchDatabase.from_arrays(images), backend="native", threads=threads)
    return machine.posterior(x, alpha=0.8, sigma=0.6, patch_size=3).mean
expected = mean(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
try:
    print("the same" if torch.equal(mean(2**16), expected) else "another")
except (RuntimeError, MemoryError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.native
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("megabytes", [200, 40, 0])
@pytest.mark.thinned
def test_threads_that_cannot_start(megabytes: int) -> None:
    """A limit on memory, as batch systems set it: fewer threads or an error, never an abort."""
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, str(megabytes << 20)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(("the same", "RuntimeError no thread", "MemoryError"))


@pytest.mark.parametrize(
    ("entries", "files", "quota"),
    [
        pytest.param("0::/", {"cpu.max": "150000 100000"}, 1.5, id="container"),
        pytest.param("0::/", {"cpu.max": "max 100000"}, math.inf, id="unlimited"),
        pytest.param("0::/", {}, math.inf, id="root"),
        pytest.param(
            "0::/job/step",
            {"job/cpu.max": "200000 100000", "job/step/cpu.max": "max 100000"},
            2.0,
            id="parent",
        ),
        pytest.param("0::/not/mounted", {"cpu.max": "50000 100000"}, 0.5, id="namespace"),
        pytest.param(
            "5:memory:/m\n4:cpu,cpuacct:/job",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            3.0,
            id="version-1",
        ),
        pytest.param(
            "4:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            math.inf,
            id="version-1-unlimited",
        ),
        pytest.param("0::/", {"cpu.max": "what is this"}, math.inf, id="malformed"),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, entries: str, files: dict[str, str], quota: float
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(entries + "\n")
    for name, content in files.items():
        place = tmp_path / "sys/fs/cgroup" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content + "\n")
    assert core_count._cpu_quota(tmp_path) == quota


def test_without_control_groups(tmp_path: Path) -> None:
    assert core_count._cpu_quota(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("quota", "wanted", "cores"),
    [
        (math.inf, None, 8),
        (2.5, None, 3),
        (0.2, None, 1),
        (math.inf, "4", 4),
        (math.inf, "3,2", 3),
        (math.inf, "64", 8),
        (math.inf, "0", 8),
        (math.inf, "many", 8),
        (2.0, "1", 1),
    ],
)
def test_what_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float, wanted: str | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(core_count, "_cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert available_cores() == cores
