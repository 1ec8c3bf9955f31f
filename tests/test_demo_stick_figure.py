"""The stick figure: pose, place, size and direction of a subject, and nothing of its looks."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from masa.weights.demo.canvas import SUPERSAMPLE
from masa.weights.demo.figures import draw_figure
from masa.weights.demo.stick_figure import StickCanvas, stick_figure
from masa.weights.demo.world import POSES, SUBJECTS, Between, render, sample
from tests.test_demo_world import grown

EVERY_POSE = [(subject, pose) for subject in SUBJECTS for pose in POSES[subject]]
EVERY_POSE += [("cat", Between("sitting", "jumping", 0.4)), ("person", Between("standing", "running", 0.5))]


def differ(a, b):
    """The share of pixels that are white in one picture alone, of those that are in either."""
    a, b = a > 127, b > 127
    return (a ^ b).sum() / (a | b).sum()


@pytest.mark.parametrize(("subject", "pose"), EVERY_POSE)
def test_it_lies_on_the_subject(subject, pose):
    for seed in range(5):
        drawn = sample(seed, [subject])
        stick = stick_figure(subject, pose, drawn.scene)
        assert stick.shape == (128, 128)
        assert stick.dtype == np.uint8
        assert 0.01 < (stick > 127).mean() < 0.1
        mask = render(drawn.appearance, pose, drawn.scene)[1]
        # The lines are a pixel and a half wide, and a head's outline lies half outside.
        assert not ((stick > 127) & ~grown(mask, 2)).any()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_looks_and_surroundings_do_not_show(subject):
    """Whoever is drawn: without what one wears, everybody's lines are those of nobody."""
    here = sample(0, [subject]).scene
    for seed in range(1, 6):
        drawn = sample(seed, [subject])
        elsewhere = replace(drawn.scene, x=here.x, y=here.y, scale=here.scale, facing=here.facing)
        for pose in POSES[subject]:
            stick = stick_figure(subject, pose, here)
            assert np.array_equal(stick_figure(subject, pose, elsewhere), stick)
            layer = Image.new("L", (128 * SUPERSAMPLE,) * 2, 0)
            draw_figure(StickCanvas(layer, here), replace(drawn.appearance, extra=None), pose)
            assert np.array_equal(np.asarray(layer.resize((128, 128), Image.Resampling.BILINEAR)), stick)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_pose_place_size_and_direction_show(subject):
    scene = replace(sample(3, [subject]).scene, x=0.5, scale=0.6, facing=1)
    sticks = [stick_figure(subject, pose, scene) for pose in POSES[subject]]
    for i, one in enumerate(sticks):
        for other in sticks[i + 1 :]:
            assert differ(one, other) > 0.3
    for changed in ({"x": 0.45}, {"y": scene.y - 0.05}, {"scale": 0.7}, {"facing": -1}):
        # A person who stands is nearly symmetric: feet, mouth and the head's place tell where it looks.
        assert differ(stick_figure(subject, POSES[subject][0], replace(scene, **changed)), sticks[0]) > 0.2
    right, left = (stick_figure(subject, POSES[subject][0], replace(scene, facing=f), 512) for f in (1, -1))
    assert differ(right, left[:, ::-1]) < 0.1  # large: a line's pixels round to one side


def test_subjects_differ():
    scene = sample(0).scene
    sticks = {subject: stick_figure(subject, "standing", scene) for subject in SUBJECTS}
    for one in SUBJECTS:
        for other in SUBJECTS:
            assert one == other or differ(sticks[one], sticks[other]) > 0.05


def test_larger_picture_is_the_same_picture():
    drawn = sample(8, ["bird"])
    small = stick_figure("bird", "flying", drawn.scene, 128).astype(float)
    large = stick_figure("bird", "flying", drawn.scene, 256).reshape(128, 2, 128, 2).mean((1, 3))
    # Rounded ends of lines and their smoothed rims differ a little.
    assert np.abs(large - small).mean() < 2.0


def test_thickness_thickens():
    scene = sample(1, ["cat"]).scene
    thin, ordinary, thick = (stick_figure("cat", "lying", scene, thickness=t).mean() for t in (0.5, 1.0, 2.0))
    assert 1.6 < ordinary / thin < 2.2
    assert 1.6 < thick / ordinary < 2.2


def test_an_unknown_pose_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no pose 'flying'.*sitting"):
        stick_figure("cat", "flying", sample(0).scene)
