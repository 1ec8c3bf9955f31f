"""T2I-Adapter, ControlNet and IP-Adapter files: what they are, and where each of our parameters lies in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from masa.config import IPAdapterConfig, T2IAdapterConfig, UNetConfig
from masa.errors import CheckpointError
from masa.weights.checkpoint import Entries, read_entries
from masa.weights.detect import (
    KNOWN_KINDS,
    OTHER_CONTEXTS,
    ShapeOf,
    detect_unet,
    ldm_layers_per_block,
)
from masa.weights.layouts import UNET_PREFIX, ldm_unet_name
from masa.weights.model_files import Json, PartFiles, read_folder, read_json

CONTROL_PREFIX = "control_model."
DIFFERENCE = "difference"  # a ControlNet file's mark: what the UNet has too is given as differences to it
PICTURE_CHANNELS = {64: "1 (lines)", 192: "3 (colours)"}  # of an SD v1 adapter's input, 8 x 8 pixels in each
CONTROLNET_WANTED = "expected a ControlNet for Stable Diffusion v1, such as control_v11p_sd15_canny.safetensors"
ADAPTER_WANTED = "expected a T2I-Adapter for Stable Diffusion v1, such as t2iadapter_canny_sd14v1.safetensors"

IP_ADAPTER_WANTED = "expected an IP-Adapter for Stable Diffusion v1, such as ip-adapter_sd15.safetensors"
OTHER_IP_ADAPTERS = (
    (("to_q_lora", "perceiver_resampler"), "an IP-Adapter for faces (FaceID)"),
    (("image_proj.proj.3.",), 'a "full face" IP-Adapter'),
)


@dataclass(frozen=True)
class OpenedAdapter:
    """An opened T2I-Adapter: its headers are read, its tensors are not."""

    path: Path
    part: PartFiles
    config: T2IAdapterConfig


@dataclass(frozen=True)
class OpenedControlNet:
    """An opened ControlNet: its headers are read, its tensors are not.

    unet: the shape of the UNet that it is a copy of; heads and norm groups, which no tensor's shape tells, are those
    asked for, or its configuration file's. difference: what the UNet has too are differences to it. unused: how many
    tensors of the file are not the ControlNet's. bgr: its hint's channels are reversed. pooled: of its residuals the
    means over positions are added ("shuffle").
    """

    path: Path
    part: PartFiles
    unet: UNetConfig
    difference: bool = False
    unused: int = 0
    bgr: bool = False
    pooled: bool = False


@dataclass(frozen=True)
class OpenedIPAdapter:
    """An opened IP-Adapter: its headers are read, its tensors are not."""

    path: Path
    part: PartFiles
    config: IPAdapterConfig


def open_adapter(path: Path) -> OpenedAdapter:
    """Read a T2I-Adapter's headers, a file or a diffusers folder. CheckpointError for whatever is none of SD v1's."""
    entries, _ = _read(path, "T2I-Adapter", ADAPTER_WANTED)
    if any(piece in key for key in entries for piece in ("style_embedding", "transformer_layes.")):
        raise CheckpointError(f"{path} is a style adapter, which reads CLIP's view of a picture; {ADAPTER_WANTED}")
    if any(piece in key for key in entries for piece in ("task_embedding", "spatial_ch_projs")):
        raise CheckpointError(f"{path} is the fuser of several adapters (CoAdapter); {ADAPTER_WANTED}")
    refuse_others(entries, path, "T2I-Adapter", ADAPTER_WANTED)
    prefix = "adapter." if any(key.startswith("adapter.body.") for key in entries) else ""
    shape_of = PartFiles(entries, lambda name: prefix + name).shape_of()
    if not any(key.startswith(f"{prefix}body.") for key in entries):
        raise CheckpointError(f"{path} holds no T2I-Adapter ({first_names(entries)}); {ADAPTER_WANTED}")
    light = not any(key.startswith(f"{prefix}conv_in.") for key in entries)
    first = shape_of("body.0.in_conv.weight" if light else "conv_in.weight") or (0, 192)
    if len(first) < 2 or first[1] not in PICTURE_CHANNELS or any("down_opt.op" in key for key in entries):
        raise CheckpointError(
            f"{path} is an adapter for another model, such as SDXL's: its first layer takes {first[1:2]} channels, "
            f"those of Stable Diffusion v1 take {' or '.join(map(str, PICTURE_CHANNELS))}; {ADAPTER_WANTED}"
        )
    diffusers = any(".resnets." in key for key in entries)
    config = _adapter_config(entries, prefix, shape_of, light, diffusers, first[1])

    def name(ours: str) -> str:
        found = re.fullmatch(r"body\.(\d+)\.resnets\.(\d+)\.(.+)", ours)
        if diffusers or (light and found is None):
            return prefix + ours
        if light and found is not None:
            return f"{prefix}body.{found[1]}.body.{found[2]}.{found[3]}"
        if found is not None:
            return f"{prefix}body.{config.blocks_per_level * int(found[1]) + int(found[2])}.{found[3]}"
        level = re.fullmatch(r"body\.(\d+)\.(in_conv.+)", ours)
        return prefix + (ours if level is None else f"body.{config.blocks_per_level * int(level[1])}.{level[2]}")

    return OpenedAdapter(path, PartFiles(entries, name), config)


def _adapter_config(
    entries: Entries, prefix: str, shape_of: ShapeOf, light: bool, diffusers: bool, in_channels: int
) -> T2IAdapterConfig:
    """Levels, widths and blocks; a missing tensor must not change them: strict loading then names it alone."""
    base = T2IAdapterConfig()
    numbers = [int(found[1]) for key in entries if (found := re.match(re.escape(prefix) + r"body\.(\d+)\.", key))]
    inner = "resnets" if diffusers else "body"
    rows = max(numbers) + 1
    blocks = base.blocks_per_level
    if diffusers or light:
        pattern = re.escape(prefix) + rf"body\.\d+\.{inner}\.(\d+)\."
        blocks = 1 + max((int(found[1]) for key in entries if (found := re.match(pattern, key))), default=blocks - 1)
    levels = rows if diffusers or light else -(-rows // blocks)
    widths = []
    for level in range(levels):
        if light:
            tried = [f"body.{level}.out_conv.weight", f"body.{level}.out_conv.bias"]
        else:
            one = f"body.{level}.resnets.0." if diffusers else f"body.{blocks * level}."
            tried = [one + kind for kind in ("block1.weight", "block1.bias", "block2.weight", "block2.bias")]
        found_shapes = [shape for name in tried if (shape := shape_of(name))]
        usual = base.block_out_channels[min(level, len(base.block_out_channels) - 1)]
        widths.append(found_shapes[0][0] if found_shapes else usual)
    return T2IAdapterConfig(in_channels, tuple(widths), blocks, light)


def open_controlnet(path: Path, heads: int, norm_groups: int) -> OpenedControlNet:
    """Read a ControlNet's headers: a file of its own, one that holds a whole SD beside, or a diffusers folder.

    heads, norm_groups: of the UNet that it will steer. CheckpointError for whatever is none of SD v1's.
    """
    entries, settings = _read(path, "ControlNet", CONTROLNET_WANTED)
    marks = {"lora_controlnet": "a Control-LoRA", "lllite_unet_": "a ControlNet-LLLite"}
    for mark, what in marks.items():
        if any(key.startswith(mark) for key in entries):
            raise CheckpointError(f"{path} is {what}, which is not served; {CONTROLNET_WANTED}")
    difference = DIFFERENCE in entries
    entries = {key: entry for key, entry in entries.items() if key != DIFFERENCE}
    prefix = CONTROL_PREFIX if any(key.startswith(CONTROL_PREFIX) for key in entries) else ""
    own = {key: entry for key, entry in entries.items() if key.startswith(prefix)}
    crosses = [entry.shape[-1] for key, entry in own.items() if key.endswith("attn2.to_k.weight") and entry.shape]
    for context in set(crosses) & set(OTHER_CONTEXTS):
        raise CheckpointError(
            f"{path} is a ControlNet for {OTHER_CONTEXTS[context]} (it expects {context} text features); "
            + CONTROLNET_WANTED
        )
    refuse_others(own, path, "ControlNet", CONTROLNET_WANTED)
    original = any(key.startswith(f"{prefix}input_hint_block.") for key in own)
    if not original and not any(key.startswith("controlnet_") for key in own):
        raise CheckpointError(f"{path} holds no ControlNet ({first_names(entries)}); {CONTROLNET_WANTED}")
    layers = ldm_layers_per_block(own, prefix)

    def name(ours: str) -> str:
        return prefix + original_controlnet_name(ours, layers) if original else ours

    part = PartFiles(own, name)
    told = settings.get("num_attention_heads") or settings.get("attention_head_dim", heads)
    heads = max(told) if isinstance(told, list) else told
    unet = detect_unet(part.shape_of(), heads, settings.get("norm_num_groups", norm_groups), f"{path}: the ControlNet")
    return OpenedControlNet(
        path,
        part,
        unet,
        difference,
        unused=len(entries) - len(own),
        bgr=settings.get("controlnet_conditioning_channel_order") == "bgr",
        pooled=bool(settings.get("global_pool_conditions")) or "shuffle" in path.stem.lower(),
    )


def original_controlnet_name(name: str, layers_per_block: int) -> str:
    """The name in ControlNet's own files, without prefix, of one of our parameters."""
    module, _, kind = name.rpartition(".")
    if module == "controlnet_mid_block":
        return f"middle_block_out.0.{kind}"
    if found := re.fullmatch(r"controlnet_down_blocks\.(\d+)", module):
        return f"zero_convs.{found[1]}.0.{kind}"
    if found := re.fullmatch(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d+))", module):
        place = {"conv_in": 0, "conv_out": 14}.get(found[1])
        return f"input_hint_block.{2 * int(found[2]) + 2 if place is None else place}.{kind}"
    return ldm_unet_name(name, layers_per_block)


