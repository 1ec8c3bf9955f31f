"""Which tokens of one prompt correspond to which of another (2208.01626, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masa.errors import MasaError

# A bare prompt -> token ids and each one's span of characters.
Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's tokens as the text encoder sees them.

    ids: start, the prompt's tokens as far as they fit, end; no padding. words: those that white space
    separates, each with the positions of its tokens (empty where the prompt was cut before them).
    """

    text: str
    ids: tuple[int, ...]
    words: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, prompt: str, encode: Encode, tokens: int = 77) -> TokenizedPrompt:
        ids, spans = encode(prompt)
        ids, spans = ids[: tokens - 2], spans[: tokens - 2]
        words = []
        for match in re.finditer(r"\S+", prompt):
            inside = (i + 1 for i, (start, end) in enumerate(spans) if start < match.end() and end > match.start())
            words.append((match.group(), tuple(inside)))
        # Start and end belong to no vocabulary of words: any ids that no word has serve to align them.
        return cls(prompt, (-1, *ids, -2), tuple(words))


def replacement_map(source: TokenizedPrompt, target: TokenizedPrompt, tokens: int = 77) -> Tensor:
    """M (tokens, tokens), source x target, of a word swap: P_target = P_source M.

    Words are paired in order. Tokens of a pair correspond one to one; where their numbers differ, each token of
    the target's word takes the sum over the source's word, divided by its own number of tokens. All that
    follows, padding too, moves along. MasaError where the numbers of words differ. 2208.01626, "Word swap".
    """
    if len(source.words) != len(target.words):
        raise MasaError(
            f"edit='replace' swaps word for word: {source.text!r} has {len(source.words)} words and {target.text!r} "
            f"{len(target.words)}; give prompts of equal length, or edit='refine'"
        )
    matrix = torch.zeros(tokens, tokens)
    matrix[0, 0] = 1.0
    for (_, ours), (_, theirs) in zip(source.words, target.words, strict=True):
        if len(ours) == len(theirs):
            matrix[list(ours), list(theirs)] = 1.0
        elif ours and theirs:
            matrix[ours[0] : ours[-1] + 1, list(theirs)] = 1.0 / len(theirs)
    ends = len(source.ids) - 1, len(target.ids) - 1
    for i, j in zip(range(ends[0], tokens), range(ends[1], tokens), strict=False):
        matrix[i, j] = 1.0
    return matrix


def refinement_map(source: TokenizedPrompt, target: TokenizedPrompt, tokens: int = 77) -> tuple[Tensor, Tensor]:
    """M (tokens, tokens), source x target, of an added phrase, and which target tokens (tokens,) it serves.

    Aligned tokens take their counterpart's column, new ones have none and keep their own map. Padding after both
    ends corresponds place by place. 2208.01626, "Adding a new phrase".
    """
    matrix, aligned = torch.zeros(tokens, tokens), torch.zeros(tokens)
    both_padded = range(max(len(source.ids), len(target.ids)), tokens)
    for i, j in [*align(source.ids, target.ids), *zip(both_padded, both_padded, strict=True)]:
        matrix[i, j] = 1.0
        aligned[j] = 1.0
    return matrix, aligned


def align(source: Sequence[int], target: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions (source, target) that a global alignment matches, in order.

    Needleman-Wunsch with gap 0, match 1 and mismatch -1, so that only equal tokens are ever paired. Of equally
    good alignments the one is taken that leaves out the target's tokens, then the source's, from the end on.
    """
    rows, columns = len(source) + 1, len(target) + 1
    score = [[0] * columns for _ in range(rows)]
    for i in range(1, rows):
        for j in range(1, columns):
            match = score[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], match)
    pairs: list[tuple[int, int]] = []
    i, j = len(source), len(target)
    while i > 0 and j > 0:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]
