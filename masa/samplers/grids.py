"""Noise levels: spacings of timesteps, Karras's spacing of sigma, and what a trajectory leaves to choose."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from masa.errors import MasaError
from masa.samplers.base import Levels
from masa.schedule import Schedule

Spacing = Literal["leading", "trailing", "linspace"]
End = Literal["zero", "sigma_min"]
CHOICES: Mapping[str, tuple[Any, ...]] = {"spacing": (None, *get_args(Spacing)), "end": (None, *get_args(End))}
KARRAS_RHO = 7.0  # 2206.00364, eq. 5


def check_grid(sampler: str, **fields: Any) -> None:
    """MasaError unless a sampler's `spacing` and `end` are known ones, and its other fields truth values."""
    for name, value in fields.items():
        if name not in CHOICES:
            if not isinstance(value, bool):
                raise MasaError(f"{sampler} {name} is {value!r}; expected True or False")
        elif value not in CHOICES[name]:
            choices = ", ".join(repr(choice) for choice in CHOICES[name] if choice is not None)
            raise MasaError(f"{sampler} {name} is {value!r}; expected one of {choices}")


def refuse_own_levels(sampler: str, *, karras: bool, spacing: Spacing | None, end: End | None = None) -> None:
    """MasaError where a sampler on a trajectory, which brings its levels, asks for others."""
    asked = {"karras=True": karras, f"spacing={spacing!r}": spacing, "end='zero'": end == "zero"}
    own = [name for name, value in asked.items() if value]
    if own:
        raise MasaError(
            f"{sampler}({', '.join(own)}) asks for noise levels of its own, and the trajectory brings those that it "
            "was inverted on; leave it out"
        )


def multistep_levels(
    schedule: Schedule, steps: int, *, karras: bool, spacing: Spacing | None, end: End | None
) -> Levels:
    """The levels of a solver that looks back, as diffusers gives them to DPM-Solver++ and UniPC.

    karras: levels evenly spaced in sigma^(1/7), whatever the spacing, from the noisiest to the cleanest that training
    saw; the network is told whole timesteps.
    """
    schedule.timesteps(steps)  # refuses a number of steps that is none
    last = schedule.alpha(0) if end == "sigma_min" else 1.0
    if not karras:
        timesteps = spaced_timesteps(schedule, steps, spacing or "trailing")
        return Levels(schedule, timesteps, (*map(schedule.alpha, timesteps), last))
    logs = log_sigmas(schedule)
    sigmas = karras_sigmas(math.exp(logs[-1]), math.exp(logs[0]), steps)
    timesteps = tuple(round(timestep_at(math.log(sigma), logs)) for sigma in sigmas)
    return Levels(schedule, timesteps, (*map(alpha_of, sigmas), last))


def spaced_timesteps(schedule: Schedule, steps: int, spacing: Spacing) -> tuple[int, ...]:
    """`steps` timesteps, noisiest first. "leading" lies lower than DDIM's: it leaves the noisiest stride out."""
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


def karras_sigmas(high: float, low: float, steps: int) -> list[float]:
    """Levels evenly spaced in sigma^(1/7), from high to low. 2206.00364, eq. 5."""
    high, low = high ** (1.0 / KARRAS_RHO), low ** (1.0 / KARRAS_RHO)
    return [(high + i / max(1, steps - 1) * (low - high)) ** KARRAS_RHO for i in range(steps)]


def half_log_snr(a: float) -> float:
    """lambda = ln(sqrt(a) / sqrt(1 - a)) of a cumulative alpha; infinite of a clean picture's, 1."""
    return math.inf if a == 1.0 else 0.5 * math.log(a / (1.0 - a))


def alpha_of(sigma: float) -> float:
    """The cumulative alpha at which noise is sigma times as large as the picture."""
    return 1.0 / (1.0 + sigma**2)


def log_sigmas(schedule: Schedule) -> list[float]:
    """ln sigma = -lambda of every training timestep."""
    return [-half_log_snr(a) for a in schedule.alphas_cumprod]


def timestep_at(log_sigma: float, logs: Sequence[float]) -> float:
    """Where the logarithms of sigma, straight between timesteps, reach a value."""
    low = min(max(bisect_right(logs, log_sigma) - 1, 0), len(logs) - 2)
    share = (log_sigma - logs[low]) / (logs[low + 1] - logs[low])
    return low + min(max(share, 0.0), 1.0)
