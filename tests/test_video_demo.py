"""Videos on the demo world: motions with their renders, the measure of flicker and identity, `masa demo --video`."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import masa
from masa.cli.commands import main
from masa.output.frames import read_run
from masa.weights.demo.between import Recorder
from masa.weights.demo.figures import draw_figure
from masa.weights.demo.motion import OFFSETS, STANCE, STEP, Stride, jump, paw, walk
from masa.weights.demo.stick_figure import nobody, stick_figure
from masa.weights.demo.world import Between, render, sample
from masa.workflows import demo_video

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import video
from ground_truth.cases import Individual
from ground_truth.drawn import joints, pose_error

WHO = Individual.draw(video.SEEDS)


def nodes_of(subject, pose):
    """Every joint that is drawn of nobody in a pose, by stroke."""
    recorder = Recorder()
    draw_figure(recorder, nobody(subject), pose)
    return [stroke.arguments[0] for stroke in recorder.strokes if stroke.method in ("tube", "coat")]


# -------------------------------------------------------------------------------------------------------- motions


@pytest.mark.parametrize("subject", ["cat", "dog"])
def test_a_stride_moves_paws_and_leaves_the_rest_where_it_stands(subject):
    standing, stride = nodes_of(subject, "standing"), nodes_of(subject, Stride(0.1))
    moved = [i for i, (a, b) in enumerate(zip(standing, stride, strict=True)) if list(a) != list(b)]
    assert len(moved) == 4
    reached = [stride[i][-1].u - standing[i][-1].u for i in moved]
    assert reached == pytest.approx([paw((0.1 + offset) % 1)[0] for offset in OFFSETS])
    assert all(stride[i][0] == standing[i][0] for i in moved)  # hips stay


def test_a_paw_stays_down_while_the_body_passes_and_is_carried_ahead():
    on_ground = [paw(STANCE * i / 10) for i in range(10)]
    assert all(up == 0 for _, up in on_ground)
    assert np.diff([along for along, _ in on_ground]) == pytest.approx(-2 * STEP / 10)  # as fast as the body goes
    carried = [paw(STANCE + (1 - STANCE) * i / 10) for i in range(1, 10)]
    assert all(up > 0 for _, up in carried)
    assert all(np.diff([along for along, _ in carried]) > 0)
    for a, b in ((paw(STANCE - 1e-9), paw(STANCE)), (paw(1 - 1e-9), paw(0))):  # without a jerk
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("motion", [walk, jump])
def test_the_last_frame_leads_to_the_first(motion):
    poses = motion(24)
    steps = [pose_error("cat", a, b) for a, b in zip(poses, [*poses[1:], poses[0]], strict=True)]
    assert steps[-1] <= 1.01 * max(steps[:-1])
    assert max(steps) < 0.12
    assert len({tuple(joints("cat", pose).flatten()) for pose in poses}) > 12


def test_a_jump_crouches_leaves_the_ground_and_comes_back():
    lowest = [min(node.v for nodes in nodes_of("cat", pose) for node in nodes) for pose in jump(20)]
    heads = [joints("cat", pose)[-1][1] for pose in jump(20)]
    assert lowest[10] > 0.15 > 0.1 > lowest[0]
    assert heads[10] > heads[0] > heads[2]
    assert jump(20)[10] == Between("standing", "jumping", 1.0)


def test_motions_have_renders_and_stick_figures():
    drawn = sample(20, ["cat"])
    for pose in (*walk(3), *jump(3)):
        picture, mask = render(drawn.appearance, pose, drawn.scene)
        stick = stick_figure("cat", pose, drawn.scene)
        assert picture.shape == (128, 128, 3)
        assert mask[stick > 127].mean() > 0.6  # a head's outline lies half outside
    with pytest.raises(ValueError, match="a stride moves 4 legs"):
        render(sample(3, ["person"]).appearance, Stride(0.2), sample(3, ["person"]).scene)


# -------------------------------------------------------------------------------------------------------- measures


def test_exact_renders_have_neither_flicker_nor_error():
    poses = jump(4)
    exact = [WHO.picture(pose, 128) for pose in poses]
    found = video.measure(WHO, poses, exact)
    assert found.flicker == found.appearance == 0
    assert found.pose < 1e-9
    assert found.identity < 6  # poses show other shares of a coat


def test_each_measure_sees_its_own_fault():
    poses = jump(4)
    exact = [WHO.picture(pose, 128) for pose in poses]
    base = video.measure(WHO, poses, exact)

    def change(which, where):
        frames = [frame.copy() for frame in exact]
        for i in which:
            mask = WHO.mask(poses[i], 128)
            at = mask if where == "subject" else ~mask
            frames[i][at] = 255 - frames[i][at]
        return video.measure(WHO, poses, frames)

    once = change([2], "background")
    assert once.flicker > 20
    assert once.appearance == pytest.approx(base.appearance, abs=1e-4)
    assert change(range(4), "background").flicker == 0  # wrong, but steady
    other = change([2, 3], "subject")
    assert other.flicker == 0
    assert other.identity > base.identity + 20
    assert other.appearance > 20
    steady = change(range(4), "subject")
    assert steady.identity < 6 < 20 < steady.appearance  # another individual, the same throughout
    frozen = video.measure(WHO, poses, [exact[0]] * 4)
    assert frozen.pose > 0.1


def test_measures_are_kept_and_written(tmp_path):
    store = video.Store(tmp_path / "run" / "measures.jsonl")
    one = video.Measures(1.0, 2.0, 3.0, 0.25)
    store.add("jump", 7, {"a": one, "b": replace(one, flicker=5.0)})
    store.add("jump", 8, {"a": replace(one, flicker=3.0)})
    found = store.load()
    assert found == {
        ("jump", "a"): {7: one, 8: replace(one, flicker=3.0)},
        ("jump", "b"): {7: replace(one, flicker=5.0)},
    }
    video.write(tmp_path, found, "about")
    with (tmp_path / "video.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["flicker"] == "2.0"
    assert (rows[0]["flicker low"], rows[0]["flicker high"]) == ("1.0", "3.0")
    assert "| jump | b | 1 | 5.0 [5.0, 5.0] |" in (tmp_path / "video.md").read_text()


# ----------------------------------------------------------------------------------------------------------- the demo


@pytest.mark.slow
def test_the_demo_writes_a_film_and_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_video, "STEPS", 4)
    monkeypatch.setattr(demo_video, "FRAMES", 3)
    monkeypatch.setattr(demo_video, "SHOWN", 3)
    assert main(["demo", "--video", "walk", "-o", str(tmp_path / "out"), "-q"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(demo_video.FILES)
    assert "masa rerun" in capsys.readouterr().out
    settings, _ = read_run(tmp_path / "out" / "video.gif")
    assert settings["frames"] == 3
    again = masa.rerun(tmp_path / "out" / "video.webp", progress=False)
    with Image.open(tmp_path / "out" / "video.webp") as film:
        assert film.n_frames == 3
        shown = np.asarray(film.convert("RGB"))
    side = demo_video.SIZE
    whole = np.asarray(demo_video.enlarge(again.images[0])).astype(int)
    left = 2 * (side + 4)  # behind drawn poses and frames without control
    assert np.abs(shown[-side:, left : left + side] - whole).max() <= 2
    assert main(["demo", "--video", "-o", str(tmp_path / "out"), "-q"]) == 2
    assert "already holds video.gif" in capsys.readouterr().err


def test_a_demo_is_of_one_kind(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--video", "--pose"])
    assert "not allowed with argument" in capsys.readouterr().err
