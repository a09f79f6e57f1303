"""Runs: a folder of samples that can be killed at any moment and goes on where it was.

A run folder holds::

    run.json            every setting, and when and with which versions it was worked on
    samples/000000.npy  float32 [C, H, W], nominally in [-1, 1]; it is there if and only if the
                        sample is finished
    samples/000000.png  the same as 8-bit pixels (2 and 4 channels: side by side, in grey)
    trajectory/         on request: 000000.png (above x_t, below the predicted x_0, noise first)
                        and 000000.npz (both as float32 [steps, C, H, W], with t, alpha, sigma)
    grid.png            all samples (the first 1,024), made when the last is finished
"""

from __future__ import annotations

import fcntl
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from els.engine.backends import BackendName
from els.engine.machines import ScoreMachine
from els.engine.pictures import grid, panels, write_png
from els.engine.posterior import Boundary, Kind
from els.engine.sampler import (
    DEFAULT_BATCH,
    SamplePlan,
    StepState,
    plan_sampling,
    require_count,
    sample,
)
from els.engine.schedule import Cosine, Schedule, describe, described
from els.index import encode
from els.index.files import atomic_file, remove_stale, write_json

FORMAT = "els-run"
VERSION = 1
GRID_MOST = 1024

_MANIFEST, _GRID, _LOCK = "run.json", "grid.png", ".lock"
_MAY_DIFFER = {"n", "database"}


class RunError(RuntimeError):
    """A run folder is in use, in the way, damaged, or holds a run with other settings."""


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
        tolerance: of every posterior mean; None for exact ones. The samples then depend on which
            patch indices the database has, too.
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

    def is_finished(self, index: int) -> bool:
        """Whether a sample is there, as values and as a picture."""
        return self.values(index).exists() and self.picture(index).exists()

    def load(self, index: int) -> npt.NDArray[np.float32]:
        """A finished sample, float32 ``[C, H, W]``.

        Raises:
            RunError: if it is not finished, or damaged.
        """
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
        finished: samples that were finished before this batch, earlier sessions' included.
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
        computed: samples that were computed now; the others were there.
        steps: timing of every step.
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
    progress: Callable[[StepProgress], None] | None = None,
) -> RunReport:
    """Sample into a folder; called again with the same settings, do only what is missing.

    Samples are written as soon as they are finished, each file whole or not at all. ``n`` may grow
    from one call to the next. A KeyboardInterrupt or OSError on the way (a full disk) carries a
    note that says what is safe and how to go on.

    Args:
        machine: computes the steps.
        folder: of the run; it and its parents are made.
        n: as in :func:`~els.engine.sample`; so are the others that are not listed.
        steps: see there.
        patch_sizes: see there.
        seed: see there.
        schedule: see there.
        eta: see there.
        label: draw only on training images of this class.
        trajectory: keep x_t and the predicted x_0 of every step, as a picture and as arrays.
        batch_size: samples computed at once, None for at most 16; results do not depend on it.
        tolerance: see there.
        progress: called after every step of every batch.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a value out of range, before any work.
        RunError: if another process works on the folder, or it holds something else or a run with
            other settings.
        DiskFullError: (an OSError) no room; finished samples are safe.
    """
    require_count("n", n, 1)
    if batch_size is not None:
        require_count("batch_size", batch_size, 1)
    if label is not None:
        require_count("label", label, 0)
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
    run = RunFolder(Path(folder))
    with _claimed(run), _explained(run, n):
        sessions = _sessions_to_continue(run, settings)
        missing = [index for index in range(n) if not run.is_finished(index)]
        if not missing and run.grid.exists() and read_settings(run.path) == settings:
            return RunReport(run, 0, ())
        run.grid.unlink(missing_ok=True)
        session = {"started": _now(), "finished": None, **_surroundings(machine)}
        _write_manifest(run, settings, [*sessions, session])
        _make_room(run, settings)
        timings = _compute(machine, run, settings, missing, batch_size or DEFAULT_BATCH, progress)
        report = RunReport(run, len(missing), timings)
        _write_grid(run, n)
        session |= {
            "finished": _now(),
            "computed": report.computed,
            "seconds_per_image_step": report.seconds_per_image_step(),
        }
        _write_manifest(run, settings, [*sessions, session])
        return report


def read_settings(folder: str | Path) -> RunSettings:
    """The settings of a run.

    Raises:
        RunError: if there is none, or its ``run.json`` is damaged or too new.
    """
    run = RunFolder(Path(folder))
    if not run.manifest.exists():
        raise RunError(f"{run.path} is not a run (it has no {_MANIFEST}); els sample makes one")
    return _settings_of(run, _read_manifest(run))


