"""The one call site of every attention, and the edits that controls may ask of it and of residual blocks.

A control never touches the network. It names, per site, which rows' queries, keys, values and features each row
of the batch reads, and how one row's probabilities become another's; `attend` carries that out, at residual
blocks their own forward. Rows are those of `masa.branches`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from masa.errors import MasaError
from masa.kernels.cross_attention_maps import cross_attention_with_maps
from masa.kernels.launch import Backend, triton_unavailable
from masa.kernels.mutual_attention import MaskPlan, mutual_attention

Place = Literal["down", "mid", "up"]
Grid = tuple[int, int]

# What a forward recorded, by (record's key, site index): maps (rows, tokens, h*w), queries (rows, h*w, width), or
# what `Edit.keep` names.
Tape = dict[tuple[Hashable, int], Tensor]

Part = Literal["q", "k", "v"]


@dataclass(frozen=True)
class Site:
    """One attention or residual block of the UNet: its place in forward order and the grid it works on."""

    index: int  # in SD v1, self- and cross-attention of layer n are 2n and 2n + 1; residual blocks follow from 32 on
    layer: int  # transformer block, 0..15; of a residual block, the next one to run
    name: str  # module name, as in the checkpoint
    place: Place
    kind: Literal["self", "cross", "res"]
    downsample: int  # 1, 2, 4 or 8, relative to the latents
    heads: int  # 0 of a residual block


# (tape of this forward, grid (h, w) of the site) -> plan over the rows whose keys are read, or None for no mask.
MaskSource = Callable[[Tape, Grid], MaskPlan | None]


@dataclass(frozen=True)
class Mix:
    """Probabilities of some rows made from the source's and their own: P = P_source @ from_source + P_own * own.

    rows, sources: the rows edited and, for each, the row that P_source is of. from_source (rows edited, tokens,
    tokens), from the source's tokens to the row's. own (rows edited, tokens), None for zeros. Nothing is
    renormalised. Prompt-to-Prompt section 3.2.
    """

    rows: tuple[int, ...]
    sources: tuple[int, ...]
    from_source: Tensor
    own: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """Keep head-mean attention maps: token_weights (rows, maps, keys) picks and sums the keys."""

    key: Hashable
    token_weights: Tensor


@dataclass(frozen=True, eq=False)
class Lent:
    """What rows outside the batch have at a site in this step, for edits that read them.

    q, k, v (rows lent, heads, h*w, d). maps (rows lent, keys, h*w): head-mean probabilities of every key. Only
    what the edit reads need be there.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    maps: Tensor | None = None


