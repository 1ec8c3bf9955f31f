"""RecordAttention and the figures made from what it keeps."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace

import numpy as np
import published_p2p as published
import pytest
import torch

import masa
from masa.output import plots

SOURCE, TARGETS = "a photo of a cat", ("a photo of a dog", "a drawing of a cat")
STEPS = 4


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.std())


def run(tiny, controls, targets=TARGETS, **settings):
    size = {"height": 64, "width": 128, "steps": STEPS, "seed": 0, "progress": False}
    return masa.sample(tiny, SOURCE, targets, controls=controls, **(size | settings))


class Maps(published.Control):
    """Sums the conditional half's head-mean probabilities over steps and layers."""

    def __init__(self, layers) -> None:
        super().__init__()
        self.layers, self.sums = layers, {True: 0.0, False: 0.0}

    def attend(self, q, k, v, is_cross, step, layer):
        p = published.probabilities(q, k)
        if layer in self.layers:
            self.sums[is_cross] = self.sums[is_cross] + p[len(p) // 2 :].mean(1) / len(self.layers) / STEPS
        return torch.einsum("bhij,bhjd->bhid", p, v)


@pytest.fixture(scope="module")
def result(tiny):
    record = masa.RecordAttention(words=["cat", "photo", "of a"], self_attention=True)
    more = [masa.RecordQueries([7, 10], [0, 2]), masa.RecordPredictions()]
    return run(tiny, [masa.MasaCtrl(1, 10, mask=masa.WordMasks(6 - 1, 5)), record, *more])


@pytest.fixture(scope="module")
def loaded(result, tmp_path_factory):
    """The same result, saved and read back."""
    folder = tmp_path_factory.mktemp("saved")
    result.save(folder)
    return masa.Result.load(folder)


@pytest.mark.parametrize(("layers", "grid"), [(None, (2, 4)), ([3, 11], (4, 8))])
def test_maps_are_the_probabilities(tiny, tiny_folder, layers, grid):
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    record = masa.RecordAttention(layers=layers, self_attention=True)
    maps = run(tiny, record, TARGETS[:1]).attention[0]
    reference = Maps(layers or [4, 5, 7, 8, 9])
    published.EditOracle(tiny_folder, tiny.tokenizer).run(
        [SOURCE, TARGETS[0]], noise.expand(2, -1, -1, -1), STEPS, 7.5, reference
    )
    assert maps[""].shape == (2, 77, *grid)
    assert maps["self-attention"].shape == (2, *grid, *grid)
    assert torch.allclose(maps[""].flatten(2), reference.sums[True].mT, atol=1e-4)
    assert torch.allclose(maps["self-attention"].flatten(3).flatten(1, 2), reference.sums[False], atol=1e-4)
    assert torch.allclose(maps[""].sum(1), torch.ones(2, *grid), atol=1e-4)


def test_words_add_up_their_tokens(tiny):
    every = run(tiny, masa.RecordAttention()).attention[0][""]
    words = run(tiny, masa.RecordAttention(words=["of a", "dog"])).attention[0]
    assert torch.allclose(words["of a"], every[:, 3] + every[:, 4], atol=1e-5)
    assert torch.allclose(words["dog"][1], every[1, 5], atol=1e-5)
    assert words["dog"][[0, 2]].abs().max() == 0  # prompts without it


def test_edited_maps_are_recorded_as_used(tiny):
    edit = masa.PromptToPrompt(cross_replace_steps=1.0)
    maps = run(tiny, [edit, masa.RecordAttention(words=["photo"])], TARGETS[:1]).attention[1]["photo"]
    assert torch.allclose(maps[0], maps[1], atol=1e-5)
    plain = run(tiny, masa.RecordAttention(words=["photo"]), TARGETS[:1]).attention[0]["photo"]
    assert not torch.allclose(plain[0], plain[1], atol=1e-4)


@pytest.mark.parametrize("control", [[], masa.MasaCtrl(1, 4), masa.MasaCtrl(1, 4, union=True), masa.PromptToPrompt()])
def test_recording_changes_nothing(tiny, control):
    controls = [] if control == [] else [control]
    records = [masa.RecordAttention(layers=[8], self_attention=True), masa.RecordQueries(), masa.RecordPredictions([1])]
    assert difference(run(tiny, [*controls, *records]).latents, run(tiny, controls).latents) < 1e-4


class Queries(published.Control):
    """Keeps the conditional half's self-attention queries, heads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {}

    def attend(self, q, k, v, is_cross, step, layer):
        if not is_cross:
            self.kept[layer, step] = q[len(q) // 2 :].permute(0, 2, 1, 3).flatten(2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_queries_are_the_networks(tiny, tiny_folder):
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    kept = run(tiny, masa.RecordQueries([3, 8], [0, 2]), TARGETS[:1]).queries[0]
    reference = Queries()
    prompts = [SOURCE, TARGETS[0]]
    published.EditOracle(tiny_folder, tiny.tokenizer).run(prompts, noise.expand(2, -1, -1, -1), STEPS, 7.5, reference)
    assert set(kept) == {(3, 0), (3, 2), (8, 0), (8, 2)}
    for name, grid in (((3, 2), (4, 8)), ((8, 0), (2, 4))):
        assert kept[name].dtype == torch.float16
        assert kept[name].shape == (2, *grid, 64)
        assert difference(kept[name].float().flatten(1, 2), reference.kept[name]) < 2e-3  # float16 as kept


def test_queries_are_recorded_as_used(tiny):
    kept = run(tiny, [masa.StyleTransfer(0, 10), masa.RecordQueries([8, 12], [0])], TARGETS[:1]).queries[1]
    assert torch.equal(kept[12, 0][0], kept[12, 0][1])
    assert not torch.equal(kept[8, 0][0], kept[8, 0][1])


def test_by_default_queries_are_few(tiny):
    kept = run(tiny, masa.RecordQueries(), steps=9).queries[0]
    assert sorted({layer for layer, _ in kept}) == [7, 10, 13]
    assert sorted({step for _, step in kept}) == [0, 2, 3, 5, 6, 8]


def test_predictions_are_the_clean_latents_that_two_steps_imply(tiny):
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e before a step and with a_prev after it: two equations, x0 and e."""
    seen = [torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)]
    record = masa.RecordPredictions([0, 2])
    out = run(tiny, record, TARGETS[:1], callback=lambda step, timestep, x: seen.append(x.clone()))
    assert set(out.predictions[0]) == {0, 2}
    for step, pictures in out.predictions[0].items():
        t = tiny.schedule.timesteps(STEPS)[step]
        a, b = tiny.schedule.alpha(t), tiny.schedule.alpha(t - tiny.schedule.stride(STEPS))
        x, y = seen[step].double(), seen[step + 1].double()
        x0 = ((1 - b) ** 0.5 * x - (1 - a) ** 0.5 * y) / (((1 - b) * a) ** 0.5 - ((1 - a) * b) ** 0.5)
        assert pictures.shape == (2, 64, 128, 3)
        for picture, expected in zip(pictures, tiny.decode_latents(x0.float()), strict=True):
            assert (picture.int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 1


def test_a_pinned_source_predicts_the_picture(tiny):
    """Where no row is spent on it; at the last step its row is computed, and gives its reconstruction."""
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = {"steps": 3, "height": 64, "width": 64, "progress": False}
    plain = masa.edit(tiny, picture, TARGETS[0], controls=masa.MasaCtrl(1), **settings)
    out = masa.edit(tiny, picture, TARGETS[0], controls=[masa.MasaCtrl(1), masa.RecordPredictions()], **settings)
    assert torch.equal(out.latents, plain.latents)
    clean = tiny.decode_latents(tiny.encode_image(picture, height=64, width=64))[0]
    kept = out.predictions[1]
    assert [np.array_equal(kept[step][0].numpy(), np.array(clean)) for step in range(3)] == [True, True, False]
    assert not torch.equal(kept[0][1], kept[1][1])


def test_recording_needs_no_targets(tiny):
    """The source alone, as it is among targets; what acts on targets is refused by name."""
    controls = [masa.RecordAttention(words=["cat"]), masa.RecordQueries([8], [1]), masa.RecordPredictions([1])]
    alone, among = run(tiny, controls, ()), run(tiny, controls)
    assert torch.allclose(alone.attention[0]["cat"], among.attention[0]["cat"][:1], atol=1e-4)
    assert torch.allclose(alone.queries[1][8, 1], among.queries[1][8, 1][:1], atol=1e-2)
    assert len(alone.predictions[2][1]) == 1
    assert alone.settings["controls"] == among.settings["controls"]
    with pytest.raises(masa.MasaError, match="MasaCtrl and PlugAndPlay act on targets, and there are none"):
        run(tiny, [masa.MasaCtrl(), masa.RecordAttention(), masa.PlugAndPlay()], ())


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (masa.RecordQueries(layers=[16]), "transformer blocks from 0 to 15"),
        (masa.RecordQueries(steps=[4]), r"RecordQueries\(steps=\[4\]\) selects no step of a run of 4"),
        (masa.RecordPredictions(steps=[]), r"RecordPredictions\(steps=\[\]\) selects no step"),
    ],
)
def test_bad_layers_and_steps_are_named(tiny, control, message):
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, control)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [16]}, "transformer blocks from 0 to 15"),
        ({"layers": [3, 8]}, r"several grids \(2x4, 4x8\)"),
        ({"words": ["cat", "horse"]}, "'horse' is not in the prompt"),
        ({"words": "cat"}, r"such as \['cat'\]"),
    ],
)
def test_bad_settings_are_named(tiny, settings, message):
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, masa.RecordAttention(**settings))


