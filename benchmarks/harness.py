"""Timing, hardware limits and result files shared by the benchmarks."""

from __future__ import annotations

import csv
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


@dataclass(frozen=True)
class Timing:
    """Quantiles of one call's time, milliseconds."""

    p20: float
    p50: float
    p80: float


def measure(
    function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], repeats: int, warm_up: int, device: str
) -> Timing:
    """Time function over rotating inputs, so that no call finds its tensors in a cache of the last one."""
    for turn in range(warm_up):
        function(*inputs[turn % len(inputs)])
    times = []
    if device == "cuda":
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize()
        for turn, (begin, end) in enumerate(marks):
            begin.record()
            function(*inputs[turn % len(inputs)])
            end.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in marks]
    else:
        for turn in range(repeats):
            began = time.perf_counter()
            function(*inputs[turn % len(inputs)])
            times.append((time.perf_counter() - began) * 1e3)
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Timing(p20, p50, p80)


@dataclass(frozen=True)
class Limits:
    """What this device does at best, as measured: matrix products in TFLOP/s, copies in GB/s."""

    tflops: float
    gigabytes: float

    def floor(self, flops: float, bytes_moved: float) -> float:
        """Milliseconds below which no kernel with this work can go."""
        return max(flops / (self.tflops * 1e9), bytes_moved / (self.gigabytes * 1e6))


def limits(device: str, dtype: torch.dtype) -> Limits:
    """Measure the device's limits with one large matrix product and one large copy."""
    size, count = (8192, 1 << 28) if device == "cuda" else (1024, 1 << 24)
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = measure(torch.mm, [(a, a)], repeats=10, warm_up=3, device=device)
    source = torch.empty(count, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = measure(target.copy_, [(source,)], repeats=10, warm_up=3, device=device)
    return Limits(2 * size**3 / product.p20 / 1e9, 8 * count / copy.p20 / 1e6)


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
