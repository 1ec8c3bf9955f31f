"""From a path to the parts of a checkpoint: which tensors, under which names, with which configuration."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from masa.config import ModelConfig, PreviewFactors, ScheduleConfig, TextConfig, TinyVAEConfig, UNetConfig, VAEConfig
from masa.errors import CheckpointError, MasaError
from masa.weights.checkpoint import (
    PICKLE_SUFFIXES,
    Entries,
    listed,
    read_entries,
    read_index,
    read_metadata,
    refuse_pickle,
)
from masa.weights.detect import (
    LDM_HEADS,
    SERVED,
    Namer,
    ShapeOf,
    detect_text,
    detect_unet,
    detect_vae,
    refuse_lone_parts,
    refuse_other_models,
    split_ldm,
    text_namer,
    unet_namer,
    vae_namer,
)
from masa.weights.layouts import VAE_PREFIX, text_name
from masa.weights.taesd import REPOSITORY_FILES, is_tiny, tiny_names
from masa.weights.variants import (
    averaged,
    averaged_names,
    describe_variants,
    predicts_velocity,
    unwrapped,
    unwrapped_vae,
)

Json = Mapping[str, Any]

# What the models of this library compute. A configuration file that asks for anything else is refused.
FIXED_UNET: Json = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "addition_embed_type": None,
    "use_linear_projection": False,
    "transformer_layers_per_block": 1,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
}
FIXED_VAE: Json = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
FIXED_SCHEDULE: Json = {
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}


# Parts that only other kinds of models have.
OTHER_PARTS = {
    "text_encoder_2": "an SDXL model, or another with two text encoders",
    "transformer": "a diffusion transformer (such as SD 3 or Flux)",
    "prior": "a model in two stages (such as Kandinsky)",
}
EXPECTED = "expected a .safetensors file or a diffusers-layout folder with unet/, vae/ and text_encoder/"
SDXL_SCALING = 0.13025
FILE_LAYOUT, FOLDER_LAYOUT, OTHER_LAYOUT = "single file (LDM)", "folder (diffusers)", "not a Stable Diffusion v1 layout"
MOST_GROUPS = 16  # that a summary lists by name


@dataclass(frozen=True)
class PartFiles:
    """One part's tensors under the file's keys, and the name of each of our parameters there."""

    entries: Entries
    namer: Namer
    ignore: frozenset[str] = frozenset()

    def shape_of(self) -> ShapeOf:
        def shape(name: str) -> tuple[int, ...] | None:
            try:
                key = self.namer(name)
            except KeyError:
                return None
            return self.entries[key].shape if key in self.entries else None

        return shape


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a checkpoint, as `open_checkpoint` takes it."""

    prefer_half: bool = False
    vae: Path | None = None
    ema: bool = False
    prediction_type: str | None = None

    def open(self, path: Path) -> Checkpoint:
        return open_checkpoint(
            path, prefer_half=self.prefer_half, vae=self.vae, ema=self.ema, prediction_type=self.prediction_type
        )


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers and configuration read, tensors not.

    prediction: what its UNet predicts, and by what that is known. plain_beside_ema: whether it holds averaged weights
    (EMA) of the UNet too, and the plain ones are taken.
    """

    path: Path
    layout: str  # "single file (LDM)" or "folder (diffusers)"
    unet: PartFiles
    vae: PartFiles
    text_encoder: PartFiles
    config: ModelConfig
    tokenizer: Path | None = None
    extra: Entries = field(default_factory=dict)
    wanted: Wanted = Wanted()
    prediction: str = "the noise"
    plain_beside_ema: bool = False

    def skipping(self, clip_skip: int) -> Checkpoint:
        """The same, the text encoder's last layers left out. MasaError unless it has as many, and one more."""
        layers = self.config.text.layers
        if not isinstance(clip_skip, int) or isinstance(clip_skip, bool) or not 0 <= clip_skip < layers:
            raise MasaError(
                f"clip_skip is {clip_skip!r}; expected 0 to {layers - 1}, how many of the text encoder's {layers} "
                "layers are left out (what other programs call clip skip 2 is 1)"
            )
        return replace(self, config=replace(self.config, text=replace(self.config.text, clip_skip=clip_skip)))

    @property
    def parts(self) -> dict[str, PartFiles]:
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}


