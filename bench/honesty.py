"""Whether ``mode="auto"`` keeps its tolerance, and what it claims against what is true.

``python -m els.bench.honesty SOURCE`` asks exact and approximate posteriors of held-out images of a
source, and of images that the sampler passes through, at several noise levels, machines and seeds,
and prints a row for each cell. It exits with 1 where a cell fails: the mean absolute error is at
most the tolerance for :data:`LEAST_KEPT` of the (query, seed) pairs and never above
:data:`MOST_EXCEEDED` times it, and the mean claim is between the two :data:`CLAIMS` times the mean
error.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from els.bench.workloads import load_images
from els.engine import ScoreMachine, sample
from els.engine.sampler import StepState
from els.engine.schedule import Cosine
from els.index import PatchDatabase, decode
from els.storage.files import write_json

if TYPE_CHECKING:
    from els.engine.kinds import Boundary

# Share of the (query, seed) pairs whose error is at most the tolerance, at least.
LEAST_KEPT = 0.95
# Largest error, in tolerances.
MOST_EXCEEDED = 1.5
# Least and largest ratio of the mean claim to the mean error.
CLAIMS = (0.8, 2.0)
# Noise variances and patch sizes: what trained networks of 32 x 32 pixels see (arXiv 2412.20292).
NOISE = ((0.006, 3), (0.05, 3), (0.2, 5), (0.5, 9), (0.8, 15))
# Steps of the samples that queries are taken from.
STEPS = 10
MACHINES: tuple[tuple[str, Boundary], ...] = (
    ("ELS", "circular"),
    ("ELS", "zeros"),
    ("LS", "zeros"),
)

app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Cell:
    """What was found for a machine at a noise level.

    Attributes:
        kind: of the machine.
        boundary: of the machine.
        beta: noise variance.
        patch_size: P.
        error: mean absolute error, the mean over queries and seeds.
        claim: what was claimed of it, likewise.
        kept: share of (query, seed) pairs whose error is at most the tolerance.
        worst: largest error, in tolerances.
        exact: share of the pairs for which everything was computed.
        seconds: of an approximate posterior.
        exact_seconds: of an exact one.
    """

    kind: str
    boundary: str
    beta: float
    patch_size: int
    error: float
    claim: float
    kept: float
    worst: float
    exact: float
    seconds: float
    exact_seconds: float

    def objections(self) -> Iterator[str]:
        """What is wrong with it; nothing where everything was computed."""
        if self.kept < LEAST_KEPT:
            yield f"kept in {self.kept:.0%} only"
        if self.worst > MOST_EXCEEDED:
            yield f"exceeded {self.worst:.2f} times"
        # Rounding is claimed by nobody.
        if self.exact < 1 and not CLAIMS[0] <= self.claim / max(self.error, 1e-6) <= CLAIMS[1]:
            yield f"claims {self.claim / max(self.error, 1e-6):.2f} times its error"


@dataclass(frozen=True)
class Query:
    """A noisy image ``[1, C, H, W]``, float32, and its noise."""

    x: Tensor
    alpha: float
    sigma: float


def held_out(clean: np.ndarray, beta: float, seed: int) -> list[Query]:
    """Clean images, uint8 ``[n, C, H, W]``, at a noise level."""
    alpha, sigma = (1 - beta) ** 0.5, beta**0.5
    noise = np.random.default_rng(seed).standard_normal(clean.shape)
    noisy = torch.from_numpy((alpha * decode(clean) + sigma * noise).astype(np.float32))
    return [Query(x, alpha, sigma) for x in torch.split(noisy, 1)]


def sampled(machine: ScoreMachine, count: int, tolerance: float) -> list[list[Query]]:
    """What the sampler asks nearest to each noise level: ``count`` queries each."""
    betas = np.array([beta for beta, _ in NOISE])
    times = (np.arange(STEPS) + 1) / STEPS
    nearest = np.abs(betas[:, None] - [Cosine().sigma(t) ** 2 for t in times])
    steps: list[StepState] = []
    sample(
        machine,
        count,
        STEPS,
        [NOISE[i][1] for i in nearest.argmin(0)],
        callback=steps.append,
        batch_size=count,
        tolerance=tolerance,
    )
    by_step = {state.step: state for state in steps}
    chosen = [by_step[int(step) + 1] for step in nearest.argmin(1)]
    return [
        [Query(x.float(), state.alpha, state.sigma) for x in torch.split(state.x_t, 1)]
        for state in chosen
    ]


def cells(db: PatchDatabase, clean: np.ndarray, tolerance: float, seeds: int) -> Iterator[Cell]:
    """Every machine at every noise level, for as many sampled queries as there are clean images."""
    for kind, boundary in MACHINES:
        machine = ScoreMachine(db, kind, boundary)
        of_sampler = sampled(machine, len(clean), tolerance)
        for (beta, patch_size), more in zip(NOISE, of_sampler, strict=True):
            queries = held_out(clean, beta, patch_size) + more
            errors, claims, modes, times = [], [], [], np.zeros(2)
            for query in queries:
                x = query.x
                asked: dict[str, Any] = {
                    "alpha": query.alpha,
                    "sigma": query.sigma,
                    "patch_size": patch_size,
                    "entropy": False,
                }
                start = time.perf_counter()
                truth = machine.posterior(x, **asked).mean
                times[1] += time.perf_counter() - start
                for seed in range(seeds):
                    start = time.perf_counter()
                    answer = machine.posterior(
                        x, mode="auto", tolerance=tolerance, seed=seed, **asked
                    )
                    times[0] += (time.perf_counter() - start) / seeds
                    errors.append(float((answer.mean - truth).abs().mean()))
                    assert answer.expected_error is not None
                    claims.append(float(answer.expected_error.mean()))
                    modes.append(answer.modes[0])
            times /= len(queries)
            yield Cell(
                kind,
                boundary,
                beta,
                patch_size,
                error=float(np.mean(errors)),
                claim=float(np.mean(claims)),
                kept=float(np.mean(np.array(errors) <= tolerance)),
                worst=max(errors) / tolerance,
                exact=modes.count("exact") / len(modes),
                seconds=float(times[0]),
                exact_seconds=float(times[1]),
            )


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="Images, as of els build.")],
    images: Annotated[int, typer.Option(min=1, help="Of the database.")] = 10_000,
    queries: Annotated[
        int, typer.Option(min=1, help="Held-out images that are asked for, and sampled ones.")
    ] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Of each query.")] = 20,
    tolerance: Annotated[float, typer.Option(help="Mean absolute error.")] = 0.01,
    index: Annotated[bool, typer.Option(help="Build an index of each patch size first.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the cells there, as JSON.")] = None,
) -> None:
    """Ask everything of one source."""
    loaded = load_images(source, images + queries)
    with tempfile.TemporaryDirectory() as folder:
        db = PatchDatabase.from_arrays(loaded[queries:])
        if index:
            db = PatchDatabase.build(loaded[queries:], path=Path(folder) / "db")
            for patch_size in sorted({patch_size for _, patch_size in NOISE}):
                db.build_index(patch_size)
        _ask(db, loaded[:queries], tolerance, seeds, output)


def _ask(
    db: PatchDatabase, clean: np.ndarray, tolerance: float, seeds: int, output: Path | None
) -> None:
    """Print and write every cell."""
    table = Table(
        "machine", "beta", "P", "error", "claim", "kept", "worst", "exact", "s", "exact s"
    )
    found, failures = [], []
    for cell in cells(db, clean, tolerance, seeds):
        found.append(cell)
        failures += [f"{cell.kind} {cell.boundary} {cell.beta}: {o}" for o in cell.objections()]
        table.add_row(
            f"{cell.kind} {cell.boundary}",
            f"{cell.beta}",
            f"{cell.patch_size}",
            f"{cell.error:.4f}",
            f"{cell.claim:.4f}",
            f"{cell.kept:.0%}",
            f"{cell.worst:.2f}",
            f"{cell.exact:.0%}",
            f"{cell.seconds:.2f}",
            f"{cell.exact_seconds:.2f}",
        )
    Console(width=100).print(table)
    if output:
        write_json(output, [asdict(cell) for cell in found])
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    app()
