"""The engine's entry: what is refused, and what derives from the posterior."""

import builtins
import copy
import logging
import multiprocessing
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from backends import BackendUnderTest

from els.engine import EDMDenoiser, ELSModel, ScoreMachine
from els.engine.backends.pytorch import TorchBackend
from els.engine.mesh import ProcessMesh
from els.index import PatchDatabase, decode

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 7, 5), dtype=np.uint8)
DB = PatchDatabase.from_arrays(IMAGES, np.array([0, 1, 1, 4, 0, 1]))
UNLABELLED = PatchDatabase.from_arrays(IMAGES)
X = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 7, 5), dtype=np.float32))
GOOD = {"alpha": 0.8, "sigma": 0.6, "patch_size": 3}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ScoreMachine:
    """A machine whose backend must not be reached."""

    def unreachable(*_: object) -> None:
        raise AssertionError("the backend was called before the input was checked")

    monkeypatch.setattr(TorchBackend, "states", unreachable)
    return ScoreMachine(DB, backend="torch")


def with_value(value: float) -> torch.Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


BAD_QUERIES = [
    pytest.param({"x": X[0]}, ValueError, r"\(3, 7, 5\).*\[B, 3, 7, 5\]", id="x-without-batch"),
    pytest.param({"x": X[:, :1]}, ValueError, r"\(2, 1, 7, 5\)", id="x-wrong-channels"),
    pytest.param({"x": X[..., :1]}, ValueError, "shorter side of x, 1", id="x-too-small"),
    pytest.param({"x": X[:0]}, ValueError, r"\(0, 3, 7, 5\).*B >= 1", id="x-empty-batch"),
    pytest.param({"x": X.to(torch.uint8)}, TypeError, "torch.uint8; decode", id="x-uint8"),
    pytest.param({"x": X.to(torch.complex64)}, TypeError, "complex64", id="x-complex"),
    pytest.param({"x": X.numpy()}, TypeError, "ndarray", id="x-numpy"),
    pytest.param({"x": with_value(np.nan)}, ValueError, "1 values.*not finite", id="x-nan"),
    pytest.param({"x": with_value(np.inf)}, ValueError, "1 values.*not finite", id="x-inf"),
    pytest.param({"x": X.to("meta")}, ValueError, "meta.*cpu.*move x", id="x-elsewhere"),
    pytest.param({"patch_size": 4}, ValueError, "patch_size=4 is even", id="patch-even"),
    pytest.param({"patch_size": 7}, ValueError, "patch_size=7.*1 to 5", id="patch-oversized"),
    pytest.param({"patch_size": -1}, ValueError, "patch_size=-1", id="patch-negative"),
    pytest.param({"patch_size": None}, ValueError, "give patch_size", id="patch-missing"),
    pytest.param({"patch_size": 3.0}, TypeError, "float", id="patch-float"),
    pytest.param({"patch_size": True}, TypeError, "bool", id="patch-bool"),
    pytest.param({"sigma": 0}, ValueError, "sigma=0.* > 0", id="sigma-zero"),
    pytest.param({"sigma": -0.5}, ValueError, "sigma=-0.5", id="sigma-negative"),
    pytest.param({"sigma": float("nan")}, ValueError, "sigma=nan", id="sigma-nan"),
    pytest.param({"sigma": torch.tensor([0.5, 0.0])}, ValueError, "sigma", id="sigma-one-zero"),
    pytest.param({"sigma": torch.ones(3)}, ValueError, r"\(3,\).*\[2\]", id="sigma-wrong-batch"),
    pytest.param({"sigma": "low"}, TypeError, "sigma.*'low'", id="sigma-text"),
    pytest.param({"sigma": None}, TypeError, "sigma.*None", id="sigma-none"),
    pytest.param({"alpha": -0.1}, ValueError, "alpha=-0.1.*>= 0", id="alpha-negative"),
    pytest.param({"alpha": float("inf")}, ValueError, "alpha=inf", id="alpha-infinite"),
    pytest.param({"alpha": torch.ones(2, 1)}, ValueError, r"alpha.*\(2, 1\)", id="alpha-column"),
    pytest.param({"alpha": 1j}, TypeError, "alpha.*1j", id="alpha-complex"),
    pytest.param(
        {"alpha": torch.ones(2, dtype=torch.complex64)}, TypeError, "alpha", id="alpha-complexes"
    ),
    pytest.param({"labels": 2}, ValueError, "no image has label 2.*0, 1, 4", id="class-empty"),
    pytest.param({"labels": 9}, ValueError, "label 9", id="class-out-of-range"),
    pytest.param({"labels": -1}, ValueError, "label -1", id="class-negative"),
    pytest.param({"labels": torch.tensor([1, 9])}, ValueError, "label 9", id="class-one-bad"),
    pytest.param({"labels": torch.tensor([1])}, ValueError, r"\(1,\).*\[2\]", id="labels-batch"),
    pytest.param({"labels": 1.0}, TypeError, "float32", id="labels-float"),
    pytest.param({"labels": True}, TypeError, "bool", id="labels-bool"),
    pytest.param({"labels": "shoe"}, ValueError, "have no names", id="labels-text"),
    pytest.param({"labels": ["shoe", None]}, ValueError, "have no names", id="labels-texts"),
    pytest.param({"labels": [None, None]}, TypeError, "None", id="labels-none"),
    pytest.param({"top": -1}, ValueError, "top=-1", id="top-negative"),
    pytest.param({"top": 5000}, ValueError, "top=5000.*4096", id="top-too-many"),
    pytest.param({"top": 1.5}, ValueError, "top=1.5", id="top-float"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_QUERIES)
def test_bad_queries_are_refused_before_any_work(
    machine: ScoreMachine, change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"x": X, **GOOD, **change}
    with pytest.raises(error, match=message):
        machine.posterior(arguments.pop("x"), **arguments)


@pytest.mark.parametrize("method", ["score", "epsilon"])
def test_score_and_epsilon_refuse_the_same(machine: ScoreMachine, method: str) -> None:
    with pytest.raises(ValueError, match="patch_size=4 is even"):
        getattr(machine, method)(X, alpha=0.8, sigma=0.6, patch_size=4)


def test_labels_need_a_labelled_database() -> None:
    with pytest.raises(ValueError, match="database has none; build it with labels"):
        ScoreMachine(UNLABELLED, backend="torch").posterior(X, **GOOD, labels=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"kind": "EL"}, ValueError, "kind='EL'.*IS, ES, LS, ELS", id="kind"),
        pytest.param({"boundary": "reflect"}, ValueError, "boundary='reflect'", id="boundary"),
        pytest.param({"backend": "cuda"}, ValueError, "backend='cuda'.*'torch'", id="backend"),
        pytest.param({"threads": 0}, ValueError, "threads=0", id="threads-zero"),
        pytest.param({"threads": 1.5}, ValueError, "threads=1.5", id="threads-float"),
        pytest.param({"threads": True}, ValueError, "threads=True", id="threads-bool"),
        pytest.param({"db": IMAGES}, TypeError, "ndarray.*PatchDatabase.open", id="db-array"),
        pytest.param(
            {"backend": "torch", "device": "nowhere"}, RuntimeError, "nowhere", id="device-unknown"
        ),
        pytest.param(
            {"backend": "torch", "device": "cuda:99"},
            RuntimeError,
            "cuda:99.*use device='cpu'",
            id="device-absent",
        ),
    ],
)
def test_bad_machines_are_refused(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ScoreMachine(**{"db": DB, **arguments})


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def without_the_extension(name: str, *others: object) -> object:
        if name == "els.engine.backends.native":
            raise ImportError("no extension")
        return honest(name, *others)

    monkeypatch.delitem(sys.modules, "els.engine.backends.native", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_the_extension)
    with pytest.raises(ImportError, match="no extension"):
        ScoreMachine(DB, backend="native")


def test_auto_says_what_it_chose_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="els"):
        machine = ScoreMachine(DB)
    assert machine.backend.startswith(("native", "torch"))
    assert machine.backend in caplog.text
    assert machine.backend_reason in caplog.text
    assert ScoreMachine(DB, backend="torch").backend_reason == "asked for by name"


