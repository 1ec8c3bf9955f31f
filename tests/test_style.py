"""The style variant: the source's queries and keys with the target's values."""

from __future__ import annotations

import pytest
import torch
from published_p2p import EditOracle, SourceLayout

import masa

SOURCE, TARGET, OTHER = "a photo of a cat", "a photo of a wooden dog", "an origami horse"
STEPS = 6
TOLERANCE = 5e-4  # of the latents' standard deviation


@pytest.fixture
def noise(generator):
    return torch.randn(1, 4, 8, 16, generator=generator)


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.std())


def run(tiny, noise, control, targets=(TARGET,), **settings):
    size = {"height": 64, "width": 128, "steps": STEPS, "latents": noise, "progress": False}
    return masa.sample(tiny, SOURCE, targets, controls=control, **(size | settings)).latents


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_equals_the_formula(tiny, tiny_folder, noise, guidance):
    out = run(tiny, noise, masa.StyleTransfer(1, 4), (TARGET, OTHER), guidance_scale=guidance)
    oracle = EditOracle(tiny_folder, tiny.tokenizer)
    control = SourceLayout(range(1, STEPS), range(4, 16), halves=2 if guidance > 1 else 1)
    ref = oracle.run([SOURCE, TARGET, OTHER], noise.expand(3, -1, -1, -1), STEPS, guidance, control)
    assert difference(out, ref) < TOLERANCE


def test_every_setting_matters(tiny, noise):
    controls = [
        [],
        masa.StyleTransfer(0, 8),
        masa.StyleTransfer(2, 8),
        masa.StyleTransfer(0, 12),
        masa.StyleTransfer(steps=[2], start_layer=8),
        masa.StyleTransfer(0, layers=[8, 9]),
        masa.MasaCtrl(0, 8),
    ]
    latents = [run(tiny, noise, control)[1] for control in controls]
    for i, one in enumerate(latents):
        for other in latents[:i]:
            assert difference(one, other) > 20 * TOLERANCE


def test_source_is_unchanged_and_targets_together_equal_targets_alone(tiny, noise):
    together = run(tiny, noise, masa.StyleTransfer(1, 4), (TARGET, OTHER))
    assert difference(together[:1], run(tiny, noise, [], ())[:1]) < 1e-4
    assert difference(together[2], run(tiny, noise, masa.StyleTransfer(1, 4), (OTHER,))[1]) < 1e-4


def test_a_control_used_twice_gives_the_same(tiny, noise):
    control = masa.StyleTransfer(1, 4)
    assert torch.equal(run(tiny, noise, control), run(tiny, noise, control))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_step": -1}, "start_step is -1"),
        ({"start_step": STEPS}, "selects no step"),
        ({"layers": [16]}, "transformer blocks from 0 to 15"),
    ],
)
def test_bad_settings_are_named(tiny, noise, settings, message):
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, noise, masa.StyleTransfer(**settings))
