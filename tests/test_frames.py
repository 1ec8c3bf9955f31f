"""A video: frames equal the targets that they are, however many run at once; what is saved runs again."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import make_adapter, make_controlnet, original_adapter_keys, picture, save
from PIL import Image, ImageSequence
from rounding import same

import masa
from masa.cli.commands import main
from masa.controls import ActiveControl, Edit, choose_layers, choose_steps
from masa.io.movies import read_movie
from masa.output.frames import read_run

SOURCE, PROMPT = "a photo of a sitting cat", "a photo of a running cat"
SIDE, COUNT = 128, 4
USUAL = {"steps": 3, "guidance_scale": 5.0, "progress": False, "height": SIDE, "width": SIDE}
CONTROL = masa.MasaCtrl(1, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    nets = {"full": make_adapter("full"), "lines": make_adapter("full", 1, 2)}
    made = {
        name: save(folder / f"{name}.safetensors", original_adapter_keys(net.state_dict()))
        for name, net in nets.items()
    }
    return made | {"net": save(folder / "net.safetensors", make_controlnet().state_dict())}


@pytest.fixture(scope="module")
def poses():
    """Conditions, each other than the others."""
    return [picture(i, size=(SIDE, SIDE)) for i in range(COUNT)]


@pytest.fixture(scope="module")
def trajectory(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "photo.png"
    noise = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return masa.invert(tiny, path, SOURCE, steps=3, progress=False)


@pytest.fixture
def video(tiny, files, poses):
    def run(**changes):
        start = {} if {"latents", "trajectory"} & {*changes} else {"seed": 3}
        settings = {"adapter": masa.T2IAdapter(files["full"]), "controls": CONTROL} | USUAL | start | changes
        of_trajectory = ("steps", "height", "width") if "trajectory" in changes else ()
        settings = {name: value for name, value in settings.items() if name not in of_trajectory}
        source, prompt = settings.pop("source", SOURCE), settings.pop("prompt", PROMPT)
        return masa.sample_frames(tiny, source, prompt, settings.pop("conditions", poses), **settings)

    return run


@pytest.fixture(scope="module")
def made(tiny, files, poses):
    """One video, to be saved."""
    return masa.sample_frames(
        tiny, SOURCE, PROMPT, poses, adapter=masa.T2IAdapter(files["full"]), controls=CONTROL, seed=3, **USUAL
    )


def as_targets(tiny, controls, **settings):
    start = {} if {"latents", "trajectory"} & {*settings} else {"seed": 3}
    usual = {"guidance_scale": 5.0, "progress": False} if "trajectory" in settings else USUAL
    return masa.sample(tiny, SOURCE, [PROMPT] * COUNT, controls=controls, **(usual | start | settings))


def masks() -> masa.GivenMasks:
    """A source's mask, and one for each frame."""
    source, target = torch.zeros(16, 16), torch.zeros(16, 16)
    source[4:12, 2:9] = 1.0
    target[3:9, 5:15] = 1.0
    return masa.GivenMasks(source, [target, 1 - target, target.T.contiguous(), target.flip(0)])


# ----------------------------------------------------------------------------------- frames are targets of one source


@pytest.mark.parametrize("at_once", [None, 1, 3, 100])
def test_frames_equal_targets_however_many_at_once(tiny, files, poses, video, at_once):
    ref = as_targets(tiny, [CONTROL, masa.T2IAdapter(files["full"], target=poses)])
    out = video(frames_at_once=at_once)
    same(out.latents, ref.latents[1:])
    assert len(out) == len(out.images) == COUNT
    for picture_, target in zip([out.source, *out.images], ref.images, strict=True):
        assert np.abs(np.asarray(picture_).astype(int) - np.asarray(target)).max() <= 1
    assert (out.latents[0] - out.latents[1]).abs().max() > 0.1  # each has a layout of its own


@pytest.mark.parametrize("anchor", ["source", "first"])
def test_no_call_of_the_network_takes_more_frames_than_asked(tiny, video, anchor):
    rows = []
    hook = tiny.unet.register_forward_pre_hook(lambda net, given: rows.append(len(given[2])))  # prompts
    try:
        video(frames_at_once=2, anchor=anchor)
    finally:
        hook.remove()
    assert max(rows) == 4  # two frames, two halves: the source is cached
    calls = 3 * (1 + (2 if anchor == "source" else 3))  # of the source, then of each chunk
    assert len(rows) == calls


