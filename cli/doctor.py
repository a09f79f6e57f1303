"""The command that says what this machine has, what computes here, and what would improve it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from els.cli.console import print_table, reported

# Torch and the optional libraries take seconds to import: help needs none of them.
if TYPE_CHECKING:
    from els.engine import ScoreMachine

commands = typer.Typer()

# Largest error of a posterior mean, pixels in [-1, 1], that a backend may have (README.md).
_ALLOWED_ERROR = 2e-5
# Noise levels (alpha, sigma) of the self-check, from next to none to next to nothing else.
_CHECKED_NOISE = ((1.0, 0.01), (0.9, 0.4), (0.1, 1.0))
# Images, channels, height and width of the self-check, and the side of its patches.
_CHECKED_SHAPE = (24, 1, 10, 10)
_CHECKED_PATCH = 5
# Images and side of the patches of the speed measurement.
_TIMED_IMAGES = 256
_TIMED_PATCH = 7
# Seconds that it goes on for.
_TIMED_SECONDS = 0.5
# Seconds that a compiler may take to say its version.
_COMPILER_SECONDS = 10.0

_REINSTALL = "pip install --force-reinstall --no-deps els-machine"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: of the thing.
        found: what there is, in words.
        state: ``there``, ``missing`` or ``broken``.
        remedy: the one command that would improve it, and what for; None where there is nothing
            to do.
    """

    name: str
    found: str
    state: str = "there"
    remedy: str | None = None


@dataclass(frozen=True)
class SelfCheck:
    """What the chosen backend answered.

    Attributes:
        backend: its name.
        reason: why it was chosen.
        error: largest error of the posterior mean beside torch in float64, pixels in [-1, 1].
        allowed: the largest that it may be.
        pairs_per_second: of a pixel and a patch, of an exact ELS posterior of one image.
    """

    backend: str
    reason: str
    error: float
    allowed: float
    pairs_per_second: float

    @property
    def is_right(self) -> bool:
        """Whether the answer is right; not where the error is not a number."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class _Library:
    """A library that is not always installed.

    Attributes:
        module: as it is imported.
        distribution: as it is installed.
        remedy: the command that installs it.
        purpose: what it is for.
    """

    module: str
    distribution: str
    remedy: str
    purpose: str


_OPTIONAL = (
    _Library("faiss", "faiss-cpu", "pip install 'els-machine[cpu]'", "patch indices"),
    _Library("matplotlib", "matplotlib", "pip install matplotlib", "pictures of results"),
    _Library("safetensors", "safetensors", "pip install 'els-machine[networks]'", "networks"),
    _Library("datasets", "datasets", "pip install 'els-machine[hf]'", "els build hf:NAME"),
    _Library(
        "diffusers",
        "diffusers",
        "pip install 'els-machine[diffusers]'",
        "pipelines, attention-unet",
    ),
)


@commands.command(epilog="Example: els doctor --json")
@reported
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what this machine has, which backend computes, and what would make it better.

    The chosen backend is checked against torch in float64 and timed for half a second. What is
    missing or broken is said, with a command that mends it. The exit code is 1 only if the backend
    cannot be asked or answers wrongly.
    """
    findings = examined()
    problem = None
    check = None
    try:
        check = checked()
    # Whatever a broken installation does, the findings say what is there.
    except Exception as error:
        problem = _reason(error)
    if as_json:
        content = {
            "findings": [asdict(finding) for finding in findings],
            "check": None if check is None else {**asdict(check), "is_right": check.is_right},
            "problem": problem,
        }
        typer.echo(json.dumps(content, indent=2))
    else:
        _print(findings, check, problem)
    if check is None or not check.is_right:
        raise typer.Exit(1)


def examined() -> list[Finding]:
    """Everything that was looked for; nothing that is missing or broken raises."""
    lookups: list[tuple[str, Callable[[], Finding]]] = [
        ("els-machine", _els),
        ("Python", _python),
        ("processor", _processor),
        ("memory", _memory),
        ("disk", _disk),
        ("torch", _torch),
        ("compiler", _compiler),
        ("kernels", _kernels),
        ("GPU", _gpu),
        ("triton", _triton),
    ]
    lookups += [(each.module, _lookup(each)) for each in _OPTIONAL]
    return [_safely(name, look) for name, look in lookups]


