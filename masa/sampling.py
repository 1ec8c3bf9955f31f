"""sample() and edit(): one source and N targets together, under control."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from masa import __version__
from masa.attention import Backend
from masa.branches import Branches
from masa.cache.recorder import source_condition
from masa.cache.source_cache import SourceCache
from masa.checks import (
    agree,
    as_controls,
    as_prompts,
    check_controls,
    check_embedded,
    check_inversion,
    check_model,
    check_schedule,
    check_settings,
    choose_first_step,
    choose_levels,
    describe_run,
    grid_of,
    picture_size,
    settle,
)
from masa.controls.base import ActiveControl, Control, begin_all, only_looks
from masa.controls.masactrl import MasaCtrl
from masa.denoising import Callback, Context, Denoising, check_cache, check_together, denoise
from masa.errors import MasaError
from masa.guidance import Guidance
from masa.inversion import invert
from masa.io.pictures import ImageLike
from masa.models.taesd import TinyVAE
from masa.noise import Noise
from masa.null_text import INNER_STEPS
from masa.output.result import Picture, Result
from masa.pipeline import StableDiffusion
from masa.runtime.adapters import keep_networks
from masa.samplers import choose_sampler
from masa.samplers.base import Levels, Sampler
from masa.schedule import Schedule
from masa.settings import RunSettings, describe
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
    guidance: Guidance | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    latents: Tensor | None = None,
    eta: float = 0.0,
    schedule: Schedule | None = None,
    sampler: str | Sampler | None = None,
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
    for an edit-friendly trajectory 12 of 50. guidance_scale: default 7.5; 1 or less switches guidance off. guidance:
    what it means, default masa.ClassifierFree(); RescaledGuidance(phi) and GuidanceInterval(start, end) are others.
    height, width: multiples of 64, default the model's training size. Starting noise: `latents` (1, 4, h, w)
    shared or (1 + N, 4, h, w), else drawn from `generator`, else from `seed` on the CPU, the same on every
    device. eta: DDIM's, 0 is deterministic. schedule: default the model's. sampler: "ddim" (default), "dpm++2m",
    "dpm++2m-sde", "unipc", "euler", "euler-a", "lcm" or a value such as DPMSolverPP(karras=True); one that adds noise
    takes it from the same seed or generator, after the start's. On a trajectory it visits the trajectory's levels;
    "lcm" cannot. targets_at_once: how many targets one call of the UNet takes, where memory is short; further calls in
    a step compute the source again where their targets read it, unless it is cached. tiled: decode in overlapping
    tiles, which takes less memory and changes the pictures a little; default where a side is over 768 pixels. backend:
    of controlled attention, "auto", "triton", "sdpa" or "reference". callback(step, timestep, latents) may return other
    latents; a timestep between training's is rounded.

    Raises MasaError for bad input, before any long work. MasaCtrl (2304.08465), algorithm 1.
    """
    asked = RunSettings(
        source=source,
        target=as_prompts(target),
        controls=as_controls(controls),
        pin_source=pin_source,
        steps=steps,
        skip_steps=skip_steps,
        guidance_scale=guidance_scale,
        guidance=guidance,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        seed=seed,
        latents=latents,
        eta=eta,
        schedule=schedule,
        sampler=None if sampler is None else choose_sampler(sampler),
        targets_at_once=targets_at_once,
        tiled=tiled,
        backend=backend,
    )
    return run(sd, asked, Given(trajectory, cache, generator, callback, progress))


