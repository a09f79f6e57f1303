"""Faults: ``pytest bench/cases/bench_faults.py``. Processes killed at random, a full disk, damage.

Every case ends with the same files as a run that nobody disturbed, to the bit.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from els.index import PatchDatabase, open_source
from els.runs.folder import RunFolder, read_settings

KILLS = 24
SAMPLES = 300
# So many at a time: most of a case is starting Python.
AT_ONCE = 3

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def start(db: Path, run: Path, shards: int, restarts: int) -> subprocess.Popen[str]:
    """Two ranks that sample into a folder."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts={restarts}"
    options = (
        f"-n {SAMPLES} --steps 4 --sizes 3 --eta 1 --batch-size 10 --shard-size 100 --threads 1 "
        f"--backend native --database-shards {shards}"
    )
    command = [*launcher.split(), "-m", "els.engine", "sample", str(db), "-o", str(run)]
    return subprocess.Popen(
        [sys.executable, *command, *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finished(run: Path) -> int:
    folder = RunFolder(run)
    if not folder.manifest.exists():
        return 0
    return sum(map(len, folder.finished(read_settings(run))))


def files(run: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in paths
        if path.name not in ("run.json", ".lock")
    }


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "db"
    images = next(iter(open_source("embedded:fashion-mnist", resize=12).chunks(64)))[:64]
    PatchDatabase.build(images, path=path)
    return path


@pytest.fixture(scope="module")
def undisturbed(db: Path) -> dict[int, dict[str, bytes]]:
    """The files of a run that nobody disturbed, by the number of database shards."""
    found = {}
    for shards in (1, 2):
        process = start(db, db.parent / f"undisturbed-{shards}", shards, 0)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        found[shards] = files(db.parent / f"undisturbed-{shards}")
    return found


def test_kills(
    benchmark: BenchmarkFixture,
    db: Path,
    undisturbed: dict[int, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """SIGKILL for a random rank at a random moment; torchrun starts again, or somebody does."""

    def trial(number: int) -> dict[str, object]:
        chance = random.Random(number)
        shards, restarts = 1 + number % 2, number // 2 % 2
        rank, attempt = None, 0
        while rank is None:
            # Again where a slow machine's run had ended before the kill.
            run = tmp_path / f"run-{number}-{attempt}"
            process = start(db, run, shards, restarts)
            rank, at = _kill(process, run, chance)
            output, _ = process.communicate()
            attempt += 1
        died = process.returncode != 0
        if died:
            process = start(db, run, shards, 0)
            output, _ = process.communicate()
        survived = process.returncode == 0 and files(run) == undisturbed[shards]
        print(number, "survived" if survived else output, flush=True)
        return {
            "database_shards": shards,
            "restarted_by": "hand" if died else "torchrun",
            "rank": rank,
            "samples_finished": at,
            "survived": survived,
        }

    kills: list[dict[str, object]] = []

    def kill_all() -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            kills.extend(pool.map(trial, range(KILLS)))

    benchmark.pedantic(kill_all, rounds=1)
    benchmark.extra_info |= {
        "samples": SAMPLES,
        "tried": len(kills),
        "survived": sum(bool(kill["survived"]) for kill in kills),
        "kills": kills,
    }
    assert all(kill["survived"] for kill in kills)


def _kill(
    process: subprocess.Popen[str], run: Path, chance: random.Random
) -> tuple[int | None, int]:
    """Which rank was killed, if the run had not ended before, and how many samples it had."""
    wanted = chance.randrange(SAMPLES * 9 // 10)
    while process.poll() is None and (not (run / "run.json").exists() or finished(run) < wanted):
        time.sleep(0.01)
    time.sleep(0.03 * chance.random())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = [int(child) for child in children.read_text().split()] if children.exists() else []
    at = finished(run)
    if len(ranks) < 2 or at == SAMPLES:
        return None, SAMPLES
    rank = chance.randrange(2)
    os.kill(ranks[rank], signal.SIGKILL)
    return rank, at


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("shards", [1, 2])
def test_full_disk(
    benchmark: BenchmarkFixture,
    db: Path,
    undisturbed: dict[int, dict[str, bytes]],
    tmp_path: Path,
    shards: int,
) -> None:
    """A disk that is full in the midst of a run; then it is made larger."""
    with small_disk(tmp_path / "disk", "160k") as disk:
        run = disk / "run"
        outputs = []

        def fill() -> None:
            process = start(db, run, shards, 0)
            outputs.append(process.communicate()[0])
            assert process.returncode != 0
            subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)

        benchmark.pedantic(fill, rounds=1)
        assert "no room to write" in outputs[0], outputs[0]
        kept = finished(run)
        process = start(db, run, shards, 0)
        output, _ = process.communicate()
        assert f"({SAMPLES - kept} computed now)" in output, output
        same = files(run) == undisturbed[shards]
        assert same
    assert 0 < kept < SAMPLES
    benchmark.extra_info |= {"kept": kept, "samples": SAMPLES, "identical_in_the_end": same}


def test_second_run(
    benchmark: BenchmarkFixture,
    db: Path,
    undisturbed: dict[int, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """Two processes more, started on the folder of a run that goes on."""
    run = tmp_path / "run"

    def both() -> tuple[int, str]:
        first = start(db, run, 1, 0)
        while first.poll() is None and finished(run) == 0:
            time.sleep(0.01)
        # Held as it is, so that the second one meets it, however busy the machine.
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGSTOP)
        second = start(db, run, 1, 0)
        output, _ = second.communicate()
        for child in children:
            os.kill(int(child), signal.SIGCONT)
        first.communicate()
        assert first.returncode == 0
        return second.returncode, output

    code, output = benchmark.pedantic(both, rounds=1)
    assert code != 0
    assert f"another process is sampling into {run}" in output
    assert files(run) == undisturbed[1]
    benchmark.extra_info |= {"refused": True, "identical_in_the_end": True}


def test_unreadable_shard(
    benchmark: BenchmarkFixture,
    db: Path,
    undisturbed: dict[int, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """A shard that was cut off: named, and made again once it is removed."""
    run = tmp_path / "run"
    for name, content in undisturbed[1].items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    (run / "run.json").write_bytes((db.parent / "undisturbed-1" / "run.json").read_bytes())
    shard = run / "shards" / "samples-000002.npz"
    shard.write_bytes(shard.read_bytes()[:1000])

    def refuse() -> str:
        process = start(db, run, 1, 0)
        output, _ = process.communicate()
        assert process.returncode != 0
        return output

    output = benchmark.pedantic(refuse, rounds=1)
    assert f"{shard} is damaged" in output
    shard.unlink()
    process = start(db, run, 1, 0)
    output, _ = process.communicate()
    assert "(100 computed now)" in output, output
    assert files(run) == undisturbed[1]
    benchmark.extra_info |= {"named": True, "identical_in_the_end": True}
