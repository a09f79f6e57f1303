"""Many processes: batches of samples are dealt out, and the database is sharded by images.

The ranks of a run form a mesh of two axes. Along one, groups of ranks take batches of samples as
they become free. Along the other, the ranks of a group share the candidates of every posterior:
each computes the partial state over its image shard, and the states are merged by an all-reduce of
the reference logit and one of the sums relative to it. Processes are started by torchrun::

    torchrun --nproc-per-node=8 -m els.engine sample DB --database-shards 4 ...

Samples do not depend on which rank computes what, but for the rounding of the sums.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from els.engine.state import PosteriorState, SamplingSums, best, rescaled

# Longest wait of a rank for another of its group, at every step: a longer step is a hung rank.
DEFAULT_TIMEOUT = timedelta(minutes=30)
# Longest wait for all processes to start. Launchers start them together, so that they differ by
# the time that importing torch from a busy file system takes, a minute or two.
DEFAULT_START_TIMEOUT = timedelta(minutes=5)
# Seconds between two looks at a counter that other processes change, at most.
_LONGEST_PAUSE = 0.5
# Seconds that a try to reach rank 0 may take.
_CONNECT_SECONDS = 5.0
# Seconds between two tries, and between two looks at who came.
_MEETING_PAUSE = 0.02
_LARGEST_PORT = 65535

logger = logging.getLogger("els")


class RankError(RuntimeError):
    """Another process of the run has died, hangs, or stopped it."""


@final
class ProcessMesh:
    """The ranks of a run: ``sample_groups`` groups of ``database_shards`` ranks each.

    Made by :func:`process_mesh`; rank r is shard ``r % database_shards`` of group
    ``r // database_shards``, so that a group's ranks are on one machine if they fit there.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        database_shards: S, among how many ranks the images are divided.
        shard: number of this rank's image shard, 0 to S - 1.
        sample_groups: number of groups that samples are dealt to.
        processes_here: how many of the processes run on this machine.
        reduced_bytes: payload of all all-reduces and gathers so far, of this rank; a ring
            all-reduce sends 2 (S - 1) / S times as much.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int = 0,
        world_size: int = 1,
        database_shards: int = 1,
        processes_here: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.database_shards = database_shards
        self.shard = rank % database_shards
        self.sample_groups = world_size // database_shards
        self.processes_here = processes_here
        self.reduced_bytes = 0
        self._store = store
        self._group = group
        self._tasks = 0

    def __reduce__(self) -> str:
        raise TypeError(
            "a ProcessMesh, and a machine with one, belongs to its process: copy a machine without "
            "a mesh"
        )

    @classmethod
    def alone(cls) -> ProcessMesh:
        """The mesh of a single process."""
        return cls(dist.HashStore())

    @property
    def leads(self) -> bool:
        """Whether this rank writes and reads files for its group."""
        return self.shard == 0

    def task(self) -> SharedTask:
        """A task for all ranks; every rank begins the same ones in the same order."""
        self._tasks += 1
        return SharedTask(self, dist.PrefixStore(f"task-{self._tasks}", self._store))

    def merge(self, state: PosteriorState) -> PosteriorState:
        """Merge the group's states, one per rank, over disjoint candidates (docs/theory.md, (7)).

        Raises:
            RankError: if a rank of the group does not answer.
        """
        if self._group is None:
            return state
        reference = self.largest(state.reference)
        own = rescaled(state, reference)
        planes = [own.mass.unsqueeze(1), own.centre]
        if own.logit_sum is not None:
            planes.append(own.logit_sum.unsqueeze(1))
        if own.sampling is not None:
            planes += [own.sampling.seen.unsqueeze(1), own.sampling.squares]
        sums = torch.cat(planes, dim=1)
        self._all_reduce(sums, dist.ReduceOp.SUM)
        merged = iter(torch.split(sums, [plane.shape[1] for plane in planes], dim=1))
        mass, centre = next(merged)[:, 0], next(merged)
        logit_sum = None if own.logit_sum is None else next(merged)[:, 0]
        sampling = None
        if own.sampling is not None:
            sampling = SamplingSums(next(merged)[:, 0], next(merged))
        top = None
        if state.top is not None:
            top = best(
                self._gathered(state.top.logits),
                self._gathered(state.top.addresses),
                state.top.logits.shape[-1],
            )
        return PosteriorState(reference, mass, centre, logit_sum, top, sampling)

    def largest(self, values: Tensor) -> Tensor:
        """The element-wise maximum over the group's ranks; errors as in :meth:`merge`."""
        reduced = values.clone(memory_format=torch.contiguous_format)
        self._all_reduce(reduced, dist.ReduceOp.MAX)
        return reduced

    def same_for_group(self, number: int) -> int:
        """The number that the leading rank has; errors as in :meth:`merge`."""
        if self._group is None:
            return number
        agreed = torch.tensor([number], device="cpu")
        with _answered():
            dist.broadcast(agreed, src=self.rank - self.shard, group=self._group)
        return int(agreed)

    def _all_reduce(self, values: Tensor, operation: Any) -> None:
        if self._group is None:
            return
        self.reduced_bytes += values.nbytes
        with _answered():
            dist.all_reduce(values, op=operation, group=self._group)

    def _gathered(self, values: Tensor) -> Tensor:
        """The ranks' last axes one after another."""
        self.reduced_bytes += values.nbytes
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.database_shards)]
        with _answered():
            dist.all_gather(parts, values, group=self._group)
        return torch.cat(parts, dim=-1)


