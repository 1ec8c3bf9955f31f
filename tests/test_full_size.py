"""Once at Stable Diffusion v1.5's full shapes: every network against diffusers and transformers, float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import masa
from benchmarks.random_checkpoint import write

pytestmark = pytest.mark.slow


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("full") / "sd15"
    write(path, layout="diffusers")
    return path


@pytest.fixture(scope="module")
def sd(folder):
    return masa.load(folder, device="cpu", dtype="fp32")


@torch.no_grad()
def test_unet_equals_diffusers(sd, folder, generator):
    from diffusers import UNet2DConditionModel

    x = torch.randn(1, 4, 64, 64, generator=generator)
    context = torch.randn(1, 77, 768, generator=generator)
    eps, _ = sd.unet(x, 401, context)
    oracle = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    assert eps.abs().max() > 0.1
    assert relative_error(eps, oracle(x, 401, context).sample) < 1e-4


@torch.no_grad()
def test_vae_equals_diffusers(sd, folder, generator):
    from diffusers import AutoencoderKL

    oracle = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    picture = torch.rand(1, 3, 128, 192, generator=generator) * 2 - 1
    latents = sd.vae.encode(picture)
    assert relative_error(latents, oracle.encode(picture).latent_dist.mean * 0.18215) < 1e-4
    assert relative_error(sd.vae.decode(latents), oracle.decode(latents / 0.18215).sample) < 1e-4


@torch.no_grad()
def test_text_encoder_equals_transformers(sd, folder):
    from transformers import CLIPTextModel

    oracle = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).eval()
    prompts = ["", "a photo of a cat", "a very long prompt " * 20]
    with pytest.warns(UserWarning, match="left out"):
        context = sd.encode_prompt(prompts)
    with pytest.warns(UserWarning, match="left out"):
        ids = sd.tokenizer(prompts)
    assert context.shape == (3, 77, 768)
    assert relative_error(context, oracle(ids).last_hidden_state) < 1e-4
