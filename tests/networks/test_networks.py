"""Networks: what they can see, how they train, and what the adapters make of them."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from els.engine import ScoreMachine, sample
from els.engine.sampler import initial_noise
from els.engine.schedule import Cosine, Exponential, Linear, describe
from els.index import PatchDatabase, decode

pytest.importorskip("safetensors", reason="networks are stored with safetensors")

from machine_network import MachineNetwork

from els.networks import training
from els.networks.architecture import NetworkConfig
from els.networks.denoiser import Network, NetworkDenoiser, open_network
from els.networks.folders import (
    NetworkError,
    NetworkFolder,
    read_tensors,
    write_manifest,
    write_tensors,
)
from els.networks.training import TrainingProgress, TrainingSettings, build, load, train_network

RNG = np.random.default_rng(21)
DB = PatchDatabase.from_arrays(RNG.integers(0, 256, (5, 1, 8, 8), dtype=np.uint8), [0, 1, 2, 0, 1])


def config(**changes) -> NetworkConfig:
    values = {
        "kind": "resnet",
        "shape": (1, 8, 8),
        "channels": 8,
        "layers": 3,
        "levels": 1,
        "padding": "zeros",
        "normalization": "none",
        "num_classes": 0,
        "prediction": "epsilon",
        "schedule": describe(Cosine()),
    }
    return NetworkConfig(**{**values, **changes})


def random_network(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(config(**changes)).eval().requires_grad_(False)


def noisy(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


NETWORKS = [
    pytest.param({"padding": "circular"}, 1, id="resnet"),
    pytest.param({"padding": "circular", "prediction": "velocity"}, 1, id="velocity"),
    pytest.param({"padding": "circular", "normalization": "group"}, 1, id="normalised"),
    pytest.param({"padding": "circular", "kind": "unet", "levels": 3, "layers": 1}, 4, id="unet"),
]


@pytest.mark.parametrize(("changes", "period"), NETWORKS)
def test_circular_networks_commute_with_shifts(changes, period) -> None:
    network = random_network(shape=(2, 8, 16), **changes)
    t, x = torch.tensor([0.3, 0.8]), noisy(2, 2, 8, 16)
    for shift in ((period, 0), (0, 3 * period), (-period, 2 * period)):
        moved = network(t, x.roll(shift, (2, 3)))
        torch.testing.assert_close(moved, network(t, x).roll(shift, (2, 3)), rtol=0, atol=1e-5)
    # The zeros beyond the border are seen: the test can fail.
    broken = random_network(shape=(2, 8, 16), **{**changes, "padding": "zeros"})
    moved, still = broken(t, x.roll(period, 2)), broken(t, x).roll(period, 2)
    assert (moved - still).abs().max() > 1e-4


@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize("layers", [2, 4])
def test_a_resnet_sees_twice_its_layers_plus_one(layers, padding) -> None:
    network = random_network(shape=(1, 15, 17), layers=layers, padding=padding)
    t, x = torch.tensor([0.5]), noisy(1, 1, 15, 17)
    before = network(t, x)
    moved = x.clone()
    moved[0, 0, 7, 8] += 10.0
    changed = (network(t, moved) - before).abs()[0, 0]
    near = torch.zeros(15, 17, dtype=torch.bool)
    near[7 - layers : 8 + layers, 8 - layers : 9 + layers] = True
    assert changed[~near].max() <= 1e-5
    assert changed[near].min() > 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"kind": "resnet", "channels": 16}, id="resnet"),
        pytest.param(
            {"kind": "unet", "layers": 1, "levels": 2, "prediction": "velocity"}, id="unet"
        ),
    ],
)
def test_a_tiny_network_overfits_one_image(tmp_path: Path, changes) -> None:
    # With one image the noise is known: epsilon = (x - alpha * image) / sigma, and the loss is 0.
    image = np.zeros((1, 8, 8), dtype=np.uint8)
    image[:, 2:6, 3:] = 255
    db = PatchDatabase.from_arrays(image)
    settings = TrainingSettings(steps=300, batch_size=8, learning_rate=1e-2, warm_up=20)
    made = train_network(db, tmp_path / "net", config(**changes), settings)
    network, manifest = load(made)
    assert manifest["trained"]["step"] == "300"
    clean, t = torch.from_numpy(decode(db.images)), torch.linspace(0.3, 0.9, 13)
    alpha, sigma = (
        torch.tensor([scale(time) for time in t.tolist()]).reshape(-1, 1, 1, 1)
        for scale in (Cosine().alpha, Cosine().sigma)
    )
    noise = noisy(13, 1, 8, 8)
    loss = (network(t, alpha * clean + sigma * noise) - noise).square().mean()
    # Without the image, the best linear guess of the noise is x * sigma.
    blind = (sigma * (alpha * clean + sigma * noise) - noise).square().mean()
    assert loss < 0.3 * blind


def rows_of(folder: NetworkFolder) -> list[list[str]]:
    """The lines of loss.csv: step, loss, seconds."""
    header, *rows = folder.losses.read_text(encoding="ascii").splitlines()
    assert header == "step,loss,seconds"
    found = [row.split(",") for row in rows]
    assert [int(row[0]) for row in found] == list(range(1, len(found) + 1))
    losses = read_tensors(folder.training)[0]["losses"]
    assert [float(row[1]) for row in found] == pytest.approx(losses.tolist(), rel=1e-6)
    return found


@pytest.mark.parametrize("changes", [{}, {"num_classes": 3}], ids=["plain", "conditional"])
def test_killed_training_goes_on_to_the_same_weights(tmp_path: Path, changes) -> None:
    settings = TrainingSettings(steps=9, batch_size=3)
    whole = train_network(DB, tmp_path / "whole", config(**changes), settings)

    def stop(done: TrainingProgress) -> None:
        if done.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        train_network(
            DB, tmp_path / "cut", config(**changes), settings, progress=stop, checkpoint_seconds=0
        )
    (note,) = stopped.value.__notes__
    assert note == (
        f"4 of 9 steps are kept in {tmp_path / 'cut'}; the next save was due in 0 s. Start again "
        "with the same arguments to resume"
    )
    kept = rows_of(NetworkFolder(tmp_path / "cut"))
    assert len(kept) == 4
    assert load(NetworkFolder(tmp_path / "cut"))[1]["trained"]["step"] == "4"
    steps: list[int] = []
    cut = train_network(
        DB,
        tmp_path / "cut",
        config(**changes),
        settings,
        progress=lambda done: steps.append(done.step),
    )
    assert steps == [5, 6, 7, 8, 9]
    ours, theirs = read_tensors(cut.training)[0], read_tensors(whole.training)[0]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert name == "elapsed" or torch.equal(ours[name], theirs[name]), name
    rows, others = rows_of(cut), rows_of(whole)
    assert [row[:2] for row in rows] == [row[:2] for row in others]
    assert rows[:4] == kept
    times = [float(row[2]) for row in rows]
    assert times == sorted(times)
    # Finished: nothing is done again, even if what training needed was removed.
    cut.training.unlink()
    before = cut.weights.read_bytes()
    train_network(DB, cut.path, config(**changes), settings)
    assert cut.weights.read_bytes() == before


def test_the_default_device_changes_no_weight_and_no_sample(tmp_path: Path) -> None:
    """Whatever default device a program has set."""

    def drawn(name: str) -> torch.Tensor:
        settings = TrainingSettings(steps=2, batch_size=3)
        trained = train_network(DB, tmp_path / name, config(num_classes=3), settings)
        denoiser = NetworkDenoiser(open_network(trained.path), DB)
        return sample(denoiser, n=1, steps=2, labels=1)

    expected = drawn("plain")
    try:
        torch.set_default_device("meta")
        found = drawn("meta")
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_every_image_is_taken_before_any_is_taken_again(tmp_path: Path, monkeypatch) -> None:
    from els.networks import training

    seen: list[int] = []
    image = training._Training._image

    def watched(self, place: int) -> int:
        seen.append(image(self, place))
        return seen[-1]

    monkeypatch.setattr(training._Training, "_image", watched)
    train_network(DB, tmp_path / "net", config(), TrainingSettings(steps=5, batch_size=3))
    for epoch in range(3):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:10]


def test_other_settings_foreign_folders_and_damage_are_refused(tmp_path: Path) -> None:
    settings = TrainingSettings(steps=2, batch_size=2)
    made = train_network(DB, tmp_path / "net", config(), settings)
    with pytest.raises(NetworkError, match="layers is 3 there, 4 here"):
        train_network(DB, made.path, config(layers=4), settings)
    with pytest.raises(NetworkError, match="seed is 0 there, 1 here"):
        train_network(DB, made.path, config(), TrainingSettings(steps=2, batch_size=2, seed=1))
    other = PatchDatabase.from_arrays(DB.images[:2])
    with pytest.raises(NetworkError, match=r"its data are .* images, content \w{12}; here are"):
        train_network(other, made.path, config(), settings)
    with pytest.raises(ValueError, match="shape"):
        train_network(DB, tmp_path / "new", config(shape=(1, 8, 9)), settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(NetworkError, match=r"letter\.txt"):
        train_network(DB, tmp_path / "full", config(), settings)
    with pytest.raises(NetworkError, match="is not a network"):
        load(NetworkFolder(tmp_path / "nothing"))
    data = made.weights.read_bytes()
    made.weights.write_bytes(data[:-7])
    with pytest.raises(NetworkError, match="damaged"):
        load(made)
    made.weights.write_bytes(data)
    manifest = json.loads(made.manifest.read_bytes())
    manifest["network"]["channels"] = 9
    made.manifest.write_text(json.dumps(manifest))
    with pytest.raises(NetworkError, match="does not fit"):
        load(made)


def test_training_that_diverges_says_so(tmp_path: Path, monkeypatch) -> None:
    from els.networks import training

    def broken(self, *arguments):
        return torch.full((2, 1, 8, 8), float("nan")).requires_grad_()

    monkeypatch.setattr(training.ResNet, "output", broken)
    with pytest.raises(RuntimeError, match=r"nan at step 1; .* learning rate below 0\.002"):
        train_network(DB, tmp_path / "net", config(), TrainingSettings(steps=3, batch_size=2))


def test_without_safetensors_nothing_is_begun(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(RuntimeError, match=r"els-machine\[networks\]"):
        train_network(DB, tmp_path / "net", config(), TrainingSettings(steps=3, batch_size=2))
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"kind": "transformer"}, "attention-unet", id="kind"),
        pytest.param({"channels": 0}, "channels=0", id="channels"),
        pytest.param({"layers": 1}, "at least 2", id="layers"),
        pytest.param({"kind": "unet", "levels": 5}, "fewer levels", id="levels"),
        pytest.param({"kind": "attention-unet", "levels": 2}, "normalization", id="attention"),
        pytest.param({"padding": "mirror"}, "circular", id="padding"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, words) -> None:
    with pytest.raises(ValueError, match=words):
        config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"steps": 0}, id="steps"),
        pytest.param({"learning_rate": 0.0}, id="learning_rate"),
        pytest.param({"decay": 1.5}, id="decay"),
        pytest.param({"average": -0.1}, id="average"),
        pytest.param({"precision": "float8"}, id="precision"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainingSettings(**changes)


def test_the_rate_rises_and_then_decays() -> None:
    settings = TrainingSettings(steps=100, learning_rate=1e-2, decay=0.01, warm_up=9)
    rates = [settings.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9] == pytest.approx(1e-2 * 0.01**0.09)
    assert rates[100] == pytest.approx(1e-4)
    assert np.all(np.diff(rates[9:]) < 0)


def test_classes_are_told() -> None:
    network = random_network(num_classes=3)
    t, x = torch.tensor([0.5, 0.5]), noisy(1, 1, 8, 8).expand(2, -1, -1, -1)
    answers = network(t, x, torch.tensor([0, 2]))
    assert (answers[0] - answers[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="3 classes"):
        network(t, x)
    with pytest.raises(ValueError, match="0 classes"):
        random_network()(t, x, torch.tensor([0, 2]))
    denoiser = NetworkDenoiser(Network.of(network, num_classes=3), DB, device="cpu")
    with pytest.raises(ValueError, match="labels are missing"):
        sample(denoiser, n=1, steps=2)
    assert sample(denoiser, n=1, steps=2, labels=1).isfinite().all()


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), Exponential()], ids=lambda s: s.name)
def test_a_network_goes_through_the_papers_update(schedule) -> None:
    """Against the update as published: x * sqrt(a'/a) + (sqrt(b') - sqrt(a'/a) sqrt(b)) * eps."""
    module = random_network(schedule=describe(schedule))
    denoiser = NetworkDenoiser(Network.of(module, schedule=schedule), DB, device="cpu")
    drawn = sample(denoiser, n=2, steps=5, seed=4, schedule=schedule)
    for index in range(2):
        x = initial_noise(4, index, DB.shape)
        for step in range(5, 0, -1):
            t, before = step / 5, (step - 1) / 5
            eps = module(torch.tensor([t]), x[None].float())[0].double()
            a, b = schedule.alpha(t) ** 2, schedule.beta(t)
            a_next, b_next = schedule.alpha(before) ** 2, schedule.beta(before)
            if step == 1:
                a_next, b_next = 1.0, 0.0
            x = x * (a_next / a) ** 0.5 + (b_next**0.5 - (a_next / a * b) ** 0.5) * eps
        # The network's float32 error, magnified by 1 / alpha at t = 1.
        tolerance = 1e-5 * float(x.abs().max()) / schedule.alpha(1.0)
        torch.testing.assert_close(drawn[index].double(), x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("clip", [False, True])
def test_a_machine_as_a_network_draws_what_the_machine_draws(clip: bool) -> None:
    machine = ScoreMachine(DB, "ELS", "zeros", backend="torch")
    network = Network.of(MachineNetwork(machine, [3, 3, 5, 5]))
    denoiser = NetworkDenoiser(network, DB, clip=clip, device="cpu")
    ours = sample(denoiser, n=2, steps=4)
    theirs = sample(machine, n=2, steps=4, patch_sizes=[3, 3, 5, 5])
    # Epsilon in float32, magnified by 1 / alpha = 80 at t = 1.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_noise_that_does_not_preserve_variance_is_scaled() -> None:
    machine = ScoreMachine(DB, "IS", backend="torch")
    network = Network.of(MachineNetwork(machine, [1]))
    denoiser = NetworkDenoiser(network, DB, device="cpu")
    clean = torch.from_numpy(decode(DB.images[:2]))
    x = clean + 0.7 * noisy(*clean.shape)
    ours = denoiser.posterior(x, alpha=1.0, sigma=0.7).mean
    theirs = machine.posterior(x, alpha=1.0, sigma=0.7).mean
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-5)


def make_module() -> torch.nn.Module:
    return random_network()


def make_nothing() -> str:
    return "nothing"


def test_networks_are_opened_by_name(tmp_path: Path, monkeypatch) -> None:
    made = train_network(DB, tmp_path / "net", config(), TrainingSettings(steps=1, batch_size=2))
    ours = open_network(made.path)
    assert (ours.padding, ours.content_hash) == ("zeros", DB.content_hash)
    assert ours.fingerprint == open_network(str(made.path)).fingerprint
    by_function = open_network(f"{__name__}:make_module")
    assert by_function.schedule == Cosine()
    assert by_function.fingerprint != ours.fingerprint
    for name, words in (
        (f"{__name__}:make_nothing", "returned a str"),
        (f"{__name__}:nowhere", "nowhere"),
        ("no_such_module:f", "no_such_module"),
        (tmp_path / "nothing", "els train"),
        ("embedded:nothing", "not in the package"),
    ):
        with pytest.raises(NetworkError, match=words):
            open_network(name)


def test_what_a_denoiser_refuses() -> None:
    class Wrong(torch.nn.Module):
        def forward(self, t, x, label=None):
            return x[:, :, :-1]

    denoiser = NetworkDenoiser(Network.of(Wrong()), DB, device="cpu")
    with pytest.raises(ValueError, match="same shape"):
        denoiser.posterior(noisy(1, 1, 8, 8), alpha=0.5, sigma=0.5)
    with pytest.raises(ValueError, match="must be > 0"):
        denoiser.posterior(noisy(1, 1, 8, 8), alpha=0.0, sigma=1.0)


class ExtraState(torch.nn.Module):
    """One weight, and whatever else its state is said to hold."""

    def __init__(self, state: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


STATES = [
    {"version": 1},
    {"version": 2},
    {"version": torch.zeros(1)},
    {"version": torch.zeros(1, dtype=torch.float64)},
    [1, (2.5, None, "\udcff", b"x", 1j, True)],
    torch.zeros(1),
    torch.ones(1),
    torch.zeros(0),
    torch.zeros((), dtype=torch.bfloat16),
    torch.eye(3).to_sparse(),
    torch.zeros(2, dtype=torch.complex64).conj(),
    {1: "a", "1": "b", None: "c"},
    SimpleNamespace(a=1),
    object(),
    None,
]


def test_extra_state_has_a_fingerprint() -> None:
    fingerprints = [Network.of(ExtraState(state)).fingerprint for state in STATES]
    assert len(set(fingerprints)) == len(STATES)
    assert fingerprints == [Network.of(ExtraState(state)).fingerprint for state in STATES]
    # An object counts by its type, which is the same in every process.
    assert Network.of(ExtraState(object())).fingerprint == fingerprints[STATES.index(STATES[-2])]
    ordered = Network.of(ExtraState({"b": 1, "a": 2})).fingerprint
    assert ordered == Network.of(ExtraState({"a": 2, "b": 1})).fingerprint


def test_a_network_without_a_state_is_refused() -> None:
    class Stateless(ExtraState):
        def get_extra_state(self) -> object:
            raise KeyError("state")

    with pytest.raises(NetworkError, match="no fingerprint: KeyError: 'state'"):
        _ = Network.of(Stateless(None)).fingerprint


def test_only_modules_are_networks() -> None:
    for made in (len, None, ExtraState):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            Network.of(made)


class Answering(torch.nn.Module):
    """Answers what a function makes of the images."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, t, x, label):
        return self.answer(x)


def raising(error: Exception):
    def forward(x):
        raise error

    return forward


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(lambda x: (x,), "a tuple, not a tensor", id="tuple"),
        pytest.param(lambda x: [x], "a list, not a tensor", id="list"),
        pytest.param(lambda x: {"sample": x}, "a dict, not a tensor", id="dict"),
        pytest.param(lambda x: SimpleNamespace(sample=x), "a SimpleNamespace", id="model-output"),
        pytest.param(lambda x: None, "answers None", id="none"),
        pytest.param(lambda x: x.numpy(), "a ndarray", id="array"),
        pytest.param(lambda x: x[0], "same shape", id="fewer"),
        pytest.param(lambda x: x.mean(), "same shape", id="number"),
        pytest.param(lambda x: torch.cat([x, x], 1), "same shape", id="more-channels"),
        pytest.param(lambda x: x.long(), "int64", id="integers"),
        pytest.param(lambda x: x > 0, "bool", id="booleans"),
        pytest.param(lambda x: x.to(torch.complex64), "complex64", id="complex"),
        pytest.param(lambda x: x * torch.nan, "not finite", id="nan"),
        pytest.param(lambda x: x / 0, "not finite", id="infinite"),
        pytest.param(raising(KeyError("key")), "fails: KeyError: 'key'", id="key"),
        pytest.param(raising(AssertionError()), "fails: AssertionError", id="assertion"),
        pytest.param(raising(TypeError("two\nlines")), "TypeError: two lines; it is", id="type"),
        pytest.param(lambda x: x.nothing, "fails: AttributeError", id="attribute"),
        pytest.param(lambda x: x @ x[:1, :, 1:], "fails: RuntimeError", id="torch"),
    ],
)
def test_answers_that_are_no_noise_are_refused(answer, words) -> None:
    denoiser = NetworkDenoiser(Network.of(Answering(answer)), DB, device="cpu")
    with pytest.raises((ValueError, NetworkError), match=words) as caught:
        denoiser.posterior(noisy(1, 1, 8, 8), alpha=0.5, sigma=0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_answers_of_any_floating_type_are_taken(dtype: torch.dtype) -> None:
    denoiser = NetworkDenoiser(Network.of(Answering(lambda x: x.to(dtype))), DB, device="cpu")
    assert denoiser.posterior(noisy(1, 1, 8, 8), alpha=0.5, sigma=0.5).mean.isfinite().all()


def test_a_network_without_label_is_told_what_it_is_called_with() -> None:
    class Unlabelled(torch.nn.Module):
        def forward(self, t, x):
            return x

    denoiser = NetworkDenoiser(Network.of(Unlabelled()), DB, device="cpu")
    with pytest.raises(NetworkError, match=r"called with \(t, x, label\)"):
        denoiser.posterior(noisy(1, 1, 8, 8), alpha=0.5, sigma=0.5)


@pytest.mark.parametrize(
    ("source", "function", "words"),
    [
        pytest.param("def f(:", "f", "SyntaxError", id="syntax"),
        pytest.param("1 / 0", "f", "ZeroDivisionError", id="import-raises"),
        pytest.param("import nowhere_at_all", "f", "nowhere_at_all", id="import-fails"),
        pytest.param("import sys; sys.exit('usage')", "f", "SystemExit: usage", id="script"),
        pytest.param("def f(size): pass", "f", "TypeError.*size", id="arguments"),
        pytest.param("def f(): return {}['key']", "f", "KeyError", id="raises"),
        pytest.param("f = 3", "f", "not callable", id="no-function"),
        pytest.param("def f(): return f", "f", "returned a function", id="no-module"),
        pytest.param("def f(): pass", "f", "returned None", id="nothing"),
        pytest.param("def f(): pass", "g", "'g'", id="unknown"),
        pytest.param("def f(): pass", "", "AttributeError", id="no-name"),
    ],
)
def test_modules_that_make_no_network(tmp_path, monkeypatch, source, function, words) -> None:
    name = f"module_of_{tmp_path.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NetworkError, match=words) as caught:
        open_network(f"{name}:{function}")
    assert "\n" not in str(caught.value)


HUGE = 2**64


@pytest.mark.parametrize("kind", ["resnet", "unet"])
@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("levels", "layers") for value in (HUGE, 10**9, 50)),
        *({name: value} for name in ("channels", "num_classes") for value in (HUGE, 10**9, 9)),
        *(
            {name: value}
            for name in ("channels", "layers", "levels", "num_classes")
            for value in (-1, 8.0, True, "8", None, [8], float("nan"))
        ),
        *(
            {"shape": shape}
            for shape in (
                [HUGE, 8, 8],
                [2, 8, 8],
                [1, -8, 8],
                [0, 8, 8],
                [1, 8.0, 8],
                [1, True, 8],
                [1, 8],
                8,
            )
        ),
        *({"schedule": schedule} for schedule in ({}, 3, {"name": []}, {"name": "cosine", "x": 1})),
        {"kind": ["resnet"]},
        {"padding": {}},
        {"more": 1},
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else value,
)
def test_configs_that_do_not_fit_their_weights(tmp_path: Path, changes, kind: str) -> None:
    is_unet = kind == "unet"
    small = config(kind=kind, layers=1 if is_unet else 2, levels=2 if is_unet else 1)
    folder = NetworkFolder(tmp_path)
    write_manifest(folder, {"network": small.describe(), "training": {}, "data": {}})
    write_tensors(folder.weights, build(small).state_dict(), {})
    assert load(folder)[0].config == small
    manifest = json.loads(folder.manifest.read_bytes())
    manifest["network"] |= changes
    folder.manifest.write_text(json.dumps(manifest))
    with limited_memory(), pytest.raises(NetworkError, match=r"damaged|does not fit") as caught:
        load(folder)
    assert len(str(caught.value)) < 1000
    del manifest["network"]["kind"]
    folder.manifest.write_text(json.dumps(manifest))
    with pytest.raises(NetworkError, match="damaged"):
        load(folder)


@contextmanager
def limited_memory() -> Iterator[None]:
    """A quarter of a gigabyte more than now; what needs more fails at once."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if not pages:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 28), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"format": "els-network", "version": 1}',
        b'{"format": "els-network", "version": 1, "network": [], "training": 3, "data": null}',
        b"[]",
        b"\xff\xfe",
        b"",
    ],
    ids=["nested", "no-parts", "other-parts", "list", "no-text", "empty"],
)
def test_manifests_that_are_none(tmp_path: Path, content: bytes) -> None:
    folder = NetworkFolder(tmp_path)
    folder.manifest.write_bytes(content)
    with pytest.raises(NetworkError, match="damaged"):
        open_network(tmp_path)
    with pytest.raises(NetworkError, match="damaged"):
        train_network(DB, tmp_path, config(), TrainingSettings(steps=1, batch_size=2))


