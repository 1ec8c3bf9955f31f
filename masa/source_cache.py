"""What a source lends to its targets, kept: a further target then costs only its own rows."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from masa.attention import Edit, Lent, Part, Record, Site, Tape
from masa.branches import Branches
from masa.controls.base import ActiveControl, Run, choose_layers, choose_steps
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import MAP_DOWNSAMPLE, WordMasks
from masa.controls.style import StyleTransfer
from masa.errors import MasaError
from masa.files import replacing
from masa.pipeline import StableDiffusion
from masa.schedule import Schedule
from masa.tensor_file import TensorFile, TensorWriter
from masa.trajectory import Trajectory

Store = Literal["auto", "device", "host", "disk"]
FORMAT = "masa source cache 1"
SUFFIX = ".safetensors"
MAPS = "source maps"  # the tape's key of every token's cross-attention map
EXTRAS = "run/"  # names of what is not read step by step
# Of the free memory, how much "auto" may take; the rest is for the networks' own work.
SHARE = 0.5


@dataclass(frozen=True, eq=False, repr=False)
class SourceCache:
    """A source's keys and values at the layers and steps that controls read. Made by `masa.record`.

    settings: of the run that recorded it, as `Result.settings`. latents (steps run + 1, 4, h, w), float32 on the
    CPU: the source's, from the start to the last step. picture: the source. trajectory: that it was recorded from,
    or None. tensors: queries, keys and values (rows, h*w, heads, d) and token maps (rows, tokens, h*w) by
    "step/site/part". store: where they live, "device", "host" or "disk". nbytes: their size.
    """

    settings: Mapping[str, Any]
    latents: Tensor
    picture: Image.Image
    trajectory: Trajectory | None
    tensors: Mapping[str, Tensor]
    store: str
    path: Path | None
    nbytes: int

    def __repr__(self) -> str:
        place = {"device": f"on {self.settings['device']}", "host": "in host memory", "disk": f"in {self.path}"}
        held = {tuple(map(int, name.split("/")[:2])) for name in self.tensors if name.endswith("/k")}
        layers = sorted({site // 2 for _, site in held})
        return (
            f"SourceCache({self.settings['source']!r}, layers {layers}, {len({step for step, _ in held})} of "
            f"{self.settings['steps']} steps, {self.nbytes / 1e6:,.1f} MB {place[self.store]})"
        )

    @property
    def first_step(self) -> int:
        """The first step that was run."""
        return int(self.settings["skip_steps"])

    @property
    def pinned(self) -> bool:
        """Whether the source follows its trajectory, whatever step a run starts at."""
        return bool(self.settings["pin_source"]) and self.trajectory is not None

    @property
    def seeded(self) -> bool:
        """Whether the seed decides what the source is."""
        return (self.trajectory is None and self.settings["latents"] is None) or (
            self.settings["eta"] > 0 and (self.trajectory is None or self.trajectory.noise is None)
        )

    def source_after(self, step: int) -> Tensor:
        """The source's latents (1, 4, h, w) when a step is done."""
        return self.latents[step + 1 - self.first_step][None]

    def agree(self, name: str, asked: Any) -> Any:
        """The recorded value of a setting. MasaError where another one is asked for; None asks for none."""
        recorded = self.settings[name]
        if name == "schedule":
            recorded = Schedule.restore(recorded)
        if asked is not None and asked != recorded:
            raise MasaError(
                f"{name} is {asked!r}, but the cache was recorded with {recorded!r}; leave it out, or record anew"
            )
        return recorded

    def check(self, sd: StableDiffusion) -> None:
        """MasaError unless the model is the one that recorded it, in the same dtype."""
        _check_model(self.settings, sd)

    def start(self, latents: Tensor | None) -> Tensor | None:
        """The starting latents of a run: those asked for, whose first must be the source's, or those recorded."""
        if latents is not None and self.trajectory is None:
            if latents.shape[1:] != self.latents.shape[1:] or not torch.equal(latents[:1].cpu(), self.latents[:1]):
                raise MasaError("the first of latents is not what the cache was recorded from; leave it out")
            return latents
        return self.latents[:1] if self.settings["latents"] is not None else latents

    def check_edits(self, control: ActiveControl, step: int, branches: Branches, sites: Sequence[Site]) -> None:
        """MasaError where a control reads of the source in a step what is not here; branches: the source lent."""
        for index, edit in control.edits(step, branches).items():
            for part in _reads(edit, len(branches)):
                if _name(step, index, part) not in self.tensors:
                    remedy = "sample without cache="
                    if part in ("q", "k", "v"):
                        remedy = f"record with controls that reach it, or {remedy}"
                    raise MasaError(
                        f"{control.name} reads the source's {PARTS[part]} at {sites[index].name} (layer "
                        f"{sites[index].layer}) in step {step}, which the cache does not hold; {remedy}"
                    )

    def lend(self, edit: Edit, step: int, site: int, rows: int, device: torch.device) -> Edit:
        """The edit with what it reads of the source, on the device."""
        found = {}
        for part in _reads(edit, rows):
            tensor = self.tensors[_name(step, site, part)].to(device, non_blocking=True)
            found[part] = tensor if part == "maps" else tensor.transpose(1, 2)
        return replace(edit, lent=Lent(**found)) if found else edit

    def save(self, path: str | Path) -> None:
        """Write all of it as one safetensors file."""
        with replacing(path) as temporary, TensorWriter(temporary, len(self.tensors)) as writer:
            for name in self.tensors:
                writer.append(name, self.tensors[name])
            _finish(writer, self.settings, self.latents, self.picture, self.trajectory)

    @classmethod
    def load(cls, path: str | Path, sd: StableDiffusion, *, store: Store = "auto") -> SourceCache:
        """Read what `save`, or `record` with a path, wrote. MasaError for any other file, and for another model.

        store: as in `record`; "disk" reads from the file as long as the cache is used.
        """
        _check_store(store)
        file = TensorFile(path, FORMAT, "source cache", "expected a file written by masa.record or SourceCache.save")
        run = json.loads(file[f"{EXTRAS}settings"].numpy().tobytes())
        _check_model(run["settings"], sd)
        trajectory = None
        if run["trajectory"] is not None:
            parts = {n: file[f"{EXTRAS}{n}"].clone() for n in TRAJECTORY if f"{EXTRAS}{n}" in file}
            trajectory = Trajectory(prompt=run["trajectory"]["prompt"], settings=run["trajectory"]["settings"], **parts)
        settings = run["settings"] | {"device": str(sd.device)}
        names = [name for name in file if not name.startswith(EXTRAS)]
        nbytes = sum(file.sizes[name] for name in names)
        store = choose_store(store, nbytes, sd.device)
        tensors = file.only(names) if store == "disk" else {name: _keep(file[name], store, sd.device) for name in names}
        picture = Image.fromarray(file[f"{EXTRAS}picture"].numpy().copy())
        latents = file[f"{EXTRAS}source latents"].clone()
        place = Path(path) if store == "disk" else None
        return cls(settings, latents, picture, trajectory, tensors, store, place, nbytes)


