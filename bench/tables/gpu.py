"""Tables of GPU results, and of what the compiler makes of the kernels."""

from __future__ import annotations

import json

from els.bench.tables.results import RESULTS, Result, load, table

# 132 multiprocessors, four warps of 32 threads a cycle, at 1.755 GHz.
_H100_INSTRUCTIONS = 132 * 4 * 32 * 1.755e9
# The same, with four matrix units of 512 float16 multiply-adds a cycle.
_H100_PRODUCTS = 132 * 4 * 512 * 1.755e9
# Columns of a product of weights and values.
_VALUES = 8
# Of the compilers whose outcomes are kept.
_VERSIONS = ("3.6", "3.9")


def ahead_of_time_table() -> str:
    """What the assembler says of the exact kernel as it is shipped, and what that allows."""
    versions = [load(f"ahead-of-time-{version}") for version in _VERSIONS]
    rows = []
    for case, *others in zip(*(result["cases"] for result in versions), strict=True):
        constants = case["constants"]
        is_exact = case["kernel"] in ("attention", "sliding")
        chosen = is_exact and case["target"] == "sm_90" and case["shipped"]
        if not chosen or constants["C"] != 3 or constants["PARTS"] == 0 or constants["BM"] < 64:
            continue
        products = constants["PARTS"] * constants["COLUMNS"] + 2 * _VALUES
        # Every step down the rows counts, but the first windows are not whole.
        steps = constants["H"] / (constants["H"] - constants["P"] + 1) if "H" in constants else 1
        each = [str(figures["instructions"]) for figures in (case, *others)]
        fewest = min(figures["instructions"] for figures in (case, *others))
        rows.append(
            [
                str(case["patch_size"]) + (", sliding" if "H" in constants else ""),
                str(constants["PARTS"]) + (", entropy" if constants["ENTROPY"] else ""),
                f"{constants['BM']} x {constants['BN']}",
                str(products),
                " / ".join(str(figures["registers"]) for figures in (case, *others)),
                " / ".join(str(figures["spills"]) for figures in (case, *others)),
                " / ".join(each),
                f"{_H100_INSTRUCTIONS / fewest / steps / 1e12:.2f}",
                f"{_H100_PRODUCTS / products / steps / 1e12:.2f}",
            ]
        )
    header = ["P", "parts", "tile", "multiply-adds", "registers", "spills", "instructions"]
    header += ["1e12 pairs/s by issue", "by products"]
    compilers = " / ".join(result["triton"] for result in versions)
    return table(header, rows) + f"\nTriton {compilers}, sm_90, C = 3; a pair.\n"


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
