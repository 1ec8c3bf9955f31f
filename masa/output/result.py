"""What a run gives back: pictures that carry their settings, latents, masks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from torch import Tensor

from masa.errors import MasaError
from masa.io.files import load_tensors, replacing, save_tensors
from masa.io.folders import writing_together
from masa.output.labels import label_font
from masa.output.notebook import picture_html, png, shorten, table_html

KEY = "masa"  # the text chunks of a PNG that hold its settings: masa, masa.1, ..
TENSORS = "result.safetensors"  # what is not a picture, beside the pictures
FORMAT = "masa result 1"
BIG = 2**20  # numbers; larger maps are saved as float16
MOST_LINES = 8  # of a label; a prompt may be a page long
LONGEST_LABEL = 1000  # characters; more would not fit
CHUNK = 900_000  # characters in each; Pillow opens no PNG with a text chunk above 2**20 bytes


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
        """PIL's save. PNGs carry the settings; a file is written under another name and then renamed.

        WriteError, and no file, where the disk is full.
        """
        is_path = isinstance(fp, str | Path)
        named_png = is_path and Path(fp).suffix.lower() == ".png"
        if (format or "").upper() == "PNG" or (format is None and named_png):
            params.setdefault("pnginfo", png_info(self.settings))
        if not is_path:
            super().save(fp, format, **params)
            return
        encoded = io.BytesIO()
        encoded.name = str(fp)  # by which Pillow tells the format
        # In memory first: Pillow takes no notice of a disk that takes only a part of the last block.
        super().save(encoded, format, **params)
        with replacing(fp) as temporary:
            temporary.write_bytes(encoded.getbuffer())


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """Settings as the text chunks of a PNG."""
    chunks = PngInfo()
    text = json.dumps(dict(settings))  # ASCII: as many bytes as characters
    for i, start in enumerate(range(0, len(text), CHUNK)):
        chunks.add_itxt(f"{KEY}.{i}" if i else KEY, text[start : start + CHUNK], zip=True)
    return chunks


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings inside a PNG that masa saved. MasaError where there are none."""
    remedy = "expected a PNG saved by masa and not edited since"
    try:
        with Image.open(path) as picture:
            picture.load()
            texts = getattr(picture, "text", {})
    except UnidentifiedImageError as error:
        raise MasaError(f"{path} is not a picture; {remedy}") from error
    if KEY not in texts:
        raise MasaError(f"{path} carries no masa settings; {remedy}")
    pieces = [texts[KEY]]
    while (name := f"{KEY}.{len(pieces)}") in texts:
        pieces.append(texts[name])
    return parse_settings("".join(pieces), path, remedy)


def parse_settings(text: str, path: str | Path, remedy: str) -> dict[str, Any]:
    """Settings from the text that a file carries. MasaError where it is damaged, or none of masa's."""
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise MasaError(f"{path} carries damaged masa settings; {remedy}") from error
    if not isinstance(settings, dict) or "function" not in settings:
        raise MasaError(f"{path} carries settings that are not masa's; {remedy}")
    return settings


