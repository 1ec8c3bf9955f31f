"""Cross-attention with token maps on the CPU: values, the operator, gradients, compilation, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DTYPES, MAP_CASES, error, make_maps

from masa.kernels.cross_attention_maps import cross_attention_with_maps

CASES = {case.name: case for case in MAP_CASES}
TENSORS = make_maps(CASES["maps-40-fp32"])
ROUNDING = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_float64_answer(name: str) -> None:
    q, k, v, weights = (x.double() for x in make_maps(CASES[name]))
    out, maps = cross_attention_with_maps(q, k, v, weights, backend="reference")
    for row in range(2):
        probabilities = (q[row] @ k[row].mT * q.shape[-1] ** -0.5).softmax(-1)
        expected = probabilities.mean(0) @ (weights[row] if weights.dim() == 3 else weights).mT
        torch.testing.assert_close(out[row], probabilities @ v[row])
        torch.testing.assert_close(maps[row], expected.mT)


@pytest.mark.parametrize("name", CASES)
def test_sdpa_is_as_exact_as_torch(name: str) -> None:
    case = CASES[name]
    q, k, v, weights = make_maps(case)
    out, maps = cross_attention_with_maps(q, k, v, weights)
    wide = [x.double() for x in (q, k, v, weights)]
    true_out, true_maps = cross_attention_with_maps(*wide, backend="reference")
    assert out.dtype == DTYPES[case.dtype]
    assert maps.dtype == torch.float32
    assert error(out, true_out) <= 2 * error(F.scaled_dot_product_attention(q, k, v), true_out)
    assert error(maps, true_maps) <= ROUNDING[case.dtype]


def test_all_tokens_together_get_all_the_attention() -> None:
    q, k, v, _ = TENSORS
    _, maps = cross_attention_with_maps(q, k, v, torch.ones(1, k.shape[2]))
    torch.testing.assert_close(maps, torch.ones_like(maps))


def test_many_maps_at_once() -> None:
    q, k, v, _ = TENSORS
    _, maps = cross_attention_with_maps(q, k, v, torch.eye(k.shape[2]))
    torch.testing.assert_close(maps.sum(1), torch.ones(q.shape[0], q.shape[2]))


def test_scale_is_on_the_logits() -> None:
    q, k, v, weights = TENSORS
    out, maps = cross_attention_with_maps(q, k, v, weights, scale=0.5)
    expected = cross_attention_with_maps(q * 0.5 * 40**0.5, k, v, weights, backend="reference")
    torch.testing.assert_close((out, maps), expected)


@pytest.mark.parametrize("batched", [False, True])
def test_operator_is_well_formed(batched: bool) -> None:
    q, k, v, weights = TENSORS
    weights = weights.expand(2, -1, -1) if batched else weights
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.masa.cross_attention_with_maps, (*leaves, weights, 0.2, "sdpa"))


@pytest.mark.parametrize("scale", [40**-0.5, 0.3])
def test_gradients_flow_through_both_results(scale: float) -> None:
    grads = []
    for backend in ("sdpa", "reference", "operator"):
        q, k, v, weights = (x.clone() for x in TENSORS)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if backend == "operator":
            out, maps = torch.ops.masa.cross_attention_with_maps(q, k, v, weights, scale, "sdpa")
        else:
            out, maps = cross_attention_with_maps(q, k, v, weights, scale=scale, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum() + maps.square().sum(), leaves))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention_with_maps, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*TENSORS), cross_attention_with_maps(*TENSORS))


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.zeros(2, 5, 8), "split the heads"),
        (1, torch.zeros(2, 2, 77, 48), "expected"),
        (1, TENSORS[1][:1], "expected"),
        (2, TENSORS[2].half(), "convert"),
        (3, torch.zeros(3, 76), "one weight per key"),
        (3, torch.zeros(3, 1, 77), "one weight per key"),
        (3, torch.zeros(77), "one weight per key"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(place: int, tensor: torch.Tensor, message: str) -> None:
    given = list(TENSORS)
    given[place] = tensor
    with pytest.raises(ValueError, match=message):
        cross_attention_with_maps(*given)


def test_triton_asked_for_by_name_does_not_fall_back() -> None:
    q = torch.zeros(1, 1, 5, 8)
    with pytest.raises(RuntimeError, match="33 sets"):
        cross_attention_with_maps(q, q, q, torch.ones(33, 5), backend="triton")
    with pytest.raises(RuntimeError, match=r"(?i)cuda|triton is not installed"):
        cross_attention_with_maps(q, q, q, torch.ones(1, 5), backend="triton")
