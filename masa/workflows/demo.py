"""`masa demo`: the main job on the embedded model, as two labelled pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from masa.controls.masactrl import MasaCtrl
from masa.inversion import invert
from masa.output.result import Picture, label_row
from masa.pipeline import load
from masa.sampling import sample
from masa.weights.demo.world import Sample, caption, render
from masa.weights.demo.world import sample as draw_sample

# What suits the embedded model; Stable Diffusion v1.5 wants the defaults of `sample` instead.
STEPS, GUIDANCE = 20, 4.0
CONTROL = MasaCtrl(start_step=2, start_layer=0)
SEED = 2
SHOWN_SIZE = 256  # the model's 128 pixels are small on a screen


def run(folder: Path, seed: int | None = None, progress: bool = True) -> list[Path]:
    """Write synthesis.png (source, fixed seed, MasaCtrl) and editing.png (picture, reconstruction, edit, truth)."""
    seed = SEED if seed is None else seed
    sd = load()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "synthesis.png", folder / "editing.png"]

    prompts = ("a photo of a cat sitting, facing left", "a photo of a cat standing, facing left")
    settings = {"steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed, "progress": progress}
    plain = sample(sd, *prompts, controls=[], **settings)  # type: ignore[arg-type]
    masa = sample(sd, *prompts, controls=CONTROL, **settings)  # type: ignore[arg-type]
    sheet = label_row(
        [enlarge(picture) for picture in (masa.source, plain.targets[0], masa.targets[0])],
        [f"source: {prompts[0]}", f"fixed seed: {prompts[1]}", f"MasaCtrl: {prompts[1]}"],
    )
    Picture.of(sheet, masa.settings).save(paths[0])

    scene = find_sample(10 * seed)
    truth_pose = "standing"
    picture, truth = (
        Image.fromarray(render(scene.appearance, pose, scene.scene, sd.config.image_size)[0])
        for pose in (scene.pose, truth_pose)
    )
    words = [
        caption(scene.appearance, pose, scene.scene, colour=False, pattern=False) for pose in (scene.pose, truth_pose)
    ]
    picture.save(folder / "picture.png")  # a file, so that the edit can be repeated from its own PNG
    trajectory = invert(sd, folder / "picture.png", words[0], steps=STEPS, progress=progress)
    edited = sample(
        sd, target=words[1], trajectory=trajectory, controls=CONTROL, guidance_scale=GUIDANCE, progress=progress
    )
    rebuilt = sample(sd, trajectory=trajectory, guidance_scale=1.0, progress=progress)
    sheet = label_row(
        [enlarge(p) for p in (picture, rebuilt.source, edited.targets[0], truth)],
        [f"picture: {words[0]}", "its reconstruction", f"MasaCtrl: {words[1]}", "the truth, drawn"],
    )
    Picture.of(sheet, edited.settings).save(paths[1])
    return paths


def find_sample(seed: int) -> Sample:
    """The first sitting cat at or after a seed, in the part of the world that no training saw."""
    while (found := draw_sample(seed, ["cat"])).pose != "sitting":
        seed += 1
    return found


def enlarge(picture: Image.Image) -> Image.Image:
    return picture.resize((SHOWN_SIZE, SHOWN_SIZE), Image.Resampling.BICUBIC)
