"""The control that runs a source and keeps what others will read of it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from PIL import Image
from torch import Tensor

from masa.attention import Edit, Part, Record, Site, Tape
from masa.branches import Branches
from masa.cache.source_cache import EXTRAS, FORMAT, SourceCache, finish_file, name_of
from masa.cache.storage import Store, check_store, choose_store, keep
from masa.controls.base import ActiveControl, Run, choose_layers, choose_steps
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import MAP_DOWNSAMPLE, WordMasks
from masa.controls.style import StyleTransfer
from masa.errors import MasaError
from masa.io.files import replacing
from masa.io.tensor_file import TensorFile, TensorWriter
from masa.pipeline import StableDiffusion
from masa.trajectory import Trajectory

SUFFIX = ".safetensors"
MAPS = "source maps"  # the tape's key of every token's cross-attention map


class Recording:
    """Takes a recorder's tensors as they come, and becomes a SourceCache."""

    def __init__(self, store: Store, path: str | Path | None) -> None:
        check_store(store)
        if path is not None and store not in ("auto", "disk"):
            raise MasaError(f"path is {str(path)!r}, and store {store!r}; a file is for store='disk'")
        self.asked: Store = store if path is None else "disk"
        self.path = None if path is None else Path(path)
        self.store: Store = self.asked
        self.device = torch.device("cpu")
        self.folder: str | None = None  # a temporary one
        self.closing = ExitStack()  # around the run, until the cache is made
        self.writing = ExitStack()  # within it, until the file is whole
        self.writer: TensorWriter | None = None
        self.tensors: dict[str, Tensor] = {}
        self.latents: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.nbytes = 0

    def open(self, entries: int, nbytes: int, device: torch.device) -> None:
        """Choose the store of `nbytes`, and make the file if it is one."""
        self.device = device
        self.store = choose_store(self.asked, nbytes, device)
        if self.store != "disk":
            return
        if self.path is None:
            self.folder = tempfile.mkdtemp(prefix="masa-source-")
            self.closing.push(self._drop)
            self.path = Path(self.folder) / f"source{SUFFIX}"
        self.closing.enter_context(self.writing)
        temporary = self.writing.enter_context(replacing(self.path))
        free = shutil.disk_usage(temporary.parent).free
        if free < nbytes:
            raise MasaError(
                f"the source cache takes {nbytes / 1e9:.1f} GB, and {self.path.parent} has {free / 1e9:.1f} GB free; "
                "give another path, or record fewer layers and steps"
            )
        self.writer = self.writing.enter_context(TensorWriter(temporary, entries))

    def put(self, name: str, tensor: Tensor) -> None:
        self.nbytes += tensor.nbytes
        if self.writer is not None:
            self.writer.append(name, tensor)
        else:
            self.tensors[name] = keep(tensor, self.store, self.device)

    def finish(self, settings: Mapping[str, Any], picture: Image.Image, trajectory: Trajectory | None) -> SourceCache:
        latents, predictions = torch.cat(self.latents), torch.cat(self.predictions)
        tensors: Mapping[str, Tensor] = self.tensors
        if self.writer is not None and self.path is not None:
            finish_file(self.writer, settings, latents, picture, trajectory, predictions)
            self.writing.close()
            file = TensorFile(self.path, FORMAT, "source cache", "record it again")
            tensors = file.only([name for name in file if not name.startswith(EXTRAS)])
        path = self.path if self.store == "disk" else None
        cache = SourceCache(settings, latents, picture, trajectory, tensors, self.store, path, self.nbytes, predictions)
        if self.folder is not None:  # the file goes when the cache does
            weakref.finalize(cache, shutil.rmtree, self.folder, ignore_errors=True)
        return cache

    def _drop(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Recorder:
    """The control that records a source for others; it serves a run without targets."""

    needs_targets: ClassVar[bool] = False

    controls: tuple[MasaCtrl | StyleTransfer, ...]
    sd: StableDiffusion
    rows: int  # of the source, at most
    recording: Recording

    def begin(self, run: Run) -> ActiveControl:
        wanted: dict[int, dict[int, tuple[Part, ...]]] = {step: {} for step in range(run.first_step, run.steps)}
        for control in self.controls:
            name = type(control).__name__
            steps = choose_steps(control.steps, control.start_step, run, name)
            layers = choose_layers(control.layers, control.start_layer, run, name)
            if isinstance(control, MasaCtrl) and isinstance(control.mask, WordMasks):
                run.token_positions(run.prompts[0], control.mask.source)  # a misspelt word is found now
            parts: tuple[Part, ...] = ("k", "v") if isinstance(control, MasaCtrl) else ("q", "k")
            for site in run.sites:
                if site.kind == "self" and site.layer in layers:
                    for step in steps:
                        both = {*parts, *wanted[step].get(site.index, ())}
                        wanted[step][site.index] = tuple(part for part in get_args(Part) if part in both)
        # Of all steps: LocalBlend and RecordAttention read them from the first on.
        maps = [s for s in run.sites if s.kind == "cross" and s.downsample == MAP_DOWNSAMPLE]
        self._open(wanted, maps, run)
        eye = torch.eye(run.tokens, device=run.device)
        return _Active(self.recording, wanted, tuple(site.index for site in maps), eye)

    def _open(self, wanted: Mapping[int, Mapping[int, tuple[Part, ...]]], maps: Sequence[Site], run: Run) -> None:
        widths = self.sd.unet.config.block_out_channels
        rows, itemsize = self.rows, self.sd.unet.conv_in.weight.element_size()

        def area(site: Site) -> int:
            h, w = run.grid_at(site.downsample)
            return h * w

        nbytes = len(wanted) * sum(rows * run.tokens * area(site) * 4 for site in maps)
        entries = len(wanted) * len(maps)
        for of_sites in wanted.values():
            for index, parts in of_sites.items():
                site = run.sites[index]
                width = widths[site.downsample.bit_length() - 1]
                nbytes += len(parts) * rows * area(site) * width * itemsize
                entries += len(parts)
        self.recording.open(entries, nbytes, run.device)


class _Active(ActiveControl):
    name = "the recording of a source"

    def __init__(
        self,
        recording: Recording,
        wanted: Mapping[int, Mapping[int, tuple[Part, ...]]],
        maps: tuple[int, ...],
        each: Tensor,
    ) -> None:
        self.recording = recording
        self.wanted = wanted
        self.maps = maps
        self.each = each  # token its own map

    def start(self, latents: Tensor) -> Tensor:
        self.recording.latents.append(latents[:1].float().cpu())
        return latents

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        record = Record(MAPS, self.each.expand(len(branches), -1, -1))
        edits = dict.fromkeys(self.maps, Edit(records=(record,)))
        return edits | {site: Edit(keep=parts) for site, parts in self.wanted[step].items()}

    def see_prediction(self, step: int, x0: Tensor) -> None:
        self.recording.predictions.append(x0[:1].float().cpu())

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        for site in self.maps:
            self.recording.put(name_of(step, site, "maps"), tape[MAPS, site])
        for site, parts in self.wanted[step].items():
            for part in parts:
                self.recording.put(name_of(step, site, part), tape[("kept", part), site].transpose(1, 2))
        self.recording.latents.append(latents[:1].float().cpu())
        return latents
