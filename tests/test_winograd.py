"""The convolution with fewer multiplications against the direct one, in float64 and inside whole networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from masa.config import UNetConfig, VAEConfig
from masa.models import winograd
from masa.models.resnet import ResnetBlock, Upsample, silu_of
from masa.models.rowwise import GroupNorm
from masa.models.unet import UNet
from masa.models.vae import VAE
from masa.models.winograd import LEAST_CHANNELS, Conv3x3, double

LAST = torch.channels_last


def operands(rows: int, channels: int, out_channels: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = F.silu(torch.randn(rows, channels, height, width, generator=generator)).to(memory_format=LAST)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return x, weight.to(memory_format=LAST), torch.randn(out_channels, generator=generator)


def error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Root mean square error against float64, in standard deviations of the exact result."""
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    return float((found - exact).square().mean().sqrt() / exact.std())


@pytest.mark.parametrize("shape", [(1, 64, 64, 16, 16), (2, 96, 64, 17, 31), (3, 64, 80, 16, 22), (1, 200, 64, 3, 5)])
@pytest.mark.parametrize("convolve", [winograd.winograd, winograd.unfolded])
def test_is_the_convolution(convolve, shape):
    x, weight, bias = operands(*shape)
    found = convolve(x, weight, bias)
    assert found.shape == (shape[0], shape[2], shape[3], shape[4])
    assert found.is_contiguous(memory_format=LAST)
    assert error(found, x, weight, bias) < 2e-6


@pytest.mark.parametrize("shape", [(2, 96, 64, 16, 16), (1, 96, 72, 9, 31), (3, 200, 64, 3, 5)])
@pytest.mark.parametrize("numbers", [1 << 14, 6 << 20])
def test_doubled_it_is_the_convolution_of_the_doubled_map(monkeypatch, shape, numbers):
    """With few numbers a pass, bands begin between the two copies of a line."""
    monkeypatch.setattr(winograd, "PRODUCTS_PER_PASS", numbers)
    x, weight, bias = operands(*shape)
    found = winograd.winograd(x, weight, bias, doubled=True)
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert found.shape == (shape[0], shape[2], 2 * shape[3], 2 * shape[4])
    assert error(found, doubled, weight, bias) < 2e-6
    assert torch.equal(found, winograd.winograd(doubled.to(memory_format=LAST), weight, bias))


@pytest.mark.parametrize("side", [4, 8, 16])
@pytest.mark.parametrize("channels", [16, 96])
def test_the_layer_takes_doubled_maps(side, channels):
    layer = Conv3x3(channels, channels).to(memory_format=LAST).requires_grad_(False)
    x = torch.randn(2, channels, side, side).to(memory_format=LAST)
    expected = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert relative(layer(x, doubled=True), expected) < 1e-6
    assert relative(layer.double()(x.double(), doubled=True), expected) < 2e-6


def test_rounds_no_worse_than_twice_the_direct_convolution():
    x, weight, bias = operands(1, 320, 320, 32, 32)
    direct = error(F.conv2d(x, weight, bias, padding=1), x, weight, bias)
    assert error(winograd.winograd(x, weight, bias), x, weight, bias) < 2 * direct


def test_the_points_of_the_paper_round_worse(monkeypatch):
    """Why there are others."""
    x, weight, bias = operands(1, 320, 64, 16, 16)
    chosen = error(winograd.winograd(x, weight, bias), x, weight, bias)
    monkeypatch.setattr(winograd, "POINTS", (0.0, 1.0, -1.0, 2.0, -2.0))
    monkeypatch.setattr(winograd, "transforms", winograd.transforms.__wrapped__)
    assert 1.3 * chosen < error(winograd.winograd(x, weight, bias), x, weight, bias) < 1e-5


@pytest.mark.parametrize("limit", ["PRODUCTS_PER_PASS", "FILTERS_PER_PASS"])
@pytest.mark.parametrize("numbers", [1 << 10, 1 << 16, 1 << 18, 1 << 20])
def test_the_size_of_a_pass_changes_nothing_but_rounding(monkeypatch, limit, numbers):
    """Bands of a row, whole rows, several rows; blocks of the weights by their inputs, their outputs and both."""
    x, weight, bias = operands(3, 96, 72, 34, 30)
    monkeypatch.setattr(winograd, limit, numbers)
    assert error(winograd.winograd(x, weight, bias), x, weight, bias) < 2e-6


@pytest.mark.parametrize("side", [8, 16, 32])
def test_a_row_does_not_depend_on_the_others(side):
    x, weight, bias = operands(3, 320, 128, side, side)
    convolve = Conv3x3(320, 128).to(memory_format=LAST).requires_grad_(False)
    convolve.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(convolve(x)[1:2], convolve(x[1:2]))


