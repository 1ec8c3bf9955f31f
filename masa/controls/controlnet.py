"""ControlNet: a copy of the UNet's way down reads a hint picture and corrects its features (2302.05543)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from masa.branches import SOURCE, Branches, Row
from masa.controls.base import ActiveControl, Run
from masa.controls.checks import check_flag, check_fraction, is_number
from masa.controls.conditions import (
    Condition,
    Conditions,
    PictureControl,
    check_conditions,
    find_conditions,
    warn_unless_lines,
)
from masa.edits import Residuals, RowTuple, take
from masa.errors import MasaError
from masa.models.controlnet import ControlNetwork
from masa.runtime.adapters import AdapterFile, holds_differences, read_controlnet

# Of each connection's residual, from the last to the first, in guess mode (the published code's).
GUESS_DECAY = 0.825
# Files whose names say that they were trained on lines: no tensor does.
LINES = re.compile(r"canny|scribble|lineart|mlsd|hed|softedge")


@dataclass(frozen=True, eq=False)
class ControlNet(PictureControl):
    """A ControlNet's residuals are added to the UNet's skip connections and its middle.

    path: a .safetensors file (alone, with a whole model beside, or the differences to its base model) or a diffusers
    folder, for SD v1. source, target: hints as in `T2IAdapter`. scale: of the residuals, 0 changes nothing; several
    ControlNets add up. start, end: in [0, 1], the share of the steps between which it acts. guess_mode: only the
    prompted half of guidance is steered, the deeper the connection the more. sha256: of the file, where another one is
    to be refused.

    It runs on the very rows of the UNet, each with its own half's prompt; rows without a hint are left out. Without
    targets it acts on the source. MasaError for a file of another kind, or a picture that is none. 2302.05543,
    section 3.
    """

    path: str | Path
    source: Condition = None
    target: Condition | Sequence[Condition] = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False
    sha256: str | None = None
    file: AdapterFile[ControlNetwork] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_conditions("ControlNet", self.source, self.target, later=True)
        if not is_number(self.scale):
            raise MasaError(f"ControlNet scale is {self.scale!r}; expected a number, 1 as trained")
        check_fraction("ControlNet start", self.start)
        check_fraction("ControlNet end", self.end)
        if self.start >= self.end:
            raise MasaError(f"ControlNet start is {self.start} and end {self.end}; expected start below end")
        check_flag("ControlNet guess_mode", self.guess_mode)
        object.__setattr__(self, "file", AdapterFile(self.path, self.sha256, read_controlnet))

    def begin(self, run: Run) -> ActiveControl:
        conditions = find_conditions("ControlNet", self.source, self.target, run)
        base = run.base_weights if holds_differences(self.file.path) else None
        network = self.file.load(run.unet, run.dtype, run.device, base)
        if LINES.search(self.file.path.stem.lower()):
            warn_unless_lines(str(self.path), conditions.pictures)
        steps = self._steps(run.steps) if self.scale else frozenset()
        if self.scale and not steps:
            raise MasaError(
                f"ControlNet(start={self.start}, end={self.end}) selects no step of a run of {run.steps}; widen them"
            )
        active = _Active(self, network, conditions, steps, run)
        if SOURCE in conditions.place and steps:
            about = (self.file.digest(), conditions.digest(SOURCE), self.scale, self.guess_mode, *sorted(steps))
            active.source_condition = f"ControlNet({self.file.path.name}, {', '.join(map(str, about))})"
            active.tells_halves_apart = self.guess_mode or network.pooled
        return active

    def _steps(self, steps: int) -> frozenset[int]:
        """The steps of a run in which it acts."""
        return frozenset(i for i in range(steps) if not (i / steps < self.start or (i + 1) / steps > self.end))


class _Active(ActiveControl):
    name = "ControlNet"

    def __init__(
        self, control: ControlNet, network: ControlNetwork, conditions: Conditions, steps: frozenset[int], run: Run
    ) -> None:
        self.network = network
        self.conditions = conditions
        self.steps = steps
        self.only_cond = control.guess_mode or network.pooled
        count = len(network.controlnet_down_blocks)
        decay = GUESS_DECAY if control.guess_mode and not network.pooled else 1.0
        self.scales = [float(control.scale) * decay ** (count - i) for i in range(count + 1)]
        self.device, self.dtype = run.device, run.dtype
        self.hints: tuple[Tensor, ...] | None = None  # of each picture, once a step has asked

    def residuals(self, step: int, timestep: float, x: Tensor, context: Tensor, branches: Branches) -> Residuals | None:
        rows = tuple(i for i, row in enumerate(branches.rows) if self._steers(row))
        if step not in self.steps or not rows:
            return None
        if self.hints is None:  # one picture at a time: its features do not depend on the others
            encode = self.network.encode
            self.hints = tuple(encode(picture.to(self.device, self.dtype)) for picture in self.conditions.pictures)
        hint = torch.cat([self.hints[self.conditions.place[branches.rows[i].branch]] for i in rows])
        skips, mid = self.network(take(x, rows), timestep, take(context, rows), hint)
        scaled = [scale * r for scale, r in zip(self.scales, (*skips, mid), strict=True)]
        placed = [spread(r, rows, len(x)) for r in scaled]
        return Residuals(skips=tuple(placed[:-1]), mid=placed[-1])

    def _steers(self, row: Row) -> bool:
        """Whether a row of the batch has a hint."""
        return row.branch in self.conditions.place and ("cond" in row.halves or not self.only_cond)


def spread(residual: Tensor, rows: RowTuple, count: int) -> Tensor:
    """A residual of some of `count` rows as one of all, zeros elsewhere."""
    if len(rows) == count:
        return residual
    whole = residual.new_zeros(count, *residual.shape[1:])
    for i, row in enumerate(rows):
        whole[row] = residual[i]
    return whole
