"""The denoising UNet of Stable Diffusion v1.

Four levels down, a middle, four levels up; every level but the deepest holds transformer blocks, 16 in all.
Module names follow diffusers, which LoRA files and papers speak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from masa.attention import Backend, Call, Edit, Place, Site, Tape, take
from masa.config import UNetConfig
from masa.errors import MasaError
from masa.models.resnet import Downsample, ResnetBlock, Upsample, emb_of
from masa.models.rowwise import Conv2d, GroupNorm
from masa.models.transformer import Transformer


@dataclass(frozen=True)
class Retirement:
    """Rows that leave the batch in the transformer block `layer`: `keep` are those that stay.

    They leave when nobody reads more of them: in self-attention, if its edit only names rows, else after the block.
    """

    layer: int
    keep: tuple[int, ...]


class TimestepEmbedding(nn.Module):
    """The sinusoidal timestep through a two-layer MLP."""

    def __init__(self, width: int, emb_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, emb_width)
        self.linear_2 = nn.Linear(emb_width, emb_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Block(nn.Module):
    """One level's modules under the checkpoints' names; UNet.forward runs them."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[Transformer] = (),
        downsampler: Downsample | None = None,
        upsampler: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])


class UNet(nn.Module):
    """Predicts the noise in latents at a timestep, given a prompt's embedding.

    `sites` lists every attention in forward order, then every residual block in forward order; an edit is
    addressed to a site's index.
    """

    def __init__(self, config: UNetConfig = UNetConfig()) -> None:
        super().__init__()
        self.config = config
        self.sites: tuple[Site, ...] = ()
        channels, groups = config.block_out_channels, config.norm_groups
        emb_width = 4 * channels[0]
        deepest = len(channels) - 1

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(in_channels, out_channels, emb_width, groups, eps=1e-5)

        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], emb_width)

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # widths of the feature maps that the way up will concatenate
        for level, width in enumerate(channels):
            resnets, attentions = [], []
            for i in range(config.layers_per_block):
                resnets.append(resnet(skips[-1], width))
                if level < deepest:
                    attentions.append(self._transformer(width, "down", level, i))
                skips.append(width)
            down = Downsample(width) if level < deepest else None
            if down is not None:
                skips.append(width)
            self.down_blocks.append(Block(resnets, attentions, downsampler=down))

        width = channels[-1]
        self.mid_block = Block(
            [resnet(width, width), resnet(width, width)], [self._transformer(width, "mid", deepest, 0)]
        )

        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for level in reversed(range(len(channels))):
            width = channels[level]
            resnets, attentions = [], []
            for i in range(config.layers_per_block + 1):
                resnets.append(resnet(below + skips.pop(), width))
                below = width
                if level < deepest:
                    attentions.append(self._transformer(width, "up", level, i))
            up = Upsample(width) if level > 0 else None
            self.up_blocks.append(Block(resnets, attentions, upsampler=up))

        self.conv_norm_out = GroupNorm(groups, channels[0], eps=1e-5)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)
        self._add_residual_sites()

    def _transformer(self, width: int, place: Place, level: int, i: int) -> Transformer:
        """The next transformer block; its two attentions are added to `sites`."""
        config, index = self.config, len(self.sites)
        block = {
            "down": f"down_blocks.{level}",
            "mid": "mid_block",
            "up": f"up_blocks.{len(config.block_out_channels) - 1 - level}",
        }[place]
        name = f"{block}.attentions.{i}.transformer_blocks.0"
        self_site = Site(index, index // 2, f"{name}.attn1", place, "self", 2**level, config.heads)
        cross_site = Site(index + 1, index // 2, f"{name}.attn2", place, "cross", 2**level, config.heads)
        self.sites += (self_site, cross_site)
        return Transformer(width, config.context_width, config.norm_groups, self_site, cross_site)

    def _add_residual_sites(self) -> None:
        """Give every residual block, in forward order, a site behind the attentions'."""
        levels = len(self.config.block_out_channels)
        blocks: list[tuple[str, Place, int, Block]] = [
            *((f"down_blocks.{i}", "down", i, cast(Block, block)) for i, block in enumerate(self.down_blocks)),
            ("mid_block", "mid", levels - 1, self.mid_block),
            *((f"up_blocks.{i}", "up", levels - 1 - i, cast(Block, block)) for i, block in enumerate(self.up_blocks)),
        ]
        layer = 0  # the next transformer block to run: rows that a residual block reads must not retire before it
        for name, place, level, block in blocks:
            for i, resnet in enumerate(cast("list[ResnetBlock]", block.resnets)):
                resnet.site = Site(len(self.sites), layer, f"{name}.resnets.{i}", place, "res", 2**level, heads=0)
                self.sites += (resnet.site,)
                if i < len(block.attentions):
                    layer += 1

    def _first_block_is_edited(self, call: Call, retire: Retirement | None) -> bool:
        """Whether anything is asked of a batch's rows before the first of them has read its prompt."""
        before = [site for site in self.sites if site.layer == 0 and site.kind != "cross"]
        return any(site.index in call.edits for site in before) or (retire is not None and retire.layer == 0)

    @property
    def layers(self) -> int:
        """Number of transformer blocks (16 in SD v1)."""
        return 1 + max(site.layer for site in self.sites)

    def forward(
        self,
        x: Tensor,
        timestep: int | Tensor,
        context: Tensor,
        edits: Mapping[int, Edit] | None = None,
        retire: Retirement | None = None,
        backend: Backend = "auto",
        checkpoint: bool = False,
        copies: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, Tape]:
        """Noise in x, and what the edits asked to record.

        x (rows, 4, h, w) with h and w multiples of 8; timestep 0..999, one for all rows or (rows of x,);
        context (rows, 77, context_width); edits by site index; retire drops rows on the way; checkpoint keeps
        only each block's input for the gradient and computes the rest again on the way back: exact.
        copies: for each row of context, its row of x, where those are fewer: two halves of guidance differ from the
        first prompt that they read on, and are one row until then. Rows of edits and retire are context's.
        Returns eps (rows kept, 4, h, w) and the tape of this call. Nothing outlives the call. MasaError where the
        rows do not fit.
        """
        if len(context) != len(x if copies is None else copies) or any(not 0 <= row < len(x) for row in copies or ()):
            raise MasaError(
                f"context has {len(context)} rows, x {len(x)} and copies is {copies}; expected one row of x for each "
                "of context, or as many copies, each a row of x"
            )
        call = Call(edits or {}, {}, backend)
        # One row for one timestep: the product would round otherwise with more.
        emb = self.time_embedding(timestep_embedding(timestep, self.config.block_out_channels[0], x))
        if len(emb) not in (1, len(x)):
            raise MasaError(
                f"timestep has {len(emb)} rows and x {len(x)}; expected one timestep, or one for each row of x"
            )

        def through(module: nn.Module, *inputs: object) -> Tensor:
            if checkpoint:
                return recompute(module, *inputs, use_reentrant=False, preserve_rng_state=False)
            return module(*inputs)

        def resnet(block: Block, i: int, x: Tensor) -> Tensor:
            module = cast(ResnetBlock, block.resnets[i])
            assert module.site is not None
            return through(module, x, emb, call.edit_at(module.site).features_from)

        def run(block: Block, i: int, x: Tensor) -> Tensor:
            """Residual block i and, where the level has one, transformer block i."""
            nonlocal emb, context, copies
            x = resnet(block, i, x)
            if i < len(block.attentions):
                attention = block.attentions[i]
                keep = retire.keep if retire is not None and attention.layer == retire.layer else None
                x = through(attention, x, context, call, copies, keep)
                if copies is not None:
                    emb, copies = emb_of(emb, copies), None
                if keep is not None:
                    emb, context = emb_of(emb, keep), take(context, keep)
            return x

        if copies is not None and self._first_block_is_edited(call, retire):
            x, emb, copies = take(x, copies), emb_of(emb, copies), None
        x = self.conv_in(x)
        skips = [x if copies is None else take(x, copies)]
        for block in cast("list[Block]", self.down_blocks):
            for i in range(len(block.resnets)):
                x = run(block, i, x)
                skips.append(x)
            for down in block.downsamplers:
                x = down(x)
                skips.append(x)

        x = run(self.mid_block, 0, x)
        x = resnet(self.mid_block, 1, x)

        for block in cast("list[Block]", self.up_blocks):
            for i in range(len(block.resnets)):
                skip = skips.pop()
                if retire is not None and len(skip) != len(x):  # stored before rows retired
                    skip = take(skip, retire.keep)
                x = torch.cat([x, skip], dim=1)
                del skip  # not held while the block runs
                x = run(block, i, x)
            for up in block.upsamplers:
                x = up(x)

        return self.conv_out(F.silu(self.conv_norm_out(x))), call.tape


def timestep_embedding(timestep: int | Tensor, width: int, like: Tensor) -> Tensor:
    """Cosines, then sines, of the timestep at `width / 2` frequencies from 1 to 1/10000: (1 or rows, width).

    Computed in float32, given in the dtype and on the device of `like`.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=like.device) / half
    frequencies = torch.exp(-math.log(10000.0) * exponents)
    t = torch.as_tensor(timestep, dtype=torch.float32, device=like.device).reshape(-1, 1)
    angles = t * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(like.dtype)
