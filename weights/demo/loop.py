"""What every training stage shares: budget, learning rate, averaging, checkpoints, device."""

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from masa.pipeline import cpu_has_bf16


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: minutes of its own running time, or samples; exactly one of the two."""

    minutes: float | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.samples is None):
            raise ValueError(f"a budget is minutes or samples, not {self.minutes} and {self.samples}")

    def fraction(self, progress: "Progress") -> float:
        """How much of it is spent, 0..1 and beyond."""
        if self.minutes is not None:
            return progress.seconds / (60 * self.minutes)
        assert self.samples is not None
        return progress.samples / self.samples


@dataclass
class Progress:
    """How far a stage is; seconds add up over resumed runs."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # means over 50 steps each
    recent: list[float] = field(default_factory=list)  # since the last of those

    def advance(self, samples: int, loss: float, seconds: float) -> None:
        """Counts one step."""
        self.steps += 1
        self.samples += samples
        self.seconds += seconds
        self.recent.append(loss)
        if len(self.recent) == 50:
            self.losses.append(sum(self.recent) / 50)
            self.recent.clear()


def learning_rate(peak: float, step: int, fraction: float, warmup: int, floor: float, hold: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from the peak to floor * peak at fraction 1.

    The cosine begins at fraction `hold`: a run that may yet be given more time has lost nothing before it.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, fraction - hold) / (1 - hold))))
    return peak * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


class Average:
    """Exponential moving average of parameters, whose memory grows with training up to `decay`.

    Early on it forgets quickly: step s uses at most (1 + s) / (10 + s).
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Writes the averages into parameters of the same order and shapes."""
        for parameter, value in zip(parameters, self.values, strict=True):
            parameter.copy_(value)


def save_atomically(state: Any, path: Path) -> None:
    """torch.save beside the path, then rename: a reader sees the old file or the new, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def layout(device: torch.device) -> torch.memory_format:
    """How pictures lie in memory: channels last, but for bfloat16 on a CPU, whose group norms want channels first."""
    first = device.type == "cpu" and autocast_dtype(device) is not None
    return torch.contiguous_format if first else torch.channels_last


def to_device(network: nn.Module, device: torch.device) -> None:
    """Moves a network, convolutions in the device's layout."""
    network.to(device)
    network.to(memory_format=layout(device))  # type: ignore[call-overload]


def zero_(layer: nn.Conv2d | nn.Linear) -> None:
    """Sets weights and bias to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def zero_last_layers(model: nn.Module) -> None:
    """Zeroes the last layer of every residual branch: training starts from the identity, and starts faster."""
    for name, module in model.named_modules():
        last = name.endswith((".conv2", ".proj_out")) or name == "conv_out"
        if last and isinstance(module, nn.Conv2d | nn.Linear):
            zero_(module)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 on CUDA and on CPUs that multiply it in hardware; None (float32) where it would be emulated."""
    return torch.bfloat16 if device.type == "cuda" or cpu_has_bf16() else None


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision where the device is faster for it; parameters stay float32."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """Attention as plain products while a CPU trains in bfloat16: the gradient of torch's fused one costs five times
    as much at this model's head widths (and three quarters of a step, before)."""
    if device.type != "cpu" or autocast_dtype(device) is None:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # else it computes in float32; of CPUs too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class Stopwatch:
    """Seconds since the last call.

    On a CPU those that this thread computed: whoever else uses the machine slows training, and spends none of its
    budget. On a GPU those that passed.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = time.monotonic if device.type == "cuda" else time.thread_time
        self._at = self._clock()

    def __call__(self) -> float:
        now = self._clock()
        elapsed, self._at = now - self._at, now
        return elapsed


class SpareCores:
    """Chooses how many threads to compute with: all cores while nobody else computes, else fewer.

    Threads that wait for one another at every operator become many times slower, not a little slower, when
    one of them must share its core. So it gives cores up at once and takes them back only after `patience`
    quiet looks, `period` seconds apart. Call it between steps; Linux only, elsewhere the number stays as it is.
    """

    def __init__(self, threads: int | None = None, period: float = 1.5, patience: int = 8) -> None:
        self._fixed = threads is not None or not Path("/proc/stat").exists()
        self._period, self._patience, self._quiet = period, patience, 0
        self._cores = os.cpu_count() or 1
        torch.set_num_threads(threads or (self._cores if self._fixed else 1))
        self._before = self._usage()

    def _usage(self) -> tuple[float, float, float]:
        """Now, CPU seconds that everybody used, and that this process used."""
        ticks = [0.0] * 8
        if not self._fixed:
            ticks = [float(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks
        own = os.times()
        return time.monotonic(), busy, own.user + own.system

    def __call__(self) -> int:
        """Sets the number of threads from the time since the last look; returns it."""
        if self._fixed or time.monotonic() - self._before[0] < self._period:
            return torch.get_num_threads()
        now = self._usage()
        elapsed, everybody, own = (b - a for a, b in zip(self._before, now, strict=True))
        self._before = now
        others = max(0.0, everybody - own) / elapsed
        threads = max(1, self._cores - math.ceil(others - 0.2))
        self._quiet = self._quiet + 1 if threads > torch.get_num_threads() else 0
        if threads < torch.get_num_threads() or self._quiet >= self._patience:
            torch.set_num_threads(threads)
            self._quiet = 0
        return torch.get_num_threads()
