"""How well the score machines predict, sample by sample, what a network draws.

The network and every machine start from the same noise and go through the same DDIM loop. The
figures that compare a machine's image with the network's are those of :mod:`els.runs.agreement`.

An evaluation's folder holds::

    evaluation.json   settings, figures of every sample, medians and quartiles
    network/          what the network drew, 000000.npy and .png
    bbELS/, ELS/, ...   runs of els sample, one for each machine
    scatter.png       r of every sample: a machine against the ideal score machine
    grid.png          rows of noise, network and machines
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from els.engine.kinds import Boundary
from els.engine.machines import ScoreMachine
from els.engine.sampler import StepState, initial_noise, require_count, sample
from els.index import PatchDatabase, encode
from els.networks.calibrate import Calibration
from els.networks.denoiser import NetworkDenoiser
from els.networks.folders import NetworkError, claimed
from els.runs.agreement import FIGURES, Agreement, Spread, compared, spread_of
from els.runs.novelty import nearest_images
from els.runs.run import StepProgress, sample_run
from els.storage.figures import optional_picture, write_figure
from els.storage.files import atomic_file, remove_stale, visible_names, write_json
from els.storage.manifests import package_version, read_json
from els.storage.png import panels, write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Machine: TypeAlias = Literal["bbELS", "ELS", "LS", "IS", "PCA", "Wiener", "nearest"]
Image: TypeAlias = npt.NDArray[np.float32]

FORMAT = "els-evaluation"
VERSION = 1
MACHINES: tuple[Machine, ...] = get_args(Machine)
DEFAULT_MACHINES: tuple[Machine, ...] = ("bbELS", "ELS", "LS", "IS")

_GRID_MOST = 12
_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """All figures of an evaluation.

    Attributes:
        predictions: of each machine, one for every sample, in order.
        memorised: of each machine and the network, the share of samples whose nearest training
            image is a third as far as the second nearest (:mod:`els.runs.novelty`).
        seconds: of each machine and the network, wall time of all sessions.
    """

    predictions: dict[Machine, tuple[Agreement, ...]]
    seconds: dict[str, float]
    memorised: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        medians = [f"{name} {self.spread(name, 'r').median:.3f}" for name in self.predictions]
        count = max((len(each) for each in self.predictions.values()), default=0)
        return f"Evaluation({count} samples, median r: {', '.join(medians)})"

    def spread(self, machine: Machine, figure: str) -> Spread:
        """Quartiles of one of ``FIGURES``."""
        return spread_of(self.predictions[machine], figure)

    def share_above(self, machine: Machine, other: Machine = "IS") -> float:
        """Share of the samples whose r is above the other machine's."""
        pairs = zip(self.predictions[machine], self.predictions[other], strict=True)
        return float(np.mean([ours.r > theirs.r for ours, theirs in pairs]))


def evaluate(
    db: PatchDatabase,
    denoiser: NetworkDenoiser,
    calibration: Calibration,
    folder: str | Path,
    *,
    n: int = 100,
    seed: int = 0,
    machines: Sequence[Machine] = DEFAULT_MACHINES,
    label: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    progress: Callable[[str, StepProgress], None] | None = None,
) -> Evaluation:
    """Draw n samples with the network and each machine, and compare; called again, resume.

    Args:
        db: the images that the network was trained on.
        denoiser: the network.
        calibration: patch sizes of ELS, boundary-broken ELS and LS, and the schedule and steps.
        folder: of the evaluation; it and its parents are made.
        n: samples; may grow from one call to the next.
        seed: of the noise; another than the calibration's.
        machines: which to compare. LS has the boundary of the calibration.
        label: class, needed by a class-conditional network; machines then take its images only.
        threads: of the native backend, None for one per core.
        device: of the machines, None for a GPU if there is one.
        progress: called after every step of every batch, with who drew.

    Raises:
        ValueError: if the calibration belongs to other images, or a value is out of range.
        NetworkError: if the folder holds something else or another evaluation, or is in use.
    """
    require_count("n", n, 1)
    require_count("seed", seed, 0, most=None)
    if calibration.database != db.content_hash:
        raise ValueError(
            "the sizes were calibrated on other images than the database holds; calibrate again"
        )
    unknown = [name for name in machines if name not in MACHINES]
    if unknown or not machines:
        raise ValueError(f"machines={machines!r} must be some of {', '.join(MACHINES)}")
    path = Path(folder)
    settings = _settings(db, denoiser, calibration, seed, label)
    with claimed(path, "evaluating in"):
        seconds = _seconds_of(path, settings)
        started = time.perf_counter()
        drawn = _drawn_by_network(denoiser, calibration, path, n, seed, label, progress)
        _add(seconds, "network", started)
        images: dict[Machine, list[Image]] = {}
        for name in machines:
            started = time.perf_counter()
            kind, boundary = _kind(name, calibration)
            machine = ScoreMachine(db, kind, boundary, threads=threads, device=device)
            report = sample_run(
                machine,
                path / name,
                n=n,
                steps=calibration.steps,
                patch_sizes=calibration.sizes if machine.is_local else None,
                seed=seed,
                schedule=calibration.noise,
                label=label,
                progress=None if progress is None else _named(progress, name),
            )
            images[name] = [report.folder.load(index) for index in range(n)]
            if report.computed:
                _add(seconds, name, started)
        evaluation = Evaluation(
            {
                name: tuple(compared(*pair) for pair in zip(drawn, of_machine, strict=True))
                for name, of_machine in images.items()
            },
            seconds,
            {
                name: float(np.mean([n.is_memorised for n in nearest_images(db, np.stack(of))]))
                for name, of in [("network", drawn), *images.items()]
            },
        )
        _write(path, settings, n, evaluation)
        with optional_picture(path / "grid.png"):
            write_figure(lambda: _grid_figure(seed, drawn, images), path / "grid.png")
        if {"IS"} < set(evaluation.predictions):
            with optional_picture(path / "scatter.png"):
                write_figure(lambda: _scatter(evaluation), path / "scatter.png")
    return evaluation


