"""Write a Stable Diffusion v1.5 checkpoint of random weights: real names, shapes and size, no content.

    python benchmarks/random_checkpoint.py OUT [--layout ldm | diffusers] [--dtype fp16] [--seed 0]

For loading, memory and timing, none of which care about content. About 2.1 GB in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from masa.config import SD_V1, ModelConfig
from masa.io.files import replacing
from masa.models.clip import TextEncoder
from masa.models.unet import UNet
from masa.models.vae import VAE
from masa.pipeline import DTYPE_NAMES
from masa.weights.folder import write_folder
from masa.weights.layouts import UNET_PREFIX, VAE_PREFIX, ldm_unet_name, ldm_vae_name

LDM_TEXT_PREFIX = "cond_stage_model.transformer.text_model."


def random_state(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights that keep activations near unit size: norms are the identity, the rest 1/sqrt(fan-in)."""
    state = {}
    for name, tensor in module.state_dict().items():
        if tensor.ndim < 2:
            value = torch.ones(tensor.shape) if name.endswith("weight") else torch.zeros(tensor.shape)
        else:
            scale = tensor[0].numel() ** -0.5 if "embedding.weight" not in name else 0.02
            value = torch.randn(tensor.shape, generator=generator) * scale
        state[name] = value.to(dtype)
    return state


def random_parts(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random unet, vae and text_encoder under diffusers' names, the text encoder's with their prefix."""
    with torch.device("meta"):
        text = TextEncoder(config.text)
        modules = {"unet": UNet(config.unet), "vae": VAE(config.vae), "text_encoder": text.model}
    generator = torch.Generator().manual_seed(seed)
    parts = {name: random_state(module, dtype, generator) for name, module in modules.items()}
    bare = {name.removeprefix(text.state_prefix): value for name, value in parts["text_encoder"].items()}
    parts["text_encoder"] = {f"text_model.{name}": value for name, value in bare.items()}
    return parts


def to_ldm(parts: dict[str, dict[str, Tensor]], config: ModelConfig) -> dict[str, Tensor]:
    """The parts under the names of an LDM single file; its VAE attention is stored as 1x1 convolutions."""
    levels = len(config.vae.block_out_channels)
    state = {
        UNET_PREFIX + ldm_unet_name(name, config.unet.layers_per_block): value for name, value in parts["unet"].items()
    }
    for name, value in parts["vae"].items():
        as_conv = "attentions.0.to_" in name and value.ndim == 2
        state[VAE_PREFIX + ldm_vae_name(name, levels)] = value[:, :, None, None] if as_conv else value
    for name, value in parts["text_encoder"].items():
        state[LDM_TEXT_PREFIX + name.removeprefix("text_model.")] = value
    return state


def write(
    out: Path, config: ModelConfig = SD_V1, *, layout: str = "ldm", dtype: torch.dtype = torch.float16, seed: int = 0
) -> None:
    """Write the checkpoint: one file for "ldm", a folder for "diffusers"."""
    parts = random_parts(config, dtype, seed)
    if layout == "ldm":
        with replacing(out) as temporary:
            save_file({k: v.contiguous() for k, v in to_ldm(parts, config).items()}, temporary)
        return
    write_folder(out, config, parts, max_shard_size="5GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=("ldm", "diffusers"), default="ldm")
    parser.add_argument("--dtype", choices=sorted(DTYPE_NAMES), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, layout=args.layout, dtype=DTYPE_NAMES[args.dtype], seed=args.seed)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
