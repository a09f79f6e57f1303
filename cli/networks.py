"""The commands ``els train``, ``els calibrate`` and ``els evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID, TextColumn
from rich.table import Table

from els.cli.console import BoundaryOption, ScheduleOption, print_table, progress_bar, reported
from els.cli.options import label_given

# As in els.cli.app: commands import what they use, help none of it.
if TYPE_CHECKING:
    from els.index import PatchDatabase
    from els.networks.evaluate import Evaluation, Machine
    from els.networks.training import TrainingProgress
    from els.runs.run import StepProgress


# Steps of a training after which the time left is told: the first ones take longer.
_FEW_STEPS = 10


class _Network(StrEnum):
    RESNET = "resnet"
    UNET = "unet"
    ATTENTION_UNET = "attention-unet"


class _Normalization(StrEnum):
    NONE = "none"
    GROUP = "group"


class _Prediction(StrEnum):
    EPSILON = "epsilon"
    VELOCITY = "velocity"


class _Local(StrEnum):
    LS = "LS"
    ELS = "ELS"


class _Metric(StrEnum):
    COSINE = "cosine"
    L2 = "l2"


class _Search(StrEnum):
    NEIGHBOURS = "neighbours"
    ALL = "all"


class _Log(StrEnum):
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


class _Precision(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add the commands to ``els``; the entry point of the group ``els.commands``."""
    for command, example in (
        (train, "els train db -o net --network resnet --channels 64 --layers 8"),
        (calibrate, "els calibrate db net -o sizes.json"),
        (evaluate, "els evaluate db net --sizes sizes.json -n 100 -o evaluation"),
    ):
        app.command(epilog=f"Example: {example}")(command)


@reported
def train(
    database: Annotated[Path, typer.Argument(help="The database folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The network folder.")],
    network: Annotated[
        _Network,
        typer.Option(
            help="resnet, unet: convolutions alone, the paper's. attention-unet: self-attention at "
            "the coarse levels, of diffusers."
        ),
    ] = _Network.RESNET,
    channels: Annotated[
        int, typer.Option(help="Features of a layer; of the first level in a UNet.")
    ] = 64,
    layers: Annotated[
        int | None,
        typer.Option(
            help="3 x 3 convolutions of a ResNet, 8 if not given: it sees 2 * layers + 1 pixels. "
            "Of a block of a UNet: 2."
        ),
    ] = None,
    levels: Annotated[int, typer.Option(help="Resolutions of a UNet.")] = 3,
    padding: Annotated[
        BoundaryOption,
        typer.Option(case_sensitive=False, help="What a convolution reads beyond the border."),
    ] = BoundaryOption.ZEROS,
    normalization: Annotated[
        _Normalization | None,
        typer.Option(help="none if not given, as in the paper; group for attention-unet."),
    ] = None,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Tell the network the class.")
    ] = False,
    prediction: Annotated[
        _Prediction,
        typer.Option(
            help="The last layer is the noise, as in the paper, or the velocity, from which the "
            "noise is made: exact where there is little but noise."
        ),
    ] = _Prediction.EPSILON,
    schedule: Annotated[
        ScheduleOption, typer.Option(case_sensitive=False, help="Noise over time.")
    ] = ScheduleOption.COSINE,
    steps: Annotated[int, typer.Option(help="Batches in all.")] = 20_000,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, at the start.")] = 2e-3,
    decay: Annotated[
        float, typer.Option(help="The rate at the end, over that at the start.")
    ] = 0.02,
    average: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.999,
    seed: Annotated[int, typer.Option(help="Of weights, order, times and noise.")] = 0,
    precision: Annotated[
        _Precision,
        typer.Option(
            help="Of the convolutions: bfloat16 on a GPU and float32 on a CPU if auto; CPUs with "
            "AMX are several times faster with bfloat16."
        ),
    ] = _Precision.AUTO,
    device: Annotated[
        str | None, typer.Option(help="Where to train, e.g. cuda:1; a GPU if there is one.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch on a CPU; one per core if not given.")
    ] = None,
    log: Annotated[
        _Log | None,
        typer.Option(
            case_sensitive=False,
            help="Also report the loss there, by the library of that name where it is installed.",
        ),
    ] = None,
) -> None:
    """Train a diffusion network; the same command resumes an interrupted training.

    The folder holds network.json, weights.safetensors (averaged), training.safetensors (to go on),
    loss.csv (step, loss, seconds) and loss.png. All of them are written after 10 seconds and then
    every minute.
    """
    import torch

    from els.engine.devices import device_named
    from els.engine.schedule import describe, schedule_named
    from els.index import PatchDatabase
    from els.networks.architecture import NetworkConfig
    from els.networks.training import TrainingSettings, train_network

    place = device_named(device)
    db = PatchDatabase.open(database)
    if conditional and db.labels is None:
        raise ValueError("--conditional needs labels, but the database has none")
    has_attention = network is _Network.ATTENTION_UNET
    if normalization is None:
        normalization = _Normalization.GROUP if has_attention else _Normalization.NONE
    is_resnet = network is _Network.RESNET
    config = NetworkConfig(
        kind=network.value,
        shape=db.shape,
        channels=channels,
        layers=(8 if is_resnet else 2) if layers is None else layers,
        levels=1 if is_resnet else levels,
        padding=padding.value,
        normalization=normalization.value,
        num_classes=db.num_classes if conditional else 0,
        prediction=prediction.value,
        schedule=describe(schedule_named(schedule.value)),
    )
    is_mixed = precision is _Precision.BFLOAT16 or (
        precision is _Precision.AUTO and place.type == "cuda"
    )
    settings = TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        decay=decay,
        average=average,
        seed=seed,
        precision="bfloat16" if is_mixed else "float32",
    )
    if threads is not None:
        torch.set_num_threads(threads)
    with _training() as update:
        folder = train_network(
            db,
            output,
            config,
            settings,
            device=device,
            progress=update,
            log=None if log is None else log.value,
        )
    typer.echo(f"network: {folder.path}")
    for what, path in (("losses", folder.losses), ("loss curve", folder.picture)):
        if path.exists():
            typer.echo(f"{what}: {path}")


