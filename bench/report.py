"""Results and the tables made from them.

``python -m els.bench.report record RAW.json bench/results/NAME.json`` keeps of a pytest-benchmark
file what a reader needs, ``python -m els.bench.report evaluation FOLDER NAME`` of an evaluation of
``els evaluate``; ``python -m els.bench.report tables`` writes the tables of the docs from the
results, and with ``--check`` says whether they are up to date.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("docs/performance.md", "docs/results.md", "docs/retrieval.md", "README.md")

_FIGURES = ("r", "r_squared", "determination")
# 132 multiprocessors, four warps of 32 threads a cycle, at 1.755 GHz.
_H100_INSTRUCTIONS = 132 * 4 * 32 * 1.755e9

Case = dict[str, Any]
Result = dict[str, Any]

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command()
def record(raw: Path, output: Path) -> None:
    """Keep the cases, medians and provenance of a pytest-benchmark file."""
    measured = json.loads(raw.read_text())
    machine = measured["machine_info"]
    result = {
        "processor": machine["cpu"]["brand_raw"],
        "cores": machine["cpu"]["count"],
        "python": machine["python_version"],
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
        "commit": measured["commit_info"]["id"],
        "dirty": measured["commit_info"]["dirty"],
        "date": measured["datetime"][:10],
        "unit": "seconds",
        "cases": [
            {
                "test": case["name"].partition("[")[0],
                "parameters": case["params"] or {},
                "extra": case["extra_info"],
                **{key: case["stats"][key] for key in ("rounds", "q1", "median", "q3")},
            }
            for case in measured["benchmarks"]
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
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
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
        typer.echo(f"stale tables in {', '.join(stale)}: python -m els.bench.report tables")
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


def pairs_table() -> str:
    """Speed of the native kernel."""
    result = _load("posterior-cpu")
    chosen = [case for case in result["cases"] if case["test"] == "test_pairs"]
    settings = sorted(
        {tuple(case["parameters"][key] for key in ("data", "boundary", "batch")) for case in chosen}
    )
    sizes = sorted({case["parameters"]["patch_size"] for case in chosen})
    rows = []
    for data, boundary, batch in settings:
        cells = []
        for size in sizes:
            speeds = [
                _pairs_per_second(
                    _find(
                        chosen,
                        data=data,
                        boundary=boundary,
                        batch=batch,
                        threads=threads,
                        patch_size=size,
                    )
                )
                / 1e9
                for threads in (1, 2)
            ]
            cells.append(" / ".join(f"{speed:.2f}" for speed in speeds))
        shape = {"cifar": "CIFAR-10, 32 x 32 x 3", "fashion": "Fashion-MNIST, 28 x 28"}[data]
        rows.append([shape, boundary, str(batch), *cells])
    worst = max(case["extra"]["max_error"] for case in chosen)
    header = ["images", "boundary", "batch", *(f"P = {size}" for size in sizes)]
    note = f"Largest error of the mean in the gates of these cases: {worst:.1e}."
    return _table(header, rows) + f"\n{note} {_provenance(result)}\n"


def alternatives_table() -> str:
    """How many times slower the alternatives are than the native kernel."""
    result = _load("alternatives-cpu")
    chosen = [case for case in result["cases"] if case["test"] == "test_alternatives"]
    sizes = sorted({case["parameters"]["patch_size"] for case in chosen})
    methods = list(dict.fromkeys(case["parameters"]["method"] for case in chosen))
    fastest = {size: _find(chosen, method="native", patch_size=size)["median"] for size in sizes}
    rows = []
    for method in methods:
        medians = [_find(chosen, method=method, patch_size=size)["median"] for size in sizes]
        if method == "native":
            cells = [f"{1e3 * median:.3g} ms" for median in medians]
        else:
            ratios = zip(medians, sizes, strict=True)
            cells = [f"{median / fastest[size]:.3g} x" for median, size in ratios]
        rows.append([method, *cells])
    header = ["method", *(f"P = {size}" for size in sizes)]
    return _table(header, rows) + f"\n{_provenance(result)}\n"


def sampling_table() -> str:
    """Seconds per image-step on a whole data set."""
    result = _load("scale-cpu")
    case = next(case for case in result["cases"] if case["test"] == "test_sampling")
    by_size = case["extra"]["seconds_by_patch_size"]
    header = ["patch size", *by_size]
    rows = [["seconds per image-step", *(f"{seconds:.2f}" for seconds in by_size.values())]]
    return _table(header, rows) + f"\n{_provenance(result)}\n"


def memory_table() -> str:
    """Peak memory."""
    result = _load("scale-cpu")
    extra = next(case for case in result["cases"] if case["test"] == "test_scoring_memory")["extra"]
    header = ["images", "as uint8", "peak of the process"]
    sizes = [f"{extra[key] / 1e6:.0f} MB" for key in ("image_bytes", "peak_bytes")]
    return _table(header, [[f"{extra['images']:,} CIFAR-10", *sizes]]) + "\n"


def ahead_of_time_table() -> str:
    """What the assembler says of the exact kernel as it is shipped."""
    result = _load("ahead-of-time")
    rows = []
    for case in result["cases"]:
        constants = case["constants"]
        chosen = case["kernel"] == "exact" and case["target"] == "sm_90" and case["shipped"]
        if not chosen or constants["C"] != 3 or constants["ENTROPY"]:
            continue
        pairs = constants["ROW_BLOCK"] * constants["COLUMN_BLOCK"] * constants["TOGETHER"]
        instructions = case["instructions"]
        rows.append(
            [
                f"{constants['ROW_BLOCK']} x {constants['COLUMN_BLOCK']}",
                f"{constants['ROW_CHUNKS']} x {constants['COLUMN_CHUNKS']}",
                "float64" if case["precise"] else "2 x float16",
                str(case["registers"]),
                str(case["spills"]),
                str(case["shared"]),
                "" if instructions is None else f"{32 * case['warps'] * instructions / pairs:.0f}",
            ]
        )
    header = ["pairs", "slots", "products", "registers", "spills", "shared", "instructions a pair"]
    return _table(header, rows) + f"\nTriton {result['triton']}, sm_90, C = 3.\n"


def ceilings_table() -> str:
    """Pairs per second at which an H100 would issue the exact kernel's instructions."""
    from els.triton_kernels.configurations import SHIPPED, cheapest
    from els.triton_kernels.tiles import diagonals

    cases = [
        case
        for case in _load("ahead-of-time")["cases"]
        if case["kernel"] == "exact" and case["target"] == "sm_90" and not case["precise"]
    ]
    rows = []
    for boundary in ("circular", "zeros"):
        cells = []
        for size in (3, 5, 9, 17):
            circular = boundary == "circular"
            _, plan = cheapest(
                SHIPPED,
                equivariant=True,
                circular=circular,
                height=32,
                width=32,
                patch_size=size,
            )
            axis = diagonals(equivariant=True, circular=circular, length=32, patch_size=size)
            wanted = {
                "C": 3,
                "ENTROPY": False,
                "ROW_BLOCK": plan.row_block,
                "COLUMN_BLOCK": plan.column_block,
            }
            # What counts is how many blocks of slots there are, not whether of rows or columns.
            chunks = plan.rows.chunks * plan.columns.chunks
            found = [
                case
                for case in cases
                if wanted.items() <= case["constants"].items()
                and case["constants"]["ROW_CHUNKS"] * case["constants"]["COLUMN_CHUNKS"] == chunks
            ]
            if not found:
                cells.append(f"not compiled for {chunks} blocks of slots")
                continue
            case = found[0]
            block = plan.row_block * plan.column_block
            slots = plan.rows.tiles * plan.columns.tiles * block
            pairs = sum(diagonal.length for diagonal in axis) ** 2
            each = 32 * case["warps"] * case["instructions"] / block / case["constants"]["TOGETHER"]
            rate = _H100_INSTRUCTIONS / each * pairs / slots
            cells.append(f"{rate / 1e9:.0f} ({100 * pairs / slots:.0f} % full)")
        rows.append([boundary, *cells])
    return _table(["boundary", *(f"P = {size}" for size in (3, 5, 9, 17))], rows)


