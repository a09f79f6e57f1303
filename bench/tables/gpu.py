"""Tables of GPU results, and of what the compiler makes of the kernels."""

from __future__ import annotations

import json

from els.bench.tables.results import RESULTS, Result, load, table

# 132 multiprocessors, four warps of 32 threads a cycle, at 1.755 GHz.
_H100_INSTRUCTIONS = 132 * 4 * 32 * 1.755e9


def ahead_of_time_table() -> str:
    """What the assembler says of the exact kernel as it is shipped."""
    result = load("ahead-of-time")
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
    return table(header, rows) + f"\nTriton {result['triton']}, sm_90, C = 3.\n"


def ceilings_table() -> str:
    """Pairs per second at which an H100 would issue the exact kernel's instructions."""
    from els.triton_kernels.configurations import SHIPPED, cheapest
    from els.triton_kernels.tiles import diagonals

    cases = [
        case
        for case in load("ahead-of-time")["cases"]
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
    return table(["boundary", *(f"P = {size}" for size in (3, 5, 9, 17))], rows)


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
        table([*header, "of exp ceiling", "of fma ceiling"], rows)
        + f"\n{result['device']}, torch {result['versions']['torch']}, Triton "
        + f"{result['versions']['triton']}; commit {result['commit'][:10]}, {result['date']}."
        + f"{failed}\n"
    )
