"""Many runs on one labelled picture: inversions beside controls, and two parameters swept."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from masa.attention import Backend
from masa.checks import (
    check_controls,
    check_inversion,
    check_model,
    check_numbers,
    choose_first_step,
    choose_levels,
    picture_size,
)
from masa.controls.base import Control
from masa.controls.masactrl import MasaCtrl
from masa.controls.plug_and_play import PlugAndPlay
from masa.controls.prompt_to_prompt import PromptToPrompt
from masa.controls.steering import without_targets
from masa.controls.style import StyleTransfer
from masa.errors import MasaError
from masa.guidance import check_guidance
from masa.inversion import METHODS, check_method, invert
from masa.io.pictures import ImageLike
from masa.noise import Noise
from masa.null_text import MAX_STEPS
from masa.output.labels import label_font
from masa.output.result import Picture, wrap
from masa.pipeline import StableDiffusion
from masa.runtime.adapters import keep_networks
from masa.samplers import choose_sampler
from masa.samplers.base import Levels
from masa.sampling import sample
from masa.settings import describe, is_registered
from masa.trajectory import Trajectory, default_skip

# What a sweep may vary beside its control's own fields.
SAMPLING = (
    *("guidance_scale", "guidance", "sampler", "negative_prompt"),
    *("seed", "eta", "steps", "skip_steps", "pin_source"),
)
FIXED_BY_TRAJECTORY = ("steps",)


def parameters_of(control: type) -> tuple[str, ...]:
    """What a sweep of a control may vary: its fields, and those of the sampling; steps are the run's."""
    own = (field.name for field in fields(control) if field.init and field.name != "steps")
    return tuple(dict.fromkeys((*own, *SAMPLING)))


PARAMETERS = parameters_of(MasaCtrl)

CELL = 192  # pixels: pictures are shown with at least this short side


def comparison(source: str, masactrl: MasaCtrl = MasaCtrl()) -> dict[str, Control | Sequence[Control]]:
    """The controls that a grid compares by default, by name; Prompt-to-Prompt only with a source prompt."""
    controls: dict[str, Control | Sequence[Control]] = {
        "fixed seed": (),
        "MasaCtrl": masactrl,
        "Prompt-to-Prompt": PromptToPrompt("refine", self_replace_tokens=None),
        "Plug-and-Play": PlugAndPlay(),
        "style": StyleTransfer(masactrl.start_step, masactrl.start_layer),
    }
    return controls if source else {name: c for name, c in controls.items() if name != "Prompt-to-Prompt"}


@keep_networks()
def grid(
    sd: StableDiffusion,
    image: ImageLike,
    target: str,
    source: str = "",
    *,
    methods: Sequence[str] | None = None,
    controls: Mapping[str, Control | Sequence[Control]] | None = None,
    steps: int = 50,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    backend: Backend = "auto",
    progress: bool = True,
) -> Picture:
    """One picture of an edit by every inversion (rows) and control (columns), the reconstruction first.

    methods: of `invert`; default all that serve these settings (null-text wants guidance, at most 100 steps and,
    as negative-prompt does, a source prompt). controls: by
    the name to write above; default those of `comparison`. Each picture is inverted once per method. All
    else as in `edit`. Raises MasaError for bad input, before any long work.
    """
    check_model(sd)
    if methods is None:
        methods = [method for method in METHODS if serves(method, source, steps, guidance_scale)]
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) < len(methods):
        known = ", ".join(map(repr, METHODS))
        raise MasaError(f"inversion methods are {list(methods)}; expected some of {known}, each once")
    columns = comparison(source) if controls is None else dict(controls)
    for method in methods:
        check_method(method, source, steps, sd.schedule, guidance_scale)
    size = picture_size(sd, image, height, width)
    levels = Levels.of_schedule(sd.schedule, steps)
    steering: dict[tuple[str, str], tuple[Control, ...]] = {}
    for method, (name, control) in itertools.product(methods, columns.items()):
        prompts, first_step = (source, target), default_skip(method, steps)
        steering[method, name] = check_controls(
            sd, control, levels, prompts, size=size, first_step=first_step, method=method
        )
    seed = secrets.randbelow(2**32) if seed is None else seed
    inversions = _Inversions(
        partial(
            invert,
            sd,
            image,
            source,
            steps=steps,
            edit_guidance_scale=guidance_scale,
            height=height,
            width=width,
            seed=seed,
            backend=backend,
            progress=False,
        )
    )
    rows = []
    for method in tqdm(methods, desc="inversions", disable=not progress):
        trajectory = inversions.of(method)
        rebuilt = sample(sd, trajectory=trajectory, guidance_scale=guidance_scale, backend=backend, progress=False)
        row: list[Image.Image] = [rebuilt.source]
        for name, control in tqdm(columns.items(), desc=method, disable=not progress, leave=False):
            result = sample(
                sd,
                target=target,
                controls=control,
                trajectory=inversions.of(method, steering[method, name]),
                guidance_scale=guidance_scale,
                seed=seed,
                backend=backend,
                progress=False,
            )
            row.append(result.targets[0])
        rows.append(row)
    settings = {
        **rebuilt.settings,
        "function": "grid",
        "target": [target],
        "methods": list(methods),
        "controls": {name: describe(_listed(control)) for name, control in columns.items()},
        "seed": seed,
    }
    return Picture.of(label_sheet(rows, methods, ["reconstruction", *columns]), settings)


