"""What goes from noise level to noise level: samplers, one a file, and the names that stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masa.errors import MasaError
from masa.samplers.base import Sampler
from masa.samplers.ddim import DDIM
from masa.samplers.dpm_solver import DPMSolverPP
from masa.samplers.euler import Euler
from masa.samplers.lcm import LCM
from masa.samplers.unipc import UniPC

NAMES: Mapping[str, Sampler] = {
    "ddim": DDIM(),
    "dpm++2m": DPMSolverPP(),
    "dpm++2m-sde": DPMSolverPP(sde=True),
    "unipc": UniPC(),
    "euler": Euler(),
    "euler-a": Euler(ancestral=True),
    "lcm": LCM(),
}


def choose_sampler(sampler: Any) -> Sampler:
    """The sampler that a name stands for, or the value given. MasaError for anything else."""
    if isinstance(sampler, str) and sampler in NAMES:
        return NAMES[sampler]
    whole = all(hasattr(sampler, name) for name in ("start", "levels", "noise_scale", "retraces", "takes_eta"))
    if isinstance(sampler, str | type) or not whole:
        names = ", ".join(map(repr, NAMES))
        raise MasaError(
            f"sampler is {sampler!r}; expected one of {names}, or a value such as masa.DPMSolverPP(), of a class "
            "that extends masa.samplers.base.Sampler"
        )
    return sampler