@pytest.mark.parametrize(
    "controls",
    [
        [],
        masa.MasaCtrl(1, 8, union=True, source_weight=2.0),
        masa.MasaCtrl(1, 8, mask=masks()),
        masa.MasaCtrl(1, 10, mask=masa.WordMasks("cat", "cat", threshold=0.4)),
        [masa.MasaCtrl(1, 8), masa.FreeU()],
        masa.StyleTransfer(1, 8),
        masa.FreeU(),
    ],
    ids=["none", "union", "given masks", "word masks", "freeu beside", "style", "freeu alone"],
)
def test_other_controls_act_as_in_one_batch(tiny, files, poses, video, controls):
    several = [*controls] if isinstance(controls, list) else [controls]
    ref = as_targets(tiny, [*several, masa.T2IAdapter(files["full"], target=poses)])
    same(video(controls=controls, frames_at_once=3).latents, ref.latents[1:])


def test_several_adapters_have_conditions_each(tiny, files, poses, video):
    lines = [pose[:1].flip(1) for pose in poses]
    both = [masa.T2IAdapter(files["full"], weight=0.7), masa.ControlNet(files["net"], scale=0.8)]
    full, net = (replace(one, target=shown) for one, shown in zip(both, (poses, lines), strict=True))
    ref = as_targets(tiny, [CONTROL, full, net])
    same(video(adapter=both, conditions=[poses, lines], frames_at_once=2).latents, ref.latents[1:])


