"""Score machines as a UNet of diffusers, which need not be installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast, final, get_args

import numpy as np
import torch
from torch import Tensor

from els.engine.adapters.denoised import PatchSizes, PosteriorMean, one_per_image, widened
from els.engine.machines import ScoreMachine
from els.engine.sampler import require_count
from els.engine.schedule import Cosine, Schedule
from els.engine.smoothed import SmoothedDenoiser

PredictionType: TypeAlias = Literal["epsilon", "sample", "v_prediction"]

# These schedulers compute their timesteps from noise levels, along a straight line of log sigma.
_FROM_LOG_SIGMA = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)


def trained_betas(schedule: Schedule, steps: int) -> list[float]:
    """A noise schedule for a diffusers scheduler: ``beta_i = 1 - alpha(t_i)^2 / alpha(t_i-1)^2``.

    With ``DDIMScheduler(num_train_timesteps=steps, trained_betas=..., clip_sample=False)``,
    timestep i - 1 has the noise of t = i / steps, and ``steps`` inference steps are those of
    :func:`els.engine.sample`. So are S inference steps on ``steps`` = a multiple of S with
    ``timestep_spacing="trailing"``. The schedulers' default, ``clip_sample=True``, would clip
    what rounding moves out of [-1, 1].

    Args:
        schedule: preserves variance, as all of :mod:`els.engine.schedule` do.
        steps: the scheduler's ``num_train_timesteps``, >= 1.

    Returns:
        ``steps`` numbers in (0, 1), lowest noise first.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for steps < 1.
    """
    require_count("steps", steps, 1)
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a Schedule such as Cosine(), got {type(schedule).__name__}"
        )
    kept = [1.0, *(schedule.alpha(i / steps) ** 2 for i in range(1, steps + 1))]
    return [1 - after / before for before, after in pairwise(kept)]


class ModelOutput(NamedTuple):
    """What a UNet of diffusers returns.

    Attributes:
        sample: the prediction, ``[B, C, H, W]``.
    """

    sample: Tensor


@final
class ModelConfig(dict[str, Any]):
    """Read as ``config.in_channels``, ``config["in_channels"]`` and ``config.get(...)``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config of an ELSModel has no {name!r}") from None


