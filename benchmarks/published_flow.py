"""The published flow on diffusers: what an edit costs without this library. A peer of bench_edit.py.

Inversion with both halves of guidance, the target from the inverted noise without control (the fixed-seed picture),
then source and target together under MasaCtrl with the source free: 100 + 100 + 200 UNet rows for 50 steps.
MasaCtrl (2304.08465), algorithm 1 and section 4. Nothing here imports the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

Style = Literal["hooks", "sdpa"]
LATENT_SCALE = 0.18215
TRAINING_STEPS = 1000


@dataclass
class Editor:
    """What the attention hooks read: the step of the loop, and where MasaCtrl acts; None is no control."""

    first_step: int | None = None
    first_layer: int = 10
    layers: int = 16
    step: int = 0

    @property
    def edited(self) -> int:
        """How many self-attentions this step edits."""
        active = self.first_step is not None and self.step >= self.first_step
        return self.layers - self.first_layer if active else 0

    def edits(self, layer: int, is_cross: bool) -> bool:
        return bool(self.edited) and not is_cross and layer >= self.first_layer


@dataclass(frozen=True)
class EinsumHook:
    """The published hook: scores and probabilities in memory, of all rows, before anyone asks who reads them.

    Where MasaCtrl acts they are thrown away, and each half is computed again with its source's keys and values.
    """

    editor: Editor
    layer: int
    is_cross: bool

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = attn.heads

        def fold(x: Tensor) -> Tensor:  # (b, n, h*d) -> (b*h, n, d)
            return x.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)

        q, k, v = fold(attn.to_q(hidden_states)), fold(attn.to_k(context)), fold(attn.to_v(context))
        scores = torch.einsum("bid,bjd->bij", q, k) * attn.scale
        probabilities = scores.softmax(-1)
        if not self.editor.edits(self.layer, self.is_cross):
            out = torch.einsum("bij,bjd->bid", probabilities, v)
            out = out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
        else:
            halves = zip(q.chunk(2), k.chunk(2), v.chunk(2), strict=True)
            out = torch.cat([self._from_source(*half, heads, attn.scale) for half in halves])
        return attn.to_out[0](out)

    @staticmethod
    def _from_source(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
        """Every row of a half on its first row's keys and values: all queries stand behind one another."""
        rows = len(q) // heads
        q = q.unflatten(0, (rows, heads)).transpose(0, 1).flatten(1, 2)
        probabilities = (torch.einsum("hid,hjd->hij", q, k[:heads]) * scale).softmax(-1)
        out = torch.einsum("hij,hjd->hid", probabilities, v[:heads])
        return out.unflatten(1, (rows, -1)).permute(1, 2, 0, 3).flatten(2)


