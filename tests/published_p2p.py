"""Prompt-to-Prompt, Plug-and-Play and the style variant as published, naively: every probability materialised.

Written from the papers' formulas on `published`'s hooks and loop, and independent of `masa`: nothing here imports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from published import Control, Oracle, attention
from torch import Tensor

Ids = Callable[[Sequence[str]], Tensor]
END = 49407


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])).softmax(-1)


# --------------------------------------------------------------------------------------- token alignment


def word_tokens(ids: Ids, prompt: str) -> list[list[int]]:
    """Positions of each word's tokens, by tokenizing every word alone."""
    found, position = [], 1
    for word in prompt.split(" "):
        count = ids([word])[0].tolist().index(END) - 1
        found.append(list(range(position, position + count)))
        position += count
    return found


def replacement_mapper(ids: Ids, source: str, target: str) -> Tensor:
    """The published walk along both prompts, each later token from its own source position."""
    source_words, target_words = source.split(" "), target.split(" ")
    swapped = [w for w in range(len(source_words)) if source_words[w] != target_words[w]]
    source_tokens, target_tokens = word_tokens(ids, source), word_tokens(ids, target)
    mapper = torch.zeros(77, 77)
    i = j = 0
    while i < 77 and j < 77:
        if swapped and source_tokens[swapped[0]][0] == i:
            s, t = source_tokens[swapped[0]], target_tokens[swapped.pop(0)]
            for n, position in enumerate(t):
                if len(s) == len(t):
                    mapper[s[n], position] = 1
                else:
                    mapper[s, position] = 1 / len(t)
            i, j = i + len(s), j + len(t)
        else:
            mapper[i, j] = 1
            i, j = i + 1, j + 1
    return mapper


