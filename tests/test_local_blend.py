"""LocalBlend against the published one, and its properties."""

from __future__ import annotations

import published_p2p as published
import pytest
import torch

import masa

STEPS = 6
TOLERANCE = 5e-4  # of the latents' standard deviation
SOURCE = "a photo of a cat on the grass"
TARGETS = ("a photo of a dog on the grass", "a photo of a labradoodle on the lawn")


@pytest.fixture
def noise(generator):
    return torch.randn(1, 4, 16, 24, generator=generator)


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.std())


def run(tiny, noise, control, targets=TARGETS, **settings):
    size = {"height": 128, "width": 192, "steps": STEPS, "latents": noise, "progress": False}
    return masa.sample(tiny, SOURCE, targets, controls=control, **(size | settings))


# the blend, and the published one's start, thresholds and subtracted tokens
CASES = {
    "plain": (masa.LocalBlend("cat", ["dog", "labradoodle"], threshold=0.95), 1, (0.95, 0.3), None),
    "subtract": (
        masa.LocalBlend(
            "cat",
            ["dog", "labradoodle"],
            threshold=0.93,
            start=0.5,
            subtract_source="grass",
            subtract_target=["grass", "lawn"],
            subtract_threshold=0.97,
        ),
        3,
        (0.93, 0.97),
        ([8], [8], [9]),
    ),
}


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_blend(tiny, tiny_folder, noise, case, guidance):
    blend, start, thresholds, subtract = CASES[case]
    control = masa.PromptToPrompt(cross_replace_steps=0.5, self_replace_steps=0.3, local_blend=blend)
    result = run(tiny, noise, control, guidance_scale=guidance)
    masks = torch.stack(list(result.masks[0].values()))
    assert 0.05 < masks.mean() < 0.95  # else the thresholds would test nothing

    ids = tiny.tokenizer
    mappers = torch.stack([published.replacement_mapper(ids, SOURCE, target) for target in TARGETS])
    schedule = published.schedule(STEPS, 2, (0, 0.5))
    reference = published.PromptToPrompt(published.replace(mappers), schedule, (0, 1), halves=2 if guidance > 1 else 1)
    after = published.local_blend(reference, ([5], [5], [5, 6]), start, thresholds, subtract)
    oracle = published.EditOracle(tiny_folder, ids)
    prompts = [SOURCE, *TARGETS]
    ref = oracle.run(prompts, noise.expand(3, -1, -1, -1), STEPS, guidance, reference, after_step=after)
    assert difference(result.latents, ref) < TOLERANCE


def test_every_setting_matters(tiny, noise):
    base = {"source": "cat", "target": "dog", "threshold": 0.98, "start": 0.0}
    subtract = {"subtract_source": "grass", "subtract_target": "grass", "subtract_threshold": 0.96}
    changes = [
        {},
        {"source": "grass"},
        {"target": "photo"},
        {"threshold": 0.96},
        subtract,
        subtract | {"subtract_source": "photo"},
        subtract | {"subtract_target": "the"},
        subtract | {"subtract_threshold": 0.98},
    ]
    latents = [run(tiny, noise, masa.LocalBlend(**(base | c)), TARGETS[:1], steps=3).latents[1] for c in changes]
    for i, one in enumerate(latents):
        for other in latents[:i]:
            assert difference(one, other) > 20 * TOLERANCE


def test_outside_its_mask_the_target_is_the_source(tiny, noise):
    out = run(tiny, noise, masa.LocalBlend("cat", "dog", threshold=0.95, start=0.5), TARGETS[:1])
    assert sorted(out.masks[0]) == [3, 4, 5]
    outside = out.masks[0][5][1] == 0
    assert torch.equal(out.latents[1][:, outside], out.latents[0][:, outside])
    assert not torch.equal(out.latents[1], out.latents[0])
    earlier = run(tiny, noise, masa.LocalBlend("cat", "dog", threshold=0.95, start=0.0), TARGETS[:1])
    assert not torch.equal(out.latents[1], earlier.latents[1])


def test_a_threshold_of_1_leaves_the_source(tiny, noise):
    out = run(tiny, noise, masa.LocalBlend("cat", "dog", threshold=1.0), TARGETS[:1])
    assert difference(out.latents[1], out.latents[0]) < 1e-5


def test_targets_together_equal_targets_alone(tiny, noise):
    together = run(tiny, noise, masa.LocalBlend("cat", ["dog", "labradoodle"], threshold=0.95)).latents
    alone = run(tiny, noise, masa.LocalBlend("cat", "dog", threshold=0.95), TARGETS[:1]).latents
    assert difference(together[1], alone[1]) < 1e-4


def test_joins_masactrl(tiny, noise):
    """Both keep their own masks, found from the same maps."""
    mutual = masa.MasaCtrl(1, 8, mask=masa.WordMasks("cat", "dog", threshold=0.4))
    both = run(tiny, noise, [mutual, masa.LocalBlend("cat", "dog", threshold=0.95)], TARGETS[:1], steps=3)
    assert sorted(both.masks) == [0, 1]
    assert difference(both.latents[1], run(tiny, noise, mutual, TARGETS[:1], steps=3).latents[1]) > 20 * TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.1}, "threshold is 1.1"),
        ({"start": -0.1}, "start is -0.1"),
        ({"start": 1.0}, "start is 1.0, after the last of 6 steps"),
        ({"source": "horse"}, "'horse' is not in the prompt"),
        ({"target": "horse"}, "'horse' is not in the prompt"),
        ({"subtract_source": "grass"}, "give subtract_source and subtract_target"),
    ],
)
def test_bad_settings_are_named(tiny, noise, settings, message):
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, noise, masa.LocalBlend(**({"source": "cat", "target": "dog"} | settings)), TARGETS[:1])


def test_every_target_needs_a_word(tiny, noise):
    with pytest.raises(masa.MasaError, match="finds none of 'dog' in the prompt 'a photo of a labradoodle"):
        run(tiny, noise, masa.LocalBlend("cat", "dog"))
