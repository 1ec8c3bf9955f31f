"""Attention over the keys of several rows in one softmax, each part with its weight, scale, statistics and region.

    out[b] = softmax over all parts p of (ln w_p + s_p q[b] k_p[b]^T / sqrt(d)) times the parts' values

The plain forms, one part and two, have a kernel of their own: `masa.kernels.mutual_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from masa.kernels import launch
from masa.kernels.launch import Backend
from masa.kernels.mutual_attention import mutual_attention_with_lse
from masa.kernels.rows import number_tensor, pick_rows, put_rows

ADAIN_EPS = 1e-5
QUERIES_PER_PASS = 256  # of contrast, which needs the probabilities: heads * 256 * keys of them at a time


@dataclass(frozen=True, eq=False)
class KeyPart:
    """Keys and values of one part.

    k, v (S, H, Nk, D). k_rows, v_rows: for each row of q the row of k and of v that it reads, -1 for none. weight,
    scale: for each row of q. gain, offset (B, H, 1, D) or None: keys are gain * k + offset. visible (B, Nk) bool or
    None: which keys each row may see.
    """

    k: Tensor
    v: Tensor
    k_rows: tuple[int, ...]
    v_rows: tuple[int, ...]
    weight: tuple[float, ...]
    scale: tuple[float, ...]
    gain: Tensor | None = None
    offset: Tensor | None = None
    visible: Tensor | None = None


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over positions: (B, H, N, D) -> twice (B, H, D), at least float32.

    The variance is unbiased, 0 of a single position, and gains 1e-5, as StyleAligned publishes it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=2, unbiased=x.shape[2] > 1)
    return mean, (variance + ADAIN_EPS).sqrt()


def attention_over_parts(
    q: Tensor, parts: Sequence[KeyPart], *, contrast: tuple[float, ...] | None = None, backend: Backend = "auto"
) -> Tensor:
    """Attention of q (B, H, Nq, D) over the keys of all parts together; returns (B, H, Nq, D).

    A row needs one part that it reads with a visible key; one without gives zeros. contrast: for each row c,
    P becomes clip(1/N + c (P - 1/N), 0, 1) over its N visible keys, not renormalised; 1 changes nothing.

    backend: "reference" writes every score out in float32 (float64 for such inputs). "sdpa" joins the parts' keys,
    one call for all rows that read the same parts. "triton" (CUDA, "auto" for 16-bit dtypes) copies no key: each
    part gives its answer and its log-sum-exp, AdaIN and scale fold into the queries, and the answers are merged;
    parts with regions, contrast and gradients are SDPA's. Raises RuntimeError where "triton" cannot serve.
    """
    tensors = {"q": q} | {f"{name}{i}": t for i, part in enumerate(parts) for name, t in (("k", part.k), ("v", part.v))}
    why_not = launch.unserved(tensors, q.shape[0] * q.shape[1])
    if why_not is None and (contrast is not None or any(part.visible is not None for part in parts)):
        why_not = "contrast and regions of keys are not for this kernel: leave them out"
    if why_not is None and torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        why_not = "a gradient is to be taken: use torch.no_grad()"
    chosen = launch.choose_backend(backend, q, why_not)
    if chosen == "triton":
        return _merged(q, parts)
    out = torch.zeros_like(q)
    groups: dict[tuple[bool, ...], list[int]] = {}
    for row in range(len(q)):
        groups.setdefault(tuple(part.k_rows[row] >= 0 for part in parts), []).append(row)
    for present, members in groups.items():
        if any(present):
            chosen_parts = [part for part, is_read in zip(parts, present, strict=True) if is_read]
            put_rows(out, tuple(members), _joined(q, chosen_parts, tuple(members), contrast, chosen == "reference"))
    return out


def _joined(
    q: Tensor, parts: Sequence[KeyPart], rows: tuple[int, ...], contrast: tuple[float, ...] | None, written_out: bool
) -> Tensor:
    """Some rows, all of which read all these parts, through one list of keys."""
    queries = pick_rows(q, rows)
    keys, values = [], []
    for part in parts:
        k, v = pick_rows(part.k, _at(part.k_rows, rows)), pick_rows(part.v, _at(part.v_rows, rows))
        if part.gain is not None and part.offset is not None:
            k = (k * pick_rows(part.gain, rows) + pick_rows(part.offset, rows)).to(k.dtype)
        scale = _column(_at(part.scale, rows), q)
        keys.append(k if scale is None else (k * scale).to(k.dtype))
        values.append(v)
    bias = _bias(parts, rows, q)
    k, v = torch.cat(keys, 2), torch.cat(values, 2)
    if contrast is not None and any(contrast[row] != 1.0 for row in rows):
        return _contrasted(queries, k, v, bias, _at(contrast, rows))
    if not written_out:
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias)
    else:
        out = (_probabilities(queries, k, bias) @ v.to(_wide(v))).to(q.dtype)
    if bias is None:
        return out
    # Where no key is visible the softmax has nothing to share out.
    return out.masked_fill((bias == -math.inf).all(-1, keepdim=True), 0.0)


def _bias(parts: Sequence[KeyPart], rows: tuple[int, ...], q: Tensor) -> Tensor | None:
    """ln of the weights, -inf where a key is not visible: (rows, 1, 1, all keys), or None where it is all zeros."""
    if all(part.visible is None and all(part.weight[row] == 1.0 for row in rows) for part in parts):
        return None
    columns = []
    for part in parts:
        logs = number_tensor(tuple(math.log(part.weight[row]) for row in rows), q.device, q.dtype)
        bias = logs[:, None].expand(-1, part.k.shape[2])
        if part.visible is not None:
            bias = bias.masked_fill(~pick_rows(part.visible, rows), -math.inf)
        columns.append(bias)
    return torch.cat(columns, 1)[:, None, None]


def _contrasted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, contrast: tuple[float, ...]) -> Tensor:
    """Attention whose probabilities are spread by a factor around 1/N, some queries at a time (2311.03335)."""
    factor = number_tensor(contrast, q.device, _wide(q))[:, None, None, None]
    count = k.shape[2] if bias is None else (bias > -math.inf).sum(-1, keepdim=True)
    mean = torch.ones_like(factor) / count
    out = []
    for queries in q.split(QUERIES_PER_PASS, dim=2):
        probabilities = _probabilities(queries, k, bias)
        spread = torch.where(factor == 1.0, probabilities, (mean + factor * (probabilities - mean)).clamp(0.0, 1.0))
        if bias is not None:
            spread = spread.masked_fill(bias == -math.inf, 0.0)
        out.append((spread @ v.to(spread.dtype)).to(q.dtype))
    return torch.cat(out, 2)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    wide = _wide(q)
    logits = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias.to(wide)).softmax(-1)


def _merged(q: Tensor, parts: Sequence[KeyPart]) -> Tensor:
    """Each part's answer weighed by its share of the softmax; a part reaches no key of another, and copies none.

    Keys g k + o at scale s give logits (s g q) k / sqrt(d) + s q o / sqrt(d): the second term is the same for all
    keys of the part, so it joins ln w as a bias of the part's log-sum-exp.
    """
    answers, sums = [], []
    for part in parts:
        index, v_index = (tuple(max(row, 0) for row in rows) for rows in (part.k_rows, part.v_rows))
        k, v = part.k, part.v
        if index != v_index:
            k, v, index = pick_rows(k, index), pick_rows(v, v_index), tuple(range(len(index)))
        queries, scale, bias = q, _column(part.scale, q), _logs(part, q)
        if part.gain is not None and part.offset is not None:
            shift = (q.float() * part.offset).sum(-1) * q.shape[-1] ** -0.5
            bias = bias + (shift if scale is None else shift * scale[..., 0])
            queries = queries * part.gain
        if scale is not None:
            queries = queries * scale
        answer, lse = mutual_attention_with_lse(queries.to(q.dtype), k, v, kv_index=index)
        answers.append(answer)
        sums.append(lse + bias)
    shares = torch.stack(sums).softmax(0).nan_to_num(0.0)
    out = torch.stack([share[..., None] * answer for share, answer in zip(shares, answers, strict=True)]).sum(0)
    return out.to(q.dtype)


def _logs(part: KeyPart, q: Tensor) -> Tensor:
    """ln of the part's weight for each row, -inf where a row does not read it: (B, 1, 1)."""
    logs = (math.log(w) if row >= 0 else -math.inf for w, row in zip(part.weight, part.k_rows, strict=True))
    return number_tensor(tuple(logs), q.device, torch.float32)[:, None, None]


def _column(values: tuple[float, ...], q: Tensor) -> Tensor | None:
    """Values (rows, 1, 1, 1) in at least float32; None where all are 1."""
    if all(value == 1.0 for value in values):
        return None
    return number_tensor(values, q.device, _wide(q))[:, None, None, None]


def _at(values: tuple[Any, ...], rows: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(values[row] for row in rows)


def _wide(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)
