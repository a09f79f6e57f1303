"""Settings of a run: everything its samples depend on, and whether two runs agree."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from els.engine.backends import BackendName
from els.engine.kinds import Boundary, kind_named
from els.engine.machines import ScoreMachine
from els.engine.patch_sizes import patch_sizes_for
from els.engine.sampler import (
    SamplePlan,
    require_count,
)
from els.engine.schedule import describe, described
from els.engine.smoothed import Machine, SmoothedDenoiser
from els.index import DatabaseError, PatchDatabase
from els.index.database import short_hash


@dataclass(frozen=True)
class EstimateSource:
    """The kernel and indices that the estimates of an ELS run with a tolerance depend on.

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
class Smoothing:
    """Of a :class:`~els.engine.SmoothedDenoiser`.

    Attributes:
        std: of the moves.
        copies: how many.
    """

    std: float
    copies: int


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
        mask_threshold: of PCA; None for other machines.
        smoothing: over moves of the query, seeded by the run's seed; None for none.
        canvas: height and width of the samples; None for those of the training images.
    """

    database: str
    content_hash: str
    machine: str
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
    mask_threshold: float | None = None
    smoothing: Smoothing | None = None
    canvas: tuple[int, int] | None = None

    def __repr__(self) -> str:
        machine = self.machine if self.boundary is None else f"{self.machine} {self.boundary}"
        parts = [machine, f"{self.n} samples", f"{self.steps} steps", f"seed {self.seed}"]
        for name in ("label", "tolerance", "canvas"):
            value = getattr(self, name)
            parts += [f"{name} {value}"] if value is not None else []
        return f"RunSettings({', '.join(parts)}, {self.backend}, database={self.database!r})"

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
            self.canvas,
        )

    def machine_over(self, db: PatchDatabase, threads: int | None = None) -> Machine:
        """The machine of the run, over its database; errors as of ScoreMachine."""
        machine = ScoreMachine(
            db,
            self.machine,
            self.boundary or "zeros",
            self.backend,
            threads=threads,
            mask_threshold=self.mask_threshold,
        )
        if self.smoothing is None:
            return machine
        std, copies = self.smoothing.std, self.smoothing.copies
        return SmoothedDenoiser(machine, std=std, copies=copies, seed=self.seed)


def database_in_words(settings: RunSettings) -> str:
    """A run's database: its path, first digits of its hash, and what it holds if it is there."""
    try:
        db = PatchDatabase.open(settings.database)
    except DatabaseError:
        db = None
    if db is not None and db.content_hash == settings.content_hash:
        return db.summary
    return f"{settings.database}, content {short_hash(settings.content_hash)}"


def _estimate_source(machine: Machine, plan: SamplePlan) -> EstimateSource | None:
    """The source of a plan's estimates; None for exact runs and machines without indices."""
    if plan.tolerance is None or not machine.is_indexed:
        return None
    found = {size: machine.index(size) for size in sorted(set(plan.patch_sizes or ()))}
    return EstimateSource(
        machine.estimate_kernel,
        {str(size): index.content_hash for size, index in found.items() if index},
    )


def settings_of(
    machine: Machine, plan: SamplePlan, n: int, label: int | None, trajectory: bool
) -> RunSettings:
    """The settings of a run with this machine."""
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
        mask_threshold=machine.mask_threshold,
        smoothing=_smoothing(machine, plan.seed),
        canvas=plan.canvas,
    )


def _smoothing(machine: Machine, seed: int) -> Smoothing | None:
    """How a machine is smoothed, if it is; ValueError for moves of another seed than the run's."""
    if isinstance(machine, ScoreMachine):
        return None
    if machine.seed != seed:
        raise ValueError(
            f"the machine is smoothed with seed={machine.seed}, but the run has seed={seed}: make "
            "them the same, so that the run can be drawn again"
        )
    return Smoothing(machine.std, machine.copies)


def require_sound(settings: RunSettings) -> None:
    """Check settings from a file.

    Raises:
        TypeError, ValueError: naming the setting.
    """
    for name in ("n", "steps", "shard_size"):
        require_count(name, getattr(settings, name), 1)
    require_count("seed", settings.seed, 0, most=None)
    if settings.label is not None:
        require_count("label", settings.label, 0, most=None)
    for name, choices in (
        ("boundary", (None, *get_args(Boundary))),
        ("trajectory", (False, True)),
    ):
        if getattr(settings, name) not in choices:
            raise ValueError(f"{name} is {getattr(settings, name)!r}")
    kind_named(settings.machine)
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
    if settings.smoothing is not None:
        require_count("copies", settings.smoothing.copies, 1)
    for side in settings.canvas or ():
        require_count("canvas", side, 1)
    if settings.patch_sizes is not None:
        patch_sizes_for(settings.patch_sizes, settings.steps)


def settings_from_json(content: dict[str, Any]) -> RunSettings:
    """The inverse of :func:`settings_to_json`; raises TypeError for unknown or missing settings."""
    settings = RunSettings(**content)
    sizes, estimates = settings.patch_sizes, content.get("estimates")
    smoothing, canvas = content.get("smoothing"), content.get("canvas")
    return replace(
        settings,
        patch_sizes=None if sizes is None else tuple(sizes),
        estimates=None if estimates is None else EstimateSource(**estimates),
        smoothing=None if smoothing is None else Smoothing(**smoothing),
        canvas=None if canvas is None else tuple(canvas),
    )


def settings_to_json(settings: RunSettings) -> dict[str, Any]:
    """The settings as JSON, without the keys of what a run has not, as in older versions."""
    content = asdict(settings)
    for name in ("estimates", "mask_threshold", "smoothing", "canvas"):
        if content[name] is None:
            del content[name]
    return content
