"""Poses by drawing on the demo model, against their exact truth: named ones, and ones that no prompt can name.

    python benchmarks/drawn_poses.py sweep report --minutes 20      # choose weight, tau, S and guidance
    python benchmarks/drawn_poses.py table report --weight 2 -S 2   # 67 individuals, six edits each

Sections: `sweep` (one setting varied at a time, on individuals of their own), `table` (three other named poses and the
three poses half way between these), `report`. Pictures are kept under runs/: a second call goes on. Measures are those
of ground_truth_editing.py; the pose of an edit between two is that of the nearest of 22 exact renders.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ground_truth.cases import CALIBRATION_SEEDS, SWEEP_SEEDS, TABLE_SEEDS, Individual
from ground_truth.drawn import drawn_cases, summarise_drawn
from ground_truth.methods import Drawing, Method, Settings, as_arrays, masactrl
from ground_truth.report import Row, markdown, thresholds, write_csv
from ground_truth.runs import Store, Task, about, make
from tqdm import tqdm

import masa
from masa.io.files import replacing
from masa.weights.demo.pose_classifier import load_pose_classifier

HERE = Path(__file__).parent
COLUMNS = {
    "method": "method", "cases": "cases", "pose": "pose right", "pose error": "pose error",
    "appearance right": "appearance right", "both right": "both right", "appearance": "appearance error",
    "psnr": "subject PSNR", "background": "background error",
}  # fmt: skip
TITLES = {
    "real": "Poses that prompts name",
    "between": "Poses half way between two, which no prompt names",
    "drawn sweep": "Sweep: poses that prompts name",
    "between sweep": "Sweep: poses half way between two",
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=("sweep", "table", "report"))
    parser.add_argument("-c", "--checkpoint", help="default: the embedded demo model")
    parser.add_argument(
        "--run", type=Path, default=HERE.parent / "runs" / "drawn_poses", help="where pictures are kept"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where tables go")
    parser.add_argument("--subject", default="cat")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("-S", "--start-step", type=int, default=2)
    parser.add_argument("-L", "--start-layer", type=int, default=6)
    parser.add_argument("--weight", type=float, default=2.0)
    parser.add_argument("--tau", type=float, default=1.0)
    parser.add_argument("--adapter", default="demo", help="another model's adapter of stick figures")
    parser.add_argument("--methods", nargs="+", default=[""], help="only those with one of these texts in their names")
    parser.add_argument("--individuals", type=int, default=67)
    parser.add_argument("--sweep-individuals", type=int, default=3)
    parser.add_argument("--sweep-weights", type=float, nargs="*", default=[1.0, 1.5, 3.0])
    parser.add_argument("--sweep-taus", type=float, nargs="*", default=[0.5])
    parser.add_argument("--sweep-starts", type=int, nargs="*", default=[0, 6])
    parser.add_argument("--sweep-guidances", type=float, nargs="*", default=[2.0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after that")
    return parser.parse_args(given)


def drawn(
    args: argparse.Namespace, guidance: float, worded: bool, weight: float | None = None, tau: float | None = None,
    start: int | None = None,
) -> tuple[str, Method]:  # fmt: skip
    """MasaCtrl with a drawing; what is None is as the arguments say. Its name holds every setting."""
    weight, tau = args.weight if weight is None else weight, args.tau if tau is None else tau
    name, plain = masactrl(args.subject, args.start_step if start is None else start, args.start_layer)
    said = "drawn and named" if worded else "drawn"
    method = replace(plain, drawing=Drawing(weight, tau, args.adapter), worded=worded, guidance_scale=guidance)
    return f"{name}, {said}, weight {weight:g}, tau {tau:g}, guidance {guidance:g}", method


def plain(args: argparse.Namespace, guidance: float) -> tuple[str, Method]:
    """MasaCtrl by the prompt alone."""
    name, method = masactrl(args.subject, args.start_step, args.start_layer)
    return f"{name}, named, guidance {guidance:g}", replace(method, guidance_scale=guidance)


def table_methods(args: argparse.Namespace) -> dict[str, dict[str, Method]]:
    """By section: the drawing alone, drawing and prompt, the prompt alone; no prompt names what lies between."""
    alone, both, prompt = (
        drawn(args, args.guidance, False),
        drawn(args, args.guidance, True),
        plain(args, args.guidance),
    )
    return {"real": dict([alone, both, prompt]), "between": dict([alone, prompt])}


def sweep_cells(args: argparse.Namespace) -> dict[str, Method]:
    """The arguments' setting, and each setting varied alone; and the prompt alone at every guidance."""
    base = args.guidance
    found = [plain(args, guidance) for guidance in (base, *args.sweep_guidances)]
    for worded in (False, True):
        found.append(drawn(args, base, worded))
        found += [drawn(args, base, worded, weight=weight) for weight in args.sweep_weights]
        found += [drawn(args, base, worded, tau=tau) for tau in args.sweep_taus]
        found += [drawn(args, base, worded, start=start) for start in args.sweep_starts]
        found += [drawn(args, guidance, worded) for guidance in args.sweep_guidances]
    return dict(found)


def calibration(store: Store, pairs: int = 201) -> list[Task]:
    """The pairs of renders through the autoencoder that set the threshold."""
    wanted = [(CALIBRATION_SEEDS + i, what) for i in range(pairs) for what in ("same individual", "other individual")]
    return [Task("model", s, {what: None}) for s, what in wanted if not store.path("model", what, s).exists()]


