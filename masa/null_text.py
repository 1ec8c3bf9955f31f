"""Null-text inversion: unconditional embeddings that make guided denoising retrace a pivot (2211.09794)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from masa.branches import SOURCE, Branches, Half, Row
from masa.controls.steering import NO_STEERING, Steering
from masa.guidance import ClassifierFree
from masa.pipeline import StableDiffusion
from masa.schedule import Schedule

INNER_STEPS = 10  # published
LEARNING_RATE = 1e-2
MAX_STEPS = 100  # the learning rate falls to 0 there
# Positions of the latents up to which all activations are kept: they are few there, and slower to compute again.
KEPT = 32 * 32


def learning_rate(step: int) -> float:
    """Adam's, at a denoising step: it falls as the steps get less noisy, whatever their number."""
    return LEARNING_RATE * (1.0 - step / MAX_STEPS)


def tolerance(step: int) -> float:
    """The loss that is low enough at a denoising step."""
    return 1e-5 + 2e-5 * step


def null_text(
    sd: StableDiffusion,
    pivot: Tensor,
    uncond: Tensor,
    cond: Tensor,
    *,
    schedule: Schedule,
    guidance_scale: float,
    inner_steps: int = INNER_STEPS,
    progress: bool = True,
    steering: Steering = NO_STEERING,
) -> Tensor:
    """Algorithm 1: the unconditional embedding of each denoising step, (steps, 77, width) float32 on the CPU.

    pivot (steps + 1, 4, h, w): an inversion's latents, clean first. uncond, cond (1, 77, width): embeddings of
    the empty and of the source's prompt. inner_steps: Adam's at each denoising step, unless the loss falls below
    the tolerance before; 1 or more. The published 10 may leave the first steps, where the embedding has furthest
    to go, above the tolerance, and what is lost there is not always made up for at the end. steering: the controls
    that steered the pivot; what they read of the embedding is part of its gradient.
    Latents, embedding and Adam are float32 even when the network is not; beyond 32x32 latents the network's
    activations are recomputed block by block, which is exact and keeps the memory small.
    """
    steps = len(pivot) - 1
    checkpoint = pivot[0, 0].numel() > KEPT
    rule = ClassifierFree()
    found = []

    def predict(x: Tensor, timestep: int, context: Tensor, half: Half, checkpoint: bool = False) -> Tensor:
        row, latents = Branches((Row(SOURCE, (half,)),)), x.to(sd.dtype)
        edits, residuals = steering.edits(timestep, row), steering.residuals(timestep, latents, context, row)
        return sd.unet(latents, timestep, context, edits, checkpoint=checkpoint, residuals=residuals)[0].float()

    x, embedding = pivot[-1:], uncond.float()
    bar = tqdm(schedule.timesteps(steps), desc="null-text", disable=not progress)
    for step, timestep in enumerate(bar):
        wanted = pivot[steps - step - 1][None]
        with torch.no_grad():
            eps_cond = predict(x, timestep, cond, "cond")
        with torch.enable_grad():
            embedding = embedding.detach().clone().requires_grad_()
            adam = torch.optim.Adam([embedding], lr=learning_rate(step))
            for _ in range(inner_steps):
                eps = predict(x, timestep, embedding.to(sd.dtype), "uncond", checkpoint)
                reached = schedule.step(rule.guide(eps, eps_cond, guidance_scale, step), x, timestep, steps)
                # Summed, so that no gradient underflows in float16; the mean's gradient after that, in float32.
                total = F.mse_loss(reached, wanted, reduction="sum")
                embedding.grad = torch.autograd.grad(total, embedding)[0] / wanted.numel()
                adam.step()
                loss = total.item() / wanted.numel()
                if loss < tolerance(step):
                    break
        embedding = embedding.detach()
        bar.set_postfix(loss=f"{loss:.1e}")
        found.append(embedding.cpu())
        with torch.no_grad():  # once more: the embedding has moved since its last prediction
            eps = predict(x, timestep, embedding.to(sd.dtype), "uncond")
            x = schedule.step(rule.guide(eps, eps_cond, guidance_scale, step), x, timestep, steps)
    return torch.cat(found)
