"""CUDA graphs of whole forwards: equal to the plain UNet, and captured once per structure of edits."""

from __future__ import annotations

import pytest
import torch

import masa
from masa.edits import Edit

pytestmark = pytest.mark.gpu

SETTINGS = {"steps": 4, "height": 64, "width": 64, "guidance_scale": 3.0, "progress": False}


@pytest.fixture(scope="module")
def on_gpu(tiny_folder):
    return masa.load(tiny_folder, device="cuda", dtype="fp32")


@pytest.mark.parametrize(
    "controls",
    [
        [],
        masa.MasaCtrl(1, 4),
        masa.MasaCtrl(1, 4, union=True),
        masa.PromptToPrompt("replace"),
        masa.PlugAndPlay(),
        masa.LocalBlend("cat", "cat"),
        masa.RecordAttention(),
        masa.RecordQueries(),
    ],
    ids=["none", "masactrl", "union", "p2p", "plug-and-play", "local blend", "recorded attention", "recorded queries"],
)
def test_graphs_equal_the_plain_model(on_gpu, controls):
    fast = on_gpu.compile(compiler="eager")
    graphs = []
    for seed, target in ((0, "a running cat"), (1, "a jumping cat")):
        run = {"controls": controls, "seed": seed, **SETTINGS}
        plain = masa.sample(on_gpu, "a sitting cat", target, **run).latents
        found = masa.sample(fast, "a sitting cat", target, **run).latents
        assert (found - plain).abs().max() < 1e-3 * plain.abs().max()
        graphs.append(len(fast.unet.captured))
    assert graphs[0] == graphs[1] > 0


def test_inductor_and_graphs_equal_the_plain_model(on_gpu):
    fast = on_gpu.compile()
    run = {"controls": masa.MasaCtrl(1, 4), "seed": 0, **SETTINGS}
    plain = masa.sample(on_gpu, "a sitting cat", "a running cat", **run).latents
    found = masa.sample(fast, "a sitting cat", "a running cat", **run).latents
    assert (found - plain).abs().max() < 1e-3 * plain.abs().max()


def test_results_outlive_the_next_replay(on_gpu):
    fast = on_gpu.compile(compiler="eager")
    x, context = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 77, 32, device="cuda")
    with torch.no_grad():
        first, _ = fast.unet(x, 500, context)
        kept = first.clone()
        fast.unet(x + 1, 20, context)
    assert torch.equal(first, kept)


def test_graphs_share_memory_in_any_order(on_gpu):
    fast = on_gpu.compile(compiler="eager")
    x, context = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 77, 32, device="cuda")
    edits = [{site: Edit(k_from=(0, 0), v_from=(0, 0))} for site in (0, 12, 24)]
    with torch.no_grad():
        plain = [on_gpu.unet(x, 500, context, one)[0] for one in edits]
        for order in ((0, 1, 2), (2, 1, 0), (1, 1, 0), (0, 2, 1)):
            found = {i: fast.unet(x, 500, context, edits[i])[0] for i in order}
            assert all((found[i] - plain[i]).abs().max() < 1e-3 * plain[i].abs().max() for i in found)
    assert len(fast.unet.captured) == 3


def test_graphs_do_not_outlive_their_weights(tiny_folder):
    sd = masa.load(tiny_folder, device="cuda", dtype="fp32")
    fast = sd.compile(compiler="eager")
    x, context = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 77, 32, device="cuda")
    with torch.no_grad():
        first = fast.unet(x, 500, context)[0]
        sd.unet.to("cpu").to("cuda")
        filler = [torch.full_like(weight, 3.0) for weight in sd.unet.parameters()]  # where the weights may have been
        again = fast.unet(x, 500, context)[0]
    assert (again - first).abs().max() < 1e-3 * first.abs().max()
    assert len(fast.unet.captured) == 1
    assert filler


def test_offloaded_networks_and_graphs(tiny_folder, on_gpu):
    fast = masa.load(tiny_folder, device="cuda", dtype="fp32", offload=True).compile(compiler="eager")
    run = {"controls": masa.MasaCtrl(1, 4), "seed": 0, **SETTINGS}
    for _ in range(2):
        plain = masa.sample(on_gpu, "a sitting cat", "a running cat", **run).latents
        found = masa.sample(fast, "a sitting cat", "a running cat", **run).latents
        assert (found - plain).abs().max() < 1e-3 * plain.abs().max()


def test_a_pinned_cache_feeds_graphs(on_gpu):
    fast = on_gpu.compile(compiler="eager")
    recorded = {"seed": 0, **SETTINGS}
    control = masa.MasaCtrl(1, 4)
    plain = masa.sample(on_gpu, "a sitting cat", "a running cat", controls=control, **recorded).latents
    for store in ("host", "device", "disk"):
        cache = masa.record(on_gpu, "a sitting cat", controls=control, store=store, **recorded)
        assert all(tensor.is_pinned() == (store == "host") for tensor in cache.tensors.values())
        for sd in (on_gpu, fast):
            found = masa.sample(sd, target="a running cat", cache=cache, controls=control, progress=False).latents
            assert (found - plain).abs().max() < 1e-3 * plain.abs().max()
