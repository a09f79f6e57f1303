"""The build or the searches of one index in a process of its own, measured (Linux).

``python -m els.bench.index_growth build DB P`` and ``... search DB P QUESTIONS ANSWERS`` print
JSON. Processor time is of the whole process; memory is the peak of its resident pages, those of
mapped files included, less what was resident before.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import typer

from els.index import PatchDatabase

K = 256
EFFORTS = (8, 32, 128)

_ROUNDS = 3

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command()
def build(database: Path, patch_size: int) -> None:
    """Build the index, on one thread."""
    import faiss  # noqa: F401  (its own memory is no part of the build's)

    db = PatchDatabase.open(database)
    start, meter = resident_peak(), Meter(database / "indices")
    index = db.build_index(patch_size, threads=1, progress=meter)
    meter("done", 1, 1)
    _show(
        {
            "factory": index.factory,
            "patches": index.count,
            "lists": index.lists,
            "largest_list": int(index.list_sizes().max(initial=0)),
            "seconds": meter.seconds,
            "cpu_seconds": meter.cpu_seconds,
            "memory": resident_peak() - start,
            "peak_disk": meter.peak_disk,
            "disk": index.size_bytes,
        }
    )


@app.command()
def search(database: Path, patch_size: int, questions: Path, answers: Path) -> None:
    """Ask an .npz of queries, at every effort; what was found goes into another."""
    import faiss

    index = PatchDatabase.open(database).open_index(patch_size)
    start = resident_peak()
    rows = []
    found: dict[str, Any] = {}
    with np.load(questions) as file:
        queries = {name: file[name] for name in file}
    statistics: Any = faiss.cvar.indexIVF_stats  # type: ignore[attr-defined]
    for name, patches in queries.items():
        for effort in EFFORTS:
            # The first search reads the lists from disk.
            distances, addresses = index.search(patches, K, effort=effort, threads=1)
            found[f"{name} {effort} distances"] = distances
            found[f"{name} {effort} addresses"] = addresses
            times = []
            for _ in range(_ROUNDS):
                statistics.reset()
                before = time.perf_counter(), time.process_time()
                index.search(patches, K, effort=effort, threads=1)
                times.append((time.perf_counter() - before[0], time.process_time() - before[1]))
            wall, cpu = np.median(times, axis=0) / len(patches)
            rows.append(
                {
                    "queries": name,
                    "effort": effort,
                    "seconds": wall,
                    "cpu_seconds": cpu,
                    "codes": statistics.ndis / len(patches),
                    "list_finding": statistics.quantization_time / 1e3 / len(patches),
                    "scanning": statistics.search_time / 1e3 / len(patches),
                }
            )
    np.savez(answers, **found)
    _show({"memory": resident_peak() - start, "searches": rows})


class Meter:
    """A progress callback that adds up time by stage and notes the most disk in use.

    Args:
        folder: what is on disk.
    """

    def __init__(self, folder: Path) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu_seconds: defaultdict[str, float] = defaultdict(float)
        self.peak_disk = 0
        self._folder, self._stage = folder, "training"
        self._before = time.perf_counter(), time.process_time()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Counts the time since the last call as that call's stage."""
        now = time.perf_counter(), time.process_time()
        self.seconds[self._stage] += now[0] - self._before[0]
        self.cpu_seconds[self._stage] += now[1] - self._before[1]
        self._stage, self._before = stage, now
        in_use = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        self.peak_disk = max(self.peak_disk, in_use)


def resident_peak() -> int:
    """Most bytes of this process that were ever resident; Linux only."""
    # Not getrusage: after a fork that starts from the parent's.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status; run this on Linux")


def _show(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    app()
