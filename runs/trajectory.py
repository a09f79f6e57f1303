"""The kept steps of a sample as a strip of pictures, or as one that moves."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from els.index import encode
from els.runs.folder import RunFolder, read_settings
from els.runs.stores import RunError, Samples
from els.storage.files import atomic_file, require_place
from els.storage.labelled import PICTURE_FORMATS, Labels, draw_grid, write_grid
from els.storage.png import Pixels, panels, require_suffix

ANIMATIONS = (".webp", ".gif")
"""Suffixes of pictures that move; all other formats are strips."""

# Milliseconds that a step is shown, and the last.
_STEP_MS = 200
_LAST_MS = 2000
_ROWS = ("noisy x_t", "predicted x_0")


@dataclass(frozen=True)
class Trajectory:
    """The steps of a sample, from noise to clean.

    Attributes:
        x_t: what each step started from, float32 ``[steps, C, H, W]``.
        predicted: the clean image that each step predicted, likewise.
        sigma: standard deviation of each step's noise, float64 ``[steps]``.
    """

    x_t: Samples
    predicted: Samples
    sigma: npt.NDArray[np.float64]


def read_trajectory(folder: str | Path, index: int) -> Trajectory:
    """The steps of a finished sample of a run that keeps them.

    Raises:
        RunError: if there is no run, it keeps no steps, or the sample is not finished or damaged.
    """
    run = RunFolder(Path(folder))
    settings = read_settings(run.path)
    if not settings.trajectory:
        raise RunError(
            f"{run.path} does not keep the steps of its samples; els sample --trajectory keeps "
            "them, in a run folder of its own"
        )
    run.load(index)
    path = run.trajectory(index, ".npz")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = Trajectory(*(arrays[name] for name in ("x_t", "predicted", "sigma")))
    except FileNotFoundError as error:
        raise RunError(f"{path} is not there; draw the run into another folder again") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    shape = found.x_t.shape
    if len(shape) != 4 or found.predicted.shape != shape or found.sigma.shape != shape[:1]:
        raise _damaged(path, f"its arrays have shapes {shape} and {found.predicted.shape}")
    return found


def draw_trajectory(folder: str | Path, index: int, output: str | Path) -> int:
    """Draw the kept steps of a sample, from noise (step 1) to clean.

    Args:
        folder: of the run.
        index: number of the sample.
        output: the picture. Its suffix says what it is: with one of ``ANIMATIONS`` it moves, a
            frame a step; else it is a strip, x_t above the predicted x_0, a column a step.

    Returns:
        How many steps there are.

    Raises:
        ValueError: for another suffix, or more pixels than the format can have.
        FileNotFoundError: if the picture's folder is not there.
        RunError: as of :func:`read_trajectory`.
    """
    output = Path(output)
    require_suffix(output, list(dict.fromkeys((*PICTURE_FORMATS, *ANIMATIONS))))
    require_place(output)
    steps = read_trajectory(folder, index)
    noisy, predicted = (
        [panels(encode(values)) for values in of_steps] for of_steps in (steps.x_t, steps.predicted)
    )
    count = len(noisy)
    if output.suffix.lower() in ANIMATIONS:
        _write_animation(
            output,
            [
                draw_grid(
                    pair,
                    2,
                    Labels(
                        title=f"sample {index}, step {step} of {count}, sigma {sigma:.3f}",
                        columns=_ROWS,
                    ),
                )
                for step, (*pair, sigma) in enumerate(
                    zip(noisy, predicted, steps.sigma, strict=True), 1
                )
            ],
        )
    else:
        labels = Labels(
            title=f"sample {index}, from noise (step 1) to clean (step {count})",
            rows=_ROWS,
            columns=tuple(str(step) for step in range(1, count + 1)),
        )
        write_grid(output, [*noisy, *predicted], count, labels)
    return count


def _write_animation(path: Path, frames: Sequence[Pixels]) -> None:
    """Write frames of possibly different widths, whole or not at all."""
    width = max(frame.shape[1] for frame in frames)
    pictures = [
        Image.fromarray(
            np.pad(frame, ((0, 0), (0, width - frame.shape[1]), (0, 0)), constant_values=255)
        )
        for frame in frames
    ]
    with atomic_file(path) as stream:
        pictures[0].save(
            stream,
            format=path.suffix[1:].upper(),
            save_all=True,
            append_images=pictures[1:],
            duration=[*[_STEP_MS] * (len(frames) - 1), _LAST_MS],
            loop=0,
            **({"lossless": True} if path.suffix.lower() == ".webp" else {}),
        )


def _damaged(path: Path, reason: object) -> RunError:
    return RunError(f"{path} is damaged ({reason}); draw the run into another folder again")
