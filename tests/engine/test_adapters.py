"""Adapters: our machines in the schedulers of diffusers and the samplers of k-diffusion.

What a scheduler makes of them is compared with its published formula, written out here in float64
on :meth:`ScoreMachine.posterior`. Schedulers keep float32 tables: they are off by some 1e-6, and
so are trajectories, whose tolerance is 1e-5 (steps at the noise of the last one multiply an error
by a few).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from els.engine import EDMDenoiser, ELSModel, ScoreMachine, sample, trained_betas
from els.engine.patch_sizes import PATCH_SIZES, SizesByNoise, patch_sizes_for
from els.engine.sampler import initial_noise
from els.engine.schedule import Cosine, Exponential, Linear
from els.index import PatchDatabase, open_source

RNG = np.random.default_rng(33)
COUNT, CHANNELS, HEIGHT, WIDTH = 6, 2, 7, 8
IMAGES = RNG.integers(0, 256, (COUNT, CHANNELS, HEIGHT, WIDTH), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])
SHAPE = (CHANNELS, HEIGHT, WIDTH)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
# diffusers calls np.array on tensors, of which numpy 2 has something to say.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
# DDPM's schedule, the default of diffusers.
KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
STEPS = 6

Trajectory = Iterator[Tensor]
Mean = Callable[[Tensor, float, float], Tensor]


@pytest.fixture(scope="module")
def machine() -> ScoreMachine:
    return ScoreMachine(PatchDatabase.from_arrays(IMAGES, LABELS), "ELS", "zeros", "torch")


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers", reason="diffusers is not installed (extra diffusers)")


@pytest.fixture(scope="module")
def k_diffusion() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import k_diffusion
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"k-diffusion cannot be imported: {error}")
    return k_diffusion


def noise(batch: int = 2, seed: int = 5) -> Tensor:
    return torch.stack([initial_noise(seed, index, SHAPE) for index in range(batch)])


def mean_of(machine: ScoreMachine, **options: object) -> Mean:
    """The posterior mean with sizes 3 (calibrated at t = 1/2) and 5 (at t = 1), chosen by hand."""

    def mean(x: Tensor, alpha: float, sigma: float) -> Tensor:
        t = math.atan2(sigma, alpha) / (math.pi / 2) * 1.008
        size = 3 if t <= 0.75 else 5
        return machine.posterior(x, alpha=alpha, sigma=sigma, patch_size=size, **options).mean

    return mean


def scales(kept: float) -> tuple[float, float]:
    return math.sqrt(kept), math.sqrt(1 - kept)


# The samplers, from their papers. `timesteps` count down; after the last comes the clean image.


def ddim(mean: Mean, x: Tensor, timesteps: list[float], _: torch.Generator) -> Trajectory:
    """arXiv 2010.02502, equation 12 without fresh noise."""
    after = [*timesteps[1:], None]
    for t, following in zip(timesteps, after, strict=True):
        alpha, sigma = scales(KEPT[int(t)])
        next_alpha, next_sigma = (1, 0) if following is None else scales(KEPT[int(following)])
        clean = mean(x, alpha, sigma)
        x = next_alpha * clean + next_sigma * (x - alpha * clean) / sigma
        yield x


def ddpm(mean: Mean, x: Tensor, timesteps: list[float], generator: torch.Generator) -> Trajectory:
    """arXiv 2006.11239, equations 6 and 7, from step to step of a coarser chain."""
    after = [*timesteps[1:], None]
    for t, following in zip(timesteps, after, strict=True):
        kept, kept_next = KEPT[int(t)], 1.0 if following is None else KEPT[int(following)]
        step = kept / kept_next
        clean = mean(x, *scales(kept))
        x = (
            math.sqrt(kept_next) * (1 - step) / (1 - kept) * clean
            + math.sqrt(step) * (1 - kept_next) / (1 - kept) * x
        )
        if following is not None:
            variance = (1 - kept_next) / (1 - kept) * (1 - step)
            fresh = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x + math.sqrt(variance) * fresh
        yield x


def dpm_solver(mean: Mean, x: Tensor, timesteps: list[float], _: torch.Generator) -> Trajectory:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2; the first and last step of order 1."""
    past: list[tuple[float, Tensor]] = []
    after = [*timesteps[1:], None]
    for t, following in zip(timesteps, after, strict=True):
        alpha, sigma = scales(KEPT[int(t)])
        past.append((math.log(alpha / sigma), mean(x, alpha, sigma)))
        (here, clean) = past[-1]
        if following is None:
            yield clean
            return
        next_alpha, next_sigma = scales(KEPT[int(following)])
        h = math.log(next_alpha / next_sigma) - here
        data = clean
        if len(past) > 1:
            before, clean_before = past[-2]
            half = h / (2 * (here - before))
            data = (1 + half) * clean - half * clean_before
        x = next_sigma / sigma * x - next_alpha * math.expm1(-h) * data
        yield x


