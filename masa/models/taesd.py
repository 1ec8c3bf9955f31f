"""TAESD: a tiny autoencoder for Stable Diffusion v1's latents, some twenty times faster than its own.

After github.com/madebyollin/taesd: convolutions of one width and residual blocks, neither norms nor attention. It has
learnt the latents as the denoiser sees them, so nothing is divided by 0.18215, and pictures in [0, 1].
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masa.config import TinyVAEConfig
from masa.errors import MasaError
from masa.models.rowwise import Conv2d

WIDTH = 64
LATENTS_BEYOND = 3.0  # the decoder bends latents over this, 3 tanh(x / 3), which keeps outliers from spreading


class Block(nn.Module):
    """relu(three convolutions of x, plus x)."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Picture (b, 3, 8h, 8w) in [0, 1] -> latents (b, c, h, w). Layers are numbered as in published files."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv2d(3, WIDTH, 3, padding=1), Block()]
        for _ in range(3):
            layers += [Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False), Block(), Block(), Block()]
        self.layers = nn.Sequential(*layers, Conv2d(WIDTH, latent_channels, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        return self.layers(picture)


class TinyDecoder(nn.Module):
    """Latents (b, c, h, w) -> picture (b, 3, 8h, 8w) in about [0, 1]. Published files count the tanh as layer 0."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv2d(latent_channels, WIDTH, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            larger = nn.Upsample(scale_factor=2.0, mode="nearest")
            layers += [Block(), Block(), Block(), larger, Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, Block(), Conv2d(WIDTH, 3, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(LATENTS_BEYOND * torch.tanh(latents / LATENTS_BEYOND))


class TinyVAE(nn.Module):
    """Encoder and decoder, with the interface of `VAE`; the encoder may be missing."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config.latent_channels) if config.encodes else None
        self.decoder = TinyDecoder(config.latent_channels)

    def encode(self, picture: Tensor) -> Tensor:
        """Picture (b, 3, 8h, 8w) in [-1, 1] -> latents (b, 4, h, w). MasaError without an encoder."""
        if self.encoder is None:
            raise MasaError(
                "the vae= that was loaded is TAESD's decoder alone, which cannot encode a picture; give a file or "
                "folder with its encoder too, or leave vae= out"
            )
        return cast(Tensor, self.encoder((picture + 1.0) / 2.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) -> picture (b, 3, 8h, 8w), about [-1, 1], not clipped."""
        return cast(Tensor, self.decoder(latents)) * 2.0 - 1.0

    def forward(self, picture: Tensor) -> Tensor:
        """The picture through encoder and decoder."""
        return self.decode(self.encode(picture))
