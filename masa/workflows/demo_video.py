"""`masa demo --video`: a cat of the embedded model that jumps or walks by drawn poses, with and without control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from masa.controls.masactrl import MasaCtrl
from masa.controls.t2i_adapter import T2IAdapter
from masa.inversion import invert
from masa.output.frames import Frames
from masa.output.result import Picture, label_row
from masa.pipeline import load
from masa.weights.demo.motion import jump, walk
from masa.weights.demo.stick_figure import stick_figure
from masa.weights.demo.world import Pose, caption, render
from masa.weights.demo.world import sample as draw_sample
from masa.workflows.demo import GUIDANCE, STEPS
from masa.workflows.demo_pose import stacked
from masa.workflows.frames import sample_frames

MOTIONS: Mapping[str, Callable[[int], list[Pose]]] = {"jump": jump, "walk": walk}
CONTROL = MasaCtrl(start_step=2, start_layer=6)
SEED = 600_000  # of an individual that no training saw
FRAMES, FPS = 10, 8.0
SHOWN = 5  # frames on the sheet
SIZE = 192  # a picture's side in the film; the model's 128 pixels are small on a screen
ANIMATIONS, SHEET, PICTURE = ("video.gif", "video.webp"), "video.png", "picture.png"
FILES = (*ANIMATIONS, SHEET, PICTURE)


def run(
    folder: Path, motion: str = "jump", seed: int | None = None, adapter: str | Path = "demo", progress: bool = True
) -> list[Path]:
    """Write video.gif and video.webp (drawn pose, frames without control, frames with it, the truth), and a sheet.

    The source is a render of a cat that stands, inverted; it is written too. motion: "jump" or "walk". adapter: a
    T2I-Adapter of stick figures, default the demo model's.
    """
    sd = load()
    who, size = draw_sample(SEED if seed is None else seed, ["cat"]), sd.config.image_size
    poses = MOTIONS[motion](FRAMES)
    sticks = [stick_figure("cat", pose, who.scene, size) for pose in poses]
    words = [
        caption(who.appearance, pose, who.scene, colour=False, pattern=False, place=False)
        for pose in ("standing", None)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / PICTURE  # a file, so that a rerun finds it
    Image.fromarray(render(who.appearance, "standing", who.scene, size)[0]).save(picture)
    trajectory = invert(sd, picture, words[0], steps=STEPS, progress=progress)

    def make(*controls: MasaCtrl) -> Frames:
        return sample_frames(
            sd,
            *("", words[1], sticks),
            adapter=T2IAdapter(adapter),
            controls=controls,
            trajectory=trajectory,
            guidance_scale=GUIDANCE,
            progress=progress,
        )

    plain, frames = make(), make(CONTROL)
    rows: dict[str, Sequence[Image.Image]] = {
        "drawn pose": [Image.fromarray(stick).convert("RGB") for stick in sticks],
        f"without control: {words[1]}": plain.images,
        f"MasaCtrl: {words[1]}": frames.images,
        "the truth, drawn": [Image.fromarray(render(who.appearance, p, who.scene, size)[0]) for p in poses],
    }
    shown = [label_row([enlarge(row[i]) for row in rows.values()], list(rows)) for i in range(FRAMES)]
    film = replace(frames, images=[Picture.of(one, frames.settings) for one in shown])
    paths = [path for name in ANIMATIONS for path in film.save(folder / name, fps=FPS, overwrite=True)]
    Picture.of(sheet(Image.open(picture), words[0], rows), frames.settings).save(folder / SHEET)
    return [*paths, folder / SHEET, picture]


def sheet(picture: Image.Image, words: str, rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Some of the frames side by side, what they are below each other; at the left the picture that all come from."""
    lines = []
    for n, (label, images) in enumerate(rows.items()):
        first = picture if n == 0 else Image.new("RGB", picture.size, "white")
        half = len(images) // 2  # of a jump, the way up
        chosen = [images[round(i * half / (SHOWN - 1))] for i in range(SHOWN)]
        labels = [f"picture: {words}" if n == 0 else "", label, *[""] * (SHOWN - 1)]
        lines.append(label_row([enlarge(one) for one in (first, *chosen)], labels))
    return stacked(lines)


def enlarge(picture: Image.Image) -> Image.Image:
    return picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
