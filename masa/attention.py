"""The one call site of every attention: `attend` carries out what an edit asks of a site (`masa.edits`)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from masa.edits import PLAIN, CachedRows, Edit, Grid, MaskSource, Mix, Part, RowTuple, Site, Tape, pick, take
from masa.errors import MasaError
from masa.kernels.attention_over_parts import KeyPart, attention_over_parts, moments
from masa.kernels.cross_attention_maps import cross_attention_with_maps
from masa.kernels.launch import Backend, triton_unavailable
from masa.kernels.mutual_attention import MaskPlan, mutual_attention
from masa.kernels.rows import number_tensor


@dataclass(frozen=True)
class Call:
    """What one forward of the UNet carries down to its blocks. The tape is this forward's own."""

    edits: Mapping[int, Edit]
    tape: Tape
    backend: Backend = "auto"
    plans: dict[Hashable, MaskPlan | None] = field(default_factory=dict)

    def edit_at(self, site: Site) -> Edit:
        return self.edits.get(site.index, PLAIN)

    def of_rows(self, site: Site, rows: int, wanted: RowTuple) -> Call:
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


def attend(q: Tensor, k: Tensor, v: Tensor, rows: int, site: Site, grid: Grid, call: Call) -> Tensor:
    """softmax(q kᵀ / √d) v with the edit that this call makes at this site.

    q (read rows, heads, h*w, d), k and v (read rows, heads, keys, d): only the rows of the batch that
    `Edit.read_rows` lists for each, in that order. Returns (rows, heads, h*w, d), or the rows of `Call.of_rows`.
    """
    edit = call.edit_at(site)
    if edit is PLAIN and call.backend == "auto":
        return F.scaled_dot_product_attention(q, k, v)

    _keep_for_cache(q, k, v, edit, site, call.tape)
    read = _Read.of(q, k, v, edit, rows)
    queries = read.queries(edit, rows)
    for key in edit.query_records:
        call.tape[key, site.index] = rearrange(queries, "b h n d -> b n (h d)")
    if edit.mix is not None:
        out = _attend_mixed(queries, read, edit, site, call)
    elif edit.records and edit.has_plain_reading:  # the maps come out of the same attention
        out = _attend_recorded(queries, read, edit, site, call)
    else:
        if edit.records:  # of masked or several parts' attention, the maps without them
            _attend_recorded(queries, read, edit, site, call)
        out = _attend_to_parts(queries, read, edit, len(queries), site, grid, call)
    if edit.plain is not None:
        out = _blend_plain(out, read, edit.plain, rows, call)
    for extra in edit.extra:
        out = out + _attend_to_extra(queries, extra.k, extra.v, extra.rows, extra.scale, call)
    return out


def _keep_for_cache(q: Tensor, k: Tensor, v: Tensor, edit: Edit, site: Site, tape: Tape) -> None:
    """Put on the tape what the edit asks for of this batch's rows."""
    for name in edit.to_cache:
        if name in ("q", "k", "v"):
            tape[("cache", name), site.index] = {"q": q, "k": k, "v": v}[name]
        elif name in ("q_moments", "k_moments"):
            rows = (q if name == "q_moments" else k).split(1)
            tape[("cache", name), site.index] = torch.cat([torch.stack(moments(row), dim=2) for row in rows])


# ------------------------------------------------------------------------------------------------ rows that are read


@dataclass(frozen=True, eq=False)
class _Rows:
    """One of queries, keys and values: the batch's rows that were projected, and those of a cache behind them."""

    own: Tensor
    own_rows: RowTuple
    cached: Tensor | None
    batch: int

    def of(self, wanted: RowTuple) -> tuple[Tensor, RowTuple]:
        """A tensor that has the rows wanted, and each one's place in it, -1 for -1; a copy only of both kinds."""
        behind = tuple(sorted({row for row in wanted if row >= self.batch}))
        if not behind:
            return self.own, tuple(-1 if row < 0 else self.own_rows.index(row) for row in wanted)
        assert self.cached is not None, "rows are read that no cache holds"
        cached = take(self.cached, tuple(row - self.batch for row in behind))
        if all(row < 0 or row >= self.batch for row in wanted):
            return cached, tuple(-1 if row < 0 else behind.index(row) for row in wanted)
        places = (*self.own_rows, *behind)
        return torch.cat([self.own, cached]), tuple(-1 if row < 0 else places.index(row) for row in wanted)

    def aligned(self, wanted: RowTuple) -> Tensor:
        """The rows wanted, one after the other."""
        return take(*self.of(wanted))


