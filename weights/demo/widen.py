"""A trained network's weights in a wider one of the same kind, which computes the same at first.

Net2Net (Chen, Goodfellow and Shlens, arXiv 1511.05641): every channel becomes several equal ones side by side, and
what reads them shares its weights among them, in random parts, so that training can tell them apart. Group norms of as
many groups see the same means and variances as before.
"""

import torch
from torch import Tensor, nn


def widen(state: dict[str, Tensor], wider: nn.Module, seed: int = 0) -> None:
    """Loads a narrower network's state; ValueError where a width is no multiple of the narrower one's."""
    draws = torch.Generator().manual_seed(seed)
    widened = {}
    for name, target in wider.state_dict().items():
        tensor = state[name].to(target.dtype)
        for dim, (before, after) in enumerate(zip(tensor.shape, target.shape, strict=True)):
            if after % before:
                raise ValueError(f"{name} is {before} wide in dimension {dim}: no divisor of {after}")
            copies = after // before
            if copies == 1:
                continue
            tensor = tensor.repeat_interleave(copies, dim)
            if dim == 1:  # what is read; dim 0 is what is made
                parts = torch.rand(len(tensor), before, copies, generator=draws) + 0.5
                parts = (parts / parts.sum(2, keepdim=True)).flatten(1)
                tensor = tensor * parts.view(*parts.shape, *[1] * (tensor.dim() - 2))
        widened[name] = tensor
    wider.load_state_dict(widened)
