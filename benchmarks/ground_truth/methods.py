"""The methods compared, as values: how each makes its edits of one individual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation

import masa
from masa.controls.base import Control
from masa.weights.demo.world import POSES, Pose

from .cases import Individual

PAPER_STEPS, PAPER_START = 50, 4  # MasaCtrl's S of its steps
STRENGTHS = (0.5, 0.8)
VARIANTS = ("", ", free source", ", word masks", ", union")
STRESS = 2.0  # Prompt-to-Prompt's factor on the pose's word
# Of null-text, at each step: ten inner ones, forward, again, and backward. One row alone and its gradients are slow:
# the time of this many rows in a batch, measured.
INNER_ROWS = 100

# What a control must know of one edit: (individual, target pose, side of the picture in pixels) -> controls.
PerEdit = Callable[[Individual, Pose, int], tuple[Control, ...]]


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
class Drawing:
    """Each target's pose is drawn. weight, tau, adapter: of masa.T2IAdapter, the last its path."""

    weight: float = 1.0
    tau: float = 1.0
    adapter: str = "demo"

    def control(self, who: Individual, size: int) -> masa.T2IAdapter:
        sticks = [who.stick(pose, size) for pose in who.target_poses]
        return masa.T2IAdapter(self.adapter, target=sticks, weight=self.weight, tau=self.tau)


@dataclass(frozen=True)
class Method:
    """One way to edit. inversion: masa.invert's method; strength: SDEdit's instead, and no inversion.

    per_edit: controls that differ from target to target, each of which then runs alone; `controls` for all.
    described: the inversion knows the source's prompt. pin_source: as in masa.sample. drawing: the poses are drawn.
    worded: the prompt names the pose. guidance_scale: its own instead of the run's.
    """

    controls: tuple[Control, ...] = ()
    per_edit: PerEdit | None = None
    inversion: str = "ddim"
    described: bool = True
    pin_source: bool = True
    strength: float | None = None
    drawing: Drawing | None = None
    worded: bool = True
    guidance_scale: float | None = None

    @property
    def trajectory(self) -> tuple[str, bool] | None:
        """What tells its inversion from others'; methods of equal ones share it. None without an inversion."""
        return None if self.strength is not None else (self.inversion, self.described)

    def rows(self, steps: int, targets: int, real: bool) -> float:
        """At most how many rows the UNet computes for one individual's edits, without the inversion."""
        if self.strength is not None:
            return 2 * targets * round(self.strength * steps)
        controlled = bool(self.controls) or self.per_edit is not None
        sources = 2 if controlled or not (real and self.pin_source) else 0
        share = 38 / 50 if self.inversion == "edit-friendly" else 1.0
        return steps * share * (2 * targets + sources * (targets if self.per_edit else 1))


def inversion_rows(inversion: str, steps: int) -> float:
    """How many rows an inversion computes, null-text's fitting in rows' time."""
    return steps * (1 + (INNER_ROWS if inversion == "null-text" else 0))


def masactrl(subject: str, start_step: int, start_layer: int, variant: str = "") -> tuple[str, Method]:
    """MasaCtrl's name and method at one S and L, in one of VARIANTS."""
    mask = masa.WordMasks(subject, subject) if variant == ", word masks" else None
    control = masa.MasaCtrl(start_step, start_layer, mask=mask, union=variant == ", union")
    name = f"MasaCtrl S={start_step} L={start_layer}{variant}"
    return name, Method((control,), pin_source=variant != ", free source")


def prompt_to_prompt(
    subject: str, reweight: dict[str | int, float] | None = None, local_blend: masa.LocalBlend | None = None
) -> masa.PromptToPrompt:
    """Swaps the pose's word; where poses have unequal numbers of words, aligns them instead."""
    swap = len({len(pose.split()) for pose in POSES[subject]}) == 1
    return masa.PromptToPrompt(
        "replace" if swap else "refine",
        reweight=reweight or {},
        self_replace_tokens=None,  # the latents here are smaller than those that 32*32 was published for
        local_blend=local_blend,
    )


def stressed_pose(who: Individual, pose: Pose, size: int) -> tuple[Control, ...]:
    """Prompt-to-Prompt that also makes the pose's word weigh more."""
    assert isinstance(pose, str)
    return (prompt_to_prompt(who.appearance.subject, {pose: STRESS}),)


def true_mask(who: Individual, pose: Pose, size: int) -> tuple[Control, ...]:
    """Blended Latent Diffusion in the renderer's own mask: where the subject is before the edit, or is after it.

    No user has one so good. Three pixels wider, as far as smooth edges reach.
    """
    subject = who.mask(who.source_pose, size) | who.mask(pose, size)
    return (masa.BlendedLatents(binary_dilation(subject, iterations=3).astype(np.float32)),)


