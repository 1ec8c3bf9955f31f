"""The denoising loop: one source and N targets together, with controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from masa import __version__
from masa.attention import Backend, Edit, Grid, Tape, check_backend, take
from masa.branches import Branches, check_guidance
from masa.controls.base import ActiveControl, Control, Run, begin_all, check_together, resolve
from masa.controls.masactrl import MasaCtrl
from masa.errors import MasaError
from masa.image import ImageLike, check_size, load_image
from masa.inversion import invert
from masa.models.unet import Retirement
from masa.noise import Noise
from masa.pipeline import StableDiffusion
from masa.result import Picture, Result
from masa.schedule import Schedule, predict_x0
from masa.settings import describe, pack
from masa.source_cache import Recorder, SourceCache
from masa.trajectory import EDIT_FRIENDLY_ETA, Trajectory, default_skip

Callback = Callable[[int, int, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Denoising:
    """One run, ready to go: everything `denoise` needs, checked."""

    sd: StableDiffusion
    schedule: Schedule
    steps: int
    latents: Tensor  # (1 + N, 4, h, w): the start
    contexts: tuple[Context, ...]  # of each step
    guidance_scale: float
    draw_noise: Callable[[], Tensor]  # (1, 4, h, w)
    source_guidance: float | None = None  # None: guidance_scale
    first_step: int = 0
    controls: tuple[ActiveControl, ...] = ()
    pinned: Tensor | None = None  # a trajectory's latents, which the source's are replaced by
    retraces: bool = True  # a pinned source is computed at the last step: its reconstruction
    eta: float = 0.0
    noise: Tensor | None = None  # (steps, 4, h, w), added by each step instead of fresh noise
    backend: Backend = "auto"
    callback: Callback | None = None
    cache: SourceCache | None = None  # has what the targets read of the source, which is not computed
    targets_at_once: int | None = None


@dataclass(frozen=True)
class Batch:
    """One call of the UNet: its rows, their edits, those that leave on the way and those whose eps is wanted."""

    branches: Branches
    edits: dict[int, Edit]
    retire: Retirement | None
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """One step's rows and their prompts' embeddings."""

    branches: Branches
    uncond: Tensor  # (1, 77, width)
    cond: Tensor  # (1 + N, 77, width)


def denoise(run: Denoising) -> Iterator[Tensor]:
    """The latents (1 + N, 4, h, w) after each step; the caller owns the progress. MasaCtrl algorithm 1."""
    x = run.latents
    for step, timestep in list(enumerate(run.schedule.timesteps(run.steps)))[run.first_step :]:
        last = step == run.steps - 1
        if run.pinned is not None:
            x = torch.cat([run.pinned[run.steps - step][None], x[1:]])
        eps, present, tape, branches = _predict(run, x, step, timestep, _plan_step(run, step, last))
        noise = _step_noise(run, step).to(x.device) if run.eta > 0 else None
        before = x[list(present)]
        x0 = predict_x0(eps, before, run.schedule.alpha(timestep))
        moved = run.schedule.step(eps, before, timestep, run.steps, run.eta, noise)
        if len(moved) < len(x):
            # A source that was not computed stands where its trajectory does, or where it was recorded.
            moved = torch.cat([_source_after(run, step).to(x.device), moved])
            x0 = torch.cat([_source_after(run, run.steps - 1).to(x.device), x0])
        x = moved
        for control in run.controls:
            control.see_prediction(step, x0)
            x = control.after_step(step, x, tape, branches)
        if run.callback is not None:
            x = _call_back(run.callback, step, timestep, x)
        yield x


def _plan_step(run: Denoising, step: int, last: bool) -> list[Batch]:
    """The UNet's calls in a step, leaving out source rows that nobody reads.

    A pinned source, or one that an earlier call has predicted, is computed only for the targets to read it; a
    pinned one also at the last step, which gives its reconstruction. It leaves the batch once the last edited
    layer is done.
    """
    batches = []
    for part, branches in enumerate(_parts(run, step)):
        rows, targets = tuple(range(len(branches))), branches.without_source()
        edits = resolve(run.controls, step, branches, run.sd.unet.sites)
        if run.cache is not None or (part == 0 and (run.pinned is None or (last and run.retraces))):
            batches.append(Batch(branches, edits, None, rows))
        elif not edits:
            batches.append(Batch(branches.keep(targets), {}, None, tuple(range(len(targets)))))
        elif not targets:  # a pinned source is recorded
            batches.append(Batch(branches, edits, None, ()))
        else:
            last_layer = max(run.sd.unet.sites[index].layer for index in edits)
            batches.append(Batch(branches, edits, Retirement(last_layer, targets), targets))
    return batches


def _parts(run: Denoising, step: int) -> tuple[Branches, ...]:
    """The rows of a step in as many parts as there are calls of the UNet."""
    branches = run.contexts[step].branches
    return (branches if run.cache is None else branches.lend_source()).parts(run.targets_at_once)


def _predict(
    run: Denoising, x: Tensor, step: int, timestep: int, batches: Sequence[Batch]
) -> tuple[Tensor, tuple[int, ...], Tape, Branches]:
    """Guided eps (branches present, 4, h, w), the branches present, and all calls' tape with the rows it is of."""
    context, tapes = run.contexts[step], []
    predicted: dict[int, Tensor] = {}
    for batch in batches:
        branches, edits, tape = batch.branches, batch.edits, {}
        if run.cache is not None:  # here, so that one call's tensors are on the device at a time
            rows, device = len(branches), run.sd.device
            edits = {site: run.cache.lend(edit, step, site, rows, device) for site, edit in edits.items()}
        if len(branches):
            eps, tape = run.sd.unet(
                branches.expand(x).to(run.sd.dtype),
                timestep,
                branches.contexts(context.uncond, context.cond),
                edits,
                retire=batch.retire,
                backend=run.backend,
            )
            wanted = branches.keep(batch.wanted)
            eps = (eps if batch.retire is not None else take(eps, batch.wanted)).float()
            if len(wanted):
                guided = wanted.guide(eps, run.guidance_scale, run.source_guidance)
                predicted.update(zip(wanted.present, guided, strict=True))
        tapes.append(tape)
    present = tuple(sorted(predicted))
    eps = torch.stack([predicted[branch] for branch in present]) if present else x[:0]
    return eps, present, *_join_tapes(batches, tapes)


