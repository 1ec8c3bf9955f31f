"""batch(): thousands of edits from a job file, resumable, by one process or many."""

from __future__ import annotations

import errno
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from masa.cache.source_cache import SourceCache
from masa.checks import as_prompts, check_controls, settle
from masa.controls.base import Control, FileControl
from masa.controls.masactrl import MasaCtrl
from masa.errors import MasaError
from masa.inversion import invert
from masa.io.files import WriteError, check_folder, replacing, told_plainly
from masa.io.folders import Claim, check_names, locked, remove_unfinished
from masa.io.pictures import fitted_size
from masa.output.result import Result, file_names, read_saved
from masa.pipeline import StableDiffusion, load
from masa.samplers import choose_sampler
from masa.sampling import check_edit, edit, sample
from masa.settings import RunSettings, describe
from masa.trajectory import Trajectory
from masa.workflows.jobs import OF_TARGETS, Job, in_order, keys_of, read_jobs, shard_of, units_of
from masa.workflows.recording import record

REPORT = "report.jsonl"
CLAIMS = ".claims"
DONE, FAILED = "done", "failed"
DEFAULT_CONTROLS = (MasaCtrl(),)  # of edit and sample
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

RECORD_KEYS = set(inspect.signature(record).parameters)

# The model, or what loads it.
Model = StableDiffusion | Callable[[], StableDiffusion]
Row = dict[str, Any]


@dataclass(frozen=True)
class BatchReport:
    """What became of a batch's jobs.

    path: of report.jsonl. rows: by id, of the jobs that are done or failed, as the file has them: id, state ("done" or
    "failed"), seconds, error. elsewhere: ids that other processes were busy with at the end.
    """

    path: Path
    rows: Mapping[str, Mapping[str, Any]]
    elsewhere: tuple[str, ...] = ()

    @property
    def done(self) -> list[str]:
        return [name for name, row in self.rows.items() if row["state"] == DONE]

    @property
    def failed(self) -> dict[str, str]:
        """The errors by id."""
        return {name: row["error"] for name, row in self.rows.items() if row["state"] == FAILED}


