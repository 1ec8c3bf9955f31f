"""Networks that steer the UNet, from their own files: read once by the runs that share them, gone with the last.

A control names a file and holds no network: it may live as long as a program. A run holds what it uses until its
result is there; `keep_networks` holds what several runs use one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from masa.config import TinyVAEConfig, UNetConfig
from masa.edits import Site
from masa.errors import CheckpointError, MasaError
from masa.io.files import file_digest
from masa.models.controlnet import ControlNetwork
from masa.models.ip_adapter import IPAdapterNetwork
from masa.models.t2i_adapter import T2IAdapterNetwork
from masa.models.taesd import TinyVAE
from masa.models.unet import UNet
from masa.runtime.networks import LAYOUT, first_values
from masa.weights import hub
from masa.weights.adapters import DIFFERENCE, open_adapter, open_controlnet, open_ip_adapter
from masa.weights.checkpoint import Part, load_parts, read_entries
from masa.weights.model_files import PartFiles, open_vae

Network = TypeVar("Network", bound=nn.Module)

# The adapter that ships with the demo model: a pose by a stick figure.
DEMO_ADAPTER = Path(hub.__file__).parent / "demo" / "adapter" / "stick_figure.safetensors"

# Reads a file for a UNet of a shape, in a dtype, on a device; last the UNet's own weights, where the file needs them.
Reader = Callable[..., Network]
Weights = Mapping[str, Tensor]

# Networks in use, by file, its state on disk, device, dtype and the UNet's shape: runs with one file share one.
_IN_USE: WeakValueDictionary[object, nn.Module] = WeakValueDictionary()
_DIGESTS: dict[object, str] = {}  # by file and its state on disk
_KEPT: dict[object, list[nn.Module]] = {}  # by block of `keep_networks`


@contextmanager
def keep_networks() -> Iterator[None]:
    """Adapters, ControlNets and image encoders that runs in this block have read stay in memory until its end.

    Without it each run reads them anew from their files, and lets them go::

        edges = masa.ControlNet("canny.safetensors", target="edges.png")
        with masa.keep_networks():
            results = [masa.sample(sd, "a cat", "a dog", controls=edges, seed=seed) for seed in range(8)]
    """
    block = object()
    _KEPT[block] = []
    try:
        yield
    finally:
        del _KEPT[block]


class AdapterFile(Generic[Network]):
    """One file or folder of weights, and the network in it as long as somebody holds it."""

    def __init__(self, path: str | Path, sha256: str | None, read: Reader[Network]) -> None:
        """sha256: what the file's digest must be; None for any. read: makes the network."""
        self.path = Path(path)
        self.sha256 = sha256
        self.read = read

    def load(self, unet: UNetConfig, dtype: torch.dtype, device: torch.device, base: Weights | None = None) -> Network:
        """The network, which the caller holds. MasaError for a file that does not fit, or has not the digest given.

        base: the UNet's weights before any LoRA, for a file that holds differences to them.
        """
        if self.sha256 is not None and self.digest() != self.sha256:
            raise MasaError(
                f"{self.path} has changed since these settings were written (its SHA-256 is {self.digest()[:12]}.., "
                f"expected {self.sha256[:12]}..); put the old file back, or run anew"
            )
        key = (
            self.path.resolve(),
            self.state(),
            self.read,
            unet,
            dtype,
            device,
            None if base is None else digest(base),
        )
        kept = _IN_USE.get(key)
        if kept is None:
            more = () if base is None else (base,)
            kept = _IN_USE[key] = self.read(self.path, unet, dtype, device, *more)
        for networks in _KEPT.values():
            networks.append(kept)
        return kept  # type: ignore[return-value]

    def digest(self) -> str:
        """SHA-256, in hex, of the file; of a folder, of its weights' digests."""
        key = (self.path.resolve(), self.state())
        if key not in _DIGESTS:
            found = [file_digest(file) for file in self._files()]
            _DIGESTS[key] = found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
        return _DIGESTS[key]

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} is not there; give the path of a .safetensors file or its folder")
        return sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]

    def state(self) -> tuple[object, ...]:
        """What changes when the files do."""
        return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files())


def digest(weights: Weights) -> str:
    """What tells the weights of one model from another's, from a few values of each."""
    values = torch.cat([first_values(weight.detach()).float().cpu() for weight in weights.values()])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def locate_adapter(path: str | Path) -> Path:
    """The file or folder that a T2I-Adapter's path means: "demo" is the shipped adapter, "./demo" what lies there."""
    return DEMO_ADAPTER if path == "demo" else Path(path)


def read_adapter(path: Path, unet: UNetConfig, dtype: torch.dtype, device: torch.device) -> T2IAdapterNetwork:
    """A T2I-Adapter for a UNet of this shape. CheckpointError for other files, before any tensor is read."""
    opened = open_adapter(path)
    if opened.config.block_out_channels != unet.block_out_channels:
        raise CheckpointError(
            f"{path} was made for a UNet of widths {opened.config.block_out_channels}, and this model's are "
            f"{unet.block_out_channels}; give an adapter that was trained for it"
        )
    with torch.device("meta"):
        network = T2IAdapterNetwork(opened.config)
    return _filled(network, opened.part, path, "T2I-Adapter for Stable Diffusion v1", dtype, device)