@dataclass(frozen=True)
class Edit:
    """What one site does differently in one step; rows are indices into the UNet batch.

    Where rows are lent, they are indexed behind the batch's own, and the tape's maps have them too.

    q_from, k_from, v_from: the row whose queries, keys and values each row reads (default: its own).
    union_with: a second row whose keys and values each row also sees, -1 for none.
    source_weight: weight of the first part against the second in a union (log-weight on its logits).
    mask: restricts each query to its own region of the keys.
    mix: rows whose probabilities come from the source's (cross-attention only).
    features_from: the row whose features, before the residual sum, each row takes (residual blocks only).
    records: maps to keep on the tape, as they are after `mix`, and without `mask` and `union_with`.
    query_records: keys under which to keep the queries on the tape, as they are after `q_from`.
    keep: which of the queries, keys and values read here to put on the tape, under ("kept", name).
    lent: what the rows behind the batch's own have here.
    """

    q_from: tuple[int, ...] | None = None
    k_from: tuple[int, ...] | None = None
    v_from: tuple[int, ...] | None = None
    union_with: tuple[int, ...] | None = None
    source_weight: float | None = None
    mask: MaskSource | None = None
    mix: Mix | None = None
    features_from: tuple[int, ...] | None = None
    records: tuple[Record, ...] = ()
    query_records: tuple[Hashable, ...] = ()
    keep: tuple[Part, ...] | None = None
    lent: Lent | None = None

    def changed(self) -> tuple[str, ...]:
        """The fields that make this site differ from plain attention; records do not."""
        names = (f.name for f in fields(self) if f.name not in ("records", "query_records"))
        return tuple(name for name in names if getattr(self, name) is not None)

    def merge(self, other: Edit) -> Edit:
        """Both edits at once, of different fields; records add up."""
        changes = {name: getattr(other, name) for name in other.changed()}
        queries = self.query_records + other.query_records
        return replace(self, records=self.records + other.records, query_records=queries, **changes)

    def read_rows(self, rows: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The rows whose queries, those whose keys, and those whose values anybody reads; sorted."""
        own = tuple(range(rows))
        extra = {row for row in self.union_with or () if row >= 0}
        queries = tuple(sorted({*(self.q_from or own)}))
        keys = tuple(sorted({*(self.k_from or own), *extra}))
        values = tuple(sorted({*(self.v_from or own), *extra}))
        return queries, keys, values

    def reads_only_rows(self) -> bool:
        """Whether it names rows to read and nothing else: what `of_rows` can take apart."""
        rows = {"q_from", "k_from", "v_from", "union_with", "source_weight"}
        return {*self.changed()} <= rows and not (self.records or self.query_records)

    def of_rows(self, rows: int, wanted: tuple[int, ...]) -> Edit:
        """The edit of a batch, where it `reads_only_rows`, for some of the batch's rows alone."""
        own = tuple(range(rows))
        q_from, k_from, v_from = (
            tuple((read or own)[row] for row in wanted) for read in (self.q_from, self.k_from, self.v_from)
        )
        union_with = None if self.union_with is None else tuple(self.union_with[row] for row in wanted)
        return replace(self, q_from=q_from, k_from=k_from, v_from=v_from, union_with=union_with)

    def key_rows(self, rows: int) -> tuple[int, ...]:
        """The rows whose keys `attend` indexes, and a mask's plan must cover: all that are read, or those lent.

        A union of lent keys with the batch's own has these apart.
        """
        first = tuple(sorted({*(self.k_from or range(rows))}))
        return first if first[0] >= rows else self.read_rows(rows)[1]


PLAIN = Edit()


@dataclass(frozen=True)
class Call:
    """What one forward of the UNet carries down to its attentions. The tape is this forward's own."""

    edits: Mapping[int, Edit]
    tape: Tape
    backend: Backend = "auto"
    plans: dict[Hashable, MaskPlan | None] = field(default_factory=dict)

    def edit_at(self, site: Site) -> Edit:
        return self.edits.get(site.index, PLAIN)

    def of_rows(self, site: Site, rows: int, wanted: tuple[int, ...]) -> Call:
        """The same call, in which a site gives some of the batch's rows alone."""
        return replace(self, edits={**self.edits, site.index: self.edit_at(site).of_rows(rows, wanted)})

    def plan(self, mask: MaskSource, grid: Grid) -> MaskPlan | None:
        """The mask on a grid, planned once per forward unless more of the tape has been written since."""
        key = (id(mask), grid, len(self.tape))
        if key not in self.plans:
            self.plans[key] = mask(self.tape, grid)
        return self.plans[key]


def check_backend(backend: str, device: torch.device) -> None:
    """MasaError unless a backend of controlled attention exists and can serve on a device."""
    if backend not in get_args(Backend):
        raise MasaError(f"backend is {backend!r}; expected one of {', '.join(map(repr, get_args(Backend)))}")
    reason = triton_unavailable(device) if backend == "triton" else None
    if reason is not None:
        raise MasaError(f"backend 'triton' cannot serve: {reason}, or use 'sdpa' or 'auto'")


def take(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The named rows of x, in order; x itself when that is all of them, a view when they are adjacent."""
    if rows == tuple(range(len(x))):
        return x
    if not rows:
        return x[:0]
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows)]
    return torch.cat([x[row : row + 1] for row in rows])


def attend(q: Tensor, k: Tensor, v: Tensor, rows: int, site: Site, grid: Grid, call: Call) -> Tensor:
    """softmax(q kᵀ / √d) v with the edit that this call makes at this site.

    q (read rows, heads, h*w, d), k and v (read rows, heads, keys, d): only the rows of the batch that
    `Edit.read_rows` lists for each, in that order. Returns (rows, heads, h*w, d), or the rows of `Call.of_rows`.
    """
    edit = call.edit_at(site)
    if edit is PLAIN and call.backend == "auto":
        return F.scaled_dot_product_attention(q, k, v)

    own = tuple(range(rows))
    q_rows, k_rows, v_rows = edit.read_rows(rows)
    second_k, second_v, second_rows = k, v, k_rows  # of a union
    if edit.keep is not None:
        call.tape.update({(("kept", name), site.index): {"q": q, "k": k, "v": v}[name] for name in edit.keep})
    if edit.lent is not None:
        k_rows = edit.key_rows(rows)
        v_rows = k_rows if edit.v_from == edit.k_from else v_rows
        second_rows = tuple(row for row in second_rows if row < rows)
        q = _with_lent(q, edit.lent.q, q_rows, rows)
        k, v = _with_lent(k, edit.lent.k, k_rows, rows), _with_lent(v, edit.lent.v, v_rows, rows)
        if k_rows[0] < rows:
            second_k, second_v, second_rows = k, v, k_rows
    q_index = tuple(q_rows.index(row) for row in edit.q_from or own)
    k_index = tuple(k_rows.index(row) for row in edit.k_from or own)
    v_index = tuple(v_rows.index(row) for row in edit.v_from or own)
    q = take(q, q_index)
    for key in edit.query_records:
        call.tape[key, site.index] = rearrange(q, "b h n d -> b n (h d)")

    if edit.mix is not None or (edit.records and edit.mask is None and edit.union_with is None):
        # Row-aligned K and V: mostly cross-attention, whose K/V are 77 tokens.
        return _attend_to_tokens(q, take(k, k_index), take(v, v_index), edit, site, call)

    if edit.records:  # of masked or united self-attention, the maps without mask and union
        _attend_to_tokens(q, take(k, k_index), take(v, v_index), edit, site, call)
    plan = None if edit.mask is None else call.plan(edit.mask, grid)
    if k_index != v_index:  # keys of one row with values of another: align them once, here
        if plan is not None or edit.union_with is not None:
            raise MasaError(f"{site.name}: keys and values of different rows cannot be masked or united")
        k, v, k_index = take(k, k_index), take(v, v_index), tuple(range(len(k_index)))
    if edit.union_with is None:
        return mutual_attention(q, k, v, kv_index=k_index, plan=plan, backend=call.backend)
    second = tuple(-1 if row < 0 else second_rows.index(row) for row in edit.union_with)
    return mutual_attention(
        q,
        k,
        v,
        kv_index=k_index,
        k2=second_k,
        v2=second_v,
        kv_index2=second,
        source_weight=1.0 if edit.source_weight is None else edit.source_weight,
        plan=plan,
        backend=call.backend,
    )


def _with_lent(own: Tensor, lent: Tensor | None, wanted: tuple[int, ...], rows: int) -> Tensor:
    """The rows wanted, sorted: the batch's own, all of `own`, then those lent; no copy where they are of one kind."""
    behind = tuple(row - rows for row in wanted if row >= rows)
    if not behind:
        return own
    assert lent is not None, "rows are read that were not lent"
    return take(lent, behind) if len(behind) == len(wanted) else torch.cat([own, take(lent, behind)])


def _attend_to_tokens(q: Tensor, k: Tensor, v: Tensor, edit: Edit, site: Site, call: Call) -> Tensor:
    """Cross-attention whose probabilities are mixed or recorded, without holding them in memory.

    Attention is linear in the values: (P_s M + P_t * own) V is P_s (M V) + P_t (own * V), two plain attentions,
    and a recorded map, a product with token weights in place of V, splits the same way.
    """
    rows, mix = len(q), edit.mix
    weights = [record.token_weights for record in edit.records]
    tokens = torch.cat(weights, dim=1) if weights else None
    lent_maps = None
    if tokens is not None and edit.lent is not None and edit.lent.maps is not None:
        lent_maps = tokens[rows:].to(edit.lent.maps.dtype) @ edit.lent.maps
        tokens = tokens[:rows]
    if mix is not None:
        own_q, own_k, own_v = (take(t, mix.rows) for t in (q, k, v))
        own_tokens = None if tokens is None else take(tokens, mix.rows)
        source_of = dict(zip(mix.rows, mix.sources, strict=True))
        index = tuple(source_of.get(row, row) for row in range(rows))
        q, k = take(q, index), take(k, index)
        v = _replace_rows(v, mix.rows, mix.from_source[:, None].to(v.dtype) @ own_v)
        if tokens is not None and own_tokens is not None:
            tokens = _replace_rows(tokens, mix.rows, own_tokens @ mix.from_source.mT)
        if mix.own is not None:
            q, k = torch.cat([q, own_q]), torch.cat([k, own_k])
            v = torch.cat([v, mix.own[:, None, :, None].to(v.dtype) * own_v])
            if tokens is not None and own_tokens is not None:
                tokens = torch.cat([tokens, own_tokens * mix.own[:, None]])

    if tokens is None:
        out = mutual_attention(q, k, v, kv_index=tuple(range(len(q))), backend=call.backend)
        return _fold_rows(out, rows, mix)
    out, maps = cross_attention_with_maps(q, k, v, tokens, backend=call.backend)
    maps = _fold_rows(maps, rows, mix)
    if lent_maps is not None:
        maps = torch.cat([maps, lent_maps])
    for record, part in zip(edit.records, maps.split([w.shape[1] for w in weights], dim=1), strict=True):
        call.tape[record.key, site.index] = part
    return _fold_rows(out, rows, mix)


def _replace_rows(x: Tensor, rows: tuple[int, ...], new: Tensor) -> Tensor:
    """x with new's rows in place of the named ones."""
    place = {row: i for i, row in enumerate(rows)}
    return torch.cat([new[place[i]][None] if i in place else x[i : i + 1] for i in range(len(x))])


def _fold_rows(x: Tensor, rows: int, mix: Mix | None) -> Tensor:
    """The first `rows` rows, with what stands after them, the mixed rows' own parts, added in."""
    if mix is None or len(x) == rows:
        return x
    return _replace_rows(x[:rows], mix.rows, take(x, mix.rows) + x[rows:])
