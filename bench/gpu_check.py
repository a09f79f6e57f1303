"""All checks and measurements on a GPU, in one command: ``python bench/gpu_check.py``.

For a bare CUDA or ROCm machine: it needs torch, triton, numpy and pytest (with hypothesis, for the
tests), installs nothing, and takes less than eight minutes. It measures the card's ceilings, then
exact posteriors, what one would pick instead, other configurations of the exact kernel, truncated
and top-k posteriors, the most telling first, and at last runs the GPU tests against the float64
oracle. Every row is printed and written to ``gpu-check.json`` (under ``$OUT`` if that is set, else
in bench/results) as soon as it is there; what there was no time for is listed as ``skipped``. No
timing is reported whose result failed its gate. The exit code is 0 if everything passed, else 1.

``--sanitize`` asks three small questions and nothing else: run it under ``compute-sanitizer --tool
memcheck`` and ``--tool racecheck``. ``--rehearse`` runs the whole program on a handful of tiny
images; its figures mean nothing. With ``TRITON_INTERPRET=1`` both need no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Everything ends within so many seconds, of which the tests may take the last.
_SECONDS = 450.0
_TESTS_SECONDS = 130.0
_CHANNELS = 3
# Largest error of a posterior mean, in units of a pixel in [-1, 1], and of a weight.
_TOLERANCE = 1e-4
# Pairs a second that a card is supposed to reach, to see what there is time for.
_PAIRS_PER_SECOND = 3e11
# The same for the reference of a gate, which multiplies float64 numbers one by one.
_PRODUCTS_PER_SECOND = 1e11
# Queries that a gate compares.
_GATE_QUERIES = 4
# Pixels of each of them.
_GATE_PIXELS = 16
# Patches that the reference of a gate takes at once, and logits that attention may hold.
_PATCH_BYTES = 256 << 20
_LOGIT_BYTES = 4 << 30

Row = dict[str, Any]


def make_importable() -> dict[str, str]:
    """The environment in which ``els.X`` is the folder ``X``, installed or not."""
    if importlib.util.find_spec("els"):
        return dict(os.environ)
    folder = Path(tempfile.mkdtemp(prefix="els-"))
    (folder / "els").mkdir()
    for package in ROOT.glob("*/__init__.py"):
        (folder / "els" / package.parent.name).symlink_to(package.parent)
    sys.path.insert(0, str(folder))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ) | {"PYTHONPATH": path}


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        side: of the images.
        wide: side of larger ones.
        patch_sizes: each at its own noise; the first also at the least noise.
        batches: queries at once.
        small: images of the smaller database.
        large: of the larger.
        tuned: with which configurations are compared.
        k: of top-k.
        repeats: operations in a chain that measures a ceiling.
        programs: that measure a ceiling.
        matrix: side of the matrices whose product measures a ceiling.
    """

    side: int
    wide: int
    patch_sizes: tuple[int, ...]
    batches: tuple[int, ...]
    small: int
    large: int
    tuned: int
    k: int
    repeats: int
    programs: int
    matrix: int


FULL = Scale(32, 64, (3, 5, 9, 17), (1, 16), 10_000, 50_000, 2048, 256, 4096, 132 * 64, 8192)
REHEARSAL = Scale(6, 8, (3,), (1, 2), 5, 7, 4, 4, 4, 2, 16)


class Check:
    """One run: what is measured, where, under a deadline.

    Args:
        scale: how much.
        device: the GPU, or the CPU of a rehearsal.
        path: of the file that the rows go to.
        seconds: that the measurements may take.
    """

    def __init__(self, scale: Scale, device: str, path: Path, seconds: float) -> None:
        self.scale = scale
        self.device = device
        self.path = path
        self.seconds = seconds
        self.start = time.monotonic()
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.failures: list[str] = []
        self.where: Row = dict.fromkeys(("device", "commit", "date"), "unknown")
        self.where["versions"] = dict.fromkeys(("python", "torch", "triton", "numpy"), "unknown")

    @property
    def left(self) -> float:
        """Seconds until the measurements have to end."""
        return self.seconds - (time.monotonic() - self.start)

    def add(self, **row: Any) -> None:
        """Keep, print and write a row."""
        self.rows.append(row)
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self.write()

    def fail(self, what: str) -> None:
        """Note that something is wrong, and go on."""
        self.failures.append(what)
        print(f"failed: {what}", flush=True)
        self.write()

    def write(self) -> None:
        """Everything so far, the whole file or none of it."""
        failure = "; ".join(self.failures) or None
        result = self.where | {"rows": self.rows, "skipped": self.skipped, "failure": failure}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(self.path)

    def skip(self, what: str) -> None:
        """Note what is not done."""
        self.skipped.append(what)
        print(f"skipped: {what}", flush=True)
        self.write()

    def can_afford(self, seconds: float, what: str) -> bool:
        """Whether that fits before the deadline; if not, it is skipped."""
        fits = self.left >= seconds
        if not fits:
            self.skip(f"for lack of time: {what}")
        return fits

    def attempt(self, what: str, function: Callable[[], None]) -> None:
        """Do something whose failure must not keep the rest from being measured."""
        try:
            function()
        except Exception as error:
            self.fail(f"{what}: {type(error).__name__}: {error}"[:500])

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


