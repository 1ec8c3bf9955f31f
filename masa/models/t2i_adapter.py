"""The T2I-Adapter of Stable Diffusion v1: from a condition picture to one feature map per level (2302.08453)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from masa.config import T2IAdapterConfig

PIXELS = 8  # of the picture's side, per position of the finest level


class AdapterBlock(nn.Module):
    """x + block2(relu(block1(x))); block2 is 1x1, of light adapters 3x3."""

    def __init__(self, width: int, light: bool) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, 3, padding=1) if light else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class AdapterLevel(nn.Module):
    """One level: halved unless it is the first, brought to its width, then its blocks."""

    def __init__(self, in_channels: int, width: int, config: T2IAdapterConfig, first: bool) -> None:
        super().__init__()
        self.first = first
        inner = width // 4 if config.light else width
        self.changes_width = config.light or in_channels != width
        if self.changes_width:
            self.in_conv = nn.Conv2d(in_channels, inner, 1)
        self.resnets = nn.ModuleList([AdapterBlock(inner, config.light) for _ in range(config.blocks_per_level)])
        self.light = config.light
        if config.light:
            self.out_conv = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        if self.changes_width:
            x = self.in_conv(x)
        for block in self.resnets:
            x = block(x)
        return self.out_conv(x) if self.light else x


class T2IAdapterNetwork(nn.Module):
    """Names follow diffusers', without its prefix `adapter.`"""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        if not config.light:
            self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        before = (config.in_channels if config.light else widths[0], *widths)
        self.body = nn.ModuleList(
            [AdapterLevel(before[i], width, config, first=i == 0) for i, width in enumerate(widths)]
        )

    @property
    def picture_channels(self) -> int:
        """Channels of the condition picture: 1 for lines, 3 for colours."""
        return self.config.in_channels // PIXELS**2

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        """picture (rows, 1 or 3, 8h, 8w) in [0, 1] -> each level (rows, width, h >> level, w >> level)."""
        x = F.pixel_unshuffle(picture, PIXELS)
        if not self.config.light:
            x = self.conv_in(x)
        features = []
        for level in self.body:
            x = level(x)
            features.append(x)
        return tuple(features)
