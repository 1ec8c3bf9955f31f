"""The kernels on a CUDA device: against float64, compiled, captured in a CUDA graph, without host waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import MAP_CASES, Case, error, exact, interpreter_cases, low_precision, make, make_maps

from masa.kernels.cross_attention_maps import cross_attention_with_maps
from masa.kernels.mutual_attention import MaskPlan, mutual_attention

pytestmark = pytest.mark.gpu

BATCH = {"rows": (0, 0, 2, 2), "sources": 4, "heads": 8}
CASES = {case.name: replace(case, heads=8) for case in interpreter_cases()} | {
    f"{kind}-{tokens}x{width}-{dtype}": Case(
        f"{kind}-{tokens}x{width}-{dtype}",
        dtype=dtype,
        width=width,
        queries=tokens,
        keys=tokens,
        region="mixed" if kind in ("masked", "soft") else None,
        weight="soft" if kind == "soft" else "binary",
        full=(0, 2),
        own=(-1, 1, -1, 3) if kind == "union" else None,
        **BATCH,
    )
    for kind in ("plain", "masked", "soft", "union")
    for dtype in ("fp16", "bf16")
    for tokens, width in ((64, 160), (256, 160), (1024, 80), (1200, 80), (4095, 40), (4096, 40))
}
# float32 products keep 22 bits, and a softmax over one key is exact in torch.
FLOOR = {"fp32": 3e-7, "fp16": 0.0, "bf16": 0.0}


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_mutual_attention_is_as_exact_as_torch(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = make(case, "cuda")
    out = mutual_attention(inputs.q, inputs.k, inputs.v, **inputs.arguments(case), backend=backend)
    truth = exact(case, inputs)
    assert error(out, truth) <= 2 * error(low_precision(case, inputs), truth) + FLOOR[case.dtype]


@pytest.mark.parametrize("case", MAP_CASES, ids=lambda case: case.name)
def test_maps_are_as_exact_as_the_dtype(case) -> None:
    q, k, v, weights = make_maps(case, "cuda")
    out, maps = cross_attention_with_maps(q, k, v, weights, backend="triton")
    wide = [x.double() for x in (q, k, v, weights)]
    true_out, true_maps = cross_attention_with_maps(*wide, backend="reference")
    own = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert error(out, true_out) <= 2 * error(own, true_out) + FLOOR[case.dtype]
    assert error(maps, true_maps) <= {"fp32": 2e-6, "fp16": 1e-3, "bf16": 8e-3}[case.dtype]


def test_nothing_waits_for_the_device() -> None:
    case = CASES["masked-1024x80-fp16"]
    inputs = make(case, "cuda")
    mutual_attention(inputs.q, inputs.k, inputs.v, **inputs.arguments(case))  # compiles, copies the rows
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = MaskPlan.build(inputs.region, inputs.weight, inputs.full)
        mutual_attention(inputs.q, inputs.k, inputs.v, kv_index=case.rows, plan=plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["plain-1024x80-fp16", "masked-1024x80-fp16", "union-1024x80-fp16"])
def test_replays_in_a_cuda_graph(name: str) -> None:
    case = CASES[name]
    inputs = make(case, "cuda")
    arguments = inputs.arguments(case)
    expected = mutual_attention(inputs.q, inputs.k, inputs.v, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mutual_attention(inputs.q, inputs.k, inputs.v, **arguments)
    graph.replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", ["plain-1024x80-fp16", "soft-1024x80-fp16", "union-1024x80-fp16"])
def test_compiles_without_graph_breaks(name: str) -> None:
    case = CASES[name]
    inputs = make(case, "cuda")
    arguments = inputs.arguments(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: mutual_attention(q, k, v, **arguments), fullgraph=True)
    expected = mutual_attention(inputs.q, inputs.k, inputs.v, **arguments)
    torch.testing.assert_close(compiled(inputs.q, inputs.k, inputs.v), expected)


def test_gradients_are_those_of_sdpa() -> None:
    case = CASES["masked-256x160-fp16"]
    grads = []
    for backend in ("triton", "sdpa"):
        inputs = make(case, "cuda")
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = mutual_attention(inputs.q, inputs.k, inputs.v, **inputs.arguments(case), backend=backend)
        grads.append(torch.autograd.grad(out.float().square().mean(), leaves))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-3, rtol=2e-2)
