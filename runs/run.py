"""Sampling into a folder: only what is missing is computed, by one process or many.

A machine with a mesh (:mod:`els.engine.mesh`) shares the work with the other processes of
the run: rank 0 writes ``run.json``, and the process that computes a sample writes it.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from els.engine.mesh import ProcessMesh, SharedTask
from els.engine.result import Claim
from els.engine.sampler import (
    DEFAULT_BATCH,
    Resumption,
    SamplePlan,
    StepState,
    plan_sampling,
    require_count,
    sample_plan,
)
from els.engine.schedule import Cosine, Schedule
from els.engine.smoothed import Machine
from els.index import encode
from els.runs.folder import (
    _STEPS,
    GRID_MOST,
    RunFolder,
    _claimed,
    _make_room,
    _there,
    _write_manifest,
    read_settings,
)
from els.runs.settings import (
    RunSettings,
    Smoothing,
    database_in_words,
    settings_from_json,
    settings_of,
    settings_to_json,
)
from els.runs.stores import DEFAULT_SHARD_SIZE, RunError, Samples, missing
from els.storage.files import atomic_file
from els.storage.manifests import package_version
from els.storage.png import grid, panels, write_png

# Settings that may differ from those of the run in the folder; estimates and databases are compared
# by themselves.
_MAY_DIFFER = {"n", "database", "content_hash", "estimates"}
# Steps whose timing is kept, for medians: bounded, so that a long run does not use more memory.
_TIMINGS_KEPT = 4096
# Seconds of work that an interruption may cost: batches without a given size are made to take at
# most that long, and longer ones save their steps.
_MOST_LOST_SECONDS = 20.0
# Fewest samples in such a batch of IS and ES: they read and transform every training image once for
# the whole batch, so that four samples take 1.2 to 2.5 times as long as one.
_LEAST_SHARED_BATCH = 4


@dataclass(frozen=True)
class StepProgress:
    """One step of one batch was done, or a part of it.

    Attributes:
        finished: samples that were finished before this batch, by all processes, earlier
            sessions' included.
        step: counts up from 1, the noise, to the number of steps.
        patch_size: of the step; None for IS and ES.
        images: samples in the batch.
        seconds: that the step took until now, for all of them.
        claims: what their posteriors say of themselves; empty without a tolerance.
        share: of the step that is done.
    """

    finished: int
    step: int
    patch_size: int | None
    images: int
    seconds: float
    claims: tuple[Claim, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class StepSummary:
    """A step of all batches of a process.

    Attributes:
        step: counts up from 1, the noise, to the number of steps.
        patch_size: None for IS and ES.
        seconds_per_image: median.
        modes: how many posteriors were computed in which mode, the most frequent first.
        error: mean absolute error of the posterior mean that is to be expected, the mean over
            images; 0 for exact ones.
        work: share of the exact pairs, likewise.
    """

    step: int
    patch_size: int | None = None
    seconds_per_image: float = 0.0
    modes: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    work: float = 1.0


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

    def __repr__(self) -> str:
        seconds = self.seconds_per_image_step()
        speed = "" if seconds is None else f", {seconds:.3g} s per image-step"
        return f"RunReport({str(self.folder.path)!r}, {self.computed} computed now{speed})"

    def seconds_per_image_step(self) -> float | None:
        """Median over the steps; None if nothing was computed."""
        return median(step.seconds / step.images for step in self.steps) if self.steps else None

    def by_step(self) -> list[StepSummary]:
        """What the steps computed and claim, from noise to clean."""
        summaries = []
        for number in sorted({step.step for step in self.steps}):
            steps = [step for step in self.steps if step.step == number]
            claims = [claim for step in steps for claim in step.claims]
            summary = StepSummary(
                number, steps[0].patch_size, median(step.seconds / step.images for step in steps)
            )
            if claims:
                summary = replace(
                    summary,
                    modes=dict(Counter(claim.mode for claim in claims).most_common()),
                    error=mean(claim.error for claim in claims),
                    work=mean(1.0 if claim.work is None else claim.work for claim in claims),
                )
            summaries.append(summary)
        return summaries

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
    machine: Machine,
    folder: str | Path,
    *,
    n: int = 16,
    steps: int = 20,
    patch_sizes: str | int | Sequence[int] | None = None,
    seed: int = 0,
    schedule: Schedule | str = Cosine(),  # noqa: B008 - frozen, one instance can serve every call
    eta: float = 0.0,
    label: int | str | None = None,
    trajectory: bool = False,
    batch_size: int | None = None,
    tolerance: float | None = None,
    canvas: Sequence[int] | None = None,
    shard_size: int | None = None,
    progress: Callable[[StepProgress], None] | None = None,
    under_way: Callable[[StepProgress], None] | None = None,
) -> RunReport:
    """Sample into a folder; called again with the same settings, compute only what is missing.

    Samples are written batch by batch as they are finished, each file whole or not at all. ``n``
    may grow from one call to the next, and so may the number of processes. A KeyboardInterrupt or
    OSError (a full disk) carries a note that says what is safe and how to resume.

    Args:
        machine: computes the steps; with a mesh, every rank of which makes this call.
        folder: of the run; it and its parents are made.
        n: as in :func:`~els.engine.sample`; so are the others that are not listed.
        steps: see there.
        patch_sizes: see there.
        seed: see there.
        schedule: see there.
        eta: see there.
        label: draw only on training images of this class: its number or its name.
        trajectory: keep x_t and the predicted x_0 of every step, as a picture and as arrays.
        batch_size: samples computed at once; results do not depend on it, but for the rounding of
            sums with database shards. None for as many as take about 20 seconds, 1 to 16, of IS and
            ES at least 4; with database shards 16.
        tolerance: see there.
        canvas: see there.
        shard_size: samples to a file; 1 for a picture and a file of each, which trajectories need;
            None for what an existing run has, and for a new one 1 up to 1,000 samples, else 1,000.
        progress: called after every step of every batch of this process.
        under_way: the same within a long step, about ten times a second at most.

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
    number: int | None = machine.db.class_numbers(label)
    if number is not None:
        require_count("label", number, 0, most=None)
        machine.db.class_members(number)
    plan = plan_sampling(
        machine,
        steps=steps,
        patch_sizes=patch_sizes,
        seed=seed,
        schedule=schedule,
        eta=eta,
        tolerance=tolerance,
        canvas=canvas,
    )
    settings = settings_of(machine, plan, n, number, trajectory)
    mesh = machine.mesh or ProcessMesh.alone()
    task = mesh.task()
    run = RunFolder(Path(folder))
    with ExitStack() as held, _explained(run, n):

        def begin() -> dict[str, Any]:
            held.enter_context(_claimed(run))
            return _begin(machine, mesh, run, settings, shard_size).to_json()

        work = _Work.from_json(task.decided(begin))
        # The ranks of a mesh are started alike, but not necessarily with the same files.
        _require_same(run, work.settings, replace(settings, shard_size=work.settings.shard_size))
        if work.missing:
            _require_same_estimates(run, work.settings, settings)
        if work.is_done:
            return RunReport(run, 0, ())
        sizes = _BatchSizes.of(machine, batch_size)
        timings = _compute(machine, mesh, task, run, work, sizes, progress, under_way)
        report = RunReport(run, work.count, timings)
        task.add("left", 1)
        if mesh.rank == 0:
            task.wait("left", mesh.world_size)
            _end(run, report)
        return report


