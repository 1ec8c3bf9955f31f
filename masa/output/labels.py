"""The font of labels: one that has their letters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import ImageFont

# Latin, Greek, Cyrillic, Arabic, Hebrew and more; its licence lies beside it.
OWN = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"
# For the rest, what systems have: Pillow looks for these names in their folders.
WIDE = (
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
    *("Arial Unicode.ttf", "msgothic.ttc", "msyh.ttc", "malgun.ttf"),
)


def label_font(size: int, texts: Sequence[str]) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels that has all letters of the texts, as far as one is found here."""
    own = ImageFont.truetype(OWN, size)
    if _has(own, texts):
        return own
    for name in WIDE:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:  # not on this system
            continue
        if _has(font, texts):
            return font
    return own


def _has(font: ImageFont.FreeTypeFont, texts: Sequence[str]) -> bool:
    """Whether no letter shows as the box that stands for missing ones."""
    box = bytes(font.getmask("\uffff"))
    letters = {letter for text in texts for letter in text if not letter.isspace()}
    return all(bytes(font.getmask(letter)) != box for letter in letters)
