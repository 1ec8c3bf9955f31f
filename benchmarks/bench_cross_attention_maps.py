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
from masa.kernels.reference import cross_attention_with_maps_sdpa

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
        batches = [make(tokens, width, device, dtype, seed) for seed in range(4 if device == "cuda" else 1)]
        q = batches[0][0]
        flops = 4.0 * ROWS * HEADS * tokens * KEYS * width
        moved = 2.0 * (q.numel() + batches[0][1].numel()) * q.element_size() + 4.0 * ROWS * MAPS * tokens
        floor = limit.floor(flops, moved)
        for peer, function in PEERS.items():
            with torch.inference_mode():
                timing = harness.measure(function, batches, repeats, warm_up=3, device=device)
            row = {"case": f"{tokens}x{width}, {MAPS} maps", "peer": peer}
            row |= {"p20_ms": timing.p20, "p50_ms": timing.p50, "p80_ms": timing.p80}
            row |= {"floor_ms": round(floor, 5), "fraction_of_floor": round(floor / timing.p50, 4)}
            rows.append(row | context)
            print(f"{row['case']:22s} {peer:26s} {timing.p50:.3f} ms", flush=True)
    stem = f"cross_attention_maps_{device}"
    harness.write_csv(arguments.results / f"{stem}.csv", rows)
    harness.plot(arguments.results / f"{stem}.png", rows, f"Cross-attention with maps, 4 rows: {context['device']}")


if __name__ == "__main__":
    main()
