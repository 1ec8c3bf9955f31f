"""Offloaded on a CPU: networks are read for their work, and nothing of the user's is lost for it."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import masa


def absent(network: torch.nn.Module) -> bool:
    """Whether no weight, and no buffer, takes memory."""
    return all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.slow
def test_on_a_cpu_networks_are_read_for_their_work(tiny_folder, generator, monkeypatch):
    kept = masa.load(tiny_folder, device="cpu", dtype="fp32")
    sd = masa.load(tiny_folder, device="cpu", dtype="fp32", offload=True)
    assert absent(sd.vae)
    assert absent(sd.text_encoder)
    assert sd.fingerprint == kept.fingerprint
    seen = []

    def noted(network, name):
        method = getattr(network, name)

        def run(*given, **more):
            seen.append([part for part in ("unet", "vae", "text_encoder") if not absent(getattr(sd, part))])
            return method(*given, **more)

        monkeypatch.setattr(network, name, run)

    for network, name in (
        (sd.unet, "forward"), (sd.text_encoder, "forward"), (sd.vae, "encode"), (sd.vae, "decode"),
    ):  # fmt: skip
        noted(network, name)
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    run = {"steps": 2, "height": 64, "width": 64, "controls": [], "progress": False}
    out, expected = (masa.edit(model, picture, "a cat", **run) for model in (sd, kept))
    assert seen.count(["unet"]) == 4
    assert seen.count(["vae"]) == 3
    assert all(part in (["unet"], ["vae"], ["unet", "text_encoder"]) for part in seen)
    assert torch.equal(out.latents, expected.latents)
    assert out.targets[0].tobytes() == expected.targets[0].tobytes()
    assert absent(sd.vae)
    assert absent(sd.text_encoder)


def test_a_failure_frees_the_network_again(tiny_folder):
    sd = masa.load(tiny_folder, device="cpu", dtype="fp32", offload=True)
    with pytest.raises(RuntimeError):
        sd.decode_latents(torch.zeros(1, 3, 8, 8))
    assert absent(sd.vae)
    assert not absent(sd.unet)


@pytest.fixture
def offloaded(tiny_folder, tmp_path):
    """A model on a CPU, offloaded, and the folder that it reads."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    return masa.load(folder, device="cpu", dtype="fp32", offload=True), folder


LATENTS = torch.zeros(1, 4, 8, 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.conv_out.bias.add_(1.0),
        lambda unet: unet.conv_in.weight.data[-1, -1, -1].mul_(1.001),  # beyond the first values; not counted by torch
        lambda unet: setattr(unet.conv_out, "bias", torch.nn.Parameter(unet.conv_out.bias + 1.0, requires_grad=False)),
        lambda unet: unet.register_buffer("mine", torch.zeros(3, dtype=torch.int64), persistent=False),
        lambda unet: unet.conv_in.weight.data.copy_(unet.conv_in.weight.data.flip(0)),
        lambda unet: unet.requires_grad_(True),
    ],
    ids=["in place", "unseen", "replaced", "added", "turned round", "for a gradient"],
)
def test_a_changed_unet_is_not_thrown_away(offloaded, change):
    sd, _ = offloaded
    sd.decode_latents(LATENTS)
    sd.decode_latents(LATENTS)
    with torch.no_grad():
        change(sd.unet)
    with pytest.raises(masa.MasaError, match="changed, or want gradients, and offload=True on a CPU reads them"):
        sd.decode_latents(LATENTS)
    with pytest.raises(masa.MasaError, match="load the model without it"):  # before the steps, not at their end
        sd.encode_prompt(["a cat"])
    assert not absent(sd.unet)


@pytest.mark.parametrize(
    "change",
    [
        lambda vae, other: setattr(vae, "decoder", other.decoder),
        lambda vae, other: vae.load_state_dict(other.state_dict(), assign=True),
        lambda vae, other: vae.register_buffer("mine", torch.zeros(3)),
    ],
    ids=["replaced", "loaded", "added"],
)
def test_an_absent_network_given_weights_keeps_them(offloaded, tiny, change):
    sd, _ = offloaded
    other = copy.deepcopy(tiny.vae)
    change(sd.vae, other)
    with pytest.raises(masa.MasaError, match="the VAE was given other weights, and offload=True on a CPU reads them"):
        sd.decode_latents(LATENTS)
    assert not absent(other)
    assert not absent(sd.unet)


def test_memory_that_lacks_for_the_unet_loses_no_picture(offloaded, monkeypatch):
    sd, _ = offloaded
    module, fill = sys.modules["masa.runtime.offload"], sys.modules["masa.runtime.offload"].fill

    def filled(opened, networks, *more):
        if networks == [sd.unet]:
            raise RuntimeError("can't allocate memory")
        fill(opened, networks, *more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "fill", filled)
        with pytest.warns(UserWarning, match="the UNet could not be read again: can't allocate memory"):
            assert len(sd.decode_latents(LATENTS)) == 1
    assert absent(sd.unet)
    sd.encode_prompt(["a cat"])
    assert not absent(sd.unet)


