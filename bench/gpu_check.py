"""Everything there is to check on a GPU, in one command: ``python bench/gpu_check.py``.

For a bare CUDA or ROCm machine: it needs torch, triton, numpy and pytest, installs nothing, and
takes less than eight minutes. It runs the GPU tests against the float64 oracle, measures the card's
ceilings, times every configuration of the exact kernel, then exact, truncated and top-k posteriors
and what one would pick instead, prints all of it and writes ``gpu-check.json`` (under ``$OUT`` if
that is set, else in bench/results). No timing is reported whose result failed its gate.

``--rehearse`` runs the same program on a handful of tiny images; with ``TRITON_INTERPRET=1`` it
needs no GPU. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 450.0
_TESTS_SECONDS = 150.0
_CHANNELS = 3
_TOLERANCE = 1e-4

Row = dict[str, Any]


def make_importable() -> dict[str, str]:
    """The environment in which ``els.X`` is the folder ``X``, installed or not."""
    if importlib.util.find_spec("els"):
        return dict(os.environ)
    folder = Path(tempfile.mkdtemp(prefix="els-"))
    (folder / "els").mkdir()
    for package in ("index", "engine", "triton_kernels", "bench"):
        (folder / "els" / package).symlink_to(ROOT / package)
    sys.path.insert(0, str(folder))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ) | {"PYTHONPATH": path}


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    side: int
    patch_sizes: tuple[int, ...]
    batches: tuple[int, ...]
    small: int
    large: int
    tuned: int
    k: int
    repeats: int
    programs: int


FULL = Scale(32, (3, 5, 9, 17), (1, 16, 64), 10_000, 50_000, 2048, 256, 4096, 132 * 64)
REHEARSAL = Scale(6, (3,), (1, 2), 5, 7, 4, 4, 4, 2)


class Check:
    """One run: what is measured, where, under a deadline.

    Args:
        scale: how much.
        device: the GPU, or the CPU of a rehearsal.
    """

    def __init__(self, scale: Scale, device: str) -> None:
        self.scale = scale
        self.device = device
        self.start = time.monotonic()
        self.rows: list[Row] = []
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return _SECONDS - (time.monotonic() - self.start)

    def add(self, **row: Any) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)

    def can_afford(self, seconds: float, what: str) -> bool:
        """Whether that fits before the deadline; if not, it is said."""
        if self.left >= seconds:
            return True
        self.skipped.append(what)
        print(f"skipped for lack of time: {what}", flush=True)
        return False

    def seconds_of(self, function: Callable[[], object], *, rounds: int = 3) -> float:
        """Median time of a call on the device, after one warm-up."""
        function()
        times = []
        for _ in range(rounds):
            self.synchronize()
            before = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - before)
        return sorted(times)[len(times) // 2]

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_tests(check: Check, environment: dict[str, str]) -> None:
    """The suites of the Triton backend, on this card."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-W", "default", "-k", "triton and not compiles_without_a_gpu"]
    command += ["tests/test_triton.py", "tests/test_conformance.py"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=_TESTS_SECONDS,
            capture_output=True,
            text=True,
            check=False,
        )
        output, passed = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as expired:
        output, passed = f"{expired.stdout!r}"[-2000:] + "\nran out of time", False
    print(output[-6000:], flush=True)
    check.add(what="tests", passed=passed, summary=output.strip().splitlines()[-1][-200:])


def ceilings(check: Check) -> tuple[float, float]:
    """Exponentials and float32 multiply-adds per second that this card reaches."""
    import torch
    import triton

    from els.bench.gpu_ceilings import exponentials, multiply_adds

    programs, block, repeats = check.scale.programs, 1024, check.scale.repeats
    out = torch.empty(programs * block, device=check.device)
    rates = []
    for name, kernel, chains in (("exp2", exponentials, 4), ("fma", multiply_adds, 8)):

        def launch(kernel: Any = kernel) -> None:
            kernel[(programs,)](out, repeats, SIZE=block, num_warps=4)

        rate = programs * block * repeats * chains / check.seconds_of(launch)
        check.add(what="ceiling", name=name, per_second=rate, triton=triton.__version__)
        rates.append(rate)
    return rates[0], rates[1]


