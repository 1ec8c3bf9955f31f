"""The autoencoder of Stable Diffusion v1: pictures (3, 8h, 8w) <-> latents (4, h, w)."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from masa.config import VAEConfig
from masa.models.resnet import Downsample, ResnetBlock, Upsample, silu_of
from masa.models.rowwise import Conv2d, GroupNorm

# Both of the VAE's norms use 1e-6, the UNet's residual blocks 1e-5: the checkpoints were trained so.
EPS = 1e-6


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, in the middle of encoder and decoder."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(norm_groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](out), "b 1 (h w) c -> b c h w", h=x.shape[-2])


class Level(nn.Module):
    """One resolution: residual blocks, then possibly a change of size."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        downsampler: Downsample | None = None,
        upsampler: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def modules_in_turn(self) -> tuple[nn.Module, ...]:
        """What a map goes through. Not a forward: that would hold its input, the largest map, to its end."""
        return (*self.resnets, *self.downsamplers, *self.upsamplers)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, None, norm_groups, EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, norm_groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Picture (b, 3, H, W) -> moments of the latent posterior (b, 8, H/8, W/8)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        above = channels[0]
        for level, width in enumerate(channels):
            resnets = [
                ResnetBlock(above if i == 0 else width, width, None, groups, EPS)
                for i in range(config.layers_per_block)
            ]
            above = width
            down = Downsample(width, asymmetric=True) if level < len(channels) - 1 else None
            self.down_blocks.append(Level(resnets, downsampler=down))
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in cast("list[Level]", self.down_blocks):
            for module in level.modules_in_turn():
                x = module(x)
        return self.conv_out(silu_of(self.conv_norm_out, self.mid_block(x)))


class Decoder(nn.Module):
    """Latents (b, 4, h, w) -> picture (b, 3, 8h, 8w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_groups
        self.conv_in = Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid_block = Middle(channels[-1], groups)
        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for level in reversed(range(len(channels))):
            width = channels[level]
            resnets = [
                ResnetBlock(below if i == 0 else width, width, None, groups, EPS)
                for i in range(config.layers_per_block + 1)
            ]
            below = width
            self.up_blocks.append(Level(resnets, upsampler=Upsample(width) if level > 0 else None))
        self.conv_norm_out = GroupNorm(groups, channels[0], eps=EPS)
        self.conv_out = Conv2d(channels[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in cast("list[Level]", self.up_blocks):
            for module in level.modules_in_turn():
                x = module(x)
        return self.conv_out(silu_of(self.conv_norm_out, x))


class VAE(nn.Module):
    """Encoder, decoder and the two 1x1 convolutions between them and the latents."""

    def __init__(self, config: VAEConfig = VAEConfig()) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = Conv2d(latent, latent, 1)

    def moments(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, (b, 4, h, w) each and unscaled, of the posterior of a picture in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(picture)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, picture: Tensor) -> Tensor:
        """Picture (b, 3, 8h, 8w) in [-1, 1] -> latents (b, 4, h, w): the posterior mean times 0.18215."""
        return self.moments(picture)[0] * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) -> picture (b, 3, 8h, 8w), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

    def forward(self, picture: Tensor) -> Tensor:
        """The picture through encoder and decoder."""
        return self.decode(self.encode(picture))
