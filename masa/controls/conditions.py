"""Condition pictures: whose they are, and how they are brought to a run's size."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masa.branches import SOURCE
from masa.controls.base import FileControl, Run
from masa.edits import Grid
from masa.errors import MasaError
from masa.io.pictures import ImageLike, flatten, open_picture
from masa.runtime.adapters import AdapterFile

# A path, PIL picture, uint8 array (h, w) or (h, w, 3), or float tensor (h, w), (1, h, w) or (3, h, w) in [0, 1]; None
# for no condition.
Condition = ImageLike | None

PIXELS = 8  # of a picture's side, per position of the latents
# A share of neighbours that differ a little, above which a picture is shaded (a depth map, a photograph) and not drawn.
SHADED = 0.2
# A share of pixels that are neither near black nor near white, above which a picture is not made of lines.
GREY = 0.2
# The share of a condition that is cut away without a word where its shape is not the run's.
CUT = 0.2


@dataclass(frozen=True, eq=False)
class Conditions:
    """The distinct condition pictures of a run, each (1, 3, 8h, 8w) in [0, 1], and the branches that have one."""

    pictures: tuple[Tensor, ...]
    place: dict[int, int]  # branch -> which of the pictures

    def digest(self, branch: int) -> str:
        """What tells the picture of a branch from others."""
        picture = self.pictures[self.place[branch]]
        return hashlib.sha256(picture.contiguous().numpy().tobytes()).hexdigest()


class PictureControl(FileControl):
    """What the controls share that have a network in a `file`, and a picture for the source and each target.

    One that has neither yet is an adapter for `masa.sample_frames`, which gives each frame its own.
    """

    source: Condition
    target: Condition | Sequence[Condition]
    path: str | Path
    file: AdapterFile[Any]

    @property
    def needs_targets(self) -> bool:
        """Whether a run without targets leaves it nothing to do."""
        return self.source is None

    def of_source(self) -> Any:
        """The same, of the source alone: what an inversion keeps."""
        return replace(self, target=None)  # type: ignore[type-var]

    def kept(self) -> Any:
        """The same with its pictures inside and its file's digest, for settings."""
        source, target = embed(self.source), embed_all(self.target)
        return replace(self, path=str(self.path), sha256=self.file.digest(), source=source, target=target)  # type: ignore[type-var]

    @property
    def is_blank(self) -> bool:
        """Whether its targets have no picture."""
        return not _has_picture(self.target)

    def showing(self, target: Condition | Sequence[Condition]) -> Any:
        """The same with other pictures for the targets, and with the network that is loaded already."""
        other = replace(self, target=target)  # type: ignore[type-var]
        for field in fields(self):  # type: ignore[arg-type]
            if not field.init:
                object.__setattr__(other, field.name, getattr(self, field.name))
        return other


def find_conditions(name: str, source: Condition, target: Condition | Sequence[Condition], run: Run) -> Conditions:
    """The pictures of a run's branches at its size; name: the control's. MasaError for none, and for what is none."""
    if source is None and not _has_picture(target):
        raise MasaError(f"{name} has no condition picture; give target=, source=, or both")
    pictures: list[Tensor] = []
    place: dict[int, int] = {}
    loaded: dict[object, int] = {}
    for branch, picture in by_branch(name, source, target, run).items():
        key = str(picture) if isinstance(picture, str | Path) else id(picture)
        if key not in loaded:
            found = load_condition(name, picture, run.grid)
            same = (i for i, other in enumerate(pictures) if torch.equal(found, other))
            loaded[key] = next(same, len(pictures))
            if loaded[key] == len(pictures):
                pictures.append(found)
        place[branch] = loaded[key]
    return Conditions(tuple(pictures), place)


def by_branch(name: str, source: Condition, target: Condition | Sequence[Condition], run: Run) -> dict[int, ImageLike]:
    """The pictures of the branches that have one. MasaError for a list that does not fit the targets.

    Where the targets are not known yet only the source has one.
    """
    targets = len(run.prompts) - 1 if run.targets_known else 0
    each: list[Condition] = list(target) if isinstance(target, list | tuple) else [target] * targets  # type: ignore[list-item]
    if targets and len(each) != targets:
        raise MasaError(
            f"{name} target has {len(each)} pictures and the run {targets} targets; give one for each, None for none, "
            "or a single picture for all"
        )
    given = {SOURCE: source} | dict(enumerate(each[:targets], 1))
    return {branch: picture for branch, picture in given.items() if picture is not None}


def check_conditions(
    name: str, source: Condition, target: Condition | Sequence[Condition], *, later: bool = False
) -> None:
    """MasaError, when a control is made, for what is no picture, and where there is none.

    later: one without any is a video's, whose frames bring theirs; a run refuses it.
    """
    each = list(target) if isinstance(target, list | tuple) else [target]
    for picture in (source, *each):
        if picture is not None and not isinstance(picture, str | Path | Image.Image | np.ndarray | Tensor):
            raise MasaError(
                f"{name} has a condition of {type(picture).__name__}; expected a path, PIL picture, array or tensor, "
                "None for none, and for targets a list of these"
            )
    if source is None and not _has_picture(target) and not (later and target is None):
        raise MasaError(f"{name} has no condition picture; give target=, source=, or both")


