"""The denoising UNet of Stable Diffusion v1.

Four levels down, a middle, four levels up; every level but the deepest holds transformer blocks, 16 in all.
Module names follow diffusers, which LoRA files and papers speak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masa.attention import Backend, Call
from masa.config import UNetConfig
from masa.edits import Edit, Place, Residuals, RowTuple, Site, Tape, take
from masa.models.batch_rows import BatchRows, Retirement
from masa.models.norms import edited_norm
from masa.models.resnet import Downsample, ResnetBlock, Upsample, emb_of
from masa.models.rowwise import Conv2d, GroupNorm
from masa.models.transformer import Transformer
from masa.schedule import alphas_at, eps_of_velocity, training_alphas


class TimestepEmbedding(nn.Module):
    """The sinusoidal timestep, and guidance where a model was trained with it, through a two-layer MLP."""

    def __init__(self, width: int, emb_width: int, guidance_width: int = 0) -> None:
        super().__init__()
        self.cond_proj = nn.Linear(guidance_width, width, bias=False) if guidance_width else None
        self.linear_1 = nn.Linear(width, emb_width)
        self.linear_2 = nn.Linear(emb_width, emb_width)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None and self.cond_proj is not None:
            x = x + self.cond_proj(guidance)
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

    `sites` lists every attention in forward order, then every residual block, every group norm and every joint with a
    skip connection; an edit is addressed to a site's index.
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
        self.time_embedding = TimestepEmbedding(channels[0], emb_width, config.guidance_width)

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
        self._add_other_sites()

    def _transformer(self, width: int, place: Place, level: int, i: int) -> Transformer:
        """The next transformer block; its two attentions are added to `sites`."""
        config, index = self.config, len(self.sites)
        block = {
            "down": f"down_blocks.{level}",
            "mid": "mid_block",
            "up": f"up_blocks.{len(config.block_out_channels) - 1 - level}",
        }[place]
        name = f"{block}.attentions.{i}.transformer_blocks.0"
        self_site = Site(index, index // 2, f"{name}.attn1", place, "self", 2**level, config.heads, width)
        cross_site = Site(index + 1, index // 2, f"{name}.attn2", place, "cross", 2**level, config.heads, width)
        self.sites += (self_site, cross_site)
        return Transformer(width, config.context_width, config.norm_groups, self_site, cross_site)

    def _add_other_sites(self) -> None:
        """Sites behind the attentions': residual blocks, norms and skip connections, each kind in forward order."""
        norms: list[Site] = []
        skips: list[Site] = []
        blocks = list(self._blocks_in_order())
        index = len(self.sites) + sum(len(block.resnets) for *_, block in blocks)
        layer = 0  # the next transformer block to run: rows that are read must not retire before it

        def norm(name: str, place: Place, level: int) -> Site:
            norms.append(Site(index + len(norms), layer, name, place, "norm", 2**level))
            return norms[-1]

        for name, place, level, block in blocks:
            for i, resnet in enumerate(cast("list[ResnetBlock]", block.resnets)):
                own = Site(len(self.sites), layer, f"{name}.resnets.{i}", place, "res", 2**level)
                self.sites += (own,)
                resnet.sites = (own, norm(f"{own.name}.norm1", place, level), norm(f"{own.name}.norm2", place, level))
                if place == "up":
                    skips.append(Site(0, layer, f"{own.name}.skip", "up", "skip", 2**level))
                if i < len(block.attentions):
                    attention = cast(Transformer, block.attentions[i])
                    attention.norm_site = norm(f"{name}.attentions.{i}.norm", place, level)
                    layer += 1
        norm("conv_norm_out", "up", 0)
        self.sites += tuple(norms)
        self.sites += tuple(replace(skip, index=len(self.sites) + i) for i, skip in enumerate(skips))

    def _blocks_in_order(self) -> Iterator[tuple[str, Place, int, Block]]:
        """Name, place, level and modules of each block, as they run."""
        levels = len(self.config.block_out_channels)
        for i, block in enumerate(self.down_blocks):
            yield f"down_blocks.{i}", "down", i, cast(Block, block)
        yield "mid_block", "mid", levels - 1, self.mid_block
        for i, block in enumerate(self.up_blocks):
            yield f"up_blocks.{i}", "up", levels - 1 - i, cast(Block, block)

    @property
    def layers(self) -> int:
        """Number of transformer blocks (16 in SD v1)."""
        return sum(site.kind == "self" for site in self.sites)

    @cached_property
    def skip_sites(self) -> tuple[Site, ...]:
        """The joints with skip connections, as they run on the way up."""
        return tuple(site for site in self.sites if site.kind == "skip")

    @cached_property
    def last_norm_site(self) -> Site:
        """The norm before the last convolution."""
        return next(site for site in self.sites if site.name == "conv_norm_out")

    def forward(
        self,
        x: Tensor,
        timestep: float | Tensor,
        context: Tensor,
        edits: Mapping[int, Edit] | None = None,
        retire: Retirement | None = None,
        backend: Backend = "auto",
        checkpoint: bool = False,
        copies: RowTuple | None = None,
        residuals: Residuals | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tape]:
        """Noise in x, and what the edits asked to record.

        x (rows, 4, h, w) with h and w multiples of 8; timestep 0..999, one for all rows or (rows of x,);
        context (rows, 77, context_width); edits by site index; retire drops rows on the way; checkpoint keeps
        only each block's input for the gradient and computes the rest again on the way back: exact.
        copies: for each row of context, its row of x, where those are fewer: two halves of guidance differ from the
        first prompt that they read on, and are one row until then. residuals: added on the way. Rows of edits, retire
        and residuals are context's. guidance (1, guidance_width): `guidance_embedding`, for a model that has a place
        for it; None leaves it out.
        Returns eps (rows kept, 4, h, w), also where the network predicts v, and the tape of this call. Nothing outlives
        the call. MasaError where the rows do not fit.
        """
        call = Call(edits or {}, {}, backend)
        noisy = x
        add = residuals or Residuals()
        # One row for one timestep: the product would round otherwise with more.
        emb = self.time_embedding(timestep_embedding(timestep, self.config.block_out_channels[0], x), guidance)
        rows = BatchRows(x, emb, context, copies, retire, checkpoint)
        if self._first_block_is_edited(call, retire):
            x = rows.spread(x)

        x = self.conv_in(x)
        skips = [rows.as_stored(x)]
        for level, block in enumerate(cast("list[Block]", self.down_blocks)):
            for i in range(len(block.resnets)):
                x = self._run(block, i, x, rows, call)
                skips.append(x)
            x = skips[-1] = rows.add(x, add.at_level(level))
            for down in block.downsamplers:
                x = down(x)
                skips.append(x)

        x = self._run(self.mid_block, 0, x, rows, call)
        x = self._run(self.mid_block, 1, x, rows, call)
        x = rows.add(x, add.mid)

        for block in cast("list[Block]", self.up_blocks):
            for i in range(len(block.resnets)):
                skip = rows.add(rows.still_here(skips.pop()), add.at_skip(len(skips)))
                x, skip = self._edit_joint(x, skip, len(skips), call)
                x = torch.cat([x, skip], dim=1)
                del skip  # not held while the block runs
                x = self._run(block, i, x, rows, call)
            for up in block.upsamplers:
                x = up(x)

        site = self.last_norm_site
        x = edited_norm(self.conv_norm_out, x, call.edit_at(site), site, call.tape)
        predicted = self.conv_out(F.silu(x))
        return self._noise(predicted, noisy, timestep, copies, retire), call.tape

    def _noise(
        self, predicted: Tensor, x: Tensor, timestep: float | Tensor, copies: RowTuple | None, retire: Retirement | None
    ) -> Tensor:
        """The noise in x (rows of x, 4, h, w) by what was predicted of the rows kept: itself, or v."""
        if self.config.velocity is None:
            return predicted
        times = torch.as_tensor(timestep, dtype=torch.float32, device=x.device).reshape(-1)
        alphas = alphas_at(training_alphas(self.config.velocity, x.device), times)
        for rows in (copies, None if retire is None else retire.staying):
            if rows is not None:
                x, alphas = take(x, rows), emb_of(alphas, rows)
        return eps_of_velocity(predicted, x, alphas[:, None, None, None])

    def _run(self, block: Block, i: int, x: Tensor, rows: BatchRows, call: Call) -> Tensor:
        """Residual block i and, where the level has one, transformer block i."""
        resnet = cast(ResnetBlock, block.resnets[i])
        edited = any(site.index in call.edits for site in resnet.sites)
        x = rows.through(resnet, x, rows.emb, call if edited else None)
        if i < len(block.attentions):
            x = rows.through_transformer(cast(Transformer, block.attentions[i]), x, call)
        return x

    def _edit_joint(self, x: Tensor, skip: Tensor, place: int, call: Call) -> tuple[Tensor, Tensor]:
        """Backbone and skip features as an edit changes them; place: of the skip, counted on the way down."""
        joint = call.edit_at(self.skip_sites[len(self.skip_sites) - 1 - place]).joint
        return (x, skip) if joint is None else joint(x, skip)

    def _first_block_is_edited(self, call: Call, retire: Retirement | None) -> bool:
        """Whether anything is asked of a batch's rows before the first of them has read its prompt."""
        before = [site for site in self.sites if site.layer == 0 and site.kind != "cross"]
        return any(site.index in call.edits for site in before) or (retire is not None and retire.layer == 0)


def timestep_embedding(timestep: float | Tensor, width: int, like: Tensor) -> Tensor:
    """Cosines, then sines, of the timestep at `width / 2` frequencies from 1 to 1/10000: (1 or rows, width).

    Computed in float32, given in the dtype and on the device of `like`.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=like.device) / half
    frequencies = torch.exp(-math.log(10000.0) * exponents)
    t = torch.as_tensor(timestep, dtype=torch.float32, device=like.device).reshape(-1, 1)
    angles = t * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(like.dtype)


def guidance_embedding(guidance_scale: float, width: int, like: Tensor) -> Tensor:
    """Sines, then cosines, of w = guidance_scale - 1 in thousandths, at frequencies from 1 to 1/10000: (1, width).

    Computed in float32, given in the dtype and on the device of `like`. 2310.04378, section 4.2; w as published there.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=like.device) / (half - 1)
    angles = 1000.0 * (guidance_scale - 1.0) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()])[None].to(like.dtype)
