"""Many processes: the same posteriors and samples, whoever computes them and whoever dies."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mesh_worker import BACKENDS, IMAGES, LABELS, MANY, RUN, answers
from numpy.typing import NDArray
from typer.testing import CliRunner

from els.cli import app as cli
from els.engine import ScoreMachine
from els.engine.backends.native import NativeBackend
from els.engine.backends.pytorch import TorchBackend
from els.engine.backends.sharded import ShardedBackend
from els.engine.kinds import kind_named
from els.engine.mesh import ProcessMesh, RankError, local_device, process_mesh
from els.engine.query import PosteriorQuery
from els.engine.state import merge_all
from els.index import PatchDatabase
from els.runs.folder import RunFolder, read_sessions, read_settings
from els.runs.run import RunReport, StepProgress, sample_run
from els.runs.stores import RunError

DB = PatchDatabase.from_arrays(IMAGES, LABELS)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# Of a pixel, whatever the number of ranks: sums in another order, which ten steps amplify. A
# hundredth of a grey level, where samples that differ are levels apart.
SAME = 0.01 * 2 / 255


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    return output


def images_of(folder: Path) -> NDArray[np.float32]:
    n = read_settings(folder).n
    return np.concatenate(list(RunFolder(folder).samples(range(n))))


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name not in ("run.json", ".lock")
    }


def in_ranks(work: Callable[[ProcessMesh], object], ranks: int = 2) -> list[object]:
    """What each of several ranks returns or raises; in threads, for what needs no all-reduce."""
    store = dist.HashStore()
    results: list[object] = [None] * ranks

    def run(rank: int) -> None:
        try:
            results[rank] = work(ProcessMesh(store, rank=rank, world_size=ranks))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    return results


def test_four_ranks_agree_with_one(tmp_path: Path) -> None:
    """Two groups, each with the database on two ranks: every machine, mode, and a run."""
    db = PatchDatabase.build(MANY, path=tmp_path / "db")
    db.build_index(3)
    worker = Path(__file__).with_name("mesh_worker.py")
    process = torchrun("--nproc-per-node=4", worker, tmp_path)
    expected = answers(tmp_path / "db", None)
    one = sample_run(ScoreMachine(DB, backend=BACKENDS[-1]), tmp_path / "one", **RUN)
    output = finish(process)
    assert process.returncode == 0, output
    with np.load(tmp_path / "answers.npz") as found:
        assert set(found) == set(expected)
        for name, values in expected.items():
            # Float64 sums in another order, and of the native kernel float32 ones.
            relative = 1e-5 if "torch" not in name else 1e-12
            np.testing.assert_allclose(found[name], values, relative, relative, err_msg=name)
    assert one.computed == RUN["n"]
    difference = np.abs(images_of(tmp_path / "dealt") - images_of(tmp_path / "one")).max()
    assert difference <= SAME
    (session,) = read_sessions(tmp_path / "dealt")
    assert (session["processes"], session["database_shards"]) == (4, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database, and the samples of one undisturbed process."""
    folder = tmp_path_factory.mktemp("runs")
    db = PatchDatabase.build(IMAGES, path=folder / "db")
    options = {"n": 600, "steps": 10, "patch_sizes": 3, "eta": 1, "shard_size": 100}
    sample_run(ScoreMachine(db), folder / "one", **options)
    return folder


def command(db: Path, run: Path, n: int) -> list[str]:
    options = f"-n {n} --steps 10 --sizes 3 --eta 1 --batch-size 4 --shard-size 100 --threads 1"
    return ["-m", "els.engine", "sample", str(db), "-o", str(run), *options.split()]


def kill_a_rank(process: subprocess.Popen[str], run: RunFolder, chance: random.Random) -> int:
    """SIGKILL for a rank once some samples are there."""
    wanted = chance.randrange(4, 100)
    while process.poll() is None:
        if run.manifest.exists():
            finished = sum(map(len, run.finished(read_settings(run.path))))
            if finished >= wanted:
                break
        time.sleep(0.005)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = [int(number) for number in listed.read_text().split()]
    victim = chance.choice(ranks)
    os.kill(victim, signal.SIGKILL)
    return victim


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


