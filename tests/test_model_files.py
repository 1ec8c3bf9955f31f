"""Every published layout opens with SD v1.5's configuration; folders that are none say what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_checkpoints import (
    Keys,
    key_list,
    prefixed,
    retyped,
    write_folder,
    write_shards,
    write_sparse,
)

from masa import CheckpointError
from masa.config import SD_V1, ModelConfig, ScheduleConfig
from masa.runtime.networks import check_keys
from masa.weights.model_files import Checkpoint, open_checkpoint, summarise

LDM = key_list("sd15_ldm")
DIFFUSERS = key_list("sd15_diffusers")
FOLDER = {part: DIFFUSERS[part] for part in ("unet", "vae", "text_encoder")}
VAE = {k.removeprefix("first_stage_model."): v for k, v in LDM.items() if k.startswith("first_stage_model.")}
NESTED = "cond_stage_model.transformer.text_model."
TEXT = {k.removeprefix(NESTED): v for k, v in LDM.items() if k.startswith(NESTED)}
WITHOUT_TEXT = {k: v for k, v in LDM.items() if not k.startswith("cond_stage_model.")}
WITHOUT_VAE = {k: v for k, v in LDM.items() if not k.startswith("first_stage_model.")}


def assert_loads(opened: Checkpoint, config: ModelConfig = SD_V1) -> None:
    """The configuration is detected, and every tensor is there under a name and in a shape that fits."""
    assert opened.config == config
    check_keys(opened)


def refusal(path: Path, reason: str, **more: Path) -> str:
    """The one-line message with which a path is refused."""
    with pytest.raises(CheckpointError, match=reason) as error:
        check_keys(open_checkpoint(path, **more))
    message = str(error.value)
    assert "\n" not in message
    assert ";" in message
    return message


LDM_FILES: dict[str, Keys] = {
    "emaonly": LDM,
    "pruned with EMA": key_list("sd15_ldm_full_with_ema"),
    "float16": retyped(LDM, "F16"),
    "bfloat16": retyped(LDM, "BF16"),
    "no position_ids": {k: v for k, v in LDM.items() if not k.endswith("position_ids")},
    "no text_model": WITHOUT_TEXT | prefixed("cond_stage_model.transformer.", TEXT),
    "no transformer": WITHOUT_TEXT | prefixed("cond_stage_model.text_model.", TEXT),
    "text_model alone": WITHOUT_TEXT | prefixed("text_model.", TEXT),
    "CLIP's other parts": LDM
    | {
        "cond_stage_model.logit_scale": ([], "F32"),
        "cond_stage_model.transformer.text_projection.weight": ([768, 768], "F32"),
        "cond_stage_model.transformer.vision_model.embeddings.class_embedding": ([1024], "F32"),
    },
    "VAE with training leftovers": LDM
    | {
        "first_stage_model.loss.logvar": ([], "F32"),
        "first_stage_model.loss.perceptual_loss.lin0.model.1.weight": ([1, 64, 1, 1], "F32"),
        "first_stage_model.model_ema.decay": ([], "F32"),
    },
}


@pytest.mark.parametrize("kind", LDM_FILES)
def test_ldm_files_open(tmp_path, kind):
    opened = open_checkpoint(write_sparse(tmp_path / "model.safetensors", LDM_FILES[kind]))
    assert opened.layout == "single file (LDM)"
    assert_loads(opened)


@pytest.mark.parametrize("vae", ["vae", "vae_as_published"])
@pytest.mark.parametrize("text", ["text_encoder", "text_encoder_transformers5"])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_folders_open(tmp_path, vae, text, dtype):
    parts = {"unet": DIFFUSERS["unet"], "vae": DIFFUSERS[vae], "text_encoder": DIFFUSERS[text]}
    folder = write_folder(tmp_path, {part: retyped(keys, dtype) for part, keys in parts.items()})
    opened = open_checkpoint(folder)
    assert opened.layout == "folder (diffusers)"
    # Without text_encoder/config.json the number of heads follows from CLIP's width of 64 each.
    assert_loads(opened)


def files_of(opened: Checkpoint) -> set[str]:
    return {entry.path.name for part in opened.parts.values() for entry in part.entries.values()}


@pytest.mark.parametrize("prefer_half", [True, False])
def test_of_two_variants_the_preferred_one_is_read(tmp_path, prefer_half):
    write_folder(tmp_path, FOLDER)
    write_folder(tmp_path, {p: retyped(k, "F16") for p, k in FOLDER.items()}, variant="fp16")
    opened = open_checkpoint(tmp_path, prefer_half=prefer_half)
    assert all((".fp16." in name) == prefer_half for name in files_of(opened))
    assert_loads(opened)


@pytest.mark.parametrize("variant", ["", "fp16"])
@pytest.mark.parametrize("prefer_half", [True, False])
def test_the_only_variant_is_read_whatever_is_preferred(tmp_path, variant, prefer_half):
    assert_loads(open_checkpoint(write_folder(tmp_path, FOLDER, variant=variant), prefer_half=prefer_half))


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_are_read_through_their_index(tmp_path, variant):
    for part, keys in FOLDER.items():
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        (tmp_path / part).mkdir()
        write_shards(tmp_path / part, stem, keys, variant=variant)
    opened = open_checkpoint(tmp_path)
    assert len(files_of(opened)) == 6
    assert_loads(opened)
    (tmp_path / "unet" / f"diffusion_pytorch_model{variant and '.' + variant}-00002-of-00003.safetensors").unlink()
    assert "1 of 3 shards" in refusal(tmp_path, "not beside it")


def test_weights_without_ema_and_other_tools_files_are_passed_over(tmp_path):
    write_folder(tmp_path, FOLDER)
    write_sparse(tmp_path / "unet" / "diffusion_pytorch_model.non_ema.safetensors", {"x": ([1], "F32")})
    write_sparse(tmp_path / "unet" / "adapter.safetensors", {"x": ([1], "F32")})
    assert_loads(open_checkpoint(tmp_path))


VAE_FILES: dict[str, Keys] = {
    "LDM": VAE,
    "LDM, prefixed": prefixed("first_stage_model.", VAE),
    "LDM with training leftovers": VAE | {"loss.logvar": ([], "F32"), "model_ema.decay": ([], "F32")},
    "diffusers": DIFFUSERS["vae"],
    "old diffusers": DIFFUSERS["vae_as_published"],
    "whole checkpoint": LDM,
}


@pytest.mark.parametrize("kind", VAE_FILES)
@pytest.mark.parametrize("model", ["file without VAE", "file", "folder without VAE"])
def test_another_autoencoder_serves_every_model(tmp_path, kind, model):
    vae = write_sparse(tmp_path / "vae.safetensors", VAE_FILES[kind])
    if model == "folder without VAE":
        path = write_folder(tmp_path / "model", {k: v for k, v in FOLDER.items() if k != "vae"})
    else:
        path = write_sparse(tmp_path / "model.safetensors", LDM if model == "file" else WITHOUT_VAE)
    opened = open_checkpoint(path, vae=vae)
    assert {entry.path for entry in opened.vae.entries.values()} == {vae}
    assert_loads(opened)


@pytest.mark.parametrize("folder", ["model", "model/vae"])
def test_another_autoencoder_may_be_a_folder(tmp_path, folder):
    write_folder(tmp_path / "model", FOLDER)
    path = write_sparse(tmp_path / "model.safetensors", WITHOUT_VAE)
    assert_loads(open_checkpoint(path, vae=tmp_path / folder))


def test_what_is_no_autoencoder_is_refused_as_one(tmp_path):
    path = write_sparse(tmp_path / "model.safetensors", LDM)
    lora = write_sparse(tmp_path / "lora.safetensors", key_list("lora_sd15_rank4")["kohya"])
    text = write_sparse(tmp_path / "text.safetensors", DIFFUSERS["text_encoder_transformers5"])
    refusal(path, "is a LoRA", vae=lora)
    refusal(path, "holds no autoencoder .*give as vae=", vae=text)
    sdxl = write_folder(tmp_path / "sdxl", {"vae": DIFFUSERS["vae"]}, {"vae/config.json": {"scaling_factor": 0.13025}})
    refusal(path, "is SDXL's autoencoder", vae=sdxl)
    with pytest.raises(FileNotFoundError, match=r"no autoencoder at .*; give"):
        open_checkpoint(path, vae=tmp_path / "nothing")


def test_missing_unexpected_and_misshapen_keys_are_named_and_counted_together(tmp_path):
    keys = dict(LDM)
    gone = [k for k in keys if k.startswith("model.diffusion_model.output_blocks.5.1.")]
    for key in gone:
        del keys[key]
    keys["first_stage_model.decoder.extra.weight"] = ([3], "F32")
    keys["cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"] = ([3072, 700], "F32")
    keys["model.diffusion_model.out.2.bias"] = ([4], "F8_E4M3")
    message = refusal(write_sparse(tmp_path / "model.safetensors", keys), "does not fit a Stable Diffusion v1 model")
    assert f"{len(gone)} missing: {gone[0].rpartition('.1.')[0]}" in message
    assert f"and {len(gone) - 4} more" in message
    assert "1 unexpected: first_stage_model.decoder.extra.weight" in message
    assert "1 misshapen: " in message
    assert "layers.3.mlp.fc1.weight is [3072, 700], expected [3072, 768]" in message
    assert "out.2.bias is F8_E4M3" in message


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("unet/config.json", {"use_linear_projection": True}, "use_linear_projection = True where .* has False"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, r"heads"),
        ("unet/config.json", {"attention_head_dim": 7}, "does not divide into 7 heads"),
        ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv = False"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule = 'linear'"),
    ],
)
def test_settings_that_the_models_do_not_compute_are_refused(tmp_path, name, settings, reason):
    folder = write_folder(tmp_path, FOLDER, {name: settings})
    assert str(tmp_path) in refusal(folder, reason)


def test_settings_are_read(tmp_path):
    settings = {
        "unet/config.json": {"attention_head_dim": 4, "sample_size": 96, "norm_num_groups": 16},
        "text_encoder/config.json": {"num_attention_heads": 8, "hidden_act": "gelu"},
        "scheduler/scheduler_config.json": {"beta_start": 0.001, "num_train_timesteps": 500},
    }
    config = open_checkpoint(write_folder(tmp_path, FOLDER, settings)).config
    assert (config.unet.heads, config.unet.norm_groups, config.image_size) == (4, 16, 768)
    assert (config.text.heads, config.text.activation) == (8, "gelu")
    assert config.schedule == ScheduleConfig(beta_start=0.001, training_timesteps=500)


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({}, 8),
        ({"attention_head_dim": 4}, 4),
        ({"attention_head_dim": [4, 4, 4, 4]}, 4),
        ({"num_attention_heads": 4}, 4),
        ({"num_attention_heads": None, "attention_head_dim": 4}, 4),
        ({"num_attention_heads": 4, "attention_head_dim": 8}, 4),
    ],
)
def test_heads_are_read_from_the_settings(tmp_path, settings, heads):
    """No tensor's shape tells them."""
    assert open_checkpoint(write_folder(tmp_path, FOLDER, {"unet/config.json": settings})).config.unet.heads == heads


