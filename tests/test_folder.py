"""Written folders load, in masa and in diffusers, whole or in shards."""

from __future__ import annotations

import pytest
import torch

import masa
from benchmarks.random_checkpoint import random_parts
from masa.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from masa.weights.folder import write_folder

SMALL = ModelConfig(
    unet=UNetConfig(block_out_channels=(32, 64, 64, 64), context_width=64, norm_groups=16),
    vae=VAEConfig(block_out_channels=(16, 16, 32, 32), norm_groups=8, layers_per_block=1),
    text=TextConfig(width=64, intermediate_width=128, layers=2, heads=4),
    image_size=128,
)


@pytest.mark.parametrize("shard", ["5GB", "1MB"])
def test_what_is_written_loads(tmp_path, shard):
    from diffusers import UNet2DConditionModel

    parts = random_parts(SMALL, torch.float32)
    write_folder(tmp_path, SMALL, parts, shard)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists() == (shard == "5GB")
    sd = masa.load(tmp_path, dtype="fp32")
    assert sd.config == SMALL
    for name, tensor in sd.unet.state_dict().items():
        assert torch.equal(tensor, parts["unet"][name])
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in parts["unet"].items())
