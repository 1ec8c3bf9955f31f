"""LoRA files in each of their layouts: what they are, and which of our layers each of their tensors changes."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

from safetensors import safe_open

from masa.errors import CheckpointError
from masa.io.files import file_digest
from masa.weights.adapters import first_names, refuse_others
from masa.weights.checkpoint import DTYPES, Entries, listed, read_entries
from masa.weights.detect import OTHER_CONTEXTS
from masa.weights.lora_names import PEFT, PREFIXES, WANTED, Layer, Layers, Shape, layer_names, numbered_names, parsed
from masa.weights.model_files import Json, read_json

CONFIG = "adapter_config.json"  # peft's settings, beside its file
# How a key ends, and which tensor of its layer it is: kohya's, diffusers' first, second and third, cloneofsimo's.
ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ":down": "down",
    ":up": "up",
}
ALPHA_DTYPES = (*DTYPES, "I64", "I32", "I16", "I8", "U8")  # an alpha is one number, often whole
# What a key of other kinds of files matches.
OTHER_KINDS = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA, whose norms loaders disagree on"),
    (r"hada_w", "a LoHa (LyCORIS)"),
    (r"lokr_w", "a LoKr (LyCORIS)"),
    (r"oft_blocks|oft_diag|oft_R", "an OFT"),
    (r"ia3_l|\.on_input$", "an IA3"),
    (r"\.[ab][12]\.weight$", "a GLoRA (LyCORIS)"),
    (r"\.diff(_b)?$|\.[wb]_norm$", "a file of whole differences (LyCORIS)"),
    (r"^lora_te[12]_|^text_encoder_2\.", "a LoRA for SDXL (it changes two text encoders)"),
    (r"^transformer\.|^lora_transformer_|_(double|joint)_blocks_", "a LoRA for a diffusion transformer"),
    (r"time_embedding\.cond_proj", "a whole LCM, with a guidance embedding"),
)


# What peft's settings may say; other starts ("pissa", "olora", ..) change the base model's weights too.
PEFT_SERVED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Change:
    """One layer's change: `scale * up @ down`, or with `mid` the Tucker product of three; keys of the file."""

    layer: Layer
    down: str
    up: str
    mid: str | None
    scale: float


@dataclass(frozen=True)
class OpenedLora:
    """An opened LoRA: headers and scales are read, factors are not.

    path: as given. file: where the tensors are. sha256: as `lora_digest` has it. words: whose embeddings it holds too.
    """

    path: Path
    file: Path
    sha256: str
    changes: tuple[Change, ...]
    words: tuple[str, ...] = ()


def open_lora(path: str | Path, layers: Layers) -> OpenedLora:
    """Read a LoRA's headers, a safetensors file or its folder, and match it to a model.

    layers: the model's linear layers and convolutions, with their weights' shapes. CheckpointError for other kinds of
    files, and one that lists every key that fits no layer. FileNotFoundError where nothing is.
    """
    path = Path(path)
    file = find_file(path)
    entries = read_entries(file)
    _refuse_other_kinds(entries, path)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        scalars = [key for key, entry in entries.items() if key.endswith(".alpha") and entry.count == 1]
        alphas = {key: float(opened.get_tensor(key)) for key in scalars if entries[key].dtype in ALPHA_DTYPES}
    words = tuple(key for key in entries if metadata.get(key) == "<embed>")
    own = {key: entry for key, entry in entries.items() if key not in words}
    names = layer_names(layers) | numbered_names(own, layers, metadata, path)
    settings = _file_settings(metadata, path)
    if any(key.startswith(PEFT) for key in own):
        settings = dict.fromkeys(PREFIXES, _peft_settings(file.parent / CONFIG))
    found, problems = _sorted(own, names)
    changes = []
    for layer, keys in found.items():
        wrong = _misshapen(layer, keys, own, layers[layer], path)
        alpha = alphas.get(keys.get("alpha", ""))
        if alpha is not None and not isfinite(alpha):
            wrong.append(f"{keys['alpha']} is {alpha}, and should be a number such as the rank")
        problems += wrong
        if not wrong:
            rank = own[keys["down"]].shape[0]
            scale = _scale(alpha, settings.get(layer[0], {}), layer, rank)
            changes.append(Change(layer, keys["down"], keys["up"], keys.get("mid"), scale))
    if problems:
        raise CheckpointError(
            f"{path} does not fit this model; of its {len(entries)} tensors {len(problems)} are wrong: "
            f"{listed(problems, 40)}; {WANTED}"
        )
    if not changes:
        raise CheckpointError(f"{path} holds no LoRA ({first_names(entries)}); {WANTED}")
    return OpenedLora(path, file, lora_digest(path), tuple(changes), words)


