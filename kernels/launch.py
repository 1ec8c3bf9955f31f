"""What the kernels share on the host: is Triton there, which backend serves, head-width splits, tile sizes."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "sdpa", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

LOG2_E = 1.4426950408889634
MAX_HEAD_WIDTH = 256
MAX_PROGRAMS = 65535  # CUDA's limit on the second axis of a grid
MAX_SPAN = 2**31 - 1  # kernels count in 32 bits within a row and head
WARPGROUPS_SINCE = (3, 4)  # releases of Triton before serialise warpgroup products (ptxas C7515)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
SERVED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Strides(NamedTuple):
    """Strides over batch, head and token, in units of `unit` elements."""

    batch: int
    head: int
    token: int


def choose_backend(backend: str, q: Tensor, why_not: str | None) -> str:
    """Resolve "auto" and refuse what cannot serve.

    why_not: the reason why this call's arguments are not for Triton, None if they are. Raises ValueError for an
    unknown name, RuntimeError when "triton" was asked for and cannot serve.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        # Exact float32 products take three passes and many registers: SDPA does those better.
        wanted = q.is_cuda and q.dtype != torch.float32 and why_not is None
        return "triton" if wanted and triton_unavailable(q.device) is None and triton_is_fast(q.device) else "sdpa"
    if backend == "triton":
        reason = why_not or triton_unavailable(q.device)
        if reason is not None:
            raise RuntimeError(f"backend 'triton' cannot serve this call: {reason}, or pass backend='sdpa' or 'auto'")
    return backend


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device, with the remedy; None where they can."""
    if not TRITON_INSTALLED:
        return "triton is not installed: pip install triton (Linux)"
    if device.type != "cuda":
        return None if interpreted() else f"the tensors are on {device}: move them to a CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} has compute capability {major}.{minor}, 8.0 or newer is needed: use another GPU"
    return None


def triton_is_fast(device: torch.device) -> bool:
    """Whether "auto" takes Triton on this CUDA device, on which it can run.

    Not where an old Triton would serialise the warpgroup products of compute capability 9.x: SDPA does not.
    """
    warpgroups = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    return not warpgroups or triton_release() >= WARPGROUPS_SINCE


# What torch.compiler.assume_constant_result sets; calling that imports the whole compiler, seconds of every import.
triton_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
triton_is_fast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_release() -> tuple[int, int]:
    """Major and minor number of the Triton that is installed."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def interpreted() -> bool:
    """Whether the kernels were decorated for Triton's interpreter, which runs them on CPU tensors."""
    import triton

    from masa.kernels import device

    return not isinstance(device.mutual_attention_kernel, triton.runtime.JITFunction)


def unserved(tensors: dict[str, Tensor], programs: int) -> str | None:
    """Why the dtype, head width, layout or size of these tensors is not for Triton, with the remedy; None if it is.

    programs: how many rows, or rows times heads, the kernel spreads over the grid's second axis.
    """
    if programs > MAX_PROGRAMS:
        return f"{programs} rows and heads, served are up to {MAX_PROGRAMS}: split the batch"
    for name, tensor in tensors.items():
        if tensor.dtype not in SERVED_DTYPES:
            return f"{name} is {tensor.dtype}, served are float16, bfloat16 and float32: convert it"
        width = tensor.shape[-1]
        if width % 8 or not 8 <= width <= MAX_HEAD_WIDTH:
            return f"{name} has head width {width}, served are multiples of 8 up to {MAX_HEAD_WIDTH}: pad it"
        if tensor.stride(-1) != 1:
            return f"{name} has stride {tensor.stride(-1)} over the head width, 1 is needed: call .contiguous()"
        # The output's tokens are all heads wide.
        token = max(tensor.stride(2), tensor.shape[1] * width) if tensor.shape[2] > 1 else 0
        if tensor.shape[2] * token > MAX_SPAN:
            return f"{name} spreads {tensor.shape[2]} tokens over 2**31 elements or more: call .contiguous()"
    return None


def split_width(width: int) -> tuple[int, int]:
    """A head width as one or two powers of two, at least 16: 40 -> (32, 16), 80 -> (64, 16), 64 -> (64, 0).

    Padding 40, 80 and 160 to 64, 128 and 256 instead would spend up to 1.6 times the matrix work.
    """
    low = 1 << (width.bit_length() - 1)
    if width <= 16:
        return 16, 0
    if width == low:
        return low, 0
    rest = max(16, 1 << (width - low - 1).bit_length())
    return (low, rest) if rest < low else (2 * low, 0)


def stride_unit(*tensors: Tensor) -> int:
    """8 if every stride but the last is a multiple of 8 elements, else 1; dimensions of one entry do not count.

    Kernels multiply strides by this constant, which tells the compiler that rows start on 16-byte boundaries: a
    head stride of 40 elements alone would not, and loads would fall back to 2 bytes each.
    """
    return 1 if any(stride % 8 for tensor in tensors for stride in strides(tensor, 1)) else 8


def strides(tensor: Tensor, unit: int) -> Strides:
    """Strides of (B, H, N, D) over batch, head and token, in units; 0 over dimensions of one entry."""
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return Strides(*(stride // unit if size > 1 else 0 for size, stride in pairs))


@functools.cache
def architecture(device: torch.device) -> str:
    """Name of the tile table's section for a device: the closest architecture that has one."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter takes any
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] == 9:
        return "sm_90"
    if capability[0] == 10:
        return "sm_100"
    # 8.6, 8.9 and 12.x have 99 KB of shared memory per block, 8.0 and 8.7 have 163.
    return "sm_80" if capability in ((8, 0), (8, 7)) else "sm_89"


def dot_precision(dtype: torch.dtype, arch: str, interpreted: bool = False) -> str:
    """How the matrix unit multiplies: float32 in three TF32 passes (22 bits), or directly where that is offered."""
    if arch.startswith("gfx"):
        return "ieee"  # AMD's compiler refuses TF32 on most architectures, whatever the dtype
    if dtype != torch.float32:
        return "tf32"  # says nothing about 16-bit operands
    return "ieee" if interpreted else "tf32x3"