@dataclass(frozen=True, eq=False)
class _Read:
    """Queries, keys and values that an edit reads, wherever they are: what stands below knows of no cache."""

    q: _Rows
    k: _Rows
    v: _Rows
    cached: CachedRows

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, edit: Edit, rows: int) -> _Read:
        cached = edit.cached or CachedRows()
        q_rows, k_rows, v_rows = (tuple(row for row in read if row < rows) for read in edit.read_rows(rows))
        return cls(
            _Rows(q, q_rows, cached.q, rows), _Rows(k, k_rows, cached.k, rows), _Rows(v, v_rows, cached.v, rows), cached
        )

    def queries(self, edit: Edit, rows: int) -> Tensor:
        """The queries (rows, heads, h*w, d) that the rows attend with."""
        wanted = edit.q_from or tuple(range(rows))
        q = self.q.aligned(wanted)
        if edit.q_blend is not None:
            others, share = edit.q_blend
            q = share * self.q.aligned(others) + (1.0 - share) * q
        if edit.q_match is not None:
            gain, offset = _match(self.q, wanted, edit.q_match, self.cached.q_moments)
            q = (q * gain + offset).to(q.dtype)
        return q


def _match(x: _Rows, rows: RowTuple, to: RowTuple, cached: Tensor | None) -> tuple[Tensor, Tensor]:
    """AdaIN as gain and offset (len(rows), heads, 1, d): rows' mean and deviation become those of `to`, -1 for none.

    Statistics are over positions, per head and channel, in float32, the variance unbiased. 2312.02133.
    """

    def of(wanted: int) -> tuple[Tensor, Tensor]:
        if wanted >= x.batch and cached is not None:
            mean, deviation = cached[wanted - x.batch].unbind(1)
            return mean, deviation
        mean, deviation = moments(x.aligned((wanted,)))
        return mean[0], deviation[0]

    found = {row: of(row) for row in {*rows, *to} if row >= 0}
    neutral = x.own.new_ones(x.own.shape[1], x.own.shape[3], dtype=torch.promote_types(x.own.dtype, torch.float32))
    gains, offsets = [], []
    for row, wanted in zip(rows, to, strict=True):
        if row < 0 or wanted < 0 or row == wanted:
            gains.append(neutral)
            offsets.append(torch.zeros_like(neutral))
            continue
        (mean, deviation), (mean_to, deviation_to) = found[row], found[wanted]
        gains.append(deviation_to / deviation)
        offsets.append(mean_to - mean * gains[-1])
    return torch.stack(gains)[:, :, None], torch.stack(offsets)[:, :, None]


# ------------------------------------------------------------------------------------------------- parts and extras


def _attend_to_parts(q: Tensor, read: _Read, edit: Edit, rows: int, site: Site, grid: Grid, call: Call) -> Tensor:
    """One softmax over the keys of all parts; MasaCtrl eq. 5 (one part), and its union with the row's own (two)."""
    parts = edit.key_parts(rows)
    first = parts[0]
    plan = None if edit.mask is None else call.plan(edit.mask, grid)
    k, k_index = read.k.of(first.rows)
    v, v_index = read.v.of(first.rows if edit.parts else edit.v_from or tuple(range(rows)))
    fused = len(parts) <= 2 and all(part.is_plain for part in parts) and edit.contrast is None
    fused = fused and isinstance(first.weight, int | float) and (len(parts) == 1 or parts[1].weight == 1.0)
    if edit.mask is not None and not (fused and k_index == v_index):
        raise MasaError(
            f"{site.name}: a mask restricts one row's keys and their values, beside at most one plain part; keys and "
            "values of different rows, matched, scaled or several parts cannot be masked"
        )
    if not fused:
        return _attend_to_many(q, read, parts, edit, rows, grid, call)
    if k_index != v_index:  # keys of one row with values of another: align them once, here
        k, v, k_index = take(k, k_index), take(v, v_index), tuple(range(len(k_index)))
    if len(parts) == 1:
        return mutual_attention(q, k, v, kv_index=k_index, plan=plan, backend=call.backend)
    k2, second = read.k.of(parts[1].rows)
    v2, _ = read.v.of(parts[1].rows)
    return mutual_attention(
        *(q, k, v),
        kv_index=k_index,
        k2=k2,
        v2=v2,
        kv_index2=second,
        source_weight=float(cast(float, first.weight)),
        plan=plan,
        backend=call.backend,
    )


