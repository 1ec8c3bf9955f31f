"""Trains a T2I-Adapter that draws a demo model's subjects in the pose of a stick figure; a second call goes on.

The model stays as it is. The run's folder keeps latents, stick figures and a checkpoint; --out receives the adapter.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from masa.config import T2IAdapterConfig
from masa.edits import Residuals
from masa.io.files import replacing
from masa.models.t2i_adapter import PIXELS, T2IAdapterNetwork
from masa.pipeline import DEMO, StableDiffusion, load

from .export import half_precision
from .figures import JOINTED, Appearance
from .loop import (
    Average,
    Budget,
    Progress,
    SpareCores,
    Stopwatch,
    autocast,
    fast_attention,
    layout,
    learning_rate,
    save_atomically,
    to_device,
)
from .pool import FIRST_TRAINING_SEED, as_input
from .scenery import Scene
from .stick_figure import stick_figure
from .world import POSES, SUBJECTS, Between, Pose, caption, render, sample

FILE, CARD = "stick_figure.safetensors", "facts.json"
FIRST_SEED = FIRST_TRAINING_SEED + 4_000_000  # the model's own training draws others
HELD_OUT = range(30_000, 30_096)


@dataclass(frozen=True)
class AdapterRecipe:
    """Squared error of the noise, at timesteps 1000 (1 - u^3): mostly the noisiest, as published (2302.08453)."""

    batch: int = 16
    peak_rate: float = 1e-3
    empty_captions: float = 0.1  # share, for classifier-free guidance
    decay: float = 0.998
    warmup: int = 50
    floor: float = 0.03
    checkpoint_minutes: float = 2.0


@dataclass(frozen=True)
class Example:
    """One picture to learn from: an individual in a pose, what is said of it, and how thick its lines are drawn."""

    appearance: Appearance
    pose: Pose
    scene: Scene
    caption: str
    thickness: float


def example(seed: int, subjects: Sequence[str], between: float = 0.4) -> Example:
    """The example of a seed. between: the share, of subjects that have them, of poses that captions cannot name.

    Half of the captions tell neither pose nor direction: those the lines alone can tell.
    """
    drawn = sample(seed, subjects)
    rng = random.Random(seed)
    subject, pose = drawn.appearance.subject, drawn.pose
    thickness = rng.uniform(0.6, 2.0) if rng.random() < 0.5 else 1.0
    way: Pose = pose
    if subject in JOINTED and rng.random() < between:
        other = rng.choice([p for p in POSES[subject] if p != pose])
        way = Between(pose, other, rng.uniform(0.15, 0.85))
    told = rng.random() < 0.5
    text = drawn.caption
    if way != pose or not told:
        text = caption(
            drawn.appearance,
            None,
            drawn.scene,
            colour=rng.random() < 0.7,
            pattern=rng.random() < 0.7,
            place=rng.random() < 0.6,
            facing=told and rng.random() < 0.75,
        )
    return Example(drawn.appearance, way, drawn.scene, text, thickness)


@dataclass(frozen=True)
class Pool:
    """Scaled latents in float16 (n, 4, h, w), stick figures uint8 (n, 1, 8h, 8w) and token ids (n, 77)."""

    latents: Tensor
    sticks: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device) -> "Pool":
        return Pool(self.latents.to(device), self.sticks.to(device), self.ids.to(device))


def make_pool(sd: StableDiffusion, seeds: range, subjects: Sequence[str]) -> Pool:
    """Renders and encodes the examples of seeds."""
    size, latents, sticks, captions = sd.config.image_size, [], [], []
    for start in tqdm(range(seeds.start, seeds.stop, 25), desc="examples", disable=len(seeds) < 200):
        chosen = [example(seed, subjects) for seed in range(start, min(start + 25, seeds.stop))]
        pictures = [torch.tensor(render(e.appearance, e.pose, e.scene, size)[0]) for e in chosen]
        sticks += [torch.tensor(stick_figure(e.appearance.subject, e.pose, e.scene, size, e.thickness)) for e in chosen]
        captions += [e.caption for e in chosen]
        with torch.no_grad():
            x = as_input(torch.stack(pictures).permute(0, 3, 1, 2).to(sd.device))
            latents.append(sd.vae.encode(x).half().cpu())
    return Pool(torch.cat(latents), torch.stack(sticks)[:, None], sd.tokenizer(captions))


def cached_pool(path: Path, sd: StableDiffusion, seeds: range, subjects: Sequence[str]) -> Pool:
    """The pool, from the run's folder where it lies there already."""
    key = [sd.fingerprint, seeds.start, seeds.stop, *subjects]
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state.pop("key") == key:
            return Pool(**state)
    pool = make_pool(sd, seeds, subjects)
    save_atomically({"key": key, "latents": pool.latents, "sticks": pool.sticks, "ids": pool.ids}, path)
    return pool


