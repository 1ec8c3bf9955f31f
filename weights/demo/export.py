"""Writes a trained model as a diffusers-layout folder, in float16."""

from pathlib import Path

import torch
from torch import Tensor, nn

from masa.config import ModelConfig
from masa.models.vae import VAE
from masa.weights.folder import write_folder

from .denoiser import Denoiser
from .vocabulary import write_tokenizer


def half_precision(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The network's tensors as contiguous float16 on the CPU, floating ones only, under prefixed names."""
    return {
        prefix + name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }


def export(folder: Path, vae: VAE, model: Denoiser, size: int) -> None:
    """Writes the model with its tokenizer; `size` is the pictures' side. ValueError for another vocabulary."""
    vocabulary = write_tokenizer(folder / "tokenizer")
    if vocabulary != model.text.config.vocab_size:
        raise ValueError(
            f"the text encoder knows {model.text.config.vocab_size} tokens, the world's vocabulary has "
            f"{vocabulary}: it was trained on another"
        )
    config = ModelConfig(unet=model.unet.config, vae=vae.config, text=model.text.config, image_size=size)
    prefix = "" if model.text.state_prefix else "text_model."
    parts = {
        "unet": half_precision(model.unet),
        "vae": half_precision(vae),
        "text_encoder": half_precision(model.text.model, prefix),
    }
    write_folder(folder, config, parts)
