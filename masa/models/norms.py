"""Group norms whose statistics are taken over the positions of two rows together, as StyleAligned's are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from masa.edits import Edit, Site, Tape


def edited_norm(norm: nn.GroupNorm, x: Tensor, edit: Edit, site: Site, tape: Tape) -> Tensor:
    """norm(x) of x (rows, c, h, w), where `edit.norm_with` names for each row the row that it shares statistics with.

    A row that names itself is normalised alone. 2312.02133 (in its published code; the paper names attention alone).
    """
    if "norm" in edit.to_cache:
        tape[("cache", "norm"), site.index] = torch.cat([group_moments(norm, row) for row in x.split(1)])
    out = norm(x)
    if edit.norm_with is None:
        return out
    cached = None if edit.cached is None else edit.cached.norm

    def of(row: int) -> Tensor:
        if row < len(x):
            return group_moments(norm, x[row : row + 1])
        assert cached is not None, "statistics are read that no cache holds"
        return cached[row - len(x)][None]

    shared = []
    for row, other in enumerate(edit.norm_with):
        if other == row:
            shared.append(out[row : row + 1])
        else:
            shared.append(_normalise(norm, x[row : row + 1], _join(of(row), of(other))))
    return torch.cat(shared)


def group_moments(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Mean and biased variance of each group of channels over positions: (rows, 2, groups), at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(len(x), norm.num_groups, -1)
    variance, mean = torch.var_mean(wide, dim=2, unbiased=False)
    return torch.stack([mean, variance], dim=1)


def _join(a: Tensor, b: Tensor) -> Tensor:
    """The moments of two equally large sets together, from those of each."""
    (mean_a, variance_a), (mean_b, variance_b) = a.unbind(1), b.unbind(1)
    half = (mean_a - mean_b) / 2.0
    return torch.stack([(mean_a + mean_b) / 2.0, (variance_a + variance_b) / 2.0 + half * half], dim=1)


def _normalise(norm: nn.GroupNorm, x: Tensor, statistics: Tensor) -> Tensor:
    """x (1, c, h, w) normalised by given moments (1, 2, groups)."""
    mean, variance = statistics.repeat_interleave(x.shape[1] // norm.num_groups, dim=2).unbind(1)
    gain = (variance + norm.eps).rsqrt() * norm.weight
    offset = norm.bias - mean * gain
    return (x * gain[:, :, None, None] + offset[:, :, None, None]).to(x.dtype)
