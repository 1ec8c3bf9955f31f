"""Guidance: the published arithmetic, and that every way to run a model keeps it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from rounding import same

import masa
from masa.branches import Branches
from masa.guidance import guide
from masa.output.result import read_settings

SOURCE, TARGETS = "a photo of a sitting cat", ["a photo of a running cat", "a red cat in the snow"]
SETTINGS = {"steps": 4, "height": 128, "width": 128, "progress": False}
CONTROL = masa.MasaCtrl(1, 8)
RULES = {
    "rescaled": masa.RescaledGuidance(0.7),
    "interval": masa.GuidanceInterval(1, 3),
    "both": masa.GuidanceInterval(0, 2, within=masa.RescaledGuidance(0.4)),
}


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------ arithmetic


def test_guidance_moves_away_from_uncond():
    guided = guide(Branches.build(1, guided=True), column(0, 10, 1, 12), masa.ClassifierFree(), 0, 3.0)
    assert guided.flatten().tolist() == [3.0, 16.0]


def test_a_branch_of_one_row_is_taken_as_it_is():
    merged = Branches.build(1, guided=True, merge_source=True)
    assert guide(merged, column(5, 10, 12), masa.ClassifierFree(), 0, 3.0).flatten().tolist() == [5.0, 16.0]
    alone = Branches.build(1, guided=False)
    assert guide(alone, column(5, 10), masa.ClassifierFree(), 0, 3.0).flatten().tolist() == [5.0, 10.0]


def test_a_scale_of_1_takes_the_conditional_row():
    branches = Branches.build(1, guided=True)
    assert guide(branches, column(0, 10, 1, 12), masa.ClassifierFree(), 0, 1.0).flatten().tolist() == [1.0, 12.0]


def test_source_and_targets_may_be_guided_by_different_scales():
    """Up to 1 a branch is its conditional half alone, whatever the other's scale."""
    branches, eps, plain = Branches.build(1, guided=True), column(0, 10, 1, 12), masa.ClassifierFree()
    assert guide(branches, eps, plain, 0, 0.5, source_scale=3.0).flatten().tolist() == [3.0, 12.0]
    assert guide(branches, eps, plain, 0, 3.0, source_scale=0.5).flatten().tolist() == [1.0, 16.0]
    assert guide(branches, eps, plain, 0, 2.0, source_scale=3.0).flatten().tolist() == [3.0, 14.0]


def test_a_replayed_source_keeps_plain_guidance_of_its_own_scale():
    """Its recorded noise makes up for exactly the prediction that its inversion saw."""
    branches, eps = Branches.build(1, guided=True), column(0, 10, 1, 12).expand(-1, 1, 1, 2)
    for rule in (masa.GuidanceInterval(5, 6), masa.RescaledGuidance(1.0)):
        assert guide(branches, eps, rule, 0, 3.0, source_scale=2.0)[0].flatten().tolist() == [2.0, 2.0]
    outside = guide(branches, eps, masa.GuidanceInterval(5, 6), 0, 3.0, source_scale=2.0)
    assert outside[1].flatten().tolist() == [12.0, 12.0]


def test_an_interval_within_another_is_the_steps_of_both():
    both = masa.GuidanceInterval(0, 3, within=masa.GuidanceInterval(2, 5))
    assert [both.guides(step) for step in range(6)] == [False, False, True, False, False, False]


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_guidance_equals_diffusers(phi):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(6, 4, 16, 24, generator=generator) * torch.rand(6, 1, 1, 1, generator=generator)
    out = guide(Branches.build(2, guided=True), eps, masa.RescaledGuidance(phi), 0, 7.5)
    uncond, cond = eps.chunk(2)
    ref = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=phi)
    # One rounding more or less, of float32.
    assert (out - ref).abs().max() < 1e-5 * ref.abs().max()


# --------------------------------------------------------------------------------------------------- whole runs


def run(tiny, targets=TARGETS, **settings):
    return masa.sample(tiny, SOURCE, targets, **({"controls": CONTROL, "seed": 3} | SETTINGS | settings))


