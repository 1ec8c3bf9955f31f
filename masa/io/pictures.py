"""Pictures in and out: anything a user may hold <-> float tensors (1, 3, h, w) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from masa.errors import MasaError

# A path, a PIL picture, a uint8 array (h, w, 3) or (h, w), or a float tensor (3, h, w) in [-1, 1].
ImageLike = str | Path | Image.Image | np.ndarray | Tensor

ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 lie on their side
MULTIPLE = 64  # the VAE divides each side by 8, the UNet by another 8


def open_picture(path: str | Path, background: str = "white") -> Image.Image:
    """A picture file as RGB, turned upright as its EXIF data says, transparent parts over the background."""
    try:
        with Image.open(path) as picture:
            return flatten(ImageOps.exif_transpose(picture), background)
    except Image.DecompressionBombError as error:
        raise MasaError(f"{path} has more pixels than Pillow opens ({error}); scale it down first") from error
    except UnidentifiedImageError as error:
        raise MasaError(f"{path} is not a picture that Pillow can read; expected PNG, JPEG, WebP, ..") from error
    except IsADirectoryError as error:
        raise MasaError(f"{path} is a folder; expected a picture file") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no picture at {path}; give the path of a PNG, JPEG, WebP, ..") from error
    except OSError as error:  # what Pillow raises for a file that ends early
        raise MasaError(f"{path} cannot be read as a picture ({error}); take another copy") from error


def flatten(picture: Image.Image, background: str = "white") -> Image.Image:
    """8-bit RGB; transparent parts show the background."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257.0).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("RGB")


def load_image(image: ImageLike, *, short_side: int, height: int | None = None, width: int | None = None) -> Tensor:
    """The picture as (1, 3, h, w) float32 in [-1, 1], both sides multiples of 64.

    Without height and width: scaled so that the short side is `short_side`, then cropped in the middle to
    multiples of 64. With them: scaled to cover exactly that size, the overhang cropped. A picture that fits
    already is not resampled. MasaError for what is no picture, or a size that is no multiple of 64.
    """
    check_size(height, width)
    if isinstance(image, Tensor):
        return _fit_tensor(image, short_side, height, width)
    picture = as_picture(image)
    target = target_size(picture.height, picture.width, short_side, height, width)
    if (picture.height, picture.width) != target:
        # Scale to cover, crop the middle; ImageOps.fit does both in one resampling.
        picture = ImageOps.fit(picture, (target[1], target[0]), Image.Resampling.LANCZOS)
    array = np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()


def fitted_size(
    path: str | Path, *, short_side: int, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """(height, width) of what `load_image` makes of a file; only its head is read. MasaError for what is no picture."""
    check_size(height, width)
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) >= 5
            h, w = picture.size if turned else picture.size[::-1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MasaError(f"{path} cannot be read as a picture ({error}); expected PNG, JPEG, WebP, ..") from error
    return target_size(h, w, short_side, height, width)


def check_size(height: int | None, width: int | None) -> None:
    """MasaError unless each given side is a positive multiple of 64."""
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not isinstance(side, int) or side < MULTIPLE or side % MULTIPLE):
            near = max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) if isinstance(side, int) else 512
            raise MasaError(f"{name} is {side!r}; expected a multiple of {MULTIPLE}, such as {near}")


def target_size(h: int, w: int, short_side: int, height: int | None, width: int | None) -> tuple[int, int]:
    if height is not None and width is not None:
        return height, width
    if height is not None or width is not None:  # one side given: the other keeps the proportions
        scale = height / h if height is not None else width / w  # type: ignore[operator]
    else:
        scale = short_side / min(h, w)

    def side(given: int | None, length: int) -> int:
        # The nearest pixel first, so that 511.99 does not lose a whole 64.
        return given if given is not None else max(MULTIPLE, round(length * scale) // MULTIPLE * MULTIPLE)

    return side(height, h), side(width, w)


def as_picture(image: ImageLike) -> Image.Image:
    """A path, PIL picture or uint8 array as RGB. MasaError for anything else."""
    if isinstance(image, str | Path):
        return open_picture(image)
    if isinstance(image, Image.Image):
        return flatten(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise MasaError(f"the array is {image.dtype} {image.shape}; expected uint8 (h, w, 3)")
        _check_not_empty(image.shape)
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, Tensor):
        raise MasaError("a picture cannot be a Tensor here; give a path, PIL picture or uint8 array (h, w, 3)")
    raise MasaError(f"a picture cannot be a {type(image).__name__}; give a path, PIL picture, array or tensor")


def _check_not_empty(shape: Sequence[int]) -> None:
    if 0 in shape:
        raise MasaError(f"the picture has shape {tuple(shape)}, without a pixel; expected one at least on each side")


def _fit_tensor(image: Tensor, short_side: int, height: int | None, width: int | None) -> Tensor:
    x = image[0] if image.ndim == 4 and len(image) == 1 else image
    if x.ndim != 3 or x.shape[0] != 3 or not x.is_floating_point():
        raise MasaError(f"the tensor is {x.dtype} {tuple(image.shape)}; expected float (3, h, w) in [-1, 1]")
    _check_not_empty(x.shape)
    if not bool((x.abs() <= 1.0 + 1e-3).all()):
        raise MasaError(f"the tensor holds values from {x.min():.4g} to {x.max():.4g}; expected [-1, 1]")
    x = x.detach().float().cpu()
    target = target_size(x.shape[1], x.shape[2], short_side, height, width)
    if tuple(x.shape[1:]) == target:
        return x[None].contiguous()
    return load_image(to_pil(x[None])[0], short_side=short_side, height=height, width=width)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Tensors (n, 3, h, w), about [-1, 1], clipped -> PIL pictures."""
    array = ((pictures.detach().float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(a.permute(1, 2, 0).contiguous().numpy()) for a in array]


def colour_patches(picture: Tensor, side: int = 64) -> Tensor:
    """(n, 3, h, w) in [0, 1], in squares of one colour: cubic down by `side`, nearest back, as T2I-Adapter's code does.

    A picture that is made of such squares stays as it is.
    """
    size = picture.shape[2:]
    small = (max(1, size[0] // side), max(1, size[1] // side))
    patches = F.interpolate(picture, small, mode="bicubic").clamp(0.0, 1.0)
    return F.interpolate(patches, size, mode="nearest")


def load_mask(mask: ImageLike) -> Tensor:
    """A mask as float32 (h, w) in [0, 1]: from a path, PIL picture, array or tensor; white is 1."""
    if isinstance(mask, Tensor | np.ndarray):
        x = mask if isinstance(mask, Tensor) else torch.tensor(mask)
        x = x.float() / 255.0 if x.dtype == torch.uint8 and x.numel() and int(x.max()) > 1 else x.float()
        x = x.reshape(x.shape[-2:]) if x.ndim > 2 and x.numel() == x.shape[-1] * x.shape[-2] else x
        if x.ndim != 2 or not x.numel():
            raise MasaError(f"the mask has shape {tuple(mask.shape)}; expected (h, w)")
    elif not isinstance(mask, str | Path | Image.Image):
        raise MasaError(f"a mask cannot be a {type(mask).__name__}; give a path, PIL picture, array or tensor")
    else:
        # Transparent parts of a mask are outside the subject.
        picture = flatten(mask, "black") if isinstance(mask, Image.Image) else open_picture(mask, "black")
        x = torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255.0)
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise MasaError(f"the mask holds values from {x.min():.4g} to {x.max():.4g}; expected [0, 1]")
    return x.cpu()
