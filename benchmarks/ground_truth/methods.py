"""The methods compared, as values: how each makes its edits of one individual."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

import masa
from masa.controls.base import Control

from .cases import Individual

PAPER_STEPS, PAPER_START = 50, 4  # MasaCtrl's S of its steps
STRENGTHS = (0.5, 0.8)
VARIANTS = ("", ", free source", ", word masks", ", union")
# Of null-text, at each step: ten inner ones, forward, again, and backward. One row alone and its gradients are slow:
# the time of this many rows in a batch, measured.
INNER_ROWS = 300


@dataclass(frozen=True)
class Settings:
    """What all methods of a run share. start_step, start_layer: MasaCtrl's S and L."""

    steps: int
    guidance_scale: float
    start_step: int
    start_layer: int

    @property
    def paper_start(self) -> int:
        """The paper's S = 4 of 50, at this number of steps."""
        return round(PAPER_START * self.steps / PAPER_STEPS)


@dataclass(frozen=True)
class Method:
    """One way to edit. inversion: masa.invert's method; strength: SDEdit's instead, and no inversion.

    described: the inversion knows the source's prompt. pin_source: as in masa.sample.
    """

    controls: tuple[Control, ...] = ()
    inversion: str = "ddim"
    described: bool = True
    pin_source: bool = True
    strength: float | None = None

    def rows(self, steps: int, targets: int, real: bool) -> float:
        """How many rows the UNet computes for one individual, inversions left out but for null-text's fitting."""
        if self.strength is not None:
            return 2 * targets * round(self.strength * steps)
        source = 2 if self.controls or not (real and self.pin_source) else 0
        share = 38 / 50 if self.inversion == "edit-friendly" else 1.0
        fitting = INNER_ROWS if self.inversion == "null-text" and real else 0
        return steps * (share * (2 * targets + source) + fitting)


def masactrl(subject: str, start_step: int, start_layer: int, variant: str = "") -> tuple[str, Method]:
    """MasaCtrl's name and method at one S and L, in one of VARIANTS."""
    mask = masa.WordMasks(subject, subject) if variant == ", word masks" else None
    control = masa.MasaCtrl(start_step, start_layer, mask=mask, union=variant == ", union")
    name = f"MasaCtrl S={start_step} L={start_layer}{variant}"
    return name, Method((control,), pin_source=variant != ", free source")


def core_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """The comparison that the claims rest on."""
    return {
        "fixed seed": Method(),
        **{f"SDEdit {strength}": Method(strength=strength) for strength in STRENGTHS},
        "Prompt-to-Prompt": Method((masa.PromptToPrompt(),)),
        "Plug-and-Play": Method((masa.PlugAndPlay(),), described=False),
        **dict([masactrl(subject, settings.start_step, settings.start_layer)]),
    }


def further_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """MasaCtrl's variants and the paper's setting, and other inversions."""
    S, L = settings.start_step, settings.start_layer
    name, plain = masactrl(subject, S, L)
    variants = dict(masactrl(subject, S, L, variant) for variant in VARIANTS[1:])
    paper = dict([masactrl(subject, settings.paper_start, 10)])
    return {
        **({} if name in paper else paper),
        **variants,
        "negative-prompt": Method(inversion="negative-prompt", pin_source=False),
        f"negative-prompt, {name}": Method(plain.controls, "negative-prompt", pin_source=False),
        "edit-friendly": Method(inversion="edit-friendly"),
        f"edit-friendly, {name}": Method(plain.controls, "edit-friendly"),
    }


def slow_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """Null-text inversion, whose fitting costs more than all the rest."""
    name, plain = masactrl(subject, settings.start_step, settings.start_layer)
    return {
        f"null-text, {name}": Method(plain.controls, "null-text", pin_source=False),
    }


def real_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """All methods that edit a given picture, in the table's order."""
    groups = (core_methods, further_methods, slow_methods)
    return {name: method for group in groups for name, method in group(settings, subject).items()}


def synthesis_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """Those that need no picture: source and target from one noise."""
    return {
        name: method
        for name, method in real_methods(settings, subject).items()
        if method.strength is None and method.inversion == "ddim" and method.pin_source
    }


def sweep_methods(
    subject: str, start_steps: list[int], start_layers: list[int], variants: list[str]
) -> dict[str, Method]:
    """One MasaCtrl per cell of S x L, and variant."""
    return dict(masactrl(subject, s, layer, v) for v in variants for s in start_steps for layer in start_layers)


class Editor:
    """Edits of one individual's rendered picture; each inversion is made once."""

    def __init__(self, sd: masa.StableDiffusion, who: Individual, settings: Settings) -> None:
        self.sd = sd
        self.who = who
        self.settings = settings
        self.source = who.picture(who.source_pose, sd.config.image_size)
        self.trajectories: dict[tuple[str, bool], masa.Trajectory] = {}

    def edit(self, method: Method) -> np.ndarray:
        """Pictures uint8 (1 + targets, h, w, 3): the source as the method gives it back, and its edits."""
        who, settings = self.who, self.settings
        if method.strength is not None:
            out = masa.sdedit(
                self.sd, self.source, who.target_prompts, method.strength,
                steps=settings.steps, guidance_scale=settings.guidance_scale, seed=who.seed, progress=False,
            )  # fmt: skip
        else:
            out = masa.sample(
                self.sd, target=who.target_prompts, controls=method.controls, pin_source=method.pin_source,
                trajectory=self._trajectory(method), guidance_scale=settings.guidance_scale, seed=who.seed,
                progress=False,
            )  # fmt: skip
        return as_arrays(out.images)

    def reconstruct(self) -> np.ndarray:
        """Inversion with the prompt, and denoising with it and without guidance: (1, h, w, 3)."""
        out = masa.sample(self.sd, trajectory=self._trajectory(Method()), guidance_scale=1.0, progress=False)
        return as_arrays(out.images)

    def _trajectory(self, method: Method) -> masa.Trajectory:
        key = method.inversion, method.described
        if key not in self.trajectories:
            self.trajectories[key] = masa.invert(
                self.sd, self.source, self.who.source_prompt if method.described else "", method=method.inversion,
                steps=self.settings.steps, edit_guidance_scale=self.settings.guidance_scale, seed=self.who.seed,
                progress=False,
            )  # fmt: skip
        return self.trajectories[key]


def synthesise(sd: masa.StableDiffusion, who: Individual, settings: Settings, method: Method) -> np.ndarray:
    """A source and its targets from one noise, uint8 (1 + targets, h, w, 3)."""
    out = masa.sample(
        sd, who.source_prompt, who.target_prompts, controls=method.controls, seed=who.seed,
        steps=settings.steps, guidance_scale=settings.guidance_scale, progress=False,
    )  # fmt: skip
    return as_arrays(out.images)


def text_to_image(sd: masa.StableDiffusion, who: Individual, settings: Settings) -> np.ndarray:
    """The source's prompt alone, uint8 (1, h, w, 3)."""
    out = masa.sample(
        sd, who.source_prompt, seed=who.seed, steps=settings.steps, guidance_scale=settings.guidance_scale,
        progress=False,
    )  # fmt: skip
    return as_arrays(out.images)


def round_trip(sd: masa.StableDiffusion, picture: np.ndarray) -> np.ndarray:
    """Through the autoencoder and back, uint8 (1, h, w, 3)."""
    return as_arrays(sd.decode_latents(sd.encode_image(picture)))


def as_arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
