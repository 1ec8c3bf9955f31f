"""Other Stable Diffusion v1 checkpoints: each kind of file is made, loaded, and compared number by number."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from fake_checkpoints import key_list, prefixed, write_folder, write_sparse
from safetensors.torch import save_file

import masa
from benchmarks.random_checkpoint import random_parts, to_ldm
from masa.cli import main
from masa.config import ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from masa.controls.base import ActiveControl
from masa.models.unet import UNet
from masa.runtime.networks import check_keys
from masa.runtime.overflow import MendedVAE
from masa.schedule import alphas_at, eps_of_velocity, training_alphas
from masa.weights import folder as folders
from masa.weights.model_files import open_checkpoint, summarise

# Wide enough for the numbers of heads and norm groups that an LDM file cannot tell.
SMALL = ModelConfig(
    unet=UNetConfig(block_out_channels=(32, 64, 64, 64), context_width=64, layers_per_block=1),
    vae=VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
    text=TextConfig(width=64, intermediate_width=128, layers=3, heads=1),
)
NESTED = "cond_stage_model.transformer.text_model."
SETTINGS = {"steps": 2, "height": 64, "width": 64, "progress": False, "controls": masa.MasaCtrl(1, 8)}
LDM = key_list("sd15_ldm")


@pytest.fixture(scope="module")
def parts():
    return random_parts(SMALL, torch.float32)


@pytest.fixture(scope="module")
def state(parts):
    """An LDM file's tensors."""
    return {key: value.contiguous() for key, value in to_ldm(parts, SMALL).items()}


@pytest.fixture(scope="module")
def plain(state, tmp_path_factory):
    return load(save(tmp_path_factory.mktemp("plain") / "model.safetensors", state))


def save(path, state, metadata=None):
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path, metadata)
    return path


def load(path, **more):
    return masa.load(path, **({"device": "cpu", "dtype": "fp32"} | more))


def weights(sd):
    networks = {"unet": sd.unet, "vae": sd.vae, "text": sd.text_encoder}
    return {f"{name}.{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}


def same(sd, other):
    found, expected = weights(sd), weights(other)
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], value) for key, value in expected.items())


def moved_text(state, prefix):
    return {prefix + k.removeprefix(NESTED) if k.startswith(NESTED) else k: v for k, v in state.items()}


def without(state, prefix):
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


def spoiled(state, seed=3):
    """Tensors of the same names with other numbers."""
    g = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=g) for key, value in state.items()}


# What merges and fine-tunes look like: the LDM file's tensors, changed as their makers' tools do.
FILES = {
    "NAI's text names": lambda s: moved_text(s, "cond_stage_model.transformer."),
    "bare text names": lambda s: moved_text(s, "text_model."),
    "float position_ids": lambda s: s | {f"{NESTED}embeddings.position_ids": torch.arange(77.0)[None]},
    "merged position_ids": lambda s: s | {f"{NESTED}embeddings.position_ids": 0.3 * torch.arange(77.0)[None]},
    "garbage position_ids": lambda s: s | {f"{NESTED}embeddings.position_ids": torch.full((1, 77), float("nan"))},
    "NAI's position_ids": lambda s: s | {"cond_stage_model.transformer.embeddings.position_ids": torch.ones(1, 5)},
    "nested": lambda s: {f"state_dict.{k}": v for k, v in s.items()},
    "nested, beside others": lambda s: {f"state_dict.{k}": v for k, v in s.items()} | {"epoch": torch.ones(1)},
    "an odd prefix": lambda s: {f"model.{k}": v for k, v in s.items()},
    "training leftovers": lambda s: s | {"first_stage_model.loss.logvar": torch.ones(1), "betas": torch.ones(1000)},
    "a part of the text encoder twice": lambda s: moved_text(s, "cond_stage_model.transformer.")
    | dict(list(text_of(spoiled(s)).items())[:9]),
    "the text encoder twice": lambda s: text_of(spoiled(s), "cond_stage_model.transformer.") | s,
}  # fmt: skip


