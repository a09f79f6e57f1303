"""Tables of runs by many processes."""

from __future__ import annotations

import math

from els.bench.tables.results import case_of, load, provenance, table

# The modelled run: ImageNet at 64 x 64 x 3, boundary-broken ELS at P = 9, batches of 16 from 10,000
# samples. A faster GPU waits more for the others, and a slower network as well. Seconds for a
# message to the next rank, bytes per second between two ranks.
_MODEL = {"images": 1_280_000, "side": 64, "channels": 3, "patch_size": 9, "samples": 10_000}
# Images of a batch.
_MODEL_BATCH = 16
# Pairs a second of an H100 at P = 9, in batches of 16 (bench/results/gpu-check.json).
_MODEL_PAIRS_PER_SECOND = 3.2e11
# Seconds of a hop between two ranks.
_MODEL_LATENCY = 10e-6
# Bytes a second between two ranks.
_MODEL_BANDWIDTH = 25e9


def processes_table() -> str:
    """One process and two: wall time, processor time, bytes."""
    case = case_of("processes-cpu", "test_processes")
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
    return table(header, rows) + f"\n{note} {provenance(load('processes-cpu'))}\n"


def processes_model_table() -> str:
    """Efficiency on many GPUs by the model of docs/scaling.md."""
    case = case_of("processes-cpu", "test_step_without_posterior")
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
    return table(header, rows) + (
        f"\nA model, not a measurement, but for {1e3 * serial / _MODEL_BATCH:.2f} ms per "
        "image-step outside the posterior.\n"
    )


def many_samples_table() -> str:
    """A run of 100,000 samples, tenth by tenth."""
    extra = case_of("processes-cpu", "test_many_samples")["extra"]
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
    return table(header, rows) + f"\n{note} {provenance(load('processes-cpu'))}\n"


def faults_table() -> str:
    """Faults that runs were put through, and their outcomes."""
    cases = load("faults-cpu")["cases"]
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
    return table(["fault", "outcome"], rows) + f"\n{note} {provenance(load('faults-cpu'))}\n"
