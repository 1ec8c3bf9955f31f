"""sample_frames(): a video whose frames are targets of one source, each with a layout of its own."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from masa.attention import Backend
from masa.branches import Branches
from masa.cache.source_cache import SourceCache
from masa.cache.storage import Store, check_store
from masa.checks import as_controls, as_prompts, bind_controls, check_model, settle
from masa.controls.anchor import FirstFrameAnchor
from masa.controls.base import ActiveControl, Control, only_looks
from masa.controls.conditions import PictureControl, embed, read_picture
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks
from masa.controls.record import RecordAttention, RecordPredictions, RecordQueries
from masa.denoising import denoise
from masa.errors import MasaError
from masa.guidance import Guidance
from masa.io.movies import Movie, read_movie
from masa.io.pictures import ImageLike
from masa.output.frames import Frames
from masa.output.result import Picture, Result
from masa.pipeline import StableDiffusion
from masa.samplers import choose_sampler
from masa.samplers.base import Sampler
from masa.sampling import Given, check_edit, collect, prepare
from masa.schedule import Schedule
from masa.settings import RunSettings, describe, restore
from masa.trajectory import Trajectory
from masa.workflows.recording import record

Anchor = Literal["source", "first", "both"]
ANCHORS: tuple[Anchor, ...] = ("source", "first", "both")
AT_ONCE = 4  # frames in one call of the network, where nothing else is asked


def sample_frames(
    sd: StableDiffusion,
    source: str,
    prompt: str,
    conditions: Movie | Sequence[Movie],
    *,
    adapter: Control | Sequence[Control],
    anchor: Anchor = "source",
    frames_at_once: int | None = None,
    controls: Control | Sequence[Control] = MasaCtrl(),
    trajectory: Trajectory | None = None,
    pin_source: bool | None = None,
    steps: int | None = None,
    skip_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance: Guidance | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    latents: Tensor | None = None,
    eta: float = 0.0,
    schedule: Schedule | None = None,
    sampler: str | Sampler | None = None,
    tiled: bool | None = None,
    backend: Backend = "auto",
    store: Store = "auto",
    progress: bool = True,
) -> Frames:
    """Make a video: frames are targets of one source, with one prompt and one starting noise, each with its own layout.

    source: the source's prompt; trajectory: an inverted picture as the source, whose noisiest latents start all frames.
    prompt: every frame's. conditions: a picture for each frame, all of one size: a list as the adapter takes them, an
    array or tensor of them, a folder (in the order of the numbers in its names), an animated GIF, WebP or PNG, or a
    film (which needs imageio-ffmpeg). adapter: a T2IAdapter or ControlNet without pictures for targets (its source= is
    the source's own), or any control with a field `target`; several may be given, then conditions are a list with one
    such set for each, and they add up.

    anchor: whose keys and values MasaCtrl's frames read: the "source"'s; the "first" frame's, which itself reads the
    source; or "both", in one softmax. controls: as in `sample`, all frames'; a list of masks, or of an IPAdapter's
    pictures, has one for each frame. MasaCtrl(0, 0) with a source that is the first frame (the same prompt, the first
    condition as its own) is Text2Video-Zero's attention (2303.13439). frames_at_once: how many one call of the network
    takes, default 4; memory does not grow with the number of frames, and the result does not depend on it (in the sense
    in which it does not on `record`'s cache). Other anchors than the source compute the first frame again in each call,
    as one of these. store: where the source's keys and values are kept, as in `record`. Everything else as in `sample`.

    Raises MasaError for bad input, before any long work. MasaCtrl, section 4 and its videos.
    """
    check_model(sd)
    adapters = as_adapters(adapter)
    asked = RunSettings(
        source=source,
        target=as_prompts(prompt),
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
        tiled=tiled,
        backend=backend,
    )
    video = Video(adapters, read_conditions(conditions, adapters), anchor, frames_at_once)
    return run_frames(sd, asked, video, trajectory, store, progress)


@dataclass(frozen=True, eq=False)
class Video:
    """What a video is asked beside the settings of its runs.

    adapters: without pictures for their targets. conditions: of each adapter, a picture for each frame.
    """

    adapters: tuple[Control, ...]
    conditions: tuple[tuple[Tensor, ...], ...]
    anchor: Anchor = "source"
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.anchor not in ANCHORS:
            raise MasaError(f"anchor is {self.anchor!r}; expected one of {', '.join(map(repr, ANCHORS))}")
        least = 1 if self.anchor == "source" or len(self) == 1 else 2
        most = self.at_once
        if most is not None and (not isinstance(most, int | np.integer) or isinstance(most, bool) or most < least):
            beside = " (the first frame is one of them)" if least == 2 else ""
            raise MasaError(
                f"frames_at_once is {most!r}; expected a number from {least}{beside}, or None for {AT_ONCE}"
            )

    def __len__(self) -> int:
        return len(self.conditions[0])

    def chunks(self) -> list[tuple[int, ...]]:
        """The frames of each call of the network; behind another anchor than the source, the first is in each."""
        at_once, every = self.at_once or AT_ONCE, tuple(range(len(self)))
        if len(every) == 1:
            return [every]
        if self.anchor == "source":
            return [every[i : i + at_once] for i in range(0, len(every), at_once)]
        others = [every[i : i + at_once - 1] for i in range(1, len(every), at_once - 1)]
        return [(0, *some) for some in others]

    def showing(self, frames: Sequence[int]) -> tuple[Control, ...]:
        """The adapters of a run whose targets are these frames."""
        pairs = zip(self.adapters, self.conditions, strict=True)
        return tuple(with_target(adapter, [shown[i] for i in frames]) for adapter, shown in pairs)

    def describe(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "adapters": describe(list(self.adapters)),
            "conditions": describe([list(shown) for shown in self.conditions]),
            "anchor": self.anchor,
            "frames": len(self),
            "frames_at_once": self.at_once,
        }

    @classmethod
    def restored(cls, settings: Mapping[str, Any]) -> Video:
        """The inverse of `describe`."""
        adapters, conditions = restore(settings["adapters"]), restore(settings["conditions"])
        return cls(adapters, conditions, settings["anchor"], settings["frames_at_once"])


# --------------------------------------------------------------------------------------------------- what is given


def as_adapters(adapter: Control | Sequence[Control]) -> tuple[Control, ...]:
    """One adapter or several, as several. MasaError for what has no place for a frame's picture, or has one already."""
    several: tuple[Any, ...] = (adapter,)
    if isinstance(adapter, Sequence) and not isinstance(adapter, str):
        several = tuple(adapter)
    if not several:
        raise MasaError("adapter is empty; give a masa.T2IAdapter or masa.ControlNet, which each frame gives a picture")
    for one in several:
        a_value = is_dataclass(one) and not isinstance(one, type) and hasattr(one, "begin")
        if not a_value or all(f.name != "target" for f in fields(one) if f.init):
            raise MasaError(
                f"adapter is {one!r}; expected a control that takes a picture for each target, such as "
                "masa.T2IAdapter(path) or masa.ControlNet(path)"
            )
        if isinstance(one, PictureControl) and not one.is_blank:
            raise MasaError(
                f"{type(one).__name__} has a target of its own; leave it out: the frames' pictures are the conditions"
            )
    return several


def read_conditions(conditions: Movie | Sequence[Movie], adapters: Sequence[Control]) -> tuple[tuple[Tensor, ...], ...]:
    """Each adapter's pictures, one a frame, as settings keep them. MasaError for what cannot be a video's."""
    if len(adapters) == 1:
        sets: Sequence[Any] = [conditions]
    elif not isinstance(conditions, list | tuple) or len(conditions) != len(adapters):
        raise MasaError(
            f"there are {len(adapters)} adapters; give conditions as a list with a set of pictures for each"
        )
    else:
        sets = conditions
    found = []
    for place, movie in enumerate(sets):
        name = "conditions" if len(sets) == 1 else f"conditions[{place}]"
        pictures = [embed(picture) for picture in read_movie(movie, name)]
        found.append(tuple(_checked(picture, f"{name}[{i}]") for i, picture in enumerate(pictures)))
        sizes = [tuple(read_picture(name, picture).shape[1:]) for picture in found[-1]]
        other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            (h, w), (first_h, first_w) = sizes[other], sizes[0]
            raise MasaError(
                f"{name}[{other}] has {w}x{h} pixels, and the first {first_w}x{first_h}; give frames of one size"
            )
    counts = [len(pictures) for pictures in found]
    if len(set(counts)) > 1:
        raise MasaError(f"the adapters' conditions have {' and '.join(map(str, counts))} frames; give each as many")
    return tuple(found)


def _checked(picture: Tensor | None, name: str) -> Tensor:
    if picture is None:
        raise MasaError(f"{name} is None; give every frame a picture (black is a condition, too)")
    read_picture(name, picture)
    return picture


def with_target(control: Any, target: Sequence[Any]) -> Control:
    """A control with these pictures for its targets."""
    made: Control = (
        control.showing(list(target)) if isinstance(control, PictureControl) else replace(control, target=target)
    )
    return made


def of_frames(control: Control, frames: Sequence[int], total: int) -> Control:
    """A control of all frames for some of them alone: masks and pictures in a list have one for each frame."""
    if isinstance(control, MasaCtrl) and isinstance(control.mask, GivenMasks) and len(control.mask.targets) == total:
        masks = [control.mask.targets[i] for i in frames]
        return replace(control, mask=replace(control.mask, target=masks))
    if isinstance(control, PictureControl) and isinstance(control.target, list | tuple):
        return with_target(control, [control.target[i] for i in frames])
    return control


def anchored(controls: Sequence[Control], anchor: Anchor) -> tuple[Control, ...]:
    """The controls of a run whose first target is the first frame. MasaError where no MasaCtrl has an anchor."""
    if anchor == "source":
        return tuple(controls)
    if not any(isinstance(control, MasaCtrl) for control in controls):
        raise MasaError(
            f"anchor={anchor!r} says what MasaCtrl's frames read, and controls have none; add masa.MasaCtrl()"
        )
    both = anchor == "both"
    return tuple(FirstFrameAnchor(c, both) if isinstance(c, MasaCtrl) else c for c in controls)


# -------------------------------------------------------------------------------------------------------- the run


@torch.no_grad()
def run_frames(
    sd: StableDiffusion,
    asked: RunSettings,
    video: Video,
    trajectory: Trajectory | None,
    store: Store = "auto",
    progress: bool = True,
) -> Frames:
    """What `sample_frames` does with its arguments: check, record the source, make the frames in chunks."""
    check_store(store)
    asked = replace(asked, seed=secrets.randbelow(2**32) if asked.seed is None else asked.seed)
    reads, first_step = _check(sd, asked, video, trajectory)
    asked = replace(asked, skip_steps=first_step)
    cache = _record(sd, asked, video, trajectory, store, progress) if reads else None
    results: list[Result] = []
    frames: dict[int, tuple[Picture, Tensor]] = {}
    with tqdm(desc="frames", total=len(video), disable=not progress, unit="frame", unit_scale=True) as bar:
        for chunk in video.chunks():
            result = _sample_chunk(sd, asked, video, chunk, Given(trajectory, cache, progress=False), bar)
            made = zip(chunk, result.targets, result.latents[1:], strict=True)
            frames |= {frame: (picture, latents) for frame, picture, latents in made if frame not in frames}
            results = results or [result]
    return _collect(asked, video, results[0], [frames[i] for i in range(len(video))])


def _check(sd: StableDiffusion, asked: RunSettings, video: Video, trajectory: Trajectory | None) -> tuple[bool, int]:
    """Whether frames read the source, and the first step. MasaError for whatever a chunk would refuse."""
    if len(asked.target) != 1:
        raise MasaError(f"prompt is {list(asked.target)}; expected one, which all frames have")
    for control in asked.controls:
        if isinstance(control, RecordAttention | RecordPredictions | RecordQueries):
            raise MasaError(
                f"{type(control).__name__} keeps what a video has no place for; leave it out, or look at a frame with "
                "masa.sample"
            )
    if asked.latents is not None and isinstance(asked.latents, Tensor) and len(asked.latents) != 1:
        raise MasaError(f"latents are {tuple(asked.latents.shape)}; expected (1, 4, h, w), with which all frames start")
    settings, levels = settle(sd, asked, trajectory)
    assert settings.height is not None
    assert settings.width is not None
    assert settings.skip_steps is not None
    size, real = (settings.height, settings.width), trajectory is not None

    def check(controls: Sequence[Control], frames: int) -> tuple[ActiveControl, ...]:
        prompts = (settings.source, *asked.target * frames)
        first = settings.skip_steps or 0
        return bind_controls(sd, controls, levels, prompts, size=size, first_step=first, real=real)

    check(asked.controls, len(video))  # a mask for each frame, where there are several
    chunk = video.chunks()[0]
    active = check(_controls(asked, video, chunk), len(chunk))
    first_step = max(settings.skip_steps, *(control.first_step for control in active), 0)
    settle(sd, replace(asked, skip_steps=first_step), trajectory)
    branches = Branches.build(len(chunk), guided=True).cache_source()
    steps = range(first_step, levels.steps)
    edits = (edit for step in steps for control in active for edit in control.edits(step, branches).values())
    return any(part != "maps" for edit in edits for part in edit.reads_cached(len(branches))), first_step


def check_before_inversion(
    sd: StableDiffusion, image: ImageLike, asked: RunSettings, video: Video, method: str, steps: int
) -> None:
    """MasaError for what frames of a picture's trajectory would be refused, before the minutes of its inversion."""
    first = video.chunks()[0]
    controls = _controls(asked, video, first)
    of_first = replace(
        asked, target=asked.target * len(first), controls=controls, sampler=asked.sampler or choose_sampler("ddim")
    )
    check_edit(sd, image, of_first, method, steps, asked.schedule or sd.schedule, (asked.height, asked.width))


def _controls(asked: RunSettings, video: Video, chunk: Sequence[int]) -> tuple[Control, ...]:
    """All controls of a run whose targets are these frames."""
    own = tuple(of_frames(control, chunk, len(video)) for control in asked.controls)
    return (*anchored(own, video.anchor), *video.showing(chunk))


def _record(
    sd: StableDiffusion,
    asked: RunSettings,
    video: Video,
    trajectory: Trajectory | None,
    store: Store,
    progress: bool,
) -> SourceCache:
    """The source, run once for all chunks."""
    of_source = tuple(a for a in video.adapters if getattr(a, "source", None) is not None)
    names = (
        *("pin_source", "steps", "skip_steps", "guidance_scale", "guidance", "negative_prompt", "height", "width"),
        *("seed", "latents", "eta", "schedule", "sampler", "tiled", "backend"),
    )
    given: dict[str, Any] = {name: value for name in names if (value := getattr(asked, name)) is not None}
    if trajectory is None and asked.latents is None:
        given.pop("skip_steps")
    controls = (*asked.controls, *of_source)
    return record(sd, asked.source, controls=controls, trajectory=trajectory, store=store, progress=progress, **given)


def _sample_chunk(
    sd: StableDiffusion, asked: RunSettings, video: Video, chunk: tuple[int, ...], given: Given, bar: tqdm[Any]
) -> Result:
    """A run whose targets are these frames; the bar moves by the frames that are new, step by step."""
    run = replace(asked, target=asked.target * len(chunk), controls=_controls(asked, video, chunk))
    prepared = prepare(sd, run, given)
    new = len(chunk) if video.anchor == "source" or chunk == video.chunks()[0] else len(chunk) - 1
    steps = prepared.denoising.steps - prepared.denoising.first_step
    x = prepared.denoising.latents
    for x in denoise(prepared.denoising):  # noqa: B007
        bar.update(new / steps)
    bar.n = round(bar.n)  # thirds of frames do not add up to whole ones
    return collect(prepared, x)


def _collect(asked: RunSettings, video: Video, result: Result, made: Sequence[tuple[Picture, Tensor]]) -> Frames:
    """The frames, each with settings that make it alone, and the settings of all."""
    about = {"function": "frames", "target": list(asked.target), "targets_at_once": None}
    acting = [control for control in asked.controls if not only_looks(control)]
    controls = describe(acting)
    settings = {**result.settings, **about, "controls": controls, **video.describe()}
    settings.pop("branch", None)
    images = []
    for i, (picture, _) in enumerate(made):
        shown = (i,) if video.anchor == "source" or i == 0 else (0, i)
        of_one = [of_frames(control, shown, len(video)) for control in acting]
        each = zip(of_one, acting, controls, strict=True)
        own = {
            "controls": [known if one is whole else describe(one) for one, whole, known in each],
            "conditions": [[pictures[k] for k in shown] for pictures in settings["conditions"]],
            "frames": len(shown),
            "frames_at_once": None,
            "frame": i,
        }
        images.append(Picture.of(picture, {**settings, **own}))
    source = Picture.of(result.source, {**images[0].settings, "branch": 0})
    return Frames(images, torch.stack([latents for _, latents in made]), source, settings)
