"""Tiled encoding and decoding: exact where the network is local, close where it is not, small, and without seams."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from masa.models import tiling


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any one result has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 pixels, which overlap by 32, above 96: the same code at a test's size."""
    for name, value in (("TILE", 64), ("OVERLAP", 32), ("LARGEST", 96)):
        monkeypatch.setattr(tiling, name, value)


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (832, 512), (320, 2048), (1088, 896)])
def test_a_local_network_is_reproduced_everywhere(height, width, generator):
    picture = torch.randn(1, 3, height, width, generator=generator)

    def shrink(x: torch.Tensor) -> torch.Tensor:
        assert max(x.shape[-2:]) <= tiling.TILE
        return F.avg_pool2d(x, 8)

    def grow(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(8, -1).repeat_interleave(8, -2)

    latents = tiling._blend(shrink, picture, tiling.TILE, tiling.OVERLAP, 1 / 8, step=8)
    torch.testing.assert_close(latents, F.avg_pool2d(picture, 8))
    torch.testing.assert_close(tiling._blend(grow, latents, 64, 16, 8, step=1), grow(latents))


@pytest.mark.parametrize("length", [64, 96, 104, 128, 136, 200, 256])
def test_tiles_cover_and_overlap(length):
    spans = tiling._spans(length, 64, 16, 8)
    assert spans[0].start == 0
    assert spans[-1].stop == length
    assert all(span.stop - span.start == 64 for span in spans)
    assert all(span.start % 8 == 0 for span in spans)  # where a latent begins
    gaps = [other.start - one.start for one, other in pairwise(spans)] or [0]
    assert max(gaps) - min(gaps) <= 8  # evenly spread
    assert all(one.stop - other.start >= 16 for one, other in pairwise(spans))


@pytest.mark.parametrize("across", [True, False])
def test_a_tile_s_share_falls_linearly_to_its_borders(across):
    """Two tiles of 8 that overlap by 4: in the overlap one's share falls by a fifth per place as the other's rises."""
    numbers = iter((0.0, 1.0))

    def numbered(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, next(numbers))

    x = torch.zeros(1, 1, 8, 12)
    out = tiling._blend(numbered, x if across else x.mT, 8, 4, 1, step=1)
    expected = torch.tensor([0.0] * 4 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 4).expand(1, 1, 8, 12)
    torch.testing.assert_close(out if across else out.mT, expected)


@torch.no_grad()
def test_up_to_the_limit_nothing_changes(tiny, small_tiles, generator):
    picture = torch.rand(1, 3, 96, 96, generator=generator) * 2 - 1
    latents = tiny.vae.encode(picture)
    assert torch.equal(tiling.encode(tiny.vae, picture), latents)
    assert torch.equal(tiling.decode(tiny.vae, latents), tiny.vae.decode(latents))
    # Over it on one side, tiles; forbidden, none.
    wide = torch.rand(1, 3, 64, 160, generator=generator) * 2 - 1
    whole = tiny.vae.encode(wide)
    assert not torch.equal(tiling.encode(tiny.vae, wide), whole)
    assert torch.equal(tiling.encode(tiny.vae, wide, tiled=False), whole)
    assert not torch.equal(tiling.decode(tiny.vae, whole), tiny.vae.decode(whole))
    assert torch.equal(tiling.decode(tiny.vae, whole, tiled=False), tiny.vae.decode(whole))
    # Asked for, also where a picture is small, and one tile is the whole.
    assert torch.equal(tiling.decode(tiny.vae, latents[..., :8, :8], tiled=True), tiny.vae.decode(latents[..., :8, :8]))
    assert not torch.equal(tiling.decode(tiny.vae, latents, tiled=True), tiny.vae.decode(latents))


@torch.no_grad()
def test_activations_are_a_tiles(tiny, small_tiles, generator):
    latents = torch.randn(1, 4, 32, 32, generator=generator)
    with Largest() as whole:
        tiny.vae.decode(latents)
    with Largest() as tiles:
        tiling.decode(tiny.vae, latents)
    # A picture of 256 pixels in tiles of 64: a sixteenth, but for the picture itself.
    assert tiles.elements <= max(whole.elements // 16, 3 * 256 * 256)


def test_the_model_tiles_large_pictures(tiny, small_tiles, generator):
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    assert tiny.decode_latents(latents)[0].tobytes() == tiny.decode_latents(latents, tiled=True)[0].tobytes()
    assert tiny.decode_latents(latents)[0].tobytes() != tiny.decode_latents(latents, tiled=False)[0].tobytes()
    picture = torch.rand(3, 128, 128, generator=generator) * 2 - 1
    found = {tiled: tiny.encode_image(picture, height=128, width=128, tiled=tiled) for tiled in (None, True, False)}
    assert torch.equal(found[None], found[True])
    assert not torch.equal(found[None], found[False])
