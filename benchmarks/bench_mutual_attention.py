"""Mutual attention against its peers, on the same inputs in one run.

    python benchmarks/bench_mutual_attention.py                            # on a GPU, float16
    python benchmarks/bench_mutual_attention.py --device cpu --heads 2     # SDPA paths, float32

Writes mutual_attention_<device>.csv and .png to benchmarks/results. A peer that cannot run leaves its reason in
the CSV. Rows are those of classifier-free guidance: (source, target) twice.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

import harness

from masa.kernels.mutual_attention import MaskPlan, mutual_attention
from masa.kernels.reference import mutual_attention_reference, mutual_attention_sdpa

ROWS = (0, 0, 2, 2)


@dataclass(frozen=True)
class Case:
    """kind: plain, masked, soft or union; targets: every row is a target, else (source, target) twice."""

    kind: str
    tokens: int
    width: int
    targets: bool = False

    @property
    def name(self) -> str:
        rows = "target rows" if self.targets else "whole batch"
        return f"{self.kind} {self.tokens}x{self.width}, {rows}"


CASES = [
    *(Case("plain", tokens, width) for tokens, width in ((4096, 40), (1024, 80), (256, 160))),
    *(Case("masked", tokens, width, targets=True) for tokens, width in ((4096, 40), (1024, 80))),
    *(Case("soft", tokens, width, targets=True) for tokens, width in ((4096, 40), (1024, 80))),
    *(Case("masked", tokens, width) for tokens, width in ((4096, 40), (1024, 80))),
    *(Case("union", tokens, width) for tokens, width in ((4096, 40), (1024, 80))),
]


@dataclass(frozen=True)
class Inputs:
    """q, k, v (4, 8, N, D) as projections leave them; masks half foreground, in one blob each."""

    q: Tensor
    k: Tensor
    v: Tensor
    region: Tensor
    weight: Tensor
    full: Tensor
    plan: MaskPlan | None
    own: tuple[int, ...] | None


def make(case: Case, heads_per_row: int, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def heads() -> Tensor:
        x = torch.randn(len(ROWS), case.tokens, heads_per_row, case.width, generator=generator)
        return x.to(device, dtype).transpose(1, 2)

    side = math.isqrt(case.tokens)
    across = torch.linspace(-1, 1, side)
    # Half planes at two angles: 50/50, and unsorted along the rows of the picture.
    region = ((across[None] + 0.3 * across[:, None]) > 0).flatten().expand(len(ROWS), -1).contiguous()
    weight = ((across[None] - 0.2 * across[:, None]) > 0).float().flatten().expand(len(ROWS), -1).contiguous()
    if case.kind == "soft":
        weight = (across[None] * 4 - 0.8 * across[:, None] + 0.5).clamp(0, 1).flatten().expand(len(ROWS), -1)
        weight = weight.contiguous()
    full = torch.tensor([not case.targets and row == source for row, source in enumerate(ROWS)])
    region, weight, full = region.to(device), weight.to(device), full.to(device)
    plan = None
    if case.kind in ("masked", "soft"):
        plan = MaskPlan.build(region, weight if case.kind == "soft" else weight.bool(), full)
    own = None
    if case.kind == "union":
        own = tuple(-1 if row == source else row for row, source in enumerate(ROWS))
    return Inputs(heads(), heads(), heads(), region, weight, full, plan, own)


# -------------------------------------------------------------------------------------------------------- peers

# A peer is a preparation, not timed, of one set of inputs, which returns the call to time. Row lists become tensors
# there: a copy from the host in a timed call would wait for the device.
Call = Callable[[], Tensor]
Peer = Callable[[Inputs], Call]


def masa(inputs: Inputs) -> Call:
    return lambda: mutual_attention(
        *(inputs.q, inputs.k, inputs.v), kv_index=ROWS, kv_index2=inputs.own, plan=inputs.plan, backend="auto"
    )


def sdpa(inputs: Inputs) -> Call:
    """Plain: one call on views. Union: keys concatenated. Masked: one call with label columns."""
    return lambda: mutual_attention_sdpa(inputs.q, inputs.k, inputs.v, ROWS, None, None, inputs.own, inputs.plan)


def two_masks(inputs: Inputs) -> Call:
    """One SDPA call with a bool mask per region, blended; the masks are ready, K and V are repeated in the call."""
    source = torch.tensor(ROWS, device=inputs.q.device)
    region, full = inputs.region[source][:, None, None], inputs.full[:, None, None, None]
    seen, unseen = region | full, ~region | full
    weight = inputs.weight.to(inputs.q.dtype)[:, None, :, None]

    def call() -> Tensor:
        k, v = inputs.k[source], inputs.v[source]
        foreground = F.scaled_dot_product_attention(inputs.q, k, v, attn_mask=seen)
        background = F.scaled_dot_product_attention(inputs.q, k, v, attn_mask=unseen)
        return weight * foreground + (1 - weight) * background

    return call


def einsum(inputs: Inputs) -> Call:
    """The published code's way: K and V repeated, scores written out, softmax, masks as -inf."""
    batch, heads, tokens, width = inputs.q.shape
    source = torch.tensor(ROWS, device=inputs.q.device)
    alone = None
    if inputs.own is not None:  # a source row sees its keys once
        alone = torch.tensor([row < 0 for row in inputs.own], device=inputs.q.device)
        alone = alone.repeat_interleave(heads)[:, None, None]
    region = inputs.region[source].repeat_interleave(heads, 0)[:, None]
    full = inputs.full[:, None].expand(-1, heads).flatten()[:, None, None]
    weight = inputs.weight.to(inputs.q.dtype)[:, None, :, None]

    def call() -> Tensor:
        q, k, v = (x.reshape(batch * heads, -1, width) for x in (inputs.q, inputs.k[source], inputs.v[source]))
        if alone is not None:
            k = torch.cat([k, inputs.k.reshape(batch * heads, -1, width)], 1)
            v = torch.cat([v, inputs.v.reshape(batch * heads, -1, width)], 1)
        scores = torch.einsum("hid,hjd->hij", q, k) * width**-0.5
        if alone is not None:
            scores[:, :, tokens:].masked_fill_(alone, -math.inf)

        def attend(scores: Tensor) -> Tensor:
            return torch.einsum("hij,hjd->hid", scores.softmax(-1), v).view(batch, heads, tokens, width)

        if inputs.plan is None:
            return attend(scores)
        foreground = attend(scores.masked_fill(~(region | full), -math.inf))
        return weight * foreground + (1 - weight) * attend(scores.masked_fill(region & ~full, -math.inf))

    return call