@pytest.mark.parametrize("kind", ["IS", "ES"])
def test_whole_image_machines_need_no_patch_size(kind: str) -> None:
    machine = ScoreMachine(DB, kind, backend="torch")
    assert not machine.is_local
    mean = machine.posterior(X, alpha=0.8, sigma=0.6).mean
    assert torch.equal(mean, machine.posterior(X, **GOOD).mean)


def test_score_and_epsilon_derive_from_the_mean() -> None:
    machine = ScoreMachine(DB, backend="torch")
    x = X.double()
    alpha, sigma = torch.tensor([0.9, 0.1]), torch.tensor([0.4, 2.5])
    score = machine.score(x, alpha=alpha, sigma=sigma, patch_size=3)
    epsilon = machine.epsilon(x, alpha=alpha, sigma=sigma, patch_size=3)
    for b in range(len(x)):
        truth = oracle.posterior(
            IMAGES,
            x[b].numpy(),
            alpha=alpha[b].item(),
            sigma=sigma[b].item(),
            kind="ELS",
            boundary="zeros",
            patch_size=3,
        )
        np.testing.assert_allclose(score[b], truth.score, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(epsilon[b], -truth.score * sigma[b].item(), rtol=1e-9, atol=1e-9)


def test_numbers_and_tensors_mean_the_same() -> None:
    """A Python float is a double: 0.3 rounded to float32 would show in a double's answer."""
    machine = ScoreMachine(DB, backend="torch")
    x = X.double()
    by_number = machine.score(x, alpha=0.3, sigma=0.7, patch_size=3)
    alpha, sigma = torch.tensor([[0.3, 0.3], [0.7, 0.7]], dtype=torch.float64)
    by_tensor = machine.score(x, alpha=alpha, sigma=sigma, patch_size=3)
    assert torch.equal(by_number, by_tensor)


def test_entropy_and_top_come_on_request() -> None:
    machine = ScoreMachine(DB, backend="torch")
    bare = machine.posterior(X, **GOOD, entropy=False)
    assert bare.effective_patches is None
    assert bare.top_weights is None
    assert bare.top_addresses is None
    full = machine.posterior(X, **GOOD, top=2)
    assert full.effective_patches.shape == (2, 7, 5)
    assert full.top_weights.shape == full.top_addresses.shape == (2, 7, 5, 2)
    assert torch.equal(full.mean, bare.mean)


@pytest.mark.parametrize("kind", ["IS", "ES", "LS", "ELS"])
@pytest.mark.thinned
def test_copies_and_pickles_answer_alike(backend: BackendUnderTest, kind: str) -> None:
    machine = backend.machine(IMAGES, kind, "zeros", DB.labels)
    x = X.to(machine.device)
    answer = machine.posterior(x, labels=1, **GOOD)
    for made in (copy.copy, copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))):
        again = made(machine)
        assert again.backend == machine.backend
        assert torch.equal(again.posterior(x, labels=1, **GOOD).mean, answer.mean)
        adapter = made(EDMDenoiser(machine, 3))
        assert torch.equal(adapter(x, 0.6), EDMDenoiser(machine, 3)(x, 0.6))
        model = made(ELSModel(machine, 3, scheduler=[0.9, 0.5]))
        expected = ELSModel(machine, 3, scheduler=[0.9, 0.5])(x, 1).sample
        assert torch.equal(model(x, 1).sample, expected)


