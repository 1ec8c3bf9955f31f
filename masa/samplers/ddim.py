"""DDIM, the schedule's own step (2010.02502)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from masa.samplers.base import History, Levels, Sampler, Solver


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM, eq. 12: of first order, on the schedule's own steps; eta 0 is deterministic, 1 as noisy as DDPM."""

    takes_eta: ClassVar[bool] = True

    def start(self, levels: Levels, eta: float) -> Solver:
        return _Solver(levels, eta)


@dataclass(frozen=True)
class _Solver(Solver):
    levels: Levels
    eta: float

    @property
    def draws_noise(self) -> bool:  # type: ignore[override]
        return self.eta > 0.0

    def step(
        self, step: int, x: Tensor, eps: Tensor, x0: Tensor, history: History, noise: Tensor | None
    ) -> tuple[Tensor, History]:
        levels = self.levels
        return levels.schedule.step(eps, x, int(levels.timesteps[step]), levels.steps, self.eta, noise), ()
