"""Networks as denoisers: the sampler's own loop runs them, from the noise of the same seeds.

Three kinds of network are opened by name: a folder that ``els train`` made (or ``embedded:NAME``),
a folder of a diffusers UNet2DModel, and ``module:function``, any function of yours that returns a
``torch.nn.Module`` with ``(t, x, label) -> epsilon``.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from els.engine.devices import device_named
from els.engine.schedule import Cosine, Linear, Schedule
from els.index import PatchDatabase
from els.networks.architecture import Padding
from els.networks.folders import EMBEDDED, NetworkError, network_folder, tensor_shapes
from els.networks.training import load
from els.networks.unet import unet2d_model
from els.storage.manifests import read_json

_MANIFEST = "network.json"
_DIFFUSERS = "config.json"


@dataclass(frozen=True)
class Network:
    """A trained network and what it needs to be asked.

    Attributes:
        module: ``(t, x, label) -> epsilon``, in evaluation mode: times float32 ``[B]``, images
            float32 ``[B, C, H, W]``, labels int64 ``[B]`` or None; answers ``[B, C, H, W]``.
        schedule: the noise that its t stands for.
        num_classes: of a class-conditional network, 0 for none.
        padding: of its convolutions, None where it is not known.
        content_hash: of the data that it was trained on, None where it is not known.
        description: how it was made, plain values for a JSON file.
    """

    module: nn.Module
    schedule: Schedule
    num_classes: int
    padding: Padding | None
    content_hash: str | None
    description: dict[str, Any]

    def __repr__(self) -> str:
        weights = sum(value.numel() for value in self.module.parameters())
        parts = [type(self.module).__name__, f"{weights:,} weights", self.schedule.name]
        parts += [f"{self.num_classes} classes"] if self.num_classes else []
        parts += [self.padding] if self.padding is not None else []
        return f"Network({', '.join(parts)})"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the weights: names the network in results.

        Of what ``get_extra_state`` adds, tensors and plain values count, and of anything else its
        type alone.
        """
        digest = hashlib.sha256()
        with _foreign("the network has no fingerprint", "its state_dict() must return its weights"):
            state = dict(self.module.state_dict())
        for name, value in state.items():
            for part in _parts(name, value):
                digest.update(part)
        return digest.hexdigest()

    @classmethod
    def of(
        cls, module: nn.Module, *, schedule: Schedule | None = None, num_classes: int = 0
    ) -> Network:
        """Any module with ``(t, x, label) -> epsilon``.

        Args:
            module: see the class.
            schedule: the noise that t stands for; the paper's cosine if None.
            num_classes: of a class-conditional network.

        Raises:
            TypeError: for what is no module.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module must be a torch.nn.Module with (t, x, label) -> epsilon, got "
                f"{_kind_of(module)}"
            )
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        module = module.eval().requires_grad_(False)
        return cls(module, schedule or Cosine(), num_classes, None, None, {"module": name})


def _parts(name: str, value: object) -> Iterator[bytes]:
    """What a value of a state contributes to its fingerprint; the same in every process."""
    match value:
        case Tensor():
            yield f"{name} {value.dtype} {tuple(value.shape)}\n".encode()
            plain = value.detach().cpu()
            if plain.layout != torch.strided:
                plain = plain.to_dense()
            yield plain.reshape(-1).resolve_conj().resolve_neg().view(torch.uint8).numpy().tobytes()
        case dict():
            for key in sorted(value, key=repr):
                yield from _parts(f"{name}[{key!r}]", value[key])
        case list() | tuple():
            for place, item in enumerate(value):
                yield from _parts(f"{name}[{place}]", item)
        case None | bool() | int() | float() | complex() | str() | bytes():
            yield f"{name} {value!r}\n".encode("utf-8", "surrogatepass")
        case _:
            yield f"{name} {type(value).__module__}.{type(value).__qualname__}\n".encode()


def _kind_of(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def _foreign(what: str, remedy: str) -> Iterator[None]:
    """Context of a user's code: every exception becomes one message, with the error as cause."""
    try:
        yield
    # A module that is a script may end the program when it is imported.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise NetworkError(f"{what}: {type(error).__name__}: {reason}; {remedy}") from error


def open_network(name: str | Path) -> Network:
    """A network by its name; see the module.

    Raises:
        NetworkError: if there is none, or it is damaged.
        RuntimeError: without the packages that it needs.
    """
    text = str(name)
    if text.startswith(EMBEDDED) or (Path(text) / _MANIFEST).exists():
        return _trained(text)
    if (Path(text) / _DIFFUSERS).exists() or (Path(text) / "unet" / _DIFFUSERS).exists():
        return _diffusers(Path(text))
    module, separator, function = text.partition(":")
    if separator and not Path(text).exists():
        return _made(text, module, function)
    raise NetworkError(
        f"network={text!r} is none: give a folder with {_MANIFEST} (els train makes one) or a "
        f"diffusers {_DIFFUSERS}, {EMBEDDED}NAME, or module:function"
    )


