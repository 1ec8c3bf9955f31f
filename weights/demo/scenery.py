"""Places: sky, ground and what stands in them, drawn behind the subject."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from .canvas import SUPERSAMPLE, Colour, mix, shade

Kind = Literal["grass", "beach", "snow", "room", "night"]
KINDS: tuple[Kind, ...] = ("grass", "beach", "snow", "room", "night")

# per kind: choices of (sky top, sky at the horizon, ground)
_PALETTES: dict[Kind, tuple[tuple[Colour, Colour, Colour], ...]] = {
    "grass": (
        ((120, 182, 232), (214, 234, 244), (134, 182, 104)),
        ((150, 200, 236), (246, 236, 216), (156, 190, 98)),
        ((236, 172, 142), (252, 226, 188), (138, 160, 92)),
    ),
    "beach": (
        ((128, 194, 236), (222, 240, 246), (236, 214, 166)),
        ((242, 178, 132), (252, 226, 178), (230, 202, 152)),
    ),
    "snow": (
        ((168, 194, 224), (224, 232, 242), (240, 244, 250)),
        ((190, 186, 218), (244, 226, 230), (232, 236, 248)),
    ),
    "room": (
        ((232, 214, 184), (222, 200, 168), (166, 122, 88)),
        ((184, 208, 206), (170, 196, 194), (154, 116, 86)),
        ((222, 190, 190), (210, 176, 178), (150, 108, 82)),
        ((196, 200, 224), (182, 188, 214), (170, 132, 98)),
    ),
    "night": (
        ((34, 40, 84), (86, 86, 138), (58, 78, 92)),
        ((44, 34, 78), (112, 82, 128), (72, 70, 98)),
    ),
}


@dataclass(frozen=True)
class Prop:
    """Something beside the subject: its kind, place and size as fractions of the picture."""

    kind: str  # tree, pine, bush, palm, frame, window or lamp
    x: float
    y: float
    size: float
    colour: Colour


@dataclass(frozen=True)
class Scene:
    """A place and where the subject stands in it; lengths are fractions of the picture's side.

    `facing` is 1 for right and -1 for left; (`x`, `y`) is the point on the ground the subject stands over,
    `scale` the length of one subject unit.
    """

    kind: Kind
    sky: tuple[Colour, Colour]
    ground: Colour
    horizon: float
    disc: tuple[float, float, float] | None  # sun or moon: x, y, radius
    clouds: tuple[tuple[float, float, float], ...]
    hills: tuple[float, float, float] | None  # height, waves across the picture, phase
    props: tuple[Prop, ...]
    x: float
    y: float
    scale: float
    facing: int


def _jitter(rng: random.Random, colour: Colour, amount: int = 9) -> Colour:
    r, g, b = (max(0, min(255, c + rng.randint(-amount, amount))) for c in colour)
    return (r, g, b)


def sample_scene(rng: random.Random, scale: tuple[float, float] = (0.62, 0.72)) -> Scene:
    """Draws a place, and where in it the subject stands; `scale` bounds the subject's size."""
    kind = rng.choice(KINDS)
    top, low, ground = rng.choice(_PALETTES[kind])
    horizon = rng.uniform(0.56, 0.7)
    outdoors = kind != "room"
    disc = None
    if outdoors and rng.random() < 0.6:
        disc = (rng.choice((rng.uniform(0.12, 0.26), rng.uniform(0.74, 0.88))), rng.uniform(0.12, 0.22), 0.075)
    clouds = tuple(
        (rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.3), rng.uniform(0.07, 0.1))
        for _ in range(rng.choice((0, 1, 2)) if outdoors and kind != "night" else 0)
    )
    hills = (rng.uniform(0.05, 0.13), rng.uniform(0.8, 1.7), rng.uniform(0, math.tau)) if outdoors else None
    if kind == "beach" and rng.random() < 0.6:
        hills = None
    props = []
    for left in (True, False):
        if rng.random() > 0.45:
            continue
        x = rng.uniform(0.04, 0.13) if left else rng.uniform(0.87, 0.96)
        if kind == "room":
            what = rng.choice(("frame", "window", "lamp"))
            colour = rng.choice(((220, 120, 96), (104, 148, 188), (140, 168, 108), (232, 192, 104)))
            y = rng.uniform(0.22, 0.32) if what != "lamp" else 0.9
            props.append(Prop(what, x, y, rng.uniform(0.1, 0.13), _jitter(rng, colour)))
        else:
            what = {"grass": rng.choice(("tree", "bush", "tree")), "beach": "palm", "snow": "pine"}.get(
                kind, rng.choice(("tree", "pine"))
            )
            colour = {"snow": (88, 132, 116), "night": (40, 66, 72)}.get(kind, (92, 146, 84))
            props.append(Prop(what, x, horizon + rng.uniform(0.02, 0.07), rng.uniform(0.15, 0.2), _jitter(rng, colour)))
    return Scene(
        kind=kind,
        sky=(_jitter(rng, top), _jitter(rng, low)),
        ground=_jitter(rng, ground),
        horizon=horizon,
        disc=disc,
        clouds=clouds,
        hills=hills,
        props=tuple(props),
        x=rng.uniform(0.46, 0.54),
        y=rng.uniform(0.88, 0.93),
        scale=rng.uniform(*scale),
        facing=rng.choice((-1, 1)),
    )


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """The empty place, RGB, SUPERSAMPLE times `size` on a side."""
    side = size * SUPERSAMPLE
    picture = _gradients(scene, size).resize((side, side), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)

    def ellipse(x: float, y: float, a: float, b: float, colour: Colour) -> None:
        draw.ellipse(((x - a) * side, (y - b) * side, (x + a) * side, (y + b) * side), fill=colour)

    def box(x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        draw.rectangle((x0 * side, y0 * side, x1 * side, y1 * side), fill=colour)

    if scene.disc:
        x, y, radius = scene.disc
        ellipse(x, y, radius, radius, (250, 240, 206) if scene.kind == "night" else (255, 222, 132))
    for x, y, radius in scene.clouds:
        white = mix(scene.sky[1], (255, 255, 255), 0.75)
        for shift, r in ((-1.1, 0.62), (0.0, 0.85), (1.1, 0.58)):
            ellipse(x + shift * radius, y - r * radius * 0.25, r * radius, r * radius * 0.85, white)
        box(x - 1.1 * radius, y, x + 1.1 * radius, y + radius * 0.28, white)
    horizon = scene.horizon
    if scene.hills:
        height, waves, phase = scene.hills
        ridge = [
            (x / 60 * side, (horizon - height * (1 + math.sin(waves * math.tau * x / 60 + phase)) / 2) * side)
            for x in range(61)
        ]
        draw.polygon([*ridge, (side, horizon * side + 2), (0, horizon * side + 2)], fill=_hill_colour(scene))
    if scene.kind == "beach":
        box(0, horizon - 0.05, 1, horizon, (104, 172, 196))
    if scene.kind == "room":
        box(0, horizon - 0.022, 1, horizon, shade(scene.ground, 0.78))
    for prop in scene.props:
        _draw_prop(prop, ellipse, box, draw, side)
    # the subject's shadow belongs to the place: it stays where it is whatever the pose
    ellipse(scene.x, scene.y + 0.005, 0.34 * scene.scale, 0.04 * scene.scale, shade(scene.ground, 0.82))
    return picture


def _hill_colour(scene: Scene) -> Colour:
    return mix(scene.ground, scene.sky[1], 0.45)


def _gradients(scene: Scene, size: int) -> Image.Image:
    rows = (np.arange(size) + 0.5)[:, None] / size
    top, low, ground = (np.array(c, dtype=np.float64) for c in (*scene.sky, scene.ground))
    up = np.clip(rows / scene.horizon, 0, 1)
    down = np.clip((rows - scene.horizon) / (1 - scene.horizon), 0, 1)
    column = np.where(rows < scene.horizon, top * (1 - up) + low * up, ground * (1.03 - 0.14 * down))
    pixels = np.repeat(column[:, None, :], size, axis=1)
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def _draw_prop(
    prop: Prop, ellipse: Callable[..., None], box: Callable[..., None], draw: ImageDraw.ImageDraw, side: int
) -> None:
    x, y, s, colour = prop.x, prop.y, prop.size, prop.colour
    trunk = (128, 94, 70)

    def polygon(*points: tuple[float, float]) -> None:
        draw.polygon([(a * side, b * side) for a, b in points], fill=colour)

    if prop.kind == "tree":
        box(x - 0.022, y - s, x + 0.022, y, trunk)
        ellipse(x, y - 1.45 * s, 0.68 * s, 0.85 * s, colour)
    elif prop.kind == "pine":
        box(x - 0.02, y - 0.4 * s, x + 0.02, y, trunk)
        for k in (0, 1):
            base = y - (0.25 + 0.75 * k) * s
            wide = (0.62 - 0.16 * k) * s
            polygon((x - wide, base), (x + wide, base), (x, base - 1.25 * s))
    elif prop.kind == "palm":
        box(x - 0.016, y - 1.5 * s, x + 0.016, y, trunk)
        for dx, dy in ((-0.42, -0.02), (0.42, -0.02), (-0.2, -0.3), (0.2, -0.3)):
            ellipse(x + dx * s, y - 1.55 * s + dy * s, 0.42 * s, 0.17 * s, colour)
    elif prop.kind == "bush":
        ellipse(x, y - 0.1 * s, 0.75 * s, 0.5 * s, colour)
    elif prop.kind == "lamp":
        box(x - 0.012, y - 0.5, x + 0.012, y, shade(colour, 0.55))
        polygon((x - 0.075, y - 0.42), (x + 0.075, y - 0.42), (x + 0.045, y - 0.58), (x - 0.045, y - 0.58))
    else:
        box(x - s, y - s, x + s, y + s, (244, 238, 226))
        inner = (168, 208, 234) if prop.kind == "window" else colour
        box(x - 0.78 * s, y - 0.78 * s, x + 0.78 * s, y + 0.78 * s, inner)
        if prop.kind == "window":
            box(x - 0.07 * s, y - s, x + 0.07 * s, y + s, (244, 238, 226))
