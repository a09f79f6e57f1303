"""UNets of diffusers: ours with self-attention, and any UNet2DModel's folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="an optional extra")

import diffusers

from els.engine import sample
from els.engine.schedule import Cosine, Linear, describe
from els.index import PatchDatabase
from els.networks.architecture import NetworkConfig
from els.networks.denoiser import NetworkDenoiser, open_network
from els.networks.folders import NetworkError
from els.networks.training import TrainingSettings, build, load, train_network

DB = PatchDatabase.from_arrays(
    np.random.default_rng(2).integers(0, 256, (3, 1, 16, 16), dtype=np.uint8)
)


def config(**changes) -> NetworkConfig:
    values = {
        "kind": "attention-unet",
        "shape": (1, 16, 16),
        "channels": 8,
        "layers": 1,
        "levels": 2,
        "padding": "zeros",
        "normalization": "group",
        "num_classes": 0,
        "prediction": "epsilon",
        "schedule": describe(Cosine()),
    }
    return NetworkConfig(**{**values, **changes})


def test_attention_sees_the_whole_image() -> None:
    torch.manual_seed(0)
    network = build(config()).eval()
    t, x = torch.tensor([0.5]), torch.randn(1, 1, 16, 16)
    moved = x.clone()
    moved[0, 0, 0, 0] += 10.0
    with torch.inference_mode():
        changed = (network(t, moved) - network(t, x)).abs()[0, 0]
    assert changed.min() > 1e-6


def test_it_trains_and_loads(tmp_path: Path) -> None:
    made = train_network(
        DB, tmp_path / "net", config(), TrainingSettings(steps=2, batch_size=2, warm_up=0)
    )
    network, manifest = load(made)
    assert manifest["trained"]["step"] == "2"
    denoiser = NetworkDenoiser(open_network(made.path), DB, device="cpu")
    assert sample(denoiser, n=1, steps=2).isfinite().all()
    assert network.config == config()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("is_pipeline", [True, False], ids=["pipeline", "folder"])
def test_a_diffusers_folder_is_asked_at_the_noise_of_the_query(
    tmp_path: Path, prediction, is_pipeline
) -> None:
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    unet.save_pretrained(tmp_path / "unet" if is_pipeline else tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler" if is_pipeline else tmp_path)
    network = open_network(tmp_path)
    assert network.schedule == Linear()
    denoiser = NetworkDenoiser(network, DB, device="cpu")
    x = torch.randn(2, 1, 16, 16)
    for step in (0, 20, 400, 980):
        bar = float(scheduler.alphas_cumprod[step])
        alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        mean = denoiser.posterior(x, alpha=alpha, sigma=sigma).mean
        with torch.inference_mode():
            answer = unet(x, step, return_dict=False)[0]
        wanted = {
            "epsilon": (x - sigma * answer) / alpha,
            "v_prediction": alpha * x - sigma * answer,
            "sample": answer,
        }[prediction]
        tolerance = 2e-4 * float(wanted.abs().max()) / min(1.0, 10 * alpha)
        torch.testing.assert_close(mean.float(), wanted, rtol=0, atol=tolerance)


def test_another_diffusers_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(NetworkError, match="UNet2DConditionModel"):
        open_network(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 10**9},
        {"layers_per_block": 2**64},
        {"block_out_channels": [10**6, 10**6]},
        {"block_out_channels": [2**64, 8]},
        {"block_out_channels": 8},
        {"block_out_channels": [8] * 10**5},
        {"in_channels": 10**12},
        {"num_class_embeds": 10**12},
        {"num_class_embeds": "many", "class_embed_type": None},
        {"layers_per_block": None},
        {"down_block_types": ["nonsense", "nonsense"]},
        {"norm_num_groups": 3},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_config_of_diffusers_that_its_weights_rule_out(tmp_path: Path, changes) -> None:
    diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))
    with pytest.raises(NetworkError, match=str(tmp_path)) as caught:
        open_network(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "", "{"], ids=len)
def test_a_config_of_diffusers_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(NetworkError, match=r"config\.json is damaged"):
        open_network(tmp_path)
