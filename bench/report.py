"""Results and the tables made from them.

``python -m els.bench.report record RAW.json ... bench/results/NAME.json`` keeps of pytest-benchmark
files what a reader needs, ``python -m els.bench.report evaluation FOLDER NAME`` of an evaluation of
``els evaluate``; ``python -m els.bench.report tables`` writes the tables of the docs from the
results, and with ``--check`` says whether they are up to date.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (
    "docs/performance.md",
    "docs/results.md",
    "docs/retrieval.md",
    "docs/scaling.md",
    "README.md",
)

_FIGURES = ("r", "r_squared", "determination")
# 132 multiprocessors, four warps of 32 threads a cycle, at 1.755 GHz.
_H100_INSTRUCTIONS = 132 * 4 * 32 * 1.755e9

_DATA = {
    "fashion": "Fashion-MNIST",
    "fashion-mnist": "Fashion-MNIST, 28 x 28",
    "cifar": "CIFAR-10 (JPEG), 32 x 32 x 3",
}

# The modelled run: ImageNet at 64 x 64 x 3, boundary-broken ELS at P = 9, batches of 16 from 10,000
# samples. Of the GPUs only the order is known; a faster one waits more for the others, and a slower
# network as well. Seconds for a message to the next rank, bytes per second between two ranks.
_MODEL = {"images": 1_280_000, "side": 64, "channels": 3, "patch_size": 9, "samples": 10_000}
_MODEL_BATCH, _MODEL_PAIRS_PER_SECOND = 16, 1e12
_MODEL_LATENCY, _MODEL_BANDWIDTH = 10e-6, 25e9

Case = dict[str, Any]
Result = dict[str, Any]

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
            f"{row['beta']:.3g}",
            str(row["batch"]),
            f"{row['seconds_per_image_step']:.4f}",
            f"{row['pairs_per_second'] / 1e9:.0f}",
            f"{100 * row['share_of_exp']:.0f} %",
            f"{100 * row['share_of_fma']:.0f} %",
        ]
        for row in result["rows"]
        if row["what"] == "exact"
    ]
    header = ["images", "boundary", "number", "P", "beta", "batch"]
    header += ["s per image-step", "1e9 pairs/s"]
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


def speed_up_table(name: str = "speed-up-cpu") -> str:
    """Seconds per image-step of mode="auto" with indices, at the paper's noise levels."""
    result = _load(name)
    rows = []
    for case in result["cases"]:
        extra = case["extra"]
        seconds = case["median"] / extra["queries"]
        has_index = extra["patch_size"] in extra["indices"]
        rows.append(
            [
                f"{extra['images']:,} {_DATA[case['parameters']['data']]}",
                f"{case['parameters']['beta']:g}",
                f"{extra['patch_size']}{'' if has_index else ' (no index)'}",
                f"{extra['exact_seconds']:.2f}",
                f"{seconds:.3f}",
                f"{extra['exact_seconds'] / seconds:.1f}",
                f"{extra['mean_error']:.4f}",
                f"{extra['claimed']:.4f}",
                ", ".join(extra["modes"]),
                " ".join(f"{images:,}" for images in extra["subset_images"]),
            ]
        )
    header = ["data", "beta", "P", "exact, s", "auto, s", "times faster", "error", "claimed"]
    header += ["chosen", "images of each query's subset"]
    return _table(header, rows) + f"\n{_provenance(result)}\n"


def whole_samples_table() -> str:
    """Whole samples to a tolerance."""
    result = _load("whole-samples-cpu")
    rows = [
        [
            f"{case['extra']['images']:,} {_DATA[case['parameters']['data']]}",
            f"{case['extra']['tolerance']:g}",
            str(case["extra"]["samples"]),
            f"{case['extra']['seconds'] * case['extra']['speed_up']:.1f}",
            f"{case['extra']['seconds']:.1f}",
            f"{case['extra']['first_seconds']:.1f}",
            f"{case['extra']['speed_up']:.1f}",
            f"{case['extra']['r_squared']:.4f}",
            f"{case['extra']['psnr']:.1f}",
            f"{case['extra']['r_squared_of_moved']:.4f}",
        ]
        for case in result["cases"]
    ]
    header = ["data", "tolerance", "samples", "exact, s each", "to it, s", "first, s"]
    header += ["times faster", "r^2, median", "PSNR, dB", "r^2 of moved exact ones"]
    return _table(header, rows) + f"\n{_provenance(result)}\n"


