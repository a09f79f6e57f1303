"""Exact against approximate on one database: time, error, what was omitted; the command els bench.

Every approximate posterior is compared with the exact one of the same query, so no figure is
without its error.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from els.bench.baselines import FlatNearest, answered, chunked_torch, pairs, query_patches
from els.engine.kinds import Boundary
from els.engine.machines import ScoreMachine
from els.engine.result import LocalPosterior
from els.engine.sampler import Denoiser, sample
from els.index import PatchDatabase, decode
from els.storage.figures import optional_picture, write_figure
from els.storage.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_T = TypeVar("_T")

_SUBSETS = (256, 1024, 4096)
_HEADS = (64, 256, 1024)
_SHARES = (0.002, 0.01, 0.05)
_NEAREST = 256
_MARKERS = "osD^vP*X"
_LEAST_SHOWN = 1e-6  # an error in a picture with logarithmic axes
# Of one baseline and one query: about a minute in chunked torch on two cores.
_MOST_PAIRS = 1 << 32
# Seeds that a generator of torch takes; larger ones start over.
_SEEDS = 1 << 63
# Times that each query is asked, so that a row can say its spread.
_REPEATS = 3
# Seconds after which twice is enough.
_LONG = 30.0
# Spread of a row's times from which it is marked: an idle machine repeats them within some percent.
BUSY_SPREAD = 0.2
# Processes that run or wait before the comparison starts, from which the machine is called busy.
_BUSY_LOAD = 0.5


@dataclass(frozen=True)
class Comparison:
    """One way to compute the posteriors of some queries, against the exact ones.

    Attributes:
        beta: noise variance; alpha is ``sqrt(1 - beta)``.
        patch_size: P.
        method: mode and its size, another backend, or a baseline.
        seconds: per image, the median over queries of the median over repeats.
        spread: of the repeats of a query, slowest less fastest over the median; the median over
            queries.
        speed_up: of the exact default backend's seconds over these; None for a baseline that saw
            the first images only, which is not the same work.
        mean_error: mean absolute error of the posterior mean, over pixels, channels and queries.
        max_error: the largest.
        claimed: what the method says its mean absolute error is, or is at most; None if nothing.
        omitted: mean share of the mass that was not computed; None if it is not known.
        recall: share of the k nearest that the index found; None without a head.
        note: what must be known to read the row, or None.
    """

    beta: float
    patch_size: int
    method: str
    seconds: float
    spread: float
    speed_up: float | None
    mean_error: float
    max_error: float
    claimed: float | None
    omitted: float | None
    recall: float | None
    note: str | None = None


@dataclass(frozen=True)
class SampleComparison:
    """Whole samples from the same seeds, to a tolerance and exact.

    Attributes:
        tolerance: of the approximate ones.
        seconds: per sample, once the indices are in memory.
        first_seconds: the same the first time, when they may have to be read from disk.
        speed_up: over the exact ones.
        r_squared: squared Pearson correlation of the pixels, the median over samples.
        psnr: peak signal-to-noise ratio in dB (peak to peak 2), the median over samples.
        r_squared_of_moved: as ``r_squared``, for exact samples whose initial noise was moved by
            1e-3: how stable the trajectory itself is.
    """

    tolerance: float
    seconds: float
    first_seconds: float
    speed_up: float
    r_squared: float
    psnr: float
    r_squared_of_moved: float


def held_out(db: PatchDatabase, count: int, seed: int) -> Tensor:
    """Clean images like those of the database that are not in it: mirrored ones.

    Returns:
        float32 ``[count, C, H, W]`` in [-1, 1].
    """
    chosen = np.random.default_rng(seed).permutation(len(db))[:count]
    return torch.from_numpy(decode(db.images[np.sort(chosen)][..., ::-1].copy()))


def compare_posteriors(
    db: PatchDatabase,
    clean: Tensor,
    noise: Sequence[tuple[float, int]],
    *,
    boundary: Boundary = "zeros",
    tolerance: float = 0.01,
    seed: int = 0,
    with_torch: bool = False,
    with_baselines: bool = False,
    memory: int = 4 * 10**9,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Comparison]:
    """Every method at every noise level, on ELS machines.

    The baselines (`els.bench.baselines`) are chunked torch, exact, and a flat FAISS index of all
    patches with a softmax over the 256 nearest, whose construction is not timed. With zeros beyond
    the border they get the border pixels from the exact posterior at no cost. Where a baseline
    would take more than 2^32 pairs a query or more than `memory`, it gets as many of the first
    images as fit, and its row says so.

    Args:
        db: the training images, with or without indices.
        clean: images to add noise to, ``[n, C, H, W]``.
        noise: pairs of a noise variance, 0 to 1, and the patch size for it.
        boundary: of the machine.
        tolerance: of ``auto``.
        seed: of the noise and the subsets.
        with_torch: also time the torch backend, which is exact.
        with_baselines: also time the baselines.
        memory: bytes that the flat FAISS index may take.
        progress: told what is being computed, and what is left out and why.
    """
    machine = ScoreMachine(db, "ELS", boundary)
    plain = ScoreMachine(db, "ELS", boundary, backend="torch") if with_torch else None
    baselines = _Baselines(db, boundary, memory, progress) if with_baselines else None
    generator = torch.Generator().manual_seed(seed % _SEEDS)
    for beta, patch_size in noise:
        alpha, sigma = (1 - beta) ** 0.5, beta**0.5
        x = alpha * clean + sigma * torch.randn(clean.shape, generator=generator, device="cpu")
        arguments = {"alpha": alpha, "sigma": sigma, "patch_size": patch_size, "entropy": False}
        methods: list[tuple[str, dict[str, Any]]] = [("exact", {})]
        for size in _SUBSETS:
            if size < len(db):
                methods.append((f"subset {size}", {"mode": "subset", "subset": size}))
        if db.has_index(patch_size) and alpha > 0:
            for k in _HEADS:
                methods.append((f"topk {k}", {"mode": "topk", "k": k}))
            methods.append(("topk+subset 256 1024", {"mode": "topk+subset"}))
            for share in _SHARES if machine.has_lists(patch_size, alpha, sigma) else ():
                methods.append((f"lists {share:g}", {"mode": "lists", "share": share}))
        methods.append((f"auto {tolerance:g}", {"mode": "auto", "tolerance": tolerance}))
        exact: _Answers | None = None
        for name, options in methods:
            progress(f"beta {beta}, P {patch_size}: {name}")
            given = _ask(
                machine, x, {**arguments, **options, **({"seed": seed} if options else {})}
            )
            exact = exact or given
            recall = None
            if options.get("mode") == "topk":
                recall = _recall(machine, x, arguments, options["k"])
            yield _compared(beta, patch_size, name, given, exact, recall)
        if plain is not None and exact is not None:
            progress(f"beta {beta}, P {patch_size}: torch backend")
            given = _ask(plain, x, arguments)
            yield _compared(beta, patch_size, "torch backend", given, exact, None)
        if baselines is not None and exact is not None:
            yield from baselines.compared(x.to(machine.device), beta, patch_size, exact)


def compare_samples(
    db: PatchDatabase,
    patch_sizes: str | int | Sequence[int],
    *,
    n: int,
    steps: int = 20,
    boundary: Boundary = "zeros",
    tolerance: float = 0.01,
    seed: int = 0,
) -> SampleComparison:
    """Whole samples to a tolerance, and exact ones from the same seeds and from moved noise.

    Args:
        db: the training images.
        patch_sizes: see :func:`~els.engine.sample`.
        n: how many samples.
        steps: of the sampler.
        boundary: of the machine.
        tolerance: of every step.
        seed: of the run.
    """
    machine = ScoreMachine(db, "ELS", boundary)

    def drawn(of: Denoiser, tolerance: float | None = None) -> tuple[Tensor, float]:
        before = time.perf_counter()
        images = sample(
            of,
            n=n,
            steps=steps,
            patch_sizes=patch_sizes,
            seed=seed,
            tolerance=tolerance,
            progress=False,
        )
        return images, (time.perf_counter() - before) / n

    exact, exact_seconds = drawn(machine)
    _, first_seconds = drawn(machine, tolerance)
    near, seconds = drawn(machine, tolerance)
    moved, _ = drawn(_Moved(machine, 1e-3, seed))
    error = (near - exact).square().mean((1, 2, 3))
    return SampleComparison(
        tolerance,
        seconds,
        first_seconds,
        exact_seconds / seconds,
        _r_squared(near, exact),
        float((10 * (4 / error.clamp(min=1e-20)).log10()).median()),
        _r_squared(moved, exact),
    )


def write_comparison(
    folder: Path,
    db: PatchDatabase,
    rows: Sequence[Comparison],
    samples: SampleComparison | None,
) -> None:
    """``bench.json`` and ``pareto.png``, error against time, in a folder that is made.

    A picture that cannot be made is left out with a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "bench.json",
        {
            "database": {"images": len(db), "shape": db.shape, "content_hash": db.content_hash},
            "machine": {"processor": platform.processor(), "torch": torch.__version__},
            "posteriors": [asdict(row) for row in rows],
            "samples": None if samples is None else asdict(samples),
        },
    )
    with optional_picture(folder / "pareto.png"):
        write_figure(lambda: _drawn(rows), folder / "pareto.png", dpi=120)


