"""T2I-Adapters, ControlNets and IP-Adapters on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from masa.controls.base import Control
from masa.controls.controlnet import ControlNet
from masa.controls.ip_adapter import IPAdapter
from masa.controls.t2i_adapter import T2IAdapter
from masa.errors import MasaError
from masa.io.pictures import open_picture
from masa.runtime.adapters import locate_adapter

# Options that only one of the three reads.
ADAPTER_OPTIONS = ("adapter_source", "adapter_weight", "tau")
CONTROLNET_OPTIONS = ("controlnet_source", "controlnet_scale", "controlnet_start", "controlnet_end", "guess_mode")
IP_OPTIONS = ("ip_source", "ip_scale", "image_encoder")


def add_adapters(parser: argparse.ArgumentParser, frames: bool = False) -> None:
    """Options of three kinds of adapters; for a command without targets, which has the source's alone.

    frames: of a video, whose layout is a set of pictures, by default the command's own.
    """
    about = "of each frame" if frames else "by a picture (for the targets; without targets, for the source)"
    group = parser.add_argument_group(f"layout {about}")
    shape: dict[str, Any] = {"nargs": 2, "metavar": ("FILE", "PICTURE")}
    shown = "and its picture of lines, poses, depth, .."
    if frames:
        shape = {"nargs": "+", "action": FileAndConditions, "metavar": ("FILE", "CONDITIONS")}
        shown = "and its own conditions (default: CONDITIONS above)"
    shape = {"action": "append"} | shape
    text = f"an adapter's file or folder, or 'demo' for the demo model's, {shown}; several add up"
    group.add_argument("--t2i-adapter", **shape, help=text)
    group.add_argument("--adapter-source", metavar="PICTURE", help="the source's picture (default: none)")
    group.add_argument("--adapter-weight", type=float, help="of the adapters' features (default: 1)")
    group.add_argument("--tau", type=float, help="share of the steps, the noisiest, with adapters (default: 1)")
    text = f"a ControlNet's file or folder, {shown if frames else 'and its hint picture'}; several add up"
    group.add_argument("--controlnet", **shape, help=text)
    group.add_argument("--controlnet-source", metavar="PICTURE", help="the source's hint (default: none)")
    group.add_argument("--controlnet-scale", type=float, help="of the ControlNets' residuals (default: 1)")
    group.add_argument("--controlnet-start", type=float, help="share of the steps before they act (default: 0)")
    group.add_argument("--controlnet-end", type=float, help="share of the steps after which they do not (default: 1)")
    group.add_argument("--guess-mode", action="store_true", help="ControlNets steer the prompted half alone")

    group = parser.add_argument_group("a picture as a prompt (for the targets; without targets, for the source)")
    text = "an IP-Adapter's file, and its picture; several add up"
    group.add_argument("--ip-adapter", nargs=2, action="append", metavar=("FILE", "PICTURE"), help=text)
    group.add_argument("--ip-source", metavar="PICTURE", help="the source's picture (default: none)")
    group.add_argument("--ip-scale", type=float, help="of what IP-Adapters add (default: 1; 0.5 beside a prompt)")
    group.add_argument("--image-encoder", metavar="FOLDER", help="CLIP ViT-H/14, which transformers reads")


class FileAndConditions(argparse.Action):
    """Takes a file, and what may follow it: one set of conditions."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if len(values) > 2:
            parser.error(f"argument {option}: expected FILE, or FILE CONDITIONS, and got {' '.join(values)}")
        several = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*several, (values[0], values[1] if len(values) > 1 else None)])


def build_adapters(args: argparse.Namespace) -> list[Control]:
    """The controls with weights of their own; files are looked for before the model's minutes."""
    controls: list[Control] = []
    if args.command != "video":
        for build, given_files, source in (
            (build_t2i_adapter, args.t2i_adapter, args.adapter_source),
            (build_controlnet, args.controlnet, args.controlnet_source),
        ):
            for path, picture in given_files or ():
                controls.append(build(args, path, **pictures(args.target, picture, source)))
    chosen = given(scale=args.ip_scale, image_encoder=args.image_encoder)
    for path, picture in args.ip_adapter or ():
        check_weights(path, "IP-Adapter")
        if args.image_encoder is None:
            raise MasaError(f"--ip-adapter {path} sees pictures through CLIP; give its folder as --image-encoder")
        check_weights(args.image_encoder, "image encoder")
        controls.append(IPAdapter(path, **pictures(args.target, picture, args.ip_source), **chosen))
    return controls


def build_t2i_adapter(args: argparse.Namespace, path: str, **shown: Any) -> Control:
    """A T2IAdapter of a file, as the options describe it."""
    check_weights(locate_adapter(path), "T2I-Adapter")
    return T2IAdapter(path, **shown, **given(weight=args.adapter_weight, tau=args.tau))


def build_controlnet(args: argparse.Namespace, path: str, **shown: Any) -> Control:
    """A ControlNet of a file, as the options describe it."""
    check_weights(path, "ControlNet")
    chosen = given(scale=args.controlnet_scale, start=args.controlnet_start, end=args.controlnet_end)
    return ControlNet(path, **shown, **chosen, guess_mode=args.guess_mode)


def build_frame_adapters(args: argparse.Namespace) -> tuple[list[Control], list[str]]:
    """A video's adapters, and the conditions of each."""
    adapters: list[Control] = []
    conditions: list[str] = []
    for build, given_files, source in (
        (build_t2i_adapter, args.t2i_adapter, args.adapter_source),
        (build_controlnet, args.controlnet, args.controlnet_source),
    ):
        if source is not None:
            open_picture(source)
        for path, own in given_files or ():
            adapters.append(build(args, path, source=source))
            conditions.append(own or args.conditions)
    if not adapters:
        raise MasaError("frames get their layout from an adapter; give --t2i-adapter FILE or --controlnet FILE")
    if args.conditions not in conditions:
        raise MasaError(f"{args.conditions} would do nothing: every adapter has conditions of its own; leave one's out")
    return adapters, conditions


def check_weights(path: str | Path, what: str) -> None:
    """MasaError, before the model's minutes, where nothing is."""
    if not Path(path).exists():
        raise MasaError(f"no {what} at {path}; give the path of a .safetensors file, or of a diffusers folder")


def pictures(target: Sequence[str], picture: str, source: str | None) -> dict[str, Any]:
    """Whose picture is whose: without targets, the source's."""
    for path in (picture, source):
        if path is not None:
            open_picture(path)
    return {"source": source, "target": picture} if target else {"source": picture}


def given(**options: Any) -> dict[str, Any]:
    """The arguments that the command line was given; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}
