"""The convolutional parts that UNet and VAE share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masa.attention import Call
from masa.edits import PLAIN, Edit, Site, take
from masa.models.norms import edited_norm
from masa.models.rowwise import Conv2d, GroupNorm
from masa.models.winograd import Conv3x3, double


def silu_of(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)), in the memory of the norm's output unless somebody may want that: one map less at the peak.

    Somebody may where a gradient is taken, or where the norm was replaced or has hooks.
    """
    own = type(norm) is GroupNorm and not norm._forward_hooks
    return F.silu(norm(x), inplace=own and not torch.is_grad_enabled())


def emb_of(emb: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The timestep's embedding for these rows of the batch; a single row of it is everybody's."""
    return emb if len(emb) == 1 else take(emb, rows)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a residual sum, with the timestep added between them.

    `emb_width=None` leaves the timestep out (the VAE). `eps` belongs to the checkpoint: 1e-5 in the UNet,
    1e-6 in the VAE. sites: of the UNet's blocks, the block's own and its two norms'.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_width: int | None, norm_groups: int, eps: float
    ) -> None:
        super().__init__()
        self.sites: tuple[Site, ...] = ()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        if emb_width is not None:
            self.time_emb_proj = nn.Linear(emb_width, out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor, emb: Tensor | None = None, call: Call | None = None) -> Tensor:
        """x (b, c_in, h, w), emb (b, emb_width), (1, emb_width) for all rows, or None -> (b, c_out, h, w).

        call: given where it edits the block or its norms.
        """
        before = x
        if call is not None:
            x = self._edited_features(x, emb, call)
        else:
            x = self.conv1(silu_of(self.norm1, x))
            if emb is not None:
                x = x + self.time_emb_proj(F.silu(emb))[:, :, None, None]
            x = silu_of(self.norm2, x)  # named, so that what it is made of is gone when the convolution runs
            x = self.conv2(x)
        # Last, so that it is not held while the convolutions run: at 512x512 in the VAE it is 128 MiB.
        return (self.conv_shortcut(before) if self.has_shortcut else before) + x

    def _edited_features(self, x: Tensor, emb: Tensor | None, call: Call) -> Tensor:
        """What is added to the residual sum, where features are another row's or statistics are shared."""
        block, *norms = self.sites
        edit, edits = call.edit_at(block), [call.edit_at(site) for site in norms]
        read = tuple(range(len(x)))
        rows = len(x)
        if edit.features_from is not None and all(of_norm is PLAIN for of_norm in edits):
            read = tuple(sorted({row for row in edit.features_from if row < rows}))  # the others serve nobody
            if not read:
                return features_of(x[:0], read, rows, edit)
        x = edited_norm(self.norm1, take(x, read), edits[0], norms[0], call.tape)
        x = self.conv1(F.silu(x))
        if emb is not None:
            x = x + self.time_emb_proj(F.silu(emb_of(emb, read)))[:, :, None, None]
        x = self.conv2(F.silu(edited_norm(self.norm2, x, edits[1], norms[1], call.tape)))
        if "features" in edit.to_cache:
            call.tape[("cache", "features"), block.index] = x
        return x if edit.features_from is None else features_of(x, read, rows, edit)


def features_of(x: Tensor, read: tuple[int, ...], rows: int, edit: Edit) -> Tensor:
    """For each row, the features of the row that it takes: of those read, or, behind the batch, of those cached."""
    assert edit.features_from is not None
    if edit.cached is not None and edit.cached.features is not None:
        x = torch.cat([x, edit.cached.features]) if read else edit.cached.features
        read = (*read, *range(rows, rows + len(edit.cached.features)))
    return take(x, tuple(read.index(row) for row in edit.features_from))


class Downsample(nn.Module):
    """A strided convolution that halves each side.

    The UNet pads both sides by one pixel; the VAE encoder pads right and bottom only (`asymmetric`).
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)
        self.asymmetric = asymmetric

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, Conv3x3):
            return self.conv(x, doubled=True)
        return self.conv(double(x))  # of a module that the user put in its place
