"""Runs: a folder of samples that can be killed at any moment and goes on where it was.

A run folder holds::

    run.json            every setting, and when and with which versions it was worked on
    samples/000000.npy  float32 [C, H, W], nominally in [-1, 1]; it is there if and only if the
                        sample is finished
    samples/000000.png  the same as 8-bit pixels (2 and 4 channels: side by side, in grey)
    steps/              where samples are that take long, until they are finished: 000000.npz
    trajectory/         on request: 000000.png (above x_t, below the predicted x_0, noise first)
                        and 000000.npz (both as float32 [steps, C, H, W], with t, alpha, sigma)
    grid.png            all samples (the first 1,024), made when the last is finished

A large run has ``shards/`` in place of ``samples/``: see :mod:`els.engine.shards`. A machine with a
mesh (:mod:`els.engine.distributed`) shares the work with the other processes of the run: rank 0
keeps the folder, and whoever computes samples writes them.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, final, get_args

import numpy as np
import numpy.typing as npt
import torch

from els.engine.backends import BackendName
from els.engine.distributed import ProcessMesh, SharedTask
from els.engine.machines import ScoreMachine
from els.engine.native import instruction_sets
from els.engine.posterior import Boundary, Kind
from els.engine.sampler import (
    DEFAULT_BATCH,
    Resumption,
    SamplePlan,
    StepState,
    plan_sampling,
    require_count,
    sample_plan,
)
from els.engine.scan import can_scan, has_tiles
from els.engine.schedule import Cosine, Schedule, describe, described, patch_sizes_for
from els.engine.shards import DEFAULT_SHARD_SIZE, RunError, Samples, ShardFolder, missing, united
from els.index import encode
from els.storage.files import atomic_file, remove_stale, visible_names, write_json
from els.storage.locks import take_lock
from els.storage.manifests import package_version, read_json
from els.storage.png import grid, panels, write_png

FORMAT = "els-run"
VERSION = 1
GRID_MOST = 1024

_MANIFEST, _GRID, _LOCK, _STEPS = "run.json", "grid.png", ".lock", "steps"
# Settings that may differ from those of the run in the folder; estimates are compared apart.
_MAY_DIFFER = {"n", "database", "estimates"}
# Seconds to try for the lock: els status holds it for an instant when it looks whether it is held.
_LOCK_PATIENCE = 0.2
# Steps whose timing is kept: their medians do not need all, and a long run must not grow.
_TIMINGS_KEPT = 4096
# Seconds of work that an interruption may cost: batches whose size is not given take at most so
# long where fewer samples would do, and longer ones save where they are.
_MOST_LOST_SECONDS = 20.0
# Fewest samples in such a batch of IS and ES: they read and transform every training image once for
# all, so that four samples take 1.2 to 2.5 times as long as one.
_LEAST_SHARED_BATCH = 4

__all__ = [
    "GRID_MOST",
    "EstimateSource",
    "RunError",
    "RunFolder",
    "RunReport",
    "RunSettings",
    "StepProgress",
    "read_sessions",
    "read_settings",
    "sample_run",
]


@dataclass(frozen=True)
class EstimateSource:
    """What the estimates of an ELS run with a tolerance depend on beside the database.

    Attributes:
        kernel: which estimates use: the instruction set, ``+tiles`` with a matrix unit, and
            ``none`` without the compiled extension.
        indices: SHA-256 of the database's patch index of every patch size of the run that has one.
    """

    kernel: str
    indices: dict[str, str]

    def __post_init__(self) -> None:
        # It may come from a file.
        indices = self.indices.items() if isinstance(self.indices, dict) else [(None, None)]
        if not isinstance(self.kernel, str) or not all(
            isinstance(size, str) and size.isdecimal() and isinstance(content, str)
            for size, content in indices
        ):
            raise TypeError(f"estimates are {self!r}")


@dataclass(frozen=True)
class RunSettings:
    """Everything that the samples of a run depend on, as ``run.json`` holds it.

    Attributes:
        database: folder of the database; it may move, its content may not change.
        content_hash: of the database.
        machine: which score machine.
        boundary: of the machine; None for IS and ES, to which it does not matter.
        backend: ``native``, ``torch`` or ``triton``: they agree to rounding, not to the bit.
        patch_sizes: one per step, lowest noise first; None for IS and ES.
        schedule: name and constants.
        steps: of the sampler.
        eta: of the sampler.
        seed: of the run.
        label: class of the training images that were drawn on; None for all.
        trajectory: whether every step is kept.
        n: number of samples; may grow.
        tolerance: of every posterior mean; None for exact ones.
        shard_size: samples to a file; 1 for a picture and a file of each.
        estimates: what estimates depend on; None without a tolerance, for machines other than ELS,
            and in runs of older versions.
    """

    database: str
    content_hash: str
    machine: Kind
    boundary: Boundary | None
    backend: BackendName
    patch_sizes: tuple[int, ...] | None
    schedule: dict[str, str | float]
    steps: int
    eta: float
    seed: int
    label: int | None
    trajectory: bool
    n: int
    tolerance: float | None = None
    shard_size: int = 1
    estimates: EstimateSource | None = None

    @property
    def plan(self) -> SamplePlan:
        """How the samples are drawn."""
        return SamplePlan(
            self.steps,
            self.patch_sizes,
            self.seed,
            described(self.schedule),
            self.eta,
            self.tolerance,
        )


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are."""

    path: Path

    @property
    def manifest(self) -> Path:
        """Settings and sessions."""
        return self.path / _MANIFEST

    @property
    def lock(self) -> Path:
        """Locked by the process that keeps the folder, as long as the run goes on."""
        return self.path / _LOCK

    @property
    def grid(self) -> Path:
        """The picture of all samples."""
        return self.path / _GRID

    def values(self, index: int) -> Path:
        """Float values of a sample; written last, so it marks the sample as finished."""
        return self.path / "samples" / f"{index:06d}.npy"

    def picture(self, index: int) -> Path:
        """8-bit picture of a sample."""
        return self.path / "samples" / f"{index:06d}.png"

    def trajectory(self, index: int, suffix: str) -> Path:
        """``.png`` or ``.npz`` of a sample's steps."""
        return self.path / "trajectory" / f"{index:06d}{suffix}"

    def step(self, index: int) -> Path:
        """Where a sample is that is not finished yet."""
        return self.path / _STEPS / f"{index:06d}.npz"

    def shards(self, size: int) -> ShardFolder:
        """The samples of a large run."""
        return ShardFolder(self.path / "shards", size)

    def is_finished(self, index: int) -> bool:
        """Whether a sample that has files of its own is there, as values and as a picture."""
        return self.values(index).exists() and self.picture(index).exists()

    def finished(self, settings: RunSettings) -> list[range]:
        """The numbers of the finished samples, in disjoint ascending runs.

        Raises:
            RunError: if a shard is damaged.
        """
        if settings.shard_size > 1:
            return self.shards(settings.shard_size).finished()
        # Of the files that are there: n may be any number.
        stems = [path.stem for path in self.values(0).parent.glob("*.npy")]
        numbers = sorted(int(stem) for stem in stems if stem.isdecimal())
        there = (index for index in numbers if index < settings.n and self.is_finished(index))
        return united(range(index, index + 1) for index in there)

    def load(self, index: int) -> npt.NDArray[np.float32]:
        """A finished sample, float32 ``[C, H, W]``.

        Raises:
            RunError: if it is not finished, or damaged.
        """
        values: npt.NDArray[np.float32] = next(self.samples(range(index, index + 1)))[0]
        return values

    def samples(self, numbers: range) -> Iterator[Samples]:
        """Finished samples in their order, float32 ``[k, C, H, W]`` at a time.

        Raises:
            RunError: if one is not finished, or its file is damaged.
        """
        size = read_settings(self.path).shard_size if self.manifest.exists() else 1
        if size > 1:
            yield from self.shards(size).pieces(numbers)
        else:
            for index in numbers:
                yield self._own_values(index)[np.newaxis]

    def _own_values(self, index: int) -> npt.NDArray[np.float32]:
        try:
            values: npt.NDArray[np.float32] = np.load(self.values(index), allow_pickle=False)
        except FileNotFoundError as error:
            raise RunError(
                f"sample {index} of {self.path} is not there; the same els sample command that "
                "began the run goes on with it"
            ) from error
        except (ValueError, EOFError) as error:
            raise RunError(
                f"{self.values(index)} is damaged ({error}); remove it and start the same els "
                "sample command again"
            ) from error
        return values


