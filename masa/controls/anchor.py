"""MasaCtrl whose later targets read the first target, alone or beside the source: the anchors of a video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from masa.branches import SOURCE, Branches
from masa.controls.base import ActiveControl, Run, choose_layers, choose_steps
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import ActiveMasks
from masa.edits import Edit, Part, RowTuple, Site, Tape
from masa.errors import MasaError

FIRST = 1  # the branch of the first target


@dataclass(frozen=True)
class FirstFrameAnchor:
    """The first target reads the source as `control` says; those after it read the first target instead.

    both: they read source and first target, in one softmax; the weight of a union is that of each of the two. The
    first target must be in every call of the network: no targets_at_once. MasaError for a mask under both, which
    restricts the keys of one picture.
    """

    control: MasaCtrl
    both: bool = False

    def __post_init__(self) -> None:
        if self.both and self.control.mask is not None:
            raise MasaError(
                "MasaCtrl's mask restricts the keys of one picture, and anchor='both' reads two; use anchor='source' "
                "or 'first', or leave the mask out"
            )

    def begin(self, run: Run) -> ActiveControl:
        steps = choose_steps(self.control.steps, self.control.start_step, run, "MasaCtrl")
        layers = choose_layers(self.control.layers, self.control.start_layer, run, "MasaCtrl")
        mask = None if self.control.mask is None else self.control.mask.bind(run, layers)
        chosen = tuple(site for site in run.sites if site.kind == "self" and site.layer in layers)
        return _Active(self, steps, chosen, mask)


class _Active(ActiveControl):
    name = "MasaCtrl"

    def __init__(
        self, anchor: FirstFrameAnchor, steps: frozenset[int], sites: tuple[Site, ...], mask: ActiveMasks | None
    ) -> None:
        self.both = anchor.both
        self.union, self.weight = anchor.control.union, float(anchor.control.source_weight)
        self.steps = steps
        self.sites = sites
        self.mask = mask

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        if step not in self.steps:
            return {}
        edit = Edit(parts=self._parts(branches))
        if self.mask is not None:
            edit = replace(edit, mask=self.mask.source(branches, edit.key_rows(len(branches))))
        edits = {site.index: edit for site in self.sites}
        if self.mask is not None:
            edits.update(self.mask.records(branches))
        return edits

    def _parts(self, branches: Branches) -> tuple[Part, ...]:
        """What rows read: the source's and the first target's rows the source; the others as the anchor says."""
        leads = tuple(row.branch in (SOURCE, FIRST) for row in branches.rows)
        source, first = branches.source_rows, branches.rows_of(FIRST)
        own = (Part(branches.own_rows()),) if self.union else ()
        if self.both:
            others: RowTuple = tuple(-1 if lead else row for lead, row in zip(leads, first, strict=True))
            beside = (Part(others, weight=self.weight),) if not all(leads) else ()
            return Part(source, weight=self.weight), *beside, *own
        read = tuple(s if lead else f for lead, s, f in zip(leads, source, first, strict=True))
        return Part(read, weight=self.weight), *own

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        if self.mask is not None and step in self.steps:
            self.mask.after_step(tape, branches)  # words' masks remember the last step's
        return latents
