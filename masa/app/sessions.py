"""What each browser tab keeps between runs: inverted pictures, a recorded source, results; bounded, its own."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from masa.app.work import Ticket
from masa.cache.source_cache import SourceCache
from masa.errors import MasaError
from masa.output.result import Result
from masa.trajectory import Trajectory

SESSIONS = 8  # tabs that keep something; the one unused for longest is forgotten
INVERTED = 3  # pictures of each
OUTCOMES = 3  # whose files stay to be downloaded
RECORDED = 4_000_000_000  # bytes of recorded sources, of all tabs together


@dataclass(frozen=True, eq=False)
class Inverted:
    """A trajectory, and what was said of its picture."""

    trajectory: Trajectory
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A source that was run before, and the settings that it serves."""

    key: str
    cache: SourceCache


@dataclass(frozen=True, eq=False)
class Found:
    """A word's attention map (h, w) on a picture, found without a run."""

    key: str
    picture: Image.Image
    map: Tensor


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run left: results by method, files to download, what there was to say.

    recorded: its source came from a recording, so that a rerun agrees up to rounding.
    """

    results: tuple[tuple[str, Result], ...]
    shown: tuple[tuple[Path, str], ...]  # pictures and their labels
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    seconds: float
    recorded: bool


@dataclass(eq=False)
class Session:
    """One tab's."""

    folder: Path
    ticket: Ticket | None = None  # of the run under way, or of one that waits for its turn
    at_work: bool = False
    inverted: OrderedDict[str, Inverted] = field(default_factory=OrderedDict)
    recorded: Recorded | None = None
    asked_before: str = ""  # the last run's source and settings, whatever its targets
    found: Found | None = None
    outcome: Outcome | None = None
    folders: list[Path] = field(default_factory=list)

    def keep_inverted(self, key: str, inverted: Inverted) -> None:
        self.inverted[key] = inverted
        self.inverted.move_to_end(key)
        while len(self.inverted) > INVERTED:
            self.inverted.popitem(last=False)

    def new_folder(self) -> Path:
        """A fresh folder for a run's files; those of the oldest run go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folders.append(Path(tempfile.mkdtemp(dir=self.folder)))
        while len(self.folders) > OUTCOMES:
            shutil.rmtree(self.folders.pop(0), ignore_errors=True)
        return self.folders[-1]

    def wait(self) -> None:
        """A run is going to begin, and can be cancelled from now on."""
        if self.ticket is None:
            self.ticket = Ticket()

    @contextmanager
    def working(self) -> Iterator[Ticket]:
        """The run that waits, or a new one, until it is over. MasaError beside another."""
        if self.at_work:
            raise MasaError("this page is at work already; wait for it, or cancel it")
        self.wait()
        assert self.ticket is not None
        self.at_work = True
        try:
            yield self.ticket
        finally:
            self.ticket, self.at_work = None, False

    def cancel(self) -> bool:
        """Stop the run that is under way or waits; whether there was one."""
        ticket = self.ticket
        if ticket is None:
            return False
        ticket.stop.set()
        return True


class Sessions:
    """All tabs'. root: the folder of their files."""

    def __init__(self, root: Path, most: int = SESSIONS) -> None:
        self.root = root
        self.most = most
        self.lock = threading.Lock()
        self.by_tab: OrderedDict[str, Session] = OrderedDict()

    def of(self, tab: str) -> Session:
        """A tab's session, made where it has none."""
        with self.lock:
            session = self.by_tab.pop(tab, None) or Session(Path(tempfile.mkdtemp(dir=self.root)))
            self.by_tab[tab] = session
            idle = [name for name, other in self.by_tab.items() if other.ticket is None and name != tab]
            dropped = [self.by_tab.pop(name) for name in idle[: max(0, len(self.by_tab) - self.most)]]
        for old in dropped:
            shutil.rmtree(old.folder, ignore_errors=True)
        return session

    def keep_recorded(self, session: Session, recorded: Recorded, most: int = RECORDED) -> None:
        """Keep a session's recorded source; those of the tabs unused for longest go, until all fit."""
        session.recorded = recorded
        with self.lock:
            held = [other for other in self.by_tab.values() if other.recorded is not None]
            for other in held:
                if sum(o.recorded.cache.nbytes for o in held if o.recorded is not None) <= most:
                    break
                other.recorded = None

    def close(self, tab: str) -> None:
        """Forget a tab that was closed or reloaded, and stop its run."""
        with self.lock:
            session = self.by_tab.pop(tab, None)
        if session is not None:
            session.cancel()
            shutil.rmtree(session.folder, ignore_errors=True)

    def close_all(self) -> None:
        """Stop every run, and forget all tabs."""
        for tab in list(self.by_tab):
            self.close(tab)
