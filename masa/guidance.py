"""Guidance: what turns the two halves of a branch into the noise that its step removes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from masa.branches import SOURCE, Branches
from masa.errors import MasaError


class Guidance(Protocol):
    """A frozen, reusable value: how a step's unconditional and conditional predictions become one.

    Subclass it, and write `guide`. It is not asked where guidance_scale is 1 or less, nor for a source whose two
    prompts are equal: there the conditional prediction is taken.
    """

    def guide(self, uncond: Tensor, cond: Tensor, scale: float, step: int) -> Tensor:
        """The guided eps (4, h, w) of one branch; uncond, cond: its halves' (4, h, w). scale: guidance_scale."""
        ...

    def guides(self, step: int) -> bool:
        """Whether a step is guided. Where it is not, unconditional rows are left out of it."""
        return True

    def check(self, steps: Sequence[int]) -> None:
        """MasaError where these steps, the run's, are none that it can serve."""
        return


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance: e_u + scale (e_c - e_u). 2207.12598, eq. 6."""

    def guide(self, uncond: Tensor, cond: Tensor, scale: float, step: int) -> Tensor:
        return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class RescaledGuidance(Guidance):
    """Classifier-free guidance, brought back to the conditional prediction's standard deviation. 2305.08891, eq. 15-16.

    phi: in [0, 1], the share of the rescaled prediction in the result; 0 is plain guidance, 0.7 the paper's. The
    standard deviations are of each picture's whole prediction.
    """

    phi: float = 0.7

    def __post_init__(self) -> None:
        if not _is_number(self.phi) or not 0.0 <= self.phi <= 1.0:
            raise MasaError(f"RescaledGuidance phi is {self.phi!r}; expected a number from 0 (plain guidance) to 1")

    def guide(self, uncond: Tensor, cond: Tensor, scale: float, step: int) -> Tensor:
        guided = ClassifierFree().guide(uncond, cond, scale, step)
        return self.phi * (guided * (cond.std() / guided.std())) + (1.0 - self.phi) * guided


@dataclass(frozen=True)
class GuidanceInterval(Guidance):
    """Guidance in the steps [start, end) alone; in the others the conditional prediction, at half the rows. 2404.07724.

    Steps are counted from the noisiest, 0; controls act in all of them. within: the guidance of the steps inside.
    """

    start: int
    end: int
    within: Guidance = ClassifierFree()

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
                raise MasaError(f"GuidanceInterval {name} is {value!r}; expected a step, a whole number from 0")
        if self.start >= self.end:
            raise MasaError(
                f"GuidanceInterval({self.start}, {self.end}) holds no step; expected start below end, or use "
                "guidance_scale=1"
            )
        check_guidance(self.within)

    def guide(self, uncond: Tensor, cond: Tensor, scale: float, step: int) -> Tensor:
        return self.within.guide(uncond, cond, scale, step)

    def guides(self, step: int) -> bool:
        return self.start <= step < self.end and self.within.guides(step)

    def check(self, steps: Sequence[int]) -> None:
        if not any(map(self.guides, steps)):
            raise MasaError(
                f"GuidanceInterval({self.start}, {self.end}) holds none of the run's steps, {steps[0]} to {steps[-1]}; "
                "name some of them, or use guidance_scale=1"
            )
        self.within.check(steps)


def guide(
    branches: Branches,
    eps: Tensor,
    rule: Guidance,
    step: int,
    guidance_scale: float,
    source_scale: float | None = None,
) -> Tensor:
    """Predictions of rows, (rows, 4, h, w) -> one of each branch present, (branches, 4, h, w).

    A branch of one row gives that row, and so does a scale of 1 or less, its conditional one. source_scale: of a
    source that must be replayed as it was inverted, with classifier-free guidance; None: guided as the targets are.
    """
    guided = []
    for branch in branches.present:
        uncond, cond = branches.row(branch, "uncond"), branches.row(branch, "cond")
        assert cond is not None
        replayed = branch == SOURCE and source_scale is not None
        scale = source_scale if replayed and source_scale is not None else guidance_scale
        if uncond is None or uncond == cond or scale <= 1.0 or not (replayed or rule.guides(step)):
            guided.append(eps[cond])
        else:
            of_branch = ClassifierFree() if replayed else rule
            found = of_branch.guide(eps[uncond], eps[cond], scale, step)
            if not isinstance(found, Tensor) or found.shape != eps[cond].shape:
                raise MasaError(f"{type(rule).__name__}.guide gave {type(found).__name__}; expected eps as its halves")
            guided.append(found)
    return torch.stack(guided)


def check_guidance(rule: Any) -> None:
    """MasaError unless a value can guide."""
    if isinstance(rule, type) or not all(callable(getattr(rule, name, None)) for name in ("guide", "guides", "check")):
        raise MasaError(
            f"guidance is {rule!r}; expected a value such as masa.RescaledGuidance(0.7), or one of a class of yours "
            "that extends masa.Guidance; the number is guidance_scale"
        )


def check_guidance_scale(guidance_scale: Any) -> None:
    """MasaError unless a guidance scale is a finite number."""
    if not isinstance(guidance_scale, int | float) or not math.isfinite(guidance_scale):
        raise MasaError(f"guidance_scale is {guidance_scale!r}; expected a number such as 7.5, or 1 to switch it off")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