def euler(mean: Mean, x: Tensor, timesteps: list[float], _: torch.Generator) -> Trajectory:
    """The probability flow dx/dsigma = (x - D(x, sigma)) / sigma, where x = x_0 + sigma * eps."""
    table = np.sqrt((1 - KEPT) / KEPT)
    sigmas = [*np.interp(timesteps, np.arange(1000), table), 0.0]
    yield from probability_flow(mean, x, sigmas)


def probability_flow(mean: Mean, x: Tensor, sigmas: list[float]) -> Trajectory:
    for sigma, following in pairwise(sigmas):
        scale = math.hypot(1, sigma)
        clean = mean(x / scale, 1 / scale, sigma / scale)
        x = x + (following - sigma) * (x - clean) / sigma
        yield x


def require_same(drawn: list[Tensor], expected: Trajectory, *, atol: float = 1e-5) -> None:
    """After every step: at the last one alone, small noise would hide what went wrong before."""
    wanted = list(expected)
    assert len(drawn) == len(wanted) == STEPS
    for x, right in zip(drawn, wanted, strict=True):
        # Where x holds much noise it is rounded to as many digits.
        scale = max(1.0, float(right.abs().max()))
        torch.testing.assert_close(x.double(), right, atol=atol * scale, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        pytest.param("DDIMScheduler", {"clip_sample": False}, ddim, id="ddim"),
        pytest.param("DDPMScheduler", {"clip_sample": False}, ddpm, id="ddpm"),
        pytest.param("DPMSolverMultistepScheduler", {}, dpm_solver, id="dpm-solver"),
        pytest.param("EulerDiscreteScheduler", {}, euler, id="euler"),
    ],
)
@pytest.mark.thinned
def test_a_scheduler_does_what_its_paper_says(
    diffusers, machine, name, options, formula, prediction
) -> None:
    scheduler = getattr(diffusers, name)(prediction_type=prediction, **options)
    model = ELSModel(machine, [3, 5], scheduler=scheduler)
    assert model.prediction_type == prediction
    scheduler.set_timesteps(STEPS)
    start = noise() * scheduler.init_noise_sigma
    x, drawn = start, []
    generator = torch.Generator().manual_seed(1)
    fresh = {"generator": generator} if name == "DDPMScheduler" else {}
    for t in scheduler.timesteps:
        predicted = model(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(predicted, t, x, **fresh).prev_sample
        drawn.append(x)
    generator = torch.Generator().manual_seed(1)
    require_same(drawn, formula(mean_of(machine), start, scheduler.timesteps.tolist(), generator))


@pytest.fixture(scope="module")
def real() -> tuple[ScoreMachine, Tensor]:
    """A machine of real images, and what our sampler draws with it."""
    images = next(iter(open_source("embedded:fashion-mnist").chunks(128)))[:128]
    machine = ScoreMachine(PatchDatabase.from_arrays(np.asarray(images)), "ELS", "zeros")
    return machine, sample(machine, n=2, steps=20, patch_sizes="fashion-mnist-resnet", seed=0)


@pytest.mark.parametrize("is_exact", [True, False], ids=["float64-table", "as-shipped"])
@pytest.mark.parametrize(
    ("training_steps", "spacing"),
    [pytest.param(20, "leading", id="20"), pytest.param(1000, "trailing", id="1000")],
)
def test_ddim_through_diffusers_is_our_sampler(
    diffusers, real, training_steps, spacing, is_exact
) -> None:
    machine, ours = real
    betas = trained_betas(Cosine(), training_steps)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=training_steps,
        trained_betas=betas,
        clip_sample=False,
        timestep_spacing=spacing,
    )
    if is_exact:
        scheduler.alphas_cumprod = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    model = ELSModel(machine, "fashion-mnist-resnet", scheduler=scheduler)
    x = torch.stack([initial_noise(0, index, machine.db.shape) for index in range(2)])
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    error = (x - ours).abs()
    # As shipped, the noise levels are off by some 1e-6, and so are most pixels; one whose patches
    # are about to change places multiplies that by a hundred.
    assert float(error.mean()) < 1e-6
    assert float(error.max()) < (1e-5 if is_exact else 1e-3)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_pipelines_take_the_model(diffusers, machine, name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(clip_sample=False)
    model = ELSModel(machine, 3, scheduler=scheduler)
    pipeline = getattr(diffusers, f"{name}Pipeline")(unet=model, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.to("cpu") is pipeline
    assert pipeline.unet is model
    drawn = pipeline(
        batch_size=3,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(2),
        output_type="pt",
    ).images
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, *SHAPE, generator=generator)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x, generator=generator).prev_sample
    assert torch.equal(drawn, (x / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["IS", "ES", "LS", "ELS"])
def test_a_prediction_is_the_oracles(kind: str, prediction: str) -> None:
    machine = ScoreMachine(PatchDatabase.from_arrays(IMAGES), kind, "circular", "torch")
    model = ELSModel(machine, 3, scheduler=KEPT, prediction_type=prediction)
    alpha, sigma = scales(KEPT[250])
    x = alpha * torch.from_numpy(IMAGES[:1] / 127.5 - 1) + sigma * noise(1)
    expected = oracle.posterior(
        IMAGES,
        x[0].numpy(),
        alpha=alpha,
        sigma=sigma,
        kind=kind,
        boundary="circular",
        patch_size=3,
    ).mean
    eps = (x[0].numpy() - alpha * expected) / sigma
    answers = {"epsilon": eps, "sample": expected, "v_prediction": alpha * eps - sigma * expected}
    np.testing.assert_allclose(model(x, 250).sample[0], answers[prediction], atol=1e-9)


def test_every_row_has_its_own_noise_size_and_class(machine: ScoreMachine) -> None:
    model = ELSModel(machine, [3, 5], scheduler=KEPT, prediction_type="sample")
    x = noise(4)
    timesteps = torch.tensor([20, 900, 30, 800])
    labels = torch.tensor([2, 0, 1, 2])
    together = model(x, timesteps, class_labels=labels).sample
    for row in range(4):
        mean = mean_of(machine, labels=int(labels[row]))
        alone = mean(x[row : row + 1], *scales(KEPT[int(timesteps[row])]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)
    only_ones = ELSModel(machine, [3, 5], scheduler=KEPT, prediction_type="sample", labels=1)
    assert torch.equal(only_ones(x[2:3], 30).sample, together[2:3])


def test_between_timesteps_noise_is_interpolated_as_the_scheduler_does(diffusers, machine) -> None:
    for option in ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}):
        # Few timesteps lie far apart, so that the two ways differ.
        scheduler = diffusers.EulerDiscreteScheduler(30, beta_end=0.3, **option)
        scheduler.set_timesteps(7)
        model = ELSModel(machine, 3, scheduler=scheduler)
        assert (scheduler.timesteps.frac() != 0).any()
        alpha, sigma = model._noise.at(scheduler.timesteps, 7)
        # A float32 timestep of 30 is known to 2e-6, where log sigma moves 0.2 a timestep.
        torch.testing.assert_close(
            sigma / alpha, scheduler.sigmas[:-1].double(), rtol=2e-6, atol=0, msg=str(option)
        )
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(7, dtype=torch.float64))


