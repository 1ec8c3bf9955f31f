"""Who is edited, from which pose to which: individuals that training never saw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np

from masa.weights.demo.stick_figure import stick_figure
from masa.weights.demo.world import POSES, Appearance, Between, Pose, Scene, caption, render, sample

# Held out: training draws seeds from 10,000,000 up. Ranges of their own, so that nothing is chosen on what judges it.
TABLE_SEEDS = 100_000
SWEEP_SEEDS = 200_000
MODEL_SEEDS = 300_000
CALIBRATION_SEEDS = 400_000


@dataclass(frozen=True)
class Individual:
    """One subject in its place: a source pose, and every other pose as a target, or what lies between these."""

    seed: int
    appearance: Appearance
    scene: Scene
    source_pose: str
    between: bool = False

    @classmethod
    def draw(cls, seed: int, subject: str = "cat", between: bool = False) -> Individual:
        """The individual of a seed, always the same. between: its targets are poses that prompts cannot name."""
        drawn = sample(seed, [subject])
        return cls(seed, drawn.appearance, drawn.scene, drawn.pose, between)

    @property
    def target_poses(self) -> tuple[Pose, ...]:
        named = tuple(pose for pose in POSES[self.appearance.subject] if pose != self.source_pose)
        return tuple(Between(a, b, 0.5) for a, b in combinations(named, 2)) if self.between else named

    def prompt(self, pose: Pose | None) -> str:
        """Tells subject, pose and direction; colours, pattern and place are for the method to keep.

        Of a pose between two it can name one; None: tells no pose.
        """
        named = pose.first if isinstance(pose, Between) else pose
        return caption(self.appearance, named, self.scene, colour=False, pattern=False, place=False)

    @property
    def source_prompt(self) -> str:
        return self.prompt(self.source_pose)

    @property
    def target_prompts(self) -> list[str]:
        return [self.prompt(pose) for pose in self.target_poses]

    def turned(self, facing: int) -> Individual:
        """The same one, in the same place, facing right (1) or left (-1)."""
        return replace(self, scene=replace(self.scene, facing=facing))

    def stick(self, pose: Pose, size: int) -> np.ndarray:
        """The pose as a stick figure, uint8 (size, size)."""
        return stick_figure(self.appearance.subject, pose, self.scene, size)

    def picture(self, pose: Pose, size: int) -> np.ndarray:
        """The render, uint8 (size, size, 3): the truth of an edit to that pose."""
        return _render(self, pose, size)[0]

    def mask(self, pose: Pose, size: int) -> np.ndarray:
        """Where the subject is in that render, bool (size, size)."""
        return _render(self, pose, size)[1]


@lru_cache(maxsize=2048)
def _render(who: Individual, pose: Pose, size: int) -> tuple[np.ndarray, np.ndarray]:
    return render(who.appearance, pose, who.scene, size)
