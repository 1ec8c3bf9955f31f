"""Layers that compute a row alike whatever the other rows, in float32 on a CPU.

torch's choose an algorithm, and where a sum is cut, by the size of the batch: a target would then differ in its last
bits with the number of rows beside it. Large matrix products and attention do not, so with these a network does not.
(Measured with MKL on AVX2; a matrix library may promise less.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below this many lines of its left matrix a product rounds as their number tells it to; of 8 and more nothing was seen.
LEAST_LINES = 16
# From this many pixels on a group norm cuts its sums by threads, across rows.
LARGE_MAP = 1024


def applies(x: Tensor) -> bool:
    """Whether to see to it that rows are computed alike: in float32, on a CPU, with grad mode off, no graph."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class Conv2d(nn.Conv2d):
    """nn.Conv2d; where `applies` a row at a time, or, of 1x1, as one product with all pixels."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or not applies(input):
            return super().forward(input)
        pixels = input.permute(0, 2, 3, 1)
        if self._is_product and pixels.is_contiguous() and input.shape[2:].numel() >= LEAST_LINES:
            return F.linear(pixels, self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)
        if len(input) == 1:
            return super().forward(input)
        return torch.cat([super(Conv2d, self).forward(row) for row in input.split(1)])

    @property
    def _is_product(self) -> bool:
        """Whether it is a 1x1 convolution, and nobody has changed its stride, padding or groups."""
        return (self.kernel_size, self.stride, self.padding, self.groups) == ((1, 1), (1, 1), (0, 0), 1)


class Linear(nn.Linear):
    """nn.Linear; where `applies` a row at a time of few tokens (rows, tokens, width)."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 3 or len(input) == 1 or input.shape[1] >= LEAST_LINES or not applies(input):
            return super().forward(input)
        return torch.cat([super(Linear, self).forward(row) for row in input.split(1)])


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm; where `applies` a row at a time of large maps."""

    def forward(self, input: Tensor) -> Tensor:
        if len(input) == 1 or input.shape[2:].numel() < LARGE_MAP or not applies(input):
            return super().forward(input)
        return torch.cat([super(GroupNorm, self).forward(row) for row in input.split(1)])
