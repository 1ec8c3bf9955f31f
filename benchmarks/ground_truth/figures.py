"""The picture grid and the S x L heat maps; needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .cases import Individual
from .report import Outcome, Row, summarise, write_csv
from .runs import Store

CELL = re.compile(r"MasaCtrl S=(\d+) L=(\d+)(.*)")
PANELS = (("pose", "pose right"), ("appearance", "appearance error, of 255"), ("both right", "both right"))


def write_grid(
    path: Path,
    store: Store,
    section: str,
    methods: Sequence[str],
    outcomes: Mapping[tuple[str, str], Sequence[Outcome]],
    cases: int,
) -> None:
    """A row per case and a column per method, beside source and truth; a frame says what was right.

    Cases are the first individuals that every method has done, each with another of its targets.
    """
    subject, size = str(store.about["subject"]), int(store.about["image_size"])
    shared = sorted(set.intersection(*(set(store.seeds(section, method)) for method in methods)))[:cases]
    given = ["source", "truth"] if section == "real" else []
    figure = Figure(figsize=(1.15 * (len(given) + len(methods)), 1.3 * len(shared) + 0.6), layout="constrained")
    axes = figure.subplots(len(shared), len(given) + len(methods), squeeze=False)
    for i, seed in enumerate(shared):
        who = Individual.draw(seed, subject)
        k = i % len(who.target_poses)
        pictures = [who.picture(pose, size) for pose in (who.source_pose, who.target_poses[k])] if given else []
        pictures += [store.load(section, method, seed)[1 + k] for method in methods]
        for axis, picture, name in zip(axes[i], pictures, [*given, *methods], strict=True):
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
    figure.savefig(path, dpi=130)


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
    figure.savefig(stem.with_suffix(".png"), dpi=110)
    return rows
