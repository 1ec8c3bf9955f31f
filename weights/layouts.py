"""Names of the same parameter in the three layouts that Stable Diffusion v1 checkpoints come in.

The modules of `masa.models` carry diffusers' names. These functions give the name of one of our parameters in
an LDM ("original") single file, or in an older diffusers release. Every table is tested as a bijection on the
full key lists of published files.
"""

from __future__ import annotations

import re

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_VAE_ENDS = {"conv_norm_out": "norm_out"}


def ldm_unet_name(name: str, layers_per_block: int) -> str:
    """LDM name, without prefix, of a UNet parameter.

    LDM numbers the way down and the way up in one row each: `layers_per_block` residual blocks and one change
    of size per level down, one residual block more and none of its own up.
    """
    module, _, kind = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{kind}"
    match = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(f"no LDM name for {name}")
    place, level, group, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    row = layers_per_block + 1
    if place == "mid":
        base = "middle_block.1" if group == "attentions" else f"middle_block.{2 * index}"
    elif place == "down":
        base = {
            "resnets": f"input_blocks.{1 + row * level + index}.0",
            "attentions": f"input_blocks.{1 + row * level + index}.1",
            "downsamplers": f"input_blocks.{row * (level + 1)}.0",
        }[group]
        rest = rest.replace("conv.", "op.") if group == "downsamplers" else rest
    else:
        # The upsampler shares the last entry of its level, after the attention where the level has one.
        after = 1 if level == 0 else 2
        base = {
            "resnets": f"output_blocks.{row * level + index}.0",
            "attentions": f"output_blocks.{row * level + index}.1",
            "upsamplers": f"output_blocks.{row * level + row - 1}.{after}",
        }[group]
    if group == "resnets":
        part, _, kind = rest.partition(".")
        rest = f"{_RESNET[part]}.{kind}"
    return f"{base}.{rest}"


def ldm_vae_name(name: str, levels: int = 4) -> str:
    """LDM name, without prefix, of a VAE parameter."""
    coder, _, rest = name.partition(".")
    if coder in ("quant_conv", "post_quant_conv"):
        return name
    module, _, kind = rest.rpartition(".")
    if module in ("conv_in", "conv_out"):
        return name
    if module in _VAE_ENDS:
        return f"{coder}.{_VAE_ENDS[module]}.{kind}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", rest):
        return f"{coder}.mid.block_{int(match[1]) + 1}.{match[2]}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(\w+)", rest):
        return f"{coder}.mid.attn_1.{_VAE_ATTENTION[match[1]]}.{match[2]}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", rest)
    if match is None:
        raise KeyError(f"no LDM name for {name}")
    place, level, group, index, rest = match[1], int(match[2]), match[3], match[4], match[5]
    # LDM counts the decoder's levels from the picture, we in the order they run.
    level = levels - 1 - level if place == "up" else level
    if group == "resnets":
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        return f"{coder}.{place}.{level}.block.{index}.{rest}"
    return f"{coder}.{place}.{level}.{place}sample.{rest}"


def old_diffusers_vae_name(name: str) -> str:
    """Name of a VAE parameter in folders written by early diffusers, which named the attention otherwise."""
    for new, old in _OLD_VAE_ATTENTION.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


# What precedes a text encoder's own names: LDM files nest it, merged ones drop one level or another.
_TEXT = re.compile(
    r"(?:cond_stage_model\.)?(?:transformer\.)?(?:text_model\.)?"
    r"((?:embeddings\.(?:token|position)_embedding|encoder\.layers\.\d+|final_layer_norm)\..+)"
)


def text_name(key: str) -> str | None:
    """The text encoder's own name of a file's key, whatever prefixes it carries; None for other keys."""
    match = _TEXT.fullmatch(key)
    return match[1] if match else None