def find_file(path: Path) -> Path:
    """The safetensors file that a path means: itself, or peft's, diffusers' or the only one in a folder."""
    if not path.exists():
        raise FileNotFoundError(f"no LoRA at {path}; give the path of its .safetensors file, or of its folder")
    if not path.is_dir():
        return path
    usual = [path / name for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
    found = [file for file in usual if file.is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = listed([file.name for file in found]) or "none"
        raise CheckpointError(f"{path} should hold one LoRA's .safetensors file, and holds {names}; give a file's path")
    return found[0]


def lora_digest(path: str | Path) -> str:
    """SHA-256 of a LoRA's file; of one with peft's settings beside it, of both digests."""
    file = find_file(Path(path))
    digests = [file_digest(found) for found in (file, file.parent / CONFIG) if found.is_file()]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _refuse_other_kinds(entries: Entries, path: Path) -> None:
    for pattern, what in OTHER_KINDS:
        if any(re.search(pattern, key) for key in entries):
            raise CheckpointError(f"{path} is {what}, which is not served; {WANTED}")
    refuse_others(entries, path, "LoRA", WANTED)


def _file_settings(metadata: Mapping[str, str], path: Path) -> dict[str, Json]:
    """diffusers' third layout: peft's settings of each part, in the file's metadata."""
    told = parsed(metadata.get("lora_adapter_metadata", "{}"), dict, path)
    return {
        part: {key.removeprefix(f"{part}."): value for key, value in told.items() if key.startswith(f"{part}.")}
        for part in PREFIXES
    }


def _peft_settings(config: Path) -> Json:
    """A peft adapter's settings. CheckpointError for those that mean more than `up @ down`."""
    settings = read_json(config)
    if not settings:
        warnings.warn(f"{config} is not there, so the LoRA's alpha is taken to be its rank", stacklevel=3)
    for key, allowed in PEFT_SERVED.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{config} has {key} = {settings[key]!r}, which is not served; {WANTED}")
    return settings


def _scale(alpha: float | None, settings: Json, layer: Layer, rank: int) -> float:
    """alpha / rank, or what peft's settings say; 1 where nothing is said, or alpha is 0."""
    name = layer[1] if layer[0] == "unet" else f"text_model.{layer[1]}"
    if alpha is None:
        patterns = settings.get("alpha_pattern") or {}
        told = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        alpha = next(told, settings.get("lora_alpha"))
    if not alpha:
        return 1.0
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)


def _sorted(entries: Entries, names: Mapping[str, Layer]) -> tuple[dict[Layer, dict[str, str]], list[str]]:
    """The keys of each layer by what they are, and what is wrong with those that are of none, or come twice."""
    found: dict[Layer, dict[str, str]] = {}
    problems = []
    for key in entries:
        hits = ((names.get(key.removesuffix(end)), kind) for end, kind in ENDS.items() if key.endswith(end))
        layer, kind = next(((layer, kind) for layer, kind in hits if layer is not None), (None, ""))
        if layer is None:
            problems.append(f"{key} is of no layer of this model")
        elif kind in found.get(layer, {}):
            problems.append(f"{key} names a layer that {found[layer][kind]} names too")
        else:
            found.setdefault(layer, {})[kind] = key
    return found, problems


def _misshapen(layer: Layer, keys: Mapping[str, str], entries: Entries, weight: Shape, path: Path) -> list[str]:
    """What is wrong with one layer's tensors."""
    missing = [kind for kind in ("down", "up") if kind not in keys]
    if missing:
        return [f"{key} has no {' and no '.join(missing)} beside it" for key in keys.values()]
    shapes = {kind: _four(entries[key].shape) for kind, key in keys.items() if kind != "alpha"}
    context = shapes["down"][1] if len(shapes["down"]) == 4 else 0
    if layer[1].endswith("attn2.to_k") and context != weight[1] and context in OTHER_CONTEXTS:
        raise CheckpointError(f"{path} is a LoRA for {OTHER_CONTEXTS[context]} ({context} text features); {WANTED}")
    out, inner, *kernel = _four(weight)
    rank, to_rank = max(1, shapes["down"][0]), shapes["up"][1] if len(shapes["up"]) == 4 else 0
    expected: dict[str, Shape] = {"down": (rank, inner, *kernel), "up": (out, rank, 1, 1)}
    if "mid" in keys:
        expected = {"down": (rank, inner, 1, 1), "mid": (to_rank, rank, *kernel), "up": (out, to_rank, 1, 1)}
    wrong = [kind for kind, shape in expected.items() if shapes[kind] != shape]
    wrong += ["alpha"] if "alpha" in keys and entries[keys["alpha"]].count != 1 else []
    served = {kind: ALPHA_DTYPES if kind == "alpha" else tuple(DTYPES) for kind in keys}
    told = {kind: f"{keys[kind]} is {list(entries[keys[kind]].shape)}, for a weight {list(weight)}" for kind in wrong}
    typed = [f"{key} is {entries[key].dtype}" for kind, key in keys.items() if entries[key].dtype not in served[kind]]
    return [*told.values(), *typed]


def _four(shape: Shape) -> Shape:
    """A linear layer's shape as a 1x1 convolution's."""
    return (*shape, 1, 1)[:4]
