"""Offloading: text encoder and VAE come to the UNet's device for their own work and leave it again."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import masa


class Moves:
    """A network that writes down where it is sent, and when it works."""

    def __init__(self, network: torch.nn.Module, log: list[str], name: str):
        self.network, self.log, self.name = network, log, name

    def to(self, device):
        self.log.append(f"{self.name} to {torch.device(device).type}")

    def __call__(self, *args):
        self.log.append(f"{self.name} works")
        return self.network(*args)

    def encode(self, picture):
        self.log.append(f"{self.name} works")
        return self.network.encode(picture)

    def decode(self, latents):
        self.log.append(f"{self.name} works")
        return self.network.decode(latents)

    def __getattr__(self, name):
        return getattr(self.network, name)


def test_networks_are_on_the_device_only_while_they_work(tiny, generator, monkeypatch):
    log: list[str] = []
    parts = {"text_encoder": Moves(tiny.text_encoder, log, "text"), "vae": Moves(tiny.vae, log, "vae")}
    # A device of the UNet's that is told from the CPU, where the tensors stay.
    monkeypatch.setattr(masa.StableDiffusion, "device", torch.device("cpu", 0))
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    run = {"controls": [], "steps": 1, "height": 64, "width": 64, "progress": False}
    kept = masa.edit(replace(tiny, **parts), picture, "a cat", seed=0, **run)
    assert set(log) == {"text works", "vae works"}
    log.clear()
    out = masa.edit(replace(tiny, **parts, offload=True), picture, "a cat", seed=0, **run)
    assert torch.equal(out.latents, kept.latents)
    moves = [entry for entry in log if "works" not in entry]
    # In and out in turn, one network at a time, and the last is gone.
    assert all(one.split()[0] == two.split()[0] for one, two in zip(moves[::2], moves[1::2], strict=True))
    for i, entry in enumerate(log):
        if "works" in entry:
            name = entry.split()[0]
            assert [line for line in log[:i] if line.startswith(f"{name} to")]
    assert len(moves) % 2 == 0


def test_a_failure_sends_the_network_back(tiny):
    log: list[str] = []
    sd = replace(tiny, vae=Moves(tiny.vae, log, "vae"), offload=True)
    with pytest.raises(RuntimeError):
        sd.decode_latents(torch.zeros(1, 3, 8, 8))
    assert log == ["vae to cpu", "vae works", "vae to cpu"]


def test_a_network_that_does_not_fit_goes_back(tiny, monkeypatch):
    log: list[str] = []

    class TooLarge(Moves):
        def to(self, device):
            super().to(device)
            if torch.device(device).index is not None:
                raise torch.OutOfMemoryError("half of it is there")

    monkeypatch.setattr(masa.StableDiffusion, "device", torch.device("cpu", 0))
    sd = replace(tiny, text_encoder=TooLarge(tiny.text_encoder, log, "text"), offload=True)
    with pytest.raises(torch.OutOfMemoryError):
        sd.encode_prompt(["a cat"])
    assert log == ["text to cpu", "text to cpu"]


def absent(network: torch.nn.Module) -> bool:
    """Whether no weight, and no buffer, takes memory."""
    return all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


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


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.conv_out.bias.add_(1.0),
        lambda unet: setattr(unet.conv_out, "bias", torch.nn.Parameter(unet.conv_out.bias + 1.0, requires_grad=False)),
        lambda unet: unet.load_state_dict(unet.state_dict()),
    ],
)
def test_changed_weights_are_not_thrown_away(tiny_folder, change):
    sd = masa.load(tiny_folder, device="cpu", dtype="fp32", offload=True)
    latents = torch.zeros(1, 4, 8, 8)
    sd.decode_latents(latents)
    sd.decode_latents(latents)
    with torch.no_grad():
        change(sd.unet)
    with pytest.raises(masa.MasaError, match="weights were changed, and offload=True on a CPU reads them"):
        sd.decode_latents(latents)
    assert not absent(sd.unet)


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


def test_files_that_are_gone_are_named(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    sd = masa.load(folder, device="cpu", offload=True)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises((masa.MasaError, FileNotFoundError), match="text_encoder"):
        sd.encode_prompt(["a cat"])


@pytest.mark.gpu
def test_offloaded_networks_wait_on_the_cpu(tiny_folder):
    sd = masa.load(tiny_folder, device="cuda", dtype="fp32", offload=True)
    kept = masa.load(tiny_folder, device="cuda", dtype="fp32")
    run = {"controls": [], "steps": 2, "height": 64, "width": 64, "seed": 0, "progress": False}
    out = masa.sample(sd, "a cat", "a dog", **run)
    assert {p.device.type for m in (sd.vae, sd.text_encoder) for p in m.parameters()} == {"cpu"}
    assert {p.device.type for p in sd.unet.parameters()} == {"cuda"}
    assert torch.equal(out.latents, masa.sample(kept, "a cat", "a dog", **run).latents)
