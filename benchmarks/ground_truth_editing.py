"""Non-rigid edits against their exact truth: the same individual and place, rendered in the target pose.

    python benchmarks/ground_truth_editing.py                     # the table, a picture grid and the S x L sweep
    python benchmarks/ground_truth_editing.py --cases 24 --no-sweep

Everybody in it is held out: training drew other seeds. Thresholds of "both right" were fixed beforehand.
"""

import argparse
import csv
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.metrics import structural_similarity
from tqdm import tqdm

import masa
from masa.weights.demo.pose_classifier import PoseClassifier, load_pose_classifier
from masa.weights.demo.world import POSES, Appearance, Scene, caption, render, sample

RESULTS = Path(__file__).parent / "results"
FIRST_SEED = 100_000
COLOUR_LIMIT, BACKGROUND_LIMIT = 25.0, 12.0  # of 255: what "right" means for subject and background


@dataclass(frozen=True)
class Case:
    """One edit: an individual in a place, from one pose to another."""

    seed: int
    appearance: Appearance
    scene: Scene
    source_pose: str
    target_pose: str

    @classmethod
    def draw(cls, seed: int, subject: str) -> "Case":
        """The held-out individual of a seed; the target pose runs through the other poses seed by seed."""
        drawn = sample(seed, [subject])
        others = [pose for pose in POSES[subject] if pose != drawn.pose]
        return cls(seed, drawn.appearance, drawn.scene, drawn.pose, others[seed % len(others)])

    def prompt(self, pose: str) -> str:
        """Tells subject, pose and direction; colours, pattern and place are for the method to keep."""
        return caption(self.appearance, pose, self.scene, colour=False, pattern=False, place=False)

    def truth(self, pose: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        return render(self.appearance, pose, self.scene, size)


@dataclass(frozen=True)
class Measures:
    """How one output compares; colour and background are errors of 255, psnr and ssim are taken inside the subject."""

    pose: bool
    facing: bool
    colour: float
    background: float
    psnr: float
    ssim: float

    @property
    def right(self) -> bool:
        return self.pose and self.colour < COLOUR_LIMIT and self.background < BACKGROUND_LIMIT


# -- methods ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What all methods share."""

    steps: int
    guidance_scale: float


def variants(settings: Settings, subject: str, start_step: int, start_layer: int) -> dict[str, dict]:
    """Arguments of masa.sample by method name; `pin_source` matters where there is a trajectory."""
    plain = masa.MasaCtrl(start_step, start_layer)
    words = masa.MasaCtrl(start_step, start_layer, mask=masa.WordMasks(subject, subject))
    union = masa.MasaCtrl(start_step, start_layer, union=True)
    return {
        "fixed seed": {"controls": [], "pin_source": False},
        "MasaCtrl, pinned": {"controls": plain, "pin_source": True},
        "MasaCtrl, free": {"controls": plain, "pin_source": False},
        "MasaCtrl, word masks, pinned": {"controls": words, "pin_source": True},
        "MasaCtrl, union, pinned": {"controls": union, "pin_source": True},
    }


@torch.no_grad()
def sdedit(
    sd: masa.StableDiffusion, picture: np.ndarray, prompt: str, strength: float, settings: Settings, seed: int
) -> np.ndarray:
    """SDEdit (2108.01073): noise to `strength` of the schedule, denoise with the target prompt."""
    clean = sd.encode_image(picture)
    steps = round(settings.steps * strength)
    timesteps = sd.schedule.timesteps(settings.steps)[-steps:]
    alpha = sd.schedule.alpha(timesteps[0])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    x = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise
    context = sd.encode_prompt(["", prompt])
    for t in timesteps:
        uncond, cond = sd.unet(torch.cat([x, x]).to(sd.dtype), t, context)[0].float().chunk(2)
        x = sd.schedule.step(uncond + settings.guidance_scale * (cond - uncond), x, t, settings.steps)
    return np.asarray(sd.decode_latents(x)[0])


# -- measures --------------------------------------------------------------------------------------


def palette_distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far one set of pixels (n, 3) must move to look like another (m, 3), channel by channel, of 255.

    The mean over channels of the one-dimensional Wasserstein distance: places do not matter, shares do.
    """
    at = (np.arange(101) + 0.5) / 102
    return float(np.abs(np.quantile(a, at, axis=0) - np.quantile(b, at, axis=0)).mean())


def shrunk(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask without its rim of `by` pixels."""
    for _ in range(by):
        padded = np.pad(mask, 1)
        h, w = mask.shape
        mask = np.logical_and.reduce([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)])
    return mask


