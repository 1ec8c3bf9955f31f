"""Repeating a run from the settings inside a picture that it saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from masa import __version__
from masa.controls.base import Control, FileControl
from masa.errors import MasaError
from masa.inversion import invert
from masa.io.files import file_digest, find_near
from masa.null_text import INNER_STEPS
from masa.output.frames import Frames, read_run
from masa.output.result import Result
from masa.pipeline import StableDiffusion, choose_device, load
from masa.runtime.embeddings import Embedding
from masa.runtime.lora import Lora
from masa.sampling import Given, run
from masa.settings import RunSettings, restore, restore_schedule, unpack
from masa.trajectory import Trajectory
from masa.weights.lora import lora_digest
from masa.workflows.frames import Video, run_frames


def rerun(
    picture: str | Path,
    sd: StableDiffusion | None = None,
    *,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: bool = True,
) -> Result | Frames:
    """Run again what made a file saved by masa: the same pictures, on the same device and library version.

    picture: a PNG, or of a video also the animation, film or folder that it was saved as (then Frames come back).

    sd: the model, by default loaded as the settings say; checkpoint, device, dtype, vae and tokenizer, as `load`
    takes them, replace what these name. Weights that are not named here must be those that made the picture. A
    real picture that was edited is read again from its path. Paths in the settings may be relative to the PNG's
    folder. MasaError where something that they name is gone or changed.
    """
    others = {"checkpoint": checkpoint, "device": device, "dtype": dtype, "vae": vae, "tokenizer": tokenizer}
    given = [name for name, value in others.items() if value is not None]
    if sd is not None and given:
        raise MasaError(f"sd and {' and '.join(given)} both say which model to run; leave one out")
    settings, picture = read_run(picture)
    if settings["function"] not in ("sample", "frames"):
        raise MasaError(
            f"{picture} is a sheet of many runs; repeat it with masa {settings['function']} and the settings inside it"
        )
    if settings["version"] != __version__:
        warnings.warn(f"{picture} was made by masa {settings['version']}, this is {__version__}", stacklevel=2)
    if settings["callback"]:
        warnings.warn(f"a callback took part in making {picture}; it is not repeated", stacklevel=2)
    asked = RunSettings.restored(settings)
    asked = replace(asked, controls=tuple(find_weights(control, picture) for control in asked.controls))
    video = Video.restored(settings) if settings["function"] == "frames" else None
    if video is not None:
        video = replace(video, adapters=tuple(find_weights(adapter, picture) for adapter in video.adapters))
    if sd is None:
        find_loras(settings, picture)  # before the model's minutes
        find_embeddings(settings, picture)
    made_from = settings["trajectory"]
    source = None if made_from is None else find_source(made_from, picture)
    if sd is None:
        changed = {name: str(others[name]).removeprefix("torch.") for name in given}
        sd = load_again(settings | changed, picture, progress)
        if checkpoint is None and vae is None:
            check_weights(sd, settings, picture)
    trajectory = None
    if made_from is not None and source is not None:
        inverter = sd if made_from.get("trajectory") is not None else as_inverted(sd, made_from, settings, picture)
        kept = made_from.get("controls", ()) if made_from.get("trajectory") is None else ()  # older pictures name none
        steering = tuple(find_weights(restore(control), picture) for control in kept)
        trajectory = restore_trajectory(inverter, made_from, source, progress, steering)

    generator = restore_generator(asked.generator_state)
    if generator is not None:
        asked = replace(asked, seed=None)
    if video is not None:
        return run_frames(sd, asked, video, trajectory, progress=progress)
    return run(sd, asked, Given(trajectory, generator=generator, progress=progress))


def as_inverted(
    sd: StableDiffusion, made_from: Mapping[str, Any], settings: Mapping[str, Any], picture: str | Path
) -> StableDiffusion:
    """The model with the LoRAs and embeddings of an inversion, which may be others than its edit's.

    MasaError where it had another text encoder's depth, which takes another model.
    """
    now, then = (told.get("clip_skip", 0) for told in (settings, made_from))
    if "clip_skip" in made_from and now != then:
        raise MasaError(
            f"{picture} was inverted with clip_skip={then} and edited with clip_skip={now}; invert again, save the "
            "trajectory, and sample from it"
        )
    if made_from.get("embeddings", []) != settings.get("embeddings", []):
        sd = sd.without_embeddings().with_embeddings(find_embeddings(made_from, picture))
    if made_from.get("lora", []) != settings.get("lora", []):
        sd = sd.without_lora().with_loras(find_loras(made_from, picture))
    return sd


def restore_generator(state: Mapping[str, str] | None) -> torch.Generator | None:
    """The generator as it was when the run began, or None where there was none."""
    if state is None:
        return None
    generator = torch.Generator()
    generator.set_state(unpack(state))
    return generator


def check_weights(sd: StableDiffusion, settings: Mapping[str, Any], picture: str | Path) -> None:
    """MasaError unless a model, in whatever dtype, has the weights that made a picture."""
    if str(sd.dtype) != f"torch.{settings['dtype']}":  # fingerprints are of weights as loaded
        plain = {**settings, "device": "cpu", "compiled": None, "offload": False}
        sd = load_again(plain, picture, progress=False)
    if sd.fingerprint != settings["fingerprint"]:
        raise MasaError(
            f"{settings['checkpoint']} holds other weights than those that made {picture}; put the old file back, or "
            "pass the model as sd= (-c on the command line)"
        )


def load_again(settings: Mapping[str, Any], picture: str | Path, progress: bool) -> StableDiffusion:
    """The model as the settings have it, offloaded, compiled; paths may be relative to where the picture lies."""

    def find(path: str | None) -> str | Path | None:
        return path if path is None else find_near(path, picture) or path

    checkpoint = None if settings["checkpoint"] == "demo" else find(settings["checkpoint"])
    vae, tokenizer = find(settings["vae"]), find(settings["tokenizer"])
    compiler = settings.get("compiled")
    loras = find_loras(settings, picture)
    sd = load(
        checkpoint,
        device=settings["device"],
        dtype=settings["dtype"],
        vae=vae,
        tokenizer=tokenizer,
        lora=[(lora.path, lora.weight) for lora in loras],
        embeddings=[(word.name, word.path) if word.name else word.path for word in find_embeddings(settings, picture)],
        clip_skip=settings.get("clip_skip", 0),  # older pictures name none of these
        prediction_type=settings.get("prediction_type"),
        ema=settings.get("ema", False),
        progress=progress,
        # A run may be moved from a GPU, which can do both, to a CPU.
        offload=settings.get("offload", False)
        and not ((compiler or loras) and choose_device(settings["device"]).type == "cpu"),
    )
    return sd if compiler is None else compile_again(sd, compiler, settings.get("cuda_graphs"))


def compile_again(sd: StableDiffusion, compiler: str, cuda_graphs: bool | None = None) -> StableDiffusion:
    """The model compiled; a compiler that torch knows no name of is left out, with a warning: results hardly differ."""
    try:
        # A run may be moved to a CPU, which has no such graphs.
        return sd.compile(compiler=compiler, cuda_graphs=cuda_graphs if sd.device.type == "cuda" else None)
    except MasaError as error:
        warnings.warn(f"the run was compiled, and this one is not: {error}", stacklevel=2)
        return sd


def find_source(settings: Mapping[str, Any], picture: str | Path) -> Path:
    """The trajectory's file, or the real picture that it was made from. MasaError unless there, and unchanged."""
    if settings.get("trajectory") is not None:
        path, digest = settings["trajectory"], settings["trajectory_sha256"]
    else:
        path, digest = settings["image"], settings["image_sha256"]
    if path is None:
        raise MasaError("the edited picture was given as pixels, not as a file: its run cannot be repeated from a PNG")
    found = find_near(path, picture)
    if found is None:
        raise MasaError(f"{path}, which {picture} was made from, is not there any more; put it back")
    if file_digest(found) != digest:
        raise MasaError(f"{found} has changed since {picture} was made from it; restore it, or edit anew")
    return found


