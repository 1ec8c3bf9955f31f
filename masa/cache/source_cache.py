"""What targets read of a source, kept: a further target then costs only its own rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from masa.branches import Branches
from masa.cache.storage import Store, check_store, choose_store, store_tensor
from masa.controls.base import ActiveControl
from masa.edits import CachedRows, Edit, Site
from masa.errors import MasaError
from masa.io.files import replacing
from masa.io.tensor_file import TensorFile, TensorWriter
from masa.pipeline import StableDiffusion
from masa.settings import describe_setting, restore_setting
from masa.trajectory import Trajectory

FORMAT = "masa source cache 1"
EXTRAS = "run/"  # names of what is not read step by step


@dataclass(frozen=True, eq=False, repr=False)
class SourceCache:
    """A source's keys and values at the layers and steps that controls read. Made by `masa.record`.

    settings: of the run that recorded it, as `Result.settings`. latents (steps run + 1, 4, h, w), float32 on the
    CPU: the source's, from the start to the last step. picture: the source. trajectory: that it was recorded from,
    or None. tensors: by "step/site/part", as in `masa.edits.CachePart`, but queries, keys and values (rows, h*w, heads,
    d). store: where they live, "device", "host" or "disk". nbytes: their size. predictions (steps run, 4, h, w),
    float32 on the CPU: what each step took the source's clean latents to be; None in older files.
    """

    settings: Mapping[str, Any]
    latents: Tensor
    picture: Image.Image
    trajectory: Trajectory | None
    tensors: Mapping[str, Tensor]
    store: str
    path: Path | None
    nbytes: int
    predictions: Tensor | None = None

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
        adds_noise = self.settings["eta"] > 0 or not restore_setting("sampler", self.settings.get("sampler")).retraces
        return (self.trajectory is None and self.settings["latents"] is None) or (
            adds_noise and (self.trajectory is None or self.trajectory.noise is None)
        )

    def source_after(self, step: int) -> Tensor:
        """The source's latents (1, 4, h, w) when a step is done."""
        return self.latents[step + 1 - self.first_step][None]

    def predicted(self, step: int) -> Tensor:
        """What a step took the source's clean latents (1, 4, h, w) to be."""
        # Earlier versions recorded under DDIM alone, which remembers nothing that could be blended with them.
        return self.latents[-1:] if self.predictions is None else self.predictions[step - self.first_step][None]

    def agree(self, name: str, asked: Any) -> Any:
        """The recorded value of a setting. MasaError where another one is asked for; None asks for none."""
        recorded = restore_setting(name, self.settings.get(name))  # a file of an earlier version has fewer
        # Of a user's class equality may be identity: then what is written down of it tells.
        same = asked == recorded or describe_setting(name, asked) == self.settings.get(name)
        if asked is not None and not same:
            raise MasaError(
                f"{name} is {asked!r}, but the cache was recorded with {recorded!r}; leave it out, or record anew"
            )
        return recorded

    def check(self, sd: StableDiffusion) -> None:
        """MasaError unless the model is the one that recorded it, in the same dtype."""
        _check_model(self.settings, sd)

    def agree_trajectory(self, trajectory: Trajectory | None, generator: torch.Generator | None) -> Trajectory | None:
        """The recorded trajectory. MasaError where the arguments name another start."""
        if trajectory is not None and (
            self.trajectory is None or not torch.equal(trajectory.latents, self.trajectory.latents)
        ):
            raise MasaError(
                "trajectory and cache are of different sources; leave the trajectory out, or record it anew"
            )
        if generator is not None and self.seeded:
            raise MasaError("generator and cache both give the noise; leave the generator out, or record anew")
        return self.trajectory

    def start(self, latents: Tensor | None) -> Tensor | None:
        """The starting latents of a run: those asked for, whose first must be the source's, or those recorded."""
        given: Tensor | None = restore_setting("latents", self.settings["latents"])
        if latents is not None and self.trajectory is None:
            recorded = self.latents[:1] if given is None else given
            if latents.shape[1:] != recorded.shape[1:] or not torch.equal(latents[:1].cpu().float(), recorded.float()):
                raise MasaError("the first of latents is not what the cache was recorded from; leave it out")
            return latents
        return latents if given is None else given

    def check_conditions(self, asked: Sequence[str | None]) -> None:
        """MasaError unless a run's controls change the source as those did that it was recorded with."""
        wanted = sorted(condition for condition in asked if condition is not None)
        recorded = sorted(self.settings.get("source_conditions", ()))
        if wanted == recorded:
            return
        extra = [condition.partition("(")[0] for condition in wanted if condition not in recorded]
        if extra:
            raise MasaError(
                f"{' and '.join(extra)} changes what the source is, and the cache was recorded without it, or with "
                "another; record with the same control, or leave it out (of adapters their source=: targets' are free)"
            )
        lacking = [condition.partition("(")[0] for condition in recorded if condition not in wanted]
        raise MasaError(
            f"the cache was recorded with {' and '.join(lacking)}, which changes what the source is; give the same "
            "control, or record anew without it"
        )

    def check_edits(self, control: ActiveControl, step: int, branches: Branches, sites: Sequence[Site]) -> None:
        """MasaError where a control reads of the source in a step what is not here; branches: the source cached."""
        for index, edit in control.edits(step, branches).items():
            for part in edit.reads_cached(len(branches)):
                if name_of(step, index, part) not in self.tensors:
                    remedy = "sample without cache="
                    if part != "maps":
                        remedy = f"record with controls that reach it, or {remedy}"
                    raise MasaError(
                        f"{control.name} reads the source's {PARTS[part]} at {sites[index].name} (layer "
                        f"{sites[index].layer}) in step {step}, which the cache does not hold; {remedy}"
                    )

    def attach(self, edit: Edit, step: int, site: int, rows: int, device: torch.device) -> Edit:
        """The edit with what it reads of the source, on the device."""
        found = {}
        for part in edit.reads_cached(rows):
            # Only pinned memory may be read behind the host's back: it is not freed, nor written, before it was.
            tensor = self.tensors[name_of(step, site, part)].to(device, non_blocking=self.store == "host")
            found[part] = tensor.transpose(1, 2) if part in BY_HEAD else tensor
        return replace(edit, cached=CachedRows(**found)) if found else edit

    def save(self, path: str | Path) -> None:
        """Write all of it as one safetensors file."""
        with replacing(path) as temporary, TensorWriter(temporary, len(self.tensors)) as writer:
            for name in self.tensors:
                writer.append(name, self.tensors[name])
            finish_file(writer, self.settings, self.latents, self.picture, self.trajectory, self.predictions)

    @classmethod
    def load(cls, path: str | Path, sd: StableDiffusion, *, store: Store = "auto") -> SourceCache:
        """Read what `save`, or `record` with a path, wrote. MasaError for any other file, and for another model.

        store: as in `record`; "disk" reads from the file as long as the cache is used.
        """
        check_store(store)
        remedy = "expected a file written by masa.record or SourceCache.save"
        with ExitStack() as stack:
            file = TensorFile(path, FORMAT, "source cache", remedy)
            stack.callback(file.close)
            cache = cls._from_file(file, Path(path), sd, store)
            if cache.store == "disk":
                stack.pop_all()  # it is read as long as the cache is used
        return cache

    @classmethod
    def _from_file(cls, file: TensorFile, path: Path, sd: StableDiffusion, store: Store) -> SourceCache:
        run = json.loads(file[f"{EXTRAS}settings"].numpy().tobytes())
        _check_model(run["settings"], sd)
        trajectory = None
        if run["trajectory"] is not None:
            parts = {n: file[f"{EXTRAS}{n}"].clone() for n in TRAJECTORY if f"{EXTRAS}{n}" in file}
            prompt, about = run["trajectory"]["prompt"], run["trajectory"]["settings"]
            trajectory = Trajectory(parts["latents"], prompt, about, parts.get("context"), parts.get("noise"))
        settings = run["settings"] | {"device": str(sd.device)}
        names = [name for name in file if not name.startswith(EXTRAS)]
        nbytes = sum(file.sizes[name] for name in names)
        store = choose_store(store, nbytes, sd.device)
        tensors = (
            file.only(names)
            if store == "disk"
            else {name: store_tensor(file[name], store, sd.device) for name in names}
        )
        picture = Image.fromarray(file[f"{EXTRAS}picture"].numpy().copy())
        latents = file[f"{EXTRAS}source latents"].clone()
        predictions = file[f"{EXTRAS}predictions"].clone() if f"{EXTRAS}predictions" in file else None
        path_kept = path if store == "disk" else None
        return cls(settings, latents, picture, trajectory, tensors, store, path_kept, nbytes, predictions)