def test_the_layer_is_a_convolution_where_winograd_does_not_pay_or_has_no_gradient(monkeypatch):
    taken = []

    def noted(name: str):
        return lambda x, weight, bias, doubled=False: taken.append(name) or F.conv2d(x, weight, bias, padding=1)

    for name in ("winograd", "unfolded"):
        monkeypatch.setattr(winograd, name, noted(name))
    layer = Conv3x3(96, 96).to(memory_format=LAST)
    large, small = (torch.randn(1, 96, side, side).to(memory_format=LAST) for side in (16, 8))
    with torch.no_grad():
        layer(large), layer(small)
        assert taken == ["winograd", "unfolded"]
        layer(large.contiguous())
        layer.double()(large.double())
        layer.float()
        Conv3x3(LEAST_CHANNELS - 1, 96).to(memory_format=LAST)(large[:, 1:].contiguous(memory_format=LAST))
        Conv3x3(96, LEAST_CHANNELS - 1).to(memory_format=LAST)(large)
    layer(large)
    layer.requires_grad_(False)(large.clone().requires_grad_())
    assert taken == ["winograd", "unfolded"]
    layer(large)
    assert taken == ["winograd", "unfolded", "winograd"]


def test_gradients_are_the_direct_convolutions():
    x, weight, bias = operands(1, 96, 96, 16, 16)
    layer = Conv3x3(96, 96).to(memory_format=LAST)
    layer.load_state_dict({"weight": weight, "bias": bias})
    x.requires_grad_()
    layer(x).square().sum().backward()
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).square().sum(), x)
    assert torch.equal(x.grad, expected)
    assert layer.weight.grad is not None


def test_the_blocks_keep_the_checkpoints_names():
    assert {"conv1.weight", "conv1.bias", "conv2.weight"} <= ResnetBlock(64, 64, None, 32, 1e-6).state_dict().keys()
    assert list(Upsample(64).state_dict()) == ["conv.weight", "conv.bias"]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt() / exact.std())


@torch.no_grad()
def test_a_unet_is_as_exact_as_with_direct_convolutions(monkeypatch):
    torch.manual_seed(0)
    config = UNetConfig(block_out_channels=(96, 96, 128, 128), layers_per_block=1, context_width=32, heads=4)
    unet = UNet(config).to(memory_format=LAST)
    x, context = torch.randn(2, 4, 16, 16).to(memory_format=LAST), torch.randn(2, 77, 32)
    taken, convolve = [], winograd.winograd
    monkeypatch.setattr(winograd, "winograd", lambda *operands: taken.append(1) or convolve(*operands))
    found, _ = unet(x, 500, context)
    assert taken
    monkeypatch.setattr(Conv3x3, "_is_plain", lambda layer, x: False)
    direct, _ = unet(x, 500, context)
    exact, _ = unet.double()(x.double(), 500, context.double())
    assert relative(found, exact) < max(2 * relative(direct, exact), 1e-6)
    assert (found - direct).abs().max() < 5e-5 * direct.std()


@torch.no_grad()
def test_a_vae_is_as_exact_as_with_direct_convolutions(monkeypatch):
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(96, 96), layers_per_block=1)).to(memory_format=LAST)
    picture = torch.rand(1, 3, 64, 64).to(memory_format=LAST)
    found = vae(picture)
    monkeypatch.setattr(Conv3x3, "_is_plain", lambda layer, x: False)
    direct, exact = vae(picture), vae.double()(picture.double())
    assert not torch.equal(found, direct)
    assert relative(found, exact) < max(2 * relative(direct, exact), 1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 1, 1]},
        {"stride": (2, 2)},
        {"padding": (0, 0)},
        {"dilation": (2, 2)},
        {"bias": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_module_that_was_changed_does_as_it_was_told(change):
    conv, plain = Conv3x3(96, 96), torch.nn.Conv2d(96, 96, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    for network in (conv, plain):
        network.to(memory_format=torch.channels_last)
        for name, value in change.items():
            setattr(network, name, value)
    x = torch.randn(1, 96, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), plain(x))


def test_a_convolution_in_its_place_has_the_doubled_map():
    upsample, x = Upsample(96), torch.randn(1, 96, 16, 16)
    upsample.conv = torch.nn.Conv2d(96, 8, 1)
    with torch.no_grad():
        assert torch.equal(upsample(x), upsample.conv(double(x)))


def test_other_numbers_of_channels_are_refused_as_ever():
    x = torch.randn(1, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
        Conv3x3(256, 96).to(memory_format=torch.channels_last)(x)


def test_a_bias_alone_may_want_a_gradient():
    conv = Conv3x3(96, 96).requires_grad_(False).to(memory_format=torch.channels_last)
    conv.bias.requires_grad_()
    conv(torch.randn(1, 96, 16, 16).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert conv.bias.grad is not None


def test_what_a_norm_gave_others_is_not_written_over():
    norm, seen = GroupNorm(4, 8), []
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        expected = torch.nn.functional.silu(norm(x))
        assert torch.equal(silu_of(norm, x), expected)
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert torch.equal(silu_of(norm, x), expected)
        norm_only = seen[0].clone()
        assert not torch.equal(norm_only, expected)
        before = x.clone()
        silu_of(torch.nn.Identity(), x)
        assert torch.equal(x, before)


def test_maps_are_unfolded_some_rows_at_a_time(monkeypatch):
    x, weight, bias = operands(5, 96, 96, 8, 8)
    whole = winograd.unfolded(x, weight, bias)
    monkeypatch.setattr(winograd, "PRODUCTS_PER_PASS", 2 * 9 * 96 * 8 * 8)
    torch.testing.assert_close(winograd.unfolded(x, weight, bias), whole)
    torch.testing.assert_close(whole, F.conv2d(x, weight, bias, padding=1), atol=1e-5, rtol=1e-5)
