"""Latent consistency models: each step jumps to the clean picture and is noised again (2310.04378)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from masa.errors import MasaError
from masa.samplers.base import History, Levels, Sampler, Solver
from masa.schedule import Schedule

TRAINED_STEPS = 50  # of DDIM, among whose timesteps consistency was trained
SIGMA_DATA = 0.5
TIME_SCALE = 10.0  # of timesteps, in c_skip and c_out


@dataclass(frozen=True)
class LCM(Sampler):
    """LCM's multistep sampling, 4 to 8 steps: for models of that training, or under an LCM-LoRA.

    A LoRA wants guidance_scale 1 to 2; a model with guidance embedded takes it as usual, at half the rows. Each step
    draws a noise, one for all branches. It has timesteps of its own, which no trajectory has: a picture that was
    inverted by DDIM is refused. 2310.04378, with the multistep sampling of 2303.01469, algorithm 1; LoRA: 2311.05556.
    """

    @property
    def retraces(self) -> bool:
        return False

    def levels(self, schedule: Schedule, steps: int, fixed: Levels | None = None) -> Levels:
        if fixed is not None:
            raise MasaError(
                "LCM jumps between timesteps of its own, which the trajectory does not have; synthesise the source, or "
                "edit the picture with sampler='ddim' or 'dpm++2m'"
            )
        schedule.timesteps(steps)  # refuses a number of steps that is none
        if steps > TRAINED_STEPS:
            raise MasaError(f"steps is {steps}; LCM has at most {TRAINED_STEPS}, and is made for 4 to 8")
        stride = schedule.stride(TRAINED_STEPS)
        trained = [stride * j - 1 for j in range(TRAINED_STEPS, 0, -1)]
        timesteps = tuple(trained[TRAINED_STEPS * k // steps] for k in range(steps))
        return Levels(schedule, timesteps, (*map(schedule.alpha, timesteps), 1.0))

    def start(self, levels: Levels, eta: float) -> Solver:
        return _Solver(levels)


@dataclass(frozen=True)
class _Solver(Solver):
    levels: Levels
    draws_noise: bool = True

    def step(
        self, step: int, x: Tensor, eps: Tensor, x0: Tensor, history: History, noise: Tensor | None
    ) -> tuple[Tensor, History]:
        assert noise is not None
        t, a_next = TIME_SCALE * self.levels.timesteps[step], self.levels.alphas[step + 1]
        c_skip = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
        c_out = t / math.sqrt(t**2 + SIGMA_DATA**2)
        denoised = c_skip * x + c_out * x0
        if a_next == 1.0:
            return denoised, ()
        return math.sqrt(a_next) * denoised + math.sqrt(1.0 - a_next) * noise, ()
