"""The arguments of the command line: one subcommand for each function of the library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from masa import __version__
from masa.cli.adapter_arguments import add_adapters
from masa.cli.app_command import add_app
from masa.cli.condition_command import add_condition
from masa.cli.control_arguments import add_control, add_record, add_start, parse_numbers, parse_words
from masa.cli.preview import add_preview
from masa.cli.registered_arguments import add_fields, add_plugins, add_sampler, choose
from masa.controls.masactrl import MasaCtrl
from masa.inversion import METHODS
from masa.settings import registered
from masa.weights.variants import PREDICTIONS
from masa.workflows.frames import ANCHORS
from masa.workflows.piebench_methods import INVERTERS, OTHER_NAMES
from masa.workflows.piebench_methods import METHODS as PIE_METHODS
from masa.workflows.sheets import parameters_of

PLOTS = ("word-maps", "self-attention", "masks", "queries", "predictions")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"masa: {message}; see {self.prog} --help\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="masa",
        description="MasaCtrl on Stable Diffusion v1: the same subject, another pose.",
        epilog="Begin with: masa demo",
    )
    parser.add_argument("--version", action="version", version=f"masa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    text = "two labelled pictures from the embedded model, in under a minute"
    demo = add(
        commands, "demo", text, ["masa demo", "masa demo --pose", "masa demo --pose drawing.png", "masa demo --video"]
    )
    demo.add_argument("--seed", type=int, default=None, help="another pair of pictures")
    text = "instead, edits to drawn poses; a drawing of your own: a cat in white lines on black"
    either = demo.add_mutually_exclusive_group()
    either.add_argument("--pose", nargs="?", const=True, default=None, metavar="DRAWING", help=text)
    text = "instead, a video by drawn poses, without and with control: a cat that jumps (default) or walks"
    either.add_argument("--video", nargs="?", const="jump", default=None, choices=("jump", "walk"), help=text)
    add_output(demo)
    add_profile(demo)

    sample = add(
        commands,
        "sample",
        "synthesise a source and targets that keep its subject",
        [
            'masa sample "a sitting cat" "a standing cat" -c v1-5-pruned-emaonly.safetensors --seed 0 -o cats',
            'masa sample "a cat sitting" "a cat standing" --record-words cat --record-queries --record-x0 -o cats',
            'masa sample "" "a running corgi" --trajectory corgi.safetensors -c v1-5-pruned-emaonly.safetensors',
            'masa sample "a cat sitting" "a cat standing" --sampler dpm++2m --steps 15 --guidance-rescale 0.7',
            'masa sample "a cat" "a cat, ink" -c sd15/ --lora lcm.safetensors --sampler lcm --steps 4 --guidance 1.5',
            'masa sample "a cat sitting" "a cat running" -c sd15/ --preview now.png',
            'masa sample "a cat sitting" "a cat running" -c sd15/ --lora ink.safetensors:0.8 --lora cat.safetensors',
            'masa sample "a <tom> sitting" "a <tom> running" -c sd15/ --embedding tom.safetensors --clip-skip 1',
            'masa sample "a man" "a man, arms up" -c sd15/ --t2i-adapter openpose.safetensors pose.png --tau 0.8',
        ],
    )
    sample.add_argument("source", help="the source's prompt")
    sample.add_argument("target", nargs="*", help="the targets' prompts; none: plain text-to-image")
    sample.add_argument("--trajectory", metavar="FILE", help="an inverted picture (masa invert) as the source")
    add_sampling(sample, steps=None)
    add_control(sample)
    add_record(sample)
    add_model(sample)
    add_output(sample)
    add_profile(sample)

    edit = add(
        commands,
        "edit",
        "edit a real picture",
        [
            'masa edit corgi.jpg "a photo of a running corgi" -c v1-5-pruned-emaonly.safetensors',
            'masa edit cat.png "a cat jumping" --source "a cat sitting" --words cat cat -c sd15/ -o jump',
            'masa edit cat.png "a fluffy cat" --source "a cat" --control prompt-to-prompt --p2p-edit refine -c sd15/',
        ],
    )
    edit.add_argument("image", help="the picture's path")
    edit.add_argument("target", nargs="+", help="the targets' prompts")
    edit.add_argument("--source", default="", help="the picture's own prompt (default: empty)")
    add_inversion(edit)
    add_sampling(edit)
    add_control(edit)
    add_record(edit)
    add_model(edit)
    add_output(edit)
    add_profile(edit)

    video = add(
        commands,
        "video",
        "a video of one subject, each frame with a layout of its own",
        [
            'masa video "a man" "a man walking" poses/ --t2i-adapter openpose.safetensors -c sd15/ -o walk.gif',
            'masa video "" "a man dancing" dance.gif --image me.jpg --t2i-adapter pose.safetensors -c sd15/ -o me.mp4',
            'masa video "a cat" "a cat" poses/ --t2i-adapter pose.safetensors --controlnet depth.safetensors depths/',
            'masa video "a cat" "a cat" edges.webp --controlnet canny.safetensors --anchor both --frames-at-once 8',
        ],
    )
    video.add_argument("source", help="the source's prompt")
    video.add_argument("target", nargs=1, metavar="prompt", help="the frames' prompt")
    text = "a picture for each frame: a folder, an animated GIF, WebP or PNG, or a film (which needs imageio-ffmpeg)"
    video.add_argument("conditions", help=text)
    group = video.add_argument_group("frames")
    text = "whose appearance frames take: the source's, the first frame's, or both's (default: source)"
    group.add_argument("--anchor", choices=ANCHORS, default="source", help=text)
    text = "how many one call of the network takes (default: 4); memory grows with it, the result does not depend on it"
    group.add_argument("--frames-at-once", type=int, metavar="N", help=text)
    group.add_argument("--fps", type=float, help="frames a second of what is saved (default: 8)")
    real = video.add_argument_group("a real source").add_mutually_exclusive_group()
    real.add_argument("--image", help="this picture, inverted with the source's prompt")
    real.add_argument("--trajectory", metavar="FILE", help="an inverted picture (masa invert)")
    add_inversion(video, default=None)
    add_sampling(video, steps=None, parts=False)
    add_control(video, frames=True)
    add_model(video)
    add_output(video, "a .gif, .webp, .png or .mp4, or a folder of PNGs (default: masa-out/NNNN/frames.gif)")
    add_profile(video)

    invert = add(
        commands,
        "invert",
        "invert a real picture once, for any number of edits",
        ["masa invert corgi.jpg -o corgi.safetensors -c v1-5-pruned-emaonly.safetensors"],
    )
    invert.add_argument("image", help="the picture's path")
    invert.add_argument("--prompt", default="", help="the picture's own prompt (default: empty)")
    group = add_inversion(invert)
    group.add_argument("--edit-guidance", type=float, help="guidance that null-text fits (default: 7.5)")
    group.add_argument("--seed", type=int, help="of edit-friendly and plain noise (default: drawn)")
    add_tiled(add_steps_and_size(invert))
    add_adapters(invert)
    add_model(invert)
    add_output(invert, "the .safetensors file to write (default: named after the picture)")
    add_profile(invert)

    sdedit = add(
        commands,
        "sdedit",
        "noise a picture half way and denoise it with other prompts",
        ['masa sdedit corgi.jpg "a photo of a wolf" --strength 0.6 -c v1-5-pruned-emaonly.safetensors'],
    )
    sdedit.add_argument("image", help="the picture's path")
    sdedit.add_argument("target", nargs="+", help="the targets' prompts")
    sdedit.add_argument("--strength", type=float, default=0.8, help="0: the picture, 1: noise (default: 0.8)")
    group = add_steps_and_size(sdedit)
    add_guidance_and_seed(group)
    group.add_argument("--negative-prompt", default="", help="what to be guided away from")
    add_tiled(group)
    add_sampler(group)
    add_fields(group)
    add_preview(group)
    add_plugins(sdedit)
    add_model(sdedit)
    add_output(sdedit)

    grid = add(
        commands,
        "grid",
        "one picture of an edit by every inversion and control",
        [
            'masa grid corgi.jpg "a running corgi" --source "a sitting corgi" -c v1-5-pruned-emaonly.safetensors',
            'masa grid cat.png "a cat standing" --source "a cat sitting" --steps 20 --guidance 4 --start-layer 0',
        ],
    )
    grid.add_argument("image", help="the picture's path")
    grid.add_argument("target", help="the target's prompt")
    grid.add_argument("--source", default="", help="the picture's own prompt (default: empty)")
    grid.add_argument("--methods", nargs="+", choices=METHODS, help="inversions (default: all that the source allows)")
    add_guidance_and_seed(add_steps_and_size(grid))
    add_start(grid.add_argument_group("control (MasaCtrl)"))
    add_model(grid)
    add_output(grid)

    sweep = add(
        commands,
        "sweep",
        "one picture of a target under every pair of values of two parameters",
        [
            'masa sweep "a sitting cat" "a standing cat" --rows start_step=0,4,20 --columns start_layer=0,8,10,14',
            'masa sweep "" "a running corgi" --image corgi.jpg --rows guidance_scale=3,7.5 --columns start_step=0,4,20',
        ],
    )
    sweep.add_argument("source", help="the source's prompt")
    sweep.add_argument("target", help="the target's prompt")
    sweep.add_argument("--image", help="edit this picture, inverted once (default: synthesise the source)")
    sweep.add_argument("--method", choices=METHODS, help="the inversion of --image (default: ddim)")
    form = "of MasaCtrl or of sampling: NAME=VALUE,VALUE,.."
    default = "start_step=0,4,8,16"
    sweep.add_argument("--rows", type=parse_sweep, default=default, help=f"{form} (default: {default})")
    default = "start_layer=0,4,8,10,14"
    sweep.add_argument("--columns", type=parse_sweep, default=default, help=f"another (default: {default})")
    add_guidance_and_seed(add_steps_and_size(sweep, steps=None), guidance=None)
    group = sweep.add_argument_group("control")
    text = "a registered control's class name (default: MasaCtrl)"
    group.add_argument("--control", type=parse_control, default="MasaCtrl", metavar="NAME", help=text)
    add_start(group)
    add_fields(group)
    add_plugins(sweep)
    add_model(sweep)
    add_output(sweep)

    batch = add(
        commands,
        "batch",
        "run thousands of edits from a file, resumable",
        [
            "masa batch jobs.jsonl -o out -c v1-5-pruned-emaonly.safetensors",
            "masa batch jobs.jsonl -o out -c sd15/ --shard 2/4",
            "torchrun --nproc-per-node 4 -m masa batch jobs.jsonl -o out -c sd15/",
            "masa batch jobs.jsonl -o out -c sd15/ --ray",
        ],
    )
    batch.add_argument("jobs", help="a file with one JSON object a line: id, and arguments of masa.edit or masa.sample")
    group = batch.add_argument_group("processes")
    text = "run the I-th of N parts, I from 1 (default: what torchrun's RANK and WORLD_SIZE say, else all)"
    group.add_argument("--shard", type=parse_shard, metavar="I/N", help=text)
    group.add_argument("--ray", action="store_true", help="by Ray, one worker a GPU; needs masa[ray]")
    group.add_argument("--workers", type=int, metavar="N", help="of --ray (default: one a GPU, without GPUs one)")
    add_plugins(batch)
    add_model(batch)
    add_output(batch, "the folder with a folder for each job, and report.jsonl; a second call goes on there")

    piebench = add(
        commands,
        "piebench",
        "make and measure PIE-Bench's edits; tables beside the published ones",
        [
            "masa piebench PIE-Bench/ --method p2p --inverter pinned -c sd14/ -o p2p",
            "masa piebench PIE-Bench/ --method masactrl --start-layer 8 --types 5 --limit 20 -c sd14/",
            "masa piebench PIE-Bench/ --pictures results/ --metrics psnr_unedit_part,ssim_unedit_part",
        ],
    )
    piebench.add_argument("folder", help="with mapping_file.json and annotation_images/")
    add_piebench(piebench)
    add_control(piebench)
    add_fields(piebench.add_argument_group("fields of controls"))
    add_plugins(piebench)
    add_model(piebench)
    group = piebench.add_argument_group("output")
    text = "the folder to write into; a second call goes on there (default: one in masa-out/ named after the method)"
    group.add_argument("-o", "--out", help=text)
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bars")

    plot = add(
        commands,
        "plot",
        "a figure of what a run recorded",
        [
            "masa plot masa-out/0001 word-maps",
            "masa plot masa-out/0001 queries --layers 7,10,13 -o queries.pdf",
        ],
    )
    plot.add_argument("folder", help="a folder that masa sample or masa edit wrote, with --record-.. or masks")
    plot.add_argument("kind", choices=PLOTS, help=f"one of {', '.join(PLOTS)}", metavar="KIND")
    group = plot.add_argument_group("figure")
    group.add_argument("--words", type=parse_words, metavar="WORD,..", help="of word-maps (default: all recorded)")
    group.add_argument("--layers", type=parse_numbers, metavar="LIST", help="of queries (default: up to six)")
    text = "of masks, queries and predictions (default: up to six)"
    group.add_argument("--steps", type=parse_numbers, metavar="LIST", help=text)
    group.add_argument("--components", type=int, help="of self-attention (default: 3)")
    group.add_argument("--control", type=int, help="place of the recording control (default: the first that did)")
    group = plot.add_argument_group("output")
    group.add_argument("-o", "--out", help="the .png, .pdf or .svg to write (default: FOLDER/KIND.png)")
    group.add_argument("--overwrite", action="store_true", help="replace a file that is already there")

    app = add(
        commands,
        "app",
        "the page: synthesis, editing, masks and comparisons in a browser, on this machine",
        ["masa app", "masa app -c v1-5-pruned-emaonly.safetensors --t2i-adapter t2iadapter_sketch_sd15v2.safetensors"],
    )
    add_app(app)
    add_model(app)

    condition = add(
        commands,
        "condition",
        "a condition picture for an adapter or ControlNet: edges, a sketch, a pose, ..",
        [
            "masa condition canny photo.jpg -o edges.png",
            "masa condition sketch photo.jpg --threshold 0.2 -o sketch.png",
            "masa condition openpose joints.json --height 512 --width 768 -o pose.png",
            "masa condition depth depth16.png --near-is-dark -o depth.png",
        ],
    )
    add_condition(condition)

    inspect = add(
        commands,
        "inspect",
        "what is in a checkpoint or adapter: kind, layout, parts, sizes, dtype, what is missing",
        ["masa inspect v1-5-pruned-emaonly.safetensors", "masa inspect adapter.safetensors", "masa inspect demo"],
    )
    inspect.add_argument("checkpoint", help="a file, folder or hub id; 'demo' is the embedded model")

    rerun = add(
        commands,
        "rerun",
        "repeat the run that made a PNG or a video",
        ["masa rerun masa-out/0001/target_0.png", "masa rerun walk.gif -o again.gif"],
    )
    rerun.add_argument("picture", help="a PNG that masa saved, or a video's file or folder")
    add_plugins(rerun)
    add_model(rerun, speed=False)
    add_output(rerun)
    return parser


def add(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    text: str,
    examples: Sequence[str],
) -> Parser:
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=name)
    return command


def add_model(parser: Parser, speed: bool = True) -> None:
    """speed: with the options that change how fast and how large a run is, which a rerun takes from its settings."""
    group = parser.add_argument_group("model")
    group.add_argument("-c", "--checkpoint", help=".safetensors file, diffusers folder or hub id (default: demo model)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, .. (default: cuda where there is one)")
    group.add_argument("--dtype", help="fp32, fp16 or bf16 (default: the fastest that the device has)")
    group.add_argument("--vae", help="another autoencoder's file or folder, also TAESD's")
    group.add_argument("--tokenizer", help="a tokenizer's folder (default: the checkpoint's, else CLIP's)")
    if not speed:
        return
    group.add_argument(
        "--offload",
        action="store_true",
        help="less memory: text encoder and VAE wait elsewhere; on a CPU the UNet makes room for the VAE",
    )
    group.add_argument("--compile", action="store_true", help="compile the UNet: minutes first, then faster")
    text = "a LoRA's file or folder and its weight (default: 1; 0.8,0.5: UNet's, text encoder's); several add up"
    group.add_argument("--lora", type=parse_lora, action="append", metavar="FILE[:WEIGHT]", help=text)
    text = "a textual-inversion file, and what its word is to be called (default: as the file says); several add up"
    group.add_argument("--embedding", type=parse_embedding, action="append", metavar="[NAME=]FILE", help=text)
    text = "how many of the text encoder's last layers are left out (default: 0; others' clip skip 2 is 1)"
    group.add_argument("--clip-skip", type=int, default=0, metavar="N", help=text)
    text = "what the UNet predicts, where the checkpoint does not say it (default: as it says, else the noise)"
    group.add_argument("--prediction-type", choices=PREDICTIONS, help=text)
    group.add_argument("--ema", action="store_true", help="the checkpoint's averaged weights (default: the plain ones)")


def add_steps_and_size(parser: Parser, steps: int | None = 50) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=int, default=steps, help="denoising steps (default: 50)")
    group.add_argument("--height", type=int, help="a multiple of 64 (default: the model's or the picture's)")
    group.add_argument("--width", type=int, help="a multiple of 64")
    backends = ("auto", "triton", "sdpa", "reference")
    group.add_argument("--backend", choices=backends, default="auto", help="of controlled attention (default: auto)")
    return group


def add_sampling(parser: Parser, steps: int | None = 50, parts: bool = True) -> None:
    """parts: with the option that takes targets in parts."""
    group = add_steps_and_size(parser, steps)
    add_guidance_and_seed(group)
    group.add_argument("--negative-prompt", default="", help="what to be guided away from")
    group.add_argument("--skip-steps", type=int, help="leave out the noisiest steps (default: as the inversion wants)")
    group.add_argument("--eta", type=float, default=0.0, help="DDIM's randomness, 0 to 1 (default: 0)")
    group.add_argument("--free-source", action="store_true", help="let a real source drift instead of pinning it")
    if parts:
        group.add_argument("--targets-at-once", type=int, metavar="N", help="where memory is short (default: all)")
    add_tiled(group)
    add_sampler(group)
    add_fields(group)
    add_preview(group)
    add_plugins(parser)


def add_guidance_and_seed(group: argparse._ArgumentGroup, guidance: float | None = 7.5) -> None:
    group.add_argument(
        "--guidance", type=float, default=guidance, help="classifier-free guidance (default: 7.5; 1 is off)"
    )
    group.add_argument("--seed", type=int, help="of the noise (default: drawn, and written into the PNGs)")


def add_tiled(group: argparse._ArgumentGroup) -> None:
    text = "the VAE in overlapping tiles, for less memory (default: above 768 pixels)"
    group.add_argument("--tiled", action=argparse.BooleanOptionalAction, help=text)


def add_inversion(parser: Parser, default: str | None = "ddim") -> argparse._ArgumentGroup:
    group = parser.add_argument_group("inversion")
    group.add_argument("--method", default=default, choices=METHODS, help="(default: ddim)")
    group.add_argument("--invert-guidance", type=float, help="guidance of the inversion (default: 1)")
    group.add_argument("--inner-steps", type=int, help="null-text's fitting steps at each step (default: 10)")
    return group


def add_piebench(parser: Parser) -> None:
    parser.set_defaults(target=["the benchmark's"])  # there are targets for controls to act on
    group = parser.add_argument_group("edits")
    text = "with the published settings (default: masactrl); controls that are given below replace its own"
    group.add_argument("--method", choices=[*PIE_METHODS], help=text)
    text = "of real pictures (default: pinned, which is also called direct)"
    group.add_argument("--inverter", choices=[*INVERTERS, *OTHER_NAMES], help=text)
    group.add_argument("--pictures", metavar="FOLDER", help="measure these results made elsewhere instead")
    group.add_argument("--types", type=parse_words, metavar="LIST", help="editing types, 0 to 9 (default: all)")
    group.add_argument("--limit", type=int, metavar="N", help="the first N edits only")
    group.add_argument("--steps", type=int, help="denoising steps (default: 50)")
    group.add_argument("--guidance", type=float, help="classifier-free guidance (default: 7.5)")
    group.add_argument("--seed", type=int, help="of edit-friendly and SDEdit's noise (default: 1234)")
    backends = ("auto", "triton", "sdpa", "reference")
    group.add_argument("--backend", choices=backends, default="auto", help="of controlled attention (default: auto)")
    group = parser.add_argument_group("metrics")
    group.add_argument("--metrics", type=parse_words, metavar="LIST", help="by the published names (default: all)")
    group.add_argument("--dino", help="hub id or folder of DINO ViT-B/8 (default: facebook/dino-vitb8)")
    group.add_argument("--clip", help="hub id or folder of CLIP (default: openai/clip-vit-large-patch14)")
    text = "resize and SSIM as in torchvision and torchmetrics now, or as in 2023 (default: current)"
    group.add_argument("--libraries", choices=("current", "2023"), help=text)


def add_profile(parser: Parser) -> None:
    parser.add_argument("--profile", metavar="FILE", help="write a chrome trace (.json) and print what takes longest")


def add_output(parser: Parser, text: str = "the folder to write into (default: the next free masa-out/NNNN)") -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", help=text)
    group.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bars")


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """ "start_layer=0,6,10" -> ("start_layer", [0, 6, 10]), "layers=8-9,10" -> ("layers", [[8, 9], [10]])."""
    name, equals, values = text.partition("=")
    kinds = (MasaCtrl, *registered("begin").values())
    # A mask and a guidance have no form on the command line.
    names = list(
        dict.fromkeys(name for kind in kinds for name in parameters_of(kind) if name not in ("mask", "guidance"))
    )
    if not equals or name not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUES with a name of {', '.join(names)}")
    parse = parse_numbers if name == "layers" else parse_value
    return name, [parse(value.strip()) for value in values.split(",")]


def parse_lora(text: str) -> tuple[str, float | tuple[float, float]]:
    """ "style.safetensors:0.8" -> ("style.safetensors", 0.8); what follows the last colon may be part of the name."""
    path, _, weight = text.rpartition(":")
    try:
        numbers = [float(number) for number in weight.split(",")]
    except ValueError:
        numbers = []
    if not path or len(numbers) not in (1, 2):
        return text, 1.0
    return path, numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_embedding(text: str) -> str | tuple[str, str]:
    """ "<cat>=cat.safetensors" -> ("<cat>", "cat.safetensors"); the name of a file that is there is no pair."""
    name, equals, path = text.partition("=")
    return text if not equals or not name or Path(text).exists() else (name, path)


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 2/4")
    return int(part), int(parts)


def parse_control(text: str) -> str:
    return choose(text, list(registered("begin")), "control")


def parse_value(text: str) -> int | float | bool | str:
    """A number or truth value where it is one, else the text."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
