"""The three networks of a checkpoint: built without memory, filled, and on a CPU with little of it emptied again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from masa.config import ModelConfig
from masa.errors import MasaError
from masa.models.clip import TextEncoder
from masa.models.unet import UNet
from masa.models.vae import VAE
from masa.storage import release_freed
from masa.weights.checkpoint import Part, check_parts, load_parts
from masa.weights.model_files import Checkpoint

Network = UNet | VAE | TextEncoder
NAMES: dict[type, str] = {UNet: "unet", VAE: "vae", TextEncoder: "text_encoder"}

# Of convolutions' weights, which feature maps follow. Attention reads a map as tokens without a copy; on a CPU float32
# convolutions take fewer multiplications in it (`masa.models.winograd`), and bfloat16 ones on AMX are faster too.
LAYOUT = torch.channels_last


def build_models(
    opened: Checkpoint, dtype: torch.dtype, device: torch.device, progress: bool, offload: bool = False
) -> tuple[UNet, VAE, TextEncoder]:
    """The three networks with the checkpoint's tensors. Built on the meta device: no weight exists twice.

    offload: text encoder and VAE are read, which finds what is wrong with them, and go where they wait for their work.
    """
    networks = unet, vae, text_encoder = meta_models(opened.config)
    if not offload:
        fill(opened, networks, dtype, device, progress)
        return networks
    check_parts(checkpoint_parts(opened, networks), opened.path)
    for network in (vae, text_encoder):
        fill(opened, [network], dtype, torch.device("cpu"), progress)
        if device.type == "cpu":
            _empty(network)
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


def meta_models(config: ModelConfig) -> tuple[UNet, VAE, TextEncoder]:
    """The three networks without memory for their weights."""
    with torch.device("meta"):
        return UNet(config.unet), VAE(config.vae), TextEncoder(config.text)


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


class Shelf:
    """Networks of a model on a CPU that are in memory only while they work, read anew from its checkpoint."""

    def __init__(self, opened: Checkpoint, unet: UNet) -> None:
        self.opened, self.dtype = opened, unet.conv_in.weight.dtype
        self.as_read = _state(unet)

    @contextmanager
    def at_work(self, network: Network, instead_of: UNet | None = None) -> Iterator[None]:
        """A network that is empty outside of this, and the UNet empty within, if it is to make room.

        MasaError where the UNet's weights were changed, which would be lost.
        """
        if instead_of is not None:
            if _state(instead_of) != self.as_read:
                raise MasaError(
                    "the UNet's weights were changed, and offload=True on a CPU reads them from the checkpoint anew; "
                    "load the model without it"
                )
            _empty(instead_of)
        try:
            self._fill(network)
            yield
        finally:
            _empty(network)
            if instead_of is not None:
                self._fill(instead_of)
                self.as_read = _state(instead_of)

    def _fill(self, network: Network) -> None:
        fill(self.opened, [network], self.dtype, torch.device("cpu"))


def _empty(network: Network) -> None:
    network.to("meta")
    release_freed()


def _state(unet: UNet) -> tuple[tuple[int, int], ...]:
    """Where the weights are and how often they were written to: equal as long as nobody changes them."""
    return tuple((weight.data_ptr(), weight._version) for weight in unet.parameters())