def run_tests(check: Check, environment: dict[str, str], seconds: float) -> None:
    """The suites of the Triton backend, on this card; in parallel with pytest-xdist."""
    if not importlib.util.find_spec("hypothesis"):
        check.skip("tests: hypothesis is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-W", "default", "-k", "triton and not compile"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(os.cpu_count() or 1)]
    command += ["tests/triton_kernels", "tests/engine/test_conformance.py"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output, passed = done.stdout.decode(errors="replace"), done.returncode == 0
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        output, passed = f"{output}\nnot done after {seconds:.0f} s", False
    print(output[-6000:], flush=True)
    summary = output.strip().splitlines()[-1][-200:]
    check.add(what="tests", passed=passed, summary=summary)
    if not passed:
        check.fail(f"tests: {summary}")


def ceilings(check: Check) -> dict[str, float]:
    """Exponentials and multiply-adds, in float32 and of float16 matrices, of this card a second."""
    import torch
    import triton

    from els.bench.gpu_ceilings import exponentials, multiply_adds

    programs, block, repeats = check.scale.programs, 1024, check.scale.repeats
    out = torch.empty(programs * block, device=check.device)
    rates = {}
    for name, kernel, chains in (("exp2", exponentials, 4), ("fma", multiply_adds, 8)):

        def launch(kernel: Any = kernel) -> None:
            kernel[(programs,)](out, repeats, SIZE=block, num_warps=4)

        rate = programs * block * repeats * chains / check.seconds_of(launch)
        check.add(what="ceiling", name=name, per_second=rate, triton=triton.__version__)
        rates[name] = rate
    side = check.scale.matrix
    matrix = torch.ones(side, side, dtype=torch.float16, device=check.device)
    rates["matrix"] = side**3 / check.seconds_of(lambda: matrix @ matrix)
    check.add(what="ceiling", name="matrix", per_second=rates["matrix"], torch=torch.__version__)
    return rates


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


def gate(check: Check, machine: Any, work: Any) -> float | None:
    """Largest error of the mean against float64; None, and a note, if it is too large.

    All pixels of a query over a few images against the torch backend, then some pixels of several
    queries, whose patches are inside, over all images.
    """
    import torch

    from els.engine import ScoreMachine
    from els.index import PatchDatabase

    few = PatchDatabase.from_arrays(machine.db.images[:33])
    ours, theirs = (
        ScoreMachine(few, machine.kind, machine.boundary, backend=backend, device=check.device)
        for backend in ("triton", "torch")
    )
    wide = replace(work, x=work.x.double())
    largest = float((ask(ours, work, 1).mean - ask(theirs, wide, 1).mean).abs().max())
    radius, side = work.patch_size // 2, check.scale.side
    generator = torch.Generator().manual_seed(work.patch_size)
    rows, columns = torch.randint(radius, side - radius, (2, _GATE_PIXELS), generator=generator).to(
        check.device
    )
    few_queries = work.of(_GATE_QUERIES)
    means = ask(machine, few_queries, _GATE_QUERIES).mean[:, :, rows, columns]
    expected = sampled_means(machine.db.images, few_queries, rows, columns)
    largest = max(largest, float((means - expected).abs().max()))
    if largest <= _TOLERANCE:
        return largest
    check.fail(
        f"gate: {machine.boundary}, P = {work.patch_size}, beta = {work.sigma**2:.3g}: "
        f"the mean is off by {largest:.3g}"
    )
    return None


def sampled_means(images: Any, work: Any, rows: Any, columns: Any) -> Any:
    """Posterior means of some pixels, from differences in float64, ``[B, C, n]``.

    Args:
        images: uint8 ``[N, C, H, W]``.
        work: the queries.
        rows: of the pixels, whose patches are inside, int64 ``[n]``.
        columns: of the pixels, likewise.
    """
    import torch
    from torch.nn.functional import unfold

    size, radius = work.patch_size, work.patch_size // 2
    x = work.x.double()
    batch, channels, height, width = x.shape
    inside = (rows - radius) * (width - size + 1) + columns - radius
    queries = unfold(x, size)[:, :, inside].transpose(1, 2).flatten(0, 1)
    places = (height - size + 1) * (width - size + 1)
    most = max(1, _PATCH_BYTES // (8 * channels * size**2 * places))
    maximum = queries.new_full((len(queries), 1), -torch.inf)
    mass, total = torch.zeros_like(maximum), queries.new_zeros(len(queries), channels)
    for first in range(0, len(images), most):
        clean = torch.tensor(images[first : first + most], device=x.device).double() / 127.5 - 1
        centres = clean[:, :, radius : height - radius, radius : width - radius].flatten(2)
        patches = work.alpha * unfold(clean, size).transpose(1, 2).flatten(0, 1)
        distances = torch.cdist(
            queries, patches, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
        logits = distances / (-2 * work.sigma**2)
        highest = torch.maximum(maximum, logits.amax(1, keepdim=True))
        weights, old = (logits - highest).exp(), (maximum - highest).exp()
        mass = old * mass + weights.sum(1, keepdim=True)
        total = old * total + weights @ centres.transpose(1, 2).flatten(0, 1)
        maximum = highest
    return (total / mass).reshape(batch, -1, channels).transpose(1, 2)


def tune(check: Check, works: list[Any], images: Any) -> None:
    """Other configurations of the exact kernel beside the shipped one, some images."""
    from els.engine import ScoreMachine
    from els.engine.backends.triton import TritonBackend
    from els.index import PatchDatabase
    from els.triton_kernels.configurations import CANDIDATES, SHIPPED

    some = PatchDatabase.from_arrays(images[: check.scale.tuned])
    batch = max(check.scale.batches)
    for work in works:
        pairs = replace(work.of(batch), db=some).pairs("circular")
        for configuration in (SHIPPED.plain, *CANDIDATES):
            if not check.can_afford(15, f"tuning P = {work.patch_size}, {configuration}"):
                return
            backend = TritonBackend(configurations=replace(SHIPPED, plain=configuration))
            machine = ScoreMachine(some, "ELS", "circular", backend)
            try:
                seconds = check.seconds_of(partial(ask, machine, work, batch))
            except Exception as error:
                # Long patches do not fit the shared memory with every configuration.
                check.add(
                    what="tuning",
                    patch_size=work.patch_size,
                    configuration=str(configuration),
                    failed=f"{error}"[:200],
                )
                continue
            check.add(
                what="tuning",
                patch_size=work.patch_size,
                configuration=str(configuration),
                batch=batch,
                seconds_per_image_step=seconds / batch,
                pairs_per_second=pairs / seconds,
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


def products_a_pair(work: Any) -> int:
    """Multiply-adds of matrix products for a pair: scores, and two halves of its weight."""
    import torch

    from els.triton_kernels.configurations import VALUES
    from els.triton_kernels.pixel_groups import Layout
    from els.triton_kernels.queries import parts_needed

    coordinates = _CHANNELS * work.patch_size**2
    noise = (torch.tensor(value, dtype=torch.float64) for value in (work.alpha, work.sigma))
    parts = int(parts_needed(coordinates, *noise))
    return parts * Layout.of(coordinates).columns + 2 * VALUES


def exact(
    check: Check,
    machine: Any,
    name: str,
    works: list[Any],
    batches: tuple[int, ...],
    rates: dict[str, float],
) -> None:
    """Exact posteriors over a whole database, smaller batches first."""
    count = len(machine.db)
    errors: dict[tuple[int, float], float | None] = {}
    for batch in batches:
        for work in works:
            patch_size, beta = work.patch_size, work.sigma**2
            a_query = work.pairs(machine.boundary) // len(work.x)
            label = f"exact {machine.boundary} {name} N = {count} P = {patch_size} batch {batch}"
            label += f" beta {beta:.3g}"
            key = patch_size, beta
            needed = 3 * a_query * batch / _PAIRS_PER_SECOND + 5
            if key not in errors:
                window = _CHANNELS * patch_size**2 * (check.scale.side - patch_size + 1) ** 2
                products = _GATE_QUERIES * _GATE_PIXELS * count * window
                needed += _GATE_QUERIES * a_query / _PAIRS_PER_SECOND
                needed += products / _PRODUCTS_PER_SECOND
            if not check.can_afford(needed, label):
                continue
            if key not in errors:
                errors[key] = gate(check, machine, work)
            if errors[key] is None:
                continue
            seconds = check.seconds_of(partial(ask, machine, work, batch), rounds=2)
            pairs = a_query * batch
            check.add(
                what="exact",
                boundary=machine.boundary,
                data=name,
                side=check.scale.side,
                images=count,
                patch_size=patch_size,
                beta=beta,
                batch=batch,
                seconds_per_image_step=seconds / batch,
                pairs_per_second=pairs / seconds,
                share_of_exp=pairs / seconds / rates["exp2"],
                share_of_matrix=products_a_pair(work) * pairs / seconds / rates["matrix"],
                max_error=errors[key],
            )


def approximate(check: Check, machine: Any, name: str, works: list[Any]) -> None:
    """Top-k of the whole database, and the posterior over given candidates."""
    from els.triton_kernels.truncated import truncated

    images = machine.backend_object._images._resident_images(machine.db.images)
    side, most = check.scale.side, check.scale.k
    for work in works:
        patch_size = work.patch_size
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
        x = work.x[:1].double()
        alpha, sigma = (x.new_tensor([value]) for value in (work.alpha, work.sigma))
        for k in (most // 2, most, 16 * most):
            addresses = found.top_addresses.flatten(1, 2)
            addresses = addresses.repeat(1, 1, -(-k // most))[:, :, :k].contiguous()

            launch = partial(
                truncated,
                images,
                x,
                alpha,
                sigma,
                addresses,
                patch_size=patch_size,
                circular=True,
            )
            if k == most:
                _, logits = launch()
                evidence = found.log_evidence.flatten().double()
                weights = (math.log(2) * logits[0] - evidence[:, None]).exp()
                error = (weights - found.top_weights.flatten(0, 2)).abs().max()
                if not float(error) <= _TOLERANCE:
                    check.fail(f"gate: weights at P = {patch_size} are off by {float(error):.3g}")
                    return
            check.add(
                what="truncated",
                data=name,
                patch_size=patch_size,
                k=k,
                seconds_per_image_step=check.seconds_of(launch),
                pairs=k * side**2,
            )


def alternatives(check: Check, machine: Any, name: str, works: list[Any]) -> None:
    """A chunked matrix product and attention in torch, on the same card and images."""
    import torch

    from els.bench.cases.other_libraries import attention, chunked_matmul
    from els.engine import ScoreMachine
    from els.index import PatchDatabase

    for work in works:
        patch_size, side = work.patch_size, check.scale.side
        # Attention may hold all logits at once.
        row_bytes = 4 * side**2 * (side - patch_size + 1) ** 2
        fitting = max(1, min(len(machine.db), _LOGIT_BYTES // row_bytes))
        for label, baseline, count in (
            ("chunked matmul", chunked_matmul, len(machine.db)),
            ("attention", attention, fitting),
        ):
            if not check.can_afford(20, f"{label} P = {patch_size}"):
                return
            db = PatchDatabase.from_arrays(machine.db.images[:count])
            some = ScoreMachine(db, machine.kind, machine.boundary, backend="triton")
            ours = check.seconds_of(partial(ask, some, work, 1))
            # What torch keeps for later would be missing where both count free memory.
            if check.device != "cpu":
                torch.cuda.empty_cache()
            try:
                seconds = check.seconds_of(partial(baseline, replace(work.of(1), db=db)), rounds=1)
            except Exception as error:
                check.add(what=label, patch_size=patch_size, failed=f"{error}"[:200])
                continue
            finally:
                if check.device != "cpu":
                    torch.cuda.empty_cache()
            check.add(
                what="alternative",
                method=label,
                data=name,
                images=count,
                patch_size=patch_size,
                seconds_per_image_step=seconds,
                times_slower=seconds / ours,
            )


def works_of(check: Check, db: Any, images: Any) -> list[Any]:
    """Queries of images that are not in the database, at the noise of each patch size.

    The second has the first's patch size at the least noise that a patch size has: of one pixel.
    """
    from els.bench.workloads import workload

    least = min(check.scale.patch_sizes)
    works = [
        workload(images, patch_size, len(images), db=db, device=check.device)
        for patch_size in (*check.scale.patch_sizes, 1)
    ]
    return [works[0], replace(works[-1], patch_size=least), *works[1:-1]]


def provenance() -> Row:
    """Where and with what this was measured; what cannot be found out is unknown."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.strip()

    def version(module: str) -> str:
        return str(getattr(sys.modules.get(module), "__version__", "unknown"))

    import torch
    import triton  # noqa: F401 - its version is asked for

    device: Row = {"device": "interpreted"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    versions = {name: version(name) for name in ("torch", "triton", "numpy")}
    return device | {
        "versions": {"python": platform.python_version()} | versions,
        "commit": git("rev-parse", "HEAD"),
        "changes": git("status", "--porcelain").splitlines(),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(check: Check) -> None:
    """Everything but the tests, the most telling first."""
    from els.engine import ScoreMachine
    from els.index import PatchDatabase

    scale = check.scale
    spare = max(scale.batches)

    def machine_and_works(count: int, make: Callable[..., Any]) -> tuple[Any, list[Any]]:
        images = make(count + spare, check.scale.side, seed=count)
        db = PatchDatabase.from_arrays(images[:-spare])
        machine = ScoreMachine(db, "ELS", "circular", backend="triton", device=None)
        return machine, works_of(check, db, images[-spare:])

    rates = ceilings(check)
    first, *others = scale.batches
    large, works = machine_and_works(scale.large, smooth_images)
    broken = ScoreMachine(large.db, "ELS", "zeros", backend="triton")
    plain = [works[0], *works[2:]]
    check.attempt("exact", lambda: exact(check, large, "smooth", works, (first,), rates))
    check.attempt("exact", lambda: exact(check, large, "smooth", plain, (*others,), rates))
    small, small_works = machine_and_works(scale.small, smooth_images)
    small_plain = [small_works[0], *small_works[2:]]
    check.attempt("alternatives", lambda: alternatives(check, small, "smooth", small_plain))
    check.attempt("exact", lambda: exact(check, broken, "smooth", works, (first,), rates))
    check.attempt("tuning", lambda: tune(check, plain, large.db.images))
    check.attempt("top-k", lambda: approximate(check, large, "smooth", plain))
    check.scale = replace(scale, side=scale.wide)
    wide, wide_works = machine_and_works(scale.small, smooth_images)
    check.attempt("exact", lambda: exact(check, wide, "smooth", wide_works, (first,), rates))
    check.scale = scale
    noise, noise_works = machine_and_works(scale.small, random_images)
    check.attempt("exact", lambda: exact(check, noise, "random", noise_works, (first,), rates))


def sanitized(device: str) -> None:
    """Three small questions that launch every kernel, for compute-sanitizer."""
    import torch

    from els.engine import ScoreMachine
    from els.engine.kinds import Boundary
    from els.index import PatchDatabase

    boundaries: tuple[Boundary, ...] = ("circular", "zeros", "zeros")
    db = PatchDatabase.from_arrays(smooth_images(20, 16, seed=1))
    for boundary, patch_size, sigma in zip(boundaries, (3, 5, 11), (0.5, 1e-4, 2.0), strict=True):
        machine = ScoreMachine(db, "ELS", boundary, backend="triton")
        x = torch.randn(2, _CHANNELS, 16, 16, device=device)
        answer = machine.posterior(
            x, alpha=0.8, sigma=sigma, patch_size=patch_size, entropy=True, top=3
        )
        print(f"P = {patch_size}, {boundary}: mean {float(answer.mean.mean()):.3f}", flush=True)


def main() -> None:
    """Run everything, and write it down even if something fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny: tries the program itself")
    parser.add_argument("--no-tests", action="store_true", help="timings only")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="that it may take (default %(default)s)"
    )
    parser.add_argument("--sanitize", action="store_true", help="for compute-sanitizer")
    options = parser.parse_args()
    environment = make_importable()
    import torch

    interpreted = (options.rehearse or options.sanitize) and os.environ.get(
        "TRITON_INTERPRET"
    ) == "1"
    if not torch.cuda.is_available() and not interpreted:
        raise SystemExit("no CUDA or ROCm device: torch.cuda.is_available() is False")
    if options.sanitize:
        sanitized("cpu" if interpreted else "cuda")
        return
    check = Check(
        REHEARSAL if options.rehearse else FULL,
        "cpu" if interpreted else "cuda",
        Path(os.environ.get("OUT") or ROOT / "bench" / "results") / "gpu-check.json",
        options.seconds - (0 if options.no_tests else _TESTS_SECONDS),
    )
    # First, for whoever stops the program.
    check.attempt("provenance", lambda: check.where.update(provenance()))
    check.attempt("measurements", lambda: measure(check))
    if not options.no_tests:
        seconds = max(1.0, check.left + _TESTS_SECONDS)
        check.attempt("tests", lambda: run_tests(check, environment, seconds))
    check.write()
    print(f"{time.monotonic() - check.start:.0f} s; written to {check.path}", flush=True)
    if check.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
