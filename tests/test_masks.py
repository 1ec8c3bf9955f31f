"""Masks: resizing, normalising, tokens; and what they do in a run."""

from __future__ import annotations

import pytest
import torch

import masa
from masa.branches import Branches
from masa.controls.base import Run
from masa.controls.masks import normalise

PROMPTS = ("a photo of a sitting cat", "a photo of a running cat")


@pytest.fixture
def run_info(tiny):
    return Run(10, tiny.unet.sites, PROMPTS, (16, 24), torch.device("cpu"), tiny.tokenizer.token_positions)


def test_normalise_spans_0_to_1_and_finds_constant_maps():
    scaled, constant = normalise(torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0]]))
    assert scaled.tolist() == [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]
    assert constant.tolist() == [False, True]


def test_given_masks_are_resized_to_every_grid(run_info):
    source = torch.zeros(16, 24)
    source[:, 12:] = 1.0
    active = masa.GivenMasks(source, source).bind(run_info, frozenset({6, 10}))
    branches = Branches.build(1, guided=True)
    mask = active.source(branches, (0, 2))
    assert mask is active.source(branches, (0, 2))  # planned once for all steps
    plan = mask({}, (2, 3))
    assert plan.key_region.shape == (2, 6)
    assert plan.key_region[0].reshape(2, 3).tolist() == [[False, False, True]] * 2
    assert plan.query_weight.shape == (4, 6)
    assert plan.full_rows.tolist() == [True, False, True, False]
    assert mask({}, (8, 12)).key_region[0].reshape(8, 12)[:, 6:].all()


def test_source_masks_are_cut_and_target_masks_may_be_soft(run_info):
    soft = torch.full((16, 24), 0.4)
    active = masa.GivenMasks(soft, soft).bind(run_info, frozenset({10}))
    plan = active.source(Branches.build(1, guided=False), (0,))({}, (8, 12))
    assert not plan.key_region.any()
    assert plan.query_weight[1].unique().tolist() == pytest.approx([0.4])
    assert not plan.binary


def test_a_mask_of_any_shape_covers_the_picture(run_info):
    """A mask taller than wide, of a picture wider than tall: its upper half is the picture's."""
    tall = torch.zeros(8, 4)
    tall[:4] = 1.0
    active = masa.GivenMasks(tall, tall).bind(run_info, frozenset({6, 10}))
    branches = Branches.build(1, guided=False)
    plan = active.source(branches, (0,))({}, (8, 12))
    rows = [True] * 4 + [False] * 4
    assert plan.key_region[0].reshape(8, 12).tolist() == [[row] * 12 for row in rows]
    assert plan.query_weight[1].reshape(8, 12).tolist() == [[float(row)] * 12 for row in rows]
    shown = active.after_step({}, branches)
    assert shown.shape == (2, 8, 12)  # on the finest grid that was used
    assert shown[1].tolist() == [[float(row)] * 12 for row in rows]


def test_a_given_mask_counts_from_one_half_on(run_info):
    half = torch.full((16, 24), 0.5)
    active = masa.GivenMasks(half, half).bind(run_info, frozenset({10}))
    plan = active.source(Branches.build(1, guided=False), (0, 1))({}, (8, 12))
    assert plan.key_region.all()