def judge_pose(classifier: PoseClassifier, picture: np.ndarray, case: Case) -> tuple[bool, bool]:
    """Whether the picture shows the target pose, and the case's direction."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    verdict = classifier.judge(x, case.appearance.subject)[0]
    return verdict.pose == case.target_pose, verdict.facing == case.scene.facing


def against_truth(classifier: PoseClassifier, case: Case, output: np.ndarray) -> Measures:
    """Compares an edit of the rendered source with the rendered target."""
    size = output.shape[0]
    truth, inside = case.truth(case.target_pose, size)
    outside = ~(inside | case.truth(case.source_pose, size)[1])
    a, b = output.astype(float), truth.astype(float)
    core = shrunk(inside, 1)
    _, similarity = structural_similarity(a, b, channel_axis=2, data_range=255, full=True)
    error = np.square(a - b)[inside].mean()
    return Measures(
        *judge_pose(classifier, output, case),
        colour=palette_distance(a[core], b[core]),
        background=float(np.abs(a - b)[outside].mean()),
        psnr=10 * math.log10(255**2 / max(error, 1e-9)),
        ssim=float(similarity[inside].mean()),
    )


@cache
def usual_regions(subject: str, pose: str, facing: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that nearly always are the subject, and those that nearly never are, over renders of one pose."""
    masks = []
    for seed in range(2_000_000, 2_000_060):
        drawn = sample(seed, [subject])
        if drawn.scene.facing == facing:
            masks.append(render(drawn.appearance, pose, drawn.scene, size)[1])
    share = np.mean(masks, axis=0)
    return share > 0.85, share < 0.03


def against_source(classifier: PoseClassifier, case: Case, source: np.ndarray, target: np.ndarray) -> Measures:
    """Compares a synthesised pair: no truth exists, so colours are read where such subjects usually are."""
    size = target.shape[0]
    regions = [
        usual_regions(case.appearance.subject, p, case.scene.facing, size) for p in (case.source_pose, case.target_pose)
    ]
    outside = regions[0][1] & regions[1][1]
    a, b = source.astype(float), target.astype(float)
    return Measures(
        *judge_pose(classifier, target, case),
        colour=palette_distance(a[regions[0][0]], b[regions[1][0]]),
        background=float(np.abs(a - b)[outside].mean()),
        psnr=math.nan,
        ssim=math.nan,
    )


# -- runs ------------------------------------------------------------------------------------------


def as_array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


Outputs = dict[str, tuple[np.ndarray, Measures | None]]


def run_controls(
    sd: masa.StableDiffusion, classifier: PoseClassifier, case: Case, settings: Settings, methods: dict[str, dict]
) -> Outputs:
    """Every control's edit of one rendered picture, from one inversion."""
    picture, _ = case.truth(case.source_pose, sd.config.image_size)
    trajectory = masa.invert(sd, picture, case.prompt(case.source_pose), steps=settings.steps, progress=False)
    outputs: Outputs = {}
    for name, arguments in methods.items():
        out = masa.sample(
            sd, target=case.prompt(case.target_pose), trajectory=trajectory,
            guidance_scale=settings.guidance_scale, progress=False, **arguments,
        )  # fmt: skip
        edited = as_array(out.targets[0])
        outputs[name] = (edited, against_truth(classifier, case, edited))
    return outputs


def run_real(
    sd: masa.StableDiffusion, classifier: PoseClassifier, case: Case, settings: Settings, methods: dict[str, dict]
) -> Outputs:
    """The controls' edits, and SDEdit's at two strengths."""
    outputs = run_controls(sd, classifier, case, settings, methods)
    picture, _ = case.truth(case.source_pose, sd.config.image_size)
    for strength in (0.5, 0.8):
        edited = sdedit(sd, picture, case.prompt(case.target_pose), strength, settings, case.seed)
        outputs[f"SDEdit {strength}"] = (edited, against_truth(classifier, case, edited))
    return outputs


