"""Trains the demo model from nothing, in stages that a second call goes on from.

The run's folder keeps rendered pools, checkpoints and sample grids; --out receives the finished model.
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from masa.config import TextConfig, UNetConfig, VAEConfig
from masa.models.tokenizer import Tokenizer
from masa.models.vae import VAE
from masa.pipeline import load

from .autoencoder import VAERecipe, encode, held_out_psnr, polish_decoder, reconstruct, train_vae, whiten
from .denoiser import Denoiser, UNetRecipe, draw, train_unet
from .export import export
from .loop import Budget, save_atomically, to_device
from .pool import FIRST_TRAINING_SEED, Pool, as_pictures, render_pool
from .preview import write as write_preview
from .vocabulary import write_tokenizer
from .world import POSES, SUBJECTS

SHARD = 1000  # samples whose latents lie in one file


@dataclass(frozen=True)
class Preset:
    """Sizes, widths and recipes that fit a kind of machine."""

    size: int  # side of the pictures, pixels
    subjects: tuple[str, ...]
    vae_pictures: int
    unet_pictures: int
    vae: VAEConfig
    vae_recipe: VAERecipe
    vae_minutes: float
    unet: UNetConfig
    unet_recipe: UNetRecipe
    unet_minutes: float
    text_width: int
    text_layers: int


PRESETS = {
    # one core that multiplies bfloat16: a night. Four heads, for the attention costs as the heads' number;
    # each a multiple of 8 wide, which the Triton kernels serve.
    "cpu": Preset(
        size=128,
        subjects=SUBJECTS,
        vae_pictures=6000,
        unet_pictures=10000,
        vae=VAEConfig(block_out_channels=(32, 48, 96, 128), layers_per_block=1, norm_groups=8),
        vae_recipe=VAERecipe(peak_rate=1e-3, crop_share=0.5, squared=4.0),
        vae_minutes=40,
        unet=UNetConfig(block_out_channels=(64, 128, 192, 192), context_width=128, heads=4, norm_groups=8),
        unet_recipe=UNetRecipe(batch=32, peak_rate=1e-3, decay=0.999, hold=0.6),
        unet_minutes=840,
        text_width=128,
        text_layers=2,
    ),
    # one H200 and sixteen cores: everybody, twice the size, twenty minutes in all
    "gpu": Preset(
        size=256,
        subjects=SUBJECTS,
        vae_pictures=20000,
        unet_pictures=60000,
        vae=VAEConfig(block_out_channels=(32, 64, 96, 128), layers_per_block=1, norm_groups=8),
        vae_recipe=VAERecipe(batch=16, peak_rate=1e-3, warmup=200),
        vae_minutes=5,
        unet=UNetConfig(block_out_channels=(64, 128, 160, 192), context_width=128, heads=8, norm_groups=8),
        unet_recipe=UNetRecipe(batch=256, decay=0.9995, warmup=300),
        unet_minutes=11,
        text_width=128,
        text_layers=3,
    ),
}  # fmt: skip


def text_config(preset: Preset, vocabulary: int) -> TextConfig:
    """The text encoder's shape for a vocabulary of so many tokens."""
    return TextConfig(
        vocab_size=vocabulary,
        width=preset.text_width,
        intermediate_width=4 * preset.text_width,
        layers=preset.text_layers,
        heads=4,
    )


def cached_pool(
    path: Path, seeds: range, size: int, subjects: tuple[str, ...], workers: int, twins: bool = False
) -> Pool:
    """The rendered pool, from the run's folder where it lies there already."""
    key = [seeds.start, seeds.stop, size, *subjects]
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["key"] == key:
            return Pool(state["pictures"], state["captions"], seeds)
    pool = render_pool(seeds, size, subjects, workers, twins)
    save_atomically({"key": key, "pictures": pool.pictures, "captions": pool.captions}, path)
    return pool


