"""Time a long run by its networks' calls: the first few of each kind are computed, the rest are counted."""

from __future__ import annotations

import functools
import resource
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Seconds:
    """Elapsed time, and processor time of all of this process's threads."""

    wall: float
    cpu: float

    @classmethod
    def now(cls, device: str) -> Seconds:
        if device == "cuda":
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def __mul__(self, count: int) -> Seconds:
        return Seconds(self.wall * count, self.cpu * count)


NOTHING = Seconds(0.0, 0.0)


@dataclass(frozen=True)
class Kind:
    """Calls that cost the same: the network, the rows, and the attentions that a control edits in them."""

    network: str
    rows: int
    edited: int = 0


@dataclass(frozen=True)
class Probe:
    """A network's method to time.

    kind: of the method's arguments. blank: an answer of the right shape, of the kind's last computed answer and the
    method's arguments.
    """

    network: nn.Module
    method: str
    kind: Callable[..., Kind]
    blank: Callable[..., Any]


@dataclass(frozen=True)
class Cost:
    """One run: its networks' calls, their seconds by network, the seconds around them, and the most memory, MiB.

    Where nothing was timed apart, `seconds` is empty and `rest` the whole.
    """

    calls: dict[Kind, int]
    seconds: dict[str, Seconds]
    rest: Seconds
    peak: float

    @property
    def total(self) -> Seconds:
        return sum(self.seconds.values(), self.rest)

    @property
    def unet_rows(self) -> int:
        return sum(kind.rows * count for kind, count in self.calls.items() if kind.network == "unet")


@dataclass
class CallTimer:
    """Stands before the probes' methods while it is entered.

    measured: calls of each kind that are computed and timed; the others get the blank answer, so that the loops
    around them run to their end. None computes every call and waits for none: only the whole is timed.
    """

    probes: Sequence[Probe]
    measured: int | None
    device: str
    times: defaultdict[Kind, list[Seconds]] = field(default_factory=lambda: defaultdict(list))
    answers: dict[Kind, Any] = field(default_factory=dict)  # of the last computed call of each kind
    peaks: dict[Kind, float] = field(default_factory=dict)  # MiB during the last computed call of each kind
    again: dict[Kind, Callable[[], Any]] = field(default_factory=dict)  # the last computed call of each kind
    _calls: Counter[Kind] = field(default_factory=Counter)
    _inside: Seconds = NOTHING
    _peak_outside: float = 0.0

    def __enter__(self) -> CallTimer:
        for probe in self.probes:
            setattr(probe.network, probe.method, self._timed(probe))
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        for probe in self.probes:
            delattr(probe.network, probe.method)  # the class's own again

    def _timed(self, probe: Probe) -> Callable[..., Any]:
        method = getattr(probe.network, probe.method)

        def call(*args: Any, **kwargs: Any) -> Any:
            kind = probe.kind(*args, **kwargs)
            self._calls[kind] += 1
            if self.measured is None:
                return method(*args, **kwargs)
            if len(self.times[kind]) >= self.measured:
                return probe.blank(self.answers[kind], *args, **kwargs)
            self._peak_outside = max(self._peak_outside, peak_mib(self.device))
            reset_peak(self.device)
            began = Seconds.now(self.device)
            out = method(*args, **kwargs)
            spent = Seconds.now(self.device) - began
            self.times[kind].append(spent)
            self.answers[kind] = out
            self.peaks[kind] = peak_mib(self.device)
            reset_peak(self.device)
            self.again[kind] = functools.partial(method, *args, **kwargs)
            self._inside += spent
            return out

        return call

    def cost(self, run: Callable[[], object]) -> Cost:
        """What a run costs; kinds that earlier runs have measured are not measured again."""
        self._calls, self._inside, self._peak_outside = Counter(), NOTHING, 0.0
        reset_peak(self.device)
        began = Seconds.now(self.device)
        run()
        whole = Seconds.now(self.device) - began
        calls = dict(self._calls)
        peak = max(peak_mib(self.device), self._peak_outside, *(self.peaks.get(kind, 0.0) for kind in calls))
        if self.measured is None:
            return Cost(calls, {}, whole, peak)
        seconds: defaultdict[str, Seconds] = defaultdict(lambda: NOTHING)
        for kind, count in calls.items():
            seconds[kind.network] += self.typical(kind) * count
        return Cost(calls, dict(seconds), whole - self._inside, peak)

    def typical(self, kind: Kind) -> Seconds:
        """The median call of a kind."""
        times = self.times[kind]
        return Seconds(statistics.median(t.wall for t in times), statistics.median(t.cpu for t in times))


def reset_peak(device: str) -> None:
    """Start a new high-water mark of memory, where the system can."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def peak_mib(device: str) -> float:
    """The most memory held since reset_peak, MiB: allocated on the GPU, or resident pages of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if CLEAR_REFS.exists():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
