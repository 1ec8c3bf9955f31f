"""Mutual self-attention: every row's queries against the keys and values of a source row.

    out[b] = softmax(scale * q[b] k[kv_index[b]]^T) v[kv_index[b]]

plain, restricted by region masks (`MaskPlan`), or over the union of the source's keys and the row's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from masa.kernels import launch, reference
from masa.kernels.launch import Backend
from masa.kernels.mask_plan import MaskPlan
from masa.kernels.rows import RowIndex, packed, row_tensor
from masa.kernels.tiles import lookup

__all__ = ["MaskPlan", "mutual_attention"]

# Names in the tile tables, by (masked, union).
FORMS = {(False, False): "plain", (True, False): "masked", (False, True): "union", (True, True): "masked_union"}


def mutual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_index: RowIndex,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    kv_index2: RowIndex | None = None,
    plan: MaskPlan | None = None,
    scale: float | None = None,
    source_weight: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of every row's queries to a source row's keys and values; returns (B, H, Nq, D) like q.

    q (B, H, Nq, D); k, v (S, H, Nk, D), any strides, unit stride over D for Triton. kv_index: for each row the
    source it reads, in [0, S), a tuple of ints or an int32 tensor (B,) (values on a GPU are not checked). A tuple
    lets the SDPA path use views; up to 16 rows of 15 sources reach a Triton kernel in one of its arguments, more
    of them take a fill for every run of equal rows. scale: on the logits, > 0, 1/sqrt(D) by default.

    Union: with kv_index2, row b also attends to row kv_index2[b] of k2, v2 (S2, H, Nk2, D), by default of k, v;
    -1 means no second segment. source_weight > 0 multiplies the source's unnormalised probabilities (log
    source_weight on its logits); it needs kv_index2.

    Masked: with plan, out = w Attn(foreground keys) + (1 - w) Attn(background keys), w being the plan's query
    weight; if one region of a source is empty, its queries see all the source's keys; the plan's full rows see
    all keys. In a masked union the mask is on the source's keys, the row's own keys are visible to all.

    backend: "triton" (CUDA; float16, bfloat16, float32; D a multiple of 8 up to 256), "sdpa", "reference", or
    "auto": Triton for 16-bit dtypes where it serves, else SDPA. Accumulates and normalises in float32.
    Differentiable with respect to q, k, v, k2, v2; backward recomputes through SDPA. Raises ValueError for
    arguments that do not fit, RuntimeError for a backend asked for by name that cannot serve. MasaCtrl eq. 5 and
    section 3.3.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if (k2 is None) != (v2 is None):
        raise ValueError(f"only {'v2' if k2 is None else 'k2'} is given: pass k2 and v2 together")
    if kv_index2 is not None and (k2 is None or v2 is None):
        k2, v2 = k, v
    _check(q, k, v, kv_index, k2, v2, kv_index2, plan, scale, source_weight)
    tensors = {"q": q, "k": k, "v": v}
    if k2 is not None and v2 is not None:
        tensors["k2"], tensors["v2"] = k2, v2
    chosen = launch.choose_backend(backend, q, launch.unserved(tensors, q.shape[0] * q.shape[1]))

    if chosen == "reference":
        return reference.mutual_attention_reference(q, k, v, kv_index, k2, v2, kv_index2, plan, scale, source_weight)
    if chosen == "sdpa" and (plan is None or q.device.type != "cpu"):
        index, index2 = _host_rows(kv_index), None if kv_index2 is None else _host_rows(kv_index2)
        return reference.mutual_attention_sdpa(q, k, v, index, k2, v2, index2, plan, scale, source_weight)
    # An operator, because Triton launches and the CPU's partition read values that a compiler cannot trace.
    return torch.ops.masa.mutual_attention(
        *(q, k, v, k2, v2),
        *_split_index(kv_index),
        *_split_index(kv_index2),
        *_plan_tensors(plan),
        plan is not None and plan.binary,
        scale,
        source_weight,
        chosen,
    )


def mutual_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, kv_index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Plain mutual attention by the Triton kernel, with each query's log-sum-exp (B, H, Nq), natural, float32.

    Arguments as in `mutual_attention`, at the scale 1/sqrt(D); no gradient. Answers over parts of the keys merge by it.
    """
    _check(q, k, v, kv_index, None, None, None, None, q.shape[-1] ** -0.5, 1.0)
    return torch.ops.masa.mutual_attention_with_lse(q, k, v, list(kv_index))


@torch.library.custom_op(
    "masa::mutual_attention_with_lse",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int[] kv_rows) -> (Tensor, Tensor)",
)
def _mutual_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, kv_rows: list[int]) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    out = _launch(q, k, v, None, None, tuple(kv_rows), None, None, q.shape[-1] ** -0.5, 1.0, lse)
    return out, lse


@_mutual_attention_with_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kv_rows: list[int]) -> tuple[Tensor, Tensor]:
    return reference.empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


