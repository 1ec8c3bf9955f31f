"""The three networks of a checkpoint: built without memory, then filled."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from masa.config import ModelConfig, TinyVAEConfig
from masa.models.clip import TextEncoder
from masa.models.taesd import TinyVAE
from masa.models.unet import UNet
from masa.models.vae import VAE
from masa.weights.checkpoint import Part, check_parts, load_parts
from masa.weights.model_files import Checkpoint

Autoencoder = VAE | TinyVAE
Network = UNet | Autoencoder | TextEncoder
OneOf = TypeVar("OneOf", UNet, VAE, TinyVAE, TextEncoder)
NAMES: dict[type, str] = {UNet: "unet", VAE: "vae", TinyVAE: "vae", TextEncoder: "text_encoder"}

# Of convolutions' weights, which feature maps follow. Attention reads a map as tokens without a copy; on a CPU float32
# convolutions take fewer multiplications in it (`masa.models.winograd`), and bfloat16 ones on AMX are faster too.
LAYOUT = torch.channels_last


def build_models(
    opened: Checkpoint, dtype: torch.dtype, device: torch.device, progress: bool, offload: bool = False
) -> tuple[UNet, Autoencoder, TextEncoder]:
    """The three networks with the checkpoint's tensors. Built on the meta device: no weight exists twice.

    offload: text encoder and VAE on the CPU.
    """
    networks = unet, vae, text_encoder = meta_models(opened.config)
    if not offload:
        fill(opened, networks, dtype, device, progress)
        return networks
    check_parts(checkpoint_parts(opened, networks), opened.path)
    fill(opened, [vae, text_encoder], dtype, torch.device("cpu"), progress)
    fill(opened, [unet], dtype, device, progress)
    return networks


def fill(
    opened: Checkpoint,
    networks: Sequence[Network],
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
) -> None:
    """Read networks that are on the meta device."""
    with torch.inference_mode(False):  # whose tensors could never be read for a gradient
        load_parts(checkpoint_parts(opened, networks), opened.path, dtype=dtype, device=device, progress=progress)
        for network in networks:
            if isinstance(network, TextEncoder):
                network.restore_buffers(device)
                network.eval()
            else:
                network.to(memory_format=LAYOUT)  # type: ignore[call-overload]


def check_keys(opened: Checkpoint) -> None:
    """CheckpointError naming the tensors that are missing, unexpected, misshapen or of another dtype."""
    check_parts(checkpoint_parts(opened, meta_models(opened.config)), opened.path)


def meta_models(config: ModelConfig) -> tuple[UNet, Autoencoder, TextEncoder]:
    """The three networks without memory for their weights."""
    with torch.device("meta"):
        vae = TinyVAE(config.vae) if isinstance(config.vae, TinyVAEConfig) else VAE(config.vae)
        return UNet(config.unet), vae, TextEncoder(config.text)


def checkpoint_parts(opened: Checkpoint, networks: Sequence[Network]) -> dict[str, Part]:
    """Networks beside the tensors of an opened checkpoint that fill them."""
    parts = {}
    for network in networks:
        part = NAMES[type(network)]
        module = network.model if isinstance(network, TextEncoder) else network
        strip = len(network.state_prefix) if isinstance(network, TextEncoder) else 0
        files = opened.parts[part]
        names = {name: files.namer(name[strip:]) for name in module.state_dict()}
        parts[part] = Part(module, names, files.entries, files.ignore)
    return parts


def sharing_copy(network: OneOf) -> OneOf:
    """A copy on the same weights and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    return copy.deepcopy(network, shared)


def weight_samples(network: Network) -> bytes:
    """A few values of each weight: any training, merging or conversion changes some of them."""
    values = [first_values(weight.detach()).float() for weight in network.parameters()]
    return torch.cat(values).cpu().numpy().tobytes()


def first_values(tensor: Tensor, count: int = 16) -> Tensor:
    """The first values of a tensor in the order of its indices, whatever its layout, without a copy of the rest."""
    while tensor.dim() > 1 and tensor[0].numel() >= count:
        tensor = tensor[0]
    return tensor.flatten()[:count]
