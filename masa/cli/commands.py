"""The command line: subcommands that mirror the functions of the library."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from masa.cli.adapter_arguments import build_adapters, build_frame_adapters, given
from masa.cli.app_command import run_app
from masa.cli.arguments import build_parser
from masa.cli.condition_command import run_condition
from masa.cli.control_arguments import build_controls, build_start, build_swept, check_picture
from masa.cli.idle_options import names_controls, refuse_idle
from masa.cli.preview import build_preview
from masa.cli.registered_arguments import build_guidance, build_sampler, check_used, load_plugins, with_fields
from masa.errors import MasaError
from masa.io.files import check_folder, check_free, replacing
from masa.io.folders import reserved
from masa.output.result import Result, file_names
from masa.settings import RunSettings
from masa.workflows.piebench_tables import TABLES
from masa.workflows.sheets import comparison

OUT = Path("masa-out")
SHOWN = 5  # failed jobs whose errors are printed; the report has all
Saved = TypeVar("Saved")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does: what is unfinished is cleaned up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C, 143 on SIGTERM.

    `masa batch` also returns 1, where some of its jobs failed.
    """
    warnings.formatwarning = lambda message, *_: f"masa: {message}\n"
    try:
        with ending_on_sigterm():
            return parse_and_run(sys.argv[1:] if argv is None else argv)
    except (Exception, KeyboardInterrupt) as error:
        if (interruption := find_interruption(error)) is not None:
            terminated = isinstance(interruption, Terminated)
            how = "terminated" if terminated else "interrupted"
            print(f"\nmasa: {how}; nothing unfinished was written", file=sys.stderr)
            return 143 if terminated else 130
        if "out of memory" in str(error).lower():
            print(
                "masa: out of memory; use a smaller --height and --width or a half-precision --dtype", file=sys.stderr
            )
        elif isinstance(error, MasaError | OSError | ValueError):
            print(f"masa: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            raise
        return 2


def parse_and_run(argv: Sequence[str]) -> int:
    """What the command line says, without a catch."""
    load_plugins(argv)
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    refuse_idle(args)
    with ExitStack() as args.closing:
        return run(args) or 0


def run(args: argparse.Namespace) -> int | None:
    """The command, profiled where it has --profile and that is given."""
    command = COMMANDS[args.command]
    if getattr(args, "profile", None) is None:
        return command(args)
    from masa.cli.profiling import profiled

    with profiled(args.profile, args.overwrite):
        return command(args)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Terminated is raised inside where the process gets SIGTERM."""
    if threading.current_thread() is not threading.main_thread():  # only that one hears of signals
        yield
        return

    def terminate(*_: Any) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def find_interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """Ctrl-C or SIGTERM at the root of an error; libraries that import lazily turn it into others."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


# ----------------------------------------------------------------------------------------------- commands


def run_demo(args: argparse.Namespace) -> None:
    from masa.workflows import demo

    if args.pose:
        run_pose_demo(args)
        return
    if args.video:
        run_video_demo(args)
        return
    folder = take_folder(args, ["synthesis.png", "editing.png", "picture.png"])
    for path in demo.run(folder, seed=args.seed, progress=not args.quiet):
        print(path)
    print(
        f"""
Next, with the demo model:
  masa sample "a cat sitting" "a cat standing" --guidance 4 --start-step 2 --start-layer 0 --steps 20
  masa rerun {folder / "synthesis.png"}
  masa demo --pose
  masa demo --video
With Stable Diffusion v1.5 (any v1.x .safetensors file or diffusers folder):
  masa edit photo.jpg "a photo of a running corgi" -c v1-5-pruned-emaonly.safetensors
In Python:
  import masa
  sd = masa.load("v1-5-pruned-emaonly.safetensors")
  masa.edit(sd, "photo.jpg", "a photo of a running corgi").save("out")"""
    )


def run_pose_demo(args: argparse.Namespace) -> None:
    from masa.workflows import demo_pose

    drawing = None if args.pose is True else args.pose
    folder = take_folder(args, demo_pose.file_names(drawing))
    if drawing is not None:
        check_picture(drawing)
    for path in demo_pose.run(folder, drawing, seed=args.seed, progress=not args.quiet):
        print(path)
    if drawing is None:
        print(
            f"""
Next, draw a pose of your own, white lines on black, or change one of those in {folder}:
  masa demo --pose {folder / demo_pose.DRAWN[0]}"""
        )


def run_video_demo(args: argparse.Namespace) -> None:
    from masa.workflows import demo_video

    folder = take_folder(args, demo_video.FILES)
    report(demo_video.run(folder, args.video, seed=args.seed, progress=not args.quiet))
    print(
        f"""
Next, with the demo model:
  masa rerun {folder / demo_video.ANIMATIONS[0]} -o frames
With Stable Diffusion v1.5 and an adapter for it, such as a folder of poses and t2iadapter_openpose_sd14v1.safetensors:
  masa video "a man" "a man walking" poses/ --t2i-adapter t2iadapter_openpose_sd14v1.safetensors -c sd15/ -o walk.gif"""
    )


def run_sample(args: argparse.Namespace) -> None:
    import masa

    check_prompts(args)
    folder = take_folder(args, file_names(len(args.target)))
    settings = sampling_settings(args)
    trajectory = masa.Trajectory.load(args.trajectory) if args.trajectory else None
    result = masa.sample(load_model(args), args.source, args.target, trajectory=trajectory, **settings)
    report(save(result, folder, args), args)


def run_edit(args: argparse.Namespace) -> None:
    import masa

    check_prompts(args)
    folder = take_folder(args, file_names(len(args.target)))
    settings = sampling_settings(args)
    check_picture(args.image)
    inversion = given(invert_guidance_scale=args.invert_guidance, inner_steps=args.inner_steps)
    result = masa.edit(
        load_model(args), args.image, args.target, args.source, method=args.method, **inversion, **settings
    )
    report(save(result, folder, args), args)


def run_video(args: argparse.Namespace) -> None:
    import masa
    from masa.output.frames import check_form, check_fps
    from masa.workflows.frames import Video, as_adapters, check_before_inversion, read_conditions

    check_prompts(args)
    out = Path(args.out) if args.out else take_folder(args, []) / "frames.gif"
    check_form(out, args.overwrite)
    check_fps(8.0 if args.fps is None else args.fps)
    adapters, conditions = build_frame_adapters(args)
    sets: Any = conditions[0] if len(conditions) == 1 else conditions
    shown = read_conditions(sets, adapters)  # what cannot be read is refused before the model's minutes
    settings = sampling_settings(args)
    trajectory = masa.Trajectory.load(args.trajectory) if args.trajectory else None
    if args.image:
        check_picture(args.image)
    sd = load_model(args)
    if args.image:
        chosen = given(invert_guidance=args.invert_guidance, inner_steps=args.inner_steps, method=args.method)
        chosen = {{"invert_guidance": "guidance_scale"}.get(name, name): value for name, value in chosen.items()}
        # Null-text is fitted to the guidance that the frames have.
        chosen |= {"edit_guidance_scale": args.guidance, "steps": args.steps or 50, "tiled": args.tiled}
        plain = {name: value for name, value in settings.items() if name != "progress"}
        asked = RunSettings(source=args.source, target=tuple(args.target), **plain)
        video = Video(as_adapters(adapters), shown, args.anchor, args.frames_at_once)
        check_before_inversion(sd, args.image, asked, video, args.method or "ddim", args.steps or 50)
        of_source = [c for c in (*adapters, *settings["controls"]) if getattr(c, "source", None) is not None]
        chosen |= {"controls": of_source} if of_source else {}
        trajectory = masa.invert(sd, args.image, args.source, **chosen, **size_and_seed(args))
        settings |= {"steps": None, "height": None, "width": None}
    frames = masa.sample_frames(
        sd,
        args.source,
        args.target[0],
        sets,
        adapter=adapters,
        anchor=args.anchor,
        frames_at_once=args.frames_at_once,
        trajectory=trajectory,
        **settings,
    )
    report(or_elsewhere(lambda place: frames.save(place, overwrite=args.overwrite, **given(fps=args.fps)), out))


def run_invert(args: argparse.Namespace) -> None:
    import masa

    out = Path(args.out or Path(args.image).with_suffix(".safetensors").name)
    if out.suffix != ".safetensors":
        raise MasaError(f"-o {out} must end in .safetensors, the format of a trajectory")
    check_free(out, args.overwrite, "-o")
    check_picture(args.image)
    args.target = ()  # an inversion has none: adapters' pictures are the source's
    trajectory = masa.invert(
        load_model(args),
        args.image,
        args.prompt,
        steps=args.steps,
        tiled=args.tiled,
        method=args.method,
        **given(
            controls=build_adapters(args) or None,
            guidance_scale=args.invert_guidance,
            edit_guidance_scale=args.edit_guidance,
            inner_steps=args.inner_steps,
        ),
        **size_and_seed(args),
    )
    or_elsewhere(trajectory.save, out)
    report([out], args)


def run_sdedit(args: argparse.Namespace) -> None:
    import masa

    check_prompts(args)
    folder = take_folder(args, file_names(len(args.target)))
    check_picture(args.image)
    settings = sampling_settings(args)
    result = masa.sdedit(load_model(args), args.image, args.target, args.strength, **settings)
    report(save(result, folder, args), args)


def run_grid(args: argparse.Namespace) -> None:
    import masa

    check_prompts(args)
    folder = take_folder(args, ["grid.png"])
    check_picture(args.image)
    sheet = masa.grid(
        load_model(args),
        args.image,
        args.target,
        args.source,
        methods=args.methods,
        controls=comparison(args.source, build_start(args)),
        steps=args.steps,
        guidance_scale=args.guidance,
        **size_and_seed(args),
    )
    or_elsewhere(sheet.save, folder / "grid.png")
    report([folder / "grid.png"], args)


def run_sweep(args: argparse.Namespace) -> None:
    import masa

    check_prompts(args)
    folder = take_folder(args, ["sweep.png"])
    if args.image is not None:
        check_picture(args.image)
    control = build_swept(args)
    sheet = masa.sweep(
        load_model(args),
        args.source,
        args.target,
        args.rows,
        args.columns,
        image=args.image,
        control=control,
        **given(method=args.method, steps=args.steps, guidance_scale=args.guidance),
        **size_and_seed(args),
    )
    or_elsewhere(sheet.save, folder / "sweep.png")
    report([folder / "sweep.png"], args)


def run_page(args: argparse.Namespace) -> None:
    run_app(args, lambda: load_model(args))


def run_inspect(args: argparse.Namespace) -> None:
    from masa.pipeline import locate
    from masa.runtime.networks import check_keys
    from masa.weights.kinds import recognise
    from masa.weights.model_files import summarise

    path = locate(args.checkpoint, prefer_half=False)
    rows = recognise(path) or summarise(path, check=check_keys)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")


def run_rerun(args: argparse.Namespace) -> None:
    import masa
    from masa.output.frames import check_form, read_run

    settings, _ = read_run(args.picture)
    if settings["function"] == "frames":
        out = Path(args.out) if args.out else take_folder(args, [])
        check_form(out, args.overwrite)
    else:
        out = take_folder(args, file_names(len(settings.get("target", []))))
    result = masa.rerun(
        args.picture,
        checkpoint=args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        vae=args.vae,
        tokenizer=args.tokenizer,
        progress=not args.quiet,
    )
    if isinstance(result, masa.Frames):
        report(or_elsewhere(lambda place: result.save(place, overwrite=args.overwrite), out))
    else:
        report(save(result, out, args))


def run_plot(args: argparse.Namespace) -> None:
    import masa
    from masa.output import plots

    kinds: Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
        "word-maps": (plots.word_maps, ("words",)),
        "self-attention": (plots.self_attention_components, ("components",)),
        "masks": (plots.masks, ("steps",)),
        "queries": (plots.query_components, ("layers", "steps")),
        "predictions": (plots.predictions, ("steps",)),
    }
    plot, options = kinds[args.kind]
    chosen = given(words=args.words, components=args.components, layers=args.layers, steps=args.steps)
    for name in chosen:
        if name not in options:
            raise MasaError(f"--{name} has no meaning for {args.kind}, which takes --{' and --'.join(options)}")
    out = Path(args.out or Path(args.folder) / f"{args.kind}.png")
    check_free(out, args.overwrite, "-o")
    figure = plot(masa.Result.load(args.folder), control=args.control, **chosen)
    with replacing(out) as temporary:
        figure.savefig(temporary)
    report([out])