def _kind(name: Machine, calibration: Calibration) -> tuple[str, Boundary]:
    match name:
        case "bbELS":
            return "ELS", "zeros"
        case "ELS":
            return "ELS", "circular"
        case "LS":
            return "LS", calibration.boundary
        case _:
            return name, "zeros"


def _settings(
    db: PatchDatabase,
    denoiser: NetworkDenoiser,
    calibration: Calibration,
    seed: int,
    label: int | None,
) -> dict[str, Any]:
    channels, height, width = db.shape
    settings = {
        "network": {
            "fingerprint": denoiser.network.fingerprint,
            **denoiser.network.description,
        },
        "clip": denoiser.clip,
        "database": {
            "content_hash": db.content_hash,
            "images": len(db),
            "shape": [channels, height, width],
        },
        "sizes": {
            key: value
            for key, value in asdict(calibration).items()
            if key not in ("per_seed", "agreement")
        }
        | {"sizes": calibration.sizes},
        "seed": seed,
        "label": label,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _seconds_of(path: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """Time spent by earlier sessions, in a folder that may be used with these settings."""
    manifest = path / "evaluation.json"
    remove_stale(path)
    if not manifest.exists():
        foreign = visible_names(path)
        if foreign:
            raise NetworkError(
                f"{path} is not empty and not an evaluation (it has {foreign[0]!r}); give "
                "another folder"
            )
        write_json(manifest, {"format": FORMAT, "version": VERSION, "settings": settings})
        return {}
    try:
        content = read_json(manifest)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError("another format or version")
        there = dict(content["settings"])
        seconds = {name: float(value) for name, value in dict(content.get("seconds", {})).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise NetworkError(f"{manifest} is malformed ({error}); give another folder") from error
    differing = [name for name in settings if there.get(name) != settings[name]]
    if differing:
        raise NetworkError(
            f"{path} holds an evaluation with other settings ({', '.join(differing)}); give the "
            "same to resume it, or another folder"
        )
    return seconds


def _add(seconds: dict[str, float], name: str, started: float) -> None:
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def _drawn_by_network(
    denoiser: NetworkDenoiser,
    calibration: Calibration,
    path: Path,
    n: int,
    seed: int,
    label: int | None,
    progress: Callable[[str, StepProgress], None] | None,
) -> list[Image]:
    """What the network draws; samples that are there are read."""
    folder = path / "network"
    folder.mkdir(exist_ok=True)
    remove_stale(folder)
    files = [folder / f"{index:06d}.npy" for index in range(n)]
    missing = [index for index in range(n) if not files[index].exists()]
    for start in range(0, len(missing), _BATCH):
        indices = missing[start : start + _BATCH]
        clock = time.perf_counter()

        def step_done(state: StepState, finished: int = start) -> None:
            nonlocal clock
            now = time.perf_counter()
            if progress is not None:
                count = len(state.indices)
                done = n - len(missing) + finished
                step = calibration.steps - state.step + 1
                progress("network", StepProgress(done, step, None, count, now - clock))
            clock = now

        images = sample(
            denoiser,
            steps=calibration.steps,
            seed=seed,
            schedule=calibration.noise,
            labels=label,
            indices=indices,
            callback=step_done,
            progress=False,
        )
        for index, image in zip(indices, images.numpy(), strict=True):
            write_png(files[index].with_suffix(".png"), panels(encode(image)))
            with atomic_file(files[index]) as stream:
                np.save(stream, image)
    return [_read_image(file, denoiser.db.shape) for file in files]


def _read_image(file: Path, shape: tuple[int, int, int]) -> Image:
    """A finished image.

    Raises:
        NetworkError: it is damaged.
    """
    try:
        with file.open("rb") as stream:
            image: Image = np.load(stream, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise NetworkError(f"{file} is damaged ({error}); remove it and start again") from error
    if image.shape != shape or image.dtype != np.float32:
        raise NetworkError(
            f"{file} holds {image.dtype} of shape {image.shape}, not float32 of {shape}; remove it "
            "and start again"
        )
    return image


def _named(
    progress: Callable[[str, StepProgress], None], name: str
) -> Callable[[StepProgress], None]:
    return lambda done: progress(name, done)


def _write(path: Path, settings: Mapping[str, Any], n: int, evaluation: Evaluation) -> None:
    summary = {
        name: {figure: asdict(evaluation.spread(name, figure)) for figure in FIGURES}
        for name in evaluation.predictions
    }
    shares = {}
    if "IS" in evaluation.predictions:
        shares = {
            name: evaluation.share_above(name) for name in evaluation.predictions if name != "IS"
        }
    write_json(
        path / "evaluation.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings,
            "n": n,
            "summary": summary,
            "share_above_IS": shares,
            "memorised": evaluation.memorised,
            "seconds": {name: round(value, 1) for name, value in evaluation.seconds.items()},
            "made": {
                "date": datetime.now(UTC).date().isoformat(),
                "els-machine": package_version(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "processor": platform.machine(),
            },
            "samples": {
                name: [asdict(prediction) for prediction in predictions]
                for name, predictions in evaluation.predictions.items()
            },
        },
    )


def _grid_figure(
    seed: int, drawn: Sequence[Image], images: Mapping[Machine, Sequence[Image]]
) -> Figure:
    """Rows of noise, network, and each machine, named; the first samples side by side."""
    from matplotlib.figure import Figure

    count = min(len(drawn), _GRID_MOST)
    noise: list[Image] = [
        (initial_noise(seed, index, drawn[index].shape) / 3).float().numpy()
        for index in range(count)
    ]
    rows: list[tuple[str, Sequence[Image]]] = [
        ("noise", noise),
        ("network", drawn),
        *images.items(),
    ]
    height, width = panels(encode(drawn[0])).shape[:2]
    figure = Figure(
        figsize=(1 + 0.9 * count * width / height, 0.3 + 0.9 * len(rows)), layout="constrained"
    )
    panel_rows = figure.subplots(len(rows), count, squeeze=False)
    for (name, row), axes_row in zip(rows, panel_rows, strict=True):
        axes_row[0].set_ylabel(name)
        for axes, image in zip(axes_row, row, strict=False):
            shown = panels(encode(image))
            axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    for index, axes in enumerate(panel_rows[0]):
        axes.set_title(f"sample {index}", fontsize=8)
    return figure


def _scatter(evaluation: Evaluation) -> Figure:
    """R of every sample: the other machines against the ideal score machine."""
    from matplotlib.figure import Figure

    ideal = [prediction.r for prediction in evaluation.predictions["IS"]]
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    colours = {
        "bbELS": "#0072B2",
        "ELS": "#E69F00",
        "LS": "#009E73",
        "PCA": "#CC79A7",
        "Wiener": "#D55E00",
        "nearest": "#56B4E9",
    }
    lowest = min(ideal)
    for name, predictions in evaluation.predictions.items():
        if name == "IS":
            continue
        values = [prediction.r for prediction in predictions]
        lowest = min(lowest, *values)
        share = f"{100 * evaluation.share_above(name):.0f} % above"
        axes.plot(
            ideal, values, "o", markersize=4, color=colours.get(name), label=f"{name}, {share}"
        )
    axes.plot([lowest, 1], [lowest, 1], color="0.6", linewidth=1)
    # The same ends, so that both axes have the same ticks.
    ends = (lowest - 0.03 * (1 - lowest) - 1e-6, 1 + 0.03 * (1 - lowest) + 1e-6)
    axes.set(xlabel="r of the ideal score machine", ylabel="r of the machine", xlim=ends, ylim=ends)
    axes.set_aspect("equal")
    axes.legend()
    return figure