def _drawn(rows: Sequence[Comparison]) -> Figure:
    """Error against time, a panel for every noise level."""
    from matplotlib.figure import Figure

    noise = list(dict.fromkeys((row.beta, row.patch_size) for row in rows))
    kinds = list(dict.fromkeys(_kind(row.method) for row in rows if row.method != "exact"))
    figure = Figure(figsize=(4 * len(noise), 4.4), layout="constrained")
    panels = figure.subplots(1, len(noise), squeeze=False)[0]
    for axes, level in zip(panels, noise, strict=True):
        here = [row for row in rows if (row.beta, row.patch_size) == level]
        for row in here:
            if row.method == "exact":
                axes.axvline(row.seconds, color="0.5", linestyle=":", label="exact")
                continue
            kind = _kind(row.method)
            place = (row.seconds, max(row.mean_error, _LEAST_SHOWN))
            marker, colour = _MARKERS[kinds.index(kind) % len(_MARKERS)], f"C{kinds.index(kind)}"
            axes.plot(*place, marker, color=colour, label=kind)
            size = row.method.removeprefix(kind).strip()
            axes.annotate(size, place, (4, 4), textcoords="offset points", fontsize=7)
        front = _front([row for row in here if row.method != "exact"])
        times, errors = [time for time, _ in front], [error for _, error in front]
        axes.step(times, errors, where="post", color="0.8", zorder=0)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="seconds per image-step",
            title=f"beta {level[0]:g}, P {level[1]}",
        )
    panels[0].set_ylabel("mean absolute error of the mean")
    labelled = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=6)
    return figure


