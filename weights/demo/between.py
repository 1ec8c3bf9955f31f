"""Poses between two that captions name: unseen, unnamed, and drawn as exactly as those."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from .canvas import Canvas, Colour, Node, Point


@dataclass(frozen=True)
class Between:
    """A pose on the way from one to another: every joint is `amount` (0..1, 0 is the first) of its way along.

    ValueError for an amount outside.
    """

    first: str
    second: str
    amount: float

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise ValueError(f"a pose's amount is {self.amount}; expected 0 (the first) to 1 (the second)")

    def draw(self, canvas: Canvas, draw: Callable[[Canvas, str], None]) -> None:
        """Draws it. draw: draws a named pose."""
        draw_between(canvas, self, draw)


class Unnamed(Protocol):
    """A pose that no caption names, made of named ones."""

    def draw(self, canvas: Canvas, draw: Callable[[Canvas, str], None]) -> None: ...


Pose = str | Unnamed


@dataclass(frozen=True)
class Stroke:
    """One call of a canvas: which method, and its arguments."""

    method: str
    arguments: tuple[Any, ...]


class Recorder(Canvas):
    """Takes what is drawn down, and draws nothing."""

    def __init__(self) -> None:
        nothing = Image.new("L", (1, 1))
        super().__init__(nothing, nothing, 0.0, 0.0, 1.0, 1)
        self.strokes: list[Stroke] = []

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.strokes.append(Stroke("polygon", (list(points), colour)))

    def ellipse(self, u: float, v: float, a: float, b: float, colour: Colour, angle: float = 0.0) -> None:
        self.strokes.append(Stroke("ellipse", (u, v, a, b, colour, angle)))

    def tube(self, nodes: Sequence[Node], colour: Colour) -> None:
        self.strokes.append(Stroke("tube", (list(nodes), colour)))

    def blob(self, points: Sequence[Point], colour: Colour) -> None:
        self.strokes.append(Stroke("blob", (list(points), colour)))

    def coat(self, nodes: Sequence[Node], colour: Colour, pattern: str, pattern_colour: Colour, marks: int) -> None:
        self.strokes.append(Stroke("coat", (list(nodes), colour, pattern, pattern_colour, marks)))


def draw_between(canvas: Canvas, pose: Between, draw: Callable[[Canvas, str], None]) -> None:
    """Draws what lies between two poses. draw: draws a named one.

    ValueError where the two are not drawn with the same strokes, as a bird's that sits and that flies are not.
    """
    first, second = Recorder(), Recorder()
    draw(first, pose.first)
    draw(second, pose.second)
    if [_form(s) for s in first.strokes] != [_form(s) for s in second.strokes]:
        raise ValueError(f"nothing lies between {pose.first!r} and {pose.second!r}: they are drawn of unlike parts")
    for a, b in zip(first.strokes, second.strokes, strict=True):
        getattr(canvas, a.method)(*_blend(a.arguments, b.arguments, pose.amount))


def _form(stroke: Stroke) -> tuple[str, int]:
    """What two strokes must share: the method, and how many joints it is given."""
    joints = stroke.arguments[0]
    return stroke.method, len(joints) if isinstance(joints, list) else 0


def _blend(a: Any, b: Any, amount: float) -> Any:
    """Numbers, or lists and tuples of them, on the way from a to b; what is equal stays as it is."""
    if a == b:
        return a
    if isinstance(a, list | tuple):
        mixed = [_blend(x, y, amount) for x, y in zip(a, b, strict=True)]
        return Node(*mixed) if isinstance(a, Node) else type(a)(mixed)
    return a + (b - a) * amount
