"""Flicker and identity of videos on the demo world, whose frames have exact renders.

    python benchmarks/video.py --individuals 8 --motions jump walk

Individuals that no training saw stand in a render, which is inverted; they jump and walk by drawn poses, and every
frame is compared with the render of the same individual in that very pose. Writes results/video.csv, video.md and a
contact sheet of each motion. What is measured is kept under runs/: a second call goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from ground_truth.cases import Individual
from ground_truth.drawn import pose_error
from ground_truth.intervals import clustered
from ground_truth.measures import appearance_error, palette_distance
from PIL import Image
from scipy.ndimage import binary_dilation
from tqdm import tqdm

import masa
from masa.io.files import replacing
from masa.output.result import label_row
from masa.weights.demo.motion import jump, walk
from masa.weights.demo.stick_figure import stick_figure
from masa.weights.demo.world import POSES, Pose, caption

HERE = Path(__file__).parent
SEEDS = 600_000  # of individuals: a range of its own
STEPS, GUIDANCE, FRAMES = 20, 4.0, 6
MOTIONS: Mapping[str, Callable[[int], list[Pose]]] = {"jump": jump, "walk": walk}
SOURCE_POSE = "standing"


@dataclass(frozen=True)
class Way:
    """How frames are kept alike: the controls, and whose keys and values they read."""

    controls: tuple[masa.MasaCtrl, ...] = ()
    anchor: str = "source"


CONTROL = masa.MasaCtrl(start_step=2, start_layer=6)
WAYS: Mapping[str, Way] = {
    "no control": Way(),
    # The first frame's keys and values in every layer and step (2303.13439).
    "Text2Video-Zero: MasaCtrl(0, 0), first": Way((masa.MasaCtrl(0, 0),), "first"),
    "MasaCtrl(2, 6), source": Way((CONTROL,)),
    "MasaCtrl(2, 6), first": Way((CONTROL,), "first"),
    "MasaCtrl(2, 6), both": Way((CONTROL,), "both"),
}
TRUTH = "exact renders"


@dataclass(frozen=True)
class Measures:
    """One video. Of 255, but pose, which is in units of the subject's size.

    flicker: mean change between neighbouring frames where the subject is in neither, nor in the source. appearance:
    mean error inside the true subject, of local mean colours, against the exact render. identity: how far the
    subject's colours are from those of the first frame's, wherever they are. pose: mean distance of the joints of the
    nearest render's pose, of those of the motion and those that captions name, from the asked ones.
    """

    flicker: float
    appearance: float
    identity: float
    pose: float


def measure(who: Individual, poses: Sequence[Pose], pictures: Sequence[np.ndarray]) -> Measures:
    """Compares a video's frames (h, w, 3) with the renders of their poses."""
    size, subject = pictures[0].shape[0], who.appearance.subject
    masks = [who.mask(pose, size) for pose in poses]
    # Smooth edges of the subject reach a little out of its mask.
    outside = ~binary_dilation(np.any([*masks, who.mask(SOURCE_POSE, size)], axis=0), iterations=3)
    shown = [picture.astype(np.float32) for picture in pictures]
    candidates = [*dict.fromkeys([*poses, *POSES[subject]])]
    renders = [who.picture(pose, size).astype(np.float32) for pose in candidates]
    seen = [candidates[int(np.argmin([np.abs(one - render).mean() for render in renders]))] for one in shown]
    colours = [picture[mask] for picture, mask in zip(pictures, masks, strict=True)]
    truths = zip(pictures, poses, masks, strict=True)
    return Measures(
        flicker=float(np.mean([np.abs(a - b)[outside].mean() for a, b in pairwise(shown)])),
        appearance=float(np.mean([appearance_error(one, who.picture(pose, size), mask) for one, pose, mask in truths])),
        identity=float(np.mean([palette_distance(colours[0], other) for other in colours[1:]])),
        pose=float(np.mean([pose_error(subject, a, b) for a, b in zip(seen, poses, strict=True)])),
    )


def make(
    sd: masa.StableDiffusion, adapter: masa.T2IAdapter, who: Individual, poses: Sequence[Pose], ways: Mapping[str, Way]
) -> dict[str, list[np.ndarray]]:
    """The frames of every way, from one inversion of the individual's render."""
    size, subject = sd.config.image_size, who.appearance.subject
    plain = caption(who.appearance, None, who.scene, colour=False, pattern=False, place=False)
    trajectory = masa.invert(sd, who.picture(SOURCE_POSE, size), who.prompt(SOURCE_POSE), steps=STEPS, progress=False)
    sticks = [stick_figure(subject, pose, who.scene, size) for pose in poses]
    found = {TRUTH: [who.picture(pose, size) for pose in poses]}
    for name, way in ways.items():
        frames = masa.sample_frames(
            sd,
            "",
            plain,
            sticks,
            adapter=adapter,
            anchor=way.anchor,  # type: ignore[arg-type]
            controls=way.controls,
            trajectory=trajectory,
            guidance_scale=GUIDANCE,
            frames_at_once=len(poses),
            progress=False,
        )
        found[name] = [np.asarray(picture) for picture in frames.images]
    return found