@dataclass(frozen=True)
class _Work:
    """The work that rank 0 found to be missing.

    Attributes:
        settings: of the run.
        missing: numbers of the samples to compute, in disjoint ascending runs.
        is_done: whether there is nothing at all to do.
    """

    settings: RunSettings
    missing: tuple[range, ...]
    is_done: bool

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> _Work:
        return cls(
            settings_from_json(content["settings"]),
            tuple(range(start, stop) for start, stop in content["missing"]),
            content["is_done"],
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "settings": settings_to_json(self.settings),
            "missing": [(run.start, run.stop) for run in self.missing],
            "is_done": self.is_done,
        }

    @property
    def count(self) -> int:
        """How many samples are to be computed."""
        return sum(len(run) for run in self.missing)

    def pieces(self, start: int, count: int) -> list[range]:
        """``count`` of the missing samples from place ``start`` on, split at sample shards."""
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
    """How many samples a batch has: as given, or as many as the time allows.

    Attributes:
        size: of the next batch.
        least: of every batch.
        most: of every batch.
    """

    size: int
    least: int
    most: int

    @classmethod
    def of(cls, machine: Machine, asked: int | None) -> _BatchSizes:
        if machine.mesh is not None and machine.mesh.database_shards > 1:
            # The order of an all-reduce's sums depends on the batch, which must not depend on time.
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
    machine: Machine,
    mesh: ProcessMesh,
    run: RunFolder,
    settings: RunSettings,
    shard_size: int | None,
) -> _Work:
    """Check the folder and prepare it; called by rank 0 alone."""
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
        # Before all other files: a folder without it that is not empty is not a run.
        _write_manifest(run, settings, [*sessions, session])
        _make_room(run, settings)
    return work