@final
class ELSModel(torch.nn.Module):
    """A score machine where diffusers expects a ``UNet2DModel``; it has no weights.

    ``model(sample, timestep).sample`` with ``sample = alpha * x_0 + sigma * eps``, where
    ``alpha = sqrt(alphas_cumprod[timestep])`` and ``sigma = sqrt(1 - alphas_cumprod[timestep])``.
    It works in ``DDIMPipeline(unet=model, scheduler=scheduler)``, in ``DDPMPipeline``, and in a
    loop over ``scheduler.timesteps`` that calls ``scheduler.scale_model_input`` (which
    EulerDiscreteScheduler needs) before the model and ``scheduler.step`` after it.

    Between two timesteps, where Euler's lie, ``sigma / alpha`` is interpolated as the scheduler
    does it: linearly, or, if its timesteps come from ``use_karras_sigmas`` and the like, along a
    straight line of its logarithm. A scheduler that rounds such timesteps to integers
    (DPMSolverMultistepScheduler) tells any model a noise that is slightly off.

    Where the patch size comes from: :class:`~els.engine.patch_sizes.SizesByNoise`.

    Autograd can follow its predictions to the noisy images, as :meth:`ScoreMachine.posterior` says,
    but not with a tolerance.

    Args:
        machine: computes the posteriors; inputs must live on its device.
        patch_sizes: needed by LS and ELS: a calibrated table's name such as
            ``"fashion-mnist-resnet"``, one odd size, or one per noise level, lowest noise first.
        scheduler: a diffusers scheduler, or its ``alphas_cumprod`` ``[T]``, each in [0, 1).
        prediction_type: ``"epsilon"``, ``"sample"`` (the posterior mean) or ``"v_prediction"``
            (``alpha * eps - sigma * mean``); None for the scheduler's own, or else ``"epsilon"``.
        labels: draw only on training images of this class, its number or name, where
            ``class_labels`` are not given.
        sizes_schedule: the schedule at whose t = i / S the i-th of S sizes was calibrated.
        tolerance: let the posterior means be approximated to this mean absolute error, as in
            :func:`els.engine.sample`; None for exact ones.
        seed: of the approximations' subsets, which are drawn anew for every noise level and row
            of the batch.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a value out of range, or a prediction type that is not the scheduler's.
    """

    _anchor: Tensor

    def __init__(
        self,
        machine: ScoreMachine | SmoothedDenoiser,
        patch_sizes: PatchSizes | None = None,
        *,
        scheduler: Any,
        prediction_type: PredictionType | None = None,
        labels: int | str | None = None,
        sizes_schedule: Schedule = Cosine(),  # noqa: B008 - frozen, as in els.engine.sample
        tolerance: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._posterior = PosteriorMean(
            machine, patch_sizes, labels, sizes_schedule, tolerance, seed
        )
        self._noise = _NoiseOfTimesteps(scheduler)
        self.prediction_type = _prediction_of(scheduler, prediction_type)
        channels, height, width = machine.db.shape
        self.config = ModelConfig(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            num_class_embeds=None if machine.db.labels is None else machine.db.num_classes,
        )
        # What pipelines move and cast, and read device and dtype from.
        anchor = torch.empty(0, dtype=torch.float32, device=machine.device)
        self.register_buffer("_anchor", anchor, persistent=False)

    def extra_repr(self) -> str:
        """What ``repr`` says: the machine, the patch sizes and what is predicted."""
        return f"{self._posterior!r}, predicts {self.prediction_type}"

    @property
    def device(self) -> torch.device:
        """Where samples must live: the machine's."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """In which pipelines draw their noise; the model takes any floating dtype."""
        return self._anchor.dtype

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        machine = self._posterior.machine
        wanted = fn(self._anchor).device
        if wanted.type != machine.device.type:
            raise ValueError(
                f"this model computes on {machine.device} with {machine.backend} and cannot move "
                f"to {wanted}; make it from ScoreMachine(..., device={str(wanted)!r})"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> ModelOutput:
        """Predict, as ``UNet2DModel`` does.

        Args:
            sample: noisy images, floating, ``[B, C, H, W]``.
            timestep: one for all or ``[B]``, 0 to T - 1; may be fractional.
            class_labels: ints ``[B]``: only training images of each row's class are drawn on.
            return_dict: ignored: the named tuple that is returned serves both ways.

        Raises:
            TypeError: for a wrong type.
            ValueError: for a wrong shape, or a value out of range.
        """
        wide = widened(sample)
        alpha, sigma = self._noise.at(timestep, len(sample))
        mean = self._posterior(wide, alpha, sigma, class_labels)
        a, s = (scale.to(wide.device, wide.dtype).reshape(-1, 1, 1, 1) for scale in (alpha, sigma))
        match self.prediction_type:
            case "epsilon":
                prediction = (wide - a * mean) / s
            case "sample":
                prediction = mean
            case "v_prediction":
                prediction = a * (wide - a * mean) / s - s * mean
        return ModelOutput(prediction.to(sample.dtype))


@final
class _NoiseOfTimesteps:
    """Alpha and sigma of every timestep that a scheduler may name."""

    def __init__(self, scheduler: Any) -> None:
        config = getattr(scheduler, "config", {})
        if config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
            raise ValueError(
                "the scheduler's timesteps are not places in its alphas_cumprod (use_flow_sigmas, "
                "or timestep_type='continuous'); leave that option off"
            )
        kept = getattr(scheduler, "alphas_cumprod", scheduler)
        if not isinstance(kept, Tensor | np.ndarray | Sequence) or isinstance(kept, str):
            raise TypeError(
                "scheduler must be a diffusers scheduler with alphas_cumprod, or alphas_cumprod "
                f"itself [T], got {type(scheduler).__name__}"
            )
        self._kept = torch.as_tensor(kept, dtype=torch.float64, device="cpu").detach()
        if self._kept.ndim != 1 or len(self._kept) == 0:
            raise ValueError(f"alphas_cumprod has shape {tuple(self._kept.shape)}; it must be [T]")
        if not bool(((self._kept >= 0) & (self._kept < 1)).all()):
            raise ValueError(
                f"alphas_cumprod goes from {self._kept.min():g} to {self._kept.max():g}; each must "
                "be at least 0 and below 1: a machine needs some noise"
            )
        self._is_logarithmic = any(config.get(option) for option in _FROM_LOG_SIGMA)

    def at(self, timestep: Tensor | float | int, batch: int) -> tuple[Tensor, Tensor]:
        """Alpha and sigma, float64 ``[B]`` each."""
        t = one_per_image("timestep", timestep, batch)
        last = len(self._kept) - 1
        if not bool(((t >= 0) & (t <= last)).all()):
            raise ValueError(
                f"timestep={t.tolist()} is outside 0 to {last}: the model was made for a scheduler "
                f"with {last + 1} training timesteps"
            )
        below, above = t.floor().long(), t.ceil().long()
        kept, other = self._kept[below], self._kept[above]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        between = t - below
        low, high = ((1 - k).sqrt() / k.sqrt() for k in (kept, other))
        if self._is_logarithmic:
            ratio = (torch.lerp(low.log(), high.log(), between)).exp()
        else:
            ratio = torch.lerp(low, high, between)
        on_timestep = between == 0
        return (
            torch.where(on_timestep, alpha, (1 + ratio**2).rsqrt()),
            torch.where(on_timestep, sigma, (1 + ratio**-2).rsqrt()),
        )


def _prediction_of(scheduler: Any, wanted: str | None) -> PredictionType:
    configured = getattr(scheduler, "config", {}).get("prediction_type")
    chosen = wanted or configured or "epsilon"
    if chosen not in get_args(PredictionType):
        raise ValueError(
            f"prediction_type={chosen!r} is not known; choose one of "
            f"{', '.join(get_args(PredictionType))}"
        )
    if configured not in (None, chosen):
        raise ValueError(
            f"prediction_type={chosen!r}, but the scheduler reads predictions as {configured!r}; "
            "make the scheduler with the same prediction_type, or leave it off here"
        )
    return cast(PredictionType, chosen)