# ----------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("plot", "columns"),
    [
        (plots.word_maps, 3),
        (lambda r: plots.word_maps(r, ["photo"], control=1), 1),
        (lambda r: plots.self_attention_components(r, components=2), 3),
        (plots.masks, 3),
        (lambda r: plots.masks(r, steps=[2], control=0), 1),
        (lambda r: plots.query_components(r, layers=[10]), 2),
        (lambda r: plots.query_components(r, steps=[2]), 2),
        (plots.predictions, 5),
        (lambda r: plots.predictions(r, steps=[3, 0]), 3),
    ],
)
def test_figures_have_a_row_per_picture(loaded, tmp_path, plot, columns):
    pytest.importorskip("matplotlib")
    figure = plot(loaded)
    assert len(figure.axes) == 3 * columns
    assert figure.axes[0].get_ylabel() == SOURCE
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda r: plots.word_maps(r, ["horse"]), "no map was recorded of 'horse'; recorded are: 'cat', 'photo'"),
        (lambda r: plots.word_maps(r, control=0), "by control 0, no attention was recorded"),
        (lambda r: plots.self_attention_components(r, 0), "components is 0; expected a number from 1 to 8"),
        (lambda r: plots.masks(r, steps=[0]), r"no masks in steps \[0\]; there are some in steps \[1, 2, 3\]"),
        (lambda r: plots.masks(r, control=1), "by control 1, no masks were used"),
        (lambda r: plots.query_components(r, [8]), r"no queries in layers \[8\]; there are some in layers \[7, 10\]"),
        (
            lambda r: plots.query_components(r, None, [1]),
            r"no queries in steps \[1\]; there are some in steps \[0, 2\]",
        ),
        (lambda r: plots.predictions(r, control=2), "by control 2, no predictions were recorded"),
    ],
)
def test_what_was_not_kept_is_named(result, plot, message):
    with pytest.raises(masa.MasaError, match=message):
        plot(result)


