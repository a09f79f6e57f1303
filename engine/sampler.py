"""The sampler: DDIM (arXiv 2010.02502) over a score machine, reproducible sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from els.engine.devices import physical_memory
from els.engine.patch_sizes import PATCH_SIZES, patch_sizes_for
from els.engine.progress import Progress, shown
from els.engine.result import Claim, LocalPosterior, require_tolerance
from els.engine.schedule import Cosine, Schedule, schedule_named
from els.engine.watching import Tell, watched
from els.index import PatchDatabase

# Least memory for a value of a sample, in bytes: float64 of noise, noisy image, mean and next one.
_VALUE_BYTES = 32

DEFAULT_BATCH = 16
# Largest count of samples, steps and the like.
LARGEST_COUNT = 2**31 - 1


class Denoised(Protocol):
    """The part of a posterior that the sampler reads."""

    @property
    def mean(self) -> Tensor:
        """Posterior mean of the clean images, ``[B, C, H, W]``."""


class Denoiser(Protocol):
    """The part of a machine that the sampler uses; :class:`~els.engine.ScoreMachine` has it."""

    @property
    def db(self) -> PatchDatabase:
        """The training images."""

    @property
    def kind(self) -> str:
        """Which machine, for messages."""

    @property
    def is_local(self) -> bool:
        """Whether a patch size is needed."""

    @property
    def device(self) -> torch.device:
        """Where queries must live."""

    def posterior(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | Tensor | None = None,
        entropy: bool = True,
    ) -> Denoised:
        """See :meth:`els.engine.ScoreMachine.posterior`."""


@dataclass(frozen=True, repr=False)
class StepState:
    """One sampling step of one batch; B images, pixels in [-1, 1] where clean.

    Attributes:
        step: counts down from ``steps`` (pure noise) to 1.
        t: ``step / steps``.
        alpha: signal scale of ``x_t``.
        sigma: standard deviation of the noise in ``x_t``.
        patch_size: of the step; None for IS and ES.
        indices: sample numbers of the batch, length B.
        x_t: noisy images that the step started from, float64 on the CPU, ``[B, C, H, W]``.
        predicted: posterior mean of the clean images, float64 on the CPU, ``[B, C, H, W]``.
        x_next: noisy images that the step ended with; at step 1 the final images.
        claims: what the posterior of each image says of itself; empty where it is exact by request.
    """

    step: int
    t: float
    alpha: float
    sigma: float
    patch_size: int | None
    indices: tuple[int, ...]
    x_t: Tensor
    predicted: Tensor
    x_next: Tensor
    claims: tuple[Claim, ...] = ()

    def __repr__(self) -> str:
        batch, *image = self.x_t.shape
        size = "" if self.patch_size is None else f", P={self.patch_size}"
        return (
            f"StepState(step {self.step}, t={self.t:.3g}, alpha={self.alpha:.3g}, "
            f"sigma={self.sigma:.3g}{size}, {batch} images {'x'.join(map(str, image))})"
        )


@dataclass(frozen=True)
class SamplePlan:
    """Checked arguments of :func:`sample`; see there.

    Attributes:
        steps: number of steps.
        patch_sizes: one per step, lowest noise first; None for IS and ES.
        seed: of the run.
        schedule: noise over time.
        eta: 0 deterministic to 1 ancestral.
        tolerance: of every posterior mean; None for exact ones.
        canvas: height and width of the samples; None for those of the training images.
    """

    steps: int
    patch_sizes: tuple[int, ...] | None
    seed: int
    schedule: Schedule
    eta: float
    tolerance: float | None = None
    canvas: tuple[int, int] | None = None

    def shape(self, db: PatchDatabase) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return db.shape if self.canvas is None else (db.shape[0], *self.canvas)


def plan_sampling(
    machine: Denoiser,
    *,
    steps: int,
    patch_sizes: str | int | Sequence[int] | None,
    seed: int,
    schedule: Schedule | str,
    eta: float,
    tolerance: float | None = None,
    canvas: Sequence[int] | None = None,
) -> SamplePlan:
    """Check the arguments of :func:`sample` against the machine, before any work.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a value out of range; the message says what is allowed.
    """
    require_count("steps", steps, 1)
    require_count("seed", seed, 0, most=None)
    if isinstance(schedule, str):
        schedule = schedule_named(schedule)
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a Schedule such as Cosine(), or its name, got "
            f"{type(schedule).__name__}"
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta!r} must be from 0 (DDIM) to 1 (ancestral)")
    if tolerance is not None:
        require_tolerance(tolerance)
    sizes = sizes_for_machine(machine, patch_sizes, steps)
    checked = None if canvas is None else _canvas(machine, canvas, sizes)
    return SamplePlan(int(steps), sizes, int(seed), schedule, float(eta), tolerance, checked)


def initial_noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """The standard normal noise that sample ``index`` of a run starts from, float64."""
    return _noise(seed, index, 0, shape)


def sample(
    machine: Denoiser,
    n: int = 16,
    steps: int = 20,
    patch_sizes: str | int | Sequence[int] | None = None,
    seed: int = 0,
    schedule: Schedule | str = Cosine(),  # noqa: B008 - frozen, one instance can serve every call
    eta: float = 0.0,
    labels: int | str | Sequence[int | str] | Tensor | None = None,
    callback: Callable[[StepState], None] | None = None,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    tolerance: float | None = None,
    canvas: Sequence[int] | None = None,
    progress: bool | Progress | None = None,
) -> Tensor:
    """Draw images from a score machine by DDIM, without training.

    Sample i depends on the seed and on i alone: not on n, the batch size, the order or
    interruptions, to the last bit where the backend's results do not depend on the batch.

    Args:
        machine: a :class:`~els.engine.ScoreMachine`.
        n: how many images: samples 0 to n - 1.
        steps: number of steps; step i = steps..1 goes from t = i / steps to (i - 1) / steps.
        patch_sizes: needed by LS and ELS: a calibrated table's name such as
            ``"fashion-mnist-resnet"``, one odd size for all steps, or one per step, **lowest noise
            first** (see :func:`~els.engine.patch_sizes.patch_sizes_for`).
        seed: of the run, >= 0.
        schedule: noise over time, or its name: ``"cosine"``, ``"linear"``, ``"exponential"``.
        eta: 0 (deterministic DDIM) to 1 (ancestral sampling).
        labels: draw only on training images of this class, its number or its name: one for all, or
            one per sample.
        callback: receives a :class:`StepState` after every step of every batch.
        batch_size: how many images are computed at once; None for at most 16.
        indices: the sample numbers to draw, instead of 0 to n - 1.
        tolerance: let every step be approximated to this mean absolute error of the posterior mean
            (``mode="auto"`` of :meth:`~els.engine.ScoreMachine.posterior`), from subsets of the
            images that are drawn anew for every step and sample; None for exact steps.
        canvas: height and width of the samples, which may differ from the training images' (ELS);
            patches are at most as large as the shortest of all sides.
        progress: True for a bar on standard error; a function, which is called with the
            image-steps done and in all after every step; False for neither; None for a bar in
            notebooks and in an interactive Python on a terminal alone. The bar moves within a step.

    Returns:
        Images in [-1, 1], float32 on the CPU, ``[n, C, H, W]``.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a value out of range. Both are raised before any work.
        RuntimeError: for ``progress=True`` without rich.
    """
    plan = plan_sampling(
        machine,
        steps=steps,
        patch_sizes=patch_sizes,
        seed=seed,
        schedule=schedule,
        eta=eta,
        tolerance=tolerance,
        canvas=canvas,
    )
    chosen = _indices(n, indices)
    labels_of = _labels(machine, labels, len(chosen))
    size = DEFAULT_BATCH if batch_size is None else batch_size
    require_count("batch_size", size, 1)
    images = torch.empty(len(chosen), *plan.shape(machine.db), dtype=torch.float32, device="cpu")
    total = len(chosen) * plan.steps
    done = 0
    with shown(progress, total) as tell:

        def step_done(state: StepState) -> None:
            nonlocal done
            done += len(state.indices)
            tell(done, total)
            if callback is not None:
                callback(state)

        def under_way(count: int, share: float) -> None:
            tell(done + share * count, total)

        for start in range(0, len(chosen), size):
            rows = slice(start, start + size)
            label = None if labels_of is None else labels_of[rows]
            few = chosen[rows]
            part = partial(under_way, len(few))
            images[rows] = _drawn(machine, plan, few, label, step_done, under_way=part)
    return images


@dataclass(frozen=True)
class Resumption:
    """Where an interrupted batch resumes.

    Attributes:
        step: the next one to compute, 1 to ``steps``.
        x_t: noisy images that it starts from, float64 on the CPU, ``[B, C, H, W]``.
    """

    step: int
    x_t: Tensor


def sample_plan(
    machine: Denoiser,
    plan: SamplePlan,
    indices: Sequence[int],
    *,
    label: int | None = None,
    callback: Callable[[StepState], None] | None = None,
    resumption: Resumption | None = None,
    under_way: Tell | None = None,
) -> Tensor:
    """Draw some samples of a plan at once; arguments, result and errors are those of `sample`.

    Args:
        machine: see there; so are those that are not listed.
        plan: what to draw.
        indices: see there.
        label: of all samples.
        callback: see there.
        resumption: where to resume; None to start from the samples' noise.
        under_way: called now and then within a long step, with the share of it that is done.
    """
    labels = _labels(machine, label, len(indices))
    return _drawn(machine, plan, tuple(indices), labels, callback, resumption, under_way)


def _drawn(
    machine: Denoiser,
    plan: SamplePlan,
    indices: tuple[int, ...],
    labels: Tensor | None,
    callback: Callable[[StepState], None] | None,
    resumption: Resumption | None = None,
    under_way: Tell | None = None,
) -> Tensor:
    """One batch, float32 on the CPU."""
    if resumption is None:
        noise = [initial_noise(plan.seed, index, plan.shape(machine.db)) for index in indices]
        resumption = Resumption(plan.steps, torch.stack(noise))
    for state in _ddim(machine, plan, indices, labels, resumption, under_way):
        if callback is not None:
            callback(state)
    return state.x_next.float()


def _ddim(
    machine: Denoiser,
    plan: SamplePlan,
    indices: tuple[int, ...],
    labels: Tensor | None,
    resumption: Resumption,
    under_way: Tell | None,
) -> Iterator[StepState]:
    """DDIM for one batch (arXiv 2010.02502, equations 12 and 16), the trajectory in float64."""
    shape = plan.shape(machine.db)
    # Any denoiser computes exact steps; only a score machine is asked for approximate ones.
    posterior: Callable[..., Denoised] = machine.posterior
    x = resumption.x_t
    for step in range(resumption.step, 0, -1):
        alpha, sigma = _scales(plan, step)
        alpha_next, sigma_next = _scales(plan, step - 1)
        size = None if plan.patch_sizes is None else plan.patch_sizes[step - 1]
        query = x.to(machine.device, torch.float32)
        with nullcontext() if under_way is None else watched(under_way):
            answer = posterior(
                query,
                alpha=alpha,
                sigma=sigma,
                patch_size=size,
                labels=labels,
                entropy=False,
                **_approximation(plan, indices, step),
            )
        clean = answer.mean.to("cpu", torch.float64)
        claims = answer.claims if isinstance(answer, LocalPosterior) and plan.tolerance else ()
        eps = (x - alpha * clean) / sigma
        # Between two levels of pure noise (alpha = 0) the signal is 0 before and after.
        kept = alpha / alpha_next if alpha_next > 0 else 1.0
        fresh = plan.eta * sigma_next / sigma * _root(1 - kept**2)
        direction = _root(sigma_next**2 - fresh**2)
        x_next = alpha_next * clean + direction * eps
        if fresh > 0:
            noise = [_noise(plan.seed, index, step, shape) for index in indices]
            x_next += fresh * torch.stack(noise)
        yield StepState(
            step, step / plan.steps, alpha, sigma, size, indices, x, clean, x_next, claims
        )
        x = x_next


def _approximation(plan: SamplePlan, indices: tuple[int, ...], step: int) -> dict[str, object]:
    """Arguments of an approximate posterior, with a seed of its own for each sample and step."""
    if plan.tolerance is None:
        return {}
    seeds = [
        int(np.random.SeedSequence([plan.seed, index, step]).generate_state(1, np.uint64)[0])
        for index in indices
    ]
    return {"mode": "auto", "tolerance": plan.tolerance, "seed": seeds}


def _scales(plan: SamplePlan, step: int) -> tuple[float, float]:
    """Alpha and sigma at t = step / steps; the end is clean, whatever the schedule leaves there."""
    if step == 0:
        return 1.0, 0.0
    t = step / plan.steps
    return plan.schedule.alpha(t), plan.schedule.sigma(t)


def _root(square: float) -> float:
    """The square root of a number that is >= 0 but for rounding."""
    return math.sqrt(max(0.0, square))


def _noise(seed: int, index: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Random stream of (seed, index, step): step 0 starts a trajectory, others are eta's noise."""
    stream = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index, step)))
    return torch.from_numpy(np.random.Generator(stream).standard_normal(shape))