def test_levels_with_different_heads_are_refused(tmp_path):
    folder = write_folder(tmp_path, FOLDER, {"unet/config.json": {"attention_head_dim": [4, 8, 8, 8]}})
    refusal(folder, r"its levels have \[4, 8\] heads")


@pytest.mark.parametrize("text", ["{broken", "[1, 2]", "\udcff"])
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_broken_settings_file_is_named(tmp_path, name, text):
    write_folder(tmp_path, FOLDER, {name: {}})
    (tmp_path / name).write_text(text, errors="surrogateescape")
    assert str(tmp_path / name) in refusal(tmp_path, "is not valid JSON|and not an object")


def inpainting_folder(folder: Path) -> Path:
    return write_folder(folder, FOLDER | {"unet": DIFFUSERS["unet"] | {"conv_in.weight": ([320, 9, 3, 3], "F32")}}, {})


def sd2_folder(folder: Path) -> Path:
    unet = {k: ([1024 if n == 768 else n for n in s], d) for k, (s, d) in DIFFUSERS["unet"].items()}
    return write_folder(folder, FOLDER | {"unet": unet}, {"unet/config.json": {"attention_head_dim": [5, 10, 20, 20]}})


def pickled_folder(folder: Path) -> Path:
    write_folder(folder, {k: v for k, v in FOLDER.items() if k != "unet"})
    (folder / "unet").mkdir()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    return folder


