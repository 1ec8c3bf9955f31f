"""How values show themselves in a notebook: HTML that needs nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

LONGEST = 300  # characters of a value in a table; a schedule's or a control's may be long


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def picture_html(picture: Image.Image) -> str:
    """A picture as an element that holds its own bytes."""
    data = base64.b64encode(png(picture)).decode("ascii")
    return f'<img width="{picture.width}" height="{picture.height}" src="data:image/png;base64,{data}">'


def table_html(title: str, values: Mapping[str, Any]) -> str:
    """Names and values as a table that opens under its title."""
    rows = "".join(
        f"<tr><th style='text-align: left'>{escape(name)}</th>"
        f"<td style='text-align: left'>{escape(shorten(str(value)))}</td></tr>"
        for name, value in values.items()
    )
    return f"<details><summary>{escape(title)}</summary><table>{rows}</table></details>"


def shorten(text: str, longest: int = LONGEST) -> str:
    """A text cut to a number of characters, with dots where it was."""
    return text if len(text) <= longest else f"{text[: longest - 2]}.."
