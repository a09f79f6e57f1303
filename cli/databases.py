"""Commands that build databases and patch indices, and show them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID
from rich.table import Table

from els.cli.console import (
    ScheduleOption,
    counting,
    duration,
    in_options,
    print_table,
    progress_bar,
    reported,
    size_in_words,
)
from els.cli.options import memory_given, patch_sizes_given, resize_given

# Torch and matplotlib take seconds to import: commands import what they use, help none of it.
if TYPE_CHECKING:
    from els.index import PatchDatabase, PatchIndex

commands = typer.Typer()

# Classes that are listed, the largest first, where there are more.
_MOST_CLASSES = 20
# Pairs of a pixel and a candidate that tell how long an exact posterior takes: some 0.1 s.
_TRIED_PAIRS = 300_000_000


@commands.command(
    epilog="Examples: els build photos.zip -o db --resize 32 --crop; "
    "els build mnist --per-class 200 -o db; els build cifar10 --split test --limit 1000 -o db"
)
@reported
def build(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder or zip of pictures (labels from dataset.json, metadata.csv or "
            "metadata.jsonl, or from class subfolders), an .npz, .npy or idx file, hf:NAME, "
            "embedded:fashion-mnist; or mnist, fashion-mnist, cifar10, celeba, afhq: files of "
            "torchvision or Keras in data/, else the Hugging Face hub. Of several parts, one: "
            "photos.zip:train."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The database folder to make.")],
    split: Annotated[
        str | None, typer.Option(help="The part of a source that has several, such as test.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Take the first so many images; with --seed, draw them."),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(
            min=1, help="Take the first so many images of each class; with --seed, draw them."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Draw images at random, with --limit in proportion to the classes."
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="Scale every picture to a height and width: 32 or 32x48."),
    ] = None,
    crop: Annotated[
        bool,
        typer.Option(
            "--crop", help="Cut pictures to the proportions of --resize instead of stretching them."
        ),
    ] = False,
    background: Annotated[
        str,
        typer.Option(
            help="What shows through transparency: white, black or #rrggbb; keep: a fourth channel."
        ),
    ] = "white",
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave out pictures that cannot be read, and list them; reads twice."
        ),
    ] = False,
    labels: Annotated[
        Path | None, typer.Option(help="Labels of an .npy or idx SOURCE (.npy or idx).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the database at --output.")
    ] = False,
) -> None:
    """Build a patch database from images; streamed, whole or not at all."""
    from els.index import PatchDatabase, open_source

    images = open_source(
        source,
        split=split,
        labels=labels,
        resize=None if resize is None else resize_given(resize),
        crop=crop,
        background=background,
        limit=limit,
        per_class=per_class,
        seed=seed,
        skip_bad=skip_bad,
    )
    with counting("images") as update:
        db = PatchDatabase.build(images, path=output, overwrite=overwrite, progress=update)
    print_table(_described(db))
    for note in images.notes:
        typer.echo(f"note: {in_options(note, build, source)}", err=True)


@commands.command(epilog="Examples: els info db --verify; els info db --grid images.png")
@reported
def info(
    database: Annotated[Path, typer.Argument(help="The database folder.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and check the content hash.")
    ] = False,
    classes: Annotated[
        bool, typer.Option("--classes", help="List every class, also if there are many.")
    ] = False,
    grid: Annotated[
        Path | None,
        typer.Option(help="Draw images, evenly spread over the database, into this picture."),
    ] = None,
) -> None:
    """Show what a patch database holds."""
    from els.index import PatchDatabase

    db = PatchDatabase.open(database)
    print_table(_described(db, all_classes=classes))
    if grid is not None:
        from els.storage.figures import write_figure

        write_figure(db.show, grid)
        typer.echo(f"grid: {grid}")
    if verify:
        with counting("images") as update:
            db.verify(progress=update)
        typer.echo("verified: the content is what was built")


@commands.command(
    epilog="Example: els sizes db -o sizes.json; els sample db --sizes sizes.json -o run"
)
@reported
def sizes(
    database: Annotated[Path, typer.Argument(help="The database folder.")],
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    schedule: Annotated[
        ScheduleOption, typer.Option(case_sensitive=False, help="Noise over time.")
    ] = ScheduleOption.COSINE,
    excess: Annotated[
        float | None,
        typer.Option(help="Error that a smaller patch may add, as a part of the least: 0.1."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .json file for --sizes.")
    ] = None,
) -> None:
    """Choose a patch size for every step from the data alone, where there is no network.

    The smallest patch whose best linear denoiser of the centre is nearly as good as the largest
    one's. els calibrate finds the sizes of a network instead.
    """
    from els.engine.locality import EXCESS, sizes_of_data
    from els.engine.schedule import schedule_named
    from els.index import PatchDatabase
    from els.storage.files import write_json

    db = PatchDatabase.open(database)
    noise = schedule_named(schedule.value)
    if output is not None and output.suffix != ".json":
        raise ValueError(f"--output {output} must end in .json, as --sizes reads it")
    with counting("images") as progress:
        chosen = sizes_of_data(
            db, steps, noise, excess=EXCESS if excess is None else excess, progress=progress
        )
    table = Table("step", "beta", "patch size", box=None, pad_edge=False)
    for i in range(steps, 0, -1):
        table.add_row(str(steps - i + 1), f"{noise.beta(i / steps):.4f}", str(chosen[i - 1]))
    print_table(table)
    if output is None:
        typer.echo(f"--sizes {','.join(map(str, chosen))}")
    else:
        write_json(output, list(chosen))
        typer.echo(f"--sizes {output}")


@commands.command(name="index", epilog="Example: els index db --patch-sizes 3,5,9 --memory 8GB")
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
    """Build FAISS indices of a database's patches, inside it; started again, it resumes."""
    from els.index import PatchDatabase

    db = PatchDatabase.open(database)
    sizes = patch_sizes_given(patch_sizes)
    if isinstance(sizes, str):
        raise ValueError(f"--patch-sizes must be odd numbers such as 3,5,9, got {sizes!r}")
    chosen = [sizes] if isinstance(sizes, int) else list(sizes)
    _announce(db, [size for size in chosen if overwrite or not db.has_index(size)], threads)
    columns = ("patch size", "patches", "factory", "size", "--tolerance reads it from beta")
    table = Table(*columns, box=None, pad_edge=False)
    for size in chosen:
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
                    memory=memory_given(memory),
                    threads=threads,
                    overwrite=overwrite,
                    progress=update,
                )
        amount = size_in_words(made.size_bytes)
        table.add_row(str(size), f"{made.count:,}", made.factory, amount, _read_from(made))
    print_table(table)