def write_sheet(rows: list[Tensor], path: Path) -> None:
    """Writes rows of uint8 pictures (n, 3, h, w), n the same in each, as one PNG."""
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.cpu().numpy()).save(path)


def vae_pool(run: Path, preset: Preset, workers: int) -> Pool:
    """The autoencoder's pictures: of every subject, so that a later run can teach the UNet more of them."""
    mixture = preset.subjects if preset.subjects == SUBJECTS else (*(preset.subjects * 3), *SUBJECTS)
    seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + preset.vae_pictures)
    return cached_pool(run / "vae_pool.pt", seeds, preset.size, mixture, workers)


def train_or_load_vae(
    run: Path, preset: Preset, held_out: Tensor, threads: int | None, workers: int, start: Path | None
) -> VAE:
    """The finished autoencoder, whitened, in evaluation mode on the device of `held_out`.

    `start`: the folder of a model whose autoencoder, as wide or narrower, training begins with.
    """
    finished = run / "vae_final.pt"
    if finished.exists():
        vae = VAE(preset.vae)
        vae.load_state_dict(torch.load(finished, weights_only=True, map_location="cpu"))
        to_device(vae, held_out.device)
        return vae.eval().requires_grad_(False)
    pictures = vae_pool(run, preset, workers).pictures.to(held_out.device)
    budget = Budget(minutes=preset.vae_minutes)
    first = None if start is None else load(start, device="cpu", dtype="fp32").vae
    assert first is None or isinstance(first, VAE)
    vae = train_vae(
        pictures, held_out, preset.vae, preset.vae_recipe, budget, run / "vae.pt", threads=threads, start=first
    )
    whiten(vae, pictures[:1024])
    save_atomically(vae.state_dict(), finished)
    return vae


def fingerprint(vae: VAE) -> float:
    """A number that another encoder, and so other latents, would not have."""
    return float(sum(p.double().abs().sum() for part in (vae.encoder, vae.quant_conv) for p in part.parameters()))


def cached_latents(run: Path, vae: VAE, preset: Preset, device: torch.device, workers: int) -> tuple[Tensor, list[str]]:
    """Scaled latents in float16 on the device, and captions: of `unet_pictures` samples, then of their twins.

    Each shard of them is rendered and encoded once, and kept; the pictures are not. Asked for more pictures, a later
    run makes only what is missing.
    """
    first = FIRST_TRAINING_SEED + 1_000_000
    latents: tuple[list[Tensor], list[Tensor]] = ([], [])
    captions: tuple[list[str], list[str]] = ([], [])
    for start in range(first, first + preset.unet_pictures, SHARD):
        key = [start, preset.size, *preset.subjects, fingerprint(vae)]
        path = run / "latents" / f"{start}.pt"
        shard = torch.load(path, weights_only=True) if path.exists() else None
        if shard is None or shard["key"] != key:
            shard = {"key": key, "latents": [], "captions": []}
            for twins in (False, True):
                pool = render_pool(range(start, start + SHARD), preset.size, preset.subjects, workers, twins)
                shard["latents"].append(encode(vae, pool.pictures.to(device)).half().cpu())
                shard["captions"].append(pool.captions)
            save_atomically(shard, path)
        for i in (0, 1):
            latents[i].append(shard["latents"][i])
            captions[i].extend(shard["captions"][i])
    return torch.cat(latents[0] + latents[1]).to(device), captions[0] + captions[1]


def grid_reporter(run: Path, preset: Preset, vae: VAE, device: torch.device) -> Callable[[Denoiser, int], None]:
    """A report that draws every pose of every subject, facing both ways, from two noises."""
    prompts = [
        f"a photo of a {s} {p}, facing {f}" for s in preset.subjects for p in POSES[s] for f in ("left", "right")
    ]
    side = preset.size // preset.vae.downsample

    @torch.no_grad()
    def report(model: Denoiser, steps: int) -> None:
        noise = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(3)).to(device)
        rows = [
            as_pictures(vae.decode(draw(model, prompts, each.expand(len(prompts), -1, -1, -1).contiguous())))
            for each in noise
        ]
        write_sheet(rows, run / "grids" / f"{steps:06d}.png")

    return report


