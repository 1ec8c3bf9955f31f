"""Figures of what happened inside a run; needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masa.controls.record import SELF
from masa.errors import MasaError
from masa.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 2.4  # of one panel, in inches


def word_maps(result: Result, words: Sequence[str] | None = None, control: int | None = None) -> Figure:
    """Where each word looks: its cross-attention as heat over every picture, one row each, one column per word.

    result: of a run with RecordAttention(words=..). words: some of the recorded ones, by default all. control: the
    recorder's place in the list of controls, by default the first. Each map is divided by its maximum.
    Returns a matplotlib figure. MasaError where nothing was recorded. 2208.01626, figure 4; DAAM (2210.04885).
    """
    maps = {name: m for name, m in _recorded(result, control).items() if m.ndim == 3}
    chosen = tuple(maps) if words is None else tuple(words)
    missing = [word for word in chosen if word not in maps]
    if missing or not chosen:
        raise MasaError(
            f"no map was recorded of {', '.join(map(repr, missing)) or 'any word'}; recorded are: "
            f"{', '.join(map(repr, maps)) or 'none'}; run with RecordAttention(words=[..])"
        )
    figure, axes = _panels(len(result.images), len(chosen), result)
    for i, picture in enumerate(result.images):
        for j, word in enumerate(chosen):
            heat = maps[word][i]
            axes[i][j].imshow(picture)
            if heat.any():  # a prompt without the word has no map
                axes[i][j].imshow(_enlarge(heat / heat.max(), picture), cmap="inferno", alpha=0.6)
            if i == 0:
                axes[i][j].set_title(word)
    return figure


def self_attention_components(result: Result, components: int = 3, control: int | None = None) -> Figure:
    """The main components of self-attention, one row per picture: parts that attend alike have like brightness.

    result: of a run with RecordAttention(self_attention=True). components: how many, 1 or more; the leading left
    singular vectors of the map, its mean over queries removed. control: as in `word_maps`. 2208.01626.
    """
    recorded = _recorded(result, control).get(SELF)
    if recorded is None:
        raise MasaError("no self-attention was recorded; run with RecordAttention(self_attention=True)")
    positions = recorded.shape[1] * recorded.shape[2]
    if not 1 <= components <= positions:
        raise MasaError(f"components is {components}; expected a number from 1 to {positions}")
    figure, axes = _panels(len(result.images), 1 + components, result)
    for i, picture in enumerate(result.images):
        axes[i][0].imshow(picture)
        found = principal_components(recorded[i].flatten(2).flatten(0, 1), components)
        for j in range(components):
            axes[i][1 + j].imshow(_enlarge(found[:, j].unflatten(0, recorded.shape[1:3]), picture), cmap="viridis")
            if i == 0:
                axes[i][1 + j].set_title(f"component {j + 1}")
    return figure


def masks(result: Result, control: int | None = None, steps: Sequence[int] | None = None) -> Figure:
    """The masks that a control used, outside them darkened: one row per picture, one column per step.

    control: its place in the list of controls, by default the first that used masks. steps: by default up to six,
    evenly spread. MasaError where no masks were used. MasaCtrl (2304.08465), figure 5.
    """
    used = _of_control(result.masks, control, "masks were used; run with MasaCtrl(mask=..) or LocalBlend")
    if steps is None:
        known = sorted(used)
        count = min(6, len(known))
        steps = [known[round(n * (len(known) - 1) / max(1, count - 1))] for n in range(count)]
    unknown = [step for step in steps if step not in used]
    if unknown or not steps:
        raise MasaError(f"no masks in steps {unknown}; there are some in steps {sorted(used)}")
    figure, axes = _panels(len(result.images), len(steps), result)
    for i, picture in enumerate(result.images):
        for j, step in enumerate(steps):
            axes[i][j].imshow(picture)
            # Nearest, as the control reads it: smooth edges would show what was not there.
            outside = 1.0 - _enlarge(used[step][i], picture, mode="nearest")
            axes[i][j].imshow(0.0 * outside, cmap="gray", alpha=0.75 * outside)
            if i == 0:
                axes[i][j].set_title(f"step {step}")
    return figure


def principal_components(rows: Tensor, components: int) -> Tensor:
    """The leading left singular vectors (n, components) of rows (n, features) less their mean.

    Signs are such that the entry of largest magnitude is positive.
    """
    centred = rows.float() - rows.float().mean(0)
    vectors = torch.linalg.svd(centred, full_matrices=False).U[:, :components]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _recorded(result: Result, control: int | None) -> Mapping[str, Tensor]:
    return _of_control(result.attention, control, "attention was recorded; run with RecordAttention(..)")


def _of_control(kept: Mapping[int, Mapping[Any, Tensor]], control: int | None, otherwise: str) -> Mapping[Any, Tensor]:
    """What the named control kept, by default the first that kept anything."""
    chosen = min(kept, default=None) if control is None else control
    if chosen is None or chosen not in kept:
        where = "" if control is None else f"by control {control}, "
        raise MasaError(f"{where}no {otherwise}")
    return kept[chosen]


def _panels(rows: int, columns: int, result: Result) -> tuple[Figure, Any]:
    """A figure and its axes [row][column], without ticks, each row under its prompt."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MasaError("plots need matplotlib: pip install 'masa[plots]'") from error
    # Not pyplot: nothing is kept open behind the caller's back, and no display is needed.
    figure = Figure(figsize=(SIDE * columns, SIDE * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, label in enumerate(result.labels):
        axes[i][0].set_ylabel(label, fontsize="small", wrap=True)
        for axis in axes[i]:
            axis.set_xticks([])
            axis.set_yticks([])
    return figure, axes


def _enlarge(image: Tensor, picture: Image.Image, mode: str = "bicubic") -> np.ndarray:
    """(h, w) -> (height, width) of the picture."""
    return F.interpolate(image[None, None].float(), size=(picture.height, picture.width), mode=mode)[0, 0].numpy()
