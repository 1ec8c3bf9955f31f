"""Pictures of every method and individual, made by several processes and kept: a second call goes on."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import masa
from masa.io.files import replacing
from masa.weights.demo.world import render

from .cases import CALIBRATION_SEEDS, MODEL_SEEDS, SWEEP_SEEDS, TABLE_SEEDS, Individual
from .methods import Editor, Method, Settings, inversion_rows, round_trip, synthesise, text_to_image

FIRST_SEEDS = dict.fromkeys(("real", "between", "synthesis"), TABLE_SEEDS)
FIRST_SEEDS |= dict.fromkeys(("sweep", "drawn sweep", "between sweep"), SWEEP_SEEDS) | {"model": MODEL_SEEDS}
CODEC_ROWS = 5.0  # the autoencoder's time for one picture, in rows of the UNet


@dataclass(frozen=True)
class Store:
    """A run's folder: one compressed file of pictures per section, method and individual."""

    folder: Path

    def path(self, section: str, method: str, seed: int) -> Path:
        return self.folder / section / method / f"{seed}.npz"

    def save(self, section: str, method: str, seed: int, pictures: np.ndarray) -> None:
        """Writes uint8 (n, h, w, 3)."""
        with replacing(self.path(section, method, seed)) as temporary:
            np.savez_compressed(temporary, pictures=pictures)

    def load(self, section: str, method: str, seed: int) -> np.ndarray:
        with np.load(self.path(section, method, seed)) as file:
            return file["pictures"]

    def methods(self, section: str) -> list[str]:
        """Those with pictures, by name."""
        folder = self.folder / section
        return (
            sorted(path.name for path in folder.iterdir() if self.seeds(section, path.name)) if folder.exists() else []
        )

    def seeds(self, section: str, method: str) -> list[int]:
        """The individuals that are done."""
        return sorted(int(path.stem) for path in (self.folder / section / method).glob("[0-9]*.npz"))

    @property
    def about(self) -> dict[str, str | int | float]:
        """What made the pictures; empty before the first."""
        path = self.folder / "settings.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def claim(self, about: dict[str, str | int | float]) -> None:
        """Notes what makes this folder's pictures. SystemExit where they were made by something else."""
        for name, value in about.items():
            found = self.about.get(name, value)
            if found != value:
                raise SystemExit(
                    f"{self.folder} holds pictures made with {name} {found}, not {value}; give another --run"
                )
        with replacing(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(about, indent=2) + "\n")


@dataclass(frozen=True)
class Task:
    """One individual in one section, by all the methods that are missing."""

    section: str
    seed: int
    methods: dict[str, Method | None]

    def rows(self, settings: Settings) -> float:
        """The cost, in rows of the UNet; an inversion that several methods share counts once."""
        if self.section == "model":
            costs = {"text to image": 2.0, "reconstruction": 2.0}
            return sum(settings.steps * costs.get(name, 0.0) + CODEC_ROWS for name in self.methods)
        methods = [method for method in self.methods.values() if method is not None]
        real = self.section != "synthesis"
        targets = 3  # a cat's other poses; the estimate is no worse than that
        inversions = {m.trajectory for m in methods if m.trajectory is not None} if real else set()
        edits = sum(m.rows(settings.steps, targets, real) + CODEC_ROWS * (1 + targets) for m in methods)
        return edits + sum(inversion_rows(inversion, settings.steps) for inversion, _ in inversions)


def model_tasks(n: int, reconstructions: int) -> Iterator[tuple[int, str]]:
    """(seed, what) of the model's own figures: n prompts and round trips, fewer inversions, and the calibration."""
    for i in range(n):
        yield MODEL_SEEDS + i, "text to image"
        yield MODEL_SEEDS + i, "round trip"
        yield CALIBRATION_SEEDS + i, "same individual"
        yield CALIBRATION_SEEDS + i, "other individual"
        if i < reconstructions:
            yield MODEL_SEEDS + i, "reconstruction"


def missing(store: Store, section: str, methods: dict[str, Method], individuals: Mapping[str, int]) -> list[Task]:
    """What is still to do, individual by individual. individuals: how many by method; those with most share theirs."""
    tasks = []
    first = FIRST_SEEDS[section]
    for seed in range(first, first + max((individuals[name] for name in methods), default=0)):
        todo: dict[str, Method | None] = {
            name: method
            for name, method in methods.items()
            if seed < first + individuals[name] and not store.path(section, name, seed).exists()
        }
        if todo:
            tasks.append(Task(section, seed, todo))
    return tasks