def read_controlnet(
    path: Path, unet: UNetConfig, dtype: torch.dtype, device: torch.device, base: Weights | None = None
) -> ControlNetwork:
    """A ControlNet that is a copy of a UNet of this shape. CheckpointError for others, before any tensor is read.

    base: the UNet's own weights, which are added where the file holds differences to them.
    """
    opened = open_controlnet(path, unet.heads, unet.norm_groups)
    ours, theirs = (
        (c.in_channels, c.block_out_channels, c.layers_per_block, c.context_width, c.heads, c.norm_groups)
        for c in (unet, opened.unet)
    )
    if ours != theirs:
        raise CheckpointError(
            f"{path} is a copy of another UNet (channels, widths, layers, context, heads, groups: {theirs}; this "
            f"model's: {ours}); give a ControlNet that was trained for it"
        )
    with torch.device("meta"):
        network = ControlNetwork(unet, opened.bgr, opened.pooled)
    kind = "ControlNet for Stable Diffusion v1"
    if not opened.difference:
        return _filled(network, opened.part, path, kind, dtype, device)
    if base is None:
        raise MasaError(
            f"{path} holds differences to its base model, whose weights a model offloaded on a CPU does not keep; load "
            "it without offload, or take the full version of the file"
        )
    network = _filled(network, opened.part, path, kind, torch.float32, device)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name in base:  # what the UNet has not, such as the hint's encoder, stands as it is
                weight.add_(base[name].to(weight))
    return network.to(dtype)


def holds_differences(path: Path) -> bool:
    """Whether a ControlNet's file holds differences to its base model's weights. CheckpointError for no such file."""
    return path.is_file() and DIFFERENCE in read_entries(path)


def read_ip_adapter(path: Path, unet: UNetConfig, dtype: torch.dtype, device: torch.device) -> IPAdapterNetwork:
    """An IP-Adapter for a UNet of this shape. CheckpointError for other files, before any tensor is read."""
    opened = open_ip_adapter(path)
    if opened.config.context_width != unet.context_width:
        raise CheckpointError(
            f"{path} makes tokens of {opened.config.context_width} features, and this model reads "
            f"{unet.context_width}; give an adapter that was trained for it"
        )
    with torch.device("meta"):
        widths = [site.width for site in in_file_order(UNet(unet).sites)]
        network = IPAdapterNetwork(opened.config, widths)
    return _filled(network, opened.part, path, "IP-Adapter for Stable Diffusion v1", dtype, device)


def read_tiny_vae(path: Path, unet: UNetConfig, dtype: torch.dtype, device: torch.device) -> TinyVAE:
    """TAESD, in any of its layouts. CheckpointError for another autoencoder, before any tensor is read."""
    part, config = open_vae(path)
    if not isinstance(config, TinyVAEConfig):
        raise CheckpointError(f"{path} is a whole autoencoder, too slow for previews; give TAESD's file, or 'linear'")
    with torch.device("meta"):
        network = TinyVAE(config)
    return _filled(network, part, path, "TAESD", dtype, device)


def in_file_order(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The cross-attentions as IP-Adapters count them: the way down, the way up, and the middle last."""
    crosses = [site for site in sites if site.kind == "cross"]
    return tuple(site for place in ("down", "up", "mid") for site in crosses if site.place == place)


def read_encoder(path: Path, unet: UNetConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers' CLIP image encoder from its folder. MasaError for a folder that holds none."""
    from transformers import CLIPVisionModelWithProjection  # slow to import

    try:
        loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
            str(path), local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise MasaError(
            f"{path} is no image encoder that transformers can read ({' '.join(str(error).split())[:150]}); give the "
            "folder of CLIP ViT-H/14, such as IP-Adapter's models/image_encoder"
        ) from error
    encoder, found = loaded
    lacking = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in found[kind])
    if lacking:  # which transformers would fill with random numbers
        raise CheckpointError(
            f"{path} is no whole image encoder: {len(lacking)} tensors are missing or of another shape, such as "
            f"{lacking[0]}; give the folder of CLIP ViT-H/14 with its projection, such as IP-Adapter's "
            "models/image_encoder"
        )
    return encoder.to(device, dtype).eval().requires_grad_(False)


def _filled(
    network: Network, part: PartFiles, path: Path, kind: str, dtype: torch.dtype, device: torch.device
) -> Network:
    """A network that is on the meta device, strictly filled."""
    names = {name: part.namer(name) for name in network.state_dict()}
    with torch.inference_mode(False):  # whose tensors could never be read for a gradient
        parts = {kind: Part(network, names, part.entries, part.ignore)}
        load_parts(parts, path, dtype=dtype, device=device, progress=False, whole=kind)
        network.to(memory_format=LAYOUT)  # type: ignore[call-overload]
    return network