TRAJECTORY = ("latents", "context", "noise")
PARTS = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "maps": "attention maps",
    "features": "features",
    "mix": "probabilities",
}


def _name(step: int, site: int, part: str) -> str:
    return f"{step}/{site}/{part}"


def _reads(edit: Edit, rows: int) -> list[str]:
    """What an edit reads of the rows behind the batch's own."""

    def behind(read: Sequence[int] | None) -> bool:
        return any(row >= rows for row in read or ())

    reads = {"q": behind(edit.q_from), "k": behind(edit.k_from), "v": behind(edit.v_from)}
    reads["maps"] = bool(edit.records)
    reads["features"] = behind(edit.features_from)
    reads["mix"] = edit.mix is not None and behind(edit.mix.sources)
    return [part for part, is_read in reads.items() if is_read]


# ---------------------------------------------------------------------------------------------------- recording


class Recording:
    """Takes a recorder's tensors as they come, and becomes a SourceCache."""

    def __init__(self, store: Store, path: str | Path | None) -> None:
        _check_store(store)
        if path is not None and store not in ("auto", "disk"):
            raise MasaError(f"path is {str(path)!r}, and store {store!r}; a file is for store='disk'")
        self.asked: Store = store if path is None else "disk"
        self.path = None if path is None else Path(path)
        self.store: Store = self.asked
        self.device = torch.device("cpu")
        self.folder: str | None = None  # a temporary one
        self.closing = ExitStack()
        self.writer: TensorWriter | None = None
        self.tensors: dict[str, Tensor] = {}
        self.latents: list[Tensor] = []
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
        temporary = self.closing.enter_context(replacing(self.path))
        free = shutil.disk_usage(temporary.parent).free
        if free < nbytes:
            raise MasaError(
                f"the source cache takes {nbytes / 1e9:.1f} GB, and {self.path.parent} has {free / 1e9:.1f} GB free; "
                "give another path, or record fewer layers and steps"
            )
        self.writer = self.closing.enter_context(TensorWriter(temporary, entries))

    def put(self, name: str, tensor: Tensor) -> None:
        self.nbytes += tensor.nbytes
        if self.writer is not None:
            self.writer.append(name, tensor)
        else:
            self.tensors[name] = _keep(tensor, self.store, self.device)

    def finish(self, settings: Mapping[str, Any], picture: Image.Image, trajectory: Trajectory | None) -> SourceCache:
        latents = torch.cat(self.latents)
        tensors: Mapping[str, Tensor] = self.tensors
        if self.writer is not None and self.path is not None:
            _finish(self.writer, settings, latents, picture, trajectory)
            self.closing.close()
            file = TensorFile(self.path, FORMAT, "source cache", "record it again")
            tensors = file.only([name for name in file if not name.startswith(EXTRAS)])
        path = self.path if self.store == "disk" else None
        cache = SourceCache(settings, latents, picture, trajectory, tensors, self.store, path, self.nbytes)
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

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        for site in self.maps:
            self.recording.put(_name(step, site, "maps"), tape[MAPS, site])
        for site, parts in self.wanted[step].items():
            for part in parts:
                self.recording.put(_name(step, site, part), tape[("kept", part), site].transpose(1, 2))
        self.recording.latents.append(latents[:1].float().cpu())
        return latents


