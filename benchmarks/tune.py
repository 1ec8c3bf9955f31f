"""Choose tile sizes for one architecture and write them into kernels/tile_tables.py.

    python benchmarks/tune.py                        # times every clean candidate on this GPU
    python benchmarks/tune.py --compile-only sm_90   # without a GPU: fewest instructions per score

A candidate is clean when it compiles for the architecture without spilling and within its shared memory, for ragged
and even lengths; the checks are those of tests/kernel_gate.py. The file is written after every entry, so a run may
be stopped; other architectures' entries stay as they are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import harness
import kernel_gate

from masa.kernels import cross_attention_maps, launch, mutual_attention, tile_tables, tiles
from masa.kernels.tiles import Row, Tile

TABLE = Path(__file__).parent.parent / "kernels" / "tile_tables.py"
# Widest padded head of an entry -> the head width and token count it is timed at.
SHAPES = {48: (40, 4096), 80: (80, 1024), 128: (128, 1024), 160: (160, 256), 256: (256, 256)}
CANDIDATES = [
    *(Tile(128, 128, 8, stages, ones) for stages in (2, 3) for ones in (False, True)),
    *(Tile(128, 64, 8, stages, ones) for stages in (2, 3) for ones in (False, True)),
    *(Tile(128, 64, 4, 3, ones) for ones in (False, True)),
    *(Tile(64, 64, 4, stages, ones) for stages in (2, 3) for ones in (False, True)),
    *(Tile(128, 32, 8, 2), Tile(128, 32, 8, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 3), Tile(64, 32, 8, 2)),
    *(Tile(64, 16, 4, 2), Tile(64, 16, 8, 2), Tile(32, 16, 4, 2), Tile(32, 16, 8, 2), Tile(16, 16, 4, 2)),
]


def clean(workers: Executor, arch: str, form: str, width: int, dtype: str) -> Iterator[tuple[Tile, kernel_gate.Report]]:
    """Candidates that may ship, with their reports, compiled side by side."""
    padded = sum(launch.split_width(width)) > width
    tiles_to_try = [tile for tile in CANDIDATES if not tile.ones_column or (padded and form != "maps")]
    evens = (False,) if form == "maps" else (False, True)
    jobs = {
        tile: [
            workers.submit(kernel_gate.build, kernel_gate.Launch(arch, form, width, dtype, tile, even))
            for even in evens
        ]
        for tile in tiles_to_try
    }
    for tile, reports in jobs.items():
        try:
            ragged, *even = [report.result() for report in reports]
        except Exception as problem:  # the compiler may refuse a shape
            print(f"  {tuple(tile)}: {type(problem).__name__}: {problem}".splitlines()[0][:160], flush=True)
            continue
        # float32 candidates may spill, the one that is chosen too: see kernel_gate.FP32_SPILLS.
        problems = [
            x for report in (ragged, *even) for x in report.problems(dtype) if dtype != "fp32" or "spill" not in x
        ]
        if not problems:
            yield tile, ragged


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


def choose(workers: Executor, arch: str, form: str, limit: int, dtype: str, measure: bool) -> Row | None:
    """The best clean candidate for one entry of the table; None if there is none."""
    width, tokens = SHAPES[limit]
    scores = []
    for tile, report in clean(workers, arch, form, width, dtype):
        try:
            score = timed(form, width, tokens, kernel_gate.DTYPES[dtype], tile) if measure else report.per_score
        except Exception as problem:  # say a launch beyond this device's resources
            print(f"  {tuple(tile)}: {type(problem).__name__}: {problem}".splitlines()[0][:160], flush=True)
            continue
        print(f"  {form} {width} {dtype} {tuple(tile)}: {score:.3f} {'ms' if measure else 'per score'}", flush=True)
        scores.append((score, tile))
    if not scores:
        return None
    return Row(form, kernel_gate.DTYPES[dtype].itemsize, limit, min(scores, key=lambda pair: pair[0])[1])


def write(path: Path, arch: str, rows: list[Row], before: str, how: str) -> None:
    """Replace entries of one architecture in a table file and say how they came about, keeping every other line."""
    given = runpy.run_path(str(path if path.exists() else TABLE))
    chosen = {(row.form, row.size, row.width): row.tile for row in rows}
    tables = {name: {tuple(row[:3]): Tile(*row[3]) for row in entries} for name, entries in given["TABLES"].items()}
    tables[arch] = tables.get(arch, {}) | chosen
    if len(chosen) < len(tables[arch]):  # say which entries this run chose
        names = ", ".join(f"{form} {size} {width}" for form, size, width in chosen)
        how = f"{before}; then {names}: {how}".removeprefix("; then ")
    origins = dict(given["ORIGINS"]) | {arch: how}
    lines = [(path if path.exists() else TABLE).read_text().split("# How each section came about", 1)[0].rstrip(), ""]
    lines += ["# How each section came about: timed on a GPU, or only compiled.", "ORIGINS: dict[str, str] = {"]
    lines += [f"    {json.dumps(name)}: {json.dumps(text)}," for name, text in origins.items()]
    lines += ["}", "", "TABLES: dict[str, Rows] = {"]
    for name, entries in tables.items():
        lines.append(f'    "{name}": (')
        lines += [
            f'        ("{form}", {size}, {width}, {tuple(tile)}),' for (form, size, width), tile in entries.items()
        ]
        lines.append("    ),")
    path.write_text("\n".join([*lines, "}", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--compile-only", metavar="ARCH", choices=sorted(kernel_gate.SHARED_LIMIT))
    parser.add_argument("--forms", nargs="+", default=list(tiles.FORMS), choices=tiles.FORMS)
    parser.add_argument("--widths", nargs="+", type=int, default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["fp16"], choices=["fp16", "fp32"])
    parser.add_argument("--output", type=Path, default=TABLE, metavar="PATH", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    arguments = parser.parse_args()
    measure = arguments.compile_only is None
    if measure and not torch.cuda.is_available():
        parser.error("no CUDA device here: pass --compile-only ARCH")
    arch = launch.architecture(torch.device("cuda", 0)) if measure else arguments.compile_only
    if measure:
        where = harness.environment("cuda")
        how = f"timed on {where['device']}, triton {where['triton']}, commit {where['commit']}"
    else:
        how = f"compiled only, triton {kernel_gate.triton.__version__}: fewest instructions per score"
    wanted = [
        (form, limit, dtype) for dtype in arguments.dtypes for form in arguments.forms for limit in arguments.widths
    ]
    before = tile_tables.ORIGINS.get(arch, "")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Spawned, because a forked process cannot use CUDA; workers compile, this process times.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context) as workers:
            for form, limit, dtype in wanted:
                row = choose(workers, arch, form, limit, dtype, measure)
                if row is None:
                    print(f"  {form} {limit} {dtype}: no clean candidate, the entry stays", flush=True)
                    continue
                found.append(row)
                write(arguments.output, arch, found, before, how)


if __name__ == "__main__":
    main()
