"""Once at Stable Diffusion v1.5's full shapes: every network against diffusers and transformers, and loading's memory.

Peak memory is the process's high-water mark of resident pages (VmHWM: its own memory, and pages of mapped files)
above its resident pages after `import masa` and transformers' CLIP, which load() imports whatever the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import masa
from benchmarks.random_checkpoint import random_parts, to_ldm
from masa.config import SD_V1
from masa.weights.folder import write_folder

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.abs().max())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The same random weights in both layouts, float16; 4 GB, which are removed at the end."""
    folder = tmp_path_factory.mktemp("full")
    parts = random_parts(SD_V1, torch.float16)
    save_file({name: value.contiguous() for name, value in to_ldm(parts, SD_V1).items()}, folder / "ldm.safetensors")
    write_folder(folder / "diffusers", SD_V1, parts, max_shard_size="5GB")
    del parts
    yield {"ldm": folder / "ldm.safetensors", "diffusers": folder / "diffusers"}
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def folder(checkpoints) -> Path:
    return checkpoints["diffusers"]


@pytest.fixture(scope="module")
def sd(folder):
    return masa.load(folder, device="cpu", dtype="fp32")


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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_peak_memory_is_at_most_a_fifth_above_the_model_and_300_mb(checkpoints, layout, dtype):
    command = [sys.executable, "-c", MEASURE, str(checkpoints[layout]), dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    found = json.loads(output.splitlines()[-1])
    print(layout, dtype, found)
    assert found["count"] == 859_520_964 + 83_653_863 + 123_060_480
    assert found["peak"] <= 1.2 * found["size"] + 300e6


@torch.no_grad()
def test_unet_equals_diffusers(sd, folder, generator):
    from diffusers import UNet2DConditionModel

    x = torch.randn(1, 4, 64, 64, generator=generator)
    context = torch.randn(1, 77, 768, generator=generator)
    eps, _ = sd.unet(x, 401, context)
    oracle = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    assert eps.abs().max() > 0.1
    assert relative_error(eps, oracle(x, 401, context).sample) < 1e-4


@torch.no_grad()
def test_vae_equals_diffusers(sd, folder, generator):
    from diffusers import AutoencoderKL

    oracle = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    picture = torch.rand(1, 3, 128, 192, generator=generator) * 2 - 1
    latents = sd.vae.encode(picture)
    assert relative_error(latents, oracle.encode(picture).latent_dist.mean * 0.18215) < 1e-4
    assert relative_error(sd.vae.decode(latents), oracle.decode(latents / 0.18215).sample) < 1e-4


@torch.no_grad()
def test_text_encoder_equals_transformers(sd, folder):
    from transformers import CLIPTextModel

    oracle = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).eval()
    prompts = ["", "a photo of a cat", "a very long prompt " * 20]
    with pytest.warns(UserWarning, match="left out"):
        context = sd.encode_prompt(prompts)
    with pytest.warns(UserWarning, match="left out"):
        ids = sd.tokenizer(prompts)
    assert context.shape == (3, 77, 768)
    assert relative_error(context, oracle(ids).last_hidden_state) < 1e-4
