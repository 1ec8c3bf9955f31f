"""The rules of the code: who imports whom, what never appears, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted(p for folder in ("masa", "kernels", "weights") for p in (ROOT / folder).glob("**/*.py"))
OURS = [p for p in PRODUCT if "masa/kernels" not in str(p) and "masa/weights" not in str(p)]

# Module -> what of masa it may import, by prefix.
ALLOWED = {
    "kernels": ("masa.kernels", "masa.errors"),
    "weights": ("masa.weights", "masa.config", "masa.errors", "masa.files"),
    "masa/attention.py": ("masa.kernels", "masa.errors"),
    "masa/branches.py": ("masa.errors",),
    "masa/schedule.py": ("masa.config", "masa.errors"),
    "masa/models": ("masa.config", "masa.attention", "masa.models", "masa.errors"),
    "masa/controls": ("masa.attention", "masa.branches", "masa.controls", "masa.errors", "masa.image"),
}
# Training the demo model and drawing its world are users of the library, not part of it.
TRAINING = "weights/demo"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", OURS, ids=relative)
def test_imports_flow_one_way(path):
    name = relative(path)
    found = imports(path)
    assert not {i for i in found if i.split(".")[0] in ("diffusers", "kernels", "weights")}
    if name.startswith(TRAINING):
        return
    for prefix, allowed in ALLOWED.items():
        if name.startswith(prefix):
            own = {i for i in found if i.split(".")[0] == "masa"}
            assert all(i.startswith(allowed) for i in own), own


@pytest.mark.parametrize("path", [p for p in OURS if "masa/models" in str(p) or p.name == "attention.py"], ids=relative)
def test_forward_never_synchronises_or_prints(path):
    text = path.read_text(encoding="utf-8")
    for banned in (".item()", "print(", "register_forward", "global "):
        assert banned not in text, banned


def test_no_init_files_that_would_shadow_other_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "weights" / "__init__.py").exists()


def test_import_is_light():
    """No transformers, no diffusers, no matplotlib, and no files written."""
    code = (
        "import sys, masa; "
        "heavy = [m for m in ('transformers', 'diffusers', 'matplotlib', 'gradio', 'triton') if m in sys.modules]; "
        "print(heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    import masa

    for name in masa.__all__:
        assert getattr(masa, name).__doc__, name
