"""Files: written so that none is ever half written, found again, told apart."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from masa.errors import MasaError

# What a write fails with where there is no room, or nothing may be written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class WriteError(MasaError, OSError):
    """A file could not be written: the disk is full, or read-only."""


@contextmanager
def told_plainly(path: str | Path) -> Iterator[None]:
    """WriteError, naming the file, where a full or read-only disk ends what is inside."""
    try:
        yield
    except SafetensorError as error:  # which says in words what the system said
        if "os error" not in str(error):
            raise
        raise WriteError(f"{path} could not be written ({error}); make room there, or save elsewhere") from error
    except OSError as error:
        if isinstance(error, WriteError) or error.errno not in NO_ROOM:
            raise
        raise WriteError(
            f"{path} could not be written ({error.strerror}); make room there, or save elsewhere"
        ) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes `path`'s place at the end, or vanishes on an error.

    The folder is made if need be; the temporary name keeps the suffix, by which writers tell the format. WriteError
    where the disk is full or read-only.
    """
    path = Path(path)
    if path.is_dir():
        raise MasaError(f"{path} is a folder; expected a file's name")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with told_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the user's umask gives; some writers make private files instead
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def check_folder(folder: Path, option: str) -> None:
    """MasaError unless files can be written into a folder, or into one made there; option: what asks for it."""
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise MasaError(f"{option} {folder}: {above} is a file; expected a folder to write into")
    if not os.access(above, os.W_OK | os.X_OK):
        raise MasaError(f"{option} {folder}: {above} cannot be written to; give another folder")


def check_free(path: Path, overwrite: bool, option: str) -> None:
    """MasaError where a file would be replaced unasked, or cannot be written."""
    if path.is_dir():
        raise MasaError(f"{option} {path}: {path} is a folder; expected a file's name")
    if path.exists() and not overwrite:
        raise MasaError(f"{path} is already there; give another {option}, or --overwrite")
    check_folder(path.parent, option)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file; tensors may be views of each other."""
    with replacing(path) as temporary:
        save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary, dict(metadata)
        )


@contextmanager
def reading(path: str | Path, kind: str, remedy: str) -> Iterator[None]:
    """MasaError, naming the file and what it should be, where it cannot be read as safetensors."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MasaError(f"{path} cannot be read as a {kind} ({error})") from error
    except SafetensorError as error:
        raise MasaError(f"{path} is not a whole safetensors file ({error}); {remedy}") from error


def load_tensors(path: str | Path, format: str, kind: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose metadata name this format. MasaError for any other file.

    kind, remedy: what errors call it, and what to do instead.
    """
    with reading(path, kind, remedy), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != format:
            raise MasaError(f"{path} is no {kind}; {remedy}")
        # Copies: the mapped file may be overwritten while they live.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def find_near(path: str | Path, near: str | Path) -> Path | None:
    """A file or folder under its own path, or under one relative to the folder of `near` or those above it."""
    for folder in (Path(), *Path(near).resolve().parents):
        if (folder / path).exists():
            return folder / path
    return None
