"""Plain-torch twins of the kernels, and the same operations through `scaled_dot_product_attention`.

The `*_reference` functions spell out the maths and are what tests compare with. The `*_sdpa` functions are the
path without Triton; they differentiate and compile like any torch code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from masa.kernels.mask_plan import MaskPlan
from masa.kernels.rows import RowIndex, pick_rows, put_rows, row_tensor

# Width of the columns that carry region labels; a multiple of 8 keeps rows 16-byte aligned in 16-bit dtypes.
LABEL_WIDTH = 8
# A hidden pair gets -LABEL**2 on its logit before scaling; LABEL itself fits in float16.
LABEL = 16384.0


# ---------------------------------------------------------------------------------------------- explicit maths


def mutual_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: RowIndex,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    kv_index2: RowIndex | None = None,
    plan: MaskPlan | None = None,
    scale: float | None = None,
    source_weight: float = 1.0,
) -> Tensor:
    """Mutual attention with every score written out: q (B, H, Nq, D) -> (B, H, Nq, D).

    Arguments as in `mutual_attention`. Computes in float32, or float64 for float64 inputs.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    source = row_tensor(kv_index, q.device)
    queries, keys, values = q.to(wide), k.to(wide)[source], v.to(wide)[source]
    logits = queries @ keys.mT * scale

    if kv_index2 is not None:
        own = row_tensor(kv_index2, q.device)
        present = (own >= 0)[:, None, None, None]
        own_keys = (k if k2 is None else k2).to(wide)[own.clamp(min=0)]
        own_values = (v if v2 is None else v2).to(wide)[own.clamp(min=0)]
        own_logits = (queries @ own_keys.mT * scale).masked_fill(~present, -math.inf)
        logits = logits + math.log(source_weight)

    def attend(visible: Tensor) -> Tensor:
        """Softmax over the visible source keys (B, Nk) and, in a union, all of the row's own keys."""
        scores, picked = logits.masked_fill(~visible[:, None, None, :], -math.inf), values
        if kv_index2 is not None:
            scores, picked = torch.cat([scores, own_logits], -1), torch.cat([values, own_values], -2)
        return scores.softmax(-1) @ picked

    every = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool, device=q.device)
    if plan is None:
        return attend(every).to(q.dtype)
    region, full = plan.key_region[source], plan.full_rows[:, None]
    # MasaCtrl eq. 7 and 8: attention to the subject's keys, and to the background's; eq. 9 joins them by the target's
    # mask. Empty regions and full rows see everything; where both hold, the two answers are the same.
    foreground = attend(torch.where(full | ~region.any(1, keepdim=True), every, region))
    background = attend(torch.where(full | region.all(1, keepdim=True), every, ~region))
    weight = plan.query_weight.to(wide)[:, None, :, None]
    return (weight * foreground + (1 - weight) * background).to(q.dtype)


