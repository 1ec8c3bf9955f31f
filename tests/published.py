"""The published arithmetic, naively: diffusers' UNet, hooks that count layers, every row, materialised scores.

An oracle written from the papers' formulas and independent of `masa`: nothing here imports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel


class Hook:
    """An attention processor that hands queries, keys, values and scores to `control`, in forward order."""

    def __init__(self, control: Control, is_cross: bool, heads: int) -> None:
        self.control, self.is_cross, self.heads = control, is_cross, heads

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x: Tensor) -> Tensor:  # (b, n, h*d) -> (b, h, n, d)
            b, n, _ = x.shape
            return x.reshape(b, n, self.heads, -1).transpose(1, 2)

        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        out = self.control(q, k, v, self.is_cross)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1]) + bias
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


class Control:
    """Plain attention; counts its calls to know layer and step, as hooks must."""

    def __init__(self, calls_per_step: int = 32) -> None:
        self.calls_per_step, self.calls = calls_per_step, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, is_cross: bool) -> Tensor:
        step, call = divmod(self.calls, self.calls_per_step)
        self.calls += 1
        return self.attend(q, k, v, is_cross, step, call // 2)

    def attend(self, q, k, v, is_cross: bool, step: int, layer: int) -> Tensor:
        return attention(q, k, v)


class MutualAttention(Control):
    """MasaCtrl: targets read the source of their half; masked when masks are given or found from words."""

    def __init__(
        self,
        steps: Sequence[int],
        layers: Sequence[int],
        *,
        halves: int = 2,
        union: bool = False,
        masks: tuple[Tensor, Tensor] | None = None,
        tokens: tuple[Sequence[int], Sequence[int]] | None = None,
        threshold: float = 0.1,
        aspect: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.steps, self.layers, self.halves, self.union = set(steps), set(layers), halves, union
        self.masks, self.tokens, self.threshold, self.aspect = masks, tokens, threshold, aspect
        self.maps: list[Tensor] = []
        self.map_positions = 0

    def grid(self, positions: int) -> tuple[int, int]:
        unit = math.isqrt(positions // (self.aspect[0] * self.aspect[1]))
        return self.aspect[0] * unit, self.aspect[1] * unit

    def attend(self, q, k, v, is_cross: bool, step: int, layer: int) -> Tensor:
        if is_cross:
            if layer == 0:
                self.maps, self.map_positions = [], q.shape[2] // 16
            if q.shape[2] == self.map_positions:
                scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
                self.maps.append(scores.softmax(-1).mean(1))
            return attention(q, k, v)
        if step not in self.steps or layer not in self.layers:
            return attention(q, k, v)
        out = []
        per_half = len(q) // self.halves
        for half in range(self.halves):
            source = half * per_half
            out.append(attention(q[source : source + 1], k[source : source + 1], v[source : source + 1]))
            for target in range(1, per_half):
                out.append(self.target(q, k, v, source, source + target, target))
        return torch.cat(out)

    def target(self, q, k, v, source: int, row: int, target: int) -> Tensor:
        qt, ks, vs = q[row : row + 1], k[source : source + 1], v[source : source + 1]
        if self.union:
            return attention(qt, torch.cat([ks, k[row : row + 1]], 2), torch.cat([vs, v[row : row + 1]], 2))
        found = self.find_masks(q.shape[2], target, len(q) // self.halves)
        if found is None:
            return attention(qt, ks, vs)
        key_mask, query_mask = found
        least = torch.finfo(q.dtype).min
        subject = attention(qt, ks, vs, torch.where(key_mask >= 0.5, 0.0, least))
        background = attention(qt, ks, vs, torch.where(key_mask >= 0.5, least, 0.0))
        weight = query_mask[:, None]
        return weight * subject + (1 - weight) * background

    def find_masks(self, positions: int, target: int, per_half: int) -> tuple[Tensor, Tensor] | None:
        size = self.grid(positions)
        if self.masks is not None:
            return tuple(F.interpolate(m[None, None], size, mode="nearest").flatten() for m in self.masks)
        if self.tokens is None or not self.maps:
            return None
        mean = torch.stack(self.maps).mean(0)
        cond = mean[-per_half:]
        found = []
        for row, tokens in ((0, self.tokens[0]), (target, self.tokens[1])):
            image = cond[row][:, list(tokens)].sum(-1)
            image = (image - image.min()) / (image.max() - image.min())
            image = image.reshape(1, 1, *self.grid(self.map_positions))
            found.append((F.interpolate(image, size, mode="nearest").flatten() >= self.threshold).float())
        return found[0], found[1]


class Oracle:
    """The networks as diffusers and transformers load them, and the loops as published."""

    def __init__(self, folder: Path, ids: Callable[[Sequence[str]], Tensor]) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        self.ids = ids
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self.alphas = torch.cumprod(1 - betas, 0)

    def context(self, prompts: Sequence[str]) -> Tensor:
        return self.text(self.ids(list(prompts)))[0]

    def hook(self, control: Control) -> None:
        heads = self.unet.config.attention_head_dim
        names = self.unet.attn_processors
        self.unet.set_attn_processor({name: Hook(control, "attn2" in name, heads) for name in names})

    def timesteps(self, steps: int) -> list[int]:
        return [1000 // steps * k + 1 for k in range(steps)][::-1]

    def alpha(self, t: int) -> Tensor:
        return self.alphas[t] if t >= 0 else self.alphas[0]

    @torch.no_grad()
    def eps(self, x: Tensor, t: int, prompts: Sequence[str], guidance: float, negative: str = "") -> Tensor:
        cond = self.context(prompts)
        if guidance <= 1:
            return self.unet(x, t, cond).sample
        context = torch.cat([self.context([negative] * len(prompts)), cond])
        uncond, cond = self.unet(torch.cat([x, x]), t, context).sample.chunk(2)
        return uncond + guidance * (cond - uncond)

    def sample(
        self,
        prompts: Sequence[str],
        x: Tensor,
        steps: int,
        guidance: float,
        control: Control,
        pinned: Sequence[Tensor] | None = None,
        negative: str = "",
    ) -> list[Tensor]:
        """Latents before the first and after every step, (1 + N, 4, h, w) each."""
        self.hook(control)
        latents = [x]
        for i, t in enumerate(self.timesteps(steps)):
            if pinned is not None:
                x = torch.cat([pinned[-1 - i], x[1:]])
            e = self.eps(x, t, prompts, guidance, negative)
            a, a_prev = self.alpha(t), self.alpha(t - 1000 // steps)
            x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * e
            latents.append(x)
        return latents

    def invert(self, x: Tensor, prompt: str, steps: int, guidance: float) -> list[Tensor]:
        """Latents from clean to noisy, (1, 4, h, w) each."""
        self.hook(Control())
        latents = [x]
        for t in reversed(self.timesteps(steps)):
            e = self.eps(x, t, [prompt], guidance)
            a, a_next = self.alpha(t - 1000 // steps), self.alphas[t]
            x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
            x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * e
            latents.append(x)
        return latents