def find_weights(control: Control, picture: str | Path) -> Control:
    """A control that names files, with their paths where they are now. MasaError for one that is gone."""

    def find(path: str | Path) -> Path:
        found = find_near(path, picture)
        if found is None:
            raise MasaError(f"{path}, which {picture} was made with, is not there any more; put it back")
        return found

    return control.found(find) if isinstance(control, FileControl) else control


def find_loras(settings: Mapping[str, Any], picture: str | Path) -> tuple[Lora, ...]:
    """The LoRAs that settings name, where they are now. MasaError for one that is gone, or has changed."""
    found = []
    for told in settings.get("lora", []):  # older pictures name none
        path = find_near(told["path"], picture)
        if path is None:
            raise MasaError(
                f"the LoRA {told['path']}, which {picture} was made with, is not there any more; put it back"
            )
        if lora_digest(path) != told["sha256"]:
            raise MasaError(f"the LoRA {path} has changed since it made {picture}; put the old file back")
        weight = tuple(told["weight"]) if isinstance(told["weight"], list) else told["weight"]
        found.append(Lora(str(path), weight, told["sha256"]))
    return tuple(found)


def find_embeddings(settings: Mapping[str, Any], picture: str | Path) -> tuple[Embedding, ...]:
    """The embeddings that settings name, where they are now. MasaError for one that is gone, or has changed."""
    found = []
    for told in settings.get("embeddings", []):  # older pictures name none
        path = find_near(told["path"], picture)
        if path is None:
            raise MasaError(
                f"the embedding {told['path']}, which {picture} was made with, is not there any more; put it back"
            )
        if file_digest(path) != told["sha256"]:
            raise MasaError(f"the embedding {path} has changed since it made {picture}; put the old file back")
        found.append(Embedding(str(path), told["name"], told["sha256"]))
    return tuple(found)


def restore_trajectory(
    sd: StableDiffusion, settings: Mapping[str, Any], source: Path, progress: bool, controls: tuple[Control, ...] = ()
) -> Trajectory:
    """A trajectory from its file where it came from one, else by inverting its picture again under its controls."""
    if settings.get("trajectory") is not None:
        return Trajectory.load(source)
    fitted = settings["edit_guidance_scale"]
    generator = restore_generator(settings["generator_state"])
    return invert(
        sd,
        source,
        settings["prompt"],
        steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        method=settings["method"],
        edit_guidance_scale=7.5 if fitted is None else fitted,
        inner_steps=settings.get("inner_steps") or INNER_STEPS,  # older pictures do not name it: the published
        seed=None if generator is not None else settings["seed"],
        generator=generator,
        controls=controls,
        height=settings["height"],
        width=settings["width"],
        schedule=restore_schedule(settings["schedule"]),
        tiled=settings.get("tiled"),
        backend=settings["backend"],
        progress=progress,
    )
