"""What bench_edit.py compares: the ways to run an edit, and the cases that each of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from call_timer import Kind, Probe
from torch import Tensor

import masa
from masa.models.tokenizer import Tokenizer

GUIDANCE = 7.5
SOURCE = "a photo of an astronaut"  # of synthesis; a picture is inverted with the empty prompt, as published
TARGETS = tuple(
    f"a photo of an astronaut {doing}"
    for doing in (
        *("waving a hand", "who laughs", "in profile", "wearing a helmet"),
        *("with crossed arms", "seen from behind", "looking up", "on the moon"),
    )
)


class Flow(Protocol):
    """One way to do it."""

    def probes(self) -> tuple[Probe, ...]:
        """The UNet, and the autoencoder's two halves."""
        ...

    def case(self, name: str, picture: np.ndarray) -> Callable[[], object]:
        """The run of one of CASES. What it starts from, an inverted picture or a recorded source, is made here."""
        ...


@dataclass(frozen=True)
class Plan:
    """How to make a flow."""

    flow: str
    dtype: str

    def build(self, folder: Path, device: str, steps: int) -> Flow:
        return FLOWS[self.flow](folder, device, getattr(torch, self.dtype), steps)


class MasaFlow:
    """The library's own calls."""

    offload = False

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, steps: int) -> None:
        self.sd = masa.load(folder, device=device, dtype=dtype, offload=self.offload, progress=False)
        self.steps = steps

    def probes(self) -> tuple[Probe, ...]:
        def kind(x: Tensor, timestep: int, context: Tensor, edits: Any = None, retire: Any = None, **_: Any) -> Kind:
            return Kind("unet", len(context), len(edits or {}))

        def blank(
            last: Any, x: Tensor, timestep: int, context: Tensor, edits: Any = None, retire: Any = None, **_: Any
        ) -> Any:
            _, tape = last
            return x.new_zeros(len(context if retire is None else retire.staying), *x.shape[1:]), tape

        return (
            Probe(self.sd.unet, "forward", kind, blank),
            Probe(self.sd.vae, "encode", _encoding, _the_same),
            Probe(self.sd.vae, "decode", _decoding, _the_same),
        )

    def case(self, name: str, picture: np.ndarray) -> Callable[[], object]:
        if name == "synthesis":
            return self.synthesise
        if name.startswith("one more target"):
            trajectory = masa.invert(self.sd, picture, steps=self.steps, progress=False)
            if name == CACHED:
                cache = masa.record(self.sd, trajectory=trajectory, guidance_scale=GUIDANCE, progress=False)
                return lambda: masa.sample(self.sd, target=TARGETS[0], cache=cache, progress=False)
            return lambda: masa.sample(
                self.sd, target=TARGETS[0], trajectory=trajectory, guidance_scale=GUIDANCE, progress=False
            )
        return lambda: self.edit(picture, TARGETS if name == "edit, 8 targets" else TARGETS[:1])

    def edit(self, picture: np.ndarray, targets: Sequence[str], pin_source: bool = True) -> masa.Result:
        return masa.edit(
            self.sd,
            picture,
            targets,
            steps=self.steps,
            guidance_scale=GUIDANCE,
            pin_source=pin_source,
            progress=False,
        )

    def synthesise(self) -> masa.Result:
        return masa.sample(
            self.sd, SOURCE, TARGETS[0], steps=self.steps, guidance_scale=GUIDANCE, seed=0, progress=False
        )


class OffloadedMasa(MasaFlow):
    """The same with `offload=True`."""

    offload = True


class CompiledMasa(MasaFlow):
    """The same with `sd.compile()`; what the compiler takes falls into the warm-up."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, steps: int, compiler: str = "inductor") -> None:
        super().__init__(folder, device, dtype, steps)
        self.sd = self.sd.compile(compiler=compiler)


class DiffusersFlow:
    """diffusers with the published loops; style and memory layout are the subclass's."""

    style: Any
    channels_last: bool

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, steps: int) -> None:
        from published_flow import PublishedFlow  # here: diffusers would count to the memory of masa's flows

        self.flow = PublishedFlow(
            folder,
            Tokenizer.clip(),
            device=device,
            dtype=dtype,
            style=self.style,
            channels_last=self.channels_last,
            steps=steps,
            guidance_scale=GUIDANCE,
        )

    def probes(self) -> tuple[Probe, ...]:
        def kind(x: Tensor, timestep: int, encoder_hidden_states: Tensor) -> Kind:
            return Kind("unet", len(x), self.flow.editor.edited)

        def blank(last: Any, x: Tensor, timestep: int, encoder_hidden_states: Tensor) -> Any:
            return SimpleNamespace(sample=torch.zeros_like(x))

        return (
            Probe(self.flow.unet, "forward", kind, blank),
            Probe(self.flow.vae, "encode", _encoding, _the_same),
            Probe(self.flow.vae, "decode", _decoding, _the_same),
        )

    def case(self, name: str, picture: np.ndarray) -> Callable[[], object]:
        x = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5) - 1
        if name.startswith("edit"):
            return lambda: self.flow.edit(x, TARGETS if name == "edit, 8 targets" else TARGETS[:1])
        noise = torch.randn(1, 4, *(side // 8 for side in x.shape[2:]), generator=torch.Generator().manual_seed(0))
        start = noise.to(self.flow.device)  # also for an inverted picture: timing does not care
        if name == "synthesis":
            return lambda: self.flow.synthesise([SOURCE, TARGETS[0]], start)
        return lambda: self.flow.more_targets(start, TARGETS[:1])


class Published(DiffusersFlow):
    """The published hooks: einsum, and probabilities in memory."""

    style, channels_last = "hooks", False


class DiffusersBest(DiffusersFlow):
    """The same flow at diffusers' best: scaled_dot_product_attention, and convolutions in channels_last."""

    style, channels_last = "sdpa", True


FLOWS: dict[str, Callable[[Path, str, torch.dtype, int], Flow]] = {
    "masa": MasaFlow,
    "masa compiled": CompiledMasa,
    "masa offloaded": OffloadedMasa,
    "published": Published,
    "diffusers sdpa": DiffusersBest,
}
CACHED = "one more target, source recorded"  # the peers keep nothing of a source, and run it again
CASES = ("edit", "one more target", CACHED, "synthesis", "edit, 8 targets")


def _encoding(pictures: Tensor) -> Kind:
    return Kind("encoder", len(pictures))


def _decoding(latents: Tensor) -> Kind:
    return Kind("decoder", len(latents))


def _the_same(last: Any, inputs: Tensor) -> Any:
    """The answer to other inputs of the same shape: all calls of a kind are."""
    return last


def photograph(side: int) -> np.ndarray:
    """scikit-image's astronaut, (side, side, 3) bytes."""
    from skimage.data import astronaut
    from skimage.transform import resize

    picture = astronaut()
    return picture if side == len(picture) else (resize(picture, (side, side)) * 255).astype(np.uint8)