def with_backend(backend: SDPBackend) -> Peer:
    def prepare(inputs: Inputs) -> Call:
        inner = sdpa(inputs)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return inner()

        return call

    return prepare


def xformers(inputs: Inputs) -> Call:
    """memory_efficient_attention of xformers, where it is installed; without masks, which it takes as dense biases."""
    from xformers.ops import memory_efficient_attention

    if inputs.plan is not None or inputs.own is not None:
        raise ValueError("compared on plain attention only")
    source = torch.tensor(ROWS, device=inputs.q.device)

    def call() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k[source], inputs.v[source]))
        return memory_efficient_attention(q, k, v).transpose(1, 2)

    return call


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def flex(inputs: Inputs) -> Call:
    """FlexAttention, compiled; K and V gathered, and for masks sorted into a block-sparse pattern, before timing."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, _, tokens, _ = inputs.q.shape
    device = inputs.q.device
    source = torch.tensor(ROWS, device=device)
    q, k, v = inputs.q, inputs.k[source], inputs.v[source]
    mask = None
    if inputs.own is not None:
        k, v = torch.cat([k, inputs.k], 2), torch.cat([v, inputs.v], 2)
        alone = torch.tensor([row < 0 for row in inputs.own], device=device)
        mask = create_block_mask(
            lambda b, h, i, j: (j < tokens) | ~alone[b], batch, None, tokens, 2 * tokens, device=str(device)
        )
    order = None
    if inputs.plan is not None:
        if not inputs.plan.binary:
            raise ValueError("a soft mask takes two calls")
        order, keys = inputs.plan.query_order.long(), inputs.plan.key_order[source].long()
        label = inputs.weight.gather(1, order) == 1
        key_label = inputs.region[source].gather(1, keys)
        full = inputs.full
        q = q.gather(2, order[:, None, :, None].expand_as(q))
        k, v = (x.gather(2, keys[:, None, :, None].expand_as(x)) for x in (k, v))
        mask = create_block_mask(
            lambda b, h, i, j: (label[b, i] == key_label[b, j]) | full[b],
            *(batch, None, tokens, tokens),
            device=str(device),
        )
    compiled = compiled_flex()
    out = compiled(q, k, v, block_mask=mask)
    if order is not None:  # what is timed answers in sorted order
        out = torch.empty_like(out).scatter_(2, order[:, None, :, None].expand_as(out), out)
    harness.relative_error(out, sdpa(inputs)())
    return lambda: compiled(q, k, v, block_mask=mask)


def peers(case: Case, device: str, want_flex: bool) -> Iterator[tuple[str, Peer]]:
    yield "masa", masa
    label = {"plain": "views", "union": "concatenated", "masked": "label columns", "soft": "label columns"}[case.kind]
    yield f"sdpa, {label}", sdpa
    if device == "cuda":
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):
            yield f"sdpa {name}, {label}", with_backend(backend)
        if importlib.util.find_spec("xformers") is not None and case.kind == "plain":
            yield "xformers", xformers
    if case.kind in ("masked", "soft"):
        yield "two bool-mask sdpa", two_masks
    yield "published einsum", einsum
    if want_flex:
        yield "flex attention", flex


# -------------------------------------------------------------------------------------------------------- run


def work(case: Case, inputs: Inputs) -> tuple[float, float, float]:
    """Operations, bytes and exponentials that this case cannot do without."""
    batch, heads, tokens, width = inputs.q.shape
    per_row = []
    for row, source in enumerate(ROWS):
        keys = float(tokens)
        if inputs.own is not None and inputs.own[row] >= 0:
            keys *= 2
        if inputs.plan is not None and not bool(inputs.full[row]):
            share = inputs.region[source].float().mean().item()
            weight = inputs.weight[row]
            needs = (weight > 0).float().mean().item() * share + (weight < 1).float().mean().item() * (1 - share)
            keys *= needs
        per_row.append(keys)
    rows_read = len(set(ROWS)) if inputs.own is None else batch
    size = inputs.q.element_size()
    scores = heads * tokens * sum(per_row)
    return 4.0 * width * scores, size * heads * tokens * width * 2.0 * (batch + rows_read), scores


def _run(call: Call) -> Tensor:
    return call()


def _fail(problem: Exception) -> Tensor:
    raise problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--heads", type=int, default=8, help="fewer make a CPU run shorter")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument(
        "--flex", action=argparse.BooleanOptionalAction, help="compile FlexAttention (default: on a GPU)"
    )
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    device = arguments.device
    dtype = getattr(torch, arguments.dtype or ("float16" if device == "cuda" else "float32"))
    repeats = arguments.repeats or (100 if device == "cuda" else 5)
    want_flex = device == "cuda" if arguments.flex is None else arguments.flex

    limit = harness.limits(device, dtype)
    print(f"limits: {limit.tflops:.3g} TFLOP/s, {limit.gigabytes:.3g} GB/s, {limit.gigaexps:.3g} Gexp/s")
    context = harness.environment(device) | {"dtype": str(dtype).removeprefix("torch."), "heads": str(arguments.heads)}
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.only and arguments.only not in case.name:
            continue
        batches = [make(case, arguments.heads, device, dtype, 0)]
        flops, moved, exps = work(case, batches[0])
        sets = harness.input_sets(moved, device)
        batches += [make(case, arguments.heads, device, dtype, seed) for seed in range(1, sets)]
        floor = limit.floor(flops, moved, exps)
        truth = mutual_attention_reference(
            *(x.float() for x in (batches[0].q, batches[0].k, batches[0].v)),
            *(ROWS, None, None, batches[0].own, batches[0].plan),
        )
        for peer, prepare in peers(case, device, want_flex):
            with torch.inference_mode():
                try:
                    calls = [(prepare(batch),) for batch in batches]
                except Exception as problem:  # this peer does not do this case
                    calls = [(functools.partial(_fail, problem),)]
                # FlexAttention answers in sorted order, which its preparation has checked.
                check = None if prepare is flex else functools.partial(harness.relative_error, truth=truth)
                row = harness.timed_row(case.name, peer, _run, check, calls, repeats, device, floor, flops)
            rows.append(row | context)
            shown = f"{row['p50_ms']:.3f} ms" if row["p50_ms"] != "" else row["note"]
            print(f"{case.name:34s} {peer:28s} {shown}", flush=True)
    stem = f"mutual_attention_{device}"
    harness.write_csv(arguments.results / f"{stem}.csv", rows)
    harness.plot(
        arguments.results / f"{stem}.png",
        rows,
        f"Mutual attention, 4 rows, {arguments.heads} heads: {context['device']}",
    )


if __name__ == "__main__":
    main()