def _join_tapes(batches: Sequence[Batch], tapes: Sequence[Tape]) -> tuple[Tape, Branches]:
    """The tapes of several calls as if of one: each row as the first call that has it wrote it."""
    if len(batches) == 1:
        return tapes[0], batches[0].branches
    first = {row: (n, i) for n, b in reversed(list(enumerate(batches))) for i, row in enumerate(b.branches.known)}
    lent = batches[0].branches.lent
    halves = [[row for row in first if row not in lent and row.halves[0] == half] for half in ("uncond", "cond")]
    rows = tuple(row for half in halves for row in sorted(half, key=lambda row: row.branch))
    places = [first[row] for row in (*rows, *lent)]
    joined = {key: torch.cat([tapes[n][key][i : i + 1] for n, i in places]) for key in tapes[0]}
    return joined, Branches(rows, lent)


def _source_after(run: Denoising, step: int) -> Tensor:
    if run.cache is not None:
        return run.cache.source_after(step)
    assert run.pinned is not None
    return run.pinned[run.steps - step - 1][None]


def _step_noise(run: Denoising, step: int) -> Tensor:
    """The trajectory's noise, or fresh; the same for every branch: N targets together equal N targets alone."""
    return run.draw_noise() if run.noise is None else run.noise[step][None]


