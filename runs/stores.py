"""Sample shards: the samples of a large run, a thousand to a file, and the parts of a shard.

A folder of shards holds::

    samples-000000.npz      the first shard: "samples", float32 [n, C, H, W]; samples-000001.npz
                            goes on where it ends, and so on
    parts/000016+16.npz     16 finished samples from number 16 on, of a shard that is not whole yet

A shard is written when its last sample is finished, and its parts are removed. Every file is whole
or not at all, so that a killed process loses only the batch that it was computing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from els.storage.files import atomic_file, remove_stale

Samples = npt.NDArray[np.float32]

# Samples to a file of a large run.
DEFAULT_SHARD_SIZE = 1000
_ARRAY = "samples"


class RunError(RuntimeError):
    """A run folder is in use, damaged, not a run, or holds a run with other settings."""


class _Piece(NamedTuple):
    """A file and the numbers of the samples in it."""

    path: Path
    numbers: range


@dataclass(frozen=True)
class ShardFolder:
    """The samples of a run in shards.

    Attributes:
        path: of the folder.
        size: samples of a shard; the last one of a run may have fewer.
    """

    path: Path
    size: int

    @property
    def parts(self) -> Path:
        """The folder of finished samples of incomplete shards."""
        return self.path / "parts"

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.path / f"samples-{number:06d}.npz"

    def number(self, index: int) -> int:
        """Which shard a sample is in."""
        return index // self.size

    def numbers(self, shard: int, n: int) -> range:
        """The samples of a shard in a run of n."""
        return range(shard * self.size, min(n, (shard + 1) * self.size))

    def make_room(self) -> None:
        """Make the folders, and remove what killed writers left."""
        for folder in (self.path, self.parts):
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)

    def finished(self) -> list[range]:
        """The finished samples, in disjoint ascending runs.

        Raises:
            RunError: for a damaged shard.
        """
        return united(piece.numbers for piece in (*self._shards(), *self._parts()))

    def write(self, first: int, samples: Samples, n: int) -> None:
        """Write finished samples of one shard, the first numbered ``first``, in a run of n."""
        numbers = range(first, first + len(samples))
        shard = self.number(first)
        whole = numbers == self.numbers(shard, n)
        path = self.shard(shard) if whole else self.parts / f"{first:06d}+{len(samples)}.npz"
        _save(path, samples)

    def complete(self, shard: int, n: int) -> None:
        """Make a shard of its parts, all of which are there; then they go.

        Raises:
            RunError: for a damaged part.
        """
        numbers = self.numbers(shard, n)
        parts = [piece for piece in self._parts() if piece.numbers.start in numbers]
        if self._count(shard) < len(numbers):
            _save(self.shard(shard), np.concatenate(list(self.pieces(numbers))))
        for part in parts:
            part.path.unlink(missing_ok=True)

    def tidy(self, n: int) -> None:
        """Complete the shards whose parts all exist: their last writer was killed too early."""
        finished = self.finished()
        for shard in sorted({self.number(piece.numbers.start) for piece in self._parts()}):
            numbers = self.numbers(shard, n)
            if any(numbers.start >= run.start and numbers.stop <= run.stop for run in finished):
                self.complete(shard, n)

    def pieces(self, numbers: range) -> Iterator[Samples]:
        """Finished samples in their order, float32 ``[k, C, H, W]`` at a time.

        A shard that is completed meanwhile does not matter.

        Raises:
            RunError: if one is not there, or its file is damaged.
        """
        index = numbers.start
        while index < numbers.stop:
            shard = self.number(index)
            for samples in self._pieces_of(shard, index, self.numbers(shard, numbers.stop).stop):
                yield samples
                index += len(samples)

    def _pieces_of(self, shard: int, index: int, stop: int) -> Iterator[Samples]:
        """The samples from ``index`` to ``stop`` of one shard."""
        retried = False
        pieces = self._holders(shard)
        while index < stop:
            piece = next((piece for piece in pieces if index in piece.numbers), None)
            try:
                if piece is None:
                    raise FileNotFoundError
                samples = _load(piece.path)
            except FileNotFoundError:
                # Parts go when their shard is there.
                if retried:
                    raise RunError(
                        f"sample {index} of {self.path.parent} is not there; the same els sample "
                        "command that began the run resumes it"
                    ) from None
                retried, pieces = True, self._holders(shard)
                continue
            found = samples[index - piece.numbers.start : stop - piece.numbers.start]
            yield found
            index += len(found)

    def _holders(self, shard: int) -> list[_Piece]:
        """The files that hold samples of a shard."""
        start = shard * self.size
        numbers = range(start, start + self.size)
        parts = [piece for piece in self._parts() if piece.numbers.start in numbers]
        # Looked for last: of a shard that is completed meanwhile, it or its parts are found.
        return [_Piece(self.shard(shard), range(start, start + self._count(shard))), *parts]

    def _count(self, shard: int) -> int:
        """How many samples a shard's file holds; 0 if there is none."""
        try:
            return _length(self.shard(shard))
        except FileNotFoundError:
            return 0

    def _shards(self) -> Iterator[_Piece]:
        for path in sorted(self.path.glob("samples-[0-9]*.npz")):
            first = int(path.stem.partition("-")[2]) * self.size
            yield _Piece(path, range(first, first + _length(path)))

    def _parts(self) -> Iterator[_Piece]:
        for path in sorted(self.parts.glob("[0-9]*+[0-9]*.npz")):
            first, _, count = path.stem.partition("+")
            yield _Piece(path, range(int(first), int(first) + int(count)))


def united(runs: Iterable[range]) -> list[range]:
    """The same numbers in disjoint ascending runs, none of which touches the next."""
    together: list[range] = []
    for run in sorted(runs, key=lambda run: run.start):
        if together and run.start <= together[-1].stop:
            last = together.pop()
            run = range(last.start, max(last.stop, run.stop))
        together.append(run)
    return together


def missing(finished: Iterable[range], n: int) -> list[range]:
    """The runs of numbers below n that are in none of the disjoint ascending runs."""
    gaps, start = [], 0
    for run in finished:
        gaps.append(range(start, min(run.start, n)))
        start = run.stop
    gaps.append(range(start, n))
    return [gap for gap in gaps if gap]


def write_array(stream: IO[bytes], shape: tuple[int, ...], parts: Iterable[Samples]) -> None:
    """Write an array in the .npy format, part by part.

    Args:
        stream: to write to.
        shape: of the array.
        parts: float32, of it along its first axis, in order.
    """
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for part in parts:
        stream.write(np.ascontiguousarray(part, dtype="<f4").data)


def _save(path: Path, samples: Samples) -> None:
    with atomic_file(path) as stream:
        np.savez(stream, samples=samples)


def _load(path: Path) -> Samples:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            samples: Samples = arrays[_ARRAY]
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    if samples.dtype != np.float32 or samples.ndim != 4:
        raise _damaged(path, f"it holds {samples.dtype} {samples.shape}")
    return samples


def _length(path: Path) -> int:
    """How many samples a file holds, from its headers."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{_ARRAY}.npy") as stream:
            np.lib.format.read_magic(stream)
            shape, _, _ = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    return int(shape[0])


def _damaged(path: Path, reason: object) -> RunError:
    return RunError(
        f"{path} is damaged ({reason}); remove it and start the same els sample command again: "
        "it computes what is missing"
    )


def within(numbers: range, n: int) -> range:
    """Those of the sample numbers that are below n."""
    return range(numbers.start, min(numbers.stop, n))
