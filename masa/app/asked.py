"""What a user of the page asks for, as one frozen value, and the library's values that it means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from masa.controls.base import Control
from masa.controls.controlnet import ControlNet
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks, WordMasks
from masa.controls.plug_and_play import PlugAndPlay
from masa.controls.prompt_to_prompt import PromptToPrompt
from masa.controls.style import StyleTransfer
from masa.controls.t2i_adapter import T2IAdapter
from masa.errors import MasaError
from masa.io.pictures import load_image, to_pil
from masa.pipeline import StableDiffusion
from masa.settings import describe
from masa.workflows import demo

FIXED, MASACTRL, MASKED = "Fixed seed", "MasaCtrl", "MasaCtrl, masked"
P2P, PNP, STYLE = "Prompt-to-Prompt", "Plug-and-Play", "Style"
METHODS = (FIXED, MASACTRL, MASKED, P2P, PNP, STYLE)
BY_WORD, PAINTED = "by word", "painted"
NO_LAYOUT = "none"
INVERTERS = ("ddim", "negative-prompt", "null-text", "edit-friendly")
MOST_TARGETS = 8
MOST_PIXELS = 1024 * 1024
MOST_STEPS = 200


@dataclass(frozen=True)
class Defaults:
    """What suits a model: steps, guidance, MasaCtrl's S and L, and a side's pixels."""

    steps: int = 50
    guidance: float = 7.5
    start_step: int = 4
    start_layer: int = 10
    size: int = 512

    @classmethod
    def of(cls, sd: StableDiffusion) -> Defaults:
        if sd.origin.checkpoint != "demo":
            return cls(size=sd.config.image_size)
        control = demo.CONTROL
        return cls(demo.STEPS, demo.GUIDANCE, control.start_step, control.start_layer, sd.config.image_size)


@dataclass(frozen=True)
class Adapter:
    """A T2I-Adapter or ControlNet that the page was started with."""

    name: str
    kind: str  # "T2I-Adapter" or "ControlNet"
    path: str


@dataclass(frozen=True, eq=False)
class Asked:
    """All that the page's controls say when Run is pressed.

    targets: one prompt a line. picture: the one to edit, cropped; None synthesises the source. mask_source,
    mask_target: painted, white is the subject; where the target has none the source's serves. layout: the condition
    picture. seed: None draws one.
    """

    source: str = ""
    targets: str = ""
    picture: Image.Image | None = None
    inverter: str = "ddim"
    methods: tuple[str, ...] = (MASACTRL,)
    start_step: int = 4
    start_layer: int = 10
    mask: str = BY_WORD
    word_source: str = ""
    word_target: str = ""
    threshold: float = 0.1
    mask_source: Image.Image | None = None
    mask_target: Image.Image | None = None
    p2p_edit: str = "refine"
    p2p_cross: float = 0.8
    p2p_self: float = 0.4
    pnp_features: float = 0.8
    pnp_attention: float = 0.5
    adapter: str = NO_LAYOUT
    layout: Image.Image | None = None
    layout_weight: float = 1.0
    layout_until: float = 1.0
    steps: int = 50
    guidance: float = 7.5
    negative: str = ""
    seed: int | None = None
    width: int = 512
    height: int = 512
    sampler: str = "ddim"
    reuse: bool = True
    keep_maps: bool = True

    @property
    def prompts(self) -> tuple[str, ...]:
        """The targets' prompts."""
        return tuple(line.strip() for line in self.targets.splitlines() if line.strip())

    @property
    def fitted(self) -> Image.Image | None:
        """The picture at the run's size, cropped in the middle where its shape is another."""
        if self.picture is None:
            return None
        return to_pil(load_image(self.picture, short_side=self.height, height=self.height, width=self.width))[0]

    def check(self) -> None:
        """MasaError for what no run can do, before any work."""
        if len(self.prompts) > MOST_TARGETS:
            raise MasaError(f"there are {len(self.prompts)} target prompts; give {MOST_TARGETS} at most, one a line")
        if self.picture is not None and not self.prompts:
            raise MasaError("editing a picture needs a target prompt; say what the picture is to become")
        if self.picture is None and not self.source:
            raise MasaError("there is no source prompt; describe the picture to be made first")
        if self.prompts and not self.methods:
            raise MasaError("no method is chosen; choose at least one")
        if self.width * self.height > MOST_PIXELS:
            raise MasaError(f"{self.width}x{self.height} pixels are too many; stay within {MOST_PIXELS:,}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise MasaError(f"steps is {self.steps}; expected 1 to {MOST_STEPS}")

    def controls(self, adapters: Sequence[Adapter]) -> dict[str, list[Control]]:
        """The chosen methods' controls, by name, each with the layout. MasaError for what is missing."""
        layout = self._layout(adapters)
        if not self.prompts:
            return {"": layout}
        return {name: [*self._method(name), *layout] for name in METHODS if name in self.methods}

    def _method(self, name: str) -> list[Control]:
        if name == MASACTRL:
            return [MasaCtrl(self.start_step, self.start_layer)]
        if name == MASKED:
            return [MasaCtrl(self.start_step, self.start_layer, mask=self._masks())]
        if name == P2P:
            edit: Any = self.p2p_edit
            return [
                PromptToPrompt(
                    edit,
                    cross_replace_steps=self.p2p_cross,
                    self_replace_steps=self.p2p_self,
                    self_replace_tokens=None,
                )
            ]
        if name == PNP:
            return [PlugAndPlay(self.pnp_features, self.pnp_attention)]
        return [StyleTransfer(self.start_step, self.start_layer)] if name == STYLE else []

    def _masks(self) -> WordMasks | GivenMasks:
        if self.mask == PAINTED:
            if self.mask_source is None:
                raise MasaError(f"{MASKED} with a painted mask: nothing is painted; brush over the subject")
            target = self.mask_source if self.mask_target is None else self.mask_target
            return GivenMasks(self.fit_mask(self.mask_source), self.fit_mask(target))
        if not self.word_source or not self.word_target:
            raise MasaError(f"{MASKED} by word: a word is missing; name the subject as both prompts do, such as cat")
        return WordMasks(self.word_source, self.word_target, self.threshold)

    def fit_mask(self, mask: Image.Image) -> Image.Image:
        """A mask as the picture that it was painted on is fitted: cropped in the middle."""
        fitted = load_image(mask.convert("RGB"), short_side=self.height, height=self.height, width=self.width)
        return to_pil(fitted)[0].convert("L").point(lambda value: 255 if value > 127 else 0)

    def _layout(self, adapters: Sequence[Adapter]) -> list[Control]:
        if self.adapter == NO_LAYOUT:
            return []
        found = next((adapter for adapter in adapters if adapter.name == self.adapter), None)
        if found is None:
            raise MasaError(f"there is no adapter {self.adapter!r}; start the page with --t2i-adapter or --controlnet")
        if self.layout is None:
            raise MasaError(f"{found.name} wants a layout; draw one, or give a picture")
        shown: dict[str, Any] = {"target": self.layout} if self.prompts else {"source": self.layout}
        if found.kind == "ControlNet":
            return [ControlNet(found.path, **shown, scale=self.layout_weight, end=self.layout_until)]
        return [T2IAdapter(found.path, **shown, weight=self.layout_weight, tau=self.layout_until)]

    def inversion_key(self) -> str:
        """What an inverted picture depends on."""
        fitted = self.fitted
        assert fitted is not None
        fits = self.guidance if self.inverter == "null-text" else None
        seed = self.seed if self.inverter == "edit-friendly" else None
        return _digest(
            picture_digest(fitted), self.source, self.inverter, self.steps, fits, seed, self.width, self.height
        )

    def source_key(self, seed: int, methods: Mapping[str, Sequence[Control]]) -> str:
        """What a recorded source depends on, and what was recorded of it: all but the targets' prompts."""
        start = self.inversion_key() if self.picture is not None else [self.source, self.steps, self.width, self.height]
        described = {name: describe(list(controls)) for name, controls in methods.items()}
        return _digest(start, seed, self.guidance, self.negative, self.sampler, described)


def picture_digest(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes() + repr((picture.mode, picture.size)).encode()).hexdigest()


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