def test_without_matplotlib_the_extra_is_named(result, monkeypatch):
    plain_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "masa.output.notebook_figure", raising=False)  # imported already, perhaps
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(masa.MasaError, match=r"pip install 'masa\[plots\]'"):
        plots.masks(result)


def test_equal_queries_have_equal_colours(result):
    """Of the source and a copy of it, in every panel; and colours differ where queries do."""
    pytest.importorskip("matplotlib")
    queries = {name: q[:1].expand(3, -1, -1, -1) for name, q in result.queries[2].items()}
    figure = plots.query_components(replace(result, queries={2: queries}))
    panels = [axis.images[0].get_array() for axis in figure.axes]  # layers by pictures by steps
    assert all(
        np.allclose(panels[6 * layer + i], panels[6 * layer + i + 2], atol=1e-5) for layer in (0, 1) for i in range(4)
    )
    assert float(panels[0].min()) == 0.0
    assert float(panels[0].max()) == 1.0
    unequal = [axis.images[0].get_array() for axis in plots.query_components(result).axes]
    assert not np.allclose(unequal[0], unequal[2], atol=1e-2)


def test_principal_components_find_the_directions_of_most_variance(generator):
    directions = torch.linalg.qr(torch.randn(6, 2, generator=generator)).Q.T
    weights = torch.randn(40, 2, generator=generator) * torch.tensor([5.0, 1.0])
    found = plots.principal_components(weights @ directions + 3.0, 2)
    assert found.shape == (40, 2)
    centred = weights[:, 0] - weights[:, 0].mean()
    assert torch.corrcoef(torch.stack([found[:, 0], centred]))[0, 1].abs() > 0.99
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()
