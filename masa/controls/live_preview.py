"""Pictures of a run while it goes on: what each step predicts, in a few colours or through TAESD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from masa.config import PreviewFactors
from masa.controls.base import ActiveControl, Run
from masa.errors import MasaError
from masa.io.pictures import to_pil
from masa.models.taesd import TinyVAE
from masa.runtime.adapters import AdapterFile, read_tiny_vae

# (step, pictures as large as the run's, source first)
Show = Callable[[int, list[Image.Image]], object]

# Red, green and blue of a unit in each of Stable Diffusion v1's latent channels, and of none.
SD_V1_FACTORS: PreviewFactors = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
    (0.0, 0.0, 0.0),
)


@dataclass(frozen=True, eq=False)
class LivePreview:
    """Show what steps predict the pictures to be, while a run goes on. It changes nothing of the result.

    show(step, pictures): is given PIL pictures, source first, in the thread of the run. decoder: "linear", which takes
    no time, each position's colours from its latents alone; or the path of TAESD's file. every: show each so many
    steps, and the last. It stands in a list of controls, the default one beside it (controls=[masa.MasaCtrl(), ..]),
    and is left out of settings, reruns, and the places that results number controls by.

    MasaError for other decoders, or a `show` that cannot be called. x0 of the guided eps: DDIM (2010.02502), eq. 9.
    """

    show: Show
    decoder: str | Path = "linear"
    every: int = 1

    needs_targets: ClassVar[bool] = False
    only_looks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.show):
            raise MasaError(f"LivePreview show is {self.show!r}; expected a function of (step, pictures)")
        if not isinstance(self.decoder, str | Path):
            raise MasaError(f"LivePreview decoder is {self.decoder!r}; expected 'linear' or the path of TAESD's file")
        if not isinstance(self.every, Integral) or isinstance(self.every, bool) or self.every < 1:
            raise MasaError(f"LivePreview every is {self.every!r}; expected a number of steps, 1 or more")

    def begin(self, run: Run) -> ActiveControl:
        if self.decoder == "linear":
            return _Active(self, _linear(run.preview or SD_V1_FACTORS, run), run)
        vae = AdapterFile(self.decoder, None, read_tiny_vae).load(run.unet, run.dtype, run.device)
        return _Active(self, _Tiny(vae), run)


class _Active(ActiveControl):
    name = "LivePreview"

    def __init__(self, control: LivePreview, decode: Callable[[Tensor], list[Image.Image]], run: Run) -> None:
        self.control = control
        self.decode = decode
        self.first, self.last = run.first_step, run.steps - 1

    def see_prediction(self, step: int, x0: Tensor) -> None:
        if (step - self.first) % self.control.every == 0 or step == self.last:
            self.control.show(step, self.decode(x0))


class _Tiny:
    """Latents (n, 4, h, w) -> n pictures, one after another."""

    def __init__(self, vae: TinyVAE) -> None:
        self.vae = vae
        self.like = next(vae.parameters())

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        with torch.no_grad():
            return [to_pil(self.vae.decode(z[None].to(self.like)))[0] for z in latents]


def _linear(factors: PreviewFactors, run: Run) -> Callable[[Tensor], list[Image.Image]]:
    """Latents (n, 4, h, w) -> n pictures, by factors (channels + 1, 3)."""
    if len(factors) != run.unet.in_channels + 1:
        raise MasaError(
            f"LivePreview knows the colours of {len(factors) - 1} latent channels, and this model has "
            f"{run.unet.in_channels}; give decoder= TAESD's file"
        )
    colours = torch.tensor(factors, device=run.device)
    size = (8 * run.grid[1], 8 * run.grid[0])

    def decode(latents: Tensor) -> list[Image.Image]:
        rgb = torch.einsum("nchw,cr->nrhw", latents.float(), colours[:-1]) + colours[-1][:, None, None]
        return [picture.resize(size, Image.Resampling.BICUBIC) for picture in to_pil(rgb)]

    return decode
