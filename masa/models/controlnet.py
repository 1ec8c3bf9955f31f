"""ControlNet for Stable Diffusion v1: a copy of the UNet's way down that reads a hint picture (2302.05543)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from masa.attention import Backend, Call
from masa.config import UNetConfig
from masa.models.resnet import ResnetBlock
from masa.models.rowwise import Conv2d
from masa.models.unet import Block, UNet, timestep_embedding

HINT_WIDTHS = (16, 32, 96, 256)


class HintEncoder(nn.Module):
    """Eight convolutions from the hint picture to features at an eighth of its size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, HINT_WIDTHS[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(HINT_WIDTHS):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(HINT_WIDTHS[-1], width, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """picture (rows, 3, 8h, 8w) in [0, 1] -> (rows, width, h, w)."""
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNetwork(nn.Module):
    """Names follow diffusers'. Its modules down to the middle are the UNet's own kinds, with weights of their own."""

    def __init__(self, config: UNetConfig, bgr: bool = False, pooled: bool = False) -> None:
        """bgr: the hint's channels are reversed. pooled: residuals are their means over positions ("shuffle")."""
        super().__init__()
        self.config = config
        self.bgr, self.pooled = bgr, pooled
        unet = UNet(replace(config, guidance_width=0))
        self.conv_in = unet.conv_in
        self.time_embedding = unet.time_embedding
        self.controlnet_cond_embedding = HintEncoder(config.block_out_channels[0])
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block
        widths = [config.block_out_channels[0]]
        for level, width in enumerate(config.block_out_channels):
            halved = level < len(config.block_out_channels) - 1
            widths += [width] * (config.layers_per_block + halved)
        self.controlnet_down_blocks = nn.ModuleList([Conv2d(width, width, 1) for width in widths])
        self.controlnet_mid_block = Conv2d(widths[-1], widths[-1], 1)

    def forward(
        self, x: Tensor, timestep: float | Tensor, context: Tensor, hint: Tensor, backend: Backend = "auto"
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What is added to the UNet's skip connections, in the order of the way down, and to its middle.

        x (rows, 4, h, w), timestep and context (rows, 77, width) as `UNet.forward` takes them; hint (rows, width, h,
        w): of `encode`.
        """
        call = Call({}, {}, backend)
        emb = self.time_embedding(timestep_embedding(timestep, self.config.block_out_channels[0], x))
        x = self.conv_in(x) + hint
        skips = [x]
        for block in cast("list[Block]", self.down_blocks):
            for i in range(len(block.resnets)):
                x = _run(block, i, x, emb, context, call)
                skips.append(x)
            for down in block.downsamplers:
                x = down(x)
                skips.append(x)
        x = _run(self.mid_block, 0, x, emb, context, call)
        x = _run(self.mid_block, 1, x, emb, context, call)
        residuals = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        residuals.append(self.controlnet_mid_block(x))
        if self.pooled:
            residuals = [r.mean((2, 3), keepdim=True).expand_as(r).contiguous() for r in residuals]
        return tuple(residuals[:-1]), residuals[-1]

    def encode(self, picture: Tensor) -> Tensor:
        """The features of a hint picture (rows, 3, 8h, 8w), RGB in [0, 1]: (rows, width, h, w)."""
        return self.controlnet_cond_embedding(picture.flip(1) if self.bgr else picture)


def _run(block: Block, i: int, x: Tensor, emb: Tensor, context: Tensor, call: Call) -> Tensor:
    """Residual block i and, where the level has one, transformer block i."""
    x = cast(ResnetBlock, block.resnets[i])(x, emb)
    return block.attentions[i](x, context, call) if i < len(block.attentions) else x
