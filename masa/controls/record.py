"""What a run keeps to be looked at: attention maps, queries, predictions. Recording changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from masa.branches import Branches
from masa.controls.base import ActiveControl, Run, choose_layers, choose_steps
from masa.controls.checks import check_flag, check_list
from masa.controls.masks import MAP_DOWNSAMPLE
from masa.edits import Edit, Grid, Record, Tape
from masa.errors import MasaError

SELF = "self-attention"  # its name among the maps
SHOWN_STEPS = 6  # by default, spread over the run


@dataclass(frozen=True)
class RecordAttention:
    """Keep head-mean attention maps, averaged over steps and over the layers of each grid, for `masa.plots`.

    layers: transformer blocks; default those whose grid is a quarter of the latents', 16x16 at 512x512. words: a
    word or phrase each, kept for every prompt that has it; default every token of every prompt. self_attention:
    keep what each position sees of every other too; (h*w) squared numbers, so for coarse grids.
    Result.attention holds, by name, (1 + N, h, w) for a word ("cat"; zeros for prompts without it), (1 + N,
    tokens, h, w) for all tokens (""), (1 + N, h, w, h, w), query first, for "self-attention". Maps are of the
    conditional half, and are what the run used, edits included. 2208.01626, figure 4; 2210.04885.
    """

    needs_targets: ClassVar[bool] = False

    layers: Sequence[int] | None = None
    words: Sequence[str] = ()
    self_attention: bool = False

    def __post_init__(self) -> None:
        check_list("RecordAttention layers", self.layers)
        if isinstance(self.words, str):
            raise MasaError(f"RecordAttention words is {self.words!r}; expected several, such as [{self.words!r}]")
        check_flag("RecordAttention self_attention", self.self_attention)

    def begin(self, run: Run) -> ActiveControl:
        if self.layers is None:
            layers = frozenset(s.layer for s in run.sites if s.kind == "cross" and s.downsample == MAP_DOWNSAMPLE)
        else:
            layers = choose_layers(self.layers, 0, run, "RecordAttention")
        if not layers:
            raise MasaError(
                f"RecordAttention reads cross-attention at 1/{MAP_DOWNSAMPLE} of the latents' size, which this UNet "
                "has not; name other layers"
            )
        grids = {run.grid_at(site.downsample) for site in run.sites if site.layer in layers and site.kind == "cross"}
        if len(grids) > 1:
            sizes = ", ".join(f"{h}x{w}" for h, w in sorted(grids))
            raise MasaError(
                f"RecordAttention(layers={sorted(layers)}) names layers of several grids ({sizes}), whose maps cannot "
                "be averaged; use one RecordAttention for each"
            )
        weights = self._token_weights(run)
        return _Active(self, run, layers, grids.pop(), weights.to(run.device))

    def _token_weights(self, run: Run) -> Tensor:
        """(1 + N, maps, tokens): which tokens each map adds up."""
        if not self.words:
            return torch.eye(run.tokens).expand(len(run.prompts), -1, -1)
        weights = torch.zeros(len(run.prompts), len(self.words), run.tokens)
        for i, word in enumerate(self.words):
            errors = []
            for branch, prompt in enumerate(run.prompts):
                try:
                    weights[branch, i, list(run.token_positions(prompt, word))] = 1.0
                except MasaError as error:
                    errors.append(error)
            if len(errors) == len(run.prompts):
                raise errors[0]
        return weights


class _Active(ActiveControl):
    """Holds the sums so far."""

    name = "RecordAttention"

    def __init__(self, control: RecordAttention, run: Run, layers: frozenset[int], grid: Grid, weights: Tensor) -> None:
        self.words = tuple(control.words)
        self.grid = grid
        self.key = ("recorded", id(self))
        self.weights = weights
        positions = grid[0] * grid[1]
        self.positions = torch.eye(positions, device=run.device)
        kinds = ("cross", "self") if control.self_attention else ("cross",)
        self.sites = {kind: [s.index for s in run.sites if s.kind == kind and s.layer in layers] for kind in kinds}
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        weights = self.weights[[row.branch for row in branches.all_rows]]
        edits = dict.fromkeys(self.sites["cross"], Edit(records=(Record(self.key, weights),)))
        each = self.positions.expand(len(branches), -1, -1)
        edits.update(dict.fromkeys(self.sites.get("self", ()), Edit(records=(Record(self.key, each),))))
        return edits

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        self.steps += 1
        rows = [branches.row(branch, "cond") for branch in range(len(latents))]
        for kind, sites in self.sites.items():
            mean = torch.stack([tape[self.key, site] for site in sites]).float().mean(0)[rows]
            self.sums[kind] = self.sums[kind] + mean if kind in self.sums else mean
        return latents

    def attention(self) -> dict[str, Tensor]:
        means = {kind: total / self.steps for kind, total in self.sums.items()}
        tokens = means["cross"].unflatten(2, self.grid)
        found = {word: tokens[:, i] for i, word in enumerate(self.words)} if self.words else {"": tokens}
        if "self" in means:
            # Recorded by key; read by query.
            found[SELF] = means["self"].mT.unflatten(2, self.grid).unflatten(1, self.grid)
        return found


@dataclass(frozen=True)
class RecordQueries:
    """Keep the self-attention queries of named layers and steps, for `masa.plots.query_components`.

    layers: transformer blocks; default the first of each grid on the way up (7, 10 and 13 of SD v1). steps: default
    six, spread over the run. Result.queries holds, by (layer, step), (1 + N, h, w, width), float16 on the CPU:
    per step 4.6 MB a picture at 512x512 with the default layers. Queries are of the conditional half, and are what
    the run used, edits included. MasaCtrl (2304.08465), figure 4b.
    """

    layers: Sequence[int] | None = None
    steps: Sequence[int] | None = None

    needs_targets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_list("RecordQueries layers", self.layers)
        check_list("RecordQueries steps", self.steps)

    def begin(self, run: Run) -> ActiveControl:
        steps = _chosen_steps(self.steps, run, "RecordQueries")
        sites = {site.layer: site for site in run.sites if site.kind == "self"}
        if self.layers is None:
            up = [site.layer for site in sites.values() if site.place == "up"]
            first = {sites[layer].downsample: layer for layer in sorted(up, reverse=True)}
            layers = frozenset(first.values())
        else:
            layers = choose_layers(self.layers, 0, run, "RecordQueries")
        grids = {layer: run.grid_at(sites[layer].downsample) for layer in sorted(layers)}
        return _ActiveQueries(steps, {layer: sites[layer].index for layer in grids}, grids)


class _ActiveQueries(ActiveControl):
    name = "RecordQueries"
    watches_source = True

    def __init__(self, steps: frozenset[int], sites: Mapping[int, int], grids: Mapping[int, Grid]) -> None:
        self.steps = steps
        self.sites = sites  # by layer
        self.grids = grids
        self.key = ("recorded queries", id(self))
        self.kept: dict[tuple[int, int], Tensor] = {}

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        return dict.fromkeys(self.sites.values(), Edit(query_records=(self.key,))) if step in self.steps else {}

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        if step in self.steps:
            rows = [branches.row(branch, "cond") for branch in range(len(latents))]
            for layer, site in self.sites.items():
                queries = tape[self.key, site][rows].unflatten(1, self.grids[layer])
                self.kept[layer, step] = queries.to("cpu", torch.float16)
        return latents

    def queries(self) -> dict[tuple[int, int], Tensor]:
        return self.kept


@dataclass(frozen=True)
class RecordPredictions:
    """Keep the clean pictures that steps predict, for `masa.plots.predictions`.

    steps: default six, spread over the run. Result.predictions holds, by step, (1 + N, height, width, 3), uint8 on
    the CPU: x0 = (x - sqrt(1 - a) eps) / sqrt(a) of the guided eps, decoded after the run. Of a pinned source that a
    step does not compute it is the picture itself. DDIM (2010.02502), eq. 9; MasaCtrl (2304.08465), figure 4a.
    """

    steps: Sequence[int] | None = None

    needs_targets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_list("RecordPredictions steps", self.steps)

    def begin(self, run: Run) -> ActiveControl:
        return _ActivePredictions(_chosen_steps(self.steps, run, "RecordPredictions"))


class _ActivePredictions(ActiveControl):
    name = "RecordPredictions"
    watches_source = True

    def __init__(self, steps: frozenset[int]) -> None:
        self.steps = steps
        self.kept: dict[int, Tensor] = {}

    def see_prediction(self, step: int, x0: Tensor) -> None:
        if step in self.steps:
            self.kept[step] = x0

    def predictions(self) -> dict[int, Tensor]:
        return self.kept


def spread(items: Sequence[int], count: int = SHOWN_STEPS) -> list[int]:
    """Up to `count` of the items, evenly spread, the first and the last among them."""
    count = min(count, len(items))
    return [items[round(n * (len(items) - 1) / max(1, count - 1))] for n in range(count)]


def _chosen_steps(steps: Sequence[int] | None, run: Run, control: str) -> frozenset[int]:
    return choose_steps(spread(range(run.first_step, run.steps)) if steps is None else steps, 0, run, control)
