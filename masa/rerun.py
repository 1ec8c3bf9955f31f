"""Repeating a run from the settings inside a picture that it saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from masa.errors import MasaError
from masa.image import file_digest
from masa.inversion import invert
from masa.pipeline import StableDiffusion, load
from masa.result import Result, read_settings
from masa.sampling import sample
from masa.schedule import Schedule
from masa.settings import restore, unpack
from masa.trajectory import Trajectory


def rerun(picture: str | Path, sd: StableDiffusion | None = None, *, progress: bool = True) -> Result:
    """Run again what made a PNG saved by masa: the same pictures, on the same device and library version.

    sd: the model, by default loaded from the checkpoint, device and dtype that the settings name. A real picture
    that was edited is read again from its path. MasaError where something the settings name is gone or changed.
    """
    settings = read_settings(picture)
    if settings["function"] != "sample":
        raise MasaError(
            f"{picture} is a sheet of many runs; repeat it with masa {settings['function']} and the settings inside it"
        )
    trajectory_settings = settings["trajectory"]
    if trajectory_settings is not None:
        check_image(trajectory_settings)
    if sd is None:
        name = settings["checkpoint"]
        sd = load(None if name == "demo" else name, device=settings["device"], dtype=settings["dtype"])
    trajectory = None
    if trajectory_settings is not None:
        trajectory = restore_trajectory(sd, trajectory_settings, progress)

    return sample(
        sd,
        settings["source"],
        settings["target"],
        controls=[restore(control) for control in settings["controls"]],
        trajectory=trajectory,
        pin_source=settings["pin_source"],
        steps=settings["steps"],
        skip_steps=settings.get("skip_steps"),  # pictures of version 0.1 have none: nothing was skipped
        guidance_scale=settings["guidance_scale"],
        negative_prompt=settings["negative_prompt"],
        height=settings["height"],
        width=settings["width"],
        seed=None if settings["generator_state"] is not None else settings["seed"],
        generator=restore_generator(settings["generator_state"]),
        latents=None if settings["latents"] is None else unpack(settings["latents"]),
        eta=settings["eta"],
        schedule=Schedule(sd.schedule.config, settings["schedule_offset"]),
        backend=settings["backend"],
        progress=progress,
    )


def restore_generator(state: Mapping[str, str] | None) -> torch.Generator | None:
    """The generator as it was when the run began, or None where there was none."""
    if state is None:
        return None
    generator = torch.Generator()
    generator.set_state(unpack(state))
    return generator


def check_image(settings: Mapping[str, Any]) -> None:
    """MasaError unless the picture that a trajectory was made from is where it was, and the same."""
    if settings.get("trajectory") is not None:
        return
    path = settings["image"]
    if path is None:
        raise MasaError("the edited picture was given as pixels, not as a file: its run cannot be repeated from a PNG")
    if not Path(path).is_file():
        raise MasaError(f"the edited picture {path} is not there any more; put it back, or run masa edit anew")
    if file_digest(path) != settings["image_sha256"]:
        raise MasaError(f"{path} has changed since it was edited; restore it, or run masa edit anew")


def restore_trajectory(sd: StableDiffusion, settings: Mapping[str, Any], progress: bool) -> Trajectory:
    """A trajectory from its file where it came from one, else by inverting its picture again."""
    if settings.get("trajectory") is not None:
        return Trajectory.load(settings["trajectory"])
    fitted = settings.get("edit_guidance_scale")
    return invert(
        sd,
        settings["image"],
        settings["prompt"],
        steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        method=settings["method"],
        edit_guidance_scale=7.5 if fitted is None else fitted,
        seed=settings.get("seed"),
        generator=restore_generator(settings.get("generator_state")),
        height=settings["height"],
        width=settings["width"],
        schedule=Schedule(sd.schedule.config, settings["schedule_offset"]),
        progress=progress,
    )
