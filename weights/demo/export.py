"""Writes a trained model as a diffusers-layout folder, in float16."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from masa.config import ScheduleConfig
from masa.models.vae import VAE

from .denoiser import Denoiser
from .vocabulary import write_tokenizer


def half_precision(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The network's tensors as contiguous float16 on the CPU, floating ones only, under prefixed names."""
    return {
        prefix + name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }


def write_folder(folder: Path, vae: VAE, model: Denoiser, size: int) -> None:
    """Writes unet/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json; `size` is the pictures' side."""
    vocabulary = write_tokenizer(folder / "tokenizer")
    if vocabulary != model.text.config.vocab_size:
        raise ValueError(
            f"the text encoder knows {model.text.config.vocab_size} tokens, the world's vocabulary has "
            f"{vocabulary}: it was trained on another"
        )
    unet, text, auto = model.unet.config, model.text.config, vae.config
    levels = len(unet.block_out_channels)
    _write(
        folder / "unet",
        "diffusion_pytorch_model.safetensors",
        half_precision(model.unet),
        {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            # diffusers' historical name; in SD v1 it counts heads
            "attention_head_dim": unet.heads,
            "block_out_channels": unet.block_out_channels,
            "center_input_sample": False,
            "cross_attention_dim": unet.context_width,
            "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": unet.in_channels,
            "layers_per_block": unet.layers_per_block,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-05,
            "norm_num_groups": unet.norm_groups,
            "out_channels": unet.out_channels,
            "sample_size": size // auto.downsample,
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        },
    )
    levels = len(auto.block_out_channels)
    _write(
        folder / "vae",
        "diffusion_pytorch_model.safetensors",
        half_precision(vae),
        {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": auto.block_out_channels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "in_channels": auto.in_channels,
            "latent_channels": auto.latent_channels,
            "layers_per_block": auto.layers_per_block,
            "norm_num_groups": auto.norm_groups,
            "out_channels": 3,
            "sample_size": size,
            "scaling_factor": auto.scaling_factor,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
    )
    tokenizer = model.tokenizer
    prefix = "" if model.text.state_prefix else "text_model."
    _write(
        folder / "text_encoder",
        "model.safetensors",
        half_precision(model.text.model, prefix),
        {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "attention_dropout": 0.0,
            "bos_token_id": tokenizer.start_id,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
            "dropout": 0.0,
            "hidden_act": text.activation,
            "hidden_size": text.width,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": text.intermediate_width,
            "layer_norm_eps": text.norm_eps,
            "max_position_embeddings": text.tokens,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "projection_dim": text.width,
            "vocab_size": text.vocab_size,
        },
    )
    schedule = ScheduleConfig()
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "DDIMScheduler",
            "beta_end": schedule.beta_end,
            "beta_schedule": "scaled_linear",
            "beta_start": schedule.beta_start,
            "clip_sample": False,
            "num_train_timesteps": schedule.training_timesteps,
            "prediction_type": "epsilon",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "trained_betas": None,
        },
    )
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _write(folder: Path, name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