class _Inversions:
    """A picture's trajectories by method and by the controls that steer them, each made once."""

    def __init__(self, make: Callable[..., Trajectory]) -> None:
        self.make = make
        self.made: dict[tuple[str, str], Trajectory] = {}

    def of(self, method: str, controls: Sequence[Control] = ()) -> Trajectory:
        key = (method, json.dumps([describe(without_targets(control)) for control in controls]))
        if key not in self.made:
            self.made[key] = self.make(method=method, controls=controls)
        return self.made[key]


@keep_networks()
def sweep(
    sd: StableDiffusion,
    source: str,
    target: str,
    rows: tuple[str, Sequence[Any]],
    columns: tuple[str, Sequence[Any]],
    *,
    image: ImageLike | None = None,
    method: str = "ddim",
    control: Control = MasaCtrl(),
    steps: int = 50,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    backend: Backend = "auto",
    progress: bool = True,
) -> Picture:
    """One picture of a target under every pair of values of two parameters: MasaCtrl's ablation (figure 8).

    rows, columns: a parameter's name, a field of the control or one of SAMPLING, and its values. image: edit this
    real picture, inverted once by `method`; default: synthesise the source too, from one seed. control: MasaCtrl, or
    any other of a registered class, whose fields are what is not varied. The first column shows the source. All else
    as in `sample` and `invert`.
    Raises MasaError for bad input, before any long work.
    """
    check_model(sd)
    if not is_registered(control):
        raise MasaError(
            f"a sweep varies fields of a registered control, and {type(control).__name__} is none; use masa.register"
        )
    parameters = parameters_of(type(control))
    for name, values in (rows, columns):
        if name not in parameters:
            raise MasaError(f"a sweep cannot vary {name!r}; expected one of {', '.join(parameters)}")
        if not values:
            raise MasaError(f"a sweep over {name} needs values")
        if image is not None and name in FIXED_BY_TRAJECTORY:
            raise MasaError(f"a sweep over a real picture inverts it once, which fixes {name}; vary something else")
    if rows[0] == columns[0]:
        raise MasaError(f"rows and columns both vary {rows[0]}; give two parameters")
    seed = secrets.randbelow(2**32) if seed is None else seed
    fixed: dict[str, Any] = {"guidance_scale": guidance_scale, "seed": seed, "backend": backend, "progress": False}
    cells = [[_cell(control, fixed, {rows[0]: r, columns[0]: c}) for c in columns[1]] for r in rows[1]]
    swept = {"rows": [rows[0], describe(list(rows[1]))], "columns": [columns[0], describe(list(columns[1]))]}
    if image is not None:
        check_method(method, source, steps, sd.schedule, guidance_scale)
    size = picture_size(sd, image, height, width)
    inverted = method if image is not None else None
    steering = [[_check_cell(sd, cell, (source, target), steps, size, inverted) for cell in line] for line in cells]
    _check_matters(dict([rows, columns]), control, guidance_scale, method if image is not None else None)
    start: dict[str, Any] = {"steps": steps, "height": height, "width": width}
    inversions = None
    if image is not None:
        inversions = _Inversions(
            partial(
                invert,
                sd,
                image,
                source,
                **start,
                edit_guidance_scale=guidance_scale,
                seed=seed,
                backend=backend,
                progress=progress,
            )
        )
    pictures: list[list[Image.Image]] = []
    with tqdm(desc="sweep", total=len(rows[1]) * len(columns[1]), disable=not progress) as bar:
        for line, steering_line in zip(cells, steering, strict=True):
            pictures.append([])
            for settings, controls in zip(line, steering_line, strict=True):
                if inversions is not None:
                    start = {"trajectory": inversions.of(method, controls)}
                result = sample(sd, source, target, **(start | settings))
                pictures[-1] += result.targets if pictures[-1] else result.images
                bar.update()
    about = {
        **result.settings,
        "function": "sweep",
        **swept,
        "controls": [describe(control)],
        "seed": seed,
    }
    labels = ["source", *(f"{columns[0]} = {value}" for value in columns[1])]
    return Picture.of(label_sheet(pictures, [f"{rows[0]} = {value}" for value in rows[1]], labels), about)