def run_synthesis(
    sd: masa.StableDiffusion, classifier: PoseClassifier, case: Case, settings: Settings, methods: dict[str, dict]
) -> Outputs:
    """Every method's target beside its own source, from the same noise."""
    outputs: Outputs = {}
    for name, arguments in methods.items():
        out = masa.sample(
            sd, case.prompt(case.source_pose), case.prompt(case.target_pose), seed=case.seed, steps=settings.steps,
            guidance_scale=settings.guidance_scale, progress=False, controls=arguments["controls"],
        )  # fmt: skip
        source, target = as_array(out.source), as_array(out.targets[0])
        outputs.setdefault("source", (source, None))
        outputs[name] = (target, against_source(classifier, case, source, target))
    return outputs


def reconstruction_psnr(sd: masa.StableDiffusion, case: Case, settings: Settings) -> float:
    """Invert and denoise at guidance 1 with the same prompt, against the picture, in dB."""
    picture, _ = case.truth(case.source_pose, sd.config.image_size)
    trajectory = masa.invert(sd, picture, case.prompt(case.source_pose), steps=settings.steps, progress=False)
    out = masa.sample(sd, trajectory=trajectory, guidance_scale=1.0, progress=False)
    error = np.square(as_array(out.source).astype(float) - picture).mean()
    return 10 * math.log10(255**2 / error)


