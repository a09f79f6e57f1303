"""Tables of the speed of posteriors and samples, and of approximations."""

from __future__ import annotations

from els.bench.tables.results import (
    DATA,
    find,
    load,
    milliseconds,
    pairs_per_second,
    provenance,
    table,
)


def pairs_table() -> str:
    """Speed of the native kernel."""
    result = load("posterior-cpu")
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
                pairs_per_second(
                    find(
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
    return table(header, rows) + f"\n{note} {provenance(result)}\n"


def safety_table() -> str:
    """Errors over standard errors, of all rows of a source and method."""
    result = load("safety")
    rows = []
    for source in dict.fromkeys(row["source"] for row in result["rows"]):
        for method in ("subset 256", "lists"):
            ratios = sorted(
                row["error"] / row["claim"]
                for row in result["rows"]
                if row["source"] == source and row["method"] == method
            )
            if ratios:
                middle = ratios[len(ratios) // 2]
                cells = [f"{ratio:.2f}" for ratio in (ratios[0], middle, ratios[-1])]
                rows.append([source.partition(":")[0], method, str(len(ratios)), *cells])
    header = ["images", "method", "rows", "least", "median", "largest"]
    note = (
        f"{result['images']:,} images of each, {result['queries']} queries with {result['seeds']} "
        f"seeds. {result['factor']:g} covers 90 % of all {len(result['rows'])} rows."
    )
    return table(header, rows) + f"\n{note}\n"


def alternatives_table() -> str:
    """How many times slower the alternatives are than the native kernel."""
    result = load("alternatives-cpu")
    chosen = [case for case in result["cases"] if case["test"] == "test_alternatives"]
    sizes = sorted({case["parameters"]["patch_size"] for case in chosen})
    methods = list(dict.fromkeys(case["parameters"]["method"] for case in chosen))
    fastest = {size: find(chosen, method="native", patch_size=size)["median"] for size in sizes}
    rows = []
    for method in methods:
        medians = [find(chosen, method=method, patch_size=size)["median"] for size in sizes]
        if method == "native":
            cells = [f"{1e3 * median:.3g} ms" for median in medians]
        else:
            ratios = zip(medians, sizes, strict=True)
            cells = [f"{median / fastest[size]:.3g} x" for median, size in ratios]
        rows.append([method, *cells])
    header = ["method", *(f"P = {size}" for size in sizes)]
    return table(header, rows) + f"\n{provenance(result)}\n"


def sampling_table() -> str:
    """Seconds per image-step on a whole data set."""
    result = load("scale-cpu")
    case = next(case for case in result["cases"] if case["test"] == "test_sampling")
    by_size = case["extra"]["seconds_by_patch_size"]
    header = ["patch size", *by_size]
    rows = [["seconds per image-step", *(f"{seconds:.2f}" for seconds in by_size.values())]]
    return table(header, rows) + f"\n{provenance(result)}\n"


def memory_table() -> str:
    """Peak memory."""
    result = load("scale-cpu")
    extra = next(case for case in result["cases"] if case["test"] == "test_scoring_memory")["extra"]
    header = ["images", "as uint8", "peak of the process"]
    sizes = [f"{extra[key] / 1e6:.0f} MB" for key in ("image_bytes", "peak_bytes")]
    return table(header, [[f"{extra['images']:,} CIFAR-10", *sizes]]) + "\n"


def growth_table() -> str:
    """Seconds per image-step of mode="auto" without an index, against the number of images."""
    result = load("approximate-cpu")
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
    return table(header, rows) + f"\n{provenance(result)}\n"


def speed_up_table(name: str = "speed-up-cpu") -> str:
    """Seconds per image-step of mode="auto" with indices, at the paper's noise levels."""
    result = load(name)
    rows = []
    for case in result["cases"]:
        extra = case["extra"]
        seconds = case["median"] / extra["queries"]
        has_index = extra["patch_size"] in extra["indices"]
        rows.append(
            [
                f"{extra['images']:,} {DATA[case['parameters']['data']]}",
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
    return table(header, rows) + f"\n{provenance(result)}\n"


def whole_samples_table() -> str:
    """Whole samples to a tolerance."""
    result = load("whole-samples-cpu")
    rows = [
        [
            f"{case['extra']['images']:,} {DATA[case['parameters']['data']]}",
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
    return table(header, rows) + f"\n{provenance(result)}\n"


def parts_table() -> str:
    """Time of the parts of an approximate posterior."""
    result = load("parts-cpu")
    names = {
        "test_build": "index build",
        "test_search": "index search",
        "test_weigh": "exact distances of retrieved patches",
        "test_head_and_subset": "head, subset and error as one",
        "test_merge": "merge of two states",
    }
    rows = [
        [
            names[case["test"]],
            str(case["parameters"].get("patch_size", "")),
            case["extra"]["size"],
            *(milliseconds(case[key]) for key in ("median", "q1", "q3")),
            case["extra"]["gate"],
        ]
        for case in result["cases"]
    ]
    header = ["part", "P", "size", "ms", "first quartile", "third", "gate"]
    return table(header, rows) + f"\n{provenance(result)}\n"
