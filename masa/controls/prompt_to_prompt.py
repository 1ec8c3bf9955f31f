"""Prompt-to-Prompt: a target's attention probabilities made from the source's (2208.01626)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from masa.branches import SOURCE, Branches
from masa.controls.base import ActiveControl, Run, find_words
from masa.controls.checks import is_number
from masa.controls.local_blend import LocalBlend
from masa.controls.token_alignment import TokenizedPrompt, refinement_map, replacement_map
from masa.edits import Edit, Mix, Tape, take
from masa.errors import MasaError

# A fraction of the steps from the first on, or the fractions where the control begins and ends.
Bounds = float | tuple[float, float]
DEFAULT = "default"


@dataclass(frozen=True)
class PromptToPrompt:
    """Targets take the source's cross-attention maps, and its self-attention where the grid is coarse.

    edit: "replace" swaps words one for one (equal word counts), "refine" adds to the prompt (new tokens keep
    their own maps), None takes the source's maps as they are, and only where `reweight` asks for it.
    reweight: a factor by word (or phrase, or token position) of the targets, on the maps after the edit; nothing
    is renormalised. Words need be in one target only.
    cross_replace_steps: when; a fraction f, which is (0, f), a pair (start, end) or a dict of word -> either, with
    the key "default" for all other tokens, (0, 1) where it is missing. Step k of n is controlled where
    int(start * (n + 1)) <= k < int(end * (n + 1)).
    self_replace_steps: a fraction or pair; steps int(n * start) .. int(n * end) - 1 take the source's
    self-attention probabilities where the grid has at most self_replace_tokens tokens: 32*32 as published (16*16 in
    the first release), whatever the size. None: a quarter of the latents' own, which at any size leaves only the
    finest grid free, as 32*32 does at 512x512.
    local_blend: keeps the edit where its words look.

    Only the conditional half is edited. Fractions in [0, 1]. Errors come before the first step.
    2208.01626, algorithm 1 and section 3.2.
    """

    edit: Literal["replace", "refine"] | None = "replace"
    reweight: Mapping[str | int, float] = field(default_factory=dict)
    cross_replace_steps: Bounds | Mapping[str | int, Bounds] = 0.8
    self_replace_steps: Bounds = 0.4
    self_replace_tokens: int | None = 32 * 32
    local_blend: LocalBlend | None = None

    def __post_init__(self) -> None:
        if self.edit not in ("replace", "refine", None):
            raise MasaError(f"PromptToPrompt edit is {self.edit!r}; expected 'replace', 'refine' or None")
        if not isinstance(self.reweight, Mapping):
            raise MasaError(f"PromptToPrompt reweight is {self.reweight!r}; expected a dict such as {{'fluffy': 4.0}}")
        for word, factor in self.reweight.items():
            if not is_number(factor):
                raise MasaError(f"PromptToPrompt reweight of {word!r} is {factor!r}; expected a finite number")
        for word, bounds in self.cross_bounds.items():
            _bounds(bounds, f"cross_replace_steps of {word!r}")
        _bounds(self.self_replace_steps, "self_replace_steps")
        if self.local_blend is not None and not isinstance(self.local_blend, LocalBlend):
            raise MasaError(f"PromptToPrompt local_blend is {self.local_blend!r}; expected masa.LocalBlend or None")
        tokens = self.self_replace_tokens
        if tokens is not None and (not isinstance(tokens, Integral) or tokens < 1):
            raise MasaError(
                f"PromptToPrompt self_replace_tokens is {tokens!r}; expected 1 or more, such as 32 * 32, or None"
            )

    @property
    def cross_bounds(self) -> Mapping[str | int, Bounds]:
        """cross_replace_steps as bounds by word, "default" first."""
        given = self.cross_replace_steps
        default: dict[str | int, Bounds] = {DEFAULT: (0.0, 1.0)}
        return default | dict(given) if isinstance(given, Mapping) else {DEFAULT: given}

    def begin(self, run: Run) -> ActiveControl:
        start, end = _bounds(self.self_replace_steps, "self_replace_steps")
        self_steps = range(int(run.steps * start), int(run.steps * end))
        active = _Active(self._maps(run), self._schedule(run), self_steps, self._self_sites(run), run)
        if self.local_blend is not None:
            active.local_blend = self.local_blend.begin(run)
        last = max((*active.self_steps, *active.cross_steps), default=-1)
        if last < run.first_step and active.local_blend is None:
            raise MasaError(
                f"PromptToPrompt(edit={self.edit!r}, cross_replace_steps={self.cross_replace_steps}, "
                f"self_replace_steps={self.self_replace_steps}) changes no step of a run of {run.steps}; raise the "
                "fractions, or give edit or reweight"
            )
        return active

    def _self_sites(self, run: Run) -> tuple[int, ...]:
        most = math.prod(run.grid) // 4 if self.self_replace_tokens is None else self.self_replace_tokens
        return tuple(
            site.index for site in run.sites if site.kind == "self" and math.prod(run.grid_at(site.downsample)) <= most
        )

    def _maps(self, run: Run) -> tuple[Tensor, Tensor] | None:
        """(N, tokens, tokens) from the source's tokens to each target's, and (N, tokens) of the target's own.

        None where no map is changed at all.
        """
        if self.edit is None and not self.reweight:
            return None
        prompts = [TokenizedPrompt.of(prompt, run.encode, run.tokens) for prompt in run.prompts]
        source, targets = prompts[SOURCE], prompts[SOURCE + 1 :]
        if self.edit == "refine":
            pairs = [refinement_map(source, target, run.tokens) for target in targets]
            from_source, own = torch.stack([m for m, _ in pairs]), 1.0 - torch.stack([aligned for _, aligned in pairs])
        else:
            same = torch.eye(run.tokens)
            maps = [same if self.edit is None else replacement_map(source, t, run.tokens) for t in targets]
            from_source = torch.stack(maps)
            own = torch.zeros(len(targets), run.tokens)
        for word, factor in self.reweight.items():
            for branch, positions in find_words(run, word).items():
                from_source[branch - 1][:, list(positions)] *= factor
                own[branch - 1, list(positions)] *= factor
        return from_source, own

    def _schedule(self, run: Run) -> Tensor:
        """(steps, N, tokens): 1 where a target's token is controlled."""
        schedule = torch.zeros(run.steps + 1, len(run.prompts) - 1, run.tokens)  # published with one step too many
        for word, bounds in self.cross_bounds.items():
            start, end = (int(fraction * len(schedule)) for fraction in _bounds(bounds, "cross_replace_steps"))
            everywhere = dict.fromkeys(range(1, len(run.prompts)), tuple(range(run.tokens)))
            for branch, positions in (everywhere if word == DEFAULT else find_words(run, word)).items():
                schedule[:, branch - 1, list(positions)] = 0.0
                schedule[start:end, branch - 1, list(positions)] = 1.0
        return schedule[: run.steps]


