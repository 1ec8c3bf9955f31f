"""Smooth flat shapes on a supersampled picture, and the mask of the subject they form."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLE = 4
CURVE_SAMPLES = 28


class Node(NamedTuple):
    """A joint of a tube: position and radius, in subject units."""

    u: float
    v: float
    radius: float


def shade(colour: Colour, factor: float) -> Colour:
    """The colour times a factor, per channel, clamped to 0..255."""
    r, g, b = (max(0, min(255, round(c * factor))) for c in colour)
    return (r, g, b)


def mix(a: Colour, b: Colour, amount: float) -> Colour:
    """The colour `amount` (0..1) of the way from a to b."""
    r, g, z = (round(x + (y - x) * amount) for x, y in zip(a, b, strict=True))
    return (r, g, z)


def catmull_rom(a: float, b: float, c: float, d: float, t: float) -> float:
    """The curve from b (t = 0) to c (t = 1) whose slopes come from the neighbours a and d."""
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def curve(nodes: Sequence[Node]) -> list[Node]:
    """A Catmull-Rom curve through the nodes, radii included, sampled densely."""
    ends = [nodes[0], *nodes, nodes[-1]]
    segments = len(nodes) - 1
    steps = max(4, CURVE_SAMPLES // segments)
    out = []
    for k in range(segments):
        for i in range(steps + (k == segments - 1)):
            columns = zip(*ends[k : k + 4], strict=True)
            u, v, radius = (catmull_rom(a, b, c, d, i / steps) for a, b, c, d in columns)
            out.append(Node(u, v, radius))
    return out


def outline_of_ellipse(u: float, v: float, a: float, b: float, angle: float) -> list[Point]:
    """Points around an ellipse with half axes a and b, turned by an angle in radians."""
    ca, sa = math.cos(angle), math.sin(angle)
    ring = [(a * math.cos(t), b * math.sin(t)) for t in (math.tau * i / 48 for i in range(48))]
    return [(u + x * ca - y * sa, v + x * sa + y * ca) for x, y in ring]


def outline_of_blob(points: Sequence[Point]) -> list[Point]:
    """Points along the smooth closed outline through the points."""
    n = len(points)
    outline = []
    for k in range(n):
        (a, e), (b, f), (c, g), (d, h) = (points[(k + i - 1) % n] for i in range(4))
        outline += [(catmull_rom(a, b, c, d, i / 8), catmull_rom(e, f, g, h, i / 8)) for i in range(8)]
    return outline


class Canvas:
    """Draws one subject: u runs the way it faces, v up from the ground, both in units of its size.

    `picture` (RGB) and `mask` (L) are supersampled and drawn on in place; `x`, `y` (fractions of the picture)
    are where the subject stands, `scale` the length of one unit as a fraction of the picture, `facing` 1 for
    right and -1 for left.
    """

    def __init__(self, picture: Image.Image, mask: Image.Image, x: float, y: float, scale: float, facing: int):
        self.picture, self.mask = picture, mask
        self._picture_layer, self._mask_layer = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
        self._side = picture.width
        self._x, self._y, self._scale, self._facing = x, y, scale, facing

    def _place(self, u: float, v: float) -> Point:
        return (
            (self._x + self._scale * self._facing * u) * self._side,
            (self._y - self._scale * v) * self._side,
        )

    def _length(self, units: float) -> float:
        return units * self._scale * self._side

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fills a polygon."""
        placed = [self._place(*p) for p in points]
        self._picture_layer.polygon(placed, fill=colour)
        self._mask_layer.polygon(placed, fill=255)

    def ellipse(self, u: float, v: float, a: float, b: float, colour: Colour, angle: float = 0.0) -> None:
        """Fills an ellipse with half axes a and b, turned by an angle in radians."""
        self.polygon(outline_of_ellipse(u, v, a, b, angle), colour)

    def circle(self, u: float, v: float, radius: float, colour: Colour) -> None:
        """Fills a circle."""
        self.ellipse(u, v, radius, radius, colour)

    def tube(self, nodes: Sequence[Node], colour: Colour) -> None:
        """Fills a round-ended tube whose thickness follows the nodes' radii."""
        samples = curve(nodes)
        self._stamp(self._picture_layer, samples, colour)
        self._stamp(self._mask_layer, samples, 255)

    def blob(self, points: Sequence[Point], colour: Colour) -> None:
        """Fills the smooth closed outline through the points."""
        self.polygon(outline_of_blob(points), colour)

    def coat(self, nodes: Sequence[Node], colour: Colour, pattern: str, pattern_colour: Colour, marks: int) -> None:
        """Fills a tube and lays its pattern ("plain", "striped", "spotted") along the tube's own axis.

        The marks ride the axis, so that the same coat bends with the body from pose to pose.
        """
        self.tube(nodes, colour)
        if pattern == "plain":
            return
        samples = curve(nodes)
        inside = Image.new("L", self.mask.size, 0)
        self._stamp(ImageDraw.Draw(inside), samples, 255)
        drawn = Image.new("L", self.mask.size, 0)
        draw = ImageDraw.Draw(drawn)
        for k in range(marks):
            at = (k + 0.5) / marks * (len(samples) - 1)
            here = samples[int(at)]
            ahead, behind = samples[min(int(at) + 2, len(samples) - 1)], samples[max(int(at) - 2, 0)]
            du, dv = ahead.u - behind.u, ahead.v - behind.v
            norm = math.hypot(du, dv) + 1e-9
            nu, nv = -dv / norm, du / norm
            if pattern == "striped":
                half = 0.046
                corners = [
                    (here.u + nu * s * 0.4 + du / norm * w, here.v + nv * s * 0.4 + dv / norm * w)
                    for s, w in ((-1, -half), (-1, half), (1, half), (1, -half))
                ]
                draw.polygon([self._place(*c) for c in corners], fill=255)
            else:
                for side in (0.5,) if k % 2 else (-0.1,):
                    x, y = self._place(here.u + nu * here.radius * side, here.v + nv * here.radius * side)
                    r = self._length(0.062)
                    draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        self.picture.paste(pattern_colour, mask=Image.composite(drawn, Image.new("L", drawn.size, 0), inside))

    def _stamp(self, layer: ImageDraw.ImageDraw, samples: Sequence[Node], fill: int | Colour) -> None:
        placed = [(*self._place(s.u, s.v), self._length(s.radius)) for s in samples]
        for (x0, y0, r0), (x1, y1, r1) in pairwise(placed):
            dx, dy = x1 - x0, y1 - y0
            norm = math.hypot(dx, dy) + 1e-9
            nx, ny = -dy / norm, dx / norm
            layer.polygon(
                [
                    (x0 + nx * r0, y0 + ny * r0),
                    (x1 + nx * r1, y1 + ny * r1),
                    (x1 - nx * r1, y1 - ny * r1),
                    (x0 - nx * r0, y0 - ny * r0),
                ],
                fill=fill,
            )
        for x, y, r in placed:
            layer.ellipse((x - r, y - r, x + r, y + r), fill=fill)
