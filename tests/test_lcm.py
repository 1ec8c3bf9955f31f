"""Latent consistency models: guidance embedded in the UNet, LCM-LoRA, and whole pictures as diffusers makes them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from fake_checkpoints import write_sparse
from rounding import same
from safetensors.torch import load_file, save_file

import masa
from masa.config import SD_V1, ModelConfig
from masa.models.unet import guidance_embedding
from masa.runtime.lora import Lora, open_loras
from masa.runtime.networks import meta_models
from masa.weights.model_files import open_checkpoint

SOURCE, TARGETS = "a photo of a sitting cat", ["a photo of a running cat", "a red cat in the snow"]
SETTINGS = {"steps": 4, "height": 128, "width": 128, "progress": False}
CONTROL = masa.MasaCtrl(1, 8)
WIDTH = 256
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out - ref).abs().max() / ref.std()).item()


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """The tiny model as a latent consistency model, with its scheduler's file, as published ones are."""
    from diffusers import LCMScheduler, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("lcm") / "model"
    shutil.copytree(tiny_folder, folder)
    config = dict(UNet2DConditionModel.load_config(folder / "unet"))
    unet = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": WIDTH})
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    g = torch.Generator().manual_seed(4)
    state["time_embedding.cond_proj.weight"] = 0.3 * torch.randn(32, WIDTH, generator=g)
    unet.load_state_dict(state)
    unet.save_pretrained(folder / "unet")
    LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="module")
def lcm(folder):
    return masa.load(folder, device="cpu", dtype="fp32")


def pipeline(folder, lora=None):
    """diffusers' pipeline of a folder, with its own scheduler for LCM."""
    from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return pipe


