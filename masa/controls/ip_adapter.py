"""IP-Adapter: a picture as a prompt, through keys and values of its own in cross-attention (2308.06721)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from masa.branches import SOURCE, Branches, Row
from masa.controls.base import ActiveControl, Run
from masa.controls.checks import is_number
from masa.controls.conditions import Condition, PictureControl, by_branch, check_conditions, read_picture
from masa.edits import Edit, ExtraKeys
from masa.errors import MasaError
from masa.io.pictures import ImageLike
from masa.models.ip_adapter import IPAdapterNetwork
from masa.runtime.adapters import AdapterFile, in_file_order, read_encoder, read_ip_adapter

SIDE = 224  # of what CLIP sees
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class IPAdapter(PictureControl):
    """Every cross-attention adds a second one, to a few tokens made of a picture: out + scale * A(Q, K_ip, V_ip).

    path: a .safetensors file for SD v1, plain or plus. source, target: the source's picture and the targets', None for
    none; target also a list with one entry a target. A path, PIL picture, uint8 array, float tensor (3, h, w) in
    [0, 1]; or what the encoder makes of it, a tensor: of plain adapters (1, width), its embedding; of plus adapters
    (2, patches, width), the last-but-one hidden states of an all-zero picture and of this one. scale: 1 as trained,
    0.5 beside a prompt, 0 changes nothing; several add up. image_encoder: the folder of CLIP ViT-H/14, which
    transformers reads, once for each picture; not needed for tensors. sha256, encoder_sha256: of the files, where
    others are to be refused.

    The unprompted half of guidance reads the tokens of a zero embedding. Without targets it acts on the source.
    MasaError for a file of another kind, or a picture that is none. 2308.06721, decoupled cross-attention.
    """

    files: ClassVar[tuple[str, ...]] = ("path", "image_encoder")

    path: str | Path
    source: Condition = None
    target: Condition | Sequence[Condition] = None
    scale: float = 1.0
    image_encoder: str | Path | None = None
    sha256: str | None = None
    encoder_sha256: str | None = None
    file: AdapterFile[IPAdapterNetwork] = field(init=False, repr=False)
    encoder: AdapterFile[nn.Module] | None = field(init=False, repr=False)
    seen: dict[object, Tensor] = field(init=False, repr=False)  # what the encoder made of each picture

    def __post_init__(self) -> None:
        check_conditions("IPAdapter", self.source, self.target)
        if not is_number(self.scale):
            raise MasaError(f"IPAdapter scale is {self.scale!r}; expected a number, 1 as trained")
        object.__setattr__(self, "file", AdapterFile(self.path, self.sha256, read_ip_adapter))
        folder = self.image_encoder
        encoder = None if folder is None else AdapterFile(folder, self.encoder_sha256, read_encoder)
        object.__setattr__(self, "encoder", encoder)
        object.__setattr__(self, "seen", {})

    def kept(self) -> IPAdapter:
        """The same with its pictures inside and its files' digests, for settings."""
        encoder = None if self.image_encoder is None else str(self.image_encoder)
        digest = None if self.encoder is None else self.encoder.digest()
        return replace(super().kept(), image_encoder=encoder, encoder_sha256=digest)

    @torch.no_grad()
    def begin(self, run: Run) -> ActiveControl:
        given = by_branch("IPAdapter", self.source, self.target, run)
        network = self.file.load(run.unet, run.dtype, run.device)
        pairs = {branch: self._see(picture, network, run) for branch, picture in given.items() if self.scale}
        active = _Active(network, pairs, float(self.scale), run)
        if SOURCE in pairs:
            seen = hashlib.sha256(pairs[SOURCE].float().cpu().numpy().tobytes()).hexdigest()
            active.source_condition = f"IPAdapter({self.file.path.name}, {self.file.digest()}, {seen}, {self.scale})"
            active.tells_halves_apart = True
        return active

    def _see(self, picture: ImageLike, network: IPAdapterNetwork, run: Run) -> Tensor:
        """What the network reads of nothing and of a picture: (2, width), or (2, patches, width) of a plus adapter."""
        config = network.config
        if isinstance(picture, Tensor) and picture.is_floating_point() and picture.shape[-1] == config.picture_width:
            shape = tuple(picture.shape)
            if config.plus and picture.ndim == 3 and shape[0] == 2:
                return picture.to(run.device, run.dtype)
            if not config.plus and picture.numel() == config.picture_width:
                one = picture.reshape(1, -1).to(run.device, run.dtype)
                return torch.cat([torch.zeros_like(one), one])
        if self.encoder is None:
            expected = f"(2, patches, {config.picture_width})" if config.plus else f"(1, {config.picture_width})"
            raise MasaError(
                "IPAdapter has a picture and no image_encoder; give the folder of CLIP ViT-H/14, or a tensor "
                f"{expected}"
            )
        pixels = for_clip(read_picture("IPAdapter", picture))
        shown = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        key = (shown, self.encoder.state(), config.plus, run.dtype, run.device)
        if key not in self.seen:  # once for a picture: runs begin more often, and the encoder is large
            encoder = self.encoder.load(run.unet, run.dtype, run.device)
            self.seen[key] = encode(encoder, pixels.to(run.device, run.dtype), config.plus)
        found = self.seen[key]
        if found.shape[-1] != config.picture_width:
            raise MasaError(
                f"{self.image_encoder} gives {found.shape[-1]} features of a picture, and {self.path} reads "
                f"{config.picture_width}; give the encoder that it was trained with"
            )
        return found


