"""How far a run has come, and how fast it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from els.runs.export import database_of
from els.runs.folder import RunFolder, read_sessions, read_settings
from els.runs.novelty import count_memorised
from els.runs.settings import RunSettings
from els.runs.stores import RunError, Samples, within
from els.storage.locks import is_locked

# Samples that are compared with the training images at once.
_COMPARED_AT_ONCE = 1000


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        n: how many samples it is to have.
        finished: how many are finished.
        is_running: whether a process works on it now.
        samples_per_second: over the latest session, by all its processes; None before its first
            sample.
        seconds_left: at that rate; None if nobody works on it or the rate is not known.
        started: when the latest session began, ISO 8601.
        processes: of the latest session.
        database_shards: among how many of them the images were divided.
        backend: that they compute with.
        memorised: how many of the finished samples are memorised (:mod:`els.runs.novelty`); None
            if that was not asked for.
    """

    n: int
    finished: int
    is_running: bool
    samples_per_second: float | None
    seconds_left: float | None
    started: str
    processes: int
    database_shards: int
    backend: str
    memorised: int | None = None


def run_status(
    folder: str | Path, *, memorised: bool = False, database: str | Path | None = None
) -> RunStatus:
    """How far a run is; it may still be running, on any machine that sees the folder.

    Args:
        folder: of the run.
        memorised: also compare every finished sample with every training image.
        database: where the run's database is now, if it was moved; read for memorised samples only.

    Raises:
        RunError: if there is no run, or it is damaged.
        ValueError: for memorised samples on a canvas, or if the database is not there any more.
    """
    run = RunFolder(Path(folder))
    settings, sessions = read_settings(run.path), read_sessions(run.path)
    is_running = is_locked(run.lock)
    there = [within(numbers, settings.n) for numbers in run.finished(settings)]
    finished = sum(map(len, there))
    latest = sessions[-1] if sessions else {}
    try:
        started = datetime.fromisoformat(latest["started"])
        if is_running:
            ended = datetime.now(UTC)
        elif latest["finished"] is not None:
            ended = datetime.fromisoformat(latest["finished"])
        else:
            ended = _last_written(run, settings)
        computed = finished - int(latest.get("finished_before", 0))
        processes, shards = latest.get("processes", 1), latest.get("database_shards", 1)
        backend = str(latest["backend"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.manifest} is damaged: its last session is malformed") from error
    seconds = (ended - started).total_seconds()
    rate = computed / seconds if computed > 0 and seconds > 0 else None
    left = (settings.n - finished) / rate if rate is not None and is_running else None
    return RunStatus(
        settings.n,
        finished,
        is_running,
        rate,
        left,
        started.isoformat(),
        processes,
        shards,
        backend,
        count_memorised(database_of(run, database), _blocks(run, there)) if memorised else None,
    )


def _blocks(run: RunFolder, finished: list[range]) -> Iterator[Samples]:
    """The finished samples, float32 ``[n, C, H, W]`` with up to 1,000 at a time."""
    waiting: list[Samples] = []
    for numbers in finished:
        for part in run.samples(numbers):
            waiting.append(part)
            if sum(map(len, waiting)) >= _COMPARED_AT_ONCE:
                yield np.concatenate(waiting)
                waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _last_written(run: RunFolder, settings: RunSettings) -> datetime:
    """When a sample was last written: a folder changes with every file that appears in it."""
    shards = run.shards(settings.shard_size)
    folders = [run.path / "samples"] if settings.shard_size == 1 else [shards.path, shards.parts]
    newest = max(folder.stat().st_mtime for folder in [run.manifest, *folders] if folder.exists())
    return datetime.fromtimestamp(newest, UTC)
