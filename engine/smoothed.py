"""A machine's answers averaged over small moves of the query (arXiv 2310.12395)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from els.engine.machines import ScoreMachine, noise_of, score_of
from els.engine.result import LocalPosterior, joint_claims


@final
class SmoothedDenoiser:
    """The mean of a machine's answers at ``x + std * noise``, over some noises.

    The noises are the same for every query and every image of a batch, so that results depend on
    neither. Everything else is the machine's.

    Args:
        machine: that answers.
        std: standard deviation of the noise that is added to x, > 0.
        copies: how many noises, >= 1.
        seed: of the noises, >= 0.

    Raises:
        TypeError: if ``machine`` is not a :class:`~els.engine.ScoreMachine`.
        ValueError: for a value out of range.
    """

    def __init__(
        self, machine: ScoreMachine, *, std: float, copies: int = 10, seed: int = 0
    ) -> None:
        if not isinstance(machine, ScoreMachine):
            raise TypeError(f"machine must be a ScoreMachine, got {type(machine).__name__}")
        if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < math.inf:
            raise ValueError(f"std={std!r} must be a finite number above 0, such as 0.1")
        for name, value, least in (("copies", copies, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        self.machine = machine
        self.std = float(std)
        self.copies = copies
        self.seed = seed

    def __getattr__(self, name: str) -> Any:
        # Copies and pickles ask before there is a machine.
        if name.startswith("_") or name == "machine":
            raise AttributeError(name)
        return getattr(self.machine, name)

    def __repr__(self) -> str:
        return f"SmoothedDenoiser({self.machine!r}, std={self.std:g}, copies={self.copies})"

    def posterior(self, x: Tensor, **arguments: Any) -> LocalPosterior:
        """The mean of the machine's posteriors; arguments and errors are the machine's.

        Log evidence, effective patches and errors are means, too; there are no heaviest patches.

        Raises:
            ValueError: also if ``top`` is asked for.
        """
        if arguments.get("top"):
            raise ValueError(
                f"top={arguments['top']} was asked for, but a smoothed posterior has no heaviest "
                "patches: ask its machine"
            )
        answers = [self._moved(x, copy, arguments) for copy in range(self.copies)]

        def averaged(name: str) -> Any:
            values = [getattr(answer, name) for answer in answers]
            return None if values[0] is None else torch.stack(values).mean(0)

        names = ("mean", "log_evidence", "effective_patches", "omitted_mass", "mean_error")
        of_images = [[(answer, b) for answer in answers] for b in range(len(x))]
        query = answers[0].query
        return replace(
            answers[0],
            query=None if query is None else replace(query, x=x.detach()),
            **{name: averaged(name) for name in (*names, "expected_error")},
            **joint_claims(of_images),
        )

    def epsilon(self, x: Tensor, **arguments: Any) -> Tensor:
        """The noise ``(x - alpha * mean) / sigma``, as of :meth:`ScoreMachine.epsilon`."""
        return noise_of(self.posterior, x, **arguments).to(x.dtype)

    def score(self, x: Tensor, **arguments: Any) -> Tensor:
        """The score ``(alpha * mean - x) / sigma^2``, as of :meth:`ScoreMachine.score`."""
        return score_of(self.posterior, x, **arguments)

    def divergence(self, *_: Any, **__: Any) -> Tensor:
        """Not computed.

        Raises:
            ValueError: always.
        """
        raise ValueError("a smoothed denoiser has no divergence here: use its machine's")

    def explain(self, *_: Any, **__: Any) -> Any:
        """Not drawn.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a smoothed posterior is a mean over moved images, which has no heaviest patches: "
            "explain its machine's"
        )

    def _moved(self, x: Tensor, copy: int, arguments: dict[str, Any]) -> LocalPosterior:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
            return self.machine.posterior(x, **arguments)  # says what is wrong
        stream = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(copy,)))
        noise = torch.from_numpy(stream.standard_normal(tuple(x.shape[1:])))
        return self.machine.posterior(x + self.std * noise.to(x.device, x.dtype), **arguments)


Machine: TypeAlias = ScoreMachine | SmoothedDenoiser
"""What draws samples."""
