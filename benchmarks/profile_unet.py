"""Where one UNet call on a CPU spends its time, by the kind of work, against the rate of a large matrix product.

A convolution that saves multiplications (masa/models/winograd.py) is counted with those of a direct one, and all that
it does, its matrix products and copies too, is a convolution's time: its rate may therefore exceed the limit. A 1x1
convolution that is one product of all pixels is a linear layer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from masa.models import winograd

# Operators by the start of their names; the first group that fits. What fits none is "other".
GROUPS = {
    "convolutions": (
        "aten::mkldnn_convolution",
        "aten::convolution",
        "aten::_convolution",
        "aten::conv",
        "aten::thnn",
        "aten::_slow_conv",
    ),
    "attention": ("aten::scaled_dot", "aten::_scaled_dot", "aten::bmm", "aten::baddbmm", "aten::einsum", "aten::_soft"),
    "linear layers": ("aten::addmm", "aten::mm", "aten::linear", "aten::matmul", "aten::mkldnn_linear"),
    "norms": ("aten::native_group_norm", "aten::native_layer_norm", "aten::group_norm", "aten::layer_norm"),
    "activations": ("aten::gelu", "aten::silu"),
    "sums and products": ("aten::add", "aten::mul", "aten::sub", "aten::div"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::upsample", "aten::fill_"),
}
COUNTED = ("convolutions", "attention", "linear layers")  # groups whose operations are worth counting
CONVOLUTION = "masa::convolution"  # the mark around one that is made of other operators


def group_of(name: str) -> str:
    return next((group for group, starts in GROUPS.items() if name.startswith(starts)), "other")


def matmul_limit(dtype: torch.dtype, size: int = 2048, repeats: int = 3) -> float:
    """GFLOP per second of processor time of a large matrix product on all threads, at its best."""
    a, b = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(1 + repeats):
        began = time.process_time()
        a @ b
        seconds.append(time.process_time() - began)
    return 2 * size**3 / min(seconds) / 1e9 * torch.get_num_threads()


def profile_call(call: Callable[[], object], seconds: float, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Lines of a result file, a group each, the slowest first.

    seconds: what the call takes without a profiler; each group is given its share of that. limit_gflops is measured
    here, before and after the call.
    """
    limit = matmul_limit(dtype)
    recorder = profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True)
    with torch.no_grad(), marked_convolutions(), recorder as found:
        call()
    limit = max(limit, matmul_limit(dtype))
    events = list(found.events() or ())
    spent: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for event in events:
        inside = within_convolution(event)
        group = "convolutions" if inside else group_of(event.name)
        spent[group] += event.self_cpu_time_total
        if event.name.startswith(CONVOLUTION):
            flops[group] += int(event.name.split()[1])
        elif group in COUNTED and not inside:
            flops[group] += operations(event)
    whole = sum(spent.values())
    lines = []
    for group, microseconds in spent.most_common():
        share = microseconds / whole
        line: dict[str, Any] = {"work": group, "share": round(share, 4), "seconds": round(share * seconds, 3)}
        rate = flops[group] / 1e9 / (share * seconds)
        counted = bool(flops[group])
        line |= {"gflop": round(flops[group] / 1e9, 1) if counted else "", "gflops": round(rate, 1) if counted else ""}
        line |= {"limit_gflops": round(limit, 1), "of_limit": round(rate / limit, 3) if counted else ""}
        lines.append(line)
    return lines


@contextmanager
def marked_convolutions() -> Iterator[None]:
    """masa's own convolutions bear a mark, which tells how many operations a direct one has."""

    def marked(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, doubled: bool = False) -> Tensor:
            rows, _, height, width = x.shape
            pixels = height * width * (4 if doubled else 1)
            with record_function(f"{CONVOLUTION} {2 * rows * pixels * weight.numel()}"):
                return convolve(x, weight, bias, doubled) if doubled else convolve(x, weight, bias)

        return run

    names = ("winograd", "unfolded")
    with mock.patch.multiple(winograd, **{name: marked(getattr(winograd, name)) for name in names}):
        yield


def within_convolution(event: FunctionEvent) -> bool:
    """Whether an event is one of masa's own convolutions or part of it."""
    while event is not None:
        if event.name.startswith(CONVOLUTION):
            return True
        event = event.cpu_parent
    return False


def operations(event: FunctionEvent) -> int:
    """Multiplications and additions of an event that holds its own; those around it are left out."""
    if event.name == "aten::scaled_dot_product_attention":
        return attention_operations(event.input_shapes)
    return int(event.flops or 0)


def attention_operations(shapes: Sequence[Sequence[int]]) -> int:
    """Of softmax(q kT) v with q (b, h, n, d), k (b, h, m, d): two products."""
    (b, h, n, d), (_, _, m, _) = shapes[0], shapes[1]
    return 4 * b * h * n * m * d
