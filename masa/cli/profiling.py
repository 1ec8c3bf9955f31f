"""`--profile FILE`: where a command's time goes, as a chrome trace and a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from masa.errors import MasaError
from masa.io.files import check_free, replacing

ROWS = 15


@contextmanager
def profiled(file: str | Path | None, overwrite: bool = False) -> Iterator[None]:
    """Profile what runs inside; then write a chrome trace to `file` and print the costliest operations.

    None: nothing is profiled. Open the trace in chrome://tracing or ui.perfetto.dev. MasaError, before anything
    runs, unless the file ends in .json and is new or may be replaced; after an error inside nothing is written.
    """
    if file is None:
        yield
        return
    path = Path(file)
    if path.suffix != ".json":
        raise MasaError(f"--profile {path} must end in .json, the format of a chrome trace")
    check_free(path, overwrite, "--profile")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as found:
        yield
    with replacing(path) as temporary:
        found.export_chrome_trace(str(temporary))
    averages = found.key_averages()
    print(averages.table(sort_by=choose_order(averages), row_limit=ROWS, max_name_column_width=50))
    print(path)


def choose_order(averages: Sequence[Any]) -> str:
    """What to sort operations by: their time on the GPU where any has some, else on the CPU."""
    # A machine may have a GPU that the command did not use.
    used = any(event.self_device_time_total > 0 for event in averages)
    return "self_device_time_total" if used else "self_cpu_time_total"
