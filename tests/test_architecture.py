"""The rules of the code: who imports whom, what never appears, what importing costs."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted(p for folder in ("masa", "kernels", "weights") for p in (ROOT / folder).glob("**/*.py"))

BASE = ("masa.edits", "masa.kernels", "masa.errors")
# Module -> what of masa it may import, by prefix.
ALLOWED = {
    "kernels": ("masa.kernels", "masa.errors"),
    "weights": ("masa.weights", "masa.config", "masa.errors", "masa.io.files"),
    "masa/edits.py": ("masa.kernels", "masa.errors"),
    "masa/attention.py": ("masa.edits", "masa.kernels", "masa.errors"),
    "masa/branches.py": ("masa.errors",),
    "masa/guidance.py": ("masa.branches", "masa.errors"),
    "masa/schedule.py": ("masa.config", "masa.errors"),
    "masa/samplers": ("masa.samplers", "masa.schedule", "masa.errors"),
    "masa/models": (*BASE, "masa.attention", "masa.config", "masa.models", "masa.schedule"),
    "masa/controls": (
        *(*BASE, "masa.branches", "masa.config", "masa.controls", "masa.io.pictures"),
        # Adapters bring networks of their own.
        *("masa.models.controlnet", "masa.models.ip_adapter", "masa.models.t2i_adapter", "masa.models.taesd"),
        *("masa.runtime.adapters",),
    ),
    "masa/io": ("masa.io", "masa.errors"),
    "masa/metrics": ("masa.metrics", "masa.errors"),
    "masa/runtime": (
        *(*BASE, "masa.attention", "masa.config", "masa.io.files", "masa.models", "masa.runtime", "masa.weights"),
    ),
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


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
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


@pytest.mark.parametrize(
    "path", [p for p in PRODUCT if "masa/models" in str(p) or p.name == "attention.py"], ids=relative
)
def test_forward_never_synchronises_or_prints(path):
    text = path.read_text(encoding="utf-8")
    for banned in (".item()", "print(", "register_forward", "global "):
        assert banned not in text, banned


# Where a run goes from its arguments to its result.
ROAD = [p for p in PRODUCT if relative(p) in ("masa/sampling.py", "masa/denoising.py", "masa/checks.py")]
ROAD += [p for p in PRODUCT if relative(p).startswith(("masa/guidance.py", "masa/samplers/"))]


@pytest.mark.parametrize("path", ROAD, ids=relative)
def test_functions_on_the_main_road_are_short(path):
    """Their code is: signatures that list every argument, and what these mean, do not count."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - code[0].lineno + 1 if code else 0
            assert lines <= 60, f"{node.name} has {lines} lines"


def test_no_init_files_that_would_shadow_other_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "weights" / "__init__.py").exists()


def test_no_links():
    """A checkout without symbolic links (Windows, zip downloads) is whole, and a search finds each file once."""
    assert not [p for p in ROOT.rglob("*") if p.is_symlink() and ".git" not in p.parts and ".venv" not in p.parts]


@pytest.mark.slow
def test_imports_from_a_copied_tree_and_from_what_is_built(tmp_path):
    copied, built = tmp_path / "copied", tmp_path / "built"
    for folder in ("masa", "kernels", "weights"):
        shutil.copytree(ROOT / folder, copied / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "build", "--build-lib", built]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    code = (
        "import masa, masa.kernels.reference, masa.weights.demo.world; from masa.models.tokenizer import Tokenizer; "
        "from masa.pipeline import DEMO; print(masa.__file__, DEMO.is_dir(), Tokenizer.clip().vocab_size)"
    )
    for tree in (copied, built):
        # Isolated, so that neither this checkout nor an installed masa is found.
        run = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tree)!r}); {code}"]
        out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert out.stdout.split() == [str(tree / "masa" / "__init__.py"), "True", "49408"]


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