@pytest.mark.parametrize("pinned", [True, False])
def test_a_real_picture_is_the_source_of_all_frames(tiny, files, poses, video, trajectory, pinned):
    controls = [CONTROL, masa.BlendedLatents(masks().source, skip=0.4)]
    settings = {"trajectory": trajectory, "seed": 5, "pin_source": pinned}
    ref = as_targets(tiny, [*controls, masa.T2IAdapter(files["full"], target=poses)], **settings)
    out = video(controls=controls, frames_at_once=2, **settings)
    same(out.latents, ref.latents[1:])
    inside = torch.nn.functional.interpolate(masks().source[None, None], (SIDE // 8, SIDE // 8))[0, 0] > 0
    outside = [(frame - trajectory.latents[0])[:, ~inside].abs().max() for frame in out.latents]
    assert max(outside) < 1e-5  # the picture is kept there


# --------------------------------------------------------------------------------------------------------- anchors


@dataclass(frozen=True)
class FirstByHand:
    """Frames after the first read the first, which reads the source: named row by row."""

    start_step: int
    start_layer: int

    def begin(self, run):
        layers = choose_layers(None, self.start_layer, run, "it")
        active = ActiveControl()
        active.steps = choose_steps(None, self.start_step, run, "it")

        def edits(step, branches):
            if step not in active.steps:
                return {}
            rows = [(row.branch, row.halves[0]) for row in branches.rows]
            read = tuple(branches.row(0 if branch < 2 else 1, half) for branch, half in rows)
            edit = Edit(k_from=read, v_from=read)
            return {site.index: edit for site in run.sites if site.kind == "self" and site.layer in layers}

        active.edits = edits
        return active


@pytest.mark.parametrize("at_once", [2, 3, None])
def test_behind_the_first_frame_the_others_read_it(tiny, files, poses, video, at_once):
    ref = as_targets(tiny, [FirstByHand(1, 8), masa.T2IAdapter(files["full"], target=poses)])
    out = video(anchor="first", frames_at_once=at_once)
    same(out.latents, ref.latents[1:])
    assert (out.latents[1] - video().latents[1]).abs().max() > 0.01


def test_two_anchors_that_are_one_picture_equal_it(files, poses, video):
    """The source has the first frame's prompt and condition: source, first frame and their union are one picture."""
    changes = {"source": PROMPT, "adapter": masa.T2IAdapter(files["full"], source=poses[0])}
    ref = video(**changes)
    assert (ref.latents[0] - ref.latents[1]).abs().max() > 0.1
    for anchor in ("first", "both"):
        error = (
            video(anchor=anchor, frames_at_once=3, **changes).latents - ref.latents
        ).abs().max() / ref.latents.std()
        assert error < 3e-4, anchor  # float32 rounding: the softmax is over the same keys twice


def test_both_lies_between_and_follows_the_union_s_weight(video):
    found = {anchor: video(anchor=anchor).latents[2] for anchor in ("source", "first", "both")}
    weighed = video(anchor="both", controls=masa.MasaCtrl(1, 8, union=True, source_weight=1e6)).latents[2]
    distance = {anchor: (found["both"] - found[anchor]).norm() for anchor in ("source", "first")}
    assert 0 < max(distance.values()) < (found["source"] - found["first"]).norm()
    same_as_both = (weighed - found["both"]).abs().max() / found["both"].std()
    assert same_as_both < 3e-3  # own keys of a millionth of the weight
    own = video(anchor="both", controls=masa.MasaCtrl(1, 8, union=True)).latents[2]
    assert (own - found["both"]).abs().max() > 0.01


def test_masks_of_the_first_frame_restrict_what_others_read_of_it(video):
    frames = video(anchor="first", controls=masa.MasaCtrl(1, 8, mask=masks()), frames_at_once=2)
    together = video(anchor="first", controls=masa.MasaCtrl(1, 8, mask=masks()))
    same(frames.latents, together.latents)
    mask = masks()
    other = [mask.targets[0], mask.targets[2], *mask.targets[2:]]  # the second frame's is another
    changed = video(anchor="first", controls=masa.MasaCtrl(1, 8, mask=masa.GivenMasks(mask.source, other)))
    moved = [(a - b).abs().max() > 1e-3 for a, b in zip(changed.latents, together.latents, strict=True)]
    assert moved == [False, True, False, False]
    other = [mask.targets[1], *mask.targets[1:]]  # the first frame's: of its own queries, and of the others' keys
    changed = video(anchor="first", controls=masa.MasaCtrl(1, 8, mask=masa.GivenMasks(mask.source, other)))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(changed.latents, together.latents, strict=True))


# ------------------------------------------------------------------------------------------------- what is given


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "a red dog"},
        {"prompt": "a red dog"},
        {"anchor": "both"},
        {"controls": masa.MasaCtrl(2, 8)},
        {"steps": 4},
        {"guidance_scale": 2.0},
        {"guidance": masa.RescaledGuidance(0.7)},
        {"negative_prompt": "a red dog"},
        {"height": 192},
        {"width": 192},
        {"seed": 4},
        {"latents": torch.zeros(1, 4, SIDE // 8, SIDE // 8)},
        {"eta": 0.5},
        {"schedule": masa.Schedule(masa.ScheduleConfig(beta_end=0.02))},
        {"sampler": "dpm++2m"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_matters(video, made, changes):
    out = video(**changes)
    assert out.latents.shape != made.latents.shape or (out.latents - made.latents).abs().max() > 1e-3


def test_settings_of_a_real_source_matter(video, trajectory):
    ref = video(trajectory=trajectory, controls=CONTROL)
    for changes in ({"pin_source": False}, {"skip_steps": 1}):
        assert (video(trajectory=trajectory, **changes).latents - ref.latents).abs().max() > 1e-3


def test_where_the_source_is_kept_and_decoding_in_tiles_leave_the_frames_as_they_are(video, made):
    same(video(store="disk").latents, made.latents)
    reference = video(backend="reference")
    assert (reference.latents - made.latents).abs().max() / made.latents.std() < 3e-4  # float32 rounding
    assert reference.settings["backend"] == "reference"
    tiled = video(tiled=True)
    same(tiled.latents, made.latents)
    assert tiled.settings["tiled"] is True


def test_progress_is_told_over_all_frames(video, capsys):
    video(progress=True, frames_at_once=2)
    shown = capsys.readouterr().err
    assert re.search(r"frames: +100%.* 4.00/4.00 ", shown)
    video(progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("form", ["folder", "gif", "webp", "png", "mp4", "array", "tensor", "paths", "pictures"])
def test_conditions_in_every_form(poses, tmp_path, form):
    shown = [(pose.permute(1, 2, 0) * 255).byte().numpy() for pose in poses]
    pictures = [Image.fromarray(one) for one in shown]
    tolerance = 0
    if form == "folder":
        for i, one in enumerate(pictures):
            one.save(tmp_path / f"pose_{8 + i}.png")  # 8, 9, 10, 11
        (tmp_path / "notes.txt").write_text("no picture")
        given = tmp_path
    elif form in ("gif", "webp", "png"):
        given = tmp_path / f"poses.{form}"
        pictures[0].save(given, save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    elif form == "mp4":
        pytest.importorskip("imageio_ffmpeg")
        from masa.io.movies import write_film

        given, tolerance = tmp_path / "poses.mp4", 60
        write_film(given, [Image.fromarray(one.max(2)).convert("RGB") for one in shown], 8)
        shown = [np.repeat(one.max(2)[..., None], 3, 2) for one in shown]
    elif form == "paths":
        given = [tmp_path / f"{name}.png" for name in "dbca"]
        for path, one in zip(given, pictures, strict=True):
            one.save(path)
    else:
        given = {"array": np.stack(shown), "tensor": torch.stack(poses), "pictures": pictures}[form]
    found = read_movie(given, "conditions")
    assert len(found) == COUNT
    for one, ref in zip(found, shown, strict=True):
        array = (one.permute(1, 2, 0) * 255).numpy() if form == "tensor" else np.asarray(one)
        assert np.abs(array.astype(int) - ref).mean() <= tolerance / 10, form


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
@pytest.mark.parametrize("saved", ["by Pillow", "by masa"])
@pytest.mark.parametrize("fps", [5, 12, 50])
def test_frames_that_are_held_count_as_often(made, tmp_path, form, saved, fps):
    """Files keep equal neighbours as one frame that lasts longer."""
    a, d = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    frames, path = [a, a, a, d, d], tmp_path / f"held.{form}"
    if saved == "by masa":
        replace(made, images=frames).save(path, fps=fps)
    else:
        duration = 10 * round(100 / fps)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, lossless=True)
    with Image.open(path) as animation:
        assert animation.n_frames == 2
    found = read_movie(path, "conditions")
    assert len(found) == 5
    for one, frame in zip(found, frames, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(frame)).max() <= 8  # a GIF's palette


def test_durations_that_were_rounded_hold_no_frame(tmp_path):
    """At 30 frames a second a GIF's frames last 3 or 4 hundredths: each is one frame."""
    frames = [Image.new("L", (8, 8), 50 * i) for i in range(4)]
    path = tmp_path / "rounded.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[30, 40, 30, 70])
    assert [np.asarray(one).max() for one in read_movie(path, "conditions")] == [0, 50, 100, 150, 150]


def test_an_animation_is_not_held_for_ever(tmp_path):
    frames = [Image.new("L", (8, 8), 50 * i) for i in range(2)]
    path = tmp_path / "long.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[20, 199_980])
    assert len(read_movie(path, "conditions")) == 10_000
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[20, 200_000])
    with pytest.raises(masa.MasaError, match=r"long\.gif has 10,001 frames, .* expected 10,000 at most"):
        read_movie(path, "conditions")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": []}, "conditions hold no picture"),
        ({"conditions": "gone"}, "conditions: gone is not there; give a folder"),
        ({"conditions": Image.new("RGB", (8, 8))}, "conditions are one picture; give a list"),
        ({"conditions": torch.zeros(8, 8)}, "conditions are one picture"),
        ({"conditions": 3}, "conditions are a int; expected a list"),
        ({"conditions": [torch.zeros(8, 8), None]}, r"conditions\[1\] is None; give every frame a picture"),
        ({"conditions": [torch.zeros(8, 8), torch.zeros(8, 9)]}, r"conditions\[1\] has 9x8 pixels, and the first 8x8"),
        ({"conditions": [torch.zeros(8, 8) - 1]}, "values from -1 to -1"),
        ({"adapter": []}, "adapter is empty"),
        ({"adapter": "pose.safetensors"}, "expected a control that takes a picture for each target"),
        ({"adapter": masa.MasaCtrl()}, "expected a control that takes a picture for each target"),
        ({"adapter": masa.T2IAdapter}, "expected a control that takes a picture for each target"),
        ({"anchor": "last"}, "anchor is 'last'; expected one of 'source', 'first', 'both'"),
        ({"anchor": "first", "controls": []}, "controls have none; add masa.MasaCtrl"),
        ({"anchor": "first", "frames_at_once": 1}, r"frames_at_once is 1; expected a number from 2 \(the first"),
        ({"anchor": "both", "controls": masa.MasaCtrl(1, 8, mask=masks())}, "anchor='both' reads two"),
        ({"frames_at_once": 0}, "frames_at_once is 0; expected a number from 1"),
        ({"frames_at_once": True}, "frames_at_once is True"),
        ({"prompt": ["a", "b"]}, "expected one, which all frames have"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, "expected .1, 4, h, w., with which all frames start"),
        ({"controls": masa.RecordQueries()}, "RecordQueries keeps what a video has no place for"),
        (
            {"controls": masa.MasaCtrl(1, mask=masa.GivenMasks(masks().source, masks().targets[:3]))},
            "3 target masks for 4",
        ),
        ({"controls": masa.BlendedLatents(masks().source)}, "keeps a real picture"),
        ({"guidance_scale": "x"}, "guidance_scale is 'x'"),
        ({"skip_steps": 1}, "starts from half noisy latents"),
        ({"store": "shelf"}, "store is 'shelf'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_refused_before_long_work(tiny, video, changes, message):
    hook = tiny.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran first"))
    try:
        with pytest.raises(masa.MasaError, match=message):
            video(**changes)
    finally:
        hook.remove()


@dataclass(frozen=True)
class Late:
    """A control that leaves out the first step."""

    def begin(self, run):
        active = ActiveControl()
        active.first_step = 1
        return active


def test_what_only_the_whole_video_tells_is_refused_before_long_work(tiny, video):
    hook = tiny.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran first"))
    try:
        with pytest.raises(masa.MasaError, match="3 target masks for 4"):  # as many as fit one chunk
            video(controls=masa.MasaCtrl(1, mask=replace(masks(), target=masks().targets[:3])), frames_at_once=3)
        with pytest.raises(masa.MasaError, match="half noisy latents"):
            video(controls=[CONTROL, Late()])
    finally:
        hook.remove()


def test_bad_adapters_are_refused_before_long_work(tiny, files, poses, video, tmp_path):
    hook = tiny.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran first"))
    two = [masa.T2IAdapter(files["full"]), masa.T2IAdapter(files["lines"])]
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "empty").mkdir()
    try:
        for changes, message in (
            ({"adapter": masa.T2IAdapter(files["full"], target=poses[0])}, "has a target of its own; leave it out"),
            ({"adapter": masa.T2IAdapter(files["net"])}, "is a ControlNet"),
            ({"adapter": two}, "there are 2 adapters; give conditions as a list with a set"),
            ({"adapter": two, "conditions": [poses, poses[:2]]}, "conditions have 4 and 2 frames"),
            ({"conditions": tmp_path / "torn.png"}, "not a picture that Pillow can read"),
            ({"conditions": [poses[0], tmp_path / "torn.png"]}, "not a picture that Pillow can read"),
            ({"conditions": tmp_path / "empty"}, "holds no pictures"),
        ):
            with pytest.raises(masa.MasaError, match=message):
                video(**changes)
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------------------- what is saved

FORMS = ["frames.gif", "frames.webp", "frames.png", "frames.mp4", "folder"]


def needs_film(name):
    if name.endswith(".mp4"):
        pytest.importorskip("imageio_ffmpeg")


def shown_in(path: Path) -> list[np.ndarray]:
    if path.is_dir():
        return [np.asarray(Image.open(file)) for file in sorted(path.glob("frame_*.png"))]
    if path.suffix == ".mp4":
        return [np.asarray(one) for one in read_movie(path, "it")]
    with Image.open(path) as animation:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_shows_the_frames_and_runs_again(tiny, made, tmp_path, name):
    needs_film(name)
    paths = made.save(tmp_path / name, fps=5)
    assert all(path.is_file() for path in paths)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*paths}
    found = shown_in(tmp_path / name)
    assert len(found) == COUNT
    for one, frame in zip(found, made.images, strict=True):
        error = np.abs(one.astype(int) - np.asarray(frame)).mean()
        # A palette of 255 colours for frames of noise, and half the colours' resolution in films.
        assert error <= {"frames.gif": 20, "frames.mp4": 20}.get(name, 0)
    settings, _ = read_run(tmp_path / name)
    assert settings == made.settings
    again = masa.rerun(tmp_path / name, tiny, progress=False)
    assert torch.equal(again.latents, made.latents)
    assert again.settings == made.settings


@pytest.mark.parametrize("name", ["frames.gif", "frames.webp", "frames.png"])
def test_animations_run_for_ever_at_the_rate_asked(made, tmp_path, name):
    made.save(tmp_path / name, fps=5)
    with Image.open(tmp_path / name) as animation:
        assert animation.info["loop"] == 0
        animation.seek(1)
        animation.load()
        assert animation.info["duration"] == 200
    made.save(tmp_path / name, fps=20, overwrite=True)
    with Image.open(tmp_path / name) as animation:
        animation.seek(1)
        animation.load()
        assert animation.info["duration"] == 50


def test_a_gif_has_one_palette(made, tmp_path):
    made.save(tmp_path / "frames.gif")
    data = (tmp_path / "frames.gif").read_bytes()
    descriptors = [
        i for i in range(len(data) - 10) if data[i : i + 5] == b"\x2c\x00\x00\x00\x00" and data[i + 5] == SIDE
    ]
    assert len(descriptors) >= COUNT - 1
    assert not any(data[i + 9] & 0x80 for i in descriptors)  # no frame brings a palette of its own


def test_long_settings_of_a_gif_lie_beside_it(tiny, made, tmp_path, monkeypatch):
    monkeypatch.setattr("masa.output.frames.MOST_IN_GIF", 100)
    paths = made.save(tmp_path / "frames.gif")
    assert [path.name for path in paths] == ["frames.gif", "frames.gif.json"]
    assert torch.equal(masa.rerun(paths[0], tiny, progress=False).latents, made.latents)


@pytest.mark.parametrize("anchor", ["source", "both"])
def test_one_frame_s_picture_runs_again_alone(tiny, video, tmp_path, anchor):
    controls = masa.MasaCtrl(1, 8, mask=masks()) if anchor == "source" else CONTROL
    frames = video(anchor=anchor, controls=controls)
    frames.save(tmp_path / "video")
    again = masa.rerun(tmp_path / "video" / "frame_0002.png", tiny, progress=False)
    assert len(again) == (1 if anchor == "source" else 2)
    same(again.latents[-1], frames.latents[2])
    source = masa.rerun(tmp_path / "video" / "source.png", tiny, progress=False).source
    assert np.array_equal(np.asarray(source), np.asarray(frames.source))


def test_a_video_of_a_real_picture_runs_again(tiny, video, trajectory, tmp_path):
    frames = video(trajectory=trajectory, conditions=[picture(i, size=(SIDE, SIDE)) for i in range(2)])
    frames.save(tmp_path / "frames.webp")
    assert torch.equal(masa.rerun(tmp_path / "frames.webp", tiny, progress=False).latents, frames.latents)


def test_an_adapter_that_has_changed_is_refused_by_a_rerun(tiny, files, poses, video, tmp_path):
    path = save(tmp_path / "own.safetensors", original_adapter_keys(make_adapter("full").state_dict()))
    video(adapter=masa.T2IAdapter(path), conditions=poses[:1]).save(tmp_path / "frames.gif")
    save(path, original_adapter_keys(make_adapter("full", seed=9).state_dict()))
    with pytest.raises(masa.MasaError, match="has changed since"):
        masa.rerun(tmp_path / "frames.gif", tiny, progress=False)
    path.unlink()
    with pytest.raises(masa.MasaError, match="is not there any more"):
        masa.rerun(tmp_path / "frames.gif", tiny, progress=False)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_overwritten_unasked(made, tmp_path, name):
    needs_film(name)
    made.save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(masa.MasaError, match="already"):
        made.save(tmp_path / name)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    made.save(tmp_path / name, overwrite=True)


def test_a_shorter_video_leaves_no_frame_of_a_longer_one(made, video, poses, tmp_path):
    made.save(tmp_path)
    (tmp_path / "mine.png").write_bytes(b"mine")
    video(conditions=poses[:2]).save(tmp_path, overwrite=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["frame_0000.png", "frame_0001.png", "mine.png", "settings.json", "source.png"]


@pytest.mark.parametrize("name", FORMS)
def test_what_cannot_be_written_whole_leaves_nothing(made, tmp_path, monkeypatch, name):
    needs_film(name)

    def torn(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("masa.output.frames.write_film", torn)
    monkeypatch.setattr("PIL.Image.Image.save", torn)
    with pytest.raises(OSError, match="no space left"):
        made.save(tmp_path / name)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("frames.jpg", {}, "cannot be saved as frames.jpg; expected a name that ends in .gif, .webp, .png or .mp4"),
        ("frames.gif", {"fps": 0}, "fps is 0; expected frames a second"),
        ("frames.gif", {"fps": 61}, "fps is 61"),
    ],
)
def test_what_is_no_form_is_refused(made, tmp_path, name, settings, message):
    with pytest.raises(masa.MasaError, match=message):
        made.save(tmp_path / name, **settings)
    assert not any(tmp_path.iterdir())


def test_without_imageio_ffmpeg_films_are_refused_by_name(made, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(masa.MasaError, match=r"films need imageio-ffmpeg.*pip install 'masa\[video\]'"):
        made.save(tmp_path / "frames.mp4")
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(masa.MasaError, match="films need imageio-ffmpeg"):
        read_movie(tmp_path / "film.mp4", "conditions")


def test_a_damaged_film_is_refused(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(masa.MasaError, match="cannot be read as a film"):
        read_movie(tmp_path / "film.mp4", "conditions")


def test_files_without_settings_are_refused_by_a_rerun(tiny, tmp_path):
    for name in ("a.gif", "a.webp", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        with pytest.raises(masa.MasaError, match="carries no masa settings"):
            masa.rerun(tmp_path / name, tiny)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(masa.MasaError, match=r"has no a.mp4.json beside it"):
        masa.rerun(tmp_path / "a.mp4", tiny)
    with pytest.raises(masa.MasaError, match=r"holds no settings.json"):
        masa.rerun(tmp_path, tiny)
    for name in ("gone.gif", "gone.png", "gone.mp4", "gone"):
        with pytest.raises(FileNotFoundError, match=rf"^nothing at .*{name}; give the path of a picture, a video or"):
            masa.rerun(tmp_path / name, tiny)


def test_mistakes_of_the_command_that_reruns_are_one_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("masa.rerun", lambda *args, **settings: pytest.fail("ran first"))
    monkeypatch.chdir(tmp_path)
    made.save("v.webp")
    for argv, message in (
        (["gone.gif"], "masa: nothing at gone.gif; give the path"),
        (["v.webp", "-o", "v.webp"], "v.webp is already there; give another path, or overwrite it (--overwrite, "),
    ):
        assert main(["rerun", *argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_a_sheet_shows_all_frames(made):
    sheet = made.sheet(columns=3)
    assert sheet.width == 3 * SIDE + 2 * 4
    assert sheet.height > 2 * SIDE
    assert made.sheet().width == COUNT * SIDE + 3 * 4
    with pytest.raises(masa.MasaError, match="columns is 0"):
        made.sheet(columns=0)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def home(files, poses, tmp_path, monkeypatch):
    """A working folder with adapters, poses as a folder and as an animation, and a photograph."""
    monkeypatch.chdir(tmp_path)
    for name, path in files.items():
        (tmp_path / f"{name}.safetensors").symlink_to(path)
    pictures = [Image.fromarray((pose.permute(1, 2, 0) * 255).byte().numpy()) for pose in poses[:2]]
    (tmp_path / "poses").mkdir()
    for i, one in enumerate(pictures):
        one.save(tmp_path / "poses" / f"{i}.png")
    pictures[1].save(tmp_path / "other.gif", save_all=True, append_images=pictures[:1])
    pictures[0].save(tmp_path / "photo.png")
    return tmp_path


USED = ["--steps", "2", "--seed", "3", "--start-step", "1", "--height", "128", "--width", "128", "-q"]
FULL = ["--t2i-adapter", "full.safetensors"]


def test_the_command_makes_what_python_makes(tiny, tiny_folder, home):
    model = ["-c", str(tiny_folder), "--dtype", "fp32", "--device", "cpu"]
    command = ["video", SOURCE, PROMPT, "poses", *FULL, "--adapter-weight", "0.8", "--anchor", "both", *USED, *model]
    assert main([*command, "--fps", "4", "-o", "out.gif"]) == 0
    frames = masa.sample_frames(
        tiny,
        SOURCE,
        PROMPT,
        home / "poses",
        adapter=masa.T2IAdapter(home / "full.safetensors", weight=0.8),
        anchor="both",
        controls=masa.MasaCtrl(1),
        **(USUAL | {"steps": 2, "guidance_scale": 7.5, "seed": 3}),
    )
    again = masa.rerun("out.gif", tiny, progress=False)
    assert torch.equal(again.latents, frames.latents)
    with Image.open("out.gif") as animation:
        assert animation.info["duration"] == 250
    assert main(["rerun", "out.gif", *model, "-q"]) == 0
    assert len(list(Path("masa-out/0001").glob("frame_*.png"))) == 2
    assert main(["rerun", "masa-out/0001", *model, "-q", "-o", "again.webp"]) == 0
    assert torch.equal(masa.rerun("again.webp", tiny, progress=False).latents, frames.latents)


def test_the_command_takes_several_adapters_and_a_real_picture(tiny, tiny_folder, home):
    model = ["-c", str(tiny_folder), "--dtype", "fp32", "--device", "cpu"]
    options = [*FULL, "--controlnet", "net.safetensors", "other.gif", "--frames-at-once", "1"]
    command = ["video", SOURCE, PROMPT, "poses", *options, "--image", "photo.png", *USED, *model]
    assert main([*command, "--method", "edit-friendly", "-o", "out.webp"]) == 0
    settings, _ = read_run("out.webp")
    assert [adapter["kind"] for adapter in settings["adapters"]] == ["T2IAdapter", "ControlNet"]
    assert settings["conditions"][0] == settings["conditions"][1][::-1]
    assert settings["trajectory"]["method"] == "edit-friendly"
    assert settings["frames_at_once"] == 1
    assert len(masa.rerun("out.webp", tiny, progress=False)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-control", "--anchor", "first"], "anchor='first' says what MasaCtrl's frames read"),
        (["--sampler", "lcm"], "LCM"),
        (["--skip-steps", "50"], "skip_steps is 50"),
        (["--start-step", "2"], "selects no step"),
    ],
    ids=["anchor", "sampler", "skip", "start"],
)
def test_a_picture_is_not_inverted_for_frames_that_will_be_refused(
    home, tiny_folder, monkeypatch, capsys, options, message
):
    monkeypatch.setattr("masa.invert", lambda *given, **more: pytest.fail("the minutes are spent"))
    start = [] if options[0] in ("--start-step", "--no-control") else ["--start-step", "1"]
    used = ["--steps", "2", "--height", "128", "--width", "128", "-q", *start]
    command = ["video", SOURCE, PROMPT, "poses", *FULL, "--image", "photo.png", *used, *options, "-c", str(tiny_folder)]
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_frames_of_an_empty_prompt_have_masactrl_too(home, tiny_folder):
    command = ["video", SOURCE, "", "poses", *FULL, *USED, "-c", str(tiny_folder), "-o", "out.gif"]
    assert main(command) == 0
    settings, _ = read_run("out.gif")
    assert [control["kind"] for control in settings["controls"]] == ["MasaCtrl"]


def test_one_frame_behind_any_anchor(video, poses):
    made = [video(conditions=poses[:1], anchor=anchor, frames_at_once=1) for anchor in ("first", "both")]
    assert [len(frames) for frames in made] == [1, 1]


VIDEO = ["video", SOURCE, PROMPT, "poses"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["video", "photo.png", PROMPT, "poses", *FULL], "photo.png is a file and stands where a prompt belongs"),
        (VIDEO, "frames get their layout from an adapter; give --t2i-adapter FILE"),
        ([*VIDEO, "--t2i-adapter", "gone.safetensors"], "no T2I-Adapter at gone.safetensors"),
        (["video", SOURCE, PROMPT, "gone", *FULL], "conditions: gone is not there"),
        (["video", SOURCE, PROMPT, "full.safetensors", *FULL], "not a picture that Pillow can read"),
        ([*VIDEO, *FULL, "other.gif"], "poses would do nothing: every adapter has conditions of its own"),
        ([*VIDEO, "--t2i-adapter", "a", "b", "c"], "expected FILE, or FILE CONDITIONS, and got a b c"),
        ([*VIDEO, *FULL, "-o", "out.jpg"], "frames cannot be saved as out.jpg"),
        ([*VIDEO, *FULL, "-o", "photo.png"], "photo.png is already there"),
        ([*VIDEO, *FULL, "--fps", "0"], "fps is 0.0; expected frames a second"),
        ([*VIDEO, *FULL, "--fps", "8", "-o", "out"], "--fps 8.0 would do nothing: -o out is a folder of pictures"),
        ([*VIDEO, *FULL, "--method", "ddim"], "--method ddim would do nothing: it inverts a picture; give --image"),
        ([*VIDEO, *FULL, "--free-source"], "--free-source would do nothing"),
        ([*VIDEO, *FULL, "--controlnet-scale", "1"], "--controlnet-scale 1.0 would do nothing"),
        ([*VIDEO, *FULL, "--image", "a.png", "--trajectory", "b"], "not allowed with argument --image"),
        ([*VIDEO, *FULL, "--image", "gone.png"], "gone.png"),
        ([*VIDEO, *FULL, "--targets-at-once", "2"], "unrecognized arguments: --targets-at-once 2"),
        ([*VIDEO, *FULL, "--adapter-source", "gone.png"], "gone.png"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, list) else None,
)
def test_bad_options_are_refused_before_the_model_is_loaded(home, argv, message, capsys, monkeypatch):
    monkeypatch.setattr("masa.load", lambda *args, **settings: pytest.fail("loaded first"))
    before = sorted(home.rglob("*"))
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert sorted(home.rglob("*")) == before


def test_frames_show_themselves_in_a_notebook(made):
    html = made._repr_html_()
    assert html.startswith('<img src="data:image/gif;base64,R0lGODlh')
    assert "frames_at_once" in html
    assert len(html) < 400_000  # without the conditions
    assert repr(made) == f"Frames(4 of {PROMPT!r}, from {SOURCE!r}, 128x128, 3 steps, seed 3)"


def test_what_is_no_model_is_refused(files, poses):
    with pytest.raises(masa.MasaError, match=r"expected what masa.load\(\) gives"):
        masa.sample_frames("sd15", SOURCE, PROMPT, poses, adapter=masa.T2IAdapter(files["full"]))
