"""Launches of the tile tables compile for their architectures without spilling; no GPU is needed.

By default a few of them: the plain and masked forms of every architecture, the widest head, even and ragged lengths,
maps at their maximum. The rest is marked slow and runs with MASA_SLOW_TESTS=1, or as tests/kernel_gate.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from masa.kernels.launch import TRITON_INSTALLED, WARPGROUPS_SINCE, triton_release
from masa.kernels.tiles import FORMS, TABLES

TESTS = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
# What SD's layers launch most, and what is closest to its limits.
SELECTED = {
    "sm_80": (("80", "masked", "even"), ("160", "plain", "even")),
    "sm_89": (("80", "masked", "even"), ("160", "plain", "even")),
    "sm_90": (("40", "plain", "even"), ("80", "masked", "ragged"), ("64", "maps", "ragged")),
}

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
full_sweep = pytest.mark.skipif(not os.environ.get("MASA_SLOW_TESTS"), reason="minutes: set MASA_SLOW_TESTS=1")


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """Records of `kernel_gate.py`, run in a process where kernels compile."""
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-B", TESTS / "kernel_gate.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def problems(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """By name, but for the serialised products of an old Triton, for which "auto" leaves sm_90 to SDPA."""
    known = "wgmma.mma_async instructions are serialized" if triton_release() < WARPGROUPS_SINCE else None
    found = {record["name"]: [p for p in record["problems"] if not (known and known in p)] for record in records}
    return {name: listed for name, listed in found.items() if listed}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "width", "form", "keys"), [(arch, *entry) for arch, entries in SELECTED.items() for entry in entries]
)
def test_what_is_launched_most_compiles_cleanly(arch: str, width: str, form: str, keys: str) -> None:
    records = compiled(arch, "--widths", width, "--dtypes", "fp16", "--forms", form, "--keys", keys)
    assert len(records) == 1
    assert problems(records) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "width"), [("sm_80", "160"), ("sm_90", "40")])
def test_log_sum_exps_cost_no_spill(arch: str, width: str) -> None:
    records = compiled(arch, "--widths", width, "--forms", "plain", "--keys", "even", "--lse")
    assert [record["name"].endswith("-even-lse") for record in records] == [True]
    assert problems(records) == {}


@full_sweep
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stable_diffusion_widths_compile_cleanly(arch: str, dtype: str) -> None:
    """Every form, at lengths that fill whole blocks of keys and at others."""
    records = compiled(arch, "--dtypes", dtype)
    assert {record["name"].split("-")[1] for record in records} == set(FORMS)
    assert any(record["name"].endswith("-even") for record in records)
    assert problems(records) == {}


@full_sweep
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_entry_compiles_cleanly(arch: str) -> None:
    widths = sorted({str(row.width) for row in TABLES[arch] if row.size == 2})
    records = compiled(arch, "--widths", *widths, "--dtypes", "fp16", "--keys", "ragged")
    assert len(records) == len(widths) * len(FORMS)
    assert problems(records) == {}


@full_sweep
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float32_spills_no_more_than_it_did(arch: str) -> None:
    records = compiled(arch, "--widths", "40", "80", "160", "--dtypes", "fp32", "--keys", "ragged")
    assert problems(records) == {}  # the ceiling is kernel_gate.FP32_SPILLS


@full_sweep
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_architectures_compile(arch: str) -> None:
    """Reported, not gated: print the figures, fail only where compilation does."""
    for record in compiled(arch, "--widths", "40", "80", "160", "--dtypes", "fp16", "--keys", "ragged"):
        print(record)