@dataclass(frozen=True)
class StepProgress:
    """One step of one batch was done.

    Attributes:
        finished: samples that were finished before this batch, by all processes, earlier
            sessions' included.
        step: counts down from the number of steps to 1.
        patch_size: of the step; None for IS and ES.
        images: samples in the batch.
        seconds: that the step took, for all of them.
    """

    finished: int
    step: int
    patch_size: int | None
    images: int
    seconds: float


@dataclass(frozen=True)
class RunReport:
    """What one call of :func:`sample_run` did.

    Attributes:
        folder: of the run.
        computed: samples that were computed now, by all processes; the others were there.
        steps: timing of this process's steps, of the last 4,096.
    """

    folder: RunFolder
    computed: int
    steps: tuple[StepProgress, ...]

    def seconds_per_image_step(self) -> float | None:
        """Median over the steps; None if nothing was computed."""
        return median(step.seconds / step.images for step in self.steps) if self.steps else None

    def seconds_by_patch_size(self) -> dict[int | None, float]:
        """Median seconds per image-step of each patch size (None for IS and ES), ascending."""
        sizes = sorted({step.patch_size for step in self.steps}, key=lambda size: size or 0)
        return {
            size: median(
                step.seconds / step.images for step in self.steps if step.patch_size == size
            )
            for size in sizes
        }


