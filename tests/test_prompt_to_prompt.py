"""Prompt-to-Prompt against the published controllers, and its properties."""

from __future__ import annotations

import json

import published_p2p as published
import pytest
import torch

import masa
from masa.controls.base import Run
from masa.settings import describe, restore

STEPS = 6
TOLERANCE = 5e-4  # of the latents' standard deviation
SOURCE = "a photo of a siamese cat"
SWAPS = ("a photo of a labradoodle dog", "a drawing of a siamese horse")
ADDITIONS = ("a photo of a fluffy siamese cat", "a photo of a siamese cat at night, in snow")


@pytest.fixture(scope="module")
def oracle(tiny_folder, tiny):
    return published.EditOracle(tiny_folder, tiny.tokenizer)


@pytest.fixture
def noise(generator):
    return torch.randn(1, 4, 8, 16, generator=generator)


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.std())


def run(tiny, noise, control, targets, source=SOURCE, **settings):
    size = {"height": 64, "width": 128, "steps": STEPS, "latents": noise, "progress": False}
    return masa.sample(tiny, source, targets, controls=control, **(size | settings)).latents


def replace(ids, targets=SWAPS):
    return published.replace(torch.stack([published.replacement_mapper(ids, SOURCE, target) for target in targets]))


def refine(ids, targets=ADDITIONS):
    pairs = [published.refinement_mapper(ids, SOURCE, target) for target in targets]
    return published.refine(torch.stack([m for m, _ in pairs]), torch.stack([a for _, a in pairs]))


def factors(**by_position: float) -> torch.Tensor:
    """Both targets' factors: p5=2.0 is 2.0 for token 5."""
    found = torch.ones(2, 77)
    for position, factor in by_position.items():
        found[:, int(position[1:])] = factor
    return found


