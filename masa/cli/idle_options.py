"""Options of the command line that would do nothing where they stand: refused by name, before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from masa.cli.adapter_arguments import ADAPTER_OPTIONS, CONTROLNET_OPTIONS, IP_OPTIONS
from masa.errors import MasaError
from masa.samplers import NAMES
from masa.settings import KINDS
from masa.workflows.sheets import parameters_of

# Options that only some controls read; they are None, or False, where they are not given.
OWNERS: Mapping[str, tuple[str, ...]] = {
    "start_step": ("masactrl", "style"),
    "start_layer": ("masactrl", "style"),
    "control_steps": ("masactrl", "style"),
    "control_layers": ("masactrl", "style"),
    "words": ("masactrl",),
    "threshold": ("masactrl",),
    "masks": ("masactrl",),
    "union": ("masactrl",),
    "source_weight": ("masactrl",),
    "p2p_edit": ("prompt-to-prompt",),
    "reweight": ("prompt-to-prompt",),
    "cross_steps": ("prompt-to-prompt",),
    "self_steps": ("prompt-to-prompt",),
    "feature_steps": ("plug-and-play",),
    "attention_steps": ("plug-and-play",),
}

# Options that bring a control of their own.
CONTROLS_BESIDE = ("local_blend", "blend", "t2i_adapter", "controlnet", "ip_adapter")

# A sweep's own options, and the parameter that each fixes.
FIXED = {
    "start_step": "start_step",
    "start_layer": "start_layer",
    "guidance": "guidance_scale",
    "seed": "seed",
    "steps": "steps",
}


# Inversions that read such an option whatever a sweep varies.
FITTED = {"guidance": ("null-text",), "seed": ("edit-friendly", "noise")}


def refuse_idle(args: argparse.Namespace) -> None:
    """MasaError for an option of this command that nothing would read, with its value and the remedy."""
    checks: Mapping[str, tuple[Callable[[argparse.Namespace], None], ...]] = {
        "sample": (check_controls, check_adapters, check_source, check_guided, check_eta),
        "edit": (check_controls, check_adapters, check_inversion, check_guided, check_eta),
        "video": (check_controls, check_video, check_guided, check_eta),
        "invert": (check_adapters, check_inversion, check_fitting),
        "sdedit": (check_guided,),
        "sweep": (check_sweep,),
        "piebench": (check_piebench,),
    }
    for check in checks.get(args.command, ()):
        check(args)


def check_controls(args: argparse.Namespace) -> None:
    """Options of controls that are not in use, or that others of the same control leave without a say."""
    names = ["masactrl"] if args.control is None else args.control
    alone = all(not getattr(KINDS.get(name), "needs_targets", True) for name in names)  # those serve a source too
    for option in ("control", *OWNERS):
        if is_given(args, option) and not args.target and not (option == "control" and alone):
            raise MasaError(
                f"{shown(args, option)} is about targets, and there are none; give a target, or leave it out"
            )
    for option, owners in OWNERS.items():
        if is_given(args, option) and not set(owners) & set(names):
            whose = " or ".join(f"{owner}'s" for owner in owners)
            raise MasaError(f"{shown(args, option)} is {whose}, which is not in use; add it to --control")
    refuse(args, "start_step", args.control_steps is not None, "--control-steps lists the steps; leave one out")
    refuse(args, "start_layer", args.control_layers is not None, "--control-layers lists the layers; leave one out")
    refuse(args, "threshold", not args.words, "it is of the maps of --words; give these too")
    refuse(args, "source_weight", not args.union, "it is of the source in a union; add --union")
    only_weights = args.p2p_edit == "none" and not args.reweight
    refuse(args, "cross_steps", only_weights, "--p2p-edit none changes only what --reweight names; add it")


def check_video(args: argparse.Namespace) -> None:
    """Options of adapters, of an inversion and of a real source where there are none."""
    check_adapter_options(args)
    refuse(args, "fps", bool(args.out) and not Path(args.out).suffix, f"-o {args.out} is a folder of pictures")
    for option in ("method", "invert_guidance", "inner_steps"):
        refuse(args, option, args.image is None, "it inverts a picture; give --image")
    real = args.image is not None or args.trajectory is not None
    refuse(args, "free_source", not real, "only a real source is pinned; give --image or --trajectory")
    if args.image is not None:
        check_inversion(args)


def check_adapters(args: argparse.Namespace) -> None:
    """Options of adapters where there are none, and a source's picture where it has the only one."""
    check_adapter_options(args)
    for option in ("adapter_source", "controlnet_source", "ip_source"):
        alone = not getattr(args, "target", ())
        refuse(args, option, alone, "without targets the first picture is the source's; give a target")