def published(pipe, sd, steps, guidance_scale):
    """The final latents of a picture of the source's prompt, of noise drawn with seed 5."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt([SOURCE])
    return pipe(
        prompt_embeds=cond, negative_prompt_embeds=uncond, num_inference_steps=steps, guidance_scale=guidance_scale,
        latents=noise, generator=generator, height=128, width=128, output_type="latent",
    ).images  # fmt: skip


# ------------------------------------------------------------------------------------- guidance that is embedded


def test_the_embedding_is_diffusers():
    from diffusers import LatentConsistencyModelPipeline

    for scale in (1.0, 2.5, 8.5):
        theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1.0]), WIDTH)
        ours = guidance_embedding(scale, WIDTH, torch.zeros(1))
        assert ours.shape == (1, WIDTH)
        assert torch.allclose(ours, theirs, atol=2e-3)  # angles up to 7500, of which float32 keeps three decimals


@pytest.mark.parametrize("guidance_scale", [1.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 7])
@torch.no_grad()
def test_pictures_equal_diffusers(lcm, folder, steps, guidance_scale):
    out = masa.sample(
        lcm, SOURCE, sampler="lcm", seed=5, guidance_scale=guidance_scale, **(SETTINGS | {"steps": steps})
    )
    # Float32 rounding of the network, and of angles up to 7000.
    assert difference(out.latents, published(pipeline(folder), lcm, steps, guidance_scale)) < 5e-4


def test_guidance_changes_the_picture_and_costs_no_rows(lcm, monkeypatch):
    calls = []
    forward = type(lcm.unet).forward

    def spy(self, x, timestep, context, *args, **kwargs):
        calls.append((len(x), len(context)))
        return forward(self, x, timestep, context, *args, **kwargs)

    monkeypatch.setattr(type(lcm.unet), "forward", spy)
    runs = [
        masa.sample(lcm, SOURCE, TARGETS, controls=CONTROL, sampler=s, seed=3, guidance_scale=g, **SETTINGS).latents
        for s in ("lcm", "ddim")
        for g in (2.0, 8.0)
    ]
    assert set(calls) == {(3, 3)}
    for one, other in ((0, 1), (2, 3)):
        assert difference(runs[one], runs[other]) > 1e-2


def test_without_w_the_term_is_left_out(lcm, tiny):
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    context = tiny.encode_prompt([SOURCE])
    with torch.no_grad():
        assert torch.equal(lcm.unet(x, 499, context)[0], tiny.unet(x, 499, context)[0])
        told = lcm.unet(x, 499, context, guidance=lcm.embed_guidance(4.0))[0]
    assert not torch.equal(told, tiny.unet(x, 499, context)[0])
    assert tiny.embed_guidance(4.0) is None


@pytest.mark.parametrize("sampler", ["lcm", "unipc"])
def test_targets_caches_compilers_and_reruns_agree(lcm, folder, sampler, tmp_path):
    made = {"controls": CONTROL, "seed": 3, "sampler": sampler, "guidance_scale": 4.0, **SETTINGS}
    out = masa.sample(lcm, SOURCE, TARGETS, **made)
    same(masa.sample(lcm, SOURCE, TARGETS[1:], **made).latents, out.latents[[0, 2]])
    cache = masa.record(lcm, SOURCE, **made)
    cached = masa.sample(lcm, target=TARGETS, controls=CONTROL, cache=cache, targets_at_once=1, progress=False)
    same(cached.latents, out.latents)
    compiled = masa.sample(lcm.compile(compiler="eager"), SOURCE, TARGETS, **made)
    # Compiled convolutions are summed in another order: float32 rounding, grown over four steps.
    assert difference(compiled.latents, out.latents) < 1e-4
    out.source.save(tmp_path / "source.png")
    assert torch.equal(masa.rerun(tmp_path / "source.png", progress=False).latents, out.latents)


@torch.no_grad()
def test_an_inversion_is_told_its_guidance(lcm):
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    made = {"steps": 2, "height": 64, "width": 64, "progress": False}
    trajectories = [masa.invert(lcm, picture, SOURCE, guidance_scale=g, **made) for g in (1.0, 3.0)]
    z0 = trajectories[0].latents[:1]
    eps = lcm.unet(z0, 1, lcm.encode_prompt([SOURCE]), guidance=lcm.embed_guidance(1.0))[0]
    first = lcm.schedule.invert_step(eps, z0, 1, 2)
    assert difference(trajectories[0].latents[1:2], first) < 1e-5
    assert not torch.equal(trajectories[0].latents[1], trajectories[1].latents[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_prompt": "a dog"}, "negative_prompt='a dog' needs an unconditional prediction"),
        ({"guidance": masa.RescaledGuidance(0.5)}, r"guidance=RescaledGuidance\(phi=0.5\) needs an unconditional"),
        ({"method": "null-text"}, "null-text inversion needs an unconditional prediction"),
        ({"method": "edit-friendly"}, "edit-friendly inversion needs"),
    ],
)
def test_what_needs_two_halves_is_refused(lcm, settings, message):
    picture = torch.zeros(3, 64, 64)
    with pytest.raises(masa.MasaError, match=message):
        masa.edit(lcm, picture, "a cat", SOURCE, steps=4, controls=[], progress=False, **settings)
    if "method" not in settings:
        with pytest.raises(masa.MasaError, match=message):
            masa.sample(lcm, SOURCE, **SETTINGS, **settings)


def test_a_controlnet_has_no_place_for_guidance(lcm):
    """It is a copy of a plain UNet, whose timesteps are embedded without."""
    from masa.models.controlnet import ControlNetwork

    assert not [name for name in ControlNetwork(lcm.config.unet).state_dict() if "cond_proj" in name]


def test_the_real_shapes_are_detected(tmp_path):
    """cond_proj (320, 256) in a diffusers folder of SD v1.5's size; without it there is none."""
    from fake_checkpoints import key_list, write_folder

    parts = {name: dict(keys) for name, keys in key_list("sd15_diffusers").items() if isinstance(keys, dict)}
    parts = {name: parts[name] for name in ("unet", "vae", "text_encoder")}
    plain = open_checkpoint(write_folder(tmp_path / "plain", parts))
    parts["unet"]["time_embedding.cond_proj.weight"] = [[320, 256], "F32"]
    opened = open_checkpoint(write_folder(tmp_path / "lcm", parts))
    assert (plain.config.unet, opened.config.unet) == (SD_V1.unet, replace(SD_V1.unet, guidance_width=256))
    unet, _, _ = meta_models(opened.config)
    assert unet.state_dict()["time_embedding.cond_proj.weight"].shape == (320, 256)


