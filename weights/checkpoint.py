"""Safetensors files as one lazily read set of tensors, and strict loading into modules on the meta device."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from masa.errors import CheckpointError

# Tensors are converted in groups of this size, each through a mapping of its own: peak memory is the model in
# its final dtype plus one group, however large the file.
GROUP_BYTES = 128 * 2**20

# Less than this loads in about a second, which needs no progress bar.
SILENT_BYTES = 500 * 10**6

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is, known without reading it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "F32", "F16", "BF16", "I64", ..
    stored: str | None = None  # its name in the file, where that is not the key it is listed under

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        # Names end in the number of bits, as in "BF16" and "F8_E4M3"; "BOOL" alone has none.
        bits = re.search(r"\d+", self.dtype)
        return self.count * (int(bits[0]) // 8 if bits else 1)


Entries = dict[str, Entry]


def read_entries(path: Path) -> Entries:
    """Names, shapes and dtypes in one safetensors file, in the file's order. CheckpointError where it is not one."""
    refuse_other_formats(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.offset_keys()}
            return {k: Entry(path, tuple(s.get_shape()), str(s.get_dtype())) for k, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} {_what_is_broken(path)}; download it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_entries` has read."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def refuse_other_formats(path: Path) -> None:
    """CheckpointError for files that are no safetensors file at all: empty, pickled, or text of some kind."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); give a safetensors file") from error
    # Eight bytes of header length, which may be any, then JSON: whatever the suffix, that is no pickle.
    plausible = head[8:9] == b"{"
    if len(head) > 8 and not plausible and (head[:2] == b"PK" or head[:1] == b"\x80" or path.suffix in PICKLE_SUFFIXES):
        refuse_pickle(path)
    start = head.lstrip().lower()
    if not head:
        problem = "is an empty file: its download failed; download it again"
    elif len(head) < 9:
        problem = f"is truncated: it has {len(head)} bytes; download it again"
    elif start.startswith(b"version https://git-lfs"):
        problem = "is a git-lfs pointer, not the weights; run `git lfs pull` beside it, or download the file"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        problem = "is a web page, not a checkpoint: the download needed a login or a direct link; download it again"
    elif start.startswith(b"gguf"):
        problem = "is a GGUF file (quantised); take the safetensors version of the model"
    elif not plausible:
        problem = "is not a safetensors file; give a .safetensors file, or a diffusers-layout folder"
    else:
        return
    raise CheckpointError(f"{path} {problem}")


def refuse_pickle(path: Path) -> NoReturn:
    """CheckpointError for a torch.save file, which may run code when opened, with the command to convert it."""
    suffix = "-converted.safetensors" if path.suffix == ".safetensors" else ".safetensors"
    out = path.with_name(path.stem + suffix)
    code = (
        "import torch, safetensors.torch as s; "
        f"d = torch.load(open({str(path)!r}, 'rb'), map_location='cpu', weights_only=True); "
        "d = d.get('state_dict', d); "
        "s.save_file({k: v.clone().contiguous() for k, v in d.items() if hasattr(v, 'shape')}, "
        f"{str(out)!r})"
    )
    raise CheckpointError(
        f"{path} is a pickled checkpoint, which may run code when opened; take its .safetensors version, or convert "
        f'it: python -c "{code}"'
    )


def _what_is_broken(path: Path) -> str:
    """Why a file that begins like a safetensors file is not a whole one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return f"is truncated or corrupt: it has {size:,} bytes and its header alone claims {length + 8:,}"
        try:
            header = json.loads(file.read(length))
            ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is corrupt: its header is not what a safetensors file has"
    if size < whole:
        return f"is truncated: it has {size:,} of {whole:,} bytes"
    if size > whole:
        return f"is corrupt: it has {size:,} bytes where its header describes {whole:,}"
    return "is corrupt: its header contradicts itself"


def read_index(path: Path) -> Entries:
    """The entries of a sharded checkpoint, from its *.safetensors.index.json."""
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a shard index: expected JSON with a weight_map; download it again"
        ) from error
    if missing:
        raise CheckpointError(
            f"{path} names {len(missing)} of {len(shards)} shards that are not beside it: {listed(missing)}; "
            "download them too"
        )
    entries: Entries = {}
    for shard in shards:
        entries.update(read_entries(path.parent / shard))
    return entries


def read_tensors(entries: Iterable[tuple[str, Entry]]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, memory-mapped. A group's mapping is released once its tensors are dropped."""
    group: list[tuple[str, str]] = []
    size, current = 0, None

    def flush() -> Iterator[tuple[str, Tensor]]:
        if group and current is not None:
            with safe_open(current, framework="pt") as file:
                for key, stored in group:
                    yield key, file.get_tensor(stored)

    for key, entry in entries:
        if current != entry.path or size > GROUP_BYTES:
            yield from flush()
            group, size, current = [], 0, entry.path
        group.append((key, entry.stored or key))
        size += entry.count * DTYPES[entry.dtype].itemsize
    yield from flush()


@dataclass(frozen=True)
class Part:
    """A module built on the meta device, and where its parameters are.

    names: the module's parameter -> the file's key. entries: this part's keys alone; those neither in `names`
    nor in `ignore` are unexpected.
    """

    module: nn.Module
    names: Mapping[str, str]
    entries: Entries
    ignore: frozenset[str] = frozenset()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}


def check_parts(parts: Mapping[str, Part], where: object, whole: str = "Stable Diffusion v1 model") -> None:
    """One CheckpointError for all parts' keys that are missing, unexpected, misshapen or of another dtype.

    whole: what the parts are, or are of.
    """
    found: dict[str, list[str]] = {}
    for part in parts.values():
        for kind, keys in _key_problems(part).items():
            found.setdefault(kind, []).extend(keys)
    problems = [f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in found.items() if keys]
    if problems:
        raise CheckpointError(
            f"{where} does not fit a {whole}; {'; '.join(problems)}; take a complete, unmodified checkpoint"
        )


def load_parts(
    parts: Mapping[str, Part],
    where: object,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = True,
    whole: str = "Stable Diffusion v1 model",
) -> None:
    """Fill modules built on the meta device, strictly; their weights then need no gradients.

    1x1 convolutions and linear layers hold the same numbers and stand for each other. CheckpointError names and
    counts the keys that are missing, unexpected or misshapen (before any tensor is read), and then those with NaN
    or infinite values, or values beyond dtype's range. progress: a bar, for what takes longer than a second.
    whole: as in `check_parts`.
    """
    check_parts(parts, where, whole)
    total = sum(entry.bytes for part in parts.values() for entry in part.entries.values())
    bar = tqdm(
        desc="load", total=total, unit="B", unit_scale=True, disable=not progress or total < SILENT_BYTES, leave=False
    )
    broken: list[str] = []
    too_large: list[str] = []
    for part in parts.values():
        shapes, state = part.shapes, {}
        by_key = {key: name for name, key in part.names.items()}
        for key, tensor in read_tensors((key, entry) for key, entry in part.entries.items() if key in by_key):
            name, largest = by_key[key], _largest(tensor)
            if not math.isfinite(largest):
                broken.append(key)
            elif largest > torch.finfo(dtype).max:
                too_large.append(key)
            moved = tensor.reshape(shapes[name]).to(device=device, dtype=dtype)
            # A tensor that is still the file's own memory would change, or crash, when the file does.
            state[name] = moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved
            bar.update(part.entries[key].bytes)
        part.module.load_state_dict(state, strict=True, assign=True)
        part.module.requires_grad_(False).eval()
    bar.close()
    if broken:
        raise CheckpointError(
            f"{where}: NaN or infinite values in {len(broken)} tensors: {listed(broken)}; "
            "the checkpoint is damaged: take another copy"
        )
    if too_large:
        raise CheckpointError(
            f"{where}: values beyond {dtype}'s range in {len(too_large)} tensors: {listed(too_large)}; "
            "load it with dtype='bf16' or 'fp32'"
        )


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN or infinite where any element is. One pass, no copy, unlike torch.isfinite."""
    if tensor.numel() == 0:
        return 0.0
    low, high = (float(end) for end in torch.aminmax(tensor))
    # Both ends are NaN where any element is; max() could drop one.
    return low if math.isnan(low) else max(-low, high)


def _key_problems(part: Part) -> dict[str, list[str]]:
    """Keys that stand in the way of loading a part, by what is wrong with them."""
    shapes, entries = part.shapes, part.entries
    present = {name: key for name, key in part.names.items() if key in entries}
    return {
        "missing": [key for key in part.names.values() if key not in entries],
        "unexpected": sorted(set(entries) - set(part.names.values()) - part.ignore),
        "misshapen": [
            f"{key} is {list(entries[key].shape)}, expected {list(shapes[name])}"
            for name, key in present.items()
            if _squeeze(entries[key].shape) != _squeeze(shapes[name])
        ],
        f"not of a dtype that is read ({', '.join(DTYPES)})": [
            f"{key} is {entries[key].dtype}" for key in present.values() if entries[key].dtype not in DTYPES
        ],
    }


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without a 1x1 kernel's trailing ones."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def listed(items: list[str], most: int = 4) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
