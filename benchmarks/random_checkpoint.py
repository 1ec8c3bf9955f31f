"""Write a Stable Diffusion v1.5 checkpoint of random weights: real names, shapes and size, no content.

    python benchmarks/random_checkpoint.py OUT [--layout ldm | diffusers] [--dtype fp16] [--seed 0]

For loading, memory and timing, none of which care about content. About 2.1 GB in float16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from masa.config import SD_V1, ModelConfig
from masa.files import replacing
from masa.models.clip import TextEncoder
from masa.models.unet import UNet
from masa.models.vae import VAE
from masa.pipeline import DTYPE_NAMES
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


def folder_configs(config: ModelConfig) -> dict[str, dict[str, object]]:
    """The configuration files of a diffusers folder, by path."""
    levels = len(config.unet.block_out_channels)
    vae_levels = len(config.vae.block_out_channels)
    return {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": config.unet.heads,
            "block_out_channels": list(config.unet.block_out_channels),
            "cross_attention_dim": config.unet.context_width,
            "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
            "in_channels": config.unet.in_channels,
            "out_channels": config.unet.out_channels,
            "layers_per_block": config.unet.layers_per_block,
            "norm_num_groups": config.unet.norm_groups,
            "sample_size": config.image_size // config.vae.downsample,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(config.vae.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
            "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
            "in_channels": config.vae.in_channels,
            "out_channels": config.vae.in_channels,
            "latent_channels": config.vae.latent_channels,
            "layers_per_block": config.vae.layers_per_block,
            "norm_num_groups": config.vae.norm_groups,
            "scaling_factor": config.vae.scaling_factor,
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_act": config.text.activation,
            "hidden_size": config.text.width,
            "intermediate_size": config.text.intermediate_width,
            "layer_norm_eps": config.text.norm_eps,
            "max_position_embeddings": config.text.tokens,
            "num_attention_heads": config.text.heads,
            "num_hidden_layers": config.text.layers,
            "vocab_size": config.text.vocab_size,
            "projection_dim": config.text.width,
            "eos_token_id": 2,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_start": config.schedule.beta_start,
            "beta_end": config.schedule.beta_end,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": config.schedule.training_timesteps,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": "epsilon",
        },
    }


def write(
    out: Path, config: ModelConfig = SD_V1, *, layout: str = "ldm", dtype: torch.dtype = torch.float16, seed: int = 0
) -> None:
    """Write the checkpoint: one file for "ldm", a folder for "diffusers"."""
    parts = random_parts(config, dtype, seed)
    if layout == "ldm":
        with replacing(out) as temporary:
            save_file({k: v.contiguous() for k, v in to_ldm(parts, config).items()}, temporary)
        return
    for name, settings in folder_configs(config).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(settings, indent=2))
    for part, state in parts.items():
        name = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        with replacing(out / part / name) as temporary:
            save_file(state, temporary, {"format": "pt"})


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
