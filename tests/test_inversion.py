"""Inversion: equality with the published loop under every kind of guidance, and that it leads back."""

from __future__ import annotations

import pytest
import torch
from published import Oracle

import masa


@pytest.fixture(scope="module")
def oracle(tiny_folder, tiny):
    return Oracle(tiny_folder, tiny.tokenizer)


@pytest.mark.parametrize("prompt", ["", "a photo of a cat"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_the_published_loop(tiny, oracle, generator, prompt, guidance):
    picture = torch.rand(3, 64, 128, generator=generator) * 2 - 1
    out = masa.invert(tiny, picture, prompt, steps=6, guidance_scale=guidance, height=64, width=128, progress=False)
    reference = torch.cat(oracle.invert(out.latents[:1], prompt, 6, guidance))
    assert out.latents.shape == (7, 4, 8, 16)
    # 5e-4 of the standard deviation: float32 rounding over the trajectory.
    assert (out.latents - reference).abs().max() / reference.std() < 5e-4


def test_starts_at_the_picture(tiny, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    out = masa.invert(tiny, picture, steps=2, height=64, width=64, progress=False)
    assert torch.equal(out.latents[:1], tiny.encode_image(picture, height=64, width=64))


def test_guidance_and_steps_matter(tiny, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1

    def last(**settings):
        defaults = {"steps": 3, "height": 64, "width": 64, "progress": False}
        return masa.invert(tiny, picture, "a cat", **(defaults | settings)).latents[-1]

    assert not torch.equal(last(), last(guidance_scale=4.0))
    assert not torch.equal(last(), last(steps=4))
    assert not torch.equal(last(), last(schedule=masa.Schedule(offset=0)))


def test_unknown_method_is_named(tiny):
    with pytest.raises(masa.MasaError, match="inversion method is 'magic'"):
        masa.invert(tiny, torch.zeros(3, 64, 64), method="magic")
