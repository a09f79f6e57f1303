"""UNets: the paper's, of convolutions alone, and one with self-attention from diffusers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from els.networks.architecture import (
    EpsilonNetwork,
    NetworkConfig,
    Padding,
    TimeEmbedding,
    TimeShift,
    convolution,
    normalization,
)

TIMESTEPS = 1000
"""What diffusers calls t = 1."""

_GROUPS = 8
_HEAD = 8


@final
class UNet(EpsilonNetwork):
    """Convolutions at ``levels`` resolutions, with max-pooling, transposed ones and skips.

    Pooling makes it equivariant to shifts by multiples of ``2^(levels - 1)`` only, and its
    receptive field larger.

    Args:
        config: all but ``kind`` counts; a block has ``layers`` convolutions.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        colours = config.shape[0]
        widths = [config.channels * 2**level for level in range(config.levels)]
        embedding = config.channels * 2
        self.embedding = TimeEmbedding(embedding, config.num_classes)
        self.down = nn.ModuleList(
            _Block(config, inputs, outputs, embedding)
            for inputs, outputs in zip([colours, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        upwards = [(widths[level + 1], widths[level]) for level in reversed(range(len(widths) - 1))]
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2) for coarse, fine in upwards
        )
        self.up = nn.ModuleList(_Block(config, 2 * fine, fine, embedding) for _, fine in upwards)
        self.last_told = TimeShift(widths[0], embedding)
        self.leave = nn.Conv2d(widths[0], colours, 1)

    def output(self, t: Tensor, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`EpsilonNetwork`."""
        embedding = self.embedding(t, label)
        levels = []
        for depth, block in enumerate(self.down):
            x = block(self.pool(x) if depth else x, embedding)
            levels.append(x)
        skips = reversed(levels[:-1])
        for grow, block, skip in zip(self.grow, self.up, skips, strict=True):
            x = block(torch.cat([skip, grow(x)], dim=1), embedding)
        leaving: Tensor = self.leave(self.last_told(x, embedding))
        return leaving


@final
class _Block(nn.Module):
    """Convolutions of one level, the first with the time embedding."""

    def __init__(self, config: NetworkConfig, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * config.layers]
        padding: Padding = config.padding
        self.told = TimeShift(outputs, embedding)
        self.convolutions = nn.ModuleList(
            convolution(before, after, padding) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(normalization(config, outputs) for _ in range(config.layers))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for depth, (convolve, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolve(x))
            x = (self.told(x, embedding) if depth == 0 else x).relu_()
        return x


@final
class AttentionUNet(EpsilonNetwork):
    """A UNet2DModel of diffusers with self-attention at all levels but the finest.

    Not local: the machine's prediction of it is the paper's hard case (section 5).

    Args:
        config: ``channels``, ``layers`` and ``levels`` count.

    Raises:
        RuntimeError: without diffusers.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        colours, height, width = config.shape
        coarse = config.levels - 1
        self.unet: Any = unet2d_model()(
            sample_size=(height, width),
            in_channels=colours,
            out_channels=colours,
            layers_per_block=config.layers,
            block_out_channels=tuple(config.channels * min(2**i, 4) for i in range(config.levels)),
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * coarse),
            up_block_types=(*["AttnUpBlock2D"] * coarse, "UpBlock2D"),
            norm_num_groups=_GROUPS,
            attention_head_dim=_HEAD,
        )

    def output(self, t: Tensor, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`EpsilonNetwork`."""
        output: Tensor = self.unet(x, t * TIMESTEPS, return_dict=False)[0]
        return output


def unet2d_model() -> Any:
    """The class, imported when it is needed.

    Raises:
        RuntimeError: without diffusers.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise RuntimeError(
            "a UNet2DModel needs diffusers: pip install 'els-machine[networks]'"
        ) from error
    return UNet2DModel