@pytest.fixture(scope="module")
def plain(tiny):
    return run(tiny)


@pytest.fixture(scope="module")
def guided(tiny):
    return {name: run(tiny, guidance=rule) for name, rule in RULES.items()}


def test_rules_change_the_result(plain, guided):
    results = [plain, *guided.values()]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one.latents - other.latents).abs().max() > 0.01 * one.latents.std()


def test_rules_that_ask_for_nothing_are_plain_guidance(tiny, plain):
    for rule in (masa.ClassifierFree(), masa.GuidanceInterval(0, 4), masa.RescaledGuidance(0.0)):
        assert torch.equal(run(tiny, guidance=rule).latents, plain.latents)


def test_without_guidance_a_rule_is_not_asked(tiny):
    off = run(tiny, guidance_scale=1.0).latents
    assert torch.equal(run(tiny, guidance_scale=1.0, guidance=masa.RescaledGuidance(1.0)).latents, off)


def test_outside_its_interval_the_unconditional_rows_are_not_computed(tiny):
    rows, seen, off = [], [], []
    handle = tiny.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[2])))
    guidance = masa.GuidanceInterval(2, 3)
    run(tiny, guidance=guidance, callback=lambda step, timestep, x: seen.append(x.clone()))
    handle.remove()
    assert rows == [3, 3, 6, 3]
    run(tiny, guidance_scale=1.0, callback=lambda step, timestep, x: off.append(x.clone()))
    # Before the interval the run is the one without guidance; controls act in both.
    assert torch.equal(seen[1], off[1])
    assert not torch.equal(seen[2], off[2])


@pytest.mark.parametrize("name", RULES)
def test_targets_together_in_parts_and_alone_agree(tiny, guided, name):
    together = guided[name].latents
    same(run(tiny, guidance=RULES[name], targets_at_once=1).latents, together)
    same(run(tiny, TARGETS[1:], guidance=RULES[name]).latents, together[[0, 2]])


@pytest.mark.parametrize("name", RULES)
def test_a_cached_source_serves_it(tiny, guided, name):
    cache = masa.record(tiny, SOURCE, controls=CONTROL, seed=3, guidance=RULES[name], **SETTINGS)
    cached = masa.sample(tiny, target=TARGETS, controls=CONTROL, cache=cache, targets_at_once=1, progress=False)
    same(cached.latents, guided[name].latents)
    assert cached.settings["guidance"] == guided[name].settings["guidance"]
    with pytest.raises(masa.MasaError, match=r"guidance is ClassifierFree\(\), but the cache was recorded with"):
        masa.sample(tiny, target=TARGETS, cache=cache, guidance=masa.ClassifierFree())


@pytest.fixture(scope="module")
def trajectory(tiny):
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return masa.invert(tiny, picture, SOURCE, **SETTINGS)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_a_pictures_cache_serves_it(tiny, trajectory, name, pinned):
    start = {"trajectory": trajectory, "pin_source": pinned, "guidance": RULES[name], "progress": False}
    uncached = masa.sample(tiny, target=TARGETS, controls=CONTROL, **start)
    cache = masa.record(tiny, controls=CONTROL, **start)
    same(masa.sample(tiny, target=TARGETS, controls=CONTROL, cache=cache, progress=False).latents, uncached.latents)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_source_that_replays_its_noise_is_the_same_under_every_rule(tiny, pinned):
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    inverted = masa.invert(tiny, picture, SOURCE, method="edit-friendly", guidance_scale=3.0, seed=0, **SETTINGS)
    start = {"trajectory": inverted, "pin_source": pinned, "controls": CONTROL, "skip_steps": 0, "progress": False}
    plain = masa.sample(tiny, target=TARGETS[0], **start)
    for rule in (RULES["rescaled"], RULES["interval"]):
        out = masa.sample(tiny, target=TARGETS[0], guidance=rule, **start)
        same(out.latents[:1], plain.latents[:1])
        assert not torch.equal(out.latents[1], plain.latents[1])
        cache = masa.record(tiny, controls=CONTROL, guidance=rule, trajectory=inverted, pin_source=pinned,
                            skip_steps=0, progress=False)  # fmt: skip
        cached = masa.sample(tiny, target=TARGETS[0], controls=CONTROL, cache=cache, progress=False)
        same(cached.latents, out.latents)


