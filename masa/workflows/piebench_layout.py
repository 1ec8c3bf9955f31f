"""PIE-Bench's folder: pictures, prompts and masks as they were published (2310.01506)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from masa.errors import MasaError
from masa.io.pictures import ORIENTATION, open_picture

MAPPING_FILE, PICTURES = "mapping_file.json", "annotation_images"
FIELDS = ("image_path", "original_prompt", "editing_prompt", "editing_type_id", "blended_word", "mask")

# What "editing_type_id" means.
TYPES: Mapping[str, str] = {
    "0": "random",
    "1": "change object",
    "2": "add object",
    "3": "delete object",
    "4": "change content",
    "5": "change pose",
    "6": "change color",
    "7": "change material",
    "8": "change background",
    "9": "change style",
}


@dataclass(frozen=True)
class Entry:
    """One edit of the benchmark.

    image_path: relative to the folder of pictures. source, target: the prompts without their square brackets.
    blended_words: the edited words of the source's and of the target's prompt, or None. runs: of the mask. size: the
    picture's (height, width).
    """

    id: str
    image: Path
    image_path: str
    source: str
    target: str
    type_id: str
    blended_words: tuple[str, str] | None
    runs: tuple[int, ...]
    size: tuple[int, int] = (512, 512)

    def read_picture(self) -> np.ndarray:
        """The source, uint8 (h, w, 3)."""
        return np.array(open_picture(self.image))

    def read_mask(self) -> np.ndarray:
        """Where the picture may change: uint8 (h, w), 1 there. Errors as in `decode_mask`."""
        return decode_mask(self.runs, *self.size)


def read_layout(folder: str | Path, types: Collection[str] | None = None) -> list[Entry]:
    """The edits that a folder in PIE-Bench's layout describes, in the file's order.

    types: editing type ids, "0".."9"; default all. MasaError where the mapping file or a picture is missing, an entry
    lacks a field, a path leads out of the folder, or a mask does not fit its picture: of several, the first is named.
    """
    folder = Path(folder)
    _check_types(types)
    items = _read_mapping(folder)
    entries, errors = [], []
    for id, item in items.items():
        try:
            entry = _read_entry(folder, id, item)
            if types is None or entry.type_id in types:
                entries.append(replace(entry, size=_check_files(entry)))
        except MasaError as error:
            errors.append(error)
    if errors:
        more = f" (and {len(errors) - 1} more entries are wrong)" if len(errors) > 1 else ""
        raise MasaError(f"{errors[0]}{more}")
    if not entries:
        wanted = "" if types is None else f" of type {', '.join(sorted(types))}"
        raise MasaError(f"{folder / MAPPING_FILE} has no edits{wanted}; expected id -> prompts, picture and mask")
    return entries


def _check_types(types: Collection[str] | None) -> None:
    unknown = [type_id for type_id in types or () if type_id not in TYPES]
    if unknown or isinstance(types, str):
        known = ", ".join(f"{type_id!r} ({name})" for type_id, name in TYPES.items())
        raise MasaError(f"editing types are {types!r}; expected some of {known}")


def _read_mapping(folder: Path) -> dict[str, Any]:
    path = folder / MAPPING_FILE
    if not path.is_file():
        raise MasaError(
            f"{folder} holds no {MAPPING_FILE}; expected PIE-Bench's folder, with {MAPPING_FILE} and {PICTURES}/"
        )
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MasaError(f"{path} is no whole JSON file ({error}); take another copy") from error
    if not isinstance(items, dict):
        raise MasaError(f"{path} holds a {type(items).__name__}; expected an object, id -> edit")
    return items


def _read_entry(folder: Path, id: str, item: Any) -> Entry:
    """One edit of the file. MasaError for what is missing or of the wrong kind."""
    where = f"{MAPPING_FILE}, {id!r}"
    if not isinstance(item, Mapping):
        raise MasaError(f"{where} is {item!r:.60}; expected an object with {', '.join(FIELDS)}")
    lacking = [name for name in FIELDS if name not in item]
    if lacking:
        raise MasaError(f"{where} lacks {', '.join(lacking)}")
    for name in FIELDS[:-1]:
        if not isinstance(item[name], str):
            raise MasaError(f"{where}: {name} is {item[name]!r:.60}; expected a text")
    if item["editing_type_id"] not in TYPES:
        raise MasaError(f"{where}: editing_type_id is {item['editing_type_id']!r}; expected '0' to '9'")
    pictures = (folder / PICTURES).resolve()
    image = folder / PICTURES / item["image_path"]
    if not image.resolve().is_relative_to(pictures):
        raise MasaError(f"{where}: image_path is {item['image_path']!r}, outside {PICTURES}/")
    words = item["blended_word"].split()
    return Entry(
        id,
        image,
        item["image_path"],
        plain_prompt(item["original_prompt"]),
        plain_prompt(item["editing_prompt"]),
        item["editing_type_id"],
        (words[0], words[1]) if len(words) >= 2 else None,
        check_runs(item["mask"], where),
    )


def plain_prompt(prompt: str) -> str:
    """A prompt without the square brackets that mark what an edit changes."""
    return prompt.replace("[", "").replace("]", "")


def check_runs(runs: Any, where: str) -> tuple[int, ...]:
    """A mask's pairs (start, length). MasaError unless they are whole numbers from 0, in pairs."""
    whole = isinstance(runs, Sequence) and not isinstance(runs, str)
    if not whole or len(runs) % 2 or not all(type(number) is int and number >= 0 for number in runs):
        raise MasaError(f"{where}: the mask is {runs!r:.60}; expected whole numbers from 0, in pairs (start, length)")
    return tuple(runs)


