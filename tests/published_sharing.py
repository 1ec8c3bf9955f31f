"""Published methods that share keys, values and statistics between pictures, naively. Nothing here imports `masa`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from published import Control, attention
from torch import Tensor, nn


class StyleAligned(Control):
    """Every self-attention of every step: AdaIN of queries and keys to the first row's, its keys and values beside own.

    shift: added to the style's logits; scale: on its keys. Never on the style row itself. 2312.02133.
    """

    def __init__(self, shift: float = 0.0, scale: float = 1.0, halves: int = 2) -> None:
        super().__init__()
        self.shift, self.scale, self.halves = shift, scale, halves

    def attend(self, q, k, v, is_cross: bool, step: int, layer: int) -> Tensor:
        if is_cross:
            return attention(q, k, v)
        out = []
        for half in range(self.halves):
            rows = slice(half * len(q) // self.halves, (half + 1) * len(q) // self.halves)
            out.append(self.of_half(q[rows], k[rows], v[rows]))
        return torch.cat(out)

    def of_half(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = [attention(q[:1], k[:1], v[:1])]
        q, k = adain(q), adain(k)
        for row in range(1, len(q)):
            keys = torch.cat([k[row : row + 1], self.scale * k[:1]], 2)
            values = torch.cat([v[row : row + 1], v[:1]], 2)
            bias = torch.cat([torch.zeros(k.shape[2]), torch.full((k.shape[2],), self.shift)])
            out.append(attention(q[row : row + 1], keys, values, bias))
        return torch.cat(out)


def adain(x: Tensor) -> Tensor:
    """x (b, h, n, d): over the tokens, mean and deviation of the first row."""
    mean, deviation = x.mean(2, keepdim=True), (x.var(2, keepdim=True) + 1e-5).sqrt()
    return (x - mean) / deviation * deviation[:1] + mean[:1]


@contextmanager
def shared_norms(network: nn.Module, halves: int = 2) -> Iterator[None]:
    """Every group norm's statistics over the row's own and its half's first row's positions together."""
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]

    def patch(norm: nn.GroupNorm) -> None:
        def forward(x: Tensor) -> Tensor:
            out = []
            for half in x.chunk(halves):
                flat = half.flatten(2)
                joined = torch.cat([flat, flat[:1].expand_as(flat)], 2)
                normed = F.group_norm(joined, norm.num_groups, norm.weight, norm.bias, norm.eps)
                out.append(normed[:, :, : flat.shape[2]].reshape(half.shape))
            return torch.cat(out)

        norm.forward = forward

    for norm in norms:
        patch(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
