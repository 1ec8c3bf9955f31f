"""Folders: one run's alone, and their files there together or not at all, also where a process is killed."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from contextlib import suppress

import pytest

from masa.errors import MasaError
from masa.io import folders
from masa.io.files import WriteError
from masa.io.folders import Claim, reserved, writing_together

NAMES = ["one.txt", "two.txt", "last.txt"]


def stop_half_way(folder):
    with writing_together(folder, NAMES, overwrite=True) as stage:
        (stage / "one.txt").write_text("b")
        raise RuntimeError


def write_under_another(folder):
    with writing_together(folder, NAMES) as stage:
        for name in NAMES:
            (stage / name).write_text("b" * 1000)
        write(folder, "a")


def fill_the_disk(folder):
    with writing_together(folder, NAMES):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(folder, text, **more):
    with writing_together(folder, NAMES, **more) as stage:
        for name in NAMES:
            (stage / name).write_text(text * 1000)


def texts(folder):
    """What the files say, "" for one that is not whole or not there."""
    found = []
    for name in NAMES:
        path = folder / name
        text = path.read_text() if path.exists() else ""
        found.append(text[:1] if len(text) == 1000 else "")
    return "".join(found)


def in_child(work):
    """A process that does the work, forked from this one: it starts at once."""
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return child


def test_files_appear_together_in_a_new_an_empty_and_a_used_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used" / "sub").mkdir(parents=True)
    (tmp_path / "used" / "note.txt").write_text("mine")
    (tmp_path / "used" / "sub" / "deep.txt").write_text("mine too")
    (tmp_path / "used" / "link").symlink_to("nowhere")
    for name in ("deep/new", "empty", "used"):
        write(tmp_path / name, "a")
        assert texts(tmp_path / name) == "aaa"
        with pytest.raises(MasaError, match=r"already holds one\.txt, two\.txt, last\.txt; give another folder"):
            write(tmp_path / name, "b")
        (tmp_path / name / "four.txt").write_text("of the older")
        write(tmp_path / name, "b", overwrite=True, dropped=["four.txt"])
        assert texts(tmp_path / name) == "bbb"
    assert sorted(p.name for p in (tmp_path / "used").iterdir()) == [
        "last.txt",
        "link",
        "note.txt",
        "one.txt",
        "sub",
        "two.txt",
    ]
    assert (tmp_path / "used" / "sub" / "deep.txt").read_text() == "mine too"
    assert os.readlink(tmp_path / "used" / "link") == "nowhere"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "empty", "used"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["new"]


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "a")
    for folder in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(RuntimeError):
            stop_half_way(folder)
    assert texts(tmp_path / "out") == "aaa"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_working_folder_is_not_moved(tmp_path, monkeypatch):
    """Its shell would stay behind in a folder that is gone."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    write(".", "a")
    write(tmp_path, "b", overwrite=True)
    assert tmp_path.stat().st_ino == before
    assert texts(tmp_path) == "bbb"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("lacking", ["exchange", "links", "rename"])
def test_a_file_system_that_can_do_less_serves_too(tmp_path, monkeypatch, lacking):
    def refuse(*_):
        raise OSError(errno.EXDEV, "not here")

    if lacking == "exchange":
        monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: object())
    elif lacking == "links":
        monkeypatch.setattr(folders.os, "link", refuse)
    else:
        monkeypatch.setattr(folders.os, "rename", refuse)
    for text in "ab":
        write(tmp_path / "out", text, overwrite=True)
        (tmp_path / "out" / "note.txt").write_text("mine")
        assert texts(tmp_path / "out") == text * 3
    assert (tmp_path / "out" / "note.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_of_two_that_write_at_once_one_is_refused(tmp_path):
    with pytest.raises(MasaError, match="already holds"):
        write_under_another(tmp_path / "out")
    assert texts(tmp_path / "out") == "aaa"


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_change_of_a_name(tmp_path, monkeypatch, older):
    """SIGKILL before the first, second, .. system call that gives a file or folder its name."""
    died = 0
    for nth in range(40):
        folder = tmp_path / str(nth) / "out"
        if older:
            write(folder, "a")
            (folder / "note.txt").write_text("mine")

        def work(nth=nth, folder=folder):
            left = [nth]

            def counted(call):
                def wrapped(*args, **more):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **more)

                return wrapped

            for name in ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "scandir"):
                monkeypatch.setattr(os, name, counted(getattr(os, name)))
            monkeypatch.setattr(folders, "_exchange", counted(folders._exchange))
            write(folder, "b", overwrite=True)

        _, status = os.waitpid(in_child(work), 0)
        died += os.WIFSIGNALED(status)
        assert texts(folder) in (("aaa", "bbb") if older else ("", "bbb"))
        assert older == (folder / "note.txt").exists()
        left = [p for p in tmp_path.glob(f"{nth}/*") if p.name != "out"]
        assert all(p.name.startswith(".") and p.name.endswith(".unfinished") for p in left)
        if not os.WIFSIGNALED(status):
            assert not left
            break
    assert died >= 3
    assert texts(folder) == "bbb"


def test_killed_at_any_time(tmp_path):
    """SIGKILL at 60 random moments of a process that replaces a folder's files again and again."""
    chance = random.Random(0)
    write(tmp_path / "out", "a")
    inherited = 0
    for _ in range(60):

        def work():
            for text in "bcdefgh" * 1000:
                write(tmp_path / "out", text, overwrite=True)

        child = in_child(work)
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = texts(tmp_path / "out")
        assert len(found) == 3
        assert len(set(found)) == 1
        inherited += found != "aaa"
    assert inherited  # some were killed after they had written


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(WriteError, match=r"out could not be written .*; make room there, or save elsewhere"):
        fill_the_disk(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_reserved_folder_is_one_runs_alone(tmp_path):
    out = tmp_path / "deep" / "out"
    with reserved(out):
        assert out.is_dir()
        with pytest.raises(MasaError, match="out is being written to by another run; give another -o"), reserved(out):
            pass
        with pytest.raises(FileExistsError), reserved(out, new=True):
            pass
        assert out.is_dir()
    assert list(tmp_path.iterdir()) == []  # nothing was written into it
    with reserved(out):
        write(out, "a")
    with reserved(out):
        write(out, "b", overwrite=True)  # does not wait for itself
    assert texts(out) == "bbb"


def test_who_dies_frees_what_was_theirs(tmp_path):
    def work():
        Claim.take(tmp_path / "claim")
        with reserved(tmp_path / "out"):
            (tmp_path / "ready").touch()
            time.sleep(60)

    child = in_child(work)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert Claim.take(tmp_path / "claim") is None
    with pytest.raises(MasaError, match="another run"), reserved(tmp_path / "out"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    claim = Claim.take(tmp_path / "claim")
    assert claim is not None
    assert Claim.take(tmp_path / "claim") is None
    claim.release()
    assert not (tmp_path / "claim").exists()
    with reserved(tmp_path / "out"):
        pass


def test_a_claim_is_one_processs_at_a_time(tmp_path):
    """Three processes count under one claim; were two in it at once, a count would be lost."""
    (tmp_path / "count").write_text("0")

    def work():
        done = 0
        while done < 100:
            claim = Claim.take(tmp_path / "claim")
            if claim is None:
                continue
            count = int((tmp_path / "count").read_text())
            (tmp_path / "count").write_text(str(count + 1))
            claim.release()
            done += 1

    for child in [in_child(work) for _ in range(3)]:
        assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "count").read_text() == "300"
