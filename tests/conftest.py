"""Fixtures: tiny models of SD v1's topology, written once per run by diffusers and transformers themselves.

And how a run is shared out (`pytest -n 2`): a module's tests stay together, for the sake of its fixtures; modules with
slow tests come first, so that no worker is left alone with one; each worker has one thread.
"""

from __future__ import annotations

import os
from pathlib import Path

# Threads that wait sleep: several processes share the cores. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from filelock import FileLock

# Tests never reach for the network; hub tests set what they need themselves.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DATA = Path(__file__).parent / "data"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "dist", None) == "load":  # what -n alone means
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers-layout folder with SD v1's topology and narrow random networks, by diffusers' own writers."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if IS_WORKER else own
    with FileLock(shared / "tiny.lock"):
        if not (shared / "tiny").is_dir():
            write_tiny(own / "unfinished").rename(shared / "tiny")
    return shared / "tiny"


def write_tiny(folder: Path) -> Path:
    """Write the folder of `tiny_folder`."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            eos_token_id=2,
        )
    )
    # Fresh CLIP weights are near zero: prompts would hardly differ. Fresh attention is nearly uniform: which keys
    # a query sees would hardly matter, and a test of controls could not fail.
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(2.0)
            elif name.endswith(("to_v.weight", "to_out.0.weight")):
                parameter.mul_(4.0)
        for parameter in text.embeddings.parameters() if hasattr(text, "embeddings") else ():
            parameter.mul_(30.0)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path):
    """The tiny model, loaded by masa in float32."""
    import masa

    return masa.load(tiny_folder, device="cpu", dtype="fp32")


@pytest.fixture(params=["float32", "bfloat16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """As if on a CPU that does not multiply bfloat16, and on one that does: the dtype that `load` then defaults to."""
    monkeypatch.setattr("masa.pipeline.cpu_has_bf16", lambda: request.param == "bfloat16")
    return getattr(torch, request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
