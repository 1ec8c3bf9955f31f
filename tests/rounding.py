"""Whether this machine's matrix library computes a row alike whatever the others: asked before bits are compared."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

# Else: float32 rounding, grown over a few steps. Measured before rows were computed alike: at most 1.2e-5.
TOLERANCE = 3e-4


def products_are_rowwise() -> bool:
    """True of MKL on AVX2. A library that cuts its sums by the number of lines may say otherwise."""
    return _products_are_rowwise(torch.get_num_threads())


@cache
def _products_are_rowwise(threads: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    for tokens, width, out_width in ((16, 64, 64), (64, 256, 64), (77, 32, 64), (256, 32, 256), (256, 320, 320)):
        x = torch.randn(6, tokens, width, generator=generator)
        weight = torch.randn(out_width, width, generator=generator)
        whole = F.linear(x, weight)
        parts = ([0], [1, 2], [1, 2, 3], [0, 1, 2, 3, 5])
        if not all(torch.equal(F.linear(x[rows], weight), whole[rows]) for rows in parts):
            return False
    return True


def same(out: torch.Tensor, ref: torch.Tensor) -> None:
    """The same bits, where the products under them are row by row; else the same up to rounding."""
    assert out.shape == ref.shape
    error = (out - ref).abs().max() / ref.std()
    assert error <= (0.0 if products_are_rowwise() else TOLERANCE), f"error {error:.2e} of the standard deviation"
