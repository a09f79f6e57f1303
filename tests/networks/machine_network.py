"""A network whose right answers are known: a score machine in disguise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from els.engine import ScoreMachine
from els.engine.schedule import Cosine


class MachineNetwork(torch.nn.Module):
    """A score machine that answers as a network does, ``(t, x, label) -> epsilon``.

    Args:
        machine: on the CPU.
        sizes: its patch size at t = 1 / steps, 2 / steps, ..., 1.
    """

    def __init__(self, machine: ScoreMachine, sizes: Sequence[int]) -> None:
        super().__init__()
        self.machine, self.sizes = machine, sizes

    def forward(self, t: Tensor, x: Tensor, label: Tensor | None = None) -> Tensor:
        time = float(t[0])
        return self.machine.epsilon(
            x,
            alpha=Cosine().alpha(time),
            sigma=Cosine().sigma(time),
            patch_size=self.sizes[round(time * len(self.sizes)) - 1],
            labels=label,
        )
