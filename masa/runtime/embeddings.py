"""Textual inversion: words of a model whose vectors come from files, beside the checkpoint's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from masa.errors import MasaError
from masa.models.clip import TextEncoder, TokenTable
from masa.models.tokenizer import Tokenizer, fold
from masa.runtime.networks import sharing_copy
from masa.weights.embeddings import OpenedEmbedding, open_embedding

EmbeddingPath = str | Path
# A file, or (what its word is to be called, the file).
EmbeddingGiven = EmbeddingPath | tuple[str, EmbeddingPath]


@dataclass(frozen=True)
class Embedding:
    """A textual-inversion file of a model: its path as given, its word's name, its SHA-256 once it is read.

    name: None where the file names its words.
    """

    path: str
    name: str | None = None
    sha256: str | None = None

    def describe(self) -> dict[str, Any]:
        """As settings hold it, in JSON's types."""
        return {"path": self.path, "name": self.name, "sha256": self.sha256}


def as_embeddings(given: EmbeddingGiven | Sequence[EmbeddingGiven | Embedding] | None) -> tuple[Embedding, ...]:
    """What load() was given: a path, (name, path), or a list of these. MasaError for anything else."""
    if given is None:
        return ()
    items = given if isinstance(given, list) or _is_all_embeddings(given) else [given]
    found = []
    for item in items:  # type: ignore[union-attr]
        if isinstance(item, Embedding):
            found.append(item)
        elif isinstance(item, str | Path):
            found.append(Embedding(str(item)))
        elif (
            isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], str | Path)
        ):
            found.append(Embedding(str(item[1]), item[0]))
        else:
            raise MasaError(f"embeddings hold {item!r}; expected a path, (name, path), or a list of these")
    return tuple(found)


def _is_all_embeddings(given: object) -> bool:
    return isinstance(given, tuple) and all(isinstance(item, Embedding) for item in given)


def open_embeddings(embeddings: Sequence[Embedding], width: int) -> list[OpenedEmbedding]:
    """Their words and vectors. CheckpointError for files that do not fit; MasaError where one has changed.

    MasaError, too, where two words have one name, case aside.
    """
    opened = [open_embedding(embedding.path, embedding.name, width) for embedding in embeddings]
    owners: dict[str, Path] = {}
    for embedding, found in zip(embeddings, opened, strict=True):
        if embedding.sha256 not in (None, found.sha256):
            raise MasaError(
                f"{embedding.path} has changed since it was loaded (its SHA-256 is {found.sha256[:12]}.., expected "
                f"{str(embedding.sha256)[:12]}..); put the old file back, or begin anew with the new one"
            )
        for word in found.vectors:
            key = " ".join(fold(word).split())
            if key in owners:
                raise MasaError(
                    f"{found.path} and {owners[key]} both hold a word {word!r}; give one another name: (name, path)"
                )
            owners[key] = found.path
    return opened


def with_words(
    text_encoder: TextEncoder, tokenizer: Tokenizer, opened: Sequence[OpenedEmbedding], dtype: torch.dtype
) -> tuple[TextEncoder, Tokenizer]:
    """Copies that know these words and no others, on the same weights.

    A word's token ids follow the vocabulary's, and index a table beside the checkpoint's. dtype: the text encoder's.
    """
    table = [vectors for found in opened for vectors in found.vectors.values()]
    first = text_encoder.config.vocab_size
    ids: dict[str, tuple[int, ...]] = {}
    for found in opened:
        for word, vectors in found.vectors.items():
            ids[word] = tuple(range(first, first + len(vectors)))
            first += len(vectors)
    twin = sharing_copy(text_encoder)
    own = cast(nn.Embedding, twin.model.get_input_embeddings())
    twin.model.set_input_embeddings(TokenTable(own, torch.cat(table).to(dtype) if table else None))
    return twin, tokenizer.with_words(ids)


def recorded(embeddings: Sequence[Embedding], opened: Sequence[OpenedEmbedding]) -> tuple[Embedding, ...]:
    """The embeddings with what tells them again: their digests, and the names of words that files do not name."""
    return tuple(
        replace(
            embedding,
            name=next(iter(found.vectors)) if len(found.vectors) == 1 else None,
            sha256=found.sha256,
        )
        for embedding, found in zip(embeddings, opened, strict=True)
    )
