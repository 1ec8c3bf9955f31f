"""Condition pictures: canny as OpenCV has it, sketches, poses, maps that are given, and the command."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import masa
from masa.cli.commands import main
from masa.io.poses import KEYPOSE_JOINTS, OPENPOSE_JOINTS

PHOTOS = ("astronaut", "coffee", "chelsea")
# A standing person with an arm raised, at 512x512, and one beside of whom two joints are not seen.
BODY = [
    *([256, 90], [256, 150], [210, 150], [170, 210], [140, 270], [302, 150], [350, 120], [400, 80], [225, 290]),
    *([215, 370], [205, 460], [287, 290], [320, 370], [350, 450], [244, 78], [268, 78], [228, 88], [284, 88]),
]
OTHER = [None if i in (4, 10) else [x / 2 + 10, 0.9 * y] for i, (x, y) in enumerate(BODY)]


def photo(name, grey=False):
    picture = Image.fromarray(getattr(data, name)())
    return np.asarray(picture.convert("L") if grey else picture)


# --------------------------------------------------------------------------------------------------------------- canny


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(("low", "high"), [(100, 200), (50, 400), (0, 30.5)])
def test_canny_is_opencvs_pixel_for_pixel(name, grey, low, high):
    cv2 = pytest.importorskip("cv2")
    ref = cv2.Canny(photo(name, grey), low, high)
    out = np.asarray(masa.conditions.canny(photo(name, grey), low, high, short_side=None))
    assert np.array_equal(out, ref)
    assert 0.01 < (out > 0).mean() < 0.5


def naive_canny(x, low, high):
    """The definition, pixel by pixel, of a grey picture."""
    h, w = x.shape
    p = np.pad(x.astype(int), 1, mode="edge")
    dx, dy, m = np.zeros((h, w), int), np.zeros((h, w), int), np.zeros((h + 2, w + 2), int)
    for i in range(h):
        for j in range(w):
            a = p[i : i + 3, j : j + 3]
            dx[i, j] = (a[:, 2] - a[:, 0]) @ [1, 2, 1]
            dy[i, j] = (a[2] - a[0]) @ [1, 2, 1]
            m[i + 1, j + 1] = abs(dx[i, j]) + abs(dy[i, j])
    edges, todo = np.zeros((h, w), int), []
    for i in range(h):
        for j in range(w):
            at, gx, gy = m[i + 1, j + 1], dx[i, j], dy[i, j]
            slope = abs(gy) / abs(gx) if gx else math.inf
            if slope < math.tan(math.pi / 8):
                largest = m[i + 1, j] < at >= m[i + 1, j + 2]
            elif slope > math.tan(3 * math.pi / 8):
                largest = m[i, j + 1] < at >= m[i + 2, j + 1]
            else:
                s = -1 if gx * gy < 0 else 1
                largest = m[i, j + 1 - s] < at > m[i + 2, j + 1 + s]
            if largest and at > low:
                edges[i, j] = 1
                if at > high:
                    todo.append((i, j))
    out = np.zeros((h, w), np.uint8)
    while todo:
        i, j = todo.pop()
        if 0 <= i < h and 0 <= j < w and edges[i, j] and not out[i, j]:
            out[i, j] = 255
            todo += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return out


def test_canny_is_its_definition():
    x = photo("chelsea", grey=True)[60:180, 100:240]
    out = np.asarray(masa.conditions.canny(x, 100, 200))
    assert np.array_equal(out, naive_canny(x, 100, 200))
    assert not np.array_equal(out, np.asarray(masa.conditions.canny(x, 150, 200)))
    assert not np.array_equal(out, np.asarray(masa.conditions.canny(x, 100, 300)))


def test_larger_photographs_are_scaled_down_first():
    assert masa.conditions.canny(photo("coffee"), short_side=256).size == (384, 256)
    assert masa.conditions.sketch(photo("coffee"), short_side=256).size == (384, 256)
    assert masa.conditions.color(photo("coffee"), short_side=256).size == (384, 256)
    assert masa.conditions.canny(photo("chelsea")).size == (451, 300)  # small ones stay
    large = np.asarray(Image.fromarray(photo("coffee")).resize((1200, 800)))
    assert masa.conditions.canny(large).size == (768, 512)
    assert masa.conditions.canny(large, short_side=None).size == (1200, 800)


# -------------------------------------------------------------------------------------------------------------- sketch


@pytest.mark.parametrize("name", PHOTOS)
def test_a_sketch_is_lines_where_a_photograph_changes(name):
    x = photo(name)
    lines = {t: np.asarray(masa.conditions.sketch(x, t)) > 0 for t in (0.2, 0.3, 0.6)}
    assert 0.03 < lines[0.3].mean() < 0.3
    assert not (lines[0.6] & ~lines[0.2]).any()  # lower draws more
    assert lines[0.6].sum() < lines[0.3].sum() < lines[0.2].sum()
    change = np.abs(np.gradient(x.mean(-1))).sum(0)
    assert change[lines[0.3]].mean() > 2 * change[~lines[0.3]].mean()


def test_a_drawing_is_turned_white_on_black():
    drawing = np.full((96, 128, 3), 245, np.uint8)
    drawing[20:24, 10:100] = 20
    drawing[40:80, 60:63] = 60
    lines = drawing[..., 0] < 128
    for shown in (drawing, 255 - drawing):  # either way round
        assert np.array_equal(np.asarray(masa.conditions.sketch(shown)) > 0, lines)
    assert not np.array_equal(np.asarray(masa.conditions.sketch(drawing, drawing=False)) > 0, lines)
    grey = photo("chelsea", grey=True)
    assert not np.array_equal(
        np.asarray(masa.conditions.sketch(grey, drawing=True)), np.asarray(masa.conditions.sketch(grey))
    )


# --------------------------------------------------------------------------------------------------------------- poses


def published_openpose(people, side=512):
    """As the published code draws, by OpenCV."""
    cv2 = pytest.importorskip("cv2")
    limbs = "2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18"
    colours = "ff0000 ff5500 ffaa00 ffff00 aaff00 55ff00 00ff00 00ff55 00ffaa 00ffff 00aaff 0055ff 0000ff 5500ff"
    colours = [tuple(bytes.fromhex(c)) for c in f"{colours} aa00ff ff00ff ff00aa ff0055".split()]
    canvas = np.zeros((side, side, 3), np.uint8)
    for i, colour in enumerate(colours):
        for person in people:
            if person[i] is not None:
                cv2.circle(canvas, (int(person[i][0]), int(person[i][1])), 4, colour, -1)
    for limb, colour in zip(limbs.split(), colours, strict=False):
        a, b = (int(joint) - 1 for joint in limb.split("-"))
        for person in people:
            if person[a] is None or person[b] is None:
                continue
            (ax, ay), (bx, by) = person[a], person[b]
            outline = cv2.ellipse2Poly(
                (int((ax + bx) / 2), int((ay + by) / 2)),
                (int(math.hypot(ax - bx, ay - by) / 2), 4),
                int(math.degrees(math.atan2(ay - by, ax - bx))), 0, 360, 1,
            )  # fmt: skip
            drawn = canvas.copy()
            cv2.fillConvexPoly(drawn, outline, colour)
            canvas = cv2.addWeighted(canvas, 0.4, drawn, 0.6, 0)
    return canvas


def test_openpose_is_the_published_drawing_but_for_edges():
    out = np.asarray(masa.conditions.openpose([BODY, OTHER])).astype(int)
    ref = published_openpose([BODY, OTHER]).astype(int)
    assert (out - ref).__abs__().max(-1).mean() < 1.5
    both, either = (out.any(-1) & ref.any(-1)).sum(), (out.any(-1) | ref.any(-1)).sum()
    assert both / either > 0.88  # OpenCV's shapes have whole numbers
    near = [np.roll(ref, (i, j), (0, 1)) for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2)]
    assert (np.min([np.abs(out - r).max(-1) for r in near], axis=0) > 3).mean() < 1e-3


def test_openpose_has_the_published_colours_and_leaves_out_what_is_not_seen():
    x = np.asarray(masa.conditions.openpose(BODY))
    for (one, other), colour in {(2, 3): "ffaa00", (6, 7): "55ff00", (8, 9): "00ff55", (12, 13): "0055ff"}.items():
        middle = [round((a + b) / 2) for a, b in zip(BODY[one], BODY[other], strict=True)]
        assert x[middle[1], middle[0]].tolist() == [round(0.6 * c) for c in bytes.fromhex(colour)]
    assert x[80, 400].tolist() == [51, 255, 34]  # the left wrist: 0.6 of its limb over 0.4 of its disc
    unseen = [None if i == 7 else joint for i, joint in enumerate(BODY)]
    y = np.asarray(masa.conditions.openpose(unseen))
    assert not y[80, 400].any()
    assert not y[100, 375].any()
    assert np.array_equal(x[:, :330], y[:, :330])
    small = np.asarray(masa.conditions.openpose([[a / 4, b / 4] for a, b in BODY], 128, 128))
    assert 0.6 < 16 * small.any(-1).sum() / x.any(-1).sum() < 1.6  # in proportion, but for whole pixels


def test_keypose_has_cocos_joints_and_colours():
    order = [OPENPOSE_JOINTS.index(name) for name in KEYPOSE_JOINTS]
    x = np.asarray(masa.conditions.keypose([BODY[i] for i in order]))
    assert {tuple(c) for c in x.reshape(-1, 3)} == {(0, 0, 0), (255, 153, 51), (0, 255, 0), (0, 128, 255)}
    assert x[80, 400].tolist() == [0, 255, 0]  # the left wrist
    assert x[270, 140].tolist() == [0, 128, 255]  # the right one
    assert x[90, 256].tolist() == [255, 153, 51]  # the nose
    assert x[220, 294].tolist() == [255, 153, 51]  # shoulder to hip
    assert x[330, 303].tolist() == [0, 255, 0]  # the left thigh


@pytest.mark.parametrize(
    ("joints", "message"),
    [
        ([], "joints are \\[\\]"),
        (BODY[:17], "a person of 17 joints; expected 18: nose, neck"),
        ([BODY, BODY[:3]], "a person of 3 joints"),
        ([*BODY[:17], [600, 3]], r"the left ear is at \(600, 3\), outside a picture 512 wide"),
        ([*BODY[:17], [-1, 3]], "outside a picture"),
        ([[[1, 2, 3], *BODY[1:]]], "the nose is .* expected .x, y. in pixels"),
        ([[float("nan"), 2], *BODY[1:]], r"the nose is \[nan, 2\]; expected .x, y. in pixels"),
        ([BODY[0], [1e400, 2], *BODY[2:]], r"the neck is \[inf, 2\]"),
        ([BODY[0], [10**400, 2], *BODY[2:]], r"the neck is \[10000"),
        ([["a", 1]] * 18, r"the nose is \['a', 1\]"),
        ([BODY, [["a", 1]] * 18], r"the nose is \['a', 1\]"),
        (np.full((18, 2), np.nan), r"the nose is \[nan, nan\]"),
        (np.zeros((3, 17, 2)), "a person of 17 joints"),
        ([[0.5, 0.25]] * 18, "within 1 pixel; expected pixels"),
        ([None] * 18, "all None"),
    ],
)
def test_joints_that_are_none_are_refused(joints, message):
    with pytest.raises(masa.MasaError, match=message):
        masa.conditions.openpose(joints)


def test_joints_may_be_arrays():
    people = np.array([[[100 + 10 * k, 60 + 20 * k] for k in range(18)], [[300, 60 + 20 * k] for k in range(18)]])
    expected = np.asarray(masa.conditions.openpose(people.tolist()))
    for given in (people, people.astype(np.float32), list(people), [[*person] for person in people]):
        assert np.array_equal(np.asarray(masa.conditions.openpose(given)), expected)
    one = np.asarray(masa.conditions.keypose(people[0, :17]))
    assert np.array_equal(one, np.asarray(masa.conditions.keypose(people[0, :17].tolist())))


# ---------------------------------------------------------------------------------------------------------- given maps


def test_depth_is_brought_to_the_whole_range(tmp_path):
    ramp = np.linspace(3.0, 7.0, 64)[:, None].repeat(32, 1)
    out = np.asarray(masa.conditions.depth(ramp))
    assert out.shape == (64, 32, 3)
    assert (out[0] == 0).all()
    assert (out[-1] == 255).all()
    assert np.array_equal(np.asarray(masa.conditions.depth(ramp, near_is_dark=True)), 255 - out)
    Image.fromarray((ramp * 5000).astype(np.uint16)).save(tmp_path / "depth16.png")
    assert np.abs(np.asarray(masa.conditions.depth(tmp_path / "depth16.png")).astype(int) - out).max() <= 1
    for bad, message in (
        (photo("coffee"), "is in colours; expected grey"),
        (np.zeros((4, 4)), "values from 0 to 0"),
        (np.array([[0.0, np.inf]]), "expected finite"),
        (np.zeros(4), "of shape"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            masa.conditions.depth(bad)


def test_segments_are_flat_colours():
    flat = np.zeros((64, 64, 3), np.uint8)
    flat[:32, :, 0] = 120
    assert np.array_equal(np.asarray(masa.conditions.seg(flat)), flat)
    with pytest.raises(masa.MasaError, match="colours; expected one for each class, 256 at most"):
        masa.conditions.seg(photo("astronaut"))
    with pytest.raises(masa.MasaError, match="is grey"):
        masa.conditions.seg(flat[..., :1].repeat(3, 2))


def test_colours_are_opencvs_patches():
    cv2 = pytest.importorskip("cv2")
    for x in (photo("astronaut"), photo("coffee")[:384, :576]):
        h, w = x.shape[:2]
        small = cv2.resize(x, (w // 64, h // 64), interpolation=cv2.INTER_CUBIC)
        ref = cv2.resize(small, (w, h), interpolation=cv2.INTER_NEAREST)
        out = np.asarray(masa.conditions.color(x))
        assert np.abs(out.astype(int) - ref).max() <= 1  # OpenCV's weights are whole numbers
        assert np.array_equal(np.asarray(masa.conditions.color(out)), out)  # once is enough


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: masa.conditions.canny(x, 200, 100), "low is 200 and high 100"),
        (lambda x: masa.conditions.canny(x, -1, 100), "low is -1"),
        (lambda x: masa.conditions.canny(x, "1"), "low is '1'"),
        (lambda x: masa.conditions.canny(x, short_side=4), "short_side is 4"),
        (lambda x: masa.conditions.sketch(x, 0), "threshold is 0"),
        (lambda x: masa.conditions.sketch(x[:1, :1] * 0), "a drawing of one colour"),
        (lambda x: masa.conditions.canny(x / 255.0), r"the array is float64"),
        (
            lambda x: masa.conditions.canny(torch.zeros(3, 8, 8)),
            r"cannot be a Tensor here; .* or uint8 array \(h, w, 3\)$",
        ),
        (lambda x: masa.conditions.openpose(BODY, 1_000_000), "height is 1000000; expected pixels, 8 to 8192"),
        (lambda x: masa.conditions.openpose(BODY, height="a"), "height is 'a'"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(masa.MasaError, match=message):
        make(photo("chelsea"))


def test_a_missing_library_is_named(monkeypatch):
    for name in ("scipy.ndimage", "skimage.filters"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(masa.MasaError, match=r"needs scipy, which is not installed .*pip install 'masa\[conditions\]'"):
        masa.conditions.canny(photo("chelsea"))
    with pytest.raises(masa.MasaError, match="needs skimage"):
        masa.conditions.sketch(photo("chelsea"))
    masa.conditions.openpose(BODY)  # needs none


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo("chelsea")).save("cat.png")
    (tmp_path / "joints.json").write_text(json.dumps(BODY))
    flat = [v for j in OTHER for v in ([*j, 0.9] if j else [0, 0, 0])]
    (tmp_path / "people.json").write_text(json.dumps({"people": [{"pose_keypoints_2d": flat}]}))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "make"),
    [
        (["canny", "cat.png", "--low", "50", "--high", "300"], lambda: masa.conditions.canny("cat.png", 50, 300)),
        (["canny", "cat.png", "--short-side", "0"], lambda: masa.conditions.canny("cat.png", short_side=None)),
        (["sketch", "cat.png", "--threshold", "0.5"], lambda: masa.conditions.sketch("cat.png", 0.5)),
        (["sketch", "cat.png", "--drawing"], lambda: masa.conditions.sketch("cat.png", drawing=True)),
        (["color", "cat.png", "--short-side", "128"], lambda: masa.conditions.color("cat.png", short_side=128)),
        (["openpose", "joints.json", "--width", "640"], lambda: masa.conditions.openpose(BODY, 512, 640)),
        (["openpose", "people.json"], lambda: masa.conditions.openpose([OTHER])),
    ],
)
def test_the_command_equals_the_library(home, options, make, capsys):
    assert main(["condition", *options, "-o", "out.png"]) == 0
    assert capsys.readouterr().out == "out.png\n"
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(make()))


def test_mistakes_are_one_line(home, capsys):
    (home / "broken.json").write_text("[1")
    (home / "other.json").write_text("{}")
    (home / "large.json").write_text(json.dumps([["x", 1], *BODY[1:]]).replace('"x"', "1e400"))
    for options, message in (
        (["canny", "gone.png"], "gone.png"),
        (["canny", "cat.png", "-o", "a.jpg"], "must end in .png"),
        (["canny", "cat.png", "-o", "cat.png"], "cat.png is already there"),
        (["canny", "cat.png", "--threshold", "0.5"], "--threshold has no meaning for canny; it is of sketch"),
        (["seg", "cat.png"], "colours; expected one for each class"),
        (["depth", "cat.png"], "is in colours"),
        (["openpose", "broken.json"], "broken.json is not JSON"),
        (["openpose", "other.json"], "holds no list of joints"),
        (["openpose", "cat.png"], "is not JSON"),
        (["openpose", "large.json"], "the nose is [inf, 1]; expected [x, y] in pixels, or None"),
        (["openpose", "joints.json", "--width", "8193"], "width is 8193; expected pixels, 8 to 8192"),
        (["keypose", "joints.json"], "a person of 18 joints; expected 17"),
    ):
        assert main(["condition", *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
