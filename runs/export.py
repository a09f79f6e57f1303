"""The samples of a run as one array or one picture."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from els.engine.sampler import require_count
from els.index import DatabaseError, PatchDatabase, encode
from els.runs.folder import RunFolder, read_settings
from els.runs.novelty import Nearest, nearest_images
from els.runs.settings import database_in_words
from els.runs.stores import RunError, Samples, within, write_array
from els.storage.files import atomic_file, require_space
from els.storage.png import grid, panels, write_png

MOST_TILES = 10_000
_FLOAT_BYTES = 4


def merge_run(
    folder: str | Path,
    output: str | Path,
    *,
    partial: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the samples of a run to one .npz file, in order and without ever holding all.

    The file has ``samples``, float32 ``[n, C, H, W]``, nominally in [-1, 1], and their numbers,
    ``indices``, int64 ``[n]``.

    Args:
        folder: of the run.
        output: the file; it appears whole or not at all.
        partial: take what is finished of a run that is not complete.
        progress: called with how many samples are written, and how many will be.

    Returns:
        How many samples there are.

    Raises:
        ValueError: for another kind of file.
        RunError: if there is no run, samples are missing or damaged, or none is there.
        DiskFullError: (an OSError) no room for the file.
    """
    output = Path(output)
    if output.suffix != ".npz":
        raise ValueError(f"{output} must end in .npz, the one format that els merge writes")
    run = RunFolder(Path(folder))
    settings = read_settings(run.path)
    finished = [within(numbers, settings.n) for numbers in run.finished(settings)]
    count = sum(map(len, finished))
    if count == 0 or (count < settings.n and not partial):
        raise RunError(
            f"{run.path} has {count} of {settings.n} samples; let the same els sample command "
            "finish it" + ("" if count == 0 else ", or take those that are there with --partial")
        )
    shape = run.load(finished[0].start).shape
    require_space(output, count * (_FLOAT_BYTES * math.prod(shape) + 8))

    def parts() -> Iterator[Samples]:
        written = 0
        for numbers in finished:
            for part in run.samples(numbers):
                yield part
                written += len(part)
                if progress is not None:
                    progress(written, count)

    with atomic_file(output) as stream, zipfile.ZipFile(stream, "w") as archive:
        # In the order and the encoding of numpy.savez, whose arrays have to fit into memory.
        with archive.open("samples.npy", "w", force_zip64=True) as entry:
            write_array(entry, (count, *shape), parts())
        with archive.open("indices.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array(
                entry, np.concatenate([np.arange(r.start, r.stop) for r in finished])
            )
    return count


def draw_grid(
    folder: str | Path,
    output: str | Path,
    *,
    rows: int = 8,
    columns: int = 8,
    first: int = 0,
    indices: Sequence[int] | None = None,
    nearest: bool = False,
    database: str | Path | None = None,
) -> list[tuple[int, Nearest | None]]:
    """Draw samples of a run, row by row, as one PNG.

    Args:
        folder: of the run.
        output: the picture.
        rows: at most so many; fewer if the run has fewer samples.
        columns: tiles in a row.
        first: number of the first sample.
        indices: which samples instead, in this order; ``rows`` and ``first`` do not matter then.
        nearest: draw the nearest training image right of every sample.
        database: where the run's database is now, if it was moved; read for nearest images only.

    Returns:
        The number of each sample in it, and its nearest training image; None if not asked for.

    Raises:
        TypeError: for an argument that is not an integer.
        ValueError: for a value out of range, or another kind of file.
        RunError: if there is no run, or a sample is not finished or damaged.
    """
    output = Path(output)
    if output.suffix != ".png":
        raise ValueError(f"{output} must end in .png")
    run = RunFolder(Path(folder))
    n = read_settings(run.path).n
    require_count("rows", rows, 1)
    require_count("columns", columns, 1)
    if indices is None:
        require_count("first", first, 0)
        runs = [range(first, min(n, first + rows * columns))]
    else:
        runs = [range(index, index + 1) for index in indices]
    count = sum(map(len, runs))
    if not 1 <= count <= MOST_TILES:
        raise ValueError(
            f"a grid has 1 to {MOST_TILES:,} samples, not {count}; the run has numbers 0 to {n - 1}"
        )
    for numbers in runs:
        require_count("indices", numbers.start, 0)
        if numbers.stop > n:
            raise ValueError(f"sample {numbers.stop - 1} is not in the run: it has 0 to {n - 1}")
    shown = [number for numbers in runs for number in numbers]
    samples = [values for numbers in runs for part in run.samples(numbers) for values in part]
    tiles = [panels(encode(values)) for values in samples]
    if not nearest:
        write_png(output, grid(tiles, columns=min(columns, count)))
        return [(number, None) for number in shown]
    db = database_of(run, database)
    found = nearest_images(db, np.stack(samples))
    pairs = [
        tile
        for sample, of_sample in zip(tiles, found, strict=True)
        for tile in (sample, panels(db.images[of_sample.image]))
    ]
    write_png(output, grid(pairs, columns=2 * min(columns, count)))
    return list(zip(shown, found, strict=True))


def database_of(run: RunFolder, database: str | Path | None) -> PatchDatabase:
    """The database that a run was drawn from.

    Args:
        run: whose.
        database: where it is now, if it was moved.

    Raises:
        DatabaseError: if it is not there any more.
        RunError: if another is.
    """
    settings = read_settings(run.path)
    try:
        db = PatchDatabase.open(settings.database if database is None else database)
    except DatabaseError as error:
        if database is not None:
            raise
        if Path(settings.database).exists():
            reason = str(error)
        else:
            reason = f"the database of {run.path} is not at {settings.database} any more"
        raise DatabaseError(
            f"{reason}; if it was moved, say where it is now with database=PATH"
        ) from error
    if db.content_hash != settings.content_hash:
        raise RunError(
            f"another database than that of {run.path}: it was drawn from "
            f"{database_in_words(settings)}, this is {db.summary}; say where that one is now with "
            "database=PATH"
        )
    return db