def _attend_to_many(
    q: Tensor, read: _Read, parts: tuple[Part, ...], edit: Edit, rows: int, grid: Grid, call: Call
) -> Tensor:
    """Parts in their general form: matched, scaled, weighted by row, with regions of keys, any number of them."""
    found = []
    for part in parts:
        k, k_rows = read.k.of(part.rows)
        v, v_rows = read.v.of(part.rows if edit.parts else edit.v_from or tuple(range(rows)))
        gain = offset = None
        if part.match is not None:
            gain, offset = _match(read.k, part.rows, part.match, read.cached.k_moments)
        visible = None if part.keys is None else part.keys(call.tape, grid)
        weight, scale = (_each(value, rows) for value in (part.weight, part.scale))
        found.append(KeyPart(k, v, k_rows, v_rows, weight, scale, gain, offset, visible))
    contrast = None if edit.contrast is None else _each(edit.contrast, rows)
    out = attention_over_parts(q, found, contrast=contrast, backend=call.backend)
    if not any(edit.may_see_nothing(rows)):
        return out
    # A row of which no part has a key left is plain.
    own = tuple(range(rows))
    k, v = read.k.aligned(own), read.v.aligned(own)
    plain = mutual_attention(read.q.aligned(own), k, v, kv_index=own, backend=call.backend)
    seen = torch.stack([_seen(part, q.device) for part in found])
    return torch.where(seen.any(0)[:, None, None, None], out, plain)


def _seen(part: KeyPart, device: torch.device) -> Tensor:
    """For each row, whether it sees a key of a part."""
    present = number_tensor(tuple(float(row >= 0) for row in part.k_rows), device, torch.float32) > 0
    return present if part.visible is None else present & part.visible.any(1)


def _blend_plain(out: Tensor, read: _Read, shares: tuple[float, ...], rows: int, call: Call) -> Tensor:
    """f times what the row would give unedited, and 1 - f times what it gives."""
    some = tuple(row for row in range(rows) if shares[row] > 0.0)
    if not some:
        return out
    q, k, v = (x.aligned(some) for x in (read.q, read.k, read.v))
    plain = mutual_attention(q, k, v, kv_index=tuple(range(len(some))), backend=call.backend)
    share = number_tensor(pick(shares, some), out.device, out.dtype)[:, None, None, None]
    return _replace_rows(out, some, share * plain + (1.0 - share) * take(out, some))


def _attend_to_extra(
    q: Tensor, k: Tensor, v: Tensor, rows: RowTuple, scale: tuple[float, ...] | float, call: Call
) -> Tensor:
    """scale * softmax(q kᵀ / √d) v of the rows that read extra keys, zeros for the others."""
    some = tuple(row for row, read in enumerate(rows) if read >= 0)
    out = torch.zeros_like(q)
    if not some:
        return out
    index = tuple(rows[row] for row in some)
    found = mutual_attention(take(q, some), k, v, kv_index=index, backend=call.backend)
    scales = number_tensor(pick(_each(scale, len(q)), some), q.device, q.dtype)
    return _replace_rows(out, some, scales[:, None, None, None] * found)


