"""The folder of a run, which can be interrupted at any moment and resumed.

A run folder holds::

    run.json            every setting, and when and with which versions it was worked on
    samples/000000.npy  float32 [C, H, W], nominally in [-1, 1]; it is there if and only if the
                        sample is finished
    samples/000000.png  the same as 8-bit pixels (2 and 4 channels: side by side, in grey)
    steps/              where samples are that take long, until they are finished: 000000.npz
    trajectory/         on request: 000000.png (above x_t, below the predicted x_0, step 1, the
                        noise, first) and 000000.npz (both as float32 [steps, C, H, W], with t,
                        alpha, sigma); els.runs.trajectory draws it with words
    grid.png            all samples (the first 1,024) without words, made when the last is finished

A large run has ``shards/`` in place of ``samples/``: see :mod:`els.runs.stores`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from els.runs.settings import RunSettings, require_sound, settings_from_json, settings_to_json
from els.runs.stores import RunError, Samples, ShardFolder, united
from els.storage.files import remove_stale, visible_names, write_json
from els.storage.locks import take_lock
from els.storage.manifests import read_json

FORMAT = "els-run"
VERSION = 1
GRID_MOST = 1024

_MANIFEST = "run.json"
_GRID = "grid.png"
_LOCK = ".lock"
_STEPS = "steps"
# Seconds to try for the lock: els status takes it for an instant to see whether it is held.
_LOCK_PATIENCE = 0.2


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are."""

    path: Path

    @property
    def manifest(self) -> Path:
        """Settings and sessions."""
        return self.path / _MANIFEST

    @property
    def lock(self) -> Path:
        """Locked by the process that writes ``run.json``, as long as the run lasts."""
        return self.path / _LOCK

    @property
    def grid(self) -> Path:
        """The picture of all samples."""
        return self.path / _GRID

    def values(self, index: int) -> Path:
        """Float values of a sample; written last, so it marks the sample as finished."""
        return self.path / "samples" / f"{index:06d}.npy"

    def picture(self, index: int) -> Path:
        """8-bit picture of a sample."""
        return self.path / "samples" / f"{index:06d}.png"

    def trajectory(self, index: int, suffix: str) -> Path:
        """``.png`` or ``.npz`` of a sample's steps."""
        return self.path / "trajectory" / f"{index:06d}{suffix}"

    def step(self, index: int) -> Path:
        """The saved step of an unfinished sample."""
        return self.path / _STEPS / f"{index:06d}.npz"

    def shards(self, size: int) -> ShardFolder:
        """The samples of a large run."""
        return ShardFolder(self.path / "shards", size)

    def is_finished(self, index: int) -> bool:
        """Whether a sample is finished that has files of its own, values and picture."""
        return self.values(index).exists() and self.picture(index).exists()

    def finished(self, settings: RunSettings) -> list[range]:
        """The numbers of the finished samples, in disjoint ascending runs.

        Raises:
            RunError: if a shard is damaged.
        """
        if settings.shard_size > 1:
            return self.shards(settings.shard_size).finished()
        # From the existing files: n may be any number.
        stems = [path.stem for path in self.values(0).parent.glob("*.npy")]
        numbers = sorted(int(stem) for stem in stems if stem.isdecimal())
        there = (index for index in numbers if index < settings.n and self.is_finished(index))
        return united(range(index, index + 1) for index in there)

    def load(self, index: int) -> npt.NDArray[np.float32]:
        """A finished sample, float32 ``[C, H, W]``.

        Raises:
            RunError: if it is not finished, or damaged.
        """
        values: npt.NDArray[np.float32] = next(self.samples(range(index, index + 1)))[0]
        return values

    def samples(self, numbers: range) -> Iterator[Samples]:
        """Finished samples in their order, float32 ``[k, C, H, W]`` at a time.

        Raises:
            RunError: if one is not finished, or its file is damaged.
        """
        size = read_settings(self.path).shard_size if self.manifest.exists() else 1
        if size > 1:
            yield from self.shards(size).pieces(numbers)
        else:
            for index in numbers:
                yield self._own_values(index)[np.newaxis]

    def _own_values(self, index: int) -> npt.NDArray[np.float32]:
        try:
            values: npt.NDArray[np.float32] = np.load(self.values(index), allow_pickle=False)
        except FileNotFoundError as error:
            raise RunError(
                f"sample {index} of {self.path} is not there; the same els sample command that "
                "began the run resumes it"
            ) from error
        except (ValueError, EOFError) as error:
            raise RunError(
                f"{self.values(index)} is damaged ({error}); remove it and start the same els "
                "sample command again"
            ) from error
        return values


