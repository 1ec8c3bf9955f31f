"""Options that nothing would read are refused in one line: the option, its value, the remedy."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from masa.cli.arguments import build_parser
from masa.cli.commands import main
from masa.cli.idle_options import refuse_idle

ROOT = Path(__file__).parent.parent

TWO = ["sample", "a cat", "a dog"]
EDIT = ["edit", "photo.jpg", "a dog"]
SWEEP = ["sweep", "a cat", "a dog"]
P2P = [*TWO, "--control", "prompt-to-prompt"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TWO, "--threshold", "0"], "--threshold 0.0 would do nothing: .* --words"),
        ([*TWO, "--masks", "a.png", "b.png", "--threshold", "0.2"], "--threshold 0.2 would do nothing"),
        ([*TWO, "--source-weight", "1"], "--source-weight 1.0 would do nothing: .* add --union"),
        ([*TWO, "--control-steps", "4-5", "--start-step", "0"], "--start-step 0 would do nothing: --control-steps"),
        ([*TWO, "--control-layers", "9", "--start-layer", "2"], "--start-layer 2 would do nothing: --control-layers"),
        ([*TWO, "--no-control", "--start-step", "0"], "--start-step 0 is masactrl's or style's, which is not in use"),
        ([*P2P, "--start-layer", "9"], "--start-layer 9 is masactrl's or style's"),
        ([*P2P, "--control-steps", "4-5"], "--control-steps 4,5 is masactrl's or style's"),
        ([*P2P, "--control-layers", "4"], "--control-layers 4 is masactrl's or style's"),
        ([*TWO, "--control", "style", "--source-weight", "2"], "--source-weight 2.0 is masactrl's, .* to --control"),
        ([*TWO, "--control", "style", "--threshold", "0.3"], "--threshold 0.3 is masactrl's"),
        ([*TWO, "--control", "style", "--words", "cat", "dog"], "--words cat dog is masactrl's"),
        ([*TWO, "--reweight", "dog=2"], "--reweight dog=2 is prompt-to-prompt's"),
        ([*TWO, "--feature-steps", "0"], "--feature-steps 0.0 is plug-and-play's"),
        ([*P2P, "--p2p-edit", "none", "--cross-steps", "0.3"], "--cross-steps 0.3 would do nothing: .* --reweight"),
        (["sample", "a cat", "--start-step", "1"], "--start-step 1 is about targets, .* give a target"),
        (["sample", "a cat", "--control", "style"], "--control style is about targets"),
        (["sample", "a cat", "--words", "cat", "cat"], "--words cat cat is about targets"),
        ([*TWO, "--control", "style", "--no-control"], "--no-control: not allowed with argument --control"),
        ([*TWO, "--control", "style,masactrl,style"], "names a control twice"),
        ([*TWO, "--control-steps", "1,5-3"], "5-3 runs backwards and holds no number; give 3-5"),
        ([*TWO, "--record-words", "cat,,dog"], "has an empty place"),
        ([*P2P, "--reweight", "dog=2,dog=3"], "has a word twice"),
        ([*P2P, "--reweight", "=3"], "has a word twice, or none"),
        ([*TWO, "--tau", "0.5"], "--tau 0.5 would do nothing: .* give --t2i-adapter"),
        ([*TWO, "--adapter-weight", "2"], "--adapter-weight 2.0 would do nothing"),
        ([*TWO, "--adapter-source", "a.png"], "--adapter-source a.png would do nothing"),
        ([*EDIT, "--controlnet-scale", "0"], "--controlnet-scale 0.0 would do nothing: .* give --controlnet"),
        ([*TWO, "--controlnet-start", "0"], "--controlnet-start 0.0 would do nothing"),
        ([*TWO, "--controlnet-end", "1"], "--controlnet-end 1.0 would do nothing"),
        ([*TWO, "--controlnet-source", "a.png"], "--controlnet-source a.png would do nothing"),
        ([*TWO, "--ip-scale", "1"], "--ip-scale 1.0 would do nothing: .* give --ip-adapter"),
        ([*TWO, "--ip-source", "a.png"], "--ip-source a.png would do nothing"),
        ([*EDIT, "--image-encoder", "clip"], "--image-encoder clip would do nothing"),
        ([*TWO, "--guess-mode"], "--guess-mode would do nothing: it is a ControlNet's"),
        (
            ["sample", "a cat", "--t2i-adapter", "a", "b.png", "--adapter-source", "c.png"],
            "--adapter-source c.png would do nothing: without targets",
        ),
        ([*TWO, "--free-source"], "--free-source would do nothing: .* --trajectory"),
        ([*TWO, "--guidance", "1", "--negative-prompt", "bad"], "--negative-prompt bad would do nothing: --guidance 1"),
        ([*EDIT, "--guidance", "0", "--negative-prompt", "bad"], "--negative-prompt bad would do nothing"),
        ([*EDIT, "--invert-guidance", "3"], "--invert-guidance 3.0 would do nothing: .* give --source"),
        (
            [*EDIT, "--source", "a cat", "--method", "noise", "--invert-guidance", "3"],
            "--invert-guidance 3.0 would do nothing: --method noise",
        ),
        (["invert", "photo.jpg", "--invert-guidance", "3"], "would do nothing: .* give --prompt"),
        (["invert", "photo.jpg", "--inner-steps", "3"], "--inner-steps 3 would do nothing: .* null-text"),
        (["invert", "photo.jpg", "--edit-guidance", "3"], "--edit-guidance 3.0 would do nothing: .* null-text"),
        (["sdedit", "photo.jpg", "a dog", "--guidance", "1", "--negative-prompt", "bad"], "would do nothing"),
        ([*SWEEP, "--method", "ddim"], "--method ddim would do nothing: .* give --image"),
        ([*SWEEP, "--start-step", "3"], "--start-step 3 would do nothing: --rows varies start_step"),
        ([*SWEEP, "--start-layer", "3"], "--start-layer 3 would do nothing: --columns varies start_layer"),
        ([*SWEEP, "--columns", "layers=8-9,10", "--start-layer", "3"], "--columns lists the layers"),
        ([*SWEEP, "--rows", "guidance_scale=1,2", "--guidance", "7.5"], "--guidance 7.5 would do nothing"),
        ([*SWEEP, "--rows", "seed=1,2", "--seed", "0"], "--seed 0 would do nothing"),
        ([*SWEEP, "--rows", "steps=9,8", "--steps", "50"], "--steps 50 would do nothing"),
        ([*SWEEP, "--rows", "mask=cat"], "is not NAME=VALUES with a name of start_step"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, list) else None,
)
def test_an_option_that_nothing_reads_is_refused(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("masa.load", lambda *args, **settings: pytest.fail("loaded first"))
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not any(tmp_path.iterdir())


def test_every_example_is_of_use():
    """What help and README show is read by something."""
    commands = build_parser()._subparsers._group_actions[0].choices
    text = "\n".join([(ROOT / "README.md").read_text(), *(command.epilog for command in commands.values())])
    examples = re.findall(r"^ *masa (\w+ .*?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(examples) > 20
    for example in examples:
        refuse_idle(build_parser().parse_args(shlex.split(example)))


def test_an_option_that_is_read_is_let_through():
    image = ["--image", "photo.jpg"]
    for argv in (
        [*TWO, "--words", "cat", "dog", "--threshold", "0", "--union", "--source-weight", "1", "--start-step", "0"],
        [*TWO, "--control", "style", "--control-steps", "1", "--start-layer", "0"],
        [*P2P, "--p2p-edit", "none", "--reweight", "dog=2", "--cross-steps", "0.3"],
        [*TWO, "--trajectory", "t.safetensors", "--free-source", "--guidance", "1", "--negative-prompt", "bad"],
        [*EDIT, "--source", "a cat", "--invert-guidance", "3"],
        ["invert", "photo.jpg", "--prompt", "a cat", "--method", "null-text", "--edit-guidance", "3"],
        ["invert", "photo.jpg", "--method", "noise", "--seed", "0"],
        [*SWEEP, *image, "--method", "null-text", "--rows", "guidance_scale=3,7", "--guidance", "7"],
        [*SWEEP, *image, "--method", "noise", "--rows", "seed=1,2", "--columns", "eta=0,1", "--seed", "3"],
        [*SWEEP, "--rows", "start_layer=8,9", "--columns", "eta=0,1", "--start-step", "0"],
        ["sample", "a cat", "--no-control"],
        ["sample", "a cat", "--t2i-adapter", "a", "b.png", "--tau", "0.5", "--adapter-weight", "0"],
        [*TWO, "--ip-adapter", "a", "b.png", "--image-encoder", "c", "--ip-scale", "0", "--ip-source", "d.png"],
        [*EDIT, "--controlnet", "a", "b.png", "--controlnet-source", "c.png", "--guess-mode", "--controlnet-end", "1"],
    ):
        refuse_idle(build_parser().parse_args(argv))
