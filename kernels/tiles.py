"""Which tile a kernel launch uses: a lookup in tables per architecture, never a search at run time."""

from __future__ import annotations

from typing import NamedTuple

from masa.kernels.launch import split_width
from masa.kernels.tile_tables import TABLES as _LITERALS

FORMS = ("plain", "masked", "union", "masked_union", "maps")


class Tile(NamedTuple):
    """Sizes of one kernel launch: queries and keys per step, warps, pipeline stages.

    ones_column: the padding columns of V hold ones, so the matrix unit adds up the softmax denominators too.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    ones_column: bool = False


class Row(NamedTuple):
    """One entry: a kernel form, bytes per element, the widest padded head it serves, and its tile."""

    form: str
    size: int
    width: int
    tile: Tile


TABLES = {
    arch: tuple(Row(form, size, width, Tile(*tile)) for form, size, width, tile in rows)
    for arch, rows in _LITERALS.items()
}


def lookup(arch: str, form: str, size: int, width: int) -> Tile:
    """The tile of the narrowest entry that holds a head width.

    arch: a section of the tables, see `launch.architecture`; size: bytes per element, 2 or 4.
    """
    padded = sum(split_width(width))
    fitting = [row for row in TABLES[arch] if (row.form, row.size) == (form, size) and row.width >= padded]
    return min(fitting, key=lambda row: row.width).tile
