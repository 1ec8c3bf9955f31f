"""piebench(): the edits of PIE-Bench, made, measured, and set beside the published numbers (2310.01506)."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from masa.attention import Backend
from masa.checks import as_controls, check_model
from masa.controls.base import Control
from masa.errors import MasaError
from masa.io.files import check_folder, file_digest, replacing
from masa.io.pictures import check_size, open_picture
from masa.metrics.networks import CLIP, DINO, MetricNetworks, load_networks
from masa.metrics.similarity import (
    Libraries,
    mean_squared_error,
    peak_signal_to_noise,
    perceptual_distance,
    prompt_similarity,
    structural_similarity,
    structure_distance,
)
from masa.models.tokenizer import Tokenizer
from masa.pipeline import StableDiffusion, choose_device
from masa.settings import describe
from masa.workflows.batch import batch
from masa.workflows.piebench_layout import Entry, find_picture, fit_result, read_layout
from masa.workflows.piebench_methods import INVERTERS, METHODS, SDEDIT_STRENGTH, Plan, check_method
from masa.workflows.piebench_tables import BY_NAME, METRICS, Metric, PieBench, Row, explain

SETTINGS, SCORES, EDITS = "settings.json", "scores.jsonl", "edits"
SEED = 1234  # the published programs'


def piebench(
    folder: str | Path,
    sd: StableDiffusion | None = None,
    *,
    method: str | None = None,
    inverter: str | None = None,
    controls: Control | Sequence[Control] | None = None,
    pictures: str | Path | None = None,
    out: str | Path | None = None,
    types: Collection[str] | None = None,
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    networks: MetricNetworks | None = None,
    dino: str | Path = DINO,
    clip: str | Path = CLIP,
    libraries: Libraries = "current",
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = SEED,
    backend: Backend = "auto",
    progress: bool = True,
) -> PieBench:
    """Make the edits of PIE-Bench with a model, or take them from a folder, measure them, and write tables.

    folder: in the published layout, with mapping_file.json and annotation_images/. types: editing type ids "0".."9",
    default all. limit: the first so many edits.

    sd: the model that edits. method: "masactrl" (default), "p2p", "pnp" or "sdedit", with the published settings.
    inverter: "pinned" (default; the same as "direct"), "ddim" (the source drifts), "negative-prompt", "null-text" or
    "edit-friendly"; none for SDEdit. controls: in place of the method's own; [] for none. steps, guidance_scale,
    seed, backend: as in `edit`; each edit has the size of its picture. pictures: instead of sd, a folder of results
    made elsewhere, named as their sources are.

    out: default a folder in masa-out/ named after the method. It gets edits/, the output folder of a batch with one
    job for each edit, scores.jsonl, and table.md, table.csv and scores.csv. An edit that is there whole is not made
    again, nor is a picture measured twice: a run that was cut off goes on where it was, and several processes may
    share the work (see `batch`). An edit that fails does not stop the others.

    metrics: names of the published evaluator's, default all eight; "structure_distance_divided" is the structure
    distance of values in [0, 1]. Without their networks the others are still taken; the result's `missing` names what
    is not, unless it was asked for by name. networks: loaded already. dino, clip: hub ids or folders of transformers.
    libraries: "2023" resizes for the structure distance without smoothing, and leaves SSIM's border out, as those did
    that the published numbers were made with.

    Raises MasaError for bad input, before any long work: a missing mapping file or picture, a mask that does not fit,
    an unknown method, a folder `out` that holds edits with other settings; and where every edit fails.
    """
    chosen = choose_metrics(metrics)
    if libraries not in get_args(Libraries):
        raise MasaError(f"libraries is {libraries!r}; expected 'current' or '2023'")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise MasaError(f"limit is {limit!r}; expected a number of edits from 1, or None for all")
    entries = read_layout(folder, types)[:limit]
    run = None
    made: Mapping[str, Path] = {}
    if pictures is None:
        check_model(sd)
        own = None if controls is None else as_controls(controls)
        usual = check_method(method or "masactrl", inverter, own)
        run = EditRun(method or "masactrl", usual, own, steps, guidance_scale, seed, backend)
        check_sizes(entries)
    else:
        check_pictures(Path(pictures), sd, {"method": method, "inverter": inverter, "controls": controls})
        made = find_pictures(Path(pictures), entries)
    name = f"pictures in {Path(pictures).name}" if pictures is not None else run.name if run is not None else ""
    out = Path("masa-out") / f"piebench {name}".replace(" + ", "-").replace(" ", "-") if out is None else Path(out)
    check_folder(out, "out")
    kept = None if networks is not None else ScoreFile(out / SCORES, (str(dino), str(clip), libraries))
    networks = networks or load_networks(networks_of(chosen), dino=dino, clip=clip)
    missing = missing_metrics(chosen, networks)
    if missing and metrics is not None:
        raise MasaError(f"cannot be taken: {'; '.join(explain(missing))}")
    failed: dict[str, str] = {}
    if run is not None and sd is not None:
        check_same_run(out, run.describe(sd))
        for line in explain(missing):
            warnings.warn(f"will not be measured: {line}", stacklevel=2)  # before the hours of edits, not after
        made, failed = make_edits(sd, run, entries, out, progress)
    measure = Measure(
        tuple(metric.name for metric in chosen if metric.name not in missing),
        networks.to(choose_device(None) if sd is None else sd.device),
        libraries,
        kept,
    )
    rows = []
    for entry in tqdm([entry for entry in entries if entry.id in made], desc="measure", disable=not progress):
        try:
            rows.append(Row(entry.id, entry.type_id, measure(entry, made[entry.id])))
        except MasaError as error:
            failed[entry.id] = str(error)
    if not rows:
        id, why = next(iter(failed.items()))
        raise MasaError(f"all {len(failed)} edits failed; {id}: {why}")
    found = PieBench(name, tuple(rows), len(entries), missing, failed, out)
    found.save(out)
    return found


def choose_metrics(metrics: Sequence[str] | None) -> tuple[Metric, ...]:
    """The metrics by name, in the tables' order. MasaError for an unknown name, or none."""
    if metrics is None:
        return METRICS
    unknown = [name for name in metrics if name not in BY_NAME]
    if unknown or not metrics or isinstance(metrics, str):
        raise MasaError(f"metrics are {metrics!r}; expected some of {', '.join(map(repr, BY_NAME))}")
    return tuple(metric for metric in METRICS if metric.name in metrics)