def run_batch(args: argparse.Namespace) -> int:
    import masa

    if args.out is None:
        raise MasaError("masa batch needs -o, the folder that a second call goes on in")
    report = masa.batch(
        args.jobs,
        args.out,
        partial(load_in_worker, place_rank(args)),
        shard=args.shard or shard_of_rank(os.environ),
        overwrite=args.overwrite,
        ray=args.ray,
        workers=args.workers,
        progress=not args.quiet,
    )
    for name, error in list(report.failed.items())[:SHOWN]:
        print(f"masa: {name}: {error}", file=sys.stderr)
    others = f", {len(report.elsewhere)} in the hands of other runs" if report.elsewhere else ""
    print(f"{len(report.done)} done, {len(report.failed)} failed{others}: {report.path}")
    return int(bool(report.failed or report.elsewhere))


def run_piebench(args: argparse.Namespace) -> int:
    import masa
    from masa.workflows.piebench_layout import read_layout

    read_layout(args.folder, args.types)  # before the model's minutes
    controls = build_controls(args) if names_controls(args) else None
    check_used(args.set, controls or [])
    found = masa.piebench(
        args.folder,
        None if args.pictures else load_model(args),
        backend=args.backend,
        progress=not args.quiet,
        **given(
            **{name: getattr(args, name) for name in ("method", "inverter", "pictures", "types", "limit", "metrics")},
            **{name: getattr(args, name) for name in ("dino", "clip", "libraries", "steps", "seed", "out")},
            guidance_scale=args.guidance,
            controls=controls,
        ),
    )
    print(found.markdown(), end="")
    report([] if found.folder is None else [found.folder / name for name in TABLES], None if args.pictures else args)
    return int(bool(found.failed))


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int | None]] = {
    "demo": run_demo,
    "sample": run_sample,
    "edit": run_edit,
    "video": run_video,
    "invert": run_invert,
    "sdedit": run_sdedit,
    "grid": run_grid,
    "sweep": run_sweep,
    "plot": run_plot,
    "app": run_page,
    "condition": run_condition,
    "inspect": run_inspect,
    "rerun": run_rerun,
    "batch": run_batch,
    "piebench": run_piebench,
}


