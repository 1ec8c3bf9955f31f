"""Configuration from shapes, and refusal of everything that is no Stable Diffusion v1 model, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_checkpoints import Keys, key_list, prefixed, write_sparse

from masa import CheckpointError
from masa.config import SD_V1, TextConfig, UNetConfig, VAEConfig
from masa.weights.checkpoint import Entries, Entry
from masa.weights.detect import (
    LDM_HEADS,
    detect_text,
    detect_unet,
    detect_vae,
    split_ldm,
    text_namer,
    unet_namer,
    vae_namer,
)
from masa.weights.model_files import PartFiles, open_checkpoint

LDM = key_list("sd15_ldm")
DIFFUSERS = key_list("sd15_diffusers")
UNET = {k.removeprefix("model.diffusion_model."): v for k, v in LDM.items() if k.startswith("model.diffusion_model.")}
VAE = {k: v for k, v in LDM.items() if k.startswith("first_stage_model.")}
TEXT = {k: v for k, v in LDM.items() if k.startswith("cond_stage_model.")}


def rewidened(keys: Keys, old: int, new: int) -> Keys:
    """The same keys with one width of their attention's context replaced."""
    return {k: ([new if n == old and "attn2.to_" in k else n for n in shape], d) for k, (shape, d) in keys.items()}


def stable_diffusion_2() -> Keys:
    """An SD 2.x file's keys, as far as they differ: OpenCLIP's text encoder, 1024 features."""
    open_clip = {
        "cond_stage_model.model.positional_embedding": ([77, 1024], "F32"),
        "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": ([1024], "F32"),
    }
    return prefixed("model.diffusion_model.", rewidened(UNET, 768, 1024)) | VAE | open_clip