def test_pure_noise_is_a_noise_level(diffusers, machine) -> None:
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    model = ELSModel(machine, 3, scheduler=scheduler)
    # alpha = 0: the mean is that of all patches, and v is its negative.
    x = noise(2)
    v = model(x, 999).sample
    assert torch.equal(v[0], v[1])
    clean = torch.from_numpy(IMAGES / 127.5 - 1)
    torch.testing.assert_close(-v[0, :, 3, 3], clean[:, :, 1:-1, 1:-1].mean(dim=(0, 2, 3)))


def test_what_pipelines_read(machine: ScoreMachine) -> None:
    model = ELSModel(machine, 3, scheduler=KEPT)
    assert model.prediction_type == "epsilon"
    assert model.config.sample_size == (HEIGHT, WIDTH)
    assert model.config["in_channels"] == model.config.get("out_channels") == CHANNELS
    assert model.config.num_class_embeds == 3
    assert not hasattr(model.config, "cross_attention_dim")
    assert model.device == torch.device("cpu")
    assert (model.dtype, model.to(torch.float64).dtype) == (torch.float32, torch.float64)
    assert not model.state_dict()
    with pytest.raises(ValueError, match=r"cannot move to meta; make it from ScoreMachine"):
        model.to("meta")
    assert model.device == torch.device("cpu")
    x = noise().to(torch.bfloat16)
    answer = model(x, 500, return_dict=False)[0]
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), model(x.float(), 500).sample, rtol=2**-8, atol=0)


