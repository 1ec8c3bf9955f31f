"""The transformer block: passes over the tokens and layouts change nothing but time."""

from __future__ import annotations

import copy

import pytest
import torch

from masa.attention import Call
from masa.models import transformer
from masa.models.transformer import FeedForward


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("tokens", [16, 20, 33, 66, 1000])
def test_passes_over_the_tokens_equal_one(tokens, generator, monkeypatch):
    torch.manual_seed(0)
    module, x = FeedForward(32), torch.randn(2, 33, 32, generator=generator)
    monkeypatch.setattr(transformer, "TOKENS_PER_PASS", tokens)
    out = module(x)
    assert out.shape == x.shape
    assert relative_error(out, module.net[2](module.net[0](x))) < 1e-5


@torch.no_grad()
def test_layouts_agree(tiny, generator):
    x, context = torch.randn(2, 4, 16, 24, generator=generator), torch.randn(2, 77, 32, generator=generator)
    assert tiny.unet.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    first = copy.deepcopy(tiny.unet).to(memory_format=torch.contiguous_format)
    eps, _ = tiny.unet(x, 300, context)
    assert relative_error(first(x, 300, context)[0], eps) < 1e-5
    # Every block keeps the layout of its weights.
    layouts = []
    for unet in (tiny.unet, first):
        block = unet.down_blocks[0].attentions[0]
        features = unet.down_blocks[0].resnets[0](unet.conv_in(x), torch.zeros(2, 128))
        out = block(features, context, Call({}, {}))
        layouts.append((out.is_contiguous(), out.is_contiguous(memory_format=torch.channels_last)))
    assert layouts == [(False, True), (True, False)]