@dataclass(frozen=True, eq=False)
class Given:
    """What a run is given beside its settings."""

    trajectory: Trajectory | None = None
    cache: SourceCache | None = None
    generator: torch.Generator | None = None
    callback: Callback | None = None
    progress: bool = True


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that is checked and ready, and what tells how it was made."""

    denoising: Denoising
    described: Mapping[str, Any]  # the settings as JSON, as they were before the run
    noise: Noise
    given: Given


@torch.no_grad()
def run(sd: StableDiffusion, asked: RunSettings, given: Given) -> Result:
    """What `sample` does with its arguments: prepare, denoise, collect."""
    prepared = prepare(sd, asked, given)
    denoising = prepared.denoising
    x, total = denoising.latents, denoising.steps - denoising.first_step
    for x in tqdm(denoise(denoising), desc="sample", total=total, disable=not given.progress):  # noqa: B007
        pass
    return collect(prepared, x)


def prepare(sd: StableDiffusion, asked: RunSettings, given: Given) -> Prepared:
    """Check all that a run is given, fill in what was left out, bind its controls. MasaError before any long work."""
    check_model(sd)
    if given.callback is not None and not callable(given.callback):
        raise MasaError(f"callback is {given.callback!r}; expected a function of (step, timestep, latents), or None")
    cache = given.cache
    looking = tuple(filter(only_looks, asked.controls))
    asked = replace(asked, controls=tuple(control for control in asked.controls if not only_looks(control)))
    if not asked.target and [describe(control) for control in asked.controls] == [describe(MasaCtrl())]:
        asked = replace(asked, controls=())  # the default, which has nothing to act on
    if cache is not None:
        cache.check(sd)
        given = replace(given, trajectory=cache.agree_trajectory(given.trajectory, given.generator))
        asked = agree(asked, cache)
    trajectory = given.trajectory
    settings, levels = settle(sd, asked, trajectory)
    assert settings.sampler is not None
    assert settings.guidance is not None
    assert settings.guidance_scale is not None
    noise = Noise(settings.seed, given.generator)
    shape = (sd.config.unet.in_channels, *grid_of(sd, settings))
    _pass_over_drawn(noise, trajectory, shape)

    def draw() -> Tensor:
        return noise.draw((1, *shape))

    controls = (*settings.controls, *looking)
    active, first_step = _begin(
        sd, replace(settings, controls=controls), levels, trajectory, lambda: draw().to(sd.device)
    )
    start = _start(settings, trajectory, first_step, shape, draw).to(sd.device)
    if trajectory is None and first_step == 0:
        start = start * settings.sampler.noise_scale(levels)
    start = _started(active, start, cache)
    denoising = Denoising(
        sd=sd,
        levels=levels,
        solver=settings.sampler.start(levels, settings.eta),
        latents=start,
        contexts=_contexts(sd, settings, trajectory, active, first_step),
        guidance=settings.guidance,
        guidance_scale=settings.guidance_scale,
        draw_noise=draw,
        source_guidance=None if trajectory is None else trajectory.source_guidance,
        first_step=first_step,
        controls=active,
        pinned=trajectory.latents.to(sd.device) if trajectory is not None and settings.pin_source else None,
        retraces=trajectory is None or trajectory.method != "noise",
        noise=None if trajectory is None else trajectory.noise,
        backend=settings.backend,
        callback=given.callback,
        cache=cache,
        targets_at_once=settings.targets_at_once,
        embedded_guidance=sd.embed_guidance(settings.guidance_scale),
    )
    if cache is not None:
        rows_of = {step: denoising.contexts[step].branches for step in range(first_step, denoising.steps)}
        pairs = zip(controls, active, strict=True)
        check_cache(denoising, cache, [source_condition(control, bound, rows_of) for control, bound in pairs])
    check_together(denoising)
    settings = replace(settings, skip_steps=first_step, generator_state=noise.generator_state)
    return Prepared(denoising, settings.describe(), noise, given)


def collect(prepared: Prepared, x: Tensor) -> Result:
    """The final latents (1 + N, 4, h, w) decoded, with all that controls kept and the run's settings."""
    run, given = prepared.denoising, prepared.given
    sd = run.sd
    if not bool(torch.isfinite(x).all()):
        raise MasaError(
            f"the latents became NaN or infinite in {str(sd.dtype).removeprefix('torch.')}; load with dtype='fp32', "
            "or lower guidance_scale"
        )
    settings = {
        "function": "sample",
        "version": __version__,
        **sd.origin.describe(),
        "decoder": "TAESD" if isinstance(sd.vae, TinyVAE) else "VAE",
        "fingerprint": sd.fingerprint,
        "device": str(sd.device),
        "dtype": str(sd.dtype).removeprefix("torch."),
        "offload": sd.offload,
        "compiled": sd.compiled,
        "cuda_graphs": sd.cuda_graphs,
        **prepared.described,
        "seed": prepared.noise.seed,  # drawn, where none was given: any run can be repeated
        "trajectory": None if given.trajectory is None else dict(given.trajectory.settings),
        "callback": given.callback is not None,
    }
    tiled = prepared.described["tiled"]
    if given.cache is None:
        pictures = sd.decode_latents(x, progress=given.progress, tiled=tiled)
    else:
        pictures = [given.cache.picture, *sd.decode_latents(x[1:], progress=given.progress, tiled=tiled)]
    active = run.controls
    masks = {i: {s: m.cpu() for s, m in c.masks().items()} for i, c in enumerate(active) if c.masks()}
    attention = {i: {n: m.cpu() for n, m in c.attention().items()} for i, c in enumerate(active) if c.attention()}
    recorded = {i: c.queries() for i, c in enumerate(active)}
    queries = {i: {n: q.cpu() for n, q in found.items()} for i, found in recorded.items() if found}
    predicted = {i: c.predictions() for i, c in enumerate(active) if c.predictions()}
    predictions = {i: _decode_all(sd, latents, given.progress, tiled) for i, latents in predicted.items()}
    images = [Picture.of(picture, settings | {"branch": i}) for i, picture in enumerate(pictures)]
    return Result(images, x.cpu(), settings, masks, attention, queries, predictions)


