"""T2I-Adapters, ControlNets and IP-Adapters on the command line: what it runs is what the library runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_cases import make_adapter, make_controlnet, picture, save
from PIL import Image

import masa
from masa.cli.arguments import build_parser
from masa.cli.commands import main
from masa.cli.control_arguments import build_controls

TWO = ["sample", "a cat", "a dog"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with an adapter, a ControlNet and two pictures."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "adapter.safetensors", make_adapter("full").state_dict())
    save(tmp_path / "net.safetensors", make_controlnet().state_dict())
    for name, seed in (("a.png", 0), ("b.png", 1)):
        shown = (picture(seed, size=(64, 64)).permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(shown).save(name)
    return tmp_path


def described(argv):
    return [masa.settings.describe(control) for control in build_controls(build_parser().parse_args(argv))]


def test_options_describe_adapters(home):
    options = ["--t2i-adapter", "adapter.safetensors", "a.png", "--adapter-source", "b.png", "--adapter-weight", "0.7"]
    options += ["--tau", "0.5", "--controlnet", "net.safetensors", "b.png", "--controlnet-source", "a.png"]
    options += ["--controlnet-scale", "0.6", "--controlnet-start", "0.1", "--controlnet-end", "0.9", "--guess-mode"]
    adapter = masa.T2IAdapter("adapter.safetensors", "b.png", "a.png", 0.7, 0.5)
    net = masa.ControlNet("net.safetensors", "a.png", "b.png", 0.6, 0.1, 0.9, True)
    assert described([*TWO, *options]) == [masa.settings.describe(c) for c in (masa.MasaCtrl(), adapter, net)]
    several = ["--t2i-adapter", "adapter.safetensors", "a.png"] * 2
    one = masa.settings.describe(masa.T2IAdapter("adapter.safetensors", target="a.png"))
    assert described([*TWO, "--no-control", *several]) == [one, one]
    (home / "clip").mkdir()
    words = ["--ip-adapter", "adapter.safetensors", "a.png", "--image-encoder", "clip"]
    words += ["--ip-scale", "0.5", "--ip-source", "b.png"]
    ip = masa.settings.describe(masa.IPAdapter("adapter.safetensors", "b.png", "a.png", 0.5, "clip"))
    assert described([*TWO, "--no-control", *words]) == [ip]
    alone = masa.settings.describe(masa.T2IAdapter("adapter.safetensors", source="a.png"))
    assert described(["sample", "a cat", *several[:3]]) == [alone]


def test_the_command_equals_the_library_and_is_repeated(home, tiny_folder, capsys):
    argv = [*TWO, "-c", str(tiny_folder), "--dtype", "fp32", "--seed", "0", "--steps", "2", "-q", "-o", "out"]
    options = ["--t2i-adapter", "adapter.safetensors", "a.png", "--controlnet", "net.safetensors", "b.png"]
    assert main([*argv, "--height", "64", "--width", "64", *options, "--no-control"]) == 0
    sd = masa.load(tiny_folder, dtype="fp32")
    controls = [
        masa.T2IAdapter("adapter.safetensors", target="a.png"),
        masa.ControlNet("net.safetensors", target="b.png"),
    ]
    usual = {"seed": 0, "steps": 2, "height": 64, "width": 64, "progress": False}
    for shown, equal in ((controls, True), (controls[:1], False), (controls[1:], False)):
        out = masa.sample(sd, "a cat", "a dog", controls=shown, **usual)
        with Image.open("out/target_0.png") as file:
            assert (file.tobytes() == out.targets[0].tobytes()) == equal
    assert main(["rerun", "out/target_0.png", "-o", "again", "-q"]) == 0
    assert Path("again/target_0.png").read_bytes() == Path("out/target_0.png").read_bytes()


def test_an_inversion_takes_the_sources_picture(home, tiny_folder, capsys):
    model = ["-c", str(tiny_folder), "--dtype", "fp32", "-q"]
    usual = ["--steps", "2", "--height", "64", "--width", "64", "--prompt", "a cat"]
    options = ["--t2i-adapter", "adapter.safetensors", "b.png", "--tau", "0.5", "--adapter-weight", "0.7"]
    assert main(["invert", "a.png", "-o", "t.safetensors", *usual, *options, *model]) == 0
    sd = masa.load(tiny_folder, dtype="fp32")
    control = masa.T2IAdapter("adapter.safetensors", source="b.png", weight=0.7, tau=0.5)
    size = {"steps": 2, "height": 64, "width": 64, "progress": False}
    ref = masa.invert(sd, "a.png", "a cat", controls=control, **size)
    found = masa.Trajectory.load("t.safetensors")
    assert found.latents.equal(ref.latents)
    assert found.settings["source_conditions"] == ref.settings["source_conditions"]
    assert not found.latents.equal(masa.invert(sd, "a.png", "a cat", **size).latents)
    capsys.readouterr()
    for more, message in (
        (["--tau", "0.5"], "--tau 0.5 would do nothing"),
        ([*options, "--adapter-source", "a.png"], "without targets the first picture is the source's"),
        ([*options, "--method", "noise"], "'noise' predicts nothing"),
    ):
        assert main(["invert", "a.png", "-o", "u.safetensors", *usual, *more, *model]) == 2
        assert message in capsys.readouterr().err


def test_mistakes_are_one_line(home, tiny_folder, capsys):
    model = ["-c", str(tiny_folder), "-q", "--steps", "2", "--height", "64", "--width", "64", "--no-control"]
    for options, message in (
        (["--t2i-adapter", "adapter.safetensors", "gone.png"], "gone.png"),
        (["--t2i-adapter", "gone.safetensors", "a.png"], "no T2I-Adapter at gone.safetensors"),
        (["--t2i-adapter", "net.safetensors", "a.png"], "is a ControlNet"),
        (["--controlnet", "adapter.safetensors", "a.png"], "is a T2I-Adapter"),
        (["--ip-adapter", "adapter.safetensors", "a.png"], "give its folder as --image-encoder"),
        (["--ip-adapter", "adapter.safetensors", "a.png", "--image-encoder", "gone"], "no image encoder at gone"),
        (["--ip-adapter", "adapter.safetensors", "a.png", "--image-encoder", "."], "is a T2I-Adapter"),
    ):
        assert main([*TWO, *model, *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not (home / "masa-out").exists()


@pytest.mark.usefixtures("processor")
def test_every_dtype_serves(home, tiny_folder):
    """Networks and pictures follow the model's dtype, in which it may be half as exact: same up to a few percent."""
    sd, exact = masa.load(tiny_folder), masa.load(tiny_folder, dtype="fp32")
    controls = [
        masa.T2IAdapter("adapter.safetensors", target="a.png", weight=0.5),
        masa.ControlNet("net.safetensors", target="b.png", scale=0.5),
    ]
    usual = {"seed": 0, "steps": 2, "height": 64, "width": 64, "guidance_scale": 1.0, "progress": False}
    out, ref = (masa.sample(model, "a cat", "a dog", controls=controls, **usual).latents for model in (sd, exact))
    assert (out - ref).abs().max() / ref.std() < 0.1