@final
class SharedTask:
    """Counters and decisions that the ranks of a mesh share during one task.

    Args:
        mesh: of the ranks.
        store: that holds them.
    """

    def __init__(self, mesh: ProcessMesh, store: dist.Store) -> None:
        self._mesh = mesh
        self._store = store

    def decided(self, decision: Callable[[], Any]) -> Any:
        """Rank 0's decision, on every rank.

        Args:
            decision: called on rank 0 only; what it returns must be JSON.

        Raises:
            RankError: on the other ranks, if it failed on rank 0, where its error is raised, or if
                rank 0 does not answer.
        """
        if self._mesh.rank == 0:
            try:
                answer = decision()
            except BaseException as error:
                self._tell("decision", {"refused": str(error) or type(error).__name__})
                raise
            self._tell("decision", {"answer": answer})
            return answer
        with _answered():
            message = json.loads(self._store.get("decision"))
        if "refused" in message:
            raise RankError(f"rank 0 stopped the run: {message['refused']}")
        return message["answer"]

    def draw(self, counter: str, count: int) -> int:
        """The first of the next ``count`` numbers, from 0 on, that no other group has drawn."""
        number = self.add(counter, count) - count if self._mesh.leads else 0
        return self._mesh.same_for_group(number)

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter of all ranks, which starts at 0; its new value."""
        with _answered():
            return int(self._store.add(counter, amount))

    def wait(self, counter: str, amount: int) -> None:
        """Return when a counter has reached an amount, however long that takes."""
        pause = 0.001
        while self.add(counter, 0) < amount:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _tell(self, key: str, value: object) -> None:
        with _answered():
            self._store.set(key, json.dumps(value))


@dataclass(frozen=True)
class _Launch:
    """The processes of a run as the environment describes them (torchrun sets it).

    Attributes:
        rank: of this process (RANK).
        world_size: number of processes, more than 1 (WORLD_SIZE).
        address: where rank 0 or torchrun listens (MASTER_ADDR).
        port: likewise (MASTER_PORT).
        local_rank: of this process among those of its machine (LOCAL_RANK).
        local_world_size: number of processes on this machine (LOCAL_WORLD_SIZE).
    """

    rank: int
    world_size: int
    address: str
    port: int
    local_rank: int
    local_world_size: int

    @classmethod
    def of_environment(cls) -> _Launch | None:
        """The launch of this process; None if it is the only one.

        RANK and WORLD_SIZE together make a process one of several. Where one of them is not set,
        the other variables are left over from another program and are ignored.

        Raises:
            ValueError: for a variable that is missing or out of range.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        world_size = _variable("WORLD_SIZE", 1)
        if world_size == 1:
            return None
        rank = _variable("RANK", 0, world_size - 1)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ValueError(
                    f"the environment says RANK={rank} and WORLD_SIZE={world_size}, but not "
                    f"{name}; start the processes with torchrun, which sets it, or {_ALONE}"
                )
        local_world_size = _variable("LOCAL_WORLD_SIZE", 1, world_size, default=1)
        return cls(
            rank,
            world_size,
            os.environ["MASTER_ADDR"],
            _variable("MASTER_PORT", 1, _LARGEST_PORT),
            _variable("LOCAL_RANK", 0, local_world_size - 1, default=0),
            local_world_size,
        )

    @property
    def listens(self) -> bool:
        """Whether this process listens at the address that the others connect to."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def store(self, until: float) -> dist.Store:
        """The store of all processes, as soon as a process listens at the address.

        Ctrl-C does not interrupt torch's own wait, so it is called when it need not wait.

        Args:
            until: when to give up, as time.monotonic() counts.

        Raises:
            OSError: if no process listens, or the address is not known.
            RuntimeError: if the process that listens there is not one of the run.
        """
        while True:
            try:
                if self.listens:
                    socket.getaddrinfo(self.address, self.port)
                else:
                    where = (self.address, self.port)
                    socket.create_connection(where, timeout=_CONNECT_SECONDS).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(_MEETING_PAUSE)
        return dist.TCPStore(
            self.address,
            self.port,
            is_master=self.listens,
            timeout=timedelta(seconds=max(1.0, until - time.monotonic())),
            wait_for_workers=False,
        )


# The remedy for variables that are left over.
_ALONE = "let this process work alone: unset RANK WORLD_SIZE"


def _variable(name: str, least: int, most: int | None = None, default: int | None = None) -> int:
    """An integer of the environment."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
        if number >= least and (most is None or number <= most):
            return number
    except ValueError:
        pass
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(
        f"the environment variable {name}={text!r} must be an integer {allowed}; start the "
        f"processes with torchrun, which sets it, or {_ALONE}"
    )


