"""What people get wrong in their first minutes: one error each, with the value and the remedy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import masa
from masa.cli.commands import main
from masa.weights.demo.world import render
from masa.weights.demo.world import sample as draw_sample

FAST = {"steps": 2, "height": 64, "width": 64, "progress": False}


@pytest.mark.parametrize(
    "call",
    [
        lambda: masa.sample("a cat", "a dog"),
        lambda: masa.edit("cat.png", "a dog", "a cat"),
        lambda: masa.invert("cat.png", "a cat"),
        lambda: masa.record("a cat"),
        lambda: masa.sdedit("cat.png", "a dog", "a cat", 0.5),
        lambda: masa.grid("cat.png", "a dog", "a cat"),
        lambda: masa.sweep("a cat", "a dog", "a", ("start_step", [0]), ("start_layer", [0])),
    ],
    ids=["sample", "edit", "invert", "record", "sdedit", "grid", "sweep"],
)
def test_the_model_is_forgotten(call):
    with pytest.raises(masa.MasaError, match=r"expected what masa.load\(\) gives"):
        call()


def test_a_sampler_where_the_schedule_belongs(tiny):
    for call in (masa.sample, lambda sd, prompt, **given: masa.edit(sd, Image.new("RGB", (64, 64)), prompt, **given)):
        with pytest.raises(masa.MasaError, match=r"schedule is 'dpm'; expected .*sampler='dpm\+\+2m'"):
            call(tiny, "a cat", schedule="dpm", **FAST)
    with pytest.raises(masa.MasaError, match="schedule is 'dpm'"):
        masa.invert(tiny, Image.new("RGB", (64, 64)), schedule="dpm", **FAST)


def test_a_callback_that_cannot_be_called(tiny):
    with pytest.raises(masa.MasaError, match="callback is 3; expected a function"):
        masa.sample(tiny, "a cat", callback=3, **FAST)


def test_a_number_where_a_checkpoint_or_a_prompt_belongs(tiny):
    with pytest.raises(masa.MasaError, match="checkpoint is 3; expected a path"):
        masa.load(3)
    with pytest.raises(masa.MasaError, match="the target is 3; expected a prompt"):
        masa.sample(tiny, "a cat", 3, **FAST)


@pytest.mark.parametrize("picture", [np.zeros((0, 0, 3), np.uint8), torch.zeros(3, 0, 64)], ids=["array", "tensor"])
def test_a_picture_without_pixels(picture, tiny):
    with pytest.raises(masa.MasaError, match="without a pixel"):
        masa.invert(tiny, picture, steps=2, progress=False)


def test_a_picture_that_is_not_there(tiny):
    with pytest.raises(FileNotFoundError, match=r"no picture at gone.png; give the path"):
        masa.invert(tiny, "gone.png", **FAST)


def test_few_steps_with_the_default_start(tiny):
    with pytest.raises(masa.MasaError, match="meant for 50 steps, which of 4 are 0"):
        masa.sample(tiny, "a cat", "a dog", steps=4, height=64, width=64, progress=False)


def test_two_pictures_to_edit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(name)
    assert main(["edit", "a.png", "b.png", "a cat"]) == 2
    assert "b.png is a file and stands where a prompt belongs" in capsys.readouterr().err


def test_the_bare_command_helps_and_tells_its_version(capsys):
    assert main([]) == 0
    assert "masa demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"masa {masa.__version__}\n"


def test_the_model_that_is_used_is_named(tmp_path, monkeypatch, capsys, tiny_folder):
    monkeypatch.chdir(tmp_path)
    fast = ["--steps", "1", "--height", "64", "--width", "64"]
    assert main(["sample", "a cat", *fast]) == 0
    assert "made with the embedded demo model" in capsys.readouterr().err
    assert main(["sample", "a cat", *fast, "-c", str(tiny_folder)]) == 0
    assert "demo model" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_photograph_meets_the_demo_model(recwarn):
    data = pytest.importorskip("skimage.data")
    sd = masa.load()
    for photograph in (data.astronaut(), data.coffee(), data.chelsea()):
        with pytest.warns(UserWarning, match="knows a small drawn world, no photographs"):
            masa.invert(sd, photograph, steps=1, progress=False)
    recwarn.clear()
    for seed in range(4):
        drawn = draw_sample(seed, ["cat"])
        picture = render(drawn.appearance, drawn.pose, drawn.scene, sd.config.image_size)[0]
        masa.invert(sd, picture, steps=1, progress=False)
    assert not [w for w in recwarn if "photographs" in str(w.message)]


def test_types_are_shipped():
    code = "import importlib.resources as r; assert (r.files('masa') / 'py.typed').is_file()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
