"""What a set of tensors is, and the configuration of an SD-v1-shaped model, from names and shapes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from masa.config import TextConfig, UNetConfig, VAEConfig
from masa.errors import CheckpointError
from masa.weights.checkpoint import Entries
from masa.weights.layouts import (
    UNET_PREFIX,
    VAE_PREFIX,
    ldm_unet_name,
    ldm_vae_name,
    old_diffusers_vae_name,
    text_name,
)
from masa.weights.taesd import is_tiny
from masa.weights.variants import chosen_text

# Our parameter name -> its shape in the file, or None.
ShapeOf = Callable[[str], "tuple[int, ...] | None"]
Namer = Callable[[str], str]

LDM_HEADS = 8  # fixed by SD v1's LDM configuration; no tensor's shape tells it
CLIP_HEAD_WIDTH = 64
# Tensors of a residual block that tell its width on their first axis.
RESNET_KINDS = ("conv1.weight", "conv1.bias", "norm2.weight", "norm2.bias", "conv2.weight", "conv2.bias")


SERVED = "masa runs Stable Diffusion v1.x checkpoints, such as v1-5-pruned-emaonly.safetensors"

# What a piece of a tensor's name says about the file that it is in. The first that is found decides.
KNOWN_KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (
            *("lora_up.", "lora_down.", "lora_A.", "lora_B.", "lora.up.", "lora.down.", ":up", ":down"),
            *("hada_w1", "lokr_w1", "oft_blocks"),
        ),
        "a LoRA, which changes a model but is none",
        "give the model that it is for, and this file as lora=",
    ),
    (
        ("control_model.", "input_hint_block.", "controlnet_cond_embedding.", "zero_convs."),
        "a ControlNet, which steers a model but is none",
        "give the Stable Diffusion v1 checkpoint that it is for",
    ),
    (
        ("body.0.block1.", "body.0.in_conv.", "body.0.resnets.", "transformer_layes.", "style_embedding"),
        "a T2I-Adapter, which steers a model but is none",
        "give the Stable Diffusion v1 checkpoint that it is for",
    ),
    (
        ("ip_adapter.", "image_proj."),
        "an IP-Adapter, which steers a model but is none",
        "give the Stable Diffusion v1 checkpoint that it is for",
    ),
    (("emb_params",), "a textual-inversion embedding", "give the model that it is for, and this file as embeddings="),
    (("conditioner.embedders.", "add_embedding.linear_1"), "an SDXL model", SERVED),
    (
        ("cond_stage_model.model.",),
        "a Stable Diffusion 2.x model (its text encoder is OpenCLIP's)",
        SERVED,
    ),
    (
        ("double_blocks.", "joint_blocks.", "single_transformer_blocks.", "add_k_proj.", "caption_projection."),
        "a diffusion transformer (such as SD 3 or Flux)",
        SERVED,
    ),
    (("label_emb.", "class_embedding."), "a model whose UNet is conditioned on classes or images too", SERVED),
)
OTHER_INPUTS = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth-to-image model"}
OTHER_CONTEXTS = {1024: "a Stable Diffusion 2.x model", 2048: "an SDXL model"}
WORD_SHAPES = ((768,), (1024,), (1280,))  # last axes of embeddings of words, of any model


def refuse_other_models(entries: Entries, path: object) -> None:
    """CheckpointError, with reason and remedy, for the known kinds of files that are not an SD v1 model.

    entries: those of a single file, or of a folder's UNet.
    """
    for pieces, what, remedy in KNOWN_KINDS:
        if any(piece in key for key in entries for piece in pieces):
            raise CheckpointError(f"{path} is {what}; {remedy}")

    for key in (f"{UNET_PREFIX}input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight"):
        shape = entries[key].shape if key in entries else ()
        if len(shape) == 4 and shape[1] != 4:
            raise CheckpointError(
                f"{path} is {OTHER_INPUTS.get(shape[1], 'another model')}: its UNet takes {shape[1]} channels instead "
                "of 4; give the base checkpoint that it was made from"
            )

    crosses = (entry.shape[-1] for key, entry in entries.items() if key.endswith("attn2.to_k.weight") and entry.shape)
    width = next(crosses, None)
    if width in OTHER_CONTEXTS:
        raise CheckpointError(f"{path} is {OTHER_CONTEXTS[width]} (its UNet expects {width} text features); {SERVED}")


def refuse_lone_parts(entries: Entries, path: object) -> None:
    """CheckpointError for a single file that is one part of a model, or lacks a part other than the VAE."""

    def has(*beginnings: str) -> bool:
        return any(key.startswith(beginnings) for key in entries)

    text = any(text_name(key) for key in entries)
    if has(UNET_PREFIX):
        if text:
            return
        what = "lacks a text encoder (no keys cond_stage_model.*)" if has(VAE_PREFIX) else "is a UNet alone"
        remedy = "give the whole checkpoint that it comes from"
    elif has(VAE_PREFIX, "encoder.conv_in.", "encoder.down.", "decoder.conv_in.", "decoder.up."):
        what, remedy = "is an autoencoder (VAE) alone", "give it as vae=, beside a whole checkpoint"
    elif is_tiny(entries):
        what, remedy = "is TAESD, a tiny autoencoder, alone", "give it as vae=, beside a whole checkpoint"
    elif has("input_blocks.", "down_blocks."):
        what, remedy = "is a UNet alone", "give the whole checkpoint, or the diffusers folder that it is in"
    elif text:
        what, remedy = "is a text encoder alone", "give the whole checkpoint, or the diffusers folder that it is in"
    elif not entries:
        what, remedy = "holds no tensors", "download it again"
    elif all(entry.shape[-1:] in WORD_SHAPES and len(entry.shape) <= 2 for entry in entries.values()):
        what, remedy = "is a textual-inversion embedding", "give the model that it is for, and this file as embeddings="
    else:
        first = ", ".join(list(entries)[:3])
        what, remedy = f"holds no model known here (its first tensors: {first})", SERVED
    raise CheckpointError(f"{path} {what}; {remedy}")


def split_ldm(entries: Entries) -> dict[str, Entries]:
    """The parts of an LDM single file under the file's own keys; everything else in it is extra."""
    parts: dict[str, Entries] = {"unet": {}, "vae": {}, "text_encoder": {}, "extra": {}}
    texts: dict[str, Entries] = {}  # by prefix: some merged files hold one text encoder twice
    for key, entry in entries.items():
        name = text_name(key)
        if key.startswith(UNET_PREFIX):
            parts["unet"][key] = entry
        elif key.startswith(VAE_PREFIX):
            # Training leftovers of some VAE releases.
            extra = key.startswith((f"{VAE_PREFIX}loss.", f"{VAE_PREFIX}model_ema."))
            parts["extra" if extra else "vae"][key] = entry
        elif name:
            texts.setdefault(key[: -len(name)], {})[key] = entry
        else:
            parts["extra"][key] = entry
    if texts:
        parts["text_encoder"] = texts.pop(chosen_text({prefix: len(found) for prefix, found in texts.items()}))
    for spare in texts.values():
        parts["extra"].update(spare)
    return parts


