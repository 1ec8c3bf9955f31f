"""What a control may ask of the network: edits of single sites, and residuals added between blocks.

A control never touches the network. It names, per site, which rows' queries, keys, values and features each row of
the batch reads, with which weight and which statistics, and how one row's probabilities become another's. Rows are
those of `masa.branches`; those a source cache holds are indexed behind the batch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from masa.errors import MasaError
from masa.kernels.mutual_attention import MaskPlan

Place = Literal["down", "mid", "up"]
Kind = Literal["self", "cross", "res", "norm", "skip"]
Grid = tuple[int, int]
RowTuple = tuple[int, ...]

# What a forward recorded, by (record's key, site index): maps (rows, tokens, h*w), queries (rows, h*w, width), or
# what `Edit.to_cache` names.
Tape = dict[tuple[Hashable, int], Tensor]

# What of a row a cache may hold at a site, for rows of later batches that read it:
# queries, keys and values (rows, heads, h*w, d); their moments over positions (rows, heads, 2, d); maps (rows, keys,
# h*w), head-mean probabilities of every key; features (rows, c, h, w) of a residual block before its sum; norm
# (rows, 2, groups), moments of a group norm's input.
CachePart = Literal["q", "k", "v", "q_moments", "k_moments", "maps", "features", "norm"]


@dataclass(frozen=True)
class Site:
    """One place of the UNet that an edit is addressed to, and the grid it works on.

    kind: "self" and "cross" are attentions, "res" residual blocks, "norm" group norms, "skip" the joints where a
    skip connection is concatenated. In SD v1 self- and cross-attention of layer n are sites 2n and 2n + 1; the
    others follow from 32 on, kind by kind.
    """

    index: int
    layer: int  # transformer block, 0..15; of other kinds the next one to run, 16 where none is left
    name: str  # module name, as in the checkpoint; of skips the residual block's that takes them, with ".skip"
    place: Place
    kind: Kind
    downsample: int  # 1, 2, 4 or 8, relative to the latents
    heads: int = 0  # of attentions
    width: int = 0  # of attentions: features of a token


# (tape of this forward, grid (h, w) of the site) -> plan over the rows whose keys are read, or None for no mask.
MaskSource = Callable[[Tape, Grid], "MaskPlan | None"]
# (tape of this forward, grid (h, w) of the site) -> for each row, which keys it may see: (rows, h*w) bool, or None.
KeyRegion = Callable[[Tape, Grid], "Tensor | None"]
# (backbone features, skip features), each (rows, c, h, w) -> both; the same for every row.
Joint = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Part:
    """Keys and values that rows read in one softmax with the other parts: softmax over all parts' keys together.

    rows: for each row, the row that it reads here, -1 for none. weight: how many times the part's keys count, > 0;
    their logits gain ln(weight). scale: on the logits, before the weight. match: for each row, the row to whose
    keys' mean and standard deviation the keys read are brought (AdaIN, per head and channel over positions), -1 for
    none. keys: which keys may be seen, whatever the query; a part without any is left out.
    weight and scale: one number, or one for each row.
    """

    rows: RowTuple
    weight: tuple[float, ...] | float = 1.0
    scale: tuple[float, ...] | float = 1.0
    match: RowTuple | None = None
    keys: KeyRegion | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing but which rows are read and how often they count."""
        return self.scale == 1.0 and self.match is None and self.keys is None

    def of_rows(self, wanted: RowTuple) -> Part:
        """The same, for some of the rows alone; not with `keys`."""
        return Part(
            pick(self.rows, wanted), pick(self.weight, wanted), pick(self.scale, wanted), pick(self.match, wanted)
        )


@dataclass(frozen=True, eq=False)
class ExtraKeys:
    """Further keys and values with a softmax of their own: out + scale * softmax(q kᵀ / √d) v, the
    decoupled cross-attention of 2308.06721.

    k, v (n, heads, tokens, d), in the model's dtype. rows: for each row of the batch, which of the n it reads, -1 for
    none. scale: one number, or one for each row.
    """

    k: Tensor
    v: Tensor
    rows: RowTuple
    scale: tuple[float, ...] | float = 1.0


