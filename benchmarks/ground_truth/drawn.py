"""Poses by drawing: which pose an edit shows, named or not, and what that is from the asked one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

from masa.weights.demo.between import Recorder
from masa.weights.demo.figures import JOINTED, draw_figure
from masa.weights.demo.pose_classifier import PoseClassifier
from masa.weights.demo.stick_figure import nobody
from masa.weights.demo.world import POSES, Between, Pose

from .cases import Individual
from .intervals import clustered, share_interval
from .measures import Measures, against_truth
from .report import Row, Threshold
from .runs import Store

AMOUNTS = (0.25, 0.5, 0.75)
NEAR = 0.03  # of the subject's size: a pose is right whose joints are so near; no other candidate's are


@cache
def joints(subject: str, pose: Pose) -> np.ndarray:
    """Where limbs, trunk and head are, (n, 2), in units of the subject's size."""
    strokes = Recorder()
    draw_figure(strokes, nobody(subject), pose)
    found: list[tuple[float, float]] = []
    for stroke in strokes.strokes:
        if stroke.method in ("tube", "coat"):
            found += [(node.u, node.v) for node in stroke.arguments[0]]
    heads = [
        stroke.arguments for stroke in strokes.strokes if stroke.method == "ellipse" and stroke.arguments[3] > 0.15
    ]
    return np.array([*found, *((head[0], head[1]) for head in heads)])


def pose_error(subject: str, a: Pose, b: Pose) -> float:
    """Mean distance between the joints of two poses, in units of the subject's size."""
    return float(np.linalg.norm(joints(subject, a) - joints(subject, b), axis=1).mean())


@cache
def candidates(subject: str) -> tuple[Pose, ...]:
    """The named poses, and some between every two."""
    named = POSES[subject]
    pairs = combinations(named, 2) if subject in JOINTED else ()
    return (*named, *(Between(a, b, amount) for a, b in pairs for amount in AMOUNTS))


def seen_pose(who: Individual, picture: np.ndarray) -> Pose:
    """The candidate whose exact render of this individual is nearest to a picture (h, w, 3), pixel by pixel."""
    size = picture.shape[0]
    shown = picture.astype(np.float32)
    errors = {
        pose: float(np.abs(shown - who.picture(pose, size)).mean()) for pose in candidates(who.appearance.subject)
    }
    return min(errors, key=errors.__getitem__)


@dataclass(frozen=True)
class DrawnCase:
    """One edit, measured. pose_error: of the nearest render's pose, in units of the subject's size."""

    seed: int
    target: Pose
    measures: Measures
    pose_error: float
    threshold: float

    @property
    def shares(self) -> dict[str, bool]:
        """A named pose is what the classifier sees, as in the other tables; another what the nearest render shows."""
        near = self.pose_error < NEAR
        pose = self.measures.pose if isinstance(self.target, str) else near
        appearance = self.measures.appearance < self.threshold
        return {"pose": pose, "nearest render": near, "appearance right": appearance, "both right": pose and appearance}


def drawn_cases(
    store: Store, classifier: PoseClassifier, section: str, method: str, subject: str, threshold: Threshold
) -> list[DrawnCase]:
    """Every stored case of a method."""
    found = []
    for seed in store.seeds(section, method):
        who = Individual.draw(seed, subject, section.startswith("between"))
        pictures = store.load(section, method, seed)
        for pose, picture in zip(who.target_poses, pictures[1:], strict=True):
            error = pose_error(subject, seen_pose(who, picture), pose)
            measures = against_truth(classifier, who, pose, picture)
            found.append(DrawnCase(seed, pose, measures, error, threshold.value))
    return found


def summarise_drawn(section: str, method: str, cases: Sequence[DrawnCase]) -> Row:
    """A table's row: each figure with its interval."""
    seeds = [case.seed for case in cases]
    row: Row = {"section": section, "method": method, "cases": len(cases), "individuals": len(set(seeds))}
    for name in ("pose", "nearest render", "appearance right", "both right"):
        hits = [case.shares[name] for case in cases]
        low, high = share_interval(hits, seeds)
        row |= {name: sum(hits) / len(hits), f"{name} low": low, f"{name} high": high}
    means = {name: [getattr(c.measures, name) for c in cases] for name in ("appearance", "psnr", "background")}
    for name, values in ({"pose error": [c.pose_error for c in cases]} | means).items():
        low, high = clustered(values, seeds)
        row |= {name: float(np.mean(values)), f"{name} low": low, f"{name} high": high}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
