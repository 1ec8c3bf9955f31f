"""Timing, hardware limits and result files shared by the benchmarks."""

from __future__ import annotations

import csv
import functools
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    *("case", "peer", "p20_ms", "p50_ms", "p80_ms", "host_ms", "timed"),
    *("floor_ms", "fraction_of_floor", "tflops", "error", "note"),
)


@dataclass(frozen=True)
class Timing:
    """Quantiles of one call's time, and how long the host takes to issue it, milliseconds.

    how: what was timed: "graph", the device's work alone, replayed; "events", the device's work with gaps in which
    it waits for the host; "clock", on a CPU.
    """

    p20: float
    p50: float
    p80: float
    host: float
    how: str


def measure(
    function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], repeats: int, warm_up: int, device: str
) -> Timing:
    """Time function over rotating inputs, so that no call finds its tensors in a cache of the last one."""
    for turn in range(max(warm_up, len(inputs) if device == "cuda" else 0)):
        function(*inputs[turn % len(inputs)])
    if device != "cuda":
        times = [_clock(function, inputs[turn % len(inputs)]) for turn in range(repeats)]
        return Timing(*_quantiles(times), host=_quantiles(times)[1], how="clock")

    torch.cuda.synchronize()
    host = []
    for turn in range(20):
        host.append(_clock(function, inputs[turn % len(inputs)]))
        torch.cuda.synchronize()  # an empty queue, so that issuing never waits for room
    try:
        calls: list[Callable[[], object]] = [_captured(function, given).replay for given in inputs]
        how = "graph"
    except Exception:  # a function that waits for the device cannot be captured
        torch.cuda.synchronize()
        calls, how = [functools.partial(function, *given) for given in inputs], "events"
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for turn in range(len(calls)):
        calls[turn]()
    torch.cuda.synchronize()
    for turn, (begin, end) in enumerate(marks):
        begin.record()
        calls[turn % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return Timing(*_quantiles([begin.elapsed_time(end) for begin, end in marks]), host=_quantiles(host)[1], how=how)


def _captured(function: Callable[..., Any], given: tuple[Any, ...]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call: replaying it costs the host the same few microseconds for any function."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*given)
    return graph


def _clock(function: Callable[..., Any], given: tuple[Any, ...]) -> float:
    began = time.perf_counter()
    function(*given)
    return (time.perf_counter() - began) * 1e3


def _quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return p20, p50, p80


def input_sets(bytes_per_set: float, device: str) -> int:
    """How many sets of inputs to rotate over: together, on a GPU, at least three times its L2 cache."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(4, math.ceil(3 * cache / bytes_per_set)))


@dataclass(frozen=True)
class Limits:
    """What this device does at best, as measured: matrix products, copies and exponentials per second."""

    tflops: float
    gigabytes: float
    gigaexps: float

    def floor(self, flops: float, bytes_moved: float, exps: float) -> float:
        """Milliseconds below which no kernel with this work can go, even with all three overlapped."""
        return max(flops / (self.tflops * 1e9), bytes_moved / (self.gigabytes * 1e6), exps / (self.gigaexps * 1e6))


# Exponentials per clock and multiprocessor of NVIDIA GPUs since Volta.
EXPS_PER_CLOCK = 16


def specified_gigaexps(properties: Any) -> float:
    """Billions of exponentials per second that a GPU with these properties computes at its highest clock.

    Infinite where torch does not tell the clock (below 2.10): the floor then counts products and bytes alone.
    """
    kilohertz = getattr(properties, "clock_rate", math.inf)
    return float(EXPS_PER_CLOCK * properties.multi_processor_count * kilohertz / 1e6)


def limits(device: str, dtype: torch.dtype) -> Limits:
    """Measure the device's limits with one large matrix product and one large copy.

    The rate of exponentials is the specified one on a GPU, at its highest clock; on a CPU it is measured.
    """
    size, count = (8192, 1 << 28) if device == "cuda" else (1024, 1 << 24)
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = measure(torch.mm, [(a, a)], repeats=10, warm_up=3, device=device)
    source = torch.empty(count, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = measure(target.copy_, [(source,)], repeats=10, warm_up=3, device=device)
    if device == "cuda":
        gigaexps = specified_gigaexps(torch.cuda.get_device_properties(0))
    else:
        few = torch.rand(1 << 20)
        gigaexps = few.numel() / measure(few.exp, [()], repeats=50, warm_up=5, device=device).p20 / 1e6
    return Limits(2 * size**3 / product.p20 / 1e9, 8 * count / copy.p20 / 1e6, gigaexps)


def timed_row(
    case: str,
    peer: str,
    function: Callable[..., Any],
    check: Callable[[Any], float] | None,
    inputs: Sequence[tuple[Any, ...]],
    repeats: int,
    device: str,
    floor: float,
    flops: float,
) -> dict[str, Any]:
    """One line of a result file. A peer that fails, or whose answer `check` refuses, leaves its reason there.

    check: returns the error of the function's answer on the first inputs, or raises; None where there is no answer.
    """
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"case": case, "peer": peer, "floor_ms": round(floor, 5)}
    try:
        if check is not None:
            row["error"] = f"{check(function(*inputs[0])):.1e}"
        timing = measure(function, inputs, repeats, warm_up=10 if device == "cuda" else 1, device=device)
    except Exception as problem:  # a peer may lack a kernel for this shape
        row["note"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
        return row
    row |= {"p20_ms": timing.p20, "p50_ms": timing.p50, "p80_ms": timing.p80}
    row |= {"host_ms": timing.host, "timed": timing.how}
    row |= {"fraction_of_floor": round(floor / timing.p50, 4), "tflops": round(flops / timing.p50 / 1e9, 3)}
    return row


def relative_error(out: torch.Tensor, truth: torch.Tensor, limit: float = 2e-2) -> float:
    """Relative error in the Frobenius norm; raises RuntimeError beyond the limit."""
    error = ((out.float() - truth.float()).norm() / truth.float().norm()).item()
    if not error < limit:
        raise RuntimeError(f"wrong result: relative error {error:.1e}")
    return error


def environment(device: str) -> dict[str, str]:
    """Device, versions and commit, for every line of a result file."""

    def release(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "threads": "" if device == "cuda" else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": release("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    if found.returncode:
        return "uncommitted"
    return found.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal keys as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """One panel per case, one bar per peer: p50 with p20 to p80 as whiskers, ours coloured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["p50_ms"] != ""]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    height = 1.1 + 1.6 * len(cases)
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(8, height), squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        bars = sorted((row for row in timed if row["case"] == case), key=lambda row: -row["p50_ms"])
        middle = [row["p50_ms"] for row in bars]
        whiskers = [
            [row["p50_ms"] - row["p20_ms"] for row in bars],
            [row["p80_ms"] - row["p50_ms"] for row in bars],
        ]
        colours = ["tab:orange" if row["peer"].startswith("masa") else "lightgrey" for row in bars]
        axis.barh([row["peer"] for row in bars], middle, xerr=whiskers, color=colours)
        axis.set_title(case, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("ms")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.2 / height))
    figure.savefig(path, dpi=120)
