"""Settings of a run: one value, its JSON in results and PNGs, and the classes that can stand in it."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from masa.attention import Backend
from masa.config import ScheduleConfig
from masa.controls.base import Control, FileControl
from masa.controls.blended import BlendedLatents
from masa.controls.controlnet import ControlNet
from masa.controls.freeu import FreeU
from masa.controls.ip_adapter import IPAdapter
from masa.controls.local_blend import LocalBlend
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks, WordMasks
from masa.controls.plug_and_play import PlugAndPlay
from masa.controls.prompt_to_prompt import PromptToPrompt
from masa.controls.record import RecordAttention, RecordPredictions, RecordQueries
from masa.controls.style import StyleTransfer
from masa.controls.t2i_adapter import T2IAdapter
from masa.errors import MasaError
from masa.guidance import ClassifierFree, Guidance, GuidanceInterval, RescaledGuidance
from masa.io.pictures import load_mask
from masa.samplers.base import Sampler
from masa.samplers.ddim import DDIM
from masa.samplers.dpm_solver import DPMSolverPP
from masa.samplers.euler import Euler
from masa.samplers.lcm import LCM
from masa.samplers.unipc import UniPC
from masa.schedule import Schedule

Class = TypeVar("Class", bound=type)

KINDS: dict[str, type] = {}  # what can stand in a settings file, by class name
MAPPING = "mapping"


@dataclass(frozen=True, eq=False)
class RunSettings:
    """What a run is asked, as `sample` takes it; None is what it chooses itself.

    `sample` and `edit` make one of their arguments, `settle` (checks) fills in what was left out, results and PNGs
    carry it as JSON (`describe`), `rerun` reads it back (`restored`), and a cache compares its own with it.
    """

    source: str = ""
    target: tuple[str, ...] = ()
    controls: tuple[Control, ...] = ()
    pin_source: bool | None = None
    steps: int | None = None
    skip_steps: int | None = None
    guidance_scale: float | None = None
    guidance: Guidance | None = None
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    generator_state: Mapping[str, str] | None = None  # packed, before the first draw
    latents: Tensor | None = None
    eta: float = 0.0
    schedule: Schedule | None = None
    sampler: Sampler | None = None
    targets_at_once: int | None = None
    tiled: bool | None = None
    backend: Backend = "auto"

    def describe(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {f.name: describe_setting(f.name, getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def restored(cls, settings: Mapping[str, Any]) -> RunSettings:
        """The inverse of `describe`; a file of an earlier version has fewer. MasaError for what was lost."""
        return cls(**{f.name: restore_setting(f.name, settings[f.name]) for f in fields(cls) if f.name in settings})


def describe_setting(name: str, value: Any) -> Any:
    """One of the settings as JSON."""
    if name == "schedule" and value is not None:
        return describe_schedule(value)
    return value if name == "generator_state" else describe(value)


def restore_setting(name: str, value: Any) -> Any:
    """The inverse of `describe_setting`; what an earlier version did not name is what it did."""
    if value is None:
        return {"sampler": DDIM(), "guidance": ClassifierFree()}.get(name)
    if name == "schedule":
        return restore_schedule(value)
    return value if name == "generator_state" else restore(value)


# ----------------------------------------------------------------------------------------------- registration


def register(cls: Class) -> Class:
    """Make a class of yours known: a frozen dataclass that is a control, sampler, guidance, or extends Schedule.

    Usable as a decorator. Results then carry its values by class name and fields, and `rerun`, `record`, `sweep` and
    the command line (--plugin FILE.py) make them again from there; so must whoever reruns the picture call this. Fields
    hold numbers, texts, None, tensors, lists, dicts or values of registered classes; lists come back as tuples. A class
    of the same module and name is replaced, as when a notebook's cell runs again. MasaError for a class that is no
    frozen dataclass, or a name that is taken::

        @masa.register
        @dataclass(frozen=True)
        class Mine:
            start_step: int = 4

            def begin(self, run): ...
    """
    if not isinstance(cls, type) or not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        name = getattr(cls, "__name__", repr(cls))
        raise MasaError(f"register was given {name}; expected a class under @dataclass(frozen=True)")
    known = KINDS.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise MasaError(f"{cls.__name__} is registered already, by {known.__module__}; give the class another name")
    KINDS[cls.__name__] = cls
    return cls


def is_registered(value: Any) -> bool:
    """Whether a value's class is known, so that the value can be made again."""
    return KINDS.get(type(value).__name__) is type(value)


