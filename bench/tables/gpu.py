"""Tables of GPU results, and of what the compiler makes of the kernels."""

from __future__ import annotations

import json

from els.bench.tables.results import RESULTS, Result, load, table
from els.triton_kernels.configurations import VALUES

# 132 multiprocessors, four warps of 32 threads a cycle, at 1.755 GHz.
_H100_INSTRUCTIONS = 132 * 4 * 32 * 1.755e9
# The same, with four matrix units of 512 float16 multiply-adds a cycle.
_H100_PRODUCTS = 132 * 4 * 512 * 1.755e9
# The least patch size of colour images whose sums slide, and the least rows of a usual tile.
_SLIDING = 11
_WHOLE_ROWS = 64
# The step that is estimated: images, and their side.
_IMAGES = 50_000
_SIDE = 32
# Of the compilers whose outcomes are kept.
_VERSIONS = ("3.6", "3.9")


def ahead_of_time_table() -> str:
    """What the assembler says of the exact kernels as they are shipped, and what that allows."""
    versions = [load(f"ahead-of-time-{version}") for version in _VERSIONS]
    rows = []
    for cases in zip(*(result["cases"] for result in versions), strict=True):
        case = cases[0]
        constants = case["constants"]
        slides = case["kernel"] == "sliding"
        is_exact = slides or (case["kernel"] == "attention" and case["patch_size"] < _SLIDING)
        if not is_exact or case["target"] != "sm_90" or not case["shipped"]:
            continue
        if constants["C"] != 3 or constants["ENTROPY"] or constants["PARTS"] == 0:
            continue
        if constants["BM"] < _WHOLE_ROWS:
            continue
        # Every step down the rows counts, but the first windows are not whole.
        steps = constants["H"] / (constants["H"] - constants["P"] + 1) if slides else 1.0
        products = steps * (constants["PARTS"] * constants["COLUMNS"] + 2 * VALUES)
        issued = steps * max(figures["instructions"] for figures in cases)
        places = (_SIDE - case["patch_size"] + 1) ** 2
        pairs = _IMAGES * _SIDE**2 * places
        seconds = pairs * (issued / _H100_INSTRUCTIONS + products / _H100_PRODUCTS)
        rows.append(
            [
                str(case["patch_size"]) + (", sliding" if slides else ""),
                str(constants["PARTS"]),
                f"{constants['BM']} x {constants['BN']}",
                f"{products:.0f}",
                *(
                    " / ".join(str(figures[name]) for figures in cases)
                    for name in ("registers", "spills", "instructions")
                ),
                f"{_H100_INSTRUCTIONS / issued / 1e12:.2f}",
                f"{_H100_PRODUCTS / products / 1e12:.2f}",
                f"{seconds:.3f}",
            ]
        )
    header = ["P", "parts", "tile", "multiply-adds a pair", "registers", "spills"]
    header += ["instructions", "1e12 pairs/s by issue", "by products", "s a step, estimated"]
    compilers = " / ".join(result["triton"] for result in versions)
    return table(header, rows) + f"\nTriton {compilers}, sm_90, C = 3.\n"


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
            f"{row['images']:,} of {row['side']} x {row['side']}",
            str(row["patch_size"]),
            f"{row['beta']:.3g}",
            str(row["batch"]),
            f"{row['seconds_per_image_step']:.4f}",
            f"{row['pairs_per_second'] / 1e9:.0f}",
            f"{100 * row['share_of_exp']:.0f} %",
            f"{100 * row['share_of_matrix']:.0f} %",
        ]
        for row in result["rows"]
        if row["what"] == "exact"
    ]
    header = ["images", "boundary", "number", "P", "beta", "batch"]
    header += ["s per image-step", "1e9 pairs/s"]
    failed = f" The run failed: {result['failure']}." if result["failure"] else ""
    return (
        table([*header, "of exp ceiling", "of matrix ceiling"], rows)
        + f"\n{result['device']}, torch {result['versions']['torch']}, Triton "
        + f"{result['versions']['triton']}; commit {result['commit'][:10]}, {result['date']}."
        + f"{failed}\n"
    )
