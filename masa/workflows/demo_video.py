"""`masa demo --video`: a cat of the embedded model that jumps or walks by drawn poses, with and without control."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image

from masa.controls.masactrl import MasaCtrl
from masa.controls.t2i_adapter import T2IAdapter
from masa.output.frames import Frames
from masa.output.result import Picture, label_row
from masa.pipeline import load
from masa.weights.demo.motion import jump, walk
from masa.weights.demo.stick_figure import stick_figure
from masa.weights.demo.world import Pose, caption
from masa.weights.demo.world import sample as draw_sample
from masa.workflows.demo import GUIDANCE, STEPS, enlarge
from masa.workflows.demo_pose import stacked
from masa.workflows.frames import sample_frames

MOTIONS: Mapping[str, Callable[[int], list[Pose]]] = {"jump": jump, "walk": walk}
CONTROL = MasaCtrl(start_step=2, start_layer=6)
ADAPTER = "demo"
SEED = 5
FRAMES, FPS = 12, 8.0
SHOWN = 6  # frames on the sheet
ANIMATIONS, SHEET = ("video.gif", "video.webp"), "video.png"
FILES = (*ANIMATIONS, SHEET)


def run(
    folder: Path, motion: str = "jump", seed: int | None = None, adapter: str | Path = ADAPTER, progress: bool = True
) -> list[Path]:
    """Write video.gif, video.webp (drawn pose, frames without control, frames with it) and video.png, a sheet of them.

    motion: "jump" or "walk". adapter: a T2I-Adapter of stick figures, default the demo model's.
    """
    seed = SEED if seed is None else seed
    sd = load()
    who, size = draw_sample(seed, ["cat"]), sd.config.image_size
    sticks = [stick_figure("cat", pose, who.scene, size) for pose in MOTIONS[motion](FRAMES)]
    words = [
        caption(who.appearance, pose, who.scene, colour=False, pattern=False, place=False)
        for pose in ("standing", None)
    ]
    pose = T2IAdapter(adapter, source=stick_figure("cat", "standing", who.scene, size))

    def make(*controls: MasaCtrl) -> Frames:
        return sample_frames(
            sd,
            *(words[0], words[1], sticks),
            adapter=pose,
            controls=controls,
            steps=STEPS,
            guidance_scale=GUIDANCE,
            seed=seed,
            progress=progress,
        )

    plain, frames = make(), make(CONTROL)
    labels = ["the drawn pose", f"without control: {words[1]}", f"MasaCtrl: {words[1]}"]
    drawn = [Image.fromarray(stick).convert("RGB") for stick in sticks]
    shown = [
        label_row([enlarge(p) for p in pictures], labels)
        for pictures in zip(drawn, plain.images, frames.images, strict=True)
    ]
    film = replace(frames, images=[Picture.of(picture, frames.settings) for picture in shown])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [path for name in ANIMATIONS for path in film.save(folder / name, fps=FPS, overwrite=True)]
    Picture.of(sheet(drawn, plain, frames, words), frames.settings).save(folder / SHEET)
    return [*paths, folder / SHEET]


def sheet(sticks: list[Image.Image], plain: Frames, frames: Frames, words: list[str]) -> Image.Image:
    """Some of the frames: drawn poses above frames without control above frames with it, the source before each row."""
    chosen = [i * len(sticks) // SHOWN for i in range(SHOWN)]
    source = frames.source
    rows = []
    for label, pictures in (
        ("drawn poses", sticks),
        (f"without control: {words[1]}", plain.images),
        (f"MasaCtrl: {words[1]}", frames.images),
    ):
        first = Image.new("RGB", source.size, "white") if pictures is sticks else source
        named = "" if pictures is sticks else f"source: {words[0]}"
        row = [first, *(pictures[i] for i in chosen)]
        rows.append(label_row([enlarge(p) for p in row], [named, label, *[""] * (SHOWN - 1)]))
    return stacked(rows)