def networks_of(metrics: Sequence[Metric]) -> list[str]:
    """The networks that metrics look through."""
    return sorted({metric.network for metric in metrics if metric.network is not None})


def missing_metrics(metrics: Sequence[Metric], networks: MetricNetworks) -> dict[str, str]:
    """The metrics whose network is missing, and what to do about it."""
    lacking = [metric for metric in metrics if metric.network and getattr(networks, metric.network) is None]
    unsaid = "networks hold none for it; see load_networks"
    return {metric.name: networks.missing.get(metric.network or "", unsaid) for metric in lacking}


def check_sizes(entries: Sequence[Entry]) -> None:
    """MasaError for a picture that no model can edit at its own size."""
    for entry in entries:
        try:
            check_size(*entry.size)
        except MasaError as error:
            raise MasaError(f"{entry.image} cannot be edited at its own size: {error}") from error


def check_pictures(folder: Path, sd: StableDiffusion | None, idle: Mapping[str, Any]) -> None:
    """MasaError where the folder of results made elsewhere is none, or something says how edits are made."""
    given = [name for name, value in {"sd": sd, **idle}.items() if value is not None]
    if given:
        raise MasaError(f"{' and '.join(given)} would do nothing: pictures were made already; leave one of both out")
    if not folder.is_dir():
        raise MasaError(f"no folder of pictures at {folder}; expected results named as PIE-Bench's pictures are")


def find_pictures(folder: Path, entries: Sequence[Entry]) -> dict[str, Path]:
    """The results by id. MasaError where some are not there."""
    found = {entry.id: find_picture(folder, entry) for entry in entries}
    lacking = [entry.image_path for entry in entries if found[entry.id] is None]
    if lacking:
        raise MasaError(
            f"{folder} lacks {len(lacking)} of {len(entries)} results, such as {lacking[0]}; add them, or choose fewer "
            "edits with types or limit"
        )
    return {id: path for id, path in found.items() if path is not None}


# ------------------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True)
class EditRun:
    """How all edits are made; inverter: by its usual name, "noise" for SDEdit."""

    method: str
    inverter: str
    controls: tuple[Control, ...] | None
    steps: int
    guidance_scale: float
    seed: int
    backend: Backend

    @property
    def name(self) -> str:
        """What the tables call it."""
        own = "" if self.controls is None else " with own controls"
        inverter = "" if self.inverter == "noise" else f"{self.inverter} + "
        return f"{inverter}{self.method}{own}"

    def describe(self, sd: StableDiffusion) -> dict[str, Any]:
        """What two edits must agree in to stand in one table, as JSON."""
        kept = {
            "method": self.method,
            "inverter": self.inverter,
            "controls": None if self.controls is None else describe(self.controls),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
        }
        return kept | {"fingerprint": sd.fingerprint, "dtype": str(sd.dtype).removeprefix("torch.")}

    def plan(self, entry: Entry, sd: StableDiffusion) -> Plan:
        """What is done with one edit."""
        plan = METHODS[self.method](entry, self.inverter, lambda prompt, word: _has_word(sd, prompt, word))
        return plan if self.controls is None else replace(plan, controls=self.controls)

    def job(self, sd: StableDiffusion, entry: Entry) -> dict[str, Any]:
        """One edit as a job: `edit`'s arguments as JSON values, and an id. It has its picture's size."""
        plan = self.plan(entry, sd)
        inversion, pinned = INVERTERS.get(self.inverter, ("noise", True))
        job = {
            "id": entry.id,
            "image": str(entry.image.resolve()),
            "target": entry.target,
            "source": plan.source,
            "controls": describe(plan.controls),
            "pin_source": pinned,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "method": inversion,
            "negative_prompt": plan.negative_prompt,
            "height": entry.size[0],
            "width": entry.size[1],
            "seed": self.seed,
            "backend": self.backend,
        }
        if self.method == "sdedit":
            job["skip_steps"] = self.steps - round(SDEDIT_STRENGTH * self.steps)
        return job


