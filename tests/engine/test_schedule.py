"""Schedules and tables of patch sizes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from els.engine.patch_sizes import PATCH_SIZES, patch_sizes_for
from els.engine.schedule import (
    Cosine,
    Exponential,
    Linear,
    Schedule,
    describe,
    described,
    schedule_named,
)

SCHEDULES = [
    pytest.param(Cosine(), id="cosine"),
    pytest.param(Linear(), id="linear"),
    pytest.param(Linear(rate_min=0.0, rate_max=1.0), id="linear-from-zero"),
    pytest.param(Exponential(), id="exponential"),
]
TIMES = np.linspace(0, 1, 101)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variance_is_preserved(schedule: Schedule) -> None:
    for t in TIMES:
        total = schedule.alpha(t) ** 2 + schedule.beta(t)
        assert total == pytest.approx(1, abs=4 * np.finfo(float).eps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_grows_and_the_signal_never_vanishes(schedule: Schedule) -> None:
    assert np.all(np.diff([schedule.sigma(t) for t in TIMES]) > 0)
    assert np.all(np.diff([schedule.alpha(t) for t in TIMES]) < 0)
    assert schedule.alpha(1.0) > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_is_found_again_from_the_noise(schedule: Schedule) -> None:
    for t in TIMES:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        for scale in (1.0, 3.0):
            found = schedule.time(scale * alpha, scale * sigma)
            # Where noise sets in as a root, sigma keeps half the digits of t.
            assert found == pytest.approx(t, rel=1e-12, abs=1e-15)
    assert schedule.time(0.0, 1.0) == 1.0
    assert schedule.time(1.0, 0.0) <= 2.0**-64


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0], ids=str)
def test_cosine_is_the_papers(t: float) -> None:
    assert Cosine().beta(t) == pytest.approx(1 - math.cos(math.pi / 2 * t / 1.008) ** 2, rel=1e-12)


def test_linear_is_the_limit_of_ddpm() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    # 1 - b = exp(-b - b^2 / 2 - ...): that sum, at most, is what 1000 finite steps differ by.
    alpha = math.sqrt(np.prod(1 - betas))
    assert math.log(alpha) == pytest.approx(math.log(Linear().alpha(1.0)), abs=0.6 * sum(betas**2))


def test_linear_is_accurate_near_clean() -> None:
    t = 1e-12
    assert Linear().sigma(t) == pytest.approx(math.sqrt(0.1 * t), rel=1e-9)


def test_exponential_is_geometric() -> None:
    schedule = Exponential(0.01, 0.81)
    assert schedule.sigma(0.0) == pytest.approx(0.01)
    assert schedule.sigma(0.5) == pytest.approx(0.09)
    assert schedule.sigma(1.0) == pytest.approx(0.81)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_survives_a_file(schedule: Schedule) -> None:
    assert described(describe(schedule)) == schedule


@pytest.mark.parametrize("name", ["cosine", "Linear", "EXPONENTIAL"])
def test_schedules_by_name(name: str) -> None:
    assert schedule_named(name).name == name.lower()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda: schedule_named("sigmoid"), "cosine, linear, exponential", id="name"),
        pytest.param(lambda: Cosine(0.0), "offset", id="cosine-offset"),
        pytest.param(lambda: Linear(2.0, 1.0), "rate_min", id="linear-falling"),
        pytest.param(lambda: Linear(0.0, 0.0), "rate_max", id="linear-nothing"),
        pytest.param(lambda: Exponential(0.5, 0.5), "sigma_min", id="exponential-flat"),
        pytest.param(lambda: Exponential(0.5, 1.0), "sigma_max", id="exponential-no-signal"),
        pytest.param(lambda: Cosine().alpha(1.5), "t=1.5", id="t-late"),
        pytest.param(lambda: Linear().sigma(float("nan")), "t=nan", id="t-nan"),
        pytest.param(lambda: described({"name": "sigmoid"}), "sigmoid", id="described-name"),
        pytest.param(lambda: described({"name": "cosine", "b": 1}), "cosine", id="described-extra"),
    ],
)
def test_wrong_schedules_are_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_tables_are_the_papers() -> None:
    assert len(PATCH_SIZES) == 9
    for sizes in PATCH_SIZES.values():
        assert len(sizes) == 20
        assert all(size % 2 == 1 for size in sizes)
    # One entry of each, from the paper's end of most noise.
    last = {name: sizes[-1] for name, sizes in PATCH_SIZES.items()}
    assert list(last.values()) == [17, 15, 25, 19, 17, 25, 15, 3, 27]


@pytest.mark.parametrize(
    ("name", "full"),
    [
        pytest.param("fashion-mnist-resnet", "fashion-mnist-resnet-zeros", id="one-padding"),
        pytest.param("celeba-resnet-zeros", "celeba-resnet-zeros", id="full"),
        pytest.param("MNIST-ResNet-circular", "mnist-resnet-circular", id="capitals"),
    ],
)
def test_tables_by_name(name: str, full: str) -> None:
    assert patch_sizes_for(name, 20) == PATCH_SIZES[full]


@given(st.sampled_from(sorted(PATCH_SIZES)), st.integers(1, 200))
def test_other_numbers_of_steps_take_the_nearest_level(name: str, steps: int) -> None:
    sizes = patch_sizes_for(name, steps)
    assert len(sizes) == steps
    levels = np.arange(1, 21)
    for i, size in enumerate(sizes, 1):
        # Multiplied out: in integers there is no rounding to decide a tie.
        nearest = levels[np.argmin(np.abs(levels * steps - 20 * i))]
        assert size == PATCH_SIZES[name][nearest - 1]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param(5, (5, 5, 5), id="int"),
        pytest.param(np.int64(5), (5, 5, 5), id="numpy-int"),
        pytest.param([3, 5, 7], (3, 5, 7), id="list"),
        pytest.param((1, 1, 9), (1, 1, 9), id="tuple"),
    ],
)
def test_own_sizes(sizes, expected: tuple[int, ...]) -> None:
    assert patch_sizes_for(sizes, 3) == expected


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        pytest.param("cifar10-resnet", ValueError, "zeros or cifar10-resnet-circ", id="ambiguous"),
        pytest.param("imagenet", ValueError, "celeba-resnet-zeros", id="unknown"),
        pytest.param([3, 5], ValueError, "2 entries for steps=3", id="length"),
        pytest.param([3, 4, 5], ValueError, "has 4", id="even"),
        pytest.param(-1, ValueError, "has -1", id="negative"),
        pytest.param(3.0, TypeError, r"3\.0", id="float"),
        pytest.param([3, True, 3], TypeError, "True", id="bool"),
        pytest.param(None, TypeError, "None", id="none"),
    ],
)
def test_wrong_sizes_are_refused(sizes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        patch_sizes_for(sizes, 3)
