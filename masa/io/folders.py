"""Folders that one run has for itself, and whose files appear together."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from masa.errors import MasaError
from masa.io.files import told_plainly

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2
SUFFIX = ".unfinished"  # of what lies beside a folder until it is whole


@contextmanager
def writing_together(
    folder: str | Path, names: Sequence[str], *, overwrite: bool = False, dropped: Sequence[str] = ()
) -> Iterator[Path]:
    """A hidden folder to write the files `names` into; at the end they stand in `folder`, all or none.

    A folder that is new or empty gets its files by one rename. One that holds others is changed for its successor in
    one system call (Linux; elsewhere by two renames, between which the older lies beside it under a hidden name): files
    of `names` are replaced, those of `dropped` are gone, all others come along. Only a folder that cannot be moved - a
    mount point, another user's, the working folder - gets its files one by one, the last of `names` at last, so that
    this last one says whether all are there.

    Killed at any moment, it leaves what was there before or all that is new (in a folder that cannot be moved: possibly
    a mixture without its last name, or over older files with the older last one), and perhaps a hidden folder
    `.NAME.XXXXXXXX.unfinished`, which may be deleted. MasaError where a name is taken and overwrite is False.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise MasaError(f"{folder} is a file; expected a folder to write into")
    check_names(folder, names, overwrite)
    with told_plainly(folder):
        folder = folder.resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        movable = _is_movable(folder)
        if not movable:
            folder.mkdir(exist_ok=True)
        above, stem = (folder.parent, _stem(folder)) if movable else (folder, "files")
        stage = above / f".{stem}.{secrets.token_hex(4)}{SUFFIX}"
        stage.mkdir()
        try:
            yield stage
            if not (movable and _put_in_place(stage, folder, names, overwrite, dropped)):
                _move_files(stage, folder, names, overwrite, dropped)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _stem(folder: Path) -> str:
    """The folder's name, cut where a hidden name made of it would be too long for a file system."""
    return os.fsencode(folder.name)[:150].decode(errors="ignore")


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left beside a folder; only for who knows that none is writing it now."""
    for path in folder.parent.glob(f".{glob.escape(_stem(folder))}.{'[0-9a-f]' * 8}{SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


def check_names(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """MasaError where one of the names is taken: by a file unless it may be replaced, by a folder always."""
    present = [name for name in names if os.path.lexists(folder / name)]
    if present and not overwrite:
        raise MasaError(f"{folder} already holds {', '.join(present)}; give another folder, or overwrite=True")
    for name in present:
        if (folder / name).is_dir():
            raise MasaError(f"{folder / name} is a folder; expected a file's name")


def _is_movable(folder: Path) -> bool:
    """Whether a folder may be changed for another one of its name."""
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    if not folder.exists():
        return True
    # Whoever works in there would stay behind in a folder that is gone; and what is another user's stays theirs.
    worked_in = Path.cwd().resolve().is_relative_to(folder)
    own = not hasattr(os, "geteuid") or folder.stat().st_uid == os.geteuid()
    return own and not worked_in and not folder.is_mount()


def _put_in_place(stage: Path, folder: Path, names: Sequence[str], overwrite: bool, dropped: Sequence[str]) -> bool:
    """Give the stage the folder's name. False where it cannot be moved after all."""
    if folder.exists():
        shutil.copymode(folder, stage)
    try:
        os.rename(stage, folder)  # over nothing, or over an empty folder
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            return False
    with _one_at_a_time(stage):
        check_names(folder, names, overwrite)  # another may have been faster
        gone = {*names, *dropped}
        try:
            for entry in os.scandir(folder):
                if entry.name not in gone:
                    _link(Path(entry.path), stage / entry.name)
            _exchange(stage, folder)
        except OSError:  # no links between these, or a folder that is in use
            for path in stage.iterdir():
                if path.name not in names:
                    _discard(path)
            return False
        for entry in os.scandir(stage):  # what was made in there while the links were
            if entry.name not in gone and not os.path.lexists(folder / entry.name):
                os.rename(entry.path, folder / entry.name)
    return True


@contextmanager
def _one_at_a_time(stage: Path) -> Iterator[None]:
    """Wait until no other process is putting files into the folder of this stage.

    By a lock beside the stage: the folder's own is `reserved`'s, which whoever saves may be holding.
    """
    path = stage.with_name(f"{stage.name.rsplit('.', 2)[0]}.lock{SUFFIX}")
    while (claim := Claim.take(path)) is None:
        time.sleep(0.01)
    try:
        yield
    finally:
        claim.release()


def _link(path: Path, other: Path) -> None:
    """Another name of a file; of a folder, one with other names of all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, other, symlinks=True, copy_function=os.link)
    elif path.is_symlink():
        other.symlink_to(os.readlink(path))
    else:
        os.link(path, other)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _exchange(one: Path, other: Path) -> None:
    """Each gets the other's name, at once where the system can do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is not None and rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return
    aside = one.with_name(f"{one.name}.older")
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def _move_files(stage: Path, folder: Path, names: Sequence[str], overwrite: bool, dropped: Sequence[str]) -> None:
    """The files one by one into a folder that stays; the last of the names, which tells that all are there, last."""
    folder.mkdir(exist_ok=True)
    with _one_at_a_time(stage):
        check_names(folder, names, overwrite)  # another may have been faster
        for name in names[:-1]:
            os.replace(stage / name, folder / name)
        for name in dropped:
            (folder / name).unlink(missing_ok=True)
        os.replace(stage / names[-1], folder / names[-1])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block of the same folder; the system frees it when a process dies."""
    handle = _open(folder)
    try:
        if handle is not None and fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def reserved(folder: Path, *, new: bool = False, option: str = "-o") -> Iterator[None]:
    """Have a folder, made if need be, for this process alone; one that was made and stayed empty vanishes again.

    The folder is made by an exclusive mkdir, and locked; the system frees the lock when the process dies, however it
    does. new: FileExistsError where it is there already. MasaError where another process has it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made = True
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if new or not folder.is_dir():
            raise
        made = False
    handle = _open(folder)
    try:
        if handle is not None and not _lock(handle, folder):
            made, missing = False, []
            raise MasaError(f"{folder} is being written to by another run; give another {option}, or wait for it")
        yield
    finally:
        # Made folders are removed while they are still locked; rmdir refuses those that hold anything.
        with suppress(OSError):
            for path in missing if made else ():
                path.rmdir()
        if handle is not None:
            os.close(handle)


def _open(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return None


def _lock(handle: int, path: Path) -> bool:
    """Whether an open file or folder is locked now for this process alone, and still has its name."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return _is_named(handle, path)


def _is_named(handle: int, path: Path) -> bool:
    """Whether an open file or folder still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


class Claim:
    """A name that one process has: a locked file, which the system frees when the process dies, however it does.

    Nothing is ever stale, so that nothing must be judged dead by its age: what a killed process leaves is a file
    without a lock, which the next one takes. On Windows, and on file systems without locks, everything can be claimed.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.handle = handle

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """The claim, or None while another process, or another claim of this one, has it. Its folder is made."""
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another process, at its end, has removed the empty folder
                continue
            if _lock(handle, path):
                return cls(path, handle)
            gone = not _is_named(handle, path)
            os.close(handle)
            if not gone:  # else the one who had it has removed it meanwhile
                return None

    def release(self) -> None:
        """Give it back; the file goes first, so that nobody is left with a lock on one that is gone."""
        self.path.unlink(missing_ok=True)
        os.close(self.handle)