def cross_attention_with_maps_reference(
    q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-attention and token maps with the probabilities written out.

    Arguments and results as in `cross_attention_with_maps`. Computes in float32, or float64 for float64 inputs.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probabilities = (q.to(wide) @ k.to(wide).mT * scale).softmax(-1)
    maps = torch.einsum("bnk,btk->btn", probabilities.mean(1), _per_row(token_weights.to(wide), q.shape[0]))
    return (probabilities @ v.to(wide)).to(q.dtype), maps


# ------------------------------------------------------------------------------------------------ through SDPA


def mutual_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: RowIndex,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    kv_index2: RowIndex | None = None,
    plan: MaskPlan | None = None,
    scale: float | None = None,
    source_weight: float = 1.0,
) -> Tensor:
    """Mutual attention as ordinary SDPA calls on whole batches, free of host reads of device values.

    Arguments as in `mutual_attention`. Plain attention over a host tuple of rows reads K and V through views
    where the pattern allows; masks ride in label columns (one call, two when the mask may be soft); a union
    concatenates keys.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kv_index2 is None:
        if plan is None:
            return _attend_rows(q, k, v, kv_index, scale)
        return _attend_labelled(q, k, v, kv_index, plan, scale)

    k2, v2 = (k if k2 is None else k2), (v if v2 is None else v2)
    if plan is None and isinstance(kv_index, tuple) and isinstance(kv_index2, tuple):
        return _attend_union_rows(q, k, v, kv_index, k2, v2, kv_index2, scale, source_weight)
    bias = _segment_bias(q, k.shape[2], k2.shape[2], source_weight, row_tensor(kv_index2, q.device) >= 0)
    own = tuple(max(row, 0) for row in kv_index2) if isinstance(kv_index2, tuple) else kv_index2.clamp(min=0)
    own_keys, own_values = pick_rows(k2, own), pick_rows(v2, own)
    if plan is not None:
        return _attend_labelled(q, k, v, kv_index, plan, scale, own_keys, own_values, bias)
    keys, values = (torch.cat([pick_rows(x, kv_index), y], 2) for x, y in ((k, own_keys), (v, own_values)))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)


def mutual_attention_partitioned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Sequence[int],
    k2: Tensor | None,
    v2: Tensor | None,
    kv_index2: Sequence[int] | None,
    plan: MaskPlan,
    scale: float,
    source_weight: float,
) -> Tensor:
    """Masked mutual attention that computes only the visible scores: one SDPA call per row and region.

    Arguments as in `mutual_attention`, rows on the host. Reads the plan's counts on the host, so it is for the
    CPU, where it takes about half the time of one call with label columns for an even binary mask.
    """
    k2, v2 = (k if k2 is None else k2), (v if v2 is None else v2)
    out = empty_token_major(q)
    counts = plan.key_count.tolist()
    whole = [
        bool(full) or counts[source] in (0, k.shape[2])
        for full, source in zip(plan.full_rows.tolist(), kv_index, strict=True)
    ]
    ones = (plan.query_weight == 1).sum(1).tolist()
    zeros = (plan.query_weight == 0).sum(1).tolist()

    for row, source in enumerate(kv_index):
        own = -1 if kv_index2 is None else kv_index2[row]

        def attend(queries: Tensor, picked: Tensor | None, source: int = source, own: int = own) -> Tensor:
            """Queries (H, n, D) against some of the source's keys (all for None) and the row's own keys."""
            keys, values = k[source], v[source]
            if picked is not None:
                keys, values = keys.index_select(1, picked), values.index_select(1, picked)
            bias, count = None, keys.shape[1]
            if own >= 0:
                keys, values = torch.cat([keys, k2[own]], 1), torch.cat([values, v2[own]], 1)
                bias = _segment_bias(q, count, k2.shape[2], source_weight)
            return F.scaled_dot_product_attention(queries[None], keys[None], values[None], bias, scale=scale)[0]

        if whole[row]:
            out[row] = attend(q[row], None)
            continue
        order, keys = plan.query_order[row], plan.key_order[source]
        soft = slice(ones[row], q.shape[2] - zeros[row])
        queries = q[row].index_select(1, order)
        foreground = attend(queries[:, : soft.stop], keys[: counts[source]])
        background = attend(queries[:, soft.start :], keys[counts[source] :])
        weight = plan.query_weight[row].index_select(0, order[soft])[:, None]
        blend = _blend(foreground[:, soft.start :], background[:, : soft.stop - soft.start], weight)
        pieces = [foreground[:, : soft.start], blend, background[:, soft.stop - soft.start :]]
        out[row].index_copy_(1, order.long(), torch.cat(pieces, 1))
    return out


def cross_attention_with_maps_sdpa(
    q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-attention and token maps in one SDPA call: the token weights ride as further columns of V.

    Arguments and results as in `cross_attention_with_maps`; the maps carry the rounding of q's dtype.
    """
    batch, heads, _, width = q.shape
    scale = width**-0.5 if scale is None else scale
    weights = _per_row(token_weights.to(v.dtype), batch).mT
    extra = -(-weights.shape[-1] // LABEL_WIDTH) * LABEL_WIDTH
    columns = F.pad(weights, (0, extra - weights.shape[-1]))[:, None].expand(-1, heads, -1, -1)
    # Fused SDPA kernels want one width for q, k and v: zero columns leave the scores as they are.
    out = F.scaled_dot_product_attention(
        F.pad(q, (0, extra)), F.pad(k, (0, extra)), torch.cat([v, columns], -1), scale=scale
    )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    maps = out[..., width : width + weights.shape[-1]].to(wide).mean(1).mT
    return out[..., :width], maps


# ----------------------------------------------------------------------------------------------------- helpers


def empty_token_major(q: Tensor) -> Tensor:
    """An output like q (B, H, Nq, D), laid out (B, Nq, H, D) so that joining heads afterwards is a view."""
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width).transpose(1, 2)


def _per_row(token_weights: Tensor, batch: int) -> Tensor:
    """Token weights (T, Nk) or (B, T, Nk) -> (B, T, Nk)."""
    return token_weights if token_weights.dim() == 3 else token_weights.expand(batch, -1, -1)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, rows: RowIndex, scale: float) -> Tensor:
    """Plain mutual attention in one SDPA call, on views of K and V where the rows follow a pattern.

    MasaCtrl's rows are runs of one source each, evenly spaced: (0, 0, 2, 2). The queries of a run, one after the
    other along the sequence, attend to the run's one source.
    """
    runs = _even_runs(rows) if isinstance(rows, tuple) else None
    if runs is None:
        return F.scaled_dot_product_attention(q, pick_rows(k, rows), pick_rows(v, rows), scale=scale)
    start, step, count = runs
    batch, heads, length, width = q.shape
    keys, values = k[start::step][:count], v[start::step][:count]
    if count == batch:
        return F.scaled_dot_product_attention(q, keys, values, scale=scale)
    if count == 1:
        keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        return F.scaled_dot_product_attention(q, keys, values, scale=scale)
    # A view when q is laid out (B, Nq, H, D), as a projection leaves it; a copy of q otherwise.
    packed = q.transpose(1, 2).reshape(count, -1, heads, width).transpose(1, 2)
    out = F.scaled_dot_product_attention(packed, keys, values, scale=scale)
    return out.transpose(1, 2).reshape(batch, length, heads, width).transpose(1, 2)