def ldm_layers_per_block(keys: Mapping[str, object], prefix: str = UNET_PREFIX, levels: int = 4) -> int:
    """Residual blocks per level: LDM's way down has `levels * (n + 1)` numbered entries."""
    found = {int(m[1]) for key in keys if (m := re.match(re.escape(prefix) + r"input_blocks\.(\d+)\.", key))}
    return max(1, (max(found, default=11) + 1) // levels - 1)


def unet_namer(entries: Entries) -> Namer:
    """Our UNet parameter -> the file's key, LDM or diffusers."""
    if any(key.startswith(UNET_PREFIX) for key in entries):
        n = ldm_layers_per_block(entries)
        return lambda name: UNET_PREFIX + ldm_unet_name(name, n)
    return lambda name: name


def vae_namer(entries: Entries) -> Namer:
    """Our VAE parameter -> the file's key: LDM with or without prefix, diffusers new or old."""
    prefix = VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in entries) else ""
    found = (re.search(r"encoder\.down\.(\d+)\.", key) for key in entries)
    levels = 1 + max((int(match[1]) for match in found if match), default=-1)
    if levels:
        return lambda name: prefix + ldm_vae_name(name, levels)
    if any(".attentions.0.query." in key for key in entries):
        return old_diffusers_vae_name
    return lambda name: name


def text_namer(entries: Entries) -> Namer:
    """Our text-encoder parameter (without prefix) -> the file's key, whatever prefix that carries."""
    by_name = {name: key for key in entries if (name := text_name(key))}
    prefix = next((key[: -len(name)] for name, key in by_name.items()), "text_model.")
    return lambda name: by_name.get(name, prefix + name)


