"""Inputs for mutual attention, its exact answer in float64, and what torch's own low precision makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from masa.kernels.mutual_attention import MaskPlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One call: shapes, rows, masks. region: None, or which keys are foreground; weight: how queries divide."""

    name: str
    dtype: str = "fp16"
    width: int = 40
    queries: int = 77
    keys: int = 77
    heads: int = 1
    rows: tuple[int, ...] = (0, 0)
    sources: int = 2
    own: tuple[int, ...] | None = None
    own_keys: int | None = None  # None: the second segment is k, v themselves
    source_weight: float = 1.0
    region: str | None = None
    weight: str = "binary"
    full: tuple[int, ...] = ()
    scale: float | None = None
    layout: str = "bnhd"
    spread: float = 1.0  # standard deviation of q: large makes sharp softmaxes


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    k2: Tensor | None
    v2: Tensor | None
    region: Tensor | None
    weight: Tensor | None
    full: Tensor

    def arguments(self, case: Case) -> dict[str, Any]:
        """Keyword arguments for `mutual_attention`, after q, k and v."""
        found: dict[str, Any] = {"kv_index": case.rows, "scale": case.scale, "source_weight": case.source_weight}
        found |= {"kv_index2": case.own, "k2": self.k2, "v2": self.v2}
        if self.region is not None and self.weight is not None:
            found["plan"] = MaskPlan.build(self.region, self.weight, self.full)
        return found


def make(case: Case, device: str = "cpu") -> Inputs:
    """Seeded inputs; layout bnhd is what a projection leaves, bhnd contiguous, fused a slice of one qkv tensor."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    dtype, batch = DTYPES[case.dtype], len(case.rows)

    def heads(rows: int, tokens: int) -> Tensor:
        x = torch.randn(rows, tokens, case.heads, case.width, generator=generator).to(dtype).to(device)
        if case.layout == "fused":
            wide = torch.zeros(rows, tokens, 3, case.heads, case.width, dtype=dtype, device=device)
            wide[:, :, 1] = x
            return wide[:, :, 1].transpose(1, 2)
        if case.layout == "odd":  # token stride not a multiple of 8 elements
            wide = torch.zeros(rows, tokens, case.heads * case.width + 1, dtype=dtype, device=device)
            wide[..., 1:] = x.flatten(2)
            return wide[..., 1:].unflatten(2, (case.heads, case.width)).transpose(1, 2)
        return x.transpose(1, 2).contiguous() if case.layout == "bhnd" else x.transpose(1, 2)

    q = heads(batch, case.queries) * case.spread
    k, v = heads(case.sources, case.keys), heads(case.sources, case.keys)
    k2 = v2 = None
    if case.own_keys is not None and case.own is not None:
        k2, v2 = heads(max(case.own) + 1, case.own_keys), heads(max(case.own) + 1, case.own_keys)
    full = torch.tensor([row in case.full for row in range(batch)], device=device)
    if case.region is None:
        return Inputs(q, k, v, k2, v2, None, None, full)

    region = torch.rand(case.sources, case.keys, generator=generator) < 0.4
    if case.region == "none":
        region[:] = False
    if case.region == "all":
        region[:] = True
    if case.region == "one":
        region[:] = False
        region[:, case.keys // 3] = True
    weight = torch.rand(batch, case.queries, generator=generator)
    if case.weight == "soft":
        weight = (weight * 1.6 - 0.3).clamp(0, 1)
    else:
        weight = (weight < {"binary": 0.4, "ones": 2.0, "zeros": -1.0}[case.weight]).float()
    return Inputs(q, k, v, k2, v2, region.to(device), weight.to(device), full)


def far_apart(dimension: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """q and k (2, 2, 16, 16) float16, k with a stride of 2**31 elements over rows (0) or heads (1).

    Reserves 4 GiB of address space, of which hardly anything is touched on the CPU.
    """
    shape, far = (2, 2, 16, 16), 2**31
    storage = torch.empty(far + 1024, dtype=torch.float16, device=device)
    strides = (far, 256, 16, 1) if dimension == 0 else (256, far, 16, 1)
    k = storage.as_strided(shape, strides)
    generator = torch.Generator().manual_seed(dimension)
    k.copy_(torch.randn(shape, generator=generator))
    return torch.randn(shape, generator=generator).half().to(device), k


def exact(case: Case, inputs: Inputs) -> Tensor:
    """The answer in float64, one row at a time, keys picked out by their region."""
    return torch.stack([_row(case, inputs, row, torch.float64) for row in range(len(case.rows))])


def low_precision(case: Case, inputs: Inputs) -> Tensor:
    """The same through torch's SDPA in the case's dtype, one call per row and region."""
    return torch.stack([_row(case, inputs, row, inputs.q.dtype) for row in range(len(case.rows))])


def _row(case: Case, inputs: Inputs, row: int, dtype: torch.dtype) -> Tensor:
    scale = case.width**-0.5 if case.scale is None else case.scale
    source = case.rows[row]

    def attend(picked: Tensor) -> Tensor:
        keys, values = inputs.k[source][:, picked], inputs.v[source][:, picked]
        bias = torch.full_like(picked, math.log(case.source_weight), dtype=torch.float64)
        if case.own is not None and case.own[row] >= 0:
            k2, v2 = (inputs.k, inputs.v) if inputs.k2 is None else (inputs.k2, inputs.v2)
            assert v2 is not None
            keys, values = (
                torch.cat([keys, k2[case.own[row]]], 1),
                torch.cat([values, v2[case.own[row]]], 1),
            )
            bias = torch.cat([bias, bias.new_zeros(k2.shape[2])])
        queries, keys, values = inputs.q[row].to(dtype), keys.to(dtype), values.to(dtype)
        if dtype == torch.float64:
            return (queries @ keys.mT * scale + bias).softmax(-1) @ values
        mask = None if not bias.any() else bias.to(dtype)[None, None, None]
        return F.scaled_dot_product_attention(queries[None], keys[None], values[None], mask, scale=scale)[0]

    every = torch.arange(case.keys, device=inputs.q.device)
    if inputs.region is None or inputs.weight is None or row in case.full:
        return attend(every)
    region = inputs.region[source]
    foreground = attend(every[region] if region.any() else every)
    background = attend(every[~region] if (~region).any() else every)
    weight = inputs.weight[row].to(dtype)[:, None]
    return weight * foreground + (1 - weight) * background


def error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite for anything that is not a number."""
    if not torch.isfinite(value).all():
        return math.inf
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@dataclass(frozen=True)
class MapCase:
    """One cross-attention with maps: queries x keys, T = 3 token sets; batched: weights per row."""

    name: str
    dtype: str
    width: int
    queries: int
    keys: int
    batched: bool


