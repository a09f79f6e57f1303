"""The command line ``els``: build a database, look at it, sample, explain, collect.

Results go to stdout; progress and errors to stderr. An expected failure is one message without a
traceback and exit code 1; wrong usage is 2, Ctrl-C 130.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from functools import cache
from importlib import metadata
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
    prepare_streams,
    print_table,
    progress_bar,
    reported,
)

# Torch and matplotlib take seconds to import: commands import what they use, help none of it.
if TYPE_CHECKING:
    from els.bench.compare import Comparison, SampleComparison
    from els.engine.sampler import StepState
    from els.explain.explanation import Explanation
    from els.index import PatchDatabase
    from els.runs.run import RunReport, StepProgress
    from els.runs.status import RunStatus

_MOST_LISTED = 8
_SECONDS_BETWEEN_LOOKS = 1.0

app = typer.Typer(
    name="els",
    help="Equivariant local score machines: images from training patches, with no training.",
    epilog="A first run: els build embedded:fashion-mnist -o db, then "
    "els sample db --sizes fashion-mnist-resnet -o run, then els explain run --sample 0",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


class _Machine(StrEnum):
    IS = "IS"
    ES = "ES"
    LS = "LS"
    ELS = "ELS"


class _Backend(StrEnum):
    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"
    TRITON = "triton"


def main() -> None:
    """Run the command line; the console entry point ``els``."""
    prepare_streams()
    command_line()()


@cache
def command_line() -> typer.Typer:
    """The app, with the commands that other packages add to it.

    An entry point of the group ``els.commands`` is a function that takes the app and registers
    commands on it; its module must not import what only its commands need. One that is broken
    costs its own commands only.
    """
    for point in sorted(metadata.entry_points(group="els.commands"), key=lambda point: point.name):
        try:
            register = point.load()
        except (ImportError, AttributeError) as error:
            typer.echo(f"warning: the commands of {point.value} are left out: {error}", err=True)
            continue
        register(app)
    return app


@app.command(epilog="Example: els build photos.zip -o db --resize 32")
@reported
def build(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder or zip of pictures (labels from dataset.json, metadata.csv or "
            "metadata.jsonl, or from class subfolders), an .npz, .npy or idx file, hf:NAME, or "
            "embedded:fashion-mnist."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The database folder to make.")],
    resize: Annotated[
        int | None, typer.Option(min=1, help="Scale every picture to this height and width.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels of an .npy or idx SOURCE (.npy or idx).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the database at --output.")
    ] = False,
) -> None:
    """Build a patch database from images; streamed, whole or not at all."""
    from els.index import PatchDatabase, open_source

    images = open_source(source, labels=labels, resize=resize)
    with _counting("images") as update:
        db = PatchDatabase.build(images, path=output, overwrite=overwrite, progress=update)
    print_table(_described(db))


@app.command(epilog="Example: els info db --verify")
@reported
def info(
    database: Annotated[Path, typer.Argument(help="The database folder.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and check the content hash.")
    ] = False,
) -> None:
    """Show what a patch database holds."""
    from els.index import PatchDatabase

    db = PatchDatabase.open(database)
    print_table(_described(db))
    if verify:
        with _counting("images") as update:
            db.verify(progress=update)
        typer.echo("verified: the content is what was built")


@app.command(name="index", epilog="Example: els index db --patch-sizes 3,5,9 --memory 8GB")
@reported
def build_indices(
    database: Annotated[Path, typer.Argument(help="The database folder.")],
    patch_sizes: Annotated[
        str, typer.Option(help="Odd patch sizes, one index each: a comma list such as 3,5,9.")
    ],
    factory: Annotated[
        str | None,
        typer.Option(help="A FAISS factory string, such as IVF4096,SQ8_direct; else chosen."),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Memory that a build may take, such as 4GB or 800MB.")
    ] = "4GB",
    threads: Annotated[
        int | None, typer.Option(help="Threads of FAISS; one per core if not given.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Build sizes anew that are there already.")
    ] = False,
) -> None:
    """Build FAISS indices of a database's patches, inside it; started again, it goes on."""
    from els.index import PatchDatabase

    db = PatchDatabase.open(database)
    sizes = _patch_sizes(patch_sizes)
    if isinstance(sizes, str):
        raise ValueError(f"--patch-sizes must be odd numbers such as 3,5,9, got {sizes!r}")
    table = Table("patch size", "patches", "factory", "size", box=None, pad_edge=False)
    for size in [sizes] if isinstance(sizes, int) else sizes:
        if db.has_index(size) and not overwrite:
            made = db.open_index(size)
            if factory not in (None, made.factory):
                raise ValueError(
                    f"the index of patch size {size} is there, made with {made.factory!r}, not "
                    f"{factory!r}; replace it with --overwrite"
                )
        else:
            with _staged(f"P {size:2d}") as update:
                made = db.build_index(
                    size,
                    factory=factory,
                    memory=_bytes(memory),
                    threads=threads,
                    overwrite=overwrite,
                    progress=update,
                )
        megabytes = f"{made.size_bytes / 1e6:,.1f} MB"
        table.add_row(str(size), f"{made.count:,}", made.factory, megabytes)
    print_table(table)


