"""Masks of the subject in source and targets: given as pictures, or found from words in cross-attention."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masa.branches import SOURCE, Branches
from masa.controls.base import Run
from masa.controls.checks import check_fraction
from masa.edits import Edit, Grid, MaskSource, Record, Tape, take
from masa.errors import MasaError
from masa.io.pictures import ImageLike, load_mask
from masa.kernels.mask_plan import MaskPlan

# Cross-attention maps are read where the grid is the latents' divided by 4: 16x16 at 512x512.
MAP_DOWNSAMPLE = 4
SOURCE_THRESHOLD = 0.5  # of a given source mask, which is binary: keys are in or out

Words = str | int | Sequence[str | int]


class ActiveMasks(Protocol):
    """Masks bound to a run."""

    def source(self, branches: Branches, key_rows: tuple[int, ...]) -> MaskSource:
        """The mask that this step's edits carry; key_rows are the rows whose keys are read."""
        ...

    def records(self, branches: Branches) -> dict[int, Edit]:
        """What must be recorded on the way, by site index."""
        ...

    def after_step(self, tape: Tape, branches: Branches) -> Tensor | None:
        """Masks (1 + N, h, w) to keep for the user, source first; called after each controlled step."""
        ...


@dataclass(frozen=True, eq=False)
class GivenMasks:
    """Masks (h, w) of any size; 1 or white is the subject. MasaCtrl section 3.3.

    source: binary (cut at 0.5). target: one for all targets, or a sequence of one per target; may be soft.
    Tensors, arrays, PIL pictures or paths.
    """

    source: ImageLike
    target: ImageLike | Sequence[ImageLike]

    @property
    def targets(self) -> list[ImageLike]:
        """The target masks as given: one, or one per target."""
        if isinstance(self.target, str | Path | Image.Image | np.ndarray | Tensor):
            return [self.target]
        return list(self.target)

    def bind(self, run: Run, layers: frozenset[int]) -> ActiveMasks:
        wanted = len(run.prompts) - 1
        targets = self.targets if run.targets_known else self.targets[:1]
        if len(targets) not in (1, wanted):
            raise MasaError(f"GivenMasks has {len(targets)} target masks for {wanted} targets; give one, or one each")
        if len(targets) == 1:
            targets = targets * wanted
        source = (load_mask(self.source) >= SOURCE_THRESHOLD).float()
        masks = [source, *(load_mask(target) for target in targets)]
        soft = any(bool(((mask > 0) & (mask < 1)).any()) for mask in masks)
        sizes = {run.grid_at(site.downsample) for site in run.sites if site.layer in layers}
        by_grid = {size: torch.stack([resize(mask, size) for mask in masks]).to(run.device) for size in sizes}
        return _ActiveGiven(by_grid, soft)


class _ActiveGiven:
    """Plans every grid once per set of rows; steps share them."""

    def __init__(self, by_grid: dict[Grid, Tensor], soft: bool) -> None:
        self.by_grid = by_grid  # (1 + N, h, w)
        self.soft = soft
        self.planned: dict[tuple[Branches, tuple[int, ...]], _FixedPlans] = {}

    def source(self, branches: Branches, key_rows: tuple[int, ...]) -> MaskSource:
        if (branches, key_rows) not in self.planned:
            plans = {grid: self._plan(masks, branches, key_rows) for grid, masks in self.by_grid.items()}
            self.planned[branches, key_rows] = _FixedPlans(plans)
        return self.planned[branches, key_rows]

    def _plan(self, masks: Tensor, branches: Branches, key_rows: tuple[int, ...]) -> MaskPlan:
        rows = masks[[row.branch for row in branches.all_rows]].flatten(1)
        region = rows >= SOURCE_THRESHOLD
        full = _is_source(branches, rows.device)
        queries = (rows if self.soft else region)[: len(branches)]
        return MaskPlan.build(take(region, key_rows), queries, full)

    def records(self, branches: Branches) -> dict[int, Edit]:
        return {}

    def after_step(self, tape: Tape, branches: Branches) -> Tensor:
        # The targets' masks may differ in size from the source's: shown on the finest grid that was used.
        return self.by_grid[max(self.by_grid)]


@dataclass(frozen=True, eq=False)
class _FixedPlans:
    by_grid: dict[Grid, MaskPlan]

    def __call__(self, tape: Tape, grid: Grid) -> MaskPlan:
        return self.by_grid[grid]