# ----------------------------------------------------------------------------------------------------- storage


def choose_store(store: Store, nbytes: int, device: torch.device) -> Store:
    """Where `nbytes` go: as asked, else the first of device, host and disk of whose free memory half suffices."""
    if store == "host" and device.type == "cpu":
        return "device"  # the same memory
    if store != "auto":
        return store
    if nbytes <= SHARE * free_memory(device):
        return "device"
    return "host" if device.type != "cpu" and nbytes <= SHARE * free_memory(torch.device("cpu")) else "disk"


def free_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, or of the host as Linux counts them; 4 GB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 * 10**9


def _check_model(settings: Mapping[str, Any], sd: StableDiffusion) -> None:
    if sd.fingerprint != settings["fingerprint"]:
        raise MasaError(
            f"the cache was recorded with {settings['checkpoint']} in {settings['dtype']} (fingerprint "
            f"{settings['fingerprint']}), not with {sd.checkpoint} in {str(sd.dtype).removeprefix('torch.')} "
            f"({sd.fingerprint}); load that model, or record anew"
        )


def _check_store(store: str) -> None:
    if store not in get_args(Store):
        raise MasaError(f"store is {store!r}; expected one of {', '.join(map(repr, get_args(Store)))}")


def _keep(tensor: Tensor, store: str, device: torch.device) -> Tensor:
    """A tensor of its own, dense, where the store is."""
    if store == "device":
        return tensor.to(device).clone(memory_format=torch.contiguous_format)
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
    return kept.copy_(tensor)


def _finish(
    writer: TensorWriter,
    settings: Mapping[str, Any],
    latents: Tensor,
    picture: Image.Image,
    trajectory: Trajectory | None,
) -> None:
    """Write what is not read step by step, and close the file."""
    about: dict[str, Any] = {"settings": dict(settings), "trajectory": None}
    if trajectory is not None:
        about["trajectory"] = {"prompt": trajectory.prompt, "settings": dict(trajectory.settings)}
        for name in TRAJECTORY:
            tensor = getattr(trajectory, name)
            if tensor is not None:
                writer.append(f"{EXTRAS}{name}", tensor)
    writer.append(f"{EXTRAS}source latents", latents)
    writer.append(f"{EXTRAS}picture", torch.from_numpy(np.array(picture.convert("RGB"))))
    writer.append(f"{EXTRAS}settings", torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8))
    writer.finish({"format": FORMAT})
