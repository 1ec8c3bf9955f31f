"""Settings of a run as JSON: what results carry, PNGs keep and `masa rerun` reads back."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masa.controls.blended import BlendedLatents
from masa.controls.local_blend import LocalBlend
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks, WordMasks
from masa.controls.plug_and_play import PlugAndPlay
from masa.controls.prompt_to_prompt import PromptToPrompt
from masa.controls.record import RecordAttention, RecordPredictions, RecordQueries
from masa.controls.style import StyleTransfer
from masa.errors import MasaError
from masa.io.pictures import load_mask

# Values that can stand in a settings file, by class name.
KINDS = {
    kind.__name__: kind
    for kind in (
        BlendedLatents,
        MasaCtrl,
        GivenMasks,
        WordMasks,
        PlugAndPlay,
        PromptToPrompt,
        RecordAttention,
        RecordPredictions,
        RecordQueries,
        LocalBlend,
        StyleTransfer,
    )
}
MAPPING = "mapping"


def describe(value: Any) -> Any:
    """A control, mask or plain value as JSON. Masks given as pictures are embedded, compressed."""
    if isinstance(value, GivenMasks):
        targets = [pack(load_mask(mask)) for mask in value.targets]
        return {"kind": "GivenMasks", "source": pack(load_mask(value.source)), "target": targets}
    if isinstance(value, BlendedLatents):
        return {"kind": "BlendedLatents", "mask": pack(load_mask(value.mask)), "skip": value.skip}
    if is_dataclass(value) and type(value).__name__ in KINDS:
        return {"kind": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Tensor):
        return pack(value)
    if isinstance(value, list | tuple | range | set | frozenset | np.ndarray):
        return [describe(v) for v in value]
    if isinstance(value, Mapping):
        # As pairs: a word may be a number, and may be "kind".
        return {"kind": MAPPING, "items": [[describe(key), describe(item)] for key, item in value.items()]}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # A control of the user's own: the run goes on, and only its repetition is refused.
    return {"kind": type(value).__name__, "own": True}


def restore(value: Any) -> Any:
    """The inverse of `describe`. MasaError for a kind that this version does not know."""
    if isinstance(value, list):
        return tuple(restore(v) for v in value)
    if not isinstance(value, Mapping):
        return value
    if "packed" in value:
        return unpack(value)
    if value.get("kind") == MAPPING:
        return {restore(key): restore(item) for key, item in value["items"]}
    kind = KINDS.get(value.get("kind", ""))
    if kind is None:
        raise MasaError(
            f"settings name a {value.get('kind')!r}, which this version of masa does not have; repeat the run in the "
            "program that made it"
        )
    return kind(**{name: restore(v) for name, v in value.items() if name != "kind"})


def pack(tensor: Tensor) -> dict[str, str]:
    """A tensor as compressed text."""
    buffer = io.BytesIO()
    whole = tensor.detach().cpu()
    np.save(buffer, (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy())
    return {"packed": base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode("ascii")}


def unpack(packed: Mapping[str, str]) -> Tensor:
    """The tensor that `pack` wrote."""
    data = zlib.decompress(base64.b64decode(packed["packed"]))
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
