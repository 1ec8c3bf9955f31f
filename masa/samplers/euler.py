"""Euler's method on the probability flow (2206.00364, eq. 1), plain and ancestral (2010.02502, eq. 16)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from masa.samplers.base import History, Levels, Sampler, Solver
from masa.samplers.grids import (
    Spacing,
    alpha_of,
    check_grid,
    karras_sigmas,
    log_sigmas,
    refuse_own_levels,
    spaced_timesteps,
    timestep_at,
)
from masa.schedule import Schedule, ddim_sigma


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method: DDIM's step on levels that end at zero.

    ancestral: each step goes further and adds noise, as DDIM with eta 1. karras: levels evenly spaced in sigma^(1/7)
    between the spacing's ends. spacing: of the timesteps, "trailing" (999 first), "leading" (the schedule's own), or
    "linspace", from the last to the first, between whole ones; None, the default, is "trailing", and the only choice on
    a trajectory. On trailing and linspace levels the starting noise is weighted as in latents at the first level,
    as in diffusers, whose grids these are.
    """

    ancestral: bool = False
    karras: bool = False
    spacing: Spacing | None = None

    def __post_init__(self) -> None:
        check_grid("Euler", ancestral=self.ancestral, karras=self.karras, spacing=self.spacing)

    @property
    def retraces(self) -> bool:
        return not self.ancestral

    def levels(self, schedule: Schedule, steps: int, fixed: Levels | None = None) -> Levels:
        if fixed is not None:
            refuse_own_levels("Euler", karras=self.karras, spacing=self.spacing)
            return fixed
        whole = schedule.timesteps(steps)  # refuses a number of steps that is none
        logs = log_sigmas(schedule)
        timesteps: tuple[float, ...] = whole
        if self.spacing == "linspace":
            last = len(logs) - 1
            timesteps = tuple(np.linspace(0, last, steps)[::-1].tolist())
        elif self.spacing != "leading":
            timesteps = spaced_timesteps(schedule, steps, "trailing")
        sigmas = np.interp(timesteps, range(len(logs)), np.exp(logs)).tolist()
        if self.karras:
            sigmas = karras_sigmas(sigmas[0], sigmas[-1], steps)
            timesteps = tuple(timestep_at(math.log(sigma), logs) for sigma in sigmas)
        return Levels(schedule, timesteps, (*map(alpha_of, sigmas), 1.0))

    def noise_scale(self, levels: Levels) -> float:
        return 1.0 if self.spacing == "leading" else math.sqrt(1.0 - levels.alphas[0])

    def start(self, levels: Levels, eta: float) -> Solver:
        return _Solver(levels, self.ancestral)


@dataclass(frozen=True)
class _Solver(Solver):
    levels: Levels
    draws_noise: bool

    def step(
        self, step: int, x: Tensor, eps: Tensor, x0: Tensor, history: History, noise: Tensor | None
    ) -> tuple[Tensor, History]:
        a, a_next = self.levels.alphas[step : step + 2]
        if a_next == 1.0:
            return x0, ()
        if noise is None:
            return math.sqrt(a_next) * x0 + math.sqrt(1.0 - a_next) * eps, ()
        sigma = ddim_sigma(a, a_next, eta=1.0)
        return math.sqrt(a_next) * x0 + math.sqrt(1.0 - a_next - sigma**2) * eps + sigma * noise, ()
