"""Blended Latent Diffusion: edit inside a mask, keep the picture outside (2206.02779)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from masa.branches import Branches
from masa.controls.base import ActiveControl, Run
from masa.controls.checks import is_number
from masa.edits import Tape
from masa.errors import MasaError
from masa.io.pictures import ImageLike, load_mask


@dataclass(frozen=True, eq=False)
class BlendedLatents:
    """After each step, targets take the source picture's latents, noised to that step's level, outside a mask.

    mask: (h, w), any size; 1 or white is where targets may change; values between blend. A tensor, array, PIL
    picture or path. skip: in [0, 1), the share of the noisiest steps left out; targets start from the noised
    picture there. Needs a real picture: a trajectory, of which it reads only the clean latents. Algorithm 1.
    """

    mask: ImageLike
    skip: float = 0.25

    def __post_init__(self) -> None:
        if not is_number(self.skip) or not 0.0 <= self.skip < 1.0:
            raise MasaError(f"BlendedLatents skip is {self.skip!r}; expected a number from 0 to below 1")

    def begin(self, run: Run) -> ActiveControl:
        if run.source_latents is None or run.draw_noise is None:
            raise MasaError(
                "BlendedLatents keeps a real picture outside its mask; give one: masa.edit, or a trajectory"
            )
        mask = load_mask(self.mask)[None, None]
        mask = F.interpolate(mask, size=run.grid, mode="nearest").to(run.device)
        first_step = max(run.first_step, int(self.skip * run.steps))
        return _Active(mask, first_step, run.source_latents, run.draw_noise, run.alphas)


class _Active(ActiveControl):
    name = "BlendedLatents"

    def __init__(
        self, mask: Tensor, first_step: int, source: Tensor, draw_noise: Callable[[], Tensor], alphas: tuple[float, ...]
    ) -> None:
        self.mask = mask  # (1, 1, h, w)
        self.first_step = first_step
        self.source = source
        self.draw_noise = draw_noise
        self.alphas = alphas
        self.used: dict[int, Tensor] = {}

    def noised(self, alpha: float) -> Tensor:
        """The source (1, 4, h, w) with fresh noise, the same for all targets."""
        return math.sqrt(alpha) * self.source + math.sqrt(1.0 - alpha) * self.draw_noise()

    def start(self, latents: Tensor) -> Tensor:
        latents = latents.clone()
        latents[1:] = self.noised(self.alphas[self.first_step])
        return latents

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        # The level that this step has reached: after the last one the source itself.
        background = self.noised(self.alphas[step + 1])
        self.used[step] = self.mask[0].expand(len(latents), -1, -1)
        return self._put_back(latents, background)

    def blend(self, history: Tensor) -> Tensor:
        return self._put_back(history, self.source)

    def _put_back(self, latents: Tensor, background: Tensor) -> Tensor:
        """Latents (1 + N, 4, h, w) with the targets' outside the mask from background (1, 4, h, w)."""
        latents = latents.clone()
        latents[1:] = self.mask * latents[1:] + (1.0 - self.mask) * background
        return latents

    def masks(self) -> dict[int, Tensor]:
        return self.used