# --------------------------------------------------------------------------------------------------- operator


# A row index is one of two arguments, a tensor or host ints; a plan is its six tensors and `binary`.
@torch.library.custom_op(
    "masa::mutual_attention",
    mutates_args=(),
    device_types="cuda",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? k2, Tensor? v2, Tensor? kv_index, int[]? kv_rows, "
        "Tensor? kv_index2, int[]? kv_rows2, Tensor? key_region, Tensor? query_weight, Tensor? full_rows, "
        "Tensor? key_order, Tensor? key_count, Tensor? query_order, bool binary, float scale, "
        "float source_weight, str backend) -> Tensor"
    ),
)
def _mutual_attention(*args: Any) -> Tensor:
    q, k, v, k2, v2, index, index2, plan, scale, source_weight, _ = _join(args)
    return _launch(q, k, v, k2, v2, index, index2, plan, scale, source_weight)


@_mutual_attention.register_kernel("cpu")
def _(*args: Any) -> Tensor:
    q, k, v, k2, v2, index, index2, plan, scale, source_weight, backend = _join(args)
    if backend == "triton":  # Triton's interpreter
        return _launch(q, k, v, k2, v2, index, index2, plan, scale, source_weight)
    rows = index if isinstance(index, tuple) else tuple(index.tolist())
    rows2 = tuple(index2.tolist()) if isinstance(index2, Tensor) else index2
    if plan is None:
        out = reference.mutual_attention_sdpa(q, k, v, rows, k2, v2, rows2, None, scale, source_weight)
        return reference.empty_token_major(q).copy_(out)
    return reference.mutual_attention_partitioned(q, k, v, rows, k2, v2, rows2, plan, scale, source_weight)


@_mutual_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return reference.empty_token_major(q)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, k2, v2 by running the SDPA path again."""
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if other is None else other[0] for other in ctx.others]
    wanted = [place for place in range(5) if ctx.needs_input_grad[place]]
    with torch.enable_grad():
        for place in range(5):
            if inputs[place] is not None:
                inputs[place] = inputs[place].detach().requires_grad_(place in wanted)
        q, k, v, k2, v2, index, index2, plan, scale, source_weight, _ = _join(inputs)
        out = reference.mutual_attention_sdpa(q, k, v, index, k2, v2, index2, plan, scale, source_weight)
        found = torch.autograd.grad(out, [inputs[place] for place in wanted], grad, allow_unused=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for place, value in zip(wanted, found, strict=True):
        grads[place] = value
    return tuple(grads)


_mutual_attention.register_autograd(_backward, setup_context=_setup_context)


def _split_index(rows: RowIndex | None) -> tuple[Tensor | None, list[int] | None]:
    """A row index as the operator's two arguments."""
    return (rows, None) if isinstance(rows, Tensor) else (None, None if rows is None else list(rows))


def _plan_tensors(plan: MaskPlan | None) -> tuple[Tensor | None, ...]:
    if plan is None:
        return (None,) * 6
    return (
        *(plan.key_region, plan.query_weight, plan.full_rows),
        *(plan.key_order, plan.key_count, plan.query_order),
    )


def _join(args: Any) -> tuple[Any, ...]:
    """The operator's flat arguments as q, k, v, k2, v2, index, index2, plan, scale, source_weight, backend."""
    index, rows, index2, rows2 = args[5:9]
    plan = None if args[9] is None else MaskPlan(*args[9:16])
    index = tuple(rows) if index is None else index
    index2 = tuple(rows2) if index2 is None and rows2 is not None else index2
    return (*args[:5], index, index2, plan, *args[16:])


