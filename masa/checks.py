"""What a run refuses before long work, and what it takes where an argument is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from masa.attention import check_backend
from masa.branches import Branches
from masa.cache.recorder import Recorder
from masa.cache.source_cache import SourceCache
from masa.controls.base import ActiveControl, Control, Run, begin_all, check_together
from masa.controls.steering import check_halves, steering_controls
from masa.edits import Grid
from masa.errors import MasaError
from masa.guidance import ClassifierFree, Guidance, check_guidance, check_guidance_scale
from masa.io.pictures import ImageLike, check_size, load_image
from masa.pipeline import StableDiffusion
from masa.samplers.base import Levels, Sampler
from masa.samplers.ddim import DDIM
from masa.schedule import Schedule
from masa.settings import RunSettings
from masa.trajectory import EDIT_FRIENDLY_ETA, Trajectory


def check_model(sd: object) -> None:
    """MasaError unless it is a model."""
    if not isinstance(sd, StableDiffusion):
        raise MasaError(f"the model is {sd!r}; expected what masa.load() gives, as the first argument")


def check_schedule(schedule: object) -> None:
    """MasaError unless it is a schedule, or None."""
    if schedule is not None and not isinstance(schedule, Schedule):
        raise MasaError(
            f"schedule is {schedule!r}; expected a value such as masa.Schedule(), the noise levels of training (how "
            "they are walked is the sampler's: sampler='dpm++2m')"
        )


def as_prompts(target: str | Sequence[str]) -> tuple[str, ...]:
    """One prompt or several, as several."""
    if target is not None and not isinstance(target, Sequence):
        raise MasaError(f"the target is {target!r}; expected a prompt, or a list of prompts")
    prompts = (target,) if isinstance(target, str) else tuple(target or ())
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise MasaError(f"a target is {prompt!r}; expected a prompt, or a list of prompts")
    return prompts


def as_controls(controls: Control | Sequence[Control]) -> tuple[Control, ...]:
    """One control or several, as several."""
    chosen = tuple(controls) if isinstance(controls, Sequence) else (controls,)
    for control in chosen:
        if isinstance(control, type) or not hasattr(control, "begin"):
            raise MasaError(f"controls hold {control!r}; expected controls such as masa.MasaCtrl(), or [] for none")
    return chosen


def check_numbers(
    sd: StableDiffusion, guidance_scale: float, eta: float, backend: str, latents: Tensor | None = None
) -> None:
    """MasaError for values that no run can use."""
    check_guidance_scale(guidance_scale)
    if not isinstance(eta, int | float) or not 0.0 <= eta <= 1.0:
        raise MasaError(f"eta is {eta!r}; expected a number from 0 (deterministic) to 1")
    if latents is not None and (not isinstance(latents, Tensor) or not bool(torch.isfinite(latents).all())):
        raise MasaError("latents hold NaN or infinite values, or are no tensor; expected a float tensor of noise")
    check_backend(backend, sd.device)


def check_settings(sd: StableDiffusion, asked: RunSettings) -> None:
    """MasaError for values that no run can use, whatever it starts from."""
    check_targets_at_once(asked.targets_at_once)
    check_schedule(asked.schedule)
    check_tiled(asked.tiled)
    for prompt in (asked.source, *asked.target, asked.negative_prompt):
        sd.tokenizer.check_words(prompt)
    scale = 7.5 if asked.guidance_scale is None else asked.guidance_scale
    check_numbers(sd, scale, asked.eta, asked.backend, asked.latents)
    if asked.guidance is not None:
        check_guidance(asked.guidance)


def check_targets_at_once(targets_at_once: int | None) -> None:
    """MasaError unless it is a number of targets, or None."""
    if targets_at_once is not None and (
        not isinstance(targets_at_once, int | np.integer) or isinstance(targets_at_once, bool) or targets_at_once < 1
    ):
        raise MasaError(f"targets_at_once is {targets_at_once!r}; expected a number from 1, or None for all")


def check_tiled(tiled: bool | None) -> None:
    """MasaError unless it is a truth value, or None."""
    if tiled not in (None, True, False):
        raise MasaError(f"tiled is {tiled!r}; expected True, False, or None for pictures over 768 pixels")


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
    levels: Levels,
    prompts: tuple[str, ...],
    *,
    size: tuple[int, int],
    first_step: int = 0,
    method: str | None,
) -> tuple[Control, ...]:
    """Let controls refuse a run, and each other, before an inversion's minutes are spent: those that take part in it.

    size (height, width): of the pictures. method: of the source's inversion, None where it is not a real picture.
    """
    active = bind_controls(sd, controls, levels, prompts, size=size, first_step=first_step, real=method is not None)
    check_halves(method, active)
    return () if method == "noise" else steering_controls(as_controls(controls), active)


def bind_controls(
    sd: StableDiffusion,
    controls: Control | Sequence[Control],
    levels: Levels,
    prompts: tuple[str, ...],
    *,
    size: tuple[int, int],
    first_step: int,
    real: bool,
) -> tuple[ActiveControl, ...]:
    """Controls bound to a run that is still to come. MasaError where one refuses it, or another.

    real: whether the source is a real picture.
    """
    grid = (size[0] // sd.config.vae.downsample, size[1] // sd.config.vae.downsample)
    info = replace(describe_run(sd, levels, prompts, grid), first_step=first_step)
    if real:
        latents = torch.zeros(1, sd.config.unet.in_channels, *grid, device=sd.device)
        info = replace(info, source_latents=latents, draw_noise=lambda: latents)
    active = begin_all(as_controls(controls), info)
    # Which prompts share a row does not matter to what controls set.
    rows = [Branches.build(len(prompts) - 1, guided=True)] * levels.steps
    check_together(active, first_step, rows, sd.unet.sites)
    return active


def describe_run(sd: StableDiffusion, levels: Levels, prompts: tuple[str, ...], grid: Grid) -> Run:
    """What controls may know of a run, but for where it starts."""
    return Run(
        steps=levels.steps,
        sites=sd.unet.sites,
        prompts=prompts,
        grid=grid,
        device=sd.device,
        dtype=sd.dtype,
        unet=sd.config.unet,
        base_weights=sd.without_lora().unet.state_dict() if sd.offloaded is None else None,
        preview=sd.config.preview,
        token_positions=sd.tokenizer.token_positions,
        encode=sd.tokenizer.encode,
        tokens=sd.config.text.tokens,
        alphas=(*levels.alphas[:-1], 1.0),
    )


def choose_levels(
    sampler: Sampler, schedule: Schedule, steps: int, *, method: str | None, eta: float, free: bool
) -> Levels:
    """The noise levels of a run. MasaError where its sampler cannot serve it.

    method: the inversion of the trajectory that it starts from, or None. free: its source runs by itself.
    """
    name = type(sampler).__name__
    if method == "edit-friendly" and not sampler.takes_eta:
        raise MasaError(f"edit-friendly noise was made for DDIM's steps, and the sampler is {name}; use sampler='ddim'")
    if eta and not sampler.takes_eta:
        raise MasaError(
            f"eta is {eta}, which is DDIM's, and the sampler is {name}; leave it out, or use sampler='ddim'"
        )
    if method not in (None, "noise") and free and not sampler.retraces:
        raise MasaError(
            f"{name} adds noise, with which a source that runs by itself does not retrace its inversion; pin it "
            "(pin_source=True, with targets), or use a sampler without noise such as 'dpm++2m' or 'ddim'"
        )
    return sampler.levels(schedule, steps, None if method is None else Levels.of_schedule(schedule, steps))


# Settings that a run shares with the recording of its source.
AGREED = ("pin_source", "steps", "guidance_scale", "guidance", "height", "width", "schedule", "sampler", "tiled")
EMPTY_ASKS_NOTHING = ("source", "negative_prompt", "eta")


def agree(asked: RunSettings, cache: SourceCache) -> RunSettings:
    """The settings with those that the cache was recorded with. MasaError where others are asked."""
    agreed = {name: cache.agree(name, getattr(asked, name)) for name in AGREED}
    agreed |= {name: cache.agree(name, getattr(asked, name) or None) for name in EMPTY_ASKS_NOTHING}
    if asked.skip_steps is None or not cache.pinned or asked.skip_steps < cache.first_step:
        agreed["skip_steps"] = cache.agree("skip_steps", asked.skip_steps)
    if cache.seeded:
        agreed["seed"] = cache.agree("seed", asked.seed)
    return replace(asked, **agreed, latents=cache.start(asked.latents))


def grid_of(sd: StableDiffusion, settings: RunSettings) -> Grid:
    """(height, width) of a run's latents."""
    assert settings.height is not None
    assert settings.width is not None
    return settings.height // sd.config.vae.downsample, settings.width // sd.config.vae.downsample


