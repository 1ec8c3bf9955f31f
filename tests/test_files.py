"""Files are whole or not there."""

from __future__ import annotations

import os
import stat

import pytest

from masa.errors import MasaError
from masa.io.files import check_folder, check_free, replacing


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "all of it"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_where_nothing_can_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    check_folder(tmp_path / "new" / "folder", "-o")
    check_free(tmp_path / "new" / "file", False, "-o")
    check_free(tmp_path / "file", True, "-o")
    for path in ("file", "file/below"):
        with pytest.raises(MasaError, match=r"-o .* is a file; expected a folder"):
            check_folder(tmp_path / path, "-o")
    with pytest.raises(MasaError, match="give another --profile, or --overwrite"):
        check_free(tmp_path / "file", False, "--profile")
    with pytest.raises(MasaError, match="is a file; expected a folder"):
        check_free(tmp_path / "file" / "below", True, "--profile")
    with pytest.raises(MasaError, match="is a folder; expected a file's name"):
        check_free(tmp_path / "folder", True, "-o")
    # The superuser may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    for check in (lambda path: check_folder(path, "-o"), lambda path: check_free(path, True, "-o")):
        with pytest.raises(MasaError, match="cannot be written to; give another folder"):
            check(tmp_path / "new")
        check(tmp_path / "folder" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_permissions_are_the_users_own(tmp_path):
    """safetensors writes private files; a saved trajectory is as readable as any other file."""
    (tmp_path / "other.txt").touch()
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file.txt", "other.txt")}
    assert len(modes) == 1
