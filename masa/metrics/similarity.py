"""Likeness of two pictures, and of a picture and a prompt, with the arithmetic of PIE-Bench's evaluator (2310.01506).

Pictures are uint8 arrays (h, w, 3). Masks are arrays (h, w) of 0 and 1; of what is compared, the rest is black.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from masa.errors import MasaError

# torchvision since 0.17 smooths what it makes smaller, and torchmetrics since 1.5 counts the border of SSIM in; those
# of 2023, when the published numbers were made, did neither.
Libraries = Literal["current", "2023"]

# Two pictures (1, 3, h, w) in [-1, 1] -> their distance, one number.
PictureDistance = Callable[[Tensor, Tensor], Tensor]

SIGMA, WINDOW = 1.5, 11  # of SSIM's Gaussian, pixels
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for values in [0, 1]
SHORT_SIDE, LONGEST_SIDE = 224, 480  # of what structure is read from, pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_pair(one: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> None:
    """MasaError unless both are uint8 pictures of one size, and the mask, if any, is of that size too."""
    for picture in (one, other):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise MasaError(f"the picture is {picture.dtype} {picture.shape}; expected uint8 (h, w, 3)")
    if one.shape != other.shape:
        raise MasaError(f"the pictures are {one.shape[:2]} and {other.shape[:2]} pixels; expected one size")
    if mask is not None and mask.shape != one.shape[:2]:
        raise MasaError(f"the mask is {mask.shape} and the picture {one.shape[:2]}; expected one size")


def masked_pair(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> Tensor:
    """Both pictures (2, 3, h, w), float32 in [0, 1], with black where the mask is 0. Errors as in `check_pair`."""
    check_pair(one, other, mask)
    both = np.stack([one, other]).astype(np.float32) / 255.0 * mask.astype(np.float32)[None, :, :, None]
    return torch.from_numpy(both).permute(0, 3, 1, 2).contiguous()


def mean_squared_error(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Mean over all values of the frame, for values in [0, 1]; what is masked out counts as equal."""
    first, second = masked_pair(one, other, mask).double()
    return float((first - second).square().mean())


def peak_signal_to_noise(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """-10 log10 of the mean squared error, dB; infinite for equal pictures."""
    error = mean_squared_error(one, other, mask)
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def structural_similarity(
    one: np.ndarray, other: np.ndarray, mask: np.ndarray, *, libraries: Libraries = "current"
) -> float:
    """SSIM of the frame, 1 for equal pictures: Gaussian windows of 11 pixels, borders mirrored, channels averaged.

    libraries: "2023" leaves out a border of 5 pixels. MasaError for pictures smaller than 12 pixels a side.
    """
    pair = masked_pair(one, other, mask).double()
    if min(pair.shape[2:]) <= WINDOW:
        raise MasaError(f"the pictures are {tuple(pair.shape[2:])} pixels; SSIM's window wants {WINDOW + 1} a side")
    x, y = pair.split(1)
    moments = _blur(torch.cat([x, y, x * x, y * y, x * y]))
    mean_x, mean_y, square_x, square_y, product = moments.split(1)
    var_x, var_y = (square_x - mean_x**2).clamp(min=0.0), (square_y - mean_y**2).clamp(min=0.0)
    covariance = product - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    border = WINDOW // 2 if libraries == "2023" else 0
    height, width = similarity.shape[2:]
    return float(similarity[:, :, border : height - border, border : width - border].mean())


def _blur(pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) under SSIM's Gaussian, mirrored at the borders."""
    radius = WINDOW // 2
    offsets = torch.arange(-radius, radius + 1, dtype=pictures.dtype)
    weights = torch.exp(-((offsets / SIGMA) ** 2) / 2)
    padded = F.pad(pictures, (radius, radius, radius, radius), mode="reflect")
    height, width = pictures.shape[2:]
    # Sums of shifted pictures: a convolution of doubles takes four times as long.
    shifts = list(enumerate((weights / weights.sum()).tolist()))
    across, blurred = torch.zeros_like(padded[..., :width]), torch.zeros_like(pictures)
    for i, weight in shifts:
        across.add_(padded[..., i : i + width], alpha=weight)
    for i, weight in shifts:
        blurred.add_(across[..., i : i + height, :], alpha=weight)
    return blurred


def perceptual_distance(one: np.ndarray, other: np.ndarray, mask: np.ndarray, lpips: PictureDistance) -> float:
    """LPIPS (1801.03924) of values brought to [-1, 1] after the mask: what is masked out is -1 in both."""
    device = _device_of(lpips)
    first, second = (masked_pair(one, other, mask).to(device) * 2.0 - 1.0).split(1)
    with torch.no_grad():
        return float(lpips(first, second))


def structure_distance(
    one: np.ndarray, other: np.ndarray, dino: nn.Module, *, divided: bool = False, libraries: Libraries = "current"
) -> float:
    """Mean squared difference of the pictures' self-similarities: cosines of DINO's keys in its last layer.

    Both whole pictures are read. divided: give the network values in [0, 1], which it was trained on; PIE-Bench's
    published numbers are of values up to 255, normalised as if they were in [0, 1]. libraries: "2023" resizes without
    smoothing. 2104.14294 (DINO), 2201.00424 (the distance).
    """
    check_pair(one, other)
    with torch.no_grad():
        first, second = (_self_similarity(picture, dino, divided, libraries == "current") for picture in (one, other))
    return float((first - second).square().mean())


def _self_similarity(picture: np.ndarray, dino: nn.Module, divided: bool, smooth: bool) -> Tensor:
    """Cosines (tokens, tokens) between the keys of all tokens, heads side by side."""
    x = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None].to(_device_of(dino))
    x = F.interpolate(
        x / 255.0 if divided else x,
        size=structure_size(x.shape[2], x.shape[3]),
        mode="bilinear",
        align_corners=False,
        antialias=smooth,
    )
    keys = read_keys(dino, (x - x.new_tensor(IMAGENET_MEAN)[:, None, None]) / x.new_tensor(IMAGENET_STD)[:, None, None])
    lengths = keys.norm(dim=1, keepdim=True)
    return (keys @ keys.T) / (lengths @ lengths.T).clamp(min=1e-8)


