"""A pose as a stick figure: the world's own drawing of a subject, reduced to lines."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .between import Pose
from .canvas import SUPERSAMPLE, Canvas, Colour, Node, Point, curve, outline_of_blob, outline_of_ellipse
from .figures import Appearance, draw_figure
from .scenery import Scene

LIMB, TRUNK = 6 / 512, 10 / 512  # widths of lines, of the picture's side
HEAD = 0.15  # the half axis above which an ellipse is a head; eyes, paws and muzzles are smaller
_GREY: Colour = (128, 128, 128)


class StickCanvas(Canvas):
    """Draws limbs and trunks as their centre lines, heads and wings as their outlines, and nothing else.

    `picture` is one layer (L) that white lines are drawn on. Thickness, colour and pattern of what is drawn have no
    say. thickness: of the lines, 1 is ordinary.
    """

    def __init__(self, picture: Image.Image, scene: Scene, thickness: float = 1.0) -> None:
        super().__init__(picture, picture, scene.x, scene.y, scene.scale, scene.facing)
        self.thickness = thickness

    def _line(self, points: Sequence[Point], width: float) -> None:
        placed = [self._place(*p) for p in points]
        pixels = max(1, round(width * self.thickness * self._side))
        self._picture_layer.line(placed, fill=255, width=pixels, joint="curve")

    def tube(self, nodes: Sequence[Node], colour: Colour) -> None:
        self._line([(n.u, n.v) for n in curve(nodes)], LIMB)

    def coat(self, nodes: Sequence[Node], colour: Colour, pattern: str, pattern_colour: Colour, marks: int) -> None:
        self._line([(n.u, n.v) for n in curve(nodes)], TRUNK)

    def ellipse(self, u: float, v: float, a: float, b: float, colour: Colour, angle: float = 0.0) -> None:
        if a > HEAD and b > HEAD:
            ring = outline_of_ellipse(u, v, a, b, angle)
            self._line([*ring, *ring[:2]], LIMB)

    def blob(self, points: Sequence[Point], colour: Colour) -> None:
        outline = outline_of_blob(points)
        self._line([*outline, *outline[:2]], LIMB)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Ears, beaks and crests: nothing."""


def nobody(subject: str) -> Appearance:
    """An individual without anything of its own."""
    return Appearance(
        subject=subject,
        colour="gray",
        body=_GREY,
        second=_GREY,
        pattern="plain",
        marks=_GREY,
        build=1.0,
        eyes=_GREY,
        extra=None,
        tipped=False,
        skin=_GREY,
        hair=_GREY,
    )


def stick_figure(subject: str, pose: Pose, scene: Scene, size: int = 128, thickness: float = 1.0) -> np.ndarray:
    """Draws a pose where `render` draws it: uint8 (size, size), white lines on black.

    It tells pose, place, size and direction. It cannot tell more: of the individual it is given the kind alone, and
    of the scene it reads x, y, scale and facing. Lines grow with the picture. thickness: theirs, 1 is ordinary.
    ValueError where the subject has no such pose.
    """
    layer = Image.new("L", (size * SUPERSAMPLE,) * 2, 0)
    draw_figure(StickCanvas(layer, scene, thickness), nobody(subject), pose)
    return np.asarray(layer.resize((size, size), Image.Resampling.BILINEAR))
