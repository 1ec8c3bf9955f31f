"""What a control's fields may hold: a wrong type is named when the control is made, not where it is first used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from masa.errors import MasaError


def check_whole(name: str, value: Any) -> None:
    """MasaError unless a whole number from 0; name: the control's and the field's."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise MasaError(f"{name} is {value!r}; expected a whole number from 0")


def check_list(name: str, value: Any) -> None:
    """MasaError unless None or several whole numbers from 0; an empty list is left to the run, which names it."""
    if value is None:
        return
    several = isinstance(value, Collection | np.ndarray) and not isinstance(value, str | Mapping)
    if not several or any(not isinstance(n, Integral) or isinstance(n, bool) or n < 0 for n in value):
        raise MasaError(f"{name} is {value!r}; expected several whole numbers from 0, such as [8, 9], or None")


def check_fraction(name: str, value: Any) -> None:
    """MasaError unless a number in [0, 1]."""
    if not is_number(value) or not 0.0 <= value <= 1.0:
        raise MasaError(f"{name} is {value!r}; expected a number from 0 to 1")


def check_flag(name: str, value: Any) -> None:
    """MasaError unless True or False."""
    if not isinstance(value, bool | np.bool_):
        raise MasaError(f"{name} is {value!r}; expected True or False")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; truth values are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
