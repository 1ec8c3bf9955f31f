"""The versions that .ci/versions installs are the ends of what setup.py admits, and its tests exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = (ROOT / ".ci" / "versions").read_text(encoding="utf-8")
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
# What the script does not run: linters and type checkers, pinned to a release.
TOOLS = {"ruff", "mypy"}


def pins(name: str) -> dict[str, str]:
    """Package -> version of one array of the script."""
    found = re.search(rf"^{name}=\(\n?(.*?)\)$", SCRIPT, re.M | re.S)
    assert found is not None
    return dict(pin.split("==") for pin in found[1].split())


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def bounds(sign: str) -> dict[str, str]:
    """Package -> bound of that sign in setup.py."""
    found = re.findall(r'^ +"([\w-]+)[<>=]', SETUP, re.M)
    lines = {name: re.search(rf'"{name}[^"]*?{sign}([\d.]+)', SETUP) for name in found}
    return {name: line[1] for name, line in lines.items() if line is not None}


def test_the_oldest_environment_has_all_lower_bounds():
    lowest = {name: numbers(version) for name, version in bounds(">=").items() if name not in TOOLS}
    oldest = {name: numbers(version) for name, version in pins("oldest").items()}
    assert {name: oldest[name][: len(bound)] for name, bound in lowest.items()} == lowest
    assert all(not any(oldest[name][len(bound) :]) for name, bound in lowest.items())
    assert set(oldest) == set(lowest)


def test_the_newest_environments_are_the_last_within_the_upper_bounds():
    upper = bounds("<")
    for name, version in (pins("newest") | pins("newest_triton")).items():
        major, minor = numbers(version)[:2]
        assert numbers(upper[name]) == (major, minor + 1)


def test_the_core_names_tests_that_exist():
    named = re.findall(r"^ +(tests/\w+\.py)(?:::(\w+))?$", SCRIPT, re.M)
    assert len(named) == len(set(named)) > 10
    for file, test in named:
        assert f"def {test or 'test_'}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