def _end(run: RunFolder, report: RunReport) -> None:
    """Complete the run; called by rank 0 when every rank is done."""
    settings, sessions = _there(run)
    assert settings is not None
    _write_grid(run, settings.n)
    shutil.rmtree(run.path / _STEPS, ignore_errors=True)
    sessions[-1] |= {
        "finished": _now(),
        "computed": report.computed,
        "seconds_per_image_step": report.seconds_per_image_step(),
    }
    if settings.plan.tolerance is not None:
        sessions[-1]["steps"] = [asdict(summary) for summary in report.by_step()]
    _write_manifest(run, settings, sessions)


def _compute(
    machine: Machine,
    mesh: ProcessMesh,
    task: SharedTask,
    run: RunFolder,
    work: _Work,
    sizes: _BatchSizes,
    progress: Callable[[StepProgress], None] | None,
    under_way: Callable[[StepProgress], None] | None,
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
        resumption = saved.resumption(indices)
        watch = _Watch(
            finished,
            plan,
            len(indices),
            plan.steps if resumption is None else resumption.step,
            saved,
            keep_states=settings.trajectory,
            progress=progress,
            under_way=under_way,
        )
        images = sample_plan(
            machine,
            plan,
            indices,
            label=settings.label,
            callback=watch,
            resumption=resumption,
            under_way=watch.look,
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
    """Writes finished samples; the process that writes the last of a shard completes it.

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
    """Saved steps of slow samples, so that an interruption costs only a part of them.

    Runs with trajectories have none: their files need all steps.

    Args:
        run: where.
        machine: that computes.
        mesh: of the ranks; those that lead their group write and read.
        settings: of the run.
    """

    def __init__(
        self, run: RunFolder, machine: Machine, mesh: ProcessMesh, settings: RunSettings
    ) -> None:
        self._run = run
        self._machine = machine
        self._mesh = mesh
        self._settings = settings
        self._unsaved = 0.0

    def offer(self, state: StepState, seconds: float) -> None:
        """Save a step that took so many seconds, if enough time has passed since the last."""
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
        """Where a batch resumes, if all of its samples were saved at the same step."""
        self._unsaved = 0.0
        found = [self._read(index) for index in indices] if self._mesh.leads else []
        steps = {step for step, _ in found}
        step = self._mesh.same_for_group(steps.pop() if len(steps) == 1 else 0)
        if step == 0:
            return None
        shape = (len(indices), *self._settings.plan.shape(self._machine.db))
        # The maximum over the group is the leader's values: the others have -inf.
        x_t = np.stack([values for _, values in found]) if found else np.full(shape, -np.inf)
        return Resumption(step, self._mesh.largest(torch.from_numpy(x_t)))

    def forget(self, indices: Sequence[int]) -> None:
        """Remove the saved steps of finished samples."""
        for index in indices:
            self._run.step(index).unlink(missing_ok=True)

    def _read(self, index: int) -> tuple[int, npt.NDArray[np.float64]]:
        """The next step of a sample and its noisy image; step 0 if nothing usable was saved."""
        nothing = np.zeros(self._settings.plan.shape(self._machine.db))
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
    """The sampler's callback for one batch: times every step and keeps trajectories."""

    def __init__(
        self,
        finished: int,
        plan: SamplePlan,
        images: int,
        step: int,
        saved: _SavedSteps,
        *,
        keep_states: bool,
        progress: Callable[[StepProgress], None] | None,
        under_way: Callable[[StepProgress], None] | None,
    ) -> None:
        self.states: list[StepState] = []
        self.timings: list[StepProgress] = []
        self._finished = finished
        self._plan = plan
        self._images = images
        self._step = step
        self._saved = saved
        self._keep_states = keep_states
        self._progress = progress
        self._under_way = under_way
        self._clock = time.perf_counter()

    def __call__(self, state: StepState) -> None:
        timing = self._timing(state.claims)
        self.timings.append(timing)
        if self._keep_states:
            self.states.append(state)
        self._saved.offer(state, timing.seconds)
        if self._progress is not None:
            self._progress(timing)
        self._step -= 1
        self._clock = time.perf_counter()

    def look(self, share: float) -> None:
        """A share of the step under way is done."""
        if self._under_way is not None:
            self._under_way(self._timing((), share))

    def _timing(self, claims: tuple[Claim, ...], share: float = 1.0) -> StepProgress:
        plan, seconds = self._plan, time.perf_counter() - self._clock
        # The sampler counts down to 1, as its time does.
        step = plan.steps - self._step + 1
        size = None if plan.patch_sizes is None else plan.patch_sizes[self._step - 1]
        return StepProgress(self._finished, step, size, self._images, seconds, claims, share)


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
            "start again with the same arguments to resume"
        )
        raise


def _require_same(run: RunFolder, there: RunSettings, here: RunSettings) -> None:
    differing = []
    if there.content_hash != here.content_hash:
        differing.append(
            f"its database is {database_in_words(there)}; the one here is {database_in_words(here)}"
        )
    differing += [
        f"{field.name} is {_shown(field.name, getattr(there, field.name))} there, "
        f"{_shown(field.name, getattr(here, field.name))} here"
        for field in fields(RunSettings)
        if field.name not in _MAY_DIFFER and getattr(there, field.name) != getattr(here, field.name)
    ]
    if here.n < there.n:
        differing.append(f"n is {there.n} there, {here.n} here (it may grow, not shrink)")
    if differing:
        raise RunError(
            f"{run.path} holds a run with other settings: {'; '.join(differing)}. Give the same "
            "settings to resume it, or another folder for a new run"
        )


def _require_same_estimates(run: RunFolder, there: RunSettings, here: RunSettings) -> None:
    """Refuse to resume with other estimates: samples would depend on which kernel computed them."""
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


def _require_no_new_indices(machine: Machine, settings: RunSettings) -> None:
    """Refuse samples of a machine that may have found an index during the run."""
    if settings.estimates is None:
        return
    for size in sorted(set(settings.patch_sizes or ())):
        if str(size) not in settings.estimates.indices and machine.db.has_index(size):
            raise RunError(
                f"an index of patch size {size} was built during the run, which began without it; "
                "remove it to resume, or give another folder for a new run"
            )


def _shown(name: str, value: object) -> str:
    match value:
        case None:
            return "none"
        case Smoothing(std=std, copies=copies):
            return f"{std:g}x{copies}"
        case tuple():
            return ("x" if name == "canvas" else " ").join(map(str, value))
        case _:
            return str(value)


def _surroundings(machine: Machine, mesh: ProcessMesh) -> dict[str, Any]:
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