def core_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """The comparison that the claims rest on."""
    return {
        "fixed seed": Method(),
        **{f"SDEdit {strength}": Method(strength=strength) for strength in STRENGTHS},
        "Prompt-to-Prompt": Method((prompt_to_prompt(subject),)),
        "Plug-and-Play": Method((masa.PlugAndPlay(),), described=False),
        **dict([masactrl(subject, settings.start_step, settings.start_layer)]),
    }


def further_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """MasaCtrl's variants and the paper's setting, variants of Prompt-to-Prompt, and what needs or keeps more."""
    S, L = settings.start_step, settings.start_layer
    name, _ = masactrl(subject, S, L)
    paper = dict([masactrl(subject, settings.paper_start, 10)])
    return {
        **({} if name in paper else paper),
        **dict(masactrl(subject, S, L, variant) for variant in VARIANTS[1:]),
        f"Prompt-to-Prompt, pose reweighted by {STRESS:g}": Method(per_edit=stressed_pose),
        "Prompt-to-Prompt, LocalBlend": Method((prompt_to_prompt(subject, None, masa.LocalBlend(subject, subject)),)),
        f"StyleTransfer S={S} L={L}": Method((masa.StyleTransfer(S, L),)),
        "Blended Latent Diffusion, true mask": Method(per_edit=true_mask),
    }


def by_inversion(inversion: str, settings: Settings, subject: str, pin_source: bool) -> dict[str, Method]:
    """An inversion with the prompt alone, with MasaCtrl and with Prompt-to-Prompt."""
    name, plain = masactrl(subject, settings.start_step, settings.start_layer)
    controls = {"": (), f", {name}": plain.controls, ", Prompt-to-Prompt": (prompt_to_prompt(subject),)}
    return {
        inversion + suffix: Method(chosen, inversion=inversion, pin_source=pin_source)
        for suffix, chosen in controls.items()
    }


def inversion_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """The quick ones; negative-prompt without pinning, which would hide how well it retraces the source."""
    return by_inversion("negative-prompt", settings, subject, False) | by_inversion(
        "edit-friendly", settings, subject, True
    )


def null_text_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """The slow one: its fitting, done once for the three, costs more than all else."""
    return by_inversion("null-text", settings, subject, False)


def drawn_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """MasaCtrl with the pose drawn: alone, and named too; and the drawing without MasaCtrl."""
    name, plain = masactrl(subject, settings.start_step, settings.start_layer)
    return {
        f"{name}, drawn pose": replace(plain, drawing=Drawing(), worded=False),
        f"{name}, drawn and named pose": replace(plain, drawing=Drawing()),
        "fixed seed, drawn and named pose": Method(drawing=Drawing()),
    }


@dataclass(frozen=True)
class Group:
    """Methods that are run on equally many individuals: of edited pictures, and of synthesised pairs."""

    methods: Callable[[Settings, str], dict[str, Method]]
    individuals: int
    pairs: int


GROUPS = {
    "core": Group(core_methods, 67, 30),
    "further": Group(further_methods, 24, 12),
    "drawn": Group(drawn_methods, 67, 0),
    "inversions": Group(inversion_methods, 24, 0),
    "null-text": Group(null_text_methods, 4, 0),
}


def real_methods(settings: Settings, subject: str) -> dict[str, Method]:
    """All methods that edit a given picture, in the table's order."""
    return {name: method for group in GROUPS.values() for name, method in group.methods(settings, subject).items()}


def fits_pairs(method: Method) -> bool:
    """Whether it serves synthesis, source and targets from one noise: it needs no picture, nor its truth."""
    plain = method.inversion == "ddim" and method.pin_source and method.drawing is None
    return method.trajectory is not None and plain and not method.per_edit


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
            return as_arrays(out.images)
        size, scale = len(self.source), settings.guidance_scale
        if method.guidance_scale is not None:
            scale = method.guidance_scale
        drawn = () if method.drawing is None else (method.drawing.control(who, size),)
        prompts = [who.prompt(pose if method.worded else None) for pose in who.target_poses]
        runs = [(prompts, (*method.controls, *drawn))]
        if method.per_edit is not None:
            runs = [([who.prompt(p)], (*method.controls, *method.per_edit(who, p, size))) for p in who.target_poses]
        pictures: list[Image.Image] = []
        for prompts, controls in runs:
            out = masa.sample(
                self.sd, target=prompts, controls=controls, pin_source=method.pin_source,
                trajectory=self._trajectory(method), guidance_scale=scale, seed=who.seed, progress=False,
            )  # fmt: skip
            pictures += out.images[1:] if pictures else out.images  # every run gives the source back first
        return as_arrays(pictures)

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