def _kind(method: str) -> str:
    """A method without its sizes."""
    return re.split(r",? \d", method)[0]


def _front(rows: Sequence[Comparison]) -> list[tuple[float, float]]:
    """Seconds and errors of the rows that no other beats in both, fastest first."""
    front: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row.seconds, row.mean_error)):
        error = max(row.mean_error, _LEAST_SHOWN)
        if not front or error < front[-1][1]:
            front.append((row.seconds, error))
    return front


@dataclass(frozen=True)
class _Answers:
    """The posteriors of all queries: means, errors and shares, and how long one took."""

    mean: Tensor
    claimed: float | None
    omitted: float | None
    seconds: float
    spread: float


def _ask(machine: ScoreMachine, x: Tensor, arguments: dict[str, Any]) -> _Answers:
    times, means, claims, omitted = [], [], [], []
    for image in torch.split(x.to(machine.device), 1):
        part, taken = _timed(partial(machine.posterior, image, **arguments))
        means.append(part.mean.cpu())
        times.append(taken)
        assert part.expected_error is not None
        claims.append(float(part.expected_error.mean()))
        omitted.append(float(part.omitted_mass.mean()))
    return _Answers(
        torch.cat(means), float(np.mean(claims)), float(np.mean(omitted)), *_typical(times)
    )


def _timed(compute: Callable[[], _T]) -> tuple[_T, list[float]]:
    """A result, and the seconds of each time that it was computed."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < _REPEATS and sum(times) < _LONG):
        before = time.perf_counter()
        result = compute()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return result, times


def _typical(times: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Seconds and spread of a row, from those of each query."""
    medians = [float(np.median(each)) for each in times]
    spreads = [float(np.ptp(each)) / median for each, median in zip(times, medians, strict=True)]
    return float(np.median(medians)), float(np.median(spreads))


def busy_before() -> str | None:
    """A warning where other work ran on this machine in the last minute; None where none did.

    Call it before anything is computed: a load average counts this process, too.
    """
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    load = os.getloadavg()[0]
    if load <= _BUSY_LOAD:
        return None
    return (
        f"the machine was busy before this began: load average {load:.1f} of the last minute on "
        f"{os.cpu_count()} processors; times may be too long"
    )