def test_controls_that_read_maps_act_outside_the_interval(tiny):
    controls = [masa.MasaCtrl(0, 8, mask=masa.WordMasks("cat", "cat", 0.4)), masa.LocalBlend("cat", "cat", 0.95)]
    rule = masa.GuidanceInterval(1, 2)
    out = run(tiny, controls=controls, guidance=rule)
    assert sorted(out.masks[0]) == [0, 1, 2, 3]
    same(run(tiny, controls=controls, guidance=rule, targets_at_once=1).latents, out.latents)


@pytest.mark.slow
def test_a_compiled_model_agrees(tiny, guided):
    compiled = tiny.compile(compiler="eager")
    for name in ("rescaled", "interval"):
        out, ref = run(compiled, guidance=RULES[name]).latents, guided[name].latents
        # Compiled convolutions are summed in another order: float32 rounding, grown over four steps.
        assert (out - ref).abs().max() < 1e-4 * ref.std()


@pytest.mark.parametrize("name", RULES)
def test_it_is_written_down_and_runs_again(tiny, guided, name, tmp_path):
    guided[name].source.save(tmp_path / "source.png")
    again = masa.rerun(tmp_path / "source.png", tiny, progress=False)
    assert torch.equal(again.latents, guided[name].latents)
    assert again.settings == guided[name].settings
    assert read_settings(tmp_path / "source.png")["guidance"]["kind"] == type(RULES[name]).__name__


def test_edits_take_it(tiny):
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    settings = {"steps": 3, "height": 64, "width": 64, "progress": False, "guidance": RULES["rescaled"]}
    plain = settings | {"guidance": None}
    for make in (
        lambda kept: masa.edit(tiny, picture, TARGETS, controls=masa.MasaCtrl(1), **kept),
        lambda kept: masa.sdedit(tiny, picture, TARGETS, 0.7, seed=0, **kept),
    ):
        out = make(settings)
        assert out.settings["guidance"] == {"kind": "RescaledGuidance", "phi": 0.7}
        assert not torch.equal(out.latents[1:], make(plain).latents[1:])


@dataclass(frozen=True)
class Halved(masa.Guidance):
    """A user's: half the scale."""

    def guide(self, uncond, cond, scale, step):
        return uncond + scale / 2 * (cond - uncond)


def test_a_rule_of_ones_own_is_used(tiny):
    assert torch.equal(run(tiny, guidance=Halved()).latents, run(tiny, guidance_scale=3.75).latents)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masa.RescaledGuidance(1.1), r"phi is 1\.1; expected a number from 0"),
        (lambda: masa.RescaledGuidance(float("nan")), "phi is nan"),
        (lambda: masa.RescaledGuidance(True), "phi is True"),
        (lambda: masa.GuidanceInterval(-1, 3), "start is -1; expected a step"),
        (lambda: masa.GuidanceInterval(0, 2.5), r"end is 2\.5; expected a step"),
        (lambda: masa.GuidanceInterval(3, 3), r"GuidanceInterval\(3, 3\) holds no step"),
        (lambda: masa.GuidanceInterval(0, 3, within=7.5), "guidance is 7.5; expected a value such as"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(masa.MasaError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (3.0, "guidance is 3.0; expected a value such as masa.RescaledGuidance"),
        (masa.RescaledGuidance, "guidance is <class"),
        (masa.GuidanceInterval(4, 9), r"GuidanceInterval\(4, 9\) holds none of the run's steps, 0 to 3"),
    ],
)
def test_rules_that_cannot_serve_are_named_before_any_step(tiny, monkeypatch, rule, message):
    monkeypatch.setattr(masa.sampling, "denoise", lambda *args: pytest.fail("ran first"))
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, guidance=rule)
