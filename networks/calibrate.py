"""Calibration: the patch size whose score is closest to the network's, step by step.

The paper's procedure (arXiv 2412.20292, section 5): the network samples; at every step of its own
trajectory the local machines of all sizes are asked about the same noisy image, and the size whose
score is most like the network's is kept; the median over seeds is the size of the step. Scores and
epsilons of one image differ by a factor, so epsilons are compared.

A sizes file is JSON::

    format, version       "els-sizes", 1
    steps                 of the reverse process
    sizes                 one per step, lowest noise first: size i - 1 belongs to t = i / steps
    kind, boundary        of the machine that was compared
    schedule              name and constants
    metric                "cosine" or "l2"
    candidates            the sizes that were compared
    search                "neighbours" or "all"
    seed, seeds           trajectories (seed, 0), (seed, 1), ...: how many
    label                 class of the trajectories, or null
    clip                  whether the network's estimates were kept in [-1, 1]
    per_seed              for each finished trajectory, its sizes, lowest noise first
    agreement             for each, how close the best size came: the cosine, or minus the distance
    network, database     fingerprints of what was compared, and the number of training images
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from els.engine.kinds import Boundary
from els.engine.machines import ScoreMachine
from els.engine.patch_sizes import patch_sizes_for
from els.engine.sampler import StepState, require_count, sample
from els.engine.schedule import Schedule, describe, described
from els.networks.denoiser import NetworkDenoiser
from els.storage.figures import optional_picture, write_figure
from els.storage.files import write_json
from els.storage.manifests import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metric: TypeAlias = Literal["cosine", "l2"]
LocalKind: TypeAlias = Literal["LS", "ELS"]
Search: TypeAlias = Literal["neighbours", "all"]

FORMAT = "els-sizes"
VERSION = 1

# A size is the best if it beats so many on either side: curves have small bumps.
_REACH = 2
_MAY_DIFFER = {"seeds", "per_seed", "agreement"}
# Patch sizes that are written at the axis of the picture, at most.
_MOST_TICKS = 9


@dataclass(frozen=True)
class Calibration:
    """A sizes file, see the module; ``sizes`` follows from the others."""

    steps: int
    kind: LocalKind
    boundary: Boundary
    schedule: dict[str, str | float]
    metric: Metric
    candidates: tuple[int, ...]
    search: Search
    seed: int
    seeds: int
    label: int | None
    clip: bool
    network: str
    database: str
    images: int
    per_seed: tuple[tuple[int, ...], ...] = ()
    agreement: tuple[tuple[float, ...], ...] = ()

    def __repr__(self) -> str:
        done = f"{len(self.per_seed)} of {self.seeds} seeds"
        sizes = f", P={' '.join(map(str, self.sizes))}" if self.per_seed else ""
        return f"Calibration({self.kind} {self.boundary}, {self.images} images, {done}{sizes})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The median over the seeds, the lower of two; lowest noise first."""
        return tuple(median_low(column) for column in zip(*self.per_seed, strict=True))

    @property
    def is_finished(self) -> bool:
        """Whether all seeds are there."""
        return len(self.per_seed) == self.seeds

    @property
    def noise(self) -> Schedule:
        """The schedule of the steps."""
        return described(self.schedule)