# ------------------------------------------------------------------------------------------------ helpers


def check_prompts(args: argparse.Namespace) -> None:
    """Refuse a picture's name where a prompt belongs: `masa edit a.png b.png "a cat"` edits one picture only."""
    prompts = [args.target] if isinstance(args.target, str) else args.target
    for prompt in [*prompts, args.source] if "source" in args else prompts:
        if os.path.isfile(prompt):
            raise MasaError(f"{prompt} is a file and stands where a prompt belongs; a command edits one picture")


def load_model(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    import masa
    from masa.attention import check_backend
    from masa.io.pictures import check_size
    from masa.pipeline import choose_device

    # What can be refused without the model is refused before its minutes are spent.
    check_size(getattr(args, "height", None), getattr(args, "width", None))
    masa.Schedule().timesteps(50 if getattr(args, "steps", None) is None else args.steps)
    device = choose_device(args.device)
    check_backend(getattr(args, "backend", "auto"), device)
    if args.offload and args.compile and device.type == "cpu":
        raise masa.MasaError("--offload and --compile go together on a GPU only; leave one of the two out")
    sd = masa.load(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        vae=args.vae,
        lora=args.lora,
        embeddings=args.embedding,
        clip_skip=args.clip_skip,
        prediction_type=args.prediction_type,
        ema=args.ema,
        offload=args.offload,
        progress=not args.quiet,
    )
    return sd.compile() if args.compile else sd


def load_in_worker(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The model in a process that has not parsed the command line itself."""
    new = [file for file in args.plugin if f"masa_plugin_{Path(file).stem}" not in sys.modules]
    load_plugins([part for file in new for part in ("--plugin", file)])
    return load_model(args)


def shard_of_rank(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which part is this process's: torchrun tells its processes by RANK and WORLD_SIZE."""
    try:
        return int(environment.get("RANK", "0")) + 1, int(environment.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise MasaError(f"RANK or WORLD_SIZE is no number ({error}); give --shard I/N") from error


def place_rank(args: argparse.Namespace) -> argparse.Namespace:
    """The options, with the GPU that torchrun's LOCAL_RANK means where none is named."""
    import torch

    plain = {name: value for name, value in vars(args).items() if name != "closing"}  # picklable, for workers
    rank = os.environ.get("LOCAL_RANK")
    if args.device is None and rank is not None and torch.cuda.is_available():
        plain["device"] = f"cuda:{rank}"
    return argparse.Namespace(**plain)


# The options that are a run's settings under another name, or in another sense.
OPTIONS = {"guidance_scale": "guidance"}


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """A run's settings as the command's options give them: what sample, edit and sdedit share."""
    controls = {"controls": build_controls(args)} if "control" in args else {}
    made = {"sampler": build_sampler(args), "guidance": build_guidance(args)}
    used = [*controls.get("controls", ()), *made.values()]
    used.append(getattr(made["guidance"], "within", None))
    check_used(args.set, [value for value in used if value is not None])
    names = [f.name for f in fields(RunSettings) if f.name not in ("source", "target", *made)]
    plain = {name: getattr(args, OPTIONS.get(name, name)) for name in names if OPTIONS.get(name, name) in args}
    pinned = {"pin_source": not args.free_source} if "free_source" in args else {}
    made = {name: with_fields(value, args.set) for name, value in made.items() if value is not None}
    previews = build_preview(args)
    if previews:
        controls = {"controls": [*controls.get("controls", ()), *previews]}
    return {**plain, **pinned, **controls, **made, "progress": not args.quiet}


def size_and_seed(args: argparse.Namespace) -> dict[str, Any]:
    """What every function that samples or inverts takes."""
    return {
        "height": args.height,
        "width": args.width,
        "seed": args.seed,
        "backend": args.backend,
        "progress": not args.quiet,
    }


def choose_folder(out: str | None, names: Sequence[str], overwrite: bool) -> Path:
    """Where to write: `out`, refusing to overwrite unasked, or the next free masa-out/NNNN."""
    if out is None:
        used = [int(p.name) for p in OUT.glob("[0-9]*") if p.name.isdecimal()]
        folder = OUT / f"{max(used, default=0) + 1:04d}"
    else:
        folder = Path(out)
    check_folder(folder, "-o")
    taken = [name for name in names if os.path.lexists(folder / name)]
    if taken and not overwrite:
        raise MasaError(f"{folder} already holds {', '.join(taken)}; give another -o, or --overwrite")
    for name in taken:
        check_free(folder / name, overwrite, "-o")
    return folder


def take_folder(args: argparse.Namespace, names: Sequence[str]) -> Path:
    """The folder of `choose_folder`, the command's alone until it ends; where it stays empty it vanishes again."""
    while True:
        folder = choose_folder(args.out, names, args.overwrite)
        try:
            args.closing.enter_context(reserved(folder, new=args.out is None))
            return folder
        except FileExistsError:
            if args.out is not None:
                raise
            # Another run was faster to take this number.


def save(result: Result, folder: Path, args: argparse.Namespace) -> list[Path]:
    """Save a finished result, elsewhere where the folder does not take it."""
    return or_elsewhere(lambda place: result.save(place, args.overwrite), folder)


def or_elsewhere(write: Callable[[Path], Saved], path: Path) -> Saved:
    """Write what took minutes to make; where that fails, somewhere else. MasaError, which says where, then too."""
    try:
        return write(path)
    except (MasaError, OSError) as error:
        for place in (Path(tempfile.gettempdir()), Path.home()):
            kept = None
            try:
                kept = Path(tempfile.mkdtemp(prefix="masa-", dir=place))
                write(kept / path.name)
            except (MasaError, OSError):
                with suppress(OSError):
                    if kept is not None:
                        kept.rmdir()
                continue
            raise MasaError(f"{error}; what was made is in {kept / path.name} instead") from error
        raise


def report(paths: Sequence[Path], args: argparse.Namespace | None = None) -> None:
    """Say what was written and, of a run without -c, with which model."""
    for path in paths:
        print(path)
    if args is not None and args.checkpoint is None and not args.quiet:
        print(
            "masa: made with the embedded demo model, which knows a small drawn world; -c FILE: another",
            file=sys.stderr,
        )
