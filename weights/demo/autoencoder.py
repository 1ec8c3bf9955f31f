"""Trains the autoencoder, then folds a whitening of its latents into the 1x1 convolutions beside them."""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from masa.config import VAEConfig
from masa.models.vae import VAE

from .loop import (
    Average,
    Budget,
    Progress,
    SpareCores,
    Stopwatch,
    autocast,
    learning_rate,
    save_atomically,
    to_device,
    zero_,
)
from .pool import as_input
from .widen import widen


@dataclass(frozen=True)
class VAERecipe:
    """Crops of half the side come first: four of them, of as many pictures, cost what a whole one does."""

    batch: int = 2  # whole pictures a step; crops: four times as many
    peak_rate: float = 2e-3
    crop_share: float = 0.8  # of the budget
    squared: float = 0.5  # weight of the squared error: of 4 and more it tells, and the largest errors are at edges
    latent_noise: float = 0.05  # in standard deviations of the latents: keeps them smooth
    decay: float = 0.998
    warmup: int = 100
    floor: float = 0.02
    checkpoint_minutes: float = 2.0


def start_near_identity(vae: VAE) -> None:
    """Zero residual branches; resampling convolutions that average on the way down and copy on the way up."""
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            if name.endswith((".conv2", ".to_out.0")):
                zero_(module)
            elif "samplers" in name:
                assert module.bias is not None
                module.weight.mul_(0.1)
                module.bias.zero_()
                i = torch.arange(module.weight.shape[0])
                if "downsamplers" in name:
                    module.weight[i, i, :2, :2] += 0.25
                else:
                    module.weight[i, i, 1, 1] += 1


def reconstruction_loss(output: Tensor, picture: Tensor, mean: Tensor, squared: float = 0.5) -> Tensor:
    """L1, the squared error, the differences between neighbours, and a leash on the latents' size."""
    error = output - picture
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + squared * error.square().mean() + 0.5 * edges + 2e-4 * mean.square().mean()