def index_growth_table() -> str:
    """What an index costs, against the number of images."""
    result = _load("index-growth-cpu")
    rows = []
    for case in _by_size(result):
        built, default = case["extra"]["build"], _searches(case, effort=32)
        cpu = {stage: f"{seconds:.3g}" for stage, seconds in built["cpu_seconds"].items()}
        rows.append(
            [
                _DATA[case["parameters"]["data"]],
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
    return _table(header, rows) + f"\n{_provenance(result)}\n"


def index_fit_table() -> str:
    """Power laws of the same, by least squares in logarithms, on Fashion-MNIST."""
    cases = [
        case
        for case in _by_size(_load("index-growth-cpu"))
        if case["parameters"]["data"] == "fashion-mnist"
    ]
    images = [case["parameters"]["count"] for case in cases]
    built = [case["extra"]["build"] for case in cases]
    search = [_searches(case, effort=32)[0] for case in cases]
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
    return _table(["n thousand images", "fit", f"measured against fit at {measured}"], rows)


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, list[float]]:
    """Scale and exponent of ``y = scale * x^exponent``, least squares in logarithms, y over it."""
    exponent, offset = np.polyfit(np.log(x), np.log(y), 1)
    scale = float(np.exp(offset))
    fitted = scale * np.asarray(x) ** exponent
    return scale, float(exponent), [float(ratio) for ratio in np.asarray(y) / fitted]


def index_units_table() -> str:
    """What one distance, one patch and one code cost in the build and search of an index."""
    rows = []
    for case in _by_size(_load("index-growth-cpu")):
        built = case["extra"]["build"]
        few = _searches(case, effort=32)[0]
        spent, codes = (
            sum(row[key] for row in _searches(case, effort=128))
            - sum(row[key] for row in _searches(case, effort=32))
            for key in ("cpu_seconds", "codes")
        )
        code = spent / codes
        adding = built["cpu_seconds"]["adding"] / built["patches"]
        training = built["cpu_seconds"]["training"] / (10 * 64 * built["lists"] ** 2)
        rows.append(
            [
                _DATA[case["parameters"]["data"]],
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
    return _table(header, rows)


def parts_table() -> str:
    """Time of the parts of an approximate posterior."""
    result = _load("parts-cpu")
    names = {
        "test_build": "index build",
        "test_search": "index search",
        "test_given": "exact distances of retrieved patches",
        "test_head_and_tail": "head, tail and error as one",
        "test_merge": "merge of two states",
    }
    rows = [
        [
            names[case["test"]],
            str(case["parameters"].get("patch_size", "")),
            case["extra"]["size"],
            *(_milliseconds(case[key]) for key in ("median", "q1", "q3")),
            case["extra"]["gate"],
        ]
        for case in result["cases"]
    ]
    header = ["part", "P", "size", "ms", "first quartile", "third", "gate"]
    return _table(header, rows) + f"\n{_provenance(result)}\n"


def processes_table() -> str:
    """One process and two: wall time, processor time, bytes."""
    case = _case("processes-cpu", "test_processes")
    extra = case["extra"]
    alone = extra["settings"]["1 process, 2 threads"]
    image_steps = extra["samples"] * extra["steps"]
    calls = image_steps / extra["batch"]
    rows = []
    for name, measured in extra["settings"].items():
        shared = measured["reduced_bytes"] > 0
        rows.append(
            [
                name,
                f"{measured['seconds'] / image_steps:.3f}",
                f"{alone['seconds'] / measured['seconds']:.2f}",
                f"{measured['cpu_seconds'] / image_steps:.3f}",
                f"{measured['reduced_bytes'] / calls:,.0f}" if shared else "0",
                f"{measured['loopback_bytes'] / calls:,.0f}" if shared else "",
            ]
        )
    header = [
        *("setting", "s per image-step", "speed-up", "processor s per image-step"),
        *("payload per step, bytes", "sent per step by both, bytes"),
    ]
    shape = " x ".join(map(str, extra["shape"]))
    note = (
        f"{extra['images']:,} images {shape}, P = {extra['patch_size']}, "
        f"{extra['samples']} samples in batches of {extra['batch']}; speed-up over 1 process with "
        f"2 threads. Largest difference of a pixel between the settings: "
        f"{extra['largest_difference']:.1e}. Load average {extra['load_average']:.0f} on 2 cores."
    )
    return _table(header, rows) + f"\n{note} {_provenance(_load('processes-cpu'))}\n"


def processes_model_table() -> str:
    """Efficiency on many GPUs by the model of docs/scaling.md."""
    case = _case("processes-cpu", "test_step_without_posterior")
    # Of the processor, so that what else a shared machine did does not count.
    serial: float = _MODEL_BATCH * case["extra"]["cpu_seconds"] / case["extra"]["image_steps"]
    side, middle = _MODEL["side"], _MODEL["side"] - _MODEL["patch_size"] + 1
    pairs = _MODEL["images"] * (middle**2 + side - middle) ** 2
    payload = 8 * (2 + _MODEL["channels"]) * side**2
    compute = _MODEL_BATCH * pairs / _MODEL_PAIRS_PER_SECOND

    def step(shards: int) -> float:
        hops = 2 * (shards - 1)
        sent = hops / shards * _MODEL_BATCH * payload
        # Two all-reduces, of the maximum and of the sums.
        return compute / shards + 2 * hops * _MODEL_LATENCY + sent / _MODEL_BANDWIDTH + serial

    def dealt(groups: int) -> float:
        batches = math.ceil(_MODEL["samples"] / _MODEL_BATCH)
        return batches / (groups * math.ceil(batches / groups))

    rows = []
    for gpus in (1, 8, 64, 512):
        shards = min(gpus, 8)
        efficiency = {count: step(1) / (count * step(count)) for count in (gpus, shards)}
        sent = 2 * (gpus - 1) / gpus * payload
        rows.append(
            [
                str(gpus),
                f"{sent / 1024:.0f} KiB",
                f"{pairs / gpus:.1e}",
                f"{step(gpus) / _MODEL_BATCH:.3g}",
                f"{100 * efficiency[gpus]:.1f} %",
                f"{100 * dealt(gpus):.1f} %",
                f"{100 * dealt(gpus // shards) * efficiency[shards]:.1f} % "
                f"({gpus // shards} x {shards})",
            ]
        )
    header = [
        *("GPUs", "sent per image-step by each", "pairs of each", "s per image-step"),
        *("all share the database", "all deal samples", "groups x shards"),
    ]
    return _table(header, rows) + (
        f"\nA model, not a measurement, but for {1e3 * serial / _MODEL_BATCH:.2f} ms per "
        "image-step outside the posterior.\n"
    )


def many_samples_table() -> str:
    """A run of 100,000 samples, tenth by tenth."""
    extra = _case("processes-cpu", "test_many_samples")["extra"]
    tenths = extra["tenths"]
    shown = [(0, "first tenth"), (len(tenths) // 2, "sixth"), (len(tenths) - 1, "last")]
    rows = [
        [
            name,
            f"{tenths[i]['samples_per_second']:.0f}",
            f"{tenths[i]['samples_per_cpu_second']:.0f}",
            f"{tenths[i]['resident_bytes'] / 1e6:.1f} MB",
        ]
        for i, name in shown
    ]
    header = ["of the run", "samples/s", "samples per processor second", "memory"]
    note = (
        f"{extra['samples']:,} samples of 8 x 8, {extra['steps']} steps, LS over "
        f"{extra['images']} images, batches of {extra['batch']}, one thread; load "
        f"average {extra['load_average']:.0f} on 2 cores."
    )
    return _table(header, rows) + f"\n{note} {_provenance(_load('processes-cpu'))}\n"


def faults_table() -> str:
    """What was done to runs, and what was left of them."""
    cases = _load("faults-cpu")["cases"]
    kills = next(case["extra"] for case in cases if case["test"] == "test_kills")
    rows = []
    for shards, name in ((1, "samples dealt out"), (2, "database sharded")):
        for by in ("torchrun", "hand"):
            chosen = [
                kill
                for kill in kills["kills"]
                if kill["database_shards"] == shards and kill["restarted_by"] == by
            ]
            survived = sum(kill["survived"] for kill in chosen)
            what = f"SIGKILL of a rank, {name}, started again by {by}"
            rows.append([what, f"{survived} of {len(chosen)} runs identical"])
    for case in cases:
        extra = case["extra"]
        if case["test"] == "test_full_disk":
            shards = case["parameters"]["shards"]
            what = f"full disk, {shards} database shard{'s' * (shards > 1)}"
            kept = f"error; {extra['kept']} of {extra['samples']} samples kept; then identical"
            rows.append([what, kept])
        elif case["test"] == "test_second_run":
            rows.append(["a second run on the same folder", "refused; the first is identical"])
        elif case["test"] == "test_unreadable_shard":
            rows.append(["a shard cut off", "named; identical once it was removed"])
    note = f"In all {kills['survived']} of {kills['tried']} kills survived."
    return _table(["fault", "outcome"], rows) + f"\n{note} {_provenance(_load('faults-cpu'))}\n"


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
        depth = f"{config['layers']} layer{'s' * (config['layers'] > 1)}"
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
    "speed-up": speed_up_table,
    "whole-samples": whole_samples_table,
    "pairs": pairs_table,
    "alternatives": alternatives_table,
    "sampling": sampling_table,
    "memory": memory_table,
    "ahead-of-time": ahead_of_time_table,
    "ceilings": ceilings_table,
    "gpu": gpu_table,
    "growth": growth_table,
    "growth-indexed": partial(speed_up_table, "growth-indexed-cpu"),
    "index-growth": index_growth_table,
    "index-fit": index_fit_table,
    "index-units": index_units_table,
    "parts": parts_table,
    "processes": processes_table,
    "processes-model": processes_model_table,
    "many-samples": many_samples_table,
    "faults": faults_table,
    "networks": networks_table,
    "networks-settings": networks_settings_table,
}


def _load(name: str) -> Result:
    result: Result = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def _case(name: str, test: str) -> Case:
    """The one case of a test."""
    return next(case for case in _load(name)["cases"] if case["test"] == test)


def _find(cases: Iterable[Case], **parameters: object) -> Case:
    return next(
        case
        for case in cases
        if all(case["parameters"][key] == value for key, value in parameters.items())
    )


def _by_size(result: Result) -> list[Case]:
    """Cases of bench_growth by data and number of images."""
    return sorted(
        result["cases"],
        key=lambda case: (case["parameters"]["data"] == "cifar", case["parameters"]["count"]),
    )


def _searches(case: Case, *, effort: int) -> list[Case]:
    """Searches of a case of bench_growth, at every noise level."""
    return [row for row in case["extra"]["search"]["searches"] if row["effort"] == effort]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


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
