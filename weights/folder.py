"""Writing a diffusers-layout folder: configuration files as diffusers writes them, tensors in safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from masa.config import ModelConfig, VAEConfig
from masa.io.files import replacing

# Repositories and mail both dislike larger files; diffusers and masa read sharded folders like whole ones.
SHARD_SIZE = "14MB"

Json = dict[str, object]


def folder_configs(config: ModelConfig) -> dict[str, Json]:
    """The configuration files of a diffusers folder, by path."""
    assert isinstance(config.vae, VAEConfig)
    levels, vae_levels = len(config.unet.block_out_channels), len(config.vae.block_out_channels)
    side = config.image_size
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            # diffusers' historical name; in SD v1 it counts heads.
            "attention_head_dim": config.unet.heads,
            "block_out_channels": config.unet.block_out_channels,
            "center_input_sample": False,
            "cross_attention_dim": config.unet.context_width,
            "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": config.unet.in_channels,
            "layers_per_block": config.unet.layers_per_block,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-05,
            "norm_num_groups": config.unet.norm_groups,
            "out_channels": config.unet.out_channels,
            "sample_size": side // config.vae.downsample,
            "time_cond_proj_dim": config.unet.guidance_width or None,
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": config.vae.block_out_channels,
            "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
            "in_channels": config.vae.in_channels,
            "latent_channels": config.vae.latent_channels,
            "layers_per_block": config.vae.layers_per_block,
            "norm_num_groups": config.vae.norm_groups,
            "out_channels": config.vae.in_channels,
            "sample_size": side,
            "scaling_factor": config.vae.scaling_factor,
            "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            # As SD v1's own configuration has it; it matters only for the pooled output, which is not used.
            "eos_token_id": 2,
            "pad_token_id": 1,
            "dropout": 0.0,
            "hidden_act": config.text.activation,
            "hidden_size": config.text.width,
            "intermediate_size": config.text.intermediate_width,
            "layer_norm_eps": config.text.norm_eps,
            "max_position_embeddings": config.text.tokens,
            "num_attention_heads": config.text.heads,
            "num_hidden_layers": config.text.layers,
            "projection_dim": config.text.width,
            "vocab_size": config.text.vocab_size,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_end": config.schedule.beta_end,
            "beta_schedule": "scaled_linear",
            "beta_start": config.schedule.beta_start,
            "clip_sample": False,
            "num_train_timesteps": config.schedule.training_timesteps,
            "prediction_type": "epsilon" if config.unet.velocity is None else "v_prediction",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "trained_betas": None,
        },
    }


def write_folder(
    folder: Path, config: ModelConfig, parts: dict[str, dict[str, Tensor]], max_shard_size: str = SHARD_SIZE
) -> None:
    """Write unet/, vae/, text_encoder/, scheduler/ and model_index.json.

    parts: "unet", "vae" and "text_encoder" to tensors under diffusers' names. Parts over max_shard_size are
    written as several files and an index.
    """
    from huggingface_hub import save_torch_state_dict

    for name, settings in folder_configs(config).items():
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for part, tensors in parts.items():
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_torch_state_dict(
            tensors, folder / part, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
        )
