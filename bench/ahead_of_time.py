"""Every Triton kernel and configuration, compiled without a GPU.

``python -m els.bench.ahead_of_time`` compiles for sm_80, sm_90 and gfx942, reads registers, shared
memory, spills and the instructions of the loop over images from the sm_90 code, prints a table,
and exits with 1 if something does not compile that should, or a shipped configuration spills.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from els.triton_kernels.configurations import Configuration

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
_SIDE = 32
# Bytes: shorter backward branches are loops over a few values.
_LONG = 1024

app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched.

    Attributes:
        kernel: exact, merge, truncated or select.
        label: what distinguishes the case.
        target: one of :data:`TARGETS`.
        constants: compile-time arguments.
        precise: float64.
        warps: per program.
        shipped: whether the engine launches it so.
    """

    kernel: str
    label: str
    target: str
    constants: dict[str, Any] = field(hash=False)
    precise: bool
    warps: int
    shipped: bool


@dataclass(frozen=True)
class Outcome:
    """The result of compiling a case; figures are of sm_90 only.

    Attributes:
        error: why it did not compile, or None.
        registers: per thread.
        spills: bytes of the stack per thread.
        shared: bytes of shared memory per program.
        instructions: a thread issues for one round of its loop over images; None where the loops
            are others.
    """

    error: str | None = None
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    instructions: int | None = None


def slots(choices: tuple[Configuration, ...]) -> dict[Configuration, set[tuple[int, int]]]:
    """Blocks of slots, by rows and columns, with which each of some configurations is launched.

    Those of all machines and patch sizes at this side, and one with slots that are loaded anew for
    every image, as larger images have them.
    """
    from els.triton_kernels.configurations import cheapest

    found = {configuration: {(3, 3)} for configuration in choices}
    sizes = range(1, _SIDE + 1, 2)
    for patch_size, equivariant, circular in product(sizes, (False, True), (False, True)):
        configuration, plan = cheapest(
            choices,
            equivariant=equivariant,
            circular=circular,
            height=_SIDE,
            width=_SIDE,
            patch_size=patch_size,
        )
        found[configuration].add((plan.rows.chunks, plan.columns.chunks))
    return found


def cases(*, targets: list[str], channels: list[int]) -> Iterator[Case]:
    """Every case of these targets and numbers of channels."""
    from els.triton_kernels.configurations import CANDIDATES, PRECISE, SHIPPED

    image = {"WIDTH": _SIDE, "PIXELS": _SIDE**2}
    launched = slots(SHIPPED) | slots((PRECISE,))
    for configuration in CANDIDATES:
        launched |= {} if configuration in SHIPPED else slots((configuration,))
    for target in targets:
        for configuration in (*CANDIDATES, PRECISE):
            precise, shipped = configuration is PRECISE, configuration in (*SHIPPED, PRECISE)
            if not shipped and target != "sm_90":
                continue
            for c in channels if shipped else [3]:
                blocks = {
                    **image,
                    "C": c,
                    "ROW_BLOCK": configuration.row_block,
                    "COLUMN_BLOCK": configuration.column_block,
                    "PRECISE": precise,
                    "STAGES": configuration.stages,
                }
                name = (
                    f"{configuration.row_block} x {configuration.column_block}, "
                    f"{configuration.together} together"
                )
                for row_chunks, column_chunks in sorted(launched[configuration]):
                    sized = {**blocks, "ROW_CHUNKS": row_chunks, "COLUMN_CHUNKS": column_chunks}
                    suffix = f"{name}, C = {c}, slots {row_chunks} x {column_chunks}"
                    suffix += ", float64" if precise else ""
                    launch = configuration.for_windows(row_chunks, column_chunks)
                    yield Case("select", suffix, target, sized, precise, launch.warps, shipped)
                    for entropy in (False, True):
                        yield Case(
                            "exact",
                            suffix + (", entropy" if entropy else ""),
                            target,
                            {**sized, "TOGETHER": launch.together, "ENTROPY": entropy},
                            precise,
                            launch.warps,
                            shipped,
                        )
                merged = {key: blocks[key] for key in (*image, "C", "ROW_BLOCK", "COLUMN_BLOCK")}
                yield Case(
                    "merge",
                    f"{name}, C = {c}" + (", float64" if precise else ""),
                    target,
                    {**merged, "PIXEL_BLOCK": 4, "LANES": 32, "ENTROPY": True},
                    precise,
                    4,
                    shipped,
                )
        for c in channels:
            for window, circular in ((5, False), (5, True), (_SIDE, True)):
                yield Case(
                    "truncated",
                    f"C = {c}, window {window}, {'circular' if circular else 'zeros'}",
                    target,
                    {
                        "WIDTH": _SIDE,
                        "HEIGHT": _SIDE,
                        "C": c,
                        "FIRST": 0 if window == _SIDE else -2,
                        "WINDOW_ROWS": window,
                        "WINDOW_COLUMNS": window,
                        "CIRCULAR": circular,
                        "PIXEL_BLOCK": 1,
                        "LANES": 128,
                    },
                    True,
                    4,
                    True,
                )


