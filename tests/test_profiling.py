"""--profile: a readable trace and a table, on success only, and refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from masa.cli.commands import build_parser, main
from masa.cli.profiling import choose_order, profiled
from masa.errors import MasaError


def test_trace_and_table(tmp_path, capsys):
    with profiled(tmp_path / "trace.json"):
        torch.randn(8, 8) @ torch.randn(8, 8)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    printed = capsys.readouterr().out
    assert "aten::mm" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "trace.json")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize(("times", "order"), [((0, 0), "self_cpu_time_total"), ((0, 3), "self_device_time_total")])
def test_sorted_by_what_was_measured(times, order, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that was not used has no times
    assert choose_order([SimpleNamespace(self_device_time_total=time) for time in times]) == order


def test_the_costliest_operation_stands_first(tmp_path, capsys):
    with profiled(tmp_path / "trace.json"):
        torch.randn(8, 8).relu()
        a = torch.randn(600, 600)
        for _ in range(5):
            a @ a
    lines = [line for line in capsys.readouterr().out.splitlines() if "aten::" in line]
    assert "aten::mm" in lines[0]


def test_refused_before_anything_runs(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    for name, reason in (("trace.txt", "must end in .json"), ("old.json", "already there")):
        with pytest.raises(MasaError, match=reason), profiled(tmp_path / name):
            pytest.fail("ran")
    (tmp_path / "folder.json").mkdir()
    for path, reason in (("old.json/trace.json", "is a file; expected a folder"), ("folder.json", "is a folder")):
        with pytest.raises(MasaError, match=f"--profile .*{reason}"), profiled(tmp_path / path, overwrite=True):
            pytest.fail("ran")
    with profiled(tmp_path / "old.json", overwrite=True):
        torch.ones(1)
    assert "traceEvents" in (tmp_path / "old.json").read_text()


def test_a_failed_command_leaves_no_trace(tmp_path):
    with pytest.raises(KeyError), profiled(tmp_path / "new" / "trace.json"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_none_profiles_nothing(capsys):
    with profiled(None):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_command_line_profiles(tmp_path, tiny_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["sample", "a cat", "-c", str(tiny_folder), "--steps", "1", "--height", "64", "--width", "64", "-q"]
    assert main([*argv, "--profile", "trace.json"]) == 0
    assert "aten::" in capsys.readouterr().out
    assert json.loads(Path("trace.json").read_text())["traceEvents"]
    assert main([*argv, "--profile", "trace.json"]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["demo"], ["sample", "a"], ["edit", "a.png", "b"], ["invert", "a.png"]])
def test_commands_that_profile(argv):
    assert build_parser().parse_args([*argv, "--profile", "t.json"]).profile == "t.json"
