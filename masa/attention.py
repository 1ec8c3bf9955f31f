"""The one call site of every attention, and the edits that controls may ask of it.

A control never touches the network. It names, per attention site, which rows' queries, keys and values each
row of the batch reads; `attend` carries that out. Rows are those of `masa.branches`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from masa.errors import MasaError
from masa.kernels.cross_attention_maps import cross_attention_with_maps
from masa.kernels.launch import Backend
from masa.kernels.mutual_attention import MaskPlan, mutual_attention

Place = Literal["down", "mid", "up"]
Grid = tuple[int, int]

# What a forward recorded: maps (rows, tokens, h*w) by (record's key, site index).
Tape = dict[tuple[Hashable, int], Tensor]


@dataclass(frozen=True)
class Site:
    """One attention of the UNet: its place in forward order and the token grid it works on."""

    index: int  # 0..31 in SD v1: self- and cross-attention of layer n are 2n and 2n + 1
    layer: int  # transformer block, 0..15
    name: str  # module name, as in the checkpoint
    place: Place
    kind: Literal["self", "cross"]
    downsample: int  # 1, 2, 4 or 8, relative to the latents
    heads: int


@dataclass(frozen=True)
class Regions:
    """Two-part masks on one grid: a query sees the keys of its own part.

    key_region (rows, keys) bool: the subject, in each row's own keys.
    query_weight (rows, queries) in [0, 1]: how far each query belongs to the subject.
    full_rows (rows,) bool: rows that see every key.
    """

    key_region: Tensor
    query_weight: Tensor
    full_rows: Tensor


# (tape of this forward, grid (h, w) of the site) -> regions, or None for no mask.
MaskSource = Callable[[Tape, Grid], Regions | None]


@dataclass(frozen=True)
class Record:
    """Keep head-mean cross-attention maps: token_weights (rows, maps, tokens) picks and sums the tokens."""

    key: Hashable
    token_weights: Tensor


@dataclass(frozen=True)
class Edit:
    """What one attention does differently in one step; rows are indices into the UNet batch.

    k_from, v_from: the row whose keys and values each row reads (default: its own).
    union_with: a second row whose keys and values each row also sees, -1 for none.
    source_weight: weight of the first part against the second in a union (log-weight on its logits).
    mask: restricts each query to its own region of the keys.
    records: maps to keep on the tape (cross-attention only).
    """

    k_from: tuple[int, ...] | None = None
    v_from: tuple[int, ...] | None = None
    union_with: tuple[int, ...] | None = None
    source_weight: float | None = None
    mask: MaskSource | None = None
    records: tuple[Record, ...] = ()

    def merge(self, other: Edit, site: Site) -> Edit:
        """Both edits at once. MasaError where both set the same field; records add up."""
        changes: dict[str, object] = {"records": self.records + other.records}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name == "records" or theirs is None:
                continue
            if mine is not None:
                raise MasaError(f"two controls both set {field.name} at {site.name} (layer {site.layer})")
            changes[field.name] = theirs
        return replace(self, **changes)  # type: ignore[arg-type]

    def read_rows(self, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows whose keys, and those whose values, anybody reads; sorted."""
        own = tuple(range(rows))
        k_from, v_from = self.k_from or own, self.v_from or own
        extra = {row for row in self.union_with or () if row >= 0}
        keys = tuple(sorted({*k_from, *extra}))
        values = tuple(sorted({*v_from, *extra}))
        return keys, values


PLAIN = Edit()


@dataclass(frozen=True)
class Call:
    """What one forward of the UNet carries down to its attentions. The tape is this forward's own."""

    edits: Mapping[int, Edit]
    tape: Tape
    backend: Backend = "auto"

    def edit_at(self, site: Site) -> Edit:
        return self.edits.get(site.index, PLAIN)


def take(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The named rows of x, in order; x itself when that is all of them, a view when they are adjacent."""
    if rows == tuple(range(len(x))):
        return x
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows)]
    return torch.cat([x[row : row + 1] for row in rows])


def attend(q: Tensor, k: Tensor, v: Tensor, site: Site, grid: Grid, call: Call) -> Tensor:
    """softmax(q kᵀ / √d) v with the edit that this call makes at this site.

    q (rows, heads, h*w, d) for every row; k and v (read rows, heads, keys, d) only for the rows that
    `Edit.read_rows` lists, in that order. Returns (rows, heads, h*w, d).
    """
    edit = call.edit_at(site)
    if edit is PLAIN and call.backend == "auto":
        return F.scaled_dot_product_attention(q, k, v)

    rows = len(q)
    own = tuple(range(rows))
    k_rows, v_rows = edit.read_rows(rows)
    k_index = tuple(k_rows.index(row) for row in edit.k_from or own)
    v_index = tuple(v_rows.index(row) for row in edit.v_from or own)

    if edit.records:
        # Row-aligned K and V: a recorded site is cross-attention, whose K/V are 77 tokens.
        weights = torch.cat([record.token_weights for record in edit.records], dim=1)
        out, maps = cross_attention_with_maps(q, take(k, k_index), take(v, v_index), weights)
        counts = [record.token_weights.shape[1] for record in edit.records]
        for record, part in zip(edit.records, maps.split(counts, dim=1), strict=True):
            call.tape[record.key, site.index] = part
        return out

    regions = None if edit.mask is None else edit.mask(call.tape, grid)
    plan = None
    if regions is not None:
        plan = MaskPlan.build(take(regions.key_region, k_rows), regions.query_weight, regions.full_rows)
    if k_index != v_index:  # keys of one row with values of another: align them once, here
        k, v, k_index = take(k, k_index), take(v, v_index), own
    if edit.union_with is None:
        return mutual_attention(q, k, v, kv_index=k_index, plan=plan, backend=call.backend)
    second = tuple(-1 if row < 0 else k_rows.index(row) for row in edit.union_with)
    return mutual_attention(
        q,
        k,
        v,
        kv_index=k_index,
        k2=k,
        v2=v,
        kv_index2=second,
        source_weight=1.0 if edit.source_weight is None else edit.source_weight,
        plan=plan,
        backend=call.backend,
    )
