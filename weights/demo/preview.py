"""Fits the demo model's linear preview: colours by latent channel, from drawn pictures and their latents.

    python -m masa.weights.demo.preview [--model FOLDER]

writes FOLDER/preview.json, which `masa.load` reads beside the model.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from masa.pipeline import DEMO, StableDiffusion, load

from .pool import FIRST_TRAINING_SEED, as_input, render_pool

PICTURES = 256
NAME = "preview.json"


@torch.no_grad()
def fit(sd: StableDiffusion, pictures: int = PICTURES) -> tuple[list[list[float]], float]:
    """Least squares of each position's mean colour in [-1, 1] by its latents and 1.

    Returns the factors (channels + 1, 3), and the share of the colours' variance that they do not tell.
    """
    seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + pictures)
    pool = render_pool(seeds, sd.config.image_size)
    latents, colours = [], []
    for drawn in pool.pictures.split(16):
        picture = as_input(drawn)
        latents.append(sd.vae.encode(picture.to(sd.device, sd.dtype)).float().cpu())
        colours.append(F.avg_pool2d(picture, sd.config.vae.downsample))
    x = torch.cat(latents).movedim(1, -1).flatten(0, -2).double()
    y = torch.cat(colours).movedim(1, -1).flatten(0, -2).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    factors = torch.linalg.lstsq(x, y).solution
    left = (y - x @ factors).var() / y.var()
    return [[round(value, 4) for value in row] for row in factors.tolist()], float(left)


def write(folder: Path) -> None:
    """Fit a model's factors and put them beside it."""
    factors, left = fit(load(folder, device="cpu", dtype="fp32"))
    about = (
        f"least squares of the mean colour of 8 x 8 pixels by the encoder's latents and 1, over {PICTURES} drawn "
        f"pictures; {left:.1%} of the variance is left; python -m masa.weights.demo.preview"
    )
    rows = ",\n    ".join(map(json.dumps, factors))
    text = f'{{\n  "made": {json.dumps(about)},\n  "factors": [\n    {rows}\n  ]\n}}\n'
    (folder / NAME).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m masa.weights.demo.preview", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO, help="the model's folder (default: the embedded one)")
    write(parser.parse_args().model)


if __name__ == "__main__":
    main()