def signature(kernel: str, *, precise: bool) -> dict[str, Any]:
    """Types of a kernel's run-time arguments."""
    real = "*fp64" if precise else "*fp32"
    tables = {"row_tables": ("*i32",) * 6, "column_tables": ("*i32",) * 6}
    states = dict.fromkeys(("reference", "mass", "centre", "logit_sum"), "*fp64")

    def integers(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "i32")

    match kernel:
        case "exact":
            return {
                "images": "*i32",
                "x": real,
                "scales": real,
                **tables,
                "partial": real,
                **integers("count", "images_per_split", "first_row_tile", "column_tiles"),
            }
        case "select":
            return {
                "images": "*i32",
                "x": real,
                "scales": real,
                "thresholds": real,
                **tables,
                "counts": "*i32",
                "found": "*i32",
                **integers("count", "images_per_split", "room", "column_tiles"),
            }
        case "merge":
            return {
                "partial": real,
                "row_pairs": "*i32",
                "column_pairs": "*i32",
                **states,
                **integers("splits", "tiles", "column_tiles", "first_row_tile", "row_tiles"),
                **integers("row_pair_count", "column_pair_count"),
            }
        case "truncated":
            return {
                "images": "*i32",
                "x": "*fp64",
                "slopes": "*fp64",
                "addresses": "*i64",
                **states,
                "logits": "*fp64",
                "k": "i32",
            }
    raise ValueError(f"kernel={kernel!r} is not known")


def kernels() -> dict[str, Any]:
    """The kernels by their names."""
    from els.triton_kernels import exact, merge, top_k, truncated

    return {
        "exact": exact.exact_kernel,
        "merge": merge.merge_kernel,
        "select": top_k.select_kernel,
        "truncated": truncated.truncated_kernel,
    }


def compiled(case: Case) -> Outcome:
    """Compile a case, and read what the assembler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from els.triton_kernels.configurations import FP_FUSION

    types = signature(case.kernel, precise=case.precise) | dict.fromkeys(
        case.constants, "constexpr"
    )
    try:
        code = triton.compile(
            ASTSource(fn=kernels()[case.kernel], signature=types, constexprs=case.constants),
            target=GPUTarget(*TARGETS[case.target]),
            options={"num_warps": case.warps, "enable_fp_fusion": FP_FUSION},
        )
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    if case.target != "sm_90":
        return Outcome()
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        usage, sass = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, spills = map(int, found.groups())
    rounds = case.constants.get("ROW_CHUNKS", 1) * case.constants.get("COLUMN_CHUNKS", 1)
    return Outcome(None, registers, spills, code.metadata.shared, _executed(sass, rounds))


def _executed(sass: str, inner_rounds: int) -> int | None:
    """Instructions of one round of the loop over images; None where there is none.

    Loops are long backward branches: one, or one inside the other, which runs ``inner_rounds``
    times.
    """
    lines = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
    ]
    loops = []
    for address, text in lines:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and address - int(target[1], 16) > _LONG:
            first = int(target[1], 16)
            loops.append((sum(first <= place <= address for place, _ in lines), first, address))
    match sorted(loops, reverse=True):
        case [(length, _, _)]:
            return length
        case [(outer, first, last), (inner, inner_first, inner_last)] if (
            first <= inner_first and inner_last <= last
        ):
            return outer + (inner_rounds - 1) * inner
    return None


def cannot(case: Case, version: str) -> str | None:
    """Why an installed Triton is known not to compile a case, or None."""
    if case.target == "gfx942" and case.precise and case.kernel in ("exact", "select"):
        major_minor = tuple(map(int, version.split(".")[:2]))
        if major_minor < (3, 8):
            return "float64 products for AMD came with Triton 3.8"
    return None


@app.command()
def main(
    output: Annotated[Path | None, typer.Option(help="Write the outcomes there, as JSON.")] = None,
    targets: Annotated[str, typer.Option(help="Comma list of sm_80, sm_90, gfx942.")] = ",".join(
        TARGETS
    ),
    channels: Annotated[str, typer.Option(help="Comma list of 1 to 4.")] = "1,2,3,4",
) -> None:
    """Compile everything."""
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    chosen = list(cases(targets=targets.split(","), channels=[int(c) for c in channels.split(",")]))
    # Spawned: a forked child would share the parent's LLVM.
    with ProcessPoolExecutor(
        os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        outcomes = list(pool.map(compiled, chosen, chunksize=4))
    table = Table("kernel", "case", "target", "registers", "spills", "shared", "instructions")
    failures = []
    for case, outcome in zip(chosen, outcomes, strict=True):
        name = f"{case.kernel} ({case.label}) for {case.target}"
        known = cannot(case, triton.__version__)
        if outcome.error and known:
            typer.echo(f"not with Triton {triton.__version__}: {name}: {known}")
        elif outcome.error:
            failures.append(f"does not compile: {name}: {outcome.error}")
        elif outcome.spills and case.shipped:
            failures.append(f"spills {outcome.spills} bytes: {name}")
        if case.target == "sm_90" and outcome.error is None:
            figures = (outcome.registers, outcome.spills, outcome.shared, outcome.instructions)
            table.add_row(case.kernel, case.label, case.target, *map(str, figures))
    Console().print(table)
    typer.echo(f"{len(chosen)} cases with Triton {triton.__version__}, {len(failures)} failed")
    if output:
        rows = [
            asdict(case) | asdict(outcome) for case, outcome in zip(chosen, outcomes, strict=True)
        ]
        lines = ",\n".join(json.dumps(row) for row in rows)
        output.write_text(f'{{"triton": "{triton.__version__}", "cases": [\n{lines}\n]}}\n')
    for failure in failures:
        typer.echo(failure, err=True)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    app()
