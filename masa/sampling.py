"""The denoising loop: one source and N targets together, with controls."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from masa import __version__
from masa.attention import Backend, Edit
from masa.branches import Branches
from masa.controls.base import ActiveControl, Control, Run, resolve
from masa.controls.masactrl import MasaCtrl
from masa.errors import MasaError
from masa.image import ImageLike, check_size
from masa.inversion import Trajectory, invert
from masa.models.unet import Retirement
from masa.pipeline import StableDiffusion
from masa.result import Picture, Result
from masa.schedule import Schedule
from masa.settings import describe, pack

Callback = Callable[[int, int, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Denoising:
    """One run, ready to go: everything `denoise` needs, checked."""

    sd: StableDiffusion
    schedule: Schedule
    steps: int
    latents: Tensor  # (1 + N, 4, h, w): the start
    uncond: Tensor  # (1, 77, width)
    cond: Tensor  # (1 + N, 77, width)
    guidance_scale: float
    branches: Branches
    controls: tuple[ActiveControl, ...] = ()
    pinned: Tensor | None = None  # a trajectory's latents, which the source's are replaced by
    eta: float = 0.0
    generator: torch.Generator | None = None
    backend: Backend = "auto"
    callback: Callback | None = None


def denoise(run: Denoising) -> Iterator[Tensor]:
    """The latents (1 + N, 4, h, w) after each step; the caller owns the progress. MasaCtrl algorithm 1."""
    sd, x = run.sd, run.latents
    for step, timestep in enumerate(run.schedule.timesteps(run.steps)):
        last = step == run.steps - 1
        if run.pinned is not None:
            x = torch.cat([run.pinned[run.steps - step][None], x[1:]])
        branches, edits, retire = _plan_step(run, step, last)
        eps, tape = sd.unet(
            branches.expand(x).to(sd.dtype),
            timestep,
            branches.contexts(run.uncond, run.cond),
            edits,
            retire=retire,
            backend=run.backend,
        )
        predicted = branches if retire is None else Branches(tuple(branches.rows[i] for i in retire.keep))
        eps = predicted.guide(eps.float(), run.guidance_scale)
        noise = _step_noise(run, x) if run.eta > 0 else None
        moved = run.schedule.step(eps, x[list(predicted.present)], timestep, run.steps, run.eta, noise)
        # A pinned source that was not computed stands where its trajectory does.
        x = moved if len(moved) == len(x) else torch.cat([_pinned_after(run, step), moved])
        for control in run.controls:
            x = control.after_step(step, x, tape, branches)
        if run.callback is not None:
            x = _call_back(run.callback, step, timestep, x)
        yield x


def _plan_step(run: Denoising, step: int, last: bool) -> tuple[Branches, dict[int, Edit], Retirement | None]:
    """The rows and edits of a step, leaving out source rows that nobody reads.

    A pinned source is computed only for the targets to read it, or at the last step, which gives its
    reconstruction; it leaves the batch once the last edited layer is done.
    """
    edits = resolve(run.controls, step, run.branches, run.sd.unet.sites)
    if run.pinned is None or last:
        return run.branches, edits, None
    targets = run.branches.without_source()
    if not edits:
        return Branches(tuple(run.branches.rows[i] for i in targets)), {}, None
    last_layer = max(run.sd.unet.sites[index].layer for index in edits)
    return run.branches, edits, Retirement(last_layer, targets)


def _pinned_after(run: Denoising, step: int) -> Tensor:
    assert run.pinned is not None
    return run.pinned[run.steps - step - 1][None]


def _step_noise(run: Denoising, x: Tensor) -> Tensor:
    """Fresh noise for eta > 0, the same for every branch: N targets together equal N targets alone."""
    return _draw((1, *x.shape[1:]), run.generator).to(x.device)


def _draw(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


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
    pin_source: bool = True,
    steps: int | None = None,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    latents: Tensor | None = None,
    eta: float = 0.0,
    schedule: Schedule | None = None,
    backend: Backend = "auto",
    progress: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Synthesise a source picture and, from the same noise and under control, its targets.

    source, target: prompts; several targets share one pass; none is plain text-to-image of the source.
    controls: one or a list; [] is the fixed-seed baseline. They act on targets only.
    trajectory: an inverted picture as the source; its size, steps and schedule hold, and its prompt where
    `source` is empty. pin_source: put the source's latents back on the trajectory before each step
    (2310.01506), else it drifts. steps: default 50. guidance_scale: 1 or less switches guidance off.
    height, width: multiples of 64, default the model's training size. Starting noise: `latents` (1, 4, h, w)
    shared or (1 + N, 4, h, w), else drawn from `generator`, else from `seed` on the CPU, the same on every
    device. eta: DDIM's, 0 is deterministic. schedule: default the model's. backend: of controlled attention,
    "auto", "triton", "sdpa" or "reference". callback(step, timestep, latents) may return other latents.

    Raises MasaError for bad input, before any long work. MasaCtrl (2304.08465), algorithm 1.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    chosen = _as_list(controls)
    needs_noise = eta > 0 or (latents is None and trajectory is None)
    if needs_noise and seed is None and generator is None:
        seed = secrets.randbelow(2**32)  # written into the settings: any run can be repeated
    steps, schedule, size = _steps_and_size(sd, trajectory, steps, schedule, height, width)
    schedule.timesteps(steps)
    _check_noise(seed, generator, latents, trajectory, eta)
    source = source or (trajectory.prompt if trajectory is not None else "")
    settings = {
        "function": "sample",
        "version": __version__,
        "checkpoint": sd.checkpoint,
        "device": str(sd.device),
        "dtype": str(sd.dtype).removeprefix("torch."),
        "source": source,
        "target": list(targets),
        "controls": [describe(control) for control in chosen] if targets else [],
        "trajectory": None if trajectory is None else dict(trajectory.settings),
        "pin_source": pin_source,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "height": size[0],
        "width": size[1],
        "seed": seed,
        "generator_state": None if generator is None else pack(generator.get_state()),
        "latents": None if latents is None else pack(latents),
        "eta": eta,
        "schedule_offset": schedule.offset,
        "backend": backend,
    }

    prompts = (source, *targets)
    shape = (sd.config.unet.in_channels, *(side // sd.config.vae.downsample for side in size))
    run_info = Run(
        steps=steps,
        sites=sd.unet.sites,
        prompts=prompts,
        grid=(shape[1], shape[2]),
        device=sd.device,
        token_positions=sd.tokenizer.token_positions,
        tokens=sd.config.text.tokens,
    )
    active = tuple(control.begin(run_info) for control in chosen) if targets else ()
    if generator is None and seed is not None:
        generator = torch.Generator().manual_seed(seed)
    pinned = trajectory is not None and pin_source and bool(targets)
    guided = guidance_scale > 1.0
    run = Denoising(
        sd=sd,
        schedule=schedule,
        steps=steps,
        latents=_start(len(prompts), shape, latents, trajectory, generator).to(sd.device),
        uncond=sd.encode_prompt([negative_prompt]),
        cond=sd.encode_prompt(prompts),
        guidance_scale=guidance_scale,
        branches=Branches.build(len(targets), guided=guided, merge_source=source == negative_prompt),
        controls=active,
        pinned=trajectory.latents.to(sd.device) if trajectory is not None and pinned else None,
        eta=eta,
        generator=generator,
        backend=backend,
        callback=callback,
    )
    x = run.latents
    for x in tqdm(denoise(run), desc="sample", total=steps, disable=not progress):  # noqa: B007
        pass
    pictures = sd.decode_latents(x, progress=progress)
    masks = {i: {s: m.cpu() for s, m in c.masks().items()} for i, c in enumerate(active) if c.masks()}
    images = [Picture.of(picture, settings | {"branch": i}) for i, picture in enumerate(pictures)]
    return Result(images, x.cpu(), settings, masks)


def edit(
    sd: StableDiffusion,
    image: ImageLike,
    target: str | Sequence[str],
    source: str = "",
    *,
    controls: Control | Sequence[Control] = MasaCtrl(),
    pin_source: bool = True,
    steps: int = 50,
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
    backend: Backend = "auto",
    progress: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Edit a real picture: `invert` it with the source prompt, then `sample` the targets from its trajectory.

    guidance_scale is the sampling's, invert_guidance_scale the inversion's; seed and generator matter only
    with eta > 0. Everything else as in `invert` and `sample`. MasaCtrl section 4.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    if not targets:
        raise MasaError("edit needs at least one target prompt")
    _check_controls(sd, _as_list(controls), steps, (source, *targets))
    trajectory = invert(
        sd,
        image,
        source,
        steps=steps,
        guidance_scale=invert_guidance_scale,
        method=method,
        height=height,
        width=width,
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
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        eta=eta,
        seed=seed,
        generator=generator,
        backend=backend,
        progress=progress,
        callback=callback,
    )


def _as_list(controls: Control | Sequence[Control]) -> tuple[Control, ...]:
    return tuple(controls) if isinstance(controls, Sequence) else (controls,)


def _check_controls(sd: StableDiffusion, controls: Sequence[Control], steps: int, prompts: tuple[str, ...]) -> None:
    """Let every control refuse the run before the inversion's minutes are spent."""
    side = sd.config.image_size // sd.config.vae.downsample
    run = Run(
        steps=steps,
        sites=sd.unet.sites,
        prompts=prompts,
        grid=(side, side),
        device=sd.device,
        token_positions=sd.tokenizer.token_positions,
        tokens=sd.config.text.tokens,
    )
    for control in controls:
        control.begin(run)


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
    found = {
        "steps": (steps, trajectory.steps),
        "height": (height, trajectory.latents.shape[2] * scale),
        "width": (width, trajectory.latents.shape[3] * scale),
        "schedule offset": (None if schedule is None else schedule.offset, trajectory.offset),
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
    schedule = schedule or Schedule(sd.schedule.config, trajectory.offset)
    return trajectory.steps, schedule, (found["height"][1], found["width"][1])


def _check_noise(
    seed: int | None,
    generator: torch.Generator | None,
    latents: Tensor | None,
    trajectory: Trajectory | None,
    eta: float,
) -> None:
    if eta < 0:
        raise MasaError(f"eta is {eta}; expected 0 (deterministic) or more, 1 at most in the DDIM paper")
    if trajectory is not None and latents is not None:
        raise MasaError("latents and trajectory both give the start; leave one out")
    if seed is not None and generator is not None:
        raise MasaError("seed and generator both give the noise; leave one out")


def _start(
    branches: int,
    shape: tuple[int, ...],
    latents: Tensor | None,
    trajectory: Trajectory | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The first latents (branches, 4, h, w): one noise for all, unless given one each."""
    if trajectory is not None:
        return trajectory.latents[-1:].expand(branches, -1, -1, -1)
    if latents is None:
        return _draw((1, *shape), generator).expand(branches, -1, -1, -1)
    if latents.shape[1:] != shape or len(latents) not in (1, branches):
        raise MasaError(
            f"latents are {tuple(latents.shape)}; expected (1, {', '.join(map(str, shape))}), or {branches} of them"
        )
    return latents.float().expand(branches, -1, -1, -1)