class _Active(ActiveControl):
    name = "PromptToPrompt"

    def __init__(
        self,
        maps: tuple[Tensor, Tensor] | None,
        schedule: Tensor,
        self_steps: range,
        self_sites: tuple[int, ...],
        run: Run,
    ) -> None:
        self.self_steps = self_steps if self_sites else range(0)
        self.self_sites = self_sites
        self.cross_sites = tuple(site.index for site in run.sites if site.kind == "cross")
        self.local_blend: ActiveControl | None = None
        # What the host must know is read here, before the tensors go to the device.
        self.cross_steps: frozenset[int] = frozenset()
        self.own_steps: frozenset[int] = frozenset()
        if maps is not None:
            from_source, own = maps
            own = 1.0 - schedule + schedule * own
            self.cross_steps = frozenset(schedule.any(2).any(1).nonzero().flatten().tolist())
            self.own_steps = frozenset(own.any(2).any(1).nonzero().flatten().tolist())
            self.from_source, self.own, self.schedule = (t.to(run.device) for t in (from_source, own, schedule))

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        edits: dict[int, Edit] = {}
        if step in self.self_steps or step in self.cross_steps:
            source = branches.row(SOURCE, "cond")
            rows = [branches.row(branch, "cond") for branch in branches.targets]
            assert source is not None
            targets = tuple(row for row in rows if row is not None)
            if step in self.self_steps:
                # Equal probabilities are equal queries and keys; the values stay the target's.
                reads = tuple(source if row in targets else row for row in range(len(branches)))
                edits.update(dict.fromkeys(self.self_sites, Edit(q_from=reads, k_from=reads)))
            if step in self.cross_steps:
                of_targets = tuple(branch - 1 for branch in branches.targets)
                from_source = take(self.from_source * self.schedule[step][:, None], of_targets)
                own = take(self.own[step], of_targets) if step in self.own_steps else None
                mix = Mix(targets, (source,) * len(targets), from_source, own)
                edits.update(dict.fromkeys(self.cross_sites, Edit(mix=mix)))
        if self.local_blend is not None:
            for site, edit in self.local_blend.edits(step, branches).items():
                edits[site] = edits[site].merge(edit) if site in edits else edit
        return edits

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        return latents if self.local_blend is None else self.local_blend.after_step(step, latents, tape, branches)

    def blend(self, history: Tensor) -> Tensor:
        return history if self.local_blend is None else self.local_blend.blend(history)

    def masks(self) -> dict[int, Tensor]:
        return {} if self.local_blend is None else self.local_blend.masks()


def _bounds(bounds: Bounds, name: str) -> tuple[float, float]:
    """(start, end) of a fraction or pair. MasaError unless 0 <= start <= end <= 1."""
    pair: tuple[Any, ...] = tuple(bounds) if isinstance(bounds, Sequence | np.ndarray) else (0.0, bounds)
    numbers = len(pair) == 2 and all(is_number(fraction) for fraction in pair)
    if not numbers or not 0.0 <= pair[0] <= pair[1] <= 1.0:
        raise MasaError(
            f"PromptToPrompt {name} is {bounds!r}; expected a fraction from 0 to 1, or a pair (start, end) of them"
        )
    return pair[0], pair[1]
