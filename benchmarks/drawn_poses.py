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
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ground_truth.cases import CALIBRATION_SEEDS, TABLE_SEEDS, Individual
from ground_truth.drawn import drawn_cases, summarise_drawn
from ground_truth.methods import Drawing, Method, Settings, as_arrays, masactrl
from ground_truth.report import Row, markdown, thresholds, write_csv
from ground_truth.runs import Store, Task, about, make, missing
from tqdm import tqdm

import masa
from masa.controls.base import Control
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


def arguments() -> argparse.Namespace:
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
    parser.add_argument("--methods", nargs="+", default=[""], help="only those with one of these texts in their names")
    parser.add_argument("--individuals", type=int, default=67)
    parser.add_argument("--sweep-individuals", type=int, default=8)
    parser.add_argument("--sweep-weights", type=float, nargs="*", default=[0.5, 1.0, 1.5, 3.0])
    parser.add_argument("--sweep-taus", type=float, nargs="*", default=[0.4, 0.7])
    parser.add_argument("--sweep-starts", type=int, nargs="*", default=[0, 4, 8])
    parser.add_argument("--sweep-guidances", type=float, nargs="*", default=[1.5, 2.5, 7.5])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after that")
    return parser.parse_args()


def drawn(
    args: argparse.Namespace, guidance: float, worded: bool, weight: float | None = None, tau: float | None = None,
    start: int | None = None,
) -> tuple[str, Method]:  # fmt: skip
    """MasaCtrl with a drawing; what is None is as the arguments say. Its name holds every setting."""
    weight, tau = args.weight if weight is None else weight, args.tau if tau is None else tau
    name, plain = masactrl(args.subject, args.start_step if start is None else start, args.start_layer)
    said = "drawn and named" if worded else "drawn"
    method = replace(plain, drawing=Drawing(weight, tau), worded=worded, guidance_scale=guidance)
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


def sweep(sd: masa.StableDiffusion, args: argparse.Namespace, store: Store, settings: Settings) -> None:
    """Cell by cell, since a run has one S and one guidance."""
    cells = sweep_cells(args)
    count = dict.fromkeys(cells, args.sweep_individuals)
    tasks = [task for section in ("drawn sweep", "between sweep") for task in missing(store, section, cells, count)]
    for task in tqdm(sorted(tasks, key=lambda task: task.seed)):
        if time.time() < args.deadline:
            make(sd, store, settings, args.subject, task)


def table(sd: masa.StableDiffusion, args: argparse.Namespace, store: Store, settings: Settings) -> None:
    """Each individual's edits by all methods in one run: they share the source, and a target does not depend on others.

    Those asked for by --methods first; what they leave out may follow in a second call.
    """
    for seed in tqdm(range(TABLE_SEEDS, TABLE_SEEDS + args.individuals)):
        todo = [
            (section, name, method, Individual.draw(seed, args.subject, section == "between"))
            for section, methods in table_methods(args).items()
            for name, method in methods.items()
            if any(text in name for text in args.methods) and not store.path(section, name, seed).exists()
        ]
        if not todo or time.time() > args.deadline:
            continue
        prompts, sticks = [], []
        for _, _, method, who in todo:
            prompts += [who.prompt(pose if method.worded else None) for pose in who.target_poses]
            size = sd.config.image_size
            sticks += [who.stick(pose, size) if method.drawing else None for pose in who.target_poses]
        who = Individual.draw(seed, args.subject)
        source = who.picture(who.source_pose, sd.config.image_size)
        out = masa.sample(
            sd, target=prompts, controls=controls(args, sticks), guidance_scale=args.guidance, progress=False,
            trajectory=masa.invert(sd, source, who.source_prompt, steps=settings.steps, progress=False),
        )  # fmt: skip
        pictures, first = as_arrays(out.images), 1
        for section, name, _, who in todo:
            last = first + len(who.target_poses)
            store.save(section, name, seed, np.concatenate([pictures[:1], pictures[first:last]]))
            first = last


def controls(args: argparse.Namespace, sticks: Sequence[np.ndarray | None]) -> list[Control]:
    """MasaCtrl, and the adapter where anything is drawn."""
    name_and_method = masactrl(args.subject, args.start_step, args.start_layer)
    if all(stick is None for stick in sticks):
        return [*name_and_method[1].controls]
    return [*name_and_method[1].controls, masa.T2IAdapter("demo", target=sticks, weight=args.weight, tau=args.tau)]


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
        'subject and direction; "named" ones tell the pose too, of one between two the first of them.\n',
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
    args.deadline = time.time() + 60 * args.minutes
    torch.set_num_threads(1)
    settings = Settings(args.steps, args.guidance, args.start_step, args.start_layer)
    store = Store(args.run)
    if args.sections != ["report"]:
        sd = masa.load(args.checkpoint, device="cpu", progress=False)
        store.claim(about(sd, settings, args.subject))
        for section in args.sections:
            if section != "report":
                (sweep if section == "sweep" else table)(sd, args, store, settings)
        for task in calibration(store):
            make(sd, store, settings, args.subject, task)
    if "report" in args.sections:
        print(write_report(store, args.out))


if __name__ == "__main__":
    main()
