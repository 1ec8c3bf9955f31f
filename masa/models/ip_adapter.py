"""The IP-Adapter of Stable Diffusion v1: a picture becomes keys and values beside the prompt's (2308.06721)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masa.config import IPAdapterConfig


class Projection(nn.Module):
    """The plain adapter's tokens: a linear layer of the picture's embedding, and a norm."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.tokens, self.width = config.tokens, config.context_width
        self.proj = nn.Linear(config.picture_width, config.tokens * config.context_width)
        self.norm = nn.LayerNorm(config.context_width)

    def forward(self, picture: Tensor) -> Tensor:
        """picture (n, picture_width) -> (n, tokens, context_width)."""
        return self.norm(self.proj(picture).view(-1, self.tokens, self.width))


class Perceiver(nn.Module):
    """One attention of the resampler: latents read the picture's tokens and themselves."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, picture: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        read = torch.cat([self.norm1(picture), latents], dim=1)
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.to_q(latents), *self.to_kv(read).chunk(2, dim=-1))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """The plus adapter's tokens: learned latents that read the encoder's last-but-one hidden states."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width = config.inner_width
        self.latents = nn.Parameter(torch.empty(1, config.tokens, width))
        self.proj_in = nn.Linear(config.picture_width, width)
        self.proj_out = nn.Linear(width, config.context_width)
        self.norm_out = nn.LayerNorm(config.context_width)
        self.layers = nn.ModuleList()
        for _ in range(config.layers):
            mlp = [nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)]
            layer = [Perceiver(width, config.head_width), nn.Sequential(nn.LayerNorm(width), *mlp)]
            self.layers.append(nn.ModuleList(layer))

    def forward(self, picture: Tensor) -> Tensor:
        """picture (n, patches, picture_width) -> (n, tokens, context_width)."""
        latents = self.latents.expand(len(picture), -1, -1)
        picture = self.proj_in(picture)
        for layer in self.layers:
            attention, mlp = cast(nn.ModuleList, layer)
            latents = attention(picture, latents) + latents
            latents = mlp(latents) + latents
        return self.norm_out(self.proj_out(latents))


class ExtraProjections(nn.Module):
    """Keys and values of one cross-attention."""

    def __init__(self, context_width: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_width, width, bias=False)
        self.to_v_ip = nn.Linear(context_width, width, bias=False)


class IPAdapterNetwork(nn.Module):
    """Names are the published files'. widths: of the cross-attentions on the way down, on the way up, in the middle."""

    def __init__(self, config: IPAdapterConfig, widths: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.image_proj = Resampler(config) if config.plus else Projection(config)
        # Self-attentions are counted too, and have nothing.
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): ExtraProjections(config.context_width, width) for i, width in enumerate(widths)}
        )

    def forward(self, picture: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """What the encoder gives of pictures -> keys and values of each cross-attention, (n, tokens, width) each."""
        tokens = self.image_proj(picture)
        return tuple((one.to_k_ip(tokens), one.to_v_ip(tokens)) for one in self.ip_adapter.values())  # type: ignore[operator]