def test_tolerances_reach_the_machine(monkeypatch) -> None:
    machine = ScoreMachine(PatchDatabase.from_arrays(IMAGES), "ELS", "zeros", "torch")
    asked: list[dict[str, object]] = []
    exact = machine.posterior

    def record(x: Tensor, **options: object) -> object:
        approximation = {name: options.pop(name) for name in ("mode", "tolerance", "seed")}
        asked.append(approximation | {"patch_size": options["patch_size"]})
        return exact(x, **options)

    monkeypatch.setattr(machine, "posterior", record)
    denoiser = EDMDenoiser(machine, [3, 5], tolerance=0.2, seed=1)
    denoiser(noise(3), torch.tensor([0.1, 9.0, 0.1], dtype=torch.float64))
    assert [question["patch_size"] for question in asked] == [3, 5]
    assert all((q["mode"], q["tolerance"]) == ("auto", 0.2) for q in asked)
    # Every row and noise level has a subset of its own, the same whenever it is asked again.
    seeds = asked[0]["seed"] + asked[1]["seed"]
    assert len(set(seeds)) == 3
    asked.clear()
    denoiser(noise(3), 0.1)
    assert asked[0]["seed"][::2] == seeds[:2]
    assert asked[0]["seed"][1] not in seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_denoiser_is_the_oracles(machine: ScoreMachine, dtype: torch.dtype) -> None:
    denoiser = EDMDenoiser(machine, [3, 5])
    sigmas = torch.tensor([0.05, 0.7, 80.0], dtype=torch.float64)
    x = torch.from_numpy(IMAGES[:3] / 127.5 - 1) + sigmas.reshape(-1, 1, 1, 1) * noise(3)
    labels = torch.tensor([0, 1, 2])
    answer = denoiser(x.to(dtype), sigmas.to(dtype), labels)
    assert answer.dtype == dtype
    for row, (sigma, size) in enumerate(zip(sigmas.tolist(), (3, 3, 5), strict=True)):
        expected = oracle.posterior(
            IMAGES,
            x[row].numpy(),
            alpha=1.0,
            sigma=sigma,
            kind="ELS",
            boundary="zeros",
            patch_size=size,
            members=np.flatnonzero(labels[row].item() == LABELS),
        ).mean
        # float32: x itself is rounded, to 80 * 2^-24 = 5e-6 where sigma is 80, far less elsewhere.
        tolerance = 1e-9 if dtype == torch.float64 else 2e-5
        np.testing.assert_allclose(answer[row], expected, atol=tolerance)
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    again = denoiser(x.to(dtype), sigmas.to(dtype).reshape(-1, 1, 1, 1), one_hot)
    assert torch.equal(again, answer)


