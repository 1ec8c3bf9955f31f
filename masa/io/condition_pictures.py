"""Condition pictures, made or checked: edges, sketches, poses, depth, segments and colours (`masa.conditions`).

Each function gives a PIL picture of the size that it was made at, as adapters and ControlNets of that kind expect it:
their `source=` and `target=` take it as it is. canny and sketch need scikit-image: `pip install 'masa[conditions]'`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from masa.errors import MasaError
from masa.io.pictures import as_picture, colour_patches
from masa.io.poses import keypose, openpose

__all__ = ["canny", "color", "depth", "keypose", "openpose", "seg", "sketch"]

# A path, a PIL picture, or a uint8 array (h, w) or (h, w, 3).
Photo = str | Path | Image.Image | np.ndarray

SHORT_SIDE = 512  # what the networks were trained on
TANGENT = round(math.tan(math.pi / 8) * 2**15)  # of 22.5 degrees, as OpenCV rounds it
MIDDLE_GREYS = 0.2  # a share of pixels neither dark nor light above which a picture is no drawing
SPECK = 200  # pixels of a 512 x 512 sketch: smaller pieces are left out
MOST_COLOURS = 256  # of a picture of segments


def canny(image: Photo, low: float = 100, high: float = 200, *, short_side: int | None = SHORT_SIDE) -> Image.Image:
    """Canny's edges of a photograph, white on black, for canny adapters and ControlNets.

    low, high: on |dx| + |dy| of 3x3 Sobel filters, 0 to 2040: edges are followed above `low` from where they are above
    `high`. The photograph is not blurred; of colours the channel with the strongest gradient counts. short_side: larger
    pictures are first scaled down to it (lines do not survive that later); None never scales.

    MasaError for what is no picture, for thresholds out of order, and without scipy. Canny (1986), as OpenCV defines
    and ControlNet calls it: |dx| + |dy|, borders repeated, eight neighbours.
    """
    if not _is_number(low) or not _is_number(high) or not 0.0 <= low <= high <= 2040.0:
        raise MasaError(f"canny low is {low!r} and high {high!r}; expected numbers with 0 <= low <= high <= 2040")
    ndimage = _library("scipy.ndimage")
    x = _photo(image, short_side).astype(np.int64)
    dx, dy = (
        np.stack([ndimage.sobel(x[..., c], axis=axis, mode="nearest") for c in range(3)], axis=-1) for axis in (1, 0)
    )
    strongest = (np.abs(dx) + np.abs(dy)).argmax(-1)[..., None]
    dx, dy = (np.take_along_axis(d, strongest, -1)[..., 0] for d in (dx, dy))
    m = np.abs(dx) + np.abs(dy)
    candidates = _is_ridge(m, dx, dy) & (m > low)
    labels, _ = ndimage.label(candidates, structure=np.ones((3, 3)))
    chosen = np.unique(labels[candidates & (m > high)])
    return Image.fromarray(np.where(np.isin(labels, chosen[chosen > 0]), 255, 0).astype(np.uint8))


def _is_ridge(m: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Where a gradient's size m is largest along its direction, of four; outside the picture there is none."""
    padded = np.pad(m, 1)

    def at(rows: int, columns: int) -> np.ndarray:
        return padded[1 + rows : padded.shape[0] - 1 + rows, 1 + columns : padded.shape[1] - 1 + columns]

    ax, ay = np.abs(dx), np.abs(dy) << 15
    across, down = ay < ax * TANGENT, ay > ax * TANGENT + (ax << 16)
    falling = (dx ^ dy) >= 0
    diagonal = np.where(falling, (m > at(-1, -1)) & (m > at(1, 1)), (m > at(-1, 1)) & (m > at(1, -1)))
    along = np.where(down, (m > at(-1, 0)) & (m >= at(1, 0)), diagonal)
    return np.where(across, (m > at(0, -1)) & (m >= at(0, 1)), along)


def sketch(
    image: Photo, threshold: float = 0.3, *, drawing: bool | None = None, short_side: int | None = SHORT_SIDE
) -> Image.Image:
    """A sketch, white on black, for sketch and scribble adapters and ControlNets: of a photograph, or from a drawing.

    Of a photograph: places where lightness or colour change most, a few pixels wide. threshold: in (0, 1], of the
    strongest changes; lower draws more. This is not PiDiNet, the trained network whose sketches the adapters saw: it
    knows no objects, and texture counts like outlines. A drawing of yours serves best. A drawing (few greys) is not
    searched: its lines are taken, and turned white on black where the paper is light; threshold is not read. drawing:
    says which of the two the picture is, where the greys mislead. short_side: as in `canny`.

    MasaError for what is no picture, a threshold out of range, and without scikit-image.
    """
    if not _is_number(threshold) or not 0.0 < threshold <= 1.0:
        raise MasaError(f"sketch threshold is {threshold!r}; expected a number above 0, up to 1")
    filters, color, ndimage = _library("skimage.filters"), _library("skimage.color"), _library("scipy.ndimage")
    x = _photo(image, short_side)
    grey = np.asarray(Image.fromarray(x).convert("L")) / 255.0
    if drawing is None:
        drawing = float(((grey > 0.15) & (grey < 0.85)).mean()) < MIDDLE_GREYS
    if drawing:
        if grey.min() == grey.max():
            raise MasaError("sketch was given a drawing of one colour; expected lines")
        light = grey > filters.threshold_isodata(grey)
        lines = ~light if light.mean() > 0.5 else light  # paper is more than lines
    else:
        scale = min(grey.shape) / SHORT_SIDE
        smooth = filters.gaussian(color.rgb2lab(x) / 100.0, 2.0 * scale, channel_axis=-1)
        strength = np.max([filters.scharr(smooth[..., c]) for c in range(3)], axis=0)
        strength = strength / max(float(np.quantile(strength, 0.99)), 1e-6)
        lines = filters.apply_hysteresis_threshold(strength, threshold, min(1.0, 1.8 * threshold))
        labels, _ = ndimage.label(lines)
        lines &= np.bincount(labels.ravel())[labels] > SPECK * scale**2
    return Image.fromarray(np.where(lines, 255, 0).astype(np.uint8))


