"""FreeU: stronger backbone features, weaker low frequencies of skip connections (2309.11497)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from masa.branches import Branches
from masa.controls.base import ActiveControl, Run
from masa.controls.checks import is_number
from masa.edits import Edit
from masa.errors import MasaError

THRESHOLD = 1  # of the frequencies scaled, along each axis


@dataclass(frozen=True)
class FreeU:
    """On the two coarsest levels up, half of the backbone's channels are scaled, and low frequencies of the skips.

    backbone: factors of the deepest level and of the next (b1, b2), skip: the same of the skips (s1, s2); the
    published ones of SD 1.5 are the defaults; 1 changes nothing. Every row is changed alike, the source too, unless it
    is pinned. 2309.11497, equations 4 and 5, in the form of the first release (one factor for all positions).
    """

    needs_targets: ClassVar[bool] = False

    backbone: tuple[float, float] = (1.5, 1.6)
    skip: tuple[float, float] = (0.9, 0.2)

    def __post_init__(self) -> None:
        for name in ("backbone", "skip"):
            factors = getattr(self, name)
            if not isinstance(factors, tuple | list) or len(factors) != 2 or not all(map(is_number, factors)):
                raise MasaError(f"FreeU {name} is {factors!r}; expected two numbers, such as (1.5, 1.6)")

    def begin(self, run: Run) -> ActiveControl:
        skips = [site for site in run.sites if site.kind == "skip"]
        deepest = max(site.downsample for site in skips)
        edits: dict[int, Edit] = {}
        for place, (backbone, skip) in enumerate(zip(self.backbone, self.skip, strict=True)):
            joint = ScaleFeatures(float(backbone), float(skip))
            edits |= {site.index: Edit(joint=joint) for site in skips if site.downsample == deepest >> place}
        return _Active(edits)


class _Active(ActiveControl):
    name = "FreeU"

    def __init__(self, of_all_steps: Mapping[int, Edit]) -> None:
        self.of_all_steps = of_all_steps

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        return self.of_all_steps


@dataclass(frozen=True)
class ScaleFeatures:
    """The change of one joint: a factor for half of the backbone's channels, one for the skip's low frequencies."""

    backbone: float
    skip: float

    def __call__(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half] * self.backbone, x[:, half:]], dim=1)
        return x, scale_low_frequencies(skip, self.skip)


def scale_low_frequencies(x: Tensor, factor: float) -> Tensor:
    """x (rows, c, h, w) with its lowest 2 x 2 spatial frequencies times a factor; computed in float32."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = x.shape[-2] // 2, x.shape[-1] // 2
    mask = torch.ones(x.shape[-2:], device=x.device)
    mask[row - THRESHOLD : row + THRESHOLD, column - THRESHOLD : column + THRESHOLD] = factor
    spectrum = torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))
    return torch.fft.ifftn(spectrum, dim=(-2, -1)).real.to(x.dtype)
