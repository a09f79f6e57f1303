"""Every Triton kernel, compiled without a GPU, and a gate on what the compiler made.

``python -m els.bench.ahead_of_time`` compiles for sm_80, sm_89, sm_90 and gfx942, reads registers,
spills, shared memory and the instructions of the loop over keys from the sm_90 code, and prints a
table. It exits with 1 if something does not compile that should, or a shipped launch spills or
needs more shared memory than there is, or the loop of exact posteriors has more instructions a pair
than :data:`MOST_INSTRUCTIONS`, writes to shared memory, or has narrower matrix products than its
tile.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from els.storage.files import write_text

if TYPE_CHECKING:
    from els.triton_kernels.configurations import Configuration

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have, from the makers' manuals.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
PATCH_SIZES = (3, 5, 7, 9, 17)
# Those for which sums slide.
LONG_PATCHES = (11, 17)
# Issued for a pair of a pixel and a candidate, by kernel and patch size: C = 3, two parts, sm_90. A
# step of the sliding kernel is a pair, too.
MOST_INSTRUCTIONS = {
    ("attention", 3): 9.0,
    ("attention", 5): 9.5,
    ("attention", 9): 13.0,
    ("sliding", 11): 21.0,
    ("sliding", 17): 22.0,
}
_SIDE = 32
# Bytes: shorter backward branches are loops over a few values.
_LONG = 256

app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched.

    Attributes:
        kernel: attention, sliding, select, bank or truncated.
        label: what distinguishes the case.
        target: one of :data:`TARGETS`.
        constants: compile-time arguments.
        warps: per program.
        shipped: whether the engine launches it so.
        patch_size: odd side of the patch; 0 where it does not matter.
    """

    kernel: str
    label: str
    target: str
    constants: dict[str, Any] = field(hash=False)
    warps: int
    shipped: bool
    patch_size: int = 0

    @property
    def most_instructions(self) -> float | None:
        """How many its loop may have for a pair, where that is checked."""
        wanted = {"PARTS": 2, "C": 3, "ENTROPY": False}
        is_checked = self.shipped and self.target == "sm_90" and self.constants.get("BM", 0) >= 64
        if not is_checked or not wanted.items() <= self.constants.items():
            return None
        return MOST_INSTRUCTIONS.get((self.kernel, self.patch_size))


@dataclass(frozen=True)
class Outcome:
    """The result of compiling a case; figures but ``shared`` are of sm_90 only.

    Attributes:
        error: why it did not compile, or None.
        registers: per thread.
        spills: bytes of the stack per thread.
        shared: bytes of shared memory per program.
        instructions: issued for a pair in the loop over keys; None where there are no parts.
        names: of those, how many of the most frequent ones and of memory and matrix instructions.
    """

    error: str | None = None
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    instructions: float | None = None
    names: dict[str, float] = field(default_factory=dict, hash=False)


def cases(*, targets: list[str], channels: list[int]) -> Iterator[Case]:
    """Every case of these targets and numbers of channels."""
    from els.triton_kernels.configurations import CANDIDATES, SHIPPED

    for target in targets:
        for c in channels:
            for patch_size in PATCH_SIZES:
                for parts in (2, 3, 0):
                    plain, detailed = SHIPPED.plain, SHIPPED.detailed
                    if parts == 0:
                        plain = detailed = SHIPPED.precise
                    yield _attention(target, c, patch_size, parts, plain)
                    yield _attention(target, c, patch_size, parts, detailed, entropy=True)
                    if parts != 3:
                        yield _select(target, c, patch_size, parts, detailed)
                yield _bank(target, c, patch_size)
            for patch_size, parts, entropy in product(LONG_PATCHES, (2, 3), (False, True)):
                yield _sliding(target, c, patch_size, parts, entropy=entropy)
            for window, circular in ((5, False), (5, True), (_SIDE, True)):
                yield _truncated(target, c, window, circular=circular)
        for parts, entropy in product((2, 3), (False, True)):
            yield _attention(target, 3, 5, parts, SHIPPED.few_rows, entropy=entropy)
        yield _select(target, 3, 5, 2, SHIPPED.few_rows)
    for configuration in CANDIDATES if "sm_90" in targets else ():
        for patch_size in PATCH_SIZES:
            yield _attention("sm_90", 3, patch_size, 2, configuration, shipped=False)


def _attention(
    target: str,
    channels: int,
    patch_size: int,
    parts: int,
    configuration: Configuration,
    *,
    entropy: bool = False,
    shipped: bool = True,
) -> Case:
    """The kernel of exact posteriors."""
    label, sized = _weighing(target, channels, patch_size, parts, configuration)
    sized |= {"C": channels, "ENTROPY": entropy}
    label += ", entropy" if entropy else ""
    return Case("attention", label, target, sized, configuration.warps, shipped, patch_size)


