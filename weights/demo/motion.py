"""Poses one after the other: a cat or dog that jumps, and one that walks. Each has its exact render."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .between import Between, Pose, Recorder, Stroke
from .canvas import Canvas, Node

STEP = 0.12  # how far a paw reaches before and behind its place, in units of the subject
RAISED = 0.1  # how high it is carried
STANCE = 0.6  # the share of a stride in which a paw is on the ground
# Of the far hind, far front, near hind and near front leg, in the order in which they are drawn: a walk's four beats.
OFFSETS = (0.5, 0.75, 0.0, 0.25)
CROUCH = 0.3  # how far a body sinks towards lying before it leaps
LEAP = (0.2, 0.8)  # the shares of a jump at which paws leave the ground, and are back


@dataclass(frozen=True)
class Stride:
    """A cat or dog at a moment of its walk: phase 0..1 is one stride; the next is like it."""

    phase: float

    def draw(self, canvas: Canvas, draw: Callable[[Canvas, str], None]) -> None:
        """Draws it: one that stands, with its paws moved. draw: draws a named pose. ValueError without four legs."""
        recorder = Recorder()
        draw(recorder, "standing")
        strokes = recorder.strokes
        legs = [i for i, pair in enumerate(pairwise(strokes)) if _is_leg(*pair)]
        if len(legs) != len(OFFSETS):
            raise ValueError(f"a stride moves {len(OFFSETS)} legs, and this subject has {len(legs)}")
        moved = dict(enumerate(strokes))
        for place, offset in zip(legs, OFFSETS, strict=True):
            along, up = paw((self.phase + offset) % 1.0)
            moved[place] = _moved_leg(strokes[place], along, up)
            moved[place + 1] = _moved_paw(strokes[place + 1], along, up)
        for stroke in moved.values():
            getattr(canvas, stroke.method)(*stroke.arguments)


def paw(phase: float) -> tuple[float, float]:
    """Where a paw is, along and up from its place: it stays on the ground while the body passes, then swings ahead."""
    if phase < STANCE:
        return STEP * (1 - 2 * phase / STANCE), 0.0
    swung = (phase - STANCE) / (1 - STANCE)
    return -STEP * math.cos(math.pi * swung), RAISED * math.sin(math.pi * swung)


def walk(frames: int) -> list[Pose]:
    """One stride in so many frames, of which the last leads to the first."""
    return [Stride(i / frames) for i in range(frames)]


def jump(frames: int) -> list[Pose]:
    """One jump on the spot in so many frames, from standing; the last leads to the first."""
    return [_jumping(i / frames) for i in range(frames)]


def _jumping(share: float) -> Pose:
    start, end = LEAP
    if start <= share < end:
        return Between("standing", "jumping", math.sin(math.pi * (share - start) / (end - start)))
    crouched = share / start if share < start else (share - end) / (1 - end)
    return Between("standing", "lying", CROUCH * math.sin(math.pi * crouched))


def _is_leg(stroke: Stroke, after: Stroke) -> bool:
    """Whether a stroke is a limb that ends at the ground, with a paw drawn upon it."""
    joints: Any = stroke.arguments[0]
    return stroke.method == "tube" and after.method == "ellipse" and len(joints) == 3 and joints[-1].v < 0.1


def _moved_leg(leg: Stroke, along: float, up: float) -> Stroke:
    """A leg whose paw has moved; the joint between goes half the way, and further ahead the more it is bent."""
    hip, knee, end = leg.arguments[0]
    knee = Node(knee.u + along / 2 + up / 2, knee.v + up / 2, knee.radius)
    return Stroke(leg.method, ([hip, knee, Node(end.u + along, end.v + up, end.radius)], *leg.arguments[1:]))


def _moved_paw(stroke: Stroke, along: float, up: float) -> Stroke:
    u, v, *others = stroke.arguments
    return Stroke(stroke.method, (u + along, v + up, *others))