def open_ip_adapter(path: Path) -> OpenedIPAdapter:
    """Read an IP-Adapter's headers, plain or plus. CheckpointError for whatever is none of SD v1's."""
    entries, _ = _read(path, "IP-Adapter", IP_ADAPTER_WANTED)
    for pieces, what in OTHER_IP_ADAPTERS:
        if any(piece in key for key in entries for piece in pieces):
            raise CheckpointError(f"{path} is {what}, which is not served; {IP_ADAPTER_WANTED}")
    refuse_others(entries, path, "IP-Adapter", IP_ADAPTER_WANTED)
    if not any(key.startswith("image_proj.") for key in entries):
        raise CheckpointError(f"{path} holds no IP-Adapter ({first_names(entries)}); {IP_ADAPTER_WANTED}")
    shape_of = PartFiles(entries, str).shape_of()
    base, plus = IPAdapterConfig(), any(key.startswith("image_proj.latents") for key in entries)

    def size(name: str, axis: int, usual: int) -> int:
        shape = shape_of(name)
        return shape[axis] if shape is not None and len(shape) > axis else usual

    context = size("ip_adapter.1.to_k_ip.weight", 1, base.context_width)
    if context in OTHER_CONTEXTS:
        raise CheckpointError(
            f"{path} is an IP-Adapter for {OTHER_CONTEXTS[context]} (it makes {context} features); {IP_ADAPTER_WANTED}"
        )
    if not plus:
        tokens = size("image_proj.proj.weight", 0, base.tokens * context) // context
        width = size("image_proj.proj.weight", 1, base.picture_width)
        return OpenedIPAdapter(path, PartFiles(entries, str), IPAdapterConfig(width, context, tokens))
    numbers = [int(found[1]) for key in entries if (found := re.match(r"image_proj\.layers\.(\d+)\.", key))]
    config = IPAdapterConfig(
        picture_width=size("image_proj.proj_in.weight", 1, 1280),
        context_width=context,
        tokens=size("image_proj.latents", 1, 16),
        plus=True,
        layers=1 + max(numbers, default=base.layers - 1),
        inner_width=size("image_proj.latents", 2, base.inner_width),
    )
    return OpenedIPAdapter(path, PartFiles(entries, str), config)


def _read(path: Path, what: str, wanted: str) -> tuple[Entries, Json]:
    """The tensors of a file or folder, and the folder's configuration."""
    if not path.exists():
        raise FileNotFoundError(f"no {what} at {path}; {wanted}")
    if not path.is_dir():
        return read_entries(path), {}
    return read_folder(path, prefer_half=False), read_json(path / "config.json")


def refuse_others(entries: Entries, path: Path, own: str, wanted: str) -> None:
    """CheckpointError for the known kinds of files that are neither a whole model nor what is wanted."""
    if any(key.startswith((UNET_PREFIX, "cond_stage_model.", "first_stage_model.")) for key in entries):
        raise CheckpointError(f"{path} is a whole model; {wanted}")
    for pieces, what, _ in KNOWN_KINDS:
        if own not in what and any(piece in key for key in entries for piece in pieces):
            raise CheckpointError(f"{path} is {what.split(', which')[0]}; {wanted}")


def first_names(entries: Entries) -> str:
    return "its first tensors: " + (", ".join(list(entries)[:3]) or "none")