def psnr(output: Tensor, picture: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture in [-1, 1], clipped first: (n,)."""
    error = (output.float().clamp(-1, 1) - picture).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error)


def train_vae(
    pictures: Tensor,
    held_out: Tensor,
    config: VAEConfig,
    recipe: VAERecipe,
    budget: Budget,
    checkpoint: Path,
    seed: int = 0,
    threads: int | None = None,
    start: VAE | None = None,
) -> VAE:
    """Trains on uint8 pictures (n, 3, size, size) on their device, goes on from the checkpoint if there is one.

    `start`: a trained one, as wide or narrower, to begin with. Returns the averaged model in evaluation mode, not
    whitened. `held_out` is reported on at every checkpoint.
    """
    torch.manual_seed(seed)
    vae = VAE(config)
    if start is None:
        start_near_identity(vae)
    else:
        widen(start.state_dict(), vae)
    to_device(vae, pictures.device)
    _train(vae, list(vae.parameters()), pictures, held_out, recipe, budget, checkpoint, seed, threads)
    return vae


def polish_decoder(
    vae: VAE,
    pictures: Tensor,
    held_out: Tensor,
    recipe: VAERecipe,
    budget: Budget,
    checkpoint: Path,
    seed: int = 0,
    threads: int | None = None,
) -> VAE:
    """Trains the decoder further on whole pictures and leaves the latents, and so any UNet trained on them, alone."""
    copy = VAE(vae.config)
    copy.load_state_dict(vae.state_dict())
    copy.encoder.requires_grad_(False)
    copy.quant_conv.requires_grad_(False)
    to_device(copy, pictures.device)
    trained = [*copy.decoder.parameters(), *copy.post_quant_conv.parameters()]
    _train(copy, trained, pictures, held_out, recipe, budget, checkpoint, seed, threads)
    return copy


def _train(
    vae: VAE,
    parameters: list[nn.Parameter],
    pictures: Tensor,
    held_out: Tensor,
    recipe: VAERecipe,
    budget: Budget,
    checkpoint: Path,
    seed: int,
    threads: int | None,
) -> None:
    """Trains the parameters, then puts their averages in their place; the model is frozen afterwards."""
    device, size = pictures.device, pictures.shape[-1]
    config = vae.config
    whole = not next(vae.encoder.parameters()).requires_grad  # latents of crops are not crops of latents
    optimizer = torch.optim.AdamW(parameters, recipe.peak_rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    average = Average(parameters, recipe.decay)
    progress = Progress()
    draws = torch.Generator().manual_seed(seed)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = state["average"]
        progress = Progress(**state["progress"])
        draws.set_state(state["draws"].cpu())

    def save() -> None:
        state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
        save_atomically({**state, "progress": asdict(progress), "draws": draws.get_state()}, checkpoint)

    bar = tqdm(
        total=100.0,
        desc="decoder" if whole else "autoencoder",
        initial=min(100.0, 100 * budget.fraction(progress)),
        bar_format="{desc} {percentage:5.1f}% {elapsed} {postfix}",
        mininterval=10,
    )
    watch, since_save, spare = Stopwatch(device), 0.0, SpareCores(threads)
    while (spent := budget.fraction(progress)) < 1:
        spare()
        crops = not whole and spent < recipe.crop_share
        side, count = (size // 2, 4 * recipe.batch) if crops else (size, recipe.batch)
        rows = torch.randint(len(pictures), (count,), generator=draws)
        x0, y0 = (int(v) for v in torch.randint(size - side + 1, (2,), generator=draws))
        picture = as_input(pictures[rows.to(device), :, y0 : y0 + side, x0 : x0 + side])
        if torch.rand((), generator=draws) < 0.5:
            picture = picture.flip(3)
        noise = torch.randn(count, config.latent_channels, side // 8, side // 8, generator=draws).to(device)
        with autocast(device):
            mean = vae.moments(picture)[0]
            noisy = mean + recipe.latent_noise * mean.detach().float().std() * noise
            output = vae.decode(noisy * config.scaling_factor)
        loss = reconstruction_loss(output.float(), picture, mean.float(), recipe.squared)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.peak_rate, progress.steps, spent, recipe.warmup, recipe.floor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(parameters, progress.steps)
        seconds = watch()
        progress.advance(count, loss.item(), seconds)
        since_save += seconds
        quality = 10 * math.log10(4 / F.mse_loss(output.float(), picture).item())
        bar.set_postfix_str(
            f"step {progress.steps} loss {loss.item():.3f} {quality:.1f} dB {torch.get_num_threads()} threads",
            refresh=False,
        )
        bar.update(100 * (budget.fraction(progress) - spent))
        if since_save > 60 * recipe.checkpoint_minutes:
            save()
            latest = [p.detach().clone() for p in parameters]
            average.copy_to(parameters)
            bar.write(f"{bar.desc}: step {progress.steps}, held out {held_out_psnr(vae, held_out):.2f} dB")
            Average(latest, 0.0).copy_to(parameters)
            since_save = 0.0
            watch()
    save()
    bar.close()
    average.copy_to(parameters)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def reconstruct(vae: VAE, pictures: Tensor, batch: int = 16) -> Tensor:
    """uint8 pictures through encoder and decoder: floats about [-1, 1]."""
    return torch.cat([vae(as_input(part)).float() for part in pictures.split(batch)])


def held_out_psnr(vae: VAE, pictures: Tensor) -> float:
    """Mean PSNR in dB of the reconstructions of uint8 pictures."""
    return float(psnr(reconstruct(vae, pictures), as_input(pictures)).mean())


@torch.no_grad()
def encode(vae: VAE, pictures: Tensor, batch: int = 32, exactly: bool = False) -> Tensor:
    """uint8 pictures -> scaled latents (n, 4, h, w), float32; computed in the device's fastest type or `exactly`."""
    parts = tqdm(pictures.split(batch), desc="encoding", disable=len(pictures) < 1000, mininterval=10)
    with nullcontext() if exactly else autocast(pictures.device):
        return torch.cat([vae.encode(as_input(part)).float() for part in parts])


@torch.no_grad()
def whiten(vae: VAE, pictures: Tensor) -> None:
    """Makes the scaled latents of these pictures zero-mean, unit-variance and uncorrelated, in place.

    The map goes into quant_conv and its inverse into post_quant_conv: reconstructions stay the same, and SD's
    constant 0.18215 becomes the right scale. The posterior's log-variance is set to a small constant.
    """
    scale = vae.config.scaling_factor
    flat = encode(vae, pictures, exactly=True).div(scale).transpose(0, 1).flatten(1).double()
    mean = flat.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh((flat - mean) @ (flat - mean).T / flat.shape[1])
    # symmetric whitening: the least change among all that whiten
    forward = vectors @ torch.diag(values.rsqrt()) @ vectors.T / scale
    backward = torch.linalg.inv(forward)
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant.bias is not None
    assert post.bias is not None
    quant.weight[:channels] = (forward @ quant.weight[:channels, :, 0, 0].double()).float()[..., None, None]
    quant.bias[:channels] = (forward @ (quant.bias[:channels].double() - mean[:, 0])).float()
    quant.weight[channels:] = 0
    quant.bias[channels:] = -8.0
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ mean[:, 0]).float()
    post.weight[:] = (weight @ backward).float()[..., None, None]
