"""Labels show the letters of the prompts they stand for."""

from __future__ import annotations

import pytest
from PIL import Image, ImageFont

from masa.output.labels import label_font
from masa.output.result import MOST_LINES, label_row, wrap


@pytest.mark.parametrize(
    "text", ["un chat à côté d'une fenêtre", "кошка", "γάτα", "größer, żółw, ağaç", "“quoted” — …"]
)
def test_letters_are_no_boxes(text):
    font = label_font(14, [text])
    box = bytes(font.getmask("\uffff"))
    assert not [letter for letter in text if not letter.isspace() and bytes(font.getmask(letter)) == box]
    assert len({bytes(font.getmask(letter)) for letter in set(text)}) > 1


def test_another_font_is_taken_where_the_own_one_lacks_letters(monkeypatch):
    """A system's font with Japanese, if it has one: here a stand-in that has every letter."""
    asked = []
    truetype = ImageFont.truetype

    class Everything:
        def getmask(self, letter):
            return b"box" if letter == "\uffff" else letter.encode()

    def find(name, size):
        asked.append(name)
        if "Noto" in str(name):
            raise OSError("not on this system")
        return truetype(name, size) if "DejaVu" in str(name) else Everything()

    monkeypatch.setattr(ImageFont, "truetype", find)
    assert isinstance(label_font(14, ["猫が立っている"]), Everything)
    assert len(asked) > 2
    assert not isinstance(label_font(14, ["a cat"]), Everything)


def test_words_without_spaces_are_broken_to_the_width():
    font = label_font(14, [])
    lines = wrap("x" * 60, font, 100)
    assert "".join(lines) == "x" * 60
    assert len(lines) > 3
    assert all(font.getlength(line) <= 100 for line in lines)
    assert wrap("x" * 600, font, 100)[-1] == ".."
    assert len(wrap("x " * 600, font, 100)) == MOST_LINES


def test_a_row_is_labelled(tmp_path):
    pictures = [Image.new("RGB", (128, 128), "gray")] * 2
    sheet = label_row(pictures, ["eine Katze, größer", "кошка стоит"])
    assert sheet.size == (128 * 2 + 4, sheet.height)
    assert sheet.height > 128
    assert len(sheet.crop((0, 0, 128, sheet.height - 128)).getcolors()) > 2
