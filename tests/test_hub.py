"""A hub id is served from the cache without a network, and its failures say what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

import masa
from masa.weights import hub

FILES = [
    "README.md",
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.fp16.json",
    "v1-5-pruned-emaonly.safetensors",
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in place of the user's, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def snapshot(cache: Path, hub_id: str) -> Path:
    """Where the cache keeps the main revision of a repository."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("text", ["owner/name", "stable-diffusion-v1-5/stable-diffusion-v1-5", "a/b_c.d-e"])
def test_hub_ids(text):
    assert hub.is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "a/b/c",
        "./name",
        "/abs",
        "owner/",
        "owner/model.safetensors",
        "owner/model.ckpt",
        "a--b/c",
        "a..b/c",
        "-a/b",
        "a/b.git",
        "a b/c",
        "a" * 60 + "/" + "b" * 60,
        "ü/b",
    ],
)
def test_what_the_hub_would_not_take_as_an_id_is_a_path(text):
    assert not hub.is_hub_id(text)
    with pytest.raises(FileNotFoundError, match="no checkpoint at") as error:
        masa.load(text)
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value)


def test_a_cached_model_loads_offline(cache, tiny_folder, tiny):
    snapshot(cache, "owner/tiny").parent.mkdir(parents=True)
    snapshot_folder = cache / "models--owner--tiny" / "snapshots" / ("0" * 40)
    snapshot_folder.symlink_to(tiny_folder, target_is_directory=True)
    sd = masa.load("owner/tiny", device="cpu", dtype="fp32")
    assert sd.checkpoint == "owner/tiny"
    assert sd.config == tiny.config


def test_an_id_that_is_not_cached_says_so_offline(cache):
    with pytest.raises(masa.CheckpointError, match=r"owner/name is not in the local cache and offline mode") as error:
        masa.load("owner/name")
    assert "unset it" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cache_without_safetensors_says_so_offline(cache):
    folder = snapshot(cache, "owner/name")
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(masa.CheckpointError, match="without the safetensors files of its unet, vae, text_encoder"):
        masa.load("owner/name")


class Unreachable(Exception):
    """An HTTP library's connection error: of no class that this project could name."""


def test_an_unreachable_hub_is_one_line(cache, monkeypatch):
    def model_info(*_: object, **__: object) -> None:
        raise Unreachable("name resolution failed\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(masa.CheckpointError, match=r"could not be fetched .*name resolution failed") as error:
        masa.load("owner/name")
    assert "\n" not in str(error.value)
    assert "give the path" in str(error.value)


def test_a_real_connection_failure_is_quick_and_one_line(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Releases of the hub's library below 1 keep a session that was made offline.
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()
    # Port 9 of this machine: refused at once, as where there is no network.
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    api = huggingface_hub.hf_api.HfApi(endpoint="http://127.0.0.1:9")
    with pytest.raises(masa.CheckpointError, match="could not be fetched") as error:
        masa.load("owner/name")
    assert "\n" not in str(error.value)


def test_only_what_is_needed_is_downloaded(cache, monkeypatch):
    asked = []

    def download(hub_id: str, allow_patterns: list[str] | None = None, local_files_only: bool = False) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        asked.append(allow_patterns)
        return str(cache)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in FILES])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    assert hub.fetch("owner/name", prefer_half=False) == cache
    assert set(asked[0]) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
    }


def test_half_precision_files_are_chosen_where_preferred():
    chosen = hub.choose_files("owner/name", FILES, prefer_half=True)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in chosen
    assert "unet/diffusion_pytorch_model.safetensors" not in chosen
    assert "vae/diffusion_pytorch_model.safetensors" in chosen


def test_a_repository_of_single_files_names_them():
    files = ["v1-5-pruned.safetensors", "v1-5-pruned.ckpt"]
    with pytest.raises(masa.CheckpointError, match=r"no safetensors for its unet; download one of v1-5-pruned\.saf"):
        hub.choose_files("owner/name", files, prefer_half=False)
