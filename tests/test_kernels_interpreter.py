"""The Triton kernels against float64, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from kernel_cases import MAP_CASES, interpreter_cases
from part_cases import NAMES

from masa.kernels.launch import TRITON_INSTALLED

TESTS = Path(__file__).parent
# The interpreter cuts float32 to bfloat16 instead of rounding.
BF16_LIMIT = 1.2e-2


def _unusable() -> str | None:
    if not TRITON_INSTALLED:
        return "triton is not installed"

    def release(package: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version(package).split(".")[:2])

    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        return "the interpreter of triton < 3.7 breaks on dynamic loop bounds with numpy >= 2.4"
    return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_unusable() is not None, reason=str(_unusable())),
]


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-B", TESTS / "kernel_interpreter.py"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {record["name"]: record for record in found}


@pytest.mark.parametrize("name", [case.name for case in interpreter_cases()])
def test_mutual_attention_is_as_exact_as_torch(name: str, records: dict[str, dict[str, Any]]) -> None:
    record = records[name]
    assert record["error"] <= (BF16_LIMIT if record["dtype"] == "bf16" else 2 * record["torch"])


@pytest.mark.parametrize("name", [case.name for case in MAP_CASES])
def test_maps_are_as_exact_as_the_dtype(name: str, records: dict[str, dict[str, Any]]) -> None:
    record = records[name]
    assert record["error"] <= (BF16_LIMIT if record["dtype"] == "bf16" else 2 * record["torch"])
    assert record["maps_error"] <= {"fp32": 1e-6, "fp16": 1e-3, "bf16": BF16_LIMIT}[record["dtype"]]


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "regions"])
def test_merged_parts_are_as_exact_as_joined_ones(name: str, dtype: str, records: dict[str, dict[str, Any]]) -> None:
    """Several launches, whose answers merge by their log-sum-exp, against one softmax over keys that are joined."""
    record = records[f"parts, {name}, {dtype}"]
    # In float16 the folded queries and each part's answer are rounded once more.
    assert record["error"] <= (2e-6 if dtype == "torch.float32" else 3e-3)


@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "heads"])
def test_offsets_beyond_32_bits(dimension: int, records: dict[str, dict[str, Any]]) -> None:
    record = records[f"far-apart-{dimension}"]
    assert max(record["error"], record["maps_error"]) < 1e-3