def _call_back(callback: Callback, step: int, timestep: int, x: Tensor) -> Tensor:
    changed = callback(step, timestep, x)
    if changed is None:
        return x
    if not isinstance(changed, Tensor) or changed.shape != x.shape:
        got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise MasaError(f"the callback returned {got}; expected None or latents {tuple(x.shape)}")
    return changed.to(x)


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
    targets read it, unless it is cached. backend: of controlled attention,
    "auto", "triton", "sdpa" or "reference". callback(step, timestep, latents) may return other latents.

    Raises MasaError for bad input, before any long work. MasaCtrl (2304.08465), algorithm 1.
    """
    targets, chosen = _as_prompts(target), _as_list(controls)
    if targets_at_once is not None and (not isinstance(targets_at_once, int) or targets_at_once < 1):
        raise MasaError(f"targets_at_once is {targets_at_once!r}; expected a number from 1, or None for all")
    if not targets and chosen == (MasaCtrl(),):
        chosen = ()  # the default, which has nothing to act on
    described = [describe(control) for control in chosen]
    if cache is not None:
        cache.check(sd)
        trajectory = _cached_trajectory(cache, trajectory, generator)
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
    pin_source = True if pin_source is None else pin_source
    guidance_scale = 7.5 if guidance_scale is None else guidance_scale
    check_numbers(sd, guidance_scale, eta, backend, latents)
    steps, schedule, size = _steps_and_size(sd, trajectory, steps, schedule, height, width)
    schedule.timesteps(steps)
    noise = Noise(seed, generator)
    eta = _check_start(latents, trajectory, eta, negative_prompt)
    usual = 0 if trajectory is None else trajectory.skip_steps
    first_step = choose_first_step(skip_steps, steps, usual, from_noise=trajectory is None and latents is None)
    source = source or (trajectory.prompt if trajectory is not None else "")
    shape = (sd.config.unet.in_channels, *(side // sd.config.vae.downsample for side in size))
    info = _run_info(sd, schedule, steps, (source, *targets), (shape[1], shape[2]))
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
        _check_cache(run, cache)
    rows = [context.branches if cache is None else context.branches.lend_source() for context in run.contexts]
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
        "backend": backend,
        "callback": callback is not None,
    }
    if cache is None:
        pictures = sd.decode_latents(x, progress=progress)
    else:
        pictures = [cache.picture, *sd.decode_latents(x[1:], progress=progress)]
    masks = {i: {s: m.cpu() for s, m in c.masks().items()} for i, c in enumerate(active) if c.masks()}
    attention = {i: {n: m.cpu() for n, m in c.attention().items()} for i, c in enumerate(active) if c.attention()}
    queries = {i: c.queries() for i, c in enumerate(active) if c.queries()}
    predictions = {i: _decode_all(sd, c.predictions(), progress) for i, c in enumerate(active) if c.predictions()}
    images = [Picture.of(picture, settings | {"branch": i}) for i, picture in enumerate(pictures)]
    return Result(images, x.cpu(), settings, masks, attention, queries, predictions)


def _decode_all(sd: StableDiffusion, latents: Mapping[int, Tensor], progress: bool) -> dict[int, Tensor]:
    """Latents (1 + N, 4, h, w) by step -> pictures (1 + N, height, width, 3), uint8, by step."""
    together = sd.decode_latents(torch.cat(list(latents.values())), progress=progress)
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
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    eta: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
    targets_at_once: int | None = None,
    backend: Backend = "auto",
    progress: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Edit a real picture: `invert` it with the source prompt, then `sample` the targets from its trajectory.

    guidance_scale is the sampling's, to which null-text is fitted; invert_guidance_scale the inversion's. seed or
    generator: of the inversion's noise, then of the sampling's. Everything else as in `invert` and `sample`.
    MasaCtrl section 4.
    """
    targets = _as_prompts(target)
    if not targets:
        raise MasaError("edit needs at least one target prompt")
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
        height=height,
        width=width,
        seed=seed,
        generator=generator,
        schedule=schedule,
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
        backend=backend,
        progress=progress,
        callback=callback,
    )


