"""TAESD: its files in every layout decode and encode as diffusers' AutoencoderTiny, and stand as vae=."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import masa
from masa.config import TinyVAEConfig
from masa.models.taesd import TinyVAE
from masa.output.result import read_settings

SETTINGS = {"steps": 2, "height": 64, "width": 64, "progress": False, "controls": masa.MasaCtrl(1)}
# Of the values' spread: the same convolutions, whose float32 sums are in another order (on a CPU Winograd's).
ROUNDING = 1e-4


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out - ref).abs().max() / ref.std()).item()


@pytest.fixture(scope="module")
def published():
    """diffusers' own module, at the real shapes, with random weights that let every layer matter."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny().eval()
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.05 if parameter.dim() > 1 else 0.1))
    return tiny


def original(state, coder):
    """The names of the original repository; of the decoder diffusers' are one lower: the tanh has no layer there."""
    found = {}
    for key, tensor in state.items():
        part, _, rest = key.partition(".layers.")
        number, _, rest = rest.partition(".")
        if part == coder:
            found[f"{int(number) + (coder == 'decoder')}.{rest}"] = tensor.clone()
    return found


def write(folder, state, layout):
    """One of the layouts; the path that vae= takes."""
    encoder, decoder = original(state, "encoder"), original(state, "decoder")
    file = folder / f"{layout}.safetensors"
    if layout == "decoder":
        save_file(decoder, file)
    elif layout == "encoder":
        save_file(encoder, file)
    elif layout in ("taesd_", ""):
        parts = {"encoder": encoder, "decoder": decoder}
        file = folder / "joined.safetensors"
        save_file({f"{layout}{part}.{key}": t for part, found in parts.items() for key, t in found.items()}, file)
    elif layout == "two files":
        file = folder / "repository"
        file.mkdir(exist_ok=True)
        save_file(encoder, file / "taesd_encoder.safetensors")
        save_file(decoder, file / "taesd_decoder.safetensors")
    else:
        save_file({key: tensor.clone() for key, tensor in state.items()}, file)
    return file


WHOLE = ("taesd_", "", "two files", "diffusers", "diffusers folder")


@pytest.mark.parametrize("layout", WHOLE)
@torch.no_grad()
def test_every_layout_equals_diffusers(tiny_folder, published, tmp_path, layout):
    if layout == "diffusers folder":
        published.save_pretrained(tmp_path)
        path = tmp_path
    else:
        path = write(tmp_path, published.state_dict(), layout)
    sd = masa.load(tiny_folder, device="cpu", dtype="fp32", vae=path)
    g = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 64, 64, generator=g) * 2 - 1
    latents = 4.0 * torch.randn(2, 4, 8, 8, generator=g)
    assert difference(sd.vae.decode(latents), published.decode(latents).sample) < ROUNDING
    assert difference(sd.encode_image(picture[0], height=64, width=64), published.encode(picture).latents) < ROUNDING


def test_its_shapes_are_the_published_ones():
    model = TinyVAE(TinyVAEConfig())
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
    assert counts == [1_222_532, 1_222_531]
    assert [len(part.state_dict()) for part in (model.encoder, model.decoder)] == [67, 67]


@pytest.fixture(scope="module")
def decoder(published, tmp_path_factory):
    return write(tmp_path_factory.mktemp("taesd"), published.state_dict(), "decoder")


@pytest.fixture(scope="module")
def with_decoder(tiny_folder, decoder):
    return masa.load(tiny_folder, device="cpu", dtype="fp32", vae=decoder)


@torch.no_grad()
def test_a_decoder_alone_decodes_and_says_that_it_cannot_encode(with_decoder, published):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert with_decoder.config.vae == TinyVAEConfig(encodes=False)
    assert difference(with_decoder.vae.decode(latents), published.decode(latents).sample) < ROUNDING
    with pytest.raises(masa.MasaError, match="decoder alone, which cannot encode a picture; give a file or folder"):
        masa.edit(with_decoder, torch.zeros(3, 64, 64), "a cat", **SETTINGS)


def test_a_run_names_its_decoder_and_runs_again(with_decoder, tiny, decoder, tmp_path):
    out = masa.sample(with_decoder, "a cat", "a dog", seed=1, **SETTINGS)
    plain = masa.sample(tiny, "a cat", "a dog", seed=1, **SETTINGS)
    assert torch.equal(out.latents, plain.latents)
    assert out.images[0].tobytes() != plain.images[0].tobytes()
    assert (out.settings["vae"], out.settings["decoder"], plain.settings["decoder"]) == (str(decoder), "TAESD", "VAE")
    out.source.save(tmp_path / "source.png")
    assert read_settings(tmp_path / "source.png")["decoder"] == "TAESD"
    again = masa.rerun(tmp_path / "source.png", progress=False)
    assert again.images[1].tobytes() == out.images[1].tobytes()


def test_a_rerun_finds_another_decoder_out(tiny_folder, published, tmp_path):
    path = write(tmp_path, published.state_dict(), "decoder")
    sd = masa.load(tiny_folder, device="cpu", dtype="fp32", vae=path)
    masa.sample(sd, "a cat", "a dog", seed=1, **SETTINGS).source.save(tmp_path / "source.png")
    save_file({key: 1.01 * tensor for key, tensor in original(published.state_dict(), "decoder").items()}, path)
    with pytest.raises(masa.MasaError, match="holds other weights than those that made"):
        masa.rerun(tmp_path / "source.png", progress=False)


def test_offloaded_and_in_tiles_it_agrees(tiny_folder, with_decoder, decoder):
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(3))
    offloaded = masa.load(tiny_folder, device="cpu", dtype="fp32", vae=decoder, offload=True)
    pictures = [sd.decode_latents(latents)[0].tobytes() for sd in (with_decoder, offloaded)]
    assert pictures[0] == pictures[1]
    assert with_decoder.decode_latents(latents, tiled=True)[0].size == (192, 192)


def test_other_files_are_refused(tiny_folder, published, tmp_path):
    from diffusers import AutoencoderTiny

    encoder = write(tmp_path, published.state_dict(), "encoder")
    sixteen = AutoencoderTiny(latent_channels=16).state_dict()
    wide = write(tmp_path, sixteen, "diffusers")
    half = original(published.state_dict(), "decoder")
    del half["3.conv.2.bias"]
    save_file(half, tmp_path / "half.safetensors")
    for path, message in (
        (encoder, "is TAESD's encoder without its decoder; give taesd_decoder"),
        (wide, "decodes 16 latent channels .* SD 3 or Flux"),
        (tmp_path / "half.safetensors", "1 missing: decoder.layers.2.conv.2.bias"),
    ):
        with pytest.raises(masa.CheckpointError, match=message):
            masa.load(tiny_folder, vae=path)
    with pytest.raises(masa.CheckpointError, match="is TAESD, a tiny autoencoder, alone; give it as vae="):
        masa.load(encoder)