def file_folder(folder: Path, keys: Keys, name: str = "diffusion_pytorch_model.safetensors") -> Path:
    write_sparse(folder / name, keys)
    return folder


def folder_without_vae_file(folder: Path) -> Path:
    write_folder(folder, FOLDER)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def folder_of_bare_shards(folder: Path) -> Path:
    write_folder(folder, FOLDER)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    return folder


FOLDERS = {
    "empty": (lambda folder: folder, "has no folder unet, text_encoder, vae; expected"),
    "without text encoder": (
        lambda folder: write_folder(folder, {k: v for k, v in FOLDER.items() if k != "text_encoder"}),
        "has no folder text_encoder; expected",
    ),
    "inpainting": (inpainting_folder, "is an inpainting model: its UNet takes 9 channels"),
    "SD 2.x": (sd2_folder, r"is a Stable Diffusion 2.x model .*1024 text features"),
    "SDXL": (lambda folder: write_folder(folder, FOLDER | {"text_encoder_2": {}}), "is an SDXL model"),
    "SD 3": (lambda folder: write_folder(folder, {"transformer": {}}), "is a diffusion transformer"),
    "ControlNet": (lambda folder: file_folder(folder, key_list("controlnet_sd15")["diffusers"]), "is a ControlNet"),
    "UNet's": (lambda folder: file_folder(folder, DIFFUSERS["unet"]), "is a UNet alone"),
    "VAE's": (lambda folder: file_folder(folder, DIFFUSERS["vae"]), r"is an autoencoder \(VAE\) alone"),
    "one of files": (lambda folder: file_folder(folder, LDM, "v1-5.safetensors"), "give the path of one: v1-5"),
    "pickled": (pickled_folder, "diffusion_pytorch_model.bin is a pickled checkpoint"),
    "part without weights": (folder_without_vae_file, "holds no .safetensors file; download"),
    "shards without index": (folder_of_bare_shards, "holds shards without their index"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_are_no_checkpoint_say_what_they_are(tmp_path, kind):
    make, reason = FOLDERS[kind]
    assert str(tmp_path) in refusal(make(tmp_path), reason)


def test_parts_of_different_models_are_refused(tmp_path):
    text = {k: ([512 if n == 768 else n for n in s], d) for k, (s, d) in DIFFUSERS["text_encoder"].items()}
    refusal(write_folder(tmp_path, FOLDER | {"text_encoder": text}), "512 features and the UNet expects 768")


def test_nothing_at_the_path_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing; expected"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        summarise(tmp_path / "nothing")


def test_a_summary_of_a_whole_file(tmp_path):
    path = write_sparse(tmp_path / "model.safetensors", key_list("sd15_ldm_full_with_ema"))
    lines = dict(summarise(path, check=check_keys))
    assert lines["layout"] == "single file (LDM)"
    assert lines["unet"] == "686 tensors, 859,520,964 parameters, 3,438.1 MB, F32"
    assert lines["text_encoder"].startswith("196 tensors, 123,060,480 parameters")
    assert lines["extra model_ema"].startswith("688 tensors")
    assert lines["missing"] == "no part"
    assert "(320, 640, 1280, 1280), 8 heads" in lines["unet shape"]
    assert lines["usable"] == "yes"


def test_a_summary_of_a_folder_tells_its_parts_and_what_is_missing(tmp_path):
    write_folder(tmp_path, {"unet": retyped(DIFFUSERS["unet"], "F16"), "vae": DIFFUSERS["vae"]})
    lines = dict(summarise(tmp_path))
    assert lines["layout"] == "folder (diffusers)"
    assert lines["unet"].endswith("1,719.0 MB, F16")
    assert lines["missing"] == "text_encoder"
    assert lines["usable"].startswith("no: ")
    assert "text_encoder" in lines["usable"]


def test_a_summary_counts_missing_keys_where_it_is_given_the_check(tmp_path):
    keys = {k: v for k, v in LDM.items() if not k.startswith("model.diffusion_model.out.")}
    path = write_sparse(tmp_path / "model.safetensors", keys)
    assert dict(summarise(path))["usable"] == "yes"
    assert "4 missing" in dict(summarise(path, check=check_keys))["usable"]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (key_list("lora_sd15_rank4")["kohya"], "is a LoRA"),
        (key_list("controlnet_sd15")["diffusers"], "is a ControlNet"),
        (key_list("sdxl_base_ldm"), "is an SDXL model"),
        (DIFFUSERS["vae"], r"is an autoencoder \(VAE\) alone"),
    ],
)
def test_a_summary_of_a_refused_file_counts_its_tensors_and_says_why(tmp_path, keys, reason):
    lines = summarise(write_sparse(tmp_path / "file.safetensors", keys))
    label, verdict = lines[-1]
    assert label == "usable"
    assert verdict.startswith("no: ")
    assert reason.replace("\\", "") in verdict
    counted = [int(text.split()[0].replace(",", "")) for _, text in lines if " tensors, " in text]
    assert sum(counted) == len(keys)


def test_a_summary_of_a_file_that_is_no_checkpoint_is_its_verdict(tmp_path):
    (tmp_path / "model.safetensors").write_text(json.dumps({"not": "weights"}))
    assert [label for label, _ in summarise(tmp_path / "model.safetensors")] == ["path", "usable"]
