"""Results: what is saved, and that a saved picture runs again."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import masa
from masa.cli.commands import main
from masa.io.files import WriteError
from masa.output.result import Picture, file_names, read_saved, read_settings, wrap
from masa.settings import describe, restore

SETTINGS = {"steps": 3, "height": 64, "width": 64, "progress": False}


@pytest.fixture(scope="module")
def out(tiny):
    mask = torch.zeros(8, 8)
    mask[2:6, 1:5] = 1.0
    controls = masa.MasaCtrl(1, 4, mask=masa.GivenMasks(mask, mask * 0.75))
    return masa.sample(tiny, "a sitting cat", ["a cat", "a dog"], controls=controls, seed=5, eta=0.5, **SETTINGS)


def test_saved_files(out, tmp_path):
    paths = out.save(tmp_path / "new" / "folder")
    names = ["source.png", "target_0.png", "target_1.png", "grid.png", "result.safetensors"]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(p.name for p in paths)
    with Image.open(paths[1]) as picture:
        assert picture.size == (64, 64)


def test_a_saved_result_comes_back_whole(tiny, tmp_path):
    records = [masa.RecordAttention(words=["of a", "cat"], self_attention=True), masa.RecordQueries([8], [0, 2])]
    controls = [masa.MasaCtrl(1, 4, mask=masa.WordMasks("cat", "cat")), *records, masa.RecordPredictions([2, 0])]
    first = masa.sample(tiny, "a photo of a cat", "a cat", controls=controls, seed=5, **SETTINGS)
    first.save(tmp_path)
    back = masa.Result.load(tmp_path)
    assert [p.tobytes() for p in back.images] == [p.tobytes() for p in first.images]
    assert back.images[1].settings == first.images[1].settings
    assert back.settings == first.settings
    assert torch.equal(back.latents, first.latents)
    for kind in ("masks", "attention", "queries", "predictions"):
        kept, ours = getattr(back, kind), getattr(first, kind)
        assert [(c, list(found)) for c, found in kept.items()] == [(c, list(found)) for c, found in ours.items()]
        assert all(torch.equal(kept[c][n], t) for c, found in ours.items() for n, t in found.items())
    back.save(tmp_path / "again")
    assert (tmp_path / "again" / "target_0.png").read_bytes() == (tmp_path / "target_0.png").read_bytes()
    assert list(masa.Result.load(tmp_path / "again").attention[1]) == ["of a", "cat", "self-attention"]


def test_large_maps_are_saved_in_half_precision(out, tmp_path, generator):
    maps = {"small": torch.rand(4, generator=generator), "large": torch.rand(1025, 1024, generator=generator)}
    pictures = torch.randint(0, 256, (1, 600, 600, 3), generator=generator, dtype=torch.uint8)
    replace(out, attention={1: maps}, predictions={2: {0: pictures}}).save(tmp_path)
    kept = masa.Result.load(tmp_path).predictions[2][0]
    assert kept.dtype == torch.uint8  # whole numbers stay what they are
    assert torch.equal(kept, pictures)
    back = masa.Result.load(tmp_path).attention[1]
    assert torch.equal(back["small"], maps["small"])
    assert back["large"].dtype == torch.float16
    assert torch.allclose(back["large"].float(), maps["large"], atol=1e-3)


def test_what_is_no_saved_result_is_named(out, tmp_path):
    with pytest.raises(masa.MasaError, match=r"holds no result\.safetensors; expected a folder written by Result"):
        masa.Result.load(tmp_path)
    out.save(tmp_path)
    (tmp_path / "target_1.png").unlink()
    with pytest.raises(masa.MasaError, match=r"lacks target_1\.png"):
        masa.Result.load(tmp_path)
    Picture.of(out.source, out.settings | {"branch": 2, "seed": 6}).save(tmp_path / "target_1.png")
    with pytest.raises(masa.MasaError, match=r"target_1\.png and .* are of different runs"):
        masa.Result.load(tmp_path)
    (tmp_path / "result.safetensors").write_bytes(b"123")
    with pytest.raises(masa.MasaError, match="is not a whole safetensors file"):
        masa.Result.load(tmp_path)


def test_images_are_the_decoded_latents(tiny, out):
    assert out.images[0].tobytes() == tiny.decode_latents(out.latents)[0].tobytes()
    assert out.source is out.images[0]
    assert len(out.targets) == 2


def test_a_saved_picture_runs_again(tiny, out, tmp_path):
    out.targets[1].save(tmp_path / "target.png")
    again = masa.rerun(tmp_path / "target.png", tiny, progress=False)
    assert torch.equal(again.latents, out.latents)


@pytest.mark.parametrize("start", ["latents", "whole numbers", "bfloat16", "generator"])
def test_every_kind_of_start_runs_again(tiny, tmp_path, start):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    given = {
        "latents": {"latents": noise},
        "whole numbers": {"latents": (noise * 2).to(torch.int64)},
        "bfloat16": {"latents": noise.bfloat16()},
        "generator": {"generator": torch.Generator().manual_seed(9)},
    }[start]
    first = masa.sample(tiny, "a cat", "a dog", controls=masa.MasaCtrl(1), **given, **SETTINGS)
    first.source.save(tmp_path / "source.png")
    assert torch.equal(masa.rerun(tmp_path / "source.png", tiny, progress=False).latents, first.latents)


def test_an_edit_runs_again_from_its_picture(tiny, out, tmp_path):
    out.source.save(tmp_path / "real.png")
    settings = {"steps": 3, "controls": masa.MasaCtrl(1), "progress": False, "height": 64, "width": 64}
    edit = masa.edit(tiny, tmp_path / "real.png", "a dog", "a cat", **settings)
    edit.save(tmp_path / "edit")
    again = masa.rerun(tmp_path / "edit" / "target_0.png", tiny, progress=False)
    assert torch.equal(again.latents, edit.latents)

    Image.new("RGB", (64, 64)).save(tmp_path / "real.png")
    with pytest.raises(masa.MasaError, match="has changed since"):
        masa.rerun(tmp_path / "edit" / "target_0.png", tiny, progress=False)
    (tmp_path / "real.png").unlink()
    with pytest.raises(masa.MasaError, match="not there any more"):
        masa.rerun(tmp_path / "edit" / "target_0.png", tiny, progress=False)


@pytest.mark.parametrize("pin_source", [True, False])
def test_an_edit_runs_again_with_what_is_not_the_default(tiny, out, tmp_path, pin_source):
    """Every setting of inversion and sampling that has another value comes back from the picture."""
    out.source.save(tmp_path / "real.png")
    edit = masa.edit(
        tiny,
        tmp_path / "real.png",
        ["a dog", "a bird"],
        "a cat",
        controls=masa.MasaCtrl(1, 8),
        pin_source=pin_source,
        steps=4,
        skip_steps=1,
        guidance_scale=3.0,
        invert_guidance_scale=1.5,
        negative_prompt="blurry",
        height=64,
        width=128,
        eta=0.4,
        seed=6,
        schedule=masa.Schedule(masa.ScheduleConfig(beta_end=0.02), offset=0),
        targets_at_once=1,
        tiled=False,
        backend="reference",
        progress=False,
    )
    edit.targets[1].save(tmp_path / "target.png")
    again = masa.rerun(tmp_path / "target.png", tiny, progress=False)
    assert again.settings == edit.settings
    assert torch.equal(again.latents, edit.latents)


def test_a_relative_picture_is_found_from_elsewhere(tiny, out, tmp_path, monkeypatch):
    (tmp_path / "work" / "elsewhere").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    out.source.save("real.png")
    settings = {"steps": 2, "controls": masa.MasaCtrl(1), "progress": False, "height": 64, "width": 64}
    edit = masa.edit(tiny, "real.png", "a dog", **settings)
    edit.save("masa-out/0001")
    monkeypatch.chdir(tmp_path / "work" / "elsewhere")
    again = masa.rerun(tmp_path / "work" / "masa-out" / "0001" / "target_0.png", tiny, progress=False)
    assert torch.equal(again.latents, edit.latents)


def test_schedule_and_backend_run_again(tiny, tmp_path):
    schedule = masa.Schedule(masa.ScheduleConfig(beta_end=0.02), offset=0)
    settings = SETTINGS | {"schedule": schedule, "backend": "reference", "controls": masa.MasaCtrl(1)}
    first = masa.sample(tiny, "a cat", "a dog", seed=1, **settings)
    first.source.save(tmp_path / "source.png")
    again = masa.rerun(tmp_path / "source.png", tiny, progress=False)
    assert torch.equal(again.latents, first.latents)
    assert again.settings == first.settings


def test_other_weights_are_noticed(tiny, tiny_folder, tmp_path):
    from masa.pipeline import Origin

    assert tiny.origin == Origin(str(tiny_folder))
    first = masa.sample(tiny, "a cat", seed=1, **SETTINGS)
    first.source.save(tmp_path / "source.png")
    assert torch.equal(masa.rerun(tmp_path / "source.png", progress=False).latents, first.latents)
    settings = first.settings | {"fingerprint": "0" * 16}
    Picture.of(first.source, settings).save(tmp_path / "other.png")
    with pytest.raises(masa.MasaError, match="holds other weights"):
        masa.rerun(tmp_path / "other.png", progress=False)


@pytest.mark.slow
def test_another_device_or_dtype_keeps_the_checks(tiny_folder, tiny, tmp_path, monkeypatch, capsys):
    """Weights are compared in the dtype that made the picture, and paths are still found near it."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    shutil.copytree(tiny_folder, work / "model")
    elsewhere.mkdir()
    monkeypatch.chdir(work)
    sd = masa.load("model", device="cpu", dtype="fp32", progress=False)
    first = masa.sample(sd, "a cat", seed=1, **(SETTINGS | {"steps": 1}))
    first.source.save("source.png")
    Picture.of(first.source, {**first.settings, "fingerprint": "0" * 16}).save("other.png")
    monkeypatch.chdir(elsewhere)
    source, other = work / "source.png", work / "other.png"
    assert torch.equal(masa.rerun(source, device="cpu", progress=False).latents, first.latents)
    again = masa.rerun(source, dtype="bf16", progress=False)
    assert again.settings["dtype"] == "bfloat16"
    for given in ({"device": "cpu"}, {"dtype": "bf16"}):
        with pytest.raises(masa.MasaError, match="holds other weights"):
            masa.rerun(other, progress=False, **given)
    # A checkpoint that is named is taken as it is.
    assert torch.equal(masa.rerun(other, checkpoint=work / "model", progress=False).latents, first.latents)
    with pytest.raises(masa.MasaError, match="sd and device both say"):
        masa.rerun(source, tiny, device="cpu")
    capsys.readouterr()
    loads = []
    monkeypatch.setattr("masa.workflows.rerun.load", lambda *args, **settings: loads.append(settings) or sd)
    assert main(["rerun", str(source), "--device", "cpu", "-q", "-o", "out"]) == 0
    assert [settings["progress"] for settings in loads] == [False]
    assert capsys.readouterr().err == ""


