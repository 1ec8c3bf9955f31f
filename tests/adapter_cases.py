"""Tiny T2I-Adapters and ControlNets by diffusers, their files, and the published loop with their residuals added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import ControlNetModel, T2IAdapter
from published import Oracle
from safetensors.torch import save_file
from torch import Tensor

import masa

SOURCE, TARGETS = "a photo of a sitting cat", ["a photo of a running cat", "a red cat in the snow"]
STEPS = 4
# Float32 rounding, grown over a trajectory and by guidance: a fraction of the latents' standard deviation.
TOLERANCE = 5e-4
# The same of two runs of ours whose rows are batched, or compiled, otherwise: 2e-5 is the most seen.
ROUNDING = 1e-4
USUAL = {"steps": STEPS, "height": 128, "width": 192, "guidance_scale": 5.0, "progress": False}
CPU = torch.device("cpu")


WIDTHS = (32, 64, 64, 64)  # the tiny UNet's


def same(out, ref, tolerance=TOLERANCE):
    error = (out - ref).abs().max() / ref.std()
    assert error < tolerance, f"error {error:.2e} of the latents' standard deviation"


def differs(out, ref, least=20 * TOLERANCE):
    assert (out - ref).abs().max() / ref.std() > least


def run(sd, controls, targets=TARGETS, **settings):
    start = {} if {"latents", "trajectory", "cache"} & {*settings} else {"seed": 3}
    return masa.sample(sd, SOURCE, targets, controls=controls, **(USUAL | start | settings)).latents


def seen_steps(sd, control):
    """The steps of a run in which a control adds anything."""
    from masa.branches import Branches
    from masa.checks import describe_run
    from masa.samplers.base import Levels

    active = control.begin(describe_run(sd, Levels.of_schedule(sd.schedule, STEPS), (SOURCE, "a dog"), (16, 24)))
    x, context, branches = torch.zeros(4, 4, 16, 24), torch.zeros(4, 77, 32), Branches.build(1, guided=True)
    with torch.no_grad():
        return [i for i in range(STEPS) if active.residuals(i, 1, x, context, branches) is not None]


def make_adapter(kind: str, channels: int = 3, seed: int = 0, widths: Sequence[int] = WIDTHS) -> T2IAdapter:
    """kind: "full" or "light"."""
    torch.manual_seed(seed)
    light = kind == "light"
    made = T2IAdapter(
        in_channels=channels,
        channels=list(widths[:-1] if light else widths),  # diffusers' light one has a level more than it is told
        num_res_blocks=4 if light else 2,
        adapter_type=f"{kind}_adapter",
    )
    with torch.no_grad():  # fresh features are faint: what adds them could not be told from what does not
        for parameter in made.parameters():
            parameter.mul_(1.5)
    return made.eval()


def make_controlnet(seed: int = 0, scale: float = 1.0, **changes: object) -> ControlNetModel:
    torch.manual_seed(seed)
    settings = {
        "block_out_channels": WIDTHS,
        "layers_per_block": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    }
    made = ControlNetModel(**(settings | changes))
    with torch.no_grad():  # fresh zero convolutions would add nothing
        for name, parameter in made.named_parameters():
            if name.startswith(
                ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
            ):
                parameter.normal_(0.0, 0.1 * scale)
    return made.eval()


def original_adapter_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers adapter's tensors under the published files' names, as the specification has them."""
    light = not any(name.startswith("adapter.conv_in") for name in state)
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")[1:]
        if "resnets" in parts and light:
            parts[2] = "body"
        elif "resnets" in parts:
            parts = ["body", str(2 * int(parts[1]) + int(parts[3])), *parts[4:]]
        elif parts[0] == "body" and not light:
            parts[1] = str(2 * int(parts[1]))
        renamed[".".join(parts)] = tensor
    return renamed


