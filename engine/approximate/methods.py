"""The ways to compute a posterior, as values with parameters of their own (docs/theory.md).

Each method says in one place whether it can be used (:meth:`Method.obstacle`) and computes an
estimate (:meth:`Method.estimate`). ``mode="topk"`` and its like are shorthand for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final, get_args

from els.engine.approximate import auto, head, lists, subset
from els.engine.approximate.costs import GROUPS
from els.engine.approximate.estimate import Estimate, Problem, Situation
from els.engine.query import PosteriorQuery
from els.engine.result import Mode, require_tolerance

# Largest k: more candidates of a pixel would outgrow what they save.
MAX_TOP = 4096
# Fewest images of a subset: two in each of the jackknife's groups.
_LEAST_IMAGES = 2 * GROUPS


class Method(ABC):
    """A way to compute a posterior.

    Attributes:
        mode: the name that results and ``posterior(mode=...)`` have for it.
        needs_index: whether the database must have an index of the patch size.
    """

    mode: ClassVar[Mode]
    needs_index: ClassVar[bool] = False

    def obstacle(self, situation: Situation) -> str | None:
        """Why the method cannot be used, and what can; None where it can."""
        return None

    def wants_all(self, query: PosteriorQuery, images: int) -> bool:
        """Whether everything is computed at once, of all images of the batch together.

        Args:
            query: of the batch.
            images: whose patches are the candidates of one of its images.
        """
        return False

    @abstractmethod
    def estimate(self, problem: Problem) -> Estimate:
        """The estimated posterior of what does not want all; exact where that costs no more."""


@final
@dataclass(frozen=True)
class Exact(Method):
    """Everything."""

    mode: ClassVar[Mode] = "exact"

    def wants_all(self, query: PosteriorQuery, images: int) -> bool:
        """Always."""
        return True

    def estimate(self, problem: Problem) -> Estimate:
        """The exact posterior."""
        return problem.exact()


@final
@dataclass(frozen=True)
class TopK(Method):
    """The k nearest patches that the database's index finds, weighed exactly.

    Attributes:
        k: how many per pixel, 1 to 4,096.
    """

    k: int = 256
    mode: ClassVar[Mode] = "topk"
    needs_index: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_integer("k", self.k, 1, MAX_TOP)

    def obstacle(self, situation: Situation) -> str | None:
        """See :class:`Method`."""
        return head.obstacle(situation)

    def estimate(self, problem: Problem) -> Estimate:
        """See :class:`Method`."""
        return head.truncated(problem, self.k) if head.can_search(problem) else problem.exact()


@final
@dataclass(frozen=True)
class Subset(Method):
    """A random subset of the images, extrapolated to all of them.

    Attributes:
        images: how many, >= 32.
    """

    images: int = 1024
    mode: ClassVar[Mode] = "subset"

    def __post_init__(self) -> None:
        require_integer("subset", self.images, _LEAST_IMAGES, 1 << 62)

    def wants_all(self, query: PosteriorQuery, images: int) -> bool:
        """See :class:`Method`."""
        return self.images >= images or images < _LEAST_IMAGES

    def estimate(self, problem: Problem) -> Estimate:
        """See :class:`Method`."""
        return subset.extrapolated(problem, None, subset.drawn(problem, self.images))


@final
@dataclass(frozen=True)
class TopKSubset(Method):
    """The k nearest patches, weighed exactly, and a random subset for the others.

    Attributes:
        k: how many per pixel, 1 to 4,096.
        images: of the subset, >= 32.
    """

    k: int = 256
    images: int = 1024
    mode: ClassVar[Mode] = "topk+subset"
    needs_index: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_integer("k", self.k, 1, MAX_TOP)
        require_integer("subset", self.images, _LEAST_IMAGES, 1 << 62)

    def obstacle(self, situation: Situation) -> str | None:
        """See :class:`Method`."""
        return head.obstacle(situation)

    def wants_all(self, query: PosteriorQuery, images: int) -> bool:
        """See :class:`Method`."""
        return Subset(self.images).wants_all(query, images)

    def estimate(self, problem: Problem) -> Estimate:
        """See :class:`Method`."""
        if not head.can_search(problem):
            return problem.exact()
        sample = subset.drawn(problem, self.images)
        return subset.extrapolated(problem, head.nearest(problem, self.k), sample)


@final
@dataclass(frozen=True)
class Lists(Method):
    """A sample of the index's patches, the nearer to the pixel the denser.

    Attributes:
        share: of the patches that a pixel reads at least, > 0 to 1; 1 for all.
    """

    share: float = 1 / 128
    mode: ClassVar[Mode] = "lists"
    needs_index: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"share={self.share!r} must be > 0 and at most 1")

    def obstacle(self, situation: Situation) -> str | None:
        """See :class:`Method`."""
        return lists.obstacle(situation)

    def estimate(self, problem: Problem) -> Estimate:
        """See :class:`Method`."""
        if not head.can_search(problem):
            return problem.exact()
        return lists.with_exact_border(problem, float(self.share))


@final
@dataclass(frozen=True)
class Auto(Method):
    """The cheapest method that meets a tolerance.

    Attributes:
        tolerance: mean absolute error of the posterior mean over the pixels of an image, > 0.
    """

    tolerance: float
    mode: ClassVar[Mode] = "auto"

    def __post_init__(self) -> None:
        require_tolerance(self.tolerance)

    def wants_all(self, query: PosteriorQuery, images: int) -> bool:
        """See :class:`Method`."""
        return auto.wants_all(query, images)

    def estimate(self, problem: Problem) -> Estimate:
        """See :class:`Method`."""
        return auto.estimate_to(float(self.tolerance), problem)


def method_named(
    mode: Mode | Method, *, tolerance: float | None, k: int, subset: int, share: float
) -> Method:
    """The method that a mode and the arguments of ``posterior`` are shorthand for.

    Args:
        mode: its name in any case; a method is returned as it is.
        tolerance: of ``auto``, which needs one; None for all others.
        k: see :class:`TopK`.
        subset: see :class:`Subset`.
        share: see :class:`Lists`.

    Raises:
        ValueError: for an unknown name, or a value out of range, also of an argument that the
            method does not have.
    """
    if not isinstance(mode, str):
        if tolerance is not None:
            raise ValueError(f"tolerance={tolerance!r} beside mode={mode!r}: give it to the method")
        return mode
    name = mode.lower()
    if name not in get_args(Mode):
        raise ValueError(
            f"mode={mode!r} is not known; choose one of {', '.join(get_args(Mode))}, or a method"
        )
    if name == "auto":
        require_tolerance(tolerance)
    elif tolerance is not None:
        raise ValueError(f"tolerance={tolerance!r} is of mode='auto' only, got mode={mode!r}")
    all_of_them: tuple[Method, ...] = (
        Exact(),
        Lists(share),
        TopK(k),
        Subset(subset),
        TopKSubset(k, subset),
        *([Auto(tolerance)] if tolerance is not None else []),
    )
    return next(method for method in all_of_them if method.mode == name)


def require_integer(argument: str, value: object, least: int, most: int) -> None:
    """Check an argument that is an integer of a range.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{argument}={value!r} must be an integer from {least} to {most}")
