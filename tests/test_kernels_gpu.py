"""The kernels on a CUDA device: against float64, compiled, captured in a CUDA graph, without host waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import MAP_CASES, Case, error, exact, far_apart, interpreter_cases, low_precision, make, make_maps

from masa.kernels.cross_attention_maps import cross_attention_with_maps
from masa.kernels.mutual_attention import mutual_attention

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


FORMS = ["plain-1024x80-fp16", "masked-1024x80-fp16", "soft-1024x80-fp16", "union-1024x80-fp16"]
# Rows that the tests below have not used before: nothing about them can have been prepared.
FRESH_ROWS = (3, 1, 2, 0)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("name", FORMS)
def test_nothing_waits_for_the_device(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = make(case, "cuda")
    mutual_attention(inputs.q, inputs.k, inputs.v, **inputs.arguments(case), backend=backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        arguments = inputs.arguments(case)  # builds the plan
        arguments["kv_index"] = FRESH_ROWS
        mutual_attention(inputs.q, inputs.k, inputs.v, **arguments, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(inputs: Any, arguments: dict[str, Any]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mutual_attention(inputs.q, inputs.k, inputs.v, **arguments)
    return graph, out


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("name", FORMS)
def test_captures_without_a_call_before(name: str, backend: str) -> None:
    """Only the kernel has been compiled, with other rows; the graph holds all it reads."""
    case = CASES[name]
    inputs = make(case, "cuda")
    arguments = inputs.arguments(case) | {"backend": backend}
    mutual_attention(inputs.q, inputs.k, inputs.v, **arguments)
    arguments["kv_index"] = FRESH_ROWS
    graph, out = captured(inputs, arguments)
    for row in range(300):  # whatever a cache of rows might hold is gone after these
        mutual_attention(inputs.q, inputs.k, inputs.v, **arguments | {"kv_index": (row % 4, row // 4 % 4, 0, 0)})
    inputs.q.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(out, mutual_attention(inputs.q, inputs.k, inputs.v, **arguments))


def test_captures_more_rows_than_one_argument_holds() -> None:
    case = Case("many", rows=(0, 1) * 10, own=(-1, 1) * 10, queries=64, keys=64, heads=2)
    inputs = make(case, "cuda")
    arguments = inputs.arguments(case) | {"backend": "triton"}
    expected = mutual_attention(inputs.q, inputs.k, inputs.v, **arguments)
    graph, out = captured(inputs, arguments)
    graph.replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "heads"])
def test_offsets_beyond_32_bits(dimension: int) -> None:
    q, k = far_apart(dimension, "cuda")
    out = mutual_attention(q, k, k, kv_index=(1, 1), backend="triton")
    expected = mutual_attention(q, k.contiguous(), k.contiguous(), kv_index=(1, 1), backend="reference")
    torch.testing.assert_close(out, expected)
    out, _ = cross_attention_with_maps(q, k, k, torch.ones(1, 16, device="cuda"), backend="triton")
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, k))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["plain-1024x80-fp16", "soft-1024x80-fp16", "union-1024x80-fp16"])
def test_compiles_without_graph_breaks(name: str, mode: str) -> None:
    case = CASES[name]
    inputs = make(case, "cuda")
    arguments = inputs.arguments(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: mutual_attention(q, k, v, **arguments), fullgraph=True, mode=mode)
    for _ in range(4):  # the first calls warm up and record, later ones replay
        inputs.q.mul_(0.9)
        expected = mutual_attention(inputs.q, inputs.k, inputs.v, **arguments)
        torch.testing.assert_close(compiled(inputs.q, inputs.k, inputs.v), expected)


def test_gradients_are_those_of_sdpa() -> None:
    case = CASES["masked-256x160-fp16"]
    grads = []
    for backend in ("triton", "sdpa"):
        inputs = make(case, "cuda")
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = mutual_attention(inputs.q, inputs.k, inputs.v, **inputs.arguments(case), backend=backend)
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    # Gradients are far below any fixed tolerance: compare relative norms.
    for ours, theirs in zip(*grads, strict=True):
        assert error(ours, theirs) < 2e-2