def in_patches(shown: Tensor, side: int = 64) -> Tensor:
    """A picture (3, h, w) as the published code brings it to a colour adapter: cubic down by 64, nearest back.

    A patch's middle lies between pixels: of the four around it on each axis the cubic takes -3/32, 19/32, 19/32, -3/32.
    """
    cubic = torch.tensor([-3.0, 19.0, 19.0, -3.0]) / 32.0
    blocks = shown.unflatten(2, (-1, side)).unflatten(1, (-1, side))[:, :, 30:34, :, 30:34]
    patches = torch.einsum("cyaxb,a,b->cyx", blocks, cubic, cubic).clamp(0.0, 1.0)
    return patches.repeat_interleave(side, 1).repeat_interleave(side, 2)


def save(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def picture(seed: int, channels: int = 3, size: tuple[int, int] = (128, 192)) -> Tensor:
    """Random white blocks on black, a float tensor (channels, h, w)."""
    blocks = torch.rand(channels, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(seed)) > 0.7
    return blocks.float().repeat_interleave(8, 1).repeat_interleave(8, 2)


# (step, timestep, x of all rows, context of all rows) -> what diffusers' UNet takes beside.
Residuals = Callable[[int, int, Tensor, Tensor], dict[str, object]]


class SteeredOracle(Oracle):
    """The published loop with residuals beside, which see step, rows and prompts."""

    def __init__(self, folder: Path, ids: Callable[[Sequence[str]], Tensor], steps: int) -> None:
        super().__init__(folder, ids)
        self.places = {t: i for i, t in enumerate(self.timesteps(steps))}
        self.residuals: Residuals = lambda *_: {}

    @torch.no_grad()
    def eps(self, x: Tensor, t: int, prompts: Sequence[str], guidance: float, negative: str = "") -> Tensor:
        context = self.context(prompts)
        if guidance > 1:
            x, context = torch.cat([x, x]), torch.cat([self.context([negative] * len(prompts)), context])
        added = self.residuals(self.places[t], t, x, context)
        e = self.unet(x, t, context, **added).sample
        if guidance <= 1:
            return e
        uncond, cond = e.chunk(2)
        return uncond + guidance * (cond - uncond)


def adapter_residuals(
    terms: Sequence[tuple[T2IAdapter, Sequence[Tensor | None], float, int]], halves: int
) -> Residuals:
    """Of adapters with a picture for each branch or None, a weight, and the step at which they end."""

    def residuals(step: int, t: int, x: Tensor, context: Tensor) -> dict[str, object]:
        total: list[Tensor] | None = None
        for adapter, pictures, weight, end in terms:
            if step >= end:
                continue
            shown = next(p for p in pictures if p is not None)
            features = [adapter((shown if p is None else p)[None]) for p in pictures]
            rows = [
                torch.cat([(0.0 if p is None else weight) * f[level] for p, f in zip(pictures, features, strict=True)])
                for level in range(4)
            ]
            doubled = [torch.cat([row] * halves) for row in rows]
            total = doubled if total is None else [a + b for a, b in zip(total, doubled, strict=True)]
        return {} if total is None else {"down_intrablock_additional_residuals": total}

    return residuals


def controlnet_residuals(
    terms: Sequence[tuple[ControlNetModel, Sequence[Tensor | None], float, range]], halves: int
) -> Residuals:
    """Of ControlNets with a hint for each branch or None, a scale, and the steps in which they act."""

    def residuals(step: int, t: int, x: Tensor, context: Tensor) -> dict[str, object]:
        total: list[Tensor] | None = None
        for net, hints, scale, steps in terms:
            if step not in steps:
                continue
            rows = [i for i in range(len(x)) if hints[i % len(hints)] is not None]
            shown = torch.stack([hints[i % len(hints)] for i in rows])
            down, mid = net(x[rows], t, context[rows], shown, conditioning_scale=scale, return_dict=False)
            placed = []
            for r in (*down, mid):
                whole = r.new_zeros(len(x), *r.shape[1:])
                whole[rows] = r
                placed.append(whole)
            total = placed if total is None else [a + b for a, b in zip(total, placed, strict=True)]
        if total is None:
            return {}
        return {"down_block_additional_residuals": tuple(total[:-1]), "mid_block_additional_residual": total[-1]}

    return residuals
