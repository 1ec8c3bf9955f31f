"""A row of a batch has the same bits whatever the other rows, in float32 on a CPU."""

from __future__ import annotations

import pytest
import torch
from rounding import same
from torch import nn

import masa
from masa.edits import take
from masa.models import rowwise
from masa.models.batch_rows import Retirement
from masa.models.rowwise import Conv2d, GroupNorm, Linear
from masa.models.unet import UNet
from masa.models.winograd import Conv3x3

ROWS = 5
SOME = ([2], [1, 2], [1, 2, 3], [0, 2, 3, 4])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def noise(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


# Of SD v1 at 512x512, of the demo model, and of maps so small that a product's form depends on their size.
LAYERS = {
    "first convolution": (lambda: Conv2d(4, 320, 3, padding=1), (4, 64, 64)),
    "last convolution": (lambda: Conv2d(48, 4, 3, padding=1), (48, 16, 16)),
    "strided convolution": (lambda: Conv2d(320, 320, 3, stride=2, padding=1), (320, 32, 32)),
    "small strided convolution": (lambda: Conv2d(48, 48, 3, stride=2, padding=1), (48, 16, 16)),
    "1x1 convolution": (lambda: Conv2d(640, 640, 1), (640, 32, 32)),
    "1x1 convolution with a stride": (lambda: Conv2d(64, 32, 1, stride=2), (64, 16, 16)),
    "small 1x1 convolution": (lambda: Conv2d(384, 192, 1), (384, 2, 2)),
    "3x3 convolution": (lambda: Conv3x3(320, 320), (320, 32, 32)),
    "3x3 convolution of a doubled map": (lambda: Conv3x3(128, 96), (128, 8, 8), True),
    "3x3 convolution of a small map": (lambda: Conv3x3(192, 192), (192, 2, 2)),
    "3x3 convolution of few channels": (lambda: Conv3x3(48, 48), (48, 16, 16)),
    "norm of a large map": (lambda: GroupNorm(32, 320), (320, 64, 64)),
    "norm of a map of middle size": (lambda: GroupNorm(16, 48), (48, 31, 33)),
    "norm of a small map": (lambda: GroupNorm(16, 48), (48, 8, 8)),
    "linear layer": (lambda: Linear(320, 320), (1024, 320)),
    "linear layer of 77 tokens": (lambda: Linear(768, 320), (77, 768)),
    "linear layer of few tokens": (lambda: Linear(192, 192), (2, 192)),
    "linear layer of one token": (lambda: Linear(192, 192), (1, 192)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_computes_a_row_alike(threads, name):
    make, shape, *options = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().to(memory_format=torch.channels_last), noise(ROWS, *shape)
    whole = layer(x, *options)
    assert whole.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
    for rows in SOME:
        same(layer(x[rows], *options), whole[rows])


@pytest.mark.parametrize("side", [16, 24])
@torch.no_grad()
def test_the_unet_computes_a_row_alike(threads, tiny, side):
    x, context = noise(ROWS, 4, side, side), noise(ROWS, 77, tiny.unet.config.context_width)
    whole, _ = tiny.unet(x, 500, context)
    for rows in SOME:
        same(tiny.unet(x[rows], 500, context[rows])[0], whole[rows])
    same(tiny.unet(x, 500, context, retire=Retirement(9, (1, 4)))[0], whole[[1, 4]])
    copies = (0, 1, 0, 1, 2)
    same(tiny.unet(x[:3], 500, context, copies=copies)[0], tiny.unet(x[list(copies)], 500, context)[0])


@pytest.mark.parametrize(
    "control",
    [
        masa.MasaCtrl(1, 4),
        masa.MasaCtrl(0, 0),
        masa.MasaCtrl(1, 8, mask=masa.WordMasks("cat", "cat", threshold=0.4), union=True),
        masa.PromptToPrompt("replace"),
        masa.PlugAndPlay(),
        masa.RecordAttention(self_attention=True),
    ],
    ids=["masactrl", "from the first layer", "masked union", "prompt-to-prompt", "plug-and-play", "recorded"],
)
def test_a_run_is_the_same_with_the_halves_of_guidance_apart(tiny, monkeypatch, control):
    run = {"controls": control, "steps": 3, "height": 128, "width": 128, "seed": 0, "progress": False}
    together = masa.sample(tiny, "a sitting cat", ["a running cat", "a jumping cat"], **run)
    forward, counts = UNet.forward, []

    def apart(self, x, timestep, context, *more, copies=None, **named):
        counts.append((len(x), len(context)))
        return forward(self, x if copies is None else take(x, copies), timestep, context, *more, **named)

    monkeypatch.setattr(UNet, "forward", apart)
    alone = masa.sample(tiny, "a sitting cat", ["a running cat", "a jumping cat"], **run)
    assert counts == [(3, 6)] * 3
    same(together.latents, alone.latents)
    for control_index, by_name in alone.attention.items():
        for name, maps in by_name.items():
            same(together.attention[control_index][name], maps)


@torch.no_grad()
def test_timesteps_may_differ_by_row(tiny):
    x, context = noise(2, 4, 16, 16), noise(2, 77, tiny.unet.config.context_width)
    both, _ = tiny.unet(x, torch.tensor([10, 900]), context)
    for row, timestep in enumerate((10, 900)):
        alone, _ = tiny.unet(x[row : row + 1], timestep, context[row : row + 1])
        assert torch.allclose(both[row : row + 1], alone, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        Conv2d(6, 4, 3, padding=1),
        Conv2d(6, 4, 1),
        Conv2d(6, 4, 1, bias=False),
        Conv2d(6, 4, 1, padding=1),
        Conv2d(6, 4, 1, stride=2),
        Conv2d(6, 4, 3, stride=2, padding=1),
        Conv2d(6, 4, 1, groups=2),
        GroupNorm(2, 6),
        Linear(6, 4),
    ],
    ids=str,
)
def test_the_results_are_torch_s(layer):
    plain = {Conv2d: nn.Conv2d, GroupNorm: nn.GroupNorm, Linear: nn.Linear}[type(layer)]
    x = noise(3, 5, 6) if isinstance(layer, Linear) else noise(3, 6, 32, 32)
    ref = plain.forward(layer, x)
    with torch.no_grad():
        assert torch.allclose(layer(x), ref, atol=1e-6)
    assert torch.equal(layer(x), ref)  # with a gradient: torch's own


@torch.no_grad()
def test_it_applies_where_it_serves():
    x = torch.zeros(2, 4)
    assert rowwise.applies(x)
    assert not rowwise.applies(x.bfloat16())
    assert not rowwise.applies(x.to("meta"))
    with torch.enable_grad():
        assert not rowwise.applies(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not rowwise.applies(x)
