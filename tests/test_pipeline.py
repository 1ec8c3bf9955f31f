"""load(): the same weights in every layout give the same model, and wrong arguments are refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import masa
from benchmarks import random_checkpoint
from masa.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from masa.pipeline import StableDiffusion, choose_device, choose_dtype
from masa.weights.folder import folder_configs
from masa.weights.layouts import old_diffusers_vae_name

# Narrow, and with the heads and norm groups that an LDM file cannot tell.
SMALL = ModelConfig(
    unet=UNetConfig(block_out_channels=(32, 64, 64, 64), context_width=64),
    vae=VAEConfig(block_out_channels=(32, 32, 64, 64)),
    text=TextConfig(width=64, intermediate_width=128, layers=2, heads=1),
)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def parts() -> dict[str, State]:
    """Random weights under diffusers' names, none of them zero or one."""
    made = random_checkpoint.random_parts(SMALL, torch.float32)
    generator = torch.Generator().manual_seed(1)
    return {
        part: {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
        for part, state in made.items()
    }


def write_ldm(path: Path, parts: dict[str, State], dtype: torch.dtype = torch.float32) -> Path:
    state = random_checkpoint.to_ldm(parts, SMALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, path)
    return path


def write_folder(
    folder: Path, parts: dict[str, State], dtype: torch.dtype = torch.float32, variant: str = "", shards: int = 1
) -> Path:
    for name, settings in folder_configs(SMALL).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(settings))
    suffix = f".{variant}" if variant else ""
    for part, state in parts.items():
        stem = ("model" if part == "text_encoder" else "diffusion_pytorch_model") + suffix
        cast = {key: value.to(dtype) for key, value in state.items()}
        if shards == 1:
            save_file(cast, folder / part / f"{stem}.safetensors")
            continue
        weight_map = {}
        for i in range(shards):
            name = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
            mine = {key: cast[key] for key in list(cast)[i::shards]}
            save_file(mine, folder / part / name)
            weight_map.update(dict.fromkeys(mine, name))
        index = f"{stem.removesuffix(suffix)}.safetensors.index{suffix}.json"
        (folder / part / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def states(sd: StableDiffusion) -> State:
    """All weights of a model, under names that begin with the part's."""
    modules = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.text_encoder}
    return {f"{part}.{k}": v for part, module in modules.items() for k, v in module.state_dict().items()}


def load(path: Path, dtype: str = "fp32", **more: object) -> StableDiffusion:
    return masa.load(path, device="cpu", dtype=dtype, **more)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, parts: dict[str, State]) -> State:
    """What every layout of the same weights must load to."""
    sd = load(write_folder(tmp_path_factory.mktemp("wanted"), parts))
    assert sd.config == SMALL
    return states(sd)


def old_vae_names(parts: dict[str, State]) -> dict[str, State]:
    return parts | {"vae": {old_diffusers_vae_name(key): value for key, value in parts["vae"].items()}}


def bare_text_names(parts: dict[str, State]) -> dict[str, State]:
    bare = {key.removeprefix("text_model."): value for key, value in parts["text_encoder"].items()}
    return parts | {"text_encoder": bare | {"embeddings.position_ids": torch.arange(77)[None]}}


