"""RecordAttention and the figures made from what it keeps."""

from __future__ import annotations

import builtins

import published_p2p as published
import pytest
import torch

import masa
from masa import plots

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
    return run(tiny, [masa.MasaCtrl(1, 10, mask=masa.WordMasks(6 - 1, 5)), record])


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
    record = masa.RecordAttention(layers=[8], self_attention=True)
    assert difference(run(tiny, [*controls, record]).latents, run(tiny, controls).latents) < 1e-4


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
    ],
)
def test_figures_have_a_row_per_picture(result, tmp_path, plot, columns):
    pytest.importorskip("matplotlib")
    figure = plot(result)
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

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(masa.MasaError, match=r"pip install 'masa\[plots\]'"):
        plots.masks(result)


def test_principal_components_find_the_directions_of_most_variance(generator):
    directions = torch.linalg.qr(torch.randn(6, 2, generator=generator)).Q.T
    weights = torch.randn(40, 2, generator=generator) * torch.tensor([5.0, 1.0])
    found = plots.principal_components(weights @ directions + 3.0, 2)
    assert found.shape == (40, 2)
    centred = weights[:, 0] - weights[:, 0].mean()
    assert torch.corrcoef(torch.stack([found[:, 0], centred]))[0, 1].abs() > 0.99
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()