@dataclass(frozen=True)
class SdpaHook:
    """diffusers' own attention processor for torch 2, with the source's keys and values where MasaCtrl acts."""

    editor: Editor
    layer: int
    is_cross: bool

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x: Tensor) -> Tensor:  # (b, n, h*d) -> (b, h, n, d)
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        if self.editor.edits(self.layer, self.is_cross):
            k, v = (_source_of_each_half(x) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _source_of_each_half(x: Tensor) -> Tensor:
    halves = x.unflatten(0, (2, -1))
    return halves[:, :1].expand_as(halves).flatten(0, 1)


class PublishedFlow:
    """The models as diffusers and transformers load them, and the published loops.

    tokenize: prompts -> token ids (n, 77). style: the published hook, or SDPA. channels_last: the memory layout in
    which convolutions are fastest.
    """

    def __init__(
        self,
        folder: Path,
        tokenize: Callable[[Sequence[str]], Tensor],
        *,
        device: str,
        dtype: torch.dtype,
        style: Style,
        channels_last: bool,
        steps: int,
        guidance_scale: float,
    ) -> None:
        self.tokenize, self.device, self.dtype = tokenize, device, dtype
        self.steps, self.guidance_scale = steps, guidance_scale
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).eval().to(device)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).eval().to(device)
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=dtype).eval().to(device)
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
            self.vae.to(memory_format=torch.channels_last)
        self.editor = Editor()
        hook = EinsumHook if style == "hooks" else SdpaHook
        # In forward order: the way down, the middle, the way up.
        names = sorted(self.unet.attn_processors, key=lambda name: "dmu".index(name[0]))
        self.unet.set_attn_processor(
            {name: hook(self.editor, i // 2, ".attn2." in name) for i, name in enumerate(names)}
        )
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAINING_STEPS) ** 2
        self.alphas = torch.cumprod(1 - betas, 0).tolist()

    @torch.no_grad()
    def edit(self, picture: Tensor, targets: Sequence[str], source: str = "") -> list[Tensor]:
        """Invert picture (1, 3, h, w) in [-1, 1], then each target with its fixed-seed picture: latents of each."""
        return self.more_targets(self.invert(picture, source), targets, source)

    @torch.no_grad()
    def more_targets(self, start: Tensor, targets: Sequence[str], source: str = "") -> list[Tensor]:
        """Targets of an inverted picture, one after the other, as published: latents (2, 4, h, w) of each."""
        found = []
        for target in targets:
            self.decode(self.sample([target], start, control=False))
            found.append(self.synthesise([source, target], start))
        return found

    @torch.no_grad()
    def synthesise(self, prompts: Sequence[str], start: Tensor) -> Tensor:
        """Source and targets from one noise (1, 4, h, w) under MasaCtrl: latents (1 + N, 4, h, w), also decoded."""
        latents = self.sample(prompts, start.expand(len(prompts), -1, -1, -1), control=True)
        self.decode(latents)
        return latents

    @torch.no_grad()
    def invert(self, picture: Tensor, prompt: str) -> Tensor:
        """The noisiest latents (1, 4, h, w) of the picture's DDIM inversion."""
        x = self.vae.encode(picture.to(self.device, self.dtype)).latent_dist.mean.float() * LATENT_SCALE
        self.editor.first_step = None
        context = self.context([prompt])
        for t in reversed(self.timesteps):
            eps = self.predict(x, t, context)
            x = _move(x, eps, self.alpha(t - TRAINING_STEPS // self.steps), self.alpha(t))
        return x

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], x: Tensor, *, control: bool) -> Tensor:
        self.editor.first_step = 4 if control else None
        context = self.context(prompts)
        for step, t in enumerate(self.timesteps):
            self.editor.step = step
            eps = self.predict(x, t, context)
            x = _move(x, eps, self.alpha(t), self.alpha(t - TRAINING_STEPS // self.steps))
        return x

    def predict(self, x: Tensor, t: int, context: Tensor) -> Tensor:
        """Guided noise, two rows for each picture: classifier-free guidance (2207.12598, eq. 6)."""
        rows = torch.cat([x, x]).to(self.dtype)
        uncond, cond = self.unet(rows, t, encoder_hidden_states=context).sample.float().chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def context(self, prompts: Sequence[str]) -> Tensor:
        cond = self.text(self.tokenize(list(prompts)).to(self.device))[0]
        uncond = self.text(self.tokenize([""] * len(prompts)).to(self.device))[0]
        return torch.cat([uncond, cond])

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (n, 3, h, w), bytes on the CPU."""
        pictures = self.vae.decode((latents / LATENT_SCALE).to(self.dtype)).sample
        return ((pictures / 2 + 0.5).clamp(0, 1) * 255).byte().cpu()

    @property
    def timesteps(self) -> list[int]:
        """Noisiest first: spacing "leading", offset 1."""
        return [TRAINING_STEPS // self.steps * k + 1 for k in reversed(range(self.steps))]

    def alpha(self, t: int) -> float:
        return self.alphas[max(t, 0)]


def _move(x: Tensor, eps: Tensor, a: float, a_next: float) -> Tensor:
    """DDIM (2010.02502, eq. 12, eta 0) from one noise level to another, in either direction."""
    x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
    return a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