def test_pickles_hold_no_spectrum() -> None:
    machine = ScoreMachine(DB, "PCA")
    before = len(pickle.dumps(machine))
    answer = machine.posterior(X, alpha=0.8, sigma=0.6)
    pickled = pickle.dumps(machine)
    assert len(pickled) == before
    assert torch.equal(pickle.loads(pickled).posterior(X, alpha=0.8, sigma=0.6).mean, answer.mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sigma", [0.1, 1e-2, 1e-3, 1e-4])
def test_what_scores_cancel_is_not_rounded(
    backend: BackendUnderTest, dtype: torch.dtype, sigma: float
) -> None:
    """At little noise x and alpha * mean agree in more digits than such a number has."""
    machine = backend.machine(IMAGES, "ELS", "zeros")
    clean = torch.from_numpy(decode(IMAGES[:2]))
    x = (0.9 * clean + sigma * X).to(machine.device, dtype)
    for name in ("epsilon", "score"):
        asked = {"alpha": 0.9, "sigma": sigma, "patch_size": 3}
        exact = getattr(machine, name)(x.double(), **asked)
        if exact.abs().max() > torch.finfo(dtype).max:
            continue
        found = getattr(machine, name)(x, **asked)
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    model = ELSModel(machine, 3, scheduler=[1 - sigma**2])
    exact = model(x.double(), 0).sample
    error = (model(x, 0).sample.double() - exact).abs().max()
    assert error <= torch.finfo(dtype).eps * exact.abs().max()


def test_a_machine_of_a_mesh_belongs_to_its_process() -> None:
    with pytest.raises(TypeError, match="process"):
        pickle.dumps(ScoreMachine(DB, backend="torch", mesh=ProcessMesh.alone()))


def test_a_machine_serves_other_processes(tmp_path: Path) -> None:
    db = PatchDatabase.build(IMAGES, path=tmp_path / "db")
    machine = ScoreMachine(db)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        mean = pool.submit(mean_of, machine).result()
    assert torch.equal(mean, mean_of(machine))


def mean_of(machine: ScoreMachine) -> torch.Tensor:
    return machine.posterior(X, **GOOD).mean


def test_queries_that_float64_cannot_hold() -> None:
    machine = ScoreMachine(DB)
    with pytest.raises(ValueError, match=r"sigma=1e-140 is too small for x, whose .* 2e\+20"):
        machine.posterior(X * 0 + 2e20, alpha=1.0, sigma=1e-140, patch_size=3)