# -- statistics and output -------------------------------------------------------------------------


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, p = 1.96, hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval."""
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).choice(array, (2000, len(array))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(array.mean()), float(low), float(high)


def summarise(setting: str, measured: dict[str, list[Measures]]) -> list[dict[str, str | float]]:
    """One table row per method, each figure with its 95% interval."""
    rows: list[dict[str, str | float]] = []
    for method, all_ in measured.items():
        row: dict[str, str | float] = {"setting": setting, "method": method, "cases": len(all_)}
        for name in ("pose", "facing", "right"):
            hits = sum(getattr(m, name) for m in all_)
            low, high = share_interval(hits, len(all_))
            row |= {name: hits / len(all_), f"{name}_low": low, f"{name}_high": high}
        for name in ("colour", "background", "psnr", "ssim"):
            values = [getattr(m, name) for m in all_]
            if math.isnan(values[0]):
                continue
            mean, low, high = mean_interval(values)
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def as_markdown(rows: list[dict[str, str | float]]) -> str:
    """The table for people."""
    names = {
        "pose": "pose",
        "colour": "colour",
        "background": "background",
        "psnr": "PSNR",
        "ssim": "SSIM",
        "right": "both right",
    }
    lines = ["| setting | method | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = [f"{row[n]:.2f} ({row[n + '_low']:.2f} to {row[n + '_high']:.2f})" if n in row else "" for n in names]
        lines.append(f"| {row['setting']} | {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: list[dict[str, str | float]]) -> None:
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def write_grid(path: Path, columns: Sequence[str], rows: list[list[np.ndarray]]) -> None:
    """Pictures in columns under their names."""
    size = rows[0][0].shape[0]
    sheet = Image.new("RGB", (len(columns) * (size + 4), len(rows) * (size + 4) + 18), "white")
    text = ImageDraw.Draw(sheet)
    for x, name in enumerate(columns):
        text.text((x * (size + 4) + 2, 3), name.replace("MasaCtrl", "MC"), fill="black")
        for y, row in enumerate(rows):
            sheet.paste(Image.fromarray(row[x]), (x * (size + 4), 18 + y * (size + 4)))
    sheet.save(path)


def write_heat_map(path: Path, table: dict[tuple[int, int], float], title: str) -> None:
    """One cell per (S, L), darker blue for a larger share."""
    starts, layers = (sorted({key[i] for key in table}) for i in (0, 1))
    cell = 56
    sheet = Image.new("RGB", (cell * len(layers) + 70, cell * len(starts) + 60), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), title, fill="black")
    for y, s in enumerate(starts):
        draw.text((8, 60 + y * cell + 18), f"S = {s}", fill="black")
        for x, layer in enumerate(layers):
            if y == 0:
                draw.text((74 + x * cell, 40), f"L = {layer}", fill="black")
            value = table[s, layer]
            colour = tuple(round(255 + (c - 255) * value) for c in (20, 80, 160))
            box = (70 + x * cell, 58 + y * cell)
            draw.rectangle((*box, box[0] + cell - 2, box[1] + cell - 2), fill=colour)
            draw.text((box[0] + 14, box[1] + 20), f"{value:.2f}", fill="white" if value > 0.5 else "black")
    sheet.save(path)


def model_quality(
    sd: masa.StableDiffusion, classifier: PoseClassifier, subject: str, settings: Settings, n: int
) -> dict[str, float]:
    """Whether prompts alone give their pose and direction, and how well inversion gives a picture back."""
    poses, facing, psnr = 0, 0, []
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + n), desc="model"):
        case = Case.draw(seed, subject)
        out = masa.sample(sd, case.prompt(case.target_pose), seed=seed, steps=settings.steps,
                          guidance_scale=settings.guidance_scale, progress=False)  # fmt: skip
        pose, side = judge_pose(classifier, as_array(out.source), case)
        poses, facing = poses + pose, facing + side
        psnr.append(reconstruction_psnr(sd, case, settings))
    return {
        "pose": poses / n,
        "facing": facing / n,
        "reconstruction_psnr_db": round(float(np.mean(psnr)), 2),
        "cases": n,
    }


def measure(
    run: Callable[..., Outputs],
    sd: masa.StableDiffusion,
    classifier: PoseClassifier,
    cases: list[Case],
    settings: Settings,
    methods: dict[str, dict],
    name: str,
) -> tuple[dict[str, list[Measures]], list[tuple[Case, dict[str, np.ndarray]]]]:
    """All cases by all methods: measures by method, and the pictures of the first eight cases."""
    measured: dict[str, list[Measures]] = {}
    pictures = []
    for case in tqdm(cases, desc=name):
        outputs = run(sd, classifier, case, settings, methods)
        for method, (_, measures) in outputs.items():
            if measures is not None:
                measured.setdefault(method, []).append(measures)
        if len(pictures) < 8:
            pictures.append((case, {method: output for method, (output, _) in outputs.items()}))
    return measured, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint", help="default: the embedded demo model")
    parser.add_argument("--subject", default="cat", choices=POSES)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("-S", "--start-step", type=int, default=2)
    parser.add_argument("-L", "--start-layer", type=int, default=8)
    parser.add_argument("--sweep-cases", type=int, default=32)
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sd, classifier = masa.load(args.checkpoint), load_pose_classifier()
    settings = Settings(args.steps, args.guidance)
    methods = variants(settings, args.subject, args.start_step, args.start_layer)
    size = sd.config.image_size
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / "ground_truth_editing"

    quality = model_quality(sd, classifier, args.subject, settings, min(args.cases, 100))
    print("model:", quality)
    cases = [Case.draw(seed, args.subject) for seed in range(FIRST_SEED, FIRST_SEED + args.cases)]

    real, pictures = measure(run_real, sd, classifier, cases, settings, methods, "real pictures")
    columns = ["source", *pictures[0][1], "truth"]
    shown = [
        [case.truth(case.source_pose, size)[0], *outputs.values(), case.truth(case.target_pose, size)[0]]
        for case, outputs in pictures
    ]
    write_grid(stem.with_name(stem.name + "_real.png"), columns, shown)
    synthetic = {name: arguments for name, arguments in methods.items() if not name.endswith("free")}
    synthesis, pictures = measure(run_synthesis, sd, classifier, cases, settings, synthetic, "synthesis")
    write_grid(
        stem.with_name(stem.name + "_synthesis.png"), list(pictures[0][1]), [list(o.values()) for _, o in pictures]
    )

    rows = [*summarise("real picture", real), *summarise("synthesis", synthesis)]
    write_csv(stem.with_suffix(".csv"), rows)
    stem.with_suffix(".md").write_text(as_markdown(rows))
    about = {
        "model": quality,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "checkpoint")},
        "right": {"colour_below": COLOUR_LIMIT, "background_below": BACKGROUND_LIMIT},
        "versions": {"masa": masa.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    stem.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    print(as_markdown(rows))

    if not args.no_sweep:
        n = args.steps
        grid = {
            (s, layer): f"S{s} L{layer}"
            for s in (0, n // 10, n // 5, n * 2 // 5, n * 3 // 5)
            for layer in (0, 5, 8, 10, 13)
        }
        sweep = {name: {"controls": masa.MasaCtrl(*key), "pin_source": True} for key, name in grid.items()}
        measured, _ = measure(run_controls, sd, classifier, cases[: args.sweep_cases], settings, sweep, "sweep")
        table = {key: float(np.mean([m.right for m in measured[name]])) for key, name in grid.items()}
        write_heat_map(stem.with_name(stem.name + "_sweep.png"), table, "both right, real pictures, pinned source")
        write_csv(stem.with_name(stem.name + "_sweep.csv"), summarise("sweep", measured))


if __name__ == "__main__":
    main()