def settle(sd: StableDiffusion, asked: RunSettings, trajectory: Trajectory | None) -> tuple[RunSettings, Levels]:
    """The settings with nothing left out, and the run's noise levels. MasaError for what contradicts another."""
    check_settings(sd, asked)
    steps, schedule, size = steps_and_size(sd, trajectory, asked.steps, asked.schedule, asked.height, asked.width)
    schedule.timesteps(steps)  # refuses a number of steps that is none
    usual = 0 if trajectory is None else trajectory.skip_steps
    # A source alone denoises freely, unless it is recorded for targets to come.
    read = bool(asked.target) or any(isinstance(control, Recorder) for control in asked.controls)
    pinned = asked.pin_source in (None, True) and read
    sampler = asked.sampler or DDIM()
    method = None if trajectory is None else trajectory.method
    levels = choose_levels(sampler, schedule, steps, method=method, eta=asked.eta, free=not pinned)
    if sd.embeds_guidance:
        check_embedded(asked.negative_prompt, asked.guidance, method)
    from_noise = trajectory is None and asked.latents is None
    settled = replace(
        asked,
        source=asked.source or (trajectory.prompt if trajectory is not None else ""),
        pin_source=pinned,
        steps=steps,
        skip_steps=choose_first_step(asked.skip_steps, steps, usual, from_noise=from_noise),
        guidance_scale=7.5 if asked.guidance_scale is None else asked.guidance_scale,
        guidance=asked.guidance or ClassifierFree(),
        height=size[0],
        width=size[1],
        eta=check_start(asked.latents, trajectory, asked.eta, asked.negative_prompt),
        schedule=schedule,
        sampler=sampler,
    )
    return settled, levels


def check_embedded(negative_prompt: str, guidance: Guidance | None, method: str | None) -> None:
    """MasaError for what needs two halves, of a model that is told its guidance and has one. method: an inversion's."""
    what = f"negative_prompt={negative_prompt!r}" if negative_prompt else None
    if guidance not in (None, ClassifierFree()):
        what = f"guidance={guidance!r}"
    if method in ("negative-prompt", "null-text", "edit-friendly"):
        what = f"{method} inversion"
    if what is not None:
        raise MasaError(
            f"{what} needs an unconditional prediction, and this model, a latent consistency model that is told its "
            "guidance, makes none; leave it out, or take a plain model with an LCM-LoRA"
        )


def steps_and_size(
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


def check_start(latents: Tensor | None, trajectory: Trajectory | None, eta: float, negative_prompt: str) -> float:
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
