"""Training to predict the noise: AdamW, a decaying rate, averaged weights, resumable to the bit.

The loss is the mean squared error of epsilon (arXiv 2006.11239, equation 14) at times drawn
uniformly from 0 to 1. Images, times and noise of a step depend on the seed and on the step alone,
so training that was killed goes on to the weights that it would have had.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from els.engine.devices import device_named, physical_memory
from els.engine.sampler import require_count
from els.index import PatchDatabase, decode
from els.index.database import short_hash
from els.networks.architecture import EpsilonNetwork, NetworkConfig, noise_scales
from els.networks.folders import (
    NetworkError,
    NetworkFolder,
    claimed,
    read_manifest,
    read_tensors,
    require_safetensors,
    tensor_shapes,
    write_manifest,
    write_tensors,
)
from els.networks.resnet import ResNet
from els.networks.trackers import Log, Tracker, require_tracker, tracked
from els.networks.unet import AttentionUNet, UNet
from els.storage.figures import optional_picture, write_figure
from els.storage.files import atomic_file, remove_stale, visible_names
from els.storage.manifests import package_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Precision: TypeAlias = Literal["float32", "bfloat16"]

# Seconds between two checkpoints, at most but for a single step that takes longer.
_CHECKPOINT_SECONDS = 60.0
# Seconds from the start to the first, so that a short try keeps something.
_FIRST_CHECKPOINT_SECONDS = 10.0
# Norm to which gradients are clipped.
_GRADIENT_NORM = 1.0
# Bytes of a weight in training: itself, its gradient, AdamW's two moments and the average.
_TRAINING_BYTES = 20
# Random streams of a seed: initial weights,
_INITIALISATION = 0
# order of the images,
_ORDER = 1
# noise and times of a batch.
_BATCH = 2


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained.

    Attributes:
        steps: batches in all.
        batch_size: images in a batch; every image is taken once before any is taken again.
        learning_rate: AdamW's, reached after ``warm_up`` steps.
        decay: what the rate is multiplied by from the first step to the last, exponentially.
        warm_up: steps over which the rate rises from 0.
        weight_decay: AdamW's.
        average: largest decay of the running average of the weights, which is what is used.
        seed: of the initial weights, the order of the images, times and noise.
        precision: of the convolutions; weights, averages and the loss are float32.
    """

    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 2e-3
    decay: float = 0.02
    warm_up: int = 100
    weight_decay: float = 0.01
    average: float = 0.999
    seed: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warm_up", 0)):
            require_count(name, getattr(self, name), least)
        require_count("seed", self.seed, 0, most=None)
        for name in ("learning_rate", "decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        for name in ("weight_decay", "average"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision={self.precision!r} is not known; choose one of "
                f"{', '.join(get_args(Precision))}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / (self.warm_up + 1))
        decayed: float = self.decay ** (step / self.steps)
        return self.learning_rate * warm * decayed


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training is.

    Attributes:
        step: steps that are done.
        steps: in all.
        loss: mean squared error of epsilon, the mean of the last hundred steps.
        seconds: processor time, all sessions, of all threads.
        kept: steps that are saved: what is left if training is stopped now.
    """

    step: int
    steps: int
    loss: float
    seconds: float
    kept: int = 0


def build(config: NetworkConfig) -> EpsilonNetwork:
    """A network with random weights, drawn from torch's generator."""
    match config.kind:
        case "resnet":
            return ResNet(config)
        case "unet":
            return UNet(config)
        case "attention-unet":
            return AttentionUNet(config)


def train_network(
    db: PatchDatabase,
    folder: str | Path,
    config: NetworkConfig,
    settings: TrainingSettings,
    *,
    device: str | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
    checkpoint_seconds: float = _CHECKPOINT_SECONDS,
    log: Tracker | None = None,
) -> NetworkFolder:
    """Train a network on all images of a database; called again, it resumes.

    Args:
        db: the training images, without augmentation: what the score machine compares with.
        folder: of the network; it and its parents are made.
        config: of the network; its shape is that of the images.
        settings: see there.
        device: where to train; None for a GPU if there is one.
        progress: called after every step.
        checkpoint_seconds: time between two writes of the folder; the first comes after 10 s, if
            that is sooner.
        log: also report loss and learning rate to ``"tensorboard"`` or ``"wandb"``.

    Returns:
        The folder, its weights finished.

    Raises:
        ValueError: if network and images do not fit, or the device is not there.
        NetworkError: if the folder holds something else or another training, or is in use.
        RuntimeError: if the loss is no longer finite, or without the packages that are needed.
        DiskFullError: (an OSError) no room; the last checkpoint is kept.
    """
    if config.shape != db.shape:
        raise ValueError(
            f"the network is for images of shape {config.shape}, the database has {db.shape}"
        )
    if config.num_classes and (db.labels is None or db.num_classes > config.num_classes):
        raise ValueError(
            f"num_classes={config.num_classes}, but the database has {db.num_classes} classes"
        )
    require_safetensors()
    require_tracker(log)
    place = device_named(device)
    _require_memory(config, settings)
    network = NetworkFolder(Path(folder))
    with claimed(network.path, "training in"):
        _start(network, db, config, settings)
        if not _is_finished(network, settings):
            with _explained(network, settings) as saves:
                training = _Training(db, network, config, settings, place)
                of_both = {"network": config.describe(), "training": asdict(settings)}
                with tracked(log, network.path, of_both, training.step) as tell:
                    training.run(progress, checkpoint_seconds, saves, tell)
        elif network.training.exists() and not (
            network.losses.exists() and network.picture.exists()
        ):
            # Whoever finished it may have been killed before the last of its files.
            tensors, _ = read_tensors(network.training)
            _report_losses(network, tensors["losses"].numpy(), _elapsed(tensors).numpy())
    return network


def _require_memory(config: NetworkConfig, settings: TrainingSettings) -> None:
    """Refuses a network that this machine cannot hold, before anything of its size is made.

    Raises:
        ValueError: not even its widest layers fit.
    """
    there = physical_memory()
    _, height, width = config.shape
    weights = 9 * config.layers * config.levels * config.channels**2
    features = settings.batch_size * config.channels * height * width
    needed = _TRAINING_BYTES * weights + 4 * features
    if there is not None and needed > there:
        raise ValueError(
            f"layers={config.layers}, channels={config.channels} and "
            f"batch_size={settings.batch_size} need {needed / 1e9:,.0f} GB and more, this machine "
            f"has {there / 1e9:,.0f}; give smaller ones"
        )


def load(folder: NetworkFolder) -> tuple[EpsilonNetwork, dict[str, Any]]:
    """A trained network, in evaluation mode, and its manifest.

    Raises:
        NetworkError: if it is missing or damaged.
        RuntimeError: without the packages that it needs.
    """
    manifest = read_manifest(folder)
    try:
        config = NetworkConfig.of(manifest["network"])
    except (KeyError, TypeError, ValueError) as error:
        raise NetworkError(f"{folder.manifest} is damaged: {error}") from error
    _require_fit(config, folder)
    with torch.device("cpu"):
        network = build(config)
    tensors, header = read_tensors(folder.weights)
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False), {**manifest, "trained": dict(header)}


