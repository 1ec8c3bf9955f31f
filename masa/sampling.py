"""sample() and edit(): one source and N targets together, under control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from masa import __version__
from masa.attention import Backend
from masa.branches import Branches
from masa.cache.recorder import Recorder
from masa.cache.source_cache import SourceCache
from masa.checks import (
    as_controls,
    as_prompts,
    check_controls,
    check_inversion,
    check_numbers,
    check_start,
    check_targets_at_once,
    check_tiled,
    choose_first_step,
    describe_run,
    picture_size,
    steps_and_size,
)
from masa.controls.base import Control, begin_all, check_together
from masa.controls.masactrl import MasaCtrl
from masa.denoising import Callback, Context, Denoising, check_cache, denoise
from masa.errors import MasaError
from masa.inversion import invert
from masa.io.pictures import ImageLike
from masa.noise import Noise
from masa.null_text import INNER_STEPS
from masa.output.result import Picture, Result
from masa.pipeline import StableDiffusion
from masa.schedule import Schedule
from masa.settings import describe, pack
from masa.trajectory import Trajectory, default_skip


@torch.no_grad()
def sample(
    sd: StableDiffusion,
    source: str = "",
    target: str | Sequence[str] = (),
    *,
    controls: Control | Sequence[Control] = MasaCtrl(),
    trajectory: Trajectory | None = None,
    cache: SourceCache | None = None,
    pin_source: bool | None = None,
    steps: int | None = None,
    skip_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    latents: Tensor | None = None,
    eta: float = 0.0,
    schedule: Schedule | None = None,
    targets_at_once: int | None = None,
    tiled: bool | None = None,
    backend: Backend = "auto",
    progress: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Synthesise a source picture and, from the same noise and under control, its targets.

    source, target: prompts; several targets share one pass; none is plain text-to-image of the source.
    controls: one or a list; [] is the fixed-seed baseline. They act on targets only; those that record serve a
    run without targets too, others are refused there.
    trajectory: an inverted picture as the source; its size, steps and schedule hold, its prompt where `source`
    is empty, and the unconditional embeddings and noise that it brings. cache: a source that `masa.record` ran;
    it is not computed again, and all that it was recorded with holds (an empty prompt and eta 0 ask for nothing).
    pin_source: put the source's latents back on the trajectory before each step (2310.01506), the default, else it
    drifts; without targets it always denoises freely. steps: default 50. skip_steps: how
    many of the noisiest are left out, starting from the trajectory's (or the given) latents there; default 0,
    for an edit-friendly trajectory 12 of 50. guidance_scale: default 7.5; 1 or less switches guidance off.
    height, width: multiples of 64, default the model's training size. Starting noise: `latents` (1, 4, h, w)
    shared or (1 + N, 4, h, w), else drawn from `generator`, else from `seed` on the CPU, the same on every
    device. eta: DDIM's, 0 is deterministic. schedule: default the model's. targets_at_once: how many targets one
    call of the UNet takes, where memory is short; further calls in a step compute the source again where their
    targets read it, unless it is cached. tiled: decode in overlapping tiles, which takes less memory and changes the
    pictures a little; default where a side is over 768 pixels. backend: of controlled attention,
    "auto", "triton", "sdpa" or "reference". callback(step, timestep, latents) may return other latents.

    Raises MasaError for bad input, before any long work. MasaCtrl (2304.08465), algorithm 1.
    """
    targets, chosen = as_prompts(target), as_controls(controls)
    check_targets_at_once(targets_at_once)
    check_tiled(tiled)
    described = [describe(control) for control in chosen]
    if not targets and described == [describe(MasaCtrl())]:
        chosen, described = (), []  # the default, which has nothing to act on
    if cache is not None:
        cache.check(sd)
        trajectory = cache.agree_trajectory(trajectory, generator)
        source = cache.agree("source", source or None)
        pin_source = cache.agree("pin_source", pin_source)
        steps = cache.agree("steps", steps)
        if skip_steps is None or not cache.pinned or skip_steps < cache.first_step:
            skip_steps = cache.agree("skip_steps", skip_steps)
        guidance_scale = cache.agree("guidance_scale", guidance_scale)
        negative_prompt = cache.agree("negative_prompt", negative_prompt or None)
        height, width = cache.agree("height", height), cache.agree("width", width)
        seed = cache.agree("seed", seed) if cache.seeded else seed
        latents = cache.start(latents)
        eta = cache.agree("eta", eta or None)
        schedule = cache.agree("schedule", schedule)
        tiled = cache.agree("tiled", tiled)
    pin_source = True if pin_source is None else pin_source
    guidance_scale = 7.5 if guidance_scale is None else guidance_scale
    check_numbers(sd, guidance_scale, eta, backend, latents)
    steps, schedule, size = steps_and_size(sd, trajectory, steps, schedule, height, width)
    schedule.timesteps(steps)
    noise = Noise(seed, generator)
    eta = check_start(latents, trajectory, eta, negative_prompt)
    usual = 0 if trajectory is None else trajectory.skip_steps
    first_step = choose_first_step(skip_steps, steps, usual, from_noise=trajectory is None and latents is None)
    source = source or (trajectory.prompt if trajectory is not None else "")
    shape = (sd.config.unet.in_channels, *(side // sd.config.vae.downsample for side in size))
    info = describe_run(sd, schedule, steps, (source, *targets), (shape[1], shape[2]))
    info = replace(
        info,
        first_step=first_step,
        source_latents=None if trajectory is None else trajectory.latents[:1].to(sd.device),
        draw_noise=lambda: noise.draw((1, *shape)).to(sd.device),
    )
    active = begin_all(chosen, info)
    first_step = max(first_step, *(control.first_step for control in active), 0)
    start = _start(1 + len(targets), shape, latents, trajectory, steps - first_step, noise).to(sd.device)
    for control in active:
        start = control.start(start)
    source_guidance = None if trajectory is None else trajectory.source_guidance
    guided = max(guidance_scale, source_guidance or 0.0) > 1.0
    # A source alone denoises freely, unless it is recorded for targets to come.
    pin_source = pin_source and (bool(targets) or any(isinstance(control, Recorder) for control in chosen))
    run = Denoising(
        sd=sd,
        schedule=schedule,
        steps=steps,
        latents=start,
        contexts=_contexts(sd, steps, source, targets, negative_prompt, trajectory, guided),
        guidance_scale=guidance_scale,
        draw_noise=lambda: noise.draw((1, *shape)),
        source_guidance=source_guidance,
        first_step=first_step,
        controls=active,
        pinned=trajectory.latents.to(sd.device) if trajectory is not None and pin_source else None,
        retraces=trajectory is None or trajectory.method != "noise",
        eta=eta,
        noise=None if trajectory is None else trajectory.noise,
        backend=backend,
        callback=callback,
        cache=cache,
        targets_at_once=targets_at_once,
    )
    if cache is not None:
        check_cache(run, cache)
    rows = [context.branches if cache is None else context.branches.cache_source() for context in run.contexts]
    check_together(active, first_step, rows, sd.unet.sites)
    x = run.latents
    for x in tqdm(denoise(run), desc="sample", total=steps - first_step, disable=not progress):  # noqa: B007
        pass
    if not bool(torch.isfinite(x).all()):
        raise MasaError(
            f"the latents became NaN or infinite in {str(sd.dtype).removeprefix('torch.')}; load with dtype='fp32', "
            "or lower guidance_scale"
        )
    settings = {
        "function": "sample",
        "version": __version__,
        "checkpoint": sd.origin.checkpoint,
        "vae": sd.origin.vae,
        "tokenizer": sd.origin.tokenizer,
        "fingerprint": sd.fingerprint,
        "device": str(sd.device),
        "dtype": str(sd.dtype).removeprefix("torch."),
        "offload": sd.offload,
        "compiled": sd.compiled,
        "cuda_graphs": sd.cuda_graphs,
        "source": source,
        "target": list(targets),
        "controls": described,
        "trajectory": None if trajectory is None else dict(trajectory.settings),
        "pin_source": pin_source,
        "steps": steps,
        "skip_steps": first_step,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "height": size[0],
        "width": size[1],
        "seed": noise.seed,  # drawn, where none was given: any run can be repeated
        "generator_state": noise.generator_state,
        "latents": None if latents is None else pack(latents),
        "eta": eta,
        "schedule": schedule.describe(),
        "targets_at_once": targets_at_once,
        "tiled": tiled,
        "backend": backend,
        "callback": callback is not None,
    }
    if cache is None:
        pictures = sd.decode_latents(x, progress=progress, tiled=tiled)
    else:
        pictures = [cache.picture, *sd.decode_latents(x[1:], progress=progress, tiled=tiled)]
    masks = {i: {s: m.cpu() for s, m in c.masks().items()} for i, c in enumerate(active) if c.masks()}
    attention = {i: {n: m.cpu() for n, m in c.attention().items()} for i, c in enumerate(active) if c.attention()}
    queries = {i: c.queries() for i, c in enumerate(active) if c.queries()}
    predicted = {i: c.predictions() for i, c in enumerate(active) if c.predictions()}
    predictions = {i: _decode_all(sd, latents, progress, tiled) for i, latents in predicted.items()}
    images = [Picture.of(picture, settings | {"branch": i}) for i, picture in enumerate(pictures)]
    return Result(images, x.cpu(), settings, masks, attention, queries, predictions)


def _decode_all(
    sd: StableDiffusion, latents: Mapping[int, Tensor], progress: bool, tiled: bool | None
) -> dict[int, Tensor]:
    """Latents (1 + N, 4, h, w) by step -> pictures (1 + N, height, width, 3), uint8, by step."""
    together = sd.decode_latents(torch.cat(list(latents.values())), progress=progress, tiled=tiled)
    pictures = torch.stack([torch.from_numpy(np.array(picture)) for picture in together])
    return dict(zip(latents, pictures.chunk(len(latents)), strict=True))


def edit(
    sd: StableDiffusion,
    image: ImageLike,
    target: str | Sequence[str],
    source: str = "",
    *,
    controls: Control | Sequence[Control] = MasaCtrl(),
    pin_source: bool = True,
    steps: int = 50,
    skip_steps: int | None = None,
    guidance_scale: float = 7.5,
    invert_guidance_scale: float = 1.0,
    method: str = "ddim",
    inner_steps: int = INNER_STEPS,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    eta: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
    targets_at_once: int | None = None,
    tiled: bool | None = None,
    backend: Backend = "auto",
    progress: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Edit a real picture: `invert` it with the source prompt, then `sample` the targets from its trajectory.

    guidance_scale is the sampling's, to which null-text is fitted; invert_guidance_scale the inversion's. seed or
    generator: of the inversion's noise, then of the sampling's. Everything else as in `invert` and `sample`.
    MasaCtrl section 4.
    """
    targets = as_prompts(target)
    if not targets:
        raise MasaError("edit needs at least one target prompt")
    check_targets_at_once(targets_at_once)
    check_tiled(tiled)
    check_numbers(sd, guidance_scale, eta, backend)
    check_inversion(method, negative_prompt, eta)
    size = picture_size(sd, image, height, width)
    first_step = choose_first_step(skip_steps, steps, default_skip(method, steps), from_noise=False)
    check_controls(sd, controls, steps, (source, *targets), size=size, first_step=first_step)
    trajectory = invert(
        sd,
        image,
        source,
        steps=steps,
        guidance_scale=invert_guidance_scale,
        method=method,
        edit_guidance_scale=guidance_scale,
        inner_steps=inner_steps,
        height=height,
        width=width,
        seed=seed,
        generator=generator,
        schedule=schedule,
        tiled=tiled,
        backend=backend,
        progress=progress,
    )
    return sample(
        sd,
        source,
        targets,
        controls=controls,
        trajectory=trajectory,
        pin_source=pin_source,
        skip_steps=skip_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        eta=eta,
        seed=seed,
        generator=generator,
        targets_at_once=targets_at_once,
        tiled=tiled,
        backend=backend,
        progress=progress,
        callback=callback,
    )


def _contexts(
    sd: StableDiffusion,
    steps: int,
    source: str,
    targets: tuple[str, ...],
    negative_prompt: str,
    trajectory: Trajectory | None,
    guided: bool,
) -> tuple[Context, ...]:
    """Every step's rows and embeddings; the source has one row where its two embeddings are equal."""
    cond = torch.cat([sd.encode_prompt(list(prompts)) for prompts in ((source,), targets) if prompts])
    if trajectory is None or trajectory.context is None:
        unconds = [sd.encode_prompt([negative_prompt])] * steps
    elif trajectory.context.shape != (steps, *cond.shape[1:]):
        raise MasaError(
            f"the trajectory's unconditional embeddings are {tuple(trajectory.context.shape)}; this model's would be "
            f"{(steps, *cond.shape[1:])}: invert with the model that edits"
        )
    else:
        unconds = list(trajectory.context.to(cond).split(1))
    rows = {merged: Branches.build(len(targets), guided=guided, merge_source=merged) for merged in (False, True)}
    return tuple(Context(rows[torch.equal(uncond, cond[:1])], uncond, cond) for uncond in unconds)


def _start(
    branches: int,
    shape: tuple[int, ...],
    latents: Tensor | None,
    trajectory: Trajectory | None,
    level: int,
    noise: Noise,
) -> Tensor:
    """The first latents (branches, 4, h, w): one noise for all, unless given one each; `level` steps to clean."""
    if trajectory is not None:
        return trajectory.latents[level][None].expand(branches, -1, -1, -1)
    if latents is None:
        return noise.draw((1, *shape)).expand(branches, -1, -1, -1)
    if latents.shape[1:] != shape or len(latents) not in (1, branches):
        raise MasaError(
            f"latents are {tuple(latents.shape)}; expected (1, {', '.join(map(str, shape))}), or {branches} of them"
        )
    return latents.float().expand(branches, -1, -1, -1)
