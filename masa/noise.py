"""Gaussian noise that a run can draw again."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor

from masa.errors import MasaError
from masa.settings import pack


class Noise:
    """Standard normal draws, by default on the CPU: the same on every device.

    seed or generator, not both. With neither, a seed is chosen at the first draw; read `seed` afterwards and
    write it down, and the run can be repeated. MasaError for a seed that is none.
    """

    def __init__(self, seed: int | None = None, generator: torch.Generator | None = None) -> None:
        if seed is not None and generator is not None:
            raise MasaError("seed and generator both give the noise; leave one out")
        if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise MasaError(f"seed is {seed!r}; expected a whole number from 0 to 2**63 - 1")
        self.seed = seed
        self.generator = generator
        # Packed at once: the state before the first draw is what repeats the run.
        self.generator_state: dict[str, Any] | None = None if generator is None else pack(generator.get_state())

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """The next noise of this shape, float32."""
        if self.generator is None:
            if self.seed is None:
                self.seed = secrets.randbelow(2**32)
            self.generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
