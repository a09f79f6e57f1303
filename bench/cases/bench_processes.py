"""Many processes: ``pytest bench/cases/bench_processes.py``, on one machine.

Speed-up of two processes over one with as many threads in all, bytes that a step sends, what a step
takes besides its posterior, and a run of 100,000 samples from its start to its end.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from els.engine import ScoreMachine, sample
from els.engine.result import LocalPosterior, finish
from els.engine.state import PosteriorState
from els.index import PatchDatabase, open_source
from els.runs.folder import RunFolder
from els.runs.run import StepProgress, sample_run

# Processes, database shards, threads of each.
SETTINGS = {
    "1 process, 1 thread": (1, 1, 1),
    "1 process, 2 threads": (1, 1, 2),
    "2 processes, samples dealt out": (2, 1, 1),
    "2 processes, database sharded": (2, 2, 1),
}
# Training images of the database.
IMAGES = 512
# Samples of a run.
SAMPLES = 8
# Steps of a sample.
STEPS = 4
PATCH_SIZE = 5
# Samples at once.
BATCH = 4
# Runs of each setting.
ROUNDS = 3

WORKER = """
import json, sys, time
from pathlib import Path
from els.engine import ScoreMachine
from els.engine.mesh import process_mesh
from els.runs.run import sample_run
from els.index import PatchDatabase

db, run, shards, threads, n, steps, size, batch, rounds = sys.argv[1:]
told = []
with process_mesh(int(shards)) as mesh:
    images = PatchDatabase.open(db)
    machine = ScoreMachine(images, backend="native", threads=int(threads), mesh=mesh)
    for number in range(int(rounds)):
        before = mesh.reduced_bytes
        mesh.task().decided(lambda: None)  # begin together
        start, cpu_start = time.perf_counter(), time.process_time()
        sample_run(
            machine,
            f"{run}-{number}",
            n=int(n),
            steps=int(steps),
            patch_sizes=int(size),
            batch_size=int(batch),
        )
        told.append(
            {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_start,
                "reduced_bytes": mesh.reduced_bytes - before,
            }
        )
Path(f"{run}-{mesh.rank}.json").write_text(json.dumps(told))
"""


def test_processes(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The same samples with each of the settings, several rounds of each."""
    images = next(iter(open_source("embedded:fashion-mnist").chunks(IMAGES)))[:IMAGES]
    db = PatchDatabase.build(images, path=tmp_path / "db")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    measured: dict[str, dict[str, float]] = {}

    def once() -> None:
        for name in SETTINGS:
            measured[name] = _run(name, worker, tmp_path)

    benchmark.pedantic(once, rounds=1)
    drawn = [
        np.concatenate(list(RunFolder(tmp_path / f"{name}-0").samples(range(SAMPLES))))
        for name in SETTINGS
    ]
    difference = max(float(np.abs(other - drawn[0]).max()) for other in drawn[1:])
    assert difference <= 1e-5
    benchmark.extra_info |= {
        "images": len(db),
        "shape": db.shape,
        "samples": SAMPLES,
        "steps": STEPS,
        "patch_size": PATCH_SIZE,
        "batch": BATCH,
        "rounds": ROUNDS,
        "largest_difference": difference,
        "load_average": os.getloadavg()[1],
        "settings": measured,
    }


def _run(name: str, worker: Path, folder: Path) -> dict[str, float]:
    """Medians over the rounds; bytes on the wire are those of a round, launching included."""
    processes, shards, threads = SETTINGS[name]
    run = folder / name
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    settings = (shards, threads, SAMPLES, STEPS, PATCH_SIZE, BATCH, ROUNDS)
    command = [*launcher, str(worker), str(folder / "db"), str(run), *map(str, settings)]
    sent = _loopback_bytes()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    sent = _loopback_bytes() - sent
    told = [json.loads(Path(f"{run}-{rank}.json").read_text()) for rank in range(processes)]
    rounds = [
        {
            "seconds": max(each["seconds"] for each in ranks),
            "cpu_seconds": sum(each["cpu_seconds"] for each in ranks),
            "reduced_bytes": ranks[0]["reduced_bytes"],
            "loopback_bytes": sent / ROUNDS,
        }
        for ranks in zip(*told, strict=True)
    ]
    return _medians(rounds)


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.median([each[key] for each in rounds])) for key in rounds[0]}


def _loopback_bytes() -> int:
    """Bytes that this machine has sent to itself, by whomever."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[9])
    return 0


class _Given:
    """A denoiser that costs nothing: what is left is the step."""

    kind = "ELS"
    is_local = True
    device = torch.device("cpu")

    def __init__(self, db: PatchDatabase) -> None:
        self.db = db

    def posterior(self, x: torch.Tensor, **_: object) -> LocalPosterior:
        one = torch.ones_like(x[:, 0], dtype=torch.float64)
        return finish(PosteriorState(one, one, x.double()), x.dtype)


def test_step_without_posterior(benchmark: BenchmarkFixture) -> None:
    """What the sampler itself does in a step, 64 x 64 x 3, for one image of a batch of 16."""
    denoiser = _Given(PatchDatabase.from_arrays(np.zeros((1, 3, 64, 64), dtype=np.uint8)))
    steps, batch = 50, 16
    cpu_seconds: list[float] = []

    def draw() -> None:
        start = time.process_time()
        sample(denoiser, n=batch, steps=steps, patch_sizes=5, batch_size=batch)
        cpu_seconds.append(time.process_time() - start)

    benchmark.pedantic(draw, rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {
        "image_steps": steps * batch,
        "cpu_seconds": float(np.median(cpu_seconds)),
    }


def test_many_samples(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """100,000 samples of 8 x 8 in one run: the rate and the memory at its start and its end."""
    source = open_source("embedded:fashion-mnist", resize=8)
    images: npt.NDArray[np.uint8] = next(iter(source.chunks(256)))[:256]
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "LS", "zeros", "native", threads=1)
    n, steps, batch = 100_000, 5, 100
    marks: list[tuple[int, float, float, int]] = []

    def mark(step: StepProgress) -> None:
        if step.step == 1:
            now = (time.perf_counter(), time.process_time())
            marks.append((step.finished, *now, _resident_bytes()))

    def draw() -> None:
        sample_run(
            machine,
            tmp_path / "run",
            n=n,
            steps=steps,
            patch_sizes=3,
            batch_size=batch,
            progress=mark,
        )

    benchmark.pedantic(draw, rounds=1)
    shards = sorted((tmp_path / "run" / "shards").glob("*.npz"))
    assert len(shards) == 100
    assert not list((tmp_path / "run" / "shards" / "parts").iterdir())
    tenth = len(marks) // 10
    rates = [
        {
            "samples_per_second": (last[0] - first[0]) / (last[1] - first[1]),
            "samples_per_cpu_second": (last[0] - first[0]) / (last[2] - first[2]),
            "resident_bytes": last[3],
        }
        for first, last in ((marks[i], marks[i + tenth - 1]) for i in range(0, 10 * tenth, tenth))
    ]
    benchmark.extra_info |= {
        "samples": n,
        "steps": steps,
        "batch": batch,
        "images": len(images),
        "tenths": rates,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "load_average": os.getloadavg()[1],
    }


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