def _compute(
    machine: ScoreMachine,
    run: RunFolder,
    settings: RunSettings,
    missing: Sequence[int],
    batch_size: int,
    progress: Callable[[StepProgress], None] | None,
) -> tuple[StepProgress, ...]:
    timings: list[StepProgress] = []
    for start in range(0, len(missing), batch_size):
        indices = missing[start : start + batch_size]
        finished = settings.n - len(missing) + start
        watch = _Watch(finished, keep_states=settings.trajectory, progress=progress)
        plan = settings.plan
        images = sample(
            machine,
            steps=plan.steps,
            patch_sizes=plan.patch_sizes,
            seed=plan.seed,
            schedule=plan.schedule,
            eta=plan.eta,
            labels=settings.label,
            callback=watch,
            batch_size=batch_size,
            indices=indices,
            tolerance=plan.tolerance,
        )
        for row, index in enumerate(indices):
            if settings.trajectory:
                _write_trajectory(run, index, row, watch.states)
            _write_sample(run, index, images[row].numpy())
        timings += watch.timings
    return tuple(timings)


@final
class _Watch:
    """The sampler's callback for one batch: times every step and keeps what is to be written."""

    def __init__(
        self,
        finished: int,
        *,
        keep_states: bool,
        progress: Callable[[StepProgress], None] | None,
    ) -> None:
        self.states: list[StepState] = []
        self.timings: list[StepProgress] = []
        self._finished = finished
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
    tiles = [panels(encode(run.load(index))) for index in range(min(n, GRID_MOST))]
    write_png(run.grid, grid(tiles, columns=math.ceil(math.sqrt(len(tiles)))))


@contextmanager
def _claimed(run: RunFolder) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it until the end, however it comes."""
    if run.path.exists() and not run.path.is_dir():
        raise RunError(f"{run.path} is a file; give a folder for the run")
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / _LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process is sampling into {run.path}; wait for it, or give another folder"
            ) from error
        yield


@contextmanager
def _explained(run: RunFolder, n: int) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, OSError) as interruption:
        finished = sum(run.is_finished(index) for index in range(n))
        interruption.add_note(
            f"{finished} of {n} samples are finished and safe in {run.path}; "
            "start again with the same arguments to go on"
        )
        raise


def _sessions_to_continue(run: RunFolder, settings: RunSettings) -> list[dict[str, Any]]:
    """What was done before in a folder that may be used with these settings."""
    if not run.manifest.exists():
        foreign = [path.name for path in run.path.iterdir() if not path.name.startswith(".")]
        if foreign:
            raise RunError(
                f"{run.path} is not empty and not a run (it has {sorted(foreign)[0]!r}, but no "
                f"{_MANIFEST}); give another folder"
            )
        sessions = []
    else:
        manifest = _read_manifest(run)
        _require_same(run, _settings_of(run, manifest), settings)
        sessions = manifest["sessions"]
    return sessions


def _make_room(run: RunFolder, settings: RunSettings) -> None:
    """Makes the folders inside, and clears them of what killed writers left."""
    for name in ("", "samples", *(["trajectory"] if settings.trajectory else [])):
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


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    )


def _read_manifest(run: RunFolder) -> dict[str, Any]:
    try:
        manifest = json.loads(run.manifest.read_bytes())
    except ValueError as error:
        raise _damaged(run, f"it is not JSON: {error}") from error
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
        settings = RunSettings(**manifest["settings"])
        require_count("n", settings.n, 1)
        require_count("steps", settings.steps, 1)
        sizes = settings.patch_sizes
        return replace(settings, patch_sizes=None if sizes is None else tuple(sizes))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(run, f"its settings are not ours ({error})") from error


def _damaged(run: RunFolder, reason: str) -> RunError:
    return RunError(f"{run.manifest} is damaged: {reason}; give another folder")


def _write_manifest(
    run: RunFolder, settings: RunSettings, sessions: Sequence[dict[str, Any]]
) -> None:
    content = {"format": FORMAT, "version": VERSION, "settings": asdict(settings)}
    write_json(run.manifest, content | {"sessions": list(sessions)})


def _surroundings(machine: ScoreMachine) -> dict[str, Any]:
    try:
        ours = metadata.version("els-machine")
    except metadata.PackageNotFoundError:
        ours = "not installed"
    return {
        "backend": machine.backend,
        "versions": {
            "els-machine": ours,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
