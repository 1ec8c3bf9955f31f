"""MasaCtrl: mutual self-attention control (2304.08465)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from masa.branches import Branches
from masa.controls.base import ActiveControl, Run, choose_layers, choose_steps
from masa.controls.checks import check_flag, check_list, check_whole, is_number
from masa.controls.masks import ActiveMasks, GivenMasks, WordMasks
from masa.edits import Edit, Part, Site, Tape
from masa.errors import MasaError


@dataclass(frozen=True)
class MasaCtrl:
    """From a step and a layer on, targets read the source's keys and values with their own queries (eq. 5-6).

    start_step, start_layer: first step and transformer block controlled (S and L in the paper).
    steps, layers: explicit lists instead; steps beyond the run's last are left out.
    mask: GivenMasks or WordMasks; subject attends to subject, background to background (eq. 7-9).
    union: targets see the source's keys and values beside their own.
    source_weight: in a union, the weight of the source's part against the target's own; > 0.
    """

    start_step: int = 4
    start_layer: int = 10
    steps: Sequence[int] | None = None
    layers: Sequence[int] | None = None
    mask: GivenMasks | WordMasks | None = None
    union: bool = False
    source_weight: float = 1.0

    def __post_init__(self) -> None:
        check_whole("MasaCtrl start_step", self.start_step)
        check_whole("MasaCtrl start_layer", self.start_layer)
        check_list("MasaCtrl steps", self.steps)
        check_list("MasaCtrl layers", self.layers)
        if self.mask is not None and not isinstance(self.mask, GivenMasks | WordMasks):
            raise MasaError(f"MasaCtrl mask is {self.mask!r}; expected masa.WordMasks, masa.GivenMasks or None")
        check_flag("MasaCtrl union", self.union)
        if not is_number(self.source_weight) or self.source_weight <= 0:
            raise MasaError(f"MasaCtrl source_weight is {self.source_weight!r}; expected more than 0")
        if self.source_weight != 1.0 and not self.union:
            raise MasaError("MasaCtrl source_weight weighs the source in a union; set union=True")

    def begin(self, run: Run) -> ActiveControl:
        steps = choose_steps(self.steps, self.start_step, run, "MasaCtrl")
        layers = choose_layers(self.layers, self.start_layer, run, "MasaCtrl")
        sites = tuple(site for site in run.sites if site.kind == "self" and site.layer in layers)
        mask = None if self.mask is None else self.mask.bind(run, layers)
        return _Active(self, steps, sites, mask)


class _Active(ActiveControl):
    name = "MasaCtrl"

    def __init__(
        self,
        control: MasaCtrl,
        steps: frozenset[int],
        sites: tuple[Site, ...],
        mask: ActiveMasks | None,
    ) -> None:
        self.control = control
        self.steps = steps
        self.sites = sites
        self.mask = mask
        self.used: dict[int, Tensor] = {}

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        if step not in self.steps:  # eq. 6: before step S, and in layers before L, attention stays as it is
            return {}
        source_rows = branches.source_rows
        if self.control.union:  # the source's keys and the row's own, in one softmax
            parts = (Part(source_rows, weight=float(self.control.source_weight)), Part(branches.own_rows()))
            edit = Edit(parts=parts)
        else:  # eq. 5: own queries, the source's keys and values
            edit = Edit(k_from=source_rows, v_from=source_rows)
        if self.mask is not None:
            # Eq. 7-9: subject attends to subject, background to background.
            edit = replace(edit, mask=self.mask.source(branches, edit.key_rows(len(branches))))
        edits = {site.index: edit for site in self.sites}
        if self.mask is not None:
            edits.update(self.mask.records(branches))
        return edits

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        if self.mask is not None and step in self.steps:
            masks = self.mask.after_step(tape, branches)
            if masks is not None:
                self.used[step] = masks
        return latents

    def masks(self) -> dict[int, Tensor]:
        return self.used
