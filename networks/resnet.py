"""The paper's ResNet: 3 x 3 convolutions with skips, and nothing else (appendix C.1)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from els.networks.architecture import (
    EpsilonNetwork,
    NetworkConfig,
    TimeEmbedding,
    TimeShift,
    convolution,
    normalization,
)


@final
class ResNet(EpsilonNetwork):
    """``layers`` convolutions: one in, ``layers - 2`` residual ones, one out.

    Its receptive field is ``2 * layers + 1`` pixels wide; with circular padding it commutes with
    cyclic shifts.

    Args:
        config: ``channels``, ``layers``, ``padding``, ``normalization`` and ``num_classes`` count.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        width, padding = config.channels, config.padding
        self.embedding = TimeEmbedding(width, config.num_classes)
        self.enter = convolution(config.shape[0], width, padding)
        inner = range(config.layers - 2)
        self.told = nn.ModuleList(TimeShift(width, width) for _ in inner)
        self.convolutions = nn.ModuleList(convolution(width, width, padding) for _ in inner)
        self.norms = nn.ModuleList(normalization(config, width) for _ in inner)
        self.last_told = TimeShift(width, width)
        self.leave = convolution(width, config.shape[0], padding)

    def output(self, t: Tensor, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`EpsilonNetwork`."""
        embedding = self.embedding(t, label)
        # An image of one channel has no order of channels for the layers to keep.
        state = self.enter(x).contiguous(memory_format=torch.channels_last)
        for shift, convolve, norm in zip(self.told, self.convolutions, self.norms, strict=True):
            state = state + norm(convolve(shift(state, embedding))).relu_()
        leaving: Tensor = self.leave(self.last_told(state, embedding))
        return leaving
