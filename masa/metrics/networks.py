"""The networks that metrics look through: loaded by their own libraries, missing ones named with what to do."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from masa.errors import MasaError
from masa.metrics.similarity import PictureDistance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DINO = "facebook/dino-vitb8"
CLIP = "openai/clip-vit-large-patch14"
NAMES = ("dino", "lpips", "clip")


@dataclass(frozen=True, eq=False)
class MetricNetworks:
    """What metrics look through; None where it is missing, and then `missing` says why and what to do.

    dino: a ViT of transformers, of which the last layer's keys are read. lpips: two pictures (1, 3, h, w) in [-1, 1]
    -> their distance. clip: a CLIP model of transformers with CLIP's own vocabulary. missing: by the name of the field.
    """

    dino: nn.Module | None = None
    lpips: PictureDistance | None = None
    clip: nn.Module | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> MetricNetworks:
        """The same, with weights on a device."""
        for network in (self.dino, self.lpips, self.clip):
            if isinstance(network, nn.Module):
                network.to(device)
        return self


def load_networks(
    names: Collection[str] = NAMES, *, dino: str | Path = DINO, clip: str | Path = CLIP, device: str = "cpu"
) -> MetricNetworks:
    """Load some of "dino", "lpips" and "clip", in float32, from the local cache or the network.

    dino, clip: a hub id, or a folder that transformers wrote. lpips comes with torchmetrics and torchvision. What
    cannot be loaded, whatever the reason, is None and explained in `missing`. A torchvision that fails to import takes
    all of them along. MasaError for an unknown name.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise MasaError(f"metric networks are {unknown}; expected some of {', '.join(map(repr, NAMES))}")
    broken = _broken_torchvision()
    if broken is not None:
        return MetricNetworks(missing=dict.fromkeys(names, broken))
    loaders = {"dino": lambda: _load_dino(dino), "lpips": _load_lpips, "clip": lambda: _load_clip(clip)}
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            found[name] = loaders[name]().to(device).eval().requires_grad_(False)
        except Exception as error:  # a library that is broken may raise anything; the other metrics go on
            missing[name] = _explain(name, {"dino": dino, "clip": clip}.get(name), error)
    return MetricNetworks(**found, missing=missing)


def _broken_torchvision() -> str | None:
    """Why torchvision, which is there, cannot be imported, with what to do; None where it can, or is not there."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError beside another build of torch
        return (
            f"torchvision does not work beside torch {torch.__version__} ({_shorten(error)}), and neither LPIPS nor "
            "transformers do then; install the torchvision that belongs to this torch, from where that came, or none"
        )
    return None


def _shorten(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{type(error).__name__}: {reason if len(reason) <= 200 else reason[:200] + '..'}"


def _load_dino(name: str | Path) -> PreTrainedModel:
    from transformers import ViTModel

    # DINO's own norms have eps 1e-6; the converted checkpoint's settings say otherwise.
    return _from_hub(ViTModel, name, add_pooling_layer=False, layer_norm_eps=1e-6)


def _load_clip(name: str | Path) -> PreTrainedModel:
    from transformers import CLIPModel

    return _from_hub(CLIPModel, name)


def _from_hub(kind: Any, name: str | Path, **settings: Any) -> PreTrainedModel:
    """A model of transformers in float32: from the local cache where it is there, else from the network."""
    from transformers.utils import logging

    shown, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        try:
            model = kind.from_pretrained(str(name), local_files_only=True, **settings)
        except OSError:
            model = kind.from_pretrained(str(name), **settings)
    finally:
        logging.set_verbosity(shown)
        if bars:
            logging.enable_progress_bar()
    loaded: PreTrainedModel = model.float()
    return loaded


def _load_lpips() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics and torchvision tell of their own affairs
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="squeeze")


def _explain(name: str, where: str | Path | None, error: Exception) -> str:
    """One line: what is missing, why, what to do."""
    if name != "lpips":
        what = {"dino": "DINO ViT-B/8", "clip": "CLIP ViT-L/14"}[name]
        remedy = f"go online once, or give its folder: {name}= (--{name})"
        return f"{what} could not be loaded from {where} ({_shorten(error)}); {remedy}"
    if isinstance(error, ImportError):
        return (
            f"LPIPS needs torchmetrics (pip install 'masa[bench]') and torchvision, from where torch came "
            f"({_shorten(error)})"
        )
    return f"LPIPS's SqueezeNet could not be loaded ({_shorten(error)}); go online once, it is kept then"
