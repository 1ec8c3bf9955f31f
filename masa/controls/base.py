"""What a control is, and how the edits of several become one set per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from masa.branches import Branches
from masa.config import PreviewFactors, UNetConfig
from masa.edits import Edit, Grid, Residuals, Site, Tape
from masa.errors import MasaError


def _no_encoder(prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
    raise MasaError(f"this run cannot tokenize {prompt!r}; build Run with encode=sd.tokenizer.encode")


@dataclass(frozen=True)
class Run:
    """What a control may know of the run it acts in, before the first step."""

    steps: int
    sites: tuple[Site, ...]
    prompts: tuple[str, ...]  # the source's, then the targets'
    grid: Grid  # of the latents
    device: torch.device
    token_positions: Callable[[str, Any], tuple[int, ...]]  # (prompt, words) -> positions in 0..76
    tokens: int = 77
    # A bare prompt -> its token ids and each one's span of characters.
    encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]] = _no_encoder
    first_step: int = 0  # earlier ones are not run
    source_pinned: bool = False  # its latents are put back on a trajectory before each step
    alphas: tuple[float, ...] = ()  # cumulative alpha of the latents before each step, and 1 after the last
    source_latents: Tensor | None = None  # of the real picture that is edited, clean: (1, 4, h, w)
    draw_noise: Callable[[], Tensor] | None = None  # fresh noise (1, 4, h, w), which the run's seed decides
    dtype: torch.dtype = torch.float32  # of the networks
    unet: UNetConfig = UNetConfig()
    # Of the UNet before any LoRA, by name; None where they are not in memory.
    base_weights: Mapping[str, Tensor] | None = None
    preview: PreviewFactors | None = None  # the latents' colours, where the model tells them
    # False where a source is recorded for targets to come: one target's prompt stands in, and is the source's.
    targets_known: bool = True

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return sum(site.kind == "self" for site in self.sites)

    def grid_at(self, downsample: int) -> Grid:
        return self.grid[0] // downsample, self.grid[1] // downsample


class ActiveControl:
    """A control bound to one run: the only place for state that lasts from step to step."""

    name = "a control"  # what errors call it

    first_step: int = 0  # the run leaves out the steps before it
    watches_source: bool = False  # it needs the source to be computed, not held by a cache
    tells_halves_apart: bool = False  # the source's two halves differ, even where their prompts are the same
    # What the source depends on through its residuals, beside prompt and noise: a cache of a source without is refused.
    # (Edits that change the source are found by themselves.)
    source_condition: str | None = None

    @property
    def source_conditions(self) -> tuple[str, ...]:
        """`source_condition` as a tuple, () for none; of a control that holds others, theirs."""
        return () if self.source_condition is None else (self.source_condition,)

    def start(self, latents: Tensor) -> Tensor:
        """The latents (1 + N, 4, h, w) that the run's first step starts from."""
        return latents

    def edits(self, step: int, branches: Branches) -> Mapping[int, Edit]:
        """This step's edits by site index, of a batch of these rows.

        Asked for every step before the run, to find clashes, so it changes nothing. Where no edit reads the source, the
        source's rows may be left out, and it is asked again of the targets' alone.
        """
        return {}

    def residuals(self, step: int, timestep: float, x: Tensor, context: Tensor, branches: Branches) -> Residuals | None:
        """What is added to the network's features in this step, by row of the batch; None for nothing.

        x (rows, 4, h, w) and context (rows, 77, width), in the networks' dtype: what each row is predicted from.
        """
        return None

    def after_step(self, step: int, latents: Tensor, tape: Tape, branches: Branches) -> Tensor:
        """The latents (1 + N, 4, h, w) that the next step starts from.

        The source's are put back afterwards where it is pinned to a trajectory (`Run.source_pinned`).
        """
        return latents

    def blend(self, history: Tensor) -> Tensor:
        """What `after_step` has just done to the latents, done to what the sampler remembers of them.

        history (1 + N, 4, h, w): clean latents that a step predicted. A control that puts a region of the targets
        back on the source does so here too: else a solver of second order goes on along the target's slope there.
        """
        return history

    def see_prediction(self, step: int, x0: Tensor) -> None:
        """What this step takes the clean latents to be: (1 + N, 4, h, w), from the guided prediction.

        Of a pinned source that the step does not compute, the trajectory's clean latents; of one that a cache holds,
        those that its recording saw.
        """

    def masks(self) -> dict[int, Tensor]:
        """Masks used, by step: (1 + N, h, w) float, source first."""
        return {}

    def attention(self) -> dict[str, Tensor]:
        """Attention maps recorded, by name: (1 + N, ..) float, source first."""
        return {}

    def queries(self) -> dict[tuple[int, int], Tensor]:
        """Queries recorded, by (layer, step): (1 + N, h, w, width), source first."""
        return {}

    def predictions(self) -> dict[int, Tensor]:
        """Predicted clean latents to be decoded, by step: (1 + N, 4, h, w), source first."""
        return {}


