"""From a picture back to noise: the trajectory of latents that sampling then retraces or edits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from masa.attention import Backend
from masa.branches import Branches
from masa.errors import MasaError
from masa.files import replacing
from masa.image import ImageLike, file_digest, load_image
from masa.pipeline import StableDiffusion
from masa.schedule import Schedule

FORMAT = "masa trajectory 1"


@dataclass(frozen=True)
class Trajectory:
    """A picture's way to noise.

    latents (steps + 1, 4, h, w), float32 on the CPU: the picture's own first, the noisiest last. prompt: what
    it was inverted with. settings: JSON values that tell how it was made.
    """

    latents: Tensor
    prompt: str
    settings: Mapping[str, Any]

    @property
    def steps(self) -> int:
        return len(self.latents) - 1

    @property
    def offset(self) -> int:
        """The schedule's offset that it was made with."""
        return int(self.settings["schedule_offset"])

    def save(self, path: str | Path) -> None:
        """Write latents and settings as one safetensors file."""
        metadata = {"format": FORMAT, "prompt": self.prompt, "settings": json.dumps(dict(self.settings))}
        with replacing(path) as temporary:
            save_file({"latents": self.latents.contiguous()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` wrote. MasaError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise MasaError(f"{path} is no trajectory; expected a file written by masa.invert(..).save()")
                # A copy: the mapped file may be overwritten while the trajectory lives.
                latents = file.get_tensor("latents").clone()
        except SafetensorError as error:
            raise MasaError(f"{path} is not a whole safetensors file ({error}); invert the picture again") from error
        settings = json.loads(metadata["settings"]) | {"trajectory": str(path)}
        return cls(latents, metadata["prompt"], settings)


@torch.no_grad()
def invert(
    sd: StableDiffusion,
    image: ImageLike,
    prompt: str = "",
    *,
    steps: int = 50,
    guidance_scale: float = 1.0,
    method: str = "ddim",
    height: int | None = None,
    width: int | None = None,
    schedule: Schedule | None = None,
    backend: Backend = "auto",
    progress: bool = True,
) -> Trajectory:
    """Invert a picture: latents that lead back to it when denoised with the same prompt.

    image: a path, PIL picture, uint8 array (h, w, 3) or float tensor (3, h, w) in [-1, 1]; size by default its
    own, scaled to the model's training size on the short side. guidance_scale: 1 inverts best; above 1 the
    inversion is guided away from the empty prompt. method: "ddim" (2010.02502; MasaCtrl section 4).
    schedule: default the model's. Raises MasaError for bad input, before any long work.
    """
    if method != "ddim":
        raise MasaError(f"inversion method is {method!r}; expected 'ddim'")
    schedule = schedule or sd.schedule
    timesteps = schedule.timesteps(steps)
    picture = load_image(image, short_side=sd.config.image_size, height=height, width=width)
    # With an empty prompt both halves would be the same row; without guidance the unconditional one has no say.
    guided = guidance_scale > 1.0 and prompt != ""
    rows = Branches.build(0, guided=guided)
    context = rows.contexts(*(sd.encode_prompt([p]) for p in ("", prompt)))

    x = sd.encode_image(picture, height=picture.shape[2], width=picture.shape[3])
    latents = [x]
    for timestep in tqdm(timesteps[::-1], desc="invert", disable=not progress):
        eps, _ = sd.unet(rows.expand(x).to(sd.dtype), timestep, context, backend=backend)
        x = schedule.invert_step(rows.guide(eps.float(), guidance_scale), x, timestep, steps)
        latents.append(x)
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
        "schedule_offset": schedule.offset,
        "checkpoint": sd.checkpoint,
    }
    return Trajectory(torch.cat(latents).cpu(), prompt, settings)
