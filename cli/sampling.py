"""Commands that sample and that report on runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import TaskID, TextColumn
from rich.table import Table

from els.cli.console import (
    BoundaryOption,
    ScheduleOption,
    counted,
    counting,
    duration,
    print_table,
    progress_bar,
    reported,
)
from els.cli.options import label_given, patch_sizes_given, warn_of_another_boundary

# Torch and matplotlib take seconds to import: commands import what they use, help none of it.
if TYPE_CHECKING:
    from els.runs.run import RunReport, StepProgress, StepSummary
    from els.runs.status import RunStatus

commands = typer.Typer()

_SECONDS_BETWEEN_LOOKS = 1.0
# Samples that els compare lists one by one.
_MOST_ROWS = 50


class _Machine(StrEnum):
    IS = "IS"
    ES = "ES"
    LS = "LS"
    ELS = "ELS"
    PCA = "PCA"
    WIENER = "Wiener"
    NEAREST = "nearest"


class _Numbering(StrEnum):
    ROWS = "rows"
    ALL = "all"
    NONE = "none"


class _Backend(StrEnum):
    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"
    TRITON = "triton"


@commands.command(
    epilog="Examples: els sample db --sizes fashion-mnist-resnet -o run; "
    "els sample db --machine LS --sizes 5 --label 3 -n 4 -o threes; "
    "els sample db --machine IS -o memorised"
)
@reported
def sample(
    database: Annotated[Path, typer.Argument(help="The database folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run folder; may exist.")],
    n: Annotated[int, typer.Option("-n", help="Number of samples; may grow later.")] = 16,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    machine: Annotated[
        _Machine,
        typer.Option(
            case_sensitive=False,
            help="IS: whole images. ES: their cyclic shifts. LS: patches from the same place. "
            "ELS: patches from everywhere. PCA: pixels that are correlated with a pixel. Wiener: "
            "the best linear denoiser. nearest: the nearest image.",
        ),
    ] = _Machine.ELS,
    boundary: Annotated[
        BoundaryOption,
        typer.Option(case_sensitive=False, help="What a patch reads beyond the border."),
    ] = BoundaryOption.ZEROS,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Patch sizes, needed by LS and ELS: the name of a calibrated table "
            "(fashion-mnist-resnet; a wrong name lists all), one odd number, a comma list or a "
            ".json list with one per step, lowest noise first, or the file of els calibrate."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Sample i depends on this and on i alone.")] = 0,
    label: Annotated[
        str | None,
        typer.Option(help="Draw only on training images of this class: its number or its name."),
    ] = None,
    schedule: Annotated[
        ScheduleOption, typer.Option(case_sensitive=False, help="Noise over time.")
    ] = ScheduleOption.COSINE,
    eta: Annotated[
        float, typer.Option(help="0 (DDIM, deterministic) to 1 (fresh noise in every step).")
    ] = 0.0,
    trajectory: Annotated[
        bool,
        typer.Option(
            "--trajectory",
            help="Keep x_t and the predicted x_0 of every step; els trajectory draws them.",
        ),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples at once; the images do not depend on it. If not given, as many as take "
            "some 20 seconds, at most 16."
        ),
    ] = None,
    backend: Annotated[
        _Backend, typer.Option(case_sensitive=False, help="What computes.")
    ] = _Backend.AUTO,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the native backend; one per core if not given.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Approximate every step to this mean absolute error of a pixel in [-1, 1], e.g. "
            "0.01: many times faster on large data sets, more so after els index."
        ),
    ] = None,
    canvas: Annotated[
        str | None,
        typer.Option(help="Height and width of the samples, such as 48x96 (ELS)."),
    ] = None,
    smooth: Annotated[
        str | None,
        typer.Option(
            help="Average over moved queries: standard deviation and number, such as 0.1x10."
        ),
    ] = None,
    mask_threshold: Annotated[
        float | None,
        typer.Option(
            help="Of PCA, 0 to 1 (default 0.02): how strongly a pixel must be correlated to matter."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where torch and triton compute, e.g. cuda:1; a GPU if there is one."),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            help="Samples to a file; 1: a picture and a file of each. If not given, 1 up to 1,000 "
            "samples, else 1,000; an existing run keeps what it has."
        ),
    ] = None,
    database_shards: Annotated[
        int,
        typer.Option(
            help="Of the processes that torchrun starts, how many share the database; the rest "
            "deal out the samples."
        ),
    ] = 1,
) -> None:
    """Sample images into a run folder; the same command resumes an interrupted run.

    Each finished sample is written at once (samples/*.png and *.npy), at the end a grid.png,
    without words (els grid draws with numbers); run.json holds every setting. Steps count from 1,
    the noise. With other settings an existing run is refused. More than 1,000
    samples are written in shards/ of 1,000 (els merge, els grid, els status).

    On many cores, GPUs or machines: torchrun --nproc-per-node=2 -m els.engine sample db ...
    """
    from els.engine import ScoreMachine, SmoothedDenoiser
    from els.engine.devices import device_named
    from els.engine.mesh import local_device, process_mesh
    from els.engine.schedule import schedule_named
    from els.index import PatchDatabase
    from els.runs.run import sample_run

    if device is not None:
        device_named(device)
    patch_sizes = None if sizes is None else patch_sizes_given(sizes)
    of_canvas = None if canvas is None else _canvas(canvas)
    of_smoothing = None if smooth is None else _smoothing(smooth)
    db = PatchDatabase.open(database)
    with process_mesh(database_shards) as mesh:
        if device is None and backend in (_Backend.AUTO, _Backend.TRITON):
            device = local_device()
        chosen = ScoreMachine(
            db,
            machine.value,
            boundary.value,
            backend.value,
            threads=threads,
            device=device,
            mesh=mesh,
            mask_threshold=mask_threshold,
        )
        smoothed = None
        if of_smoothing is not None:
            std, copies = of_smoothing
            smoothed = SmoothedDenoiser(chosen, std=std, copies=copies, seed=seed)
        speaks = mesh.rank == 0
        if speaks:
            if chosen.is_local and sizes is not None:
                warn_of_another_boundary(sizes, chosen.boundary)
            processes = "" if mesh.world_size == 1 else f"{mesh.world_size} processes, "
            reason = chosen.backend_reason
            typer.echo(f"backend: {processes}{chosen.backend}: {reason}", err=True)
        with _sampling(n, steps, shown=speaks) as update:
            report = sample_run(
                smoothed or chosen,
                output,
                n=n,
                steps=steps,
                patch_sizes=patch_sizes,
                seed=seed,
                schedule=schedule_named(schedule.value),
                eta=eta,
                label=label_given(label),
                trajectory=trajectory,
                batch_size=batch_size,
                tolerance=tolerance,
                canvas=of_canvas,
                shard_size=shard_size,
                progress=update,
                under_way=update,
            )
    if speaks:
        _print_report(report, n)


@commands.command(epilog="Examples: els status run --watch; els status run --memorised")
@reported
def status(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again until no process works on the run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    memorised: Annotated[
        bool,
        typer.Option(
            "--memorised",
            help="Also compare every sample with every training image: memorised are those whose "
            "nearest image is less than a third as far as the second nearest.",
        ),
    ] = False,
    database: Annotated[
        Path | None,
        typer.Option("--db", help="For --memorised: where the database is now, if it was moved."),
    ] = None,
) -> None:
    """Show how far a run is: samples done, rate, time left."""
    from dataclasses import asdict

    from els.runs.status import run_status

    if watch and as_json:
        raise ValueError("--json prints once; leave out --watch")
    if watch and memorised:
        raise ValueError("--memorised compares once; leave out --watch")
    seen = run_status(run, memorised=memorised, database=database)
    if as_json:
        typer.echo(json.dumps(asdict(seen), indent=2))
    elif not watch:
        print_table(_status_table(seen))
    else:
        with Live(_status_table(seen), console=Console(), auto_refresh=False) as live:
            while seen.is_running:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                seen = run_status(run)
                live.update(_status_table(seen), refresh=True)


@commands.command(
    epilog="Examples: els merge run -o samples.npz; els merge run -o part.npz --partial"
)
@reported
def merge(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The .npz file: samples, float32 [n, C, H, W] in [-1, 1], and their indices.",
        ),
    ],
    partial: Annotated[
        bool, typer.Option("--partial", help="Take what is finished of an incomplete run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file at --output.")
    ] = False,
) -> None:
    """Write the samples of a run to one file, in order; streamed, whole or not at all."""
    from els.runs.export import merge_run

    with counting("samples") as update:
        count = merge_run(run, output, partial=partial, overwrite=overwrite, progress=update)
    typer.echo(f"{counted(count, 'sample')}: {output}")


@commands.command(
    epilog="Examples: els grid run -o grid.png --rows 4 --columns 16 --first 100; "
    "els grid run -o best.pdf --indices 3,17,5; els grid run -o new.png --nearest --numbers all"
)
@reported
def grid(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The picture: .png, .jpg, .webp, .tiff, .pdf or .svg; one that is there is "
            "replaced.",
        ),
    ],
    rows: Annotated[int, typer.Option(help="Rows of samples, at most.")] = 8,
    columns: Annotated[int, typer.Option(help="Samples in a row.")] = 8,
    first: Annotated[int, typer.Option(help="Number of the first sample.")] = 0,
    indices: Annotated[
        str | None, typer.Option(help="These samples instead, in this order: 3,17,5.")
    ] = None,
    nearest: Annotated[
        bool,
        typer.Option("--nearest", help="Right of every sample, its nearest training image."),
    ] = False,
    numbers: Annotated[
        _Numbering | None,
        typer.Option(
            case_sensitive=False,
            help="rows: left of each row, the number of its first sample. all: above each sample, "
            "its own, and above a nearest image its. none: pictures alone. If not given, rows, and "
            "with --indices all.",
        ),
    ] = None,
    database: Annotated[
        Path | None, typer.Option("--db", help="Where the database is now, if it was moved.")
    ] = None,
) -> None:
    """Draw samples of a run in one picture.

    With --nearest, also say how far the nearest training images are. Memorised are samples whose
    nearest image is less than a third as far as the second nearest.
    """
    from els.runs.export import draw_grid

    chosen = None if indices is None else _indices(indices)
    drawn = draw_grid(
        run,
        output,
        rows=rows,
        columns=columns,
        first=first,
        indices=chosen,
        nearest=nearest,
        numbers=None if numbers is None else numbers.value,
        database=database,
    )
    if nearest:
        table = Table(
            *("sample", "nearest image", "distance", "second", "ratio", "memorised"),
            box=None,
            pad_edge=False,
        )
        for number, found in drawn:
            assert found is not None
            table.add_row(
                str(number),
                str(found.image),
                f"{found.distance:.4f}",
                f"{found.second:.4f}",
                f"{found.ratio:.3f}",
                "yes" if found.is_memorised else "",
            )
        print_table(table)
        many = sum(found is not None and found.is_memorised for _, found in drawn)
        typer.echo(f"memorised: {many} of {len(drawn)}")
    typer.echo(f"{counted(len(drawn), 'sample')}: {output}")


@commands.command(
    epilog="Examples: els trajectory run --sample 3 -o strip.png; "
    "els trajectory run --sample 3 -o movie.webp"
)
@reported
def trajectory(
    run: Annotated[Path, typer.Argument(help="The folder of a run with --trajectory.")],
    sample: Annotated[int, typer.Option(help="Number of the sample, from 0.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The picture: .webp and .gif move, a frame a step; .png, .jpg, .tiff, .pdf and "
            ".svg have the steps side by side.",
        ),
    ],
) -> None:
    """Draw the steps of a sample: x_t and the predicted x_0, from noise (step 1) to clean."""
    from els.runs.trajectory import draw_trajectory

    steps = draw_trajectory(run, sample, output)
    typer.echo(f"{counted(steps, 'step')}: {output}")


@commands.command(epilog="Example: els compare exact approximate -o compared")
@reported
def compare(
    run: Annotated[Path, typer.Argument(help="The run that counts as true.")],
    other: Annotated[Path, typer.Argument(help="The run that is compared with it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for metrics.json and grid.png.")
    ] = None,
) -> None:
    """Compare the samples of two runs that start from the same noise.

    r is Pearson's correlation, r^2 its square, R^2 the coefficient of determination, MSE the mean
    squared error of pixels in [-1, 1].
    """
    from els.runs.agreement import FIGURES, compare_runs, spread_of

    found = compare_runs(run, other, output)
    table = Table("sample", "r", "r^2", "R^2", "MSE", box=None, pad_edge=False)
    for number, figures in list(found.items())[:_MOST_ROWS]:
        table.add_row(str(number), *(f"{getattr(figures, name):.4f}" for name in FIGURES))
    medians = [spread_of(list(found.values()), name).median for name in FIGURES]
    table.add_row("median", *(f"{median:.4f}" for median in medians))
    print_table(table)
    if len(found) > _MOST_ROWS:
        typer.echo(f"{counted(len(found), 'sample')}, of which {_MOST_ROWS} are shown")
    for name in ("metrics.json", "grid.png"):
        if output is not None and (output / name).exists():
            typer.echo(f"written: {output / name}")


def _indices(text: str) -> list[int]:
    """The value of ``--indices``."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--indices {text!r} must be numbers such as 3,17,5") from None


def _canvas(text: str) -> tuple[int, int]:
    """The value of ``--canvas``."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise ValueError(f"--canvas {text!r} must be a height and a width, such as 48x96") from None
    if height < 1 or width < 1:
        raise ValueError(f"--canvas {text!r}: both sides must be at least 1")
    return height, width


def _smoothing(text: str) -> tuple[float, int]:
    """The value of ``--smooth``."""
    try:
        std, copies = text.lower().split("x")
        found = float(std), int(copies)
    except ValueError:
        raise ValueError(
            f"--smooth {text!r} must be a standard deviation and a number, such as 0.1x10"
        ) from None
    if not 0 < found[0] < float("inf") or found[1] < 1:
        raise ValueError(f"--smooth {text!r}: both must be above 0")
    return found


def _status_table(status: RunStatus) -> Table:
    unknown = "not known yet"
    rate, left = status.samples_per_second, status.seconds_left
    if status.finished == status.n:
        state = "complete"
    elif status.is_running:
        state = "running"
    else:
        state = "stopped; the same els sample command resumes it"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("state", state)
    table.add_row("done", f"{status.finished:,} of {status.n:,} ({status.finished / status.n:.1%})")
    table.add_row("rate", unknown if rate is None else f"{rate:.3g} samples/s")
    if status.is_running:
        table.add_row("left", unknown if left is None else duration(left))
    shards = status.database_shards
    shared = f", in groups of {shards} that share the database" if shards > 1 else ""
    table.add_row("processes", f"{status.processes}{shared}")
    if status.memorised is not None:
        share = status.memorised / max(1, status.finished)
        table.add_row("memorised", f"{status.memorised:,} of {status.finished:,} ({share:.1%})")
    table.add_row("backend", status.backend)
    table.add_row("started", status.started)
    return table


def _print_report(report: RunReport, n: int) -> None:
    typer.echo(f"{counted(n, 'sample')} in {report.folder.path} ({report.computed:,} computed now)")
    typer.echo(f"grid: {report.folder.grid}")
    seconds = report.seconds_per_image_step()
    if seconds is None:
        return
    typer.echo(f"seconds per image-step (median): {seconds:.4g}")
    summaries = report.by_step()
    if any(summary.modes for summary in summaries):
        _print_steps(summaries)
        return
    for size, of_size in report.seconds_by_patch_size().items():
        if size is not None:
            typer.echo(f"  patch size {size:3d}: {of_size:.4g}")


def _print_steps(summaries: Sequence[StepSummary]) -> None:
    """What a tolerance saved, step by step."""
    table = Table(box=None, pad_edge=False)
    for title in ("step", "P", "s per image", "computed", "of the exact work", "expected error"):
        table.add_column(title, justify="left" if title == "computed" else "right")
    for summary in summaries:
        many = sum(summary.modes.values())
        computed = ", ".join(
            mode if count == many else f"{mode} ({count} of {many})"
            for mode, count in summary.modes.items()
        )
        table.add_row(
            str(summary.step),
            "" if summary.patch_size is None else str(summary.patch_size),
            f"{summary.seconds_per_image:.3g}",
            computed,
            f"{summary.work:.1%}",
            f"{summary.error:.4f}",
        )
    print_table(table)
    exact = all(set(summary.modes) == {"exact"} for summary in summaries)
    if exact:
        typer.echo("Every step was exact: approximations would have saved nothing.")


@contextmanager
def _sampling(
    n: int, steps: int, *, shown: bool
) -> Iterator[Callable[[StepProgress], None] | None]:
    if not shown:
        yield None
        return
    speed = TextColumn("{task.fields[seconds]}")
    with progress_bar("image-steps", speed) as progress:
        task: TaskID | None = None
        before = total = 0

        def update(done: StepProgress) -> None:
            nonlocal task, before, total
            if task is None:
                # The time left is that of this session: samples of earlier ones do not count.
                before = done.finished
                total = (n - before) * steps
                task = progress.add_task("sampling", total=total, seconds="")
            size = "" if done.patch_size is None else f", P {done.patch_size:2d}"
            progress.update(
                task,
                # Of the other processes, only what is finished is known.
                completed=(done.finished - before) * steps
                + done.images * (done.step - 1 + done.share),
                description=f"step {done.step:2d}/{steps}{size}",
            )
            if done.share == 1:
                progress.update(task, seconds=f"({done.seconds / done.images:.3f} s)")

        yield update
        if task is not None:
            # The run is complete; the other processes' last batches were not heard of.
            progress.update(task, completed=total)
