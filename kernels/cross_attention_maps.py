"""Cross-attention that also returns where the wanted tokens look: head-mean probability maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from masa.kernels import launch, reference
from masa.kernels.launch import Backend
from masa.kernels.tiles import lookup

__all__ = ["cross_attention_with_maps"]

# The token sets of one launch sit side by side in registers: more than these would spill.
MAX_MAPS = 32


def cross_attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_weights: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-attention and, for each of T token sets, the map of the attention it receives.

    q (B, H, Nq, D); k, v (B, H, Nk, D), any strides, unit stride over D for Triton. token_weights (T, Nk), or
    (B, T, Nk) when rows differ: how much each token counts in each map, 1 for a wanted token and 0 for others.
    Returns out (B, H, Nq, D) and maps (B, T, Nq) float32 (float64 for float64 inputs),
    maps[b, t, n] = mean over heads of sum_j probability[b, h, n, j] * token_weights[.., t, j].

    scale: on the logits, > 0, 1/sqrt(D) by default. backend: "triton" (CUDA; float16, bfloat16, float32; D a
    multiple of 8 up to 256; T up to 32), "sdpa", "reference", or "auto": Triton for 16-bit dtypes where it
    serves, else SDPA. Neither of the first two holds the probabilities in memory; both round them to q's dtype
    before they add them up in float32. Differentiable with respect to q, k and v through both results; backward
    recomputes through SDPA. Raises ValueError for arguments that do not fit, RuntimeError for a backend asked
    for by name that cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q, k, v, token_weights, scale)
    why_not = launch.unserved({"q": q, "k": k, "v": v}, q.shape[0])
    if why_not is None and token_weights.shape[-2] > MAX_MAPS:
        why_not = f"token_weights has {token_weights.shape[-2]} sets, served are up to {MAX_MAPS}: use several calls"
    chosen = launch.choose_backend(backend, q, why_not)
    if chosen == "reference":
        return reference.cross_attention_with_maps_reference(q, k, v, token_weights, scale)
    if chosen == "sdpa":
        return reference.cross_attention_with_maps_sdpa(q, k, v, token_weights, scale)
    return torch.ops.masa.cross_attention_with_maps(q, k, v, token_weights, scale, chosen)


# --------------------------------------------------------------------------------------------------- operator


@torch.library.custom_op(
    "masa::cross_attention_with_maps",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor q, Tensor k, Tensor v, Tensor token_weights, float scale, str backend) -> (Tensor, Tensor)",
)
def _cross_attention_with_maps(
    q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _launch(q, k, v, token_weights, scale)


@_cross_attention_with_maps.register_kernel("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":  # Triton's interpreter
        return _launch(q, k, v, token_weights, scale)
    out, maps = reference.cross_attention_with_maps_sdpa(q, k, v, token_weights, scale)
    return reference.empty_token_major(q).copy_(out), maps.contiguous()


@_cross_attention_with_maps.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    maps = q.new_empty(q.shape[0], token_weights.shape[-2], q.shape[2], dtype=wide)
    return reference.empty_token_major(q), maps


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.scale = inputs[4]


def _backward(ctx: Any, grad_out: Tensor, grad_maps: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and v by running the SDPA path again."""
    token_weights = ctx.saved_tensors[3]
    wanted = [place for place in range(3) if ctx.needs_input_grad[place]]
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_(place in wanted) for place, x in enumerate(ctx.saved_tensors[:3]))
        results = reference.cross_attention_with_maps_sdpa(q, k, v, token_weights, ctx.scale)
        leaves = [(q, k, v)[place] for place in wanted]
        found = torch.autograd.grad(results, leaves, (grad_out, grad_maps), allow_unused=True)
    grads: list[Tensor | None] = [None] * 6
    for place, value in zip(wanted, found, strict=True):
        grads[place] = value
    return tuple(grads)


_cross_attention_with_maps.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------------- Triton launch and checks


def _launch(q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from masa.kernels.device import cross_attention_maps_kernel

    batch, heads, queries, width = q.shape
    count, keys = token_weights.shape[-2:]
    weights = token_weights.float().contiguous()
    out = reference.empty_token_major(q)
    maps = torch.empty(batch, count, queries, dtype=torch.float32, device=q.device)
    split = launch.split_width(width)
    unit = launch.stride_unit(q, k, v, out)
    arch = launch.architecture(q.device)
    tile = lookup(arch, "maps", q.element_size(), width)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        cross_attention_maps_kernel[(-(-queries // tile.block_m), batch)](
            *(q, k, v, out, weights, maps, scale * launch.LOG2_E, heads, queries, keys, count),
            count * keys if weights.dim() == 3 else 0,
            *(stride for tensor in (q, k, v, out) for stride in launch.strides(tensor, unit)),
            D=width,
            D0=split[0],
            D1=split[1],
            M=tile.block_m,
            N=tile.block_n,
            T=max(16, 1 << (count - 1).bit_length()),
            UNIT=unit,
            WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda,
            PRECISION=launch.dot_precision(q.dtype, arch, interpreted=not q.is_cuda),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return out, maps


def _check(q: Tensor, k: Tensor, v: Tensor, token_weights: Tensor, scale: float) -> None:
    if q.dim() != 4 or min(q.shape) < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, H, Nq, D): split the heads first")
    batch, heads, _, width = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor.shape != (batch, heads, k.shape[2], width) or tensor.shape[2] < 1:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected ({batch}, {heads}, Nk, {width}) to go with q "
                f"{tuple(q.shape)} and k {tuple(k.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q {q.dtype} on {q.device}: convert one of them"
            )
    if (
        token_weights.dim() < 2
        or token_weights.shape[-1] != k.shape[2]
        or token_weights.shape[:-2] not in ((), (batch,))
    ):
        raise ValueError(
            f"token_weights has shape {tuple(token_weights.shape)}, expected (T, {k.shape[2]}) or "
            f"({batch}, T, {k.shape[2]}): one weight per key"
        )
    if token_weights.device != q.device:
        raise ValueError(f"token_weights is on {token_weights.device}, q on {q.device}: move it there")
    if not 0 < scale < math.inf:  # a comparison, because torch.compile may trace a changing float
        raise ValueError(f"scale is {scale}, expected a positive number: 1/sqrt(D) is {q.shape[-1] ** -0.5:.4g}")
