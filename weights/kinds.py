"""Files beside a model, told by their tensors: adapters, ControlNets, LoRAs, words of one's own, small autoencoders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from masa.config import UNetConfig
from masa.errors import CheckpointError
from masa.weights.adapters import CONTROL_PREFIX, open_adapter, open_controlnet, open_ip_adapter
from masa.weights.checkpoint import Entries, read_entries
from masa.weights.detect import LDM_HEADS
from masa.weights.lora import ENDS, OTHER_KINDS
from masa.weights.lora_names import PEFT
from masa.weights.model_files import describe_entries, read_folder

Lines = list[tuple[str, str]]

# What a key of each kind matches; the first that is found decides.
MARKS: tuple[tuple[str, str], ...] = (
    ("IP-Adapter", r"^(ip_adapter|image_proj)\."),
    (
        "LoRA",
        r"lora_(up|down|[AB])\.|lora\.(up|down)\.|:(up|down)$|hada_w|lokr_w|oft_blocks|oft_diag|ia3_l",
    ),
    ("ControlNet", r"control_model\.|input_hint_block\.|controlnet_cond_embedding\.|zero_convs\.|lllite_unet_"),
    ("T2I-Adapter", r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets|body)\b|transformer_layes\.|style_embedding"),
    ("TAESD", r"^(taesd_)?((encoder|decoder)\.)?(layers\.)?\d+\.conv\.[024]\.weight$"),
)
# How a LoRA's keys look in each layout.
LORA_LAYOUTS = (
    ("cloneofsimo's", r":(up|down)$"),
    ("kohya's", r"^lora_(unet|te)"),
    ("peft's", re.escape(PEFT)),
    ("diffusers' (lora_A, lora_B)", r"\.lora_[AB]\."),
    ("diffusers' (attention processors)", r"_lora\.(up|down)\."),
    ("diffusers' (lora.up, lora.down)", r"\.lora(_linear_layer)?\.(up|down)\."),
)
WORD_WIDTHS = {768: "Stable Diffusion v1", 1024: "Stable Diffusion 2.x", 1280: "SDXL"}


def recognise(path: Path) -> Lines | None:
    """What a file or folder is that is no model of its own, as (label, text) lines; None for all others.

    The last line, "usable", says how, or "no: " and why.
    """
    try:
        entries = read_folder(path, prefer_half=False) if path.is_dir() else read_entries(path)
    except (CheckpointError, OSError):
        return None
    kind = next((kind for kind, mark in MARKS if any(re.search(mark, key) for key in entries)), None)
    if kind is None:
        return _word(path, entries)
    lines = [("path", str(path)), ("kind", kind)]
    tell: dict[str, Callable[[Path, Entries], Lines]] = {
        "LoRA": _lora,
        "ControlNet": _controlnet,
        "T2I-Adapter": _adapter,
        "IP-Adapter": _ip_adapter,
        "TAESD": _taesd,
    }
    about = [("tensors", describe_entries(entries))]
    try:
        return lines + about + tell[kind](path, entries)
    except CheckpointError as error:
        return [*lines, *about, ("usable", f"no: {error}")]


def _adapter(path: Path, entries: Entries) -> Lines:
    config = open_adapter(path).config
    drawn = "lines, 1 channel (canny, sketch)" if config.in_channels == 64 else "colours, 3 channels (openpose, ..)"
    if config.light:
        drawn = "colours in squares of 64 pixels, 3 channels"
    return [
        ("layout", "diffusers'" if any(".resnets." in key for key in entries) else "the published files'"),
        ("shape", f"{'light' if config.light else 'full'}, widths {config.block_out_channels}"),
        ("reads", drawn),
        ("for", "where things are, from a picture"),
        ("usable", "yes, as masa.T2IAdapter(path, target=picture), or --t2i-adapter FILE PICTURE"),
    ]


def _controlnet(path: Path, entries: Entries) -> Lines:
    opened = open_controlnet(path, LDM_HEADS, UNetConfig.norm_groups)
    prefixed = any(key.startswith(CONTROL_PREFIX) for key in entries)
    original = prefixed or any("input_hint_block." in key for key in entries)
    unet = opened.unet
    notes = [f"{opened.unused:,} tensors of a whole model beside, not used"] if opened.unused else []
    notes += ["differences to its base model"] if opened.difference else []
    notes += ["reversed channels"] if opened.bgr else []
    notes += ["residuals are their means (shuffle)"] if opened.pooled else []
    return [
        ("layout", ("the original's" if original else "diffusers'") + (f", {CONTROL_PREFIX}*" if prefixed else "")),
        ("shape", f"a copy of a UNet with channels {unet.block_out_channels}, context {unet.context_width}"),
        *([("notes", "; ".join(notes))] if notes else []),
        ("for", "where things are, from a hint picture"),
        ("usable", "yes, as masa.ControlNet(path, target=picture), or --controlnet FILE PICTURE"),
    ]


def _ip_adapter(path: Path, entries: Entries) -> Lines:
    config = open_ip_adapter(path).config
    return [
        ("layout", "the published files'"),
        ("shape", f"{'plus' if config.plus else 'plain'}, {config.tokens} tokens of {config.context_width}"),
        ("reads", f"CLIP's view of a picture, {config.picture_width} features"),
        ("for", "a picture as a prompt"),
        ("usable", "yes, as masa.IPAdapter(path, target=picture, image_encoder=folder), or --ip-adapter FILE PICTURE"),
    ]


def _lora(path: Path, entries: Entries) -> Lines:
    for pattern, what in OTHER_KINDS:
        if any(re.search(pattern, key) for key in entries):
            raise CheckpointError(f"{path} is {what}, which is not served")
    layouts = [name for name, pattern in LORA_LAYOUTS if any(re.search(pattern, key) for key in entries)]
    downs = {
        key: entry
        for key, entry in entries.items()
        if any(key.endswith(end) for end, what in ENDS.items() if what == "down") and entry.shape
    }
    text = [key for key in downs if re.search(r"lora_te|text_(encoder|model)", key)]
    ranks = Counter(entry.shape[0] for entry in downs.values())
    convolved = any(len(entry.shape) == 4 and entry.shape[-1] > 1 for entry in downs.values())
    return [
        ("layout", (layouts[0] if layouts else "unknown") + (" with convolutions (LoCon)" if convolved else "")),
        ("shape", f"{len(downs) - len(text)} layers of the UNet, {len(text)} of the text encoder"),
        ("rank", ", ".join(f"{rank}" for rank in sorted(ranks)) or "none"),
        ("for", "a style or a subject that a model then knows"),
        ("usable", "yes, where it fits the model: load(lora=(path, weight)), or --lora FILE:WEIGHT"),
    ]


def _taesd(path: Path, entries: Entries) -> Lines:
    halves = [half for half in ("encoder", "decoder") if any(f"{half}." in key for key in entries)]
    if not halves:  # alone: what reads latents has as many channels
        first = next(entries[key].shape for key in ("0.weight", "1.weight") if key in entries)
        halves = ["encoder" if first[1] == 3 else "decoder"]
    channels = {entry.shape[1] for entry in entries.values() if len(entry.shape) == 4}
    if 16 in channels:
        raise CheckpointError(f"{path} is a TAESD for latents of 16 channels (SD 3, Flux); SD v1's have 4")
    return [
        ("layout", "diffusers'" if any(".layers." in key for key in entries) else "the published files'"),
        ("shape", f"{' and '.join(halves)}, on latents times 0.18215"),
        ("for", "a small autoencoder: fast previews"),
        ("usable", "yes, in the place of an autoencoder where this version serves it"),
    ]


def _word(path: Path, entries: Entries) -> Lines | None:
    """A textual inversion: vectors as wide as a text encoder's, and nothing else."""
    widths = {entry.shape[-1] for entry in entries.values() if len(entry.shape) in (1, 2)}
    few = len(entries) <= 2 and all(len(e.shape) in (1, 2) and e.count <= 128 * e.shape[-1] for e in entries.values())
    if not entries or not few or not widths <= set(WORD_WIDTHS):
        return None
    names = [path.stem if key == "emb_params" else key for key in entries]
    vectors = sum(entry.count // entry.shape[-1] for entry in entries.values())
    served = widths == {768}
    whose = " and ".join(WORD_WIDTHS[width] for width in sorted(widths))
    return [
        ("path", str(path)),
        ("kind", "textual inversion"),
        ("tensors", describe_entries(entries)),
        ("shape", f"{' and '.join(names)}: {vectors} vectors of {', '.join(map(str, sorted(widths)))} ({whose})"),
        ("for", "a word of one's own in prompts"),
        ("usable", "yes, where this version serves it" if served else f"no: {path} is for {whose}"),
    ]
