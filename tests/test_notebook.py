"""Values show themselves in a notebook, shortly and without anything from elsewhere."""

from __future__ import annotations

import io
import re

import pytest
import torch
from PIL import Image

import masa
from masa.output.notebook import LONGEST, shorten

FAST = {"steps": 2, "height": 64, "width": 64, "progress": False}


@pytest.fixture(scope="module")
def out(tiny):
    return masa.sample(tiny, "a <b>cat</b>", "a dog", controls=[], seed=0, **FAST)


def test_a_result_shows_its_grid(out):
    with Image.open(io.BytesIO(out._repr_png_())) as shown:
        assert shown.size == out.grid().size
        assert shown.tobytes() == out.grid().tobytes()
    html = out._repr_html_()
    assert html.count("<img") == 1
    assert not re.search(r"https?://", html.split("base64")[0])


def test_what_users_wrote_is_escaped(out):
    html = out._repr_html_()
    assert "<b>" not in html
    assert "a &lt;b&gt;cat&lt;/b&gt;" in html


def test_values_describe_themselves_in_one_short_line(out, tiny):
    trajectory = masa.invert(tiny, out.source, "a cat", **FAST)
    for value, told in ((out, "a dog"), (trajectory, "2 steps"), (tiny, "parameters")):
        assert told in repr(value)
        assert "tensor(" not in repr(value)
        assert "\n" not in repr(value)
        assert len(repr(value)) < 300
        assert "<table>" in value._repr_html_()


def test_a_picture_shows_itself(out):
    with Image.open(io.BytesIO(out.source._repr_png_())) as shown:
        assert shown.size == out.source.size


def test_long_values_are_cut():
    assert shorten("x" * 1000) == "x" * (LONGEST - 2) + ".."
    assert shorten("short") == "short"


def test_a_prompt_of_a_page_makes_no_tower(tiny):
    pictures, prompts = [Image.new("RGB", (64, 64))] * 2, {"source": "word " * 2000, "target": [""]}
    long = masa.Result(pictures, torch.zeros(2, 4, 8, 8), prompts)
    assert long.grid().height < 300


def test_completion_lists_public_names_only():
    assert set(dir(masa)) == {*masa.__all__, "__version__"}


def test_a_figure_shows_itself(tiny):
    masked = masa.MasaCtrl(0, 0, mask=masa.WordMasks("cat", "dog"))
    figure = masa.plots.masks(masa.sample(tiny, "a cat", "a dog", controls=masked, seed=0, **FAST))
    with Image.open(io.BytesIO(figure._repr_png_())) as shown:
        assert len(shown.convert("RGB").getcolors(shown.width * shown.height)) > 2