def test_a_callback_is_told(tiny, tmp_path):
    out = masa.sample(tiny, "a cat", seed=1, callback=lambda step, timestep, x: None, **SETTINGS)
    out.source.save(tmp_path / "source.png")
    with pytest.warns(UserWarning, match="a callback took part"):
        masa.rerun(tmp_path / "source.png", tiny, progress=False)


def test_a_control_of_ones_own_runs_and_is_not_repeated(tiny, tmp_path):
    class Mine:
        def begin(self, run):
            return masa.MasaCtrl(1).begin(run)

    out = masa.sample(tiny, "a cat", "a dog", controls=Mine(), seed=1, **SETTINGS)
    plain = masa.sample(tiny, "a cat", "a dog", controls=masa.MasaCtrl(1), seed=1, **SETTINGS)
    assert torch.equal(out.latents, plain.latents)
    out.source.save(tmp_path / "source.png")
    with pytest.raises(masa.MasaError, match="'Mine'"):
        masa.rerun(tmp_path / "source.png", tiny, progress=False)


def test_pictures_without_settings_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(masa.MasaError, match="carries no masa settings"):
        read_settings(tmp_path / "plain.png")


def test_large_settings_survive_in_the_picture(tiny, tmp_path):
    """A noisy mask hardly compresses: its settings are larger than Pillow's limit for one text chunk."""
    noise = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0))
    controls = masa.MasaCtrl(1, 4, mask=masa.GivenMasks(noise, noise))
    first = masa.sample(tiny, "a cat", "a dog", controls=controls, seed=1, **SETTINGS)
    first.source.save(tmp_path / "source.png")
    assert len(json.dumps(first.settings)) > 2**20
    assert read_settings(tmp_path / "source.png")["controls"] == first.settings["controls"]


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_settings_are_named(tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt("masa", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=chunks)
    with pytest.raises(masa.MasaError, match=r"odd\.png carries"):
        read_settings(tmp_path / "odd.png")


def test_no_picture_is_saved_without_the_rest(out, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("masa.output.result.save_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        out.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_saved_together_or_not_at_all(out, tmp_path, monkeypatch):
    saved = []
    original = Picture.save

    def fail_at_the_third(self, fp, *args, **params):
        saved.append(fp)
        if len(saved) == 3:
            raise OSError("disk full")
        original(self, fp, *args, **params)

    monkeypatch.setattr(Picture, "save", fail_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        out.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def folder_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_older_results_further_targets_are_removed(out, tmp_path):
    one = replace(out, images=out.images[:2], settings={**out.settings, "target": ["a cat"]})
    one = replace(one, images=[Picture.of(p, one.settings | {"branch": i}) for i, p in enumerate(one.images)])
    out.save(tmp_path)
    one.save(tmp_path, overwrite=True)
    assert folder_names(tmp_path) == ["grid.png", "result.safetensors", "source.png", "target_0.png"]
    assert masa.Result.load(tmp_path).settings == one.settings
    out.save(tmp_path, overwrite=True)
    assert len(masa.Result.load(tmp_path).targets) == 2


@pytest.mark.parametrize("record", ["none", "damaged", "another file's", "replaced picture"])
def test_what_no_older_result_wrote_stays(out, tmp_path, record):
    alone = replace(out, images=out.images[:1], settings={**out.settings, "target": []})
    out.save(tmp_path)
    if record == "none":
        (tmp_path / "result.safetensors").unlink()
    elif record == "damaged":
        (tmp_path / "result.safetensors").write_bytes(b"123")
    elif record == "another file's":
        save_file({"latents": torch.zeros(1)}, tmp_path / "result.safetensors", {"format": "other"})
    else:
        for name in ("target_0.png", "target_1.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "target_2.png").write_bytes(b"mine")
    alone.save(tmp_path, overwrite=True)
    assert {"target_0.png", "target_1.png", "target_2.png"} <= set(folder_names(tmp_path))


def test_a_failed_save_loses_nothing_of_an_older_result(out, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    out.save(tmp_path)
    alone = replace(out, images=out.images[:1], settings={**out.settings, "target": []})
    monkeypatch.setattr("masa.output.result.save_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        alone.save(tmp_path, overwrite=True)
    assert masa.Result.load(tmp_path).settings == out.settings
    assert len(folder_names(tmp_path)) == 5


def test_an_older_result_is_replaced_only_when_asked(out, tmp_path):
    one = replace(out, images=out.images[:1], settings={**out.settings, "target": []})
    out.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(masa.MasaError, match=r"out already holds source\.png, .*overwrite=True"):
        one.save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert read_saved(tmp_path / "out") == out.settings
    one.save(tmp_path / "out", overwrite=True)
    assert read_saved(tmp_path / "out") == one.settings
    (tmp_path / "out" / "grid.png").unlink()
    assert read_saved(tmp_path / "out") is None
    assert read_saved(tmp_path) is None


def test_a_killed_save_leaves_the_older_result_or_the_new_one(out, tmp_path):
    """SIGKILL at 25 random moments of a process that saves two results in turn."""
    alone = replace(out, images=out.images[:1], settings={**out.settings, "target": []})
    alone = replace(alone, images=[Picture.of(alone.source, alone.settings | {"branch": 0})])
    alone.save(tmp_path / "out")
    chance = random.Random(0)
    found = set()
    for _ in range(25):
        child = os.fork()
        if child == 0:
            while True:
                out.save(tmp_path / "out", overwrite=True)
                alone.save(tmp_path / "out", overwrite=True)
        time.sleep(chance.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.add(len(masa.Result.load(tmp_path / "out").targets))
        names = [path.name for path in (tmp_path / "out").iterdir()]
        assert sorted(names) == sorted(file_names(names.count("target_0.png") + names.count("target_1.png")))
    assert found == {0, 2}  # both were met


@contextmanager
def disk_of(size):
    """No file may grow beyond so many bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["p.jpg", "p.png", "p.webp", "p.tiff"])
@pytest.mark.parametrize("less", [1, 100, 5000])
def test_a_full_disk_leaves_no_truncated_picture(out, tmp_path, name, less):
    noise = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Picture.of(Image.fromarray(noise.numpy()), {"a": 1})
    picture.save(tmp_path / "whole" / name)
    size = (tmp_path / "whole" / name).stat().st_size
    with Image.open(tmp_path / "whole" / name) as whole:
        whole.load()
    with disk_of(size - less), pytest.raises(WriteError, match=r"could not be written .*; make room there, or save"):
        picture.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_on_a_full_disk_nothing_is_saved_and_the_result_can_be_saved_elsewhere(out, tmp_path):
    with disk_of(1000), pytest.raises(WriteError, match=r"source\.png could not be written"):
        out.save(tmp_path / "full")
    pictures = max((tmp_path / "sizes" / path.name).stat().st_size for path in out.save(tmp_path / "sizes")[:-1])
    large = replace(out, attention={0: {"a": torch.rand(pictures)}})
    with disk_of(2 * pictures), pytest.raises(WriteError, match=r"result\.safetensors could not be written"):
        large.save(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["sizes"]
    large.save(tmp_path / "elsewhere")
    assert masa.Result.load(tmp_path / "elsewhere").settings == out.settings


def test_other_formats_save_without_settings(out, tmp_path):
    out.source.save(tmp_path / "source.jpg", quality=90)
    with Image.open(tmp_path / "source.jpg") as picture:
        assert picture.format == "JPEG"


def test_a_failed_save_leaves_nothing(out, tmp_path):
    with pytest.raises(ValueError, match="unknown file extension"):
        out.source.save(tmp_path / "source.nonsense")
    assert list(tmp_path.iterdir()) == []


def test_settings_are_json_and_come_back():
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    import numpy as np

    for control in (
        masa.MasaCtrl(),
        masa.MasaCtrl(start_step=np.int64(3), steps=np.arange(3), layers={4}),
        masa.MasaCtrl(steps=range(3), layers=[1, 2], union=True, source_weight=2.0),
        masa.MasaCtrl(mask=masa.WordMasks(["wooden", "chair"], 3, threshold=0.2)),
        masa.RecordQueries([7], range(3)),
        masa.RecordPredictions([1]),
    ):
        back = restore(json.loads(json.dumps(describe(control))))
        assert json.dumps(describe(back)) == json.dumps(describe(control))
        assert type(back) is type(control)
    masks = restore(json.loads(json.dumps(describe(masa.GivenMasks(mask.round(), [mask, mask])))))
    assert torch.equal(masks.source, mask.round())
    assert torch.equal(masks.target[1], mask)
    blended = restore(json.loads(json.dumps(describe(masa.BlendedLatents(mask, skip=0.5)))))
    assert blended.skip == 0.5
    assert torch.equal(blended.mask, mask)


def test_unknown_kinds_are_named():
    with pytest.raises(masa.MasaError, match="'Magic'"):
        restore({"kind": "Magic"})


def test_the_grid_shows_every_picture_under_its_prompt(out):
    grid = out.grid()
    assert grid.width >= 3 * 64
    assert grid.height > 64
    right = grid.crop((2 * 68, grid.height - 64, 2 * 68 + 64, grid.height))
    assert right.tobytes() == out.targets[1].tobytes()


def test_labels_are_wrapped():
    from PIL import ImageFont

    font = ImageFont.load_default(size=12)
    lines = wrap("a photo of a very long prompt indeed", font, 80)
    assert len(lines) > 1
    assert " ".join(lines) == "a photo of a very long prompt indeed"


def test_trajectories_come_back_whole(tiny, tmp_path, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    first = masa.invert(tiny, picture, "a cat", steps=3, progress=False)
    first.save(tmp_path / "t.safetensors")
    back = masa.Trajectory.load(tmp_path / "t.safetensors")
    assert torch.equal(back.latents, first.latents)
    assert back.prompt == "a cat"
    assert back.steps == 3
    assert back.settings["trajectory"] == str(tmp_path / "t.safetensors")
    masa.sample(tiny, target="a dog", trajectory=back, controls=masa.MasaCtrl(1), progress=False).save(tmp_path / "o")
    again = masa.rerun(tmp_path / "o" / "grid.png", tiny, progress=False)
    assert again.source.tobytes() == Image.open(tmp_path / "o" / "source.png").tobytes()
    masa.invert(tiny, picture, "a dog", steps=3, progress=False).save(tmp_path / "t.safetensors")
    with pytest.raises(masa.MasaError, match="has changed since"):
        masa.rerun(tmp_path / "o" / "grid.png", tiny, progress=False)


def test_other_files_are_no_trajectories(tmp_path):
    save_file({"latents": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    with pytest.raises(masa.MasaError, match="is no trajectory"):
        masa.Trajectory.load(tmp_path / "other.safetensors")
    with pytest.raises(masa.MasaError, match="not a whole safetensors file"):
        masa.Trajectory.load(tmp_path / "broken.safetensors")


def test_saving_keeps_the_picture_that_was_edited_and_survives_damaged_neighbours(tiny, tmp_path):
    settings = {"steps": 1, "guidance_scale": 1.0, "seed": 0, "progress": False, "height": 64, "width": 64}
    masa.sample(tiny, "a cat", ["a dog", "a bird", "a horse"], controls=[], **settings).save(tmp_path)
    (tmp_path / "target_2.png").write_bytes(b"\x89PNG damaged")
    edit = {name: settings[name] for name in ("steps", "guidance_scale", "progress", "height", "width")}
    masa.edit(tiny, tmp_path / "target_1.png", "a dog", controls=[], **edit).save(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.glob("target_*.png")} == {"target_0.png", "target_1.png", "target_2.png"}
    masa.sample(tiny, "a cat", ["a dog", "a bird"], controls=[], **settings).save(tmp_path, overwrite=True)
    masa.sample(tiny, "a cat", "a dog", controls=[], **settings).save(tmp_path, overwrite=True)
    assert not (tmp_path / "target_1.png").exists()