def batch(
    jobs: str | Path | Sequence[Mapping[str, Any]],
    out: str | Path,
    sd: Model | None = None,
    *,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    ray: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> BatchReport:
    """Run the jobs of a file, each into a folder of its own under `out`; a second call does what is left.

    jobs: a file with one JSON object a line, or a list of such: `id`, the name of the job's folder, and arguments of
    `masa.edit` (with `image`) or `masa.sample` (without). Paths are relative to the job file. Controls, samplers and
    the like stand there as results record them; a result's whole settings may be pasted, beside an `id`. sd: the
    model, or a function that loads it, called once there is work; default the demo model.

    A job is done when its folder is whole, which it is from one moment to the next (`Result.save`): a killed batch
    loses no more than the job in hand. What fails is written into report.jsonl (a line a job: id, state, seconds,
    error, and a digest of the job), and the others go on; failed jobs are tried again by the next call. A full disk
    ends the batch. overwrite: run a job again whose settings have changed since it was done (else a MasaError).

    Jobs with the same picture, source prompt and inversion settings come one after the other and share the inversion;
    where the sampling settings agree too, all but target and controls, they share the source's run (`masa.record`).
    One inversion and one source are held at a time. In float32 on a CPU the results are those of `edit` and `sample`
    bit for bit for pictures of 128 pixels a side and more (see `record`); else up to rounding.

    shard: (I, N) runs the I-th of N parts, I from 1. Several processes may also share a folder without shards: each
    job is claimed by a lock that vanishes with its process. ray: by Ray (the extra `ray`), one worker a GPU of the
    cluster, or `workers` of them on CPUs; each calls sd, a picklable function, for a model of its own, and all see
    `out` and the job's files under the same paths. A worker that dies is replaced, and what it was at is done again.

    Raises MasaError, before any long work and naming the line, for a job that is none. Jobs that the model or a
    missing file refuses fail, those that are found so at once before the first that is run.
    """
    read = read_jobs(jobs)
    out = Path(out)
    check_folder(out, "out")
    mine = shard_of(in_order(read), shard)
    if not ray and workers is not None:
        raise MasaError(f"workers is {workers}, which is Ray's; set ray=True")
    if ray and isinstance(sd, StableDiffusion):
        raise MasaError("with ray=True sd is a function that each worker loads its model with, such as masa.load")
    with told_plainly(out):
        out.mkdir(parents=True, exist_ok=True)
    report = Report(out, [job.id for job in read])
    rows = report.tidy()
    left = find_left(mine, out, rows, overwrite)
    waiting = {job.id for job in left}
    for job in mine:
        if job.id not in waiting and rows.get(job.id, {}).get("state") != DONE:  # killed between result and report
            report.add(row_of(job, DONE))
    coming: Iterator[Row] = iter(())
    if left and ray:
        from masa.workflows.ray_workers import run_by_ray

        coming = run_by_ray(left, out, load if sd is None else sd, overwrite, workers)  # type: ignore[arg-type]
    elif left:
        coming = run_here(left, out, sd if isinstance(sd, StableDiffusion) else (sd or load)(), overwrite)
    try:
        elsewhere = _follow(coming, len(mine), len(left), progress)
    finally:
        with suppress(OSError):
            report.tidy()
            (out / CLAIMS).rmdir()
    rows, ids = report.read(), {job.id for job in mine}
    return BatchReport(report.path, {name: row for name, row in rows.items() if name in ids}, tuple(elsewhere))


def _follow(rows: Iterator[Row], jobs: int, left: int, progress: bool) -> list[str]:
    """Show what comes, and the time left; gives the ids that are another process's."""
    failed, elsewhere = 0, []
    with tqdm(total=jobs, initial=jobs - left, desc="batch", unit="job", smoothing=0.1, disable=not progress) as bar:
        for row in rows:
            failed += row["state"] == FAILED
            if row["state"] in (DONE, FAILED):
                bar.update()
            else:
                elsewhere.append(row["id"])
            if failed:
                bar.set_postfix(failed=failed)
    return elsewhere


def find_left(jobs: Sequence[Job], out: Path, rows: Mapping[str, Row], overwrite: bool) -> list[Job]:
    """The jobs that are not done. MasaError for one that was done with other settings, unless it is to be redone."""
    left = []
    for job in jobs:
        if (out / job.id).is_symlink():
            raise MasaError(f"{job.where}: {out / job.id} is a link; results stay inside the output folder")
        if not is_done(job, out):
            left.append(job)
        elif rows.get(job.id, {}).get("job", job.digest) != job.digest:
            if not overwrite:
                raise MasaError(
                    f"{job.where}: {job.id!r} was done with other settings; give it another id, remove "
                    f"{out / job.id}, or overwrite it (--overwrite, overwrite=True)"
                )
            left.append(job)
    return left


def is_done(job: Job, out: Path) -> bool:
    return read_saved(out / job.id) is not None


def run_here(jobs: Sequence[Job], out: Path, sd: StableDiffusion, overwrite: bool) -> Iterator[Row]:
    """Run jobs in order, in this process; gives each one's row. Rows without a state are another process's jobs."""
    report = Report(out, [])
    sound = []
    for job in jobs:  # what can be refused is refused before the first long work
        try:
            check_with_model(sd, job)
            sound.append(job)
        except Exception as error:
            yield report.add(row_of(job, FAILED, error=error))
    busy: list[Job] = []
    for unit in units_of(sound):
        worker = Worker(sd, out, overwrite, unit)
        for job in unit:
            row = worker.run(job)
            if row is None:
                busy.append(job)
            else:
                yield row
    for job in busy:  # another process may have finished it by now, or died
        row = Worker(sd, out, overwrite, [job]).run(job)
        yield {"id": job.id, "state": ""} if row is None else row


class Worker:
    """Runs the jobs of a unit, which share an inversion or a source, and holds what they share."""

    def __init__(self, sd: StableDiffusion, out: Path, overwrite: bool, unit: Sequence[Job]) -> None:
        self.sd, self.out, self.overwrite = sd, out, overwrite
        self.report = Report(out, [])
        self.unit = unit
        self.sources = Counter(job.source for job in unit)
        self.trajectory: Trajectory | None = None
        self.cache: tuple[str, SourceCache | None] | None = None  # of which source

    def run(self, job: Job) -> Row | None:
        """Run a job, unless it is done by now; gives its row. None where another process is at it.

        WriteError where the disk is full.
        """
        claim = Claim.take(self.out / CLAIMS / job.id)
        if claim is None:
            return None
        try:
            if is_done(job, self.out):
                known = self.report.read().get(job.id, {})
                if known.get("job", job.digest) == job.digest:
                    return row_of(job, DONE)
            return self._run_claimed(job)
        finally:
            claim.release()

    def _run_claimed(self, job: Job) -> Row:
        started = time.monotonic()
        try:
            names = file_names(len(as_prompts(job.given.get("target", ()))))
            check_names(self.out / job.id, names, self.overwrite)  # before the work
            remove_unfinished(self.out / job.id)  # the claim is ours: whoever wrote there is dead
            self.make(job).save(self.out / job.id, overwrite=self.overwrite)
        except WriteError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if isinstance(error, torch.OutOfMemoryError):
                self.trajectory = self.cache = None
            return self.report.add(row_of(job, FAILED, time.monotonic() - started, error))
        return self.report.add(row_of(job, DONE, time.monotonic() - started))

    def make(self, job: Job) -> Result:
        """What `edit` or `sample` give for the job, through what it shares with others."""
        given = job.arguments()
        if job.inverts and job.inversion is not None and len(self.unit) > 1:
            if self.trajectory is None:
                self.trajectory = _invert(self.sd, given)
            given = {name: value for name, value in given.items() if name in keys_of(False)}
            for name in ("steps", "height", "width", "schedule"):  # the trajectory brings them
                given.pop(name, None)
            given["trajectory"] = self.trajectory
        elif "image" in given:
            return edit(self.sd, progress=False, **given)
        elif "trajectory" in given:
            given["trajectory"] = Trajectory.load(job.trajectory)  # type: ignore[arg-type]
        cache = self._cached(job, given)
        if cache is not None:
            with suppress(MasaError):  # of a control that needs the source itself; without the cache it says what else
                return sample(self.sd, cache=cache, progress=False, **given)
        return sample(self.sd, progress=False, **given)

    def _cached(self, job: Job, given: Mapping[str, Any]) -> SourceCache | None:
        """The source that the job shares with others, recorded at the first of them; None where it shares none."""
        key = job.source
        if key is None or self.sources[key] < 2:
            return None
        if self.cache is None or self.cache[0] != key:
            self.cache = None  # freed before the next is made
            self.cache = (key, self._record(key, given))
        return self.cache[1]

    def _record(self, key: str, given: Mapping[str, Any]) -> SourceCache | None:
        """The source with all that the controls of its jobs read; None where it cannot be recorded."""
        controls: dict[str, Control] = {}
        for job in self.unit:
            if job.source == key:
                with suppress(MasaError):  # which is said when its turn comes
                    for control in job.arguments().get("controls", DEFAULT_CONTROLS):
                        controls[json.dumps(describe(control))] = control
        shared = {name: value for name, value in given.items() if name not in OF_TARGETS}
        if not controls or not set(shared) <= RECORD_KEYS:
            return None
        try:
            return record(self.sd, controls=list(controls.values()), progress=False, **shared)
        except (MasaError, torch.OutOfMemoryError):
            return None


def _invert(sd: StableDiffusion, given: Mapping[str, Any]) -> Trajectory:
    """The inversion that `edit` makes with these arguments."""
    names = ("steps", "method", "inner_steps", "height", "width", "seed", "schedule", "tiled", "backend")
    chosen = {name: given[name] for name in names if name in given}
    return invert(
        sd,
        given["image"],
        given.get("source", ""),
        guidance_scale=given.get("invert_guidance_scale", 1.0),
        edit_guidance_scale=given.get("guidance_scale", 7.5),
        progress=False,
        **chosen,
    )


def check_with_model(sd: StableDiffusion, job: Job) -> None:
    """MasaError for what the job's files or the model refuse, as far as that is cheap to say.

    Of pictures only the head is read, and adapters are not loaded: what is wrong with those shows when they are used.
    """
    theirs, dtype = job.fingerprint or (None, None)
    if dtype == str(sd.dtype).removeprefix("torch.") and theirs != sd.fingerprint:
        raise MasaError(f"its settings are of another model than {sd.checkpoint}; remove their 'fingerprint'")
    given = job.arguments()
    if job.trajectory is not None or any(isinstance(control, FileControl) for control in given.get("controls", ())):
        return
    kept = {f.name for f in fields(RunSettings)}
    plain: dict[str, Any] = {name: value for name, value in given.items() if name in kept}
    plain["target"] = as_prompts(plain.get("target", ()))
    plain["controls"] = tuple(plain.get("controls", DEFAULT_CONTROLS if plain["target"] else ()))
    if "sampler" in plain:
        plain["sampler"] = choose_sampler(plain["sampler"])
    if "image" not in given:
        settings, levels = settle(sd, RunSettings(**plain), None)
        assert settings.height is not None
        assert settings.width is not None
        size = (settings.height, settings.width)
        check_controls(sd, settings.controls, levels, (settings.source, *settings.target), size=size, method=None)
        return
    if not job.inverts:
        return
    height, width = fitted_size(
        given["image"], short_side=sd.config.image_size, height=given.get("height"), width=given.get("width")
    )
    usual: dict[str, Any] = {"pin_source": True, "sampler": choose_sampler("ddim")}  # of `edit`
    asked = RunSettings(**(usual | plain))
    blank = Image.new("RGB", (width, height))
    method, steps = given.get("method", "ddim"), given.get("steps", 50)
    check_edit(sd, blank, asked, method, steps, given.get("schedule") or sd.schedule, (height, width))


# ------------------------------------------------------------------------------------------------- report


def row_of(job: Job, state: str, seconds: float | None = None, error: BaseException | str | None = None) -> Row:
    """A line of the report."""
    told = error
    if isinstance(error, BaseException):
        told = " ".join(str(error).split())
        if not isinstance(error, MasaError):
            told = f"{type(error).__name__}: {told}"
    taken = None if seconds is None else round(seconds, 3)
    return {"id": job.id, "state": state, "seconds": taken, "error": told, "job": job.digest}


class Report:
    """report.jsonl: a line is added as each job ends; of several for one job, the last holds."""

    def __init__(self, out: Path, order: Sequence[str]) -> None:
        self.out = out
        self.path = out / REPORT
        self.order = order

    def read(self) -> dict[str, Row]:
        """The rows by id. Lines that a kill has cut off are left out."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        rows: dict[str, Row] = {}
        for line in lines:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("id"), str) and row.get("state") in (DONE, FAILED):
                    rows.pop(row["id"], None)
                    rows[row["id"]] = row
        return rows

    def add(self, row: Row) -> Row:
        """Append a line, on one of its own whatever a killed process has left."""
        with told_plainly(self.path), locked(self.out), self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((json.dumps(row) + "\n").encode())
        return row

    def tidy(self) -> dict[str, Row]:
        """Write the file anew with one line a job, in the job file's order; gives its rows."""
        with locked(self.out):
            rows = self.read()
            known = {name: rows[name] for name in self.order if name in rows}
            rows = known | rows
            if rows:
                with replacing(self.path) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
        return rows
