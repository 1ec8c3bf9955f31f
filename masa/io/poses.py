"""Poses drawn from lists of joints, in the colours that adapters and ControlNets were trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from masa.errors import MasaError

# [x, y] in pixels from the upper left corner, or None for a joint that is not seen.
Joint = Sequence[float] | None
Person = Sequence[Joint] | np.ndarray
Joints = Sequence[Person] | Person

OPENPOSE_JOINTS = (
    *("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist"),
    *("right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle"),
    *("right eye", "left eye", "right ear", "left ear"),
)
KEYPOSE_JOINTS = (
    *("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow"),
    *("right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee"),
    *("left ankle", "right ankle"),
)

# Joints that a limb links, counted from 0, in the order of drawing. Limb k and joint k have colour k.
OPENPOSE_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
OPENPOSE_COLOURS = (
    *("ff0000", "ff5500", "ffaa00", "ffff00", "aaff00", "55ff00", "00ff00", "00ff55", "00ffaa"),
    *("00ffff", "00aaff", "0055ff", "0000ff", "5500ff", "aa00ff", "ff00ff", "ff00aa", "ff0055"),
)
OPENPOSE_OPACITY = 0.6  # of limbs over what is below
KEYPOSE_LIMBS = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),
    *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)
MIDDLE, LEFT, RIGHT = "ff9933", "00ff00", "0080ff"
TRAINED_SIDE = 512  # of the pictures whose lines have the published widths
LARGEST_SIDE = 8192


def openpose(joints: Joints, height: int = 512, width: int = 512) -> Image.Image:
    """OpenPose's skeletons, for openpose adapters and ControlNets: (height, width) pixels, RGB on black.

    joints: of one person or several, each a list of 18: nose, neck, right shoulder, elbow, wrist, left shoulder, elbow,
    wrist, right hip, knee, ankle, left hip, knee, ankle, right eye, left eye, right ear, left ear; [x, y] in pixels
    from the upper left, None for one that is not seen: what it links to is left out. Right and left are the person's.
    Lists, or arrays (18, 2) or (n, 18, 2). height, width: 8 to 8192. Discs and limbs are 4 pixels in radius where the
    short side has 512, and in proportion.

    MasaError for another size or number of joints, and one that is no point of the picture. The drawing of 2302.05543's
    code, colours and order; edges of shapes differ by a pixel.
    """
    canvas = _canvas(height, width)
    radius = 4.0 * min(height, width) / TRAINED_SIDE
    people = _people("openpose", joints, OPENPOSE_JOINTS, height, width)
    colours = [_rgb(colour) for colour in OPENPOSE_COLOURS]
    for person in people:
        for joint, colour in zip(person, colours, strict=True):
            if joint is not None:
                canvas[_disc(canvas, joint, radius)] = colour
    for (one, other), colour in zip(OPENPOSE_LIMBS, colours, strict=False):
        for person in people:
            a, b = person[one], person[other]
            if a is not None and b is not None:
                inside = _ellipse(canvas, a, b, radius)
                canvas[inside] = (1.0 - OPENPOSE_OPACITY) * canvas[inside] + OPENPOSE_OPACITY * np.array(colour)
    return _picture(canvas)


def keypose(joints: Joints, height: int = 512, width: int = 512) -> Image.Image:
    """COCO's skeletons, for the keypose adapter: (height, width) pixels, RGB on black.

    joints: of one person or several, each a list of COCO's 17: nose, left eye, right eye, left ear, right ear, left
    shoulder, right shoulder, elbows, wrists, hips, knees, ankles, the left one first; [x, y] or None as in `openpose`.
    Lines are 2 pixels wide, joints 2 in radius, where the short side has 512, and in proportion.

    MasaError for another size or number of joints, and one that is no point of the picture. The drawing of
    T2I-Adapter's code (2302.08453), whose colours are those of its pictures as read in RGB.
    """
    canvas = _canvas(height, width)
    scale = min(height, width) / TRAINED_SIDE
    for person in _people("keypose", joints, KEYPOSE_JOINTS, height, width):
        for one, other in KEYPOSE_LIMBS:
            a, b = person[one], person[other]
            if a is not None and b is not None:
                canvas[_stroke(canvas, a, b, scale)] = _rgb(_keypose_limb(one, other))
        for number, joint in enumerate(person):
            if joint is not None:
                canvas[_disc(canvas, joint, 2.0 * scale)] = _rgb(_keypose_joint(number))
    return _picture(canvas)


def _keypose_joint(number: int) -> str:
    """The colour of a joint: the head has one, below it left and right."""
    return MIDDLE if number < 5 else LEFT if number % 2 else RIGHT


def _keypose_limb(one: int, other: int) -> str:
    """That of its ends where these agree, in arms and legs; the trunk's is the head's."""
    colours = {_keypose_joint(one), _keypose_joint(other)}
    in_trunk = {one, other} <= {5, 6, 11, 12}
    return MIDDLE if in_trunk or len(colours) > 1 else colours.pop()


def _people(
    name: str, joints: Joints, names: Sequence[str], height: int, width: int
) -> list[list[tuple[float, float] | None]]:
    """One person or several as several, each joint checked."""
    joints = _plain(joints)
    if not isinstance(joints, list) or not joints:
        raise MasaError(
            f"{name} joints are {joints!r}; expected a list of {len(names)} joints, or of several such lists"
        )
    people = joints if all(_is_person(one) for one in joints) else [joints]
    found = []
    for person in people:
        if len(person) != len(names):
            raise MasaError(f"{name} has a person of {len(person)} joints; expected {len(names)}: {', '.join(names)}")
        found.append([_point(name, joint, names[i], height, width) for i, joint in enumerate(person)])
    seen = [value for person in found for joint in person if joint is not None for value in joint]
    if len(seen) > 2 and max(seen) <= 1.0:
        raise MasaError(
            f"{name} joints lie all within 1 pixel; expected pixels: multiply fractions by width and height"
        )
    if not seen:
        raise MasaError(f"{name} joints are all None; give those that are seen")
    return found


def _point(name: str, joint: Joint, which: str, height: int, width: int) -> tuple[float, float] | None:
    if joint is None:
        return None
    if not _is_point(joint):
        raise MasaError(f"{name}: the {which} is {joint!r}; expected [x, y] in pixels, or None")
    x, y = float(joint[0]), float(joint[1])
    if not (0.0 <= x <= width and 0.0 <= y <= height):
        raise MasaError(
            f"{name}: the {which} is at ({x:g}, {y:g}), outside a picture {width} wide and {height} high; give None "
            "for a joint that is not seen"
        )
    return x, y


def _plain(joints: Any) -> Any:
    """Lists in the place of arrays, which may be in lists."""
    if isinstance(joints, np.ndarray):
        return joints.tolist()
    return [_plain(one) for one in joints] if isinstance(joints, list | tuple) else joints


def _is_person(given: object) -> bool:
    """Whether it is a list of joints, good or bad, and not a joint."""
    return isinstance(given, list) and all(joint is None or isinstance(joint, list) for joint in given)


def _is_point(joint: object) -> bool:
    if not isinstance(joint, list) or len(joint) != 2:
        return False
    numbers = all(isinstance(value, Real) and not isinstance(value, bool) for value in joint)
    return numbers and all(abs(value) <= sys.float_info.max for value in joint)


def _canvas(height: int, width: int) -> np.ndarray:
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int) or isinstance(side, bool) or not 8 <= side <= LARGEST_SIDE:
            raise MasaError(f"{name} is {side!r}; expected pixels, 8 to {LARGEST_SIDE}")
    return np.zeros((height, width, 3))


def _picture(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray(canvas.round().astype(np.uint8))


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour))


def _offsets(canvas: np.ndarray, centre: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel lies right of, and below, a point."""
    rows, columns = np.mgrid[: canvas.shape[0], : canvas.shape[1]]
    return columns - centre[0], rows - centre[1]


