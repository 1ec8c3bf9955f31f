"""Plug-and-Play: the source's features and self-attention in the target (2211.12572)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from masa.branches import Branches
from masa.controls.base import ActiveControl, Run
from masa.controls.checks import check_fraction
from masa.edits import Edit
from masa.errors import MasaError

FEATURE_BLOCK = "up_blocks.1.resnets.1"  # "layer 4" of the paper's decoder
FIRST_ATTENTION_LAYER = 8


@dataclass(frozen=True)
class PlugAndPlay:
    """Targets take the source's features in one residual block and its queries and keys in self-attention.

    feature_steps: fraction of the steps, from the first on, whose features are injected in the second residual
    block of the second level up, after its second convolution and before the residual sum (tau_f).
    attention_steps: fraction of the steps whose self-attention probabilities are the source's from layer 8 on;
    the values stay the target's (tau_A). Both in [0, 1]; each half of guidance reads the source's row of that
    half. Published with an inverted, pinned source and an empty source prompt. 2211.12572, section 4, algorithm 1.
    """

    feature_steps: float = 0.8
    attention_steps: float = 0.5

    def __post_init__(self) -> None:
        for name in ("feature_steps", "attention_steps"):
            check_fraction(f"PlugAndPlay {name}", getattr(self, name))

    def begin(self, run: Run) -> ActiveControl:
        feature_steps, attention_steps = int(run.steps * self.feature_steps), int(run.steps * self.attention_steps)
        if max(feature_steps, attention_steps) <= run.first_step:
            raise MasaError(
                f"PlugAndPlay(feature_steps={self.feature_steps}, attention_steps={self.attention_steps}) selects no "
                f"step of a run of {run.steps} from step {run.first_step} on; raise one of them"
            )
        features = tuple(site.index for site in run.sites if site.name == FEATURE_BLOCK)
        attentions = tuple(s.index for s in run.sites if s.kind == "self" and s.layer >= FIRST_ATTENTION_LAYER)
        return _Active(feature_steps, attention_steps, features, attentions)


class _Active(ActiveControl):
    name = "PlugAndPlay"

    def __init__(
        self, feature_steps: int, attention_steps: int, features: tuple[int, ...], attentions: tuple[int, ...]
    ) -> None:
        self.feature_steps = feature_steps
        self.attention_steps = attention_steps
        self.features = features
        self.attentions = attentions

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        edits: dict[int, Edit] = {}
        if step < self.feature_steps:
            edits.update(dict.fromkeys(self.features, Edit(features_from=branches.source_rows)))
        if step < self.attention_steps:
            edit = Edit(q_from=branches.source_rows, k_from=branches.source_rows)
            edits.update(dict.fromkeys(self.attentions, edit))
        return edits