def _decode_all(
    sd: StableDiffusion, latents: Mapping[int, Tensor], progress: bool, tiled: bool | None
) -> dict[int, Tensor]:
    """Latents (1 + N, 4, h, w) by step -> pictures (1 + N, height, width, 3), uint8, by step."""
    together = sd.decode_latents(torch.cat(list(latents.values())), progress=progress, tiled=tiled)
    pictures = torch.stack([torch.from_numpy(np.array(picture)) for picture in together])
    return dict(zip(latents, pictures.chunk(len(latents)), strict=True))


@keep_networks()
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
    guidance: Guidance | None = None,
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
    sampler: str | Sampler = "ddim",
    targets_at_once: int | None = None,
    tiled: bool | None = None,
    backend: Backend = "auto",
    progress: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Edit a real picture: `invert` it with the source prompt, then `sample` the targets from its trajectory.

    guidance_scale is the sampling's, to which null-text is fitted; invert_guidance_scale the inversion's. seed or
    generator: of the inversion's noise, then of the sampling's. controls with a condition for the source (T2IAdapter,
    ControlNet, IPAdapter) steer its inversion too. Everything else as in `invert` and `sample`.
    MasaCtrl section 4.
    """
    asked = RunSettings(
        source=source,
        target=as_prompts(target),
        controls=as_controls(controls),
        pin_source=pin_source,
        skip_steps=skip_steps,
        guidance_scale=guidance_scale,
        guidance=guidance,
        negative_prompt=negative_prompt,
        seed=seed,
        eta=eta,
        sampler=choose_sampler(sampler),
        targets_at_once=targets_at_once,
        tiled=tiled,
        backend=backend,
    )
    check_model(sd)
    check_schedule(schedule)
    steering = check_edit(sd, image, asked, method, steps, schedule or sd.schedule, (height, width))
    trajectory = invert(
        sd,
        image,
        source,
        steps=steps,
        guidance_scale=invert_guidance_scale,
        method=method,
        edit_guidance_scale=guidance_scale,
        inner_steps=inner_steps,
        controls=steering,
        height=height,
        width=width,
        seed=seed,
        generator=generator,
        schedule=schedule,
        tiled=tiled,
        backend=backend,
        progress=progress,
    )
    return run(sd, asked, Given(trajectory, None, generator, callback, progress))


def check_edit(
    sd: StableDiffusion,
    image: ImageLike,
    asked: RunSettings,
    method: str,
    steps: int,
    schedule: Schedule,
    asked_size: tuple[int | None, int | None],
) -> tuple[Control, ...]:
    """Refuse an edit before its inversion's minutes are spent; the controls that take part in that."""
    assert asked.sampler is not None
    if not asked.target:
        raise MasaError("edit needs at least one target prompt")
    check_settings(sd, asked)
    check_inversion(method, asked.negative_prompt, asked.eta)
    size = picture_size(sd, image, *asked_size)
    first_step = choose_first_step(asked.skip_steps, steps, default_skip(method, steps), from_noise=False)
    if sd.embeds_guidance:
        check_embedded(asked.negative_prompt, asked.guidance, method)
    free = not asked.pin_source
    levels = choose_levels(asked.sampler, schedule, steps, method=method, eta=asked.eta, free=free)
    prompts = (asked.source, *asked.target)
    return check_controls(sd, asked.controls, levels, prompts, size=size, first_step=first_step, method=method)


def _begin(
    sd: StableDiffusion,
    settings: RunSettings,
    levels: Levels,
    trajectory: Trajectory | None,
    draw_noise: Callable[[], Tensor],
) -> tuple[tuple[ActiveControl, ...], int]:
    """The controls bound to the run, and its first step: as asked, or the latest that a control wants."""
    assert settings.skip_steps is not None
    info = replace(
        describe_run(sd, levels, (settings.source, *settings.target), grid_of(sd, settings)),
        first_step=settings.skip_steps,
        source_latents=None if trajectory is None else trajectory.latents[:1].to(sd.device),
        draw_noise=draw_noise,
        source_pinned=trajectory is not None and bool(settings.pin_source),
    )
    active = begin_all(settings.controls, info)
    _warn_of_other_conditions(trajectory, active)
    first_step = max(settings.skip_steps, *(control.first_step for control in active), 0)
    late = [control.name for control in active if control.first_step > settings.skip_steps]
    if late and trajectory is None and settings.latents is None:
        raise MasaError(
            f"{' and '.join(late)} starts at step {first_step}, from half noisy latents; give a trajectory "
            "(masa.invert) or latents"
        )
    return active, first_step