def text_of(state, prefix=NESTED):
    return {prefix + k.removeprefix(NESTED): v for k, v in state.items() if k.startswith(NESTED)}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_model(state, plain, tmp_path, kind):
    sd = load(save(tmp_path / "model.safetensors", FILES[kind](state)))
    assert same(sd, plain)
    assert sd.config == plain.config
    ids = torch.arange(77)[None]
    assert torch.equal(sd.text_encoder(ids), plain.text_encoder(ids))  # positions 0 to 76, whatever the file says


def test_mixed_dtypes_become_one(state, plain, tmp_path):
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    mixed = {key: value.to(kinds[i % 3]) for i, (key, value) in enumerate(state.items())}
    found = weights(load(save(tmp_path / "model.safetensors", mixed)))
    assert {value.dtype for value in found.values()} == {torch.float32}
    again = load(save(tmp_path / "rounded.safetensors", {key: value.float() for key, value in mixed.items()}))
    assert all(torch.equal(found[key], value) for key, value in weights(again).items())
    assert not same(again, plain)


VAE_FILES = {
    "LDM's names": lambda v: v,
    "without prefix, with leftovers": lambda v: {k.removeprefix("first_stage_model."): t for k, t in v.items()}
    | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)},
    "nested": lambda v: {f"state_dict.{k.removeprefix('first_stage_model.')}": t for k, t in v.items()},
    "another program's prefix": lambda v: {f"vae.{k.removeprefix('first_stage_model.')}": t for k, t in v.items()},
}  # fmt: skip


@pytest.mark.parametrize("kind", VAE_FILES)
def test_a_merge_without_autoencoder_takes_one_of_its_own(state, plain, tmp_path, kind):
    own = {key: value for key, value in state.items() if key.startswith("first_stage_model.")}
    vae = save(tmp_path / "vae.safetensors", VAE_FILES[kind](own))
    merge = save(tmp_path / "merge.safetensors", without(state, "first_stage_model."))
    with pytest.raises(masa.CheckpointError, match=r"holds no autoencoder .* give one's file as vae="):
        load(merge)
    assert same(load(merge, vae=vae), plain)
    other = save(tmp_path / "other.safetensors", state | spoiled(own))
    assert not same(load(other), plain)
    assert same(load(other, vae=vae), plain)  # one that is baked in gives way


# ------------------------------------------------------------------------------------------------ EMA


def with_averages(state, averages):
    flat = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": value for key, value in averages.items()}
    return state | flat | {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}


@pytest.mark.parametrize("wrap", ["", "state_dict."])
def test_plain_or_averaged_weights_are_taken_as_asked(state, plain, tmp_path, wrap):
    unet = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
    averages = spoiled(unet)
    both = {wrap + key: value for key, value in with_averages(state, averages).items()}
    path = save(tmp_path / "both.safetensors", both)
    with pytest.warns(UserWarning, match=r"averaged \(EMA\) weights, and the plain ones are taken"):
        first = load(path)
    assert same(first, plain)
    with warnings.catch_warnings(action="error"):
        second = load(path, ema=True)
    assert same(second, load(save(tmp_path / "averages.safetensors", state | averages)))
    assert first.fingerprint != second.fingerprint
    assert "EMA weights" in repr(second)
    assert "EMA" not in repr(first)
    with warnings.catch_warnings(action="error"):
        off = load(path, ema=True, offload=True)
    off.decode_latents(torch.zeros(1, 4, 8, 8))  # the UNet makes room, and is read again
    assert same(replace(off, text_encoder=second.text_encoder, vae=second.vae, offloaded=None), second)
    label = dict(summarise(path, check=check_keys))["EMA"]
    assert label == f"{len(unet)} averaged weights beside the plain ones, taken with ema=True"


def test_a_file_without_averages_cannot_give_them(state, tmp_path):
    scalars = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    path = save(tmp_path / "model.safetensors", state | scalars)  # as v1-5-pruned-emaonly has them
    with warnings.catch_warnings(action="error"):
        load(path)
    with pytest.raises(masa.CheckpointError, match=r"holds no averaged weights \(EMA\)"):
        load(path, ema=True)
    unet = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
    gone = next(iter(unet))
    path = save(tmp_path / "part.safetensors", with_averages(state, {k: v for k, v in unet.items() if k != gone}))
    with pytest.raises(masa.CheckpointError, match=f"missing are those of {gone}"):
        load(path, ema=True)


