"""Checkpoint files with the names and shapes of published ones and no content, at no cost."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY_LISTS = Path(__file__).parent / "data" / "checkpoints"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1}

Keys = dict[str, tuple[list[int], str]]


def key_list(name: str) -> Any:
    """A key list of tests/data/checkpoints, name -> [shape, dtype], or several of them by layout."""
    return json.loads(gzip.decompress((KEY_LISTS / f"{name}.json.gz").read_bytes()))


def retyped(keys: Mapping[str, Any], dtype: str) -> Keys:
    """The same keys with their floating-point tensors in another dtype."""
    return {key: (shape, dtype if old.startswith("F") else old) for key, (shape, old) in keys.items()}


def prefixed(prefix: str, keys: Mapping[str, Any]) -> Keys:
    return {prefix + key: value for key, value in keys.items()}


def write_sparse(path: Path, keys: Mapping[str, Any]) -> Path:
    """A safetensors file of zeros, which a file system with sparse files stores as its header alone."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Widest dtypes first, as safetensors' own writer aligns them.
    for key, (shape, dtype) in sorted(keys.items(), key=lambda item: (-BYTES[item[1][1]], item[0])):
        end = offset + math.prod(shape) * BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


def write_shards(folder: Path, stem: str, keys: Mapping[str, Any], *, variant: str = "", count: int = 3) -> None:
    """The keys spread over several files and the index that names them, as diffusers and transformers write them."""
    names = list(keys)
    suffix = f".{variant}" if variant else ""
    weight_map = {}
    for i in range(count):
        shard = f"{stem}{suffix}-{i + 1:05}-of-{count:05}.safetensors"
        mine = names[i::count]
        write_sparse(folder / shard, {name: keys[name] for name in mine})
        weight_map.update(dict.fromkeys(mine, shard))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index{suffix}.json").write_text(json.dumps(index))


def write_folder(
    folder: Path, parts: Mapping[str, Mapping[str, Any]], configs: Mapping[str, object] = {}, *, variant: str = ""
) -> Path:
    """A diffusers-layout folder of sparse files; configs: settings by relative path."""
    suffix = f".{variant}" if variant else ""
    for part, keys in parts.items():
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write_sparse(folder / part / f"{stem}{suffix}.safetensors", keys)
    for name, settings in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(settings))
    return folder
