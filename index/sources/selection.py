"""Which images of a source are taken: all, the first, or a number of each class."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from els.index.sources.foreign import SourceError


@dataclass(frozen=True)
class Selection:
    """What part of the images a database takes.

    Attributes:
        limit: how many in all.
        per_class: how many of each class.
        seed: draws them at random, with `limit` in proportion to the classes; None: the first.
    """

    limit: int | None = None
    per_class: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("per_class", self.per_class)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} must be a number of images, at least 1")
        if self.limit is not None and self.per_class is not None:
            raise ValueError("limit= and per_class= exclude each other; leave one out")
        if self.seed is None:
            return
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must be an integer from 0")
        if self.limit is None and self.per_class is None:
            raise ValueError(
                f"seed={self.seed!r} draws some of the images; add limit= or per_class="
            )

    def of(
        self, where: str, count: int, labels: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
        """The numbers of the images that are taken.

        Args:
            where: the source, for messages.
            count: how many images it has.
            labels: int64 [count], or None.

        Returns:
            int64, ascending, or None for all; and what a user should know of it.

        Raises:
            SourceError: a number of each class of images without labels.
        """
        if self.per_class is not None:
            if labels is None:
                raise SourceError(
                    f"{where} has no labels, so there are no {self.per_class} of each class "
                    f"(per_class={self.per_class}); take limit={self.per_class} instead"
                )
            return self._of_each_class(labels, self.per_class)
        if self.limit is None or self.limit >= count:
            few = self.limit is not None and self.limit > count
            return None, (f"limit={self.limit}: there are {count:,} images",) if few else ()
        if self.seed is not None:
            # Images without labels are of one class.
            classes = np.zeros(count, np.int64) if labels is None else labels
            return self._drawn(classes, _shares(classes, self.limit)), ()
        if labels is not None:
            there, taken = len(np.unique(labels)), len(np.unique(labels[: self.limit]))
            if taken < there:
                return np.arange(self.limit), (
                    f"the first {self.limit:,} images have {taken} of {there} classes; seed=0 "
                    "draws from all in proportion, and per_class=N takes as many of each",
                )
        return np.arange(self.limit), ()

    def _of_each_class(
        self, labels: NDArray[np.int64], most: int
    ) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        classes, counts = np.unique(labels, return_counts=True)
        short = classes[counts < most]
        notes = (
            (f"per_class={most}: {len(short)} of {len(classes)} classes have fewer images",)
            if len(short)
            else ()
        )
        return self._drawn(labels, dict.fromkeys(classes.tolist(), most)), notes

    def _drawn(self, labels: NDArray[np.int64], shares: dict[int, int]) -> NDArray[np.int64]:
        """So many of each class: the first, or those with the least random keys."""
        order = np.arange(len(labels))
        if self.seed is not None:
            # Raw bits: numpy promises that they stay the same in all its versions.
            keys = np.random.PCG64(self.seed).random_raw(len(labels))
            order = np.argsort(keys, kind="stable")
        drawn = labels[order]
        chosen = [order[drawn == label][:share] for label, share in shares.items()]
        return np.sort(np.concatenate(chosen))


def _shares(labels: NDArray[np.int64], limit: int) -> dict[int, int]:
    """How many of each class: in proportion, rounded by the largest remainders."""
    classes, counts = np.unique(labels, return_counts=True)
    shares, remainders = np.divmod(limit * counts, len(labels))
    largest = np.argsort(-remainders, kind="stable")[: limit - int(shares.sum())]
    shares[largest] += 1
    return dict(zip(classes.tolist(), shares.tolist(), strict=True))
