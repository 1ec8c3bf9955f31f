"""Non-rigid edits against their exact truth: the same individual and place, rendered in the target pose.

    python benchmarks/ground_truth_editing.py model sweep report --workers 2       # choose S and L
    python benchmarks/ground_truth_editing.py real synthesis report --workers 2 -S 2 -L 8
    python benchmarks/ground_truth_editing.py real --methods null-text --dry-run   # what would it cost?

Sections, done in the order given: `model` (what the model itself can do, and the thresholds), `real` (render, invert,
edit, compare with the truth), `synthesis` (source and targets from one noise), `sweep` (S x L on other individuals),
`report` (tables and pictures of what there is). Pictures are kept under runs/: a second call goes on.
Methods come in groups with numbers of individuals of their own: `--individuals core=67 null-text=4`.
"""

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ground_truth.figures import write_curves, write_grid, write_sweep
from ground_truth.methods import (
    GROUPS,
    PAPER_STEPS,
    VARIANTS,
    Method,
    Settings,
    fits_pairs,
    real_methods,
    sweep_methods,
)
from ground_truth.report import ordered, report
from ground_truth.runs import Store, Task, Work, about, estimate, missing, missing_of_model, run, speed

import masa
from masa.weights.demo.pose_classifier import load_pose_classifier
from masa.weights.demo.world import POSES

