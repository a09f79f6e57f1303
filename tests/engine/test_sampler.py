"""The sampler: DDIM against a few lines of numpy, seeds of their own for every sample."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import BackendUnderTest

from els.engine import LocalPosterior, ScoreMachine, sample
from els.engine.kinds import kind_named
from els.engine.query import PosteriorQuery
from els.engine.sampler import StepState, initial_noise
from els.engine.schedule import Cosine, Exponential, Linear, Schedule
from els.index import PatchDatabase, decode
from els.runs.run import sample_run

RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (5, 2, 7, 9), dtype=np.uint8)
DB = PatchDatabase.from_arrays(IMAGES, [0, 1, 1, 0, 3])
MANY = RNG.integers(0, 256, (40, 2, 5, 5), dtype=np.uint8)
NOISE = RNG.standard_normal((2, 2, 7, 9))
MACHINES = [
    pytest.param(kind, boundary, id=f"{kind}-{boundary}")
    for kind, boundary in [
        ("IS", "zeros"),
        ("ES", "zeros"),
        ("LS", "circular"),
        ("ELS", "zeros"),
        ("ELS", "circular"),
    ]
]


@dataclass(frozen=True)
class Toy:
    """A smooth denoiser that is no score machine, exact in float64."""

    db: PatchDatabase = DB
    kind: str = "IS"
    is_local: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    @staticmethod
    def denoise(x, alpha, sigma):
        return np.tanh(alpha * x.astype(np.float64) + sigma * np.roll(x, 1, -1))

    def posterior(self, x, *, alpha, sigma, patch_size, labels, entropy):
        mean = torch.from_numpy(self.denoise(x.numpy(), alpha, sigma))
        none = torch.zeros_like(mean[:, 0])
        return LocalPosterior(
            mean, none, None, None, None, none, none, ("exact",), ("exact",), (0,)
        )


def ddim_in_numpy(noise, fresh, schedule: Schedule, steps: int, eta: float):
    """Equation 12 and 16 of arXiv 2010.02502 as they stand there; fresh[step] is the new noise."""
    x = noise
    for step in range(steps, 0, -1):
        t, s = step / steps, (step - 1) / steps
        bar, alpha, sigma = schedule.alpha(t) ** 2, schedule.alpha(t), schedule.sigma(t)
        bar_next = schedule.alpha(s) ** 2 if step > 1 else 1.0
        # The machine is asked in float32.
        clean = Toy.denoise(x.astype(np.float32), alpha, sigma)
        eps = (x - np.sqrt(bar) * clean) / np.sqrt(1 - bar)
        spread = eta * np.sqrt((1 - bar_next) / (1 - bar)) * np.sqrt(1 - bar / bar_next)
        x = np.sqrt(bar_next) * clean + np.sqrt(1 - bar_next - spread**2) * eps
        x = x + spread * fresh[step]
    return x


def stream(seed: int, index: int, step: int) -> np.ndarray:
    sequence = np.random.SeedSequence(seed, spawn_key=(index, step))
    return np.random.Generator(np.random.Philox(sequence)).standard_normal(DB.shape)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0], ids=lambda eta: f"eta-{eta}")
@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(Cosine(), id="cosine"),
        pytest.param(Linear(), id="linear"),
        pytest.param(Exponential(0.05, 0.99), id="exponential"),
    ],
)
def test_ddim_is_the_papers(schedule: Schedule, eta: float) -> None:
    states: list[StepState] = []
    result = sample(
        Toy(), n=2, steps=7, seed=11, schedule=schedule, eta=eta, callback=states.append
    )
    for index in range(2):
        fresh = {step: stream(11, index, step) for step in range(1, 8)}
        expected = ddim_in_numpy(stream(11, index, 0), fresh, schedule, 7, eta)
        final = states[-1].x_next[index].numpy()
        # sqrt(1 - alpha^2) of the numpy lines cancels: sigma is off by eps / sigma^2 at most, and
        # each of 7 steps may double a difference (tanh and the division by sigma).
        np.testing.assert_allclose(final, expected, atol=2**7 * 2.3e-16 / schedule.beta(1 / 7))
        np.testing.assert_array_equal(result[index], final.astype(np.float32))


def test_states_tell_the_whole_trajectory() -> None:
    states: list[StepState] = []
    machine = ScoreMachine(DB, "ELS", "zeros", "torch")
    result = sample(
        machine, n=3, steps=4, patch_sizes=[1, 3, 5, 7], callback=states.append, batch_size=2
    )
    assert [state.step for state in states] == [4, 3, 2, 1] * 2
    assert [state.patch_size for state in states] == [7, 5, 3, 1] * 2
    assert [state.t for state in states[:4]] == [1.0, 0.75, 0.5, 0.25]
    assert [state.indices for state in states[::4]] == [(0, 1), (2,)]
    for before, after in pairwise(states[:4]):
        assert torch.equal(before.x_next, after.x_t)
        assert before.x_t.dtype == before.predicted.dtype == torch.float64
    assert torch.equal(states[0].x_t[1], initial_noise(0, 1, DB.shape))
    assert torch.equal(states[3].x_next, states[3].predicted)
    assert torch.equal(states[7].x_next[0].float(), result[2])
    assert states[0].alpha == Cosine().alpha(1.0)
    assert states[0].sigma == Cosine().sigma(1.0)


@pytest.mark.parametrize("schedule", [Cosine(), Exponential()], ids=["cosine", "exponential"])
@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ddim", "ancestral"])
@pytest.mark.parametrize(("kind", "boundary"), MACHINES)
def test_one_training_image_is_the_only_sample(kind, boundary, eta, schedule) -> None:
    machine = ScoreMachine(PatchDatabase.from_arrays(IMAGES[:1]), kind, boundary, "torch")
    sizes = None if kind in ("IS", "ES") else 7
    # Patches as large as a side have one place under ELS zeros; ELS circular moves them freely.
    images = sample(machine, n=2, steps=3, patch_sizes=sizes, eta=eta, schedule=schedule)
    if (kind, boundary) in {("ES", "zeros"), ("ELS", "circular")}:
        assert images.abs().max() <= 1
    else:
        np.testing.assert_allclose(images, np.stack([decode(IMAGES[0])] * 2), atol=1e-6)


def test_the_ideal_machine_memorises() -> None:
    images = sample(ScoreMachine(DB, "IS", backend="torch"), n=4, steps=10)
    for image in images.numpy():
        assert np.abs(decode(IMAGES) - image).max(axis=(1, 2, 3)).min() < 1e-3


def test_labels_choose_the_candidates() -> None:
    images = sample(ScoreMachine(DB, "IS", backend="torch"), n=2, steps=4, labels=[3, 3])
    np.testing.assert_allclose(images, np.stack([decode(IMAGES[4])] * 2), atol=1e-6)
    mixed = sample(ScoreMachine(DB, "IS", backend="torch"), n=2, steps=4, labels=[0, 3])
    assert torch.equal(mixed[1], images[1])


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("kind", "boundary"), MACHINES)
def test_a_sample_is_the_same_in_any_company(kind, boundary, backend) -> None:
    machine = ScoreMachine(DB, kind, boundary, backend, threads=1)
    options = {
        "steps": 4,
        "patch_sizes": [3, 3, 5, 5],
        "eta": 0.5,
        "seed": 2**70,
        "labels": [0, 1, 0, 1, 1],
    }
    together = sample(machine, n=5, **options)
    for batch_size in (1, 2):
        assert torch.equal(sample(machine, n=5, batch_size=batch_size, **options), together)
    options["labels"] = [1, 0]
    assert torch.equal(sample(machine, indices=[3, 0], **options), together[[3, 0]])


def test_noise_differs_by_seed_sample_and_step() -> None:
    drawn = [stream(seed, index, step) for seed in (0, 1) for index in (0, 1) for step in (0, 1)]
    assert len({array.tobytes() for array in drawn}) == 8
    assert np.array_equal(initial_noise(1, 1, DB.shape), stream(1, 1, 0))
    large = initial_noise(3, 4, (200, 500))
    # Five standard errors of the mean and of the variance of 100,000 normal numbers.
    assert abs(float(large.mean())) < 5 / 100_000**0.5
    assert abs(float(large.var()) - 1) < 5 * (2 / 100_000) ** 0.5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        pytest.param({"n": 0}, ValueError, "n=0", id="no-samples"),
        pytest.param({"n": 2.0}, TypeError, "n must be", id="n-float"),
        pytest.param({"steps": 0}, ValueError, "steps=0", id="no-steps"),
        pytest.param({"steps": True}, TypeError, "steps", id="steps-bool"),
        pytest.param({"seed": -1}, ValueError, "seed=-1", id="seed"),
        pytest.param({"eta": 1.5}, ValueError, "eta=1.5", id="eta-large"),
        pytest.param({"eta": float("nan")}, ValueError, "eta=nan", id="eta-nan"),
        pytest.param({"schedule": 1}, TypeError, r"Cosine\(\)", id="schedule-type"),
        pytest.param({"schedule": "square"}, ValueError, "cosine, linear", id="schedule-name"),
        pytest.param({"patch_sizes": None}, ValueError, "fashion-mnist-resnet", id="no-sizes"),
        pytest.param({"patch_sizes": 4}, ValueError, "odd", id="even-size"),
        pytest.param({"patch_sizes": 9}, ValueError, "shorter side is 7", id="size-too-large"),
        pytest.param({"patch_sizes": [3]}, ValueError, "1 entries", id="sizes-too-few"),
        pytest.param({"labels": 2}, ValueError, "label 2", id="empty-class"),
        pytest.param({"labels": [0, 1]}, ValueError, "one per sample", id="labels-length"),
        pytest.param({"labels": 1.0}, TypeError, "integers", id="labels-float"),
        pytest.param({"batch_size": 0}, ValueError, "batch_size=0", id="batch-size"),
        pytest.param({"indices": []}, ValueError, "empty", id="no-indices"),
        pytest.param({"indices": [-1]}, ValueError, "indices=-1", id="index-negative"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(options, error, words) -> None:
    machine = ScoreMachine(DB, "ELS", "zeros", "torch")

    def never(state: StepState) -> None:
        pytest.fail("a step was computed")

    with pytest.raises(error, match=words):
        sample(machine, **({"n": 3, "steps": 2, "patch_sizes": 3, "callback": never} | options))


def test_labels_need_a_labelled_database() -> None:
    machine = ScoreMachine(PatchDatabase.from_arrays(IMAGES), "IS", backend="torch")
    with pytest.raises(ValueError, match="no labels"):
        sample(machine, labels=0)


def test_approximate_samples_are_near_the_exact_ones_and_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("els.engine.approximate.auto.LEAST_PAIRS", 0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1500, 1, 6, 6)).astype(np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), "ELS", "zeros")
    options = {"steps": 4, "patch_sizes": [1, 3, 3, 3], "seed": 5}
    exact = sample(machine, n=2, **options)
    near = sample(machine, n=2, tolerance=0.05, **options)
    assert not torch.equal(near, exact)
    # Errors of the steps add up at most; the last step's share is all its own.
    assert (near - exact).abs().mean() <= 4 * 0.05
    assert torch.equal(near, sample(machine, n=2, tolerance=0.05, batch_size=1, **options))
    assert torch.equal(near[1:], sample(machine, indices=[1], tolerance=0.05, **options))
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        sample(machine, n=1, tolerance=0.0, **options)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [Linear(0.1, 1e6), Linear(1e4, 1e4)])
def test_schedules_that_begin_without_any_signal(schedule: Schedule, eta: float) -> None:
    """Alpha is 0 at more than one step: no part of the signal is lost between them."""
    machine = ScoreMachine(DB, "IS", backend="torch")
    drawn = sample(machine, n=2, steps=10, schedule=schedule, eta=eta)
    assert torch.isfinite(drawn).all()
    assert drawn.abs().max() < 2


DEFAULTS = [
    pytest.param(lambda: torch.set_default_device("meta"), id="device"),
    pytest.param(lambda: torch.set_default_dtype(torch.float64), id="float64"),
    pytest.param(lambda: torch.set_default_dtype(torch.float16), id="float16"),
]


@pytest.fixture
def torchs_defaults() -> Iterator[None]:
    """As they were, when the test has changed them."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def answers(machine: ScoreMachine, folder: Path, *, briefly: bool) -> list[torch.Tensor]:
    """What a machine answers in every way, or in one where everything takes long."""
    x = torch.from_numpy(NOISE[:, :, :5, :5].astype(np.float32)).to(machine.device)
    options = {"alpha": 0.8, "sigma": 0.6, "patch_size": 3}
    exact = machine.posterior(x, **options, top=4, labels=1)
    found = [exact.mean, exact.log_evidence, exact.effective_patches]
    found += [exact.top_weights, exact.top_addresses]
    if briefly:
        return found
    part = machine.posterior(x, **options, mode="subset", subset=32)
    found += [part.mean, part.mean_error, part.omitted_mass, machine.score(x, **options)]
    found += [sample(machine, n=2, steps=2, patch_sizes=3, eta=0.5, labels=[0, 1])]
    run = sample_run(machine, folder, n=2, steps=2, patch_sizes=3, tolerance=0.1).folder
    return found + [torch.from_numpy(run.load(index)) for index in range(2)]


