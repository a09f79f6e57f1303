"""Results and the tables made from them.

``python -m els.bench.tables record RAW.json ... bench/results/NAME.json`` keeps of pytest-benchmark
files what a reader needs, ``python -m els.bench.tables evaluation FOLDER NAME`` of an evaluation of
``els evaluate``; ``python -m els.bench.tables tables`` writes the tables of the docs from the
results, and with ``--check`` says whether they are up to date.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from els.bench.tables.gpu import ahead_of_time_table, gpu_table
from els.bench.tables.indices import index_fit_table, index_growth_table, index_units_table
from els.bench.tables.networks import networks_settings_table, networks_table
from els.bench.tables.processes import (
    faults_table,
    many_samples_table,
    processes_model_table,
    processes_table,
)
from els.bench.tables.results import DOCUMENTS, RESULTS, ROOT
from els.bench.tables.speed import (
    alternatives_table,
    growth_table,
    memory_table,
    pairs_table,
    parts_table,
    safety_table,
    sampling_table,
    speed_up_table,
    whole_samples_table,
)

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command()
def record(raw: list[Path], output: Path) -> None:
    """Keep the cases, medians and provenance of a pytest-benchmark file.

    Of several, measured one after another on one machine, the provenance is the last's.
    """
    parts = [json.loads(path.read_text()) for path in raw]
    measured, machine = parts[-1], parts[-1]["machine_info"]
    others = {part["machine_info"]["cpu"]["brand_raw"] for part in parts}
    if len(others) > 1:
        raise typer.BadParameter(f"measured on different processors: {', '.join(sorted(others))}")
    result = {
        "processor": machine["cpu"]["brand_raw"],
        "cores": machine["cpu"]["count"],
        "python": machine["python_version"],
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
        "commit": measured["commit_info"]["id"],
        "dirty": any(part["commit_info"]["dirty"] for part in parts),
        "date": measured["datetime"][:10],
        "unit": "seconds",
        "cases": [
            {
                "test": case["name"].partition("[")[0],
                "parameters": case["params"] or {},
                "extra": case["extra_info"],
                **{key: case["stats"][key] for key in ("rounds", "q1", "median", "q3")},
            }
            for part in parts
            for case in part["benchmarks"]
        ],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


@app.command()
def evaluation(
    folder: Path,
    name: str,
    data: Annotated[str, typer.Option(help="The images, as a reader would look for them.")],
) -> None:
    """Keep the figures, settings and provenance of an evaluation as bench/results/networks/NAME."""
    made = json.loads((folder / "evaluation.json").read_text())
    result = {
        "data": data,
        **{key: made[key] for key in ("settings", "n", "summary", "share_above_IS", "seconds")},
        "made": made["made"],
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "samples": {
            machine: [round(sample["r"], 4) for sample in samples]
            for machine, samples in made["samples"].items()
        },
    }
    target = RESULTS / "networks" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


@app.command()
def tables(
    check: Annotated[bool, typer.Option("--check", help="Only compare; exit 1 if stale.")] = False,
) -> None:
    """Write the tables between the ``<!-- table NAME -->`` marks of the documents."""
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        written = with_tables(text)
        if written != text:
            stale.append(name)
            if not check:
                path.write_text(written, encoding="utf-8")
    if check and stale:
        typer.echo(f"stale tables in {', '.join(stale)}: python -m els.bench.tables tables")
        raise typer.Exit(1)


def with_tables(text: str) -> str:
    """The text with every marked table made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        if start not in text:
            continue
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{make()}{end}{after}"
    return text


TABLES: dict[str, Callable[[], str]] = {
    "speed-up": speed_up_table,
    "whole-samples": whole_samples_table,
    "pairs": pairs_table,
    "alternatives": alternatives_table,
    "sampling": sampling_table,
    "memory": memory_table,
    "ahead-of-time": ahead_of_time_table,
    "gpu": gpu_table,
    "growth": growth_table,
    "growth-indexed": partial(speed_up_table, "growth-indexed-cpu"),
    "index-growth": index_growth_table,
    "index-fit": index_fit_table,
    "index-units": index_units_table,
    "parts": parts_table,
    "safety": safety_table,
    "processes": processes_table,
    "processes-model": processes_model_table,
    "many-samples": many_samples_table,
    "faults": faults_table,
    "networks": networks_table,
    "networks-settings": networks_settings_table,
}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    app()