def depth(picture: Photo, *, near_is_dark: bool = False) -> Image.Image:
    """A depth map of yours for depth adapters and ControlNets: RGB of three equal channels, near bright, 0 to 255.

    picture: grey, 8 or 16 bits, or an array (h, w) of any range; the nearest becomes white, the farthest black, as of
    MiDaS, whose inverse depths the networks saw. near_is_dark: of a map whose numbers grow with the distance, which is
    turned over. MasaError for a picture in colours, of one value, or with values that are not finite.
    """
    if isinstance(picture, str | Path):
        as_picture(picture)  # refuses what is none
        with Image.open(picture) as file:
            picture = file.copy()
    if isinstance(picture, Image.Image):
        picture = picture.convert("RGB") if picture.mode in ("P", "PA", "RGBA", "LA", "CMYK") else picture
    x = np.asarray(picture, dtype=np.float64)
    if x.ndim == 3 and x.shape[2] == 3 and (x == x[..., :1]).all():
        x = x[..., 0]
    if x.ndim != 2 or not x.size:
        what = "in colours" if x.ndim == 3 else f"of shape {x.shape}"
        raise MasaError(f"the depth map is {what}; expected grey, (h, w), such as MiDaS's own and not its colour map")
    if not np.isfinite(x).all() or x.min() == x.max():
        raise MasaError(f"the depth map has values from {x.min():g} to {x.max():g}; expected finite ones that differ")
    x = (x - x.min()) / (x.max() - x.min())
    x = 1.0 - x if near_is_dark else x
    return Image.fromarray((x * 255.0).round().astype(np.uint8)).convert("RGB")


def seg(picture: Photo) -> Image.Image:
    """A picture of segments of yours, for seg adapters and ControlNets, checked: RGB, each class its flat colour.

    T2I-Adapter's was trained on COCO-Stuff's colours, ControlNet's on ADE20K's. MasaError for grey pictures, which hold
    numbers of classes and not colours, and for more colours than classes can have, such as a photograph's or a JPEG's.
    """
    x = np.asarray(as_picture(picture))
    colours = len(np.unique(x.reshape(-1, 3), axis=0))
    if colours > MOST_COLOURS:
        raise MasaError(
            f"the picture of segments has {colours:,} colours; expected one for each class, {MOST_COLOURS} at most "
            "(save it as PNG: JPEG blurs colours)"
        )
    if (x == x[..., :1]).all():
        raise MasaError("the picture of segments is grey; expected each class in its colour (COCO-Stuff's or ADE20K's)")
    return Image.fromarray(x)


def color(image: Photo, *, short_side: int | None = SHORT_SIDE) -> Image.Image:
    """A photograph's colours in squares of 64 pixels, for the color adapter, which brings pictures there by itself.

    short_side: as in `canny`. MasaError for what is no picture. T2I-Adapter's code (2302.08453): cubic down by 64,
    nearest back.
    """
    x = torch.from_numpy(_photo(image, short_side).copy()).permute(2, 0, 1)[None] / 255.0
    patches = (colour_patches(x)[0].permute(1, 2, 0) * 255.0).round().to(torch.uint8)
    return Image.fromarray(patches.numpy())


def _photo(image: Photo, short_side: int | None) -> np.ndarray:
    """A photograph as uint8 (h, w, 3), scaled down to a short side."""
    if short_side is not None and (not isinstance(short_side, int) or isinstance(short_side, bool) or short_side < 8):
        raise MasaError(f"short_side is {short_side!r}; expected pixels, 8 or more, or None for the picture's own size")
    picture = as_picture(image)
    short = min(picture.size)
    if short_side is not None and short > short_side:
        size = (round(picture.width * short_side / short), round(picture.height * short_side / short))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _library(name: str) -> Any:
    """A module that is not needed elsewhere. MasaError where it is not installed."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise MasaError(
            f"this condition needs {name.split('.')[0]}, which is not installed ({error}); "
            "pip install 'masa[conditions]'"
        ) from error