@contextmanager
def process_mesh(
    database_shards: int = 1,
    *,
    timeout: timedelta = DEFAULT_TIMEOUT,
    start_timeout: timedelta = DEFAULT_START_TIMEOUT,
) -> Iterator[ProcessMesh]:
    """The mesh of the processes that torchrun started, or of this one alone.

    A process is one of several if the environment has RANK and WORLD_SIZE, and WORLD_SIZE is not 1;
    it then waits for the others, and says so in the log ``els``. Posterior states lie on the CPU
    and are merged by gloo.

    Args:
        database_shards: S, how many ranks share the images; divides the number of processes.
        timeout: how long a rank waits for another of its group.
        start_timeout: how long a rank waits for all others to start.

    Raises:
        ValueError: if S does not fit the number of processes, or for a variable of the environment
            that is missing or out of range.
        RankError: if the processes do not find each other.
    """
    launch = _Launch.of_environment()
    world_size = 1 if launch is None else launch.world_size
    if type(database_shards) is not int or database_shards < 1 or world_size % database_shards:
        raise ValueError(
            f"database_shards={database_shards!r} must be a positive divisor of the number of "
            f"processes, which is {world_size}; torchrun --nproc-per-node=N -m els.engine ... "
            "starts N of them on a machine"
        )
    if launch is None:
        yield ProcessMesh.alone()
        return
    store = _meeting(launch, start_timeout)
    store.set_timeout(timeout)
    with _answered():
        dist.init_process_group(
            "gloo",
            store=store,
            rank=launch.rank,
            world_size=world_size,
            timeout=timeout,
        )
    try:
        with _answered():
            group = None
            if database_shards > 1:
                starts = range(0, world_size, database_shards)
                group, _ = dist.new_subgroups_by_enumeration(
                    [list(range(start, start + database_shards)) for start in starts],
                    timeout=timeout,
                )
        yield ProcessMesh(
            dist.PrefixStore("els", store),
            rank=launch.rank,
            world_size=world_size,
            database_shards=database_shards,
            processes_here=launch.local_world_size,
            group=group,
        )
    finally:
        dist.destroy_process_group()


