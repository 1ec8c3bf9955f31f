"""Pictures one after the other: lists, folders, animated pictures and films in; animations and films out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from masa.errors import MasaError
from masa.io.pictures import ImageLike, flatten, open_picture

# Pictures in a list, a stack (n, h, w, 3) or (n, h, w), uint8, or (n, c, h, w), float; a folder; an animation or film.
Movie = Sequence[ImageLike] | np.ndarray | Tensor | str | Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FILMS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")

MOST_FRAMES = 10_000  # of an animation, with those that are held
FASTEST = 16  # milliseconds of a frame: what is less, at over 60 frames a second, comes of rounded durations


def read_movie(movie: Movie, name: str) -> list[ImageLike]:
    """The pictures of a movie in order, files opened; name: what errors call it. MasaError where there are none."""
    if isinstance(movie, str | Path):
        pictures: list[ImageLike] = list(_read_path(Path(movie), name))
    elif isinstance(movie, Image.Image) or (isinstance(movie, np.ndarray | Tensor) and movie.ndim < 3):
        raise MasaError(f"{name} are one picture; give a list with a picture for each frame")
    elif isinstance(movie, Sequence | np.ndarray | Tensor):
        pictures = [open_picture(one, "black") if isinstance(one, str | Path) else one for one in movie]
    else:
        raise MasaError(f"{name} are a {type(movie).__name__}; expected a list of pictures, a folder, or a file")
    if not pictures:
        raise MasaError(f"{name} hold no picture; give one for each frame")
    return pictures


def _read_path(path: Path, name: str) -> Iterator[Image.Image]:
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if file.suffix.lower() in PICTURES), key=_by_number)
        if not files:
            raise MasaError(f"{name}: {path} holds no pictures ({', '.join(PICTURES)}); give one for each frame")
        for file in files:
            yield open_picture(file, "black")
    elif not path.exists():
        raise MasaError(f"{name}: {path} is not there; give a folder of pictures, an animation or a film")
    elif path.suffix.lower() in FILMS:
        yield from _read_film(path, name)
    else:
        yield from _read_animation(path, name)


def _by_number(file: Path) -> tuple[list[tuple[int, str]], str]:
    """Names in the order of the numbers in them: frame_9 before frame_10."""
    parts = re.split(r"(\d+)", file.stem.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], file.name


def _read_animation(path: Path, name: str) -> Iterator[Image.Image]:
    """Frames as often as they are held: files keep equal neighbours as one frame of a longer duration."""
    frames, durations = [], []
    try:
        with Image.open(path) as animation:
            for frame in ImageSequence.Iterator(animation):
                frames.append(flatten(frame.copy(), "black"))
                durations.append(round(animation.info.get("duration") or 0))
    except UnidentifiedImageError as error:
        raise MasaError(f"{name}: {path} is not a picture that Pillow can read; expected GIF, WebP, PNG, ..") from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for a file that ends early
        raise MasaError(f"{name}: {path} cannot be read as pictures ({error}); take another copy") from error
    held = _times_held(durations)
    if sum(held) > MOST_FRAMES:
        raise MasaError(
            f"{name}: {path} has {sum(held):,} frames, counted as long as each is held; expected {MOST_FRAMES:,} at "
            "most: give a shorter one, or a folder of pictures"
        )
    for frame, times in zip(frames, held, strict=True):
        yield from [frame] * times


def _times_held(durations: Sequence[int]) -> list[int]:
    """How many frames each of an animation's is, by durations in milliseconds (0: one frame)."""
    told = [duration for duration in durations if duration]
    unit = math.gcd(*told)
    if told and unit < FASTEST:
        unit = min(told)
    return [max(1, round(duration / unit)) if unit else 1 for duration in durations]


def ffmpeg():  # type: ignore[no-untyped-def]
    """imageio-ffmpeg's module. MasaError where it is not installed."""
    try:
        import imageio_ffmpeg  # slow to find its program
    except ImportError as error:
        raise MasaError(
            "films need imageio-ffmpeg, which is not installed: pip install 'masa[video]'; or use .gif, .webp, .png or "
            "a folder of pictures"
        ) from error
    return imageio_ffmpeg


def _read_film(path: Path, name: str) -> Iterator[Image.Image]:
    module = ffmpeg()
    try:
        frames = module.read_frames(str(path), pix_fmt="rgb24")
        width, height = next(frames)["size"]
        for frame in frames:
            yield Image.fromarray(np.frombuffer(frame, np.uint8).reshape(height, width, 3).copy())
    except (OSError, RuntimeError, StopIteration) as error:
        reason = " ".join(str(error).split())[-200:]
        raise MasaError(f"{name}: {path} cannot be read as a film ({reason}); take another copy") from error


def write_film(path: Path, pictures: Sequence[Image.Image], fps: float) -> None:
    """H.264 in MP4, nearly lossless (CRF 16), for every player (4:2:0). MasaError without imageio-ffmpeg."""
    width, height = pictures[0].size
    writer = ffmpeg().write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        quality=None,
        macro_block_size=2,
        ffmpeg_log_level="error",
        output_params=["-crf", "16"],
    )
    writer.send(None)
    try:
        for picture in pictures:
            writer.send(np.ascontiguousarray(picture.convert("RGB")))
    finally:
        writer.close()


def one_palette(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures in one palette of 255 colours, without dithering: what stands still in all stands still in a GIF."""
    some = [pictures[i * (len(pictures) - 1) // 63] for i in range(64)] if len(pictures) > 64 else list(pictures)
    width, height = min(pictures[0].width, 128), min(pictures[0].height, 128)
    small = [picture.resize((width, height), Image.Resampling.BOX) for picture in some]
    strip = Image.new("RGB", (width, height * len(small)))
    for i, picture in enumerate(small):
        strip.paste(picture, (0, i * height))
    palette = strip.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return [picture.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