def random_images(count: int, side: int, *, seed: int) -> Any:
    """Uniform bytes, ``[count, C, H, W]``."""
    import numpy as np

    shape = (count, _CHANNELS, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth_images(count: int, side: int, *, seed: int) -> Any:
    """Like photographs in their spectrum: amplitudes fall as 1 / frequency, colours go together."""
    import numpy as np

    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1 / side
    images = np.empty((count, _CHANNELS, side, side), dtype=np.uint8)
    for first in range(0, count, 1000):
        part = images[first : first + 1000]
        grey = rng.standard_normal((len(part), 1, side, side))
        field = grey + 0.3 * rng.standard_normal(part.shape)
        field = np.fft.irfft2(np.fft.rfft2(field) / frequency, s=(side, side))
        field *= 60 / field.std(axis=(1, 2, 3), keepdims=True)
        part[:] = np.clip(128 + field, 0, 255).astype(np.uint8)
    return images


def gate(check: Check, machine: Any, work: Any, images: Any) -> float:
    """Largest error of the mean against float64 torch, on a few images."""
    from els.engine import ScoreMachine
    from els.index import PatchDatabase

    few = PatchDatabase.from_arrays(images[:33])
    arguments = {"alpha": work.alpha, "sigma": work.sigma, "patch_size": work.patch_size}
    ours = ScoreMachine(few, machine.kind, machine.boundary, backend="triton")
    theirs = ScoreMachine(few, machine.kind, machine.boundary, backend="torch", device=check.device)
    x = work.x[:1]
    error = (
        ours.posterior(x, **arguments).mean - theirs.posterior(x.double(), **arguments).mean
    ).abs()
    largest = float(error.max())
    if not largest <= _TOLERANCE:
        raise SystemExit(f"gate failed: mean off by {largest} at P = {work.patch_size}")
    return largest


def tune(check: Check, works: dict[int, Any], images: Any) -> None:
    """Every configuration of the exact kernel, a thousand images, batch 1."""
    from els.engine import ScoreMachine
    from els.engine.gpu import TritonBackend
    from els.index import PatchDatabase
    from els.triton_kernels.configurations import CANDIDATES

    some = PatchDatabase.from_arrays(images[: check.scale.tuned])
    for patch_size, work in works.items():
        for configuration in CANDIDATES:
            if not check.can_afford(15, f"tuning P = {patch_size}, {configuration}"):
                return
            machine = ScoreMachine(some, "ELS", "circular", backend="triton")
            machine._backend = TritonBackend(configuration=configuration)
            seconds = check.seconds_of(partial(ask, machine, work, 1))
            check.add(
                what="tuning",
                patch_size=patch_size,
                configuration=str(configuration),
                seconds=seconds,
                pairs_per_second=work.pairs("circular") // len(work.x) * len(some) / seconds,
            )


def ask(machine: Any, work: Any, batch: int, **options: Any) -> Any:
    """One posterior of the first ``batch`` queries."""
    return machine.posterior(
        work.x[:batch],
        alpha=work.alpha,
        sigma=work.sigma,
        patch_size=work.patch_size,
        entropy=False,
        **options,
    )


def exact(
    check: Check, machine: Any, name: str, works: dict[int, Any], rates: tuple[float, float]
) -> None:
    """Exact posteriors over a whole database."""
    count = len(machine.db)
    for patch_size, work in works.items():
        error = gate(check, machine, work, machine.db.images)
        for batch in check.scale.batches:
            pairs = work.pairs(machine.boundary) // len(work.x) * count * batch
            label = f"exact {machine.boundary} {name} N = {count} P = {patch_size} batch {batch}"
            if not check.can_afford(4 * pairs / 2e11 + 2, label):
                continue
            seconds = check.seconds_of(partial(ask, machine, work, batch), rounds=2)
            check.add(
                what="exact",
                boundary=machine.boundary,
                data=name,
                images=count,
                patch_size=patch_size,
                batch=batch,
                seconds_per_image_step=seconds / batch,
                pairs_per_second=pairs / seconds,
                # Two exponentials for three pairs, and about 22 float32 operations for each.
                share_of_exp=1.5 * pairs / seconds / rates[0],
                share_of_fma=22 * pairs / seconds / rates[1],
                max_error=error,
            )


def approximate(check: Check, machine: Any, name: str, works: dict[int, Any]) -> None:
    """Top-k of the whole database, and the posterior over given candidates."""
    import torch

    from els.engine.gpu import _LN2
    from els.triton_kernels.queries import Queries
    from els.triton_kernels.truncated import truncated

    images = machine._backend._images._resident_images(machine.db.images)
    side, most = check.scale.side, check.scale.k
    for patch_size, work in works.items():
        if not check.can_afford(15, f"top-k {name} P = {patch_size}"):
            return
        found = ask(machine, work, 1, top=most)
        seconds = check.seconds_of(partial(ask, machine, work, 1, top=most), rounds=1)
        plain = check.seconds_of(partial(ask, machine, work, 1), rounds=1)
        check.add(
            what="top-k",
            data=name,
            images=len(machine.db),
            patch_size=patch_size,
            k=most,
            seconds_per_image_step=seconds - plain,
        )
        queries = Queries.of(
            work.x[:1], torch.tensor([work.alpha]).double(), torch.tensor([work.sigma]).double()
        )
        for k in (most // 2, most, 16 * most):
            addresses = found.top_addresses.flatten(1, 2)
            addresses = addresses.repeat(1, 1, -(-k // most))[:, :, :k].contiguous()
            arguments = {"height": side, "patch_size": patch_size, "circular": True}

            def launch(given: Any = addresses, q: Any = queries, a: Any = arguments) -> Any:
                return truncated(images, q.x, q.slope, given, **a)

            if k == most:
                _, logits = launch()
                evidence = found.log_evidence.flatten().double()
                weights = (_LN2 * logits[0] - evidence[:, None]).exp()
                error = (weights - found.top_weights.flatten(0, 2)).abs().max()
                if not float(error) <= _TOLERANCE:
                    raise SystemExit(f"gate failed: weights off by {float(error)}")
            check.add(
                what="truncated",
                data=name,
                patch_size=patch_size,
                k=k,
                seconds_per_image_step=check.seconds_of(launch),
                pairs=k * side**2,
            )


def alternatives(check: Check, machine: Any, name: str, works: dict[int, Any]) -> None:
    """A chunked matrix product and attention in torch, on the same card."""
    from els.bench.baselines import attention, chunked_matmul

    for patch_size, work in works.items():
        single = work.of(1)
        ours = check.seconds_of(partial(ask, machine, work, 1))
        for label, baseline in (("chunked matmul", chunked_matmul), ("attention", attention)):
            if not check.can_afford(20, f"{label} P = {patch_size}"):
                return
            try:
                seconds = check.seconds_of(partial(baseline, single), rounds=1)
            except Exception as error:
                check.add(what=label, patch_size=patch_size, failed=f"{error}"[:200])
                continue
            check.add(
                what="alternative",
                method=label,
                data=name,
                images=len(machine.db),
                patch_size=patch_size,
                seconds_per_image_step=seconds,
                times_slower=seconds / ours,
            )


def works_of(check: Check, db: Any, images: Any) -> dict[int, Any]:
    """Queries at the noise of each patch size, of images that are not in the database."""
    from els.bench.workloads import workload

    return {
        patch_size: workload(images, patch_size, len(images), db=db, device=check.device)
        for patch_size in check.scale.patch_sizes
    }


def provenance() -> Row:
    """Where and with what this was measured."""
    import numpy as np
    import torch
    import triton

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    device: Row = {"device": "interpreted"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return device | {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "numpy": np.__version__,
        },
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d"),
    }


def databases(check: Check) -> Iterator[tuple[str, Any, Any]]:
    """Name, database and images to make queries of; the last of the images are not in it."""
    from els.index import PatchDatabase

    batch = max(check.scale.batches)
    for name, count, make in (
        ("smooth", check.scale.small, smooth_images),
        ("smooth", check.scale.large, smooth_images),
        ("random", check.scale.small, random_images),
    ):
        images = make(count + batch, check.scale.side, seed=count)
        yield name, PatchDatabase.from_arrays(images[:-batch]), images[-batch:]


def main() -> None:
    """Run everything, and write it down even if something fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny: tries the program itself")
    parser.add_argument("--no-tests", action="store_true", help="timings only")
    options = parser.parse_args()
    environment = make_importable()
    import torch

    interpreted = options.rehearse and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        raise SystemExit("no CUDA or ROCm device: torch.cuda.is_available() is False")
    from els.engine import ScoreMachine

    check = Check(REHEARSAL if options.rehearse else FULL, "cpu" if interpreted else "cuda")
    where = provenance()
    print(json.dumps(where), flush=True)
    failure = None
    try:
        if not options.no_tests:
            run_tests(check, environment)
        rates = ceilings(check)
        for number, (name, db, queries) in enumerate(databases(check)):
            works = works_of(check, db, queries)
            machine = ScoreMachine(db, "ELS", "circular", backend="triton")
            if number == 0:
                tune(check, works, db.images)
            exact(check, machine, name, works, rates)
            if number == 0:
                alternatives(check, machine, name, works)
                broken = ScoreMachine(db, "ELS", "zeros", backend="triton")
                exact(check, broken, name, works, rates)
            if number <= 1:
                approximate(check, machine, name, works)
    except (SystemExit, Exception) as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
        result = where | {"rows": check.rows, "skipped": check.skipped, "failure": failure}
        path = folder / "gpu-check.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{time.monotonic() - check.start:.0f} s; written to {path}", flush=True)


if __name__ == "__main__":
    main()
