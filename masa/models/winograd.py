"""3x3 convolutions on a CPU with a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3): Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"
(arXiv 1509.09308), equations 4 to 13. A 4x4 tile of the output is A^T [(G g G^T) * (B^T d B)] A of a 6x6 tile d of the
input: 36 products in place of 144, and for all tiles and channels together 36 matrix products.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from masa.models.rowwise import LEAST_LINES, Conv2d

TILE = 4  # outputs of a tile, per side
SPAN = TILE + 2  # inputs of a tile, per side
# Where the polynomials are evaluated, beside infinity. The paper's 0, 1, -1, 2, -2 have twice the rounding error of a
# direct convolution; these, whose neighbours differ less and which floats hold exactly, have the same error as one.
POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)
# Numbers per intermediate: of the products, and of the transformed weights, which are made for some channels at a
# time and used at once. Small enough for the cache, and for the allocator to keep the memory between passes (glibc's
# limit is 32 MiB: larger blocks are fetched from the kernel page by page, which costs more than the product).
PRODUCTS_PER_PASS = 6 << 20
FILTERS_PER_PASS = 2 << 20
# Below this many pixels a map has fewer tiles than pay for transforming the weights, and below this many channels
# transforming the map costs more than the products save.
LEAST_PIXELS, LEAST_CHANNELS = 256, 96


@cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """A^T (16, 36), G (36, 9) and B^T (36, 36) of both directions at once, float32: Kronecker squares, by Cook-Toom."""
    to_output, to_filter, to_input = np.zeros((TILE, SPAN)), np.zeros((SPAN, 3)), np.zeros((SPAN, SPAN))
    for i, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        to_output[:, i] = [point**power for power in range(TILE)]
        to_filter[i] = [point**power / math.prod(point - other for other in others) for power in range(3)]
        to_input[i, :-1] = np.poly(others)[::-1]
    to_output[-1, -1] = to_filter[-1, -1] = 1.0  # the point at infinity
    to_input[-1] = np.poly(POINTS)[::-1]
    squares = [torch.from_numpy(np.kron(m, m)).float() for m in (to_output, to_filter, to_input)]
    return squares[0], squares[1], squares[2]


def winograd(x: Tensor, weight: Tensor, bias: Tensor, doubled: bool = False) -> Tensor:
    """The 3x3 convolution of stride 1 with zeros around: x (rows, c, h, w), weight (out, c, 3, 3) -> (rows, out, h, w).

    doubled: of `double(x)`, which is made for a slice of the channels at a time: (rows, out, 2h, 2w).
    Of channels_last tensors nothing is copied whole; the result is channels_last. Without a gradient. In float32, and
    on a CPU. A row's result is computed alike whatever the other rows.
    """
    (rows, channels, height, width), out_channels = x.shape, len(weight)
    height, width = (2 * height, 2 * width) if doubled else (height, width)
    to_output, to_filter, to_input = transforms()
    maps, taps = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1).flatten(1, 2)
    down, across = -(-height // TILE), -(-width // TILE)  # tiles of a row
    out = x.new_empty(rows, down * TILE, across * TILE, out_channels)

    # Blocks of the weights' matrix, nearly square: the fewest readings of the inputs and sums of the products.
    most = FILTERS_PER_PASS // SPAN**2
    step = _even_share(channels, math.isqrt(most))
    out_step = _even_share(out_channels, max(1, most // step))
    room = x.new_empty(out_step * SPAN**2 * step)
    # Neither the blocks nor the order of the sums depends on how many rows there are.
    lines = max(1, PRODUCTS_PER_PASS // SPAN**2 // (max(step, out_channels) * across))
    for first, last, top, bottom in _passes(rows, down, lines):
        products = x.new_empty(SPAN**2, (last - first) * (bottom - top) * across, out_channels)
        for some in _slices(channels, step):
            tiles = _tiles(maps[first:last, ..., some], top, bottom, across, doubled)
            inputs = torch.mm(to_input, tiles.reshape(SPAN**2, -1)).view(SPAN**2, products.shape[1], -1)
            for others in _slices(out_channels, out_step):
                block = taps[others, :, some]
                filters = room[: len(block) * SPAN**2 * block.shape[2]].view(len(block), SPAN**2, -1)
                torch.bmm(to_filter.expand(len(block), -1, -1), block, out=filters)
                part, operands = products[:, :, others], (inputs, filters.permute(1, 2, 0))
                if some.start == 0:
                    torch.bmm(*operands, out=part)
                else:
                    part.baddbmm_(*operands)
        results = torch.mm(to_output, products.view(SPAN**2, -1))
        results = results.view(TILE, TILE, last - first, bottom - top, across, out_channels)
        place = out[first:last, top * TILE : bottom * TILE].unflatten(2, (across, TILE)).unflatten(1, (-1, TILE))
        torch.add(results.permute(2, 3, 0, 4, 1, 5), bias, out=place)
    return out[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def unfolded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same convolution as one product with the map's 3x3 neighbourhoods: for maps smaller than their weights."""
    (rows, channels, height, width), out_channels = x.shape, len(weight)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    by_row, by_line, by_pixel, _ = padded.stride()
    around = padded.as_strided((rows, height, width, 3, 3, channels), (by_row, by_line, by_pixel, by_line, by_pixel, 1))
    matrix = weight.permute(0, 2, 3, 1).flatten(1).T
    alone = height * width < LEAST_LINES
    many = 1 if alone else max(1, PRODUCTS_PER_PASS // (9 * channels * height * width))  # rows of a pass
    out = torch.cat([torch.addmm(bias, some.reshape(-1, 9 * channels), matrix) for some in around.split(many)])
    return out.view(rows, height, width, out_channels).permute(0, 3, 1, 2)


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour doubling of both sides: (rows, c, h, w) -> (rows, c, 2h, 2w)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Conv3x3(Conv2d):
    """nn.Conv2d of 3x3, stride 1 and padding 1, which on a CPU takes the fewest multiplications where that pays."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor, doubled: bool = False) -> Tensor:
        """input (rows, in_channels, h, w) -> (rows, out_channels, h, w); doubled: of `double(input)`, so 2h, 2w."""
        if not self._is_plain(input):
            return super().forward(double(input) if doubled else input)
        assert self.bias is not None  # _is_plain
        pixels = input.shape[2] * input.shape[3] * (4 if doubled else 1)
        if pixels >= LEAST_PIXELS:
            return winograd(input, self.weight, self.bias, doubled)
        return unfolded(double(input) if doubled else input, self.weight, self.bias)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether nobody asks for a gradient or a graph, the module is as built, and layouts suit the products."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32 or self.bias is None:
            return False
        if torch.is_autocast_enabled("cpu") or x.dim() != 4 or x.shape[1] != self.in_channels:
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, self.weight, self.bias)):
            return False
        # Others change them to tile a texture, say.
        if self.padding_mode != "zeros" or (self.stride, self.padding, self.dilation) != ((1, 1), (1, 1), (1, 1)):
            return False
        if min(self.in_channels, self.out_channels) < LEAST_CHANNELS or self.weight.dtype != x.dtype:
            return False
        return all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, self.weight))


def _even_share(channels: int, most: int) -> int:
    """Channels of a block: as few even blocks as can be, of about `most` at the most, and of whole vectors."""
    return min(channels, 16 * math.ceil(channels / math.ceil(channels / most) / 16))


def _slices(channels: int, step: int) -> list[slice]:
    return [slice(start, min(channels, start + step)) for start in range(0, channels, step)]


def _passes(rows: int, down: int, lines: int) -> list[tuple[int, int, int, int]]:
    """Rows first..last and lines of tiles top..bottom of each pass, at most `lines` lines: whole rows if they fit."""
    if lines >= down:
        many = lines // down
        return [(row, min(rows, row + many), 0, down) for row in range(0, rows, many)]
    each = -(-down // -(-down // lines))
    return [(row, row + 1, top, min(down, top + each)) for row in range(rows) for top in range(0, down, each)]


def _tiles(maps: Tensor, top: int, bottom: int, across: int, doubled: bool) -> Tensor:
    """Lines top..bottom of tiles of maps (rows, h, w, c), with zeros around: (SPAN, SPAN, rows, lines, across, c).

    doubled: of the maps doubled.
    """
    rows, height, width, channels = maps.shape
    height, width = (2 * height, 2 * width) if doubled else (height, width)
    above, below = TILE * top - 1, TILE * bottom + 1
    begin, end = max(0, above), min(height, below)
    if doubled:
        inside = double(maps[:, begin // 2 : -(-end // 2)].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        inside = inside[:, begin % 2 : begin % 2 + end - begin]
    else:
        inside = maps[:, begin:end]
    padded = F.pad(inside, (0, 0, 1, TILE * across + 1 - width, max(0, -above), max(0, below - height))).contiguous()
    by_row, by_line, by_pixel, _ = padded.stride()
    shape = (SPAN, SPAN, rows, bottom - top, across, channels)
    return padded.as_strided(shape, (by_line, by_pixel, by_row, TILE * by_line, TILE * by_pixel, 1))
