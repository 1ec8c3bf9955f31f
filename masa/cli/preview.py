"""--preview: what a run predicts so far, in one file that other programs may watch."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from PIL import Image

from masa.controls.live_preview import LivePreview
from masa.errors import MasaError
from masa.io.files import check_free, replacing

SECONDS = 1.0  # between two writings, at least
GAP = 4  # pixels between pictures


def add_preview(group: argparse._ArgumentGroup) -> None:
    text = "keep this picture of what the run predicts, source first, up to date while it goes on"
    group.add_argument("--preview", metavar="FILE.png", help=text)
    text = "TAESD's file or folder, for a sharper --preview (default: colours from the latents alone)"
    group.add_argument("--preview-decoder", metavar="FILE", help=text)


def build_preview(args: argparse.Namespace) -> list[LivePreview]:
    """The control that --preview asks for, if it does. MasaError for a file that cannot be written."""
    if args.preview is None:
        if args.preview_decoder is not None:
            raise MasaError(f"--preview-decoder {args.preview_decoder} would do nothing: give --preview FILE.png")
        return []
    path = Path(args.preview)
    if path.suffix.lower() != ".png":
        raise MasaError(f"--preview {path} must end in .png")
    check_free(path, args.overwrite, "--preview")
    return [LivePreview(PreviewFile(path), args.preview_decoder or "linear")]


class PreviewFile:
    """Writes the pictures of a step side by side, whole, at most once a second; the first step's at once."""

    def __init__(self, path: Path, seconds: float = SECONDS) -> None:
        self.path = path
        self.seconds = seconds
        self.written: float | None = None

    def __call__(self, step: int, pictures: list[Image.Image]) -> None:
        now = time.monotonic()
        if self.written is not None and now - self.written < self.seconds:
            return
        width, height = pictures[0].size
        row = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
        for i, picture in enumerate(pictures):
            row.paste(picture, (i * (width + GAP), 0))
        with replacing(self.path) as temporary:
            row.save(temporary)
        self.written = now