_NetworkName = Annotated[
    str,
    typer.Argument(
        help="A folder of els train, a diffusers UNet2DModel's folder, embedded:NAME, or "
        "module:function, a function that returns a torch module (t, x, label) -> epsilon."
    ),
]
_Label = Annotated[
    str | None,
    typer.Option(help="Class, its number or its name, needed by a class-conditional network."),
]
_Clip = Annotated[
    bool,
    typer.Option("--clip", help="Keep the network's clean image in [-1, 1]; the paper does not."),
]
_Threads = Annotated[
    int | None, typer.Option(help="Threads of the native backend; one per core if not given.")
]
_Device = Annotated[
    str | None,
    typer.Option(help="Where network and machines compute, e.g. cuda:1; a GPU if there is one."),
]


@reported
def calibrate(
    database: Annotated[Path, typer.Argument(help="The images that the network was trained on.")],
    network: _NetworkName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .json file of sizes.")],
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    seeds: Annotated[int, typer.Option(help="Trajectories; their median is the size.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the trajectories' noise.")] = 1,
    machine: Annotated[
        _Local, typer.Option(case_sensitive=False, help="What is compared with the network.")
    ] = _Local.ELS,
    boundary: Annotated[
        BoundaryOption | None,
        typer.Option(
            case_sensitive=False, help="Of the machine; that of the network if not given."
        ),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Odd sizes to compare, such as 3,5,7; all if not given.")
    ] = None,
    metric: Annotated[
        _Metric, typer.Option(help="Cosine similarity of the scores, or their distance.")
    ] = _Metric.COSINE,
    search: Annotated[
        _Search,
        typer.Option(
            help="neighbours: from the last step's best size to one that beats two on either side; "
            "all: every size at every step, three to five times slower."
        ),
    ] = _Search.NEIGHBOURS,
    label: _Label = None,
    clip: _Clip = False,
    threads: _Threads = None,
    device: _Device = None,
) -> None:
    """Find the patch size of every step whose score is closest to a network's.

    Started again, it resumes. A picture goes beside the file; els sample and els evaluate take the
    file as --sizes.
    """
    from els.engine import ScoreMachine
    from els.engine.devices import device_named
    from els.index import PatchDatabase
    from els.networks.calibrate import calibrate as find_sizes
    from els.networks.calibrate import draw_calibration
    from els.networks.denoiser import NetworkDenoiser, open_network

    if output.suffix != ".json":
        raise ValueError(f"--output {output} must end in .json")
    device_named(device)
    db = PatchDatabase.open(database)
    opened = open_network(network)
    _warn_of_other_images(opened.content_hash, db)
    padding = boundary.value if boundary is not None else opened.padding or "zeros"
    compared = ScoreMachine(db, machine.value, padding, threads=threads, device=device)
    with progress_bar("steps") as bar:
        task = bar.add_task("calibrating", total=seeds * steps)
        found = find_sizes(
            compared,
            NetworkDenoiser(opened, db, clip=clip, device=device),
            output,
            steps=steps,
            seeds=seeds,
            seed=seed,
            sizes=None if sizes is None else _odd_sizes(sizes),
            metric=metric.value,
            search=search.value,
            label=db.class_numbers(label_given(label)),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    picture = output.with_suffix(".png")
    draw_calibration(found, picture)
    typer.echo(f"sizes, lowest noise first: {' '.join(map(str, found.sizes))}")
    typer.echo(f"file: {output}")
    if picture.exists():
        typer.echo(f"picture: {picture}")


@reported
def evaluate(
    database: Annotated[Path, typer.Argument(help="The images that the network was trained on.")],
    network: _NetworkName,
    sizes: Annotated[
        Path | None,
        typer.Option(help="The file of els calibrate; sizes.json in the network's folder if none."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder; an existing evaluation is resumed.")
    ] = Path("evaluation"),
    n: Annotated[int, typer.Option("-n", help="Samples; may grow later.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the noise; another than els calibrate's.")] = 0,
    machines: Annotated[
        str,
        typer.Option(
            help="Which machines: bbELS (zeros), ELS (circular), LS, IS, PCA, Wiener, nearest."
        ),
    ] = "bbELS,ELS,LS,IS",
    label: _Label = None,
    clip: _Clip = False,
    threads: _Threads = None,
    device: _Device = None,
) -> None:
    """Compare what a network draws with what the machines draw from the same noise.

    r is Pearson's correlation, r^2 its square, R^2 the coefficient of determination, MSE the mean
    squared error. Memorised are samples whose nearest training image is less than a third as far as
    the second nearest. Writes evaluation.json, scatter.png, grid.png, and all samples.
    """
    from els.engine.devices import device_named
    from els.index import PatchDatabase
    from els.networks.calibrate import read_calibration
    from els.networks.denoiser import NetworkDenoiser, open_network
    from els.networks.evaluate import evaluate as compare
    from els.networks.folders import network_folder

    device_named(device)
    db = PatchDatabase.open(database)
    if sizes is not None and not sizes.exists():
        raise ValueError(f"--sizes {sizes} is not there; els calibrate makes it")
    calibration = read_calibration(sizes or network_folder(network).sizes)
    opened = open_network(network)
    _warn_of_other_images(opened.content_hash, db)
    with _drawing(n, calibration.steps) as update:
        evaluation = compare(
            db,
            NetworkDenoiser(opened, db, clip=clip, device=device),
            calibration,
            output,
            n=n,
            seed=seed,
            machines=_machines(machines),
            label=db.class_numbers(label_given(label)),
            threads=threads,
            device=device,
            progress=update,
        )
    _print_evaluation(evaluation)
    for name in ("evaluation.json", "scatter.png", "grid.png"):
        if (output / name).exists():
            typer.echo(f"written: {output / name}")


def _odd_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise ValueError(f"--sizes must be numbers such as 3,5,7, got {text!r}") from None


def _machines(text: str) -> list[Machine]:
    from els.networks.evaluate import MACHINES

    by_name = {name.lower(): name for name in MACHINES}
    wanted = [name.strip().lower() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in by_name]:
        raise ValueError(f"--machines has {unknown[0]!r}; choose some of {','.join(MACHINES)}")
    return [by_name[name] for name in wanted]


def _warn_of_other_images(content_hash: str | None, db: PatchDatabase) -> None:
    if content_hash not in (None, db.content_hash):
        typer.echo(
            "warning: the network was trained on other images than the database holds", err=True
        )


def _print_evaluation(evaluation: Evaluation) -> None:
    from els.runs.agreement import FIGURES

    table = Table(
        *("machine", "r", "r^2", "R^2", "MSE", "above IS", "memorised"), box=None, pad_edge=False
    )
    for name in evaluation.predictions:
        cells = []
        for figure in FIGURES:
            spread = evaluation.spread(name, figure)
            cells.append(f"{spread.median:.3f} ({spread.lower:.3f} to {spread.upper:.3f})")
        has_ideal = "IS" in evaluation.predictions and name != "IS"
        share = f"{evaluation.share_above(name):.0%}" if has_ideal else ""
        table.add_row(name, *cells, share, f"{evaluation.memorised[name]:.0%}")
    table.add_row("network", *[""] * 5, f"{evaluation.memorised['network']:.0%}")
    print_table(table)
    typer.echo("medians (quartiles); above IS: share of samples with a higher r")


@contextmanager
def _drawing(n: int, steps: int) -> Iterator[Callable[[str, StepProgress], None]]:
    """One bar for the network and each machine."""
    with progress_bar("image-steps") as bar:
        tasks: dict[str, TaskID] = {}

        def update(name: str, done: StepProgress) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=(n - done.finished) * steps)
            bar.advance(tasks[name], done.images)

        yield update


@contextmanager
def _training() -> Iterator[Callable[[TrainingProgress], None]]:
    with progress_bar("steps", TextColumn("{task.fields[told]}")) as bar:
        task = None
        first = 0

        def update(done: TrainingProgress) -> None:
            nonlocal task, first
            if task is None:
                first = done.step
                task = bar.add_task("training", total=None, told="")
            told = f"loss {done.loss:.4f}"
            if done.step < done.steps:
                told += f", {done.kept:,} steps kept"
            # The time left is an estimate from the steps after these, once there are some.
            is_known = done.step - first >= _FEW_STEPS or done.step == done.steps
            total = done.steps if is_known else None
            bar.update(task, completed=done.step, total=total, told=told)

        yield update