MAP_CASES = [
    MapCase(f"maps-{width}-{dtype}", dtype, width, queries, keys, batched)
    for dtype in DTYPES
    for width, queries, keys, batched in ((40, 77, 77, False), (80, 30, 77, True), (160, 20, 154, False))
]


def make_maps(case: MapCase, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (2, 2, N, D) and token weights."""
    generator = torch.Generator().manual_seed(case.width)

    def heads(tokens: int) -> Tensor:
        x = torch.randn(2, tokens, 2, case.width, generator=generator)
        return x.to(DTYPES[case.dtype]).transpose(1, 2).to(device)

    q, k, v = heads(case.queries), heads(case.keys), heads(case.keys)
    weights = torch.rand(*((2,) if case.batched else ()), 3, case.keys, generator=generator)
    return q, k, v, weights.to(device)


def interpreter_cases() -> list[Case]:
    """Small calls over dtypes, head widths, ragged lengths, regions, soft weights, unions and layouts."""
    found = []
    for dtype in DTYPES:
        for width in (40, 80, 160):
            tag = f"{dtype}-{width}"
            common = {"dtype": dtype, "width": width}
            found += [
                Case(f"plain-{tag}", **common, rows=(0, 1, 1), queries=64, keys=64, heads=2),
                Case(f"plain-ragged-{tag}", **common, queries=77, keys=150, layout="fused"),
                Case(f"union-{tag}", **common, own=(-1, 1), keys=70, own_keys=33, source_weight=1.7),
                Case(f"masked-{tag}", **common, region="mixed", full=(0,), rows=(1, 1), keys=90),
                Case(f"soft-{tag}", **common, region="mixed", weight="soft", rows=(1, 0), queries=50),
            ]
    for dtype in ("fp32", "fp16"):
        for region in ("none", "all", "one"):
            for weight in ("binary", "soft", "ones", "zeros"):
                name = f"region-{region}-{weight}-{dtype}"
                found.append(Case(name, dtype=dtype, region=region, weight=weight, keys=50, queries=40))
    for width in (8, 16, 24, 56, 64, 72, 96, 104, 128, 200, 256):
        found.append(Case(f"width-{width}", width=width, rows=(1,), queries=20, keys=45))
    for width in (8, 64, 104, 256):
        found.append(Case(f"masked-width-{width}", width=width, rows=(1,), queries=20, keys=45, region="mixed"))
    found += [
        Case("one-key", keys=1, queries=3),
        Case("one-query", queries=1, keys=200),
        Case("several-sources", rows=(0, 1, 2, 0, 2), sources=3, queries=30, keys=40),
        Case("no-source-rows-in-the-batch", rows=(2, 2), sources=3, queries=30, keys=40),
        Case("layout-bhnd", layout="bhnd", heads=2),
        Case("layout-odd", layout="odd", heads=2, queries=33, keys=41),
        Case("scale", scale=0.5),
        Case("sharp", spread=8.0, dtype="fp32"),
        Case("union-of-itself", own=(1, 0), keys=64, queries=64),
        Case("union-nothing", own=(-1, -1), keys=40, queries=40),
        Case("union-small-weight", own=(0, 1), source_weight=1e-3, keys=40, queries=40, dtype="fp32"),
        Case("masked-union", own=(-1, 1), region="mixed", source_weight=0.5, keys=60, queries=60, dtype="fp32"),
        Case("soft-union", own=(0, 1), region="mixed", weight="soft", keys=60, queries=60),
        Case("masked-union-empty", own=(0, -1), region="none", keys=40, queries=40),
        Case("sixteen-rows", rows=(*range(15), 7), sources=15, own=(-1, 3, *(14,) * 13, -1), queries=4, keys=16),
        Case("seventeen-rows", rows=(0, 1) * 8 + (1,), own=(-1, 0) * 8 + (1,), queries=4, keys=16),
        Case("sixteen-sources", rows=(15, 3), sources=16, queries=4, keys=16),
        Case("long-1200", rows=(1,), queries=70, keys=1200, region="mixed"),
        Case("long-1200-queries", rows=(1,), queries=1200, keys=70),
    ]
    return found
