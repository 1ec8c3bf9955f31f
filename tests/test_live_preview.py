"""Previews: pictures of a run while it goes on, of which the result knows nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_taesd import original, published  # noqa: F401

import masa
from masa.cli import main
from masa.cli.preview import PreviewFile
from masa.controls.live_preview import SD_V1_FACTORS
from masa.io.pictures import to_pil

SOURCE, TARGETS = "a photo of a sitting cat", ["a photo of a running cat", "a red cat in the snow"]
SETTINGS = {"steps": 5, "height": 64, "width": 128, "progress": False, "seed": 3}


class Seen:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.pictures: list[list[Image.Image]] = []

    def __call__(self, step, pictures):
        self.steps.append(step)
        self.pictures.append(pictures)


@pytest.fixture(scope="module")
def decoder(published, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("taesd") / "taesd_decoder.safetensors"
    save_file(original(published.state_dict(), "decoder"), path)
    return path


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "euler-a"])
def test_the_result_is_the_same_to_the_bit(tiny, decoder, sampler, tmp_path):
    made = {"sampler": sampler, **SETTINGS}
    control = masa.MasaCtrl(1, 8, mask=masa.WordMasks("cat", "cat"))
    plain = masa.sample(tiny, SOURCE, TARGETS, controls=control, **made)
    for chosen in ("linear", decoder):
        seen = Seen()
        out = masa.sample(tiny, SOURCE, TARGETS, controls=[masa.LivePreview(seen, chosen), control], **made)
        assert torch.equal(out.latents, plain.latents)
        assert out.settings == plain.settings
        assert out.masks.keys() == plain.masks.keys() == {0}
        assert seen.steps == [0, 1, 2, 3, 4]
        assert [[picture.size for picture in shown] for shown in seen.pictures] == [[(128, 64)] * 3] * 5
    out.source.save(tmp_path / "source.png")
    assert torch.equal(masa.rerun(tmp_path / "source.png", tiny, progress=False).latents, plain.latents)


def test_it_shows_what_steps_predict(tiny, published, decoder):  # noqa: F811
    """Each position's colours by the factors; through TAESD, the decoded prediction; the last is near the result."""
    seen, sharp, recorder = Seen(), Seen(), masa.RecordPredictions()
    kept = []

    class Keep(type(recorder)):
        def begin(self, run):
            active = super().begin(run)
            kept.append(active)
            return active

    previews = [masa.LivePreview(seen), masa.LivePreview(sharp, decoder)]
    masa.sample(tiny, SOURCE, controls=[Keep(), *previews], **SETTINGS)
    x0 = kept[0].predictions()[3]
    factors = torch.tensor(SD_V1_FACTORS)
    expected = to_pil(torch.einsum("nchw,cr->nrhw", x0, factors[:4]))[0].resize((128, 64), Image.Resampling.BICUBIC)
    assert seen.pictures[3][0].tobytes() == expected.tobytes()
    with torch.no_grad():
        decoded = np.asarray(to_pil(published.decode(x0).sample)[0], dtype=int)
    assert np.abs(np.asarray(sharp.pictures[3][0], dtype=int) - decoded).max() <= 1  # rounding to 256 levels


def test_every_so_many_steps_and_the_last(tiny):
    seen = Seen()
    masa.sample(tiny, SOURCE, controls=masa.LivePreview(seen, every=3), **SETTINGS)
    assert seen.steps == [0, 3, 4]
    seen = Seen()
    latents = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    late = masa.LivePreview(seen, every=2)
    masa.sample(tiny, SOURCE, controls=late, latents=latents, skip_steps=1, **SETTINGS)
    assert seen.steps == [1, 3, 4]


def test_pictures_inversions_and_caches_are_previewed(tiny):
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    seen = Seen()
    made = {"steps": 2, "height": 64, "width": 64, "progress": False}
    masa.edit(tiny, picture, TARGETS, controls=[masa.MasaCtrl(1), masa.LivePreview(seen)], **made)
    assert [len(shown) for shown in seen.pictures] == [3, 3]
    recording = [masa.MasaCtrl(1), masa.LivePreview(seen := Seen())]
    cache = masa.record(tiny, SOURCE, seed=1, controls=recording, **made)
    assert [len(shown) for shown in seen.pictures] == [1, 1]
    plain = masa.sample(tiny, target=TARGETS, controls=masa.MasaCtrl(1), cache=cache, progress=False)
    looking = [masa.MasaCtrl(1), masa.LivePreview(seen := Seen())]
    out = masa.sample(tiny, target=TARGETS, controls=looking, cache=cache, progress=False)
    assert torch.equal(out.latents, plain.latents)
    assert [len(shown) for shown in seen.pictures] == [3, 3]