@dataclass(frozen=True)
class Mix:
    """Probabilities of some rows made from the source's and their own: P = P_source @ from_source + P_own * own.

    rows, sources: the rows edited and, for each, the row that P_source is of. from_source (rows edited, tokens,
    tokens), from the source's tokens to the row's. own (rows edited, tokens), None for zeros. Nothing is
    renormalised. Prompt-to-Prompt section 3.2.
    """

    rows: RowTuple
    sources: RowTuple
    from_source: Tensor
    own: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """Keep head-mean attention maps: token_weights (rows, maps, keys) picks and sums the keys."""

    key: Hashable
    token_weights: Tensor


@dataclass(frozen=True, eq=False)
class CachedRows:
    """What rows outside the batch have at a site in this step, for edits that read them; shapes as in `CachePart`."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    q_moments: Tensor | None = None
    k_moments: Tensor | None = None
    maps: Tensor | None = None
    features: Tensor | None = None
    norm: Tensor | None = None


@dataclass(frozen=True)
class Edit:
    """What one site does differently in one step; rows are indices into the UNet batch.

    Of attention, reading:
    q_from, k_from, v_from: the row whose queries, keys and values each row reads (default: its own).
    parts: several rows' keys and values in one softmax, in place of k_from and v_from; parts[0].rows names a row for
    every row. One part is MasaCtrl's, two its union with the row's own, more are several references.
    q_match: the row to whose queries' mean and deviation each row's are brought (AdaIN), -1 for none.
    q_blend: (rows, nu): queries become nu times those of the rows named and 1 - nu times their own; not with the two.
    mask: restricts each query to its own region of the first part's keys.
    contrast: P becomes clip(1/N + c (P - 1/N), 0, 1), N keys, not renormalised; 1 changes nothing.
    plain: shares f in [0, 1]; the output becomes f times the row's unedited one and 1 - f times this one.
    extra: further keys and values, each with a softmax of its own, added.
    mix: rows whose probabilities come from the source's (cross-attention only).

    Elsewhere:
    features_from: the row whose features, before the residual sum, each row takes (residual blocks).
    norm_with: the row over whose positions and its own each row takes its statistics; itself: its own (norms).
    joint: what becomes of backbone and skip features before they are concatenated (skips).

    Recording, which changes no result:
    records: maps to keep on the tape, as they are after `mix`, and without `mask` and `parts`.
    query_records: keys under which to keep the queries on the tape, as attention uses them.
    to_cache: what of the batch's rows to put on the tape, under ("cache", name).

    cached: what the rows behind the batch's own have here.
    """

    q_from: RowTuple | None = None
    k_from: RowTuple | None = None
    v_from: RowTuple | None = None
    parts: tuple[Part, ...] | None = None
    q_match: RowTuple | None = None
    q_blend: tuple[RowTuple, float] | None = None
    mask: MaskSource | None = None
    contrast: tuple[float, ...] | float | None = None
    plain: tuple[float, ...] | None = None
    extra: tuple[ExtraKeys, ...] = ()
    mix: Mix | None = None
    features_from: RowTuple | None = None
    norm_with: RowTuple | None = None
    joint: Joint | None = None
    records: tuple[Record, ...] = ()
    query_records: tuple[Hashable, ...] = ()
    to_cache: tuple[CachePart, ...] = ()
    cached: CachedRows | None = None

    def __post_init__(self) -> None:
        if self.parts is not None and (self.k_from is not None or self.v_from is not None):
            raise MasaError("an edit's parts name keys and values together; leave k_from and v_from out")
        if self.parts is not None and (not self.parts or min(self.parts[0].rows, default=0) < 0):
            raise MasaError(
                f"an edit's parts are {self.parts}; expected one or more, of which the first serves all rows"
            )
        if self.q_blend is not None and (self.q_from is not None or self.q_match is not None):
            raise MasaError("q_blend, q_from and q_match say whose queries a row has; leave q_blend out, or the others")
        if self.mix is not None and not self.has_plain_reading:
            raise MasaError("mix makes probabilities of rows' own keys; leave parts, mask, contrast and plain out")

    @property
    def has_plain_reading(self) -> bool:
        """Whether a row reads the keys of one row at most, with nothing done to the probabilities."""
        return self.parts is None and self.mask is None and self.contrast is None and self.plain is None

    @property
    def masks_keys(self) -> bool:
        """Whether some keys are hidden from some queries, which is known only on the way."""
        return self.mask is not None or any(part.keys is not None for part in self.parts or ())

    def changed(self) -> tuple[str, ...]:
        """The fields that make this site differ from plain attention, norm or sum; those that add up do not count."""
        added = ("records", "query_records", "to_cache", "extra")
        names = (f.name for f in fields(self) if f.name not in added)
        return tuple(name for name in names if getattr(self, name) is not None)

    def misplaced(self, kind: Kind) -> tuple[str, ...]:
        """The fields that a site of this kind could not carry out."""
        set_here = (*self.changed(), *(name for name in ("extra", "records", "query_records") if getattr(self, name)))
        elsewhere = {name for some, names in ONLY_AT.items() if some != kind for name in names}
        if kind in ("res", "norm", "skip"):
            return tuple(name for name in set_here if name not in (*ONLY_AT[kind], "cached"))
        return tuple(name for name in set_here if name in elsewhere)

    def claims(self) -> tuple[str, ...]:
        """The fields that no other control may set too: parts say what k_from and v_from would."""
        changed = self.changed()
        return changed if self.parts is None else (*changed, "k_from", "v_from")

    def merge(self, other: Edit) -> Edit:
        """Both edits at once, of different fields; records and extra keys add up."""
        changes = {name: getattr(other, name) for name in other.changed()}
        return replace(
            self,
            records=self.records + other.records,
            query_records=self.query_records + other.query_records,
            to_cache=self.to_cache + other.to_cache,
            extra=self.extra + other.extra,
            **changes,
        )

    def key_parts(self, rows: int) -> tuple[Part, ...]:
        """The parts, of which k_from is the shorthand for one."""
        return self.parts or (Part(self.k_from or tuple(range(rows))),)

    def read_rows(self, rows: int) -> tuple[RowTuple, RowTuple, RowTuple]:
        """The rows whose queries, those whose keys, and those whose values anybody reads; sorted."""
        own = tuple(range(rows))
        queries = {*(self.q_from or own), *self._named(self.q_match), *self._named(self.q_blend and self.q_blend[0])}
        parts = self.key_parts(rows)
        keys = {row for part in parts for row in (*self._named(part.rows), *self._named(part.match))}
        if self.parts is None:
            values = {*(self.v_from or own)}
        else:
            values = {row for part in parts for row in self._named(part.rows)}
        if self.plain is not None or any(self.may_see_nothing(rows)):
            # Their own attention is wanted beside, or where no key is left to see.
            queries, keys, values = queries | {*own}, keys | {*own}, values | {*own}
        if self.mix is not None:
            queries, keys = queries | {*self.mix.sources}, keys | {*self.mix.sources}
        return tuple(sorted(queries)), tuple(sorted(keys)), tuple(sorted(values))

    def may_see_nothing(self, rows: int) -> tuple[bool, ...]:
        """For each row, whether all parts that it reads have regions, so that no key may be left; () if none has."""
        parts = self.parts or ()
        if all(part.keys is None for part in parts):
            return ()
        return tuple(all(part.rows[row] < 0 or part.keys is not None for part in parts) for row in range(rows))

    def reads_cached(self, rows: int) -> tuple[CachePart, ...]:
        """What it reads of the rows behind a batch of `rows`: from this alone a cache knows what to hold."""

        def behind(*read: Iterable[int] | None) -> bool:
            return any(row >= rows for some in read for row in some or ())

        parts = self.parts or ()
        mixed = None if self.mix is None else self.mix.sources
        reads: dict[CachePart, bool] = {
            "q": behind(self.q_from, self.q_blend and self.q_blend[0], mixed),
            "k": behind(self.k_from, mixed, *(part.rows for part in parts)),
            "v": behind(self.v_from, *(part.rows for part in parts)),
            "q_moments": behind(self.q_match),
            "k_moments": behind(*(part.match for part in parts)),
            "maps": bool(self.records),
            "features": behind(self.features_from),
            "norm": behind(self.norm_with),
        }
        return tuple(part for part, is_read in reads.items() if is_read)

    def reads_others(self, rows: RowTuple, others: RowTuple) -> bool:
        """Whether, of a batch, some rows read anything of others, or what is recorded is of all rows."""
        if self.records or self.query_records or self.to_cache or self.masks_keys:
            return True  # what is on the tape, and masks made of it, are of all rows
        wanted = {*others}
        if self.mix is not None and wanted & {
            s for r, s in zip(self.mix.rows, self.mix.sources, strict=True) if r in rows
        }:
            return True
        return any(wanted & {*pick(read, rows)} for read in self._readings())

    def changes(self, rows: RowTuple) -> bool:
        """Whether these rows, of a batch that has them all, come out otherwise than unedited, masks left aside."""
        if self.joint is not None:
            return True
        mixed = () if self.mix is None else self.mix.rows
        shared = {*rows} & {row for extra in self.extra for row, read in enumerate(extra.rows) if read >= 0}
        if {*rows} & {*mixed} or shared:
            return True
        if self.contrast is not None and any(_at(self.contrast, row) != 1.0 for row in rows):
            return True
        if any(read[row] not in (row, -1) for read in self._readings() for row in rows):
            return True
        # Of several parts, only one that is the row itself, as it is.
        read = {row: [part for part in self.parts or () if part.rows[row] >= 0] for row in rows}
        return any(len(p) > 1 or any(q.keys is not None or _at(q.scale, r) != 1.0 for q in p) for r, p in read.items())

    def _readings(self) -> list[RowTuple]:
        """Every tuple that names, for each row, a row that it reads."""
        parts = self.parts or ()
        blended = None if self.q_blend is None else self.q_blend[0]
        named = [self.q_from, self.k_from, self.v_from, self.q_match, blended, self.features_from, self.norm_with]
        named += [rows for part in parts for rows in (part.rows, part.match)]
        return [rows for rows in named if rows is not None]

    def only_names_rows(self) -> bool:
        """Whether it names rows to read and nothing else that has rows: what `of_rows` can take apart."""
        simple = {"q_from", "k_from", "v_from", "parts", "q_match"}
        recorded = self.records or self.query_records or self.to_cache
        return {*self.changed()} <= simple and not (self.masks_keys or recorded or self.extra)

    def of_rows(self, rows: int, wanted: RowTuple) -> Edit:
        """The edit of a batch, where it `only_names_rows`, for some of the batch's rows alone."""
        own = tuple(range(rows))
        keys_from = (None, None) if self.parts else (self.k_from or own, self.v_from or own)
        return replace(
            self,
            q_from=pick(self.q_from or own, wanted),
            k_from=pick(keys_from[0], wanted),
            v_from=pick(keys_from[1], wanted),
            q_match=pick(self.q_match, wanted),
            parts=None if self.parts is None else tuple(part.of_rows(wanted) for part in self.parts),
        )

    def key_rows(self, rows: int) -> RowTuple:
        """The rows that a mask's plan covers, sorted: the first part's if all are cached, else all that are read."""
        first = tuple(sorted({*self.key_parts(rows)[0].rows}))
        return first if first[0] >= rows else self.read_rows(rows)[1]

    def check(self, rows: int, in_all: int) -> None:
        """MasaError unless it fits a batch of `rows`, which with its cached rows has `in_all`."""

        def per_row(name: str, value: object, least: int) -> None:
            given = isinstance(value, tuple) and all(isinstance(row, int) and least <= row < in_all for row in value)
            if value is not None and not (given and isinstance(value, tuple) and len(value) == rows):
                raise MasaError(f"{name} is {value!r}; expected a tuple of {rows} rows from {least} to {in_all - 1}")

        def numbers(name: str, value: object, least: float, single: bool = True) -> None:
            several = value if isinstance(value, tuple) else (value,) * rows if single else ()
            real = all(isinstance(n, int | float) and math.isfinite(n) and n >= least for n in several)
            if len(several) != rows or not real:
                one = "a number or " if single else ""
                raise MasaError(f"{name} is {value!r}; expected {one}a tuple of {rows} numbers from {least:g} on")

        for name in ("q_from", "k_from", "v_from", "features_from", "norm_with"):
            per_row(name, getattr(self, name), 0)
        per_row("q_match", self.q_match, -1)
        per_row("q_blend's rows", None if self.q_blend is None else self.q_blend[0], 0)
        for place, part in enumerate(self.parts or ()):
            per_row(f"parts[{place}].rows", part.rows, -1)
            per_row(f"parts[{place}].match", part.match, -1)
            numbers(f"parts[{place}].weight", part.weight, LEAST_WEIGHT)
            numbers(f"parts[{place}].scale", part.scale, -math.inf)
        for place, extra in enumerate(self.extra):
            numbers(f"extra[{place}].scale", extra.scale, -math.inf)
            if len(extra.rows) != rows or any(not -1 <= row < len(extra.k) for row in extra.rows):
                raise MasaError(
                    f"extra[{place}].rows is {extra.rows}; expected {rows}, of its {len(extra.k)} rows or -1"
                )
        if self.plain is not None:
            numbers("plain", self.plain, 0.0, single=False)
        if self.contrast is not None:
            numbers("contrast", self.contrast, 0.0)

    @staticmethod
    def _named(rows: RowTuple | None) -> set[int]:
        return {row for row in rows or () if row >= 0}


