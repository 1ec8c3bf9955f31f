"""The code of docs/ runs, block after block, as a reader would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_example_is_short_and_uses_public_names_only():
    text = (ROOT / "examples" / "style_aligned.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    imported = re.findall(r"^(?:from|import) (masa[\w.]*)", text, re.M)
    assert set(imported) <= {"masa", "masa.controls"}


@pytest.mark.slow
def test_the_example_runs_as_a_script_and_as_a_plugin(tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    example = ROOT / "examples" / "style_aligned.py"
    script = subprocess.run([sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr[-2000:]
    assert (tmp_path / "masa-out" / "style_aligned" / "target_0.png").exists()
    command = [
        *(sys.executable, "-m", "masa", "sample", "a cat sitting", "a cat jumping", "--plugin", example),
        *("--control", "StyleAligned", "--set", "StyleAligned.score_shift=0.5", "--steps", "2", "-q", "-o", "out"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "target_0.png").exists()


@pytest.mark.slow
def test_the_notebook_runs_and_its_kept_outputs_are_small(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = ROOT / "examples" / "playground.ipynb"
    assert path.stat().st_size < 1_000_000
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kept = [bool(cell.outputs) for cell in cells]
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [bool(cell.outputs) for cell in cells] == kept  # what is shown on a page is what a run shows
