"""The transformer block of SD v1: self-attention, cross-attention to the prompt, gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from masa.attention import Call, attend
from masa.edits import PLAIN, RowTuple, Site, take
from masa.models.norms import edited_norm
from masa.models.rowwise import Conv2d, GroupNorm, Linear

# Tokens per pass through the MLP on a CPU: its intermediate, eight times as wide as the tokens, then stays in the
# cache and the allocator's reach. At 64x64 tokens of 320 a whole one costs half as much time again.
TOKENS_PER_PASS = 1024


class Attention(nn.Module):
    """Multi-head attention whose edits, if any, come from the call: the module itself keeps no state."""

    def __init__(self, width: int, context_width: int, site: Site) -> None:
        super().__init__()
        self.site = site
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context_width, width, bias=False)
        self.to_v = Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, grid: tuple[int, int], call: Call) -> Tensor:
        """x (rows, h*w, width), context (rows, keys, context_width), grid (h, w) -> (rows, h*w, width)."""
        edit = call.edit_at(self.site)
        # Only the rows that somebody reads are projected: a MasaCtrl target's own K and V never are.
        q_rows, k_rows, v_rows = (
            tuple(row for row in read if row < len(x)) for read in edit.read_rows(len(x))
        )  # those behind the batch are cached
        k_input = take(context, k_rows)
        v_input = k_input if v_rows == k_rows else take(context, v_rows)
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.site.heads)
            for t in (self.to_q(take(x, q_rows)), self.to_k(k_input), self.to_v(v_input))
        )
        out = attend(q, k, v, len(x), self.site, grid, call)
        return self.to_out[0](rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """The gated half of the MLP: linear(x) * gelu(gate(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; the names net.0 and net.2 are the checkpoints'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, tokens, width) -> the same shape."""
        rows, tokens, _ = x.shape
        # A compiler fuses the gate by itself.
        if x.device.type != "cpu" or rows * tokens <= TOKENS_PER_PASS or torch.compiler.is_compiling():
            return self._pass(x)
        many = max(1, TOKENS_PER_PASS // tokens)  # whole rows, or parts of one
        passes = [part for some in x.split(many) for part in some.split(TOKENS_PER_PASS, dim=1)]
        return torch.cat([self._pass(part).flatten(0, 1) for part in passes]).view_as(x)

    def _pass(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and MLP, each with a residual sum."""

    def __init__(self, width: int, context_width: int, self_site: Site, cross_site: Site) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, self_site)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, cross_site)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        grid: tuple[int, int],
        call: Call,
        copies: RowTuple | None = None,
        staying: RowTuple | None = None,
    ) -> Tensor:
        """As `Transformer.forward`, of tokens (rows, h*w, width)."""
        h = self.norm1(x)
        if staying is not None and self._self_attention_is_last_read(call):
            x = take(x, staying) + self.attn1(h, h, grid, call.of_rows(self.attn1.site, len(x), staying))
            context, staying = take(context, staying), None
        else:
            x = x + self.attn1(h, h, grid, call)
        if copies is not None:
            x = take(x, copies)
        x = x + self.attn2(self.norm2(x), context, grid, call)
        x = x + self.ff(self.norm3(x))
        return x if staying is None else take(x, staying)

    def _self_attention_is_last_read(self, call: Call) -> bool:
        """Whether nobody reads of other rows what comes after the queries, keys and values of self-attention."""
        return call.edit_at(self.attn1.site).only_names_rows() and call.edit_at(self.attn2.site) is PLAIN


class Transformer(nn.Module):
    """A transformer block on a feature map: 1x1 convolutions in and out, tokens in between."""

    def __init__(self, width: int, context_width: int, norm_groups: int, self_site: Site, cross_site: Site) -> None:
        super().__init__()
        self.layer = self_site.layer
        self.norm_site: Site | None = None  # the UNet gives it
        # eps 1e-6 here, 1e-5 in the residual blocks: the checkpoints were trained so.
        self.norm = GroupNorm(norm_groups, width, eps=1e-6)
        self.proj_in = Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_width, self_site, cross_site)])
        self.proj_out = Conv2d(width, width, 1)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        call: Call,
        copies: RowTuple | None = None,
        staying: RowTuple | None = None,
    ) -> Tensor:
        """x (rows, width, h, w), context (rows, 77, context_width) -> (rows, width, h, w).

        copies: the rows that go on after self-attention, which reads no prompt yet; context is of these. staying: the
        rows that go on after this block; not with copies.
        """
        height, width = x.shape[-2:]
        site = self.norm_site
        normed = self.norm(x) if site is None else edited_norm(self.norm, x, call.edit_at(site), site, call.tape)
        # Contiguous: the three norms would each copy a transposed map; of a channels_last map it is a view.
        tokens = rearrange(self.proj_in(normed), "b c h w -> b (h w) c").contiguous()
        tokens = self.transformer_blocks[0](tokens, context, (height, width), call, copies, staying)
        features = rearrange(tokens, "b (h w) c -> b c h w", h=height)
        if not x.is_contiguous(memory_format=torch.channels_last):  # back into the layout of the other blocks
            features = features.contiguous()
        onward = copies or staying  # never both
        return (x if onward is None else take(x, onward)) + self.proj_out(features)