def main() -> None:
    """Runs the stages that the run's folder has not finished."""
    parser = argparse.ArgumentParser(prog="python -m masa.weights.demo.train", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="checkpoints and grids (%(default)s)")
    parser.add_argument("--out", type=Path, help="the finished model's folder (RUN/model)")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes for a machine (%(default)s)")
    parser.add_argument("--subjects", help="comma-separated: " + ",".join(SUBJECTS))
    parser.add_argument("--pictures", type=int, help="the UNet's, each with its twin; more than before adds some")
    parser.add_argument("--batch", type=int, help="the UNet's; even; may change from call to call")
    parser.add_argument("--start-vae", type=Path, help="a model's folder: the autoencoder begins with its weights")
    parser.add_argument("--vae-minutes", type=float, help="training time of the autoencoder")
    parser.add_argument("--unet-minutes", type=float, help="training time of the UNet; more than before goes on")
    parser.add_argument("--polish-minutes", type=float, help="train the finished autoencoder's decoder further first")
    parser.add_argument("--threads", type=int, help="fixed number; default: the cores that nobody else uses")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="rendering processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    preset: Preset = PRESETS[args.preset]
    if args.subjects:
        preset = replace(preset, subjects=tuple(args.subjects.split(",")))
        unknown = set(preset.subjects) - set(SUBJECTS)
        if unknown:
            parser.error(f"unknown subjects {sorted(unknown)}; there are {', '.join(SUBJECTS)}")
    if args.pictures is not None:
        preset = replace(preset, unet_pictures=args.pictures)
    if args.batch is not None:
        preset = replace(preset, unet_recipe=replace(preset.unet_recipe, batch=args.batch))
    if args.vae_minutes is not None:
        preset = replace(preset, vae_minutes=args.vae_minutes)
    if args.unet_minutes is not None:
        preset = replace(preset, unet_minutes=args.unet_minutes)
    run: Path = args.run
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    held_out = render_pool(range(48), preset.size, preset.subjects).pictures.to(device)
    vae = train_or_load_vae(run, preset, held_out, args.threads, args.workers, args.start_vae)
    quality = held_out_psnr(vae, held_out)
    if args.polish_minutes:
        recipe = replace(preset.vae_recipe, peak_rate=preset.vae_recipe.peak_rate / 2)
        budget = Budget(minutes=args.polish_minutes)
        pool = vae_pool(run, preset, args.workers)
        vae = polish_decoder(
            vae, pool.pictures.to(device), held_out, recipe, budget, run / "polish.pt", threads=args.threads
        )
        save_atomically(vae.state_dict(), run / "vae_final.pt")
        quality = held_out_psnr(vae, held_out)
    print(f"autoencoder: held out {quality:.2f} dB", flush=True)
    write_sheet([held_out[:8], as_pictures(reconstruct(vae, held_out[:8]))], run / "vae.png")

    latents, captions = cached_latents(run, vae, preset, device, args.workers)
    vocabulary = write_tokenizer(run / "tokenizer")
    tokenizer = Tokenizer.from_folder(run / "tokenizer")
    text = text_config(preset, vocabulary)
    model = Denoiser.build(preset.unet, text, tokenizer, device)
    trained = train_unet(
        latents,
        captions,
        model,
        preset.unet_recipe,
        Budget(minutes=preset.unet_minutes),
        run / "unet.pt",
        seed=args.seed,
        threads=args.threads,
        report=grid_reporter(run, preset, vae, device),
    )
    out: Path = args.out or run / "model"
    export(out, vae, trained, preset.size)
    facts = {"preset": args.preset, "subjects": preset.subjects, "autoencoder_psnr_db": round(quality, 2)}
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_preview(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