def refinement_mapper(ids: Ids, source: str, target: str) -> tuple[Tensor, Tensor]:
    """Needleman-Wunsch with gap 0, match 1, mismatch -1: (source position or -1 of each token, aligned)."""
    x, y = ids([source])[0].tolist(), ids([target])[0].tolist()
    x, y = x[: x.index(END) + 1], y[: y.index(END) + 1]
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    move = [["left"] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i in range(1, len(x) + 1):
        move[i][0] = "up"
        for j in range(1, len(y) + 1):
            options = {
                "left": score[i][j - 1],
                "up": score[i - 1][j],
                "diagonal": score[i - 1][j - 1] + (1 if x[i - 1] == y[j - 1] else -1),
            }
            move[i][j] = max(options, key=options.__getitem__)  # the first of equals: left, up, diagonal
            score[i][j] = max(options.values())
    mapper = list(range(77))
    i, j = len(x), len(y)
    while j > 0:
        if i > 0 and move[i][j] == "up":
            i -= 1
        elif i > 0 and move[i][j] == "diagonal":
            i, j = i - 1, j - 1
            mapper[j] = i
        else:
            j -= 1
            mapper[j] = -1
    mapper_t = torch.tensor(mapper)
    return mapper_t, (mapper_t >= 0).float()


# ----------------------------------------------------------------------------------------------- controls


class PromptToPrompt(Control):
    """Edits the conditional half's probabilities; keeps what LocalBlend sums."""

    def __init__(
        self,
        edit: Callable[[Tensor, Tensor], Tensor] | None,  # (source's, targets') probabilities -> targets'
        cross_alpha: Tensor,  # (steps + 1, N, 77)
        self_steps: tuple[int, int],
        *,
        halves: int = 2,
        self_tokens: int = 32 * 32,
    ) -> None:
        super().__init__()
        self.edit, self.cross_alpha, self.self_steps = edit, cross_alpha, self_steps
        self.halves, self.self_tokens = halves, self_tokens
        self.store: dict[int, Tensor] = {}

    def attend(self, q, k, v, is_cross: bool, step: int, layer: int) -> Tensor:
        p = probabilities(q, k)
        first = len(q) - len(q) // self.halves
        base, targets = p[first], p[first + 1 :]
        if is_cross:
            if self.edit is not None:
                alpha = self.cross_alpha[step][:, None, None]
                p[first + 1 :] = self.edit(base, targets) * alpha + (1 - alpha) * targets
            if layer in (4, 5, 7, 8, 9):
                self.store[layer] = self.store.get(layer, 0) + p[first:]
        elif self.self_steps[0] <= step < self.self_steps[1] and q.shape[2] <= self.self_tokens:
            p[first + 1 :] = base
        return torch.einsum("bhij,bhjd->bhid", p, v)


def replace(mappers: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda base, targets: torch.einsum("hpw,bwn->bhpn", base, mappers)


def refine(mappers: Tensor, aligned: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def edit(base: Tensor, targets: Tensor) -> Tensor:
        moved = base[:, :, mappers].permute(2, 0, 1, 3)
        alpha = aligned[:, None, None]
        return moved * alpha + targets * (1 - alpha)

    return edit


def reweight(
    equalizer: Tensor, before: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    def edit(base: Tensor, targets: Tensor) -> Tensor:
        base = base[None] if before is None else before(base, targets)
        return base * equalizer[:, None, None]

    return edit


def schedule(
    steps: int,
    targets: int,
    default: tuple[float, float],
    words: Mapping[int, tuple[float, float]] | None = None,
) -> Tensor:
    """(steps + 1, N, 77) of 0 and 1; words: bounds by token position, in every target."""
    alpha = torch.zeros(steps + 1, targets, 77)
    alpha[int(default[0] * (steps + 1)) : int(default[1] * (steps + 1))] = 1
    for position, (start, end) in (words or {}).items():
        alpha[:, :, position] = 0
        alpha[int(start * (steps + 1)) : int(end * (steps + 1)), :, position] = 1
    return alpha


def local_blend(
    control: PromptToPrompt,
    tokens: Sequence[Sequence[int]],  # of the source and of each target
    start: int,
    threshold: tuple[float, float] = (0.3, 0.3),
    subtract: Sequence[Sequence[int]] | None = None,
) -> Callable[[int, Tensor], Tensor]:
    def mask(x: Tensor, chosen: Sequence[Sequence[int]], pool: bool, limit: float) -> Tensor:
        grid = (x.shape[2] // 4, x.shape[3] // 4)
        maps = torch.cat([control.store[layer] for layer in (4, 5, 7, 8, 9)], dim=1)
        picked = torch.stack([maps[b][..., list(t)].sum(-1).mean(0) for b, t in enumerate(chosen)])
        picked = picked.reshape(len(chosen), 1, *grid)
        if pool:
            picked = F.max_pool2d(picked, 3, 1, 1)
        picked = F.interpolate(picked, size=x.shape[2:])
        found = picked / picked.amax((2, 3), keepdim=True) > limit
        return found[:1] | found

    def blend(step: int, x: Tensor) -> Tensor:
        if step < start:
            return x
        found = mask(x, tokens, True, threshold[0])
        if subtract is not None:
            found = found & ~mask(x, subtract, False, threshold[1])
        return x[:1] + found.float() * (x - x[:1])

    return blend


class SourceLayout(Control):
    """Every target attends with the source's queries and keys of its half, and its own values."""

    def __init__(self, steps: Sequence[int], layers: Sequence[int], halves: int = 2) -> None:
        super().__init__()
        self.steps, self.layers, self.halves = set(steps), set(layers), halves

    def attend(self, q, k, v, is_cross: bool, step: int, layer: int) -> Tensor:
        if is_cross or step not in self.steps or layer not in self.layers:
            return attention(q, k, v)
        per_half = len(q) // self.halves
        sources = [row // per_half * per_half for row in range(len(q))]
        return torch.einsum("bhij,bhjd->bhid", probabilities(q, k)[sources], v)


# --------------------------------------------------------------------------------------------------- loop


class EditOracle(Oracle):
    """The published loop with what these methods add to it."""

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[str],
        x: Tensor,
        steps: int,
        guidance: float,
        control: Control,
        *,
        pinned: Sequence[Tensor] | None = None,
        feature_steps: int = 0,
        after_step: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The last latents (1 + N, 4, h, w). feature_steps: Plug-and-Play's features, injected in both halves."""
        self.hook(control)
        step = 0
        per_half = len(prompts)

        def inject(module, inputs, output: Tensor) -> Tensor:
            if step >= feature_steps:
                return output
            return output[[row // per_half * per_half for row in range(len(output))]]

        handle = self.unet.up_blocks[1].resnets[1].conv2.register_forward_hook(inject)
        for step, t in enumerate(self.timesteps(steps)):
            if pinned is not None:
                x = torch.cat([pinned[-1 - step], x[1:]])
            e = self.eps(x, t, prompts, guidance)
            a, a_prev = self.alpha(t), self.alpha(t - 1000 // steps)
            x = a_prev.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - a_prev).sqrt() * e
            if after_step is not None:
                x = after_step(step, x)
        handle.remove()
        return x
