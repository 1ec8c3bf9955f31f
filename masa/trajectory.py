"""A picture's way to noise, as a value and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from masa.io.files import file_digest, load_tensors, save_tensors
from masa.output.notebook import table_html
from masa.schedule import Schedule
from masa.settings import check_kept, restore_schedule

FORMAT = "masa trajectory 1"
Method = Literal["ddim", "negative-prompt", "null-text", "edit-friendly", "noise"]
EDIT_FRIENDLY_ETA = 1.0  # DDIM's, with which the recorded noise is added


def default_skip(method: str, steps: int) -> int:
    """How many of the noisiest steps an edit leaves out by default: 12 of 50 for edit-friendly noise."""
    return steps * 12 // 50 if method == "edit-friendly" else 0


@dataclass(frozen=True, repr=False)
class Trajectory:
    """What an inversion found: everything that sampling needs to lead back to the picture, or to an edit of it.

    latents (steps + 1, 4, h, w), float32 on the CPU: the picture's own first, the noisiest last. prompt: what
    it was inverted with. settings: JSON values that tell how it was made. context (steps, 77, width), float32:
    the unconditional embedding of each denoising step, the noisiest step's first; None where the negative
    prompt's serves. noise (steps, 4, h, w), float32: the noise that each denoising step adds, in the same
    order; None where steps are deterministic. own_schedule: one of a user's class, which settings may not restore.
    """

    latents: Tensor
    prompt: str
    settings: Mapping[str, Any]
    context: Tensor | None = None
    noise: Tensor | None = None
    own_schedule: Schedule | None = None

    def __repr__(self) -> str:
        picture = self.settings.get("image") or "a picture"
        prompt = f", {self.prompt!r}" if self.prompt else ""
        height, width = self.latents.shape[2:]
        latents = f"{self.steps + 1} latents of {width}x{height}"
        return f"Trajectory({picture}{prompt}, {self.method}, {self.steps} steps, {latents})"

    def _repr_html_(self) -> str:
        return f"<code>{escape(repr(self))}</code>" + table_html("settings", self.settings)

    @property
    def steps(self) -> int:
        return len(self.latents) - 1

    @property
    def method(self) -> str:
        """The inversion: "ddim", "negative-prompt", "null-text", "edit-friendly" or "noise"."""
        return str(self.settings["method"])

    @property
    def schedule(self) -> Schedule:
        """The schedule that it was made with."""
        return restore_schedule(self.settings["schedule"]) if self.own_schedule is None else self.own_schedule

    @property
    def eta(self) -> float:
        """DDIM's, with which its own noise is added; 0 without such noise."""
        return 0.0 if self.noise is None else EDIT_FRIENDLY_ETA

    @property
    def draws(self) -> int:
        """How many noises (4, h, w) its inversion took of its seed."""
        return {"noise": 1, "edit-friendly": self.steps}.get(self.method, 0)

    @property
    def source_guidance(self) -> float | None:
        """The guidance that the source must be replayed with; None: the sampling's."""
        # The recorded noise makes up for exactly the prediction that the inversion saw.
        return None if self.noise is None else float(self.settings["guidance_scale"])

    @property
    def skip_steps(self) -> int:
        """How many of the noisiest steps an edit leaves out by default."""
        return default_skip(self.method, self.steps)

    def save(self, path: str | Path) -> None:
        """Write all of it as one safetensors file. MasaError for a schedule that could not be read back."""
        check_kept(schedule=self.schedule)
        metadata = {"format": FORMAT, "prompt": self.prompt, "settings": json.dumps(dict(self.settings))}
        tensors = {"latents": self.latents, "context": self.context, "noise": self.noise}
        save_tensors(path, {name: t for name, t in tensors.items() if t is not None}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` wrote. MasaError for any other file."""
        remedy = "expected a file written by masa.invert(..).save()"
        tensors, metadata = load_tensors(path, FORMAT, "trajectory", remedy)
        origin = {"trajectory": str(path), "trajectory_sha256": file_digest(path)}
        settings = json.loads(metadata["settings"]) | origin
        return cls(tensors["latents"], metadata["prompt"], settings, tensors.get("context"), tensors.get("noise"))