def test_the_denoiser_in_diffusers_edm_scheduler(diffusers, machine) -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.02, sigma_max=20.0, sigma_data=0.5)
    scheduler.set_timesteps(STEPS)
    denoiser = EDMDenoiser(machine, [3, 5])
    start = noise() * float(scheduler.sigmas[0])
    x, drawn = start, []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        scheduler.scale_model_input(x, t)
        # The scheduler wants a network's raw output: EDM's preconditioning (table 1), undone.
        total = math.hypot(sigma, 0.5)
        raw = (denoiser(x, sigma) - (0.5 / total) ** 2 * x) / (0.5 * sigma / total)
        x = scheduler.step(raw, t, x).prev_sample
        drawn.append(x)
    require_same(drawn, probability_flow(mean_of(machine), start, scheduler.sigmas.tolist()))


def test_the_denoiser_in_k_diffusion(k_diffusion, machine) -> None:
    sampling = k_diffusion.sampling
    sigmas = sampling.get_sigmas_karras(STEPS, 0.02, 20.0).double()
    start = noise() * sigmas[0]
    denoiser = EDMDenoiser(machine, [3, 5])
    seen: list[Tensor] = []
    last = sampling.sample_euler(
        denoiser, start, sigmas, callback=lambda step: seen.append(step["x"]), disable=True
    )
    expected = probability_flow(mean_of(machine), start, sigmas.tolist())
    require_same([*seen[1:], last], expected, atol=1e-9)
    labels = torch.tensor([1, 1])
    drawn = sampling.sample_dpmpp_2m(
        denoiser, start, sigmas, extra_args={"class_labels": labels}, disable=True
    )
    assert drawn.isfinite().all()
    others = EDMDenoiser(machine, [3, 5], labels=1)
    assert torch.equal(drawn, sampling.sample_dpmpp_2m(others, start, sigmas, disable=True))
    for name in ("sample_heun", "sample_dpm_2", "sample_lms", "sample_dpmpp_2s_ancestral"):
        torch.manual_seed(0)
        drawn = getattr(sampling, name)(denoiser, start, sigmas, disable=True)
        # Whatever the sampler, its last step ends on a mean of training pixels.
        assert drawn.abs().max() < 1.05, name


@given(
    name=st.sampled_from(sorted(PATCH_SIZES)),
    steps=st.integers(1, 120),
    scale=st.floats(1e-3, 1e3),
    data=st.data(),
)
def test_sizes_by_noise_are_the_samplers(name, steps, scale, data) -> None:
    i = data.draw(st.integers(1, steps))
    alpha, sigma = Cosine().alpha(i / steps), Cosine().sigma(i / steps)
    rule = SizesByNoise(PATCH_SIZES[name])
    assert rule.at(scale * alpha, scale * sigma) == patch_sizes_for(name, steps)[i - 1]


@pytest.mark.parametrize("rounding", [-1e-6, 0.0, 1e-6])
def test_levels_between_two_take_the_lower_noise_whatever_rounding_does(rounding: float) -> None:
    sizes = tuple(range(1, 41, 2))
    rule = SizesByNoise(sizes)
    for i in range(1, 40, 2):
        alpha, sigma = Cosine().alpha(i / 40), Cosine().sigma(i / 40)
        assert rule.at(alpha, sigma * (1 + rounding)) == sizes[max(0, i // 2 - 1)]


def test_sizes_beyond_the_calibrated_levels_are_the_outermost() -> None:
    rule = SizesByNoise((1, 3, 5), Exponential(0.1, 0.9))
    assert [rule.at(1, sigma) for sigma in (1e-6, 1e6)] == [1, 5]
    for level, size in enumerate(rule.sizes, 1):
        assert rule.at(rule.schedule.alpha(level / 3), rule.schedule.sigma(level / 3)) == size


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), Exponential()], ids=lambda s: s.name)
def test_trained_betas_make_the_schedule(schedule) -> None:
    betas = np.array(trained_betas(schedule, 30))
    assert ((betas > 0) & (betas < 1)).all()
    expected = [schedule.alpha(i / 30) ** 2 for i in range(1, 31)]
    np.testing.assert_allclose(np.cumprod(1 - betas), expected, rtol=1e-12)