def _has_picture(target: Condition | Sequence[Condition]) -> bool:
    """Whether some target has a picture."""
    each = target if isinstance(target, list | tuple) else [target]
    return any(picture is not None for picture in each)


def load_condition(name: str, picture: ImageLike, grid: Grid) -> Tensor:
    """A picture as (1, 3, 8h, 8w) float32 in [0, 1], for latents (h, w): scaled to cover, cropped in the middle.

    Drawn pictures take the nearest pixel, shaded ones are averaged. Transparent parts are black.
    """
    x = read_picture(name, picture)
    height, width = grid[0] * PIXELS, grid[1] * PIXELS
    if tuple(x.shape[1:]) == (height, width):
        return x[None]
    scale = max(height / x.shape[1], width / x.shape[2])
    rows, columns = min(x.shape[1], round(height / scale)), min(x.shape[2], round(width / scale))
    lost = 1.0 - rows * columns / (x.shape[1] * x.shape[2])
    if lost > CUT:
        warnings.warn(
            f"a condition of {name} has {x.shape[2]}x{x.shape[1]} pixels and the run {width}x{height}: {lost:.0%} of "
            "it are cut away at its edges; give it the run's shape",
            stacklevel=2,
        )
    top, left = (x.shape[1] - rows) // 2, (x.shape[2] - columns) // 2
    x = x[None, :, top : top + rows, left : left + columns]
    if is_shaded(x):
        return F.interpolate(x, (height, width), mode="bilinear", antialias=True).clamp(0.0, 1.0)
    return F.interpolate(x, (height, width), mode="nearest-exact")


def read_picture(name: str, picture: ImageLike) -> Tensor:
    """A picture as (3, h, w) float32 in [0, 1], at its own size."""
    if isinstance(picture, str | Path):
        picture = open_picture(picture, "black")
    elif isinstance(picture, Image.Image):
        picture = flatten(picture, "black")
    channels_last = not isinstance(picture, Tensor) or picture.dtype == torch.uint8
    x = picture if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture))
    x = x.detach().cpu()
    x = x[0] if x.ndim == 4 and len(x) == 1 else x
    if channels_last and x.ndim == 3:
        x = x.permute(2, 0, 1)
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or len(x) not in (1, 3) or not x.numel():
        raise MasaError(
            f"{name} has a condition of shape {tuple(x.shape)}; expected a uint8 array (h, w) or (h, w, 3), or a "
            "float tensor (h, w), (1, h, w) or (3, h, w) in [0, 1]"
        )
    x = x.float() / 255.0 if x.dtype == torch.uint8 else x.float()
    if not bool(((x >= 0.0) & (x <= 1.0)).all()):
        raise MasaError(
            f"{name} has a condition with values from {x.min():.4g} to {x.max():.4g}; expected [0, 1], black is 0 "
            "(of a tensor in [-1, 1], give (x + 1) / 2)"
        )
    return x.expand(3, -1, -1).contiguous()


def embed(picture: Condition) -> Tensor | None:
    """A picture as a tensor that settings keep: uint8 (h, w, 3), or (h, w) where it is grey; tensors as they are."""
    if picture is None or isinstance(picture, Tensor):
        return picture
    if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
        return torch.from_numpy(picture.copy())
    x = (read_picture("a control", picture) * 255.0).round().to(torch.uint8)
    return x[0] if bool((x[0] == x[1]).all() and (x[1] == x[2]).all()) else x.permute(1, 2, 0).contiguous()


def embed_all(target: Condition | Sequence[Condition]) -> Tensor | tuple[Tensor | None, ...] | None:
    """`embed` of one picture, or of a list's."""
    return tuple(map(embed, target)) if isinstance(target, list | tuple) else embed(target)  # type: ignore[arg-type]


def is_shaded(x: Tensor) -> bool:
    """Whether many neighbours in x (1, 3, h, w) differ a little, as in depth maps and photographs."""
    steps = [x.diff(dim=dim).abs().amax(1) for dim in (2, 3)]
    little = torch.cat([((step > 0.0) & (step < 16 / 255)).flatten() for step in steps])
    return bool(little.numel()) and little.float().mean().item() > SHADED


def warn_unless_lines(name: str, pictures: Sequence[Tensor]) -> None:
    """A warning for pictures that are not white lines on black, where a network was trained on those."""
    for x in pictures:
        if ((x > 0.1) & (x < 0.9)).float().mean() > GREY:
            problem = "looks like a photograph; give white lines on black, such as Canny's edges"
        elif x.mean() > 0.5:
            problem = "is mostly white; give white lines on black: is the drawing inverted?"
        else:
            continue
        warnings.warn(f"a condition of {name}, which expects lines, {problem}", stacklevel=2)