class _Active(ActiveControl):
    name = "IPAdapter"

    def __init__(self, network: IPAdapterNetwork, pairs: Mapping[int, Tensor], scale: float, run: Run) -> None:
        self.network = network  # held as long as the run, for whoever begins again
        self.branches = tuple(pairs)
        self.scale = scale
        self.keys: dict[int, tuple[Tensor, Tensor]] = {}  # by site: of each branch's nothing, then its picture
        if not pairs:
            return
        # One picture at a time: its tokens do not depend on the others.
        made = [network(one) for pair in pairs.values() for one in pair.split(1)]
        for i, site in enumerate(in_file_order(run.sites)):
            k, v = (
                torch.cat([of_one[i][which] for of_one in made]).unflatten(2, (site.heads, -1)).transpose(1, 2)
                for which in (0, 1)
            )
            self.keys[site.index] = k.contiguous(), v.contiguous()

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        rows = tuple(self._reads(row) for row in branches.rows)
        if all(row < 0 for row in rows):
            return {}
        return {site: Edit(extra=(ExtraKeys(k, v, rows, self.scale),)) for site, (k, v) in self.keys.items()}

    def _reads(self, row: Row) -> int:
        """Which of the keys a row of the batch reads, -1 for none."""
        if row.branch not in self.branches:
            return -1
        return 2 * self.branches.index(row.branch) + ("cond" in row.halves)


def encode(encoder: nn.Module, pixels: Tensor, plus: bool) -> Tensor:
    """What CLIP makes of nothing and of a picture (1, 3, 224, 224): embeddings, or of plus adapters hidden states."""
    if plus:
        shown = torch.cat([torch.zeros_like(pixels), pixels])
        return torch.cat([encoder(one, output_hidden_states=True).hidden_states[-2] for one in shown.split(1)])
    found: Tensor = encoder(pixels).image_embeds
    return torch.cat([torch.zeros_like(found), found])


def for_clip(picture: Tensor) -> Tensor:
    """A picture (3, h, w) in [0, 1] as CLIP sees it, (1, 3, 224, 224): short side 224, its middle, normalised."""
    array = (picture * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy()
    shown = Image.fromarray(array)
    short = min(shown.size)
    size = (int(SIDE * shown.width / short), int(SIDE * shown.height / short))
    shown = shown.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    shown = shown.crop((left, top, left + SIDE, top + SIDE))
    x = torch.from_numpy(np.array(shown)).permute(2, 0, 1).float() / 255.0
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return ((x - mean) / deviation)[None]