def _read_from(index: PatchIndex) -> str:
    """The noise variance from which an index's lists tell weights well enough."""
    from els.engine.backends.native_lists import least_beta

    return "never" if index.inverted is None else f"{least_beta(index.inverted):.4f}"


def _announce(db: PatchDatabase, sizes: Sequence[int], threads: int | None) -> None:
    """Say what the indices will cost, and what that is beside the work that they save."""
    from els.engine.approximate.auto import is_little
    from els.engine.backends.cores import available_cores
    from els.index.patches.factory import build_cost
    from els.index.patches.rows import PatchRows

    for size in sizes:
        rows = PatchRows.of(db, size)
        seconds, most = build_cost(rows.count, rows.dimension, threads or available_cores())
        step = _exact_seconds(db, size)
        typer.echo(
            f"P {size}: {rows.count:,} patches; about {duration(seconds)} and "
            f"at most {size_in_words(most)}, twice that while it is built. An exact step of one "
            f"image takes {duration(step)}, so the index costs as much as {seconds / step:,.0f} of "
            "them.",
            err=True,
        )
        pixels = math.prod(db.shape[1:])
        if is_little(len(db), pixels, rows.count // len(db)):
            typer.echo(
                f"P {size}: with so few images --tolerance computes every step exactly; the index "
                "serves mode='topk' and 'lists' alone.",
                err=True,
            )


def _exact_seconds(db: PatchDatabase, patch_size: int) -> float:
    """Of an exact posterior of one image, from some training images."""
    import torch

    from els.engine import ScoreMachine
    from els.index import PatchDatabase

    _, height, width = db.shape
    pairs = height * width * (height - patch_size + 1) * (width - patch_size + 1)
    some = PatchDatabase.from_arrays(db.images[: max(1, _TRIED_PAIRS // pairs)])
    machine = ScoreMachine(some)
    x = torch.zeros((1, *db.shape), device=machine.device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        machine.posterior(x, alpha=0.9, sigma=0.4, patch_size=patch_size, entropy=False)
        times.append(time.perf_counter() - start)
    return min(times) * len(db) / len(some)


def _described(db: PatchDatabase, *, all_classes: bool = False) -> Table:
    channels, height, width = db.shape
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("images", f"{len(db):,}")
    table.add_row("shape", f"{height} x {width}, {channels} channel{'s' * (channels > 1)}")
    table.add_row("size", size_in_words(db.size_bytes))
    table.add_row("content", db.content_hash)
    table.add_row("path", str(db.path))
    for row, size in enumerate(db.index_sizes):
        index = db.open_index(size)
        told = f"P {size:2d}  {size_in_words(index.size_bytes):>12}  {index.factory}"
        if index.inverted is not None:
            told += f"  --tolerance reads it from beta {_read_from(index)}"
        table.add_row("" if row else "indices", told)
    if not db.index_sizes:
        table.add_row("indices", "none")
    if db.labels is None:
        table.add_row("classes", "none")
        return table
    counts = Counter(db.labels.tolist())
    # Without names, numbers that are no label are left out: there may be billions.
    labels = list(range(db.num_classes) if db.class_names else sorted(counts))
    hidden = 0 if all_classes else max(0, len(labels) - _MOST_CLASSES)
    if hidden:
        labels = sorted(labels, key=lambda label: -counts[label])[:_MOST_CLASSES]
    for row, label in enumerate(labels):
        name = db.class_names[label] if db.class_names else ""
        table.add_row("" if row else "classes", f"{label:3d}  {counts[label]:7,}  {name}")
    if hidden:
        table.add_row("", f"... and {hidden:,} more (els info --classes)")
    return table


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
