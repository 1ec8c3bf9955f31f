"""SDEdit: noise a picture half way, denoise it with another prompt (2108.01073)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from masa.attention import Backend
from masa.controls.base import Control
from masa.errors import MasaError
from masa.guidance import Guidance
from masa.inversion import invert
from masa.io.pictures import ImageLike
from masa.output.result import Result
from masa.pipeline import StableDiffusion
from masa.samplers import choose_sampler
from masa.samplers.base import Sampler
from masa.sampling import Callback, sample
from masa.schedule import Schedule


def sdedit(
    sd: StableDiffusion,
    image: ImageLike,
    prompt: str | Sequence[str],
    strength: float,
    *,
    controls: Control | Sequence[Control] = (),
    steps: int = 50,
    guidance_scale: float = 7.5,
    guidance: Guidance | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
    sampler: str | Sampler = "ddim",
    tiled: bool | None = None,
    backend: Backend = "auto",
    progress: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Add noise to a picture and denoise it with other prompts, one target each.

    strength: in [0, 1], the share of the steps that are run, rounded to whole steps: 0 is the picture through
    the autoencoder, 1 starts from the noisiest level; the paper's are 0.5 and 0.8. The result's source is the
    picture through the autoencoder; controls may read it at every step's noise level. seed or generator: of the
    noise. sampler: on the schedule's levels. Everything else as in `invert` and `sample`. Raises MasaError for bad
    input, before any long work.
    """
    if not isinstance(strength, int | float) or not 0.0 <= strength <= 1.0:
        raise MasaError(f"strength is {strength!r}; expected a number from 0 (the picture) to 1 (noise)")
    if not prompt and not isinstance(prompt, str):
        raise MasaError("sdedit needs at least one prompt")
    choose_sampler(sampler)
    trajectory = invert(
        sd,
        image,
        method="noise",
        steps=steps,
        height=height,
        width=width,
        seed=seed,
        generator=generator,
        schedule=schedule,
        tiled=tiled,
    )
    return sample(
        sd,
        target=prompt,
        controls=controls,
        trajectory=trajectory,
        skip_steps=steps - round(strength * steps),
        guidance_scale=guidance_scale,
        guidance=guidance,
        negative_prompt=negative_prompt,
        sampler=sampler,
        seed=seed,
        generator=generator,
        tiled=tiled,
        backend=backend,
        progress=progress,
        callback=callback,
    )