@dataclass(frozen=True, repr=False)
class Result:
    """One source and N targets.

    images: PIL pictures, source first. latents (1 + N, 4, h, w): float32, on the CPU. masks: by control (its
    place in the list) and step: (1 + N, h, w), source first. attention, queries, predictions: what RecordAttention,
    RecordQueries and RecordPredictions kept, by control and by name, (layer, step) or step. settings: JSON values
    that suffice to run it again.
    """

    images: list[Picture]
    latents: Tensor
    settings: Mapping[str, Any]
    masks: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)
    attention: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    queries: Mapping[int, Mapping[tuple[int, int], Tensor]] = field(default_factory=dict)
    predictions: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)

    def __repr__(self) -> str:
        size = f"{self.source.width}x{self.source.height}"
        return (
            f"Result({shorten(self.settings['source'], 60)!r} -> "
            f"[{', '.join(repr(shorten(target, 60)) for target in self.settings['target'])}], {size}, "
            f"{self.settings['steps']} steps, seed {self.settings['seed']})"
        )

    def _repr_png_(self) -> bytes:
        return png(self.grid())

    def _repr_html_(self) -> str:
        return picture_html(self.grid()) + table_html("settings", self.settings)

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

    def save(self, folder: str | Path, overwrite: bool = False) -> list[Path]:
        """Write source.png, target_0.png, .., grid.png and result.safetensors. Returns their paths.

        All carry the settings; the last holds everything else for `Result.load`, maps of more than 2**20 numbers
        as float16. The files appear together or not at all, also where the process is killed or the disk is full:
        they are written into a hidden folder beside, which then takes the folder's place (`writing_together`).
        A folder that cannot be moved, such as the working folder or a mount point, gets them one by one instead,
        result.safetensors last: without it, or beside pictures of another run, `load` finds no result there.

        overwrite: replace an older result, and remove the pictures of its further targets; all other files of the
        folder stay. MasaError, and nothing is changed, where files would be replaced unasked; WriteError, a MasaError
        and an OSError, where the disk is full: save elsewhere then.
        """
        folder, names = Path(folder), file_names(len(self.targets))
        edited = (self.settings.get("trajectory") or {}).get("image")
        surplus = [
            path.name
            for path in (_surplus(folder, len(self.targets)) if overwrite else ())
            if edited is None or path.resolve() != Path(edited).resolve()  # the picture that this very run edited stays
        ]
        with writing_together(folder, names, overwrite=overwrite, dropped=surplus) as stage:
            for name, picture in zip(names[:-1], [*self.images, self.grid()], strict=True):
                picture.save(stage / name)
            kept = self._kept()
            about = {"format": FORMAT, "settings": json.dumps(self.settings), "order": json.dumps(list(kept))}
            save_tensors(stage / TENSORS, {"latents": self.latents} | kept, about)
        return [folder / name for name in names]

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """Read back what `save` wrote. MasaError where files are missing, damaged or of different runs."""
        path = Path(folder) / TENSORS
        remedy = "expected a folder written by Result.save, or by masa sample, edit or sdedit"
        if not path.is_file():
            raise MasaError(f"{folder} holds no {TENSORS}; {remedy}")
        tensors, metadata = load_tensors(path, FORMAT, "saved result", remedy)
        settings = json.loads(metadata["settings"])
        images = []
        for branch, name in enumerate(file_names(len(settings["target"]))[: 1 + len(settings["target"])]):
            if not (path.parent / name).is_file():
                raise MasaError(f"{folder} lacks {name}; {remedy}")
            if read_settings(path.parent / name) != settings | {"branch": branch}:
                raise MasaError(f"{path.parent / name} and {TENSORS} beside it are of different runs; {remedy}")
            with Image.open(path.parent / name) as picture:
                images.append(Picture.of(picture, settings | {"branch": branch}))
        kept: dict[str, dict[int, dict[Any, Tensor]]] = {kind: {} for kind in NAMES}
        for key in json.loads(metadata["order"]):
            kind, control, name = key.split("/", 2)
            kept[kind].setdefault(int(control), {})[NAMES[kind](name)] = tensors[key]
        return cls(
            images,
            tensors["latents"],
            settings,
            kept["masks"],
            kept["attention"],
            kept["queries"],
            kept["predictions"],
        )

    def _kept(self) -> dict[str, Tensor]:
        """What controls left, under one key each: the kind, the control's place, the tensor's own name."""
        tensors = {}
        for kind in NAMES:
            for control, found in getattr(self, kind).items():
                for name, tensor in found.items():
                    parts = name if isinstance(name, tuple) else (name,)
                    half = tensor.is_floating_point() and tensor.numel() > BIG
                    key = "/".join(map(str, (kind, control, *parts)))
                    tensors[key] = tensor.to(torch.float16) if half else tensor
        return tensors


def read_saved(folder: str | Path) -> dict[str, Any] | None:
    """The settings of the result that a folder holds whole, or None. Only the head of a file is read."""
    try:
        with safe_open(Path(folder) / TENSORS, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            return None
        settings = json.loads(metadata["settings"])
        names = file_names(len(settings["target"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    whole = isinstance(settings, dict) and all((Path(folder) / name).is_file() for name in names)
    return settings if whole else None


def _surplus(folder: Path, targets: int) -> list[Path]:
    """Target pictures beyond the first `targets` that a saved result says it wrote, and that nobody replaced."""
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            return []
        settings = json.loads(metadata["settings"])
        names = file_names(len(settings["target"]))[1 + targets : -2]
    except (OSError, SafetensorError, KeyError, ValueError):  # no older result, or none that says what it wrote
        return []
    return [folder / name for n, name in enumerate(names, 1 + targets) if _is_of(folder / name, settings, n)]


def _is_of(path: Path, settings: Mapping[str, Any], branch: int) -> bool:
    """Whether a file is the picture of a run's branch."""
    try:
        return read_settings(path) == {**settings, "branch": branch}
    except (MasaError, OSError, ValueError, SyntaxError):  # the last two are Pillow's, of damaged files
        return False


def _layer_and_step(name: str) -> tuple[int, int]:
    layer, step = name.split("/")
    return int(layer), int(step)


# What controls leave in a result, and how its names are read back from text.
NAMES: Mapping[str, Callable[[str], Any]] = {
    "masks": int,
    "attention": str,
    "queries": _layer_and_step,
    "predictions": int,
}


def file_names(targets: int) -> list[str]:
    """What `Result.save` writes for a number of targets."""
    return ["source.png", *(f"target_{i}.png" for i in range(targets)), "grid.png", TENSORS]


def label_row(images: Sequence[Image.Image], labels: Sequence[str], gap: int = 4) -> Image.Image:
    """Pictures of one size in a row, each under its label, which is wrapped to the picture's width."""
    size = max(11, min(16, images[0].width // 14))
    font = label_font(size, labels)
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
    """At most 8 lines of at most `width` pixels, broken at spaces, and where a word is longer."""
    lines: list[str] = []
    for word in _words(text, font, width - 2):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width - 2:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], ".."]
    return lines or [""]


def _words(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Iterator[str]:
    """Words of a text; one that is wider than `width` pixels, such as a Japanese sentence, in pieces."""
    for word in text[:LONGEST_LABEL].split():
        while len(word) > 1 and font.getlength(word) > width:
            fits = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
            yield word[:fits]
            word = word[fits:]
        yield word
