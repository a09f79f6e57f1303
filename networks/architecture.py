"""The parts that every network has: its description, its time embedding, its output.

A network answers ``(t, x, label) -> epsilon``, the noise that it sees in ``x_t = alpha(t) * x_0 +
sigma(t) * epsilon``. The paper's comparators (arXiv 2412.20292, appendix C.1) are convolutions
alone: no attention, no normalisation, nothing that looks beyond a finite receptive field.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor, nn

from els.engine.schedule import Schedule, described

NetworkKind: TypeAlias = Literal["resnet", "unet", "attention-unet"]
Padding: TypeAlias = Literal["zeros", "circular"]
Normalization: TypeAlias = Literal["none", "group"]
Prediction: TypeAlias = Literal["epsilon", "velocity"]

_EMBEDDING = 64
_FASTEST = 100.0
_MOST_GROUPS = 8


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that fixes a network but its weights, as ``network.json`` holds it.

    Attributes:
        kind: which architecture.
        shape: of an image, ``(C, H, W)``.
        channels: features of a layer; of the first level in a UNet, where level i has 2^i times
            as many.
        layers: 3 x 3 convolutions of a ResNet, the first and the last included, so that its
            receptive field is ``2 * layers + 1``; of a block in a UNet.
        levels: resolutions of a UNet, each half of the one before; 1 for a ResNet.
        padding: what a convolution reads beyond the border.
        normalization: ``"none"``, as in the paper, or ``"group"``.
        num_classes: of a class-conditional network; 0 for none.
        prediction: what the last layer means. ``"epsilon"``: the noise itself, as in the paper.
            ``"velocity"``: v (arXiv 2202.00512), of which ``epsilon = sigma * x + alpha * v``;
            epsilon is what the network answers and is trained on either way.
        schedule: name and constants of the noise schedule that t belongs to.
    """

    kind: NetworkKind
    shape: tuple[int, int, int]
    channels: int
    layers: int
    levels: int
    padding: Padding
    normalization: Normalization
    num_classes: int
    prediction: Prediction
    schedule: dict[str, str | float]

    def __post_init__(self) -> None:
        for name, choices in (
            ("kind", get_args(NetworkKind)),
            ("padding", get_args(Padding)),
            ("normalization", get_args(Normalization)),
            ("prediction", get_args(Prediction)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known; choose one of "
                    f"{', '.join(choices)}"
                )
        if len(self.shape) != 3 or not all(_is_count(length, 1) for length in self.shape):
            raise ValueError(f"shape={self.shape!r} must be channels, height and width")
        least = {"channels": 1, "layers": 2 if self.kind == "resnet" else 1}
        least |= {"levels": 1, "num_classes": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not _is_count(value, bound):
                raise ValueError(f"{name}={value!r} must be an integer of at least {bound}")
        # The power of two in the sides says how often they can be halved.
        if any((length & -length).bit_length() < self.levels for length in self.shape[1:]):
            raise ValueError(
                f"levels={self.levels} halves the image {self.levels - 1} times, but its "
                f"{self.shape[1]} x {self.shape[2]} pixels cannot be; give fewer levels"
            )
        if self.kind == "attention-unet":
            for name, value in (
                ("padding", "zeros"),
                ("normalization", "group"),
                ("num_classes", 0),
            ):
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is not for attention-unet, which has "
                        f"{name}={value!r}"
                    )
            if self.channels % _MOST_GROUPS:
                raise ValueError(f"channels={self.channels} must be a multiple of {_MOST_GROUPS}")

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> NetworkConfig:
        """The config that :meth:`describe` wrote.

        Raises:
            ValueError: if it is not one.
        """
        names = {field.name for field in fields(cls)}
        if set(description) != names:
            raise ValueError(f"a network's config has {sorted(names)}, got {sorted(description)}")
        shape = description["shape"]
        if not isinstance(shape, list | tuple):
            raise ValueError(f"shape={shape!r} must be channels, height and width")
        described(description["schedule"])
        return cls(**{**description, "shape": tuple(shape)})

    def describe(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)

    @property
    def noise(self) -> Schedule:
        """The schedule that t belongs to."""
        return described(self.schedule)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def noise_scales(schedule: Schedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of times ``[B]``, each ``[B, 1, 1, 1]``, in the dtype and place of ``x``."""
    times = t.tolist()
    alpha, sigma = (
        torch.tensor([scale(time) for time in times], dtype=x.dtype, device=x.device)
        for scale in (schedule.alpha, schedule.sigma)
    )
    return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)


class EpsilonNetwork(nn.Module, ABC):
    """A network ``(t, x, label) -> epsilon``; subclasses compute the last layer's output.

    Args:
        config: see there.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self._schedule = config.noise

    def forward(self, t: Tensor, x: Tensor, label: Tensor | None = None) -> Tensor:
        """The noise in noisy images.

        Args:
            t: time of each image, floating ``[B]``, 0 (clean) to 1 (noise).
            x: noisy images, float32 ``[B, C, H, W]``, with the clean ones in [-1, 1].
            label: class of each image, int64 ``[B]``; None for a network without classes.

        Returns:
            float32 ``[B, C, H, W]``.

        Raises:
            ValueError: if a label is missing or not wanted.
        """
        if (label is None) != (self.config.num_classes == 0):
            raise ValueError(
                f"the network has {self.config.num_classes} classes, but label is "
                f"{'None' if label is None else 'given'}"
            )
        output = self.output(t, x, label).float()
        if self.config.prediction == "epsilon":
            return output
        alpha, sigma = noise_scales(self._schedule, t, x)
        return sigma * x + alpha * output

    @abstractmethod
    def output(self, t: Tensor, x: Tensor, label: Tensor | None) -> Tensor:
        """The last layer's output, ``[B, C, H, W]``; arguments as of :meth:`forward`."""


@final
class TimeEmbedding(nn.Module):
    """Embedding of time and class: sinusoids of t through a layer, plus the class's vector.

    Args:
        features: length of the vector.
        num_classes: 0 for none.
    """

    frequencies: Tensor

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        exponents = torch.linspace(0, math.log(_FASTEST), _EMBEDDING // 2)
        self.register_buffer("frequencies", math.pi / 2 * exponents.exp(), persistent=False)
        self.layer = nn.Linear(_EMBEDDING, features)
        self.classes = nn.Embedding(num_classes, features) if num_classes else None

    def forward(self, t: Tensor, label: Tensor | None) -> Tensor:
        """``[B, features]`` of times ``[B]`` and labels ``[B]``."""
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        vector = self.layer(torch.cat([angles.sin(), angles.cos()], dim=1))
        if self.classes is not None:
            vector = vector + self.classes(label)
        return nn.functional.silu(vector)


@final
class TimeShift(nn.Module):
    """Features, each channel shifted by a linear function of the time embedding.

    The same for every pixel, so that neither locality nor equivariance is lost.

    Args:
        features: channels.
        embedding: length of the embedding vector.
    """

    def __init__(self, features: int, embedding: int) -> None:
        super().__init__()
        self.layer = nn.Linear(embedding, features)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x + shift``, ``[B, features, H, W]``."""
        shifted: Tensor = x + self.layer(embedding)[:, :, None, None]
        return shifted


def convolution(inputs: int, outputs: int, padding: Padding) -> nn.Conv2d:
    """3 x 3, with as many pixels out as in."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode=padding)


def normalization(config: NetworkConfig, features: int) -> nn.Module:
    """What the config asks for."""
    if config.normalization == "none":
        return nn.Identity()
    return nn.GroupNorm(math.gcd(features, _MOST_GROUPS), features)
