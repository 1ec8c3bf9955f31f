"""The UNet: equality with diffusers, its sites, and that a forward leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

import masa
from masa.config import SD_V1
from masa.edits import Edit, Part
from masa.models.batch_rows import Retirement
from masa.models.resnet import ResnetBlock
from masa.models.unet import UNet, timestep_embedding


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.abs().max())


@pytest.fixture
def inputs(generator):
    x = torch.randn(3, 4, 16, 24, generator=generator)
    context = torch.randn(3, 77, 32, generator=generator)
    return x, context


@torch.no_grad()
def test_equals_diffusers(tiny, tiny_folder, inputs):
    from diffusers import UNet2DConditionModel

    oracle = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()
    x, context = inputs
    for timestep in (1, 500, torch.tensor([981, 21, 1])):
        eps, tape = tiny.unet(x, timestep, context)
        # 1e-4: float32 rounding through some 60 layers, summed in another order.
        assert relative_error(eps, oracle(x, timestep, context).sample) < 1e-4
        assert tape == {}


def test_sd_v1_parameter_count():
    with torch.device("meta"):
        unet = UNet(SD_V1.unet)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_sites_are_the_published_layers():
    with torch.device("meta"):
        unet = UNet(SD_V1.unet)
    own = [site for site in unet.sites if site.kind == "self"]
    assert [site.layer for site in own] == list(range(16))
    assert [site.index for site in unet.sites] == list(range(32 + 22 + 61 + 12))
    kinds = ["self", "cross"] * 16 + ["res"] * 22 + ["norm"] * (2 * 22 + 16 + 1) + ["skip"] * 12
    assert [site.kind for site in unet.sites] == kinds
    assert unet.layers == 16
    places = [site.place for site in own]
    assert places == ["down"] * 6 + ["mid"] + ["up"] * 9
    # Token grids at 512x512 are 64, 32, 16 and 8 wide: downsample 1, 2, 4, 8.
    assert [site.downsample for site in own] == [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
    modules = dict(unet.named_modules())
    for site in unet.sites:
        module = modules[site.name.removesuffix(".skip")]
        if site.kind == "norm":
            assert isinstance(module, torch.nn.GroupNorm)
        elif site.kind == "skip":
            assert isinstance(module, ResnetBlock)
        else:
            assert site == (module.sites[0] if site.kind == "res" else module.site)


def test_residual_sites_name_the_layer_that_follows():
    with torch.device("meta"):
        unet = UNet(SD_V1.unet)
    layers = {site.name: site.layer for site in unet.sites if site.kind == "res"}
    assert list(layers.values()) == sorted(layers.values())
    assert layers["down_blocks.0.resnets.1"] == 1
    assert layers["down_blocks.3.resnets.1"] == layers["mid_block.resnets.0"] == 6
    assert layers["mid_block.resnets.1"] == layers["up_blocks.0.resnets.2"] == layers["up_blocks.1.resnets.0"] == 7
    assert layers["up_blocks.1.resnets.1"] == 8
    assert layers["up_blocks.3.resnets.2"] == 15
    assert next(site.downsample for site in unet.sites if site.name == "up_blocks.1.resnets.1") == 4


@torch.no_grad()
def test_rows_may_take_the_features_of_others(tiny, inputs):
    x, context = inputs
    site = next(site for site in tiny.unet.sites if site.name == "up_blocks.1.resnets.1")
    plain, _ = tiny.unet(x, 300, context)
    own, _ = tiny.unet(x, 300, context, {site.index: Edit(features_from=(0, 1, 2))})
    assert relative_error(own, plain) < 1e-5
    swapped, _ = tiny.unet(x, 300, context, {site.index: Edit(features_from=(1, 1, 2))})
    assert relative_error(swapped[1:], plain[1:]) < 1e-5
    assert relative_error(swapped[:1], plain[:1]) > 1e-2


TIMES = torch.tensor([900, 300, 20])


@torch.no_grad()
@pytest.mark.parametrize("features_from", [(1, 1, 2), (2, 2, 2), (2, 1, 1)])
def test_features_are_those_of_the_row_s_own_timestep(tiny, inputs, features_from):
    x, context = inputs
    site = next(site for site in tiny.unet.sites if site.name == "up_blocks.1.resnets.1")
    plain, _ = tiny.unet(x, TIMES, context)
    swapped, _ = tiny.unet(x, TIMES, context, {site.index: Edit(features_from=features_from)})
    for row, read in enumerate(features_from):
        if row == read:
            assert relative_error(swapped[row], plain[row]) < 1e-5
        else:
            assert relative_error(swapped[row], plain[row]) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("copies", [None, (0, 1, 1)])
@pytest.mark.parametrize("layer", [0, 6, 15])
def test_rows_that_stay_keep_their_timesteps(tiny, inputs, layer, copies):
    x, context = inputs
    times = TIMES if copies is None else TIMES[:2]
    given = x if copies is None else x[:2]
    full, _ = tiny.unet(given, times, context, copies=copies)
    for keep in ((1, 2), (2, 0)):
        kept, _ = tiny.unet(given, times, context, retire=Retirement(layer, keep), copies=copies)
        assert relative_error(kept, full[list(keep)]) < 1e-5


def test_norm_eps_are_the_checkpoints():
    with torch.device("meta"):
        unet = UNet(SD_V1.unet)
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert module.eps == (1e-6 if "attentions" in name else 1e-5), name


@torch.no_grad()
def test_rows_do_not_see_each_other(tiny, inputs):
    x, context = inputs
    together, _ = tiny.unet(x, 300, context)
    alone = torch.cat([tiny.unet(x[i : i + 1], 300, context[i : i + 1])[0] for i in range(3)])
    assert relative_error(together, alone) < 1e-5


@torch.no_grad()
def test_forward_changes_nothing_that_outlives_it(tiny, inputs):
    x, context = inputs
    edits = {20: Edit(k_from=(0, 0, 0), v_from=(0, 0, 0))}
    before = {name: tensor.clone() for name, tensor in tiny.unet.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in tiny.unet.named_modules()}
    first, _ = tiny.unet(x, 300, context)
    edited, _ = tiny.unet(x, 300, context, edits)
    second, _ = tiny.unet(x, 300, context)
    assert torch.equal(first, second)
    assert not torch.equal(first[1:], edited[1:])
    assert attributes == {name: set(vars(module)) for name, module in tiny.unet.named_modules()}
    for name, tensor in tiny.unet.state_dict().items():
        assert torch.equal(before[name], tensor)


LAST_EDITS = {
    "none": {},
    "self": {0: Edit(k_from=(0, 0, 2), v_from=(0, 0, 2))},
    "queries and keys": {0: Edit(q_from=(0, 0, 2), k_from=(0, 0, 2))},
    "union": {0: Edit(parts=(Part((0, 0, 0), weight=3.0), Part((-1, 1, 2))))},
    "recorded": {0: Edit(k_from=(0, 0, 2), v_from=(0, 0, 2), query_records=("q",))},
    "cross": {1: Edit(q_from=(0, 0, 2))},
    "both": {0: Edit(k_from=(0, 0, 2)), 1: Edit(q_from=(0, 0, 2), k_from=(0, 1, 1))},
}


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3, 6, 9, 15])
@pytest.mark.parametrize("last", LAST_EDITS)
def test_retired_rows_do_not_change_the_others(tiny, inputs, layer, last):
    x, context = inputs
    edits = {2 * layer + site: edit for site, edit in LAST_EDITS[last].items()}
    full, expected = tiny.unet(x, 300, context, edits)
    kept, tape = tiny.unet(x, 300, context, edits, retire=Retirement(layer, (1, 2)))
    assert kept.shape[0] == 2
    assert relative_error(kept, full[1:]) < 1e-5
    assert tape.keys() == expected.keys()
    for key, recorded in expected.items():
        assert relative_error(tape[key], recorded) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("last", "seen"), [("self", 2), ("union", 2), ("recorded", 3), ("cross", 3)])
def test_rows_retire_where_nothing_more_is_read_of_them(tiny, inputs, monkeypatch, last, seen):
    x, context = inputs
    block = tiny.unet.up_blocks[1].attentions[0].transformer_blocks[0]
    layer, forward, rows = block.attn1.site.layer, block.ff.forward, []
    monkeypatch.setattr(block.ff, "forward", lambda x: rows.append(len(x)) or forward(x))
    edits = {2 * layer + site: edit for site, edit in LAST_EDITS[last].items()}
    tiny.unet(x, 300, context, edits, retire=Retirement(layer, (1, 2)))
    assert rows == [seen]


EARLY_EDITS = {
    "none": {},
    "first self-attention": {0: Edit(k_from=(0, 0, 2), v_from=(0, 0, 2))},
    "first cross-attention": {1: Edit(q_from=(0, 0, 2))},
    "first features": {32: Edit(features_from=(0, 0, 2))},
    "later": {4: Edit(k_from=(2, 2, 2), v_from=(2, 2, 2))},
}


@torch.no_grad()
@pytest.mark.parametrize("edits", EARLY_EDITS.values(), ids=list(EARLY_EDITS))
@pytest.mark.parametrize("retire", [None, Retirement(2, (2, 1)), Retirement(5, (1, 2))])
def test_copies_are_the_rows_they_stand_for(tiny, inputs, edits, retire):
    x, context = inputs
    rows = (0, 1, 1)
    full, _ = tiny.unet(x[list(rows)], 300, context, edits, retire=retire)
    found, _ = tiny.unet(x[:2], 300, context, edits, retire=retire, copies=rows)
    assert relative_error(found, full) < 1e-6
    other, _ = tiny.unet(x[:2], 300, context, edits, retire=retire, copies=(1, 0, 0))
    assert relative_error(other, full) > 1e-2


@torch.no_grad()
def test_copies_may_retire_in_the_first_block(tiny, inputs):
    x, context = inputs
    full, _ = tiny.unet(x[[0, 1, 1]], 300, context, EARLY_EDITS["first self-attention"])
    for retire in (Retirement(0, (1, 2)), Retirement(0, (2, 1))):
        edits = EARLY_EDITS["first self-attention"]
        found, _ = tiny.unet(x[:2], 300, context, edits, retire=retire, copies=(0, 1, 1))
        assert relative_error(found, full[list(retire.staying)]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("timestep", [300, torch.tensor([300, 20])])
def test_copies_are_computed_once_until_the_prompt_is_read(tiny, inputs, monkeypatch, timestep):
    x, context = inputs
    block, rows = tiny.unet.down_blocks[0].attentions[0].transformer_blocks[0], []
    for name in ("attn1", "attn2"):
        forward = getattr(block, name).forward
        monkeypatch.setattr(
            getattr(block, name),
            "forward",
            lambda x, *given, forward=forward: rows.append(len(x)) or forward(x, *given),
        )
    found, _ = tiny.unet(x[:2], timestep, context, copies=(0, 1, 1))
    assert rows == [2, 3]
    times = timestep if isinstance(timestep, int) else timestep[[0, 1, 1]]
    assert relative_error(found, tiny.unet(x[[0, 1, 1]], times, context)[0]) < 1e-6


@pytest.mark.parametrize("copies", [None, (0, 1), (0, 1, 2), (), (0, 1, -1)])
def test_rows_that_do_not_fit_are_refused(tiny, inputs, copies):
    x, context = inputs
    with pytest.raises(
        masa.MasaError, match=r"context has 3 rows, x 2 and copies is .*; expected one row of x for each"
    ):
        tiny.unet(x[:2], 300, context[:3], copies=copies)


@pytest.mark.parametrize(("rows", "copies"), [(2, None), (1, (0, 0)), (3, None)])
def test_timesteps_that_do_not_fit_are_refused(tiny, inputs, rows, copies):
    x, context = inputs
    timestep = torch.tensor([300, 20]) if rows != 2 else torch.tensor([300, 20, 1])
    with pytest.raises(masa.MasaError, match=f"timestep has {len(timestep)} rows and x {rows}; expected one timestep"):
        tiny.unet(x[:rows], timestep, context[: len(copies or x[:rows])], copies=copies)


def test_timestep_embedding_has_cosines_first():
    emb = timestep_embedding(7, 32, torch.zeros(1))
    assert emb.shape == (1, 32)
    assert emb[0, 0] == pytest.approx(torch.cos(torch.tensor(7.0)).item())
    assert emb[0, 16] == pytest.approx(torch.sin(torch.tensor(7.0)).item())
