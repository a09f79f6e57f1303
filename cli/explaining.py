"""The command that explains samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from els.cli.console import (
    print_table,
    progress_bar,
    reported,
    size_in_words,
)

# Torch and matplotlib take seconds to import: commands import what they use, help none of it.
if TYPE_CHECKING:
    from els.engine.sampler import StepState
    from els.explain.explanation import Explanation
    from els.index import PatchDatabase

commands = typer.Typer()

_MOST_LISTED = 8


@commands.command(
    epilog="Examples: els explain run --sample 3 --step 13; els explain run --sample 3 --html"
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
            help="The picture (.png, .jpg, .webp, .tiff, .pdf, .svg), or with --html the page; by "
            "default in the run folder: explain-000003-step13.png is of sample 3 at step 13. A "
            "picture's data goes beside it, as .npz.",
        ),
    ] = None,
    html: Annotated[
        bool,
        typer.Option(
            "--html", help="Make a page to explore instead: every pixel's patches, step by step."
        ),
    ] = False,
    step: Annotated[
        int | None,
        typer.Option(
            help="The step to look at closely; 1 is the first, the noise. If not given, the last; "
            "a page opens at the one at which the fewest patches share a pixel."
        ),
    ] = None,
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
        typer.echo(f"page: {page} ({size_in_words(page.stat().st_size)})")
        return
    if output is not None and output.suffix.lower() in (".html", ".htm"):
        raise ValueError(f"{output} is a page, not a picture; add --html to make one")
    if output is not None:
        require_picture(output)
    steps = read_settings(run).steps
    step = steps if step is None else step
    picture = run / f"explain-{sample:06d}-step{step:02d}.png" if output is None else output
    top = DEFAULT_TOP if top is None else top
    with _stepping(steps) as update:
        explanation, db = explain_run(
            run, sample, database=database, step=step, top=top, threads=threads, progress=update
        )
    data = write_explanation(explanation, db, picture)
    _print_contributors(explanation, db)
    typer.echo(f"picture: {picture}\ndata: {data}")


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
def _stepping(steps: int) -> Iterator[Callable[[StepState], None]]:
    with progress_bar("steps") as progress:
        task = progress.add_task("explaining", total=steps)

        def update(_: StepState) -> None:
            progress.advance(task)

        yield update
