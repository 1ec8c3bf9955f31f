"""Scores of PIE-Bench, their means with intervals, and tables of them beside the published rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from masa.io.files import replacing
from masa.metrics.summary import Summary, summarise
from masa.workflows.piebench_layout import TYPES


@dataclass(frozen=True)
class Metric:
    """One column: its name in the published evaluator, its heading, what it is multiplied by, the network it needs."""

    name: str
    heading: str
    scale: float = 1.0
    network: str | None = None


METRICS = (
    Metric("structure_distance", "Distance×10³ ↓", 1e3, "dino"),
    Metric("psnr_unedit_part", "PSNR ↑"),
    Metric("lpips_unedit_part", "LPIPS×10³ ↓", 1e3, "lpips"),
    Metric("mse_unedit_part", "MSE×10⁴ ↓", 1e4),
    Metric("ssim_unedit_part", "SSIM×10² ↑", 1e2),
    Metric("clip_similarity_target_image", "CLIP whole ↑", 1.0, "clip"),
    Metric("clip_similarity_target_image_edit_part", "CLIP edited ↑", 1.0, "clip"),
    # Of values in [0, 1], which DINO was trained on; no published row has it.
    Metric("structure_distance_divided", "Distance of [0, 1]×10³ ↓", 1e3, "dino"),
)
BY_NAME = {metric.name: metric for metric in METRICS}

# In the order of METRICS and in their units, of all 700 pictures.
PUBLISHED: Mapping[str, tuple[float, ...]] = {
    "DDIM + MasaCtrl (SD 1.4)": (28.38, 22.17, 106.62, 86.97, 79.67, 23.96, 21.16),
    "pinned + MasaCtrl (SD 1.4)": (24.70, 22.64, 87.94, 81.09, 81.33, 24.38, 21.35),
    "pinned + PnP (SD 1.5)": (24.29, 22.46, 106.06, 80.45, 79.68, 25.41, 22.62),
    "pinned + P2P (SD 1.4)": (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10),
    "InfEdit (LCM Dreamshaper 7)": (13.78, 28.51, 47.58, 32.09, 85.66, 25.03, 22.22),
    "ViMAEdit (SD 1.5, IP-Adapter)": (12.43, 28.49, 44.39, 29.12, 86.38, 25.97, 22.85),
}
PUBLISHED_PICTURES = 700
NONE = "–"
TABLES = ("table.md", "table.csv", "scores.csv")


@dataclass(frozen=True)
class Row:
    """One picture's scores by metric, in plain units; NaN where a metric has no value, absent where not taken."""

    id: str
    type_id: str
    scores: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class PieBench:
    """What a run of the benchmark found.

    name: what was run. rows: of each picture. asked: how many edits there were to be. missing: metrics that could not
    be taken, and what to do about it. failed: edits that could not be made or measured, with the reason. folder: where
    the tables lie.
    """

    name: str
    rows: tuple[Row, ...]
    asked: int
    missing: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"PieBench({self.name!r}, {len(self.rows)} of {self.asked} pictures)"

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def summary(self, metric: str, type_id: str | None = None) -> Summary:
        """The mean of a metric with its 95 % interval, in the unit of the tables; type_id: of one editing type."""
        rows = [row for row in self.rows if type_id in (None, row.type_id)]
        scale = BY_NAME[metric].scale
        return summarise([scale * row.scores.get(metric, math.nan) for row in rows])

    @property
    def types(self) -> list[str]:
        """The editing types that were run."""
        return sorted({row.type_id for row in self.rows})

    def markdown(self) -> str:
        """The tables: all pictures beside the published rows, then by editing type; intervals are of 95 %."""
        headings = ["", "n", *(metric.heading for metric in METRICS)]
        own = [self.name, str(len(self.rows)), *(_with_interval(self.summary(m.name)) for m in METRICS)]
        published = [
            [name, str(PUBLISHED_PICTURES), *(f"{value:.2f}" for value in values), NONE]
            for name, values in PUBLISHED.items()
        ]
        lines = [*_table(headings, [own, *published]), ""]
        lines.append("The first row was run here: means with 95 % bootstrap intervals. The others are as published.")
        if len(self.types) > 1:
            by_type = [
                [
                    f"{t} {TYPES[t]}",
                    str(sum(row.type_id == t for row in self.rows)),
                    *(_with_interval(self.summary(m.name, t)) for m in METRICS),
                ]
                for t in self.types
            ]
            lines += ["", *_table(["editing type", *headings[1:]], by_type)]
        if self.missing:
            lines += ["", "Not measured:", "", *(f"- {line}" for line in explain(self.missing))]
        if self.failed:
            lines += ["", f"{len(self.failed)} of {self.asked} edits failed and are in no mean:", ""]
            lines += [f"- {id}: {why}" for id, why in self.failed.items()]
        return "\n".join(lines) + "\n"

    def table_csv(self) -> str:
        """One line a row, editing type and metric: in the tables' units, the published rows too."""
        lines: list[Sequence[object]] = [("row", "editing_type", "metric", "scale", "n", "mean", "low", "high")]
        for type_id in (None, *self.types):
            for metric in METRICS:
                found = self.summary(metric.name, type_id)
                place = (self.name, "all" if type_id is None else type_id, metric.name, f"{metric.scale:g}")
                lines.append((*place, found.n, *map(_number, (found.mean, found.low, found.high))))
        for name, values in PUBLISHED.items():
            for metric, value in zip(METRICS, values, strict=False):
                place = (f"published: {name}", "all", metric.name, f"{metric.scale:g}")
                lines.append((*place, PUBLISHED_PICTURES, value, "", ""))
        return _csv(lines)

    def scores_csv(self) -> str:
        """One line a picture, in plain units, with the published evaluator's names."""
        names = [metric.name for metric in METRICS]
        lines: list[Sequence[object]] = [("file_id", "editing_type_id", *names)]
        for row in self.rows:
            lines.append((row.id, row.type_id, *(_number(row.scores.get(name, math.nan)) for name in names)))
        return _csv(lines)

    def save(self, folder: str | Path) -> list[Path]:
        """Write table.md, table.csv and scores.csv, each whole or not at all. Returns their paths."""
        texts = dict(zip(TABLES, (self.markdown(), self.table_csv(), self.scores_csv()), strict=True))
        for name, text in texts.items():
            with replacing(Path(folder) / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return [Path(folder) / name for name in texts]


def explain(missing: Mapping[str, str]) -> list[str]:
    """Metrics that could not be taken, those with one reason together."""
    reasons = dict.fromkeys(missing.values())
    return [f"{', '.join(name for name, why in missing.items() if why == reason)}: {reason}" for reason in reasons]


def _with_interval(found: Summary) -> str:
    if not found.n:
        return NONE
    if math.isnan(found.low):
        return f"{found.mean:.2f}"
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _number(value: float) -> str:
    return "nan" if math.isnan(value) else repr(float(value))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown; bars in the cells are escaped."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (headings, *rows)]
    rule = ["---", *("---:" for _ in headings[1:])]
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