TRAJECTORY = ("latents", "context", "noise")
BY_HEAD = ("q", "k", "v")  # kept (rows, h*w, heads, d), as projections leave them
PARTS: Mapping[str, str] = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "q_moments": "queries' statistics",
    "k_moments": "keys' statistics",
    "maps": "attention maps",
    "features": "features",
    "norm": "norm's statistics",
}


def name_of(step: int, site: int, part: str) -> str:
    return f"{step}/{site}/{part}"


def _check_model(settings: Mapping[str, Any], sd: StableDiffusion) -> None:
    if sd.fingerprint != settings["fingerprint"]:
        raise MasaError(
            f"the cache was recorded with {settings['checkpoint']} in {settings['dtype']} (fingerprint "
            f"{settings['fingerprint']}), not with {sd.checkpoint} in {str(sd.dtype).removeprefix('torch.')} "
            f"({sd.fingerprint}); load that model, or record anew"
        )


def finish_file(
    writer: TensorWriter,
    settings: Mapping[str, Any],
    latents: Tensor,
    picture: Image.Image,
    trajectory: Trajectory | None,
    predictions: Tensor | None,
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
    if predictions is not None:
        writer.append(f"{EXTRAS}predictions", predictions)
    writer.append(f"{EXTRAS}picture", torch.from_numpy(np.array(picture.convert("RGB"))))
    writer.append(f"{EXTRAS}settings", torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8))
    writer.finish({"format": FORMAT})
