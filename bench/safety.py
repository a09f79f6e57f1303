"""The safety factor of ``mode="auto"``, from errors and what their standard errors say.

``python -m els.bench.safety SOURCE SOURCE SOURCE SOURCE --output RESULT`` estimates posteriors of
held-out images of several sources from subsets and, with an index, from as much of its lists as
``auto`` reads first, and compares their errors with the standard errors, without a factor. The
factor is the least multiple of 0.05 with which the claims of :data:`COVERED` of all rows are at
least the errors. The result is kept in bench/results/safety.json, which
``els.engine.approximate.costs.SAFETY`` is to agree with (tests/bench/test_safety.py).
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from els.bench.honesty import MACHINES, NOISE, held_out
from els.bench.workloads import load_images
from els.engine import ScoreMachine
from els.engine.approximate.costs import LARGEST_FIRST_SHARE
from els.engine.approximate.methods import Lists, Method, Subset
from els.index import PatchDatabase
from els.storage.files import write_json

# Share of the rows whose claims are to be at least the errors.
COVERED = 0.9
# Steps in which the factor is given.
STEP = 0.05
# Images of the subsets: what auto begins with, and what it grows to.
SUBSETS = (256, 1024)
# Claims below which a row says nothing: no tolerance is as small.
LEAST_CLAIM = 1e-4

app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Row:
    """Errors and standard errors of one query, means over seeds and pixels.

    Attributes:
        source: of the images.
        kind: of the machine.
        boundary: of the machine.
        beta: noise variance.
        patch_size: P.
        method: with its size.
        error: mean absolute error of the posterior mean.
        claim: what the standard error says of it.
    """

    source: str
    kind: str
    boundary: str
    beta: float
    patch_size: int
    method: str
    error: float
    claim: float

    @property
    def ratio(self) -> float:
        """Of error to claim."""
        return self.error / self.claim


def rows(db: PatchDatabase, clean: np.ndarray, source: str, seeds: int) -> Iterator[Row]:
    """Every machine, noise level, query and method, but those whose claims are below all use."""
    for kind, boundary in MACHINES:
        machine = ScoreMachine(db, kind, boundary)
        for beta, patch_size in NOISE:
            for query in held_out(clean, beta, patch_size):
                asked: dict[str, Any] = {
                    "alpha": query.alpha,
                    "sigma": query.sigma,
                    "patch_size": patch_size,
                }
                truth = machine.posterior(query.x, **asked).mean
                for name, method in _methods(machine, patch_size, query.alpha, query.sigma):
                    found = [
                        machine.posterior(query.x, mode=method, seed=seed, **asked)
                        for seed in range(seeds)
                    ]
                    errors = [float((one.mean - truth).abs().mean()) for one in found]
                    claims = [claim.error for one in found for claim in one.claims]
                    if np.mean(claims) >= LEAST_CLAIM:
                        yield Row(
                            source,
                            kind,
                            boundary,
                            beta,
                            patch_size,
                            name,
                            float(np.mean(errors)),
                            float(np.mean(claims)),
                        )


def factor_of(found: Sequence[Row]) -> float:
    """The least multiple of :data:`STEP` that covers :data:`COVERED` of the rows, at least 1."""
    wanted = float(np.quantile([row.ratio for row in found], COVERED))
    return max(1.0, math.ceil(wanted / STEP - 1e-9) * STEP)


def _methods(
    machine: ScoreMachine, patch_size: int, alpha: float, sigma: float
) -> Iterator[tuple[str, Method]]:
    for images in SUBSETS:
        if 2 * images < len(machine.db):
            yield f"subset {images}", Subset(images)
    if machine.has_lists(patch_size, alpha, sigma):
        yield "lists", Lists(LARGEST_FIRST_SHARE)


@app.command()
def main(
    sources: Annotated[list[str], typer.Argument(help="Images, as of els build; four at least.")],
    output: Annotated[Path, typer.Option(help="Write the rows and the factor there, as JSON.")],
    images: Annotated[int, typer.Option(min=64, help="Of each database.")] = 3000,
    queries: Annotated[int, typer.Option(min=1, help="Held-out images of each source.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Of each query.")] = 6,
    index: Annotated[bool, typer.Option(help="Build indices and sample their lists, too.")] = True,
) -> None:
    """Measure all rows and write the factor."""
    found: list[Row] = []
    for source in sources:
        loaded = load_images(source, images + queries)
        with tempfile.TemporaryDirectory() as folder:
            db = PatchDatabase.build(loaded[queries:], path=Path(folder) / "db")
            if index:
                for patch_size in sorted({patch_size for _, patch_size in NOISE}):
                    db.build_index(patch_size)
            for row in rows(db, loaded[:queries], Path(source).name, seeds):
                found.append(row)
                typer.echo(json.dumps(asdict(row) | {"ratio": round(row.ratio, 3)}))
    factor = factor_of(found)
    write_json(
        output,
        {
            "factor": factor,
            "images": images,
            "queries": queries,
            "seeds": seeds,
            "processor": platform.processor() or platform.machine(),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "rows": [asdict(row) for row in found],
        },
    )
    typer.echo(f"factor {factor:g} from {len(found)} rows; written: {output}")


if __name__ == "__main__":
    app()