def missing_of_model(store: Store, n: int, reconstructions: int) -> list[Task]:
    """The same of section "model"."""
    found = [
        (seed, what) for seed, what in model_tasks(n, reconstructions) if not store.path("model", what, seed).exists()
    ]
    return [Task("model", seed, {what: None}) for seed, what in found]


def calibration_pair(seed: int, subject: str, size: int) -> tuple[Individual, str, np.ndarray, np.ndarray]:
    """An individual, a target pose, its render, and that of another individual in the same pose and place."""
    who, other = Individual.draw(seed, subject), Individual.draw(seed + 1, subject)
    pose = who.target_poses[seed % len(who.target_poses)]
    return who, pose, who.picture(pose, size), render(other.appearance, pose, who.scene, size)[0]


def make(sd: masa.StableDiffusion, store: Store, settings: Settings, subject: str, task: Task) -> None:
    """The task's pictures, each saved as soon as it is there."""
    who, size = Individual.draw(task.seed, subject, task.section.startswith("between")), sd.config.image_size
    editor = Editor(sd, who, settings)
    for name, method in task.methods.items():
        if method is not None:
            pictures = synthesise(sd, who, settings, method) if task.section == "synthesis" else editor.edit(method)
        elif name == "text to image":
            pictures = text_to_image(sd, who, settings)
        elif name == "reconstruction":
            pictures = editor.reconstruct()
        elif name == "round trip":
            pictures = round_trip(sd, editor.source)
        else:
            _, _, same, other = calibration_pair(task.seed, subject, size)
            pictures = round_trip(sd, same if name == "same individual" else other)
        store.save(task.section, name, task.seed, pictures)


@dataclass(frozen=True)
class Work:
    """What every process needs."""

    checkpoint: str | None
    store: Store
    settings: Settings
    subject: str
    deadline: float  # time.time() after which no further task is begun


_WORK: Work
_MODEL: masa.StableDiffusion


def _begin(work: Work) -> None:
    global _WORK, _MODEL
    torch.set_num_threads(1)
    _WORK, _MODEL = work, masa.load(work.checkpoint, device="cpu", progress=False)


def _do(task: Task) -> float:
    if time.time() < _WORK.deadline:
        make(_MODEL, _WORK.store, _WORK.settings, _WORK.subject, task)
    return task.rows(_WORK.settings)


def run(tasks: list[Task], work: Work, workers: int) -> None:
    """Does the tasks in `workers` processes of one thread each."""
    total = sum(task.rows(work.settings) for task in tasks)
    with (
        multiprocessing.get_context("spawn").Pool(workers, _begin, (work,)) as pool,
        tqdm(total=round(total), unit="row", unit_scale=True, smoothing=0.05) as bar,
    ):
        for rows in pool.imap_unordered(_do, tasks):
            bar.update(round(rows))


def estimate(tasks: list[Task], settings: Settings, rows_per_second: float, workers: int) -> str:
    """What the tasks cost, method by method, for people."""
    costs: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        for name, method in task.methods.items():
            costs.setdefault((task.section, name), []).append(
                Task(task.section, task.seed, {name: method}).rows(settings)
            )
    lines = [
        f"{section:10} {name:42} {len(rows):4} individuals {sum(rows):9,.0f} rows "
        f"{sum(rows) / rows_per_second / 60:6.1f} min"
        for (section, name), rows in costs.items()
    ]
    minutes = sum(task.rows(settings) for task in tasks) / rows_per_second / 60
    lines.append(
        f"{minutes:.1f} core minutes at {rows_per_second:.0f} rows/s, {minutes / workers:.1f} by {workers} workers"
    )
    return "\n".join(lines)


def speed(sd: masa.StableDiffusion) -> float:
    """The UNet's rows per second on one thread, at eight rows."""
    torch.set_num_threads(1)
    side = sd.config.image_size // sd.config.vae.downsample
    x = torch.zeros(8, sd.config.unet.in_channels, side, side, dtype=sd.dtype)
    context = sd.encode_prompt(["a cat"] * 8)
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.process_time()  # on a busy machine too, what one core does
            sd.unet(x, 500, context)
            times.append(time.process_time() - start)
    return 8 / min(times)


def about(sd: masa.StableDiffusion, settings: Settings, subject: str) -> dict[str, str | int | float]:
    """What decides a run's pictures; S and L are in the methods' names."""
    chosen = asdict(settings)
    return {
        "fingerprint": sd.fingerprint,
        "checkpoint": sd.checkpoint,
        "subject": subject,
        "image_size": sd.config.image_size,
        "steps": chosen["steps"],
        "guidance_scale": chosen["guidance_scale"],
    }