@final
class NetworkDenoiser:
    """A network as what the sampler asks: ``mean = (x - sigma * epsilon) / alpha``.

    The mean is not clipped by default, as in the paper's procedure: DDIM with an unclipped mean is
    DDIM with the network's epsilon, also at t = 1, where alpha is 0.012 and the mean magnifies the
    network's error 80 times.

    Args:
        network: see there; its t is the one whose noise is that of the query.
        db: the training images: their shape, and their classes.
        clip: keep the mean in [-1, 1].
        device: where the network computes and queries live; None for a GPU if there is one.
    """

    kind = "network"
    is_local = False

    def __init__(
        self,
        network: Network,
        db: PatchDatabase,
        *,
        clip: bool = False,
        device: str | None = None,
    ) -> None:
        self.network, self.db, self.clip = network, db, clip
        self.device = device_named(device)
        network.module.to(self.device)

    def __repr__(self) -> str:
        clip = ", clip" if self.clip else ""
        return f"NetworkDenoiser({self.network!r}, {self.device}{clip})"

    def posterior(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | Tensor | None = None,
        entropy: bool = True,
    ) -> NetworkAnswer:
        """The network's estimate of the clean images.

        Args:
            x: noisy images, float32 ``[B, C, H, W]``.
            alpha: signal scale, one for all images, > 0.
            sigma: noise standard deviation, one for all images, > 0.
            patch_size: not used.
            labels: class of each image, ``[B]``, of a class-conditional network.
            entropy: not used.

        Raises:
            ValueError: for an alpha or a sigma that is not above 0, labels that are missing or not
                wanted, or an answer that is not the noise.
            NetworkError: if the network fails.
        """
        alpha, sigma = float(alpha), float(sigma)
        if not (alpha > 0 and sigma > 0):
            raise ValueError(f"alpha={alpha} and sigma={sigma} must be > 0")
        if (labels is None) != (self.network.num_classes == 0):
            raise ValueError(
                f"the network has {self.network.num_classes} classes, labels "
                f"{'are missing' if labels is None else 'were given'}"
            )
        # Networks know noise that preserves variance; any other is that, scaled.
        scale = float(np.hypot(alpha, sigma))
        t = self.network.schedule.time(alpha, sigma)
        times = torch.full((len(x),), t, dtype=torch.float32, device=self.device)
        label = None
        if labels is not None:
            label = torch.as_tensor(labels, device=self.device).expand(len(x))
        with (
            torch.inference_mode(),
            _foreign(
                "the network fails",
                f"it is called with (t, x, label): {tuple(times.shape)}, {tuple(x.shape)}, "
                f"{'None' if label is None else tuple(label.shape)}",
            ),
        ):
            epsilon = self.network.module(times, x.float() / scale, label)
        _require_noise(epsilon, x, t)
        # In float64, as the sampler's own trajectory: x and sigma * epsilon cancel where t is high.
        mean = (x.cpu().double() - sigma * epsilon.cpu().double()) / alpha
        return NetworkAnswer(mean.clamp(-1, 1) if self.clip else mean)


def _require_noise(answer: object, x: Tensor, t: float) -> None:
    """Refuses what a network must not answer."""
    if not isinstance(answer, Tensor):
        raise ValueError(
            f"the network answers {_kind_of(answer)}, not a tensor; wrap it in a module that "
            "returns the noise alone"
        )
    if answer.shape != x.shape:
        raise ValueError(
            f"the network answers {tuple(answer.shape)} to images {tuple(x.shape)}; it must "
            "answer the noise, of the same shape"
        )
    if not answer.is_floating_point():
        raise ValueError(f"the network answers {answer.dtype}; it must answer floating numbers")
    if not bool(answer.isfinite().all()):
        raise ValueError(
            f"the network answers numbers that are not finite at t={t:g}; its weights are damaged, "
            "or it computes with too few bits"
        )


@dataclass(frozen=True)
class NetworkAnswer:
    """What the sampler takes of a posterior.

    Attributes:
        mean: the network's estimate of the clean images, float64 on the CPU, ``[B, C, H, W]``.
    """

    mean: Tensor