def _check_files(entry: Entry) -> tuple[int, int]:
    """(height, width) of an edit's picture, of which only the head is read.

    MasaError where it is not there, or the mask does not fit it.
    """
    try:
        with Image.open(entry.image) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) >= 5
            height, width = picture.size if turned else picture.size[::-1]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MasaError(f"no picture at {entry.image}, which {MAPPING_FILE} names for {entry.id!r}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise MasaError(f"{entry.image} is no picture that Pillow can read ({error}); take another copy") from error
    try:
        check_fit(entry.runs, height, width)
    except MasaError as error:
        raise MasaError(f"{MAPPING_FILE}, {entry.id!r}: {error}") from error
    return height, width


def check_fit(runs: Sequence[int], height: int, width: int) -> None:
    """MasaError where a run of a mask begins behind the last pixel."""
    late = [start for start in runs[::2] if start > height * width]
    if late:
        raise MasaError(
            f"the mask has a run from pixel {late[0]} on, and the picture has {height}x{width} = {height * width}; it "
            "is another picture's mask, or the picture was scaled"
        )


def decode_mask(runs: Sequence[int], height: int, width: int) -> np.ndarray:
    """Pairs (start, length) over the pixels row by row -> uint8 (h, w), 1 where the picture may change.

    A run that goes on behind the last pixel is cut there. The outermost row and column on each side are 1, whatever
    the runs say: annotations are unsure there. MasaError for a run that begins behind the last pixel. 2310.01506.
    """
    check_fit(runs, height, width)
    flat = np.zeros(height * width, np.uint8)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = 1
    mask = flat.reshape(height, width)
    mask[[0, -1], :] = 1
    mask[:, [0, -1]] = 1
    return mask


def find_picture(folder: Path, entry: Entry) -> Path | None:
    """The picture that another program made for an edit: under the source's name, or with another ending, or by id."""
    for base in (folder / PICTURES, folder):
        for name in (base / entry.image_path, base / Path(entry.image_path).name, base / entry.id):
            for path in (name, *(name.with_suffix(ending) for ending in (".png", ".jpg", ".jpeg", ".webp"))):
                if path.is_file():
                    return path
    return None


def fit_result(picture: np.ndarray, size: tuple[int, int], where: str | Path) -> np.ndarray:
    """A result (h, w, 3) of the source's size; of a sheet with several pictures the last. MasaError for another size.

    size: (height, width) of the source. The published programs save sheets of four pictures in a row.
    """
    height, width = picture.shape[:2]
    if (height, width) == size:
        return picture
    if height == width or height < size[0] or width < size[1]:
        raise MasaError(
            f"{where} is {height}x{width} pixels and its source {size[0]}x{size[1]}; expected that size, or a sheet "
            "whose last picture has it"
        )
    return picture[height - size[0] :, width - size[1] :]