def sample_run(
    machine: ScoreMachine,
    folder: str | Path,
    *,
    n: int = 16,
    steps: int = 20,
    patch_sizes: str | int | Sequence[int] | None = None,
    seed: int = 0,
    schedule: Schedule = Cosine(),  # noqa: B008 - frozen, so one instance can serve every call
    eta: float = 0.0,
    label: int | None = None,
    trajectory: bool = False,
    batch_size: int | None = None,
    tolerance: float | None = None,
    shard_size: int | None = None,
    progress: Callable[[StepProgress], None] | None = None,
) -> RunReport:
    """Sample into a folder; called again with the same settings, do only what is missing.

    Samples are written batch by batch as they are finished, each file whole or not at all. ``n``
    may grow from one call to the next, and so may the number of processes. A KeyboardInterrupt or
    OSError on the way (a full disk) carries a note that says what is safe and how to go on.

    Args:
        machine: computes the steps; with a mesh, every rank of which makes this call.
        folder: of the run; it and its parents are made.
        n: as in :func:`~els.engine.sample`; so are the others that are not listed.
        steps: see there.
        patch_sizes: see there.
        seed: see there.
        schedule: see there.
        eta: see there.
        label: draw only on training images of this class.
        trajectory: keep x_t and the predicted x_0 of every step, as a picture and as arrays.
        batch_size: samples computed at once; results do not depend on it, but for the rounding of
            sums with database shards. None for as many as take about 20 seconds, 1 to 16, of IS and
            ES at least 4; with database shards 16.
        tolerance: see there.
        shard_size: samples to a file; 1 for a picture and a file of each, which trajectories need;
            None for what an existing run has, and for a new one 1 up to 1,000 samples, else 1,000.
        progress: called after every step of every batch of this process.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a value out of range, before any work.
        RunError: if another process works on the folder, or it holds something else or a run with
            other settings, or samples are missing whose estimates would come from another kernel
            or other patch indices.
        RankError: if another process of the run died or stopped it.
        DiskFullError: (an OSError) no room; finished samples are safe.
    """
    require_count("n", n, 1)
    if shard_size is not None:
        require_count("shard_size", shard_size, 1)
        if trajectory and shard_size > 1:
            raise ValueError(
                f"shard_size={shard_size} with trajectory: trajectories belong to samples with "
                "files of their own; give shard_size=1"
            )
    if batch_size is not None:
        require_count("batch_size", batch_size, 1)
    if label is not None:
        require_count("label", label, 0, most=None)
        machine.db.class_members(label)
    plan = plan_sampling(
        machine,
        steps=steps,
        patch_sizes=patch_sizes,
        seed=seed,
        schedule=schedule,
        eta=eta,
        tolerance=tolerance,
    )
    settings = _settings(machine, plan, n, label, trajectory)
    mesh = machine.mesh or ProcessMesh.alone()
    task = mesh.task()
    run = RunFolder(Path(folder))
    with ExitStack() as held, _explained(run, n):

        def begin() -> dict[str, Any]:
            held.enter_context(_claimed(run))
            return _begin(machine, mesh, run, settings, shard_size).told()

        work = _Work.of(task.decided(begin))
        # The ranks of a mesh are started alike, but not necessarily with the same files.
        _require_same(run, work.settings, replace(settings, shard_size=work.settings.shard_size))
        if work.missing:
            _require_same_estimates(run, work.settings, settings)
        if work.is_done:
            return RunReport(run, 0, ())
        sizes = _BatchSizes.of(machine, batch_size)
        timings = _compute(machine, mesh, task, run, work, sizes, progress)
        report = RunReport(run, work.count, timings)
        task.add("left", 1)
        if mesh.rank == 0:
            task.wait("left", mesh.world_size)
            _end(run, report)
        return report


