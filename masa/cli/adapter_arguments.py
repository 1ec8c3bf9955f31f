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


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Options of three kinds of adapters; for a command without targets, which has the source's alone."""
    group = parser.add_argument_group("layout by a picture (for the targets; without targets, for the source)")
    text = "an adapter's file or folder, or 'demo' for the demo model's, and its picture of lines, poses, depth, ..; "
    text += "several add up"
    group.add_argument("--t2i-adapter", nargs=2, action="append", metavar=("FILE", "PICTURE"), help=text)
    group.add_argument("--adapter-source", metavar="PICTURE", help="the source's picture (default: none)")
    group.add_argument("--adapter-weight", type=float, help="of the adapters' features (default: 1)")
    group.add_argument("--tau", type=float, help="share of the steps, the noisiest, with adapters (default: 1)")
    text = "a ControlNet's file or folder, and its hint picture; several add up"
    group.add_argument("--controlnet", nargs=2, action="append", metavar=("FILE", "PICTURE"), help=text)
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


def build_adapters(args: argparse.Namespace) -> list[Control]:
    """The controls with weights of their own; files are looked for before the model's minutes."""
    controls: list[Control] = []
    chosen = given(weight=args.adapter_weight, tau=args.tau)
    for path, picture in args.t2i_adapter or ():
        check_weights(locate_adapter(path), "T2I-Adapter")
        controls.append(T2IAdapter(path, **pictures(args.target, picture, args.adapter_source), **chosen))
    chosen = given(scale=args.controlnet_scale, start=args.controlnet_start, end=args.controlnet_end)
    for path, picture in args.controlnet or ():
        check_weights(path, "ControlNet")
        shown = pictures(args.target, picture, args.controlnet_source)
        controls.append(ControlNet(path, **shown, **chosen, guess_mode=args.guess_mode))
    chosen = given(scale=args.ip_scale, image_encoder=args.image_encoder)
    for path, picture in args.ip_adapter or ():
        check_weights(path, "IP-Adapter")
        if args.image_encoder is None:
            raise MasaError(f"--ip-adapter {path} sees pictures through CLIP; give its folder as --image-encoder")
        check_weights(args.image_encoder, "image encoder")
        controls.append(IPAdapter(path, **pictures(args.target, picture, args.ip_source), **chosen))
    return controls


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
