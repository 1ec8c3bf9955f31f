"""DPM-Solver++ (2M): second order from the last two predictions (2211.01095, algorithm 2)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from masa.errors import MasaError
from masa.samplers.base import History, Levels, Sampler, Solver
from masa.schedule import Schedule

Spacing = Literal["leading", "trailing", "linspace"]
End = Literal["zero", "sigma_min"]
KARRAS_RHO = 7.0  # 2206.00364, eq. 5
FEW_STEPS = 15  # with fewer, the last one is of first order


@dataclass(frozen=True)
class DPMSolverPP(Sampler):
    """DPM-Solver++ (2M): as good in 12 to 20 steps as DDIM is in 50.

    sde: the stochastic form, whose noise the seed decides. karras: levels that are evenly spaced in sigma^(1/7)
    (2206.00364, eq. 5), whatever the spacing. spacing: of the timesteps, "trailing" (999 first), "leading" or
    "linspace". end: the last level, "zero" or "sigma_min", that of timestep 0. None, the default, is "trailing" and
    "zero"; on a trajectory, which brings its own levels, it is the only choice beside "sigma_min".
    2211.01095, algorithm 2; the grids are diffusers'.
    """

    sde: bool = False
    karras: bool = False
    spacing: Spacing | None = None
    end: End | None = None

    def __post_init__(self) -> None:
        for name in ("sde", "karras"):
            if not isinstance(getattr(self, name), bool):
                raise MasaError(f"DPMSolverPP {name} is {getattr(self, name)!r}; expected True or False")
        for name, known in (("spacing", get_args(Spacing)), ("end", get_args(End))):
            if getattr(self, name) not in (None, *known):
                choices = ", ".join(map(repr, known))
                raise MasaError(f"DPMSolverPP {name} is {getattr(self, name)!r}; expected one of {choices}")

    @property
    def retraces(self) -> bool:
        return not self.sde

    def levels(self, schedule: Schedule, steps: int, fixed: Levels | None = None) -> Levels:
        if fixed is not None:
            asked = {"karras=True": self.karras, f"spacing={self.spacing!r}": self.spacing, "end='zero'": self.end}
            own = [name for name, value in asked.items() if value and value != "sigma_min"]
            if own:
                raise MasaError(
                    f"DPMSolverPP({', '.join(own)}) asks for noise levels of its own, and the trajectory brings those "
                    "that it was inverted on; leave it out"
                )
            return fixed
        end = schedule.alpha(0) if self.end == "sigma_min" else 1.0
        if self.karras:
            schedule.timesteps(steps)  # refuses a number of steps that is none
            return _karras_levels(schedule, steps, end)
        timesteps = spaced_timesteps(schedule, steps, self.spacing or "trailing")
        return Levels(schedule, timesteps, (*map(schedule.alpha, timesteps), end))

    def start(self, levels: Levels, eta: float) -> Solver:
        return _Solver(levels, self.sde)


@dataclass(frozen=True)
class _Solver(Solver):
    """Its history is the last prediction of the clean latents."""

    levels: Levels
    draws_noise: bool
    keeps_history: bool = True

    def step(
        self, step: int, x: Tensor, eps: Tensor, x0: Tensor, history: History, noise: Tensor | None
    ) -> tuple[Tensor, History]:
        alphas = self.levels.alphas
        a, a_next = alphas[step], alphas[step + 1]
        if a_next == 1.0:
            return x0, (x0,)
        h = max(half_log_snr(a_next) - half_log_snr(a), 0.0)  # Karras may end where it is: at sigma_min
        slope = x0
        last = step == self.levels.steps - 1
        if history and not (last and self.levels.steps < FEW_STEPS):
            h_before = half_log_snr(a) - half_log_snr(alphas[step - 1])
            slope = x0 + h / (2.0 * h_before) * (x0 - history[0])
        shrink = math.sqrt((1.0 - a_next) / (1.0 - a))
        if noise is None:
            return shrink * x - math.sqrt(a_next) * math.expm1(-h) * slope, (x0,)
        moved = shrink * math.exp(-h) * x - math.sqrt(a_next) * math.expm1(-2.0 * h) * slope
        return moved + math.sqrt(1.0 - a_next) * math.sqrt(-math.expm1(-2.0 * h)) * noise, (x0,)


def half_log_snr(a: float) -> float:
    """lambda = ln(sqrt(a) / sqrt(1 - a)) of a cumulative alpha."""
    return 0.5 * math.log(a / (1.0 - a))


def spaced_timesteps(schedule: Schedule, steps: int, spacing: Spacing) -> tuple[int, ...]:
    """`steps` timesteps, noisiest first. "leading" lies lower than DDIM's: it leaves the noisiest stride out."""
    schedule.timesteps(steps)  # refuses a number of steps that is none
    training = schedule.config.training_timesteps
    if spacing == "leading":
        stride = training // (steps + 1)
        timesteps = tuple(stride * k + schedule.offset for k in range(steps, 0, -1))
    elif spacing == "trailing":
        timesteps = tuple(round(training - training * k / steps) - 1 for k in range(steps))
    else:
        # numpy's rounding errors are part of the published grid: at 30 steps 499.5 is taken for less.
        timesteps = tuple(int(t) for t in np.linspace(0, training - 1, steps + 1).round()[:0:-1])
    if timesteps[0] >= training:
        raise MasaError(f"steps is {steps}; expected at most {training - 2} with {spacing} spacing")
    return timesteps


def _karras_levels(schedule: Schedule, steps: int, end: float) -> Levels:
    """Levels evenly spaced in sigma^(1/7), from the noisiest to the cleanest that training saw."""
    logs = [-half_log_snr(a) for a in schedule.alphas_cumprod]
    high, low = (math.exp(log / KARRAS_RHO) for log in (logs[-1], logs[0]))
    spaced = [high + i / max(1, steps - 1) * (low - high) for i in range(steps)]
    sigmas = [root**KARRAS_RHO for root in spaced]
    timesteps = tuple(_timestep_at(math.log(sigma), logs) for sigma in sigmas)
    return Levels(schedule, timesteps, (*(1.0 / (1.0 + sigma**2) for sigma in sigmas), end))


def _timestep_at(log_sigma: float, logs: Sequence[float]) -> int:
    """The timestep, rounded, at which the logarithms of sigma reach a value."""
    low = min(max(bisect_right(logs, log_sigma) - 1, 0), len(logs) - 2)
    share = (log_sigma - logs[low]) / (logs[low + 1] - logs[low])
    return round(low + min(max(share, 0.0), 1.0))