P2P = masa.PromptToPrompt
# control, targets, the published edit, its cross-attention schedule, its self-attention steps, other settings
CASES = {
    "replace": (P2P(), SWAPS, replace, (0, 0.8), {}, (0, 2), {}),
    "refine": (
        P2P("refine", cross_replace_steps=(0.3, 0.9), self_replace_steps=(0.2, 0.7)),
        ADDITIONS,
        refine,
        (0.3, 0.9),
        {},
        (1, 4),
        {},
    ),
    "reweight": (
        P2P(None, {"siamese": 4.0, "photo": -1.0}, self_replace_steps=0.0),
        (SOURCE, SOURCE),
        lambda ids: published.reweight(factors(p5=4.0, p2=-1.0)),
        (0, 0.8),
        {},
        (0, 0),
        {},
    ),
    "replace and reweight": (
        P2P(reweight={4: 3.0}),
        SWAPS,
        lambda ids: published.reweight(factors(p4=3.0), replace(ids)),
        (0, 0.8),
        {},
        (0, 2),
        {},
    ),
    "refine and reweight": (
        P2P("refine", {"a photo": 3.0, "siamese": 0.5}, cross_replace_steps=0.5),
        (ADDITIONS[0], ADDITIONS[0]),
        lambda ids: published.reweight(factors(p1=3.0, p2=3.0, p6=0.5), refine(ids, (ADDITIONS[0], ADDITIONS[0]))),
        (0, 0.5),
        {},
        (0, 2),
        {},
    ),
    "bounds by word": (
        P2P(cross_replace_steps={"default": 0.4, "of": (0.2, 1.0), 5: 0.9}),
        SWAPS,
        replace,
        (0, 0.4),
        {3: (0.2, 1.0), 5: (0.0, 0.9)},
        (0, 2),
        {},
    ),
    "no guidance": (P2P(), SWAPS, replace, (0, 0.8), {}, (0, 2), {"guidance_scale": 1.0}),
    "few self-attention tokens": (
        P2P(self_replace_steps=0.9, self_replace_tokens=8),
        SWAPS,
        replace,
        (0, 0.8),
        {},
        (0, 5),
        {"self_tokens": 8},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_controller(tiny, oracle, noise, case):
    control, targets, edit, default, words, self_steps, others = CASES[case]
    guidance = others.get("guidance_scale", 7.5)
    out = run(tiny, noise, control, targets, guidance_scale=guidance)
    reference = published.PromptToPrompt(
        edit(tiny.tokenizer),
        published.schedule(STEPS, 2, default, words),
        self_steps,
        halves=2 if guidance > 1 else 1,
        self_tokens=others.get("self_tokens", 32 * 32),
    )
    ref = oracle.run([SOURCE, *targets], noise.expand(3, -1, -1, -1), STEPS, guidance, reference)
    assert difference(out, ref) < TOLERANCE


def test_a_pinned_source_equals_the_published_controller(tiny, oracle, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    trajectory = masa.invert(tiny, picture, SOURCE, steps=STEPS, height=64, width=64, progress=False)
    settings = {"cross_replace_steps": 0.4, "self_replace_steps": 0.6}
    control = P2P("refine", **settings)
    out = masa.sample(tiny, target=ADDITIONS, trajectory=trajectory, controls=control, progress=False).latents
    way = [z[None] for z in trajectory.latents]
    reference = published.PromptToPrompt(refine(tiny.tokenizer), published.schedule(STEPS, 2, (0, 0.4)), (0, 3))
    ref = oracle.run([SOURCE, *ADDITIONS], way[-1].expand(3, -1, -1, -1), STEPS, 7.5, reference, pinned=way)
    assert difference(out, ref) < TOLERANCE


@pytest.mark.parametrize("grid", [(64, 64), (8, 16), (16, 16), (96, 64)], ids=str)
def test_self_attention_reaches_half_the_latents_side_at_any_size(tiny, grid):
    """With None; at 512x512 that is the published 32x32."""
    sites, tokenizer = tiny.unet.sites, tiny.tokenizer
    prompts = (SOURCE, SWAPS[0])
    run = Run(2, sites, prompts, grid, tiny.device, tokenizer.token_positions, encode=tokenizer.encode)
    active = P2P(self_replace_steps=1.0, self_replace_tokens=None).begin(run)
    assert {sites[i].downsample for i in active.self_sites} == {2, 4, 8}
    tokens = grid[0] * grid[1] // 4
    assert P2P(self_replace_steps=1.0, self_replace_tokens=tokens).begin(run).self_sites == active.self_sites
    if grid == (64, 64):
        assert P2P(self_replace_steps=1.0, self_replace_tokens=32 * 32).begin(run).self_sites == active.self_sites


@pytest.mark.slow
def test_every_setting_matters(tiny, noise):
    """By far more than the tolerance, else equality with the published controllers would say nothing."""
    target = "a photo of a labradoodle cat"
    settings = [
        {"edit": "refine"},
        {"edit": None},
        {"reweight": {"photo": 3.0}},
        {"cross_replace_steps": 0.4},
        {"cross_replace_steps": {"default": 0.8, "photo": 0.2}},
        {"self_replace_steps": 0.8},
        {"self_replace_tokens": 8},
        {"local_blend": masa.LocalBlend("siamese", "labradoodle", threshold=0.9)},
        {},
    ]
    latents = [run(tiny, noise, P2P(**chosen), [target])[1] for chosen in settings]
    latents.append(run(tiny, noise, [], [target])[1])
    for i, one in enumerate(latents):
        for other in latents[:i]:
            assert difference(one, other) > 10 * TOLERANCE


# ------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("edit", ["replace", "refine"])
def test_equal_prompts_give_the_source(tiny, noise, edit):
    out = run(tiny, noise, P2P(edit), [SOURCE])
    assert difference(out[1], out[0]) < 1e-4


def test_recorded_maps_are_those_that_the_edit_makes(tiny, noise):
    """In the first layer of the first step, whose input no edit has changed: the source's map of a shared word, its
    own of a word that is added, times its factor."""

    def word_maps(*controls):
        record = masa.RecordAttention([0], ["cat", "fluffy"])
        settings = {"height": 64, "width": 128, "steps": 1, "latents": noise, "progress": False}
        out = masa.sample(tiny, SOURCE, ADDITIONS[0], controls=[*controls, record], **settings)
        return out.attention[len(controls)]

    plain = word_maps()
    edited = word_maps(P2P("refine", {"fluffy": 3.0, "cat": 0.5}, cross_replace_steps=1.0, self_replace_steps=0.0))
    assert not torch.allclose(plain["cat"][0], plain["cat"][1], rtol=1e-2)
    torch.testing.assert_close(edited["cat"][0], plain["cat"][0])
    torch.testing.assert_close(edited["cat"][1], 0.5 * plain["cat"][0])
    torch.testing.assert_close(edited["fluffy"][1], 3.0 * plain["fluffy"][1])


def test_reweight_by_1_is_no_control(tiny, noise):
    plain = run(tiny, noise, [], [SOURCE])
    assert difference(run(tiny, noise, P2P(None, {"siamese": 1.0}), [SOURCE])[1], plain[1]) < 1e-4
    swapped = run(tiny, noise, P2P(), SWAPS[:1])
    assert difference(run(tiny, noise, P2P(reweight={"dog": 1.0}), SWAPS[:1]), swapped) < 1e-4


def test_source_is_unchanged_and_targets_together_equal_targets_alone(tiny, noise):
    together = run(tiny, noise, P2P(), SWAPS)
    assert difference(together[0], run(tiny, noise, [], ())[0]) < 1e-4
    assert difference(together[2], run(tiny, noise, P2P(), SWAPS[1:])[1]) < 1e-4


def test_a_control_used_twice_gives_the_same(tiny, noise):
    control = P2P(local_blend=masa.LocalBlend("cat", "dog"))
    assert torch.equal(run(tiny, noise, control, SWAPS[:1]), run(tiny, noise, control, SWAPS[:1]))


def test_joins_masactrl_where_they_change_different_things(tiny, noise):
    reweight = P2P(None, {"siamese": 5.0}, cross_replace_steps=1.0, self_replace_steps=0.0)
    mutual = masa.MasaCtrl(1, 8, mask=masa.WordMasks("cat", "cat", threshold=0.4))
    both = run(tiny, noise, [mutual, reweight], [SOURCE])[1]
    assert torch.equal(both, run(tiny, noise, [reweight, mutual], [SOURCE])[1])
    for one in (reweight, mutual):
        assert difference(both, run(tiny, noise, one, [SOURCE])[1]) > 10 * TOLERANCE


def test_settings_come_back():
    control = P2P(
        "refine",
        {"kind": 2.0, 4: 0.5},
        cross_replace_steps={"default": (0.1, 0.9), "cat": 0.2},
        self_replace_steps=(0.1, 0.3),
        local_blend=masa.LocalBlend(["a", "cat"], "dog", subtract_source="snow", subtract_target="snow"),
    )
    back = restore(json.loads(json.dumps(describe(control))))
    assert describe(back) == describe(control)
    assert back.reweight == control.reweight
    assert back.cross_replace_steps == control.cross_replace_steps


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edit": "swap"}, "edit is 'swap'; expected 'replace', 'refine' or None"),
        ({"reweight": {"cat": float("nan")}}, "reweight of 'cat' is nan"),
        ({"cross_replace_steps": 1.2}, "cross_replace_steps of 'default' is 1.2; expected a fraction"),
        ({"cross_replace_steps": {"cat": (0.5, 0.2)}}, "of 'cat' is .0.5, 0.2.; expected a fraction"),
        ({"self_replace_steps": (0.1,)}, r"self_replace_steps is \(0.1,\)"),
        ({"self_replace_tokens": 0}, "self_replace_tokens is 0"),
        ({"self_replace_tokens": "32x32"}, "self_replace_tokens is '32x32'"),
    ],
)
def test_bad_settings_are_named_at_once(settings, message):
    with pytest.raises(masa.MasaError, match=message):
        P2P(**settings)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (P2P(), "has 6 words and 'a photo of a fluffy siamese cat' 7"),
        (P2P("refine", {"dog": 2.0}), "'dog' is not in the prompt"),
        (P2P("refine", cross_replace_steps={"dog": 0.2}), "'dog' is not in the prompt"),
        (P2P("refine", local_blend=masa.LocalBlend("dog", "cat")), "'dog' is not in the prompt"),
        (P2P(None, self_replace_steps=0.0), "changes no step"),
        (P2P("refine", cross_replace_steps=0.1, self_replace_steps=0.1), "changes no step"),
        ([P2P("refine"), P2P("refine")], "both set q_from at .*: PromptToPrompt and PromptToPrompt"),
        ([P2P("refine"), masa.MasaCtrl(0, 8)], "both set k_from at .*: PromptToPrompt and MasaCtrl"),
    ],
)
def test_runs_that_do_not_fit_are_refused(tiny, noise, control, message):
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, noise, control, ADDITIONS[:1])


def test_words_of_one_target_need_not_be_in_the_others(tiny, noise):
    control = P2P("refine", {"fluffy": 3.0}, cross_replace_steps={"snow": 0.2})
    together = run(tiny, noise, control, ADDITIONS)
    alone = run(tiny, noise, P2P("refine", {"fluffy": 3.0}, cross_replace_steps=1.0), ADDITIONS[:1])
    assert difference(together[1], alone[1]) < 1e-4