LAYOUTS: dict[str, Callable[[Path, dict[str, State]], Path]] = {
    "LDM": lambda folder, parts: write_ldm(folder / "model.safetensors", parts),
    "sharded": lambda folder, parts: write_folder(folder, parts, shards=3),
    "sharded variant": lambda folder, parts: write_folder(folder, parts, variant="fp16", shards=2),
    "old VAE names": lambda folder, parts: write_folder(folder, old_vae_names(parts)),
    "bare text names": lambda folder, parts: write_folder(folder, bare_text_names(parts)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_to_identical_weights(tmp_path, parts, wanted, layout):
    sd = load(LAYOUTS[layout](tmp_path, parts))
    assert sd.config == dataclasses.replace(SMALL, image_size=sd.config.image_size)
    found = states(sd)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["LDM", "folder"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_stored_and_wanted_dtypes_round_once_each(tmp_path, parts, wanted, stored, layout, dtype):
    write = write_ldm if layout == "LDM" else write_folder
    path = write(tmp_path / "model.safetensors", parts, stored)
    sd = load(path, dtype)
    into = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert sd.dtype == into
    found = states(sd)
    assert all(torch.equal(found[key], value.to(stored).to(into)) for key, value in wanted.items())


def test_half_precision_takes_the_variant_and_full_precision_does_not(tmp_path, parts, wanted):
    write_folder(tmp_path, parts)
    write_folder(tmp_path, {p: {k: v + 1 for k, v in s.items()} for p, s in parts.items()}, torch.float16, "fp16")
    key = "unet.conv_in.weight"
    assert torch.equal(states(load(tmp_path))[key], wanted[key])
    assert torch.equal(states(load(tmp_path, "fp16"))[key], (wanted[key] + 1).half())


def test_another_autoencoder_replaces_the_checkpoints(tmp_path, parts, wanted):
    path = write_ldm(tmp_path / "model.safetensors", parts)
    other = {key: value + 1 for key, value in parts["vae"].items()}
    save_file(other, tmp_path / "vae.safetensors")
    found = states(load(path, vae=tmp_path / "vae.safetensors"))
    assert torch.equal(found["vae.quant_conv.weight"], wanted["vae.quant_conv.weight"] + 1)
    assert torch.equal(found["unet.conv_in.weight"], wanted["unet.conv_in.weight"])


def test_the_model_is_ready_to_run(tmp_path, parts):
    sd = load(write_ldm(tmp_path / "model.safetensors", parts))
    for module in (sd.unet, sd.vae, sd.text_encoder):
        assert not module.training
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())
    context = sd.encode_prompt(["a cat", ""])
    assert context.shape == (2, 77, 64)
    assert context.isfinite().all()
    latents = sd.encode_image(torch.zeros(3, 64, 128), height=64, width=128)
    assert latents.shape == (1, 4, 8, 16)
    assert [picture.size for picture in sd.decode_latents(latents)] == [(128, 64)]


def test_nothing_is_loaded_after_a_damaged_tensor(tmp_path, parts):
    damaged = dict(parts["unet"])
    damaged["conv_in.weight"] = damaged["conv_in.weight"].clone()
    damaged["conv_in.weight"][0, 0, 0, 0] = math.nan
    path = write_ldm(tmp_path / "model.safetensors", parts | {"unet": damaged})
    with pytest.raises(masa.CheckpointError, match=r"in 1 tensors: model.diffusion_model.input_blocks.0.0.weight"):
        load(path)


def test_problems_of_all_parts_come_in_one_error(tmp_path, parts):
    unet = {k: v for k, v in parts["unet"].items() if k != "conv_in.bias"}
    vae = {k: v for k, v in parts["vae"].items() if k != "quant_conv.bias"}
    with pytest.raises(masa.CheckpointError, match=r"2 missing: conv_in\.bias, quant_conv\.bias;"):
        load(write_folder(tmp_path, parts | {"unet": unet, "vae": vae}))


def test_a_tokenizer_larger_than_the_text_encoder_is_refused(tmp_path, parts):
    text = dict(parts["text_encoder"])
    key = "text_model.embeddings.token_embedding.weight"
    text[key] = text[key][:1000].clone()
    path = write_ldm(tmp_path / "model.safetensors", parts | {"text_encoder": text})
    with pytest.raises(masa.CheckpointError, match=r"49,408 tokens and .* knows 1,000; give .* tokenizer="):
        load(path)


def test_the_folders_own_tokenizer_is_used_and_a_broken_one_named(tmp_path, parts):
    write_folder(tmp_path, parts)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(masa.CheckpointError, match=r"tokenizer lacks vocab.json and merges.txt"):
        load(tmp_path)
    vocab = {"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3, "a": 4}
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert load(tmp_path).tokenizer(["a b"])[0, :4].tolist() == [2, 0, 1, 3]
    # Another one may be given in its place.
    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.json").write_text(json.dumps({"b</w>": 0, "a</w>": 1, **dict(list(vocab.items())[2:])}))
    (other / "merges.txt").write_text("")
    assert load(tmp_path, tokenizer=other).tokenizer(["a b"])[0, :4].tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize(
    "missing", ["nothing.safetensors", "no/such/folder/", "folder/model.ckpt", Path("owner/name"), "~/no such file"]
)
def test_a_path_where_nothing_is(missing):
    with pytest.raises(FileNotFoundError, match="no checkpoint at") as error:
        masa.load(missing)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["fp8", "int8", torch.int32, torch.float64, 16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(masa.MasaError, match="expected fp32, fp16 or bf16"):
        choose_dtype(dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float32", torch.float32)]
)
def test_dtypes_go_by_name_or_value(name, dtype):
    assert choose_dtype(name, torch.device("cpu")) == choose_dtype(dtype, torch.device("cpu")) == dtype


def test_devices_that_are_none_are_refused():
    with pytest.raises(masa.MasaError, match="expected such as 'cpu' or 'cuda'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(masa.MasaError, match="sees no CUDA GPU"):
            choose_device("cuda")


def test_half_precision_is_the_default_on_a_gpu():
    assert choose_dtype(None, torch.device("cuda")) == torch.float16


def test_fingerprint_tells_models_apart(parts, tmp_path):
    sd = load(write_ldm(tmp_path / "a.safetensors", parts))
    assert sd.fingerprint == load(write_folder(tmp_path / "b", parts)).fingerprint
    assert sd.fingerprint != load(tmp_path / "a.safetensors", dtype="bf16").fingerprint
    other = parts | {"vae": {name: value * 1.01 for name, value in parts["vae"].items()}}
    changed = load(tmp_path / "a.safetensors", vae=write_folder(tmp_path / "c", other) / "vae")
    assert sd.fingerprint != changed.fingerprint
    assert changed.origin.vae == str(tmp_path / "c" / "vae")


@pytest.mark.parametrize(
    ("dtype", "native", "warns"), [("fp16", True, True), ("bf16", False, True), ("bf16", True, False)]
)
def test_emulated_dtypes_are_warned_about(monkeypatch, dtype, native, warns):
    monkeypatch.setattr(masa.pipeline, "cpu_has_bf16", lambda: native)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choose_dtype(dtype, torch.device("cpu"))
    assert any("only emulates" in str(w.message) for w in caught) == warns


def test_the_default_dtype_is_what_the_processor_multiplies(processor, tiny_folder):
    assert masa.load(tiny_folder, device="cpu").dtype == processor
    assert masa.load(tiny_folder, device="cpu", dtype="fp32").dtype == torch.float32