def _has_word(sd: StableDiffusion, prompt: str, word: str) -> bool:
    try:
        return bool(sd.tokenizer.token_positions(prompt, word))
    except MasaError:
        return False


def check_same_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Note how edits in a folder are made. MasaError where it holds some that were made otherwise."""
    path = out / SETTINGS
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MasaError(f"{path} is damaged ({error}); give another -o") from error
        apart = [name for name, value in settings.items() if before.get(name) != value]
        if apart:
            shown = ", ".join(f"{name} {before.get(name)!r:.60}, not {settings[name]!r:.60}" for name in apart)
            raise MasaError(f"{out} holds edits made with {shown}; give another -o, or the same settings")
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")


def make_edits(
    sd: StableDiffusion, run: EditRun, entries: Sequence[Entry], out: Path, progress: bool
) -> tuple[dict[str, Path], dict[str, str]]:
    """The edited pictures by id, and why others are not there. What is there whole is not made again."""
    report = batch([run.job(sd, entry) for entry in entries], out / EDITS, sd, progress=progress)
    failed = dict.fromkeys(report.elsewhere, "another run is at it; call again when that is done") | report.failed
    return {id: out / EDITS / id / "target_0.png" for id in report.done}, failed


# ------------------------------------------------------------------------------------------------- measurement


class ScoreFile:
    """scores.jsonl: a line is added as each picture is measured; of several for one picture, the last holds."""

    def __init__(self, path: Path, about: Sequence[str]) -> None:
        self.path = path
        self.about = tuple(about)
        self.known: dict[str, dict[str, float]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
                self.known[row["key"]] = {str(name): float(value) for name, value in row["scores"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):  # a line that a kill has cut off
                continue

    def key(self, entry: Entry, picture: Path) -> str:
        """What scores depend on: both pictures, the prompt, the mask, the networks."""
        parts = [file_digest(entry.image), file_digest(picture), entry.target, list(entry.runs), *self.about]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def add(self, key: str, id: str, scores: Mapping[str, float]) -> None:
        """Append the scores of one picture."""
        self.known[key] = dict(scores)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": id, "key": key, "scores": dict(scores)}) + "\n")


@dataclass(frozen=True, eq=False)
class Measure:
    """Takes metrics by name of a picture and its source."""

    names: tuple[str, ...]
    networks: MetricNetworks
    libraries: Libraries
    file: ScoreFile | None = None

    def __call__(self, entry: Entry, picture: Path) -> dict[str, float]:
        """Scores by name, in plain units; NaN where the mask leaves nothing to look at."""
        key = None if self.file is None else self.file.key(entry, picture)
        scores = {} if self.file is None or key is None else dict(self.file.known.get(key, {}))
        lacking = [name for name in self.names if name not in scores]
        if lacking:
            source = entry.read_picture()
            result = fit_result(np.array(open_picture(picture)), entry.size, picture)
            mask = entry.read_mask()
            scores |= {name: self.take(name, source, result, mask, entry.target) for name in lacking}
            if self.file is not None and key is not None:
                self.file.add(key, entry.id, scores)
        return {name: scores[name] for name in self.names}

    def take(self, name: str, source: np.ndarray, result: np.ndarray, mask: np.ndarray, prompt: str) -> float:
        """One metric of a result (h, w, 3), its source and the mask (h, w) of what may change."""
        kept = 1 - mask
        of_kept: Mapping[str, Callable[[], float]] = {
            "psnr_unedit_part": lambda: peak_signal_to_noise(result, source, kept),
            "mse_unedit_part": lambda: mean_squared_error(result, source, kept),
            "ssim_unedit_part": lambda: structural_similarity(result, source, kept, libraries=self.libraries),
            "lpips_unedit_part": lambda: perceptual_distance(result, source, kept, _there(self.networks.lpips)),
        }
        if name in of_kept:
            return of_kept[name]() if kept.any() else math.nan
        if name in ("structure_distance", "structure_distance_divided"):
            divided = name == "structure_distance_divided"
            dino = _there(self.networks.dino)
            return structure_distance(result, source, dino, divided=divided, libraries=self.libraries)
        edited = mask if name == "clip_similarity_target_image_edit_part" else None
        return prompt_similarity(result, clip_tokens(prompt), _there(self.networks.clip), edited)


def _there(network: Any) -> Any:
    assert network is not None  # metrics whose network is missing are not taken
    return network


def clip_tokens(prompt: str) -> torch.Tensor:
    """CLIP's token ids of a prompt, (1, tokens): not padded, and a longer one cut behind 77, its end token too."""
    tokenizer = Tokenizer.clip()
    ids = [tokenizer.start_id, *tokenizer.encode(prompt)[0], tokenizer.end_id]
    return torch.tensor([ids[: tokenizer.length]])