@app.command(
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
            "ELS: patches from everywhere.",
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
        int | None, typer.Option(help="Draw only on training images of this class.")
    ] = None,
    schedule: Annotated[
        ScheduleOption, typer.Option(case_sensitive=False, help="Noise over time.")
    ] = ScheduleOption.COSINE,
    eta: Annotated[
        float, typer.Option(help="0 (DDIM, deterministic) to 1 (fresh noise in every step).")
    ] = 0.0,
    trajectory: Annotated[
        bool,
        typer.Option("--trajectory", help="Keep x_t and the predicted x_0 of every step."),
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
    """Sample images into a run folder; the same command goes on with an interrupted run.

    Each finished sample is written at once (samples/*.png and *.npy), a grid.png at the end;
    run.json holds every setting. With other settings an existing run is refused. More than 1,000
    samples are written in shards/ of 1,000 (els merge, els grid, els status).

    On many cores, GPUs or machines: torchrun --nproc-per-node=2 -m els.engine sample db ...
    """
    from els.engine import ScoreMachine
    from els.engine.devices import device_named
    from els.engine.distributed import local_device, process_mesh
    from els.engine.schedule import schedule_named
    from els.index import PatchDatabase
    from els.runs.run import sample_run

    if device is not None:
        device_named(device)
    patch_sizes = None if sizes is None else _patch_sizes(sizes)
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
        )
        speaks = mesh.rank == 0
        if speaks:
            processes = "" if mesh.world_size == 1 else f"{mesh.world_size} processes, "
            reason = chosen.backend_reason
            typer.echo(f"backend: {processes}{chosen.backend}: {reason}", err=True)
        with _sampling(n, steps, shown=speaks) as update:
            report = sample_run(
                chosen,
                output,
                n=n,
                steps=steps,
                patch_sizes=patch_sizes,
                seed=seed,
                schedule=schedule_named(schedule.value),
                eta=eta,
                label=label,
                trajectory=trajectory,
                batch_size=batch_size,
                tolerance=tolerance,
                shard_size=shard_size,
                progress=update,
            )
    if speaks:
        _print_report(report, n)


