"""What a video gives back: frames that carry their settings, saved as an animation, a film or a folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from torch import Tensor

from masa.controls.checks import is_number
from masa.errors import MasaError
from masa.io.files import check_free, replacing
from masa.io.movies import FILMS, ffmpeg, one_palette, write_film
from masa.output.notebook import shorten, table_html
from masa.output.result import Picture, label_row, parse_settings, png_info, read_settings

SHOWN_RATE = 8.0  # frames a second, where nothing else is asked
ANIMATIONS = (".gif", ".webp", ".png")
SETTINGS = "settings.json"  # in a folder of frames
DESCRIPTION = 0x010E  # of EXIF: ImageDescription, where a WebP holds its settings
# Characters of settings that a GIF carries, in pieces of 255 bytes; longer ones lie beside it.
MOST_IN_GIF = 500_000
REPLACE = "give another path, or overwrite it (--overwrite, overwrite=True)"
FORMS = "a name that ends in .gif, .webp, .png or .mp4, or in nothing for a folder of PNGs"


@dataclass(frozen=True, repr=False)
class Frames:
    """The frames of one source, in order.

    images: PIL pictures, each with the settings that make it alone again. latents (N, 4, h, w): float32, on the CPU.
    source: the picture that frames take their subject from. settings: JSON values that suffice to run all of it again.
    """

    images: list[Picture]
    latents: Tensor
    source: Picture
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = f"{self.source.width}x{self.source.height}"
        return (
            f"Frames({len(self)} of {shorten(self.settings['target'][0], 60)!r}, from "
            f"{shorten(self.settings['source'], 60)!r}, {size}, {self.settings['steps']} steps, seed "
            f"{self.settings['seed']})"
        )

    def _repr_html_(self) -> str:
        film = BytesIO()
        self._write_animation(film, ".gif", SHOWN_RATE, "")
        data = base64.b64encode(film.getvalue()).decode("ascii")
        shown = {name: value for name, value in self.settings.items() if name != "conditions"}
        return f'<img src="data:image/gif;base64,{data}">' + table_html("settings", shown)

    def save(self, path: str | Path, *, fps: float = SHOWN_RATE, overwrite: bool = False) -> list[Path]:
        """Write an animation or film, by the name's ending, or a folder of numbered PNGs. Returns the files' paths.

        path: .gif (one palette of 255 colours), .webp and .png (lossless), which run for ever; .mp4 (H.264, which
        needs imageio-ffmpeg: pip install 'masa[video]'); without an ending, a folder of frame_0000.png, .., source.png
        and settings.json. fps: frames a second, above 0, at most 60; a GIF holds hundredths of a second, of a folder
        it is none. overwrite: replace what is there; else MasaError. Animations carry the settings, a film (and a GIF
        whose settings are long) has them beside it in NAME.json: `masa.rerun` takes any of the files, and the folder.
        Either all files are there at the end, or none.
        """
        path = Path(path)
        check_form(path, overwrite)
        check_fps(fps)
        suffix = path.suffix.lower()
        if not suffix:
            return self._save_folder(path)
        text = json.dumps(dict(self.settings))
        beside = suffix == ".mp4" or (suffix == ".gif" and len(text) > MOST_IN_GIF)
        paths = [path, _beside(path)] if beside else [path]
        for other in paths[1:]:
            check_free(other, overwrite, "path")
        with ExitStack() as stack:  # all are written before the first takes its name
            temporaries = [stack.enter_context(replacing(one)) for one in paths]
            if suffix == ".mp4":
                write_film(temporaries[0], self.images, fps)
            else:
                with temporaries[0].open("wb") as file:
                    self._write_animation(file, suffix, fps, "" if beside else text)
            for temporary in temporaries[1:]:
                temporary.write_text(text, encoding="utf-8")
        return paths

    def _write_animation(self, file: BinaryIO, suffix: str, fps: float, text: str) -> None:
        pictures: list[Image.Image] = [Image.Image.copy(picture) for picture in self.images]
        options: dict[str, Any] = {"save_all": True, "loop": 0, "duration": round(1000.0 / fps)}
        if suffix == ".gif":
            pictures = one_palette(pictures)
            # Without palette= Pillow would write it again with each frame.
            palette = bytes(pictures[0].getpalette() or ())
            options |= {
                "duration": max(2, round(100.0 / fps)) * 10,
                "optimize": False,
                "palette": palette,
                "comment": text,
            }
        elif suffix == ".webp":
            exif = Image.Exif()
            exif[DESCRIPTION] = text
            options |= {"lossless": True, "exif": exif}
        else:
            options |= {"pnginfo": png_info(self.settings)}
        first, *others = pictures
        Image.Image.save(first, file, suffix[1:].upper(), append_images=others, **options)

    def _save_folder(self, folder: Path) -> list[Path]:
        names = file_names(len(self))
        surplus = [folder / name for name in file_names(_frames_in(folder)) if name not in names]
        with ExitStack() as stack:
            temporaries = [stack.enter_context(replacing(folder / name)) for name in names]
            for temporary, picture in zip(temporaries[:-1], [*self.images, self.source], strict=True):
                picture.save(temporary)
            temporaries[-1].write_text(json.dumps(dict(self.settings)), encoding="utf-8")
        for path in surplus:  # an older, longer video's, that is replaced
            path.unlink(missing_ok=True)
        return [folder / name for name in names]

    def sheet(self, columns: int = 8) -> Picture:
        """All frames on one picture, numbered, in rows of so many."""
        if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
            raise MasaError(f"columns is {columns!r}; expected a number from 1")
        columns = min(columns, len(self))
        rows = []
        for start in range(0, len(self), columns):
            shown = self.images[start : start + columns]
            rows.append(label_row(shown, [str(start + i) for i in range(len(shown))]))
        sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height
        return Picture.of(sheet, self.settings)


def check_fps(fps: float) -> None:
    """MasaError unless it is a number of frames a second."""
    if not is_number(fps) or not 0.0 < fps <= 60.0:
        raise MasaError(f"fps is {fps!r}; expected frames a second, above 0 and at most 60")


def check_form(path: Path, overwrite: bool) -> None:
    """MasaError where frames could not be saved under a name, before they are made."""
    suffix = path.suffix.lower()
    if not suffix:
        taken = [name for name in ("source.png", SETTINGS) if (path / name).exists()]
        if path.is_dir():
            taken += [file.name for file in sorted(path.glob("frame_*.png"))][:1]
        elif path.exists():
            raise MasaError(f"{path} is a file; expected {FORMS}")
        if not overwrite and taken:
            raise MasaError(f"{path} already holds {', '.join(taken)}; {REPLACE}")
        return
    if suffix not in (*ANIMATIONS, ".mp4"):
        raise MasaError(f"frames cannot be saved as {path.name}; expected {FORMS}")
    if suffix == ".mp4":
        ffmpeg()
    for one in (path, _beside(path)) if suffix == ".mp4" else (path,):
        if one.exists() and not overwrite and not one.is_dir():
            raise MasaError(f"{one} is already there; {REPLACE}")
        check_free(one, True, "path")


def file_names(frames: int) -> list[str]:
    """What a folder of so many frames holds."""
    return [*(f"frame_{i:04d}.png" for i in range(frames)), "source.png", SETTINGS]


def _frames_in(folder: Path) -> int:
    """How many frames a folder's settings say that it holds; 0 where there are none."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return int(settings["frames"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read_run(path: str | Path) -> tuple[dict[str, Any], Path]:
    """The settings of whatever masa saved, and the file that holds them: a PNG, animation, film, or folder of frames.

    MasaError where there are none, FileNotFoundError where nothing is.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}; give the path of a picture, a video or a folder that masa saved")
    remedy = "expected a picture, an animation, a film or a folder saved by masa and not edited since"
    if path.is_dir():
        return _read_json(path / SETTINGS, f"{path} holds no {SETTINGS}; {remedy}"), path / SETTINGS
    if path.suffix.lower() in FILMS:
        return _read_json(_beside(path), f"{path} has no {_beside(path).name} beside it; {remedy}"), path
    if path.suffix.lower() not in (".gif", ".webp"):
        return read_settings(path), path
    with Image.open(path) as picture:
        comment = picture.info.get("comment", b"")
        text = comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)
        text = text or str(picture.getexif().get(DESCRIPTION, ""))
    if not text:
        return _read_json(_beside(path), f"{path} carries no masa settings; {remedy}"), path
    return parse_settings(text, path, remedy), path


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    if not path.is_file():
        raise MasaError(problem)
    return parse_settings(path.read_text(encoding="utf-8"), path, "take another copy")