# ------------------------------------------------------------------------------------------------------ LCM-LoRA

KINDS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "to_q", "to_k", "to_v", "to_out.0", "proj_in")
KINDS = (*KINDS, "proj_out", "ff.net.0.proj", "ff.net.2")


def locon(config: ModelConfig):
    """Names and shapes of the weights that LCM-LoRA changes: attentions, MLPs, residual blocks, changes of size."""
    unet, _, _ = meta_models(config)
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    found = {}
    for name, parameter in unet.named_parameters():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and name.startswith(blocks) and module.endswith(tuple(f".{k}" for k in KINDS)):
            found[module] = tuple(parameter.shape)
    return found


def lora_keys(shapes, rank):
    keys = {}
    for module, (out, inner, *kernel) in shapes.items():
        stem = f"lora_unet_{module.replace('.', '_')}"
        keys[f"{stem}.lora_down.weight"] = [[rank, inner, *kernel], "F16"]
        keys[f"{stem}.lora_up.weight"] = [[out, rank, *(1 for _ in kernel)], "F16"]
        keys[f"{stem}.alpha"] = [[], "F16"]
    return keys


def test_a_file_of_the_published_layout_fits_sd_v1(tmp_path):
    shapes = locon(SD_V1)
    assert len(shapes) == 278
    keys = lora_keys(shapes, rank=64)
    path = write_sparse(tmp_path / "pytorch_lora_weights.safetensors", keys)
    assert len(keys) == 834
    assert round(path.stat().st_size / 1e6, 1) == 134.6
    unet, _, text = meta_models(SD_V1)
    (opened,) = open_loras([Lora(str(path))], unet, text)
    assert {change.layer[1] for change in opened.changes} == set(shapes)


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("lcm lora") / "pytorch_lora_weights.safetensors"
    g = torch.Generator().manual_seed(6)
    keys = lora_keys(locon(tiny.config), rank=4)
    state = {
        key: torch.tensor(2.0) if key.endswith(".alpha") else 0.1 * torch.randn(shape, generator=g)
        for key, (shape, _) in keys.items()
    }
    save_file(state, path)
    return path


@pytest.mark.parametrize("guidance_scale", [1.0, 1.8])
@torch.no_grad()
def test_lcm_lora_equals_diffusers(tiny, tiny_folder, lora, guidance_scale):
    sd = masa.load(tiny_folder, device="cpu", dtype="fp32", lora=lora)
    out = masa.sample(sd, SOURCE, sampler="lcm", seed=5, guidance_scale=guidance_scale, **SETTINGS)
    theirs = published(pipeline(tiny_folder, lora), sd, 4, guidance_scale)
    # The random network multiplies float32 rounding.
    assert difference(out.latents, theirs) < 5e-4
    without = masa.sample(tiny, SOURCE, sampler="lcm", seed=5, guidance_scale=guidance_scale, **SETTINGS)
    assert difference(without.latents, theirs) > 1e-2


def test_an_edit_with_lcm_lora_is_written_down_and_runs_again(tiny, lora, tmp_path):
    sd = tiny.with_lora(lora)
    made = {"controls": masa.MasaCtrl(0, 8), "sampler": "lcm", "guidance_scale": 1.5, "seed": 2, **SETTINGS}
    out = masa.sample(sd, SOURCE, TARGETS, **made)
    out.source.save(tmp_path / "source.png")
    assert torch.equal(masa.rerun(tmp_path / "source.png", progress=False).latents, out.latents)