# ------------------------------------------------------------------------------------------------ Triton launch


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    index: RowIndex,
    index2: RowIndex | None,
    plan: MaskPlan | None,
    scale: float,
    source_weight: float,
    lse: Tensor | None = None,
) -> Tensor:
    from masa.kernels.device import mutual_attention_kernel

    batch, heads, queries, width = q.shape
    if k2 is None or v2 is None:
        k2, v2 = k, v
    rows, by_value = _kernel_rows(index, q.device)
    rows2, by_value2 = (None, 0) if index2 is None else _kernel_rows(index2, q.device)
    masks: tuple[Tensor | None, ...] = (None,) * 5
    if plan is not None:
        masks = (plan.key_order, plan.key_count, plan.query_order, plan.query_weight, plan.full_rows)
    out = reference.empty_token_major(q)
    split = launch.split_width(width)
    unit = launch.stride_unit(q, k, v, k2, v2, out)
    arch = launch.architecture(q.device)
    tile = lookup(arch, FORMS[plan is not None, index2 is not None], q.element_size(), width)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        mutual_attention_kernel[(-(-queries // tile.block_m), batch * heads)](
            *(q, k, v, k2, v2, out, lse, rows, rows2, *masks, by_value, by_value2),
            *(scale * launch.LOG2_E, math.log2(source_weight), heads, queries, k.shape[2], k2.shape[2]),
            *(stride for tensor in (q, k, v, k2, v2, out) for stride in launch.strides(tensor, unit)),
            D=width,
            D0=split[0],
            D1=split[1],
            M=tile.block_m,
            N=tile.block_n,
            UNIT=unit,
            MASKED=plan is not None,
            UNION=index2 is not None,
            EVEN=k.shape[2] % tile.block_n == 0 and k2.shape[2] % tile.block_n == 0,
            ONES=tile.ones_column and width < sum(split),
            WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda,
            PRECISION=launch.dot_precision(q.dtype, arch, interpreted=not q.is_cuda),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return out


def _kernel_rows(rows: RowIndex, device: torch.device) -> tuple[Tensor | None, int]:
    """Rows as the kernel takes them: by value (up to 16 rows of 15 sources), else as a tensor."""
    value = packed(rows)
    return (row_tensor(rows, device, torch.int32), 0) if value is None else (None, value)


# ------------------------------------------------------------------------------------------------------ checks


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: RowIndex,
    k2: Tensor | None,
    v2: Tensor | None,
    kv_index2: RowIndex | None,
    plan: MaskPlan | None,
    scale: float,
    source_weight: float,
) -> None:
    """Refuse arguments that do not fit together, without reading values from a device."""
    if q.dim() != 4 or min(q.shape) < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, H, Nq, D): split the heads first")
    _check_segment("k", "v", q, k, v)
    _check_rows("kv_index", kv_index, q, low=0, high=k.shape[0])
    if kv_index2 is None:
        if k2 is not None:
            raise ValueError("k2 and v2 are given without kv_index2: say which of their rows each row reads")
        if source_weight != 1.0:
            raise ValueError(
                f"source_weight is {source_weight} but there is no second segment to weigh against: pass kv_index2"
            )
    elif k2 is not None and v2 is not None:
        _check_segment("k2", "v2", q, k2, v2)
        _check_rows("kv_index2", kv_index2, q, low=-1, high=k2.shape[0])
    if not 0 < scale < math.inf:  # a comparison, because torch.compile may trace a changing float
        raise ValueError(f"scale is {scale}, expected a positive number: 1/sqrt(D) is {q.shape[-1] ** -0.5:.4g}")
    if not 0 < source_weight < math.inf:
        raise ValueError(
            f"source_weight is {source_weight}, expected a positive number: to leave the source out, point kv_index "
            "at the rows themselves and drop kv_index2"
        )
    if plan is not None:
        if plan.key_region.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"the plan's key_region is {tuple(plan.key_region.shape)}, k has (S, Nk) = "
                f"{(k.shape[0], k.shape[2])}: build the plan at this resolution, one region per source"
            )
        if plan.query_weight.shape != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"the plan's query_weight is {tuple(plan.query_weight.shape)}, q has (B, Nq) = "
                f"{(q.shape[0], q.shape[2])}: build the plan at this resolution, one weight row per row of q"
            )
        if plan.key_region.device != q.device:
            raise ValueError(f"the plan is on {plan.key_region.device}, q on {q.device}: build it there")


def _check_segment(k_name: str, v_name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.dim() != 4 or min(k.shape) < 1 or k.shape[1] != q.shape[1] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{k_name} has shape {tuple(k.shape)}, expected (S, {q.shape[1]}, Nk, {q.shape[3]}) to go with q "
            f"{tuple(q.shape)}: heads and head width must agree"
        )
    if v.shape != k.shape:
        raise ValueError(f"{v_name} has shape {tuple(v.shape)}, {k_name} {tuple(k.shape)}: they must agree")
    for name, tensor in ((k_name, k), (v_name, v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q {q.dtype} on {q.device}: convert one of them"
            )


def _check_rows(name: str, rows: RowIndex, q: Tensor, low: int, high: int) -> None:
    if isinstance(rows, Tensor):
        if rows.shape != q.shape[:1] or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} is {rows.dtype} {tuple(rows.shape)}, expected int32 ({q.shape[0]},), one row per row of q"
            )
        if rows.device != q.device:
            raise ValueError(f"{name} is on {rows.device}, q on {q.device}: move it, or pass a tuple of ints")
        if rows.device.type != "cpu" or torch.compiler.is_compiling():
            return
        rows = tuple(rows.tolist())
    if len(rows) != q.shape[0]:
        raise ValueError(f"{name} has {len(rows)} rows, q has {q.shape[0]}: pass one per row of q")
    if min(rows) < low or max(rows) >= high:
        raise ValueError(f"{name} is {rows}, but rows must lie in [{low}, {high})")


def _host_rows(rows: RowIndex) -> RowIndex:
    """Rows as a tuple where reading them waits for nothing."""
    readable = isinstance(rows, Tensor) and rows.device.type == "cpu" and not torch.compiler.is_compiling()
    return tuple(rows.tolist()) if isinstance(rows, Tensor) and readable else rows