def _select(
    target: str, channels: int, patch_size: int, parts: int, configuration: Configuration
) -> Case:
    """The kernel that selects candidates."""
    label, sized = _weighing(target, channels, patch_size, parts, configuration)
    return Case("select", label, target, sized, configuration.warps, True, patch_size)


def _weighing(
    target: str, channels: int, patch_size: int, parts: int, configuration: Configuration
) -> tuple[str, dict[str, Any]]:
    """Label and constants that both have."""
    from els.triton_kernels.attention import constants
    from els.triton_kernels.pixel_groups import Layout

    layout = Layout.of(channels * patch_size**2)
    configuration = configuration.weighing(layout.columns, parts, SHARED[target])
    label = f"P = {patch_size}, C = {channels}, {configuration.rows} x {configuration.keys}, "
    label += f"{configuration.stages} stages, "
    label += f"{parts} parts" if parts else "float64"
    return label, constants(layout, parts, configuration)


def _sliding(target: str, channels: int, patch_size: int, parts: int, *, entropy: bool) -> Case:
    """The kernel of exact posteriors over long patches."""
    from els.triton_kernels.configurations import SHIPPED
    from els.triton_kernels.pixel_groups import Layout
    from els.triton_kernels.sliding import constants

    configuration = SHIPPED.sliding_detailed if entropy else SHIPPED.sliding
    columns = Layout.of(channels * patch_size, windows=2).columns
    configuration = configuration.fitting(columns, parts, SHARED[target])
    sized = constants(_SIDE, _SIDE, channels, patch_size, parts, configuration)
    label = f"P = {patch_size}, C = {channels}, {parts} parts" + (", entropy" if entropy else "")
    sized |= {"ENTROPY": entropy}
    return Case("sliding", label, target, sized, configuration.warps, True, patch_size)


def _bank(target: str, channels: int, patch_size: int) -> Case:
    from els.triton_kernels.bank import KEYS_PER_PROGRAM, constants
    from els.triton_kernels.configurations import SHIPPED
    from els.triton_kernels.pixel_groups import Layout

    sized = constants(Layout.of(channels * patch_size**2))
    sized |= {"C": channels, "TILE": SHIPPED.plain.keys, "BLOCK": KEYS_PER_PROGRAM}
    return Case("bank", f"P = {patch_size}, C = {channels}", target, sized, 4, True)


def _truncated(target: str, channels: int, window: int, *, circular: bool) -> Case:
    constants = {
        "WIDTH": _SIDE,
        "HEIGHT": _SIDE,
        "C": channels,
        "FIRST": 0 if window == _SIDE else -2,
        "WINDOW_ROWS": window,
        "WINDOW_COLUMNS": window,
        "CIRCULAR": circular,
        "PIXEL_BLOCK": 1,
        "LANES": 128,
    }
    label = f"C = {channels}, window {window}, {'circular' if circular else 'zeros'}"
    return Case("truncated", label, target, constants, 4, True)


def signature(kernel: str, *, precise: bool) -> dict[str, str]:
    """Types of a kernel's run-time arguments."""

    def integers(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "i32")

    real, row = ("*fp64", "*fp64") if precise else ("*fp32", "*fp16")
    match kernel:
        case "attention":
            return {
                "rows": row,
                "slopes": real,
                "keys": "*fp16",
                "values": "*fp16",
                "states": "*fp64",
                **integers("per_program", "count", "padded"),
            }
        case "select":
            return {
                "rows": row,
                "slopes": real,
                "keys": "*fp16",
                "thresholds": real,
                "counts": "*i32",
                "found": "*i32",
                **integers("per_program", "count", "padded", "room"),
            }
        case "sliding":
            return {
                "rows": "*fp16",
                "slopes": "*fp32",
                "starts": "*fp32",
                "keys": "*fp16",
                "values": "*fp16",
                "states": "*fp64",
                "lowest": "*fp32",
                **integers("count", "padded", "per_program", "queries", "row_count"),
                **integers("first", "last"),
            }
        case "bank":
            return {
                "images": "*u8",
                "windows": "*i32",
                "centres": "*i64",
                "keys": "*fp16",
                "values": "*fp16",
                **integers("candidates", "count", "padded", "image_bytes"),
            }
        case "truncated":
            return {
                "images": "*i32",
                "x": "*fp64",
                "slopes": "*fp64",
                "addresses": "*i64",
                **dict.fromkeys(("reference", "mass", "centre", "logit_sum", "logits"), "*fp64"),
                "k": "i32",
            }
    raise ValueError(f"kernel={kernel!r} is not known")