@final
class _Baselines:
    """The baselines on a database; the FAISS index of a patch size is kept for the next level.

    Args:
        db: the training images.
        boundary: of the machine.
        memory: bytes that the FAISS index may take.
        progress: told what is being computed.
    """

    def __init__(
        self, db: PatchDatabase, boundary: Boundary, memory: int, progress: Callable[[str], None]
    ) -> None:
        self._db, self._boundary = db, boundary
        self._memory, self._progress = memory, progress
        self._flat: tuple[int, FlatNearest] | None = None

    def compared(
        self, x: Tensor, beta: float, patch_size: int, exact: _Answers
    ) -> Iterator[Comparison]:
        """Rows of both at one noise level."""
        alpha, sigma = (1 - beta) ** 0.5, beta**0.5
        level = f"beta {beta}, P {patch_size}"
        count = len(self._db)
        in_time = max(1, _MOST_PAIRS // pairs(self._db.shape, patch_size, self._boundary))
        why = f"more than {_MOST_PAIRS:,} pairs a query"
        images = self._db.images[:in_time]
        self._progress(f"{level}: chunked torch")
        given = self._ask(
            lambda queries: chunked_torch(
                images, queries, alpha=alpha, sigma=sigma, patch_size=patch_size
            ),
            x,
            patch_size,
            exact,
        )
        yield self._row(beta, patch_size, "chunked torch", given, exact, len(images), why)
        name = f"FAISS flat {_NEAREST}"
        if importlib.util.find_spec("faiss") is None:
            self._progress(f"{level}: no {name}: it needs pip install 'els-machine[cpu]'")
            return
        if alpha == 0:
            self._progress(f"{level}: no {name}: without a signal every patch is as near")
            return
        in_memory = FlatNearest.most_images(self._db.shape, patch_size, self._memory)
        if in_memory == 0:
            self._progress(f"{level}: no {name}: one image exceeds {self._memory:,} bytes")
            return
        self._progress(f"{level}: {name}")
        kept = min(in_time, in_memory, count)
        if self._flat is None or self._flat[0] != patch_size:
            self._flat = None  # two would not fit
            self._flat = (patch_size, FlatNearest(self._db.images[:kept], patch_size))
        flat = self._flat[1]
        given = self._ask(
            lambda queries: flat.means(queries, alpha=alpha, sigma=sigma, k=_NEAREST),
            x,
            patch_size,
            exact,
        )
        if in_memory < in_time:
            why = f"more than {self._memory:,} bytes of patches"
        yield self._row(beta, patch_size, name, given, exact, kept, why)

    def _ask(
        self, means: Callable[[Tensor], Tensor], x: Tensor, patch_size: int, exact: _Answers
    ) -> _Answers:
        """The exact means with those by hand in their place, where there are any."""
        times, whole = [], exact.mean.clone()
        rows, columns = answered(self._db.shape, patch_size, self._boundary)
        for number, image in enumerate(torch.split(x, 1)):
            patches = query_patches(image, patch_size, self._boundary)
            found, taken = _timed(partial(means, patches))
            found = found.cpu()
            times.append(taken)
            place = whole[number, :, rows, columns]
            place.copy_(found.T.reshape(place.shape))
        return _Answers(whole, None, None, *_typical(times))

    def _row(
        self,
        beta: float,
        patch_size: int,
        method: str,
        given: _Answers,
        exact: _Answers,
        images: int,
        why: str,
    ) -> Comparison:
        row = _compared(beta, patch_size, method, given, exact, None)
        if images == len(self._db):
            return row
        note = f"the first {images:,} of {len(self._db):,} images only: all are {why}"
        return replace(row, method=f"{method}, {images:,} images", speed_up=None, note=note)


def _recall(machine: ScoreMachine, x: Tensor, arguments: dict[str, Any], k: int) -> float:
    found = [
        machine.recall(
            image,
            alpha=arguments["alpha"],
            sigma=arguments["sigma"],
            patch_size=arguments["patch_size"],
            k=k,
        )
        for image in torch.split(x.to(machine.device), 1)
    ]
    return float(np.mean(found))


def _compared(
    beta: float,
    patch_size: int,
    method: str,
    given: _Answers,
    exact: _Answers,
    recall: float | None,
) -> Comparison:
    error = (given.mean - exact.mean).abs()
    return Comparison(
        beta,
        patch_size,
        method,
        given.seconds,
        given.spread,
        exact.seconds / given.seconds,
        float(error.mean()),
        float(error.max()),
        given.claimed,
        given.omitted,
        recall,
    )


def _r_squared(first: Tensor, second: Tensor) -> float:
    """Squared Pearson correlation over pixels, the median over images."""
    return float(
        np.median(
            [
                np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1] ** 2
                for a, b in zip(first, second, strict=True)
            ]
        )
    )


@final
class _Moved:
    """A denoiser whose first query is moved a little.

    Args:
        machine: that answers.
        size: standard deviation of the move.
        seed: of the move.
    """

    def __init__(self, machine: ScoreMachine, size: float, seed: int) -> None:
        self.db, self.kind, self.is_local = machine.db, machine.kind, machine.is_local
        self.device = machine.device
        self._machine, self._size = machine, size
        self._generator = torch.Generator().manual_seed(seed % _SEEDS)
        self._is_first = True

    def posterior(self, x: Tensor, **arguments: Any) -> LocalPosterior:
        """The machine's answer to a query that was moved, if it is the first."""
        if self._is_first:
            move = self._size * torch.randn(x.shape, generator=self._generator, device="cpu")
            x, self._is_first = x + move.to(x.device), False
        return self._machine.posterior(x, **arguments)
