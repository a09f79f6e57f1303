"""The command that compares exact, approximate and other ways to compute a posterior."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from els.cli.console import (
    BoundaryOption,
    print_table,
    reported,
)
from els.cli.options import memory_given, patch_sizes_given

# Torch and matplotlib take seconds to import: commands import what they use, help none of it.
if TYPE_CHECKING:
    from els.bench.compare import Comparison, SampleComparison

commands = typer.Typer()

_LEGEND = """
method         subset N: N random images, extrapolated; topk K: the K nearest patches of an index;
               lists S: a share S of an index's patches; auto T: what meets the tolerance T
s / image-step seconds of one posterior, the median; spread: slowest less fastest, over that
speed-up       of the exact posterior's seconds over these
mean error     mean absolute error of the posterior mean, in pixel values of [-1, 1]; max: largest
claimed        what the method itself expects of the mean error; topk: a bound
omitted        share of the posterior weight that was not computed
recall         share of the K nearest patches that the index found
"""


@commands.command(
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
        BUSY_SPREAD,
        busy_before,
        compare_posteriors,
        compare_samples,
        held_out,
        write_comparison,
    )
    from els.engine.result import require_tolerance
    from els.engine.sampler import require_count
    from els.index import PatchDatabase, decode, open_source

    db = PatchDatabase.open(database)
    levels = _noise_levels(noise, min(db.shape[1:]))
    allowed = memory_given(memory)
    require_count("n", n, 1)
    require_count("samples", samples, 0)
    require_count("seed", seed, 0, most=None)
    require_tolerance(tolerance)
    patch_sizes = None if sizes is None else patch_sizes_given(sizes)
    if samples and patch_sizes is None:
        raise ValueError("--samples needs --sizes: the patch sizes to draw them with")
    if queries is None:
        clean = held_out(db, n, seed)
    else:
        import torch

        images = next(iter(open_source(queries).chunks(n)))[:n]
        clean = torch.from_numpy(decode(images))
    busy = busy_before()
    if busy is not None:
        typer.echo(f"warning: {busy}", err=True)
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
    uneven = sum(row.spread > BUSY_SPREAD for row in rows)
    if uneven:
        typer.echo(
            f"warning: times of {uneven} of {len(rows)} rows vary by more than {BUSY_SPREAD:.0%}: "
            "the machine was busy, or a row is too short to be timed",
            err=True,
        )
    for name in ("bench.json", "pareto.png"):
        if (output / name).exists():
            typer.echo(f"written: {output / name}")


def _noise_levels(text: str, side: int) -> list[tuple[float, int]]:
    """The value of ``--noise``, checked for images whose shorter side is ``side``."""
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
        *("beta", "P", "method", "s / image-step", "spread", "speed-up", "mean error", "max"),
        *("claimed", "omitted", "recall"),
        box=None,
        pad_edge=False,
    )
    for row in rows:
        table.add_row(
            f"{row.beta:g}",
            str(row.patch_size),
            row.method,
            f"{row.seconds:.4f}",
            f"{row.spread:.0%}",
            "" if row.speed_up is None else f"{row.speed_up:.1f}",
            f"{row.mean_error:.5f}",
            f"{row.max_error:.4f}",
            "" if row.claimed is None else f"{row.claimed:.5f}",
            "" if row.omitted is None else f"{row.omitted:.3f}",
            "" if row.recall is None else f"{row.recall:.3f}",
        )
    print_table(table)
    typer.echo(_LEGEND)
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