def sizes_for_machine(
    machine: Denoiser, patch_sizes: str | int | Sequence[int] | None, steps: int
) -> tuple[int, ...] | None:
    """One patch size per step for this machine, lowest noise first; None if it needs none.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: if sizes are needed and missing, or as :func:`patch_sizes_for` says, or too
            large for the images.
    """
    if not machine.is_local:
        return None
    if patch_sizes is None:
        raise ValueError(
            f"{machine.kind} compares patches: give patch_sizes, one odd size, one per step "
            f"(lowest noise first), or the name of a default: {', '.join(PATCH_SIZES)}"
        )
    sizes = patch_sizes_for(patch_sizes, steps)
    side = min(machine.db.shape[1:])
    if max(sizes) > side:
        raise ValueError(
            f"patch_sizes={patch_sizes!r} goes up to {max(sizes)}, but the images' shorter side "
            f"is {side}; give sizes of at most {side}"
        )
    return sizes


def _canvas(
    machine: Denoiser, canvas: Sequence[int], sizes: tuple[int, ...] | None
) -> tuple[int, int] | None:
    """The canvas, if the machine can fill it; None for that of the training images."""
    if isinstance(canvas, str) or not isinstance(canvas, Sequence) or len(canvas) != 2:
        raise TypeError(f"canvas={canvas!r} must be a height and a width, such as (48, 96)")
    for side in canvas:
        require_count("canvas", side, 1)
    height, width = map(int, canvas)
    if (height, width) == machine.db.shape[1:]:
        return None
    if not getattr(machine, "takes_canvas", False):
        raise ValueError(
            f"canvas=({height}, {width}) is not the training images' size "
            f"{machine.db.shape[1:]}, which {machine.kind} needs; other sizes are for ELS"
        )
    if sizes is not None and max(sizes) > min(height, width):
        raise ValueError(
            f"patch sizes go up to {max(sizes)}, but the canvas's shorter side is "
            f"{min(height, width)}; give sizes of at most that"
        )
    needed, there = _VALUE_BYTES * machine.db.shape[0] * height * width, physical_memory()
    if there is not None and needed > there:
        raise ValueError(
            f"canvas=({height}, {width}) needs {needed / 1e9:,.0f} GB and more for each sample, "
            f"this machine has {there / 1e9:,.0f}; give a smaller one"
        )
    return height, width


