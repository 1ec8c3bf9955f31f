"""A safetensors file written tensor by tensor, larger than memory, and read where it lies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from masa.errors import MasaError
from masa.io.files import reading

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
# The header stands first in the file and is known last: room is left for it, the rest filled with spaces.
ENTRY_BYTES = 160
EXTRA_ENTRIES = 32


class TensorWriter:
    """Appends tensors to a new safetensors file; `finish` makes it whole. A context manager: it closes the file."""

    def __init__(self, path: Path, entries: int) -> None:
        """entries: how many tensors will be appended, give or take 30."""
        self.room = (entries + EXTRA_ENTRIES) * ENTRY_BYTES // 8 * 8
        self.header: dict[str, Any] = {}
        self.offset = 0
        self.file = path.open("wb")
        self.file.seek(8 + self.room)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def append(self, name: str, tensor: Tensor) -> None:
        dense = tensor.detach().cpu().contiguous()
        offsets = [self.offset, self.offset + dense.nbytes]
        self.header[name] = {"dtype": DTYPES[dense.dtype], "shape": list(dense.shape), "data_offsets": offsets}
        self.offset = offsets[1]
        self.file.write(dense.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def finish(self, metadata: Mapping[str, str]) -> None:
        header = json.dumps({"__metadata__": dict(metadata)} | self.header, separators=(",", ":")).encode()
        assert len(header) <= self.room, f"{len(self.header)} tensors leave no room for the header"
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.flush()


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, mapped: read from the file when they are used."""

    def __init__(self, path: str | Path, wanted: str, what: str, remedy: str) -> None:
        """wanted: the format that its metadata must name. MasaError, naming `what`, for any other file."""
        with ExitStack() as refused:
            with reading(path, what, remedy):
                self.file = refused.enter_context(safe_open(path, framework="pt"))
                self.names = list(self.file.keys())
                self.sizes = {name: _nbytes(self.file.get_slice(name)) for name in self.names}
            if (self.file.metadata() or {}).get("format") != wanted:
                raise MasaError(f"{path} is no {what}; {remedy}")
            refused.pop_all()  # it stays open

    def close(self) -> None:
        """Let go of the file; the tensors read from it before are good as long as they live."""
        self.file.__exit__(None, None, None)

    def only(self, names: Sequence[str]) -> TensorFile:
        """The same file, with these names alone."""
        chosen = object.__new__(TensorFile)
        chosen.file, chosen.names = self.file, list(names)
        chosen.sizes = {name: self.sizes[name] for name in names}
        return chosen

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sizes:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _nbytes(entry: Any) -> int:
    """Size of a tensor in a file, without reading it."""
    widths = {name: dtype.itemsize for dtype, name in DTYPES.items()}
    return math.prod(entry.get_shape()) * widths.get(entry.get_dtype(), 0)
