"""From a picture back to noise: the trajectory that sampling then retraces or edits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from masa.attention import Backend, check_backend
from masa.branches import Branches
from masa.checks import as_controls, check_embedded, check_model, check_schedule, check_tiled, describe_run
from masa.controls.base import Control
from masa.controls.steering import NO_STEERING, Steering, begin_steering, check_halves, without_targets
from masa.errors import MasaError
from masa.guidance import ClassifierFree, check_guidance_scale, guide
from masa.io.files import file_digest
from masa.io.pictures import ImageLike, load_image
from masa.noise import Noise
from masa.null_text import INNER_STEPS, MAX_STEPS, null_text
from masa.pipeline import StableDiffusion
from masa.samplers.base import Levels
from masa.schedule import Schedule
from masa.settings import describe, describe_schedule
from masa.trajectory import EDIT_FRIENDLY_ETA, Method, Trajectory

# Peak signal to noise ratio, dB, of what an autoencoder rebuilds: the demo's world has 24 to 30, photographs 12 to 22.
PHOTOGRAPH = 23.0

METHODS: tuple[str, ...] = get_args(Method)

# (latents, timestep) -> the noise in them, guided.
Predict = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def invert(
    sd: StableDiffusion,
    image: ImageLike,
    prompt: str = "",
    *,
    steps: int = 50,
    guidance_scale: float = 1.0,
    method: str = "ddim",
    edit_guidance_scale: float = 7.5,
    inner_steps: int = INNER_STEPS,
    controls: Control | Sequence[Control] = (),
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
    tiled: bool | None = None,
    backend: Backend = "auto",
    progress: bool = True,
) -> Trajectory:
    """Invert a picture: latents, and what else it takes, that lead back to it when denoised.

    image: a path, PIL picture, uint8 array (h, w, 3) or float tensor (3, h, w) in [-1, 1]; size by default its
    own, scaled to the model's training size on the short side. prompt: the picture's own. guidance_scale: of
    the inversion; 1 inverts best, above 1 it is guided away from the empty prompt (no effect where both halves
    have one prompt: the empty one, or "negative-prompt"). controls: those with a condition for the source, such as
    masa.T2IAdapter(path, source=..), which then steer its way to noise as they will steer its way back; targets'
    conditions have no say here. schedule: default the model's. tiled: encode in overlapping
    tiles, which takes less memory and changes the latents a little; default where a side is over 768 pixels.

    method:
    "ddim": deterministic (2010.02502; MasaCtrl section 4).
    "negative-prompt": the same, and sampling takes the prompt as its negative one (2305.16807).
    "null-text": the same, and an unconditional embedding is fitted to each step, so that sampling with
    edit_guidance_scale retraces it (2211.09794). At most 100 steps. inner_steps: of Adam at each, at most, 1 or
    more; 10 are published, 20 to 30 follow the picture more closely in about the same time.
    "edit-friendly": independent noisy pictures, and the noise that leads from each to the next (2304.06140);
    drawn from seed or generator. Editing leaves out the first 12 of 50 steps unless told otherwise.
    "noise": no inversion; one noise, from seed or generator, added at every level (2108.01073).

    Raises MasaError for bad input, before any long work.
    """
    check_model(sd)
    check_schedule(schedule)
    schedule = schedule or sd.schedule
    timesteps = schedule.timesteps(steps)
    check_guidance_scale(guidance_scale)
    check_guidance_scale(edit_guidance_scale)
    check_method(method, prompt, steps, schedule, edit_guidance_scale)
    if sd.embeds_guidance:
        check_embedded("", None, method)
    if not isinstance(inner_steps, int | np.integer) or isinstance(inner_steps, bool) or inner_steps < 1:
        raise MasaError(f"inner_steps is {inner_steps}; expected a whole number, 1 or more")
    check_backend(backend, sd.device)
    check_tiled(tiled)
    noise = Noise(seed, generator)
    picture = load_image(image, short_side=sd.config.image_size, height=height, width=width)
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt([prompt])
    if method == "negative-prompt":
        uncond = cond
    embedded = sd.embed_guidance(guidance_scale)
    steering = _steering(sd, as_controls(controls), prompt, schedule, steps, picture, method)
    # Where both halves would be the same row, or the unconditional one has no say, one is enough.
    differ = steering.tells_halves_apart or not torch.equal(uncond, cond)
    rows = Branches.build(0, guided=guidance_scale > 1.0 and differ and not sd.embeds_guidance)
    context = rows.contexts(uncond, cond)

    def predict(x: Tensor, timestep: int) -> Tensor:
        latents = x.to(sd.dtype)
        edits, residuals = steering.edits(timestep, rows), steering.residuals(timestep, latents, context, rows)
        eps, _ = sd.unet(
            latents,
            timestep,
            context,
            edits,
            backend=backend,
            copies=rows.copies,
            residuals=residuals,
            guidance=embedded,
        )
        return guide(rows, eps.float(), ClassifierFree(), 0, guidance_scale)

    z0 = sd.encode_image(picture, height=picture.shape[2], width=picture.shape[3], tiled=tiled)
    _warn_of_photograph(sd, picture, z0)
    bar = tqdm(timesteps[::-1], desc="invert", disable=not progress or method == "noise")
    embeddings: Tensor | None = None
    added: Tensor | None = None
    if method == "noise":
        latents = _noised(z0, noise, schedule, timesteps[::-1], shared=True)
    elif method == "edit-friendly":
        latents = _noised(z0, noise, schedule, timesteps[::-1], shared=False)
        added = _edit_friendly(predict, latents, schedule, bar).cpu()
    else:
        latents = _ddim(predict, z0, schedule, steps, bar)
    if method == "negative-prompt":
        embeddings = cond.float().cpu().expand(steps, -1, -1)
    elif method == "null-text":
        embeddings = null_text(
            sd, latents, uncond, cond, schedule=schedule, guidance_scale=edit_guidance_scale,
            inner_steps=inner_steps, progress=progress, steering=steering,
        )  # fmt: skip
    is_file = isinstance(image, str | Path)
    settings = {
        "function": "invert",
        "image": str(image) if is_file else None,
        "image_sha256": file_digest(image) if is_file else None,  # type: ignore[arg-type]
        "height": picture.shape[2],
        "width": picture.shape[3],
        "prompt": prompt,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "method": method,
        "edit_guidance_scale": edit_guidance_scale if method == "null-text" else None,
        "inner_steps": int(inner_steps) if method == "null-text" else None,
        "controls": [describe(without_targets(control)) for control in as_controls(controls)],
        "source_conditions": steering.source_conditions,
        "seed": noise.seed,
        "generator_state": noise.generator_state,
        "schedule": describe_schedule(schedule),
        "tiled": tiled,
        "backend": backend,
        **sd.origin.describe(),
    }
    own = None if type(schedule) is Schedule else schedule
    return Trajectory(latents.cpu(), prompt, settings, embeddings, added, own)


def _steering(
    sd: StableDiffusion,
    controls: tuple[Control, ...],
    prompt: str,
    schedule: Schedule,
    steps: int,
    picture: Tensor,
    method: str,
) -> Steering:
    """The controls bound to the inversion of a picture (1, 3, 8h, 8w). MasaError where the method has no place for one.

    They act at a timestep as they will in the step of sampling that starts there.
    """
    if not controls:
        return NO_STEERING
    if method == "noise":
        raise MasaError("method 'noise' predicts nothing that controls could steer; leave them out, or use 'ddim'")
    scale = sd.config.vae.downsample
    grid = (picture.shape[2] // scale, picture.shape[3] // scale)
    run = describe_run(sd, Levels.of_schedule(schedule, steps), (prompt,), grid)
    steering = begin_steering(controls, run, schedule.timesteps(steps))
    check_halves(method, steering.controls)
    return steering


def _warn_of_photograph(sd: StableDiffusion, picture: Tensor, z0: Tensor) -> None:
    """Say so where the demo model is given a picture (1, 3, h, w) that its autoencoder cannot rebuild."""
    if sd.origin.checkpoint != "demo":
        return
    rebuilt = torch.from_numpy(np.array(sd.decode_latents(z0)[0])).permute(2, 0, 1)
    error = ((picture[0] + 1.0) * 127.5 - rebuilt).square().mean().item()
    psnr = 10.0 * math.log10(255.0**2 / max(error, 1e-6))
    if psnr < PHOTOGRAPH:
        warnings.warn(
            f"the demo model rebuilds this picture at {psnr:.0f} dB only: it knows a small drawn world, no "
            "photographs; load Stable Diffusion v1 for those (masa.load(FILE), -c FILE)",
            stacklevel=3,
        )


def _ddim(predict: Predict, z0: Tensor, schedule: Schedule, steps: int, timesteps: Sequence[int] | tqdm) -> Tensor:
    """DDIM against time: latents (steps + 1, 4, h, w), clean first."""
    latents = [z0]
    for timestep in timesteps:
        x = latents[-1]
        latents.append(schedule.invert_step(predict(x, timestep), x, timestep, steps))
    return torch.cat(latents)


def _noised(z0: Tensor, noise: Noise, schedule: Schedule, timesteps: Sequence[int], shared: bool) -> Tensor:
    """z0 and its draws from q(x_t | x_0), (steps + 1, 4, h, w): of one shared noise, or independent."""
    draws = noise.draw((1 if shared else len(timesteps), *z0.shape[1:])).to(z0).expand(len(timesteps), -1, -1, -1)
    return torch.cat([z0, *(schedule.noised(z0, e, t) for e, t in zip(draws[:, None], timesteps, strict=True))])


def _edit_friendly(predict: Predict, latents: Tensor, schedule: Schedule, timesteps: Sequence[int] | tqdm) -> Tensor:
    """z_t = (x_{t-1} - mu_t(x_t)) / sigma_t, eq. 5, noisiest first: the noise that a replay adds, (steps, 4, h, w)."""
    steps = len(latents) - 1
    found = []
    for k, timestep in enumerate(timesteps):
        x, x_prev = latents[k + 1][None], latents[k][None]
        mean = schedule.step(predict(x, timestep), x, timestep, steps, EDIT_FRIENDLY_ETA, torch.zeros_like(x))
        found.append((x_prev - mean) / schedule.sigma(timestep, steps, EDIT_FRIENDLY_ETA))
    return torch.cat(found[::-1])


def check_method(method: str, prompt: str, steps: int, schedule: Schedule, edit_guidance_scale: float) -> None:
    if method not in METHODS:
        raise MasaError(f"inversion method is {method!r}; expected one of {', '.join(map(repr, METHODS))}")
    if method in ("negative-prompt", "null-text") and not prompt:
        raise MasaError(
            f"{method} inversion with an empty prompt: guidance has no prompt to pull the source to, and nothing "
            "to make up for; describe the picture in its prompt, or use method='ddim'"
        )
    if method == "null-text" and steps > MAX_STEPS:
        raise MasaError(f"null-text has a learning rate for {MAX_STEPS} steps at most; steps is {steps}")
    if method == "null-text" and edit_guidance_scale <= 1.0:
        raise MasaError(
            f"null-text fits embeddings to guided denoising, and edit_guidance_scale is {edit_guidance_scale}; "
            "expected more than 1, or method='ddim'"
        )
    if method == "edit-friendly" and schedule.offset == 0:
        raise MasaError("edit-friendly noise needs a last step that adds some; use the schedule's offset 1")