@app.command(epilog="Example: els status run --watch")
@reported
def status(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep looking until nobody works on the run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how far a run is: samples done, rate, time left."""
    from dataclasses import asdict

    from els.runs.status import run_status

    if watch and as_json:
        raise ValueError("--json prints once; leave out --watch")
    seen = run_status(run)
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


@app.command(epilog="Example: els merge run -o samples.npz")
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
) -> None:
    """Write the samples of a run to one file, in order; streamed, whole or not at all."""
    from els.runs.export import merge_run

    with _counting("samples") as update:
        count = merge_run(run, output, partial=partial, progress=update)
    typer.echo(f"{count:,} samples: {output}")


@app.command(epilog="Example: els grid run -o grid.png --rows 4 --columns 16 --first 100")
@reported
def grid(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture (.png).")],
    rows: Annotated[int, typer.Option(help="Rows of samples, at most.")] = 8,
    columns: Annotated[int, typer.Option(help="Samples in a row.")] = 8,
    first: Annotated[int, typer.Option(help="Number of the first sample.")] = 0,
    indices: Annotated[
        str | None, typer.Option(help="These samples instead, in this order: 3,17,5.")
    ] = None,
) -> None:
    """Draw samples of a run in one picture."""
    from els.runs.export import draw_grid

    chosen = None if indices is None else _indices(indices)
    count = draw_grid(run, output, rows=rows, columns=columns, first=first, indices=chosen)
    typer.echo(f"{count:,} samples: {output}")


@app.command(
    epilog="Example: els bench db --noise 0.006:3,0.05:3,0.2:7 --samples 2 "
    "--sizes fashion-mnist-resnet -o bench"
)
@reported
def bench(
    database: Annotated[Path, typer.Argument(help="The database folder.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for bench.json and pareto.png.")
    ],
    noise: Annotated[
        str, typer.Option(help="Noise variances, each with its patch size: BETA:P,BETA:P,...")
    ] = "0.006:3,0.05:3,0.2:5",
    queries: Annotated[
        str | None,
        typer.Option(
            help="Clean images to add noise to, any source that els build takes; by default "
            "mirrored images of the database."
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Number of queries.")] = 2,
    boundary: Annotated[
        BoundaryOption, typer.Option(case_sensitive=False, help="As of els sample.")
    ] = BoundaryOption.ZEROS,
    tolerance: Annotated[float, typer.Option(help="Of the automatic choice.")] = 0.01,
    with_torch: Annotated[
        bool, typer.Option("--torch", help="Also time the torch backend, which takes long.")
    ] = False,
    with_baselines: Annotated[
        bool,
        typer.Option(
            "--baselines/--no-baselines",
            help="Also time what one would write by hand: chunked torch, and a flat FAISS index. "
            "Of large databases they see the first images only.",
        ),
    ] = True,
    memory: Annotated[
        str, typer.Option(help="What the flat FAISS index may take, such as 4GB or 800MB.")
    ] = "4GB",
    samples: Annotated[
        int, typer.Option(help="Also draw so many whole samples, to the tolerance and exact.")
    ] = 0,
    sizes: Annotated[
        str | None, typer.Option(help="Patch sizes of the samples, as of els sample.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of noise, subsets and samples.")] = 0,
) -> None:
    """Compare approximate posteriors with exact ones: time, error, what they say of it."""
    from els.bench.compare import (
        compare_posteriors,
        compare_samples,
        held_out,
        write_comparison,
    )
    from els.engine.posterior import require_tolerance
    from els.engine.sampler import require_count
    from els.index import PatchDatabase, decode, open_source

    db = PatchDatabase.open(database)
    levels = _noise_levels(noise, min(db.shape[1:]))
    allowed = _bytes(memory)
    require_count("n", n, 1)
    require_count("samples", samples, 0)
    require_count("seed", seed, 0, most=None)
    require_tolerance(tolerance)
    patch_sizes = None if sizes is None else _patch_sizes(sizes)
    if samples and patch_sizes is None:
        raise ValueError("--samples needs --sizes: the patch sizes to draw them with")
    if queries is None:
        clean = held_out(db, n, seed)
    else:
        import torch

        images = next(iter(open_source(queries).chunks(n)))[:n]
        clean = torch.from_numpy(decode(images))
    rows = list(
        compare_posteriors(
            db,
            clean,
            levels,
            boundary=boundary.value,
            tolerance=tolerance,
            seed=seed,
            with_torch=with_torch,
            with_baselines=with_baselines,
            memory=allowed,
            progress=lambda what: typer.echo(what, err=True),
        )
    )
    drawn = None
    if samples and patch_sizes is not None:
        typer.echo(f"{samples} whole samples, exact and to {tolerance:g}", err=True)
        drawn = compare_samples(
            db,
            patch_sizes,
            n=samples,
            boundary=boundary.value,
            tolerance=tolerance,
            seed=seed,
        )
    write_comparison(output, db, rows, drawn)
    _print_comparison(rows, drawn)
    for name in ("bench.json", "pareto.png"):
        if (output / name).exists():
            typer.echo(f"written: {output / name}")


@app.command(
    epilog="Examples: els explain run --sample 3 --step 8; els explain run --sample 3 --html"
)
@reported
def explain(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    sample: Annotated[int, typer.Option(help="Number of the sample, from 0.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The picture (.png, .pdf, .svg), or with --html the page; by default in the run "
            "folder. A picture's data goes beside it, as .npz.",
        ),
    ] = None,
    html: Annotated[
        bool,
        typer.Option(
            "--html", help="Make a page to explore instead: every pixel's patches, step by step."
        ),
    ] = False,
    step: Annotated[
        int, typer.Option(help="The step to look at closely: 1 is the last and cleanest.")
    ] = 1,
    top: Annotated[
        int | None,
        typer.Option(
            help="Heaviest patches per pixel to count at that step (16 if not given); of a page, "
            "to show at every step (6)."
        ),
    ] = None,
    database: Annotated[
        Path | None, typer.Option("--db", help="Where the database is now, if it was moved.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the native backend; one per core if not given.")
    ] = None,
) -> None:
    """Draw where a sample came from: which training patches, how many, from which images."""
    from els.explain.page import require_page, write_page
    from els.explain.picture import require_picture, write_explanation
    from els.explain.replay import DEFAULT_TOP, DEFAULT_WALK_TOP, explain_run, walk_run
    from els.runs.folder import read_settings

    if html:
        page = run / f"explain-{sample:06d}.html" if output is None else output
        require_page(page)
        top = DEFAULT_WALK_TOP if top is None else top
        with _stepping(read_settings(run).steps) as update:
            walkthrough, db = walk_run(
                run, sample, database=database, step=step, top=top, threads=threads, progress=update
            )
        write_page(walkthrough, db, page)
        typer.echo(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB)")
        return
    if output is not None and output.suffix.lower() in (".html", ".htm"):
        raise ValueError(f"{output} is a page, not a picture; add --html to make one")
    picture = run / f"explain-{sample:06d}-step{step:02d}.png" if output is None else output
    require_picture(picture)
    top = DEFAULT_TOP if top is None else top
    with _stepping(read_settings(run).steps) as update:
        explanation, db = explain_run(
            run, sample, database=database, step=step, top=top, threads=threads, progress=update
        )
    data = write_explanation(explanation, db, picture)
    _print_contributors(explanation, db)
    typer.echo(f"picture: {picture}\ndata: {data}")


def _patch_sizes(text: str) -> str | int | list[int]:
    """What ``--sizes`` means: a table's name, one size, or a list, written out or in a file."""
    if text.endswith(".json"):
        from els.storage.manifests import read_json

        try:
            listed = read_json(text)
        except FileNotFoundError:
            raise ValueError(
                f"--sizes {text} is not there; els calibrate makes one, or write a JSON list of "
                "sizes, such as [3, 3, 5]"
            ) from None
        except ValueError as error:
            raise ValueError(f"--sizes {text}: {error}") from None
        if isinstance(listed, dict) and listed.get("format") == "els-sizes":
            listed = listed.get("sizes")
        # JSON's true and 3.0 are no integers, though they equal some.
        if not isinstance(listed, list) or not all(type(size) is int for size in listed):
            raise ValueError(
                f"--sizes {text} must hold a JSON list of integers, such as [3, 3, 5], or come "
                "from els calibrate"
            )
        return listed
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        return text
    return numbers if "," in text else numbers[0]


def _indices(text: str) -> list[int]:
    """What ``--indices`` means."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--indices {text!r} must be numbers such as 3,17,5") from None


def _noise_levels(text: str, side: int) -> list[tuple[float, int]]:
    """What ``--noise`` means for images whose shorter side is given."""
    try:
        levels = [
            (float(beta), int(size)) for beta, size in (pair.split(":") for pair in text.split(","))
        ]
    except ValueError:
        raise ValueError(f"--noise {text!r} must be BETA:P,BETA:P,..., as in 0.05:3") from None
    if not all(0 < beta <= 1 for beta, _ in levels):
        raise ValueError(f"--noise {text!r}: a noise variance is above 0 and at most 1")
    for _, size in levels:
        if size % 2 == 0 or not 1 <= size <= side:
            raise ValueError(f"--noise {text!r}: a patch size is odd, from 1 to {side}")
    return levels


def _print_comparison(rows: list[Comparison], samples: SampleComparison | None) -> None:
    table = Table(
        *("beta", "P", "method", "s / image-step", "speed-up", "mean error", "max", "claimed"),
        *("omitted", "recall"),
        box=None,
        pad_edge=False,
    )
    for row in rows:
        table.add_row(
            f"{row.beta:g}",
            str(row.patch_size),
            row.method,
            f"{row.seconds:.4f}",
            "" if row.speed_up is None else f"{row.speed_up:.1f}",
            f"{row.mean_error:.5f}",
            f"{row.max_error:.4f}",
            "" if row.claimed is None else f"{row.claimed:.5f}",
            "" if row.omitted is None else f"{row.omitted:.3f}",
            "" if row.recall is None else f"{row.recall:.3f}",
        )
    print_table(table)
    for method, note in dict.fromkeys((row.method, row.note) for row in rows if row.note):
        typer.echo(f"{method}: {note}")
    if samples is not None:
        typer.echo(
            f"whole samples to {samples.tolerance:g}: {samples.seconds:.1f} s each "
            f"({samples.first_seconds:.1f} s the first time), "
            f"{samples.speed_up:.1f} times faster, r^2 {samples.r_squared:.4f}, PSNR "
            f"{samples.psnr:.1f} dB; exact ones from noise moved by 0.001: r^2 "
            f"{samples.r_squared_of_moved:.4f}"
        )


def _bytes(text: str) -> int:
    """An amount of memory such as 4GB, 800MB or 1.5 GB."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        amount = round(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        amount = 0
    if amount < 1:
        raise ValueError(f"--memory must be an amount such as 4GB or 800MB, got {text!r}")
    return amount


def _described(db: PatchDatabase) -> Table:
    channels, height, width = db.shape
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("images", f"{len(db):,}")
    table.add_row("shape", f"{height} x {width}, {channels} channel{'s' * (channels > 1)}")
    table.add_row("size", f"{db.size_bytes / 1e6:,.1f} MB")
    table.add_row("content", db.content_hash)
    table.add_row("path", str(db.path))
    if db.labels is None:
        table.add_row("classes", "none")
        return table
    counts = Counter(db.labels.tolist())
    # Without names, numbers that are no label are left out: there may be billions.
    for row, label in enumerate(range(db.num_classes) if db.class_names else sorted(counts)):
        name = db.class_names[label] if db.class_names else ""
        table.add_row("" if row else "classes", f"{label:3d}  {counts[label]:7,}  {name}")
    return table


def _status_table(status: RunStatus) -> Table:
    unknown = "not known yet"
    rate, left = status.samples_per_second, status.seconds_left
    if status.finished == status.n:
        state = "complete"
    elif status.is_running:
        state = "running"
    else:
        state = "stopped; the same els sample command goes on"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("state", state)
    table.add_row("done", f"{status.finished:,} of {status.n:,} ({status.finished / status.n:.1%})")
    table.add_row("rate", unknown if rate is None else f"{rate:.3g} samples/s")
    if status.is_running:
        table.add_row("left", unknown if left is None else str(timedelta(seconds=round(left))))
    shards = status.database_shards
    shared = f", in groups of {shards} that share the database" if shards > 1 else ""
    table.add_row("processes", f"{status.processes}{shared}")
    table.add_row("backend", status.backend)
    table.add_row("started", status.started)
    return table


def _print_report(report: RunReport, n: int) -> None:
    typer.echo(f"{n} samples in {report.folder.path} ({report.computed} computed now)")
    typer.echo(f"grid: {report.folder.grid}")
    seconds = report.seconds_per_image_step()
    if seconds is None:
        return
    typer.echo(f"seconds per image-step (median): {seconds:.4g}")
    for size, of_size in report.seconds_by_patch_size().items():
        if size is not None:
            typer.echo(f"  patch size {size:3d}: {of_size:.4g}")


def _print_contributors(explanation: Explanation, db: PatchDatabase) -> None:
    table = Table("training image", "class", "share of the sample", box=None, pad_edge=False)
    for contributor in explanation.contributors()[:_MOST_LISTED]:
        label = None if db.labels is None else int(db.labels[contributor.image])
        name = "" if label is None else str(label)
        if label is not None and db.class_names is not None:
            name = db.class_names[label]
        table.add_row(str(contributor.image), name, f"{contributor.share:.1%}")
    print_table(table)


@contextmanager
def _counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    with progress_bar(unit) as progress:
        task = progress.add_task("reading", total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


@contextmanager
def _staged(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each stage."""
    with progress_bar("") as progress:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(f"{name} {stage}", total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield update


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
        before = 0

        def update(done: StepProgress) -> None:
            nonlocal task, before
            if task is None:
                # Earlier sessions' samples are not this one's work: the time left is for the rest.
                before = done.finished
                total = (n - before) * steps
                task = progress.add_task("sampling", total=total, seconds="")
            size = "" if done.patch_size is None else f", P {done.patch_size:2d}"
            progress.update(
                task,
                # Of the other processes, only what is finished is known.
                completed=(done.finished - before) * steps + done.images * (steps - done.step + 1),
                description=f"step {steps - done.step + 1:2d}/{steps}{size}",
                seconds=f"({done.seconds / done.images:.3f} s)",
            )

        yield update


@contextmanager
def _stepping(steps: int) -> Iterator[Callable[[StepState], None]]:
    with progress_bar("steps") as progress:
        task = progress.add_task("explaining", total=steps)

        def update(_: StepState) -> None:
            progress.advance(task)

        yield update
