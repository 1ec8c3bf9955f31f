"""The subjects and their poses, drawn from an appearance."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from .between import Pose
from .canvas import Canvas, Colour, Node, mix, shade

POSES: dict[str, tuple[str, ...]] = {
    "cat": ("standing", "sitting", "lying", "jumping"),
    "dog": ("standing", "sitting", "lying", "jumping"),
    "bird": ("standing", "flying", "spreading wings"),
    "person": ("standing", "sitting", "jumping", "running", "raising hands"),
}
SUBJECTS: tuple[str, ...] = tuple(POSES)
# Those that are drawn of the same parts in every pose, so that others lie between two: a flying bird has no legs.
JOINTED: tuple[str, ...] = ("cat", "dog", "person")
PATTERNS: tuple[str, ...] = ("plain", "striped", "spotted")

COLOURS: dict[str, Colour] = {
    "red": (208, 78, 70),
    "orange": (236, 148, 68),
    "yellow": (244, 208, 88),
    "green": (96, 164, 100),
    "blue": (84, 134, 208),
    "purple": (144, 104, 186),
    "pink": (238, 156, 180),
    "brown": (140, 98, 68),
    "black": (58, 56, 66),
    "gray": (148, 150, 160),
    "white": (246, 242, 234),
}
_SKINS: tuple[Colour, ...] = ((250, 216, 188), (232, 184, 146), (190, 134, 98), (128, 88, 66))
_DARK: Colour = (44, 40, 48)
FAR = 0.8  # limbs on the far side are this much darker


@dataclass(frozen=True)
class Appearance:
    """What one individual looks like in every pose; `colour` is the word a caption uses for `body`."""

    subject: str
    colour: str
    body: Colour
    second: Colour  # muzzle, paws and tail tip; a bird's wings; a person's trousers
    pattern: str
    marks: Colour  # the pattern's
    build: float  # 1 is ordinary, above stout
    eyes: Colour
    extra: Colour | None  # a collar, a crest or a hat; None: without
    tipped: bool  # paws and tail tip (cat, dog) in the second colour
    skin: Colour
    hair: Colour


def _distance(a: Colour, b: Colour) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def sample_appearance(rng: random.Random, subject: str, behind: tuple[Colour, ...]) -> Appearance:
    """Draws an individual whose body stands out from the colours `behind` it."""

    def jittered(name: str) -> Colour:
        r, g, b = (max(0, min(255, c + rng.randint(-10, 10))) for c in COLOURS[name])
        return (r, g, b)

    def contrasting(names: list[str], others: tuple[Colour, ...], least: float) -> str:
        fit = [n for n in names if all(_distance(COLOURS[n], o) > least for o in others)]
        return rng.choice(fit or names)

    names = list(COLOURS)
    colour = contrasting(names, behind, 70)
    body = jittered(colour)
    second = jittered(contrasting(names, (body, *behind[-1:]), 95))
    marks = jittered(contrasting(names, (body,), 130))
    pattern = rng.choice(("plain", "plain", "striped", "spotted"))
    return Appearance(
        subject=subject,
        colour=colour,
        body=body,
        second=second,
        pattern=pattern,
        marks=marks,
        build=rng.uniform(0.94, 1.1),
        eyes=rng.choice(((112, 176, 88), (226, 168, 62), (88, 146, 208))),
        extra=jittered(contrasting(names, (body,), 110)) if rng.random() < 0.5 else None,
        tipped=rng.random() < 0.5,
        skin=rng.choice(_SKINS),
        hair=jittered(rng.choice(("black", "brown", "yellow", "orange", "gray"))),
    )


def draw_figure(canvas: Canvas, appearance: Appearance, pose: Pose) -> None:
    """Draws the subject; a pose that it does not know raises ValueError, naming those it does."""
    if not isinstance(pose, str):
        pose.draw(canvas, lambda on, named: draw_figure(on, appearance, named))
        return
    known = POSES[appearance.subject]
    if pose not in known:
        raise ValueError(f"a {appearance.subject} has no pose {pose!r}; it has: {', '.join(known)}")
    _DRAW[appearance.subject](canvas, appearance, pose)


# -- cats and dogs ---------------------------------------------------------------------------------


def _nodes(*triples: tuple[float, float, float], lift: float = 0.0, build: float = 1.0) -> list[Node]:
    return [Node(u, v + lift, r * build) for u, v, r in triples]


# from the root to the tip: along, up, radius
_Joints = tuple[tuple[float, float, float], ...]
_CAT_TAILS: dict[str, _Joints] = {
    "standing": ((-0.34, 0.48, 0.045), (-0.5, 0.54, 0.042), (-0.55, 0.72, 0.042), (-0.47, 0.86, 0.045)),
    "sitting": ((-0.2, 0.1, 0.045), (-0.38, 0.07, 0.045), (-0.52, 0.11, 0.042), (-0.56, 0.25, 0.045)),
    "lying": ((-0.36, 0.12, 0.045), (-0.52, 0.07, 0.045), (-0.62, 0.12, 0.042), (-0.62, 0.25, 0.045)),
    "jumping": ((-0.32, 0.26, 0.045), (-0.46, 0.16, 0.042), (-0.58, 0.12, 0.042), (-0.66, 0.24, 0.045)),
}
_DOG_TAILS: dict[str, _Joints] = {
    "standing": ((-0.34, 0.5, 0.05), (-0.47, 0.6, 0.042), (-0.52, 0.74, 0.036)),
    "sitting": ((-0.24, 0.1, 0.05), (-0.4, 0.08, 0.042), (-0.5, 0.16, 0.036)),
    "lying": ((-0.36, 0.12, 0.05), (-0.5, 0.08, 0.042), (-0.6, 0.13, 0.036)),
    "jumping": ((-0.34, 0.28, 0.05), (-0.47, 0.22, 0.042), (-0.56, 0.22, 0.036)),
}


def _quadruped(c: Canvas, a: Appearance, pose: str) -> None:
    far = shade(a.body, FAR)
    paw = a.second if a.tipped else a.body
    far_paw = shade(paw, FAR)

    def leg(near: bool, *triples: tuple[float, float, float], lift: float = 0.0) -> None:
        c.tube(_nodes(*triples, lift=lift), a.body if near else far)
        u, v, r = triples[-1]
        c.ellipse(u + 0.02, v + lift, r * 1.25, r * 1.02, paw if near else far_paw)

    def tail(*triples: tuple[float, float, float], lift: float = 0.0) -> None:
        nodes = _nodes(*triples, lift=lift)
        c.tube(nodes, far)
        if a.tipped:
            c.circle(nodes[-1].u, nodes[-1].v, nodes[-1].radius * 1.15, a.second)

    def coat(*triples: tuple[float, float, float], lift: float = 0.0) -> None:
        c.coat(_nodes(*triples, lift=lift, build=a.build), a.body, a.pattern, a.marks, marks=5)

    def collar(u0: float, v0: float, u1: float, v1: float) -> None:
        if a.extra:
            c.tube([Node(u0, v0, 0.036), Node(u1, v1, 0.036)], a.extra)

    tails = _DOG_TAILS if a.subject == "dog" else _CAT_TAILS
    if pose == "standing":
        tail(*tails[pose])
        leg(False, (-0.2, 0.36, 0.075), (-0.17, 0.2, 0.06), (-0.17, 0.06, 0.056))
        leg(False, (0.14, 0.36, 0.07), (0.13, 0.2, 0.058), (0.13, 0.06, 0.056))
        coat((-0.26, 0.43, 0.165), (0.0, 0.42, 0.16), (0.22, 0.46, 0.165))
        leg(True, (-0.29, 0.38, 0.1), (-0.3, 0.2, 0.065), (-0.3, 0.06, 0.06))
        leg(True, (0.26, 0.38, 0.085), (0.26, 0.2, 0.062), (0.26, 0.06, 0.06))
        collar(0.2, 0.58, 0.36, 0.47)
        _head(c, a, 0.36, 0.68)
    elif pose == "sitting":
        tail(*tails[pose])
        leg(False, (-0.12, 0.14, 0.075), (0.0, 0.09, 0.06), (0.05, 0.06, 0.056))  # hidden: other poses have four legs
        leg(False, (0.1, 0.38, 0.07), (0.16, 0.2, 0.056), (0.16, 0.06, 0.056))
        coat((-0.13, 0.2, 0.19), (-0.04, 0.36, 0.175), (0.07, 0.54, 0.135))
        leg(True, (-0.12, 0.14, 0.12), (0.0, 0.09, 0.075), (0.05, 0.06, 0.06))
        leg(True, (0.14, 0.42, 0.075), (0.22, 0.22, 0.06), (0.24, 0.06, 0.058))
        collar(-0.02, 0.62, 0.18, 0.58)
        _head(c, a, 0.12, 0.79)
    elif pose == "lying":
        tail(*tails[pose])
        leg(False, (-0.27, 0.12, 0.075), (-0.17, 0.08, 0.06), (-0.06, 0.06, 0.056))  # hidden too
        leg(False, (0.2, 0.12, 0.07), (0.34, 0.08, 0.056), (0.5, 0.065, 0.054))
        coat((-0.26, 0.18, 0.165), (0.0, 0.17, 0.15), (0.2, 0.2, 0.155))
        leg(True, (-0.27, 0.12, 0.11), (-0.17, 0.08, 0.075), (-0.06, 0.06, 0.058))
        leg(True, (0.18, 0.1, 0.07), (0.3, 0.065, 0.058), (0.42, 0.058, 0.057))
        collar(0.18, 0.32, 0.34, 0.22)
        _head(c, a, 0.33, 0.42)
    else:
        up = 0.3
        tail(*tails[pose], lift=up)
        leg(False, (-0.2, 0.26, 0.085), (-0.33, 0.12, 0.06), (-0.44, -0.03, 0.056), lift=up)
        leg(False, (0.2, 0.42, 0.07), (0.35, 0.42, 0.058), (0.49, 0.46, 0.056), lift=up)
        coat((-0.24, 0.27, 0.165), (0.0, 0.37, 0.155), (0.2, 0.49, 0.16), lift=up)
        leg(True, (-0.24, 0.24, 0.105), (-0.3, 0.08, 0.065), (-0.34, -0.1, 0.06), lift=up)
        leg(True, (0.22, 0.42, 0.08), (0.37, 0.35, 0.06), (0.5, 0.3, 0.058), lift=up)
        collar(0.16, 0.63 + up, 0.32, 0.53 + up)
        _head(c, a, 0.31, 0.71 + up)


def _head(c: Canvas, a: Appearance, u: float, v: float) -> None:
    r = 0.19
    inner = mix(a.body, (236, 150, 150), 0.6)
    if a.subject == "cat":
        for side in (-1, 1):
            c.polygon([(u + side * r * 0.98, v + r * 0.2), (u + side * r * 0.2, v + r * 0.85),
                       (u + side * r * 0.86, v + r * 1.5)], a.body)  # fmt: skip
            c.polygon([(u + side * r * 0.82, v + r * 0.5), (u + side * r * 0.45, v + r * 0.85),
                       (u + side * r * 0.78, v + r * 1.2)], inner)  # fmt: skip
    c.ellipse(u, v, r * 1.08, r, a.body)
    if a.subject == "dog":
        ear = a.marks if a.pattern != "plain" else shade(a.body, 0.7)
        c.ellipse(u + r * 0.5, v - r * 0.4, r * 0.66, r * 0.46, a.second)
        c.ellipse(u + r * 0.98, v - r * 0.2, r * 0.24, r * 0.2, _DARK)
        c.ellipse(u - r * 0.85, v - r * 0.05, r * 0.36, r * 0.82, ear, 0.25)
        eyes = (0.02, 0.58)
    else:
        c.ellipse(u + 0.03, v - r * 0.42, r * 0.56, r * 0.4, a.second)
        c.ellipse(u + 0.03, v - r * 0.2, r * 0.17, r * 0.12, (216, 112, 122))
        eyes = (-0.36, 0.56)
    for at in eyes:
        c.circle(u + at * r, v + r * 0.2, r * 0.24, (252, 250, 244) if a.subject == "dog" else a.eyes)
        c.circle(u + at * r + 0.008, v + r * 0.2, r * 0.13, _DARK)


# -- birds -----------------------------------------------------------------------------------------


def _bird(c: Canvas, a: Appearance, pose: str) -> None:
    beak = (238, 164, 62)
    far = shade(a.second, FAR)

    def head(u: float, v: float) -> None:
        r = 0.165
        if a.extra:
            for k in (-0.55, -0.1, 0.35):
                c.polygon([(u + (k - 0.35) * r, v + r * 0.7), (u + (k + 0.35) * r, v + r * 0.7),
                           (u + (k - 0.45) * r, v + r * 1.7)], a.extra)  # fmt: skip
        c.polygon([(u + r * 0.7, v + r * 0.45), (u + r * 0.7, v - r * 0.45), (u + r * 1.85, v - r * 0.1)], beak)
        c.circle(u, v, r, a.body)
        c.circle(u + r * 0.3, v + r * 0.2, r * 0.34, (252, 250, 244))
        c.circle(u + r * 0.38, v + r * 0.2, r * 0.19, _DARK)

    def coat(*triples: tuple[float, float, float]) -> None:
        c.coat(_nodes(*triples, build=a.build), a.body, a.pattern, a.marks, marks=4)

    def legs() -> None:
        for u, colour in ((-0.07, shade(beak, FAR)), (0.07, beak)):
            c.tube([Node(u, 0.28, 0.024), Node(u, 0.04, 0.024)], colour)
            c.tube([Node(u - 0.02, 0.03, 0.024), Node(u + 0.08, 0.03, 0.024)], colour)

    if pose == "flying":
        up = 0.34
        c.blob([(-0.24, 0.46 + up), (-0.62, 0.54 + up), (-0.64, 0.42 + up), (-0.24, 0.34 + up)], far)
        c.blob([(0.12, 0.46 + up), (0.14, 0.68 + up), (0.2, 0.92 + up), (0.0, 0.86 + up), (-0.1, 0.48 + up)], far)
        coat((-0.2, 0.4 + up, 0.14), (0.02, 0.4 + up, 0.17), (0.22, 0.44 + up, 0.14))
        head(0.34, 0.52 + up)
        c.blob([(0.12, 0.42 + up), (0.04, 0.2 + up), (-0.22, -0.02 + up), (-0.34, 0.04 + up), (-0.28, 0.26 + up),
                (-0.16, 0.42 + up)], a.second)  # fmt: skip
        return
    c.blob([(-0.18, 0.46), (-0.54, 0.3), (-0.54, 0.2), (-0.18, 0.3)], far)
    legs()
    if pose == "spreading wings":
        c.blob([(0.08, 0.5), (0.3, 0.62), (0.56, 0.9), (0.6, 0.7), (0.46, 0.5), (0.2, 0.38)], far)
    coat((-0.14, 0.38, 0.17), (0.0, 0.43, 0.19), (0.13, 0.52, 0.16))
    head(0.22, 0.7)
    if pose == "spreading wings":
        c.blob([(0.06, 0.5), (-0.14, 0.68), (-0.46, 0.98), (-0.56, 0.8), (-0.46, 0.58), (-0.3, 0.44), (-0.06, 0.37)],
               a.second)  # fmt: skip
    else:
        c.ellipse(-0.1, 0.42, 0.25, 0.12, a.second, 0.35)


# -- people ----------------------------------------------------------------------------------------

_Limb = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
# per pose: hip, neck, far arm, near arm, far leg, near leg, lift
_SKELETONS: dict[str, tuple[tuple[float, float], tuple[float, float], _Limb, _Limb, _Limb, _Limb, float]] = {
    "standing": (
        (0.0, 0.38), (0.0, 0.68),
        ((-0.14, 0.64), (-0.21, 0.5), (-0.22, 0.36)), ((0.14, 0.64), (0.21, 0.5), (0.22, 0.36)),
        ((-0.08, 0.34), (-0.09, 0.2), (-0.09, 0.05)), ((0.08, 0.34), (0.09, 0.2), (0.09, 0.05)), 0.0,
    ),
    "raising hands": (
        (0.0, 0.38), (0.0, 0.68),
        ((-0.14, 0.64), (-0.27, 0.78), (-0.29, 0.98)), ((0.14, 0.64), (0.27, 0.78), (0.29, 0.98)),
        ((-0.08, 0.34), (-0.1, 0.2), (-0.11, 0.05)), ((0.08, 0.34), (0.1, 0.2), (0.11, 0.05)), 0.0,
    ),
    "sitting": (
        (-0.1, 0.14), (-0.12, 0.44),
        ((-0.22, 0.4), (-0.31, 0.26), (-0.3, 0.1)), ((0.0, 0.4), (0.12, 0.3), (0.24, 0.24)),
        ((-0.05, 0.13), (0.18, 0.18), (0.44, 0.07)), ((-0.04, 0.1), (0.18, 0.1), (0.4, 0.06)), 0.0,
    ),
    "running": (
        (-0.02, 0.42), (0.07, 0.7),
        ((-0.04, 0.65), (-0.2, 0.56), (-0.26, 0.7)), ((0.18, 0.65), (0.3, 0.52), (0.43, 0.64)),
        ((-0.06, 0.38), (-0.16, 0.22), (-0.4, 0.22)), ((0.06, 0.38), (0.26, 0.34), (0.28, 0.1)), 0.0,
    ),
    "jumping": (
        (0.0, 0.38), (0.0, 0.68),
        ((-0.14, 0.64), (-0.3, 0.7), (-0.42, 0.86)), ((0.14, 0.64), (0.3, 0.7), (0.42, 0.86)),
        ((-0.08, 0.35), (-0.25, 0.28), (-0.24, 0.09)), ((0.08, 0.35), (0.25, 0.28), (0.24, 0.09)), 0.18,
    ),
}  # fmt: skip


def _person(c: Canvas, a: Appearance, pose: str) -> None:
    hip, neck, far_arm, near_arm, far_leg, near_leg, lift = _SKELETONS[pose]
    shoe = (86, 70, 74)

    def limb(points: _Limb, radius: float, colour: Colour) -> None:
        c.tube([Node(u, v + lift, radius * a.build) for u, v in points], colour)

    for points, tone in ((far_leg, FAR), (near_leg, 1.0)):
        limb(points, 0.068, shade(a.second, tone))
        u, v = points[-1]
        toe = (u + 0.02, v + 0.07) if pose == "sitting" else (u + 0.055, v)
        c.tube([Node(u, v + lift, 0.045), Node(toe[0], toe[1] + lift, 0.045)], shade(shoe, tone))
    limb(far_arm, 0.05, shade(a.body, FAR))
    c.circle(far_arm[-1][0], far_arm[-1][1] + lift, 0.058, shade(a.skin, 0.92))
    middle = ((hip[0] + neck[0]) / 2, (hip[1] + neck[1]) / 2)
    c.coat(
        _nodes((*hip, 0.145), (*middle, 0.14), (neck[0], neck[1] - 0.06, 0.145), lift=lift, build=a.build),
        a.body, a.pattern, a.marks, marks=3,
    )  # fmt: skip
    limb(near_arm, 0.052, shade(a.body, 0.9))
    c.circle(near_arm[-1][0], near_arm[-1][1] + lift, 0.06, a.skin)
    u, v = neck[0] + (neck[0] - hip[0]) * 0.4, neck[1] + 0.17 + lift
    c.circle(u - 0.015, v + 0.02, 0.172, a.hair)
    c.circle(u + 0.025, v - 0.015, 0.148, a.skin)
    for at in (0.0, 0.11):
        c.circle(u + at, v, 0.024, _DARK)
    c.tube([Node(u + 0.03, v - 0.078, 0.011), Node(u + 0.09, v - 0.078, 0.011)], (190, 92, 88))
    if a.extra:
        c.ellipse(u + 0.02, v + 0.09, 0.24, 0.035, shade(a.extra, 0.88))
        c.blob([(u - 0.15, v + 0.09), (u - 0.12, v + 0.22), (u + 0.01, v + 0.26), (u + 0.13, v + 0.21),
                (u + 0.16, v + 0.09)], a.extra)  # fmt: skip


_DRAW: dict[str, Callable[[Canvas, Appearance, str], None]] = {
    "cat": _quadruped,
    "dog": _quadruped,
    "bird": _bird,
    "person": _person,
}