PLAIN = Edit()
# What sites of a kind alone carry out; those that are no attentions carry out nothing else.
ONLY_AT: dict[Kind, tuple[str, ...]] = {
    "self": ("mask",),
    "cross": ("mix",),
    "res": ("features_from",),
    "norm": ("norm_with",),
    "skip": ("joint",),
}
LEAST_WEIGHT = 1e-30  # of a part; its logarithm must be finite in float32


@dataclass(frozen=True, eq=False)
class Residuals:
    """Tensors that are added to features on the way through the UNet, by row of the batch.

    down: one per level, (rows, c, h, w) or None, added to what a level hands on and stores, before it is halved
    (T2I-Adapter). skips: one per skip connection, in the order of the way down, added to what is stored alone; mid:
    added to the middle's output (ControlNet).
    """

    down: tuple[Tensor | None, ...] = ()
    skips: tuple[Tensor | None, ...] = ()
    mid: Tensor | None = None

    @staticmethod
    def total(several: Sequence[Residuals]) -> Residuals | None:
        """The sum of several controls' residuals; None of none."""
        if not several:
            return None
        one = several[0]
        for other in several[1:]:
            down, skips = _add_all(one.down, other.down), _add_all(one.skips, other.skips)
            one = Residuals(down, skips, _add(one.mid, other.mid))
        return one

    def at_level(self, level: int) -> Tensor | None:
        return self.down[level] if level < len(self.down) else None

    def at_skip(self, place: int) -> Tensor | None:
        return self.skips[place] if place < len(self.skips) else None


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else (a if b is None else a + b)


def _add_all(a: tuple[Tensor | None, ...], b: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    longest = max(len(a), len(b))
    padded = [(*some, *[None] * (longest - len(some))) for some in (a, b)]
    return tuple(_add(x, y) for x, y in zip(*padded, strict=True))


def take(x: Tensor, rows: RowTuple) -> Tensor:
    """The named rows of x, in order; x itself when that is all of them, a view when they are adjacent."""
    if rows == tuple(range(len(x))):
        return x
    if not rows:
        return x[:0]
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows)]
    return torch.cat([x[row : row + 1] for row in rows])


def _at(value: tuple[float, ...] | float, row: int) -> float:
    return value[row] if isinstance(value, tuple) else value


def pick(values, wanted: RowTuple):  # type: ignore[no-untyped-def]
    """The wanted of one value per row; one value for all rows, or None, as it is."""
    return tuple(values[row] for row in wanted) if isinstance(values, tuple) else values