def test_a_folder_s_usual_file_is_the_averaged_one_where_another_lies_beside(parts, plain, tmp_path):
    folders.write_folder(tmp_path, SMALL, parts)
    with pytest.raises(masa.CheckpointError, match=r"no averaged weights \(EMA\) beside others"):
        load(tmp_path, ema=True)
    save(tmp_path / "unet" / "diffusion_pytorch_model.non_ema.safetensors", spoiled(parts["unet"]))
    assert same(load(tmp_path, ema=True), plain)
    assert "averaged weights; plain ones lie beside it" in dict(summarise(tmp_path))["EMA"]


def test_the_published_file_s_averages_fit(tmp_path):
    path = write_sparse(tmp_path / "model.safetensors", key_list("sd15_ldm_full_with_ema"))
    opened = open_checkpoint(path, ema=True)
    check_keys(opened)
    assert all(entry.stored.startswith("model_ema.") for entry in opened.unet.entries.values())
    assert len(opened.unet.entries) == 686
    assert open_checkpoint(path).plain_beside_ema
    assert not opened.plain_beside_ema


# ------------------------------------------------------------------------------------------------ clip skip


def by_hand(encoder, ids, skip):
    """CLIP's text transformer written out: the state before the last `skip` layers, then the final norm."""
    state = {name.removeprefix(encoder.state_prefix): value for name, value in encoder.model.state_dict().items()}
    config = encoder.config

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["embeddings.token_embedding.weight"][ids] + state["embeddings.position_embedding.weight"]
    later = torch.ones(77, 77).triu(1).bool()
    for layer in range(config.layers - skip):
        name = f"encoder.layers.{layer}"
        given = norm(x, f"{name}.layer_norm1")
        q, k, v = (
            linear(given, f"{name}.self_attn.{kind}_proj").unflatten(-1, (config.heads, -1)).transpose(1, 2)
            for kind in "qkv"
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.self_attn.out_proj")
        inner = linear(norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
        x = x + linear(inner * torch.sigmoid(1.702 * inner), f"{name}.mlp.fc2")
    return norm(x, "final_layer_norm")


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_equals_the_transformer_written_out(state, tmp_path, skip):
    sd = load(save(tmp_path / "model.safetensors", state), clip_skip=skip)
    prompts = ["a photo of a cat", "", "two dogs, in the snow!"]
    ids = sd.tokenizer(prompts)
    expected = by_hand(sd.text_encoder, ids, skip)
    found = sd.encode_prompt(prompts)
    assert torch.allclose(found, expected, atol=1e-4)  # float32, sums in another order; states are of size 1
    for other in {0, 1, 2} - {skip}:
        assert not torch.allclose(found, by_hand(sd.text_encoder, ids, other), atol=1e-2)


def test_clip_skip_is_part_of_a_model_and_of_its_runs(tiny_folder, tiny, tmp_path):
    sd = load(tiny_folder, clip_skip=1)
    assert sd.fingerprint != tiny.fingerprint
    first = masa.sample(sd, "a cat", "a dog", seed=0, **SETTINGS)
    assert first.settings["clip_skip"] == 1
    assert repr(sd).endswith("cpu, clip skip 1)")
    assert not torch.equal(first.latents, masa.sample(tiny, "a cat", "a dog", seed=0, **SETTINGS).latents)
    first.save(tmp_path / "out")
    again = masa.rerun(tmp_path / "out" / "target_0.png", progress=False)
    assert torch.equal(again.latents, first.latents)
    cache = masa.record(tiny, "a cat", seed=0, **SETTINGS)
    with pytest.raises(masa.MasaError, match="cache was recorded with"):
        masa.sample(sd, target="a dog", cache=cache, progress=False)
    trajectory = masa.invert(tiny, first.save(tmp_path / "x")[0], steps=2, height=64, width=64, progress=False)
    mixed = masa.sample(sd, target="a dog", trajectory=trajectory, seed=0, **SETTINGS)
    mixed.save(tmp_path / "mixed")
    with pytest.raises(masa.MasaError, match="inverted with clip_skip=0 and edited with clip_skip=1"):
        masa.rerun(tmp_path / "mixed" / "target_0.png", progress=False)


def test_clip_skip_with_lora_offload_and_from_the_command_line(tiny_folder, tiny, tmp_path, monkeypatch):
    sd = load(tiny_folder, clip_skip=1)
    off = load(tiny_folder, clip_skip=1, offload=True)
    assert torch.equal(off.encode_prompt(["a cat"]), sd.encode_prompt(["a cat"]))
    assert off.fingerprint == sd.fingerprint
    stem = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj"
    for layer, changes in ((0, True), (1, False)):  # the last of two layers is left out
        factors = {"lora_down.weight": torch.randn(2, 32), "lora_up.weight": torch.randn(32, 2)}
        path = save(tmp_path / f"{layer}.safetensors", {f"{stem.format(layer)}.{k}": v for k, v in factors.items()})
        found = sd.with_lora(path).encode_prompt(["a cat"])
        assert torch.equal(found, sd.encode_prompt(["a cat"])) == (not changes)
    monkeypatch.chdir(tmp_path)
    run = ["sample", "a cat", "-c", str(tiny_folder), "--steps", "1", "--height", "64", "--width", "64", "-q"]
    assert main([*run, "--device", "cpu", "--dtype", "fp32", "--clip-skip", "1", "--seed", "0", "-o", "out"]) == 0
    assert masa.Result.load("out").settings["fingerprint"] == sd.fingerprint


@pytest.mark.parametrize("skip", [-1, 2, True, 1.0, "1"])
def test_clip_skip_beyond_the_layers_is_refused(tiny_folder, skip):
    with pytest.raises(masa.MasaError, match=r"clip_skip is .*; expected 0 to 1"):
        load(tiny_folder, clip_skip=skip)


# ------------------------------------------------------------------------------------------------ v-prediction


@pytest.fixture(scope="module")
def velocity(tiny_folder):
    """The tiny model, taken to predict v."""
    return load(tiny_folder, prediction_type="v_prediction")


MARKS = {
    "key": ({"v_pred": torch.zeros(0)}, None, True),
    "metadata": ({}, {"modelspec.prediction_type": "v"}, True),
    "metadata, long": ({}, {"modelspec.prediction_type": "v_prediction"}, True),
    "metadata of the noise": ({}, {"modelspec.prediction_type": "epsilon"}, False),
    "key before metadata": ({"v_pred": torch.zeros(0)}, {"modelspec.prediction_type": "epsilon"}, True),
    "none": ({}, None, False),
}


@pytest.mark.parametrize("mark", MARKS)
def test_what_a_file_predicts_is_read_of_its_marks(state, tmp_path, mark):
    more, metadata, predicts_v = MARKS[mark]
    path = save(tmp_path / "model.safetensors", state | more, metadata)
    expected = ScheduleConfig() if predicts_v else None
    assert open_checkpoint(path).config.unet.velocity == expected
    assert ("velocity" in dict(summarise(path, check=check_keys))["prediction"]) == predicts_v
    for asked, wanted in (("epsilon", None), ("v_prediction", ScheduleConfig())):
        assert open_checkpoint(path, prediction_type=asked).config.unet.velocity == wanted


@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
def test_what_a_folder_predicts_is_read_of_its_scheduler(parts, tmp_path, said):
    config = replace(SMALL, schedule=ScheduleConfig(beta_end=0.02))
    if said == "v_prediction":
        config = replace(config, unet=replace(SMALL.unet, velocity=config.schedule))
    folders.write_folder(tmp_path, config, parts)
    assert load(tmp_path).config == config
    masa.load(tmp_path, device="cpu", dtype="fp32", prediction_type="epsilon")
    assert open_checkpoint(tmp_path, prediction_type="epsilon").config.unet.velocity is None


def test_predictions_that_are_none_are_refused(state, tiny_folder, tmp_path):
    with pytest.raises(masa.CheckpointError, match="prediction_type is 'sample'; expected 'epsilon' or"):
        load(tiny_folder, prediction_type="sample")
    path = save(tmp_path / "model.safetensors", state, {"modelspec.prediction_type": "flow"})
    with pytest.raises(masa.CheckpointError, match=r"modelspec\.prediction_type is 'flow'"):
        load(path)
    assert load(path, prediction_type="epsilon").config.unet.velocity is None


@pytest.mark.parametrize(
    ("more", "metadata"),
    [({"ztsnr": torch.zeros(0)}, None), ({"v_pred": torch.zeros(0)}, {"ss_zero_terminal_snr": "True"})],
)
def test_zero_terminal_snr_is_refused_by_name_whatever_is_asked(state, tmp_path, more, metadata):
    path = save(tmp_path / "model.safetensors", state | more, metadata)
    for asked in (None, "v_prediction"):
        with pytest.raises(masa.CheckpointError, match=r"zero terminal SNR \(ztsnr\)"):
            load(path, prediction_type=asked)


def test_the_noise_is_what_the_velocity_implies():
    """v = sqrt(a) eps - sqrt(1-a) x0, and x = sqrt(a) x0 + sqrt(1-a) eps."""
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    for t in (0, 500, 999):
        a = training_alphas(ScheduleConfig())[t].double()
        x, v = a.sqrt() * x0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x0
        assert torch.allclose(eps_of_velocity(v, x, a).double(), eps, atol=1e-6)


def test_each_row_of_the_network_s_output_is_turned(velocity, tiny):
    """Whichever rows share their first blocks, leave early, or have timesteps of their own."""
    from masa.models.batch_rows import Retirement

    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(4, 77, 32, generator=g)
    alphas = training_alphas(ScheduleConfig())
    cases = [
        (x, 700, context[:2], {}, [0, 1]),
        (x, torch.tensor([700, 20]), context[:2], {}, [0, 1]),
        (x, torch.tensor([700, 20]), context, {"copies": (0, 1, 0, 1)}, [0, 1, 0, 1]),
        (x, 700, context, {"copies": (0, 1, 0, 1), "retire": Retirement(3, (1, 2))}, [1, 0]),
    ]
    for given, timestep, prompts, more, rows in cases:
        v, found = (sd.unet(given, timestep, prompts, **more)[0] for sd in (tiny, velocity))
        times = torch.as_tensor(timestep).expand(2)[rows]
        a = alphas[times][:, None, None, None]
        assert torch.allclose(found, a.sqrt() * v + (1 - a).sqrt() * x[rows], atol=1e-6)
        assert not torch.allclose(found, v, atol=1e-2)


def test_between_timesteps_the_level_is_the_sampler_s(velocity):
    """Euler's fractional timesteps: the velocity is turned with the very level that the sampler is at."""
    levels = masa.Euler(karras=True).levels(velocity.schedule, 7)
    assert any(t != int(t) for t in levels.timesteps)
    found = alphas_at(training_alphas(ScheduleConfig()), torch.tensor(levels.timesteps))
    assert torch.allclose(found, torch.tensor(levels.alphas[:-1]), rtol=1e-3)  # float32 timesteps of up to 999
    whole = torch.arange(1000.0)
    assert torch.equal(alphas_at(training_alphas(ScheduleConfig()), whole), training_alphas(ScheduleConfig()))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_sampling_equals_diffusers(velocity, tiny_folder, sampler):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings |= {"prediction_type": "v_prediction"}
    if sampler == "ddim":
        scheduler = DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    else:
        scheduler = DPMSolverMultistepScheduler(**settings, timestep_spacing="trailing", final_sigmas_type="zero")
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()
    steps, scale = 5, 3.0
    scheduler.set_timesteps(steps)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    uncond, cond = velocity.encode_prompt([""]), velocity.encode_prompt(["a cat"])
    x = start.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            v_u, v_c = (unet(x, t, encoder_hidden_states=context).sample for context in (uncond, cond))
            x = scheduler.step(v_u + scale * (v_c - v_u), t, x).prev_sample
    usual = {"steps": steps, "guidance_scale": scale, "height": 128, "width": 128, "progress": False}
    out = masa.sample(velocity, "a cat", latents=start, sampler=sampler, **usual)
    assert (out.latents - x).abs().max() < 1e-4 * x.std()


def test_inversion_fitting_caching_compiling_and_watching_get_the_noise(velocity, tmp_path):
    """Guided v turned into noise is guided noise, so all of them follow from one another."""
    g = torch.Generator().manual_seed(0)
    picture = torch.rand(3, 64, 64, generator=g) * 2 - 1
    usual = {"steps": 3, "height": 64, "width": 64, "progress": False}
    trajectory = masa.invert(velocity, picture, "a cat", **usual)
    x, t = trajectory.latents[2:3], velocity.schedule.timesteps(3)[::-1][2]
    a = velocity.schedule.alpha(t)
    context = velocity.encode_prompt(["a cat"])
    twin = copy.copy(velocity.unet)
    v = UNet.forward(_predicting_noise(twin), x, t, context)[0]
    eps = math.sqrt(a) * v + math.sqrt(1 - a) * x
    stepped = velocity.schedule.invert_step(eps, x, t, 3)
    assert torch.allclose(trajectory.latents[3:4], stepped, atol=1e-5)

    run = {"target": "a dog", "trajectory": trajectory, "guidance_scale": 3.0, "controls": masa.MasaCtrl(1, 8)}
    whole = masa.sample(velocity, **run, progress=False)
    cache = masa.record(
        velocity, trajectory=trajectory, guidance_scale=3.0, controls=masa.MasaCtrl(1, 8), progress=False
    )
    cached = masa.sample(velocity, target="a dog", cache=cache, controls=masa.MasaCtrl(1, 8), progress=False)
    compiled = masa.sample(velocity.compile(compiler="eager"), **run, progress=False)
    for other in (cached, compiled):
        assert torch.allclose(other.latents, whole.latents, atol=1e-4 * float(whole.latents.std()))
    fitted = masa.invert(velocity, picture, "a cat", **usual, method="null-text", edit_guidance_scale=3.0)
    free = {"guidance_scale": 3.0, "controls": [], "pin_source": False, "progress": False}
    errors = [
        float((masa.sample(velocity, trajectory=kept, **free).latents[:1] - trajectory.latents[:1]).square().mean())
        for kept in (fitted, trajectory)
    ]
    assert errors[0] < 0.8 * errors[1]  # fitted to the noise, or it would not bring the picture nearer
    watcher = Watcher([])
    masa.sample(velocity, "a cat", seed=0, **(usual | {"steps": 1, "guidance_scale": 1.0}), controls=[watcher])
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = velocity.schedule.timesteps(1)[0]
    a = velocity.schedule.alpha(t)
    v = UNet.forward(_predicting_noise(twin), start, t, context)[0]
    assert torch.allclose(watcher.seen[0], math.sqrt(a) * start - math.sqrt(1 - a) * v, atol=1e-4)


@dataclass(frozen=True)
class Watcher:
    """A control that keeps what the steps take the clean latents to be."""

    needs_targets: ClassVar[bool] = False
    seen: list

    def begin(self, run):
        active = ActiveControl()
        active.see_prediction = lambda step, x0: self.seen.append(x0)
        return active


def _predicting_noise(unet):
    unet.config = replace(unet.config, velocity=None)
    return unet


def test_a_model_of_the_velocity_is_another_model_for_reruns_and_caches(velocity, tiny, tmp_path):
    assert velocity.fingerprint != tiny.fingerprint
    first = masa.sample(velocity, "a cat", "a dog", seed=0, **SETTINGS)
    assert first.settings["prediction_type"] == "v_prediction"
    assert repr(velocity).endswith("cpu, v-prediction)")
    first.save(tmp_path / "out")
    assert torch.equal(masa.rerun(tmp_path / "out" / "target_0.png", progress=False).latents, first.latents)
    with pytest.raises(masa.MasaError, match="cache was recorded with"):
        masa.sample(velocity, target="a dog", cache=masa.record(tiny, "a cat", seed=0, **SETTINGS), progress=False)


# ------------------------------------------------------------------------------------------------ float16


@pytest.fixture
def overflowing(tiny_folder):
    """A model in float16 whose autoencoder's first maps are beyond it, and the same in float32."""
    with warnings.catch_warnings(action="ignore"):  # float16 is emulated
        models = load(tiny_folder, dtype="fp16"), load(tiny_folder)
    for sd in models:
        with torch.no_grad():
            for conv in (sd.vae.decoder.conv_in, sd.vae.encoder.conv_in):
                conv.weight.copy_((conv.weight.half().float() * 3e5).clamp(-6e4, 6e4))
    models[1].vae.load_state_dict(models[0].vae.state_dict())
    return models


def test_a_decoding_that_overflows_is_repeated_in_float32_and_said(overflowing):
    half, full = overflowing
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = {name: weight.clone() for name, weight in half.vae.state_dict().items()}
    with pytest.warns(UserWarning, match="decoding was not finite in float16 and is repeated in float32"):
        found = half.decode_latents(latents)
    assert [picture.tobytes() for picture in found] == [p.tobytes() for p in full.decode_latents(latents)]
    assert all(torch.equal(weight, before[name]) for name, weight in half.vae.state_dict().items())
    with pytest.warns(UserWarning, match="decoding was not finite"):
        tiled = half.decode_latents(latents[:1].repeat(1, 1, 1, 9), tiled=True)
    assert tiled[0].tobytes() == full.decode_latents(latents[:1].repeat(1, 1, 1, 9), tiled=True)[0].tobytes()


def test_an_encoding_that_overflows_is_repeated_in_float32_and_said(overflowing):
    half, full = overflowing
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with pytest.warns(UserWarning, match="encoding was not finite in float16 and is repeated in float32"):
        found = half.encode_image(picture)
    assert torch.equal(found, full.encode_image(picture))


def test_what_is_finite_or_cannot_be_mended_is_left(tiny, overflowing):
    asked = []
    mended = MendedVAE(tiny.vae, torch.float16)

    def compute(vae, x):
        asked.append(x.dtype)
        return x

    with warnings.catch_warnings(action="error"):
        assert mended.finite(compute, torch.ones(3), "decoding").dtype == torch.float16
        assert asked == [torch.float16]
        assert not torch.isfinite(mended.finite(compute, torch.full((3,), float("nan")), "decoding")).any()
        assert not torch.isfinite(MendedVAE(tiny.vae, torch.float32).finite(compute, torch.ones(1) / 0, "x")).any()


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_tells_what_was_found(tmp_path):
    text = "cond_stage_model.transformer."
    moved = {text + k.removeprefix(NESTED) if k.startswith(NESTED) else k: v for k, v in LDM.items()}
    odd = prefixed("state_dict.", {k: v for k, v in moved.items() if not k.startswith("first_stage_model.")})
    told = dict(summarise(write_sparse(tmp_path / "odd.safetensors", odd), check=check_keys))
    assert told["names"] == "all behind state_dict."
    assert told["text layout"] == f"{text}*"
    assert told["missing"] == "vae"
    assert told["usable"].startswith("no: ")
    assert "vae=" in told["usable"]
    told = dict(summarise(write_sparse(tmp_path / "twice.safetensors", LDM | moved), check=check_keys))
    assert told["text layout"] == f"{NESTED}*; also, not taken, {text}*"
    assert told["prediction"] == "the noise (epsilon): nothing says otherwise"
    assert told["usable"] == "yes"
    assert not {"EMA", "names"} & set(told)


REST = {
    "sd15_ldm": None,
    "sd15_ldm_full_with_ema": None,
    "sd15_inpaint_ldm": "inpainting model",
    "sdxl_base_ldm": "SDXL",
}


@pytest.mark.parametrize("prefix", ["", "state_dict."])
@pytest.mark.parametrize("name", REST)
def test_every_published_list_opens_or_is_refused_with_its_reason(tmp_path, name, prefix):
    path = write_sparse(tmp_path / "model.safetensors", prefixed(prefix, key_list(name)))
    if REST[name] is None:
        check_keys(open_checkpoint(path))
        return
    with pytest.raises(masa.CheckpointError, match=REST[name]):
        open_checkpoint(path)


def test_the_published_folder_opens_as_a_model_of_the_velocity(tmp_path):
    parts = {part: key_list("sd15_diffusers")[part] for part in ("unet", "vae", "text_encoder")}
    config = {"scheduler/scheduler_config.json": {"prediction_type": "v_prediction"}}
    opened = open_checkpoint(write_folder(tmp_path, parts, config))
    check_keys(opened)
    assert opened.config.unet.velocity == ScheduleConfig()
    assert opened.prediction == "the velocity (v): its scheduler's prediction_type says so"
