"""Patch sizes from the data alone, against sums over all places and linear equations."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from els.engine import ScoreMachine, locality, sample
from els.engine.locality import sizes_of_data
from els.engine.schedule import Cosine, Linear, Schedule
from els.index import PatchDatabase
from els.index.statistics import autocovariance


def natural(count: int, channels: int, height: int, width: int) -> NDArray[np.uint8]:
    """Images whose amplitudes fall with the frequency, as those of photographs do."""
    rng = np.random.default_rng(height * width)
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64))
    waves = np.fft.rfft2(rng.standard_normal((count, channels, 64, 64))) / (frequency + 1 / 64)
    field = np.fft.irfft2(waves)[:, :, :height, :width]
    return np.clip(128 + 60 * field / field.std(), 0, 255).astype(np.uint8)


def covariances_by_loops(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    pixels = images / 127.5 - 1
    pixels -= pixels.mean((0, 2, 3), keepdims=True)
    _, channels, height, width = pixels.shape
    found = np.zeros((channels, channels, 2 * height, 2 * width))
    for a, b in itertools.product(range(channels), repeat=2):
        for dy, dx in itertools.product(range(1 - height, height), range(1 - width, width)):
            products = [
                pixels[:, a, y, x] * pixels[:, b, y + dy, x + dx]
                for y, x in itertools.product(range(height), range(width))
                if 0 <= y + dy < height and 0 <= x + dx < width
            ]
            found[a, b, dy, dx] = np.mean(products)
    return found


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 4, 6), (3, 5, 4)])
def test_autocovariance(
    channels: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("els.index.statistics._CHUNK_BYTES", 2000)
    images = natural(7, channels, height, width)
    told: list[tuple[int, int]] = []
    found = autocovariance(
        PatchDatabase.from_arrays(images), lambda done, total: told.append((done, total))
    )
    assert told[-1] == (7, 7)
    assert len(told) > 1
    assert told == sorted(told)
    expected = covariances_by_loops(images)
    assert found.shape == expected.shape
    # No two pixels are a whole height or width apart.
    near_y, near_x = np.arange(2 * height) != height, np.arange(2 * width) != width
    np.testing.assert_allclose(
        found[:, :, near_y][..., near_x], expected[:, :, near_y][..., near_x], atol=1e-12
    )


def sizes_by_equations(
    images: NDArray[np.uint8], steps: int, schedule: Schedule, excess: float, most: int
) -> list[int]:
    """From the linear equations of every window, one by one."""
    covariances = covariances_by_loops(images)
    channels = images.shape[1]
    chosen = []
    for i in range(1, steps + 1):
        noise = (schedule.sigma(i / steps) / schedule.alpha(i / steps)) ** 2
        errors = []
        for size in range(1, most + 1, 2):
            places = list(itertools.product(range(channels), range(size), range(size)))
            matrix = np.array(
                [[covariances[a, b, v - y, w - x] for b, v, w in places] for a, y, x in places]
            )
            error = 0.0
            for channel in range(channels):
                centre = matrix[:, places.index((channel, size // 2, size // 2))]
                filtered = np.linalg.solve(matrix + noise * np.eye(len(places)), centre)
                error += covariances[channel, channel, 0, 0] - centre @ filtered
            errors.append(error)
        least = errors[-1] * (1 + excess)
        size = next(2 * k + 1 for k, error in enumerate(errors) if error <= least)
        chosen.append(max([size, *chosen]))
    return chosen


@pytest.mark.parametrize("schedule", [Cosine(), Linear()], ids=["cosine", "linear"])
@pytest.mark.parametrize(("channels", "excess"), [(1, 0.1), (2, 0.02)])
def test_sizes_are_those_of_the_best_linear_windows(
    channels: int, excess: float, schedule: Schedule
) -> None:
    # So many that averages are covariances without a negative variance.
    images = natural(60, channels, 7, 9)
    found = sizes_of_data(PatchDatabase.from_arrays(images), 12, schedule, excess=excess)
    assert list(found) == sizes_by_equations(images, 12, schedule, excess, 7)
    assert len(set(found)) > 1


def test_only_what_is_correlated_needs_a_window() -> None:
    grain = np.random.default_rng(0).integers(0, 256, (200, 1, 9, 9), dtype=np.uint8)
    assert sizes_of_data(PatchDatabase.from_arrays(grain), 10) == (1,) * 10
    sizes = sizes_of_data(PatchDatabase.from_arrays(natural(200, 1, 15, 15)), 10)
    assert 1 < min(sizes) < max(sizes)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (4, 2, 3), (3, 8, 8)])
def test_any_shape_gives_sizes_that_sample(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locality, "_MOST_COORDINATES", 80)
    rng = np.random.default_rng(0)
    db = PatchDatabase.from_arrays(rng.integers(0, 256, (3, *shape), dtype=np.uint8))
    sizes = sizes_of_data(db, 3)
    assert max(sizes) <= min(shape[1:])
    assert shape[0] * max(sizes) ** 2 <= 80
    assert sample(ScoreMachine(db), n=1, steps=3, patch_sizes=sizes).isfinite().all()
    flat = PatchDatabase.from_arrays(np.full((2, *shape), 7, np.uint8))
    assert sizes_of_data(flat, 2) == (1, 1)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"excess": 0.0}, {"excess": float("nan")}])
def test_arguments_out_of_range(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}="):
        sizes_of_data(PatchDatabase.from_arrays(np.zeros((1, 2, 2), np.uint8)), **wrong)  # type: ignore[arg-type]
