"""Grids and sweeps: every cell is the run it is labelled with, and one command makes one picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import masa
from masa.cli.arguments import parse_sweep
from masa.cli.commands import main
from masa.output.result import read_settings
from masa.workflows.sheets import CELL, PARAMETERS, label_sheet, serves

SOURCE, TARGET = "a photo of a sitting cat", "a photo of a running cat"
SETTINGS = {"steps": 2, "height": 64, "width": 64, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def picture():
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def cell(sheet: Image.Image, row: int, column: int, rows: int, columns: int, gap: int = 4) -> bytes:
    """The pixels of a cell, counted from the lower right corner."""
    x = sheet.width - (columns - column) * (CELL + gap) + gap
    y = sheet.height - (rows - row) * (CELL + gap) + gap
    return sheet.crop((x, y, x + CELL, y + CELL)).tobytes()


def shown(picture: Image.Image) -> bytes:
    return picture.resize((CELL, CELL), Image.Resampling.BICUBIC).tobytes()


def test_a_grid_holds_every_inversion_under_every_control(tiny, picture):
    control = masa.MasaCtrl(0, 0)
    methods = ["ddim", "edit-friendly"]
    columns = {"fixed seed": [], "MasaCtrl": control}
    sheet = masa.grid(tiny, picture, TARGET, SOURCE, methods=methods, controls=columns, **SETTINGS)
    for r, method in enumerate(methods):
        edit = masa.edit(tiny, picture, TARGET, SOURCE, method=method, controls=control, **SETTINGS)
        assert cell(sheet, r, 2, 2, 3) == shown(edit.targets[0])
        assert cell(sheet, r, 1, 2, 3) != cell(sheet, r, 2, 2, 3)
    assert sheet.settings["methods"] == methods
    assert list(sheet.settings["controls"]) == ["fixed seed", "MasaCtrl"]


def test_a_grid_leaves_out_what_an_empty_source_does_not_allow(tiny, picture):
    sheet = masa.grid(tiny, picture, TARGET, controls={"fixed seed": []}, **SETTINGS)
    assert sheet.settings["methods"] == ["ddim", "edit-friendly", "noise"]


def test_a_sweep_synthesises_every_pair(tiny):
    settings = {"steps": 3, "height": 64, "width": 64, "seed": 3, "progress": False}
    rows, columns = ("start_layer", [0, 12]), ("guidance_scale", [1.0, 5.0])
    sheet = masa.sweep(tiny, SOURCE, TARGET, rows, columns, control=masa.MasaCtrl(1), **settings)
    out = masa.sample(tiny, SOURCE, TARGET, controls=masa.MasaCtrl(1, 12), guidance_scale=5.0, **settings)
    assert cell(sheet, 1, 2, 2, 3) == shown(out.targets[0])
    assert len({cell(sheet, r, c, 2, 3) for r in (0, 1) for c in (1, 2)}) == 4
    assert sheet.settings["rows"] == ["start_layer", [0, 12]]


def test_a_sweep_over_a_picture_inverts_once(tiny, picture, monkeypatch):
    calls = []

    def invert(*args, **kwargs):
        calls.append(kwargs["method"])
        return masa.invert(*args, **kwargs)

    monkeypatch.setattr("masa.workflows.sheets.invert", invert)
    settings = {"steps": 3, "height": 64, "width": 64, "seed": 3, "progress": False}
    rows, columns = ("start_step", [0, 2]), ("start_layer", [0, 12])
    sheet = masa.sweep(tiny, SOURCE, TARGET, rows, columns, image=picture, method="noise", **settings)
    assert calls == ["noise"]
    control = masa.MasaCtrl(2, 0)
    edit = masa.edit(tiny, picture, TARGET, SOURCE, method="noise", controls=control, **settings)
    assert cell(sheet, 1, 1, 2, 3) == shown(edit.targets[0])
    assert cell(sheet, 0, 0, 2, 3) == shown(edit.source)


@pytest.mark.parametrize(
    ("rows", "columns", "image", "message"),
    [
        (("shoe_size", [1]), ("start_layer", [0]), False, "cannot vary 'shoe_size'"),
        (("start_step", []), ("start_layer", [0]), False, "needs values"),
        (("start_step", [0]), ("start_step", [1]), False, "give two parameters"),
        (("steps", [3, 4]), ("start_layer", [0]), True, "fixes steps"),
        (("start_step", [0, 9]), ("start_layer", [0]), False, "selects no step"),
        (("eta", [0.0, 2.0]), ("start_step", [0]), False, r"eta is 2\.0"),
        (("guidance_scale", ["much"]), ("start_step", [0]), False, "guidance_scale is 'much'"),
        (("seed", [1, -1]), ("start_step", [0]), False, "seed is -1"),
        (("skip_steps", [0, 1]), ("start_step", [0]), False, "half noisy latents"),
        (("skip_steps", [0, 3]), ("start_step", [0]), True, "skip_steps is 3"),
        (("start_step", [0]), ("steps", [2, 0]), False, "steps is 0"),
        (("start_step", [0]), ("start_layer", [0, 16]), True, "transformer blocks from 0 to 15"),
        (("start_step", [0]), ("layers", [10]), False, "layers is 10; expected several"),
        (("start_step", [0]), ("mask", ["cat"]), False, "mask is 'cat'"),
        (("layers", [[8], [9]]), ("start_layer", [0]), False, "over start_layer would change nothing: .* leave layers"),
        (("source_weight", [1.0]), ("start_step", [0]), False, "over source_weight would change nothing: .*union=True"),
        (("negative_prompt", ["", "bad"]), ("guidance_scale", [0.0, 1.0]), False, "over negative_prompt would change"),
        (("pin_source", [True, False]), ("start_step", [0]), False, "over pin_source would change nothing"),
        (("seed", [1, 2]), ("start_step", [0]), True, "over seed would change nothing: .*sweep eta"),
    ],
)
def test_bad_sweeps_are_named_before_any_run(tiny, picture, monkeypatch, rows, columns, image, message):
    for name in ("sample", "invert"):
        monkeypatch.setattr(f"masa.workflows.sheets.{name}", lambda *args, **kwargs: pytest.fail("ran first"))
    with pytest.raises(masa.MasaError, match=message):
        masa.sweep(
            tiny, SOURCE, TARGET, rows, columns, image=picture if image else None, control=masa.MasaCtrl(0), **SETTINGS
        )


@pytest.mark.parametrize(("name", "listed"), [("start_step", {"steps": [0]}), ("start_layer", {"layers": [9]})])
def test_a_sweep_over_a_start_that_a_list_replaces_is_refused(tiny, name, listed):
    with pytest.raises(masa.MasaError, match=f"a sweep over {name} would change nothing"):
        masa.sweep(tiny, SOURCE, TARGET, (name, [0, 1]), ("eta", [0.0]), control=masa.MasaCtrl(0, **listed), **SETTINGS)


def test_a_sweep_varies_each_parameter_under_one_name(tiny):
    assert len(set(PARAMETERS)) == len(PARAMETERS)
    rows, columns = ("layers", [[9], range(10, 12)]), ("steps", [1, 2])
    sheet = masa.sweep(tiny, SOURCE, TARGET, rows, columns, control=masa.MasaCtrl(0), **SETTINGS)
    assert sheet.settings["rows"] == ["layers", [[9], [10, 11]]]
    assert len({cell(sheet, r, c, 2, 3) for r in (0, 1) for c in (1, 2)}) == 4


def test_unknown_methods_are_named(tiny, picture):
    with pytest.raises(masa.MasaError, match="each once"):
        masa.grid(tiny, picture, TARGET, methods=["ddim", "ddim"], **SETTINGS)
    with pytest.raises(masa.MasaError, match="expected some of 'ddim'"):
        masa.grid(tiny, picture, TARGET, methods=["magic"], **SETTINGS)


def test_labels_do_not_cover_pictures():
    red = Image.new("RGB", (256, 256), "red")
    sheet = label_sheet([[red, red], [red, red]], ["edit-friendly", "a long label of several words"], ["one", "two"])
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).reshape(-1, 3)
    assert int((pixels == torch.tensor([255, 0, 0])).all(1).sum()) == 4 * 256 * 256


def test_values_on_the_command_line():
    assert parse_sweep("start_step=0,4") == ("start_step", [0, 4])
    assert parse_sweep("guidance_scale=1.5,7") == ("guidance_scale", [1.5, 7])
    assert parse_sweep("union=True,False") == ("union", [True, False])
    assert parse_sweep("layers=8-9,10") == ("layers", [[8, 9], [10]])
    assert parse_sweep("negative_prompt=blurry,") == ("negative_prompt", ["blurry", ""])


@pytest.mark.slow
def test_commands_make_one_picture_each(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save("photo.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    fast = ["-c", str(tiny_folder), "--steps", "3", "--height", "64", "--width", "64", "--seed", "1", "-q"]
    start = ["--start-step", "1", "--start-layer", "0"]

    assert main(["grid", "photo.png", TARGET, "-o", "g", "--methods", "ddim", "noise", *fast, *start]) == 0
    argv = ["sweep", SOURCE, TARGET, "--image", "photo.png", "--rows", "start_step=0,1", "--columns", "start_layer=0,9"]
    assert main([*argv, "-o", "s", *fast]) == 0
    assert main(["sdedit", "photo.png", TARGET, "--strength", "0.4", "-o", "d", *fast]) == 0
    edit = ["edit", "photo.png", TARGET, *fast]
    assert main([*edit, "-o", "b", "--no-control", "--blend", "mask.png", "--skip-steps", "1"]) == 0
    argv = ["invert", "photo.png", "--prompt", SOURCE, "-o", "t.safetensors", *fast]
    del argv[argv.index("--seed") : argv.index("--seed") + 2]
    assert main([*argv, "--method", "null-text", "--edit-guidance", "3"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[:2] == ["g/grid.png", "s/sweep.png"]
    assert all(Path(path).is_file() for path in printed)
    assert read_settings("s/sweep.png")["columns"] == ["start_layer", [0, 9]]
    assert read_settings("b/target_0.png")["skip_steps"] == 1
    trajectory = masa.Trajectory.load("t.safetensors")
    assert trajectory.method == "null-text"
    assert trajectory.settings["edit_guidance_scale"] == 3.0

    assert main(["rerun", "g/grid.png", "-o", "again"]) == 2
    assert "repeat it with masa grid" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", SOURCE, TARGET, "--rows", "start_step:0"])
    assert "is not NAME=VALUES" in capsys.readouterr().err


def test_a_sweep_over_masks_is_saved(tiny, tmp_path):
    values = (None, masa.WordMasks("cat", "cat"))
    sheet = masa.sweep(
        tiny, "a cat", "a cat sitting", ("mask", values), ("start_step", range(1)), steps=2, height=64, width=64,
        seed=0, progress=False,
    )  # fmt: skip
    sheet.save(tmp_path / "sweep.png")
    assert read_settings(tmp_path / "sweep.png")["columns"] == ["start_step", [0]]


def test_a_grid_refuses_before_the_first_inversion(tiny, monkeypatch):
    def invert(*args, **kwargs):
        raise AssertionError("inverted")

    monkeypatch.setattr("masa.workflows.sheets.invert", invert)
    picture = torch.zeros(3, 64, 64)
    with pytest.raises(masa.MasaError, match="guidance"):
        masa.grid(tiny, picture, "a cat", "a dog", methods=["ddim", "null-text"], guidance_scale=1.0, progress=False)
    with pytest.raises(masa.MasaError, match="eta"):
        masa.sweep(
            tiny, "a dog", "a cat", ("eta", [0.5]), ("start_step", [0]), image=picture, method="edit-friendly",
            steps=5, progress=False,
        )  # fmt: skip


def test_a_grid_leaves_out_inversions_that_cannot_serve():
    assert serves("null-text", "a cat", 50, 7.5)
    assert not serves("null-text", "a cat", 50, 1.0)
    assert not serves("null-text", "a cat", 101, 7.5)
    assert not serves("negative-prompt", "", 50, 7.5)


def test_samplers_and_guidance_are_swept(tiny):
    rules = [masa.ClassifierFree(), masa.RescaledGuidance(0.5)]
    swept = (("sampler", ["ddim", masa.DPMSolverPP()]), ("guidance", rules))
    sheet = masa.sweep(tiny, SOURCE, TARGET, *swept, control=masa.MasaCtrl(0, 8), guidance_scale=5.0, **SETTINGS)
    for row, sampler in enumerate(swept[0][1]):
        for column, rule in enumerate(rules):
            run = {"sampler": sampler, "guidance": rule, "guidance_scale": 5.0, **SETTINGS}
            alone = masa.sample(tiny, SOURCE, TARGET, controls=masa.MasaCtrl(0, 8), **run)
            assert cell(sheet, row, column, 2, 2) == shown(alone.targets[0])
    assert parse_sweep("sampler=ddim,dpm++2m") == ("sampler", ["ddim", "dpm++2m"])
    for sampled, message in ((["dpm"], "sampler is 'dpm'"), ([masa.DPMSolverPP], "sampler is")):
        with pytest.raises(masa.MasaError, match=message):
            masa.sweep(tiny, SOURCE, TARGET, ("sampler", sampled), ("seed", [0]), **SETTINGS)
