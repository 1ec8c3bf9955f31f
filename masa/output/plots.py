"""Figures of what happened inside a run; needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masa.controls.record import SELF, spread
from masa.errors import MasaError
from masa.output.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 2.4  # of one panel, in inches
LABEL = 32  # characters that fit along it


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
    figure, axes = _panels(len(result.images), len(chosen), result.labels)
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
    figure, axes = _panels(len(result.images), 1 + components, result.labels)
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
    steps = _shown(steps, used, "masks", "steps")
    figure, axes = _panels(len(result.images), len(steps), result.labels)
    for i, picture in enumerate(result.images):
        for j, step in enumerate(steps):
            axes[i][j].imshow(picture)
            # Nearest, as the control reads it: smooth edges would show what was not there.
            outside = 1.0 - _enlarge(used[step][i], picture, mode="nearest")
            axes[i][j].imshow(0.0 * outside, cmap="gray", alpha=0.75 * outside)
            if i == 0:
                axes[i][j].set_title(f"step {step}")
    return figure


def query_components(
    result: Result,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    control: int | None = None,
) -> Figure:
    """The three main components of self-attention queries as red, green and blue: what MasaCtrl compares.

    One row per layer and picture, one column per step. Components are of all pictures together at each layer and
    step, so that in its panels equal colours mean like queries, in source and targets alike. result: of a run
    with RecordQueries. layers, steps: of those recorded, by default up to six each, evenly spread. control: as in
    `word_maps`. MasaError for what was not recorded. MasaCtrl (2304.08465), figure 4b.
    """
    kept = _of_control(result.queries, control, "queries were recorded; run with RecordQueries(..)")
    layers = _shown(layers, {layer for layer, _ in kept}, "queries", "layers")
    steps = _shown(steps, {step for _, step in kept}, "queries", "steps")
    pictures = len(result.images)
    figure, axes = _panels(pictures * len(layers), len(steps), result.labels * len(layers))
    for row, layer in enumerate(layers):
        for j, step in enumerate(steps):
            queries = kept[layer, step]  # (1 + N, h, w, width)
            found = principal_components(queries.flatten(0, 2), 3)
            low, high = found.amin(0), found.amax(0)
            colours = ((found - low) / (high - low).clamp_min(1e-12)).unflatten(0, queries.shape[:3])
            for i, picture in enumerate(result.images):
                axis = axes[row * pictures + i][j]
                height, width = picture.height, picture.width
                axis.imshow(colours[i].numpy(), extent=(0, width, height, 0), interpolation="nearest")
                axis.set_title(f"layer {layer}, step {step}", fontsize="small")
    return figure


def predictions(result: Result, steps: Sequence[int] | None = None, control: int | None = None) -> Figure:
    """The clean pictures that steps predicted: one row per picture, one column per step, the last the result.

    result: of a run with RecordPredictions. steps: of those recorded, by default up to six. control: as in
    `word_maps`. MasaError for what was not recorded. MasaCtrl (2304.08465), figure 4a.
    """
    kept = _of_control(result.predictions, control, "predictions were recorded; run with RecordPredictions(..)")
    steps = _shown(steps, kept, "predictions", "steps")
    figure, axes = _panels(len(result.images), len(steps) + 1, result.labels)
    for i, picture in enumerate(result.images):
        for j, step in enumerate(steps):
            axes[i][j].imshow(kept[step][i].numpy())
        axes[i][-1].imshow(picture)
    for j, title in enumerate([*(f"step {step}" for step in steps), "result"]):
        axes[0][j].set_title(title)
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


def _shown(asked: Sequence[int] | None, kept: Collection[int], things: str, where: str) -> list[int]:
    """The steps or layers to show: those asked for, by default up to six. MasaError for any that was not kept."""
    known = sorted(kept)
    shown = spread(known) if asked is None else list(asked)
    unknown = [number for number in shown if number not in known]
    if unknown or not shown:
        raise MasaError(f"no {things} in {where} {unknown}; there are some in {where} {known}")
    return shown


def _of_control(kept: Mapping[int, Mapping[Any, Tensor]], control: int | None, otherwise: str) -> Mapping[Any, Tensor]:
    """What the named control kept, by default the first that kept anything."""
    chosen = min(kept, default=None) if control is None else control
    if chosen is None or chosen not in kept:
        where = "" if control is None else f"by control {control}, "
        raise MasaError(f"{where}no {otherwise}")
    return kept[chosen]


def _panels(rows: int, columns: int, labels: Sequence[str]) -> tuple[Figure, Any]:
    """A figure and its axes [row][column], without ticks, each row beside its label."""
    try:
        from masa.output.notebook_figure import NotebookFigure
    except ImportError as error:
        raise MasaError("plots need matplotlib: pip install 'masa[plots]'") from error
    # Not pyplot: nothing is kept open behind the caller's back, and no display is needed.
    figure = NotebookFigure(figsize=(SIDE * columns, SIDE * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, label in enumerate(labels):
        axes[i][0].set_ylabel(textwrap.fill(label, LABEL), fontsize="small")
        for axis in axes[i]:
            axis.set_xticks([])
            axis.set_yticks([])
    return figure, axes


def _enlarge(image: Tensor, picture: Image.Image, mode: str = "bicubic") -> np.ndarray:
    """(h, w) -> (height, width) of the picture."""
    return F.interpolate(image[None, None].float(), size=(picture.height, picture.width), mode=mode)[0, 0].numpy()