def _cached_trajectory(
    cache: SourceCache, trajectory: Trajectory | None, generator: torch.Generator | None
) -> Trajectory | None:
    """The cache's. MasaError where the arguments name another start."""
    if trajectory is not None and (
        cache.trajectory is None or not torch.equal(trajectory.latents, cache.trajectory.latents)
    ):
        raise MasaError("trajectory and cache are of different sources; leave the trajectory out, or record it anew")
    if generator is not None and cache.seeded:
        raise MasaError("generator and cache both give the noise; leave the generator out, or record anew")
    return cache.trajectory


def _check_cache(run: Denoising, cache: SourceCache) -> None:
    """MasaError where a run needs of its source what the cache has not."""
    if len(run.latents) == 1:
        raise MasaError("cache serves targets, and there are none; give one, or run without cache=")
    if run.first_step != cache.first_step and not (cache.pinned and run.first_step > cache.first_step):
        raise MasaError(
            f"the run starts at step {run.first_step}, and the cache was recorded from step {cache.first_step} on; "
            "record with skip_steps to match"
        )
    for control in run.controls:
        if control.watches_source:
            raise MasaError(f"{control.name} keeps what only a computed source has; run without cache=")
    for step in range(run.first_step, run.steps):
        for control in run.controls:
            cache.check_edits(control, step, _parts(run, step)[0], run.sd.unet.sites)


def _as_prompts(target: str | Sequence[str]) -> tuple[str, ...]:
    prompts = (target,) if isinstance(target, str) else tuple(target or ())
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise MasaError(f"a target is {prompt!r}; expected a prompt, or a list of prompts")
    return prompts


def _as_list(controls: Control | Sequence[Control]) -> tuple[Control, ...]:
    chosen = tuple(controls) if isinstance(controls, Sequence) else (controls,)
    for control in chosen:
        if isinstance(control, type) or not hasattr(control, "begin"):
            raise MasaError(f"controls hold {control!r}; expected controls such as masa.MasaCtrl(), or [] for none")
    return chosen


def check_numbers(
    sd: StableDiffusion, guidance_scale: float, eta: float, backend: str, latents: Tensor | None = None
) -> None:
    """MasaError for values that no run can use."""
    check_guidance(guidance_scale)
    if not isinstance(eta, int | float) or not 0.0 <= eta <= 1.0:
        raise MasaError(f"eta is {eta!r}; expected a number from 0 (deterministic) to 1")
    if latents is not None and (not isinstance(latents, Tensor) or not bool(torch.isfinite(latents).all())):
        raise MasaError("latents hold NaN or infinite values, or are no tensor; expected a float tensor of noise")
    check_backend(backend, sd.device)


def picture_size(
    sd: StableDiffusion, image: ImageLike | None, height: int | None, width: int | None
) -> tuple[int, int]:
    """(height, width) that a run has: of a picture as `invert` fits it, without one as asked or trained."""
    if image is None:
        check_size(height, width)
        return height or sd.config.image_size, width or sd.config.image_size
    fitted = load_image(image, short_side=sd.config.image_size, height=height, width=width)
    return fitted.shape[2], fitted.shape[3]


