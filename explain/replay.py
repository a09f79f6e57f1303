"""Replay of a sample: its posteriors, computed again step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.approximate.methods import MAX_TOP
from els.engine.machines import ScoreMachine
from els.engine.result import LocalPosterior
from els.engine.sampler import SamplePlan, StepState, sample_plan
from els.explain.explanation import Explanation, Walkthrough
from els.index import PatchDatabase
from els.runs.export import database_of
from els.runs.folder import RunFolder, read_settings
from els.runs.settings import RunSettings
from els.runs.stores import RunError

DEFAULT_TOP = 16
DEFAULT_WALK_TOP = 6
MOST_ENTRIES = 500_000
"""Most patches that a walkthrough keeps: steps times pixels times patches per pixel."""

# Largest difference of a replayed sample, one grey level: rounding differs between processors by
# far less, samples from other noise by far more.
_SAME_SAMPLE = 1 / 127.5


def explain_sample(
    machine: ScoreMachine,
    plan: SamplePlan,
    index: int,
    *,
    label: int | None = None,
    step: int | None = None,
    top: int = DEFAULT_TOP,
    progress: Callable[[StepState], None] | None = None,
) -> Explanation:
    """Draw one sample again and keep the posterior of every step.

    Args:
        machine: that drew it.
        plan: how it was drawn.
        index: its number.
        label: the class that was drawn on.
        step: to look at closely, 1 (the noise) to ``plan.steps``; None for the last, the cleanest.
        top: how many of the heaviest patches to keep per pixel at that step; 1 at the others.
        progress: called after every step.

    Raises:
        ValueError: for a step or top out of range.
    """
    step = plan.steps if step is None else step
    _require_step(step, plan)
    if not 1 <= top <= MAX_TOP:
        raise ValueError(f"top={top} is out of range 1 to {MAX_TOP}")
    tops = [top if row == step - 1 else 1 for row in range(plan.steps)]
    values, states, answers = _drawn_again(machine, plan, index, tops, label, progress)
    close = answers[step - 1]
    addresses = close.addresses.numpy()
    there = addresses >= 0
    sources, _, _ = machine.db.locate(np.where(there, addresses, 0))
    heaviest = torch.stack([answer.addresses[..., 0] for answer in answers]).numpy()
    return Explanation(
        index=index,
        kind=machine.kind,
        values=values,
        step=step,
        sigma=np.array([state.sigma for state in states]),
        patch_sizes=np.array([state.patch_size or 0 for state in states], dtype=np.int64),
        effective_patches=torch.stack([answer.effective for answer in answers]).numpy(),
        heaviest=np.stack(machine.db.locate(heaviest), axis=-1),
        weights=close.weights.numpy(),
        sources=np.where(there, sources, -1),
    )


def explain_run(
    folder: str | Path,
    index: int,
    *,
    database: str | Path | None = None,
    step: int | None = None,
    top: int = DEFAULT_TOP,
    threads: int | None = None,
    progress: Callable[[StepState], None] | None = None,
) -> tuple[Explanation, PatchDatabase]:
    """Explain a finished sample of a run; see :func:`explain_sample`.

    Args:
        folder: of the run.
        index: number of the sample.
        database: where the run's database is now, if it was moved.
        step: as in :func:`explain_sample`; so is what is not listed here.
        top: see there.
        threads: of the native backend.
        progress: see there.

    Returns:
        The explanation, and the database that its image numbers refer to.

    Raises:
        RunError: if the sample is not there, the database is another one, or the sample cannot be
            reproduced here.
        DatabaseError: (a ValueError) if the database is not there any more.
        ValueError: for an argument out of range.
        RuntimeError: if the run's backend cannot run here.
    """
    machine, settings, stored = _reopened(folder, index, database, threads)
    explanation = explain_sample(
        machine,
        settings.plan,
        index,
        label=settings.label,
        step=step,
        top=top,
        progress=progress,
    )
    _require_same(folder, index, explanation.values, stored)
    return explanation, machine.db


def walk_sample(
    machine: ScoreMachine,
    plan: SamplePlan,
    index: int,
    *,
    label: int | None = None,
    step: int | None = None,
    top: int = DEFAULT_WALK_TOP,
    progress: Callable[[StepState], None] | None = None,
) -> Walkthrough:
    """Draw one sample again and keep the k heaviest patches of every pixel at every step.

    Where that is more than ``MOST_ENTRIES``, so many steps are kept as are not, evenly spread, the
    first, the last and ``step`` among them.

    Args:
        machine: that drew it.
        plan: how it was drawn.
        index: its number.
        label: the class that was drawn on.
        step: where to begin to look, 1 (the noise) to ``plan.steps``; None for the one of those
            that are kept at which the fewest patches share a pixel, by the geometric mean.
        top: how many patches to keep per pixel.
        progress: called after every step.

    Raises:
        ValueError: for a step or top out of range, or images so large that three steps are more
            than ``MOST_ENTRIES``.
    """
    if step is not None:
        _require_step(step, plan)
    _, height, width = plan.shape(machine.db)
    room = MOST_ENTRIES // (height * width)
    most = min(MAX_TOP, room // min(3, plan.steps))
    if not 1 <= top <= most:
        raise ValueError(
            f"top={top} is out of range 1 to {most} for images of {height} x {width} pixels: "
            f"at most {MOST_ENTRIES:,} patches are kept, and three steps at least"
        )
    kept = _spread(plan.steps, room // top, plan.steps - 1 if step is None else step - 1)
    tops = [top if row in kept else 1 for row in range(plan.steps)]
    values, states, answers = _drawn_again(machine, plan, index, tops, label, progress)
    states, answers = [states[row] for row in kept], [answers[row] for row in kept]
    if step is None:
        shared = [float(answer.effective.double().log().mean()) for answer in answers]
        step = kept[int(np.argmin(shared))] + 1
    return Walkthrough(
        index=index,
        kind=machine.kind,
        boundary=machine.boundary,
        values=values,
        plan_steps=plan.steps,
        tolerance=plan.tolerance,
        step=step,
        steps=np.array(kept, dtype=np.int64) + 1,
        sigma=np.array([state.sigma for state in states]),
        patch_sizes=np.array([state.patch_size or 0 for state in states], dtype=np.int64),
        noisy=torch.cat([state.x_t for state in states]).float().numpy(),
        predicted=torch.cat([state.predicted for state in states]).float().numpy(),
        effective_patches=torch.stack([answer.effective for answer in answers]).float().numpy(),
        weights=torch.stack([answer.weights for answer in answers]).float().numpy(),
        addresses=torch.stack([answer.addresses for answer in answers]).numpy(),
    )


def walk_run(
    folder: str | Path,
    index: int,
    *,
    database: str | Path | None = None,
    step: int | None = None,
    top: int = DEFAULT_WALK_TOP,
    threads: int | None = None,
    progress: Callable[[StepState], None] | None = None,
) -> tuple[Walkthrough, PatchDatabase]:
    """Walk through a finished sample of a run; see :func:`walk_sample`.

    Arguments, results and errors are those of :func:`explain_run`.
    """
    machine, settings, stored = _reopened(folder, index, database, threads)
    walkthrough = walk_sample(
        machine,
        settings.plan,
        index,
        label=settings.label,
        step=step,
        top=top,
        progress=progress,
    )
    _require_same(folder, index, walkthrough.values, stored)
    return walkthrough, machine.db


def _require_step(step: int, plan: SamplePlan) -> None:
    if not 1 <= step <= plan.steps:
        raise ValueError(
            f"step={step} is out of range 1 (the noise) to {plan.steps} (the last, the cleanest)"
        )


def _spread(count: int, most: int, wanted: int) -> list[int]:
    """At most ``most`` (>= 3) of 0 .. count - 1, evenly, the first, the last and one more."""
    if count <= most:
        return list(range(count))
    spread = np.linspace(0, count - 1, most - 1).round().astype(int)
    return sorted({*spread.tolist(), wanted})


def _reopened(
    folder: str | Path, index: int, database: str | Path | None, threads: int | None
) -> tuple[ScoreMachine, RunSettings, npt.NDArray[np.float32]]:
    """The machine of a run, its settings, and the sample that is to be explained."""
    settings = read_settings(folder)
    stored = RunFolder(Path(folder)).load(index)
    db = database_of(RunFolder(Path(folder)), database)
    if settings.smoothing is not None:
        raise RunError(
            f"{folder} was drawn by a smoothed machine, whose answers are means over "
            f"{settings.smoothing.copies} queries: they have no patches to explain"
        )
    if settings.machine == "Wiener":
        raise RunError(f"{folder} was drawn by the Wiener filter, which weighs no patches")
    machine = settings.machine_over(db, threads)
    assert isinstance(machine, ScoreMachine)
    return machine, settings, stored


def _require_same(
    folder: str | Path,
    index: int,
    values: npt.NDArray[np.float32],
    stored: npt.NDArray[np.float32],
) -> None:
    """Check that the replayed sample is the stored one."""
    difference = float(np.abs(values - stored).mean())
    if difference > _SAME_SAMPLE:
        raise RunError(
            f"sample {index} of {folder} came out differently (by {difference:.3f} on average): "
            f"compare the versions in its run.json with those here (numpy {np.__version__}, "
            f"torch {torch.__version__})"
        )


def _drawn_again(
    machine: ScoreMachine,
    plan: SamplePlan,
    index: int,
    tops: Sequence[int],
    label: int | None,
    progress: Callable[[StepState], None] | None,
) -> tuple[npt.NDArray[np.float32], list[StepState], list[_Answer]]:
    """A sample, its steps from noise to clean, and the posterior of each."""
    recorder = _Recorder(machine, tops)
    states: list[StepState] = []

    def observe(state: StepState) -> None:
        states.append(state)
        if progress is not None:
            progress(state)

    images = sample_plan(recorder, plan, [index], label=label, callback=observe)
    return images[0].numpy(), states, recorder.answers


class _Answer(NamedTuple):
    """The part of one posterior that is kept."""

    effective: Tensor
    weights: Tensor
    addresses: Tensor


@final
class _Recorder:
    """A machine that computes more of every posterior than the sampler needs, and keeps it.

    Args:
        machine: that is asked, about one image at a time.
        tops: how many of the heaviest patches to ask for, one number per question.
    """

    def __init__(self, machine: ScoreMachine, tops: Sequence[int]) -> None:
        self.db = machine.db
        self.kind = machine.kind
        self.is_local = machine.is_local
        self.takes_canvas = machine.takes_canvas
        self.device = machine.device
        self.answers: list[_Answer] = []
        self._machine = machine
        self._tops = tops

    def posterior(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | Tensor | None = None,
        entropy: bool = True,
        **approximation: Any,
    ) -> LocalPosterior:
        """The machine's answer, with entropy and heaviest patches."""
        answer = self._machine.posterior(
            x,
            alpha=alpha,
            sigma=sigma,
            patch_size=patch_size,
            labels=labels,
            entropy=True,
            top=self._tops[len(self.answers)],
            **approximation,
        )
        kept = (answer.effective_patches, answer.top_weights, answer.top_addresses)
        self.answers.append(_Answer(*(tensor[0].cpu() for tensor in kept if tensor is not None)))
        return answer
