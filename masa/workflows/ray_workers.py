"""A batch on several GPUs or machines: Ray's actors, one a device; needs Ray (the extra `ray`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.pipeline import StableDiffusion
from masa.workflows.batch import FAILED, Report, Row, is_done, row_of, run_here
from masa.workflows.jobs import Job, units_of

RETRIES = 2  # of what a worker was at when it died; who kills three of them is given up
PIECES = 4  # that a worker gets on average, so that none waits long for the last


class RayWorker:
    """One process with a model of its own."""

    def __init__(self, model: Callable[[], StableDiffusion], out: str, overwrite: bool) -> None:
        self.model, self.out, self.overwrite = model, Path(out), overwrite
        self.sd: StableDiffusion | None = None

    def ready(self) -> None:
        """Load the model. MasaError where that cannot be done."""
        self.run([])

    def run(self, unit: Sequence[Job]) -> list[Row]:
        """The rows of jobs that share an inversion or a source."""
        if self.sd is None:  # also where Ray has put this worker in the place of one that died
            self.sd = self.model()
        return list(run_here(unit, self.out, self.sd, self.overwrite))


def _run_unit(worker: Any, unit: Sequence[Job]) -> Any:
    """What a worker will have done of a unit."""
    return worker.run.remote(unit)


def run_by_ray(
    jobs: Sequence[Job], out: Path, model: Callable[[], StableDiffusion], overwrite: bool, workers: int | None
) -> Iterator[Row]:
    """The rows of jobs in order, run by Ray's workers as they become free; Ray replaces those that die.

    A cluster that runs already is used (Ray's own RAY_ADDRESS, or ray.init before this), else one is started on this
    machine. workers: by default one a GPU, without GPUs one. MasaError where Ray, or what it takes, is not there.
    """
    try:
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
        from ray.util import ActorPool
    except ImportError as error:
        raise MasaError("ray=True needs Ray: pip install 'masa[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        count, needs = choose_workers(ray.cluster_resources(), workers)
        remote: Any = ray.remote  # whose own types do not know a dict of needs
        actor: Any = remote(max_restarts=-1, max_task_retries=RETRIES, **needs)(RayWorker)
        actors = [actor.remote(model, str(out.absolute()), overwrite) for _ in range(count)]
        ray.get([one.ready.remote() for one in actors])
        pool = ActorPool(actors)
        # A worker's working folder may be another one.
        placed = [replace(job, near=str(Path(job.near).absolute())) for job in jobs]
        for unit in units_of(placed, math.ceil(len(jobs) / (PIECES * count))):
            pool.submit(_run_unit, unit)
        told = set()
        while pool.has_next():
            try:
                rows = pool.get_next_unordered()
            except (ActorDiedError, ActorUnavailableError):  # as often as it was tried; whose jobs is found below
                continue
            told |= {row["id"] for row in rows}
            yield from rows
        for job in jobs:
            if job.id not in told and not is_done(job, out):
                yield Report(out, []).add(row_of(job, FAILED, error="its worker died; see Ray's logs"))
    except RayTaskError as error:  # of a worker's code: no model there, a full disk
        if isinstance(error.cause, MasaError | OSError):
            raise error.cause from error
        raise
    finally:
        if started:
            ray.shutdown()


def choose_workers(resources: dict[str, float], workers: int | None) -> tuple[int, dict[str, int]]:
    """How many workers, and what each needs of a cluster. MasaError for more than the cluster has room for."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    room, kind = (gpus, "GPUs") if gpus else (cpus, "CPUs")
    count = workers if workers is not None else (gpus or 1)
    if not isinstance(count, int) or not 1 <= count <= room:
        raise MasaError(f"workers is {count}; expected a number from 1 to {room}, the {kind} of Ray's cluster")
    return count, {"num_gpus": 1 if gpus else 0, "num_cpus": 1 if cpus >= count else 0}
