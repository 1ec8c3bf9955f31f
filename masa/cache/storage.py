"""Where a source's tensors are kept: the model's memory, the host's, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from masa.errors import MasaError

Store = Literal["auto", "device", "host", "disk"]
# Of the free memory, how much "auto" may take; the rest is for the networks' own work.
SHARE = 0.5


def choose_store(store: Store, nbytes: int, device: torch.device) -> Store:
    """Where `nbytes` go: as asked, else the first of device, host and disk of whose free memory half suffices."""
    if store == "host" and device.type == "cpu":
        return "device"  # the same memory
    if store != "auto":
        return store
    if nbytes <= SHARE * free_memory(device):
        return "device"
    return "host" if device.type != "cpu" and nbytes <= SHARE * free_memory(torch.device("cpu")) else "disk"


def free_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, or of the host as Linux counts them; 4 GB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 * 10**9


def check_store(store: str) -> None:
    if store not in get_args(Store):
        raise MasaError(f"store is {store!r}; expected one of {', '.join(map(repr, get_args(Store)))}")


def store_tensor(tensor: Tensor, store: str, device: torch.device) -> Tensor:
    """A tensor of its own, dense, where the store is; there when this returns, for the host to read too."""
    if store == "device":
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda").copy_(tensor)
