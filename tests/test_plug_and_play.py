"""Plug-and-Play against the published arithmetic."""

from __future__ import annotations

import pytest
import torch
from published_p2p import EditOracle, SourceLayout

import masa

SOURCE, TARGET, OTHER = "a photo of a cat", "a photo of a wooden dog", "an origami horse"
STEPS = 6
TOLERANCE = 5e-4  # of the latents' standard deviation


LOUDER = 30.0  # a fresh network's features are so faint that injecting them would hardly show


@pytest.fixture(scope="module", autouse=True)
def louder_features(tiny):
    weight = tiny.unet.up_blocks[1].resnets[1].conv2.weight.data
    whole = weight.clone()
    weight *= LOUDER
    yield
    weight.copy_(whole)  # bit for bit: the model is every test's


@pytest.fixture(scope="module")
def oracle(tiny_folder, tiny):
    oracle = EditOracle(tiny_folder, tiny.tokenizer)
    oracle.unet.up_blocks[1].resnets[1].conv2.weight.data *= LOUDER
    return oracle


@pytest.fixture
def noise(generator):
    return torch.randn(1, 4, 8, 16, generator=generator)


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.std())


def run(tiny, noise, control, source="", targets=(TARGET, OTHER), **settings):
    size = {"height": 64, "width": 128, "steps": STEPS, "latents": noise, "progress": False}
    return masa.sample(tiny, source, targets, controls=control, **(size | settings)).latents


@pytest.mark.parametrize(
    ("fractions", "steps"), [((0.8, 0.5), (4, 3)), ((0.0, 1.0), (0, 6)), ((0.5, 0.0), (3, 0)), ((0.34, 0.84), (2, 5))]
)
@pytest.mark.parametrize(("source", "guidance"), [("", 7.5), (SOURCE, 7.5), (SOURCE, 1.0)])
def test_equals_the_published_arithmetic(tiny, oracle, noise, fractions, steps, source, guidance):
    out = run(tiny, noise, masa.PlugAndPlay(*fractions), source, guidance_scale=guidance)
    control = SourceLayout(range(steps[1]), range(8, 16), halves=2 if guidance > 1 else 1)
    prompts = [source, TARGET, OTHER]
    ref = oracle.run(prompts, noise.expand(3, -1, -1, -1), STEPS, guidance, control, feature_steps=steps[0])
    assert difference(out, ref) < TOLERANCE


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_a_pinned_source_equals_the_published_arithmetic(tiny, oracle, generator, features):
    """Without features the source's rows retire after layer 15, with features alone after layer 8."""
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    trajectory = masa.invert(tiny, picture, steps=STEPS, height=64, width=64, progress=False)
    control = masa.PlugAndPlay(features, 1.0 - features)
    out = masa.sample(tiny, target=TARGET, trajectory=trajectory, controls=control, progress=False).latents
    way = [z[None] for z in trajectory.latents]
    ref = oracle.run(
        ["", TARGET],
        way[-1].expand(2, -1, -1, -1),
        STEPS,
        7.5,
        SourceLayout(range(STEPS if features == 0 else 0), range(8, 16)),
        pinned=way,
        feature_steps=int(features * STEPS),
    )
    assert difference(out, ref) < TOLERANCE


def test_both_settings_matter(tiny, noise):
    controls = [[], masa.PlugAndPlay(), masa.PlugAndPlay(feature_steps=0.2), masa.PlugAndPlay(attention_steps=0.2)]
    latents = [run(tiny, noise, control, targets=[TARGET])[1] for control in controls]
    for i, one in enumerate(latents):
        for other in latents[:i]:
            assert difference(one, other) > 20 * TOLERANCE


def test_source_is_unchanged_and_targets_together_equal_targets_alone(tiny, noise):
    together = run(tiny, noise, masa.PlugAndPlay(), SOURCE)
    assert difference(together[:1], run(tiny, noise, [], SOURCE)[:1]) < 1e-4
    for i, target in enumerate((TARGET, OTHER)):
        alone = run(tiny, noise, masa.PlugAndPlay(), SOURCE, [target])
        assert difference(together[1 + i], alone[1]) < 1e-4


def test_the_target_with_the_sources_prompt_is_the_source(tiny, noise):
    out = run(tiny, noise, masa.PlugAndPlay(1.0, 1.0), SOURCE, [SOURCE])
    assert difference(out[1], out[0]) < 1e-4


def test_a_control_used_twice_gives_the_same(tiny, noise):
    control = masa.PlugAndPlay()
    assert torch.equal(run(tiny, noise, control), run(tiny, noise, control))


@pytest.mark.parametrize("settings", [{"feature_steps": 1.5}, {"attention_steps": -0.1}])
def test_bad_fractions_are_named(settings):
    with pytest.raises(masa.MasaError, match=r"expected a number from 0 to 1"):
        masa.PlugAndPlay(**settings)


def test_a_control_that_selects_nothing_is_refused(tiny, noise):
    with pytest.raises(masa.MasaError, match="selects no step of a run of 6"):
        run(tiny, noise, masa.PlugAndPlay(0.1, 0.0))


def test_two_controls_of_one_field_are_refused_by_name(tiny, noise):
    with pytest.raises(masa.MasaError, match=r"both set k_from at .*layer 10.* in step 1: PlugAndPlay and MasaCtrl"):
        run(tiny, noise, [masa.PlugAndPlay(), masa.MasaCtrl(1, 10)])
