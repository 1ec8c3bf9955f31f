"""How good a model is, on individuals that no training saw: a run's present state, or a finished folder."""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from masa.config import TextConfig
from masa.inversion import invert
from masa.models.tokenizer import Tokenizer
from masa.models.vae import VAE
from masa.pipeline import StableDiffusion, load
from masa.sampling import sample as generate

from .autoencoder import psnr, reconstruct
from .denoiser import Denoiser, draw
from .export import export
from .loop import Average, to_device
from .pool import as_input, as_pictures
from .pose_classifier import WEIGHTS, load_pose_classifier
from .train import PRESETS, Preset, text_config, write_sheet
from .vocabulary import write_tokenizer
from .world import SUBJECTS, Sample, render, sample

FIRST_SEED = 20_000  # held out, and apart from those of the tests, the classifier's card and the benchmarks


def interval(right: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.96
    share, spread = right / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def tells_all(drawn: Sample) -> bool:
    """Whether its caption names pose and direction: only such a picture can be judged by them."""
    return drawn.pose in drawn.caption and "facing" in drawn.caption


def held_out(subject: str, count: int, first: int = FIRST_SEED) -> list[Sample]:
    """The first `count` samples of a subject whose captions tell all."""
    found: list[Sample] = []
    while len(found) < count:
        drawn = sample(first, [subject])
        first += 1
        if tells_all(drawn):
            found.append(drawn)
    return found


def load_run(run: Path, preset: Preset) -> tuple[VAE, Denoiser]:
    """The autoencoder and the averaged denoiser as a run's folder holds them now; reads only."""
    device = torch.device("cpu")
    vae = VAE(preset.vae)
    vae.load_state_dict(torch.load(run / "vae_final.pt", weights_only=True, map_location=device))
    to_device(vae, device)
    state = torch.load(run / "unet.pt", weights_only=True, map_location=device)
    write_tokenizer(run / "tokenizer")
    tokenizer = Tokenizer.from_folder(run / "tokenizer")
    text: TextConfig = text_config(preset, tokenizer.vocab_size)
    average = Average([], 0.0)
    average.values = state["average"]
    model = Denoiser.build(preset.unet, text, tokenizer, device).averaged(average, device)
    return vae.eval().requires_grad_(False), model


def judged_samples(
    vae: VAE, model: Denoiser, size: int, count: int, classifier: Path = WEIGHTS, sheet: Path | None = None
) -> dict[str, dict[str, int]]:
    """Draws `count` pictures of each subject from held-out captions; how many have subject, pose and direction right.

    `sheet`: where to write some of them.
    """
    judge = load_pose_classifier(classifier)
    side = size // vae.config.downsample
    noises = torch.Generator().manual_seed(0)
    result, rows = {}, []
    for subject in SUBJECTS:
        wanted = held_out(subject, count)
        pictures = []
        for i in range(0, count, 16):
            prompts = [drawn.caption for drawn in wanted[i : i + 16]]
            noise = torch.randn(len(prompts), 4, side, side, generator=noises)
            with torch.no_grad():
                pictures.append(vae.decode(draw(model, prompts, noise)).float().clamp(-1, 1))
        drawn = torch.cat(pictures)
        free, bound = judge.judge(drawn), judge.judge(drawn, subject)
        result[subject] = {
            "of": count,
            "subject": sum(v.subject == subject for v in free),
            "pose": sum(v.pose == w.pose for v, w in zip(bound, wanted, strict=True)),
            "direction": sum(v.facing == w.scene.facing for v, w in zip(bound, wanted, strict=True)),
        }
        rows.append(as_pictures(drawn[:12]))
    if sheet:
        write_sheet(rows, sheet)
    return result


def reconstructions(vae: VAE, size: int, count: int) -> float:
    """Mean PSNR in dB of held-out pictures of every subject through the autoencoder."""
    pictures = torch.stack([picture_of(d, size) for s in SUBJECTS for d in held_out(s, count)])
    return float(psnr(reconstruct(vae, pictures), as_input(pictures)).mean())


def picture_of(drawn: Sample, size: int) -> Tensor:
    """uint8 (3, size, size)."""
    return torch.from_numpy(render(drawn.appearance, drawn.pose, drawn.scene, size)[0].copy()).permute(2, 0, 1)


def inversions(sd: StableDiffusion, size: int, count: int, steps: int = 20) -> float:
    """Mean PSNR in dB of held-out pictures, inverted with their captions and denoised again without guidance."""
    quality = []
    for drawn in (d for s in SUBJECTS for d in held_out(s, count)):
        picture = picture_of(drawn, size)
        trajectory = invert(sd, picture.permute(1, 2, 0).numpy(), drawn.caption, steps=steps, progress=False)
        rebuilt = generate(sd, trajectory=trajectory, guidance_scale=1.0, progress=False).source
        back = torch.from_numpy(np.array(rebuilt)).permute(2, 0, 1)
        quality.append(psnr(as_input(back[None]), as_input(picture[None])))
    return float(torch.cat(quality).mean())


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m masa.weights.demo.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a training's folder (%(default)s)")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="the training's (%(default)s)")
    parser.add_argument("--count", type=int, default=48, help="pictures drawn of each subject (%(default)s)")
    parser.add_argument("--inversions", type=int, default=4, help="inverted of each subject (%(default)s)")
    parser.add_argument("--classifier", type=Path, default=WEIGHTS, help="another pose classifier's weights")
    parser.add_argument("--sheet", type=Path, help="writes some of the drawn pictures there, as a PNG")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    vae, model = load_run(args.run, preset)
    facts: dict = {"autoencoder_db": round(reconstructions(vae, preset.size, 12), 2)}
    shares = judged_samples(vae, model, preset.size, args.count, args.classifier, args.sheet)
    for part in ("subject", "pose", "direction"):
        right, of = (sum(row[key] for row in shares.values()) for key in (part, "of"))
        facts[part] = {"right": right, "of": of, "interval": [round(v, 3) for v in interval(right, of)]}
        facts[part] |= {subject: round(row[part] / row["of"], 3) for subject, row in shares.items()}
    if args.inversions:
        with tempfile.TemporaryDirectory() as folder:
            export(Path(folder), vae, model, preset.size)
            sd = load(folder, device="cpu", dtype="fp32", progress=False)
            facts["inversion_db"] = round(inversions(sd, preset.size, args.inversions), 2)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