def test_files_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    folder = NetworkFolder(tmp_path)
    write_manifest(folder, {"network": config().describe(), "training": {}, "data": {}})
    for header in (
        (2**63).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        (10**8).to_bytes(8, "little") + b"{}",
        (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1152921504606846976],',
        b"",
    ):
        folder.weights.write_bytes(header)
        with limited_memory(), pytest.raises(NetworkError, match="damaged"):
            load(folder)
    folder.weights.unlink()
    os.mkfifo(folder.weights)
    with pytest.raises(NetworkError, match="not there"):
        load(folder)
    folder.manifest.unlink()
    with folder.manifest.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(NetworkError, match="1,099,511,627,776 bytes"):
        load(folder)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_refused_before_a_folder_is_made(tmp_path, device) -> None:
    with pytest.raises(ValueError, match=f"device={device} is not here; choose one of cpu"):
        train_network(DB, tmp_path / "net", config(), TrainingSettings(steps=1), device=device)
    assert not (tmp_path / "net").exists()
    with pytest.raises(ValueError, match=f"device={device}"):
        NetworkDenoiser(Network.of(Answering(len)), DB, device=device)


def test_a_missing_loss_curve_is_drawn_later(tmp_path: Path, monkeypatch, caplog) -> None:
    settings = TrainingSettings(steps=2, batch_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_loss_curve", lambda losses: 1 / 0)
        made = train_network(DB, tmp_path / "net", config(), settings)
    assert made.weights.exists()
    assert not made.picture.exists()
    assert "no picture" in caplog.text
    weights = made.weights.stat().st_mtime_ns
    train_network(DB, made.path, config(), settings)
    assert made.picture.exists()
    assert made.weights.stat().st_mtime_ns == weights


class Clock:
    """The monotonic clock, which every training step moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds_per_step: float) -> None:
        self.now = 1000.0
        take = training._Training._take_step

        def slow(its: Any, step: int) -> float:
            self.now += seconds_per_step
            return take(its, step)

        monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(training._Training, "_take_step", slow)


@pytest.mark.parametrize(
    ("seconds_per_step", "saves"),
    [
        # 10 s after the start, and then within a minute.
        pytest.param(1.0, [9, 68, 127], id="second"),
        pytest.param(0.25, [39], id="quarter"),
        pytest.param(7.0, [1, 9, 17, 25], id="slow"),
        pytest.param(45.0, [1, 2, 3, 4], id="45-seconds"),
        pytest.param(100.0, [1, 2, 3], id="minutes"),
    ],
)
def test_a_minute_at_most_is_lost(tmp_path, monkeypatch, seconds_per_step, saves) -> None:
    clock = Clock(monkeypatch, seconds_per_step)
    saved: list[tuple[int, float]] = []
    save = training._Training.save

    def watched(its: Any) -> None:
        saved.append((its.step, clock.now))
        save(its)

    monkeypatch.setattr(training._Training, "save", watched)
    monkeypatch.setattr(training._Training, "_report", lambda its: None)
    kept: list[int] = []
    last = saves[-1] + 1
    settings = TrainingSettings(steps=last, batch_size=1)
    train_network(
        DB, tmp_path / "net", config(), settings, progress=lambda done: kept.append(done.kept)
    )
    assert [step for step, _ in saved] == [*saves, last]
    moments = [1000.0, *(moment for _, moment in saved)]
    for before, after in pairwise(moments):
        assert after - before <= max(60.0, seconds_per_step)
    # What is told is what is on the disk.
    assert kept[saves[0] - 1] == 0
    assert kept[saves[0]] == saves[0]


def test_a_training_that_is_stopped_says_when_it_would_have_saved(tmp_path, monkeypatch) -> None:
    Clock(monkeypatch, 3.0)

    def stop(done: TrainingProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        train_network(
            DB, tmp_path / "net", config(), TrainingSettings(steps=50, batch_size=1), progress=stop
        )
    assert stopped.value.__notes__ == [
        f"nothing is kept in {tmp_path / 'net'} yet; the next save was due in 7 s. Start again "
        "with the same arguments to resume"
    ]


def test_losses_of_an_older_training_go_on(tmp_path: Path) -> None:
    """It did not keep when its steps ended."""
    settings = TrainingSettings(steps=3, batch_size=2)

    def stop(done: TrainingProgress) -> None:
        if done.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_network(DB, tmp_path / "net", config(), settings, progress=stop, checkpoint_seconds=0)
    folder = NetworkFolder(tmp_path / "net")
    tensors, header = read_tensors(folder.training)
    del tensors["elapsed"]
    write_tensors(folder.training, tensors, header)
    folder.losses.unlink()
    train_network(DB, folder.path, config(), settings)
    assert [row[2] for row in rows_of(folder)] == ["", "", ""]
    # Finished, the files are made again from the training's state.
    made = folder.losses.read_bytes()
    folder.losses.unlink()
    train_network(DB, folder.path, config(), settings)
    assert folder.losses.read_bytes() == made


@pytest.mark.parametrize("log", ["tensorboard", "wandb"])
def test_the_loss_is_logged_where_the_library_is(tmp_path, monkeypatch, log: str) -> None:
    told: dict[int, dict[str, float]] = {}
    begun: list[dict[str, Any]] = []
    ended: list[bool] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            begun.append({"dir": folder, "purge_step": purge_step})

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.setdefault(step, {})[name] = value

        def close(self) -> None:
            ended.append(True)

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return SimpleNamespace(
            log=lambda values, step: told.update({step: values}), finish=lambda: ended.append(True)
        )

    fake = SimpleNamespace(SummaryWriter=Writer, init=init)
    module = "wandb" if log == "wandb" else "torch.utils.tensorboard"
    monkeypatch.setitem(sys.modules, module, fake)
    settings = TrainingSettings(steps=4, batch_size=2)

    def stop(done: TrainingProgress) -> None:
        if done.step == 3:
            raise KeyboardInterrupt

    arguments = (DB, tmp_path / "net", config(), settings)
    with pytest.raises(KeyboardInterrupt):
        train_network(*arguments, progress=stop, checkpoint_seconds=0, log=log)
    train_network(*arguments, log=log)
    losses = read_tensors(NetworkFolder(tmp_path / "net").training)[0]["losses"].tolist()
    assert [told[step]["loss"] for step in (1, 2, 3, 4)] == pytest.approx(losses)
    assert told[2]["learning rate"] == settings.rate(1)
    assert ended == [True, True]
    if log == "wandb":
        assert begun[0]["id"] == begun[1]["id"]
        assert begun[0]["config"]["training"]["steps"] == 4
    else:
        assert [each["purge_step"] for each in begun] == [1, 3]


def test_a_library_that_is_not_there_is_said_before_any_work(tmp_path, monkeypatch) -> None:
    settings = TrainingSettings(steps=1, batch_size=1)
    for log, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RuntimeError, match=f"log={log} needs {log}.*pip install {log}"):
            train_network(DB, tmp_path / "net", config(), settings, log=log)
    with pytest.raises(ValueError, match="log='mlflow' is not known"):
        train_network(DB, tmp_path / "net", config(), settings, log="mlflow")
    assert not (tmp_path / "net").exists()
