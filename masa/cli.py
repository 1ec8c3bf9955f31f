"""The command line: subcommands that mirror the functions of the library."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from masa.controls.base import Control
from masa.errors import MasaError
from masa.inversion import METHODS
from masa.result import file_names
from masa.sheets import PARAMETERS, comparison

OUT = Path("masa-out")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"masa: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C."""
    warnings.formatwarning = lambda message, *_: f"masa: {message}\n"
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (Exception, KeyboardInterrupt) as error:
        if interrupted(error):
            print("\nmasa: interrupted; nothing unfinished was written", file=sys.stderr)
            return 130
        if "out of memory" in str(error).lower():
            print(
                "masa: out of memory; use a smaller --height and --width or a half-precision --dtype", file=sys.stderr
            )
        elif isinstance(error, MasaError | OSError | ValueError):
            print(f"masa: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            raise
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """The command, profiled where it has --profile and that is given."""
    if getattr(args, "profile", None) is None:
        return args.run(args)
    from masa.profiling import profiled

    with profiled(args.profile, args.overwrite):
        return args.run(args)


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the root of an error; libraries that import lazily turn it into others."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


# ----------------------------------------------------------------------------------------------- commands


def run_demo(args: argparse.Namespace) -> None:
    from masa.demo import run

    folder = choose_folder(args.out, ["synthesis.png", "editing.png", "picture.png"], args.overwrite)
    for path in run(folder, seed=args.seed, progress=not args.quiet):
        print(path)
    print(
        f"""
Next, with the demo model:
  masa sample "a cat sitting" "a cat standing" --guidance 3 --start-step 2 --start-layer 0 --steps 20
  masa rerun {folder / "synthesis.png"}
With Stable Diffusion v1.5 (any v1.x .safetensors file or diffusers folder):
  masa edit photo.jpg "a photo of a running corgi" -c v1-5-pruned-emaonly.safetensors
In Python:
  import masa
  sd = masa.load("v1-5-pruned-emaonly.safetensors")
  masa.edit(sd, "photo.jpg", "a photo of a running corgi").save("out")"""
    )


def run_sample(args: argparse.Namespace) -> None:
    import masa

    folder = choose_folder(args.out, file_names(len(args.target)), args.overwrite)
    controls = build_controls(args)
    trajectory = masa.Trajectory.load(args.trajectory) if args.trajectory else None
    result = masa.sample(
        load_model(args),
        args.source,
        args.target,
        controls=controls,
        trajectory=trajectory,
        pin_source=not args.free_source,
        steps=args.steps,
        skip_steps=args.skip_steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        seed=args.seed,
        eta=args.eta,
        backend=args.backend,
        progress=not args.quiet,
    )
    report(result.save(folder))


def run_edit(args: argparse.Namespace) -> None:
    import masa

    folder = choose_folder(args.out, file_names(len(args.target)), args.overwrite)
    controls = build_controls(args)
    check_picture(args.image)
    result = masa.edit(
        load_model(args),
        args.image,
        args.target,
        args.source,
        controls=controls,
        pin_source=not args.free_source,
        steps=50 if args.steps is None else args.steps,
        skip_steps=args.skip_steps,
        guidance_scale=args.guidance,
        invert_guidance_scale=args.invert_guidance,
        method=args.method,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        seed=args.seed,
        eta=args.eta,
        backend=args.backend,
        progress=not args.quiet,
    )
    report(result.save(folder))


def run_invert(args: argparse.Namespace) -> None:
    import masa

    out = Path(args.out) if args.out else Path(args.image).with_suffix(".safetensors").name
    out = Path(out)
    if out.suffix != ".safetensors":
        raise MasaError(f"-o {out} must end in .safetensors, the format of a trajectory")
    if out.exists() and not args.overwrite:
        raise MasaError(f"{out} is already there; give another -o, or --overwrite")
    check_picture(args.image)
    trajectory = masa.invert(
        load_model(args),
        args.image,
        args.prompt,
        steps=50 if args.steps is None else args.steps,
        guidance_scale=args.invert_guidance,
        method=args.method,
        edit_guidance_scale=args.edit_guidance,
        height=args.height,
        width=args.width,
        seed=args.seed,
        progress=not args.quiet,
    )
    trajectory.save(out)
    report([out])


def run_sdedit(args: argparse.Namespace) -> None:
    import masa

    folder = choose_folder(args.out, file_names(len(args.target)), args.overwrite)
    check_picture(args.image)
    result = masa.sdedit(
        load_model(args),
        args.image,
        args.target,
        args.strength,
        steps=50 if args.steps is None else args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        seed=args.seed,
        progress=not args.quiet,
    )
    report(result.save(folder))


def run_grid(args: argparse.Namespace) -> None:
    import masa

    folder = choose_folder(args.out, ["grid.png"], args.overwrite)
    check_picture(args.image)
    sheet = masa.grid(
        load_model(args),
        args.image,
        args.target,
        args.source,
        methods=args.methods,
        controls=comparison(args.source, masa.MasaCtrl(args.start_step, args.start_layer)),
        steps=50 if args.steps is None else args.steps,
        guidance_scale=args.guidance,
        height=args.height,
        width=args.width,
        seed=args.seed,
        progress=not args.quiet,
    )
    sheet.save(folder / "grid.png")
    report([folder / "grid.png"])


def run_sweep(args: argparse.Namespace) -> None:
    import masa

    folder = choose_folder(args.out, ["sweep.png"], args.overwrite)
    if args.image is not None:
        check_picture(args.image)
    sheet = masa.sweep(
        load_model(args),
        args.source,
        args.target,
        args.rows,
        args.columns,
        image=args.image,
        method=args.method,
        control=masa.MasaCtrl(args.start_step, args.start_layer),
        steps=50 if args.steps is None else args.steps,
        guidance_scale=args.guidance,
        height=args.height,
        width=args.width,
        seed=args.seed,
        progress=not args.quiet,
    )
    sheet.save(folder / "sweep.png")
    report([folder / "sweep.png"])


def run_inspect(args: argparse.Namespace) -> None:
    from masa.pipeline import check_keys, locate
    from masa.weights.model_files import summarise

    rows = summarise(locate(args.checkpoint, prefer_half=False), check=check_keys)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")


def run_rerun(args: argparse.Namespace) -> None:
    import masa
    from masa.result import read_settings

    settings = read_settings(args.picture)
    folder = choose_folder(args.out, file_names(len(settings.get("target", []))), args.overwrite)
    given = (args.checkpoint, args.device, args.dtype, args.vae, args.tokenizer)
    sd = None
    if any(value is not None for value in given):  # another device, or a checkpoint that has moved
        sd = masa.load(
            args.checkpoint or settings["checkpoint"],
            device=args.device or settings["device"],
            dtype=args.dtype or settings["dtype"],
            vae=args.vae or settings["vae"],
            tokenizer=args.tokenizer or settings["tokenizer"],
            progress=not args.quiet,
        )
    report(masa.rerun(args.picture, sd, progress=not args.quiet).save(folder))


# ------------------------------------------------------------------------------------------------ helpers


def load_model(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    import masa
    from masa.attention import check_backend
    from masa.image import check_size
    from masa.pipeline import choose_device

    # What can be refused without the model is refused before its minutes are spent.
    check_size(getattr(args, "height", None), getattr(args, "width", None))
    masa.Schedule().timesteps(50 if getattr(args, "steps", None) is None else args.steps)
    check_backend(getattr(args, "backend", "auto"), choose_device(args.device))
    return masa.load(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        vae=args.vae,
        progress=not args.quiet,
    )


def build_controls(args: argparse.Namespace) -> list[Control]:
    """The controls that the options describe: MasaCtrl unless --no-control, and blending where asked."""
    import masa

    blended: list[Control] = []
    if args.blend is not None:
        check_picture(args.blend)
        blended.append(masa.BlendedLatents(args.blend))
    if args.no_control:
        return blended
    mask: masa.GivenMasks | masa.WordMasks | None = None
    if args.words and args.masks:
        raise MasaError("--words and --masks both say where the subject is; give one")
    if args.words:
        mask = masa.WordMasks(as_words(args.words[0]), as_words(args.words[1]), args.threshold)
    if args.masks:
        for path in args.masks:
            check_picture(path)
        mask = masa.GivenMasks(args.masks[0], args.masks[1])
    return [
        masa.MasaCtrl(
            args.start_step,
            args.start_layer,
            steps=args.control_steps,
            layers=args.control_layers,
            mask=mask,
            union=args.union,
            source_weight=args.source_weight,
        ),
        *blended,
    ]


def as_words(text: str) -> str | int:
    """A word or phrase, or the token position that a number means."""
    return int(text) if text.isdecimal() else text


def check_picture(path: str) -> None:
    """Open a picture before the model's minutes are spent."""
    from masa.image import open_picture

    open_picture(path)


def choose_folder(out: str | None, names: Sequence[str], overwrite: bool) -> Path:
    """Where to write: `out`, refusing to overwrite unasked, or the next free masa-out/NNNN."""
    if out is None:
        used = [int(p.name) for p in OUT.glob("[0-9]*") if p.name.isdecimal()]
        return OUT / f"{max(used, default=0) + 1:04d}"
    folder = Path(out)
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise MasaError(f"-o {folder}: {above} is a file; expected a folder to write into")
    if not os.access(above, os.W_OK):
        raise MasaError(f"-o {folder}: {above} cannot be written to; give another folder")
    taken = [name for name in names if (folder / name).exists()]
    if taken and not overwrite:
        raise MasaError(f"{folder} already holds {', '.join(taken)}; give another -o, or --overwrite")
    return folder


def report(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)


def parse_numbers(text: str) -> list[int]:
    """ "3,5,10-12" -> [3, 5, 10, 11, 12]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            numbers += range(int(first), int(last or first) + 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 3,5,10-12") from None
    return numbers


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """ "start_layer=0,6,10" -> ("start_layer", [0, 6, 10])."""
    name, equals, values = text.partition("=")
    if not equals or name not in PARAMETERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUES with a name of {', '.join(PARAMETERS)}")
    return name, [parse_value(value.strip()) for value in values.split(",")]


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


# ------------------------------------------------------------------------------------------------- parser


def build_parser() -> Parser:
    parser = Parser(
        prog="masa",
        description="MasaCtrl on Stable Diffusion v1: the same subject, another pose.",
        epilog="Begin with: masa demo",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    text = "two labelled pictures from the embedded model, in under a minute"
    demo = add(commands, "demo", run_demo, text, ["masa demo"])
    demo.add_argument("--seed", type=int, default=None, help="another pair of pictures")
    add_output(demo)
    add_profile(demo)

    sample = add(
        commands,
        "sample",
        run_sample,
        "synthesise a source and targets that keep its subject",
        [
            'masa sample "a sitting cat" "a standing cat" -c v1-5-pruned-emaonly.safetensors --seed 0 -o cats',
            'masa sample "" "a running corgi" --trajectory corgi.safetensors -c v1-5-pruned-emaonly.safetensors',
        ],
    )
    sample.add_argument("source", help="the source's prompt")
    sample.add_argument("target", nargs="*", help="the targets' prompts; none: plain text-to-image")
    sample.add_argument("--trajectory", metavar="FILE", help="an inverted picture (masa invert) as the source")
    add_sampling(sample)
    add_control(sample)
    add_model(sample)
    add_output(sample)
    add_profile(sample)

    edit = add(
        commands,
        "edit",
        run_edit,
        "edit a real picture",
        [
            'masa edit corgi.jpg "a photo of a running corgi" -c v1-5-pruned-emaonly.safetensors',
            'masa edit cat.png "a cat jumping" --source "a cat sitting" --words cat cat -c sd15/ -o jump',
        ],
    )
    edit.add_argument("image", help="the picture's path")
    edit.add_argument("target", nargs="+", help="the targets' prompts")
    edit.add_argument("--source", default="", help="the picture's own prompt (default: empty)")
    add_inversion(edit)
    add_sampling(edit)
    add_control(edit)
    add_model(edit)
    add_output(edit)
    add_profile(edit)

    invert = add(
        commands,
        "invert",
        run_invert,
        "invert a real picture once, for any number of edits",
        ["masa invert corgi.jpg -o corgi.safetensors -c v1-5-pruned-emaonly.safetensors"],
    )
    invert.add_argument("image", help="the picture's path")
    invert.add_argument("--prompt", default="", help="the picture's own prompt (default: empty)")
    group = add_inversion(invert)
    group.add_argument("--edit-guidance", type=float, default=7.5, help="guidance that null-text fits (default: 7.5)")
    group.add_argument("--seed", type=int, help="of edit-friendly and plain noise (default: drawn)")
    add_steps_and_size(invert)
    add_model(invert)
    add_output(invert, "the .safetensors file to write (default: named after the picture)")
    add_profile(invert)

    sdedit = add(
        commands,
        "sdedit",
        run_sdedit,
        "noise a picture half way and denoise it with other prompts",
        ['masa sdedit corgi.jpg "a photo of a wolf" --strength 0.6 -c v1-5-pruned-emaonly.safetensors'],
    )
    sdedit.add_argument("image", help="the picture's path")
    sdedit.add_argument("target", nargs="+", help="the targets' prompts")
    sdedit.add_argument("--strength", type=float, default=0.8, help="0: the picture, 1: noise (default: 0.8)")
    group = add_steps_and_size(sdedit)
    add_guidance_and_seed(group)
    group.add_argument("--negative-prompt", default="", help="what to be guided away from")
    add_model(sdedit)
    add_output(sdedit)

    grid = add(
        commands,
        "grid",
        run_grid,
        "one picture of an edit by every inversion and control",
        [
            'masa grid corgi.jpg "a running corgi" --source "a sitting corgi" -c v1-5-pruned-emaonly.safetensors',
            'masa grid cat.png "a cat standing" --source "a cat sitting" --steps 20 --guidance 3 --start-layer 0',
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
        run_sweep,
        "one picture of a target under every pair of values of two parameters",
        [
            'masa sweep "a sitting cat" "a standing cat" --rows start_step=0,4,20 --columns start_layer=0,8,10,14',
            'masa sweep "" "a running corgi" --image corgi.jpg --rows guidance_scale=3,7.5 --columns start_step=0,4,20',
        ],
    )
    sweep.add_argument("source", help="the source's prompt")
    sweep.add_argument("target", help="the target's prompt")
    sweep.add_argument("--image", help="edit this picture, inverted once (default: synthesise the source)")
    sweep.add_argument("--method", default="ddim", choices=METHODS, help="the picture's inversion (default: ddim)")
    form = "of MasaCtrl or of sampling: NAME=VALUE,VALUE,.."
    default = "start_step=0,4,8,16"
    sweep.add_argument("--rows", type=parse_sweep, default=default, help=f"{form} (default: {default})")
    default = "start_layer=0,4,8,10,14"
    sweep.add_argument("--columns", type=parse_sweep, default=default, help=f"another (default: {default})")
    add_guidance_and_seed(add_steps_and_size(sweep))
    add_start(sweep.add_argument_group("control (MasaCtrl)"))
    add_model(sweep)
    add_output(sweep)

    inspect = add(
        commands,
        "inspect",
        run_inspect,
        "what is in a checkpoint: layout, parts, sizes, dtype, what is missing",
        ["masa inspect v1-5-pruned-emaonly.safetensors", "masa inspect demo"],
    )
    inspect.add_argument("checkpoint", help="a file, folder or hub id; 'demo' is the embedded model")

    rerun = add(
        commands,
        "rerun",
        run_rerun,
        "repeat the run that made a PNG",
        ["masa rerun masa-out/0001/target_0.png"],
    )
    rerun.add_argument("picture", help="a PNG that masa saved")
    add_model(rerun)
    add_output(rerun)
    return parser


def add(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Callable[[argparse.Namespace], None],
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
    command.set_defaults(run=run)
    return command


def add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-c", "--checkpoint", help=".safetensors file, diffusers folder or hub id (default: demo model)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, .. (default: cuda where there is one)")
    group.add_argument("--dtype", help="fp32, fp16 or bf16 (default: the fastest that the device has)")
    group.add_argument("--vae", help="another autoencoder's file or folder")
    group.add_argument("--tokenizer", help="a tokenizer's folder (default: the checkpoint's, else CLIP's)")


def add_steps_and_size(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=int, help="denoising steps (default: 50)")
    group.add_argument("--height", type=int, help="a multiple of 64 (default: the model's or the picture's)")
    group.add_argument("--width", type=int, help="a multiple of 64")
    return group


def add_sampling(parser: Parser) -> None:
    group = add_steps_and_size(parser)
    add_guidance_and_seed(group)
    group.add_argument("--negative-prompt", default="", help="what to be guided away from")
    group.add_argument("--skip-steps", type=int, help="leave out the noisiest steps (default: as the inversion wants)")
    group.add_argument("--eta", type=float, default=0.0, help="DDIM's randomness, 0 to 1 (default: 0)")
    group.add_argument("--free-source", action="store_true", help="let a real source drift instead of pinning it")
    backends = ("auto", "triton", "sdpa", "reference")
    group.add_argument("--backend", choices=backends, default="auto", help="of controlled attention (default: auto)")


def add_guidance_and_seed(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance (default: 7.5; 1 is off)")
    group.add_argument("--seed", type=int, help="of the noise (default: drawn, and written into the PNGs)")


def add_start(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--start-step", type=int, default=4, help="first step controlled (default: 4)")
    group.add_argument("--start-layer", type=int, default=10, help="first layer controlled, 0..15 (default: 10)")


def add_control(parser: Parser) -> None:
    group = parser.add_argument_group("control (MasaCtrl)")
    add_start(group)
    group.add_argument("--control-steps", type=parse_numbers, metavar="LIST", help="these steps instead: 4,6,10-20")
    group.add_argument("--control-layers", type=parse_numbers, metavar="LIST", help="these layers instead: 10-15")
    group.add_argument(
        "--words", nargs=2, metavar=("SOURCE", "TARGET"), help="mask by these words' attention; a number is a token"
    )
    group.add_argument("--threshold", type=float, default=0.1, help="of the words' maps (default: 0.1)")
    group.add_argument("--masks", nargs=2, metavar=("SOURCE", "TARGET"), help="mask by these pictures, white = subject")
    group.add_argument("--union", action="store_true", help="targets see their own keys and values too")
    group.add_argument("--source-weight", type=float, default=1.0, help="of the source in a union (default: 1)")
    group.add_argument("--no-control", action="store_true", help="no MasaCtrl: the fixed-seed baseline")
    group.add_argument("--blend", metavar="MASK", help="keep a real picture outside this mask, white = may change")


def add_inversion(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("inversion")
    group.add_argument("--method", default="ddim", choices=METHODS, help="(default: ddim)")
    group.add_argument("--invert-guidance", type=float, default=1.0, help="guidance of the inversion (default: 1)")
    return group


def add_profile(parser: Parser) -> None:
    parser.add_argument("--profile", metavar="FILE", help="write a chrome trace (.json) and print what takes longest")


def add_output(parser: Parser, text: str = "the folder to write into (default: the next free masa-out/NNNN)") -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", help=text)
    group.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
