"""Result files, and how their figures are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (
    "docs/performance.md",
    "docs/results.md",
    "docs/scaling.md",
    "README.md",
)

FIGURES = ("r", "r_squared", "determination")

DATA = {
    "fashion": "Fashion-MNIST",
    "fashion-mnist": "Fashion-MNIST, 28 x 28",
    "cifar": "CIFAR-10 (JPEG), 32 x 32 x 3",
}

Case = dict[str, Any]
Result = dict[str, Any]


def load(name: str) -> Result:
    result: Result = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def case_of(name: str, test: str) -> Case:
    """The one case of a test."""
    return next(case for case in load(name)["cases"] if case["test"] == test)


def find(cases: Iterable[Case], **parameters: object) -> Case:
    return next(
        case
        for case in cases
        if all(case["parameters"][key] == value for key, value in parameters.items())
    )


def by_size(result: Result) -> list[Case]:
    """Cases of bench_growth by data and number of images."""
    return sorted(
        result["cases"],
        key=lambda case: (case["parameters"]["data"] == "cifar", case["parameters"]["count"]),
    )


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def pairs_per_second(case: Case) -> float:
    return float(case["extra"]["pairs"] / case["median"])


def median_and_quartiles(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['lower']:.3f} to {spread['upper']:.3f})"


def provenance(result: Result) -> str:
    dirty = ", with uncommitted changes" if result["dirty"] else ""
    return (
        f"Medians; {result['processor']}, {result['cores']} cores, torch "
        f"{result['versions']['torch']}; commit {result['commit'][:10]}{dirty}, {result['date']}."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
