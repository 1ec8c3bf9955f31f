"""Textual-inversion files: vectors that stand for a word of their own, in each of their layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from masa.errors import CheckpointError, MasaError
from masa.io.files import file_digest
from masa.weights.adapters import first_names, refuse_others
from masa.weights.checkpoint import (
    DTYPES,
    PICKLE_SUFFIXES,
    Entries,
    listed,
    read_entries,
    read_metadata,
    read_tensors,
)
from masa.weights.detect import OTHER_CONTEXTS

NAMELESS = ("emb_params", "*")  # keys that are no word: the file's name is
WANTED = "expected a textual-inversion embedding for Stable Diffusion v1 in safetensors"


@dataclass(frozen=True, eq=False)
class OpenedEmbedding:
    """A file's words, each with its vectors (v, width) float32; sha256: of the file."""

    path: Path
    sha256: str
    vectors: Mapping[str, Tensor]


def open_embedding(path: str | Path, name: str | None, width: int) -> OpenedEmbedding:
    """Read a file that holds a word's vectors, several words', or beside a LoRA of cloneofsimo's those of its words.

    name: what the word is to be; default its key, or where that is none (`emb_params`) the file's name. width: of the
    model's token embeddings. CheckpointError for other files and other models' embeddings, FileNotFoundError where
    nothing is, MasaError for a name where there are several words.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no embedding at {path}; give the path of its .safetensors file")
    _refuse_pickle(path)
    entries = read_entries(path)
    metadata = read_metadata(path)
    beside = [key for key in entries if metadata.get(key) == "<embed>"]
    if any(key in entries for key in ("clip_l", "clip_g")):
        raise CheckpointError(f"{path} is an embedding for SDXL (it has vectors for two text encoders); {WANTED}")
    if not beside:
        refuse_others(entries, path, "textual-inversion", WANTED)
    own = {key: entry for key, entry in entries.items() if not beside or key in beside}
    _check(own, width, path)
    if name is not None and len(own) > 1:
        raise MasaError(
            f"{path} holds several words ({', '.join(own)}), and one name was given, {name!r}; leave it out"
        )
    given = {} if name is None else dict.fromkeys(own, name)
    named = {key: path.stem if key in NAMELESS else key for key in own} | given
    for word in named.values():
        if not word.strip():
            raise MasaError(f"{path}: a word is called {word!r}; give a name as (name, path)")
    tensors = {named[key]: tensor.float().reshape(-1, width).clone() for key, tensor in read_tensors(own.items())}
    broken = [word for word, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{path}: NaN or infinite values in {listed(broken)}; take another copy of the file")
    return OpenedEmbedding(path, file_digest(path), tensors)


def _check(entries: Entries, width: int, path: Path) -> None:
    """CheckpointError unless all tensors are vectors of this width, or a few of them."""
    shaped = {key: entry.shape for key, entry in entries.items() if len(entry.shape) in (1, 2) and entry.count}
    if not entries or len(shaped) < len(entries) or any(entry.dtype not in DTYPES for entry in entries.values()):
        raise CheckpointError(f"{path} holds no embeddings ({first_names(entries)}); {WANTED}")
    other = next((shape[-1] for shape in shaped.values() if shape[-1] != width), None)
    if other is not None:
        whose = OTHER_CONTEXTS.get(other, "another model")
        raise CheckpointError(
            f"{path} is an embedding for {whose}: its vectors have {other} numbers, this model's {width}; {WANTED}"
        )


def _refuse_pickle(path: Path) -> None:
    """CheckpointError for a torch.save file, with the command that converts it."""
    if path.is_dir():
        return
    with path.open("rb") as file:
        head = file.read(9)
    pickled = path.suffix in PICKLE_SUFFIXES or head[:2] == b"PK" or head[:1] == b"\x80"
    if pickled and head[8:9] != b"{":
        _pickled(path)


def _pickled(path: Path) -> NoReturn:
    code = (
        "import torch, safetensors.torch as s; "
        f"d = torch.load(open({str(path)!r}, 'rb'), map_location='cpu', weights_only=True); "
        "d = d.get('string_to_param', d); "
        "s.save_file({'emb_params' if k == '*' else k: v.detach().clone().contiguous() for k, v in d.items()}, "
        f"{str(path.with_suffix('.safetensors'))!r})"
    )
    raise CheckpointError(
        f"{path} is a pickled embedding, which may run code when opened; take its .safetensors version, or convert it: "
        f'python -c "{code}"'
    )