def calibrate(
    machine: ScoreMachine,
    denoiser: NetworkDenoiser,
    path: str | Path,
    *,
    steps: int = 20,
    seeds: int = 8,
    seed: int = 1,
    sizes: Sequence[int] | None = None,
    metric: Metric = "cosine",
    search: Search = "neighbours",
    schedule: Schedule | None = None,
    label: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Calibrate patch sizes into a file; called again with the same settings, resume.

    Args:
        machine: LS or ELS, of the network's boundary, over the images that it was trained on.
        denoiser: the network.
        path: the sizes file; written after every seed.
        steps: of the reverse process.
        seeds: how many trajectories.
        seed: of their noise; evaluation takes another by default.
        sizes: to be compared, odd; None for all from 1 to the image's shorter side.
        metric: ``"cosine"`` similarity of the scores, as in the paper, or ``"l2"`` distance.
        search: ``"all"`` sizes at every step, or ``"neighbours"``: all at the first step, then
            from the step before's best to one that beats two sizes on either side, which is the
            best of all where the similarity has one peak; three to five times cheaper.
        schedule: noise over time; the network's own if None.
        label: class, needed by a class-conditional network.
        progress: called with (steps done, steps in all).

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a value out of range, or a file with other settings.
    """
    require_count("steps", steps, 1)
    require_count("seeds", seeds, 1)
    require_count("seed", seed, 0, most=None)
    for name, value, choices in (("metric", metric, Metric), ("search", search, Search)):
        if value not in get_args(choices):
            raise ValueError(
                f"{name}={value!r} is not known; choose one of {', '.join(get_args(choices))}"
            )
    if machine.kind not in ("LS", "ELS"):
        raise ValueError(f"{machine.kind} has no patch size to calibrate; use LS or ELS")
    side = min(machine.db.shape[1:])
    candidates = tuple(sorted(set(sizes or range(1, side + 1, 2))))
    patch_sizes_for(candidates, len(candidates))
    if candidates[-1] > side:
        raise ValueError(f"sizes={candidates[-1]} is more than the image's shorter side, {side}")
    wanted = Calibration(
        steps=steps,
        kind="LS" if machine.kind == "LS" else "ELS",
        boundary=machine.boundary,
        schedule=describe(schedule or denoiser.network.schedule),
        metric=metric,
        candidates=candidates,
        search=search,
        seed=seed,
        seeds=seeds,
        label=label,
        clip=denoiser.clip,
        network=denoiser.network.fingerprint,
        database=machine.db.content_hash,
        images=len(machine.db),
    )
    path = Path(path)
    done = _to_continue(path, wanted)
    for index in range(len(done.per_seed), seeds):
        best: list[tuple[int, float]] = []

        def step_done(
            state: StepState, best: list[tuple[int, float]] = best, index: int = index
        ) -> None:
            start = best[-1][0] if best and search == "neighbours" else None
            best.append(_best(machine, state, candidates, start, metric, label))
            if progress is not None:
                progress(index * steps + len(best), seeds * steps)

        sample(
            denoiser,
            steps=steps,
            seed=seed,
            schedule=done.noise,
            labels=label,
            indices=[index],
            callback=step_done,
            progress=False,
        )
        done = replace(
            done,
            per_seed=(*done.per_seed, tuple(size for size, _ in reversed(best))),
            agreement=(*done.agreement, tuple(value for _, value in reversed(best))),
        )
        _write(path, done)
    return done


def read_calibration(path: str | Path) -> Calibration:
    """A sizes file.

    Raises:
        ValueError: if it is missing or none, or is not finished.
    """
    calibration = _read(Path(path))
    if not calibration.is_finished:
        raise ValueError(
            f"{path} has {len(calibration.per_seed)} of {calibration.seeds} seeds; the same els "
            "calibrate command resumes it"
        )
    return calibration


def draw_calibration(calibration: Calibration, path: str | Path) -> None:
    """A picture of patch size against noise, and how close the best size comes.

    If it cannot be made, there is a warning and no file at the path.
    """
    with optional_picture(path):
        write_figure(lambda: _drawn(calibration), path)


def _drawn(calibration: Calibration) -> Figure:
    from matplotlib.figure import Figure

    noise = [
        calibration.noise.sigma(step / calibration.steps)
        for step in range(1, calibration.steps + 1)
    ]
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for sizes in calibration.per_seed:
        above.plot(noise, sizes, "o", color="0.75", markersize=3)
    above.plot(noise, calibration.sizes, "o-", color="#0072B2", label="median")
    above.set(
        ylabel="patch size",
        title=f"{calibration.kind}, {calibration.boundary}, {calibration.images:,} images",
        yticks=_odd_ticks([*calibration.sizes, *itertools.chain(*calibration.per_seed)]),
    )
    above.legend()
    agreement = np.array(calibration.agreement)
    if calibration.metric == "cosine":
        below.plot(noise, 1 - np.median(agreement, 0), "o-", color="#D55E00")
        below.set(ylabel="1 - cosine", yscale="log")
    else:
        below.plot(noise, -np.median(agreement, 0), "o-", color="#D55E00")
        below.set(ylabel="distance of epsilons", yscale="log")
    below.set(xlabel="sigma")
    return figure


def _odd_ticks(sizes: Sequence[int]) -> list[int]:
    """At most ``_MOST_TICKS`` odd numbers, evenly spread, from the least of the sizes on."""
    least, most = min(sizes), max(sizes)
    stride = 2 * max(1, -(-(most - least) // (2 * (_MOST_TICKS - 1))))
    return list(range(least, most + 1, stride))


def _best(
    machine: ScoreMachine,
    state: StepState,
    candidates: Sequence[int],
    start: int | None,
    metric: Metric,
    label: int | None,
) -> tuple[int, float]:
    """The best size of one step of one trajectory, and how close it comes."""
    closeness: dict[int, float] = {}

    def compare(place: int) -> None:
        clean = machine.posterior(
            state.x_t.to(machine.device, torch.float32),
            alpha=state.alpha,
            sigma=state.sigma,
            patch_size=candidates[place],
            labels=label,
            entropy=False,
        ).mean
        theirs = _epsilon(state, state.predicted)
        ours = _epsilon(state, clean.to("cpu", torch.float64))
        closeness[place] = _closeness(theirs, ours, metric)

    if start is None:
        for place in range(len(candidates)):
            compare(place)
    else:
        centre = candidates.index(start)
        while True:
            around = range(max(0, centre - _REACH), min(len(candidates), centre + _REACH + 1))
            missing = [place for place in around if place not in closeness]
            if not missing:
                break
            for place in missing:
                compare(place)
            centre = max(closeness, key=closeness.__getitem__)
    best = max(closeness, key=closeness.__getitem__)
    return candidates[best], closeness[best]


def _epsilon(state: StepState, clean: Tensor) -> Tensor:
    return (state.x_t - state.alpha * clean) / state.sigma


def _closeness(theirs: Tensor, ours: Tensor, metric: Metric) -> float:
    if metric == "l2":
        return -float((theirs - ours).norm())
    return float((theirs * ours).sum() / (theirs.norm() * ours.norm()))


def _to_continue(path: Path, wanted: Calibration) -> Calibration:
    """The content of the file, if it was made with the same settings."""
    if not path.exists():
        return wanted
    there = _read(path)
    differing = [
        # A fingerprint tells a reader nothing.
        f"{field.name} is another one here"
        if field.name in ("network", "database")
        else f"{field.name} is {getattr(there, field.name)} there, "
        f"{getattr(wanted, field.name)} here"
        for field in fields(Calibration)
        if field.name not in _MAY_DIFFER
        and getattr(there, field.name) != getattr(wanted, field.name)
    ]
    if len(there.per_seed) > wanted.seeds:
        differing.append(f"it has {len(there.per_seed)} seeds, {wanted.seeds} are wanted")
    if differing:
        raise ValueError(
            f"{path} holds a calibration with other settings: {'; '.join(differing)}; give "
            "another file"
        )
    there = replace(there, seeds=wanted.seeds)
    _write(path, there)
    return there


def _write(path: Path, calibration: Calibration) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "version": VERSION, "sizes": calibration.sizes}
    write_json(path, content | asdict(calibration))


def _read(path: Path) -> Calibration:
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not there; els calibrate makes it") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a sizes file: {error}; els calibrate makes one") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a sizes file; els calibrate makes one")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')}, this els-machine reads {VERSION}; "
            "upgrade els-machine"
        )
    try:
        values = {field.name: content[field.name] for field in fields(Calibration)}
        for name in ("candidates", "per_seed", "agreement"):
            values[name] = tuple(
                tuple(row) if isinstance(row, list) else row for row in values[name]
            )
        _require_sound(values)
        calibration = Calibration(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and calibrate again") from error
    return calibration


def _require_sound(values: Mapping[str, Any]) -> None:
    """Refuses fields of a sizes file that no calibration has.

    Raises:
        TypeError, ValueError: naming the field.
    """
    counts = {"steps": 1, "seeds": 1, "seed": 0, "images": 1}
    if values["label"] is not None:
        counts["label"] = 0
    for name, least in counts.items():
        require_count(name, values[name], least)
    for name, choices in (
        ("kind", get_args(LocalKind)),
        ("boundary", get_args(Boundary)),
        ("metric", get_args(Metric)),
        ("search", get_args(Search)),
        ("clip", (False, True)),
    ):
        if values[name] not in choices:
            raise ValueError(f"{name} is {values[name]!r}")
    for name in ("network", "database"):
        if not isinstance(values[name], str):
            raise TypeError(f"{name} is {values[name]!r}")
    described(values["schedule"])
    patch_sizes_for(values["candidates"], len(values["candidates"]))
    rows, agreement = values["per_seed"], values["agreement"]
    if len(rows) > values["seeds"]:
        raise ValueError(f"it has {len(rows)} of {values['seeds']} seeds")
    for row, closeness in zip(rows, agreement, strict=True):
        patch_sizes_for(row, values["steps"])
        if len(closeness) != len(row) or not all(isinstance(c, int | float) for c in closeness):
            raise ValueError(f"agreement is {closeness!r}")