def build(sd: StableDiffusion, seed: int = 0) -> T2IAdapterNetwork:
    """A fresh adapter for lines, as wide as the model's UNet; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = T2IAdapterNetwork(T2IAdapterConfig(PIXELS**2, sd.config.unet.block_out_channels))
    to_device(network, sd.device)
    return network


def noise_error(
    sd: StableDiffusion, network: T2IAdapterNetwork | None, pool: Pool, rows: Tensor, t: Tensor, noise: Tensor,
    silent: Tensor,
) -> Tensor:  # fmt: skip
    """The squared error of the noise that the UNet sees in each of `rows` of the pool, beside its stick figure.

    t (rows,): timesteps. silent (rows,): whose caption is empty. network: None for no adapter.
    """
    alpha = torch.tensor(sd.schedule.alphas_cumprod, device=noise.device)[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * pool.latents[rows].float() + (1 - alpha).sqrt() * noise
    empty = sd.tokenizer([""]).to(noise.device)
    with torch.no_grad():
        context = sd.text_encoder(torch.where(silent[:, None], empty, pool.ids[rows]))
    with autocast(noise.device), fast_attention(noise.device):
        added = None if network is None else Residuals(network(pool.sticks[rows].float() / 255))
        eps, _ = sd.unet(noisy.contiguous(memory_format=layout(noise.device)), t, context, residuals=added)
    return (eps.float() - noise).square().mean((1, 2, 3))


def train_adapter(
    sd: StableDiffusion,
    pool: Pool,
    recipe: AdapterRecipe,
    budget: Budget,
    checkpoint: Path,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[T2IAdapterNetwork, Progress]:
    """Trains on the pool, goes on from the checkpoint if there is one; returns the averaged adapter.

    ValueError where the checkpoint is of another model.
    """
    network = build(sd, seed)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.peak_rate, weight_decay=0.01, fused=True)
    average, progress = Average(parameters, recipe.decay), Progress()
    draws = torch.Generator().manual_seed(seed)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=sd.device, weights_only=True)
        if state["model"] != sd.fingerprint:
            raise ValueError(f"{checkpoint} is of an adapter for another model; give another --run")
        network.load_state_dict(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = state["average"]
        progress = Progress(**state["progress"])
        draws.set_state(state["draws"].cpu())

    def save() -> None:
        state = {"model": sd.fingerprint, "adapter": network.state_dict(), "average": average.values}
        state |= {"optimizer": optimizer.state_dict(), "progress": asdict(progress), "draws": draws.get_state()}
        save_atomically(state, checkpoint)

    bar = tqdm(total=100.0, desc="adapter", initial=min(100.0, 100 * budget.fraction(progress)), mininterval=10,
               bar_format="{desc} {percentage:5.1f}% {elapsed} {postfix}")  # fmt: skip
    watch, since_save, spare, smooth = Stopwatch(sd.device), 0.0, SpareCores(threads), 0.1
    while (spent := budget.fraction(progress)) < 1:
        spare()
        rows = torch.randint(len(pool), (recipe.batch,), generator=draws)
        noise = torch.randn(recipe.batch, *pool.latents.shape[1:], generator=draws)
        part = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=draws)) / recipe.batch
        t = ((1 - part**3) * 1000).long().clamp(0, 999)
        silent = torch.rand(recipe.batch, generator=draws) < recipe.empty_captions
        rows, t, noise, silent = (x.to(sd.device) for x in (rows, t, noise, silent))
        loss = noise_error(sd, network, pool, rows, t, noise, silent).mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.peak_rate, progress.steps, spent, recipe.warmup, recipe.floor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(parameters, progress.steps)
        seconds = watch()
        progress.advance(recipe.batch, loss.item(), seconds)
        since_save += seconds
        smooth += 0.02 * (loss.item() - smooth)
        bar.set_postfix_str(
            f"step {progress.steps} samples {progress.samples} loss {smooth:.4f} "
            f"{progress.samples / progress.seconds:.1f} img/s",
            refresh=False,
        )
        bar.update(100 * (budget.fraction(progress) - spent))
        if since_save > 60 * recipe.checkpoint_minutes:
            save()
            since_save = 0.0
            watch()
    save()
    bar.close()
    average.copy_to(parameters)
    return network.eval().requires_grad_(False), progress


@torch.no_grad()
def judge(sd: StableDiffusion, network: T2IAdapterNetwork, pool: Pool) -> dict[str, float]:
    """Mean error of the noise at timesteps 500 and above: without a stick figure, with one's own, with another's."""
    draws = torch.Generator().manual_seed(1)
    noise = torch.randn(pool.latents.shape, generator=draws).to(sd.device)
    t = torch.randint(500, 1000, (len(pool),), generator=draws).to(sd.device)
    others = Pool(pool.latents, pool.sticks.roll(1, 0), pool.ids)
    found = {}
    for name, chosen, shown in (("none", None, pool), ("own", network, pool), ("another's", network, others)):
        errors = [
            noise_error(sd, chosen, shown, rows, t[rows], noise[rows], torch.zeros_like(rows, dtype=torch.bool))
            for rows in torch.arange(len(pool), device=sd.device).split(16)
        ]
        found[name] = round(float(torch.cat(errors).mean()), 5)
    return found


def original_layout(network: T2IAdapterNetwork) -> dict[str, Tensor]:
    """The adapter's tensors in float16, named as the first adapters' files name them."""
    blocks = network.config.blocks_per_level
    renamed = {}
    for name, tensor in half_precision(network).items():
        parts = name.split(".")
        if "resnets" in parts:
            parts = ["body", str(blocks * int(parts[1]) + int(parts[3])), *parts[4:]]
        elif parts[0] == "body":
            parts[1] = str(blocks * int(parts[1]))
        renamed[".".join(parts)] = tensor
    return renamed


def export_adapter(folder: Path, network: T2IAdapterNetwork, facts: dict[str, Any]) -> None:
    """Writes the adapter and what is known of it."""
    with replacing(folder / FILE) as temporary:
        save_file(original_layout(network), temporary)
    with replacing(folder / CARD) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def known_subjects(model: Path) -> tuple[str, ...]:
    """The subjects that a model was trained on, as its folder says; all where it does not say."""
    facts = model / "facts.json"
    return tuple(json.loads(facts.read_text())["subjects"]) if facts.exists() else SUBJECTS


def main() -> None:
    """Makes the pool, trains, writes the adapter."""
    parser = argparse.ArgumentParser(prog="python -m masa.weights.demo.train_adapter", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO, help="a demo model's folder (default: the shipped one)")
    parser.add_argument("--run", type=Path, default=Path("runs/demo_adapter"), help="what a call keeps (%(default)s)")
    parser.add_argument("--out", type=Path, help="the finished adapter's folder (RUN/adapter)")
    parser.add_argument("--subjects", help="comma-separated (default: those that the model knows)")
    parser.add_argument("--pictures", type=int, default=3000, help="to learn from (%(default)s)")
    parser.add_argument("--batch", type=int, default=AdapterRecipe.batch, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of its thread; more than before goes on")
    parser.add_argument("--threads", type=int, help="fixed number; default: the cores that nobody else uses")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    subjects = tuple(args.subjects.split(",")) if args.subjects else known_subjects(args.model)
    if unknown := set(subjects) - set(SUBJECTS):
        parser.error(f"unknown subjects {sorted(unknown)}; there are {', '.join(SUBJECTS)}")
    SpareCores(args.threads)
    sd = load(args.model, dtype="fp32", progress=False)
    fingerprint = sd.fingerprint
    for part in (sd.unet, sd.vae):
        part.eval().requires_grad_(False)
        to_device(part, sd.device)
    seeds = range(FIRST_SEED, FIRST_SEED + args.pictures)
    pool = cached_pool(args.run / "pool.pt", sd, seeds, subjects).to(sd.device)
    network, progress = train_adapter(
        sd,
        pool,
        AdapterRecipe(batch=args.batch),
        Budget(minutes=args.minutes),
        args.run / "adapter.pt",
        seed=args.seed,
        threads=args.threads,
    )
    facts = {
        "model": fingerprint,
        "subjects": subjects,
        "widths": sd.config.unet.block_out_channels,
        "pictures": args.pictures,
        "steps": progress.steps,
        "samples": progress.samples,
        "minutes": round(progress.seconds / 60, 1),
        "noise_error": judge(sd, network, make_pool(sd, HELD_OUT, subjects).to(sd.device)),
    }
    out: Path = args.out or args.run / "adapter"
    export_adapter(out, network, facts)
    print(json.dumps(facts, indent=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
