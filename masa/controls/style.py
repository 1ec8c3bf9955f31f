"""The style variant of MasaCtrl: the source's layout with the target's content (2304.08465, discussion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from masa.branches import Branches
from masa.controls.base import ActiveControl, Run, choose_layers, choose_steps
from masa.controls.checks import check_list, check_whole
from masa.edits import Edit


@dataclass(frozen=True)
class StyleTransfer:
    """From a step and a layer on, targets take the source's queries and keys and keep their own values.

    The mirror of MasaCtrl: where things are comes from the source, what they look like from the target's prompt.

    start_step, start_layer: first step and transformer block controlled.
    steps, layers: explicit lists instead; steps beyond the run's last are left out.
    """

    start_step: int = 4
    start_layer: int = 10
    steps: Sequence[int] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_whole("StyleTransfer start_step", self.start_step)
        check_whole("StyleTransfer start_layer", self.start_layer)
        check_list("StyleTransfer steps", self.steps)
        check_list("StyleTransfer layers", self.layers)

    def begin(self, run: Run) -> ActiveControl:
        steps = choose_steps(self.steps, self.start_step, run, "StyleTransfer")
        layers = choose_layers(self.layers, self.start_layer, run, "StyleTransfer")
        return _Active(steps, tuple(site.index for site in run.sites if site.kind == "self" and site.layer in layers))


class _Active(ActiveControl):
    name = "StyleTransfer"

    def __init__(self, steps: frozenset[int], sites: tuple[int, ...]) -> None:
        self.steps = steps
        self.sites = sites

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        if step not in self.steps:
            return {}
        return dict.fromkeys(self.sites, Edit(q_from=branches.source_rows, k_from=branches.source_rows))