@final
class Diffusers(nn.Module):
    """A diffusers UNet2DModel as ``(t, x, label) -> epsilon``.

    Args:
        unet: the model.
        prediction: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``: what its scheduler says that
            it answers.
        schedule: what t stands for.
        ratios: sigma / alpha of its timesteps 0, 1, ..., ascending.
    """

    def __init__(
        self, unet: nn.Module, prediction: str, schedule: Schedule, ratios: Tensor
    ) -> None:
        super().__init__()
        self.unet, self.prediction, self.schedule = unet, prediction, schedule
        self.ratios = ratios.double().log().numpy()

    def forward(self, t: Tensor, x: Tensor, label: Tensor | None = None) -> Tensor:
        """See :class:`Network`; t becomes the timestep, a fraction, of the same noise."""
        time = float(t[0])
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        steps = np.arange(len(self.ratios))
        step = float(np.interp(np.log(sigma / alpha), self.ratios, steps))
        # As a tensor: of a plain number the model would take the integer below.
        timestep = torch.full_like(t, step)
        answer: Tensor = self.unet(x, timestep, class_labels=label, return_dict=False)[0]
        match self.prediction:
            case "epsilon":
                return answer
            case "v_prediction":
                return sigma * x + alpha * answer
            case _:
                return (x - alpha * answer) / sigma


def _trained(name: str) -> Network:
    folder = network_folder(name)
    module, manifest = load(folder)
    description = {part: manifest[part] for part in ("network", "training", "data", "trained")}
    return Network(
        module,
        module.config.noise,
        module.config.num_classes,
        module.config.padding,
        manifest["data"].get("content_hash"),
        description,
    )


def _diffusers(path: Path) -> Network:
    """A UNet2DModel's folder, or that of a pipeline with its scheduler.

    The timestep is that of the query's noise in the scheduler's own table, so t may be of any
    schedule; Linear, which is DDPM's, or the paper's cosine.
    """
    is_pipeline = (path / "unet" / _DIFFUSERS).exists()
    folder = path / "unet" if is_pipeline else path
    config = _described(folder / _DIFFUSERS)
    if config.get("_class_name") != "UNet2DModel":
        raise NetworkError(
            f"{folder} holds a {config.get('_class_name')}, not a UNet2DModel; write a function "
            "that returns a module (t, x, label) -> epsilon, and give module:function"
        )
    model = unet2d_model()
    from diffusers import DDPMScheduler

    tables: Any = DDPMScheduler
    _require_size(model, config, folder)
    scheduler_file = path / ("scheduler" if is_pipeline else "") / "scheduler_config.json"
    described = _described(scheduler_file) if scheduler_file.exists() else {}
    remedy = "it must hold what diffusers' save_pretrained wrote"
    with _foreign(f"{path} cannot be opened", remedy), torch.device("cpu"):
        unet = model.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
        scheduler = tables.from_config(described)
        bars = scheduler.alphas_cumprod.double()
        ratios = ((1 - bars) / bars).sqrt()
    used = scheduler.config
    schedule: Schedule = Cosine()
    if used["beta_schedule"] == "linear":
        count = used["num_train_timesteps"]
        schedule = Linear(used["beta_start"] * count, used["beta_end"] * count)
    module = Diffusers(unet, used["prediction_type"], schedule, ratios)
    return Network(
        module.eval().requires_grad_(False),
        schedule,
        int(config.get("num_class_embeds") or 0),
        None,
        None,
        {"diffusers": config, "scheduler": described or "defaults of DDPMScheduler"},
    )


def _described(path: Path) -> dict[str, Any]:
    """What a JSON file of diffusers says."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise NetworkError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise NetworkError(f"{path} is damaged: it is no JSON object")
    return content


def _require_size(model: Any, config: dict[str, Any], folder: Path) -> None:
    """Refuses a config of a model larger than its weights, before anything of its size is made.

    Raises:
        NetworkError: it is, or the weights are missing or damaged.
    """
    # Of one file or of shards. Names are not compared: diffusers knows those of older versions.
    files = sorted(folder.glob("*.safetensors"))
    shapes = [shape for file in files for shape in tensor_shapes(file).values()]
    there = sum(math.prod(shape) for shape in shapes)
    blocks, layers = config.get("block_out_channels", []), config.get("layers_per_block", 1)
    remedy = f"{folder} must hold what diffusers' save_pretrained wrote"
    with _foreign(f"{folder / _DIFFUSERS} is damaged", remedy):
        # Every layer of every block has tensors of its own: more are not even counted.
        wanted = math.inf
        if len(blocks) * layers <= len(shapes):
            # Shapes without values take no memory.
            with torch.device("meta"):
                made = model.from_config(config)
            wanted = sum(value.numel() for value in made.state_dict().values())
    if wanted > there:
        raise NetworkError(
            f"the {there:,} weights in {folder} are too few for the model of {_DIFFUSERS}; {remedy}"
        )


def _made(name: str, module: str, function: str) -> Network:
    if "" not in sys.path:
        sys.path.insert(0, "")
    with _foreign(
        f"network={name!r}",
        "it must name a function without arguments in a module that can be imported",
    ):
        made = getattr(importlib.import_module(module), function)()
    if isinstance(made, Network):
        return made
    if not isinstance(made, nn.Module):
        raise NetworkError(
            f"network={name!r} returned {_kind_of(made)}; it must return a torch.nn.Module "
            "with (t, x, label) -> epsilon, or a Network"
        )
    return Network.of(made)