def gpu_table() -> str:
    """What gpu_check measured, if it ever ran."""
    path = RESULTS / "gpu-check.json"
    if not path.exists():
        return "No GPU has been measured yet.\n"
    result: Result = json.loads(path.read_text())
    rows = [
        [
            row["data"],
            row["boundary"],
            f"{row['images']:,}",
            str(row["patch_size"]),
            str(row["batch"]),
            f"{row['seconds_per_image_step']:.4f}",
            f"{row['pairs_per_second'] / 1e9:.0f}",
            f"{100 * row['share_of_exp']:.0f} %",
            f"{100 * row['share_of_fma']:.0f} %",
        ]
        for row in result["rows"]
        if row["what"] == "exact"
    ]
    header = ["images", "boundary", "number", "P", "batch", "s per image-step", "1e9 pairs/s"]
    failed = f" The run failed: {result['failure']}." if result["failure"] else ""
    return (
        _table([*header, "of exp ceiling", "of fma ceiling"], rows)
        + f"\n{result['device']}, torch {result['versions']['torch']}, Triton "
        + f"{result['versions']['triton']}; commit {result['commit'][:10]}, {result['date']}."
        + f"{failed}\n"
    )


def growth_table() -> str:
    """Seconds per image-step of mode="auto" without an index, against the number of images."""
    result = _load("approximate-cpu")
    rows = []
    for case in result["cases"]:
        parameters, extra = case["parameters"], case["extra"]
        seconds = case["median"] / extra["queries"]
        rows.append(
            [
                f"{extra['beta']:g}",
                str(parameters["patch_size"]),
                f"{parameters['tolerance']:g}",
                f"{parameters['count']:,}",
                f"{extra['exact_seconds']:.3f}",
                f"{seconds:.3f}",
                f"{extra['exact_seconds'] / seconds:.1f}",
                f"{extra['mean_error']:.4f}",
            ]
        )
    rows.sort(key=lambda row: (row[0], float(row[2]), int(row[3].replace(",", ""))))
    header = ["beta", "P", "tolerance", "images", "exact, s", "auto, s", "times faster", "error"]
    return _table(header, rows) + f"\n{_provenance(result)}\n"