def detect_unet(shape_of: ShapeOf, heads: int, norm_groups: int, part: str) -> UNetConfig:
    """UNet configuration from shapes; heads and norm groups cannot be seen and are given."""
    base = UNetConfig()
    blocks = "down_blocks.{}.resnets.{}."
    config = UNetConfig(
        in_channels=_agreed(shape_of, [("conv_in.weight", 1)], base.in_channels),
        out_channels=_agreed(shape_of, [("conv_out.weight", 0), ("conv_out.bias", 0)], base.out_channels),
        block_out_channels=_widths(shape_of, blocks, base.block_out_channels),
        layers_per_block=_count(shape_of, [blocks.format(0, "{}") + kind for kind in RESNET_KINDS]),
        context_width=_agreed(
            shape_of,
            [
                (f"down_blocks.{level}.attentions.{i}.transformer_blocks.0.attn2.to_{x}.weight", 1)
                for level in range(3)
                for i in range(2)
                for x in "kv"
            ],
            base.context_width,
        ),
        heads=heads,
        norm_groups=norm_groups,
        guidance_width=_agreed(shape_of, [("time_embedding.cond_proj.weight", 1)], 0),
    )
    for width in config.block_out_channels:
        _check_divides(part, width, norm_groups=norm_groups, heads=heads)
    return config


def detect_vae(shape_of: ShapeOf, norm_groups: int, scaling_factor: float, part: str) -> VAEConfig:
    """VAE configuration from shapes."""
    base = VAEConfig()
    blocks = "encoder.down_blocks.{}.resnets.{}."
    config = VAEConfig(
        in_channels=_agreed(
            shape_of,
            [("encoder.conv_in.weight", 1), ("decoder.conv_out.weight", 0), ("decoder.conv_out.bias", 0)],
            base.in_channels,
        ),
        latent_channels=_agreed(
            shape_of,
            [("decoder.conv_in.weight", 1), ("post_quant_conv.weight", 1), ("post_quant_conv.bias", 0)],
            base.latent_channels,
        ),
        block_out_channels=_widths(shape_of, blocks, base.block_out_channels),
        layers_per_block=_count(shape_of, [blocks.format(0, "{}") + kind for kind in RESNET_KINDS]),
        norm_groups=norm_groups,
        scaling_factor=scaling_factor,
    )
    for width in config.block_out_channels:
        _check_divides(part, width, norm_groups=norm_groups)
    return config


def detect_text(shape_of: ShapeOf, heads: int | None, activation: str, eps: float, part: str) -> TextConfig:
    """Text-encoder configuration from shapes; heads default to CLIP's width of 64 each."""
    base = TextConfig()
    layer = "encoder.layers.{}."
    layers = _count(shape_of, [layer + kind for kind in ("mlp.fc1.weight", "mlp.fc2.bias", "layer_norm1.bias")])
    width = _agreed(
        shape_of,
        [("embeddings.token_embedding.weight", 1), ("embeddings.position_embedding.weight", 1)]
        + [(f"final_layer_norm.{kind}", 0) for kind in ("weight", "bias")],
        base.width,
    )
    config = TextConfig(
        vocab_size=_agreed(shape_of, [("embeddings.token_embedding.weight", 0)], base.vocab_size),
        width=width,
        intermediate_width=_agreed(
            shape_of,
            [(layer.format(i) + f"mlp.fc1.{kind}", 0) for i in range(2) for kind in ("weight", "bias")],
            4 * width,
        ),
        layers=layers,
        heads=heads or max(1, width // CLIP_HEAD_WIDTH),
        tokens=_agreed(shape_of, [("embeddings.position_embedding.weight", 0)], base.tokens),
        activation=activation,
        norm_eps=eps,
    )
    _check_divides(part, width, heads=config.heads)
    return config


def _check_divides(part: str, width: int, **into: int) -> None:
    for what, number in into.items():
        if number < 1 or width % number:
            raise CheckpointError(
                f"{part} is {width} channels wide somewhere, which does not divide into {number} "
                f"{what.replace('_', ' ')}; a model with other numbers must be a diffusers folder, whose config.json "
                "tells them"
            )


def _agreed(shape_of: ShapeOf, where: list[tuple[str, int]], default: int) -> int:
    """The size that most of these tensors have on the axis named with each.

    A missing or misshapen tensor must not change the configuration: strict loading then names that tensor alone.
    """
    found: list[int] = []
    for name, axis in where:
        shape = shape_of(name)
        if shape is not None and len(shape) > axis:
            found.append(shape[axis])
    return Counter(found).most_common(1)[0][0] if found else default


def _widths(shape_of: ShapeOf, blocks: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Channels of each level; blocks: the pattern of its residual blocks' names, by level and number."""
    levels = _count(shape_of, [blocks.format("{}", 0) + kind for kind in RESNET_KINDS])
    if not levels:
        return default
    return tuple(
        _agreed(shape_of, [(blocks.format(level, i) + kind, 0) for i in range(2) for kind in RESNET_KINDS], 0)
        for level in range(levels)
    )


def _count(shape_of: ShapeOf, patterns: list[str]) -> int:
    """How often 0, 1, 2, .. can be filled into the patterns until none of them is there."""
    n = 0
    while any(shape_of(pattern.format(n)) is not None for pattern in patterns):
        n += 1
    return n
