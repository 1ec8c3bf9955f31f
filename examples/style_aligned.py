"""StyleAligned (2312.02133) as one file outside the library: pictures that share the first one's style.

python examples/style_aligned.py "a cat sitting, facing left" "a cat jumping, facing left"
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import masa
from masa.controls import ActiveControl, Branches, Edit, Part, Run


@masa.register
@dataclass(frozen=True)
class StyleAligned:
    """Targets attend to the source's keys beside their own, with its statistics: the source gives the style.

    score_shift: added to the logits of the source's keys. score_scale: on these logits. share_norms: group norms take
    their statistics over both pictures.
    """

    score_shift: float = 0.0
    score_scale: float = 1.0
    share_norms: bool = True

    def begin(self, run: Run) -> ActiveControl:
        return _Active(self, run)


class _Active(ActiveControl):
    name = "StyleAligned"

    def __init__(self, control: StyleAligned, run: Run) -> None:
        self.weight, self.scale = math.exp(control.score_shift), control.score_scale
        self.attentions = [site.index for site in run.sites if site.kind == "self"]
        self.norms = [site.index for site in run.sites if site.kind == "norm" and control.share_norms]

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        style = branches.source_rows  # for each row the source's, in its half of guidance
        own = Part(tuple(range(len(branches))), match=style)  # a row's own keys, brought to the style's statistics
        others = tuple(-1 if row == read else read for row, read in enumerate(style))  # the style reads itself alone
        parts = (own, Part(others, weight=self.weight, scale=self.scale))
        edits = dict.fromkeys(self.attentions, Edit(parts=parts, q_match=style))
        return edits | dict.fromkeys(self.norms, Edit(norm_with=style))


if __name__ == "__main__":
    prompts = sys.argv[1:] or ["a cat sitting, facing left", "a cat jumping, facing left"]
    sd = masa.load()
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0))  # each its own
    out = masa.sample(sd, prompts[0], prompts[1:], controls=StyleAligned(), latents=noise, steps=20, guidance_scale=4.0)
    print(*out.save("masa-out/style_aligned"), sep="\n")
