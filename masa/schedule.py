"""The noise schedule and the two DDIM steps, as functions of plain numbers (2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from masa.config import ScheduleConfig
from masa.errors import MasaError


@dataclass(frozen=True)
class Schedule:
    """alphas_cumprod and the timesteps that n steps visit ("leading" spacing).

    offset: 1 gives 981, 961, .., 1 for 50 steps, which is what the published MasaCtrl and Prompt-to-Prompt
    code runs; 0 gives 980, 960, .., 0, whose last step changes nothing.
    """

    config: ScheduleConfig = ScheduleConfig()
    offset: int = 1

    def __post_init__(self) -> None:
        if self.offset not in (0, 1):
            raise MasaError(f"schedule offset is {self.offset}; expected 1 (published) or 0")

    @cached_property
    def alphas_cumprod(self) -> tuple[float, ...]:
        """Cumulative products of 1 - beta, float32 as published, one per training timestep."""
        return tuple(training_alphas(self.config).tolist())

    def alpha(self, timestep: int) -> float:
        """alphas_cumprod at a timestep; before the first one, that of timestep 0 (not 1)."""
        return self.alphas_cumprod[max(timestep, 0)]

    def describe(self) -> dict[str, float]:
        """Its numbers, as JSON values that `Schedule.restore` takes back."""
        return {"offset": self.offset} | asdict(self.config)

    @classmethod
    def restore(cls, numbers: Mapping[str, Any]) -> Schedule:
        config = {name: value for name, value in numbers.items() if name != "offset"}
        return cls(ScheduleConfig(**config), int(numbers["offset"]))

    def stride(self, steps: int) -> int:
        """Training timesteps between two steps."""
        return self.config.training_timesteps // steps

    def timesteps(self, steps: int) -> tuple[int, ...]:
        """The timesteps of `steps` steps, noisiest first: stride * k + offset for k = steps-1 .. 0.

        Where `steps` does not divide the training timesteps the first lies lower: 30 steps start at 958.
        """
        last = self.config.training_timesteps - 1
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise MasaError(f"steps is {steps!r}; expected a whole number from 1 to {last}")
        stride = self.stride(steps)
        if stride < 1 or stride * (steps - 1) + self.offset > last:
            raise MasaError(f"steps is {steps}; expected at most {last} (training has {last + 1} timesteps)")
        return tuple(stride * k + self.offset for k in reversed(range(steps)))

    def step(
        self, eps: Tensor, x: Tensor, timestep: int, steps: int, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """One of `steps` denoising steps: x at `timestep` -> x one stride less noisy."""
        a_t, a_prev = self.alpha(timestep), self.alpha(timestep - self.stride(steps))
        return ddim_step(eps, x, a_t, a_prev, eta, noise)

    def invert_step(self, eps: Tensor, x: Tensor, timestep: int, steps: int) -> Tensor:
        """One of `steps` inversion steps: x one stride below `timestep` -> x at `timestep`."""
        return ddim_invert_step(eps, x, self.alpha(timestep - self.stride(steps)), self.alpha(timestep))

    def noised(self, x0: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """A draw from q(x_t | x_0): sqrt(a_t) x0 + sqrt(1 - a_t) noise."""
        a_t = self.alpha(timestep)
        return math.sqrt(a_t) * x0 + math.sqrt(1.0 - a_t) * noise

    def sigma(self, timestep: int, steps: int, eta: float) -> float:
        """Standard deviation of the noise that `step` adds."""
        return ddim_sigma(self.alpha(timestep), self.alpha(timestep - self.stride(steps)), eta)


def training_alphas(config: ScheduleConfig, device: torch.device | None = None) -> Tensor:
    """Cumulative products of 1 - beta, (training timesteps,) float32."""
    c = config
    betas = torch.linspace(c.beta_start**0.5, c.beta_end**0.5, c.training_timesteps, device=device) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def alphas_at(alphas: Tensor, times: Tensor) -> Tensor:
    """Of `training_alphas`, those at timesteps (n,); between two of them the logarithm of sigma is straight."""
    low = times.floor().clamp(0, len(alphas) - 1).long()
    high = (low + 1).clamp(max=len(alphas) - 1)
    share = times - low
    logs = ((1.0 - alphas) / alphas).log()  # twice sigma's
    between = torch.sigmoid(-(logs[low] + share * (logs[high] - logs[low])))
    return torch.where(share > 0, between, alphas[low])


def eps_of_velocity(v: Tensor, x: Tensor, a_t: Tensor) -> Tensor:
    """The noise in x that v = sqrt(a_t) eps - sqrt(1-a_t) x0 implies: sqrt(a_t) v + sqrt(1-a_t) x, float32.

    a_t broadcasts to x. 2202.00512, appendix D.
    """
    return a_t.sqrt() * v.float() + (1.0 - a_t).sqrt() * x.float()


def predict_x0(eps: Tensor, x: Tensor, a_t: float) -> Tensor:
    """The clean latents that x at noise level a_t and its noise eps imply: (x - sqrt(1-a_t) eps) / sqrt(a_t)."""
    return (x - math.sqrt(1.0 - a_t) * eps) / math.sqrt(a_t)


def find_eps(x0: Tensor, x: Tensor, a_t: float) -> Tensor:
    """The noise in x at level a_t if x0 are its clean latents: (x - sqrt(a_t) x0) / sqrt(1 - a_t)."""
    return (x - math.sqrt(a_t) * x0) / math.sqrt(1.0 - a_t)


def ddim_step(
    eps: Tensor, x: Tensor, a_t: float, a_prev: float, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """DDIM, eq. 12: from cumulative alpha a_t to the larger a_prev. eta > 0 needs `noise` of x's shape."""
    x0 = predict_x0(eps, x, a_t)
    if eta == 0.0:
        return math.sqrt(a_prev) * x0 + math.sqrt(1.0 - a_prev) * eps
    assert noise is not None
    sigma = ddim_sigma(a_t, a_prev, eta)
    return math.sqrt(a_prev) * x0 + math.sqrt(1.0 - a_prev - sigma**2) * eps + sigma * noise


def ddim_sigma(a_t: float, a_prev: float, eta: float) -> float:
    """DDIM, eq. 16; the roots are real because a_prev >= a_t."""
    return eta * math.sqrt((1.0 - a_prev) / (1.0 - a_t)) * math.sqrt(1.0 - a_t / a_prev)


def ddim_invert_step(eps: Tensor, x: Tensor, a: float, a_next: float) -> Tensor:
    """The same step against time: from cumulative alpha a to the smaller a_next."""
    return math.sqrt(a_next) * predict_x0(eps, x, a) + math.sqrt(1.0 - a_next) * eps