def _disc(canvas: np.ndarray, centre: Sequence[float], radius: float) -> np.ndarray:
    x, y = _offsets(canvas, centre)
    return x**2 + y**2 <= (radius + 0.5) ** 2


def _ellipse(canvas: np.ndarray, a: Sequence[float], b: Sequence[float], half_width: float) -> np.ndarray:
    """Between two points: half as long as they are apart, and `half_width` wide, from its middle."""
    x, y = _offsets(canvas, [(p + q) / 2 for p, q in zip(a, b, strict=True)])
    along = np.array([b[0] - a[0], b[1] - a[1]], dtype=float)
    length = max(float(np.hypot(*along)), 1e-6)
    u, v = along / length
    # Half a pixel more: shapes are filled with the pixels on their border.
    long, wide = length / 2 + 0.5, half_width + 0.5
    return ((x * u + y * v) / long) ** 2 + ((y * u - x * v) / wide) ** 2 <= 1.0


def _stroke(canvas: np.ndarray, a: Sequence[float], b: Sequence[float], half_width: float) -> np.ndarray:
    """A line between two points."""
    x, y = _offsets(canvas, a)
    along = np.array([b[0] - a[0], b[1] - a[1]], dtype=float)
    share = np.clip((x * along[0] + y * along[1]) / max(float(along @ along), 1e-12), 0.0, 1.0)
    return np.hypot(x - share * along[0], y - share * along[1]) <= max(half_width, 0.71)
