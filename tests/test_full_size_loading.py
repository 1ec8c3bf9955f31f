"""A full-size SD v1.5 file loads within the promised memory, in both layouts and every dtype.

Peak memory is the process's high-water mark of resident pages (VmHWM: its own memory, and pages of mapped files)
above its resident pages after `import masa` and transformers' CLIP, which load() imports whatever the checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import random_checkpoint

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's"),
]

MEASURE = """
import json, sys, time
import torch, masa
from transformers import CLIPTextConfig, CLIPTextModel

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the high-water mark
before, start = resident("VmRSS:"), time.perf_counter()
sd = masa.load(sys.argv[1], device="cpu", dtype=sys.argv[2])
seconds, peak = time.perf_counter() - start, resident("VmHWM:")
parameters = [p for part in (sd.unet, sd.vae, sd.text_encoder) for p in part.parameters()]
size = sum(p.numel() * p.element_size() for p in parameters)
count = sum(p.numel() for p in parameters)
print(json.dumps({"size": size, "count": count, "peak": peak - before, "total": peak, "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("full")
    paths = {"ldm": folder / "ldm.safetensors", "diffusers": folder / "diffusers"}
    for layout, path in paths.items():
        random_checkpoint.write(path, layout=layout, dtype=torch.float16)
    return paths


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_peak_memory_is_at_most_a_fifth_above_the_model_and_300_mb(checkpoints, layout, dtype):
    command = [sys.executable, "-c", MEASURE, str(checkpoints[layout]), dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    found = json.loads(output.splitlines()[-1])
    print(layout, dtype, found)
    assert found["count"] == 859_520_964 + 83_653_863 + 123_060_480
    assert found["peak"] <= 1.2 * found["size"] + 300e6
