"""One run at a time, in a thread of its own, that tells how far it is and can be stopped in the middle of a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from PIL import Image
from torch import nn

from masa.pipeline import StableDiffusion

T = TypeVar("T")
REFRESH = 0.4  # seconds between two looks at a run


class Cancelled(Exception):
    """A run that was told to stop."""


@dataclass(frozen=True)
class Phase:
    """A part of a run: its name, how often it calls the UNet, and how many rows each call has, about."""

    name: str
    calls: int
    rows: float = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a run is: a share in [0, 1], what it does, seconds left (None: not known yet), and what it sees.

    seen: pictures of the step that was last shown, under their names.
    """

    share: float
    text: str
    seconds_left: float | None = None
    seen: tuple[tuple[str, Image.Image], ...] = ()


@dataclass(frozen=True)
class Done(Generic[T]):
    """What a run gives in the end."""

    value: T


class Ticket:
    """A run under way: told to stop from outside, and telling what it does from inside."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.seen: tuple[tuple[str, Image.Image], ...] = ()
        self.phases: tuple[Phase, ...] = ()
        self.place = -1  # of the phase under way; -1 before the first
        self.calls = 0  # of the UNet in this phase
        self.began = 0.0

    def plan(self, phases: Sequence[Phase]) -> None:
        """What the run is going to do."""
        self.phases, self.place, self.calls = tuple(phases), -1, 0
        self.began = time.monotonic()

    def begin(self) -> None:
        """The next phase."""
        self.check()
        self.place, self.calls = self.place + 1, 0

    def check(self) -> None:
        """Cancelled where the run was told to stop."""
        if self.stop.is_set():
            raise Cancelled

    def count(self) -> None:
        """A call of the UNet begins."""
        self.check()
        self.calls += 1

    def show(self, names: Sequence[str], pictures: Sequence[Image.Image]) -> None:
        self.check()
        self.seen = tuple(zip(names, pictures, strict=True))

    def progress(self) -> Progress:
        """How far it is now."""
        if not 0 <= self.place < len(self.phases):
            return Progress(0.0, "starting")
        total = sum(phase.calls * phase.rows for phase in self.phases)
        now = self.phases[self.place]
        finished = min(max(0, self.calls - 1), now.calls)  # the call under way is not done
        done = sum(phase.calls * phase.rows for phase in self.phases[: self.place]) + finished * now.rows
        share = min(0.99, done / total) if total else 0.0
        spent = time.monotonic() - self.began
        left = spent / share * (1.0 - share) if share > 0.0 else None
        if self.stop.is_set():
            return Progress(share, "stopping", None, self.seen)
        text = f"{now.name}, step {min(max(1, self.calls), now.calls)} of {now.calls}" if now.calls else now.name
        return Progress(share, text, left, self.seen)


class Worker:
    """The one thread that may use a model: what is submitted runs in turn."""

    def __init__(self, sd: StableDiffusion) -> None:
        self.sd = sd
        self.pool = ThreadPoolExecutor(1, "masa")

    def follow(self, work: Callable[[Ticket], T], ticket: Ticket) -> Iterator[Progress | Done[T]]:
        """Run `work` in its turn: its progress as it goes, then Done. What it raises is raised here.

        The run is stopped where the iterator is closed early.
        """
        changed: SimpleQueue[None] = SimpleQueue()
        future = self.pool.submit(partial(self._watched, work, ticket))
        future.add_done_callback(lambda _: changed.put(None))
        try:
            while not future.done():
                wait(changed)
                if not future.done():
                    yield ticket.progress()
            yield Done(future.result())
        finally:
            ticket.stop.set()

    def _watched(self, work: Callable[[Ticket], T], ticket: Ticket) -> T:
        ticket.check()
        with watching(self.sd, ticket):
            return work(ticket)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def wait(queue: SimpleQueue[None]) -> None:
    """Wait for the end of a run, or for the time to look at it again."""
    try:
        queue.get(timeout=REFRESH)
    except Empty:
        return


@contextmanager
def watching(sd: StableDiffusion, ticket: Ticket) -> Iterator[None]:
    """While it lasts, every call of the UNet is counted, and every layer of the networks looks whether to stop.

    A compiled UNet is asked once a call: hooks within would compile it anew.
    """

    def count(_module: nn.Module, _inputs: Any) -> None:
        ticket.count()

    def check(_module: nn.Module, _inputs: Any) -> None:
        ticket.check()

    networks = [sd.vae, sd.text_encoder, *([sd.unet] if sd.compiled is None else [])]
    handles = [part.register_forward_pre_hook(check) for network in networks for part in network.modules()]
    handles.append(sd.unet.register_forward_pre_hook(count))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
