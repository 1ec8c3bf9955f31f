"""What a run gives back: pictures that carry their settings, latents, masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from masa.errors import MasaError
from masa.files import replacing

KEY = "masa"  # the text chunk of a PNG that holds its settings


class Picture(Image.Image):
    """A PIL picture that writes the settings it was made with into the PNGs it is saved as."""

    settings: Mapping[str, Any]

    @classmethod
    def of(cls, image: Image.Image, settings: Mapping[str, Any]) -> Picture:
        picture = image.copy()
        picture.__class__ = cls
        assert isinstance(picture, cls)
        picture.settings = settings
        return picture

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """PIL's save. PNGs carry the settings; a file is written under another name and then renamed."""
        is_path = isinstance(fp, str | Path)
        named_png = is_path and Path(fp).suffix.lower() == ".png"
        if (format or "").upper() == "PNG" or (format is None and named_png):
            chunks = PngInfo()
            chunks.add_itxt(KEY, json.dumps(self.settings), zip=True)
            params.setdefault("pnginfo", chunks)
        if not is_path:
            super().save(fp, format, **params)
            return
        with replacing(fp) as temporary:
            super().save(temporary, format, **params)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings inside a PNG that masa saved. MasaError where there are none."""
    with Image.open(path) as picture:
        picture.load()
        text = getattr(picture, "text", {}).get(KEY)
    if text is None:
        raise MasaError(f"{path} carries no masa settings; expected a PNG saved by masa and not edited since")
    return json.loads(text)


@dataclass(frozen=True)
class Result:
    """One source and N targets.

    images: PIL pictures, source first. latents (1 + N, 4, h, w): float32, on the CPU. masks: by control (its
    place in the list) and step: (1 + N, h, w), source first. settings: JSON values that suffice to run it again.
    """

    images: list[Picture]
    latents: Tensor
    settings: Mapping[str, Any]
    masks: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)

    @property
    def source(self) -> Picture:
        return self.images[0]

    @property
    def targets(self) -> list[Picture]:
        return self.images[1:]

    @property
    def labels(self) -> list[str]:
        """What to write above each picture: its prompt."""
        names = [self.settings["source"], *self.settings["target"]]
        return [name or ("source" if i == 0 else "(empty prompt)") for i, name in enumerate(names)]

    def grid(self) -> Picture:
        """All pictures side by side, each under its prompt."""
        return Picture.of(label_row(self.images, self.labels), self.settings)

    def save(self, folder: str | Path) -> list[Path]:
        """Write source.png, target_0.png, .. and grid.png, all carrying the settings. Returns their paths."""
        folder = Path(folder)
        names = ["source.png", *(f"target_{i}.png" for i in range(len(self.targets))), "grid.png"]
        for name, picture in zip(names, [*self.images, self.grid()], strict=True):
            picture.save(folder / name)
        return [folder / name for name in names]


def label_row(images: Sequence[Image.Image], labels: Sequence[str], gap: int = 4) -> Image.Image:
    """Pictures of one size in a row, each under its label, which is wrapped to the picture's width."""
    size = max(11, min(16, images[0].width // 14))
    font = ImageFont.load_default(size)
    lines = [wrap(label, font, images[0].width) for label in labels]
    line_height = size + gap
    header = line_height * max(len(wrapped) for wrapped in lines) + 2 * gap
    width, height = images[0].size
    sheet = Image.new("RGB", (len(images) * (width + gap) - gap, header + height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, wrapped) in enumerate(zip(images, lines, strict=True)):
        x = i * (width + gap)
        sheet.paste(image, (x, header))
        for n, line in enumerate(wrapped):
            draw.text((x + 1, gap + n * line_height), line, fill="black", font=font)
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width - 2:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]
