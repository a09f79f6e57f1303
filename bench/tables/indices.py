"""Tables of how building a patch index grows with the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from els.bench.tables.results import DATA, Case, by_size, load, provenance, table


def index_growth_table() -> str:
    """What an index costs, against the number of images."""
    result = load("index-growth-cpu")
    rows = []
    for case in by_size(result):
        built, default = case["extra"]["build"], searches(case, effort=32)
        cpu = {stage: f"{seconds:.3g}" for stage, seconds in built["cpu_seconds"].items()}
        rows.append(
            [
                DATA[case["parameters"]["data"]],
                f"{case['parameters']['count']:,}",
                f"{built['patches'] / 1e6:.3g}",
                f"{built['lists']:,}",
                cpu["training"],
                cpu["adding"],
                f"{sum(built['cpu_seconds'].values()):.4g}",
                f"{case['median']:.4g}",
                f"{built['memory'] / 1e6:.0f}",
                f"{built['peak_disk'] / 1e6:.0f}",
                f"{built['disk'] / 1e6:.0f}",
                " / ".join(f"{row['codes']:.0f}" for row in default),
                " / ".join(f"{1e3 * row['cpu_seconds']:.3f}" for row in default),
                " / ".join(f"{row['recall']:.2f}" for row in default),
            ]
        )
    header = ["data", "images", "1e6 patches", "lists", "training, CPU s", "adding, CPU s"]
    header += ["build, CPU s", "wall s", "memory, MB", "disk at most, MB", "disk, MB"]
    header += ["codes read", "search, CPU ms", "recall@256"]
    return table(header, rows) + f"\n{provenance(result)}\n"


def index_fit_table() -> str:
    """Power laws of the same, by least squares in logarithms, on Fashion-MNIST."""
    cases = [
        case
        for case in by_size(load("index-growth-cpu"))
        if case["parameters"]["data"] == "fashion-mnist"
    ]
    images = [case["parameters"]["count"] for case in cases]
    built = [case["extra"]["build"] for case in cases]
    search = [searches(case, effort=32)[0] for case in cases]
    quantities = {
        "training, CPU s": [row["cpu_seconds"]["training"] for row in built],
        "adding, CPU s": [row["cpu_seconds"]["adding"] for row in built],
        "build, CPU s": [sum(row["cpu_seconds"].values()) for row in built],
        "memory, MB": [row["memory"] / 1e6 for row in built],
        "disk at most, MB": [row["peak_disk"] / 1e6 for row in built],
        "disk, MB": [row["disk"] / 1e6 for row in built],
        "codes read a query, beta 0.006": [row["codes"] for row in search],
        "search of a query, CPU ms, beta 0.006": [1e3 * row["cpu_seconds"] for row in search],
    }
    rows = []
    for name, values in quantities.items():
        scale, exponent, residuals = power_law([count / 1000 for count in images], values)
        told = " ".join(f"{100 * (residual - 1):+.0f} %" for residual in residuals)
        rows.append([name, f"{scale:.3g} n^{exponent:.2f}", told])
    measured = ", ".join(f"{count:,}" for count in images)
    return table(["n thousand images", "fit", f"measured against fit at {measured}"], rows)


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, list[float]]:
    """Scale and exponent of ``y = scale * x^exponent``, least squares in logarithms, y over it."""
    exponent, offset = np.polyfit(np.log(x), np.log(y), 1)
    scale = float(np.exp(offset))
    fitted = scale * np.asarray(x) ** exponent
    return scale, float(exponent), [float(ratio) for ratio in np.asarray(y) / fitted]


def index_units_table() -> str:
    """What one distance, one patch and one code cost in the build and search of an index."""
    rows = []
    for case in by_size(load("index-growth-cpu")):
        built = case["extra"]["build"]
        few = searches(case, effort=32)[0]
        spent, codes = (
            sum(row[key] for row in searches(case, effort=128))
            - sum(row[key] for row in searches(case, effort=32))
            for key in ("cpu_seconds", "codes")
        )
        code = spent / codes
        adding = built["cpu_seconds"]["adding"] / built["patches"]
        training = built["cpu_seconds"]["training"] / (10 * 64 * built["lists"] ** 2)
        rows.append(
            [
                DATA[case["parameters"]["data"]],
                f"{case['parameters']['count']:,}",
                f"{built['lists']:,}",
                f"{1e9 * training:.2f} ns",
                f"{1e6 * adding:.1f} us",
                f"{1e9 * code:.1f} ns",
                f"{few['codes'] / 32 / (built['patches'] / built['lists']):.2f}",
                f"{built['largest_list'] / built['patches']:.4f}",
            ]
        )
    header = ["data", "images", "lists", "training, per 640 lists^2", "adding a patch"]
    header += ["reading a code", "codes per list probed / mean list", "share of the longest list"]
    return table(header, rows)


def searches(case: Case, *, effort: int) -> list[Case]:
    """Searches of a case of bench_growth, at every noise level."""
    return [row for row in case["extra"]["search"]["searches"] if row["effort"] == effort]