def local_device() -> str | None:
    """The GPU of this rank where several processes were started: ``"cuda:LOCAL_RANK"``; else None.

    Raises:
        ValueError: if this machine has GPUs, but fewer than processes, or as
            :func:`process_mesh` does.
    """
    launch = _Launch.of_environment()
    if launch is None or not torch.cuda.is_available():
        return None
    rank, there = launch.local_rank, torch.cuda.device_count()
    if rank >= there:
        raise ValueError(
            f"this is process {rank} (from 0) of a machine with {there} GPUs; give torchrun "
            f"--nproc-per-node={there}, or choose a device or backend='native'"
        )
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def _meeting(launch: _Launch, patience: timedelta) -> dist.Store:
    """A store that all processes of the run have reached, and no other has written to.

    Raises:
        RankError: if they do not reach it in time.
    """
    others = launch.world_size - 1
    logger.warning(
        "waiting for %d other process%s (RANK=%d, WORLD_SIZE=%d) at %s:%d (MASTER_ADDR, "
        "MASTER_PORT), at most %d s; if there are none, %s",
        others,
        "es" if others > 1 else "",
        launch.rank,
        launch.world_size,
        launch.address,
        launch.port,
        patience.total_seconds(),
        _ALONE,
    )
    until = time.monotonic() + patience.total_seconds()
    try:
        return _fresh(launch.store(until), launch.rank, launch.world_size, until)
    except (OSError, RuntimeError) as error:
        raise RankError(
            f"not all of the {launch.world_size} processes (WORLD_SIZE) connected to "
            f"{launch.address}:{launch.port} (MASTER_ADDR, MASTER_PORT) in "
            f"{patience.total_seconds():g} s ({str(error).splitlines()[0]}); start all of them "
            f"with torchrun, or {_ALONE}"
        ) from error


def _fresh(store: dist.Store, rank: int, world_size: int, until: float) -> dist.Store:
    """A part of a store that no process has written to.

    After a restart by torchrun the store still holds the keys of the dead processes, among them
    addresses where they listened. So rank 0 chooses a new prefix, sends it to every process that
    asks with a number of its own, and returns when all have confirmed that prefix.
    """
    meeting = dist.PrefixStore("els-meeting", store)
    if rank > 0:
        number = secrets.token_hex(8)
        meeting.set(f"asked by {rank}", number)
        while not meeting.check([f"assigned {number}"]):
            _pause(until, "rank 0 did not answer")
        name = meeting.get(f"assigned {number}").decode()
        meeting.add(f"confirmed {name}", 1)
        return dist.PrefixStore(name, store)
    name = f"els-{secrets.token_hex(8)}"
    answered: set[str] = set()
    while (confirmed := meeting.add(f"confirmed {name}", 0)) < world_size - 1:
        # Dead processes asked, too: an answer to them does no harm.
        asked = [key for r in range(1, world_size) if meeting.check([key := f"asked by {r}"])]
        for number in {meeting.get(key).decode() for key in asked} - answered:
            meeting.set(f"assigned {number}", name)
            answered.add(number)
        _pause(until, f"{confirmed + 1} came")
    return dist.PrefixStore(name, store)


def _pause(until: float, missing: str) -> None:
    if time.monotonic() > until:
        raise RuntimeError(missing)
    time.sleep(_MEETING_PAUSE)


@contextmanager
def _answered() -> Iterator[None]:
    """Turns an error of communication into a RankError that says what it means."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            "another process of this run died, hangs or cannot be reached; finished samples are "
            f"safe, and the same command resumes the run ({str(error).splitlines()[0]})"
        ) from error
