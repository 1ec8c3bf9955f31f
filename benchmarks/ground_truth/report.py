"""Tables, picture grid and heat maps from the pictures that a run has stored."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import masa
from masa.io.files import replacing
from masa.weights.demo.pose_classifier import PoseClassifier

from .cases import Individual
from .intervals import clustered, equal_error, share_interval
from .measures import (
    Measures,
    against_source,
    against_truth,
    appearance_error,
    judge,
    palette_distance,
    psnr,
    usual_regions,
)
from .runs import Store, calibration_pair

Row = dict[str, str | int | float]
SHARES = ("pose", "facing", "appearance right", "both right", "both right as seen")
MEANS = ("appearance", "appearance_as_seen", "psnr", "ssim", "background")


@dataclass(frozen=True)
class Threshold:
    """The appearance error from which an edit counts as wrong, and its two error rates on renders."""

    value: float
    same_refused: float
    other_accepted: float
    pairs: int


@dataclass(frozen=True)
class Outcome:
    """One case of one method, measured. threshold: the appearance error from which it is wrong."""

    seed: int
    target: str
    measures: Measures
    threshold: float

    @property
    def shares(self) -> dict[str, bool]:
        m = self.measures
        return {
            "pose": m.pose,
            "facing": m.facing,
            "appearance right": m.appearance < self.threshold,
            "both right": both_right(m, self.threshold),
            "both right as seen": both_right(m, self.threshold, as_seen=True),
        }


def both_right(measures: Measures, threshold: float, as_seen: bool = False) -> bool:
    """Pose and appearance right; as_seen: against the truth that faces where the edit is seen to face."""
    error = measures.appearance_as_seen if as_seen else measures.appearance
    return measures.pose and error < threshold


def thresholds(store: Store, subject: str, size: int) -> dict[str, Threshold]:
    """For edits of pictures and for synthesised pairs: where an individual and another are told apart equally well.

    The individual's render through the autoencoder, against another's in the same pose and place.
    """
    seeds = sorted(set(store.seeds("model", "same individual")) & set(store.seeds("model", "other individual")))
    if len(seeds) < 10:
        raise SystemExit(f"{store.folder} has {len(seeds)} pairs to set thresholds by; run the section `model` first")
    errors: dict[str, tuple[list[float], list[float]]] = {"real": ([], []), "synthesis": ([], [])}
    for seed in seeds:
        who, pose, truth, _ = calibration_pair(seed, subject, size)
        mask = who.mask(pose, size)
        before, after = (usual_regions(subject, p, who.scene.facing, size)[0] for p in (who.source_pose, pose))
        source = who.picture(who.source_pose, size)
        for side, name in enumerate(("same individual", "other individual")):
            picture = store.load("model", name, seed)[0]
            errors["real"][side].append(appearance_error(picture, truth, mask))
            errors["synthesis"][side].append(palette_distance(source[before], picture[after]))
    return {name: Threshold(*equal_error(same, other), len(seeds)) for name, (same, other) in errors.items()}


def outcomes(
    store: Store, classifier: PoseClassifier, section: str, method: str, subject: str, threshold: Threshold
) -> list[Outcome]:
    """Every stored case of a method."""
    found = []
    for seed in store.seeds(section, method):
        who, pictures = Individual.draw(seed, subject), store.load(section, method, seed)
        for pose, picture in zip(who.target_poses, pictures[1:], strict=True):
            if section == "synthesis":
                measures = against_source(classifier, who, pose, pictures[0], picture)
            else:
                measures = against_truth(classifier, who, pose, picture)
            found.append(Outcome(seed, pose, measures, threshold.value))
    return found


def summarise(section: str, method: str, cases: Sequence[Outcome]) -> Row:
    """A table's row: each figure with its interval."""
    seeds = [case.seed for case in cases]
    row: Row = {"section": section, "method": method, "cases": len(cases), "individuals": len(set(seeds))}
    for name in SHARES:
        hits = [case.shares[name] for case in cases]
        low, high = share_interval(hits, seeds)
        row |= {name: sum(hits) / len(hits), f"{name} low": low, f"{name} high": high}
    for name in MEANS:
        values = [getattr(case.measures, name) for case in cases]
        if not np.isnan(values).any():
            low, high = clustered(values, seeds)
            row |= {name: float(np.mean(values)), f"{name} low": low, f"{name} high": high}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def model_rows(store: Store, classifier: PoseClassifier, subject: str, size: int) -> list[Row]:
    """What the model itself can do, as far as it has been run."""
    rows: list[Row] = []

    def right(picture: np.ndarray, who: Individual) -> tuple[float, float]:
        shown, facing = judge(classifier, picture, subject)
        return float(shown == who.source_pose), float(facing == who.scene.facing)

    def add(figure: str, values: Sequence[float], seeds: Sequence[int], share: bool) -> None:
        if values:
            low, high = share_interval([v > 0 for v in values], seeds) if share else clustered(values, seeds)
            rows.append({"figure": figure, "n": len(values), "value": round(float(np.mean(values)), 4),
                         "low": round(low, 4), "high": round(high, 4)})  # fmt: skip

    for name, what in (
        ("text to image", "text to image"),
        ("round trip", "classifier, renders through the autoencoder"),
    ):
        seeds = store.seeds("model", name)
        people = [Individual.draw(seed, subject) for seed in seeds]
        verdicts = [right(store.load("model", name, who.seed)[0], who) for who in people]
        add(f"{what}: pose", [v[0] for v in verdicts], seeds, True)
        add(f"{what}: direction", [v[1] for v in verdicts], seeds, True)
    seeds = store.seeds("model", "round trip")
    people = [Individual.draw(seed, subject) for seed in seeds]
    verdicts = [right(who.picture(who.source_pose, size), who) for who in people]
    add("classifier, renders: pose", [v[0] for v in verdicts], seeds, True)
    add("classifier, renders: direction", [v[1] for v in verdicts], seeds, True)

    def fidelity(figure: str, section: str, method: str) -> None:
        done = store.seeds(section, method)
        who = [Individual.draw(seed, subject) for seed in done]
        values = [psnr(store.load(section, method, w.seed)[0], w.picture(w.source_pose, size)) for w in who]
        add(figure, values, done, False)

    fidelity("autoencoder, PSNR in dB", "model", "round trip")
    fidelity("inversion and reconstruction, no guidance, PSNR in dB", "model", "reconstruction")
    for method in store.methods("real"):
        if method.startswith("MasaCtrl") and method.count(",") <= 1:
            kind = "free" if method.endswith("free source") else "pinned"
            if method.endswith("free source") or "," not in method:
                fidelity(f"reconstruction beside guided edits, {kind} source ({method}), PSNR in dB", "real", method)
    return rows


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table for people; columns: heading by field. A field with an interval carries it."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name, "")
            if isinstance(value, float) and f"{name} low" in row:
                digits = 1 if name in ("appearance", "appearance_as_seen", "background", "psnr") else 2
                value = f"{value:.{digits}f} ({row[f'{name} low']:.{digits}f} to {row[f'{name} high']:.{digits}f})"
            cells.append(str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_cases(path: Path, measured: Mapping[tuple[str, str], Sequence[Outcome]]) -> None:
    """Every case, one line each."""
    rows: list[Row] = []
    for (section, method), cases in measured.items():
        for case in cases:
            row: Row = {"section": section, "method": method, "seed": case.seed, "target": case.target}
            rows.append(row | asdict(case.measures) | case.shares)
    write_csv(path, rows)


def ordered(stored: Sequence[str], order: Sequence[str]) -> list[str]:
    """Stored names in the wanted order, those that nobody ordered last."""
    return [name for name in order if name in stored] + [name for name in stored if name not in order]


EDIT_COLUMNS = {
    "method": "method", "cases": "cases", "pose": "pose", "facing": "direction",
    "appearance right": "appearance right", "both right": "both right",
    "both right as seen": "both right, direction as seen", "appearance": "appearance error",
    "appearance_as_seen": "appearance error, direction as seen",
    "psnr": "subject PSNR", "ssim": "subject SSIM", "background": "background error",
}  # fmt: skip
PAIR_COLUMNS = {name: title for name, title in EDIT_COLUMNS.items() if name not in ("psnr", "ssim")}
MODEL_COLUMNS = {"figure": "figure", "n": "n", "value": "value", "low": "from", "high": "to"}


def report(
    store: Store, classifier: PoseClassifier, orders: Mapping[str, Sequence[str]], out: Path
) -> tuple[str, dict[tuple[str, str], list[Outcome]]]:
    """Measures everything stored, writes tables to `out`; returns the text and the outcomes.

    orders: by section, the methods in the order of the table's rows.
    """
    known = store.about
    subject, size = str(known["subject"]), int(known["image_size"])
    limits = thresholds(store, subject, size)
    measured = {
        (section, method): outcomes(
            store, classifier, section, method, subject, limits["synthesis" if section == "synthesis" else "real"]
        )
        for section in ("real", "synthesis", "sweep")
        for method in ordered(store.methods(section), orders.get(section, ()))
    }
    rows = [summarise(section, method, cases) for (section, method), cases in measured.items()]
    model = model_rows(store, classifier, subject, size)
    write_csv(out / "ground_truth_model.csv", model)
    write_csv(out / "ground_truth_editing.csv", [row for row in rows if row["section"] != "sweep"])
    write_cases(store.folder / "cases.csv", measured)
    versions = {"masa": masa.__version__, "torch": torch.__version__, "python": platform.python_version()}
    settings = {**known, **versions, "thresholds": {name: asdict(limit) for name, limit in limits.items()}}
    text = _text(known, limits, model, rows)
    for suffix, content in ((".json", json.dumps(settings, indent=2) + "\n"), (".md", text)):
        with replacing(out / f"ground_truth_editing{suffix}") as temporary:
            temporary.write_text(content)
    return text, measured


def _text(
    known: Mapping[str, str | int | float], limits: Mapping[str, Threshold], model: list[Row], rows: list[Row]
) -> str:
    def explain(limit: Threshold) -> str:
        return (
            f"{limit.value:.1f} (of {limit.pairs} pairs of renders through the autoencoder it refuses "
            f"{limit.same_refused:.1%} of the same individual and accepts {limit.other_accepted:.1%} of others)"
        )

    parts = [
        "# Non-rigid edits against their exact truth\n",
        f"{known['checkpoint']} model {known['fingerprint']}, {known['image_size']}x{known['image_size']}, "
        f"{known['steps']} steps, guidance {known['guidance_scale']}. In brackets 95% intervals: of means a bootstrap "
        "over individuals, whose three edits share a source; of shares the wider of that and Wilson's.\n",
        "An appearance is right where its error is below the equal error rate's threshold: "
        f"edits of pictures {explain(limits['real'])}; synthesised pairs {explain(limits['synthesis'])}.\n",
        "The prompts name the direction, which the model may or may not obey. Appearance and both right are against "
        'the truth as captioned; "direction as seen" is against the truth that faces where the classifier sees the '
        "edit face, at the same threshold. Blended Latent Diffusion is given the renderer's true mask of each edit, "
        "source and target subject together: better than any user's.\n",
        "## The model\n",
        markdown(model, MODEL_COLUMNS),
    ]
    for section, title, columns in (
        ("real", "Edits of rendered pictures", EDIT_COLUMNS),
        ("synthesis", "Synthesised pairs", PAIR_COLUMNS),
    ):
        chosen = [row for row in rows if row["section"] == section]
        if chosen:
            parts += [f"## {title}\n", markdown(chosen, columns)]
    return "\n".join(parts)