def structure_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) that structure is read at: short side 224, unless the long one were over 480."""
    short, long = min(height, width), max(height, width)
    short_side, long_side = SHORT_SIDE, SHORT_SIDE * long // short
    if long_side > LONGEST_SIDE:
        short_side, long_side = LONGEST_SIDE * short_side // long_side, LONGEST_SIDE
    return (short_side, long_side) if height <= width else (long_side, short_side)


def read_keys(vit: nn.Module, x: Tensor) -> Tensor:
    """Keys (tokens, width) that the last layer of a vision transformer (transformers' ViT) makes of x (1, 3, h, w)."""
    # transformers 5 calls them k_proj, before it was attention.attention.key.
    projections = [m for name, m in vit.named_modules() if name.split(".")[-1] in ("k_proj", "key")]
    kept: list[Tensor] = []
    handle = projections[-1].register_forward_hook(lambda module, given, keys: kept.append(keys[0]))
    try:
        vit(x, interpolate_pos_encoding=True)
    finally:
        handle.remove()
    return kept[0].float()


def prompt_similarity(picture: np.ndarray, token_ids: Tensor, clip: nn.Module, mask: np.ndarray | None = None) -> float:
    """100 times the cosine between CLIP's features of a picture and of a prompt (1, tokens), 0 where it is below.

    mask: the picture's values outside become 0, as uint8. The picture's short side is brought to CLIP's size with
    Pillow's bicubic filter, and the middle cut out, as CLIP's own preprocessing does. 2104.08718 (CLIPScore).
    """
    check_pair(picture, picture, mask)
    seen = picture if mask is None else (picture * mask[:, :, None]).astype(np.uint8)
    device = _device_of(clip)
    pixels = clip_pixels(seen, clip.config.vision_config.image_size).to(device)  # type: ignore[union-attr, arg-type]
    ids = token_ids.to(device)
    with torch.no_grad():
        features = [
            _features(clip.get_image_features(pixels)),  # type: ignore[operator]
            _features(clip.get_text_features(ids, torch.ones_like(ids))),  # type: ignore[operator]
        ]
    image, text = (f.float() / f.float().norm(p=2, dim=-1, keepdim=True) for f in features)
    return max(0.0, 100.0 * float((image * text).sum()))


def _features(found: object) -> Tensor:
    """CLIP's projected features: transformers 4 gives them, 5 an output that holds them."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output  # type: ignore[attr-defined]
    return features


def clip_pixels(picture: np.ndarray, size: int) -> Tensor:
    """A uint8 picture as CLIP takes it, (1, 3, size, size)."""
    height, width = picture.shape[:2]
    short, long = size, int(size * max(height, width) / min(height, width))
    resized = Image.fromarray(picture).resize(
        (short, long) if width <= height else (long, short), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    cut = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32)
    x = torch.from_numpy(cut / 255.0).permute(2, 0, 1)[None]
    return ((x - x.new_tensor(CLIP_MEAN)[:, None, None]) / x.new_tensor(CLIP_STD)[:, None, None]).contiguous()


def _device_of(network: object) -> torch.device:
    """Where a network's weights are; the CPU for one without any."""
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device