def read_settings(folder: str | Path) -> RunSettings:
    """The settings of a run.

    Raises:
        RunError: if there is none, or its ``run.json`` is damaged or too new.
    """
    run = RunFolder(Path(folder))
    return _settings_of(run, _read_manifest(run))


def read_sessions(folder: str | Path) -> list[dict[str, Any]]:
    """When, how and with which versions a run was worked on, one entry a session.

    Raises:
        RunError: as :func:`read_settings`.
    """
    sessions: list[dict[str, Any]] = _read_manifest(RunFolder(Path(folder)))["sessions"]
    return sessions


@dataclass(frozen=True)
class _Work:
    """What rank 0 found that there is to do.

    Attributes:
        settings: of the run.
        missing: numbers of the samples to compute, in disjoint ascending runs.
        is_done: whether there is nothing at all to do.
    """

    settings: RunSettings
    missing: tuple[range, ...]
    is_done: bool

    @classmethod
    def of(cls, told: dict[str, Any]) -> _Work:
        return cls(
            _restored(told["settings"]),
            tuple(range(start, stop) for start, stop in told["missing"]),
            told["is_done"],
        )

    def told(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "settings": _stored(self.settings),
            "missing": [(run.start, run.stop) for run in self.missing],
            "is_done": self.is_done,
        }

    @property
    def count(self) -> int:
        """How many samples are to be computed."""
        return sum(len(run) for run in self.missing)

    def pieces(self, start: int, count: int) -> list[range]:
        """So many of the missing samples from a place on, in runs that are within one shard."""
        shard = self.settings.shard_size
        length = 1 << 62 if shard == 1 else shard
        pieces = []
        for run in self.missing:
            piece = run[max(0, start) : max(0, start + count)]
            start -= len(run)
            while piece:
                stop = min(piece.stop, (piece.start // length + 1) * length)
                pieces.append(range(piece.start, stop))
                piece = range(stop, piece.stop)
        return pieces


@final
@dataclass
class _BatchSizes:
    """How many samples a batch has: what is asked for, or what the time allows.

    Attributes:
        size: of the next batch.
        least: of every batch.
        most: of every batch.
    """

    size: int
    least: int
    most: int

    @classmethod
    def of(cls, machine: ScoreMachine, asked: int | None) -> _BatchSizes:
        if machine.mesh is not None and machine.mesh.database_shards > 1:
            # The order of an all-reduce's sums depends on the batch, which must not be up to time.
            asked = asked or DEFAULT_BATCH
        if asked is not None:
            return cls(asked, asked, asked)
        least = 1 if machine.is_local else _LEAST_SHARED_BATCH
        return cls(least, least, DEFAULT_BATCH)

    def learn(self, images: int, seconds: float) -> None:
        """Choose the next size by how long a batch took."""
        fitting = int(_MOST_LOST_SECONDS * images / seconds)
        self.size = min(max(fitting, self.least), self.most)


def _begin(
    machine: ScoreMachine,
    mesh: ProcessMesh,
    run: RunFolder,
    settings: RunSettings,
    shard_size: int | None,
) -> _Work:
    """Look at the folder, refuse it or make it ready; rank 0 alone does."""
    there, sessions = _there(run)
    if shard_size is None and there is not None:
        shard_size = there.shard_size
    elif shard_size is None:
        is_large = settings.n > DEFAULT_SHARD_SIZE and not settings.trajectory
        shard_size = DEFAULT_SHARD_SIZE if is_large else 1
    settings = replace(settings, shard_size=shard_size)
    if there is not None:
        _require_same(run, there, settings)
    if settings.shard_size > 1:
        run.shards(settings.shard_size).tidy(settings.n)
    gaps = tuple(missing(run.finished(settings), settings.n))
    if there is not None:
        if gaps:
            _require_same_estimates(run, there, settings)
        settings = replace(settings, estimates=there.estimates)
    work = _Work(settings, gaps, not gaps and run.grid.exists() and there == settings)
    if not work.is_done:
        run.grid.unlink(missing_ok=True)
        session = {
            "started": _now(),
            "finished": None,
            "finished_before": settings.n - work.count,
            **_surroundings(machine, mesh),
        }
        # First of all files: what else is there without it would be somebody else's.
        _write_manifest(run, settings, [*sessions, session])
        _make_room(run, settings)
    return work


def _end(run: RunFolder, report: RunReport) -> None:
    """What rank 0 does when every rank is done."""
    settings, sessions = _there(run)
    assert settings is not None
    _write_grid(run, settings.n)
    shutil.rmtree(run.path / _STEPS, ignore_errors=True)
    sessions[-1] |= {
        "finished": _now(),
        "computed": report.computed,
        "seconds_per_image_step": report.seconds_per_image_step(),
    }
    _write_manifest(run, settings, sessions)


def _compute(
    machine: ScoreMachine,
    mesh: ProcessMesh,
    task: SharedTask,
    run: RunFolder,
    work: _Work,
    sizes: _BatchSizes,
    progress: Callable[[StepProgress], None] | None,
) -> tuple[StepProgress, ...]:
    timings: deque[StepProgress] = deque(maxlen=_TIMINGS_KEPT)
    settings, plan = work.settings, work.settings.plan
    writer = _Writer(run, settings, task, work.missing)
    saved = _SavedSteps(run, machine, mesh, settings)
    while True:
        count = mesh.same_for_group(sizes.size)
        pieces = work.pieces(task.draw("samples", count), count)
        if not pieces:
            break
        indices = [index for piece in pieces for index in piece]
        finished = settings.n - work.count + task.add("finished", 0)
        watch = _Watch(finished, saved, keep_states=settings.trajectory, progress=progress)
        images = sample_plan(
            machine,
            plan,
            indices,
            label=settings.label,
            callback=watch,
            resumption=saved.resumption(indices),
        )
        _require_no_new_indices(machine, settings)
        if mesh.leads:
            writer.write(pieces, images.numpy(), watch.states)
            saved.forget(indices)
            task.add("finished", len(indices))
        timings += watch.timings
        seconds = sum(timing.seconds for timing in watch.timings)
        sizes.learn(len(indices), seconds / len(watch.timings) * plan.steps)
    return tuple(timings)


@final
class _Writer:
    """Writes finished samples; whoever writes the last of a shard completes it.

    Args:
        run: where.
        settings: of the run.
        task: of all the ranks that write.
        gaps: what was missing when they began.
    """

    def __init__(
        self, run: RunFolder, settings: RunSettings, task: SharedTask, gaps: Iterable[range]
    ) -> None:
        self._run = run
        self._settings = settings
        self._task = task
        self._gaps = list(gaps)
        self._shards = run.shards(settings.shard_size)

    def write(self, pieces: Sequence[range], images: Samples, states: Sequence[StepState]) -> None:
        """Write a batch, with its steps where trajectories are kept.

        Args:
            pieces: the samples' numbers, each piece of one shard.
            images: the samples, one after another.
            states: of the batch.
        """
        row = 0
        for numbers in pieces:
            if self._settings.shard_size == 1:
                for place, index in enumerate(numbers, row):
                    if self._settings.trajectory:
                        _write_trajectory(self._run, index, place, states)
                    _write_sample(self._run, index, images[place])
            else:
                self._write_part(numbers, images[row : row + len(numbers)])
            row += len(numbers)

    def _write_part(self, numbers: range, images: Samples) -> None:
        n, shard = self._settings.n, self._shards.number(numbers.start)
        self._shards.write(numbers.start, images, n)
        of_shard = self._shards.numbers(shard, n)
        missing_there = sum(
            len(range(max(gap.start, of_shard.start), min(gap.stop, of_shard.stop)))
            for gap in self._gaps
        )
        if self._task.add(f"shard {shard}", len(numbers)) == missing_there:
            self._shards.complete(shard, n)


@final
class _SavedSteps:
    """Where samples are that take long, so that an interruption costs a part of them only.

    Runs with trajectories have none: what they write needs all steps.

    Args:
        run: where.
        machine: that computes.
        mesh: of the ranks; those that lead their group write and read.
        settings: of the run.
    """

    def __init__(
        self, run: RunFolder, machine: ScoreMachine, mesh: ProcessMesh, settings: RunSettings
    ) -> None:
        self._run = run
        self._machine = machine
        self._mesh = mesh
        self._settings = settings
        self._unsaved = 0.0

    def offer(self, state: StepState, seconds: float) -> None:
        """Save a step that ended after so many seconds, if the last one saved is long ago."""
        self._unsaved += seconds
        if self._unsaved < _MOST_LOST_SECONDS:
            return
        self._unsaved = 0.0
        if not self._mesh.leads or self._settings.trajectory or state.step == 1:
            return
        _require_no_new_indices(self._machine, self._settings)
        for row, index in enumerate(state.indices):
            place = self._run.step(index)
            place.parent.mkdir(exist_ok=True)
            with atomic_file(place) as stream:
                np.savez(stream, step=state.step - 1, x_t=state.x_next[row].numpy())

    def resumption(self, indices: Sequence[int]) -> Resumption | None:
        """Where a batch goes on: all of its samples were saved at the same step."""
        self._unsaved = 0.0
        found = [self._read(index) for index in indices] if self._mesh.leads else []
        steps = {step for step, _ in found}
        step = self._mesh.same_for_group(steps.pop() if len(steps) == 1 else 0)
        if step == 0:
            return None
        shape = (len(indices), *self._machine.db.shape)
        # The leader's values: the others' are below any.
        x_t = np.stack([values for _, values in found]) if found else np.full(shape, -np.inf)
        return Resumption(step, self._mesh.largest(torch.from_numpy(x_t)))

    def forget(self, indices: Sequence[int]) -> None:
        """Remove what finished samples need no more."""
        for index in indices:
            self._run.step(index).unlink(missing_ok=True)

    def _read(self, index: int) -> tuple[int, npt.NDArray[np.float64]]:
        """The next step of a sample and what it starts from; step 0 if nothing usable is there."""
        nothing = np.zeros(self._machine.db.shape)
        if self._settings.trajectory or not self._run.step(index).is_file():
            return 0, nothing
        try:
            with np.load(self._run.step(index), allow_pickle=False) as stored:
                step, x_t = stored["step"], stored["x_t"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return 0, nothing
        usable = x_t.dtype == nothing.dtype and x_t.shape == nothing.shape
        usable = usable and step.shape == () and 0 < step < self._settings.steps
        return (int(step), x_t) if usable and np.isfinite(x_t).all() else (0, nothing)


@final
class _Watch:
    """The sampler's callback for one batch: times every step and keeps what is to be written."""

    def __init__(
        self,
        finished: int,
        saved: _SavedSteps,
        *,
        keep_states: bool,
        progress: Callable[[StepProgress], None] | None,
    ) -> None:
        self.states: list[StepState] = []
        self.timings: list[StepProgress] = []
        self._finished = finished
        self._saved = saved
        self._keep_states = keep_states
        self._progress = progress
        self._clock = time.perf_counter()

    def __call__(self, state: StepState) -> None:
        seconds = time.perf_counter() - self._clock
        images = len(state.indices)
        timing = StepProgress(self._finished, state.step, state.patch_size, images, seconds)
        self.timings.append(timing)
        if self._keep_states:
            self.states.append(state)
        self._saved.offer(state, seconds)
        if self._progress is not None:
            self._progress(timing)
        self._clock = time.perf_counter()


def _write_sample(run: RunFolder, index: int, values: npt.NDArray[np.float32]) -> None:
    write_png(run.picture(index), panels(encode(values)))
    with atomic_file(run.values(index)) as stream:
        np.save(stream, values)


def _write_trajectory(run: RunFolder, index: int, row: int, states: Sequence[StepState]) -> None:
    x_t = torch.stack([state.x_t[row] for state in states]).float().numpy()
    predicted = torch.stack([state.predicted[row] for state in states]).float().numpy()
    tiles = [panels(encode(values)) for values in (*x_t, *predicted)]
    write_png(run.trajectory(index, ".png"), grid(tiles, columns=len(states)))
    with atomic_file(run.trajectory(index, ".npz")) as stream:
        np.savez(
            stream,
            x_t=x_t,
            predicted=predicted,
            t=[state.t for state in states],
            alpha=[state.alpha for state in states],
            sigma=[state.sigma for state in states],
        )


def _write_grid(run: RunFolder, n: int) -> None:
    numbers = range(min(n, GRID_MOST))
    tiles = [panels(encode(values)) for part in run.samples(numbers) for values in part]
    write_png(run.grid, grid(tiles, columns=math.ceil(math.sqrt(len(tiles)))))


@contextmanager
def _claimed(run: RunFolder) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it until the end, however it comes."""
    if run.path.exists() and not run.path.is_dir():
        raise RunError(f"{run.path} is a file; give a folder for the run")
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(run.lock, _LOCK_PATIENCE)
    except BlockingIOError as error:
        raise RunError(
            f"another process is sampling into {run.path}; wait for it, or give another folder"
        ) from error
    with lock:
        yield


@contextmanager
def _explained(run: RunFolder, n: int) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, OSError) as interruption:
        finished = 0
        if run.manifest.exists():
            settings = read_settings(run.path)
            finished = sum(len(numbers) for numbers in run.finished(settings))
        begun = len(list((run.path / _STEPS).glob("*.npz")))
        steps = f", and so are steps of {begun} more" if begun else ""
        interruption.add_note(
            f"{finished} of {n} samples are finished and safe in {run.path}{steps}; "
            "start again with the same arguments to go on"
        )
        raise


def _there(run: RunFolder) -> tuple[RunSettings | None, list[dict[str, Any]]]:
    """The settings and sessions of the run in a folder that may be used for one."""
    if run.manifest.exists():
        manifest = _read_manifest(run)
        return _settings_of(run, manifest), manifest["sessions"]
    foreign = visible_names(run.path)
    if foreign:
        raise RunError(
            f"{run.path} is not empty and not a run (it has {foreign[0]!r}, but no "
            f"{_MANIFEST}); give another folder"
        )
    return None, []


def _make_room(run: RunFolder, settings: RunSettings) -> None:
    """Makes the folders inside, and clears them of what killed writers left."""
    remove_stale(run.path)
    remove_stale(run.path / _STEPS)
    if settings.shard_size > 1:
        run.shards(settings.shard_size).make_room()
        return
    for name in ("samples", *(["trajectory"] if settings.trajectory else [])):
        (run.path / name).mkdir(exist_ok=True)
        remove_stale(run.path / name)


def _require_same(run: RunFolder, there: RunSettings, here: RunSettings) -> None:
    differing = [
        f"{field.name} is {_shown(getattr(there, field.name))} there, "
        f"{_shown(getattr(here, field.name))} here"
        for field in fields(RunSettings)
        if field.name not in _MAY_DIFFER and getattr(there, field.name) != getattr(here, field.name)
    ]
    if here.n < there.n:
        differing.append(f"n is {there.n} there, {here.n} here (it may grow, not shrink)")
    if differing:
        raise RunError(
            f"{run.path} holds a run with other settings: {'; '.join(differing)}. Give the same "
            "settings to go on with it, or another folder for a new run"
        )


def _require_same_estimates(run: RunFolder, there: RunSettings, here: RunSettings) -> None:
    """Refuse to go on with estimates of another kind: samples would differ by how they came."""
    if there.estimates == here.estimates:
        return
    if there.estimates is None or here.estimates is None:
        raise RunError(
            f"{run.path} has missing samples and does not say with which kernel and patch indices "
            "its estimates were made: an older version began it. Give another folder for a new run"
        )
    differing = []
    if there.estimates.kernel != here.estimates.kernel:
        differing.append(
            f"the kernel is {there.estimates.kernel} there, {here.estimates.kernel} here (go on "
            "with it on such a processor)"
        )
    indices = there.estimates.indices, here.estimates.indices
    for size in sorted(indices[0].keys() | indices[1].keys(), key=int):
        before, now = (of_size.get(size) for of_size in indices)
        if before is None:
            differing.append(f"patch size {size} had no index then (remove the one it has now)")
        elif now is None:
            differing.append(f"the index of patch size {size} is not there (build it again)")
        elif now != before:
            differing.append(f"the index of patch size {size} is another one (build it as it was)")
    raise RunError(
        f"{run.path} holds samples whose estimates were made in another way: "
        f"{'; '.join(differing)}. Or give another folder for a new run"
    )


def _require_no_new_indices(machine: ScoreMachine, settings: RunSettings) -> None:
    """Refuse what a machine computed that may have found an index on the way."""
    if settings.estimates is None:
        return
    for size in sorted(set(settings.patch_sizes or ())):
        if str(size) not in settings.estimates.indices and machine.db.has_index(size):
            raise RunError(
                f"an index of patch size {size} was built during the run, which began without it; "
                "remove it to go on, or give another folder for a new run"
            )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _estimate_source(machine: ScoreMachine, plan: SamplePlan) -> EstimateSource | None:
    """What the plan's estimates depend on; other machines' than ELS only on the database."""
    if plan.tolerance is None or machine.kind != "ELS":
        return None
    kernel = "none"
    if can_scan():
        kernel = instruction_sets()[-1] + ("+tiles" if has_tiles() else "")
    found = {size: machine._index(size) for size in sorted(set(plan.patch_sizes or ()))}
    return EstimateSource(
        kernel, {str(size): index.content_hash for size, index in found.items() if index}
    )


def _settings(
    machine: ScoreMachine, plan: SamplePlan, n: int, label: int | None, trajectory: bool
) -> RunSettings:
    db = machine.db
    return RunSettings(
        database="(in memory)" if db.path is None else str(db.path.resolve()),
        content_hash=db.content_hash,
        machine=machine.kind,
        boundary=machine.boundary if machine.is_local else None,
        backend=machine.backend_name,
        patch_sizes=plan.patch_sizes,
        schedule=describe(plan.schedule),
        steps=plan.steps,
        eta=plan.eta,
        seed=plan.seed,
        label=None if label is None else int(label),
        trajectory=bool(trajectory),
        n=int(n),
        tolerance=plan.tolerance,
        estimates=_estimate_source(machine, plan),
    )


def _read_manifest(run: RunFolder) -> dict[str, Any]:
    try:
        manifest = read_json(run.manifest)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(
            f"{run.path} is not a run (it has no {_MANIFEST}); els sample makes one"
        ) from error
    except ValueError as error:
        raise _damaged(run, str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(run, f"its format is not {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise RunError(
            f"{run.manifest} has version {manifest.get('version')}, this els-machine reads "
            f"{VERSION}; upgrade els-machine, or give another folder"
        )
    if not isinstance(manifest.get("sessions"), list):
        raise _damaged(run, "it has no list of sessions")
    return manifest


def _settings_of(run: RunFolder, manifest: dict[str, Any]) -> RunSettings:
    try:
        settings = _restored(manifest["settings"])
        _require_sound(settings)
        return settings
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(run, f"its settings are not ours ({error})") from error


def _require_sound(settings: RunSettings) -> None:
    """Refuses settings that no run has.

    Raises:
        TypeError, ValueError: naming the setting.
    """
    for name in ("n", "steps", "shard_size"):
        require_count(name, getattr(settings, name), 1)
    require_count("seed", settings.seed, 0, most=None)
    if settings.label is not None:
        require_count("label", settings.label, 0, most=None)
    for name, choices in (
        ("machine", get_args(Kind)),
        ("boundary", (None, *get_args(Boundary))),
        ("trajectory", (False, True)),
    ):
        if getattr(settings, name) not in choices:
            raise ValueError(f"{name} is {getattr(settings, name)!r}")
    for name, types in (
        ("database", (str,)),
        ("content_hash", (str,)),
        ("backend", (str,)),
        ("eta", (int, float)),
        ("tolerance", (int, float, type(None))),
    ):
        if not isinstance(getattr(settings, name), types):
            raise TypeError(f"{name} is {getattr(settings, name)!r}")
    described(settings.schedule)
    if settings.patch_sizes is not None:
        patch_sizes_for(settings.patch_sizes, settings.steps)


def _restored(content: dict[str, Any]) -> RunSettings:
    settings = RunSettings(**content)
    sizes, estimates = settings.patch_sizes, content.get("estimates")
    return replace(
        settings,
        patch_sizes=None if sizes is None else tuple(sizes),
        estimates=None if estimates is None else EstimateSource(**estimates),
    )


def _stored(settings: RunSettings) -> dict[str, Any]:
    """The settings as JSON; runs without estimates say nothing of them, as in older versions."""
    content = asdict(settings)
    if settings.estimates is None:
        del content["estimates"]
    return content


def _damaged(run: RunFolder, reason: str) -> RunError:
    return RunError(f"{run.manifest} is damaged: {reason}; give another folder")


def _write_manifest(
    run: RunFolder, settings: RunSettings, sessions: Sequence[dict[str, Any]]
) -> None:
    content = {"format": FORMAT, "version": VERSION, "settings": _stored(settings)}
    write_json(run.manifest, content | {"sessions": list(sessions)})


def _surroundings(machine: ScoreMachine, mesh: ProcessMesh) -> dict[str, Any]:
    return {
        "backend": machine.backend,
        "processes": mesh.world_size,
        "database_shards": mesh.database_shards,
        "versions": {
            "els-machine": package_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