def _indices(n: int, indices: Sequence[int] | None) -> tuple[int, ...]:
    if indices is None:
        require_count("n", n, 1)
        return tuple(range(n))
    if len(indices) == 0:
        raise ValueError("indices is empty; give at least one sample number, or None and n")
    for index in indices:
        require_count("indices", index, 0)
    return tuple(int(index) for index in indices)


def _labels(
    machine: Denoiser, labels: int | str | Sequence[int | str] | Tensor | None, count: int
) -> Tensor | None:
    """One label per sample, int64 ``[count]``, each known to have training images."""
    if labels is None:
        return None
    tensor = torch.as_tensor(machine.db.class_numbers(labels), device="cpu")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {tensor.dtype}")
    if tensor.ndim > 1 or (tensor.ndim == 1 and len(tensor) != count):
        raise ValueError(
            f"labels have shape {tuple(tensor.shape)}; give one int, or one per sample, [{count}]"
        )
    for label in sorted(set(tensor.flatten().tolist())):
        machine.db.class_members(label)
    return tensor.to(torch.int64).expand(count)


def require_count(
    argument: str, value: object, least: int, most: int | None = LARGEST_COUNT
) -> None:
    """Refuse what is not an integer from ``least`` to ``most``; None for any number above."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{argument}={value} must be at least {least}")
    if most is not None and int(value) > most:
        raise ValueError(f"{argument}={value} must be at most {most}")