OpenedVAE = tuple[PartFiles, "VAEConfig | TinyVAEConfig"]


def open_checkpoint(
    path: Path,
    *,
    prefer_half: bool = False,
    vae: Path | None = None,
    ema: bool = False,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Read the headers of a checkpoint and detect its configuration.

    prefer_half: of a folder's variants take the fp16 one. vae: another autoencoder, file or folder. ema: take the
    averaged weights of the UNet. prediction_type: "epsilon" or "v_prediction", whatever the files say. Raises
    CheckpointError for whatever is no Stable Diffusion v1 model, FileNotFoundError where nothing is.
    """
    wanted = Wanted(prefer_half, vae, ema, prediction_type)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; {EXPECTED}")
    opened = _open_folder if path.is_dir() else _open_file
    return opened(path, wanted, None if wanted.vae is None else open_vae(wanted.vae, wanted.prefer_half))


def summarise(
    path: Path, *, vae: Path | None = None, check: Callable[[Checkpoint], None] | None = None
) -> list[tuple[str, str]]:
    """What is in a file or folder, as (label, text) lines, whether or not it can be loaded.

    check: raises CheckpointError where the tensors do not fit the detected configuration. The last line, "usable",
    says "yes", or "no: " and why. FileNotFoundError where nothing is.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; {EXPECTED}")
    lines = [("path", str(path))]
    try:
        groups, layout = _groups(path)
        if any(groups.values()):
            lines.append(("layout", layout))
            lines += [(label, describe_entries(entries)) for label, entries in groups.items() if entries]
        if layout != OTHER_LAYOUT:
            wanted = ("unet", "text_encoder") if vae else ("unet", "vae", "text_encoder")
            lines.append(("missing", ", ".join(part for part in wanted if not groups.get(part)) or "no part"))
        if layout == FILE_LAYOUT:
            lines += describe_variants(unwrapped(read_entries(path)))
        elif layout == FOLDER_LAYOUT and _has_plain_beside(path):
            lines.append(("EMA", "the UNet's usual file holds averaged weights; plain ones lie beside it, not read"))
        opened = open_checkpoint(path, vae=vae)
        lines += _describe_config(opened)
        if check is not None:
            check(opened)
    except CheckpointError as error:
        return [*lines, ("usable", f"no: {error}")]
    return [*lines, ("usable", "yes")]


def _groups(path: Path) -> tuple[dict[str, Entries], str]:
    """The tensors of a file or folder by part, or by how their names begin where it is no SD v1 model."""
    if not path.is_dir():
        entries = unwrapped(read_entries(path))
        parts = split_ldm(entries)
        if parts["unet"] and (parts["vae"] or parts["text_encoder"]):
            extra: dict[str, Entries] = {}
            for key, entry in parts.pop("extra").items():
                extra.setdefault(f"extra {key.split('.')[0]}", {})[key] = entry
            if len(extra) > MOST_GROUPS:
                extra = {"extra": {key: entry for group in extra.values() for key, entry in group.items()}}
            return parts | extra, FILE_LAYOUT
        begins: dict[str, Entries] = {}
        for key, entry in entries.items():
            begins.setdefault(key.split(".")[0], {})[key] = entry
        return (begins if len(begins) <= MOST_GROUPS else {"all tensors": entries}), OTHER_LAYOUT
    folders = {}
    for folder in sorted(child for child in path.iterdir() if child.is_dir()):
        if any(file.name.endswith(".safetensors") for file in folder.iterdir()):
            folders[folder.name] = read_folder(folder, prefer_half=False)
    return folders, FOLDER_LAYOUT if "unet" in folders else OTHER_LAYOUT


def describe_entries(entries: Entries) -> str:
    """How many tensors and parameters, how large, of which dtypes."""
    dtypes = Counter(entry.dtype for entry in entries.values())
    kinds = ", ".join(dtype if len(dtypes) == 1 else f"{dtype} ({n})" for dtype, n in dtypes.most_common())
    count = sum(entry.count for entry in entries.values())
    size = sum(entry.bytes for entry in entries.values()) / 1e6
    return f"{len(entries):,} tensors, {count:,} parameters, {size:,.1f} MB, {kinds}"


def _describe_config(opened: Checkpoint) -> list[tuple[str, str]]:
    unet, vae, text = opened.config.unet, opened.config.vae, opened.config.text
    return [
        ("unet shape", f"channels {unet.block_out_channels}, {unet.heads} heads, context {unet.context_width}"),
        ("vae shape", _describe_vae(vae)),
        ("text encoder shape", f"{text.layers} layers of {text.width}, {text.heads} heads, {text.vocab_size:,} tokens"),
        ("picture size", f"{opened.config.image_size} pixels"),
        ("prediction", opened.prediction),
        ("tokenizer", "its own" if opened.tokenizer else "CLIP's, which ships with masa"),
    ]


def _describe_vae(vae: VAEConfig | TinyVAEConfig) -> str:
    if isinstance(vae, TinyVAEConfig):
        return "TAESD" if vae.encodes else "TAESD's decoder alone"
    return f"channels {vae.block_out_channels}, scaling factor {vae.scaling_factor}"


def _open_file(path: Path, wanted: Wanted, vae: OpenedVAE | None) -> Checkpoint:
    entries = unwrapped(read_entries(path))
    refuse_other_models(entries, path)
    refuse_lone_parts(entries, path)
    beside = bool(averaged_names(entries)) and not wanted.ema
    entries = averaged(entries, path) if wanted.ema else entries
    velocity, why = predicts_velocity(path, entries, read_metadata(path), {}, wanted.prediction_type)
    parts = split_ldm(entries)
    if vae is None and not parts["vae"]:
        raise CheckpointError(f"{path} holds no autoencoder (no keys {VAE_PREFIX}*); give one's file as vae=")
    unet = PartFiles(parts["unet"], unet_namer(parts["unet"]))
    text = PartFiles(parts["text_encoder"], text_namer(parts["text_encoder"]))
    vae_files, vae_config = vae or _vae_part(PartFiles(parts["vae"], vae_namer(parts["vae"])), {}, path)
    shape = detect_unet(unet.shape_of(), LDM_HEADS, UNetConfig.norm_groups, f"{path}: the UNet")
    config = ModelConfig(
        unet=replace(shape, velocity=ScheduleConfig() if velocity else None),
        vae=vae_config,
        text=detect_text(
            text.shape_of(), None, TextConfig.activation, TextConfig.norm_eps, f"{path}: the text encoder"
        ),
    )
    _check_fit(config, path)
    return Checkpoint(
        path,
        FILE_LAYOUT,
        unet,
        vae_files,
        text,
        config,
        extra=parts["extra"],
        wanted=wanted,
        prediction=_prediction(velocity, why),
        plain_beside_ema=beside,
    )


def _prediction(velocity: bool, why: str) -> str:
    return f"the {'velocity (v)' if velocity else 'noise (epsilon)'}: {why}"


def _open_folder(path: Path, wanted: Wanted, vae: OpenedVAE | None) -> Checkpoint:
    prefer_half = wanted.prefer_half
    index = read_json(path / "model_index.json")
    for other, kind in OTHER_PARTS.items():
        if other in index or (path / other).is_dir():
            raise CheckpointError(f"{path} is {kind} (it has the part {other}); {SERVED}")
    missing = [part for part in ("unet", "text_encoder") if not (path / part).is_dir()]
    if vae is None and not (path / "vae").is_dir():
        missing.append("vae")
    if missing:
        _refuse_folder(path, missing)

    if wanted.ema and not _has_plain_beside(path):
        raise CheckpointError(
            f"{path} holds no averaged weights (EMA) beside others, for which ema=True asks; leave it out"
        )
    unet_json = read_json(path / "unet" / "config.json")
    entries = read_folder(path / "unet", prefer_half)
    refuse_other_models(entries, path)
    unet = PartFiles(entries, unet_namer(entries))
    _check_fixed(unet_json, FIXED_UNET, path / "unet" / "config.json")

    if vae is None:
        vae_entries = read_folder(path / "vae", prefer_half)
        part = PartFiles(vae_entries, vae_namer(vae_entries))
        vae = _vae_part(part, read_json(path / "vae" / "config.json"), path / "vae")

    text_json = read_json(path / "text_encoder" / "config.json")
    entries = read_folder(path / "text_encoder", prefer_half)
    refuse_other_models(entries, path / "text_encoder")
    # What CLIP models carry besides, depending on who wrote them.
    ignore = frozenset(k for k in entries if k.endswith(("position_ids", "text_projection.weight", "logit_scale")))
    text = PartFiles(entries, text_namer(entries), ignore)

    schedule, scheduler = _schedule(path)
    velocity, why = predicts_velocity(path, entries, {}, scheduler, wanted.prediction_type)
    unet_config = detect_unet(
        unet.shape_of(),
        _heads(unet_json, path),
        unet_json.get("norm_num_groups", UNetConfig.norm_groups),
        f"{path}: the UNet",
    )
    config = ModelConfig(
        unet=replace(unet_config, velocity=schedule if velocity else None),
        vae=vae[1],
        text=detect_text(
            text.shape_of(),
            text_json.get("num_attention_heads"),
            text_json.get("hidden_act", TextConfig.activation),
            text_json.get("layer_norm_eps", TextConfig.norm_eps),
            f"{path}: the text encoder",
        ),
        schedule=schedule,
        image_size=vae[1].downsample * _side(unet_json.get("sample_size", 64)),
        preview=_preview(path),
    )
    _check_fit(config, path)
    return Checkpoint(
        path,
        FOLDER_LAYOUT,
        unet,
        vae[0],
        text,
        config,
        tokenizer=path / "tokenizer" if (path / "tokenizer").is_dir() else None,
        wanted=wanted,
        prediction=_prediction(velocity, why),
    )


def _has_plain_beside(path: Path) -> bool:
    """Whether a folder's UNet is there with its averaged weights (EMA), the usual file, and without."""
    return any("non_ema" in file.name for file in (path / "unet").iterdir())


def _refuse_folder(path: Path, missing: list[str]) -> NoReturn:
    """Say what a folder is that is no diffusers-layout checkpoint, by the files that lie in it."""
    files = sorted(path.glob("*.safetensors"))
    if files and not any((path / part).is_dir() for part in ("unet", "vae", "text_encoder")):
        entries = read_entries(files[0])
        refuse_other_models(entries, files[0])
        refuse_lone_parts(entries, files[0])
        raise CheckpointError(
            f"{path} is a folder of single files; give the path of one: {listed([file.name for file in files])}"
        )
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        refuse_pickle(pickles[0])
    raise CheckpointError(f"{path} has no folder {', '.join(missing)}; {EXPECTED}")


def open_vae(path: Path, prefer_half: bool = False) -> OpenedVAE:
    """An autoencoder of its own: a file in any layout, a diffusers `vae/` folder, or a whole checkpoint's."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no autoencoder at {path}; give as vae= a VAE's file or folder")
    settings: Json = {}
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        settings = read_json(path / "config.json")
        entries = _tiny_repository(path) or read_folder(path, prefer_half)
    else:
        entries = unwrapped_vae(read_entries(path))
    if is_tiny(entries):
        config, names, entries = tiny_names(entries, path)
        # A missing parameter has no key; the error that says so then names ours.
        return PartFiles(entries, lambda name: names.get(name, name)), config
    coder = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    # A text encoder's names begin with "encoder." too.
    coded = {
        key: entry
        for key, entry in entries.items()
        if key.removeprefix(VAE_PREFIX).startswith(coder) and not text_name(key)
    }
    if not coded:
        refuse_other_models(entries, path)
        raise CheckpointError(
            f"{path} holds no autoencoder (its first tensors: {', '.join(list(entries)[:3])}); "
            "give as vae= a VAE's file, in LDM or diffusers layout, or its folder"
        )
    if settings.get("scaling_factor") == SDXL_SCALING:
        raise CheckpointError(
            f"{path} is SDXL's autoencoder (its scaling_factor is {SDXL_SCALING}), whose latents Stable Diffusion v1 "
            "does not understand; give an autoencoder made for Stable Diffusion v1, such as sd-vae-ft-mse"
        )
    return _vae_part(PartFiles(coded, vae_namer(coded)), settings, path)


def _tiny_repository(folder: Path) -> Entries:
    """The tensors of TAESD's two original files, where a folder holds them."""
    found: Entries = {}
    for name in REPOSITORY_FILES:
        if (folder / name).is_file():
            prefix = name.partition(".")[0]
            entries = read_entries(folder / name).items()
            found |= {f"{prefix}.{key}": replace(entry, stored=key) for key, entry in entries}
    return found


def _vae_part(part: PartFiles, settings: Json, path: Path) -> OpenedVAE:
    _check_fixed(settings, FIXED_VAE, path / "config.json")
    config = detect_vae(
        part.shape_of(),
        settings.get("norm_num_groups", VAEConfig.norm_groups),
        settings.get("scaling_factor", VAEConfig.scaling_factor),
        f"{path}: the VAE",
    )
    return part, config


def read_folder(folder: Path, prefer_half: bool) -> Entries:
    """The tensors of one part's folder: whole or sharded, full precision or the fp16 variant."""
    found = (p for p in folder.iterdir() if ".safetensors" in p.name and "non_ema" not in p.name)
    # Other tools leave files of their own beside the usual names.
    files = sorted(found, key=lambda p: (re.match(r"(diffusion_pytorch_)?model[.-]", p.name) is None, p.name))
    # Shards are found through their index.
    heads = [p for p in files if p.name.endswith(".json") or not re.search(r"-of-\d+", p.name)]
    half = [p for p in heads if ".fp16" in p.name]
    full = [p for p in heads if p not in half]
    chosen = (half or full) if prefer_half else (full or half)
    if not chosen:
        pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            refuse_pickle(pickles[0])
        what = (
            f"shards without their index ({listed([file.name for file in files])})" if files else "no .safetensors file"
        )
        raise CheckpointError(f"{folder} holds {what}; download all of the checkpoint's safetensors files")
    whole = [p for p in chosen if not p.name.endswith(".json")]
    return read_entries(whole[0]) if whole else read_index(chosen[0])


def read_json(path: Path) -> Json:
    """A configuration file, or {} where there is none."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds a {type(settings).__name__} and not an object; download it again")
    return settings


def _check_fixed(settings: Json, fixed: Json, path: Path) -> None:
    for key, value in fixed.items():
        found = settings.get(key, value)
        if found != value:
            raise CheckpointError(
                f"{path} has {key} = {found!r} where Stable Diffusion v1 has {value!r}: it is another kind of model; "
                + SERVED
            )


def _heads(settings: Json, path: Path) -> int:
    """diffusers' `attention_head_dim` means the number of heads in SD v1 configurations."""
    heads = settings.get("num_attention_heads") or settings.get("attention_head_dim", LDM_HEADS)
    heads = set(heads) if isinstance(heads, list) else {heads}
    if len(heads) != 1:
        raise CheckpointError(
            f"{path}: its levels have {sorted(heads)} heads; Stable Diffusion v1 has {LDM_HEADS} on every level"
        )
    return heads.pop()


def _preview(path: Path) -> PreviewFactors | None:
    """The colours of the latents, which masa's own models tell beside their parts."""
    factors = read_json(path / "preview.json").get("factors")
    if factors is None:
        return None
    if not isinstance(factors, list) or not all(isinstance(row, list) and len(row) == 3 for row in factors):
        raise CheckpointError(f"{path / 'preview.json'} holds no factors; expected rows of three numbers, or no file")
    return tuple(tuple(map(float, row)) for row in factors)


def _side(sample_size: int | list[int]) -> int:
    return min(sample_size) if isinstance(sample_size, list) else sample_size


def _schedule(path: Path) -> tuple[ScheduleConfig, Json]:
    """The training noise, and all that the scheduler's file says."""
    file = path / "scheduler" / "scheduler_config.json"
    settings = read_json(file)
    _check_fixed(settings, FIXED_SCHEDULE, file)
    base = ScheduleConfig()
    config = ScheduleConfig(
        settings.get("beta_start", base.beta_start),
        settings.get("beta_end", base.beta_end),
        settings.get("num_train_timesteps", base.training_timesteps),
    )
    return config, settings


def _check_fit(config: ModelConfig, path: Path) -> None:
    """The parts must agree about the widths of what they hand to each other."""
    if config.text.width != config.unet.context_width:
        raise CheckpointError(
            f"{path}: the text encoder gives {config.text.width} features and the UNet expects "
            f"{config.unet.context_width}: they belong to different models; give the parts of one checkpoint"
        )
    if config.vae.latent_channels != config.unet.in_channels:
        raise CheckpointError(
            f"{path}: the VAE has {config.vae.latent_channels} latent channels and the UNet "
            f"{config.unet.in_channels}: they belong to different models; give the parts of one checkpoint"
        )