def read_settings(folder: str | Path) -> RunSettings:
    """The settings of a run.

    Raises:
        RunError: if there is none, or its ``run.json`` is damaged or too new.
    """
    run = RunFolder(Path(folder))
    return _settings_of(run, _read_manifest(run))


def read_sessions(folder: str | Path) -> list[dict[str, Any]]:
    """When, how and with which versions a run was worked on, one entry a session.

    Raises:
        RunError: as :func:`read_settings`.
    """
    sessions: list[dict[str, Any]] = _read_manifest(RunFolder(Path(folder)))["sessions"]
    return sessions


@contextmanager
def _claimed(run: RunFolder) -> Iterator[None]:
    """Makes the folder and locks it against other runs, until the context ends."""
    if run.path.exists() and not run.path.is_dir():
        raise RunError(f"{run.path} is a file; give a folder for the run")
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(run.lock, _LOCK_PATIENCE)
    except BlockingIOError as error:
        raise RunError(
            f"another process is sampling into {run.path}; wait for it, or give another folder"
        ) from error
    with lock:
        yield


def _there(run: RunFolder) -> tuple[RunSettings | None, list[dict[str, Any]]]:
    """The settings and sessions of the run in a folder that may be used for one."""
    if run.manifest.exists():
        manifest = _read_manifest(run)
        return _settings_of(run, manifest), manifest["sessions"]
    foreign = visible_names(run.path)
    if foreign:
        raise RunError(
            f"{run.path} is not empty and not a run (it has {foreign[0]!r}, but no "
            f"{_MANIFEST}); give another folder"
        )
    return None, []


def _make_room(run: RunFolder, settings: RunSettings) -> None:
    """Makes the folders inside, and removes what killed writers left."""
    remove_stale(run.path)
    remove_stale(run.path / _STEPS)
    if settings.shard_size > 1:
        run.shards(settings.shard_size).make_room()
        return
    for name in ("samples", *(["trajectory"] if settings.trajectory else [])):
        (run.path / name).mkdir(exist_ok=True)
        remove_stale(run.path / name)


def _read_manifest(run: RunFolder) -> dict[str, Any]:
    try:
        manifest = read_json(run.manifest)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(
            f"{run.path} is not a run (it has no {_MANIFEST}); els sample makes one"
        ) from error
    except ValueError as error:
        raise _damaged(run, str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(run, f"its format is not {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise RunError(
            f"{run.manifest} has version {manifest.get('version')}, this els-machine reads "
            f"{VERSION}; upgrade els-machine, or give another folder"
        )
    if not isinstance(manifest.get("sessions"), list):
        raise _damaged(run, "it has no list of sessions")
    return manifest


def _settings_of(run: RunFolder, manifest: dict[str, Any]) -> RunSettings:
    try:
        settings = settings_from_json(manifest["settings"])
        require_sound(settings)
        return settings
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(run, f"its settings are malformed ({error})") from error


def _damaged(run: RunFolder, reason: str) -> RunError:
    return RunError(f"{run.manifest} is damaged: {reason}; give another folder")


def _write_manifest(
    run: RunFolder, settings: RunSettings, sessions: Sequence[dict[str, Any]]
) -> None:
    content = {"format": FORMAT, "version": VERSION, "settings": settings_to_json(settings)}
    write_json(run.manifest, content | {"sessions": list(sessions)})
