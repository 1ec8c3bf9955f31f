"""The CLIP text encoder: transformers' CLIPTextModel inside, token ids to context outside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masa.config import TextConfig


class TokenTable(nn.Embedding):
    """The vocabulary's embeddings, and beside them those of ids behind it: textual inversion's.

    known: the checkpoint's, whose weight it shares. extra (v, width), or None; no checkpoint holds it, so it is no
    buffer.
    """

    def __init__(self, known: nn.Embedding, extra: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = known.num_embeddings, known.embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = known.weight
        self.extra = extra

    def forward(self, ids: Tensor) -> Tensor:
        if self.extra is None:
            return super().forward(ids)
        count = len(self.weight)
        known = F.embedding(ids.clamp(max=count - 1), self.weight)
        others = F.embedding((ids - count).clamp(min=0), self.extra.to(known))
        return torch.where((ids >= count)[..., None], others, known)


class TextEncoder(nn.Module):
    """Token ids (n, 77) -> context (n, 77, width): the last hidden state after the final layer norm.

    With `config.clip_skip` k the hidden state before the last k layers, after that norm all the same.

    `model` is a transformers CLIPTextModel; `state_prefix` is what its parameter names start with, which
    differs between releases of transformers.
    """

    def __init__(self, config: TextConfig = TextConfig()) -> None:
        super().__init__()
        # Imported here: transformers takes seconds, and `import masa` should not. It may import torch's compiler,
        # which computes as it is imported (torch 2.6) and could not on the meta device.
        with torch.device("cpu"):
            from transformers import CLIPTextConfig, CLIPTextModel

        self.config = config
        self.model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.intermediate_width,
                projection_dim=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.tokens,
                hidden_act=config.activation,
                layer_norm_eps=config.norm_eps,
                bos_token_id=0,
                # As published. It only matters for the pooled output, which is not used.
                eos_token_id=2,
                pad_token_id=1,
            )
        )

    @property
    def state_prefix(self) -> str:
        return "text_model." if hasattr(self.model, "text_model") else ""

    def restore_buffers(self, device: torch.device | str) -> None:
        """Fill what no checkpoint holds: the positions 0..76, left empty by construction on the meta device."""
        for module in self.model.modules():
            if "position_ids" in module._buffers:
                module._buffers["position_ids"] = torch.arange(self.config.tokens, device=device)[None]

    def forward(self, ids: Tensor) -> Tensor:
        if self.config.clip_skip == 0:
            return self.model(ids).last_hidden_state
        states = self.model(ids, output_hidden_states=True).hidden_states  # before the layers, and after each
        return self._final_norm(states[self.config.layers - self.config.clip_skip])

    @property
    def _final_norm(self) -> nn.Module:
        return getattr(self.model, "text_model", self.model).final_layer_norm