def check_adapter_options(args: argparse.Namespace) -> None:
    for option in ADAPTER_OPTIONS:
        refuse(args, option, not args.t2i_adapter, "it is a T2I-Adapter's; give --t2i-adapter FILE PICTURE")
    for option in CONTROLNET_OPTIONS:
        refuse(args, option, not args.controlnet, "it is a ControlNet's; give --controlnet FILE PICTURE")
    for option in IP_OPTIONS:
        refuse(args, option, not args.ip_adapter, "it is an IP-Adapter's; give --ip-adapter FILE PICTURE")


def check_source(args: argparse.Namespace) -> None:
    reason = "only a real source is pinned; give its --trajectory"
    refuse(args, "free_source", args.trajectory is None, reason)
    refuse(args, "targets_at_once", not args.target, "there is no target; give one")


def check_guided(args: argparse.Namespace) -> None:
    # An edit-friendly source that was inverted under guidance is replayed under guidance; a trajectory may be one.
    replayed = getattr(args, "method", None) == "edit-friendly" and (args.invert_guidance or 1.0) > 1.0
    off = args.guidance <= 1.0 and getattr(args, "trajectory", None) is None and not replayed
    if args.guidance <= 1.0:
        for option in ("guidance_rescale", "guidance_interval", "guidance_rule"):
            refuse(args, option, True, f"--guidance {args.guidance:g} switches guidance off; raise it above 1")
    refuse(args, "negative_prompt", off, f"--guidance {args.guidance:g} switches guidance off; raise it above 1")


def check_eta(args: argparse.Namespace) -> None:
    name = "ddim" if args.sampler is None else args.sampler
    reads = getattr(NAMES.get(name, KINDS.get(name)), "takes_eta", False)
    refuse(args, "eta", args.eta != 0.0 and not reads, f"it is DDIM's, and --sampler is {name}; leave one out")


def check_inversion(args: argparse.Namespace) -> None:
    """Guidance of an inversion whose two halves have one prompt, or that predicts nothing."""
    prompt, flag = (args.prompt, "--prompt") if args.command == "invert" else (args.source, "--source")
    unread = args.method in ("noise", "negative-prompt")
    refuse(args, "invert_guidance", unread, f"--method {args.method} does not read it; use another method")
    guided = args.invert_guidance != 1.0  # the default, said aloud, does no harm
    refuse(args, "invert_guidance", guided and not prompt, f"it guides towards the picture's own prompt; give {flag}")
    refuse(args, "inner_steps", args.method != "null-text", "only --method null-text fits in inner steps")


def check_fitting(args: argparse.Namespace) -> None:
    refuse(args, "edit_guidance", args.method != "null-text", "only --method null-text fits to it")


def check_piebench(args: argparse.Namespace) -> None:
    """Options of edits where the pictures were made elsewhere; of controls as for an edit."""
    made = args.pictures is not None
    for option in ("method", "inverter", "steps", "guidance", "seed", "checkpoint", "control"):
        refuse(args, option, made, "the results of --pictures were made already; leave one out")
    if names_controls(args):
        refuse(args, "pictures", True, "controls make edits, and these were made already; leave one out")
        check_controls(args)
        check_adapters(args)


def names_controls(args: argparse.Namespace) -> bool:
    """Whether an option says which controls to use; an empty list of them says so too."""
    options = (*OWNERS, *CONTROLS_BESIDE, *ADAPTER_OPTIONS, *CONTROLNET_OPTIONS, *IP_OPTIONS)
    return args.control is not None or any(is_given(args, option) for option in options)


def check_sweep(args: argparse.Namespace) -> None:
    refuse(args, "method", args.image is None, "it inverts a picture; give --image")
    for option in ("start_step", "start_layer"):
        reason = f"it is MasaCtrl's, and --control {args.control} is swept; use --set"
        refuse(args, option, args.control != "MasaCtrl", reason)
    known = parameters_of(KINDS[args.control])
    for name in (args.rows[0], args.columns[0]):
        if name not in known:
            raise MasaError(f"a sweep of {args.control} cannot vary {name!r}; expected one of {', '.join(known)}")
    for flag, (name, _) in (("--rows", args.rows), ("--columns", args.columns)):
        for option, parameter in FIXED.items():
            idle = parameter == name and args.method not in FITTED.get(option, ())
            refuse(args, option, idle, f"{flag} varies {name}; leave one out")
        refuse(args, "start_layer", name == "layers", f"{flag} lists the layers; leave one out")


def refuse(args: argparse.Namespace, option: str, idle: bool, reason: str) -> None:
    if idle and is_given(args, option):
        raise MasaError(f"{shown(args, option)} would do nothing: {reason}")


def is_given(args: argparse.Namespace, option: str) -> bool:
    value = getattr(args, option)
    return value is not None and value is not False and value not in ("", [])


def shown(args: argparse.Namespace, option: str) -> str:
    """An option as it was given: "--start-step 4"."""
    flag, value = f"--{option.replace('_', '-')}", getattr(args, option)
    return flag if value is True else f"{flag} {as_text(value)}"


def as_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={item:g}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(value) if all(isinstance(item, str) for item in value) else ",".join(map(str, value))
    return str(value)
