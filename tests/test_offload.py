"""Offloading: text encoder and VAE come to the UNet's device for their own work and leave it again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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


@pytest.mark.gpu
def test_offloaded_networks_wait_on_the_cpu(tiny_folder):
    sd = masa.load(tiny_folder, device="cuda", dtype="fp32", offload=True)
    kept = masa.load(tiny_folder, device="cuda", dtype="fp32")
    run = {"controls": [], "steps": 2, "height": 64, "width": 64, "seed": 0, "progress": False}
    out = masa.sample(sd, "a cat", "a dog", **run)
    assert {p.device.type for m in (sd.vae, sd.text_encoder) for p in m.parameters()} == {"cpu"}
    assert {p.device.type for p in sd.unet.parameters()} == {"cuda"}
    assert torch.equal(out.latents, masa.sample(kept, "a cat", "a dog", **run).latents)