def _each(value: tuple[float, ...] | float, rows: int) -> tuple[float, ...]:
    """One number for each row."""
    return value if isinstance(value, tuple) else (float(value),) * rows


# ---------------------------------------------------------------------------------- probabilities, mixed and recorded


def _attend_recorded(q: Tensor, read: _Read, edit: Edit, site: Site, call: Call) -> Tensor:
    """Attention of row-aligned keys and values (mostly 77 tokens), whose maps go on the tape."""
    own = tuple(range(len(q)))
    if edit.parts:
        k_rows = v_rows = edit.parts[0].rows
    else:
        k_rows, v_rows = edit.k_from or own, edit.v_from or own
    tokens, cached_maps = _token_weights(edit, len(q))
    assert tokens is not None
    out, maps = cross_attention_with_maps(
        q, read.k.aligned(k_rows), read.v.aligned(v_rows), tokens, backend=call.backend
    )
    _put_maps(maps, cached_maps, edit, site, call.tape)
    return out


def _attend_mixed(q: Tensor, read: _Read, edit: Edit, site: Site, call: Call) -> Tensor:
    """Cross-attention whose probabilities are mixed, and perhaps recorded, without holding them in memory.

    Attention is linear in the values: (P_s M + P_t * own) V is P_s (M V) + P_t (own * V), two plain attentions,
    and a recorded map, a product with token weights in place of V, splits the same way. Prompt-to-Prompt section 3.2.
    """
    assert edit.mix is not None
    mix, rows, own = edit.mix, len(q), tuple(range(len(q)))
    k, v = read.k.aligned(edit.k_from or own), read.v.aligned(edit.v_from or own)
    tokens, cached_maps = _token_weights(edit, rows)
    own_q, own_k, own_v = (take(t, mix.rows) for t in (q, k, v))
    own_tokens = None if tokens is None else take(tokens, mix.rows)
    q, k = _sources(read.q, q, mix), _sources(read.k, k, mix)
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
    _put_maps(_fold_rows(maps, rows, mix), cached_maps, edit, site, call.tape)
    return _fold_rows(out, rows, mix)


def _sources(x: _Rows, aligned: Tensor, mix: Mix) -> Tensor:
    """Rows of queries or keys, those mixed replaced by their sources' own; sources may be cached."""
    source_of = dict(zip(mix.rows, mix.sources, strict=True))
    if aligned is x.own and max(mix.sources, default=0) < x.batch:
        return take(aligned, tuple(source_of.get(row, row) for row in range(len(aligned))))
    rows = range(len(aligned))
    return torch.cat([x.aligned((source_of[i],)) if i in source_of else aligned[i : i + 1] for i in rows])


def _token_weights(edit: Edit, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """All records' token weights of the batch's rows, and the maps of cached rows by them."""
    if not edit.records:
        return None, None
    tokens = torch.cat([record.token_weights for record in edit.records], dim=1)
    maps = None if edit.cached is None else edit.cached.maps
    return tokens[:rows], None if maps is None else tokens[rows:].to(maps.dtype) @ maps


def _put_maps(maps: Tensor, cached: Tensor | None, edit: Edit, site: Site, tape: Tape) -> None:
    """Each record's share of the maps on the tape, cached rows behind the batch's own."""
    if cached is not None:
        maps = torch.cat([maps, cached])
    sizes = [record.token_weights.shape[1] for record in edit.records]
    for record, part in zip(edit.records, maps.split(sizes, dim=1), strict=True):
        tape[record.key, site.index] = part


def _replace_rows(x: Tensor, rows: RowTuple, new: Tensor) -> Tensor:
    """x with new's rows in place of the named ones."""
    place = {row: i for i, row in enumerate(rows)}
    return torch.cat([new[place[i]][None] if i in place else x[i : i + 1] for i in range(len(x))])


def _fold_rows(x: Tensor, rows: int, mix: Mix) -> Tensor:
    """The first `rows` rows, with what stands after them, the mixed rows' own parts, added in."""
    return x if len(x) == rows else _replace_rows(x[:rows], mix.rows, take(x, mix.rows) + x[rows:])