@dataclass(frozen=True)
class WordMasks:
    """Masks from the cross-attention of words, found anew at each controlled step. MasaCtrl section 3.3.

    source, target: a word or phrase of the source's and of every target's prompt, a token position (0 is the
    start token), or several of these. threshold: in [0, 1], of the min-max normalised map.
    """

    source: Words
    target: Words
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("WordMasks threshold", self.threshold)

    def bind(self, run: Run, layers: frozenset[int]) -> ActiveMasks:
        positions = tuple(
            run.token_positions(prompt, self.source if branch == SOURCE or not run.targets_known else self.target)
            for branch, prompt in enumerate(run.prompts)
        )
        weights = torch.zeros(len(positions), 1, run.tokens)
        for branch, tokens in enumerate(positions):
            weights[branch, 0, list(tokens)] = 1.0
        # Deeper maps than the last controlled layer would come too late to be read.
        recorded = tuple(
            site.index
            for site in run.sites
            if site.kind == "cross" and site.downsample == MAP_DOWNSAMPLE and site.layer < max(layers)
        )
        if not recorded:
            raise MasaError(
                f"WordMasks needs a controlled layer behind the first cross-attention at 1/{MAP_DOWNSAMPLE} of the "
                f"latents' size; the last controlled layer is {max(layers)}"
            )
        return _ActiveWords(
            weights.to(run.device),
            self.threshold,
            recorded,
            run.grid_at(MAP_DOWNSAMPLE),
            ("word masks", positions),
        )


class _ActiveWords:
    """Holds the last controlled step's maps, for layers that run before this step's first map is there."""

    def __init__(self, weights: Tensor, threshold: float, recorded: tuple[int, ...], grid: Grid, key: Hashable) -> None:
        self.weights = weights
        self.threshold = threshold
        self.recorded = recorded
        self.grid = grid
        self.key = key
        self.previous: Tensor | None = None  # (1 + N, h*w)

    def source(self, branches: Branches, key_rows: tuple[int, ...]) -> MaskSource:
        of_rows = [row.branch for row in branches.all_rows]
        previous = None if self.previous is None else self.previous[of_rows]
        return _WordPlans(self.key, self.recorded, self.grid, self.threshold, branches, key_rows, previous)

    def records(self, branches: Branches) -> dict[int, Edit]:
        weights = self.weights[[row.branch for row in branches.all_rows]]
        return {index: Edit(records=(Record(self.key, weights),)) for index in self.recorded}

    def after_step(self, tape: Tape, branches: Branches) -> Tensor:
        maps = _mean_map(tape, self.key, self.recorded, branches)
        assert maps is not None
        self.previous = maps[[branches.row(branch, "cond") for branch in (SOURCE, *branches.targets)]]
        masks = normalise(self.previous)[0] >= self.threshold
        return masks.float().unflatten(1, self.grid)


@dataclass(frozen=True, eq=False)
class _WordPlans:
    key: Hashable
    recorded: tuple[int, ...]
    map_grid: Grid
    threshold: float
    branches: Branches
    key_rows: tuple[int, ...]
    previous: Tensor | None

    def __call__(self, tape: Tape, grid: Grid) -> MaskPlan | None:
        maps = _mean_map(tape, self.key, self.recorded, self.branches)
        if maps is None:
            maps = self.previous
        if maps is None:  # the first step, in a layer before any map: nothing to mask by yet
            return None
        scaled, constant = normalise(maps)
        masks = (resize(scaled.unflatten(1, self.map_grid), grid) >= self.threshold).flatten(1)
        # A constant map says nothing: its row, and every row that reads a source without a map, sees all keys.
        source, rows = list(self.branches.source_rows), len(self.branches)
        full = _is_source(self.branches, maps.device) | constant[:rows] | constant[source]
        return MaskPlan.build(take(masks, self.key_rows), masks[:rows], full)


def _mean_map(tape: Tape, key: Hashable, recorded: tuple[int, ...], branches: Branches) -> Tensor | None:
    """Mean over the layers that have run so far of each known row's conditional map: (rows, h*w), or None."""
    maps = [tape[key, index] for index in recorded if (key, index) in tape]
    if not maps:
        return None
    mean = torch.stack(maps).float().mean(0)[:, 0]
    cond = [branches.row(row.branch, "cond") for row in branches.all_rows]
    return mean[cond]


def normalise(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (rows, positions) scaled to [0, 1] each, and which of them are constant (and become 0)."""
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    constant = high <= low
    return (maps - low) / torch.where(constant, 1.0, high - low), constant[:, 0]


def _is_source(branches: Branches, device: torch.device) -> Tensor:
    """(rows,) bool: the source's rows, which are ordinary self-attention."""
    return torch.tensor([row.branch == SOURCE for row in branches.rows], device=device)


def resize(masks: Tensor, size: Grid) -> Tensor:
    """Nearest neighbour, torch's: (h, w) or (rows, h, w) -> the same with `size`."""
    x = masks if masks.ndim == 3 else masks[None]
    x = F.interpolate(x[:, None].float(), size=size, mode="nearest")[:, 0]
    return x if masks.ndim == 3 else x[0]
