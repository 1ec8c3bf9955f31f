"""Files are whole or not there."""

from __future__ import annotations

import os
import stat

import pytest

from masa.files import replacing


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


def test_permissions_are_the_users_own(tmp_path):
    """safetensors writes private files; a saved trajectory is as readable as any other file."""
    (tmp_path / "other.txt").touch()
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file.txt", "other.txt")}
    assert len(modes) == 1
