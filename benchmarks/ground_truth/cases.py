"""Who is edited, from which pose to which: individuals that training never saw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from masa.weights.demo.world import POSES, Appearance, Scene, caption, render, sample

# Held out: training draws seeds from 10,000,000 up. Ranges of their own, so that nothing is chosen on what judges it.
TABLE_SEEDS = 100_000
SWEEP_SEEDS = 200_000
MODEL_SEEDS = 300_000
CALIBRATION_SEEDS = 400_000


@dataclass(frozen=True)
class Individual:
    """One subject in its place: a source pose, and every other pose as a target."""

    seed: int
    appearance: Appearance
    scene: Scene
    source_pose: str

    @classmethod
    def draw(cls, seed: int, subject: str = "cat") -> Individual:
        """The individual of a seed, always the same."""
        drawn = sample(seed, [subject])
        return cls(seed, drawn.appearance, drawn.scene, drawn.pose)

    @property
    def target_poses(self) -> tuple[str, ...]:
        return tuple(pose for pose in POSES[self.appearance.subject] if pose != self.source_pose)

    def prompt(self, pose: str) -> str:
        """Tells subject, pose and direction; colours, pattern and place are for the method to keep."""
        return caption(self.appearance, pose, self.scene, colour=False, pattern=False, place=False)

    @property
    def source_prompt(self) -> str:
        return self.prompt(self.source_pose)

    @property
    def target_prompts(self) -> list[str]:
        return [self.prompt(pose) for pose in self.target_poses]

    def turned(self, facing: int) -> Individual:
        """The same one, in the same place, facing right (1) or left (-1)."""
        return replace(self, scene=replace(self.scene, facing=facing))

    def picture(self, pose: str, size: int) -> np.ndarray:
        """The render, uint8 (size, size, 3): the truth of an edit to that pose."""
        return _render(self, pose, size)[0]

    def mask(self, pose: str, size: int) -> np.ndarray:
        """Where the subject is in that render, bool (size, size)."""
        return _render(self, pose, size)[1]


@lru_cache(maxsize=16)
def _render(who: Individual, pose: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    return render(who.appearance, pose, who.scene, size)
