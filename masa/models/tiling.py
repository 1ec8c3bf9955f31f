"""The autoencoder on pictures too large for one piece: overlapping tiles, blended.

Activations are then a tile's, not the picture's. The result differs from an untiled one, since the norms and the
attention in the middle see one tile at a time, by how much depends on the autoencoder; overlaps are blended.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from masa.models.taesd import TinyVAE
from masa.models.vae import VAE

# In pixels. Up to LARGEST on each side a picture is one piece, and its result exact.
LARGEST = 768
TILE, OVERLAP = 512, 128


def encode(vae: VAE | TinyVAE, picture: Tensor, tiled: bool | None = None) -> Tensor:
    """`vae.encode` of a picture (b, 3, H, W). tiled: default where a side is over 768 pixels."""
    if not _wanted(tiled, picture.shape[-2:]):
        return vae.encode(picture)
    scale = vae.config.downsample
    return _blend(vae.encode, picture, TILE, OVERLAP, 1 / scale, step=scale)


def decode(vae: VAE | TinyVAE, latents: Tensor, tiled: bool | None = None) -> Tensor:
    """`vae.decode` of latents (b, 4, h, w). tiled: default where the picture has a side over 768 pixels."""
    scale = vae.config.downsample
    if not _wanted(tiled, torch.Size(side * scale for side in latents.shape[-2:])):
        return vae.decode(latents)
    return _blend(vae.decode, latents, TILE // scale, OVERLAP // scale, scale, step=1)


def _wanted(tiled: bool | None, size: torch.Size) -> bool:
    return max(size) > LARGEST if tiled is None else tiled


def _blend(network: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: float, step: int) -> Tensor:
    """The network on tiles of x (b, c, h, w), which it makes `scale` times as large; starts are multiples of step.

    Each tile's share falls linearly to its borders; shares are divided by their sum.
    """
    total, shares = None, None
    down, across = (_spans(side, tile, overlap, step) for side in x.shape[-2:])
    if len(down) == len(across) == 1:
        return network(x)
    for rows in down:
        for columns in across:
            out = network(x[..., rows, columns]).float()
            share = _ramp(out.shape[-2], out)[:, None] * _ramp(out.shape[-1], out)
            if total is None or shares is None:
                size = [round(side * scale) for side in x.shape[-2:]]
                total, shares = out.new_zeros(*out.shape[:2], *size), out.new_zeros(size)
            high, wide = (slice(round(s.start * scale), round(s.stop * scale)) for s in (rows, columns))
            total[..., high, wide] += out * share
            shares[high, wide] += share
    assert total is not None
    assert shares is not None
    return (total / shares).to(x.dtype)


def _spans(length: int, tile: int, overlap: int, step: int) -> list[slice]:
    """Evenly spread tiles that cover `length` and overlap by at least `overlap`."""
    if length <= tile:
        return [slice(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [(length - tile) * i // (count - 1) // step * step for i in range(count)]
    return [slice(start, start + tile) for start in starts]


def _ramp(length: int, like: Tensor) -> Tensor:
    """1, 2, .. up to the middle and down again: (length,)."""
    place = torch.arange(length, dtype=like.dtype, device=like.device)
    return torch.minimum(place, length - 1 - place) + 1
