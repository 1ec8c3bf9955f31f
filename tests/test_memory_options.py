"""Options that change how a run is cut into pieces or made, not what it is: in Python, on the command line, again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

import masa
from masa import pipeline
from masa.cli.commands import main
from masa.models import tiling
from masa.output.result import read_settings
from masa.runtime import compile as compiling
from masa.workflows.rerun import load_again

SIZE = {"height": 64, "width": 128}
SETTINGS = {**SIZE, "steps": 2, "seed": 0, "controls": [], "progress": False}
SOURCE, TARGETS = "a sitting cat", ["a running cat", "a red cat", "a cat in the snow"]
FAST = ["--steps", "2", "--height", "64", "--width", "128", "--no-control", "--seed", "0", "-q"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 64 pixels, above 96: pictures of 128 are tiled unless it is forbidden."""
    for name, value in (("TILE", 64), ("OVERLAP", 32), ("LARGEST", 96)):
        monkeypatch.setattr(tiling, name, value)


@pytest.fixture
def picture():
    return torch.rand(3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pixels(path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_sampling_decodes_in_tiles(tiny):
    found = {tiled: masa.sample(tiny, SOURCE, TARGETS[0], tiled=tiled, **SETTINGS) for tiled in (None, True, False)}
    for image in range(2):
        default, tiles, whole = (found[tiled].images[image].tobytes() for tiled in (None, True, False))
        assert default == tiles != whole
    assert torch.equal(found[True].latents, found[False].latents)
    assert [found[tiled].settings["tiled"] for tiled in found] == [None, True, False]


def test_what_is_recorded_of_a_run_is_decoded_alike(tiny):
    run = SETTINGS | {"controls": masa.RecordPredictions()}
    tiles, whole = (masa.sample(tiny, SOURCE, tiled=tiled, **run).predictions[0] for tiled in (True, False))
    assert not torch.equal(tiles[1], whole[1])


def test_inversions_encode_in_tiles(tiny, picture):
    invert = {"steps": 2, "progress": False, **SIZE}
    found = {tiled: masa.invert(tiny, picture, tiled=tiled, **invert) for tiled in (None, True, False)}
    assert torch.equal(found[None].latents, found[True].latents)
    assert not torch.equal(found[False].latents[0], found[True].latents[0])
    assert [found[tiled].settings["tiled"] for tiled in found] == [None, True, False]
    # An edit encodes and decodes so; in between nothing is tiled.
    for tiled in (True, False):
        out = masa.edit(tiny, picture, TARGETS[0], tiled=tiled, **SETTINGS)
        assert out.settings["tiled"] is out.settings["trajectory"]["tiled"] is tiled
        again = masa.sample(tiny, target=TARGETS[0], trajectory=found[tiled], tiled=tiled, seed=0, controls=[])
        assert torch.equal(out.latents, again.latents)
        assert out.targets[0].tobytes() == again.targets[0].tobytes()


def test_sdedit_tiles(tiny, picture):
    tiles, whole = (
        masa.sdedit(tiny, picture, TARGETS[0], 0.5, steps=2, seed=0, tiled=tiled, progress=False, **SIZE)
        for tiled in (True, False)
    )
    assert not torch.equal(tiles.latents, whole.latents)
    assert whole.settings["tiled"] is whole.settings["trajectory"]["tiled"] is False


def test_a_cached_source_stays_as_it_was_decoded(tiny):
    recorded = {name: value for name, value in SETTINGS.items() if name != "controls"}
    control = masa.MasaCtrl(1, 14)
    cache = masa.record(tiny, SOURCE, controls=control, tiled=False, **recorded)
    cached = masa.sample(tiny, target=TARGETS[0], cache=cache, controls=control, progress=False)
    assert cached.settings["tiled"] is False
    for i, image in enumerate(cached.images):
        whole, tiles = (tiny.decode_latents(cached.latents[i : i + 1], tiled=tiled)[0] for tiled in (False, True))
        assert image.tobytes() == whole.tobytes() != tiles.tobytes()
    with pytest.raises(masa.MasaError, match="tiled is True, but the cache was recorded with False"):
        masa.sample(tiny, target=TARGETS[0], cache=cache, tiled=True)


def test_a_picture_is_made_again_in_its_tiles(tiny, picture, tmp_path):
    Image.fromarray(((picture + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    out = masa.edit(tiny, tmp_path / "photo.png", TARGETS[0], tiled=False, targets_at_once=1, **SETTINGS)
    out.targets[0].save(tmp_path / "target.png")
    again = masa.rerun(tmp_path / "target.png", tiny, progress=False)
    assert again.settings["tiled"] is again.settings["trajectory"]["tiled"] is False
    assert again.settings["targets_at_once"] == 1
    assert again.targets[0].tobytes() == out.targets[0].tobytes()


@pytest.mark.usefixtures("processor")
def test_the_command_line_tiles_and_parts(tiny, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows: list[int] = []
    unet_forward = pipeline.UNet.forward

    def forward(unet, x, *args, **kwargs):
        rows.append(len(x))
        return unet_forward(unet, x, *args, **kwargs)

    monkeypatch.setattr(pipeline.UNet, "forward", forward)
    argv = ["sample", SOURCE, *TARGETS, "-c", str(tiny_folder), *FAST, "--guidance", "1"]
    assert main([*argv, "-o", "plain"]) == 0
    assert rows == [4, 4]
    rows.clear()
    assert main([*argv, "-o", "parts", "--no-tiled", "--targets-at-once", "2"]) == 0
    assert rows == [3, 1, 3, 1]
    assert pixels("plain/source.png") != pixels("parts/source.png")
    settings = read_settings("parts/target_0.png")
    assert settings["tiled"] is False
    assert settings["targets_at_once"] == 2
    assert main(["rerun", "parts/target_0.png", "-o", "again", "-q"]) == 0
    assert pixels("again/target_0.png") == pixels("parts/target_0.png")


@pytest.mark.slow
@pytest.mark.usefixtures("processor")
def test_the_command_line_inverts_and_edits_in_tiles(tiny_folder, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(((picture + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save("photo.png")
    size = ["-c", str(tiny_folder), "--steps", "2", "--height", "64", "--width", "128", "-q"]
    for flag, tiled in (("--tiled", True), ("--no-tiled", False)):
        assert main(["invert", "photo.png", "-o", f"{tiled}.safetensors", flag, *size]) == 0
        assert masa.Trajectory.load(f"{tiled}.safetensors").settings["tiled"] is tiled
        once = ["edit", "photo.png", TARGETS[0], TARGETS[1], "--no-control", "--targets-at-once", "1", "--seed", "0"]
        assert main([*once, "-o", f"edit {tiled}", flag, *size]) == 0
        assert read_settings(f"edit {tiled}/source.png")["trajectory"]["tiled"] is tiled
        assert read_settings(f"edit {tiled}/source.png")["targets_at_once"] == 1
        argv = ["sdedit", "photo.png", TARGETS[0], "--seed", "0", "-o", f"sdedit {tiled}", flag, *size]
        assert main(argv) == 0
        assert read_settings(f"sdedit {tiled}/source.png")["tiled"] is tiled
    assert pixels("edit True/target_0.png") != pixels("edit False/target_0.png")


@pytest.mark.parametrize("settings", [{"targets_at_once": 0}, {"tiled": "yes"}])
def test_bad_pieces_are_refused_before_an_inversion(tiny, picture, monkeypatch, settings):
    monkeypatch.setattr(tiny.unet, "forward", lambda *args, **kwargs: pytest.fail("ran first"))
    (name,) = settings
    with pytest.raises(masa.MasaError, match=f"{name} is .*; expected"):
        masa.edit(tiny, picture, TARGETS[0], **settings)
    if name == "tiled":
        with pytest.raises(masa.MasaError, match="tiled is 'yes'; expected"):
            masa.invert(tiny, picture, **settings)


# -------------------------------------------------------------------------------------- compiled and offloaded


@pytest.fixture
def quick_compiler(monkeypatch):
    """Every compiler is the one that compiles nothing; the names of those asked for."""
    asked: list[str] = []
    compile_unet = compiling.compile_unet

    def compile_by_name(unet, compiler="inductor", cuda_graphs=None):
        asked.append(compiler)
        return compile_unet(unet, "eager" if compiler == "inductor" else compiler, cuda_graphs)

    monkeypatch.setattr(compiling, "compile_unet", compile_by_name)
    return asked


@pytest.mark.slow
def test_the_command_line_compiles_and_rerun_does_again(tiny_folder, tmp_path, monkeypatch, quick_compiler):
    monkeypatch.chdir(tmp_path)
    argv = ["sample", SOURCE, TARGETS[0], "-c", str(tiny_folder), *FAST]
    assert main([*argv, "-o", "plain"]) == 0
    assert quick_compiler == []
    assert read_settings("plain/source.png")["compiled"] is None
    assert main([*argv, "-o", "compiled", "--compile"]) == 0
    assert quick_compiler == ["inductor"]
    assert read_settings("compiled/source.png")["compiled"] == "inductor"
    assert main(["rerun", "compiled/source.png", "-o", "again", "-q"]) == 0
    assert quick_compiler == ["inductor", "inductor"]
    assert pixels("again/target_0.png") == pixels("compiled/target_0.png")


@pytest.mark.slow
@pytest.mark.parametrize("cuda_graphs", [None, False])
def test_what_was_asked_of_cuda_graphs_is_asked_again(tiny, tmp_path, monkeypatch, quick_compiler, cuda_graphs):
    settings = masa.sample(tiny.compile(cuda_graphs=cuda_graphs), SOURCE, **SETTINGS).settings
    assert settings["cuda_graphs"] is cuda_graphs
    monkeypatch.setattr(masa.StableDiffusion, "device", torch.device("cuda", 0))
    asked: list[bool | None] = []
    monkeypatch.setattr(
        masa.StableDiffusion, "compile", lambda sd, *, compiler, cuda_graphs: asked.append(cuda_graphs) or sd
    )
    monkeypatch.setattr("masa.workflows.rerun.load", lambda checkpoint, **given: tiny)
    load_again(settings, tmp_path / "source.png", progress=False)
    assert asked == [cuda_graphs]


def test_a_gpu_s_run_that_was_offloaded_and_compiled_is_compiled_on_a_cpu(tiny, tmp_path, monkeypatch, quick_compiler):
    settings = {**masa.sample(tiny, SOURCE, **SETTINGS).settings, "offload": True, "compiled": "eager"}
    given = []
    monkeypatch.setattr("masa.workflows.rerun.load", lambda *path, **more: given.append(more["offload"]) or tiny)
    assert load_again(settings, tmp_path / "source.png", progress=False).compiled == "eager"
    load_again({**settings, "compiled": None}, tmp_path / "source.png", progress=False)
    assert given == [False, True]


def test_offloaded_and_compiled_on_a_cpu_is_refused_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(masa, "load", lambda *given, **more: pytest.fail("loaded first"))
    assert main(["sample", SOURCE, "--device", "cpu", "--offload", "--compile"]) == 2
    assert "--offload and --compile go together on a GPU only; leave one of the two out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiler_without_a_name_is_not_asked_for_again(tiny, tmp_path):
    def mine(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        return graph

    out = masa.sample(tiny.compile(compiler=mine), SOURCE, **SETTINGS)
    assert out.settings["compiled"] == "mine"
    out.source.save(tmp_path / "source.png")
    with pytest.warns(UserWarning, match="compiler is 'mine'"):
        again = masa.rerun(tmp_path / "source.png", progress=False)
    assert again.settings["compiled"] is None


def test_a_failing_compiler_is_one_line(tiny):
    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        raise RuntimeError("no C++ compiler here")

    with pytest.raises(masa.MasaError, match=r"the compiler failed \(.*no C\+\+ compiler here.*\); run without"):
        masa.sample(tiny.compile(compiler=broken), SOURCE, **SETTINGS)


def test_offloading_is_written_down(tiny, tmp_path, monkeypatch):
    class Stays(nn.Module):
        """A network that cannot be moved."""

        def __init__(self, network):
            super().__init__()
            self.network, self.config = network, network.config

        def to(self, *args, **kwargs):
            return self

        def forward(self, *args):
            return self.network(*args)

        def decode(self, latents):
            return self.network.decode(latents)

    sd = replace(tiny, text_encoder=Stays(tiny.text_encoder), vae=Stays(tiny.vae), offload=True)
    settings = dict(masa.sample(sd, SOURCE, **SETTINGS).settings)
    assert settings["offload"] is True
    assert masa.sample(tiny, SOURCE, **SETTINGS).settings["offload"] is False
    loads: list[dict] = []
    monkeypatch.setattr("masa.workflows.rerun.load", lambda checkpoint, **given: loads.append(given) or tiny)
    load_again(settings, tmp_path / "source.png", progress=False)
    del settings["offload"]  # of an earlier version
    load_again(settings, tmp_path / "source.png", progress=False)
    assert [given["offload"] for given in loads] == [True, False]


@pytest.mark.parametrize("command", [["sample", SOURCE], ["edit", "photo.png", TARGETS[0]], ["invert", "photo.png"]])
def test_the_command_line_offloads(tiny_folder, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (128, 128)).save("photo.png")
    argv = [*command, "-c", str(tiny_folder), "--device", "cpu", "--steps", "5", "--offload", "-q"]
    loads, load = [], masa.pipeline.load
    monkeypatch.setattr(masa, "load", lambda *given, **more: loads.append(more["offload"]) or load(*given, **more))
    assert main(argv) == 0
    assert loads == [True]