def check_controls(
    sd: StableDiffusion,
    controls: Control | Sequence[Control],
    steps: int,
    prompts: tuple[str, ...],
    *,
    size: tuple[int, int],
    first_step: int = 0,
    real: bool = True,
) -> None:
    """Let controls refuse a run, and each other, before an inversion's minutes are spent.

    size (height, width): of the pictures. real: whether the source is a real picture.
    """
    sd.schedule.timesteps(steps)
    grid = (size[0] // sd.config.vae.downsample, size[1] // sd.config.vae.downsample)
    info = replace(_run_info(sd, sd.schedule, steps, prompts, grid), first_step=first_step)
    if real:
        latents = torch.zeros(1, sd.config.unet.in_channels, *grid, device=sd.device)
        info = replace(info, source_latents=latents, draw_noise=lambda: latents)
    active = begin_all(_as_list(controls), info)
    # Which prompts share a row does not matter to what controls set.
    check_together(active, first_step, [Branches.build(len(prompts) - 1, guided=True)] * steps, sd.unet.sites)


def _run_info(sd: StableDiffusion, schedule: Schedule, steps: int, prompts: tuple[str, ...], grid: Grid) -> Run:
    """What controls may know of a run, but for where it starts."""
    return Run(
        steps=steps,
        sites=sd.unet.sites,
        prompts=prompts,
        grid=grid,
        device=sd.device,
        token_positions=sd.tokenizer.token_positions,
        encode=sd.tokenizer.encode,
        tokens=sd.config.text.tokens,
        alphas=(*(schedule.alpha(timestep) for timestep in schedule.timesteps(steps)), 1.0),
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


def _steps_and_size(
    sd: StableDiffusion,
    trajectory: Trajectory | None,
    steps: int | None,
    schedule: Schedule | None,
    height: int | None,
    width: int | None,
) -> tuple[int, Schedule, tuple[int, int]]:
    """Steps, schedule and picture size: the arguments', or the trajectory's where there is one."""
    check_size(height, width)
    if trajectory is None:
        side = sd.config.image_size
        return 50 if steps is None else steps, schedule or sd.schedule, (height or side, width or side)
    scale = sd.config.vae.downsample
    size = (trajectory.latents.shape[2] * scale, trajectory.latents.shape[3] * scale)
    found: dict[str, tuple[object, object]] = {
        "steps": (steps, trajectory.steps),
        "height": (height, size[0]),
        "width": (width, size[1]),
        "schedule": (schedule, trajectory.schedule),
    }
    for name, (asked, given) in found.items():
        if asked is not None and asked != given:
            raise MasaError(
                f"{name} is {asked}, but the trajectory was made with {given}; leave it out, or invert anew"
            )
    if trajectory.latents.shape[1] != sd.config.unet.in_channels:
        raise MasaError(
            f"the trajectory has {trajectory.latents.shape[1]} latent channels, the model {sd.config.unet.in_channels}"
        )
    return trajectory.steps, trajectory.schedule, size


def _check_start(latents: Tensor | None, trajectory: Trajectory | None, eta: float, negative_prompt: str) -> float:
    """The run's eta. MasaError where arguments contradict each other or the trajectory."""
    if trajectory is None:
        return eta
    if latents is not None:
        raise MasaError("latents and trajectory both give the start; leave one out")
    check_inversion(trajectory.method, negative_prompt, eta)
    return eta if trajectory.noise is None else trajectory.eta


def check_inversion(method: str, negative_prompt: str, eta: float) -> None:
    """MasaError where a negative prompt or eta meets an inversion that brings its own."""
    if method in ("negative-prompt", "null-text") and negative_prompt:
        raise MasaError(
            f"{method} inversion brings its own unconditional embeddings, which leaves no place for "
            f"negative_prompt={negative_prompt!r}; leave it out, or invert with method='ddim'"
        )
    if method == "edit-friendly" and eta not in (0.0, EDIT_FRIENDLY_ETA):
        raise MasaError(
            f"eta is {eta}, but the trajectory's noise was made for {EDIT_FRIENDLY_ETA}; leave it out, or invert anew"
        )


def choose_first_step(skip_steps: int | None, steps: int, usual: int, *, from_noise: bool) -> int:
    """How many of the noisiest steps are left out: as asked, else as is usual; from_noise: none may be."""
    if skip_steps is None:
        return usual
    if not 0 <= skip_steps <= steps:
        raise MasaError(f"skip_steps is {skip_steps}; expected a number from 0 to {steps}, the run's steps")
    if skip_steps and from_noise:
        raise MasaError("skip_steps starts from half noisy latents; give a trajectory (masa.invert) or latents")
    return skip_steps


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