def registered(method: str) -> dict[str, type]:
    """The registered classes that have a method, by name: "begin" of controls, "start" of samplers, "guide"."""
    return {name: kind for name, kind in KINDS.items() if callable(getattr(kind, method, None))}


def check_kept(**settings: Any) -> None:
    """MasaError for a schedule, sampler or guidance of a class that is not registered, where it would be lost."""
    for name, value in settings.items():
        lost = _find_lost(describe_setting(name, value))
        if lost is not None:
            raise MasaError(
                f"{name} is or holds a {lost}, which could not be read back from a file; make it known with "
                "masa.register"
            )


def _find_lost(described: Any) -> str | None:
    """The name of a class, anywhere in a described value, that is not registered."""
    if isinstance(described, Mapping) and described.get("own"):
        return str(described["kind"])
    parts = described.values() if isinstance(described, Mapping) else described if isinstance(described, list) else ()
    return next((lost for part in parts if (lost := _find_lost(part)) is not None), None)


for _kind in (
    BlendedLatents,
    ClassifierFree,
    ControlNet,
    DDIM,
    DPMSolverPP,
    Euler,
    FreeU,
    GivenMasks,
    GuidanceInterval,
    IPAdapter,
    LCM,
    LocalBlend,
    MasaCtrl,
    PlugAndPlay,
    PromptToPrompt,
    RecordAttention,
    RecordPredictions,
    RecordQueries,
    RescaledGuidance,
    ScheduleConfig,
    StyleTransfer,
    T2IAdapter,
    UniPC,
    WordMasks,
):
    register(_kind)


# ------------------------------------------------------------------------------------------------------ JSON


def describe(value: Any) -> Any:
    """A control, sampler, mask or plain value as JSON. Masks given as pictures are embedded, compressed."""
    if type(value) is GivenMasks:
        targets = [pack(load_mask(mask)) for mask in value.targets]
        return {"kind": "GivenMasks", "source": pack(load_mask(value.source)), "target": targets}
    if type(value) is BlendedLatents:
        return {"kind": "BlendedLatents", "mask": pack(load_mask(value.mask)), "skip": value.skip}
    if isinstance(value, FileControl) and is_registered(value):
        value = value.kept()
    if is_registered(value):
        kept = {f.name: describe(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"kind": type(value).__name__} | kept
    if isinstance(value, Tensor):
        return pack(value)
    if isinstance(value, list | tuple | range | set | frozenset | np.ndarray):
        return [describe(v) for v in value]
    if isinstance(value, Mapping):
        # As pairs: a word may be a number, and may be "kind".
        return {"kind": MAPPING, "items": [[describe(key), describe(item)] for key, item in value.items()]}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # Of a class that is not registered: the run goes on, and only its repetition is refused.
    return {"kind": type(value).__name__, "own": True}


def restore(value: Any) -> Any:
    """The inverse of `describe`. MasaError for a kind that this version does not know."""
    if isinstance(value, list):
        return tuple(restore(v) for v in value)
    if not isinstance(value, Mapping):
        return value
    if "packed" in value:
        return unpack(value)
    if value.get("kind") == MAPPING:
        return {restore(key): restore(item) for key, item in value["items"]}
    kind = KINDS.get(value.get("kind", ""))
    if value.get("own"):
        raise MasaError(
            f"settings name a {value.get('kind')!r}, which was not registered when they were written: its fields are "
            "lost; run anew after masa.register, which keeps them"
        )
    if kind is None:
        raise MasaError(
            f"settings name a {value.get('kind')!r}, which this version of masa does not have; if it is yours, import "
            "what calls masa.register (on the command line: --plugin FILE.py)"
        )
    return kind(**{name: restore(v) for name, v in value.items() if name != "kind"})


def describe_schedule(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON: the model's kind by its numbers, one of a user's own by its class."""
    return schedule.describe() if type(schedule) is Schedule else describe(schedule)


def restore_schedule(numbers: Mapping[str, Any]) -> Schedule:
    """The inverse of `describe_schedule`. MasaError for a class that is not known."""
    if "kind" not in numbers:
        return Schedule.restore(numbers)
    schedule: Schedule = restore(numbers)
    return schedule


def pack(tensor: Tensor) -> dict[str, str]:
    """A tensor as compressed text."""
    buffer = io.BytesIO()
    whole = tensor.detach().cpu()
    np.save(buffer, (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy())
    return {"packed": base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode("ascii")}


def unpack(packed: Mapping[str, str]) -> Tensor:
    """The tensor that `pack` wrote."""
    data = zlib.decompress(base64.b64decode(packed["packed"]))
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