HERE = Path(__file__).parent
SECTIONS = ("model", "sweep", "real", "synthesis", "report")
VARIANT_NAMES = {variant.strip(", ").split(" ")[0] or "pinned": variant for variant in VARIANTS}
LAYERS = 16  # transformer blocks of Stable Diffusion v1


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("-c", "--checkpoint", help="default: the embedded demo model")
    parser.add_argument(
        "--run", type=Path, default=HERE.parent / "runs" / "ground_truth", help="where pictures are kept"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where tables and figures go")
    parser.add_argument("--subject", default="cat")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("-S", "--start-step", type=int, help="MasaCtrl's; default 4 of 50, scaled to the steps")
    parser.add_argument("-L", "--start-layer", type=int, default=10)
    parser.add_argument("--individuals", nargs="+", default=[], help=_numbers_help("each edited to its other poses"))
    parser.add_argument("--pairs", nargs="+", default=[], help=_numbers_help("the same of section synthesis"))
    parser.add_argument("--prompts", type=int, default=201, help="of section model")
    parser.add_argument("--reconstructions", type=int, default=48, help="of section model")
    parser.add_argument("--methods", default="all", help=f"all, or some of {', '.join(GROUPS)} and of their names")
    parser.add_argument("--sweep-individuals", type=int, default=16)
    parser.add_argument("--sweep-starts", type=int, nargs="+", default=[0, 4, 8, 16, 28], help="S, of 50 steps")
    parser.add_argument("--sweep-layers", type=int, nargs="+", default=[4, 8, 10, 12, 14])
    parser.add_argument("--sweep-variants", nargs="+", choices=VARIANT_NAMES, default=["pinned"])
    parser.add_argument("--grid-cases", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after that")
    parser.add_argument("--dry-run", action="store_true", help="print the costs and stop")
    args = parser.parse_args(given)
    wrong = list(complaints(args))
    if wrong:
        parser.error("; ".join(wrong))
    return args


def _numbers_help(what: str) -> str:
    return f"{what}: a number, or group=number, by default " + " ".join(
        f"{name}={group.pairs if 'synthesis' in what else group.individuals}" for name, group in GROUPS.items()
    )


def complaints(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the arguments, each with what was expected."""
    if args.subject not in POSES:
        yield f"--subject is {args.subject!r}; expected one of {', '.join(POSES)}"
    least = {"steps": 1, "prompts": 0, "reconstructions": 0, "sweep_individuals": 0, "grid_cases": 1, "workers": 1}
    for name, lowest in least.items():
        if getattr(args, name) < lowest:
            yield f"--{name.replace('_', '-')} is {getattr(args, name)}; expected {lowest} or more"
    if not 0 <= args.guidance < float("inf"):
        yield f"--guidance is {args.guidance}; expected a number, 0 or more"
    if not args.minutes > 0:
        yield f"--minutes is {args.minutes}; expected more than 0"
    if args.start_step is not None and not 0 <= args.start_step < args.steps:
        yield f"--start-step is {args.start_step}; expected 0 to {args.steps - 1}, as there are {args.steps} steps"
    for start in args.sweep_starts:
        if not 0 <= round(start * args.steps / PAPER_STEPS) < args.steps:
            yield f"--sweep-starts holds {start}; expected steps of {PAPER_STEPS}, scaled to a step of {args.steps}"
    for layer in (args.start_layer, *args.sweep_layers):
        if not 0 <= layer < LAYERS:
            yield f"a first layer is {layer}; expected 0 to {LAYERS - 1}"
    for option in ("individuals", "pairs"):
        try:
            numbers(getattr(args, option), {})
        except ValueError as error:
            yield f"--{option}: {error}"


def numbers(asked: Sequence[str], usual: dict[str, int]) -> dict[str, int]:
    """By group: "67" for all, "core=67" for one, over the usual ones; the later word counts. ValueError else."""
    found = dict(usual)
    for word in asked:
        parts = re.fullmatch(r"(?:([\w-]+)=)?(\d+)", word)
        if not parts or parts[1] not in (None, *GROUPS):
            raise ValueError(f"{word!r} is no number and no group=number; the groups are {', '.join(GROUPS)}")
        found |= dict.fromkeys(GROUPS if parts[1] is None else [parts[1]], int(parts[2]))
    return found


@dataclass(frozen=True)
class Chosen:
    """The methods asked for, and which group each is of."""

    methods: dict[str, Method]
    groups: dict[str, str]

    def counts(self, by_group: dict[str, int]) -> dict[str, int]:
        return {name: by_group[self.groups[name]] for name in self.methods}


def choose(asked: str, settings: Settings, subject: str) -> Chosen:
    """ "all", or groups and names, separated by semicolons or commas. SystemExit for others."""
    by_group = {name: group.methods(settings, subject) for name, group in GROUPS.items()}
    groups = {name: group for group, methods in by_group.items() for name in methods}
    known = real_methods(settings, subject)
    # Names hold commas: one name alone is taken whole.
    parts = [asked] if asked in known else asked.split(";" if ";" in asked else ",")
    found: dict[str, Method] = {}
    for name in map(str.strip, parts):
        if name == "all":
            found |= known
        elif name in by_group:
            found |= by_group[name]
        elif name in known:
            found[name] = known[name]
        else:
            raise SystemExit(
                f"no method {name!r}; there are all, {', '.join(GROUPS)}; or, separated by ';': {'; '.join(known)}"
            )
    return Chosen(found, groups)


def plan(args: argparse.Namespace, store: Store, settings: Settings) -> list[Task]:
    """What the sections asked for still miss, in their order."""
    chosen = choose(args.methods, settings, args.subject)
    tasks: list[Task] = []
    for section in args.sections:
        if section == "model":
            tasks += missing_of_model(store, args.prompts, args.reconstructions)
        elif section == "sweep":
            starts = sorted({round(start * args.steps / PAPER_STEPS) for start in args.sweep_starts})
            variants = [VARIANT_NAMES[name] for name in args.sweep_variants]
            cells = sweep_methods(args.subject, starts, args.sweep_layers, variants)
            tasks += missing(store, section, cells, dict.fromkeys(cells, args.sweep_individuals))
        elif section == "real":
            usual = {name: group.individuals for name, group in GROUPS.items()}
            tasks += missing(store, section, chosen.methods, chosen.counts(numbers(args.individuals, usual)))
        elif section == "synthesis":
            usual = {name: group.pairs for name, group in GROUPS.items()}
            fit = {name: method for name, method in chosen.methods.items() if fits_pairs(method)}
            tasks += missing(store, section, fit, chosen.counts(numbers(args.pairs, usual)))
    return tasks


def main() -> None:
    args = arguments()
    scaled = Settings(args.steps, args.guidance, 0, 0).paper_start
    settings = Settings(
        args.steps, args.guidance, scaled if args.start_step is None else args.start_step, args.start_layer
    )
    store = Store(args.run)
    try:
        tasks = plan(args, store, settings)
        if tasks:
            sd = masa.load(args.checkpoint, device="cpu", progress=False)
            print(estimate(tasks, settings, speed(sd), args.workers), flush=True)
            if args.dry_run:
                return
            store.claim(about(sd, settings, args.subject))
            del sd
            deadline = time.time() + 60 * args.minutes
            run(tasks, Work(args.checkpoint, store, settings, args.subject, deadline), args.workers)
        if "report" in args.sections and not args.dry_run:
            write_report(args, store, settings)
    except (masa.MasaError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


def write_report(args: argparse.Namespace, store: Store, settings: Settings) -> None:
    """Tables, grids and heat maps of what the folder holds."""
    if not store.about:
        raise SystemExit(f"{store.folder} holds no pictures; run the sections first")
    order = list(real_methods(settings, args.subject))
    orders = {"real": order, "synthesis": order, "sweep": []}
    text, measured = report(store, load_pose_classifier(), orders, args.out)
    print(text)
    for section in ("real", "synthesis"):
        stored = ordered(store.methods(section), order)
        for suffix, columns in grids(stored, settings, args.subject).items():
            path = args.out / f"ground_truth_{section}{suffix}.png"
            write_grid(path, store, section, columns, measured, args.grid_cases)
        write_curves(args.out / f"ground_truth_thresholds_{section}", section, measured)
    known = store.about
    title = (
        f"MasaCtrl's S and L, edits of rendered pictures, {known['steps']} steps, guidance {known['guidance_scale']}"
    )
    for row in write_sweep(args.out / "ground_truth_sweep", measured, title)[:8]:
        interval = f"({row['both right low']:.2f} to {row['both right high']:.2f})"
        print(
            f"{row['method']:32} both right {row['both right']:.2f} {interval}, pose {row['pose']:.2f}, "
            f"appearance error {row['appearance']:.1f}"
        )


def grids(stored: Sequence[str], settings: Settings, subject: str) -> dict[str, list[str]]:
    """The stored methods by picture grid, of which the first has no suffix: the core, the rest, the inversions."""
    groups = {name: group.methods(settings, subject) for name, group in GROUPS.items()}
    inverted = groups["inversions"] | groups["null-text"]
    parts: dict[str, list[str]] = {"": [], "_further": [], "_inversions": []}
    for name in stored:
        parts["" if name in groups["core"] else "_inversions" if name in inverted else "_further"].append(name)
    return {suffix: names for suffix, names in parts.items() if names}


if __name__ == "__main__":
    main()
