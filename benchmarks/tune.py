"""Choose tile sizes for one architecture and write them into kernels/tile_tables.py.

    python benchmarks/tune.py                        # times every clean candidate on this GPU
    python benchmarks/tune.py --compile-only sm_90   # without a GPU: fewest instructions per score

A candidate is clean when it compiles for the architecture without spilling and within its shared memory; the
checks are those of tests/kernel_gate.py. Other architectures' entries stay as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import harness
import kernel_gate

from masa.kernels import cross_attention_maps, launch, mutual_attention, tiles
from masa.kernels.tiles import Row, Tile

TABLE = Path(__file__).parent.parent / "kernels" / "tile_tables.py"
# Widest padded head of an entry -> the head width and token count it is timed at.
SHAPES = {48: (40, 4096), 80: (80, 1024), 128: (128, 1024), 160: (160, 256), 256: (256, 256)}
CANDIDATES = [
    *(Tile(128, 128, 8, stages, ones) for stages in (2, 3) for ones in (False, True)),
    *(Tile(128, 64, 8, stages, ones) for stages in (2, 3) for ones in (False, True)),
    *(Tile(128, 64, 4, 3, ones) for ones in (False, True)),
    *(Tile(64, 64, 4, stages, ones) for stages in (2, 3) for ones in (False, True)),
    *(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 3), Tile(64, 32, 8, 2)),
    *(Tile(64, 16, 4, 2), Tile(64, 16, 8, 2), Tile(32, 16, 4, 2), Tile(32, 16, 8, 2)),
]


def clean(arch: str, form: str, width: int, dtype: str) -> list[tuple[Tile, kernel_gate.Report]]:
    """Candidates that may ship, with their reports."""
    padded = sum(launch.split_width(width)) > width
    found = []
    for tile in CANDIDATES:
        if tile.ones_column and (not padded or form == "maps"):
            continue
        try:
            report = kernel_gate.build(kernel_gate.Launch(arch, form, width, dtype, tile))
        except Exception as problem:  # the compiler may refuse a shape
            print(f"  {tile}: {type(problem).__name__}")
            continue
        if not report.problems(dtype):
            found.append((tile, report))
    return found


def workload(form: str, width: int, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    """One call of a form at a UNet's shape: 4 rows, 8 heads."""

    def heads(count: int) -> torch.Tensor:
        return torch.randn(4, count, 8, width, device="cuda", dtype=dtype).transpose(1, 2)

    q = heads(tokens)
    if form == "maps":
        k, v, weights = heads(77), heads(77), torch.ones(2, 77, device="cuda")
        return lambda: cross_attention_maps.cross_attention_with_maps(q, k, v, weights, backend="triton")
    k, v = heads(tokens), heads(tokens)
    plan = None
    if "masked" in form:
        region = torch.rand(4, tokens, device="cuda") < 0.5
        full = torch.tensor([True, False, True, False], device="cuda")
        plan = mutual_attention.MaskPlan.build(region, torch.rand(4, tokens, device="cuda") < 0.5, full)
    own = (-1, 1, -1, 3) if "union" in form else None
    return lambda: mutual_attention.mutual_attention(
        q, k, v, kv_index=(0, 0, 2, 2), kv_index2=own, plan=plan, backend="triton"
    )


def timed(form: str, width: int, tokens: int, dtype: torch.dtype, tile: Tile) -> float:
    """Median milliseconds of a form with this tile in place of the table's."""
    module = cross_attention_maps if form == "maps" else mutual_attention
    with patch.object(module, "lookup", lambda *_: tile), torch.inference_mode():
        call = workload(form, width, tokens, dtype)
        return harness.measure(call, [()], repeats=50, warm_up=10, device="cuda").p50


def choose(arch: str, form: str, limit: int, dtype: str, measure: bool) -> Row | None:
    """The best clean candidate for one entry of the table."""
    width, tokens = SHAPES[limit]
    scores = []
    for tile, report in clean(arch, form, width, dtype):
        score = timed(form, width, tokens, kernel_gate.DTYPES[dtype], tile) if measure else report.per_score
        print(f"  {form} {width} {dtype} {tuple(tile)}: {score:.3f} {'ms' if measure else 'per score'}", flush=True)
        scores.append((score, tile))
    if not scores:
        return None
    return Row(form, kernel_gate.DTYPES[dtype].itemsize, limit, min(scores, key=lambda pair: pair[0])[1])


def write(arch: str, rows: list[Row], how: str) -> None:
    """Replace one architecture's entries, keeping every other line; an entry without a choice stays."""
    chosen = {(row.form, row.size, row.width): row for row in rows}
    old = {(row.form, row.size, row.width): row for row in tiles.TABLES.get(arch, ())}
    tables = dict(tiles.TABLES) | {arch: tuple((old | chosen).values())}
    head = TABLE.read_text().split("TABLES: dict", 1)[0].rstrip()
    note = f"# {arch}: {how}"
    kept = [line for line in head.splitlines() if not line.startswith(f"# {arch}:")]
    lines = [*kept, note, "TABLES: dict[str, Rows] = {"]
    for name, entries in tables.items():
        lines.append(f'    "{name}": (')
        lines += [f'        ("{row.form}", {row.size}, {row.width}, {tuple(row.tile)}),' for row in entries]
        lines.append("    ),")
    TABLE.write_text("\n".join([*lines, "}", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--compile-only", metavar="ARCH", choices=sorted(kernel_gate.SHARED_LIMIT))
    parser.add_argument("--forms", nargs="+", default=list(tiles.FORMS), choices=tiles.FORMS)
    parser.add_argument("--widths", nargs="+", type=int, default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["fp16"], choices=["fp16", "fp32"])
    arguments = parser.parse_args()
    measure = arguments.compile_only is None
    if measure and not torch.cuda.is_available():
        parser.error("no CUDA device here: pass --compile-only ARCH")
    arch = launch.architecture(torch.device("cuda", 0)) if measure else arguments.compile_only
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        entries = [
            choose(arch, form, limit, dtype, measure)
            for dtype in arguments.dtypes
            for form in arguments.forms
            for limit in arguments.widths
        ]
    where = (
        harness.environment("cuda")
        if measure
        else {"device": "compiled only", "triton": kernel_gate.triton.__version__}
    )
    write(arch, [row for row in entries if row], f"{where['device']}, triton {where['triton']}")


if __name__ == "__main__":
    main()