@pytest.mark.slow
@needs_proc
def test_torchrun_restarts_what_was_killed(folder: Path) -> None:
    run = RunFolder(folder / "restarted")
    options = ("--nproc-per-node=2", "--max-restarts=2")
    process = torchrun(*options, *command(folder / "db", run.path, 600))
    kill_a_rank(process, run, random.Random(1))
    output = finish(process)
    assert process.returncode == 0, output
    sessions = read_sessions(run.path)
    assert [session["finished"] is not None for session in sessions] == [False, True]
    # Nothing twice: what was finished before the kill was not computed again.
    assert sessions[1]["computed"] == 600 - sessions[1]["finished_before"] < 600
    assert files_of(run.path) == files_of(folder / "one")


@pytest.mark.slow
@needs_proc
def test_a_rank_that_dies_stops_its_group_and_the_run_goes_on(folder: Path) -> None:
    run = RunFolder(folder / "sharded")
    start = ("--nproc-per-node=2", *command(folder / "db", run.path, 200), "--database-shards", "2")
    process = torchrun(*start)
    victim = kill_a_rank(process, run, random.Random(2))
    output = finish(process)
    assert process.returncode != 0
    assert f"SIGKILL) received by PID {victim}" in output
    before = sum(map(len, run.finished(read_settings(run.path))))
    assert 0 < before < 200
    process = torchrun(*start)
    output = finish(process)
    assert process.returncode == 0, output
    assert f"200 samples in {run.path} ({200 - before} computed now)" in output
    assert np.abs(images_of(run.path) - images_of(folder / "one")[:200]).max() <= SAME


@pytest.mark.parametrize("shard_size", [1, 4])
def test_samples_are_dealt_out(tmp_path: Path, shard_size: int) -> None:
    options = RUN | {"shard_size": shard_size}
    sample_run(ScoreMachine(DB, backend="torch"), tmp_path / "one", **options)
    seen: list[StepProgress] = []

    def work(mesh: ProcessMesh) -> RunReport:
        machine = ScoreMachine(DB, backend="torch", mesh=mesh)
        return sample_run(machine, tmp_path / "three", **options, progress=seen.append)

    reports = in_ranks(work, ranks=3)
    assert [report.computed for report in reports] == [10, 10, 10]
    assert sum(step.images for step in seen) == 10 * RUN["steps"]
    assert all(0 <= step.finished <= 8 for step in seen)
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")
    again = in_ranks(work)
    assert [report.computed for report in again] == [0, 0]


def test_a_refusal_reaches_every_rank(tmp_path: Path) -> None:
    sample_run(ScoreMachine(DB, backend="torch"), tmp_path, **RUN)
    before = files_of(tmp_path)

    def work(mesh: ProcessMesh) -> RunReport:
        return sample_run(
            ScoreMachine(DB, backend="torch", mesh=mesh), tmp_path, **(RUN | {"seed": 1})
        )

    first, second = in_ranks(work)
    assert isinstance(first, RunError)
    assert isinstance(second, RankError)
    assert "seed is 0 there, 1 here" in str(second)
    assert files_of(tmp_path) == before


def test_a_rank_with_another_database_is_refused(tmp_path: Path) -> None:
    other = PatchDatabase.from_arrays(IMAGES[::-1].copy(), LABELS)

    def work(mesh: ProcessMesh) -> RunReport:
        machine = ScoreMachine(other if mesh.rank else DB, backend="torch", mesh=mesh)
        # Rank 0 would wait for the other for ever: torchrun would stop it.
        if mesh.rank == 0:
            return mesh.task().decided(lambda: decision)
        return sample_run(machine, tmp_path / "other", **RUN)

    sample_run(ScoreMachine(DB, backend="torch"), tmp_path / "run", **RUN)
    decision = {
        "settings": asdict(read_settings(tmp_path / "run")),
        "missing": [[0, 10]],
        "is_done": False,
    }
    _, second = in_ranks(work)
    assert isinstance(second, RunError)
    assert "its database is" in str(second)


