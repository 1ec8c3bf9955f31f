"""Rows of a batch named by host ints or by a tensor, used without copying anything from the host to a device.

Host ints reach a device as the arguments of fills and slices. A copied tensor would wait for the device, could not
be made while a CUDA graph is being captured, and would have to outlive every graph that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows to read: a host tuple, or an integer tensor (B,) on the device of q.
RowIndex = tuple[int, ...] | Tensor

# A kernel gets rows by value: PACKED_ROWS fields of FIELD_BITS bits in one 64-bit argument; all ones stand for -1.
FIELD_BITS = 4
PACKED_ROWS = 16
NO_ROW = (1 << FIELD_BITS) - 1


def packed(rows: RowIndex) -> int | None:
    """Host rows in one signed 64-bit integer, row b in bits 4b .. 4b + 3; None where they do not fit."""
    if isinstance(rows, Tensor) or len(rows) > PACKED_ROWS or max(rows) >= NO_ROW:
        return None
    value = sum((row & NO_ROW) << (FIELD_BITS * place) for place, row in enumerate(rows))
    return value - (1 << 64) if value >= 1 << 63 else value


def row_tensor(rows: RowIndex, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Rows as a contiguous integer tensor (B,) on the device."""
    if isinstance(rows, Tensor):
        return rows.to(dtype).contiguous()
    if device.type == "cpu":
        return torch.tensor(rows, dtype=dtype)
    return fill_runs(torch.empty(len(rows), dtype=dtype, device=device), rows)


def number_tensor(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Host numbers (B,) on the device, by fills: a copy from the host could not be captured in a CUDA graph."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return fill_runs(torch.empty(len(values), dtype=dtype, device=device), values)


def fill_runs(target: Tensor, rows: tuple[int, ...] | tuple[float, ...]) -> Tensor:
    """Write host values into target (B,), one fill per run of equal ones: they travel as launch arguments."""
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[begin]:
            target[begin:end].fill_(rows[begin])
            begin = end
    return target


def pick_rows(x: Tensor, rows: RowIndex) -> Tensor:
    """x[rows]; a view where host rows are evenly spaced or all the same."""
    if isinstance(rows, Tensor):
        return x[rows.long()]
    window = _spaced(rows)
    if window is not None:
        return x[window]
    if all(row == rows[0] for row in rows):
        return x[rows[0] : rows[0] + 1].expand(len(rows), *x.shape[1:])
    return torch.cat([x[row : row + 1] for row in rows])


def put_rows(x: Tensor, rows: tuple[int, ...], value: Tensor) -> None:
    """x[rows] = value, for distinct host rows."""
    window = _spaced(rows)
    if window is not None:
        x[window] = value
        return
    for place, row in enumerate(rows):
        x[row] = value[place]


def _spaced(rows: tuple[int, ...]) -> slice | None:
    """The slice that is these rows, if they ascend evenly."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step < 1 or any(row != rows[0] + place * step for place, row in enumerate(rows)):
        return None
    return slice(rows[0], rows[-1] + 1, step)
