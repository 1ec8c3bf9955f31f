"""Files: written so that none is ever half written, found again, told apart."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes `path`'s place at the end, or vanishes on an error.

    The folder is made if need be; the temporary name keeps the suffix, by which writers tell the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; some writers make private files instead
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_near(path: str | Path, near: str | Path) -> Path | None:
    """A file or folder under its own path, or under one relative to the folder of `near` or those above it."""
    for folder in (Path(), *Path(near).resolve().parents):
        if (folder / path).exists():
            return folder / path
    return None
