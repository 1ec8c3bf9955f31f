"""Where a model came from, as a run's settings keep it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from masa.runtime.embeddings import Embedding
from masa.runtime.lora import Lora


@dataclass(frozen=True)
class Origin:
    """Where a model came from: load()'s arguments as given, and "demo" for the embedded model.

    lora: those merged into it. embeddings: those whose words it knows.
    """

    checkpoint: str
    vae: str | None = None
    tokenizer: str | None = None
    lora: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    clip_skip: int = 0
    prediction_type: str | None = None
    ema: bool = False

    def describe(self) -> dict[str, Any]:
        """As settings hold it, in JSON's types."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        told["lora"] = [lora.describe() for lora in self.lora]
        told["embeddings"] = [embedding.describe() for embedding in self.embeddings]
        return told