def checked() -> SelfCheck:
    """The backend that is chosen for ELS, its error and its speed.

    Raises:
        Exception: whatever a broken installation raises.
    """
    from els.engine import ScoreMachine

    machine = ScoreMachine(_some_database())
    return SelfCheck(
        machine.backend,
        machine.backend_reason,
        _error(machine),
        _ALLOWED_ERROR,
        _pairs_per_second(),
    )


def _lookup(library: _Library) -> Callable[[], Finding]:
    return lambda: _found(library)


def _safely(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return look()
    except Exception as error:  # Broken installations raise anything.
        return Finding(name, f"broken: {_reason(error)}", "broken")


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _els() -> Finding:
    from els.storage.manifests import package_version

    return Finding("els-machine", f"{package_version()}, in {Path(__file__).parent.parent}")


def _python() -> Finding:
    name, version = platform.python_implementation(), platform.python_version()
    return Finding("Python", f"{name} {version} on {platform.platform()}")


def _processor() -> Finding:
    from els.engine.backends.cores import available_cores

    model = platform.processor() or platform.machine()
    told = Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
                break
    there = os.cpu_count() or 1
    return Finding("processor", f"{model}; {available_cores()} of {there} cores for this process")


def _memory() -> Finding:
    from els.engine.devices import physical_memory

    total, free = physical_memory(), ""
    if total is None:
        return Finding("memory", "unknown")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not on macOS
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        free = f", {available / 1e9:,.1f} GB free"
    return Finding("memory", f"{total / 1e9:,.1f} GB{free}")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    return Finding("disk", f"{free / 1e9:,.1f} GB free in {Path.cwd()}")


def _torch() -> Finding:
    torch, missing = _imported("torch")
    if missing is not None:
        return Finding("torch", missing.found, missing.state, "pip install torch (it computes)")
    return Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _compiler() -> Finding:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(name)
        if path is None:
            continue
        done = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMPILER_SECONDS,
        )
        if done.returncode == 0 and done.stdout.strip():
            return Finding("compiler", f"{done.stdout.splitlines()[0]} ({path})")
    command = "xcode-select --install" if sys.platform == "darwin" else "sudo apt-get install g++"
    # Only kernels that are yet to be compiled need one.
    is_needed = not _is_compiled()
    return Finding(
        "compiler", "none", "missing", f"{command} (it compiles the kernels)" if is_needed else None
    )


def _is_compiled() -> bool:
    try:
        from els.engine.backends.native_kernels import is_compiled

        return is_compiled()
    except Exception:  # The backends import torch, which may be broken.
        return False


def _kernels() -> Finding:
    from els.engine.backends.native_kernels import instruction_sets, is_compiled, kernel_module

    if not is_compiled():
        return Finding(
            "kernels",
            "not compiled",
            "missing",
            f"{_REINSTALL} (where there is a C++17 compiler; 20 times faster on a CPU)",
        )
    try:
        sets = instruction_sets()
        tiles = "with" if kernel_module().can_use_tiles() else "without"
    except (ImportError, OSError, RuntimeError) as error:
        reason = _reason(error)
        return Finding("kernels", f"broken: {reason}", "broken", f"{_REINSTALL} (anew)")
    return Finding("kernels", f"{sets[-1]} of {', '.join(sets)}; {tiles} a matrix unit (AMX)")


def _gpu() -> Finding:
    torch, missing = _imported("torch")
    if missing is not None:
        return Finding("GPU", "not known without torch", "missing")
    if not torch.cuda.is_available():
        has_driver = shutil.which("nvidia-smi") is not None
        is_plain = torch.version.cuda is None and torch.version.hip is None
        if has_driver and is_plain:
            remedy = "pip install --force-reinstall torch (a build with CUDA)"
            return Finding("GPU", "one that this build of torch cannot use", "missing", remedy)
        return Finding("GPU", "none that torch finds", "missing")
    told = []
    for number in range(torch.cuda.device_count()):
        of_gpu = torch.cuda.get_device_properties(number)
        memory = of_gpu.total_memory / 1e9
        told.append(f"{of_gpu.name}, {memory:,.0f} GB, sm_{of_gpu.major}{of_gpu.minor}")
    return Finding("GPU", "; ".join(told))


def _triton() -> Finding:
    module, missing = _imported("triton")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    state = ", kernels are interpreted (TRITON_INTERPRET is set)" if interpreted else ""
    if missing is None:
        return Finding("triton", f"{module.__version__}{state}")
    torch, no_torch = _imported("torch")
    is_useful = no_torch is None and torch.cuda.is_available()
    remedy = "pip install 'els-machine[gpu]' (kernels for the GPU)" if is_useful else None
    return Finding("triton", missing.found, missing.state, remedy)


