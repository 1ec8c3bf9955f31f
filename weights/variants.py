"""What tells one Stable Diffusion v1 checkpoint from another: prefixes, averaged weights, what its UNet predicts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from masa.errors import CheckpointError
from masa.weights.checkpoint import Entries, listed
from masa.weights.layouts import UNET_PREFIX, VAE_PREFIX, text_name

EMA_PREFIX = "model_ema."
PREDICTIONS = ("epsilon", "v_prediction")
# How metadata and configuration files name them.
PREDICTION_NAMES = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
PREDICTION_KEY = "modelspec.prediction_type"
ZTSNR = "trained with zero terminal SNR (ztsnr)"

# Whatever stands before LDM's own prefixes, or before a lone autoencoder's names.
_WRAPPED = re.compile(r"(.+?\.)(?:model\.diffusion_model|cond_stage_model|first_stage_model)\.")
_WRAPPED_VAE = re.compile(r"(.+?\.)(?:first_stage_model\.)?decoder\.conv_in\.weight")


def unwrapped(entries: Entries) -> Entries:
    """The tensors under LDM's names where all of them carry a prefix more, such as "state_dict."; else as they are."""
    return _without(entries, _WRAPPED, (UNET_PREFIX, "cond_stage_model.", VAE_PREFIX))


def unwrapped_vae(entries: Entries) -> Entries:
    """The same of an autoencoder's file, whose names may lack LDM's prefix."""
    return _without(unwrapped(entries), _WRAPPED_VAE, ("decoder.conv_in.", VAE_PREFIX))


def _without(entries: Entries, wrapped: re.Pattern[str], usual: tuple[str, ...]) -> Entries:
    found = Counter(match[1] for key in entries if (match := wrapped.match(key)))
    if not found or any(key.startswith(usual) for key in entries):
        return entries
    prefix = found.most_common(1)[0][0]
    return {key.removeprefix(prefix): replace(entry, stored=entry.stored or key) for key, entry in entries.items()}


def averaged_names(entries: Entries) -> dict[str, str]:
    """The UNet's keys in an LDM file -> their moving averages' (EMA), which lose their dots; only those there."""
    flat = {key: EMA_PREFIX + key.removeprefix("model.").replace(".", "") for key in entries}
    return {key: name for key, name in flat.items() if key.startswith(UNET_PREFIX) and name in entries}


def averaged(entries: Entries, path: Path) -> Entries:
    """An LDM file's tensors with the UNet's averages in its place. CheckpointError where the file has not all."""
    names, wanted = averaged_names(entries), [key for key in entries if key.startswith(UNET_PREFIX)]
    if not names:
        raise CheckpointError(f"{path} holds no averaged weights (EMA), for which ema=True asks; leave it out")
    missing = [key for key in wanted if key not in names]
    if missing:
        raise CheckpointError(
            f"{path} holds {len(names)} of its UNet's {len(wanted)} averaged weights (EMA); missing are those of "
            f"{listed(missing)}; load it without ema=True"
        )
    taken = {key: replace(entries[name], stored=entries[name].stored or name) for key, name in names.items()}
    return {key: entry for key, entry in entries.items() if key not in names.values()} | taken


def predicts_velocity(
    path: Path, entries: Entries, metadata: Mapping[str, str], scheduler: Mapping[str, object], asked: str | None
) -> tuple[bool, str]:
    """Whether a UNet predicts the velocity v instead of the noise, and by what that is known.

    In this order: as asked; the key `v_pred`; the file's metadata; the scheduler's configuration; the noise, as is
    usual. CheckpointError for other predictions, and for a model trained with zero terminal SNR, whatever is asked.
    """
    if (
        "ztsnr" in entries
        or scheduler.get("rescale_betas_zero_snr")
        or any("zero_terminal_snr" in key and metadata[key].lower() == "true" for key in metadata)
    ):
        raise CheckpointError(
            f"{path} was {ZTSNR}: its noisiest level holds no picture, and samplers here divide by what it holds; give "
            "a model that was trained without"
        )
    if asked is not None:
        if asked not in PREDICTIONS:
            raise CheckpointError(f"prediction_type is {asked!r}; expected {' or '.join(map(repr, PREDICTIONS))}")
        return asked == "v_prediction", "as asked"
    if "v_pred" in entries:
        return True, "its key v_pred says so"
    for where, told in (
        (f"its metadata {PREDICTION_KEY}", metadata.get(PREDICTION_KEY)),
        ("its scheduler's prediction_type", scheduler.get("prediction_type")),
    ):
        if told is not None:
            name = PREDICTION_NAMES.get(str(told).lower())
            if name is None:
                raise CheckpointError(
                    f"{path}: {where} is {told!r}; expected one of {', '.join(PREDICTION_NAMES)}; where that is wrong, "
                    "say prediction_type= yourself"
                )
            return name == "v_prediction", f"{where} says so"
    return False, "nothing says otherwise"


def text_layouts(entries: Entries) -> dict[str, int]:
    """What stands before the text encoder's own names in an LDM file, and how many tensors it stands before."""
    found: Counter[str] = Counter()
    for key in entries:
        name = text_name(key)
        if name:
            found[key[: -len(name)]] += 1
    return dict(found)


def chosen_text(layouts: Mapping[str, int]) -> str:
    """Of a text encoder that is there twice, the prefix of the fuller one; of equals, the longest, as published."""
    return max(layouts, key=lambda prefix: (layouts[prefix], len(prefix)))


def describe_variants(entries: Entries) -> list[tuple[str, str]]:
    """What an LDM file's names tell, as (label, text) lines."""
    lines = []
    wrapper = next((e.stored[: -len(key)] for key, e in entries.items() if e.stored and e.stored.endswith(key)), "")
    if wrapper:
        lines.append(("names", f"all behind {wrapper}"))
    layouts = text_layouts(entries)
    if layouts:
        chosen = chosen_text(layouts)
        others = [prefix for prefix in layouts if prefix != chosen]
        twice = f"; also, not taken, {', '.join(f'{prefix}*' for prefix in others)}" if others else ""
        lines.append(("text layout", f"{chosen}*{twice}"))
    names = averaged_names(entries)
    if names:
        lines.append(("EMA", f"{len(names)} averaged weights beside the plain ones, taken with ema=True"))
    return lines
