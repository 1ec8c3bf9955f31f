"""Which layer a key of a LoRA file is about, in each of the layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from masa.errors import CheckpointError
from masa.weights.checkpoint import Entries

Shape = tuple[int, ...]
# A part ("unet" or "text_encoder") and the name of a layer in it, as diffusers and CLIP name them.
Layer = tuple[str, str]
Layers = Mapping[Layer, Shape]
Parsed = TypeVar("Parsed")

WANTED = "expected a LoRA for Stable Diffusion v1, as kohya's scripts, diffusers, peft or cloneofsimo's write it"
PEFT = "base_model.model."
PREFIXES = {
    "unet": ("", "unet.", PEFT),
    "text_encoder": tuple(p + q for p in ("", "text_encoder.", PEFT) for q in ("text_model.", "")),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")  # in the order of transformers' modules
NUMBERED = re.compile(r"(unet|text_encoder):(\d+):(?:up|down)")
# Layers that cloneofsimo's numbers run over; other lists of classes mean other numbers.
NUMBERED_CLASSES = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}


def layer_names(layers: Iterable[Layer]) -> dict[str, Layer]:
    """What a key begins with, in any layout, and the layer that it then is about."""
    names: dict[str, Layer] = {}
    for part, layer in layers:
        text = part == "text_encoder"
        flat = f"lora_te_text_model_{layer}" if text else f"lora_unet_{layer}"
        names[flat.replace(".", "_")] = part, layer
        # diffusers' first layout; it calls the text encoder's projections as it does the UNet's.
        old = re.sub(r"(attn[12])\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2", layer)
        old = re.sub(r"(self_attn)\.(?:([qkv])|(out))_proj$", r"\1.to_\2\3", old)
        for prefix in PREFIXES[part]:
            names[prefix + layer] = names[prefix + old] = part, layer
    return names


def numbered_names(entries: Entries, layers: Layers, metadata: Mapping[str, str], path: Path) -> dict[str, Layer]:
    """cloneofsimo's numbers: the UNet's blocks down, up and middle, and the text encoder's layers."""
    numbers = [(found[1], int(found[2])) for key in entries if (found := NUMBERED.fullmatch(key))]
    names: dict[str, Layer] = {}
    for part in dict.fromkeys(part for part, _ in numbers):
        other = set(parsed(metadata.get(part, "[]"), list, path)) - NUMBERED_CLASSES[part]
        if other:
            raise CheckpointError(
                f"{path} numbers the {part}'s layers together with those of {', '.join(sorted(other))}, which is not "
                f"served; {WANTED}"
            )
        first = ".attn1.to_q" if part == "unet" else ".self_attn.q_proj"
        blocks = [name[: -len(first)] for where, name in layers if where == part and name.endswith(first)]
        per_block = (1 + max(k for where, k in numbers if where == part)) / max(1, len(blocks))
        blocks.sort(key=lambda name: name.startswith("mid_block"))  # a stable sort: all others keep their order
        if part == "text_encoder":
            order = [f"{block}.self_attn.{name}" for block in blocks for name in TEXT_ATTENTION]
        else:
            own, cross = ([f"attn{i}.{name}" for name in ATTENTION] for i in (1, 2))
            geglu = ["ff.net.0.proj"] if per_block > 8 else []
            # It comes fifth, later last: it is eight times as wide as the query in the other place.
            fifth, last = (entries[key].shape if (key := f"unet:{k}:up") in entries else (0,) for k in (4, 8))
            in_block = [*own, *cross, *geglu] if geglu and last[0] > fifth[0] else [*own, *geglu, *cross]
            order = [f"{block}.{name}" for block in blocks for name in in_block]
        names |= {f"{part}:{k}": (part, layer) for k, layer in enumerate(order)}
    return names


def parsed(text: str, kind: type[Parsed], path: Path) -> Parsed:
    """Metadata that are JSON of a kind. CheckpointError where they are not."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} has metadata that are no JSON ({error}); download it again") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} has metadata {text[:40]!r}; expected a {kind.__name__}; download it again")
    return value
