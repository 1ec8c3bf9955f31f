"""Controls of a source while its picture is inverted: what they add to each of its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from masa.branches import Branches
from masa.controls.base import ActiveControl, Control, Run, begin_all, resolve
from masa.controls.conditions import PictureControl
from masa.edits import Edit, Residuals, Site
from masa.errors import MasaError


@dataclass(frozen=True)
class Steering:
    """Controls bound to an inversion. timesteps: of the steps that sampling will make, noisiest first."""

    controls: tuple[ActiveControl, ...] = ()
    timesteps: tuple[int, ...] = ()
    sites: tuple[Site, ...] = ()

    @property
    def tells_halves_apart(self) -> bool:
        """Whether the source's two halves differ even where their prompts are the same."""
        return any(control.tells_halves_apart for control in self.controls)

    @property
    def source_conditions(self) -> list[str]:
        """What the source depends on, beside its prompt, in the form that runs compare."""
        return sorted(one for control in self.controls for one in control.source_conditions)

    def edits(self, timestep: int, branches: Branches) -> dict[int, Edit]:
        """Of the step that starts at a timestep, for a batch of the source's rows."""
        return resolve(self.controls, self.timesteps.index(timestep), branches, self.sites) if self.controls else {}

    def residuals(self, timestep: int, x: Tensor, context: Tensor, branches: Branches) -> Residuals | None:
        """As `ActiveControl.residuals`, summed; x (1, 4, h, w), which all the rows share."""
        if not self.controls:
            return None
        step, rows = self.timesteps.index(timestep), x.expand(len(branches), -1, -1, -1)
        found = [control.residuals(step, timestep, rows, context, branches) for control in self.controls]
        return Residuals.total([added for added in found if added is not None])


NO_STEERING = Steering()


def begin_steering(controls: Sequence[Control], run: Run, timesteps: Sequence[int]) -> Steering:
    """Controls bound to the inversion of a run's source, which is its only branch.

    MasaError for a control that does not steer a source through a condition of its own.
    """
    active = begin_all(controls, run)
    for control, bound in zip(controls, active, strict=True):
        # One of weight 0 is as if it were not there.
        if not bound.source_conditions and not isinstance(control, PictureControl):
            raise MasaError(
                f"{type(control).__name__} has no part in an inversion; give it to sample or edit, and to invert those "
                "with a condition for the source, such as masa.T2IAdapter(path, source=..)"
            )
    return Steering(active, tuple(timesteps), run.sites)


def check_halves(method: str | None, active: Sequence[ActiveControl]) -> None:
    """MasaError where an inversion by a method would not serve a source whose two halves its controls tell apart."""
    apart = [control.name for control in active if control.source_conditions and control.tells_halves_apart]
    if method == "negative-prompt" and apart:
        raise MasaError(
            f"negative-prompt inversion needs both halves of guidance alike, and {' and '.join(apart)} tells them "
            "apart; use 'ddim' or 'null-text', or leave the source's condition out"
        )


def steering_controls(controls: Sequence[Control], active: Sequence[ActiveControl]) -> tuple[Control, ...]:
    """Those of a run's controls, bound as `active`, that take part in the inversion of its source."""
    return tuple(control for control, bound in zip(controls, active, strict=True) if bound.source_conditions)


def without_targets(control: Control) -> Control:
    """A control as an inversion knows it: its targets' pictures have no say there."""
    return control.of_source() if isinstance(control, PictureControl) else control
