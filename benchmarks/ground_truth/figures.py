"""Picture grids, threshold curves and the S x L heat maps; needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from masa.io.files import replacing

from .cases import Individual
from .report import Outcome, Row, both_right, summarise, write_csv
from .runs import Store

CELL = re.compile(r"MasaCtrl S=(\d+) L=(\d+)(.*)")
CURVE_STEP, CURVE_END = 0.5, 60.0  # appearance errors, of 255
STYLES = ("-", "--", ":")
PANELS = (("pose", "pose right"), ("appearance", "appearance error, of 255"), ("both right", "both right"))


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Under a temporary name first, so that no picture is ever half written."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def write_grid(
    path: Path,
    store: Store,
    section: str,
    methods: Sequence[str],
    outcomes: Mapping[tuple[str, str], Sequence[Outcome]],
    cases: int,
) -> None:
    """A row per case and a column per method, beside source and truth; a frame says what was right.

    Cases are the first of the individuals that most methods have done, each with another of its targets. A cell is
    empty where a method has not done that individual. Writes nothing where nothing is done.
    """
    subject, size = str(store.about["subject"]), int(store.about["image_size"])
    done = {method: set(store.seeds(section, method)) for method in methods}
    anywhere = sorted(set().union(*done.values()))
    shared = sorted(sorted(anywhere, key=lambda seed: -sum(seed in seeds for seeds in done.values()))[:cases])
    if not shared:
        return
    given = ["source", "truth"] if section == "real" else []
    figure = Figure(figsize=(1.15 * (len(given) + len(methods)), 1.3 * len(shared) + 0.6), layout="constrained")
    axes = figure.subplots(len(shared), len(given) + len(methods), squeeze=False)
    for i, seed in enumerate(shared):
        who = Individual.draw(seed, subject)
        k = i % len(who.target_poses)
        pictures: list[np.ndarray | None] = [
            who.picture(pose, size) for pose in (who.source_pose, who.target_poses[k]) if given
        ]
        pictures += [store.load(section, m, seed)[1 + k] if seed in done[m] else None for m in methods]
        for axis, picture, name in zip(axes[i], pictures, [*given, *methods], strict=True):
            if picture is not None:
                axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_title("\n".join(textwrap.wrap(name.replace("=", " "), 13)), fontsize=7)
            right = [
                o.shares for o in outcomes.get((section, name), ()) if (o.seed, o.target) == (seed, who.target_poses[k])
            ]
            colour = "black" if not right else ("tab:green" if right[0]["both right"] else "tab:red")
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2 if right else 0.5)
        axes[i][0].set_ylabel(f"{who.source_pose}\nto {who.target_poses[k]}", fontsize=7)
    if section == "synthesis":
        figure.suptitle("targets; each method's source is the same", fontsize=7)
    save(figure, path, 130)


def write_curves(stem: Path, section: str, outcomes: Mapping[tuple[str, str], Sequence[Outcome]]) -> list[Row]:
    """The share of "both right" by the appearance error that still counts as right, as `stem`.png and .csv.

    One line per method of the section, one panel per truth: facing as captioned, and as the edit is seen to face.
    The equal error rate's threshold, which the tables use, is a point of the lines and marked. Writes nothing
    where the section is empty.
    """
    measured = {method: cases for (at, method), cases in outcomes.items() if at == section and cases}
    if not measured:
        return []
    limit = next(iter(measured.values()))[0].threshold
    at = np.unique([*np.arange(0.0, CURVE_END + CURVE_STEP / 2, CURVE_STEP), limit])
    figure = Figure(figsize=(13.0, 0.5 + max(5.0, 0.19 * len(measured))), layout="constrained")
    rows: list[Row] = []
    for axis, as_seen in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        truth = "direction as seen" if as_seen else "as captioned"
        for k, (method, cases) in enumerate(measured.items()):
            shares = [float(np.mean([both_right(c.measures, t, as_seen) for c in cases])) for t in at]
            axis.plot(
                at, shares, label=f"{method} ({len(cases)})", color=colormaps["tab10"](k % 10),
                linestyle=STYLES[k // 10 % len(STYLES)], linewidth=1.2,
            )  # fmt: skip
            rows += [
                {"section": section, "method": method, "cases": len(cases), "truth": truth,
                 "threshold": round(float(t), 4), "equal error": int(t == limit), "both right": round(share, 4)}
                for t, share in zip(at, shares, strict=True)
            ]  # fmt: skip
        axis.axvline(limit, color="black", linewidth=0.8)
        axis.annotate(f" equal errors: {limit:.1f}", (limit, 1.0), fontsize=8, va="bottom")
        axis.set(xlabel="appearance error that still counts as right, of 255", xlim=(0, CURVE_END), ylim=(0, 1.05))
        axis.set_title(f"truth {truth}", fontsize=10, pad=14)
        axis.grid(alpha=0.3)
    axis.figure.axes[0].set_ylabel("share of edits right in pose and appearance")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, title="method (cases)", title_fontsize=7)
    save(figure, stem.with_suffix(".png"), 110)
    write_csv(stem.with_suffix(".csv"), rows)
    return rows


def write_sweep(stem: Path, outcomes: Mapping[tuple[str, str], Sequence[Outcome]], title: str) -> list[Row]:
    """Heat maps of S by L as `stem`.png, a row for every variant, and the figures as `stem`.csv, best first."""
    rows: list[Row] = []
    variants: dict[str, dict[tuple[int, int], Row]] = {}
    for (section, method), cases in outcomes.items():
        cell = CELL.fullmatch(method)
        if section == "sweep" and cell and cases:
            S, L, variant = int(cell[1]), int(cell[2]), cell[3].strip(", ") or "pinned source"
            row = {"S": S, "L": L, "variant": variant} | summarise(section, method, cases)
            rows.append(row)
            variants.setdefault(variant, {})[S, L] = row
    if not rows:
        return rows
    rows.sort(key=lambda row: (-float(row["both right"]), float(row["appearance"])))
    write_csv(stem.with_suffix(".csv"), rows)
    figure = Figure(figsize=(3.6 * len(PANELS), 3.0 * len(variants) + 0.4), layout="constrained")
    axes = figure.subplots(len(variants), len(PANELS), squeeze=False)
    for line, (variant, cells) in zip(axes, variants.items(), strict=True):
        starts, layers = sorted({S for S, _ in cells}), sorted({L for _, L in cells})
        for axis, (name, label) in zip(line, PANELS, strict=True):
            table = np.array(
                [[float(cells[S, L][name]) if (S, L) in cells else np.nan for L in layers] for S in starts]
            )
            share = name != "appearance"
            axis.imshow(table, cmap="viridis" if share else "viridis_r", aspect="auto")
            axis.set_xticks(range(len(layers)), [f"{L}" for L in layers])
            axis.set_yticks(range(len(starts)), [f"{S}" for S in starts])
            axis.set(xlabel="first layer L", ylabel="first step S", title=f"{label}\n{variant}")
            middle = np.nanmean([np.nanmin(table), np.nanmax(table)])
            for (y, x), value in np.ndenumerate(table):
                if not np.isnan(value):
                    light = (value > middle) == share
                    text = f"{value:.2f}" if share else f"{value:.1f}"
                    axis.text(x, y, text, ha="center", va="center", color="black" if light else "white")
    figure.suptitle(title)
    save(figure, stem.with_suffix(".png"), 110)
    return rows
