"""What a sampler is: a frozen value that owns a run's noise levels and the step from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from masa.schedule import Schedule

# What a sampler remembers of earlier steps: tensors (branches, 4, h, w); none before the first step that is run.
History = tuple[Tensor, ...]


@dataclass(frozen=True)
class Levels:
    """The noise levels that a run visits, noisiest first.

    timesteps: what the network is told at each of n steps; whole, but where a sampler goes between training's. alphas:
    alphas_cumprod of the latents before each step, and after the last one: n + 1 numbers.
    """

    schedule: Schedule
    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]

    @classmethod
    def of_schedule(cls, schedule: Schedule, steps: int) -> Levels:
        """The schedule's own levels, which DDIM and every trajectory have."""
        timesteps = schedule.timesteps(steps)
        end = schedule.alpha(timesteps[-1] - schedule.stride(steps))
        return cls(schedule, timesteps, (*map(schedule.alpha, timesteps), end))

    @property
    def steps(self) -> int:
        return len(self.timesteps)


class Solver(Protocol):
    """A sampler bound to a run's levels. It holds no state: the run does, and hands it in."""

    draws_noise: bool = False  # each step takes one noise (1, 4, h, w), the same for every branch
    keeps_history: bool = False

    def step(
        self, step: int, x: Tensor, eps: Tensor, x0: Tensor, history: History, noise: Tensor | None
    ) -> tuple[Tensor, History]:
        """Latents x at level `step` -> those at the next level, and what later steps need to remember.

        x, eps, x0 (branches, 4, h, w): latents, their guided noise, and the clean latents that both imply. history:
        what the step before returned, () at the first step that is run. noise: standard normal, or None.
        """
        ...


class Sampler(Protocol):
    """A frozen, reusable value. Subclass it; `levels` and `start` refuse a run before any long work."""

    takes_eta: ClassVar[bool] = False  # it adds DDIM's noise, as `eta` says

    @property
    def retraces(self) -> bool:
        """Whether it may run a picture's inversion backwards on its own: samplers that add noise may not."""
        return True

    def levels(self, schedule: Schedule, steps: int, fixed: Levels | None = None) -> Levels:
        """The levels of a run. fixed: a trajectory's: they hold, or MasaError where the sampler asks for others."""
        return Levels.of_schedule(schedule, steps) if fixed is None else fixed

    def noise_scale(self, levels: Levels) -> float:
        """What the starting noise of a run from its first level is multiplied by."""
        return 1.0

    def start(self, levels: Levels, eta: float) -> Solver:
        """The solver of a run; eta: DDIM's, 0 unless the sampler takes it."""
        ...