@pytest.mark.parametrize("change", DEFAULTS)
@pytest.mark.parametrize(("kind", "boundary"), MACHINES)
@pytest.mark.thinned
def test_torchs_defaults_change_nothing(
    backend: BackendUnderTest, tmp_path: Path, torchs_defaults, kind, boundary, change
) -> None:
    machine = backend.machine(MANY, kind, boundary, np.arange(len(MANY)) % 2)
    expected = answers(machine, tmp_path / "usual", briefly=backend.is_interpreted)
    change()
    found = answers(machine, tmp_path / "changed", briefly=backend.is_interpreted)
    for value, usual in zip(found, expected, strict=True):
        assert value.dtype == usual.dtype
        assert value.device == usual.device
        assert torch.equal(value, usual)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(("kind", "boundary"), MACHINES)
@pytest.mark.thinned
def test_backends_answer_the_same_without_gradients(
    backend: BackendUnderTest, kind: str, boundary: str, mode
) -> None:
    computes = backend.make(2)
    members = np.array([0, 2, 4])
    x = torch.from_numpy(NOISE).to(computes.device, backend.dtype)
    scale = torch.tensor([0.5, 0.8], dtype=torch.float64)
    query = PosteriorQuery(x, scale, scale, kind_named(kind), boundary, 3, entropy=True, top=2)
    (expected,) = computes.states(IMAGES, query, [members])
    with mode():
        asked = replace(query, x=x.clone())
        (state,) = computes.states(IMAGES, asked, [members])
    for name in ("reference", "mass", "centre", "logit_sum"):
        assert torch.equal(getattr(state, name), getattr(expected, name))
    assert not state.centre.requires_grad


def test_a_schedule_has_a_name() -> None:
    machine = ScoreMachine(DB, "IS", backend="torch")
    by_name = sample(machine, n=1, steps=2, schedule="Linear")
    assert torch.equal(by_name, sample(machine, n=1, steps=2, schedule=Linear()))
