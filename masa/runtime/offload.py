"""offload=True on a CPU: text encoder and VAE are read anew for their work, and the UNet makes room for the VAE."""

from __future__ import annotations

import ctypes
import hashlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from masa.errors import CheckpointError, MasaError
from masa.models.clip import TextEncoder
from masa.models.unet import UNet
from masa.models.vae import VAE
from masa.runtime.networks import Autoencoder, Network, checkpoint_parts, fill, meta_models, weight_samples
from masa.weights.checkpoint import check_parts
from masa.weights.model_files import Checkpoint, Wanted

FILE_ERRORS = (OSError, SafetensorError, CheckpointError)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a float


@dataclass(frozen=True)
class WeightDigest:
    """What tells a network's weights from others: names, sums of their bits, some of their values."""

    names: tuple[str, ...]
    sums: str
    samples: bytes

    @staticmethod
    def of(network: Network) -> WeightDigest:
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                bits = tensor.view(BITS[tensor.element_size()])
                if bits.dim() > 1:  # sums that run over: exact in any order, and as fast as memory is read
                    bits = bits.sum(tuple(range(1, bits.dim())), dtype=bits.dtype)
                digest.update(bits.cpu().contiguous().numpy().tobytes())
        return WeightDigest(names_of(network), digest.hexdigest(), weight_samples(network))


def names_of(network: Network) -> tuple[str, ...]:
    """Of all that a network keeps, whether or not checkpoints hold it."""
    return (*network.state_dict(), *(name for name, _ in network.named_buffers()))


@dataclass(frozen=True, eq=False, repr=False)
class OffloadedNetworks:
    """A model's UNet, VAE and text encoder, of which only those at work are in memory.

    The UNet is, except while the VAE works, whose maps need the room. For inference, and for one run at a time.
    checkpoint: its path. wanted: of it. digests: of the networks as first read.
    """

    checkpoint: Path
    wanted: Wanted
    dtype: torch.dtype
    networks: tuple[UNet, Autoencoder, TextEncoder]
    digests: tuple[WeightDigest, WeightDigest, WeightDigest]

    @staticmethod
    def read(opened: Checkpoint, dtype: torch.dtype, progress: bool) -> OffloadedNetworks:
        """Read the three networks, which finds what is wrong with them, and keep the UNet."""
        networks = meta_models(opened.config)
        unet, vae_model, text_encoder = networks
        check_parts(checkpoint_parts(opened, networks), opened.path)
        digests = []
        for network in (vae_model, text_encoder):
            fill(opened, [network], dtype, torch.device("cpu"), progress)
            digests.append(WeightDigest.of(network))
            _empty(network)
        fill(opened, [unet], dtype, torch.device("cpu"), progress)
        # Absolute, since the program may change its folder.
        vae = None if opened.wanted.vae is None else opened.wanted.vae.absolute()
        where = opened.path.absolute(), replace(opened.wanted, vae=vae)
        return OffloadedNetworks(*where, dtype, networks, (WeightDigest.of(unet), digests[0], digests[1]))

    def holds(self, network: object) -> bool:
        """Whether a network is one of these, and not one that the user put in its place."""
        return any(network is own for own in self.networks)

    def weight_samples(self, network: Network) -> bytes:
        """As `networks.weight_samples`, without reading a network that is absent."""
        if not self.holds(network) or not _is_empty(network):
            return weight_samples(network)
        return self.digests[self._place(network)].samples

    @contextmanager
    def at_work(self, network: Network) -> Iterator[None]:
        """A network in memory, in place of the UNet if it is the VAE.

        MasaError where the UNet was changed, which would be lost. CheckpointError where files are not as they were.
        """
        unet = self.networks[0]
        if _is_empty(unet):  # it could not be read when the VAE was done
            self._fill(unet, self._open())
        if not self.holds(network):
            yield
            return
        if WeightDigest.of(unet) != self.digests[0] or any(weight.requires_grad for weight in unet.parameters()):
            raise MasaError(
                "the UNet's weights were changed, or want gradients, and offload=True on a CPU reads them from the "
                "checkpoint anew; load the model without it"
            )
        kept = not all(weight.is_meta for weight in network.parameters())
        if kept or names_of(network) != self.digests[self._place(network)].names:
            raise MasaError(
                f"the {type(network).__name__} was given other weights, and offload=True on a CPU reads them from the "
                "checkpoint anew; load the model without it, or put a whole network in its place"
            )
        opened = self._open()  # before anything is given up
        alone = isinstance(network, VAE)
        try:
            if alone:
                _empty(unet)
            self._fill(network, opened)
            yield
        finally:
            _empty(network)
            if alone:
                try:
                    self._fill(unet, self._open())
                except Exception as error:  # what the VAE made is not lost for it; the next use tries again, and raises
                    _empty(unet)
                    warnings.warn(f"the UNet could not be read again: {error}", stacklevel=2)

    def _place(self, network: Network) -> int:
        return next(i for i, own in enumerate(self.networks) if own is network)

    def _fill(self, network: Network, opened: Checkpoint) -> None:
        """Read a network. CheckpointError, with the network empty, unless it is what was read first."""
        try:
            fill(opened, [network], self.dtype, torch.device("cpu"))
            if WeightDigest.of(network) != self.digests[self._place(network)]:
                raise CheckpointError("the weights are others")
        except FILE_ERRORS as error:
            _empty(network)
            raise self._not_as_loaded(error) from error

    def _open(self) -> Checkpoint:
        try:
            return self.wanted.open(self.checkpoint)
        except FILE_ERRORS as error:
            raise self._not_as_loaded(error) from error

    def _not_as_loaded(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint} is not what was loaded with offload=True, which on a CPU reads it for each use "
            f"({error}); put the files back, or load the model anew"
        )


def _empty(network: Network) -> None:
    network.to("meta")
    release_freed()


def _is_empty(network: Network) -> bool:
    return any(weight.is_meta for weight in network.parameters())


def release_freed() -> None:
    """Give the system back what this process has freed; glibc would keep most of it for later."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
        if trim is not None:
            trim(0)