class Control(Protocol):
    """A frozen, reusable value. `begin` checks it against a run and raises before any long work.

    A control that also serves a run without targets says so with a class variable `needs_targets = False`; one that
    changes nothing and keeps nothing, with `only_looks = True`: settings then leave it out.
    """

    def begin(self, run: Run) -> ActiveControl: ...


class FileControl:
    """A control that names files of its own: settings keep it as `kept` gives it, and a rerun finds the files again.

    Extend it with a frozen dataclass. files: the fields that hold a path, or None.
    """

    files: ClassVar[tuple[str, ...]] = ("path",)

    def kept(self) -> Any:
        """The same with all that tells its files from others, such as their digests."""
        return self

    def found(self, find: Callable[[str | Path], Path]) -> Any:
        """The same with each path where `find` says that the file is now."""
        paths = {name: getattr(self, name) for name in self.files}
        now = {name: find(path) for name, path in paths.items() if path is not None}
        return replace(self, **now)  # type: ignore[type-var]


def only_looks(control: Control) -> bool:
    """Whether a control has no part in the result, nor in its settings."""
    return bool(getattr(control, "only_looks", False))


def begin_all(controls: Sequence[Control], run: Run) -> tuple[ActiveControl, ...]:
    """Controls bound to a run, and to the step at which the latest of them wants it to start.

    MasaError for what a control refuses, and for a control that acts on targets where there are none.
    """
    idle = [type(c).__name__ for c in controls if getattr(c, "needs_targets", True)] if len(run.prompts) == 1 else []
    if idle:
        verb = "acts" if len(idle) == 1 else "act"
        raise MasaError(f"{' and '.join(idle)} {verb} on targets, and there are none; give one, or controls=[]")
    active = tuple(_begin(control, run) for control in controls)
    first_step = max((control.first_step for control in active), default=0)
    if first_step > run.first_step:  # the others' steps are chosen among those that are run
        active = tuple(_begin(control, replace(run, first_step=first_step)) for control in controls)
    return active


def _begin(control: Control, run: Run) -> ActiveControl:
    active = control.begin(run)
    if not isinstance(active, ActiveControl):
        raise MasaError(f"{type(control).__name__}.begin gave {active!r}; expected an ActiveControl")
    return active


def check_together(
    controls: Sequence[ActiveControl], first_step: int, branches: Sequence[Branches], sites: Sequence[Site]
) -> None:
    """MasaError where two controls are at odds in any step of a run; branches: of each step."""
    for step in range(first_step, len(branches)):
        resolve(controls, step, branches[step], sites)