def test_word_masks_are_those_of_this_step_or_of_the_last(run_info):
    """Found anew at each step; a layer before this step's first map uses the step's before. A value at the threshold
    is subject."""
    active = masa.WordMasks("cat", "cat", threshold=0.5).bind(run_info, frozenset({8}))
    branches = Branches.build(1, guided=False)
    grid = (4, 6)
    sites = active.records(branches)
    key = next(iter(sites.values())).records[0].key

    def tape(*values: float):
        maps = torch.tensor(values).repeat(24 // len(values)).expand(2, 1, 24)
        return {(key, site): maps for site in sites}

    assert active.source(branches, (0,))({}, grid) is None  # nothing is known yet
    for values in ([0.0, 1.0, 2.0, 0.0], [2.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.0, 1.0]):
        before = active.source(branches, (0,))
        found = active.after_step(tape(*values), branches)
        expected = [value >= max(values) / 2 for value in values] * 6
        assert found.flatten(1).bool().tolist() == [expected] * 2
        for plan in (before(tape(*values), grid), active.source(branches, (0,))({}, grid)):
            assert plan.key_region[0].tolist() == expected
            assert plan.query_weight[1].bool().tolist() == expected


@pytest.mark.parametrize(("constant", "full"), [((0,), [True, True]), ((1,), [True, True]), ((), [True, False])])
def test_a_row_whose_source_has_no_map_sees_every_key(run_info, constant, full):
    """A constant map says nothing of where a subject is: the source's own, or the row's."""
    active = masa.WordMasks("cat", "cat", threshold=0.5).bind(run_info, frozenset({8}))
    branches = Branches.build(1, guided=False)
    maps = torch.arange(24.0).expand(2, 1, 24).clone()
    maps[list(constant)] = 1.0
    sites = active.records(branches)
    tape = {(edit.records[0].key, site): maps for site, edit in sites.items()}
    assert active.source(branches, (0,))(tape, (4, 6)).full_rows.tolist() == full


def test_one_target_mask_each(tiny, run_info):
    mask = torch.ones(4, 4)
    with pytest.raises(masa.MasaError, match="2 target masks for 1 targets"):
        masa.GivenMasks(mask, [mask, mask]).bind(run_info, frozenset({10}))


def test_full_masks_are_the_plain_control(tiny, generator):
    """Everything subject: each query sees every source key."""
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    settings = {"steps": 3, "latents": noise, "height": 128, "width": 128, "progress": False}
    full = masa.GivenMasks(torch.ones(8, 8), torch.ones(8, 8))
    plain = masa.sample(tiny, *PROMPTS, controls=masa.MasaCtrl(1, 4), **settings)
    masked = masa.sample(tiny, *PROMPTS, controls=masa.MasaCtrl(1, 4, mask=full), **settings)
    assert torch.allclose(plain.latents, masked.latents, atol=1e-4)


def test_empty_source_mask_falls_back_to_all_keys(tiny, generator):
    """The published code returns the mean of all values there."""
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    settings = {"steps": 3, "latents": noise, "height": 128, "width": 128, "progress": False}
    empty = masa.GivenMasks(torch.zeros(8, 8), torch.ones(8, 8))
    plain = masa.sample(tiny, *PROMPTS, controls=masa.MasaCtrl(1, 4), **settings)
    masked = masa.sample(tiny, *PROMPTS, controls=masa.MasaCtrl(1, 4, mask=empty), **settings)
    assert torch.allclose(plain.latents, masked.latents, atol=1e-4)


def test_a_soft_target_mask_lies_between_its_extremes(tiny, generator):
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    settings = {"steps": 2, "latents": noise, "height": 128, "width": 128, "progress": False}
    source = torch.zeros(8, 8)
    source[:, :4] = 1.0

    def target(weight: float) -> torch.Tensor:
        control = masa.MasaCtrl(1, 15, mask=masa.GivenMasks(source, torch.full((8, 8), weight)))
        return masa.sample(tiny, *PROMPTS, controls=control, **settings).latents[1]

    # Layer 15 is the last: what follows it is one norm and one convolution, nearly linear.
    middle, ends = target(0.5), (target(0.0) + target(1.0)) / 2
    assert (middle - ends).abs().max() < 0.1 * (target(0.0) - target(1.0)).abs().max()


def test_word_masks_are_kept_per_step(tiny, generator):
    out = masa.sample(
        tiny,
        PROMPTS[0],
        [PROMPTS[1], PROMPTS[1]],
        controls=masa.MasaCtrl(2, 10, mask=masa.WordMasks("cat", "cat", threshold=0.3)),
        steps=5,
        height=128,
        width=192,
        seed=0,
        progress=False,
    )
    assert list(out.masks) == [0]
    assert sorted(out.masks[0]) == [2, 3, 4]
    mask = out.masks[0][2]
    assert mask.shape == (3, 4, 6)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert 0 < mask[0].mean() < 1


@pytest.mark.parametrize("change", [{"source": "sitting"}, {"target": "running"}, {"threshold": 0.7}])
def test_every_setting_of_word_masks_matters(tiny, generator, change):
    noise = torch.randn(1, 4, 16, 24, generator=generator)

    def latents(**settings):
        mask = masa.WordMasks(**({"source": "cat", "target": "cat", "threshold": 0.3} | settings))
        control = masa.MasaCtrl(1, 8, mask=mask)
        return masa.sample(
            tiny, *PROMPTS, controls=control, steps=3, latents=noise, height=128, width=192, progress=False
        ).latents

    assert not torch.equal(latents(), latents(**change))


def test_bad_threshold_is_named(run_info):
    with pytest.raises(masa.MasaError, match=r"threshold is 1\.5"):
        masa.WordMasks("cat", "cat", threshold=1.5).bind(run_info, frozenset({10}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_step": -1}, "start_step is -1"),
        ({"source_weight": 0.0, "union": True}, "source_weight is 0.0"),
        ({"source_weight": 2.0}, "set union=True"),
    ],
)
def test_bad_controls_are_named_at_once(settings, message):
    with pytest.raises(masa.MasaError, match=message):
        masa.MasaCtrl(**settings)


def test_source_weight_matters_in_a_union(tiny, generator):
    noise = torch.randn(1, 4, 16, 16, generator=generator)

    def latents(weight: float) -> torch.Tensor:
        control = masa.MasaCtrl(1, 0, union=True, source_weight=weight)
        return masa.sample(
            tiny, *PROMPTS, controls=control, steps=4, latents=noise, height=128, width=128, progress=False
        ).latents

    assert not torch.allclose(latents(1.0), latents(3.0), atol=1e-3)
