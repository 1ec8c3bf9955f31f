"""Run the Triton kernels in Triton's interpreter on the CPU and print one JSON record per case.

A script of its own, because TRITON_INTERPRET is read when a kernel is decorated: a process either interprets
kernels or compiles them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
import triton.runtime.interpreter as interpreter
from kernel_cases import MAP_CASES, error, exact, far_apart, interpreter_cases, low_precision, make, make_maps
from part_cases import part_cases, part_tensors, written_out

from masa.kernels.attention_over_parts import attention_over_parts
from masa.kernels.cross_attention_maps import cross_attention_with_maps
from masa.kernels.mutual_attention import mutual_attention
from masa.kernels.reference import cross_attention_with_maps_reference


def patch_once_per_launch() -> None:
    """Halve the interpreter's time: it patches triton.language again on every nested call; once a launch will do."""
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = id(self.fn.__globals__)
        if names not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(names)
        return self.rewrite()(*args, **kwargs)

    launch: Callable[..., Any] = interpreter.GridExecutor.__call__

    def launch_and_forget(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = launch_and_forget


def main() -> None:
    torch.set_num_threads(1)
    patch_once_per_launch()
    for case in interpreter_cases():
        inputs = make(case)
        began = time.process_time()
        out = mutual_attention(inputs.q, inputs.k, inputs.v, **inputs.arguments(case), backend="triton")
        seconds = time.process_time() - began
        truth = exact(case, inputs)
        record = {
            "name": case.name,
            "dtype": case.dtype,
            "error": error(out, truth),
            "torch": error(low_precision(case, inputs), truth),
            "seconds": seconds,
        }
        print(json.dumps(record), flush=True)
    for dimension in (0, 1):
        q, k = far_apart(dimension)
        out = mutual_attention(q, k, k, kv_index=(1, 1), backend="triton")
        maps_out, _ = cross_attention_with_maps(q, k, k, torch.ones(1, 16), backend="triton")
        record = {
            "name": f"far-apart-{dimension}",
            "error": error(out, F.scaled_dot_product_attention(q.float(), k[[1, 1]].float(), k[[1, 1]].float())),
            "maps_error": error(maps_out, F.scaled_dot_product_attention(q.float(), k.float(), k.float())),
        }
        print(json.dumps(record), flush=True)
    for dtype in (torch.float32, torch.float16):
        generator = torch.Generator().manual_seed(0)
        q, k, v = part_tensors(generator, dtype)
        for name, parts in part_cases(k, v, generator).items():
            if all(one.visible is None for one in parts):
                truth, plain = written_out(q, parts), attention_over_parts(q, parts, backend="sdpa")
                out = attention_over_parts(q, parts, backend="triton")
                record = {"name": f"parts, {name}, {dtype}", "error": error(out, truth), "torch": error(plain, truth)}
                print(json.dumps(record), flush=True)
    for map_case in MAP_CASES:
        q, k, v, weights = make_maps(map_case)
        began = time.process_time()
        out, maps = cross_attention_with_maps(q, k, v, weights, backend="triton")
        seconds = time.process_time() - began
        truth, true_maps = cross_attention_with_maps_reference(*(x.double() for x in (q, k, v, weights)))
        record = {
            "name": map_case.name,
            "dtype": map_case.dtype,
            "error": error(out, truth),
            "torch": error(F.scaled_dot_product_attention(q, k, v), truth),
            "maps_error": error(maps, true_maps),
            "seconds": seconds,
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
