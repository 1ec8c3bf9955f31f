"""DPM-Solver++ (2M): second order from the last two predictions (2211.01095, algorithm 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from masa.samplers.base import History, Levels, Sampler, Solver
from masa.samplers.grids import End, Spacing, check_grid, half_log_snr, multistep_levels, refuse_own_levels
from masa.schedule import Schedule

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
        check_grid("DPMSolverPP", sde=self.sde, karras=self.karras, spacing=self.spacing, end=self.end)

    @property
    def retraces(self) -> bool:
        return not self.sde

    def levels(self, schedule: Schedule, steps: int, fixed: Levels | None = None) -> Levels:
        if fixed is not None:
            refuse_own_levels("DPMSolverPP", karras=self.karras, spacing=self.spacing, end=self.end)
            return fixed
        return multistep_levels(schedule, steps, karras=self.karras, spacing=self.spacing, end=self.end)

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