def _even_runs(rows: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(start, step, count) when rows are `count` runs of equal length over start, start + step, ..; else None."""
    values = [row for place, row in enumerate(rows) if place == 0 or row != rows[place - 1]]
    count = len(values)
    step = values[1] - values[0] if count > 1 else 1
    even = step > 0 and values == list(range(values[0], values[0] + step * count, step))
    if not even or len(rows) % count or any(row != values[i * count // len(rows)] for i, row in enumerate(rows)):
        return None
    return values[0], step, count


def _attend_union_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[int, ...],
    k2: Tensor,
    v2: Tensor,
    rows2: tuple[int, ...],
    scale: float,
    source_weight: float,
) -> Tensor:
    """Union over host rows: those with a second segment in one call, the others in another."""
    joint = tuple(row for row, own in enumerate(rows2) if own >= 0)
    alone = tuple(row for row, own in enumerate(rows2) if own < 0)
    if not joint:
        return _attend_rows(q, k, v, rows, scale)
    source, own = tuple(rows[row] for row in joint), tuple(rows2[row] for row in joint)
    keys = torch.cat([pick_rows(k, source), pick_rows(k2, own)], 2)
    values = torch.cat([pick_rows(v, source), pick_rows(v2, own)], 2)
    bias = _segment_bias(q, k.shape[2], k2.shape[2], source_weight)
    if not alone:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)
    out = empty_token_major(q)
    queries = pick_rows(q, joint)
    put_rows(out, joint, F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale))
    put_rows(out, alone, _attend_rows(pick_rows(q, alone), k, v, tuple(rows[row] for row in alone), scale))
    return out


def _segment_bias(
    q: Tensor, first: int, second: int, source_weight: float, present: Tensor | None = None
) -> Tensor | None:
    """Bias (1 or B, 1, 1, first + second): log source_weight, then 0, or -inf where there is no second segment."""
    if source_weight == 1.0 and present is None:
        return None
    bias = q.new_zeros(1 if present is None else q.shape[0], 1, 1, first + second)
    bias[..., :first] = math.log(source_weight)
    if present is not None:
        bias[..., first:] = torch.where(present, 0.0, -math.inf).to(q.dtype)[:, None, None, None]
    return bias


def _attend_labelled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: RowIndex,
    plan: MaskPlan,
    scale: float,
    own_keys: Tensor | None = None,
    own_values: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Masked mutual attention by label columns: a pair of different regions gets -LABEL**2 from the dot product."""
    region = pick_rows(plan.key_region, rows)[:, None, :, None]
    hidden = torch.cat([~region, region], -1).to(q.dtype) * -LABEL  # hidden from foreground, from background
    hidden = F.pad(hidden, (0, LABEL_WIDTH - 2)).expand(-1, q.shape[1], -1, -1)
    keys, values = torch.cat([pick_rows(k, rows), hidden], -1), F.pad(pick_rows(v, rows), (0, LABEL_WIDTH))
    if own_keys is not None and own_values is not None:  # no label: visible to all
        keys = torch.cat([keys, F.pad(own_keys, (0, LABEL_WIDTH))], 2)
        values = torch.cat([values, F.pad(own_values, (0, LABEL_WIDTH))], 2)

    def attend(foreground: Tensor) -> Tensor:
        """Queries labelled by foreground (B, Nq) bool; a full row carries no label and sees every key."""
        label = torch.stack([foreground, ~foreground], -1) & ~plan.full_rows[:, None, None]
        label = F.pad(label.to(q.dtype) * LABEL, (0, LABEL_WIDTH - 2))[:, None].expand(-1, q.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(torch.cat([q, label], -1), keys, values, attn_mask=bias, scale=scale)
        return out[..., : q.shape[-1]]

    weight = plan.effective_weight(rows)
    if plan.binary:
        return attend(weight == 1)
    # weight > 0 and weight == 1 differ only for soft queries, which see one region in each call.
    foreground, background = attend(weight > 0), attend(weight == 1)
    return _blend(foreground, background, weight[:, None, :, None])


def _blend(foreground: Tensor, background: Tensor, weight: Tensor) -> Tensor:
    """weight * foreground + (1 - weight) * background, in at least float32."""
    wide = torch.promote_types(foreground.dtype, torch.float32)
    return background.to(wide).lerp(foreground.to(wide), weight.to(wide)).to(foreground.dtype)