class Scheduler:
    """Something with the attributes of a diffusers scheduler."""

    def __init__(self, **config: object) -> None:
        self.alphas_cumprod = torch.from_numpy(KEPT)
        self.config = config


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        pytest.param({"scheduler": "ddim"}, TypeError, "alphas_cumprod", id="scheduler"),
        pytest.param({"scheduler": [[0.5]]}, ValueError, r"must be \[T\]", id="shape"),
        pytest.param({"scheduler": [1.0, 0.5]}, ValueError, "below 1", id="no-noise"),
        pytest.param(
            {"scheduler": Scheduler(use_flow_sigmas=True)}, ValueError, "use_flow", id="flow"
        ),
        pytest.param(
            {"scheduler": Scheduler(prediction_type="sample"), "prediction_type": "epsilon"},
            ValueError,
            "reads predictions as 'sample'",
            id="disagree",
        ),
        pytest.param({"prediction_type": "x0"}, ValueError, "v_prediction", id="prediction"),
        pytest.param({"patch_sizes": None}, ValueError, "fashion-mnist-resnet", id="no-sizes"),
        pytest.param({"patch_sizes": [3, 9]}, ValueError, "shorter side", id="size-too-large"),
        pytest.param({"labels": 9}, ValueError, "9", id="label"),
        pytest.param({"tolerance": 0}, ValueError, "tolerance", id="tolerance"),
        pytest.param({"seed": -1}, ValueError, "seed=-1", id="seed"),
        pytest.param({"sizes_schedule": "cosine"}, TypeError, "Cosine", id="sizes-schedule"),
        pytest.param({"machine": "ELS"}, TypeError, "ScoreMachine", id="machine"),
    ],
)
def test_wrong_models_are_refused(machine, options, error, words) -> None:
    options = {"machine": machine, "patch_sizes": 3, "scheduler": KEPT} | options
    with pytest.raises(error, match=words):
        ELSModel(options.pop("machine"), options.pop("patch_sizes"), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        pytest.param((noise(), 1000), ValueError, "outside 0 to 999", id="timestep-high"),
        pytest.param((noise(), -1), ValueError, "outside 0 to 999", id="timestep-low"),
        pytest.param((noise(), math.nan), ValueError, "outside 0 to 999", id="timestep-nan"),
        pytest.param((noise(), torch.arange(3)), ValueError, "timestep has 3", id="timesteps"),
        pytest.param((noise().numpy(), 5), TypeError, "must be a tensor", id="array"),
        pytest.param((noise()[0], 5), ValueError, r"\[B, C, H, W\]", id="shape"),
        pytest.param(
            (noise(), torch.tensor([5, 900]), torch.arange(3)), ValueError, "has 3", id="labels"
        ),
        pytest.param((noise(), 5, torch.tensor([0, 9])), ValueError, "9", id="label"),
    ],
)
def test_wrong_inputs_are_refused(machine, arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        ELSModel(machine, [3, 5], scheduler=KEPT)(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        pytest.param((noise(), 0.0), ValueError, "sigma", id="no-noise"),
        pytest.param((noise(), torch.ones(3)), ValueError, "sigma has 3", id="sigmas"),
        pytest.param((noise(), 1.0, torch.ones(2, 3)), ValueError, "one-hot", id="one-hot"),
    ],
)
def test_wrong_noise_is_refused(machine, arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        EDMDenoiser(machine, 3)(*arguments)
