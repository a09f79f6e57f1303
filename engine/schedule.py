"""Noise schedules (arXiv 2412.20292; docs/theory.md, equation 10).

Time runs from t = 0 (clean) to t = 1 (noise). All schedules here preserve variance:
``alpha^2 + sigma^2 = 1``, with ``beta = sigma^2`` in the paper's notation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final


class Schedule(ABC):
    """Signal and noise scales as functions of time: ``x_t = alpha(t) * x_0 + sigma(t) * eps``."""

    name: ClassVar[str]

    @abstractmethod
    def alpha(self, t: float) -> float:
        """Signal scale at t in [0, 1], from 1 (clean) towards 0."""

    @abstractmethod
    def sigma(self, t: float) -> float:
        """Standard deviation of the noise at t in [0, 1]; pixels are in [-1, 1]."""

    @final
    def beta(self, t: float) -> float:
        """Variance of the noise at t, ``sigma(t)^2``."""
        return self.sigma(t) ** 2

    @final
    def time(self, alpha: float, sigma: float) -> float:
        """The t in [0, 1] whose noise-to-signal ratio is nearest to ``sigma / alpha``.

        Args:
            alpha: signal scale, >= 0.
            sigma: noise standard deviation, >= 0, not both 0.
        """
        low, high = 0.0, 1.0
        # The ratio rises with t; 64 halvings leave less than a float's spacing.
        for _ in range(64):
            middle = (low + high) / 2
            if self.sigma(middle) * alpha < sigma * self.alpha(middle):
                low = middle
            else:
                high = middle
        return high


@final
@dataclass(frozen=True)
class Cosine(Schedule):
    """The paper's schedule: ``beta(t) = 1 - cos^2(pi/2 * t / (1 + offset))``.

    Attributes:
        offset: keeps alpha(1) above 0, so that divisions by alpha are possible; > 0.
    """

    offset: float = 0.008
    name: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        require(self.offset > 0, f"offset={self.offset} must be > 0, or alpha(1) would be 0")

    def alpha(self, t: float) -> float:
        """``cos(pi/2 * t / (1 + offset))``."""
        return math.cos(self._angle(t))

    def sigma(self, t: float) -> float:
        """``sin(pi/2 * t / (1 + offset))``."""
        return math.sin(self._angle(t))

    def _angle(self, t: float) -> float:
        return math.pi / 2 * _time(t) / (1 + self.offset)


@final
@dataclass(frozen=True)
class Linear(Schedule):
    """Noise rate linear in time (DDPM, arXiv 2006.11239; as an SDE, 2011.13456, equation 33).

    ``alpha(t) = exp(-rate_min * t / 2 - (rate_max - rate_min) * t^2 / 4)``. The defaults are
    DDPM's 1e-4 to 0.02 per step, times its 1000 steps.

    Attributes:
        rate_min: noise rate at t = 0, >= 0.
        rate_max: noise rate at t = 1, > 0 and at least rate_min.
    """

    rate_min: float = 0.1
    rate_max: float = 20.0
    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        require(
            0 <= self.rate_min <= self.rate_max and self.rate_max > 0,
            f"rate_min={self.rate_min}, rate_max={self.rate_max} must be 0 <= rate_min <= "
            "rate_max, rate_max > 0",
        )

    def alpha(self, t: float) -> float:
        """``exp(log_alpha(t))``."""
        return math.exp(self._log_alpha(t))

    def sigma(self, t: float) -> float:
        """``sqrt(1 - alpha(t)^2)``, accurate for small t as well."""
        return math.sqrt(-math.expm1(2 * self._log_alpha(t)))

    def _log_alpha(self, t: float) -> float:
        t = _time(t)
        return -self.rate_min * t / 2 - (self.rate_max - self.rate_min) * t * t / 4


@final
@dataclass(frozen=True)
class Exponential(Schedule):
    """Noise geometric in time: ``sigma(t) = sigma_min^(1 - t) * sigma_max^t``.

    Attributes:
        sigma_min: noise at t = 0, > 0.
        sigma_max: noise at t = 1, above sigma_min and below 1.
    """

    sigma_min: float = 0.01
    sigma_max: float = 0.9999
    name: ClassVar[str] = "exponential"

    def __post_init__(self) -> None:
        require(
            0 < self.sigma_min < self.sigma_max < 1,
            f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max} must be "
            "0 < sigma_min < sigma_max < 1",
        )

    def alpha(self, t: float) -> float:
        """``sqrt(1 - sigma(t)^2)``."""
        sigma = self.sigma(t)
        return math.sqrt((1 - sigma) * (1 + sigma))

    def sigma(self, t: float) -> float:
        """``sigma_min^(1 - t) * sigma_max^t``."""
        t = _time(t)
        return math.exp((1 - t) * math.log(self.sigma_min) + t * math.log(self.sigma_max))


SCHEDULES: dict[str, type[Cosine] | type[Linear] | type[Exponential]] = {
    schedule.name: schedule for schedule in (Cosine, Linear, Exponential)
}


def schedule_named(name: str) -> Schedule:
    """The schedule of that name, with its default constants.

    Raises:
        ValueError: for an unknown name.
    """
    if name.lower() not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is not known; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name.lower()]()


def describe(schedule: Schedule) -> dict[str, str | float]:
    """Name and constants, for a file; :func:`described` reads them back.

    Raises:
        ValueError: for a schedule that is none of ``SCHEDULES``.
    """
    if not isinstance(schedule, Cosine | Linear | Exponential):
        raise ValueError(
            f"a {type(schedule).__name__} cannot be written to a file; "
            f"choose one of {', '.join(SCHEDULES)}"
        )
    return {"name": schedule.name, **asdict(schedule)}


def described(description: Mapping[str, Any]) -> Schedule:
    """The schedule that :func:`describe` wrote.

    Raises:
        ValueError: if it is not one.
    """
    constants = dict(description)
    try:
        return SCHEDULES[constants.pop("name")](**constants)
    except (KeyError, TypeError) as error:
        raise ValueError(f"schedule={dict(description)!r} is not one of this package") from error


def _time(t: float) -> float:
    require(0 <= t <= 1, f"t={t} is outside 0 (clean) to 1 (noise)")
    return t


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)
