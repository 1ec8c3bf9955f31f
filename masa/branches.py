"""The rows of the UNet batch: which picture, which half of classifier-free guidance.

One source and N targets are denoised together. With guidance each needs two rows, in the published order
[u_source, u_1, .., u_N, c_source, c_1, .., c_N]; where a row would only repeat another it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from masa.errors import MasaError

Half = Literal["uncond", "cond"]
SOURCE = 0


@dataclass(frozen=True)
class Row:
    """One sample of the batch: branch 0 is the source, 1..N the targets."""

    branch: int
    halves: tuple[Half, ...]  # both, where the two prompts are the same


@dataclass(frozen=True)
class Branches:
    """The batch's rows, and what they are rows of.

    cached: rows that are not in the batch, of which a source cache holds what an edit may read; they are indexed
    behind the batch's own.
    """

    rows: tuple[Row, ...]
    cached: tuple[Row, ...] = ()

    @classmethod
    def build(cls, targets: int, *, guided: bool, merge_source: bool = False, source_guided: bool = False) -> Branches:
        """Rows for one source and `targets` targets.

        guided: two halves (guidance_scale > 1), else the conditional one alone. merge_source: the source's two
        prompts are equal: one row serves both. source_guided: the source has two halves where the targets have one.
        """
        branches = range(targets + 1)
        if not guided:
            uncond = (Row(SOURCE, ("uncond",)),) if source_guided and not merge_source else ()
            return cls((*uncond, *(Row(branch, ("cond",)) for branch in branches)))
        rows: list[Row] = []
        for half in ("uncond", "cond"):
            for branch in branches:
                if branch == SOURCE and merge_source:
                    if half == "uncond":
                        rows.append(Row(branch, ("uncond", "cond")))
                else:
                    rows.append(Row(branch, (half,)))
        return cls(tuple(rows))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def present(self) -> tuple[int, ...]:
        """The branches that have rows, source first."""
        return tuple(sorted({row.branch for row in self.rows}))

    @property
    def targets(self) -> tuple[int, ...]:
        return tuple(branch for branch in self.present if branch != SOURCE)

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The batch's rows, then those cached: what the tape and row indices are about."""
        return self.rows + self.cached

    def row(self, branch: int, half: Half) -> int | None:
        """Index, among all rows, of the row that serves this branch and half, or None."""
        for i, row in enumerate(self.all_rows):
            if row.branch == branch and half in row.halves:
                return i
        return None

    @property
    def source_rows(self) -> tuple[int, ...]:
        """For each row, the source's row of the same half."""
        return self.rows_of(SOURCE)

    def rows_of(self, branch: int) -> tuple[int, ...]:
        """For each row, the row of a branch in the same half. MasaError where the batch, and its cache, has none."""
        rows = [self.row(branch, row.halves[0]) for row in self.rows]
        if None in rows:
            raise MasaError(
                f"a control reads branch {branch}, and this call of the network has {self.present}: leave "
                "targets_at_once out, or let it read the source alone"
            )
        return tuple(row for row in rows if row is not None)

    def own_rows(self, but: int = SOURCE) -> tuple[int, ...]:
        """For each row itself, and -1 for the rows of one branch: who reads its own beside another's."""
        return tuple(-1 if row.branch == but else i for i, row in enumerate(self.rows))

    def select(self, rows: tuple[int, ...]) -> Branches:
        """These rows alone."""
        return Branches(tuple(self.rows[i] for i in rows), self.cached)

    def cache_source(self) -> Branches:
        """The targets' rows, with the source's cached."""
        source = tuple(row for row in self.rows if row.branch == SOURCE)
        return Branches(tuple(row for row in self.rows if row.branch != SOURCE), source)

    def parts(self, targets: int | None) -> tuple[Branches, ...]:
        """The rows of at most this many targets at once, the source's rows with each; None: all together."""
        if targets is None or len(self.targets) <= targets:
            return (self,)
        groups = [{SOURCE, *self.targets[i : i + targets]} for i in range(0, len(self.targets), targets)]
        return tuple(Branches(tuple(row for row in self.rows if row.branch in group), self.cached) for group in groups)

    def without_source(self) -> tuple[int, ...]:
        """Indices of the targets' rows."""
        return tuple(i for i, row in enumerate(self.rows) if row.branch != SOURCE)

    @property
    def copies(self) -> tuple[int, ...] | None:
        """For each row, which of the branches present it is of; None where each branch has one row, in order."""
        present = self.present
        places = tuple(present.index(row.branch) for row in self.rows)
        return None if places == tuple(range(len(present))) else places

    def contexts(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Prompt embeddings: uncond (1, 77, width) for all, cond (1 + N, 77, width) -> (rows, 77, width)."""
        parts = [cond[row.branch : row.branch + 1] if "cond" in row.halves else uncond for row in self.rows]
        return torch.cat(parts)