def _warn_of_other_conditions(trajectory: Trajectory | None, controls: Sequence[ActiveControl]) -> None:
    """A warning where a real picture was inverted with other conditions than the run gives to its source."""
    if trajectory is None or trajectory.method == "noise":
        return
    inverted = sorted(trajectory.settings.get("source_conditions", ()))
    given = sorted(one for control in controls for one in control.source_conditions)
    if inverted == given:
        return

    def names(conditions: Sequence[str]) -> str:
        return " and ".join(sorted({one.partition("(")[0] for one in conditions})) or "no condition"

    of_others = " of another picture, file or weight" if names(inverted) == names(given) else ""
    warnings.warn(
        f"the source was inverted with {names(inverted)}, and the run gives it {names(given)}{of_others}: they should "
        "be the same; invert with controls=.. (masa.edit does), or give the source the same condition",
        stacklevel=2,
    )


def _pass_over_drawn(noise: Noise, trajectory: Trajectory | None, shape: tuple[int, ...]) -> None:
    """Go on in a seed's noise behind what a trajectory's inversion has drawn of it, so that none serves twice."""
    if trajectory is not None and noise.seed is not None and noise.seed == trajectory.settings.get("seed"):
        noise.draw((trajectory.draws, *shape))


def _started(controls: Sequence[ActiveControl], start: Tensor, cache: SourceCache | None) -> Tensor:
    """The first latents (1 + N, 4, h, w) as controls change them. MasaError for what are none, or another source."""
    for control in controls:
        before, start = start, control.start(start)
        if not isinstance(start, Tensor) or start.shape != before.shape:
            got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
            raise MasaError(f"{control.name} starts from {got}; expected latents {tuple(before.shape)}")
        if cache is not None and not torch.equal(start[:1], before[:1]):
            raise MasaError(f"{control.name} changes the source's start, which a cache holds; run without cache=")
    return start


def _contexts(
    sd: StableDiffusion,
    settings: RunSettings,
    trajectory: Trajectory | None,
    controls: Sequence[ActiveControl],
    first_step: int,
) -> tuple[Context, ...]:
    """Every step's rows and embeddings; the source has one row where nothing tells its two halves apart."""
    steps, targets, rule = settings.steps, settings.target, settings.guidance
    assert steps is not None
    assert rule is not None
    assert settings.guidance_scale is not None
    cond = torch.cat([sd.encode_prompt(list(prompts)) for prompts in ((settings.source,), targets) if prompts])
    if trajectory is None or trajectory.context is None:
        unconds = [sd.encode_prompt([settings.negative_prompt])] * steps
    elif trajectory.context.shape != (steps, *cond.shape[1:]):
        raise MasaError(
            f"the trajectory's unconditional embeddings are {tuple(trajectory.context.shape)}; this model's would be "
            f"{(steps, *cond.shape[1:])}: invert with the model that edits"
        )
    else:
        unconds = list(trajectory.context.to(cond).split(1))
    source_scale = (trajectory.source_guidance if trajectory is not None else None) or 0.0
    guided = max(settings.guidance_scale, source_scale) > 1.0 and not sd.embeds_guidance
    if guided and settings.guidance_scale > 1.0 and first_step < steps:
        rule.check(range(first_step, steps))

    def rows(step: int, merged: bool) -> Branches:
        # A replayed source keeps its guidance where the targets have none, in the steps that read its prediction.
        replayed = source_scale > 1.0 and (not settings.pin_source or step == steps - 1)
        both = guided and rule.guides(step)
        return Branches.build(len(targets), guided=both, merge_source=merged, source_guided=replayed)

    apart = any(control.tells_halves_apart for control in controls)
    equal = [not apart and torch.equal(uncond, cond[:1]) for uncond in unconds]
    return tuple(Context(rows(step, equal[step]), uncond, cond) for step, uncond in enumerate(unconds))


def _start(
    settings: RunSettings,
    trajectory: Trajectory | None,
    first_step: int,
    shape: tuple[int, ...],
    draw_noise: Callable[[], Tensor],
) -> Tensor:
    """The first latents (1 + N, 4, h, w): one noise for all, unless given one each."""
    branches, latents = 1 + len(settings.target), settings.latents
    if trajectory is not None:
        return trajectory.latents[trajectory.steps - first_step][None].expand(branches, -1, -1, -1)
    if latents is None:
        return draw_noise().expand(branches, -1, -1, -1)
    if latents.shape[1:] != shape or len(latents) not in (1, branches):
        raise MasaError(
            f"latents are {tuple(latents.shape)}; expected (1, {', '.join(map(str, shape))}), or {branches} of them"
        )
    return latents.float().expand(branches, -1, -1, -1)