def sheet(rows: Mapping[str, Sequence[np.ndarray]]) -> Image.Image:
    """Ways below each other, frames side by side."""
    lines = [
        label_row([Image.fromarray(picture) for picture in pictures], [name, *[""] * (len(pictures) - 1)])
        for name, pictures in rows.items()
    ]
    whole = Image.new("RGB", (lines[0].width, sum(line.height for line in lines)), "white")
    top = 0
    for line in lines:
        whole.paste(line, (0, top))
        top += line.height
    return whole


def summarise(found: Mapping[tuple[str, str], Mapping[int, Measures]]) -> list[dict[str, object]]:
    """A row for each motion and way: means over individuals, with 95% intervals."""
    rows = []
    for (motion, way), videos in found.items():
        row: dict[str, object] = {"motion": motion, "way": way, "videos": len(videos)}
        for name in ("flicker", "appearance", "identity", "pose"):
            values = [getattr(measures, name) for measures in videos.values()]
            low, high = clustered(values, [*videos])
            digits = 4 if name == "pose" else 2
            row |= {name: round(float(np.mean(values)), digits)}
            row |= {f"{name} low": round(low, digits), f"{name} high": round(high, digits)}
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, object]], about: str) -> str:
    """The table for people."""
    lines = [
        "# Videos on the demo world",
        "",
        f"{about} Means over videos, 95% bootstrap intervals in brackets; less is better, errors are of 255.",
        "",
        *" ".join((Measures.__doc__ or "").split("\n\n", 1)[1].split()).split("\n"),
        "",
        "| motion | way | videos | flicker | appearance | identity | pose |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[n]} [{row[f'{n} low']}, {row[f'{n} high']}]" for n in ("flicker", "appearance", "identity", "pose")
        ]
        lines.append(f"| {row['motion']} | {row['way']} | {row['videos']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Store:
    """Measures of one model and adapter, one JSON line for each video."""

    path: Path

    def load(self) -> dict[tuple[str, str], dict[int, Measures]]:
        """By motion and way, then by individual."""
        found: dict[tuple[str, str], dict[int, Measures]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            kept = json.loads(line)
            found.setdefault((kept["motion"], kept["way"]), {})[kept["seed"]] = Measures(**kept["measures"])
        return found

    def add(self, motion: str, seed: int, of_ways: Mapping[str, Measures]) -> None:
        lines = [
            json.dumps({"motion": motion, "way": way, "seed": seed, "measures": asdict(measures)})
            for way, measures in of_ways.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


def write(out: Path, found: Mapping[tuple[str, str], Mapping[int, Measures]], about: str) -> None:
    """The table, for programs and for people."""
    rows = summarise(found)
    with replacing(out / "video.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with replacing(out / "video.md") as path:
        path.write_text(report(rows, about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="demo", help="a T2I-Adapter of stick figures (default: the demo model's)")
    parser.add_argument("--checkpoint", help="the model (default: the demo model)")
    parser.add_argument("--individuals", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--motions", nargs="+", choices=list(MOTIONS), default=list(MOTIONS), help="(default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder to write into")
    parser.add_argument("--run", type=Path, default=HERE.parent / "runs" / "video", help="where measures are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sd = masa.load(args.checkpoint, device="cpu", progress=False)
    adapter = masa.T2IAdapter(args.adapter)
    digest, dtype = adapter.file.digest()[:12], str(sd.dtype).removeprefix("torch.")
    store = Store(args.run / f"{sd.fingerprint}_{digest}_{dtype}.jsonl")
    about = (
        f"{FRAMES} frames, {STEPS} steps, guidance {GUIDANCE:g}; individuals that no training saw. The source is a "
        "render that stands, by DDIM inversion; prompts tell kind and direction alone. "
        f"{dtype}, model {sd.fingerprint}, adapter {digest}."
    )
    for motion in args.motions:
        poses = MOTIONS[motion](FRAMES)
        for seed in tqdm(range(SEEDS, SEEDS + args.individuals), desc=motion):
            who = Individual.draw(seed)
            if seed in store.load().get((motion, TRUTH), {}):
                continue
            made = make(sd, adapter, who, poses, WAYS)
            store.add(motion, seed, {name: measure(who, poses, pictures) for name, pictures in made.items()})
            write(args.out, store.load(), about)
            if seed == SEEDS:
                sticks = [stick_figure("cat", pose, who.scene, sd.config.image_size) for pose in poses]
                drawn = {"drawn poses": [np.repeat(stick[..., None], 3, 2) for stick in sticks]}
                with replacing(args.out / f"video_{motion}.png") as path:
                    sheet(drawn | made).save(path)
    print(report(summarise(store.load()), about))


if __name__ == "__main__":
    main()
