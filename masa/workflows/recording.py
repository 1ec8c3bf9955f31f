"""record(): a source run once, kept for any number of targets and settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from masa.attention import Backend
from masa.cache.recorder import Recorder, Recording
from masa.cache.source_cache import SourceCache
from masa.cache.storage import Store
from masa.checks import as_controls, check_model, check_schedule
from masa.controls.base import Control, only_looks
from masa.controls.masactrl import MasaCtrl
from masa.errors import MasaError
from masa.guidance import Guidance
from masa.pipeline import StableDiffusion
from masa.samplers import choose_sampler
from masa.samplers.base import Sampler
from masa.sampling import sample
from masa.schedule import Schedule
from masa.settings import check_kept
from masa.trajectory import Trajectory


def record(
    sd: StableDiffusion,
    source: str = "",
    *,
    controls: Control | Sequence[Control] = MasaCtrl(),
    trajectory: Trajectory | None = None,
    pin_source: bool = True,
    steps: int | None = None,
    skip_steps: int | None = None,
    guidance_scale: float = 7.5,
    guidance: Guidance | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    latents: Tensor | None = None,
    eta: float = 0.0,
    schedule: Schedule | None = None,
    sampler: str | Sampler = "ddim",
    tiled: bool | None = None,
    backend: Backend = "auto",
    store: Store = "auto",
    path: str | Path | None = None,
    progress: bool = True,
) -> SourceCache:
    """Run a source once and keep what its targets read, so that each further target costs only its own rows.

    One picture, twenty prompts, three settings::

        settings = [masa.MasaCtrl(), masa.MasaCtrl(2, 8), masa.MasaCtrl(mask=masa.WordMasks("dog", "dog"))]
        cache = masa.record(sd, trajectory=masa.invert(sd, "dog.jpg", "a photo of a dog"), controls=settings)
        results = [masa.sample(sd, target=prompts, cache=cache, controls=c, targets_at_once=4) for c in settings]

    controls: those that will read the cache, one or several, of whatever kind: kept is what their edits read of the
    source, step by step. The source's token maps at a quarter of the
    latents' size are kept of every step: WordMasks with any words of the source prompt, LocalBlend and
    RecordAttention read them. latents: (1, 4, h, w). Everything else as in `sample`.

    store: where it lives. "device": the model's memory; "host": pinned memory, copied step by step; "disk": a
    memory-mapped safetensors file; "auto": the first of these that has twice the size free. path: the file, which
    `SourceCache.load` reads again; without it a "disk" cache vanishes when it is no longer used. SD v1 at 512x512
    with 50 steps and the default MasaCtrl takes about 2.2 GB in float16, half of that with an empty source prompt.

    Results equal those without a cache. In float32 on a CPU bit for bit, for pictures of 128 pixels a side and more,
    where the matrix library multiplies a row alike whatever the others (MKL does on AVX2), without `compile`; else up
    to rounding. The same holds of `targets_at_once`. Raises MasaError for bad input, before any long work.
    """
    check_model(sd)
    check_schedule(schedule)
    given = as_controls(controls)
    looking = [control for control in given if only_looks(control)]
    chosen = tuple(control for control in given if not only_looks(control))
    if not chosen:
        raise MasaError("record's controls are empty; give those that will read the cache")
    if latents is not None and isinstance(latents, Tensor) and len(latents) != 1:
        raise MasaError(f"latents are {tuple(latents.shape)}; record takes the source's, (1, 4, h, w)")
    solver = choose_sampler(sampler)
    own = trajectory.schedule if trajectory is not None else schedule or sd.schedule
    check_kept(schedule=own, sampler=solver, guidance=guidance)  # the cache keeps them by name
    source_guidance = None if trajectory is None else trajectory.source_guidance
    # A source whose two prompts are equal has one row.
    prompt = source or ("" if trajectory is None else trajectory.prompt)
    merged = prompt == negative_prompt and (trajectory is None or trajectory.context is None)
    rows = 2 if max(guidance_scale, source_guidance or 0.0) > 1.0 and not merged and not sd.embeds_guidance else 1
    recording = Recording(store, path)
    with recording.closing:
        result = sample(
            sd,
            source,
            controls=[Recorder(chosen, sd, rows, recording), *looking],
            trajectory=trajectory,
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
            sampler=solver,
            tiled=tiled,
            backend=backend,
            progress=progress,
        )
        about = {"controls": [], "source_conditions": recording.source_conditions}
        return recording.finish(dict(result.settings) | about, result.source, trajectory)