@dataclass(frozen=True)
class Edits:
    """One individual's edits by one method, to be stored under a section."""

    section: str
    name: str
    method: Method
    who: Individual


def still_missing(args: argparse.Namespace, store: Store, section: str, seed: int) -> list[Edits]:
    """What an individual still misses, of the methods asked for."""
    sweep = section == "sweep"
    cells = sweep_cells(args)
    by_section = {"drawn sweep": cells, "between sweep": cells} if sweep else table_methods(args)
    return [
        Edits(stored, name, method, Individual.draw(seed, args.subject, stored.startswith("between")))
        for stored, methods in by_section.items()
        for name, method in methods.items()
        if any(text in name for text in args.methods) and not store.path(stored, name, seed).exists()
    ]


def make_edits(sd: masa.StableDiffusion, store: Store, settings: Settings, todo: Sequence[Edits]) -> None:
    """One individual's: inverted once, and one run for all of equal MasaCtrl and guidance.

    They share the source, and a target among others is what it is alone.
    """
    size, who = sd.config.image_size, todo[0].who
    source = who.picture(who.source_pose, size)
    trajectory = masa.invert(sd, source, who.source_prompt, steps=settings.steps, progress=False)
    runs: dict[object, list[Edits]] = {}
    for edits in todo:
        runs.setdefault((edits.method.controls, edits.method.guidance_scale), []).append(edits)
    for together in runs.values():
        method = together[0].method
        prompts = [e.who.prompt(pose if e.method.worded else None) for e in together for pose in e.who.target_poses]
        out = masa.sample(
            sd, target=prompts, controls=[*method.controls, *adapters(together, size)], trajectory=trajectory,
            guidance_scale=method.guidance_scale, progress=False,
        )  # fmt: skip
        pictures, first = as_arrays(out.images), 1
        for edits in together:
            last = first + len(edits.who.target_poses)
            store.save(edits.section, edits.name, who.seed, np.concatenate([pictures[:1], pictures[first:last]]))
            first = last


def adapters(together: Sequence[Edits], size: int) -> list[masa.T2IAdapter]:
    """One adapter for each weight and tau, which sees the drawings of those targets alone."""
    found = []
    for drawing in dict.fromkeys(e.method.drawing for e in together if e.method.drawing is not None):
        sticks = [
            e.who.stick(pose, size) if e.method.drawing == drawing else None
            for e in together
            for pose in e.who.target_poses
        ]
        found.append(masa.T2IAdapter(drawing.adapter, target=sticks, weight=drawing.weight, tau=drawing.tau))
    return found


def write_report(store: Store, out: Path) -> str:
    """drawn_poses.md and .csv, of what there is."""
    known = store.about
    subject, size = str(known["subject"]), int(known["image_size"])
    limit = thresholds(store, subject, size)["real"]
    classifier = load_pose_classifier()
    rows: list[Row] = [
        summarise_drawn(section, method, drawn_cases(store, classifier, section, method, subject, limit))
        for section in TITLES
        for method in store.methods(section)
    ]
    write_csv(out / "drawn_poses.csv", rows)
    parts = [
        "# Poses by drawing\n",
        f"{known['checkpoint']} model {known['fingerprint']} with the shipped adapter, {known['image_size']}x"
        f"{known['image_size']}, {known['steps']} steps, inverted renders. In brackets 95% intervals, as in "
        "ground_truth_editing.md.\n",
        f"An appearance is right below an error of {limit.value:.1f}, the equal error rate's threshold. A named pose "
        "is right where the classifier sees it; one between two where the nearest of 22 exact renders is its own. The "
        "pose error is how far that render's joints are from the asked ones, of the subject's size. Prompts tell "
        'subject and direction; "named" ones tell the pose too, of one between two the first. The prompt alone, '
        "on the same individuals, is in ground_truth_editing.md: MasaCtrl S=2 L=6.\n",
    ]
    for section, title in TITLES.items():
        chosen = [row for row in rows if row["section"] == section]
        if chosen:
            parts += [f"## {title}\n", markdown(chosen, COLUMNS)]
    text = "\n".join(parts)
    with replacing(out / "drawn_poses.md") as temporary:
        temporary.write_text(text)
    settings = {**known, "masa": masa.__version__, "threshold": limit.value}
    with replacing(out / "drawn_poses.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
    return text


def main() -> None:
    args = arguments()
    deadline = time.time() + 60 * args.minutes
    torch.set_num_threads(1)
    settings = Settings(args.steps, args.guidance, args.start_step, args.start_layer)
    store = Store(args.run)
    if args.sections != ["report"]:
        sd = masa.load(args.checkpoint, device="cpu", progress=False)
        store.claim(about(sd, settings, args.subject))
        for section, first, count in (
            ("sweep", SWEEP_SEEDS, args.sweep_individuals),
            ("table", TABLE_SEEDS, args.individuals),
        ):
            for seed in tqdm(range(first, first + count), desc=section, disable=section not in args.sections):
                todo = still_missing(args, store, section, seed) if section in args.sections else []
                if todo and time.time() < deadline:
                    make_edits(sd, store, settings, todo)
        for task in calibration(store):
            make(sd, store, settings, args.subject, task)
    if "report" in args.sections:
        print(write_report(store, args.out))


if __name__ == "__main__":
    main()
