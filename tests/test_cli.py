"""The command line as a user meets it: files written, one line for a mistake, exit codes."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import masa
from masa.cli import commands
from masa.cli.arguments import PLOTS, build_parser
from masa.cli.commands import COMMANDS, choose_folder, main
from masa.cli.control_arguments import build_controls, parse_numbers
from masa.io.folders import reserved
from masa.output.result import file_names
from masa.workflows.sheets import comparison

ROOT = Path(__file__).parent.parent
PLAIN = ["--steps", "3", "--height", "64", "--width", "64", "-q"]
FAST = [*PLAIN, "--start-step", "1"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder with a picture in it."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (80, 100, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save("photo.jpg")
    return tmp_path


def mistake(capsys, *argv: str) -> str:
    """The one line on stderr that a bad call ends with."""
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("masa: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.usefixtures("processor")
def test_sample_writes_pictures_and_says_where(home, tiny_folder, capsys):
    argv = ["sample", "a sitting cat", "a running cat", "-c", str(tiny_folder), "--seed", "1", *FAST]
    assert main(argv) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [f"masa-out/0001/{name}" for name in file_names(1)]
    assert all(Path(path).is_file() for path in printed)
    assert main(argv) == 0
    assert Path("masa-out/0002/grid.png").read_bytes() == Path("masa-out/0001/grid.png").read_bytes()
    # A run from its own picture gives the same bytes.
    assert main(["rerun", "masa-out/0001/target_0.png", "-o", "again", "-q"]) == 0
    assert Path("again/target_0.png").read_bytes() == Path("masa-out/0001/target_0.png").read_bytes()


def test_edit_equals_the_library(home, tiny_folder, processor):
    argv = ["edit", "photo.jpg", "a running cat", "--source", "a sitting cat", "-c", str(tiny_folder), "-o", "out"]
    assert main([*argv, *FAST, "--words", "cat", "cat", "--threshold", "0.3", "--guidance", "3"]) == 0
    control = masa.MasaCtrl(1, mask=masa.WordMasks("cat", "cat", 0.3))
    settings = {"steps": 3, "guidance_scale": 3.0, "height": 64, "width": 64, "progress": False}
    sd = masa.load(tiny_folder)
    assert sd.dtype == processor
    expected = masa.edit(sd, "photo.jpg", "a running cat", "a sitting cat", controls=control, **settings)
    with Image.open("out/target_0.png") as picture:
        assert picture.tobytes() == expected.targets[0].tobytes()


@pytest.mark.usefixtures("processor")
def test_invert_then_sample(home, tiny_folder):
    model = ["-c", str(tiny_folder)]
    assert main(["invert", "photo.jpg", "--steps", "3", "--height", "64", "--width", "64", "-q", *model]) == 0
    assert masa.Trajectory.load("photo.safetensors").steps == 3
    argv = ["sample", "", "a cat", "--trajectory", "photo.safetensors", "--start-step", "1", "-q", "-o", "out", *model]
    assert main(argv) == 0
    assert Path("out/target_0.png").is_file()


@pytest.mark.usefixtures("processor")
def test_masks_from_pictures(home, tiny_folder):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save("mask.png")
    argv = ["sample", "a cat", "a dog", "-c", str(tiny_folder), "--seed", "0", *FAST, "--start-layer", "4"]
    assert main([*argv, "-o", "plain"]) == 0
    assert main([*argv, "-o", "masked", "--masks", "mask.png", "mask.png"]) == 0
    assert Path("plain/source.png").is_file()
    with Image.open("plain/target_0.png") as plain, Image.open("masked/target_0.png") as masked:
        assert plain.tobytes() != masked.tobytes()


def described(*argv: str) -> list[masa.controls.base.Control]:
    return build_controls(build_parser().parse_args(["sample", "a cat", "a fluffy dog", *argv]))


def test_options_describe_controls():
    assert described() == [masa.MasaCtrl()]
    assert described("--no-control") == []
    start = ["--start-step", "2", "--control-layers", "8-9"]
    assert described("--control", "style", *start) == [masa.StyleTransfer(2, layers=[8, 9])]
    both = ["--control", "masactrl,prompt-to-prompt", "--p2p-edit", "none", "--reweight", "fluffy=4", "--union"]
    p2p = masa.PromptToPrompt(None, {"fluffy": 4.0}, self_replace_steps=0.0)
    assert described(*both, "--self-steps", "0") == [masa.MasaCtrl(union=True), p2p]
    p2p = masa.PromptToPrompt("refine", cross_replace_steps=0.5)
    assert described("--control", "prompt-to-prompt", "--p2p-edit", "refine", "--cross-steps", "0.5") == [p2p]
    several = ["--control", "masactrl,style,prompt-to-prompt,plug-and-play", "--words", "cat", "cat", "--union"]
    assert described(*several) == [
        masa.MasaCtrl(mask=masa.WordMasks("cat", "cat"), union=True),
        masa.PromptToPrompt(),
        masa.PlugAndPlay(),
        masa.StyleTransfer(),
    ]
    shares = ["--feature-steps", "0.3", "--attention-steps", "0.2"]
    assert described("--control", "plug-and-play", *shares) == [masa.PlugAndPlay(0.3, 0.2)]
    assert described("--no-control", "--local-blend", "cat", "2") == [masa.LocalBlend("cat", 2)]


def test_options_describe_recorders():
    plain = ["--no-control", "--record-words", "cat, of a", "--record-x0"]
    assert described(*plain) == [masa.RecordAttention(words=["cat", "of a"]), masa.RecordPredictions()]
    where = ["--record-layers", "8", "--record-steps", "0,2"]
    assert described("--no-control", "--record-self", "--record-queries", "--record-x0", *where) == [
        masa.RecordAttention([8], (), True),
        masa.RecordQueries([8], [0, 2]),
        masa.RecordPredictions([0, 2]),
    ]


@pytest.mark.slow
def test_what_a_run_recorded_is_plotted(home, tiny_folder, capsys):
    pytest.importorskip("matplotlib")
    record = ["--record-words", "cat,sitting", "--record-self", "--record-queries", "--record-x0"]
    words = ["--words", "cat", "cat", "--start-layer", "8"]
    argv = ["sample", "a sitting cat", "a running cat", "-c", str(tiny_folder), "-o", "out", *FAST, *words, *record]
    assert main(argv) == 0
    capsys.readouterr()
    for kind in PLOTS:
        assert main(["plot", "out", kind]) == 0
        assert capsys.readouterr().out == f"out/{kind}.png\n"
        assert Path(f"out/{kind}.png").stat().st_size > 1000
    assert "out/masks.png is already there" in mistake(capsys, "plot", "out", "masks")
    assert main(["plot", "out", "masks", "--overwrite", "--steps", "1"]) == 0
    assert main(["plot", "out", "queries", "--layers", "7,10", "--steps", "0", "-o", "q.pdf", "--control", "2"]) == 0
    assert Path("q.pdf").read_bytes().startswith(b"%PDF")
    assert main(["plot", "out", "word-maps", "--words", "cat", "-o", "w.png"]) == 0
    assert main(["plot", "out", "self-attention", "--components", "1", "-o", "c.png"]) == 0
    sizes = [Image.open(name).size for name in ("out/word-maps.png", "w.png", "out/self-attention.png", "c.png")]
    assert sizes[0][0] == 2 * sizes[1][0]
    assert sizes[2][0] == 2 * sizes[3][0]
    capsys.readouterr()
    assert "no masks in steps [0]" in mistake(capsys, "plot", "out", "masks", "--steps", "0", "-o", "m.png")
    assert "not supported" in mistake(capsys, "plot", "out", "masks", "-o", "m.txt")
    assert not Path("m.txt").exists()


MODEL = ["-c", "m", "--device", "cpu", "--dtype", "fp32", "--vae", "v", "--tokenizer", "words", "--offload"]
MODEL += ["--lora", "a.safetensors:0.5", "--lora", "b"]
LOADED = {"device": "cpu", "dtype": "fp32", "vae": "v", "tokenizer": "words", "offload": True, "progress": False}
LOADED |= {"lora": [("a.safetensors", 0.5), ("b", 1.0)]}
NOT_AGAIN = ("offload", "lora", "embeddings", "clip_skip", "prediction_type", "ema")  # a rerun has them of its settings
MODEL += ["--embedding", "<cat>=c.safetensors", "--embedding", "d", "--clip-skip", "1", "--ema"]
MODEL += ["--prediction-type", "v_prediction"]
LOADED |= {"embeddings": [("<cat>", "c.safetensors"), "d"], "clip_skip": 1, "ema": True}
LOADED |= {"prediction_type": "v_prediction"}
SHARED = ["--height", "128", "--width", "192", "--seed", "4", "--backend", "sdpa", "--steps", "7", "-q"]
SHARED_GIVEN = {"height": 128, "width": 192, "seed": 4, "backend": "sdpa", "steps": 7, "progress": False}
GUIDED = ["--guidance", "3", "--negative-prompt", "blurry", "--guidance-rule", "RescaledGuidance"]
GUIDED += ["--set", "RescaledGuidance.phi=0.5"]
GUIDED_GIVEN = {"guidance_scale": 3.0, "negative_prompt": "blurry", "guidance": masa.RescaledGuidance(0.5)}
RUN = [*GUIDED, "--skip-steps", "2", "--eta", "0.3", "--free-source", "--targets-at-once", "1", "--no-tiled"]
RUN_GIVEN = GUIDED_GIVEN | {"skip_steps": 2, "eta": 0.3, "pin_source": False, "targets_at_once": 1, "tiled": False}
RUN_GIVEN |= {"sampler": masa.DDIM()}  # eta is its own
START = ["--start-step", "1", "--start-layer", "9"]
# command -> its options with other values than the defaults, and what the library is then given
CALLS = {
    "sample": (
        ["a cat", "a dog", "a bird", "--trajectory", "photo.safetensors", "--no-control", *RUN],
        ("a cat", ["a dog", "a bird"]),
        RUN_GIVEN | {"controls": [], "trajectory": "photo.safetensors"},
    ),
    "edit": (
        [
            "photo.jpg",
            "a dog",
            "--source",
            "a cat",
            "--method",
            "null-text",
            "--invert-guidance",
            "2",
            "--inner-steps",
            "3",
            "--no-control",
            *RUN,
        ],
        ("photo.jpg", ["a dog"], "a cat"),
        RUN_GIVEN | {"controls": [], "method": "null-text", "invert_guidance_scale": 2.0, "inner_steps": 3},
    ),
    "invert": (
        [
            "photo.jpg",
            "--prompt",
            "a cat",
            "--method",
            "null-text",
            "--invert-guidance",
            "2",
            "--inner-steps",
            "3",
            "--edit-guidance",
            "5",
            "--tiled",
        ],
        ("photo.jpg", "a cat"),
        {"method": "null-text", "guidance_scale": 2.0, "inner_steps": 3, "edit_guidance_scale": 5.0, "tiled": True},
    ),
    "sdedit": (
        ["photo.jpg", "a dog", "a bird", "--strength", "0.4", "--tiled", "--sampler", "dpm++2m", *GUIDED],
        ("photo.jpg", ["a dog", "a bird"], 0.4),
        GUIDED_GIVEN | {"tiled": True, "sampler": masa.DPMSolverPP()},
    ),
    "grid": (
        ["photo.jpg", "a dog", "--source", "a cat", "--methods", "ddim", "noise", "--guidance", "3", *START],
        ("photo.jpg", "a dog", "a cat"),
        {
            "methods": ["ddim", "noise"],
            "guidance_scale": 3.0,
            "controls": comparison("a cat", masa.MasaCtrl(1, 9)),
        },
    ),
    "sweep": (
        [
            "a cat",
            "a dog",
            "--image",
            "photo.jpg",
            "--method",
            "null-text",
            "--rows",
            "union=True,False",
            "--columns",
            "skip_steps=0,1",
            "--guidance",
            "3",
            *START,
        ],
        ("a cat", "a dog", ("union", [True, False]), ("skip_steps", [0, 1])),
        {
            "image": "photo.jpg",
            "method": "null-text",
            "guidance_scale": 3.0,
            "control": masa.MasaCtrl(1, 9),
        },
    ),
}


@pytest.mark.parametrize("command", CALLS)
def test_every_option_reaches_the_library(home, monkeypatch, command):
    argv, positional, named = CALLS[command]
    seen = []

    def load(checkpoint, **given):
        seen.append((checkpoint, given))
        return "the model"

    def function(*given, **more):
        seen.append((given, more))
        raise masa.MasaError("seen enough")

    monkeypatch.setattr("masa.load", load)
    monkeypatch.setattr(f"masa.{command}", function)
    monkeypatch.setattr(masa.Trajectory, "load", lambda path: path)
    assert main([command, *argv, *MODEL, *SHARED]) == 2
    assert seen == [("m", LOADED), (("the model", *positional), SHARED_GIVEN | named)]


def test_a_rerun_s_options_reach_the_library(home, monkeypatch):
    seen = []

    def rerun(*given, **more):
        seen.append((given, more))
        raise masa.MasaError("seen enough")

    monkeypatch.setattr("masa.rerun", rerun)
    monkeypatch.setattr("masa.output.frames.read_run", lambda path: ({"function": "sample", "target": []}, path))
    model = MODEL[: MODEL.index("--offload")]  # what follows is in the settings
    assert main(["rerun", "photo.jpg", *model, "-q"]) == 2
    given = {name: value for name, value in LOADED.items() if name not in NOT_AGAIN}
    assert seen == [(("photo.jpg",), given | {"checkpoint": "m"})]


def test_inspect_tells_what_a_file_is(capsys):
    assert main(["inspect", "demo"]) == 0
    out = capsys.readouterr().out
    assert "diffusers" in out
    assert "unet" in out.lower()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["edit", "none.jpg", "a cat"], "none.jpg"),
        (["edit", "photo.jpg", "a cat", "-c", "none.safetensors"], "no checkpoint at none.safetensors"),
        (["edit", "photo.jpg", "a cat", "-c", "photo.jpg"], "photo.jpg"),
        (["edit", "photo.jpg"], "the following arguments are required: target"),
        (["sample", "a cat", "--steps", "many"], "invalid int value: 'many'"),
        (["sample", "a cat", "--control-steps", "1-x"], "is not a list of numbers"),
        (["sample", "a cat", "a dog", "--words", "bird", "dog", *FAST], "'bird' is not in the prompt 'a cat'"),
        (["sample", "a cat", "a dog", "--words", "cat", "dog", "--masks", "photo.jpg", "photo.jpg"], "give one"),
        (["sample", "a cat", "a dog", "--start-step", "50", "--steps", "3"], "selects no step"),
        (["sample", "a cat", "a dog", "--no-control", "--union"], "--union is masactrl's, which is not in use"),
        (["sample", "a cat", "a dog", "--reweight", "dog=2"], "dog=2 is prompt-to-prompt's, which is not in use"),
        (["sample", "a cat", "a dog", "--control", "magic"], "'magic' is not a list of masactrl, prompt-to-prompt"),
        (["sample", "a cat", "a dog", "--reweight", "dog"], "'dog' is not a list of WORD=FACTOR"),
        (["sample", "a cat", "--record-layers", "7"], "add --record-words, --record-self or --record-queries"),
        (["sample", "a cat", "--record-steps", "1", "--record-self"], "add --record-queries or --record-x0"),
        (["sample", "a cat", "--local-blend", "cat", "cat", *PLAIN], "LocalBlend acts on targets"),
        (["plot", "none", "masks"], "none holds no result.safetensors"),
        (["plot", "none", "masks", "--layers", "3"], "--layers has no meaning for masks, which takes --steps"),
        (["sample", "a cat", "--height", "100"], "height is 100; expected a multiple of 64"),
        (["sample", "a cat", "--dtype", "int8"], "dtype is 'int8'"),
        (["sample", "a cat", "--trajectory", "photo.jpg"], "photo.jpg"),
        (["sample", "a cat", "-o", "photo.jpg"], "is a file"),
        (["invert", "photo.jpg", "-o", "photo.txt"], "must end in .safetensors"),
        (["rerun", "photo.jpg"], "carries no masa settings"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(home, capsys, argv, message):
    assert message in mistake(capsys, *argv)
    assert sorted(p.name for p in home.iterdir()) == ["photo.jpg"]


def test_nothing_is_overwritten_unasked(home, tiny_folder, capsys):
    Path("out").mkdir()
    Path("out/source.png").write_bytes(b"mine")
    argv = ["sample", "a cat", "-c", str(tiny_folder), "-o", "out", *PLAIN]
    assert "already holds source.png" in mistake(capsys, *argv)
    assert Path("out/source.png").read_bytes() == b"mine"
    assert main([*argv, "--overwrite"]) == 0
    assert Path("out/source.png").read_bytes() != b"mine"


OUTPUTS = [
    ["demo"],
    ["sample", "a cat"],
    ["edit", "photo.jpg", "a cat"],
    ["sdedit", "photo.jpg", "a cat"],
    ["grid", "photo.jpg", "a cat"],
    ["sweep", "a cat", "a dog"],
]


@pytest.mark.parametrize("argv", OUTPUTS, ids=lambda argv: argv[0])
def test_a_folder_that_cannot_be_written_is_found_first(home, capsys, monkeypatch, argv):
    monkeypatch.setattr("masa.load", lambda *args, **settings: pytest.fail("loaded first"))
    name = {"demo": "editing.png", "grid": "grid.png", "sweep": "sweep.png"}.get(argv[0], "source.png")
    (home / "out" / name).mkdir(parents=True)
    (home / "masa-out").touch()
    assert "masa-out is a file; expected a folder" in mistake(capsys, *argv)
    assert "photo.jpg is a file; expected a folder" in mistake(capsys, *argv, "-o", "photo.jpg/new")
    assert f"out/{name} is a folder; expected a file's name" in mistake(capsys, *argv, "-o", "out", "--overwrite")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written to; give another folder" in mistake(capsys, *argv, "-o", "new")
    assert not (home / "new").exists()


def test_a_file_that_cannot_be_written_is_found_first(home, tiny_folder, capsys, monkeypatch):
    assert main(["sample", "a cat", "-c", str(tiny_folder), "-o", "out", *PLAIN]) == 0
    capsys.readouterr()
    monkeypatch.setattr("masa.load", lambda *args, **settings: pytest.fail("loaded first"))
    monkeypatch.setattr("masa.rerun", lambda *args, **settings: pytest.fail("ran first"))
    (home / "t.safetensors").mkdir()
    invert = ["invert", "photo.jpg", "--overwrite", "-o"]
    assert "t.safetensors is a folder" in mistake(capsys, *invert, "t.safetensors")
    assert "photo.jpg is a file; expected a folder" in mistake(capsys, *invert, "photo.jpg/t.safetensors")
    assert "photo.jpg is a file" in mistake(capsys, "plot", "out", "masks", "-o", "photo.jpg/m.png")
    assert "photo.jpg is a file" in mistake(capsys, "rerun", "out/source.png", "-o", "photo.jpg")
    assert "photo.jpg is a file" in mistake(capsys, "sample", "a cat", "--profile", "photo.jpg/trace.json")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written to; give another folder" in mistake(capsys, *invert, "new.safetensors")


def test_interrupting_leaves_no_file(home, tiny_folder, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(masa.pipeline.StableDiffusion, "decode_latents", interrupt)
    assert main(["sample", "a cat", "-c", str(tiny_folder), "-o", "out", *PLAIN]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not Path("out").exists()


def test_sigterm_cleans_up_like_ctrl_c(home, tiny_folder, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(masa.pipeline.StableDiffusion, "decode_latents", lambda *_, **__: signal.raise_signal(15))
    assert main(["sample", "a cat", "-c", str(tiny_folder), *PLAIN]) == 143
    assert capsys.readouterr().err == "\nmasa: terminated; nothing unfinished was written\n"
    assert [p.name for p in home.iterdir()] == ["photo.jpg"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_two_runs_do_not_share_a_folder(home, tiny_folder, capsys, monkeypatch):
    argv = ["sample", "a cat", "-c", str(tiny_folder), *PLAIN]
    with reserved(home / "out"):
        assert "out is being written to by another run; give another -o" in mistake(capsys, *argv, "-o", "out")
    # Two that look for the next number at once see the same.
    numbers = iter([1, 1, 2])
    monkeypatch.setattr(commands, "choose_folder", lambda *_: Path(f"masa-out/{next(numbers):04d}"))
    assert main(argv) == 0
    assert main(argv) == 0
    assert sorted(p.name for p in Path("masa-out").iterdir()) == ["0001", "0002"]
    assert Path("masa-out/0002/source.png").is_file()


@pytest.mark.parametrize("command", ["sample", "invert"])
def test_what_cannot_be_saved_is_put_elsewhere(home, tiny_folder, capsys, monkeypatch, command):
    """A disk that takes no file of more than 1 kB, but for the folder of temporary files."""
    kept = home / "temporary"
    kept.mkdir()
    monkeypatch.setattr(commands.tempfile, "gettempdir", lambda: str(kept))
    original = masa.io.files.os.replace

    def full(source, target):
        if kept not in Path(target).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    monkeypatch.setattr(masa.io.files.os, "replace", full)
    argv = {"sample": ["a cat", "-o", "out"], "invert": ["photo.jpg", "-o", "t.safetensors"]}[command]
    error = mistake(capsys, command, *argv, "-c", str(tiny_folder), *PLAIN)
    assert "could not be written (No space left on device); make room there, or save elsewhere; what was made" in error
    place = Path(re.search(r"what was made is in (\S+) instead", error)[1])
    if command == "sample":
        assert masa.Result.load(place).settings["source"] == "a cat"
    else:
        assert masa.Trajectory.load(place).steps == 3
    assert sorted(p.name for p in home.iterdir()) == ["photo.jpg", "temporary"]
    # Where nothing takes it, there is one line, and no file.
    monkeypatch.setattr(commands.tempfile, "gettempdir", lambda: str(home))
    monkeypatch.setattr(Path, "home", lambda: home)
    error = mistake(capsys, command, *argv, "-c", str(tiny_folder), *PLAIN)
    assert "what was made" not in error
    assert sorted(p.name for p in home.iterdir()) == ["photo.jpg", "temporary"]


def test_next_free_folder(home):
    assert choose_folder(None, [], False) == Path("masa-out/0001")
    Path("masa-out/0007").mkdir(parents=True)
    assert choose_folder(None, [], False) == Path("masa-out/0008")


def test_number_lists():
    assert parse_numbers("3,5,10-12,7-7") == [3, 5, 10, 11, 12, 7]


def test_every_command_has_help_with_an_example(capsys):
    commands = build_parser()._subparsers._group_actions[0].choices
    assert set(commands) == set(COMMANDS)
    for name, parser in commands.items():
        assert f"masa {name}" in parser.format_help()


@pytest.mark.slow
def test_module_runs():
    out = subprocess.run([sys.executable, "-m", "masa", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "masa demo" in out.stdout