def test_networks_of_the_user_s_stay_his(offloaded, tiny):
    sd, _ = offloaded
    vae = copy.deepcopy(tiny.vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.5)
    mixed, kept = replace(sd, vae=vae), replace(tiny, vae=vae)
    assert mixed.decode_latents(LATENTS)[0].tobytes() == kept.decode_latents(LATENTS)[0].tobytes()
    assert mixed.decode_latents(LATENTS)[0].tobytes() != sd.decode_latents(LATENTS)[0].tobytes()
    assert not absent(vae)
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(0.5)
    assert mixed.fingerprint == kept.fingerprint != sd.fingerprint


def test_offloaded_in_inference_mode(offloaded, tiny):
    sd, folder = offloaded
    expected = tiny.decode_latents(LATENTS)[0].tobytes()
    with torch.inference_mode():
        assert sd.decode_latents(LATENTS)[0].tobytes() == expected
        fresh = masa.load(folder, device="cpu", dtype="fp32", offload=True)
    for model in (sd, fresh):
        assert model.decode_latents(LATENTS)[0].tobytes() == expected
        assert not any(weight.is_inference() for weight in model.unet.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sd: pickle.loads(pickle.dumps(sd))], ids=["copy", "pickle"])
def test_an_offloaded_model_can_be_copied(offloaded, copied):
    sd, _ = offloaded
    other = copied(sd)
    assert other.decode_latents(LATENTS)[0].tobytes() == sd.decode_latents(LATENTS)[0].tobytes()
    assert not absent(other.unet)
    assert other.unet is not sd.unet


def test_the_folder_may_be_left(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    sd = masa.load("model", device="cpu", vae="model/vae", offload=True)
    monkeypatch.chdir("/")
    assert len(sd.decode_latents(LATENTS)) == 1
    assert sd.origin.checkpoint == "model"


def damage(path: Path, how: str) -> None:
    tensors = load_file(path)
    first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    path.unlink()
    if how == "cut":
        path.write_bytes(b"\x00" * 20)
    elif how == "other values":
        save_file(tensors | {first: tensors[first] * 0.5}, path)
    elif how == "lacking":
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    elif how == "misshapen":
        save_file(tensors | {first: torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("part", "how"),
    [
        ("vae", "gone"),
        ("vae", "other values"),
        ("vae", "misshapen"),
        ("text_encoder", "cut"),
        ("text_encoder", "lacking"),
    ],
)
def test_files_that_are_not_as_they_were_are_refused(offloaded, part, how):
    sd, folder = offloaded
    (path,) = (folder / part).glob("*.safetensors")
    whole = path.read_bytes()
    damage(path, how)

    def use():
        return sd.decode_latents(LATENTS) if part == "vae" else sd.encode_prompt(["a cat"])

    with pytest.raises(masa.CheckpointError, match=r"(?s)is not what was loaded with offload=True.*put the files back"):
        use()
    assert absent(getattr(sd, part))
    assert not absent(sd.unet)
    path.write_bytes(whole)
    assert len(use()) == 1


@pytest.mark.parametrize("how", ["gone", "other values"])
def test_a_picture_is_not_lost_for_the_unet(offloaded, monkeypatch, how):
    """Its files vanish while the VAE works: the picture is given, and the model serves again once they are back."""
    sd, folder = offloaded
    expected = sd.decode_latents(LATENTS)[0].tobytes()
    (path,) = (folder / "unet").glob("*.safetensors")
    whole, decode = path.read_bytes(), sd.vae.decode

    def work(latents):
        damage(path, how)
        return decode(latents)

    with monkeypatch.context() as patch:
        patch.setattr(sd.vae, "decode", work)
        with pytest.warns(UserWarning, match="is not what was loaded"):
            pictures = sd.decode_latents(LATENTS)
    assert pictures[0].tobytes() == expected
    for use in (lambda: sd.encode_prompt(["a cat"]), lambda: masa.sample(sd, "a cat", steps=1, progress=False)):
        with pytest.raises(masa.CheckpointError, match="put the files back, or load the model anew"):
            use()
    path.write_bytes(whole)
    assert sd.decode_latents(LATENTS)[0].tobytes() == expected
    assert not absent(sd.unet)


def test_vae_and_unet_are_read_once_for_the_pictures(offloaded, monkeypatch):
    sd, _ = offloaded
    module, read = sys.modules["masa.runtime.offload"], []
    fill = module.fill
    monkeypatch.setattr(
        module, "fill", lambda opened, networks, *more: read.extend(networks) or fill(opened, networks, *more)
    )
    masa.sample(sd, "a cat", "a dog", controls=[], steps=1, height=64, width=64, progress=False)
    assert [sum(network is one for one in read) for network in (sd.vae, sd.unet)] == [1, 1]


def test_offloaded_on_a_cpu_is_not_compiled(tiny_folder):
    sd = masa.load(tiny_folder, device="cpu", dtype="fp32", offload=True)
    with pytest.raises(masa.MasaError, match="a compiled UNet keeps them; leave one of the two out"):
        sd.compile(compiler="eager")


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_an_offloaded_network_is_checked_when_it_is_loaded(tiny_folder, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file(tensors | {first: torch.full_like(tensors[first], float("nan"))}, path)
    with pytest.raises(masa.CheckpointError, match="NaN or infinite values in 1 tensors"):
        masa.load(folder, device="cpu", offload=True)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    with pytest.raises(masa.CheckpointError, match="1 missing"):
        masa.load(folder, device="cpu", offload=True)
