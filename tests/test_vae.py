"""The autoencoder: equality with diffusers in both directions."""

from __future__ import annotations

import copy

import torch

from masa.config import SD_V1
from masa.models.vae import VAE


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.abs().max())


@torch.no_grad()
def test_equals_diffusers(tiny, tiny_folder, generator):
    from diffusers import AutoencoderKL

    oracle = AutoencoderKL.from_pretrained(tiny_folder / "vae").eval()
    picture = torch.rand(2, 3, 64, 128, generator=generator) * 2 - 1
    posterior = oracle.encode(picture).latent_dist
    mean, logvar = tiny.vae.moments(picture)
    assert relative_error(mean, posterior.mean) < 1e-4
    assert relative_error(logvar, posterior.logvar) < 1e-4
    assert torch.equal(tiny.vae.encode(picture), mean * 0.18215)
    latents = torch.randn(2, 4, 8, 16, generator=generator)
    assert relative_error(tiny.vae.decode(latents), oracle.decode(latents / 0.18215).sample) < 1e-4
    assert torch.equal(tiny.vae(picture), tiny.vae.decode(tiny.vae.encode(picture)))


@torch.no_grad()
def test_the_log_variance_is_kept_between_minus_30_and_20(tiny):
    vae = copy.deepcopy(tiny.vae)
    vae.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 0.0, 0.0])
    _, logvar = vae.moments(torch.zeros(1, 3, 64, 64))
    assert logvar[:, 0].unique().tolist() == [20.0]
    assert logvar[:, 1].unique().tolist() == [-30.0]


def test_sd_v1_parameter_count_and_eps():
    with torch.device("meta"):
        vae = VAE(SD_V1.vae)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert {m.eps for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}
