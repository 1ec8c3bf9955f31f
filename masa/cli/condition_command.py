"""`masa condition`: pictures of edges, sketches, poses, depth, segments and colours."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from masa.cli.adapter_arguments import given
from masa.errors import MasaError
from masa.io import condition_pictures
from masa.io.files import check_free, replacing

# Kinds, and the options that each reads.
KINDS: Mapping[str, tuple[str, ...]] = {
    "canny": ("low", "high", "short_side"),
    "sketch": ("threshold", "drawing", "short_side"),
    "openpose": ("height", "width"),
    "keypose": ("height", "width"),
    "depth": ("near_is_dark",),
    "seg": (),
    "color": ("short_side",),
}
POSES = ("openpose", "keypose")


def add_condition(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, help="what the adapter or ControlNet reads")
    parser.add_argument("picture", help="a photograph (canny, sketch, color), a map (depth, seg), or joints as JSON")
    group = parser.add_argument_group("how it is made")
    group.add_argument("--low", type=float, help="canny: edges are followed above this (default: 100)")
    group.add_argument("--high", type=float, help="canny: from where they are above this (default: 200)")
    group.add_argument("--threshold", type=float, help="sketch: 0 to 1, lower draws more (default: 0.3)")
    text = "sketch: the picture is a drawing, or not (default: one with few greys)"
    group.add_argument("--drawing", action=argparse.BooleanOptionalAction, help=text)
    text = "scale larger photographs down to this; 0: never (default: 512)"
    group.add_argument("--short-side", type=int, metavar="PIXELS", help=text)
    group.add_argument("--height", type=int, help="poses: of the picture (default: 512)")
    group.add_argument("--width", type=int, help="poses: of the picture (default: 512)")
    group.add_argument("--near-is-dark", action="store_true", default=None, help="depth: turn the map over")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", help="the file to write (default: the kind's name and .png)")
    group.add_argument("--overwrite", action="store_true", help="replace a file that is already there")


def run_condition(args: argparse.Namespace) -> None:
    """Make the picture, write it, print its path."""
    out = Path(args.out or f"{args.kind}.png")
    if out.suffix.lower() != ".png":
        raise MasaError(f"-o {out} must end in .png: other formats blur lines and colours")
    options = sorted({option for some in KINDS.values() for option in some})
    chosen = given(**{option: getattr(args, option) for option in options})
    for option in chosen:
        if option not in KINDS[args.kind]:
            readers = [kind for kind, some in KINDS.items() if option in some]
            flag = option.replace("_", "-")
            raise MasaError(f"--{flag} has no meaning for {args.kind}; it is of {' and '.join(readers)}")
    if chosen.get("short_side") == 0:
        chosen["short_side"] = None
    check_free(out, args.overwrite, "-o")
    make: Callable[..., Any] = getattr(condition_pictures, args.kind)
    shown = read_joints(args.picture) if args.kind in POSES else args.picture
    picture = make(shown, **chosen)
    with replacing(out) as temporary:
        picture.save(temporary)
    print(out)


def read_joints(path: str) -> Any:
    """Joints from a JSON file: a person's list, several such lists, or what OpenPose writes. MasaError for others."""
    try:
        joints = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise MasaError(f"{path} is not JSON ({error}); expected a list of joints, each [x, y] or null") from error
    if not isinstance(joints, dict):
        return joints
    people = joints.get("people")
    flat = [person.get("pose_keypoints_2d") for person in people] if isinstance(people, list) else []
    if not flat or not all(isinstance(person, list) and len(person) % 3 == 0 for person in flat):
        raise MasaError(f"{path} holds no list of joints, and no people with pose_keypoints_2d as OpenPose writes them")
    # x, y and how sure the detector is; 0 for a joint that it did not see.
    return [[p[i : i + 2] if p[i + 2] else None for i in range(0, len(p), 3)] for p in flat]
