"""Mutual attention on the CPU: SDPA and reference paths, mask plans, the operator, gradients, compilation, errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Case, error, exact, interpreter_cases, low_precision, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from masa.kernels import launch, reference
from masa.kernels.launch import dot_precision, split_width, unserved
from masa.kernels.mutual_attention import MaskPlan, mutual_attention
from masa.kernels.rows import NO_ROW, fill_runs, packed, pick_rows, put_rows, row_tensor

CASES = {case.name: case for case in interpreter_cases()}
FORMS = {
    "plain": Case("plain", dtype="fp32", rows=(0, 0, 2, 2), sources=3, queries=33, keys=40, heads=2, width=16),
    "masked": Case("masked", dtype="fp32", rows=(0, 1, 1), queries=33, keys=40, width=16, region="mixed", full=(0,)),
    "soft": Case("soft", dtype="fp32", rows=(0, 1), queries=33, keys=40, width=16, region="mixed", weight="soft"),
    "union": Case("union", dtype="fp32", rows=(0, 0, 1), own=(-1, 1, 0), source_weight=2.0, width=16, keys=24),
    "masked-union": Case(
        "mu", dtype="fp32", rows=(0, 1), own=(-1, 0), own_keys=9, region="mixed", source_weight=0.3, width=16
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_path_is_as_exact_as_torch(name: str) -> None:
    """The reference path is the float64 answer, and the others err not much more than torch, one row at a time, does.

    At most twice as much on the CPU; three times in label columns, which serve GPUs without Triton and the backward.
    """
    case = CASES[name]
    inputs = make(case)
    arguments = inputs.arguments(case)
    truth = exact(case, inputs)
    wide = replace(
        inputs, **{key: x.double() for key in ("q", "k", "v", "k2", "v2") if (x := getattr(inputs, key)) is not None}
    )
    out = mutual_attention(wide.q, wide.k, wide.v, **wide.arguments(case), backend="reference")
    assert error(out, truth) < 1e-14

    own = error(low_precision(case, inputs), truth)
    out = mutual_attention(inputs.q, inputs.k, inputs.v, **arguments, backend="sdpa")
    assert out.dtype == inputs.q.dtype
    assert error(out, truth) <= 2 * own

    rows = torch.tensor(case.rows, dtype=torch.int32)
    rows2 = None if case.own is None else torch.tensor(case.own, dtype=torch.int32)
    out = reference.mutual_attention_sdpa(
        *(inputs.q, inputs.k, inputs.v, rows, inputs.k2, inputs.v2, rows2, arguments.get("plan")),
        *(case.scale, case.source_weight),
    )
    # A bias goes through the mask argument in q's dtype here, which costs half-precision dtypes some accuracy.
    assert error(out, truth) <= 3 * own


@pytest.mark.parametrize("name", FORMS)
def test_a_tensor_of_rows_means_the_same_as_a_tuple(name: str) -> None:
    case = FORMS[name]
    inputs = make(case)
    arguments = inputs.arguments(case)
    expected = mutual_attention(inputs.q, inputs.k, inputs.v, **arguments)
    for key in ("kv_index", "kv_index2"):
        if arguments[key] is not None:
            arguments[key] = torch.tensor(arguments[key], dtype=torch.int32)
    torch.testing.assert_close(mutual_attention(inputs.q, inputs.k, inputs.v, **arguments), expected)


@pytest.mark.parametrize("rows", ["0022", "0011", "1111", "0123", "3210", "0023", "0002", "1232"])
def test_rows_of_any_pattern(rows: str) -> None:
    case = Case("rows", dtype="fp32", rows=tuple(map(int, rows)), sources=4, queries=20, keys=30, heads=2)
    for layout in ("bnhd", "bhnd"):
        inputs = make(replace(case, layout=layout))
        out = mutual_attention(inputs.q, inputs.k, inputs.v, kv_index=case.rows)
        torch.testing.assert_close(out, exact(case, inputs).float())


@pytest.mark.parametrize("rows", [(0, 0, 2, 2), (1, 1, 1, 1), (0, 1, 2, 3), (0, 0, 0, 0)])
def test_masactrl_rows_copy_nothing(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(Case("views", dtype="fp32", rows=rows, sources=4, heads=2))
    seen: list[torch.Tensor] = []
    sdpa = F.scaled_dot_product_attention

    def record(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.extend(tensors)
        return sdpa(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    mutual_attention(inputs.q, inputs.k, inputs.v, kv_index=rows, backend="sdpa")
    storages = [x.untyped_storage().data_ptr() for x in (inputs.q, inputs.k, inputs.v)]
    assert [x.untyped_storage().data_ptr() for x in seen] == storages


def test_joining_heads_of_the_result_is_a_view() -> None:
    for case in FORMS.values():
        inputs = make(case)
        out = mutual_attention(inputs.q, inputs.k, inputs.v, **inputs.arguments(case), backend="sdpa")
        out.transpose(1, 2).view(out.shape[0], out.shape[2], -1)


# ---------------------------------------------------------------------------------- what the arguments mean


def test_source_weight_counts_source_keys_repeatedly() -> None:
    """Weight 3 on the source is the source three times in the union."""
    inputs = make(Case("weight", dtype="fp32"))
    out = mutual_attention(inputs.q, inputs.k, inputs.v, kv_index=(0, 0), kv_index2=(1, 1), source_weight=3.0)
    keys = torch.cat([inputs.k[:1]] * 3 + [inputs.k[1:]], 2).expand(2, -1, -1, -1)
    values = torch.cat([inputs.v[:1]] * 3 + [inputs.v[1:]], 2).expand(2, -1, -1, -1)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(inputs.q, keys, values))


def test_full_rows_are_plain() -> None:
    inputs = make(Case("full", dtype="fp32", region="mixed", full=(1,)))
    plan = MaskPlan.build(inputs.region, inputs.weight, inputs.full)
    plain = mutual_attention(inputs.q, inputs.k, inputs.v, kv_index=(0, 0))
    masked = mutual_attention(inputs.q, inputs.k, inputs.v, kv_index=(0, 0), plan=plan)
    torch.testing.assert_close(masked[1], plain[1])
    assert (masked[0] - plain[0]).abs().max() > 0.1


def test_a_soft_weight_blends_the_two_regions() -> None:
    inputs = make(Case("blend", dtype="fp32", region="mixed"))
    answer = {
        weight: mutual_attention(
            *(inputs.q, inputs.k, inputs.v),
            kv_index=(0, 1),
            plan=MaskPlan.build(inputs.region, torch.full_like(inputs.weight, weight)),
        )
        for weight in (0.0, 0.25, 1.0)
    }
    torch.testing.assert_close(answer[0.25], 0.25 * answer[1.0] + 0.75 * answer[0.0])


def test_scale_is_on_the_logits() -> None:
    inputs = make(Case("scale", dtype="fp32"))
    out = mutual_attention(inputs.q, inputs.k, inputs.v, kv_index=(0, 1), scale=0.5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, scale=0.5))


# ----------------------------------------------------------------------------------------------- mask plans


def test_plan_orders_are_stable_sorts() -> None:
    region = torch.rand(3, 57) < 0.3
    weight = torch.rand(4, 31).mul(2).sub(0.5).clamp(0, 1)
    full = torch.tensor([False, True, False, False])
    plan = MaskPlan.build(region, weight, full)
    rank = torch.where(weight == 1, 0, torch.where(weight == 0, 2, 1)).masked_fill(full[:, None], 0)
    assert torch.equal(plan.key_order.long(), torch.argsort((~region).int(), dim=1, stable=True))
    assert torch.equal(plan.query_order.long(), torch.argsort(rank, dim=1, stable=True))
    assert plan.key_count.tolist() == region.sum(1).tolist()
    assert plan.key_order.dtype == plan.key_count.dtype == plan.query_order.dtype == torch.int32


def test_plan_knows_binary_weights() -> None:
    region = torch.rand(1, 8) < 0.5
    assert MaskPlan.build(region, torch.rand(1, 4) < 0.5).binary
    assert MaskPlan.build(region, torch.tensor([[0.0, 1.0]])).binary
    assert not MaskPlan.build(region, torch.tensor([[0.0, 0.5]])).binary


def test_plan_keeps_weights_between_0_and_1() -> None:
    plan = MaskPlan.build(torch.rand(1, 8) < 0.5, torch.tensor([[-0.5, 0.25, 1.5, 1.0]]))
    assert plan.query_weight.tolist() == [[0.0, 0.25, 1.0, 1.0]]
    assert plan.query_order.tolist() == [[2, 3, 1, 0]]
    assert MaskPlan.build(torch.rand(1, 8) < 0.5, torch.tensor([[-2.0, 3.0]])).binary


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blending_rounds_once(dtype: torch.dtype) -> None:
    """Of two regions' answers in a narrow dtype: within half a unit in the last place of the exact blend."""
    generator = torch.Generator().manual_seed(0)
    foreground, background = (torch.randn(4096, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(4096, generator=generator)
    wide = background.double() + weight.double() * (foreground.double() - background.double())
    out = reference._blend(foreground, background, weight)
    assert out.dtype == dtype
    # 1e-7: what float32 adds before the one rounding.
    assert ((out.double() - wide).abs() <= torch.finfo(dtype).eps / 2 * wide.abs() + 1e-7).all()


def test_plan_tensors_are_contiguous_whatever_came_in() -> None:
    plan = MaskPlan.build((torch.rand(9, 2) < 0.5).T, torch.rand(7, 2).T, torch.zeros(1, dtype=torch.bool).expand(2))
    tensors = (plan.query_weight, plan.full_rows, plan.key_order, plan.key_count, plan.query_order)
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_plan_never_waits_for_the_device() -> None:
    """Fake tensors have no values: any host read of one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        plan = MaskPlan.build(
            torch.zeros(2, 16, dtype=torch.bool, device="meta"),
            torch.zeros(3, 9, device="meta"),
            torch.zeros(3, dtype=torch.bool, device="meta"),
        )
        assert plan.query_order.shape == (3, 9)


# ----------------------------------------------------------- operator, gradients, compilation, optional triton


def _operator_arguments(case: Case, as_tensor: bool) -> tuple[Any, ...]:
    """What `mutual_attention` hands to the operator."""
    from masa.kernels import mutual_attention as module

    inputs = make(case)
    given = inputs.arguments(case)
    index, index2 = given["kv_index"], given["kv_index2"]
    if as_tensor:
        index = torch.tensor(index, dtype=torch.int32)
        index2 = None if index2 is None else torch.tensor(index2, dtype=torch.int32)
    k2, v2 = inputs.k2, inputs.v2
    if index2 is not None and k2 is None:
        k2, v2 = inputs.k.clone(), inputs.v.clone()
    tensors = [None if x is None else x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, k2, v2)]
    plan = given.get("plan")
    return (
        *tensors,
        *module._split_index(index),
        *module._split_index(index2),
        *module._plan_tensors(plan),
        plan is not None and plan.binary,
        case.width**-0.5,
        case.source_weight,
        "sdpa",
    )


@pytest.mark.parametrize(("name", "as_tensor"), [("plain", False), ("soft", True), ("masked-union", False)])
def test_operator_is_well_formed(name: str, as_tensor: bool) -> None:
    torch.library.opcheck(torch.ops.masa.mutual_attention, _operator_arguments(FORMS[name], as_tensor))


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_the_reference_ones(name: str) -> None:
    case = FORMS[name]
    grads = []
    for backend in ("sdpa", "reference"):
        inputs = make(case)
        leaves = [x for x in (inputs.q, inputs.k, inputs.v, inputs.k2, inputs.v2) if x is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        out = mutual_attention(inputs.q, inputs.k, inputs.v, **inputs.arguments(case), backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "compiler"), [*((name, "aot_eager") for name in FORMS), ("plain", "eager"), ("masked", "eager")]
)
def test_compiles_without_graph_breaks(name: str, compiler: str) -> None:
    case = FORMS[name]
    inputs = make(case)
    arguments = inputs.arguments(case)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        return mutual_attention(q * 1.0, k, v, **arguments) + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    expected = call(inputs.q, inputs.k, inputs.v, arguments)
    torch.testing.assert_close(compiled(inputs.q, inputs.k, inputs.v, arguments), expected)
    for key in ("kv_index", "kv_index2"):
        if arguments[key] is not None:
            arguments[key] = torch.tensor(arguments[key], dtype=torch.int32)
    torch.testing.assert_close(compiled(inputs.q, inputs.k, inputs.v, arguments), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("option", "values"), [("source_weight", (1.5, 2.0, 1.0, 2.5)), ("scale", (0.5, 0.6, 0.7))])
def test_floats_that_change_between_calls_compile(option: str, values: tuple[float, ...], masked: bool) -> None:
    """A compiler makes such a float symbolic, and cannot trace every function of one."""
    inputs = make(FORMS["masked"])
    plan = MaskPlan.build(inputs.region, inputs.weight, inputs.full) if masked else None
    own = (0, 1, 1) if option == "source_weight" else None

    def call(q: torch.Tensor, value: float) -> torch.Tensor:
        return mutual_attention(q, inputs.k, inputs.v, kv_index=(0, 1, 1), kv_index2=own, plan=plan, **{option: value})

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for value in values:
        torch.testing.assert_close(compiled(inputs.q, value), call(inputs.q, value))


def test_a_plan_made_in_inference_mode_serves_training() -> None:
    inputs = make(FORMS["soft"])
    with torch.inference_mode():
        plan = MaskPlan.build(inputs.region.clone(), inputs.weight.clone(), inputs.full.clone())
    assert not any(x.is_inference() for x in vars(plan).values() if isinstance(x, torch.Tensor))
    mutual_attention(inputs.q.requires_grad_(), inputs.k, inputs.v, kv_index=(0, 1), plan=plan).sum().backward()


def test_building_a_plan_compiles() -> None:
    inputs = make(FORMS["soft"])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, region: torch.Tensor, weight: torch.Tensor):
        return mutual_attention(q, k, v, kv_index=(0, 1), plan=MaskPlan.build(region, weight))

    tensors = (inputs.q, inputs.k, inputs.v, inputs.region, inputs.weight)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))


def test_works_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from masa.kernels.cross_attention_maps import cross_attention_with_maps
from masa.kernels.mutual_attention import mutual_attention
q = torch.randn(2, 1, 8, 16)
mutual_attention(q, q, q, kv_index=(0, 0))
cross_attention_with_maps(q, q, q, torch.ones(1, 8))
try:
    mutual_attention(q, q, q, kv_index=(0, 0), backend="triton")
except RuntimeError as problem:
    print(problem)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "triton is not installed" in done.stdout


# ------------------------------------------------------------------------------------------------ rows, limits


@pytest.mark.parametrize("rows", [(0,), (-1, 3), (0, 0, 2, 2), (1, 3, 5), (14,) * 16, (-1,) * 16, (3, 1, 2)])
def test_rows_packed_in_an_integer(rows: tuple[int, ...]) -> None:
    value = packed(rows)
    assert value is not None
    assert -(1 << 63) <= value < 1 << 63
    fields = [value >> (4 * place) & NO_ROW for place in range(len(rows))]
    assert tuple(-1 if field == NO_ROW else field for field in fields) == rows


def test_rows_that_do_not_fit_an_integer() -> None:
    assert packed((0,) * 17) is None
    assert packed((15,)) is None
    assert packed(torch.tensor([0])) is None


@pytest.mark.parametrize("rows", [(0, 0, 2, 2), (1, 3), (3, 1, 2), (2, 2, 2), (0,)])
def test_host_rows_index_like_a_tensor(rows: tuple[int, ...]) -> None:
    x = torch.randn(4, 3)
    index = row_tensor(rows, x.device)
    assert torch.equal(fill_runs(torch.zeros_like(index), rows), index)
    assert torch.equal(pick_rows(x, rows), x[index])
    if len(set(rows)) == len(rows):
        target = torch.zeros_like(x)
        put_rows(target, rows, x[index])
        assert torch.equal(target[index], x[index])


def test_host_rows_reach_a_device_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host waits for the device, and cannot be captured in a CUDA graph."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(operation._overloadpacket)
            return operation(*args, **(kwargs or {}))

    q = torch.zeros(4, 2, 16, 8, device="meta")
    plan = MaskPlan.build(q[:, 0, :, 0] > 0, q[:, 0, :, 0] > 0)
    monkeypatch.setattr(torch, "tensor", None)
    with Watch():
        for rows in ((0, 0, 2, 2), (3, 1, 2, 2)):
            for own in (None, (-1, 1, -1, 3), (2, 1, 1, 0)):
                for masks in (None, plan):
                    mutual_attention(q, q, q, kv_index=rows, kv_index2=own, plan=masks)
    # Indexing by a list would come out as one of these.
    assert not {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_} & set(seen)


@pytest.mark.parametrize(
    ("q", "programs", "message"),
    [
        (torch.empty(1, 1, 4, 8), 65536, "split the batch"),
        (torch.empty(1).expand(1, 1, 2, 8), 1, "head width"),
        (torch.empty(1, 1, 2, 8, device="meta").as_strided((1, 1, 3, 8), (8, 8, 2**30, 1)), 1, "2\\*\\*31"),
        (torch.empty(1, 8, 2**26, 8, device="meta"), 8, "2\\*\\*31"),
    ],
    ids=["grid", "stride", "far tokens", "many tokens"],
)
def test_what_triton_does_not_serve(q: torch.Tensor, programs: int, message: str) -> None:
    assert re.search(message, unserved({"q": q}, programs) or "served")


@pytest.mark.parametrize(
    ("release", "capability", "expected"),
    [
        ("3.2.0", (9, 0), "sdpa"),
        ("3.3.1", (9, 0), "sdpa"),
        ("3.4.0", (9, 0), "triton"),
        ("3.10.0+git1234", (9, 0), "triton"),
        ("3.2.0", (8, 0), "triton"),
        ("3.2.0", (8, 9), "triton"),
    ],
)
def test_auto_leaves_serialised_warpgroups_to_sdpa(
    release: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only "auto" does: Triton that is asked for by name serves there too."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=release))
    monkeypatch.setattr(launch, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q: Any = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda", 0))
    assert launch.choose_backend("auto", q, None) == expected
    assert launch.choose_backend("triton", q, None) == "triton"


def test_amd_multiplies_without_tf32() -> None:
    """Triton offers TF32 on one AMD architecture only, and refuses the word for any dtype on others."""
    assert {dot_precision(dtype, "gfx942") for dtype in (torch.float16, torch.bfloat16, torch.float32)} == {"ieee"}
    assert dot_precision(torch.float32, "sm_90") == "tf32x3"


# --------------------------------------------------------------------------------------------------- errors


def test_split_width_covers_every_served_head() -> None:
    expected = {8: (16, 0), 40: (32, 16), 64: (64, 0), 80: (64, 16), 104: (128, 0), 160: (128, 32), 256: (256, 0)}
    assert {width: split_width(width) for width in expected} == expected
    assert all(width <= sum(split_width(width)) <= max(16, 1.5 * width) for width in range(8, 257, 8))


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


PLAN = MaskPlan.build(torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": _zeros(2, 5, 8)}, "split the heads"),
        ({"k": _zeros(2, 1, 7, 16)}, "head width must agree"),
        ({"v": _zeros(2, 1, 6, 8)}, "they must agree"),
        ({"v": _zeros(2, 1, 7, 8).half()}, "convert one of them"),
        ({"kv_index": (0,)}, "q has 2"),
        ({"kv_index": (0, 2)}, r"\[0, 2\)"),
        ({"kv_index": torch.tensor([0, 2])}, r"\[0, 2\)"),
        ({"kv_index": torch.tensor([0.0, 1.0])}, "int32"),
        ({"kv_index2": (0, -2)}, r"\[-1, 2\)"),
        ({"k2": _zeros(2, 1, 7, 8), "kv_index2": (0, 0)}, "k2 and v2 together"),
        ({"k2": _zeros(2, 1, 7, 8), "v2": _zeros(2, 1, 7, 8)}, "without kv_index2"),
        ({"source_weight": 2.0}, "pass kv_index2"),
        ({"source_weight": 0.0, "kv_index2": (0, 0)}, "positive"),
        ({"scale": 0.0}, "positive"),
        ({"plan": PLAN, "k": _zeros(2, 1, 6, 8), "v": _zeros(2, 1, 6, 8)}, "key_region"),
        ({"plan": PLAN, "q": _zeros(2, 1, 6, 8)}, "query_weight"),
        ({"backend": "flash"}, "expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"q": _zeros(2, 1, 5, 8), "k": _zeros(2, 1, 7, 8), "v": _zeros(2, 1, 7, 8), "kv_index": (0, 1)} | changes
    with pytest.raises(ValueError, match=message):
        mutual_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (_zeros(1, 1, 5, 8), "cuda|triton is not installed"),
        (_zeros(1, 1, 5, 8).double(), "float64"),
        (_zeros(1, 1, 5, 12), "head width 12"),
        (_zeros(1, 1, 5, 264), "head width 264"),
        (_zeros(1, 1, 8, 5).mT, "contiguous"),
    ],
    ids=["cpu", "float64", "odd-width", "too-wide", "strided-width"],
)
def test_triton_asked_for_by_name_does_not_fall_back(q: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?i)'triton' cannot serve.*({message})"):
        mutual_attention(q, q, q, kv_index=(0,), backend="triton")
    assert mutual_attention(q, q, q, kv_index=(0,), backend="auto").shape == q.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_region": _zeros(2, 7)}, "threshold"),
        ({"query_weight": torch.zeros(2, 5, dtype=torch.int64)}, "float or bool"),
        ({"full_rows": torch.zeros(3, dtype=torch.bool)}, "one value per row"),
        ({"full_rows": _zeros(2)}, "bool tensor"),
        ({"full_rows": torch.zeros(2, dtype=torch.bool, device="meta")}, "one device"),
    ],
)
def test_plans_that_do_not_fit_are_refused(changes: dict[str, torch.Tensor], message: str) -> None:
    given = {"key_region": torch.zeros(2, 7, dtype=torch.bool), "query_weight": _zeros(2, 5)} | changes
    with pytest.raises(ValueError, match=message):
        MaskPlan.build(**given)
