"""Pictures that the page is given and shows: painted masks, masks and attention maps laid over a picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from masa.controls.masks import normalise, resize
from masa.io.pictures import flatten

TINT = (230, 40, 60)  # of a mask
SHOWN = 256  # pixels: smaller pictures are enlarged


def picture_of(edited: Mapping[str, Any] | None) -> Image.Image | None:
    """The picture in an image editor, cropped as it is there, without what was painted on it; None where none is."""
    background = None if edited is None else edited.get("background")
    if background is None or _is_blank(background):
        return None
    return flatten(background)


def painted_on(edited: Mapping[str, Any] | None) -> Image.Image | None:
    """What was painted in an image editor, white on black (L), as large as its picture; None where nothing was."""
    layers = [] if edited is None else [layer for layer in edited.get("layers") or () if layer is not None]
    if not layers:
        return None
    alpha = np.max([np.asarray(layer.convert("RGBA"))[..., 3] for layer in layers], axis=0)
    return None if not alpha.any() else Image.fromarray(np.where(alpha > 64, 255, 0).astype(np.uint8))


def drawing_of(edited: Mapping[str, Any] | None) -> Image.Image | None:
    """A layout condition: white lines on black as drawn, over an uploaded picture; None where there is neither."""
    picture, lines = picture_of(edited), painted_on(edited)
    if lines is None:  # a canvas that is black all over says nothing
        return picture if picture is not None and picture.getbbox() is not None else None
    below = Image.new("RGB", lines.size, "black") if picture is None else picture.resize(lines.size)
    return Image.composite(Image.new("RGB", lines.size, "white"), below, lines)


def _is_blank(picture: Image.Image) -> bool:
    """Whether a picture is wholly transparent, as an empty canvas is."""
    return picture.mode == "RGBA" and picture.getchannel("A").getextrema()[1] == 0


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture, by a whole factor where it is small."""
    factor = max(1, SHOWN // min(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture if factor == 1 else picture.resize(size, Image.Resampling.BICUBIC)


def mask_over(picture: Image.Image, mask: Tensor) -> Image.Image:
    """A picture with a mask (h, w) in [0, 1] tinted."""
    large = enlarged(picture.convert("RGB"))
    shade = (mask.float().clamp(0.0, 1.0) * 150.0).round().to(torch.uint8).cpu().numpy()
    alpha = Image.fromarray(shade).resize(large.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", large.size, TINT), large, alpha)


def word_mask(found: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """A word's map (h, w) cut as WordMasks does, at `size` (h, w)."""
    scaled, constant = normalise(found.flatten()[None])
    if bool(constant[0]):
        return torch.zeros(size)
    return (resize(scaled.unflatten(1, tuple(found.shape)), size)[0] >= threshold).float()


def heat_over(picture: Image.Image, attention: Tensor) -> Image.Image:
    """A picture, darkened, and lit where a map (h, w) is large."""
    large = enlarged(picture.convert("RGB"))
    scaled, _ = normalise(attention.float().flatten()[None])
    shade = (scaled.unflatten(1, tuple(attention.shape))[0] * 255.0).round().to(torch.uint8).cpu().numpy()
    heat = np.asarray(Image.fromarray(shade).resize(large.size, Image.Resampling.BICUBIC), dtype=np.float32) / 255.0
    base = np.asarray(large, dtype=np.float32)
    warm = np.stack([255.0 * np.sqrt(heat), 220.0 * heat, 90.0 * heat**3], axis=-1)
    mixed = 0.45 * base * (1.0 - heat[..., None]) + (0.35 * base + 0.65 * warm) * heat[..., None]
    return Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8))


def figures(pictures: Sequence[tuple[str, Image.Image]]) -> str:
    """Pictures with their captions as HTML, the pictures inside: nothing is written to a disk for them."""
    return "".join(
        f'<figure><img alt="{escape(name, quote=True)}" src="{_inline(picture)}"><figcaption>{escape(name)}'
        "</figcaption></figure>"
        for name, picture in pictures
    )


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    enlarged(picture.convert("RGB")).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
