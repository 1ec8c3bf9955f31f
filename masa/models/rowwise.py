"""Layers that compute a row alike whatever the other rows, in float32 on a CPU.

torch's choose an algorithm, and where a sum is cut, by the size of the batch: a target would then differ in its last
bits with the number of rows beside it. Large matrix products and attention do not, so with these a network does not.
(Measured with MKL on AVX2; a matrix library may promise less.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Below this many lines of its left matrix a product rounds as their number tells it to; of 8 and more nothing was seen.
LEAST_LINES = 16


def in_turn(x: Tensor) -> bool:
    """Whether the rows of x are computed one by one: in float32, on a CPU, without a gradient or a graph."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return len(x) > 1 and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class Conv2d(nn.Conv2d):
    """nn.Conv2d, a row at a time where `in_turn`."""

    def forward(self, input: Tensor) -> Tensor:
        if not in_turn(input):
            return super().forward(input)
        return torch.cat([super(Conv2d, self).forward(row) for row in input.split(1)])


class Linear(nn.Linear):
    """nn.Linear; of few tokens (rows, tokens, width) a row at a time where `in_turn`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 3 or input.shape[1] >= LEAST_LINES or not in_turn(input):
            return super().forward(input)
        return torch.cat([super(Linear, self).forward(row) for row in input.split(1)])


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, a row at a time where `in_turn`."""

    def forward(self, input: Tensor) -> Tensor:
        if not in_turn(input):
            return super().forward(input)
        return torch.cat([super(GroupNorm, self).forward(row) for row in input.split(1)])