def _require_fit(config: NetworkConfig, folder: NetworkFolder) -> None:
    """Refuses a config that is not that of the weights, before anything of its size is made.

    Raises:
        NetworkError: they do not fit, or the weights are missing or damaged.
    """
    there = tensor_shapes(folder.weights)
    misfit = f"{folder.weights} does not fit {folder.manifest}"
    # Every layer of every level has tensors of its own: more are not even counted.
    if config.layers * config.levels > len(there):
        raise NetworkError(
            f"{misfit}: it has {len(there)} tensors, too few for layers={config.layers} and "
            f"levels={config.levels}"
        )
    try:
        # Shapes without values take no memory.
        with torch.device("meta"):
            wanted = {
                name: tuple(value.shape) for name, value in build(config).state_dict().items()
            }
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        # Below its first line torch shows where in its own code it was.
        reason = str(error).partition("\n")[0]
        raise NetworkError(f"{folder.manifest} is damaged: {reason}") from error
    for name in sorted({*there, *wanted}):
        if there.get(name) != wanted.get(name):
            raise NetworkError(
                f"{misfit}: {name} is {_shape(there.get(name))} there, {_shape(wanted.get(name))} "
                "by the config"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _start(
    folder: NetworkFolder, db: PatchDatabase, config: NetworkConfig, settings: TrainingSettings
) -> None:
    """Writes the manifest, or makes sure that the one that is there is the same."""
    wanted = json.loads(
        json.dumps(
            {
                "network": config.describe(),
                "training": asdict(settings),
                "data": {"content_hash": db.content_hash, "images": len(db)},
            }
        )
    )
    remove_stale(folder.path)
    if not folder.manifest.exists():
        foreign = visible_names(folder.path)
        if foreign:
            raise NetworkError(
                f"{folder.path} is not empty and not a network (it has {foreign[0]!r}); "
                "give another folder"
            )
        versions = {"els-machine": package_version(), "torch": torch.__version__}
        write_manifest(folder, {**wanted, "versions": versions})
        return
    there = read_manifest(folder)
    differing = [
        f"{name} is {there.get(part, {}).get(name)!r} there, {value!r} here"
        for part, values in wanted.items()
        for name, value in values.items()
        if part != "data" and there.get(part, {}).get(name) != value
    ]
    if there["data"] != wanted["data"]:
        of_there = f"{there['data'].get('images')} images"
        content = short_hash(str(there["data"].get("content_hash")))
        differing.append(f"its data are {of_there}, content {content}; here are {db.summary}")
    if differing:
        raise NetworkError(
            f"{folder.path} holds another training: {'; '.join(differing)}. Give the same "
            "settings to resume it, or another folder"
        )


@dataclass
class _Saves:
    """When a training saves next.

    Attributes:
        due: on the monotonic clock; None before its first step.
    """

    due: float | None = None


@final
class _Training:
    """The state of a training, and its steps."""

    def __init__(
        self,
        db: PatchDatabase,
        folder: NetworkFolder,
        config: NetworkConfig,
        settings: TrainingSettings,
        device: torch.device,
    ) -> None:
        self.db, self.folder, self.settings, self.device = db, folder, settings, device
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(_seed(settings.seed, _INITIALISATION))
            network = build(config)
        network.to(device)
        # Several times faster than the default order on a CPU with bfloat16.
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.network = network
        self.conditional = config.num_classes > 0
        self.schedule = config.noise
        self.average = {
            name: value.detach().clone() for name, value in self.network.state_dict().items()
        }
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), weight_decay=settings.weight_decay, fused=True
        )
        self.losses: list[float] = []
        # Wall time at the end of each step, of all sessions.
        self.elapsed: list[float] = []
        self.seconds = 0.0
        self.order: tuple[int, npt.NDArray[np.int64]] | None = None
        if folder.training.exists():
            self._restore()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)

    def run(
        self,
        progress: Callable[[TrainingProgress], None] | None,
        checkpoint_seconds: float,
        saves: _Saves,
        tell: Log,
    ) -> None:
        """All that is missing, with checkpoints."""
        kept = self.step
        if kept:
            # Whoever saved these steps may have been killed before the last of its files.
            self._report()
        before = time.monotonic()
        # A step takes its time from the end of the one before, saving included.
        start = before - (self.elapsed[-1] if self.elapsed else 0.0)
        due = before + min(_FIRST_CHECKPOINT_SECONDS, checkpoint_seconds)
        clock = _processor_seconds()
        while self.step < self.settings.steps:
            saves.due = due
            rate = self.settings.rate(self.step)
            self.losses.append(self._take_step(self.step))
            now = time.monotonic()
            self.elapsed.append(now - start)
            processor = _processor_seconds()
            self.seconds, clock = self.seconds + processor - clock, processor
            tell(self.step, self.losses[-1], rate)
            if progress is not None:
                recent = float(np.mean(self.losses[-100:]))
                done = (self.step, self.settings.steps, recent, self.seconds, kept)
                progress(TrainingProgress(*done))
            # Another step would end too late; after the last one everything is saved anyway.
            if now + (now - before) >= due and self.step < self.settings.steps:
                self.save()
                kept = self.step
                now = time.monotonic()
                due = now + checkpoint_seconds
            before = now
        self.save()

    def save(self) -> None:
        """Write everything; the training's state first, since the rest can be made from it."""
        header = {"step": str(self.step), "processor_seconds": f"{self.seconds:.1f}"}
        tensors = {
            "losses": torch.tensor(self.losses, dtype=torch.float32, device="cpu"),
            "elapsed": torch.tensor(self.elapsed, dtype=torch.float64, device="cpu"),
        }
        for name, parameter in self.network.named_parameters():
            state = self.optimiser.state[parameter]
            tensors[f"weights.{name}"] = parameter.detach()
            tensors[f"first.{name}"] = state["exp_avg"]
            tensors[f"second.{name}"] = state["exp_avg_sq"]
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        write_tensors(self.folder.training, tensors, header)
        write_tensors(self.folder.weights, self.average, header)
        self._report()

    def _report(self) -> None:
        _report_losses(
            self.folder, np.array(self.losses, np.float32), np.array(self.elapsed, np.float64)
        )

    def _restore(self) -> None:
        tensors, header = read_tensors(self.folder.training)
        try:
            self.losses = tensors["losses"].tolist()
            self.elapsed = _elapsed(tensors).tolist()
            if len(self.elapsed) != len(self.losses):
                raise ValueError(f"it has {len(self.losses)} losses, {len(self.elapsed)} times")
            self.seconds = float(header["processor_seconds"])
            with torch.no_grad():
                for name, parameter in self.network.named_parameters():
                    parameter.copy_(tensors[f"weights.{name}"])
                    self.optimiser.state[parameter] = {
                        "step": torch.tensor(float(self.step), device=self.device),
                        "exp_avg": torch.empty_like(parameter).copy_(tensors[f"first.{name}"]),
                        "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"second.{name}"]),
                    }
                for name, value in self.average.items():
                    value.copy_(tensors[f"average.{name}"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise NetworkError(
                f"{self.folder.training} does not fit {self.folder.manifest} ({error}); "
                "give another folder"
            ) from error

    def _take_step(self, step: int) -> float:
        """One batch; returns its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate(step)
        clean, t, noise, label = self._batch(step)
        alpha, sigma = noise_scales(self.schedule, t, clean)
        x = (alpha * clean + sigma * noise).contiguous(memory_format=torch.channels_last)
        self.optimiser.zero_grad()
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        ):
            answer = self.network(t.to(self.device), x, label)
        loss = nn.functional.mse_loss(answer, noise)
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(
                f"the loss is {float(loss.detach())} at step {step + 1}; start anew, in another "
                f"folder, with a learning rate below {self.settings.learning_rate:g}"
            )
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), _GRADIENT_NORM)
        self.optimiser.step()
        decay = min(self.settings.average, (1 + step) / (10 + step))
        values = self.network.state_dict()
        names = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[name] for name in names],
            [values[name] for name in names],
            1 - decay,
        )
        return float(loss.detach())

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Clean images, times, noise and labels of a step."""
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, _BATCH, step))
        size = self.settings.batch_size
        numbers = np.array([self._image(step * size + place) for place in range(size)])
        clean = torch.from_numpy(decode(self.db.images[numbers]))
        # One time in each of `size` equal parts of [0, 1]: the loss is less noisy.
        with torch.device("cpu"):
            parts = torch.randperm(size, generator=generator)
            parts = parts + torch.rand(size, generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
        label = None
        if self.conditional and self.db.labels is not None:
            label = torch.from_numpy(self.db.labels[numbers]).to(self.device)
        return clean.to(self.device), parts / size, noise.to(self.device), label

    def _image(self, place: int) -> int:
        """The number of the image at a place of the endless sequence of shuffled epochs."""
        epoch, within = divmod(place, len(self.db))
        if self.order is None or self.order[0] != epoch:
            seed = np.random.SeedSequence(self.settings.seed, spawn_key=(_ORDER, epoch))
            self.order = (epoch, np.random.default_rng(seed).permutation(len(self.db)))
        return int(self.order[1][within])


def _seed(seed: int, *key: int) -> int:
    stream = np.random.SeedSequence(seed, spawn_key=key)
    return int(stream.generate_state(1, np.uint64)[0] >> 1)


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _is_finished(folder: NetworkFolder, settings: TrainingSettings) -> bool:
    if not folder.weights.exists():
        return False
    return read_tensors(folder.weights)[1].get("step") == str(settings.steps)


@contextmanager
def _explained(folder: NetworkFolder, settings: TrainingSettings) -> Iterator[_Saves]:
    """Says what is kept when training is stopped; a step that was cut short is not saved."""
    saves = _Saves()
    try:
        yield saves
    except (KeyboardInterrupt, OSError) as interruption:
        due = ""
        if saves.due is not None:
            due = f"; the next save was due in {max(0, round(saves.due - time.monotonic()))} s"
        kept = f"nothing is kept in {folder.path} yet"
        if folder.weights.exists():
            step = read_tensors(folder.weights)[1]["step"]
            kept = f"{step} of {settings.steps} steps are kept in {folder.path}"
        interruption.add_note(f"{kept}{due}. Start again with the same arguments to resume")
        raise


def _elapsed(tensors: Mapping[str, Tensor]) -> Tensor:
    """Wall time at the end of each step; not known of steps that an older version took."""
    losses = tensors["losses"]
    return tensors.get("elapsed", torch.full(losses.shape, torch.nan, dtype=torch.float64))


def _report_losses(
    folder: NetworkFolder, losses: npt.NDArray[np.float32], elapsed: npt.NDArray[np.float64]
) -> None:
    """The losses as CSV, and their curve; both are those of the training's saved state."""
    lines = ["step,loss,seconds"]
    for step, (loss, at) in enumerate(zip(losses, elapsed.tolist(), strict=True), 1):
        lines.append(f"{step},{loss},{'' if math.isnan(at) else f'{at:.3f}'}")
    with atomic_file(folder.losses) as stream:
        stream.write(("\n".join(lines) + "\n").encode("ascii"))
    with optional_picture(folder.picture):
        write_figure(lambda: _loss_curve(losses), folder.picture)


def _loss_curve(values: npt.NDArray[np.float32]) -> Figure:
    """Every loss, and its mean over windows of a hundredth of the steps."""
    from matplotlib.figure import Figure

    window = max(1, len(values) // 100)
    whole = values[: len(values) // window * window].reshape(-1, window)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(values) + 1), values, color="0.8", linewidth=0.5, label="batch")
    axes.plot(window * (np.arange(len(whole)) + 0.5), whole.mean(1), color="#0072B2", label="mean")
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="mean squared error of epsilon")
    axes.legend()
    return figure
