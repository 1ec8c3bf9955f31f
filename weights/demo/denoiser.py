"""Trains the UNet and the text encoder together on latents and captions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from masa.config import TextConfig, UNetConfig
from masa.models.clip import TextEncoder
from masa.models.tokenizer import Tokenizer
from masa.models.unet import UNet
from masa.schedule import Schedule

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
    zero_last_layers,
)


@dataclass(frozen=True)
class UNetRecipe:
    """Noise prediction; the squared error of the picture that it implies is weighted min(snr, max_snr) + min_weight.

    The first part is min-SNR (2303.09556). Alone it all but leaves out the noisiest timesteps, where pose and
    direction are decided.
    """

    batch: int = 16  # even: pairs of twins
    peak_rate: float = 1e-3
    max_snr: float = 5.0
    min_weight: float = 0.25
    empty_captions: float = 0.1  # share, for classifier-free guidance
    alike: float = 0.5  # share, among pairs in the noisier half whose captions differ, that nothing else tells apart
    decay: float = 0.9985
    warmup: int = 150
    floor: float = 0.03
    hold: float = 0.0  # share of the budget at the peak rate
    checkpoint_minutes: float = 2.0
    checkpoints_per_report: int = 15  # drawing costs as much as a minute of training


@dataclass
class Denoiser:
    """The two networks that are trained together, and the tokenizer in front of them."""

    unet: UNet
    text: TextEncoder
    tokenizer: Tokenizer

    @classmethod
    def build(cls, unet: UNetConfig, text: TextConfig, tokenizer: Tokenizer, device: torch.device) -> "Denoiser":
        """Fresh networks in training mode; the residual branches of the UNet start at zero."""
        model = cls(UNet(unet), TextEncoder(text), tokenizer)
        zero_last_layers(model.unet)
        to_device(model.unet, device)
        model.text.to(device)
        return model

    def parameters(self) -> list[nn.Parameter]:
        """The UNet's, then the text encoder's."""
        return [*self.unet.parameters(), *self.text.parameters()]

    def averaged(self, average: Average, device: torch.device) -> "Denoiser":
        """A copy in evaluation mode that holds the averages."""
        copy = Denoiser.build(self.unet.config, self.text.config, self.tokenizer, device)
        average.copy_to(copy.parameters())
        for network in (copy.unet, copy.text):
            network.eval().requires_grad_(False)
        return copy


def stratified_timesteps(batch: int, total: int, draws: torch.Generator) -> Tensor:
    """One timestep from each of `batch` equal parts of 0..total-1, so that every batch sees all noise levels."""
    return ((torch.arange(batch) + torch.rand(batch, generator=draws)) / batch * total).long().clamp(0, total - 1)


def noised_twins(clean: Tensor, noise: Tensor, alpha: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents of pairs of twins and the noise in them, both (2 pairs, 4, h, w).

    clean (2 pairs, 4, h, w): first of each pair, then second; noise (pairs, 4, h, w) is both twins'; alpha
    (2 pairs,). Of pairs that are `alike` (pairs,) the second shares the first's noisy latents: its noise is what
    then lies between them and its own clean ones, and nothing but the caption tells which of the two is meant.
    Without them the network reads the direction off the latents and never learns the word. The price: what they
    teach for that noise is no Gaussian noise, so the network trusts the caption more than the latents.
    """
    alpha = alpha.view(-1, 1, 1, 1)
    noise = noise.repeat(2, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    shared = noisy[: len(alike)].repeat(2, 1, 1, 1)
    both = alike.repeat(2).view(-1, 1, 1, 1)
    implied = (shared - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    return torch.where(both, shared, noisy), torch.where(both, implied, noise)


def train_unet(
    latents: Tensor,
    captions: list[str],
    model: Denoiser,
    recipe: UNetRecipe,
    budget: Budget,
    checkpoint: Path,
    seed: int = 0,
    threads: int | None = None,
    report: Callable[[Denoiser, int], None] | None = None,
) -> Denoiser:
    """Trains on scaled latents (2n, 4, h, w), goes on from the checkpoint if there is one.

    The second n latents and captions are the twins of the first: the same, facing the other way. A batch holds
    pairs of twins under one noise at one timestep, so that the direction is what their gradients differ by.

    Returns the averaged model in evaluation mode. `report(model, steps)` sees it at some checkpoints.
    """
    if recipe.batch % 2 or len(latents) % 2 or len(latents) != len(captions):
        raise ValueError(
            f"a batch of {recipe.batch}, {len(latents)} latents and {len(captions)} captions; expected even numbers, "
            "and a caption for each of the latents"
        )
    device = latents.device
    twin, pairs = len(latents) // 2, recipe.batch // 2
    ids = model.tokenizer(captions).to(device)
    empty = model.tokenizer([""]).to(device)
    tells = (ids[:twin] != ids[twin:]).any(1).cpu()  # whose caption tells twins apart
    alphas = torch.tensor(Schedule().alphas_cumprod, device=device)
    snr = alphas / (1 - alphas)
    weights = (snr.clamp(max=recipe.max_snr) + recipe.min_weight) / snr
    parameters = model.parameters()
    matrices = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, recipe.peak_rate, betas=(0.9, 0.99), fused=True)
    average = Average(parameters, recipe.decay)
    progress = Progress()
    draws = torch.Generator().manual_seed(seed)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.unet.load_state_dict(state["unet"])
        model.text.load_state_dict(state["text"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = state["average"]
        progress = Progress(**state["progress"])
        draws.set_state(state["draws"].cpu())

    def save() -> None:
        state = {"unet": model.unet.state_dict(), "text": model.text.state_dict(), "average": average.values}
        state |= {"optimizer": optimizer.state_dict(), "progress": asdict(progress), "draws": draws.get_state()}
        save_atomically(state, checkpoint)

    bar = tqdm(total=100.0, desc="unet", initial=min(100.0, 100 * budget.fraction(progress)), mininterval=10,
               bar_format="{desc} {percentage:5.1f}% {elapsed} {postfix}")  # fmt: skip
    watch, since_save, saves, spare = Stopwatch(device), 0.0, 0, SpareCores(threads)
    smooth = 1.0
    while (spent := budget.fraction(progress)) < 1:
        spare()
        first = torch.randint(twin, (pairs,), generator=draws)
        rows = torch.cat([first, first + twin]).to(device)
        noise = torch.randn(pairs, *latents.shape[1:], generator=draws).to(device)
        t = stratified_timesteps(pairs, len(alphas), draws)
        alike = (t >= len(alphas) // 2) & (torch.rand(pairs, generator=draws) < recipe.alike)
        silent = torch.rand(pairs, 1, generator=draws) < recipe.empty_captions
        alike &= tells[first] & ~silent[:, 0]  # of twins with one caption the network would learn the mean: two heads
        alike, silent, t = alike.to(device), silent.to(device).repeat(2, 1), t.to(device).repeat(2)
        noisy, noise = noised_twins(latents[rows].float(), noise, alphas[t], alike)
        with autocast(device), fast_attention(device):
            context = model.text(torch.where(silent, empty, ids[rows]))
            eps, _ = model.unet(noisy.contiguous(memory_format=layout(device)), t, context)
        error = (eps.float() - noise).square().mean((1, 2, 3))
        loss = (error * weights[t]).sum() / weights[t].sum()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                recipe.peak_rate, progress.steps, spent, recipe.warmup, recipe.floor, recipe.hold
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(parameters, progress.steps)
        seconds = watch()
        progress.advance(recipe.batch, loss.item(), seconds)
        since_save += seconds
        smooth += 0.02 * (loss.item() - smooth)
        speed = progress.samples / progress.seconds
        bar.set_postfix_str(
            f"step {progress.steps} samples {progress.samples} loss {smooth:.4f} {speed:.1f} img/s "
            f"{torch.get_num_threads()} threads",
            refresh=False,
        )
        bar.update(100 * (budget.fraction(progress) - spent))
        if since_save > 60 * recipe.checkpoint_minutes:
            save()
            saves += 1
            if report and saves % recipe.checkpoints_per_report == 0:
                report(model.averaged(average, device), progress.steps)
            since_save = 0.0
            watch()
    save()
    bar.close()
    return model.averaged(average, device)


@torch.no_grad()
def draw(model: Denoiser, prompts: list[str], noise: Tensor, steps: int = 20, guidance_scale: float = 4.0) -> Tensor:
    """DDIM with classifier-free guidance: one picture's latents per prompt and noise (n, 4, h, w)."""
    device = noise.device
    schedule = Schedule()
    context = model.text(model.tokenizer([*[""] * len(prompts), *prompts]).to(device))
    x = noise
    for t in schedule.timesteps(steps):
        with autocast(device):
            rows = torch.cat([x, x]).contiguous(memory_format=layout(device))
            eps, _ = model.unet(rows, t, context)
        uncond, cond = eps.float().chunk(2)
        x = schedule.step(uncond + guidance_scale * (cond - uncond), x, t, steps)
    return x