def test_a_models_own_factors_are_used_and_shipped_with_the_demo_model(tiny_folder, tmp_path):
    demo = masa.load(device="cpu").config.preview
    assert demo is not None
    assert [len(row) for row in demo] == [3] * 5
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    factors = [[0.1 * row, 0.0, 0.0] for row in range(5)]
    (folder / "preview.json").write_text(json.dumps({"factors": factors}))
    own, plain = Seen(), Seen()
    for path, seen in ((folder, own), (tiny_folder, plain)):
        sd = masa.load(path, device="cpu", dtype="fp32")
        masa.sample(sd, SOURCE, controls=masa.LivePreview(seen), **SETTINGS)
    assert np.asarray(own.pictures[0][0])[..., 1:].std() == 0  # grey levels of no green and no blue
    assert own.pictures[0][0].tobytes() != plain.pictures[0][0].tobytes()
    (folder / "preview.json").write_text(json.dumps({"factors": [[1.0], [2.0]]}))
    with pytest.raises(masa.CheckpointError, match=r"preview\.json holds no factors; expected rows of three"):
        masa.load(folder)


@pytest.mark.slow
def test_the_demo_models_factors_are_what_its_command_finds(tmp_path):
    """Of fewer pictures; and they tell most of what its pictures look like."""
    from masa.weights.demo.preview import fit

    sd = masa.load(device="cpu", dtype="fp32")
    factors, left = fit(sd, pictures=48)
    assert left < 0.15
    assert torch.allclose(torch.tensor(factors), torch.tensor(sd.config.preview), atol=0.03)


def test_a_file_is_replaced_whole_and_not_too_often(tmp_path, monkeypatch):
    clock = [10.0]
    monkeypatch.setattr("masa.cli.preview.time.monotonic", lambda: clock[0])
    show = PreviewFile(tmp_path / "deep" / "now.png", seconds=1.0)
    inodes = []
    for step, (now, colour) in enumerate([(10.0, "red"), (10.5, "lime"), (11.2, "blue")]):
        clock[0] = now
        show(step, [Image.new("RGB", (8, 4), colour)] * 2)
        with Image.open(tmp_path / "deep" / "now.png") as picture:
            assert picture.size == (20, 4)
            inodes.append(picture.convert("RGB").getpixel((0, 0)))
    assert inodes == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["now.png"]


def test_the_command_line_previews(tiny_folder, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["-c", str(tiny_folder), "--dtype", "fp32", "--steps", "2", "--height", "64", "--width", "64", "-q"]
    assert main(["sample", "a cat", "a dog", *model, "--start-step", "1", "--preview", "now.png", "-o", "out"]) == 0
    with Image.open("now.png") as picture:
        assert picture.size == (132, 64)
    sharp = ["--preview", "alone.png", "--preview-decoder", str(decoder)]
    assert main(["sample", "a cat", *model, *sharp, "-o", "alone"]) == 0
    assert main(["sdedit", "out/source.png", "a dog", *model, "--preview", "sdedit.png", "-o", "sdedit"]) == 0
    assert all((tmp_path / name).is_file() for name in ("alone.png", "sdedit.png"))
    capsys.readouterr()
    for options, message in (
        (["--preview", "now.png"], "now.png is already there; give another --preview"),
        (["--preview", "now.jpg"], "--preview now.jpg must end in .png"),
        (["--preview-decoder", "x"], "--preview-decoder x would do nothing: give --preview"),
    ):
        assert main(["sample", "a cat", *model, *options, "-o", "more"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"show": "now.png"}, "LivePreview show is 'now.png'; expected a function"),
        ({"show": print, "every": 0}, "LivePreview every is 0; expected a number of steps, 1 or more"),
        ({"show": print, "decoder": None}, "LivePreview decoder is None; expected 'linear' or the path"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(masa.MasaError, match=message):
        masa.LivePreview(**fields)


def test_other_decoders_are_refused_before_the_run(tiny, tiny_folder, monkeypatch):
    monkeypatch.setattr(masa.sampling, "denoise", lambda run: pytest.fail("ran first"))
    whole = masa.LivePreview(print, tiny_folder / "vae")
    with pytest.raises(masa.CheckpointError, match="is a whole autoencoder, too slow for previews"):
        masa.sample(tiny, SOURCE, controls=whole, **SETTINGS)
    with pytest.raises(FileNotFoundError, match="is not there"):
        masa.sample(tiny, SOURCE, controls=masa.LivePreview(print, "gone.safetensors"), **SETTINGS)
