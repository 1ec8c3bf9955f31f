"""LoRAs merged into a model's weights: a copy that shares whatever they leave as it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from masa.errors import CheckpointError, MasaError
from masa.models.clip import TextEncoder
from masa.models.unet import UNet
from masa.runtime.networks import sharing_copy
from masa.weights.lora import Change, Layer, OpenedLora, open_lora

LoraPath = str | Path
# How strongly it acts: on both parts, or on the UNet and on the text encoder.
LoraWeight = float | tuple[float, float]
LoraGiven = LoraPath | tuple[LoraPath, LoraWeight]

Network = TypeVar("Network", UNet, TextEncoder)


@dataclass(frozen=True)
class Lora:
    """A LoRA of a model: its path as given, its weight, and its SHA-256 once it is merged."""

    path: str
    weight: LoraWeight = 1.0
    sha256: str | None = None

    @property
    def weights(self) -> dict[str, float]:
        pair = self.weight if isinstance(self.weight, tuple) else (self.weight, self.weight)
        return {"unet": pair[0], "text_encoder": pair[1]}

    def describe(self) -> dict[str, Any]:
        """As settings hold it, in JSON's types."""
        weight = list(self.weight) if isinstance(self.weight, tuple) else self.weight
        return {"path": self.path, "weight": weight, "sha256": self.sha256}


def as_loras(given: LoraGiven | Sequence[LoraGiven] | None) -> tuple[Lora, ...]:
    """What load() was given: a path, (path, weight), or several of these. MasaError for anything else."""
    if given is None:
        return ()
    first = given[0] if isinstance(given, tuple) and len(given) == 2 else given
    alone = isinstance(first, str | Path) and not (first is not given and _is_given(given[1]))  # type: ignore[index]
    items = [given] if alone else given
    if not isinstance(items, list | tuple) or not all(_is_given(item) for item in items):
        raise MasaError(f"lora is {given!r}; expected a path, (path, weight), or a list of these")
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in items]
    return tuple(Lora(str(path), check_weight(weight)) for path, weight in pairs)


def _is_given(item: object) -> bool:
    return isinstance(item, str | Path) or (
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str | Path)
    )


def check_weight(weight: object) -> LoraWeight:
    """A LoRA's weight. MasaError unless it is a finite number, or a pair of them for UNet and text encoder."""
    numbers = weight if isinstance(weight, tuple) and len(weight) == 2 else (weight,)
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise MasaError(f"a LoRA's weight is {weight!r}; expected a number, or two: (UNet's, text encoder's)")
    return weight  # type: ignore[return-value]


def open_loras(loras: Sequence[Lora], unet: UNet, text_encoder: TextEncoder) -> list[OpenedLora]:
    """Their headers, matched to a model. CheckpointError where one does not fit; MasaError where one has changed."""
    shapes = {layer: tuple(module.weight.shape) for layer, module in _layers(unet, text_encoder).items()}
    opened = [open_lora(lora.path, shapes) for lora in loras]
    for lora, found in zip(loras, opened, strict=True):
        if lora.sha256 not in (None, found.sha256):
            raise MasaError(
                f"{lora.path} has changed since it was merged (its SHA-256 is {found.sha256[:12]}.., expected "
                f"{str(lora.sha256)[:12]}..); put the old file back, or begin anew with the new one"
            )
    return opened


def warn_of_words(opened: Sequence[OpenedLora], known: Iterable[str]) -> None:
    """A warning for each file that also holds embeddings of words, where a model does not know these."""
    for found in opened:
        words = [word for word in found.words if word not in set(known)]
        if words:
            warnings.warn(
                f"{found.path} also holds embeddings of words ({', '.join(words)}), which are not loaded; give the "
                "file as embeddings= too",
                stacklevel=4,
            )


def merge(
    unet: UNet, text_encoder: TextEncoder, loras: Sequence[Lora], opened: Sequence[OpenedLora]
) -> tuple[UNet, TextEncoder]:
    """The two networks with all LoRAs added: in float32, cast once. Those given stay as they are.

    A weight of 0 leaves the very bits. CheckpointError for values that are not finite, or become so.
    """
    merged: dict[Layer, Tensor] = {}
    layers = _layers(unet, text_encoder)
    changes: dict[Layer, list[tuple[int, Change]]] = {}
    for i, (lora, found) in enumerate(zip(loras, opened, strict=True)):
        for change in found.changes:
            if lora.weights[change.layer[0]] != 0:
                changes.setdefault(change.layer, []).append((i, change))
    with torch.no_grad(), torch.inference_mode(False), ExitStack() as stack:
        files = [stack.enter_context(safe_open(found.file, framework="pt")) for found in opened]
        for layer, parts in changes.items():
            weight = layers[layer].weight
            total = weight.float()
            for i, change in parts:
                delta = difference(files[i], change, weight)
                total = total + loras[i].weights[layer[0]] * change.scale * delta
            merged[layer] = torch.empty_like(weight).copy_(total)  # in the weight's dtype and memory layout
            if not bool(torch.isfinite(merged[layer]).all()):
                raise CheckpointError(
                    f"{', '.join(str(opened[i].path) for i, _ in parts)}: merged into {layer[1]} the values are not "
                    f"finite in {weight.dtype}; take another copy of the file, a smaller weight, or dtype='fp32'"
                )
    return _with_weights(unet, merged), _with_weights(text_encoder, merged)


def difference(file: Any, change: Change, weight: Tensor) -> Tensor:
    """One layer's `up @ down` in float32, shaped as its weight; of convolutions over their kernels.

    With a Tucker core: sum over a, b of up[o, a] mid[a, b, h, w] down[b, i].
    """
    down, up = (file.get_tensor(key).to(weight.device, torch.float32).flatten(1) for key in (change.down, change.up))
    if change.mid is not None:
        mid = file.get_tensor(change.mid).to(weight.device, torch.float32)
        return torch.einsum("oa,abhw,bi->oihw", up, mid, down).reshape(weight.shape)
    return (up @ down).reshape(weight.shape)


def _layers(unet: UNet, text_encoder: TextEncoder) -> dict[Layer, Any]:
    """The linear layers and convolutions that files may name."""
    found: dict[Layer, Any] = {}
    for part, network, prefix in (("unet", unet, ""), ("text_encoder", text_encoder, _text_prefix(text_encoder))):
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                found[part, name.removeprefix(prefix)] = module
    return found


def _text_prefix(text_encoder: TextEncoder) -> str:
    return f"model.{text_encoder.state_prefix}"


def _with_weights(network: Network, merged: dict[Layer, Tensor]) -> Network:
    """A copy with other weights in some layers, on the same tensors in all others; itself where none is changed."""
    part, prefix = ("unet", "") if isinstance(network, UNet) else ("text_encoder", _text_prefix(network))
    own = {prefix + layer: weight for (where, layer), weight in merged.items() if where == part}
    if not own:
        return network
    twin = sharing_copy(network)
    for name, weight in own.items():
        twin.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return twin
