"""The samples of a run as one array or one picture."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from els.engine.sampler import require_count
from els.index import DatabaseError, PatchDatabase, encode
from els.runs.folder import RunFolder, read_settings
from els.runs.novelty import Nearest, nearest_images
from els.runs.settings import database_in_words
from els.runs.stores import RunError, Samples, within, write_array
from els.storage.files import atomic_file, require_place, require_space
from els.storage.labelled import Labels, require_picture, write_grid
from els.storage.png import Pixels, panels

Numbering: TypeAlias = Literal["rows", "all", "none"]
"""Which numbers a grid has: of every row's first sample, of every tile, or none."""

MOST_TILES = 10_000
_FLOAT_BYTES = 4


def merge_run(
    folder: str | Path,
    output: str | Path,
    *,
    partial: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the samples of a run to one .npz file, in order and without ever holding all.

    The file has ``samples``, float32 ``[n, C, H, W]``, nominally in [-1, 1], and their numbers,
    ``indices``, int64 ``[n]``.

    Args:
        folder: of the run.
        output: the file; it appears whole or not at all.
        partial: take what is finished of a run that is not complete.
        overwrite: replace a file that is there.
        progress: called with how many samples are written, and how many will be.

    Returns:
        How many samples there are.

    Raises:
        ValueError: for another kind of file.
        FileExistsError: if the file is there, and is not to be replaced.
        FileNotFoundError: if its folder is not there.
        RunError: if there is no run, samples are missing or damaged, or none is there.
        DiskFullError: (an OSError) no room for the file.
    """
    output = Path(output)
    if output.suffix != ".npz":
        raise ValueError(f"{output} must end in .npz, the one format that els merge writes")
    require_place(output)
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"{output} is there already; give another name, or replace it with overwrite=True"
        )
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
    numbers: Numbering | None = None,
    database: str | Path | None = None,
) -> list[tuple[int, Nearest | None]]:
    """Draw samples of a run, row by row, as one picture.

    Args:
        folder: of the run.
        output: the picture, of any of ``els.storage.labelled.PICTURE_FORMATS``.
        rows: at most so many; fewer if the run has fewer samples.
        columns: tiles in a row.
        first: number of the first sample.
        indices: which samples instead, in this order; ``rows`` and ``first`` do not matter then.
        nearest: draw the nearest training image right of every sample.
        numbers: ``rows``, left of each row that of its first sample; ``all``, above each tile that
            of its sample or training image; ``none``. None for ``rows``, and for ``all`` with
            ``indices``.
        database: where the run's database is now, if it was moved; read for nearest images only.

    Returns:
        The number of each sample in it, and its nearest training image; None if not asked for.

    Raises:
        TypeError: for an argument that is not an integer.
        ValueError: for a value out of range, another kind of file, or more pixels than it can have.
        FileNotFoundError: if the picture's folder is not there.
        RunError: if there is no run, or a sample is not finished or damaged.
    """
    output = Path(output)
    require_picture(output)
    run = RunFolder(Path(folder))
    n = read_settings(run.path).n
    require_count("rows", rows, 1)
    require_count("columns", columns, 1)
    if numbers is None:
        numbers = "rows" if indices is None else "all"
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
    for part in runs:
        require_count("indices", part.start, 0)
        if part.stop > n:
            raise ValueError(f"sample {part.stop - 1} is not in the run: it has 0 to {n - 1}")
    shown = [number for part in runs for number in part]
    columns = min(columns, count)
    rows_of = tuple(str(number) for number in shown[::columns]) if numbers == "rows" else ()
    samples = [values for part in runs for piece in run.samples(part) for values in piece]
    tiles = [panels(encode(values)) for values in samples]
    if not nearest:
        of_tiles = tuple(map(str, shown)) if numbers == "all" else ()
        write_grid(output, tiles, columns, Labels(rows=rows_of, tiles=of_tiles))
        return [(number, None) for number in shown]
    db = database_of(run, database)
    found = nearest_images(db, np.stack(samples))
    pairs: list[Pixels] = []
    names: list[str] = []
    for number, tile, of_sample in zip(shown, tiles, found, strict=True):
        pairs += [tile, panels(db.images[of_sample.image])]
        names += [str(number), f"image {of_sample.image}"]
    labels = Labels(
        rows=rows_of,
        columns=() if numbers == "none" else ("sample", "nearest") * columns,
        tiles=tuple(names) if numbers == "all" else (),
    )
    write_grid(output, pairs, 2 * columns, labels)
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
