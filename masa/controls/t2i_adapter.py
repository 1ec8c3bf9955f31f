"""T2I-Adapter: a picture of lines, poses or depth says where things are (2302.08453)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masa.branches import SOURCE, Branches
from masa.controls.base import ActiveControl, Run
from masa.controls.checks import check_fraction, is_number
from masa.controls.conditions import (
    Condition,
    Conditions,
    PictureControl,
    check_conditions,
    find_conditions,
    warn_unless_lines,
)
from masa.edits import Residuals
from masa.errors import MasaError
from masa.io.pictures import colour_patches
from masa.models.t2i_adapter import T2IAdapterNetwork
from masa.runtime.adapters import DEMO_ADAPTER, AdapterFile, locate_adapter, read_adapter


@dataclass(frozen=True, eq=False)
class T2IAdapter(PictureControl):
    """An adapter's features of a condition picture are added at the end of each level on the UNet's way down.

    path: a .safetensors file, or a diffusers folder, of an SD v1 adapter, full or light; "demo" for the one that
    ships with the demo model, whose pictures are stick figures, white lines on black. source, target: the source's
    picture and the targets', None for none; target also a list with one entry a target. A path, PIL picture, uint8
    array (h, w) or (h, w, 3), or float tensor (h, w), (1, h, w) or (3, h, w) in [0, 1], on black; brought to the run's
    size, and for a light adapter, which reads colours, to squares of 64 pixels. weight: of the features, 0 changes
    nothing; several adapters add up. tau: in [0, 1], the share of the steps, from the noisiest on, in which it acts.
    sha256: of the file, where another one is to be refused.

    Without any picture it is a video's (`masa.sample_frames`), and a run refuses it. Without targets it acts on the
    source. As published a real source has no picture; one that it is given steers its inversion too
    (`masa.invert(controls=..)`, `masa.edit`). MasaError for a file of another kind, or a picture that is
    none. 2302.08453, section 3.3; tau is the published code's.
    """

    path: str | Path
    source: Condition = None
    target: Condition | Sequence[Condition] = None
    weight: float = 1.0
    tau: float = 1.0
    sha256: str | None = None
    file: AdapterFile[T2IAdapterNetwork] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_conditions("T2IAdapter", self.source, self.target, later=True)
        if not is_number(self.weight):
            raise MasaError(f"T2IAdapter weight is {self.weight!r}; expected a number, 1 as trained")
        check_fraction("T2IAdapter tau", self.tau)
        object.__setattr__(self, "file", AdapterFile(locate_adapter(self.path), self.sha256, read_adapter))

    def found(self, find: Callable[[str | Path], Path]) -> Any:
        return self if locate_adapter(self.path) == DEMO_ADAPTER else super().found(find)

    def begin(self, run: Run) -> ActiveControl:
        conditions = find_conditions("T2IAdapter", self.source, self.target, run)
        network = self.file.load(run.unet, run.dtype, run.device)
        if network.picture_channels == 1:
            warn_unless_lines(str(self.path), conditions.pictures)
        last = math.ceil(self.tau * run.steps - 1e-6) if self.weight else 0
        active = _Active(network, conditions, float(self.weight), last, run)
        if SOURCE in conditions.place and last:
            about = (self.file.digest(), conditions.digest(SOURCE), self.weight, last)
            active.source_condition = f"T2IAdapter({self.file.path.name}, {', '.join(map(str, about))})"
        return active


class _Active(ActiveControl):
    name = "T2IAdapter"

    def __init__(self, network: T2IAdapterNetwork, conditions: Conditions, weight: float, steps: int, run: Run) -> None:
        self.network = network
        self.conditions = conditions
        self.weight = weight
        self.steps = steps  # it acts before this one
        self.device, self.dtype = run.device, run.dtype
        self.features: tuple[tuple[Tensor, ...], ...] | None = None  # of each picture, once a step has asked
        self.of_batches: dict[Branches, Residuals | None] = {}

    def residuals(self, step: int, timestep: float, x: Tensor, context: Tensor, branches: Branches) -> Residuals | None:
        if step >= self.steps:
            return None
        if branches not in self.of_batches:
            self.of_batches[branches] = self._of(branches)
        return self.of_batches[branches]

    def _of(self, branches: Branches) -> Residuals | None:
        """Features by row of the batch, zeros where a row has no condition; None where none has."""
        places = [self.conditions.place.get(row.branch) for row in branches.rows]
        if all(place is None for place in places):
            return None
        if self.features is None:  # one picture at a time: its features do not depend on the others
            self.features = tuple(self._features(picture) for picture in self.conditions.pictures)
        features = self.features
        nothing = [torch.zeros_like(level) for level in features[0]]
        levels = range(len(nothing))
        return Residuals(
            tuple(torch.cat([nothing[i] if p is None else features[p][i] for p in places]) for i in levels)
        )

    def _features(self, picture: Tensor) -> tuple[Tensor, ...]:
        """The weighted features of a picture (1, 3, 8h, 8w), (1, c, ..) of each level."""
        x = picture if self.network.picture_channels == 3 else to_grey(picture)
        if self.network.config.light:
            x = colour_patches(x)
        return tuple(self.weight * level for level in self.network(x.to(self.device, self.dtype)))


def to_grey(picture: Tensor) -> Tensor:
    """(1, 3, h, w) -> its luma (1, 1, h, w); of three equal channels the very values."""
    if torch.equal(picture[:, 0], picture[:, 1]) and torch.equal(picture[:, 1], picture[:, 2]):
        return picture[:, :1]
    return (picture * torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]).sum(1, keepdim=True)