CONTROLNET = key_list("controlnet_sd15")
OTHERS: dict[str, tuple[Keys, str]] = {
    "SD 2.x": (stable_diffusion_2(), r"is a Stable Diffusion 2.x model \(its text encoder is OpenCLIP's\)"),
    "SD 2.x UNet": (rewidened(DIFFUSERS["unet"], 768, 1024), r"is a Stable Diffusion 2.x model .* 1024 text features"),
    "SDXL": (key_list("sdxl_base_ldm"), "is an SDXL model"),
    "SDXL UNet": (rewidened(DIFFUSERS["unet"], 768, 2048), r"is an SDXL model .* 2048 text features"),
    "inpainting": (key_list("sd15_inpaint_ldm"), "is an inpainting model: its UNet takes 9 channels instead of 4"),
    "pix2pix": (
        LDM | {"model.diffusion_model.input_blocks.0.0.weight": ([320, 8, 3, 3], "F32")},
        "is an InstructPix2Pix model: its UNet takes 8 channels",
    ),
    "zero terminal SNR": (LDM | {"v_pred": ([0], "F32"), "ztsnr": ([0], "F32")}, "trained with zero terminal SNR"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": ([9216, 3072], "BF16")}, "is a diffusion transformer"),
    **{f"LoRA, {style}": (keys, "is a LoRA") for style, keys in key_list("lora_sd15_rank4").items()},
    "ControlNet, LDM": (CONTROLNET["ldm_control_model"], "is a ControlNet"),
    "ControlNet, LDM without prefix": (
        {k.removeprefix("control_model."): v for k, v in CONTROLNET["ldm_control_model"].items()},
        "is a ControlNet",
    ),
    "ControlNet, diffusers": (CONTROLNET["diffusers"], "is a ControlNet"),
    **{f"T2I-Adapter, {kind}": (keys, "is a T2I-Adapter") for kind, keys in key_list("t2i_adapter_sd14v1").items()},
    "textual inversion, named": ({"<cat>": ([768], "F32")}, "is a textual-inversion embedding"),
    "LoRA, numbered": ({"unet:0:up": ([320, 1], "F32"), "unet:0:down": ([1, 320], "F32")}, "is a LoRA"),
    "textual inversion": ({"emb_params": ([2, 768], "F32")}, "is a textual-inversion embedding"),
    "VAE, LDM": ({k.removeprefix("first_stage_model."): v for k, v in VAE.items()}, r"is an autoencoder \(VAE\) alone"),
    "VAE, LDM with prefix": (VAE, r"is an autoencoder \(VAE\) alone"),
    "VAE, diffusers": (DIFFUSERS["vae"], r"is an autoencoder \(VAE\) alone"),
    "VAE, old diffusers": (DIFFUSERS["vae_as_published"], r"is an autoencoder \(VAE\) alone"),
    "UNet, LDM": (UNET, "is a UNet alone"),
    "UNet, LDM with prefix": (prefixed("model.diffusion_model.", UNET), "is a UNet alone"),
    "UNet, diffusers": (DIFFUSERS["unet"], "is a UNet alone"),
    "text encoder, LDM": (TEXT, "is a text encoder alone"),
    "text encoder, diffusers": (DIFFUSERS["text_encoder"], "is a text encoder alone"),
    "text encoder, transformers 5": (DIFFUSERS["text_encoder_transformers5"], "is a text encoder alone"),
    "no text encoder": ({k: v for k, v in LDM.items() if k not in TEXT}, "lacks a text encoder"),
    "no VAE": ({k: v for k, v in LDM.items() if k not in VAE}, "holds no autoencoder .* as vae="),
    "something else": ({"blk.0.attn.weight": ([4, 4], "F32")}, "holds no model known here .*blk.0.attn.weight"),
    "no tensors": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused_with_reason_and_remedy_in_one_line(tmp_path: Path, kind: str):
    keys, reason = OTHERS[kind]
    path = write_sparse(tmp_path / "file.safetensors", keys)
    with pytest.raises(CheckpointError, match=reason) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.count(";") == 1
    what, remedy = message.split(";")
    assert what
    assert any(word in remedy for word in ("give", "masa runs", "download it again"))


def test_reasons_of_different_kinds_differ():
    reasons = {reason for _, reason in OTHERS.values()}
    assert len(reasons) >= 16


def entries(keys: Keys) -> Entries:
    return {key: Entry(Path("file"), tuple(shape), dtype) for key, (shape, dtype) in keys.items()}


def detect(keys: Keys) -> tuple[UNetConfig, VAEConfig, TextConfig]:
    """The configuration of an LDM file with these keys."""
    parts = split_ldm(entries(keys))
    unet = PartFiles(parts["unet"], unet_namer(parts["unet"]))
    vae = PartFiles(parts["vae"], vae_namer(parts["vae"]))
    text = PartFiles(parts["text_encoder"], text_namer(parts["text_encoder"]))
    return (
        detect_unet(unet.shape_of(), LDM_HEADS, 32, "the UNet"),
        detect_vae(vae.shape_of(), 32, 0.18215, "the VAE"),
        detect_text(text.shape_of(), None, "quick_gelu", 1e-5, "the text encoder"),
    )


# Every thirtieth key, and those from which the configuration is read.
CRUCIAL = [
    key
    for i, key in enumerate(key for key in LDM if key in TEXT or key in VAE or key.startswith("model.diffusion_model."))
    if i % 30 == 0 or any(s in key for s in ("blocks.0.0.", "conv_in", "embedding.", "layers.0.mlp", "conv_out"))
]


def test_one_missing_tensor_does_not_change_the_configuration():
    for key in CRUCIAL:
        found = detect({k: v for k, v in LDM.items() if k != key})
        assert found == (SD_V1.unet, SD_V1.vae, SD_V1.text), key


def test_one_misshapen_tensor_does_not_change_the_configuration():
    # But for the few sizes that a single tensor tells: a vocabulary of another size is another configuration.
    alone = ("token_embedding.weight", "position_embedding.weight")
    for key in CRUCIAL:
        shape, dtype = LDM[key]
        for wrong in ([], [7] * len(shape)):
            if wrong and key.endswith((*alone, "input_blocks.0.0.weight")):
                continue
            found = detect(LDM | {key: (wrong, dtype)})
            assert found == (SD_V1.unet, SD_V1.vae, SD_V1.text), (key, wrong)


def test_other_widths_are_read_from_the_shapes():
    halved = {
        k: ([n // 2 if n > 16 and n not in (49408, 77) else n for n in shape], d) for k, (shape, d) in LDM.items()
    }
    unet, vae, text = detect(halved)
    assert unet == UNetConfig(block_out_channels=(160, 320, 640, 640), context_width=384)
    assert vae == VAEConfig(block_out_channels=(64, 128, 256, 256))
    assert text == TextConfig(width=384, intermediate_width=1536, heads=6)


def test_widths_that_the_usual_heads_do_not_divide_need_a_folder():
    with pytest.raises(CheckpointError, match=r"does not divide into 32 norm groups; .*config.json"):
        detect({k: ([n + 1 if n == 640 else n for n in shape], d) for k, (shape, d) in LDM.items()})


def test_the_fuller_of_two_text_encoders_is_taken():
    spare = {"cond_stage_model.transformer.final_layer_norm.weight": ([768], "F32")}
    parts = split_ldm(entries(LDM | spare))
    assert len(parts["text_encoder"]) == 196
    assert set(spare) <= set(parts["extra"])
