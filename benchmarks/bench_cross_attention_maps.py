"""Cross-attention with token maps against computing the probabilities, on the same inputs in one run.

python benchmarks/bench_cross_attention_maps.py                  # on a GPU, float16
python benchmarks/bench_cross_attention_maps.py --device cpu     # SDPA path, float32
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import harness

from masa.kernels.cross_attention_maps import cross_attention_with_maps
from masa.kernels.reference import cross_attention_with_maps_reference, cross_attention_with_maps_sdpa

SHAPES = ((4096, 40), (1024, 80), (256, 160))
ROWS, HEADS, KEYS, MAPS = 4, 8, 77, 2


def masa(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return cross_attention_with_maps(q, k, v, weights)


def probabilities(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As published: every head's probabilities in memory."""
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return attention @ v, torch.einsum("bnk,tk->btn", attention.float().mean(1), weights)


def without_maps(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, None]:
    """What the maps cost on top: SDPA alone."""
    return F.scaled_dot_product_attention(q, k, v), None


PEERS: dict[str, Callable[..., Any]] = {
    "masa": masa,
    "sdpa with map columns": cross_attention_with_maps_sdpa,
    "probabilities in memory": probabilities,
    "sdpa, no maps": without_maps,
}


def make(tokens: int, width: int, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def heads(count: int) -> Tensor:
        x = torch.randn(ROWS, count, HEADS, width, generator=generator)
        return x.to(device, dtype).transpose(1, 2)

    weights = torch.zeros(MAPS, KEYS, device=device)
    weights[0, 2] = weights[1, 4:6] = 1
    return heads(tokens), heads(KEYS), heads(KEYS), weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    device = arguments.device
    dtype = getattr(torch, arguments.dtype or ("float16" if device == "cuda" else "float32"))
    repeats = arguments.repeats or (100 if device == "cuda" else 10)

    limit = harness.limits(device, dtype)
    context = harness.environment(device) | {"dtype": str(dtype).removeprefix("torch.")}
    rows: list[dict[str, Any]] = []
    for tokens, width in SHAPES:
        size = 4 if dtype == torch.float32 else 2
        moved = 2.0 * ROWS * HEADS * width * (tokens + KEYS) * size + 4.0 * ROWS * MAPS * tokens
        sets = harness.input_sets(moved, device)
        batches = [make(tokens, width, device, dtype, seed) for seed in range(sets)]
        scores = float(ROWS * HEADS * tokens * KEYS)
        flops = 4.0 * scores * width
        q, k, v, weights = (x.float() for x in batches[0])
        truth = cross_attention_with_maps_reference(q, k, v, weights)

        def check(results: tuple[Tensor, Tensor | None], truth: tuple[Tensor, Tensor] = truth) -> float:
            pairs = [(x, y) for x, y in zip(results, truth, strict=True) if x is not None]
            return max(harness.relative_error(x, y) for x, y in pairs)

        for peer, function in PEERS.items():
            name = f"{tokens}x{width}, {MAPS} maps"
            floor = limit.floor(flops, moved, scores)
            with torch.inference_mode():
                row = harness.timed_row(name, peer, function, check, batches, repeats, device, floor, flops)
            rows.append(row | context)
            shown = f"{row['p50_ms']:.3f} ms" if row["p50_ms"] != "" else row["note"]
            print(f"{name:22s} {peer:26s} {shown}", flush=True)
    stem = f"cross_attention_maps_{device}"
    harness.write_csv(arguments.results / f"{stem}.csv", rows)
    harness.plot(arguments.results / f"{stem}.png", rows, f"Cross-attention with maps, 4 rows: {context['device']}")


if __name__ == "__main__":
    main()