def resolve(controls: Sequence[ActiveControl], step: int, branches: Branches, sites: Sequence[Site]) -> dict[int, Edit]:
    """All controls' edits of one step. MasaError where two set the same field of the same site."""
    merged: dict[int, Edit] = {}
    owners: dict[tuple[int, str], str] = {}
    for control in controls:
        for index, edit in _edits_of(control, step, branches).items():
            if index not in range(len(sites)) or edit.misplaced(sites[index].kind):
                raise _misplaced(control, edit, index, sites)
            for field in edit.claims():
                owner = owners.setdefault((index, field), control.name)
                if index in merged and field in merged[index].claims():
                    raise MasaError(
                        f"two controls both set {field} at {sites[index].name} (layer {sites[index].layer}) in step "
                        f"{step}: {owner} and {control.name}; give them different steps or layers, or leave one out"
                    )
            try:
                merged[index] = _merge(merged[index], edit, len(branches)) if index in merged else edit
            except MasaError as error:
                raise MasaError(f"{control.name} and another control, at {sites[index].name}: {error}") from error
    return merged


def _merge(one: Edit, other: Edit, rows: int) -> Edit:
    """Both edits of a site. MasaError where a mask was planned for other rows than are read together."""
    both = one.merge(other)
    for edit in (one, other):
        if edit.mask is not None and edit.key_rows(rows) != both.key_rows(rows):
            raise MasaError("one masks the keys that the other has more rows read; leave one of the two out")
    return both


def _edits_of(control: ActiveControl, step: int, branches: Branches) -> Mapping[int, Edit]:
    """A control's edits of a step. MasaError, with its name, for what does not fit the batch."""
    edits = control.edits(step, branches)
    if not isinstance(edits, Mapping):
        raise MasaError(f"{control.name} gave {edits!r} as its edits; expected edits by site index, {{}} for none")
    for edit in {id(edit): edit for edit in edits.values()}.values():
        try:
            edit.check(len(branches), len(branches.all_rows))
        except MasaError as error:
            raise MasaError(f"{control.name}, in step {step}: {error}") from error
    return edits


def _misplaced(control: ActiveControl, edit: Edit, index: int, sites: Sequence[Site]) -> MasaError:
    if index not in range(len(sites)):
        return MasaError(f"{control.name} edits site {index}; the network has sites 0 to {len(sites) - 1}")
    site, names = sites[index], ", ".join(edit.misplaced(sites[index].kind))
    return MasaError(
        f"{control.name} sets {names} at {site.name}, a site of kind {site.kind!r}, which cannot carry it out; choose "
        "sites by their kind"
    )


def find_words(run: Run, words: Any) -> dict[int, tuple[int, ...]]:
    """Token positions of words by target branch, of the targets whose prompts have them. MasaError if none has.

    Where the targets are not known yet the first token stands in.
    """
    if not run.targets_known:
        return {1: (1,)}
    found: dict[int, tuple[int, ...]] = {}
    errors: list[MasaError] = []
    for branch, prompt in enumerate(run.prompts[1:], 1):
        try:
            found[branch] = run.token_positions(prompt, words)
        except MasaError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def choose_steps(steps: Sequence[int] | None, start: int, run: Run, control: str) -> frozenset[int]:
    """The listed steps, or those from `start` on, that the run has. MasaError where that is none."""
    chosen = frozenset(range(start, run.steps) if steps is None else steps) & set(range(run.first_step, run.steps))
    if not chosen:
        asked = f"start_step={start}" if steps is None else f"steps={list(steps)}"
        hint = f"; 4 is meant for 50 steps, which of {run.steps} are {run.steps * 4 // 50}" if steps is None else ""
        raise MasaError(
            f"{control}({asked}) selects no step of a run of {run.steps}; expected numbers from {run.first_step} to "
            f"{run.steps - 1}{hint}"
        )
    return chosen


def choose_layers(layers: Sequence[int] | None, start: int, run: Run, control: str) -> frozenset[int]:
    """The listed layers, or those from `start` on. MasaError for a layer that the model has not, or for none."""
    chosen = frozenset(range(start, run.layers) if layers is None else layers)
    if not chosen or not chosen <= set(range(run.layers)):
        asked = f"start_layer={start}" if layers is None else f"layers={list(layers)}"
        raise MasaError(f"{control}({asked}): expected transformer blocks from 0 to {run.layers - 1}")
    return chosen