def launched(monkeypatch: pytest.MonkeyPatch, **other: str | None) -> None:
    """The environment of rank 0 of two, but for some variables; None for one that is not set."""
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (usual | other).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"WORLD_SIZE": "1", "MASTER_ADDR": "nohost.invalid"}, id="one-process"),
        pytest.param({"WORLD_SIZE": "1", "RANK": "5", "MASTER_PORT": "x"}, id="one-and-nonsense"),
        pytest.param({"RANK": None}, id="no-rank"),
        pytest.param({"WORLD_SIZE": None}, id="no-world-size"),
        pytest.param({"RANK": None, "WORLD_SIZE": None}, id="address-alone"),
    ],
)
def test_a_process_that_is_not_one_of_several_meets_nobody(monkeypatch, caplog, other) -> None:
    launched(monkeypatch, LOCAL_RANK="3", **other)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with process_mesh() as mesh:
        assert (mesh.rank, mesh.world_size, mesh.processes_here) == (0, 1, 1)
    assert not caplog.records
    assert local_device() is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        pytest.param({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' .* at least 1", id="no-number"),
        pytest.param({"WORLD_SIZE": ""}, "WORLD_SIZE=''", id="empty"),
        pytest.param({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'", id="none"),
        pytest.param({"WORLD_SIZE": "2(x3)"}, r"WORLD_SIZE='2\(x3\)'", id="tasks-per-node"),
        pytest.param({"RANK": "5"}, "RANK='5' must be an integer from 0 to 1", id="rank-too-large"),
        pytest.param({"RANK": "-1"}, "RANK='-1'", id="rank-negative"),
        pytest.param({"MASTER_PORT": ""}, "but not MASTER_PORT", id="port-empty"),
        pytest.param({"MASTER_PORT": "http"}, "MASTER_PORT='http'", id="port-name"),
        pytest.param({"MASTER_PORT": "70000"}, "MASTER_PORT='70000'", id="port-too-large"),
        pytest.param({"MASTER_PORT": None}, "but not MASTER_PORT", id="no-port"),
        pytest.param({"MASTER_ADDR": None}, "but not MASTER_ADDR", id="no-address"),
        pytest.param({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE='all'", id="local-world-size"),
        pytest.param({"LOCAL_RANK": "1"}, "LOCAL_RANK='1' .* from 0 to 0", id="local-rank"),
    ],
)
def test_an_environment_that_cannot_be_is_refused_at_once(monkeypatch, other, words) -> None:
    launched(monkeypatch, **other)
    with pytest.raises(ValueError, match=words) as refused, process_mesh():
        pass
    assert "unset RANK WORLD_SIZE" in str(refused.value)


@pytest.mark.parametrize(
    ("rank", "address", "reason"),
    [
        pytest.param("0", "127.0.0.1", "1 came", id="nobody-comes"),
        pytest.param("1", "127.0.0.1", "refused", id="nobody-listens"),
        pytest.param("0", "nohost.invalid", "nohost.invalid:", id="unknown-host"),
        pytest.param("1", "nohost.invalid", "nohost.invalid:", id="unknown-host-of-another"),
    ],
)
def test_a_wait_for_others_is_announced_and_ends(
    monkeypatch, caplog, rank: str, address: str, reason: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched(monkeypatch, RANK=rank, MASTER_ADDR=address, MASTER_PORT=str(port))
    mesh = process_mesh(start_timeout=timedelta(seconds=0.3))
    with pytest.raises(RankError, match=reason) as failed, mesh:
        pass
    (said,) = caplog.messages
    where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
    assert said.startswith(f"waiting for 1 other process (RANK={rank}, WORLD_SIZE=2) at {where}")
    for message in (said, str(failed.value)):
        assert where in message
        assert "unset RANK WORLD_SIZE" in message


def test_ctrl_c_ends_the_wait_for_others(tmp_path: Path) -> None:
    db = PatchDatabase.build(IMAGES, path=tmp_path / "db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    waiting = subprocess.Popen(
        [sys.executable, *command(db.path, tmp_path / "run", 1)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | told | {"RANK": "0"},
    )
    assert waiting.stderr.readline().startswith("waiting for 1 other process")
    waiting.send_signal(signal.SIGINT)
    # The wait itself would go on for five minutes.
    _, said = waiting.communicate(timeout=100)
    assert waiting.returncode == 130, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["IS", "ES", "LS", "ELS"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(TorchBackend, id="torch"),
        pytest.param(NativeBackend, id="native", marks=pytest.mark.native),
    ],
)
def test_states_of_groups_are_those_of_all_ranks_together(make, kind: str) -> None:
    """A mesh without a group merges nothing, so that the ranks' states can be merged here."""
    backend = make()
    groups = [np.array([0, 3]), np.arange(len(IMAGES)), np.array([], dtype=np.int64)]
    query = PosteriorQuery(
        torch.linspace(-1, 1, 2 * IMAGES[0].size).reshape(2, *IMAGES.shape[1:]),
        torch.tensor([0.8, 0.9], dtype=torch.float64),
        torch.tensor([0.6, 0.4], dtype=torch.float64),
        kind_named(kind),
        "zeros",
        3,
        entropy=True,
        top=2,
    )
    of_ranks = []
    for rank in range(2):
        mesh = ProcessMesh(dist.HashStore(), rank=rank, world_size=2, database_shards=2)
        of_ranks.append(ShardedBackend(backend, mesh).states(IMAGES, query, groups))
    for members, *parts in zip(groups, *of_ranks, strict=True):
        found = merge_all(parts)
        (expected,) = backend.states(IMAGES, query, [members])
        if len(members) == 0:
            assert bool(torch.isneginf(found.reference).all())
            assert not bool(found.mass.any())
            continue
        # Float64 sums in another order; the native ones of LS and ELS have float32 terms.
        assert_near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
        assert_near(found.mass.log() + found.reference, expected.mass.log() + expected.reference)
        assert_near(found.mean, expected.mean)
        assert torch.equal(found.top.addresses, expected.top.addresses)


@pytest.mark.parametrize(
    ("world_size", "shards", "words"),
    [
        pytest.param(None, 2, "which is 1; torchrun", id="no-torchrun"),
        pytest.param("4", 3, "divisor of the number of processes, which is 4", id="indivisible"),
        pytest.param("4", 0, "database_shards=0", id="none"),
    ],
)
def test_shards_must_fit_the_processes(monkeypatch, world_size, shards, words) -> None:
    if world_size is not None:
        launched(monkeypatch, WORLD_SIZE=world_size)
    with pytest.raises(ValueError, match=words), process_mesh(shards):
        pass


def test_more_shards_than_images_are_refused() -> None:
    mesh = ProcessMesh(dist.HashStore(), world_size=4, database_shards=4)
    few = PatchDatabase.from_arrays(IMAGES[:3])
    with pytest.raises(ValueError, match="database_shards=4 for 3 images"):
        ScoreMachine(few, backend="torch", mesh=mesh)


@pytest.mark.native
def test_processes_of_one_machine_divide_its_cores(monkeypatch) -> None:
    monkeypatch.setattr("els.engine.machines.available_cores", lambda: 7)
    mesh = ProcessMesh(dist.HashStore(), world_size=6, processes_here=3)
    assert "2 threads" in ScoreMachine(DB, backend="native", mesh=mesh).backend


def test_errors_say_which_rank(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    failed = CliRunner().invoke(cli.app, ["info", str(tmp_path / "nothing")])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("[rank 1] error: ")
