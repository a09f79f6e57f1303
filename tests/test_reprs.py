"""What `print` says of the objects that users hold: one line, with what they want to know."""

from pathlib import Path

import numpy as np
import pytest
import torch

from els.engine import EDMDenoiser, ELSModel, ScoreMachine, SmoothedDenoiser, WienerDenoiser
from els.engine.sampler import sample
from els.engine.schedule import Cosine, describe
from els.engine.state import empty
from els.explain.replay import explain_run, walk_run
from els.index import PatchDatabase
from els.networks.architecture import NetworkConfig
from els.networks.denoiser import Network, NetworkDenoiser
from els.networks.training import build
from els.runs.folder import read_settings
from els.runs.run import sample_run

RNG = np.random.default_rng(5)
DB = PatchDatabase.from_arrays(RNG.integers(0, 256, (40, 1, 8, 9), dtype=np.uint8))
MACHINE = ScoreMachine(DB, backend="torch")
X = torch.from_numpy(RNG.standard_normal((2, 1, 8, 9)))


def test_databases_and_machines() -> None:
    assert repr(DB) == "PatchDatabase(40 images 1x8x9, path='None')"
    assert repr(MACHINE) == "ScoreMachine(ELS, zeros, 40 images 1x8x9, torch (cpu))"
    assert repr(ScoreMachine(DB, "IS", backend="torch")) == (
        "ScoreMachine(IS, 40 images 1x8x9, torch (cpu))"
    )
    assert "ScoreMachine(Wiener, 40 images" in repr(WienerDenoiser(DB))
    assert "ScoreMachine(PCA, mask_threshold=0.02, 40" in repr(ScoreMachine(DB, "PCA"))
    smoothed = repr(SmoothedDenoiser(MACHINE, std=0.1, copies=3))
    assert smoothed == f"SmoothedDenoiser({MACHINE!r}, std=0.1, copies=3)"


@pytest.mark.parametrize("way", ["exact", "canvas", "smoothed", "gradient"])
def test_posteriors(way: str) -> None:
    machine = SmoothedDenoiser(MACHINE, std=0.1, copies=2) if way == "smoothed" else MACHINE
    x = torch.cat([X, X], -1) if way == "canvas" else X.clone()
    x.requires_grad_(way == "gradient")
    post = machine.posterior(x, alpha=0.9, sigma=0.4, patch_size=3)
    effective = float(post.effective_patches.detach().mean())
    side = "1x8x18" if way == "canvas" else "1x8x9"
    assert repr(post) == (
        f"LocalPosterior(ELS zeros P=3, 2 images {side}, float64, exact, "
        f"{effective:.4g} effective patches on average)"
    )
    assert repr(post.query) == f"PosteriorQuery(ELS zeros P=3, 2 images {side}, float64)"
    assert torch.equal(post.query.x, x.detach())
    assert post.query.alpha.tolist() == [0.9, 0.9]


def test_approximate_posteriors_say_their_error() -> None:
    post = MACHINE.posterior(
        X[:1], alpha=0.9, sigma=0.4, patch_size=3, mode="subset", subset=32, entropy=False, top=4
    )
    error = float(post.expected_error.mean())
    assert repr(post) == (
        f"LocalPosterior(ELS zeros P=3, 1 image 1x8x9, float64, subset, top 4, expected error "
        f"{error:.2g})"
    )


def test_states_and_steps() -> None:
    query = MACHINE.posterior(X, alpha=0.9, sigma=0.4, patch_size=3, top=2).query
    assert repr(empty(query)) == "PosteriorState(2 images 1x8x9, logit_sum, top 2)"
    states = []
    sample(MACHINE, n=1, steps=2, patch_sizes=3, callback=states.append)
    assert repr(states[-1]).startswith("StepState(step 1, t=0.5, alpha=0.7")
    assert repr(states[-1]).endswith("P=3, 1 images 1x8x9)")


def test_adapters_and_networks() -> None:
    model = ELSModel(MACHINE, [3, 5], scheduler=[0.9, 0.5], prediction_type="sample")
    assert repr(model) == f"ELSModel({MACHINE!r}, P=3 5, predicts sample)"
    assert repr(EDMDenoiser(MACHINE, 5, tolerance=0.1)) == (
        f"EDMDenoiser({MACHINE!r}, P=5, tolerance 0.1)"
    )
    config = NetworkConfig(
        **{"kind": "resnet", "shape": (1, 8, 9), "channels": 2, "layers": 2, "levels": 1},
        **{"padding": "zeros", "normalization": "none", "num_classes": 0},
        **{"prediction": "epsilon", "schedule": describe(Cosine())},
    )
    network = Network.of(build(config))
    assert repr(network).startswith("Network(ResNet, ")
    assert repr(network).endswith(" weights, cosine)")
    denoiser = NetworkDenoiser(network, DB, clip=True, device="cpu")
    assert repr(denoiser) == f"NetworkDenoiser({network!r}, cpu, clip)"


def test_runs_and_explanations(tmp_path: Path) -> None:
    db = PatchDatabase.build(DB.images, path=tmp_path / "db")
    machine = ScoreMachine(db, backend="torch")
    report = sample_run(machine, tmp_path / "run", n=1, steps=2, patch_sizes=3)
    assert repr(report).startswith(f"RunReport({str(tmp_path / 'run')!r}, 1 computed now, ")
    assert repr(read_settings(tmp_path / "run")) == (
        f"RunSettings(ELS zeros, 1 samples, 2 steps, seed 0, torch, database={str(db.path)!r})"
    )
    explanation, _ = explain_run(tmp_path / "run", 0, top=3)
    assert repr(explanation) == "Explanation(sample 0, ELS, 1x8x9, 2 steps, step 2 closely, top 3)"
    walkthrough, _ = walk_run(tmp_path / "run", 0, top=3)
    assert repr(walkthrough) == "Walkthrough(sample 0, ELS zeros, 1x8x9, 2 of 2 steps, top 3)"
