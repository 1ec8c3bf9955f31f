"""LocalBlend: an edit stays where the edited words look (2208.01626, section 4, "Localised editing")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from masa.branches import SOURCE, Branches
from masa.controls.base import ActiveControl, Run, find_words
from masa.controls.checks import check_fraction
from masa.controls.masks import MAP_DOWNSAMPLE, Words
from masa.edits import Edit, Record, Tape
from masa.errors import MasaError


@dataclass(frozen=True)
class LocalBlend:
    """Outside the regions of the blend words, targets are put back on the source after each step.

    source, target: words, phrases or token positions of the source's and of the targets' prompts; of several
    target words each prompt uses those it has, and needs one at least. A region is where the words' summed
    cross-attention at a quarter of the latents' size, added up over the steps so far and averaged over layers and
    heads, max-pooled 3x3, exceeds `threshold` times its maximum; a target's is joined with the source's.
    start: fraction of the steps after which blending begins. subtract_source, subtract_target: words whose
    regions, without pooling and with subtract_threshold, are taken away. Thresholds and start in [0, 1].
    A control by itself, or PromptToPrompt's local_blend. 2208.01626.
    """

    source: Words
    target: Words
    threshold: float = 0.3
    start: float = 0.2
    subtract_source: Words | None = None
    subtract_target: Words | None = None
    subtract_threshold: float = 0.3

    def __post_init__(self) -> None:
        for name in ("threshold", "start", "subtract_threshold"):
            check_fraction(f"LocalBlend {name}", getattr(self, name))
        if (self.subtract_source is None) != (self.subtract_target is None):
            raise MasaError("LocalBlend subtracts words of both prompts; give subtract_source and subtract_target")

    def begin(self, run: Run) -> ActiveControl:
        if int(self.start * run.steps) >= run.steps:
            raise MasaError(f"LocalBlend start is {self.start}, after the last of {run.steps} steps; lower it")
        chosen = [(self.source, self.target)]
        if self.subtract_source is not None and self.subtract_target is not None:
            chosen.append((self.subtract_source, self.subtract_target))
        weights = torch.zeros(len(run.prompts), len(chosen), run.tokens)
        for i, (source, target) in enumerate(chosen):
            weights[SOURCE, i, list(run.token_positions(run.prompts[SOURCE], source))] = 1.0
            words = (target,) if isinstance(target, str | int) else tuple(target)
            for word in words:
                for branch, positions in find_words(run, word).items():
                    weights[branch, i, list(positions)] = 1.0
            for branch in range(1, len(run.prompts)):
                if not weights[branch, i].any():
                    raise MasaError(
                        f"LocalBlend finds none of {', '.join(map(repr, words))} in the prompt "
                        f"{run.prompts[branch]!r}; name a word of every target"
                    )
        sites = tuple(s.index for s in run.sites if s.kind == "cross" and s.downsample == MAP_DOWNSAMPLE)
        if not sites:
            raise MasaError(
                f"LocalBlend reads cross-attention at 1/{MAP_DOWNSAMPLE} of the latents' size, which this UNet has "
                "not; leave it out"
            )
        return ActiveBlend(self, int(self.start * run.steps), weights.to(run.device), sites, run)


class ActiveBlend(ActiveControl):
    """Holds the sum of the maps so far."""

    name = "LocalBlend"

    def __init__(
        self, control: LocalBlend, first_blended: int, weights: Tensor, sites: tuple[int, ...], run: Run
    ) -> None:
        self.control = control
        self.first_blended = first_blended
        self.weights = weights
        self.sites = sites
        self.grid = run.grid_at(MAP_DOWNSAMPLE)
        self.key = ("local blend", id(self))
        self.sum: Tensor | None = None
        self.region: Tensor | None = None  # (1 + N, 1, h, w) of the last step, once blending has begun
        self.used: dict[int, Tensor] = {}

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        weights = self.weights[[row.branch for row in branches.all_rows]]
        return dict.fromkeys(self.sites, Edit(records=(Record(self.key, weights),)))

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        maps = torch.stack([tape[self.key, site] for site in self.sites]).float().mean(0)
        maps = maps[[branches.row(branch, "cond") for branch in range(len(latents))]].unflatten(2, self.grid)
        self.sum = maps if self.sum is None else self.sum + maps
        if step < self.first_blended:
            return latents
        region = self._region(self.sum[:, :1], latents, self.control.threshold, pool=True)
        if self.sum.shape[1] > 1:
            region = region & ~self._region(self.sum[:, 1:], latents, self.control.subtract_threshold, pool=False)
        self.used[step] = region[:, 0].float()
        self.region = region
        return self.blend(latents)

    def blend(self, history: Tensor) -> Tensor:
        return history if self.region is None else history[:1] + self.region * (history - history[:1])

    def _region(self, maps: Tensor, latents: Tensor, threshold: float, pool: bool) -> Tensor:
        """Maps (1 + N, 1, h, w) -> (1 + N, 1, H, W) bool of the latents' size, joined with the source's."""
        if pool:
            maps = F.max_pool2d(maps, 3, stride=1, padding=1)
        maps = F.interpolate(maps, size=latents.shape[2:], mode="nearest")
        region = maps / maps.amax((2, 3), keepdim=True) > threshold  # a map of zeros: NaN, and no region
        return region | region[:1]

    def masks(self) -> dict[int, Tensor]:
        return self.used