def networks_table() -> str:
    """How well the machines predict each trained network."""
    rows = []
    for path in sorted((RESULTS / "networks").glob("*.json")):
        result: Result = json.loads(path.read_text())
        for machine, figures in result["summary"].items():
            share = result["share_above_IS"].get(machine)
            rows.append(
                [
                    path.stem,
                    machine,
                    *(_median_and_quartiles(figures[key]) for key in _FIGURES),
                    "" if share is None else f"{100 * share:.0f} %",
                    str(result["n"]),
                ]
            )
    return _table(["network", "machine", "r", "r^2", "R^2", "above IS", "n"], rows)


def networks_settings_table() -> str:
    """What each network is, what it was trained on and for how long, and its patch sizes."""
    rows = []
    for path in sorted((RESULTS / "networks").glob("*.json")):
        result: Result = json.loads(path.read_text())
        settings = result["settings"]
        network, sizes = settings["network"], settings["sizes"]
        config, training = network["network"], network["training"]
        depth = f"{config['layers']} layers"
        if config["levels"] > 1:
            depth = f"{config['levels']} levels of {depth}"
        steps = int(network["trained"]["step"])
        minutes = float(network["trained"]["processor_seconds"]) / 60
        rows.append(
            [
                path.stem,
                f"{result['data']}, {settings['database']['images']:,}",
                f"{config['channels']} channels, {depth}, {config['padding']}, "
                f"{config['prediction']}",
                f"{steps:,} x {training['batch_size']}",
                f"{minutes:.0f}",
                " ".join(map(str, sizes["sizes"])),
                str(sizes["seeds"]),
                f"{sum(result['seconds'].values()) / 60:.0f}",
                f"{result['made']['date']}, {result['commit'][:10]}",
            ]
        )
    header = ["network", "images", "architecture", "steps x batch", "minutes", "sizes", "seeds"]
    return _table([*header, "evaluation, minutes", "made"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "pairs": pairs_table,
    "alternatives": alternatives_table,
    "sampling": sampling_table,
    "memory": memory_table,
    "ahead-of-time": ahead_of_time_table,
    "ceilings": ceilings_table,
    "gpu": gpu_table,
    "growth": growth_table,
    "networks": networks_table,
    "networks-settings": networks_settings_table,
}


def _load(name: str) -> Result:
    result: Result = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def _find(cases: Iterable[Case], **parameters: object) -> Case:
    return next(
        case
        for case in cases
        if all(case["parameters"][key] == value for key, value in parameters.items())
    )


def _pairs_per_second(case: Case) -> float:
    return float(case["extra"]["pairs"] / case["median"])


def _median_and_quartiles(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['lower']:.3f} to {spread['upper']:.3f})"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _provenance(result: Result) -> str:
    dirty = ", with uncommitted changes" if result["dirty"] else ""
    return (
        f"Medians; {result['processor']}, {result['cores']} cores, torch "
        f"{result['versions']['torch']}; commit {result['commit'][:10]}{dirty}, {result['date']}."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    app()