def kernels() -> dict[str, Any]:
    """The kernels by their names."""
    from els.triton_kernels import attention, bank, sliding, truncated

    return {
        "attention": attention.attention_kernel,
        "select": attention.select_kernel,
        "sliding": sliding.sliding_kernel,
        "bank": bank.bank_kernel,
        "truncated": truncated.truncated_kernel,
    }


def compiled(case: Case) -> Outcome:
    """Compile a case, and read what the assembler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from els.triton_kernels.configurations import FP_FUSION

    types = signature(case.kernel, precise=case.constants.get("PARTS") == 0)
    # What torch allocates is aligned; integers are not specialised.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types.values())
        if kind.startswith("*")
    }
    try:
        code = triton.compile(
            ASTSource(
                fn=kernels()[case.kernel],
                signature=types | dict.fromkeys(case.constants, "constexpr"),
                constexprs=case.constants,
                attrs=aligned,
            ),
            target=GPUTarget(*TARGETS[case.target]),
            options={"num_warps": case.warps, "enable_fp_fusion": FP_FUSION},
        )
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    if case.target != "sm_90":
        return Outcome(shared=code.metadata.shared)
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
    figures = registers, spills, code.metadata.shared
    if case.constants.get("PARTS", 0) == 0:
        return Outcome(None, *figures)
    names = _executed(sass, case.constants)
    lanes = 32 * case.warps / (case.constants["BM"] * case.constants["BN"])
    each = {name: round(count * lanes, 3) for name, count in names.most_common()}
    return Outcome(None, *figures, round(names.total() * lanes, 2), each)


def _executed(sass: str, constants: dict[str, Any]) -> Counter[str]:
    """Instructions of one round of the loop over keys, or of a step down the rows, by name.

    Loops are long backward branches: one, or one inside the other, over the chunks of a row or down
    the rows.
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
            loops.append(Counter(_name(line) for place, line in lines if first <= place <= address))
    outer, *inner = sorted(loops, key=Counter.total, reverse=True)
    if "RESIDENT" not in constants:
        return inner[0]
    # The assembler unrolls short loops.
    if not constants["RESIDENT"] and inner:
        for name, count in inner[0].items():
            outer[name] += count * (constants["COLUMNS"] // constants["CHUNK"] - 1)
    return outer


def _name(line: str) -> str:
    """An instruction without predicate and options, but for the shape of a matrix product."""
    words = re.sub(r"^@!?U?P\w+ ", "", line).split()[0].split(".")
    return ".".join(words[:2]) if words[0] == "HGMMA" else words[0]


def objections(case: Case, outcome: Outcome) -> Iterator[str]:
    """What is wrong with a compiled case."""
    if not case.shipped:
        return
    if (outcome.shared or 0) > SHARED[case.target]:
        yield f"needs {outcome.shared} bytes of shared memory"
    if outcome.spills:
        yield f"spills {outcome.spills} bytes"
    most = case.most_instructions
    if most is None or outcome.instructions is None:
        return
    if outcome.instructions > most:
        yield f"{outcome.instructions} instructions a pair, more than {most}"
    # A step down the rows reads and writes the states of its pixels.
    if "STS" in outcome.names and case.kernel == "attention":
        yield "writes to shared memory in its loop"
    if f"HGMMA.64x{case.constants['BN']}x16" not in outcome.names:
        yield "has no matrix product as wide as its tile"


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
    table = Table("kernel", "case", "registers", "spills", "shared", "instructions a pair")
    failures = []
    for case, outcome in zip(chosen, outcomes, strict=True):
        name = f"{case.kernel} ({case.label}) for {case.target}"
        if outcome.error:
            failures.append(f"does not compile: {name}: {outcome.error}")
        failures.extend(f"{objection}: {name}" for objection in objections(case, outcome))
        if case.target == "sm_90" and outcome.error is None:
            figures = (outcome.registers, outcome.spills, outcome.shared, outcome.instructions)
            table.add_row(case.kernel, case.label, *map(str, figures))
    Console().print(table)
    typer.echo(f"{len(chosen)} cases with Triton {triton.__version__}, {len(failures)} failed")
    if output:
        rows = [
            asdict(case) | asdict(outcome) for case, outcome in zip(chosen, outcomes, strict=True)
        ]
        lines = ",\n".join(json.dumps(row) for row in rows)
        write_text(output, f'{{"triton": "{triton.__version__}", "cases": [\n{lines}\n]}}\n')
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    app()