def _check_cell(
    sd: StableDiffusion,
    settings: Mapping[str, Any],
    prompts: tuple[str, str],
    steps: int,
    size: tuple[int, int],
    method: str | None,
) -> tuple[Control, ...]:
    """The controls of a cell that steer its inversion. MasaError for a cell that could not be run.

    method: the picture's inversion, None for synthesis.
    """
    steps, eta = settings.get("steps", steps), settings.get("eta", 0.0)
    check_numbers(sd, settings["guidance_scale"], eta, settings["backend"])
    if method is not None:
        check_inversion(method, settings.get("negative_prompt", ""), eta)
    Noise(settings["seed"])
    usual = 0 if method is None else default_skip(method, steps)
    first_step = choose_first_step(settings.get("skip_steps"), steps, usual, from_noise=method is None)
    sampler, free = choose_sampler(settings.get("sampler", "ddim")), not settings.get("pin_source", True)
    if settings.get("guidance") is not None:
        check_guidance(settings["guidance"])
    levels = choose_levels(sampler, sd.schedule, steps, method=method, eta=eta, free=free)
    controls = settings["controls"]
    return check_controls(sd, controls, levels, prompts, size=size, first_step=first_step, method=method)


def serves(method: str, source: str, steps: int, guidance_scale: float) -> bool:
    """Whether an inversion method can be used at all."""
    if method == "null-text" and (guidance_scale <= 1.0 or steps > MAX_STEPS):
        return False
    return bool(source) or method not in ("negative-prompt", "null-text")


def _check_matters(
    swept: Mapping[str, Sequence[Any]], control: Control, guidance_scale: float, method: str | None
) -> None:
    """MasaError for a parameter that no cell reads; method: the picture's inversion, None for synthesis."""
    guided = max(swept.get("guidance_scale", [guidance_scale])) > 1.0
    noisy = any(not choose_sampler(sampler).retraces for sampler in swept.get("sampler", ()))
    drawn = method != "edit-friendly" and (noisy or max(swept.get("eta", [0.0])) > 0.0)
    reasons = {
        "negative_prompt": (not guided, "guidance is off in every cell; raise guidance_scale above 1"),
        "pin_source": (method is None, "only a real source is pinned; give image"),
        "seed": (
            method is not None and not drawn,
            "the picture is inverted once and no step adds noise; sweep eta too",
        ),
    }
    if isinstance(control, MasaCtrl):
        lists, unions = swept.get("layers", [control.layers]), swept.get("union", [control.union])
        reasons |= {
            "start_step": (control.steps is not None, "the control lists its steps; leave steps out"),
            "start_layer": (all(listed is not None for listed in lists), "the layers are listed; leave layers out"),
            "source_weight": (not any(unions), "it is of the source in a union; set union=True, or sweep it too"),
        }
    for name in swept:
        idle, reason = reasons.get(name, (False, ""))
        if idle:
            raise MasaError(f"a sweep over {name} would change nothing: {reason}")


def _cell(control: Control, fixed: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `sample` in one cell."""
    of_control = {name: value for name, value in values.items() if name not in SAMPLING}
    of_sampling = {name: value for name, value in values.items() if name in SAMPLING}
    return {**fixed, **of_sampling, "controls": replace(control, **of_control)}  # type: ignore[type-var]


def _listed(control: Control | Sequence[Control]) -> list[Control]:
    return list(control) if isinstance(control, Sequence) else [control]


def label_sheet(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], gap: int = 4
) -> Image.Image:
    """Pictures of one size in rows, labelled on the left and above; small pictures are enlarged."""
    width, height = rows[0][0].size
    scale = max(1, -(-CELL // min(width, height)))
    width, height = scale * width, scale * height
    font = label_font(max(11, min(16, width // 14)), (*row_labels, *column_labels))
    line = int(font.getbbox("Ag")[3]) + gap
    left = 2 * gap + int(max(font.getlength(word) for label in row_labels for word in (*label.split(), "source")))
    lines = [wrap(label, font, width) for label in column_labels]
    top = line * max(map(len, lines)) + 2 * gap
    sheet = Image.new("RGB", (left + len(lines) * (width + gap) - gap, top + len(rows) * (height + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: Sequence[str]) -> None:
        for n, words in enumerate(text):
            draw.text((x + 1, y + n * line), words, fill="black", font=font)

    for c, text in enumerate(lines):
        write(left + c * (width + gap), gap, text)
    for r, (label, pictures) in enumerate(zip(row_labels, rows, strict=True)):
        y = top + r * (height + gap)
        write(gap, y + gap, wrap(label, font, left - gap))
        for c, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.BICUBIC) if scale > 1 else picture
            sheet.paste(enlarged, (left + c * (width + gap), y))
    return sheet
