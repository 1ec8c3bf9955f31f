"""Files of examples/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def example(name: str):
    """A file of examples/ as a module."""
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
