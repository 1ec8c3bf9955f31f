"""Parts of attention, and their answer with every score written out: for pytest and for Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from masa.kernels.attention_over_parts import KeyPart

ROWS, HEADS, QUERIES, WIDTH = 3, 2, 20, 8


def part(
    k: Tensor, v: Tensor, rows: tuple[int, ...], weight: float = 1.0, scale: float = 1.0, **more: Tensor
) -> KeyPart:
    return KeyPart(k, v, rows, rows, (weight,) * ROWS, (scale,) * ROWS, **more)


def written_out(q: Tensor, parts: list[KeyPart], contrast: tuple[float, ...] | None = None) -> Tensor:
    """Row by row in float64: every logit, one softmax, the values' sum."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for row in range(len(q)):
        logits, values = [], []
        for p in parts:
            if p.k_rows[row] < 0:
                continue
            keys = p.k[p.k_rows[row]].double()
            if p.gain is not None:
                keys = keys * p.gain[row].double() + p.offset[row].double()
            some = q[row].double() @ keys.mT / math.sqrt(q.shape[-1]) * p.scale[row] + math.log(p.weight[row])
            if p.visible is not None:
                some = some.masked_fill(~p.visible[row], -math.inf)
            logits.append(some)
            values.append(p.v[p.v_rows[row]].double())
        joined = torch.cat(logits, -1)
        probabilities = joined.softmax(-1)
        if contrast is not None and contrast[row] != 1.0:
            count = (joined > -math.inf).sum(-1, keepdim=True)
            probabilities = (1 / count + contrast[row] * (probabilities - 1 / count)).clamp(0, 1)
            probabilities = probabilities.masked_fill(joined == -math.inf, 0.0)
        out[row] = probabilities @ torch.cat(values, -2)
    return out


def part_cases(k: Tensor, v: Tensor, generator: torch.Generator) -> dict[str, list[KeyPart]]:
    gain, offset = torch.rand(2, ROWS, HEADS, 1, WIDTH, generator=generator).unbind()
    visible = torch.rand(ROWS, 24, generator=generator) > 0.4
    own, source = (0, 1, 2), (-1, 3, 3)
    return {
        "one": [part(k, v, own)],
        "union": [part(k, v, own), part(k, v, source)],
        "weighted": [part(k, v, own), part(k, v, source, weight=2.5)],
        "weights by row": [part(k, v, own), replace(part(k, v, source), weight=(1.0, 3.0, 0.2))],
        "scaled": [part(k, v, own, scale=0.5), part(k, v, source, scale=1.7)],
        "matched": [part(k, v, own, gain=gain, offset=offset), part(k, v, source)],
        "matched and scaled": [part(k, v, own, gain=gain, offset=offset, scale=2.0), part(k, v, source, weight=0.3)],
        "regions": [part(k, v, own), part(k, v, source, visible=visible)],
        "three": [part(k, v, own), part(k, v, source), part(k, v, (2, -1, 0), weight=0.5)],
        "keys and values of two rows": [replace(part(k, v, own), v_rows=(3, 2, 1)), part(k, v, source)],
    }


def part_tensors(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and four rows of keys and values."""
    q = torch.randn(ROWS, HEADS, QUERIES, WIDTH, generator=generator)
    k, v = torch.randn(2, 4, HEADS, 24, WIDTH, generator=generator).unbind()
    return q.to(dtype), k.to(dtype), v.to(dtype)


NAMES = list(part_cases(torch.zeros(4, HEADS, 24, WIDTH), torch.zeros(4, HEADS, 24, WIDTH), torch.Generator()))
