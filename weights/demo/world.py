"""A captioned world whose edits have an exact truth: the same individual and place in another pose."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .between import Between, Pose
from .canvas import SUPERSAMPLE, Canvas
from .figures import COLOURS, PATTERNS, POSES, SUBJECTS, Appearance, draw_figure, sample_appearance
from .scenery import KINDS, Scene, draw_scene, sample_scene

__all__ = [
    "KINDS",
    "POSES",
    "SUBJECTS",
    "WORDS",
    "Appearance",
    "Between",
    "Pose",
    "Sample",
    "Scene",
    "caption",
    "render",
    "sample",
    "turned",
]

# people are tall and raise their hands: drawn smaller
_SCALES = {"cat": (0.62, 0.7), "dog": (0.62, 0.7), "bird": (0.66, 0.74), "person": (0.6, 0.68)}
_PLACES = {
    "grass": "on the grass",
    "beach": "on the beach",
    "snow": "in the snow",
    "room": "in a room",
    "night": "at night",
}
_OPENINGS = ("", "a photo of ", "a picture of ")


@dataclass(frozen=True)
class Sample:
    """One captioned picture's description; `render(appearance, pose, scene)` draws it."""

    appearance: Appearance
    pose: str
    scene: Scene
    caption: str


def sample(seed: int, subjects: Sequence[str] = SUBJECTS) -> Sample:
    """Draws an individual, a pose, a place and a caption; the same seed and subjects give the same four."""
    rng = random.Random(seed)
    subject = rng.choice(list(subjects))
    scene = sample_scene(rng, _SCALES[subject])
    appearance = sample_appearance(rng, subject, (*scene.sky, scene.ground))
    pose = rng.choice(POSES[subject])
    return Sample(appearance, pose, scene, _vary(rng, appearance, pose, scene))


def turned(drawn: Sample) -> Sample:
    """The same individual, pose and place, facing the other way; so says the caption, if it names the way."""
    other = {"left": "right", "right": "left"}
    said = re.sub("(?<=facing )(left|right)", lambda way: other[way[0]], drawn.caption)
    return replace(drawn, scene=replace(drawn.scene, facing=-drawn.scene.facing), caption=said)


def render(appearance: Appearance, pose: Pose, scene: Scene, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draws the picture, uint8 (size, size, 3), and the subject's mask, bool (size, size).

    pose: one that captions name, or `Between` two of them. Pure: equal arguments give equal pixels. ValueError where
    the subject has no such pose.
    """
    picture = draw_scene(scene, size)
    mask = Image.new("L", picture.size, 0)
    canvas = Canvas(picture, mask, scene.x, scene.y, scene.scale, scene.facing)
    draw_figure(canvas, appearance, pose)
    assert picture.width == size * SUPERSAMPLE
    # the triangle filter is a little softer than box averaging: no stair steps along slanted edges
    small = picture.resize((size, size), Image.Resampling.BILINEAR)
    inside = mask.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(small), np.asarray(inside) > 127


def caption(
    appearance: Appearance,
    pose: str | None,
    scene: Scene,
    *,
    opening: str = "a photo of ",
    colour: bool = True,
    pattern: bool = True,
    place: bool = True,
    facing: bool = True,
    pose_first: bool = False,
) -> str:
    """Says what the picture shows; each flag leaves a part out, `pose_first` says "a sitting cat"."""
    words = [appearance.colour] if colour else []
    if pattern and appearance.pattern != "plain":
        words.append(appearance.pattern)
    if pose and pose_first:
        words.append(pose)
    words.append(appearance.subject)
    if pose and not pose_first:
        words.append(pose)
    article = "an" if words[0][0] in "aeiou" else "a"
    text = f"{opening}{article} {' '.join(words)}"
    if place:
        text += f" {_PLACES[scene.kind]}"
    if facing:
        text += f", facing {'right' if scene.facing == 1 else 'left'}"
    return text


def _vary(rng: random.Random, appearance: Appearance, pose: str, scene: Scene) -> str:
    """A caption with parts left out at random, so that short prompts work too."""
    short = rng.random() < 0.2
    return caption(
        appearance,
        None if rng.random() < 0.05 else pose,
        scene,
        opening=rng.choice(_OPENINGS),
        colour=not short and rng.random() < 0.7,
        pattern=not short and rng.random() < 0.7,
        place=not short and rng.random() < 0.6,
        facing=rng.random() < 0.75,
        pose_first=" " not in pose and rng.random() < 0.3,
    )


_ARTICLES = ("a", "an", "the")
_GRAMMAR = (*_ARTICLES, "photo", "picture", "of", "on", "in", "at", "and", "with", "facing", "left", "right", ",", ".")

# Every word that a caption can hold.
WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            *_GRAMMAR,
            *SUBJECTS,
            *COLOURS,
            *PATTERNS,
            *(word for poses in POSES.values() for pose in poses for word in pose.split()),
            *(word for place in _PLACES.values() for word in place.split()),
        }
    )
)
