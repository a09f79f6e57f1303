"""How well two images of the same noise agree: correlation, determination, squared error.

- ``r``: Pearson's correlation over all pixels and channels; 0 where an image is constant.
- ``r_squared``: ``r * r``.
- ``determination``: the coefficient of determination, ``1 - sum (a - b)^2 / sum (a - its mean)^2``,
  which no scale or offset is forgiven.
- ``mse``: mean squared error, of pixels in [-1, 1].

Published code reports r under the name r^2, so all are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from els.index import encode
from els.runs.folder import RunFolder, read_settings
from els.runs.stores import RunError, united, within
from els.storage.figures import optional_picture
from els.storage.files import write_json
from els.storage.labelled import Labels, write_grid
from els.storage.png import Pixels, panels

Image = npt.NDArray[np.float32]

FIGURES = ("r", "r_squared", "determination", "mse")
# Samples of the picture, at most.
_GRID_MOST = 12


@dataclass(frozen=True)
class Agreement:
    """The agreement of an image with a true one; see the module."""

    r: float
    r_squared: float
    determination: float
    mse: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a figure over the samples."""

    lower: float
    median: float
    upper: float


def compared(truth: Image, image: Image) -> Agreement:
    """The figures of one sample; images of one shape, any values."""
    true, guess = truth.astype(np.float64).ravel(), image.astype(np.float64).ravel()
    a, b = true - true.mean(), guess - guess.mean()
    spread = math.sqrt(float(a @ a) * float(b @ b))
    r = float(a @ b) / spread if spread > 0 else 0.0
    missed, total = float(((true - guess) ** 2).sum()), float(a @ a)
    mse = missed / len(true)
    if total == 0:
        return Agreement(r, r * r, 1.0 if missed == 0 else 0.0, mse)
    return Agreement(r, r * r, 1 - missed / total, mse)


def spread_of(agreements: Sequence[Agreement], figure: str) -> Spread:
    """Quartiles of one of ``FIGURES``."""
    values = [getattr(agreement, figure) for agreement in agreements]
    return Spread(*(float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])))


def compare_runs(
    first: str | Path, second: str | Path, output: str | Path | None = None
) -> dict[int, Agreement]:
    """Compare the finished samples that two runs of the same seed have in common.

    Args:
        first: folder of the run that counts as true.
        second: folder of the other.
        output: a folder for ``metrics.json``, and ``grid.png`` with the first samples of both, a
            row a run.

    Returns:
        The figures of each sample, by its number.

    Raises:
        RunError: if a run is missing or damaged, they start from other noise, or share no sample.
    """
    runs = [RunFolder(Path(folder)) for folder in (first, second)]
    settings = [read_settings(run.path) for run in runs]
    one, other = (each.seed for each in settings)
    if one != other:
        raise RunError(
            f"{first} has seed={one} and {second} seed={other}: their samples start from "
            "different noise"
        )
    numbers = [
        {number for part in run.finished(each) for number in within(part, each.n)}
        for run, each in zip(runs, settings, strict=True)
    ]
    common = sorted(numbers[0] & numbers[1])
    if not common:
        raise RunError(f"{first} and {second} have no finished sample in common")
    found = {}
    shown: list[list[Pixels]] = [[], []]
    streams = (_samples(run, common) for run in runs)
    for number, truth, image in zip(common, *streams, strict=True):
        if truth.shape != image.shape:
            raise RunError(
                f"samples of {first} are {truth.shape}, of {second} {image.shape}: not comparable"
            )
        found[number] = compared(truth, image)
        if len(found) <= _GRID_MOST:
            for tiles, values in zip(shown, (truth, image), strict=True):
                tiles.append(panels(encode(values)))
    if output is not None:
        _write(Path(output), runs, found, shown)
    return found


def _samples(run: RunFolder, numbers: Sequence[int]) -> Iterator[Image]:
    """Samples with these ascending numbers; every file is read once, not once a sample."""
    for part in united(range(number, number + 1) for number in numbers):
        for samples in run.samples(part):
            yield from samples


def _write(
    folder: Path,
    runs: Sequence[RunFolder],
    found: dict[int, Agreement],
    shown: Sequence[Sequence[Pixels]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    agreements = list(found.values())
    write_json(
        folder / "metrics.json",
        {
            "runs": [str(run.path.resolve()) for run in runs],
            "samples": len(found),
            "summary": {figure: asdict(spread_of(agreements, figure)) for figure in FIGURES},
            "by_sample": {str(number): asdict(figures) for number, figures in found.items()},
        },
    )
    names = [run.path.resolve().name for run in runs]
    if names[0] == names[1]:
        names = [str(run.path) for run in runs]
    with optional_picture(folder / "grid.png"):
        columns = tuple(str(number) for number in list(found)[:_GRID_MOST])
        labels = Labels(title="samples", rows=tuple(names), columns=columns)
        tiles = [tile for of_run in shown for tile in of_run]
        write_grid(folder / "grid.png", tiles, len(columns), labels)
