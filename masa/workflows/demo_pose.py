"""`masa demo --pose`: a pose by drawing, on the embedded model: source, stick figure, edit and truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from masa.controls.base import Control
from masa.controls.conditions import PIXELS, load_condition
from masa.controls.masactrl import MasaCtrl
from masa.controls.t2i_adapter import T2IAdapter
from masa.inversion import invert
from masa.io.pictures import ImageLike
from masa.output.result import Picture, Result, label_row
from masa.pipeline import StableDiffusion, load
from masa.sampling import sample
from masa.weights.demo.stick_figure import stick_figure
from masa.weights.demo.world import Between, Pose, Sample, caption, render
from masa.workflows.demo import GUIDANCE, STEPS, enlarge, find_sample

# What suits the embedded model: benchmarks/results/drawn_poses.md.
CONTROL = MasaCtrl(start_step=2, start_layer=6)
WEIGHT = 2.0
SEED = 2
# One that a prompt names, and one that no prompt can.
POSES: tuple[Pose, ...] = ("standing", Between("sitting", "jumping", 0.6))
SHEET, PICTURE, DRAWN = "pose.png", "picture.png", ("drawn_0.png", "drawn_1.png")


def file_names(drawing: ImageLike | None) -> list[str]:
    """What `run` writes."""
    return [SHEET, PICTURE, *(DRAWN if drawing is None else ())]


def run(folder: Path, drawing: ImageLike | None = None, seed: int | None = None, progress: bool = True) -> list[Path]:
    """Write pose.png: a picture, drawn poses and the edits to them, and, but for a drawing of your own, the truth.

    drawing: white lines on black, a figure about where the picture's is; default the world's own, of a pose that
    prompts name and of one between two. They are written too.
    """
    sd = load()
    who = find_sample(10 * (SEED if seed is None else seed))
    size = sd.config.image_size
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(rendered(who, who.pose, size))
    picture.save(folder / PICTURE)  # a file, so that a rerun finds it
    if drawing is not None:
        edited = edit(sd, who, folder / PICTURE, [None], [drawing], progress)
        shown = load_condition("the drawing", drawing, (size // PIXELS, size // PIXELS))[0]
        seen = Image.fromarray((shown * 255).round().byte().permute(1, 2, 0).numpy())
        labels = [f"picture: {prompt(who, who.pose)}", "your drawing", f"MasaCtrl and the drawing: {edited.labels[1]}"]
        sheet = label_row([enlarge(p) for p in (picture, seen, edited.targets[0])], labels)
        Picture.of(sheet, edited.settings).save(folder / SHEET)
        return [folder / SHEET, folder / PICTURE]

    sticks = [Image.fromarray(stick_figure(who.appearance.subject, pose, who.scene, size)) for pose in POSES]
    for stick, name in zip(sticks, DRAWN, strict=True):
        stick.save(folder / name)
    drawn = [folder / name for name in DRAWN]
    edited = edit(sd, who, folder / PICTURE, POSES, drawn, progress)
    rows = []
    for pose, stick, target, words in zip(POSES, sticks, edited.targets, edited.labels[1:], strict=True):
        said = f"between {pose.first} and {pose.second}" if isinstance(pose, Between) else pose
        pictures = [
            *(picture, stick.convert("RGB"), target),
            Image.fromarray(rendered(who, pose, size)),
        ]
        labels = [
            *(f"picture: {prompt(who, who.pose)}", f"drawn pose: {said}"),
            *(f"MasaCtrl and the drawing: {words}", "the truth, drawn"),
        ]
        rows.append(label_row([enlarge(p) for p in pictures], labels))
    Picture.of(stacked(rows), edited.settings).save(folder / SHEET)
    return [folder / SHEET, folder / PICTURE, *drawn]


def edit(
    sd: StableDiffusion, who: Sample, picture: Path, poses: Sequence[Pose | None], drawn: Sequence[ImageLike],
    progress: bool,
) -> Result:  # fmt: skip
    """Each drawing its own target, with the pose's name where it has one."""
    trajectory = invert(sd, picture, prompt(who, who.pose), steps=STEPS, progress=progress)
    controls: list[Control] = [CONTROL, T2IAdapter("demo", target=list(drawn), weight=WEIGHT)]
    targets = [prompt(who, pose) for pose in poses]
    return sample(
        sd, target=targets, trajectory=trajectory, controls=controls, guidance_scale=GUIDANCE, progress=progress
    )


def prompt(who: Sample, pose: Pose | None) -> str:
    """Kind and direction, and the pose where it has a name; of an unknown pose, kind alone."""
    named = pose if isinstance(pose, str) else None
    return caption(who.appearance, named, who.scene, colour=False, pattern=False, place=False, facing=pose is not None)


def rendered(who: Sample, pose: Pose, size: int) -> np.ndarray:
    return render(who.appearance, pose, who.scene, size)[0]


def stacked(rows: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures of one width above one another, on white."""
    sheet = Image.new("RGB", (rows[0].width, sum(row.height + gap for row in rows) - gap), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + gap
    return sheet
