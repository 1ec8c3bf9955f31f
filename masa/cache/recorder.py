"""The control that runs a source and keeps what others will read of it."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from PIL import Image
from torch import Tensor

from masa.branches import SOURCE, Branches
from masa.cache.source_cache import BY_HEAD, EXTRAS, FORMAT, SourceCache, finish_file, name_of
from masa.cache.storage import Store, check_store, choose_store, store_tensor
from masa.controls.base import ActiveControl, Control, Run, resolve
from masa.controls.masks import MAP_DOWNSAMPLE
from masa.edits import PLAIN, CachePart, Edit, Record, Residuals, Site, Tape
from masa.errors import MasaError
from masa.io.files import replacing
from masa.io.tensor_file import TensorFile, TensorWriter
from masa.pipeline import StableDiffusion
from masa.settings import check_kept, describe
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
        self.source_conditions: list[str] = []  # what the source depends on, beside prompt and noise
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
            self.tensors[name] = store_tensor(tensor, self.store, self.device)

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

    controls: tuple[Control, ...]
    sd: StableDiffusion
    rows: int  # of the source, at most
    recording: Recording

    def begin(self, run: Run) -> ActiveControl:
        wanted: Wanted = {step: {} for step in range(run.first_step, run.steps)}
        shaping: list[ActiveControl] = []  # they take part in the source's own run
        conditions: list[str] = []
        for control in self.controls:
            reads, condition = source_reads(control, run)
            if condition is not None:
                shaping.append(control.begin(run))
                conditions.append(condition)
            for step, of_sites in reads.items():
                for site, parts in of_sites.items():
                    both = {*parts, *wanted[step].get(site, ())}
                    wanted[step][site] = tuple(part for part in get_args(CachePart) if part in both)
        if not shaping and not any(wanted.values()):
            names = " and ".join(type(control).__name__ for control in self.controls)
            raise MasaError(
                f"{names} reads nothing of the source that a cache could hold; give the controls that will read it"
            )
        self.recording.source_conditions = conditions
        # Of all steps: LocalBlend and RecordAttention read them from the first on.
        maps = [s for s in run.sites if s.kind == "cross" and s.downsample == MAP_DOWNSAMPLE]
        apart = any(control.tells_halves_apart for control in shaping)
        self._open(wanted, maps, run, rows=2 if apart else self.rows)
        eye = torch.eye(run.tokens, device=run.device)
        return _Active(self.recording, wanted, tuple(site.index for site in maps), eye, shaping, run.sites)

    def _open(self, wanted: Wanted, maps: Sequence[Site], run: Run, rows: int) -> None:
        config = self.sd.unet.config
        itemsize = self.sd.unet.conv_in.weight.element_size()

        def size(site: Site, part: CachePart) -> int:
            h, w = run.grid_at(site.downsample)
            width = config.block_out_channels[site.downsample.bit_length() - 1]
            if part in ("q_moments", "k_moments"):
                return 2 * width * 4
            if part == "norm":
                return 2 * config.norm_groups * 4
            if part == "maps":
                return run.tokens * h * w * 4
            positions = run.tokens if site.kind == "cross" and part in ("k", "v") else h * w
            return positions * width * itemsize

        named = [
            (run.sites[i], part) for of_sites in wanted.values() for i, parts in of_sites.items() for part in parts
        ]
        named += [(site, "maps") for site in maps] * len(wanted)
        self.recording.open(len(named), rows * sum(size(site, part) for site, part in named), run.device)


# What is read of the source, by step and site.
Wanted = dict[int, dict[int, tuple[CachePart, ...]]]


def source_reads(control: Control, run: Run) -> tuple[Wanted, str | None]:
    """What a control's edits read of a source that is not in the batch, and what the source depends on through it.

    The source's prompt stands in for a target's. Token maps are left out: they are recorded whatever reads them.
    MasaError for a control that cannot do without its targets' prompts.
    """
    stand_in = replace(run, prompts=(run.prompts[SOURCE], run.prompts[SOURCE]), targets_known=False)
    active = control.begin(stand_in)
    branches = Branches.build(1, guided=True).cache_source()
    reads: Wanted = {}
    for step in range(run.first_step, run.steps):
        found = {site: edit.reads_cached(len(branches)) for site, edit in active.edits(step, branches).items()}
        kept = {site: tuple(part for part in parts if part != "maps") for site, parts in found.items()}
        reads[step] = {site: parts for site, parts in kept.items() if parts}
    return reads, source_condition(control, active, dict.fromkeys(reads, Branches.build(1, guided=True)))


def source_condition(control: Control, active: ActiveControl, branches: Mapping[int, Branches]) -> str | None:
    """What the source depends on through a control: as it says itself, or its settings, where edits change source rows.

    branches: of each step, the source's rows among them. None: the source is as it would be without.
    """
    if active.source_condition is not None:
        return active.source_condition
    for step, of_step in branches.items():
        source = tuple(i for i, row in enumerate(of_step.rows) if row.branch == SOURCE)
        if any(edit.changes(source) for edit in active.edits(step, of_step).values()):
            check_kept(controls=control)
            return f"{active.name}({json.dumps(describe(control))})"
    return None


class _Active(ActiveControl):
    name = "the recording of a source"

    def __init__(
        self,
        recording: Recording,
        wanted: Wanted,
        maps: tuple[int, ...],
        each: Tensor,
        shaping: Sequence[ActiveControl],
        sites: Sequence[Site],
    ) -> None:
        self.recording = recording
        self.wanted = wanted
        self.maps = maps
        self.each = each  # token its own map
        self.shaping = shaping
        self.sites = sites
        self.tells_halves_apart = any(control.tells_halves_apart for control in shaping)

    @property
    def source_conditions(self) -> tuple[str, ...]:
        return tuple(one for control in self.shaping for one in control.source_conditions)

    def start(self, latents: Tensor) -> Tensor:
        self.recording.latents.append(latents[:1].float().cpu())
        return latents

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        record = Record(MAPS, self.each.expand(len(branches), -1, -1))
        edits = resolve(self.shaping, step, branches, self.sites)
        for site, parts in self.wanted[step].items():
            edits[site] = edits.get(site, PLAIN).merge(Edit(to_cache=parts))
        for site in self.maps:
            edits[site] = edits.get(site, PLAIN).merge(Edit(records=(record,)))
        return edits

    def residuals(self, step: int, timestep: float, x: Tensor, context: Tensor, branches: Branches) -> Residuals | None:
        found = [control.residuals(step, timestep, x, context, branches) for control in self.shaping]
        return Residuals.total([some for some in found if some is not None])

    def see_prediction(self, step: int, x0: Tensor) -> None:
        self.recording.predictions.append(x0[:1].float().cpu())

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        for site in self.maps:
            self.recording.put(name_of(step, site, "maps"), tape[MAPS, site])
        for site, parts in self.wanted[step].items():
            for part in parts:
                tensor = tape[("cache", part), site]
                self.recording.put(name_of(step, site, part), tensor.transpose(1, 2) if part in BY_HEAD else tensor)
        self.recording.latents.append(latents[:1].float().cpu())
        return latents
