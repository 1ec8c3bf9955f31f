"""CUDA graphs of whole forwards: equal to the plain UNet, and captured once per structure of edits."""

from __future__ import annotations

import pytest
import torch

import masa

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