def _found(library: _Library) -> Finding:
    module, missing = _imported(library.module)
    remedy = f"{library.remedy} ({library.purpose})"
    if missing is not None:
        return Finding(library.module, missing.found, missing.state, remedy)
    version = getattr(module, "__version__", None) or metadata.version(library.distribution)
    return Finding(library.module, str(version))


def _imported(name: str) -> tuple[Any, Finding | None]:
    """A library, or what is wrong with it."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, Finding(name, "not installed", "missing")
        return None, Finding(name, f"broken: {_reason(error)}", "broken")
    except Exception as error:  # A library that is damaged raises anything.
        return None, Finding(name, f"broken: {_reason(error)}", "broken")


def _some_database() -> Any:
    """A database in memory, the same everywhere."""
    import numpy as np

    from els.index import PatchDatabase

    images = np.random.default_rng(0).integers(0, 256, _CHECKED_SHAPE, dtype=np.uint8)
    return PatchDatabase.from_arrays(images)


def _error(machine: ScoreMachine) -> float:
    """Largest error of the machine's posterior means beside torch's in float64."""
    import torch

    from els.engine import ScoreMachine
    from els.index import decode

    truth = ScoreMachine(machine.db, machine.kind, machine.boundary, "torch", device="cpu")
    generator = torch.Generator().manual_seed(0)
    clean = torch.from_numpy(decode(machine.db.images[:2]))
    noise = torch.randn(clean.shape, generator=generator)
    errors = []
    for alpha, sigma in _CHECKED_NOISE:
        x = (alpha * clean + sigma * noise).double()
        means = [
            each.posterior(
                x.to(each.device), alpha=alpha, sigma=sigma, patch_size=_CHECKED_PATCH
            ).mean.cpu()
            for each in (machine, truth)
        ]
        errors.append((means[0] - means[1]).abs().max())
    return float(torch.stack(errors).max())


def _pairs_per_second() -> float:
    """Speed of an exact ELS posterior of one image over some of Fashion-MNIST."""
    import torch

    from els.engine import ScoreMachine
    from els.index import PatchDatabase, decode, open_source

    source = open_source("embedded:fashion-mnist")
    db = PatchDatabase.from_arrays(next(iter(source.chunks(_TIMED_IMAGES))))
    machine = ScoreMachine(db)
    clean = torch.from_numpy(decode(db.images[:1]))
    generator = torch.Generator().manual_seed(0)
    x = (0.9 * clean + 0.4 * torch.randn(clean.shape, generator=generator)).to(machine.device)
    _, height, width = db.shape
    places = (height - _TIMED_PATCH + 1) * (width - _TIMED_PATCH + 1)

    def ask() -> None:
        # The mean is needed on the CPU, so that what a GPU has not finished is waited for.
        answer = machine.posterior(x, alpha=0.9, sigma=0.4, patch_size=_TIMED_PATCH, entropy=False)
        answer.mean.cpu()

    ask()  # what is loaded or compiled once does not count
    start = time.perf_counter()
    times, seconds = 0, 0.0
    while times == 0 or seconds < _TIMED_SECONDS:
        ask()
        times, seconds = times + 1, time.perf_counter() - start
    return times * len(db) * places * height * width / seconds


def _print(findings: list[Finding], check: SelfCheck | None, problem: str | None) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        table.add_row(finding.name, finding.found)
    if check is None:
        table.add_row("backend", f"none can be asked: {problem}")
    else:
        verdict = "right" if check.is_right else "WRONG"
        table.add_row("backend", f"{check.backend}: {check.reason}")
        table.add_row(
            "self-check",
            f"{verdict}: off by {check.error:.1e} from torch in float64 ({check.allowed:.0e} "
            "allowed)",
        )
        table.add_row(
            "speed",
            f"{check.pairs_per_second:.2g} pairs of a pixel and a patch a second "
            f"(ELS, P = {_TIMED_PATCH}, {_TIMED_IMAGES} images of 28 x 28)",
        )
    print_table(table)
    remedies = [finding for finding in findings if finding.remedy is not None]
    if remedies:
        typer.echo("\nwhat would improve it:")
    for finding in remedies:
        typer.echo(f"  {finding.name}: {finding.remedy}")
