"""Non-rigid edits against their exact truth: the same individual and place, rendered in the target pose.

    python benchmarks/ground_truth_editing.py model sweep report --workers 2       # choose S and L
    python benchmarks/ground_truth_editing.py real synthesis report --workers 2 -S 2 -L 8
    python benchmarks/ground_truth_editing.py real --methods further --dry-run     # what would it cost?

Sections, done in the order given: `model` (what the model itself can do, and the thresholds), `real` (render, invert,
edit, compare with the truth), `synthesis` (source and targets from one noise), `sweep` (S x L on other individuals),
`report` (tables and pictures of what there is). Pictures are kept under runs/: a second call goes on.
"""

import argparse
import time
from pathlib import Path

from ground_truth.figures import write_grid, write_sweep
from ground_truth.methods import (
    PAPER_STEPS,
    VARIANTS,
    Method,
    Settings,
    core_methods,
    further_methods,
    real_methods,
    slow_methods,
    sweep_methods,
    synthesis_methods,
)
from ground_truth.report import ordered, report
from ground_truth.runs import Store, Work, about, estimate, missing, missing_of_model, run, speed

import masa
from masa.weights.demo.pose_classifier import load_pose_classifier

HERE = Path(__file__).parent
SECTIONS = ("model", "sweep", "real", "synthesis", "report")
GROUPS = {"core": core_methods, "further": further_methods, "slow": slow_methods, "all": real_methods}
VARIANT_NAMES = {variant.strip(", ").split(" ")[0] or "pinned": variant for variant in VARIANTS}


def arguments() -> argparse.Namespace:
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
    parser.add_argument("--individuals", type=int, default=67, help="each is edited to its three other poses")
    parser.add_argument("--prompts", type=int, default=201, help="of section model")
    parser.add_argument("--reconstructions", type=int, default=48, help="of section model")
    parser.add_argument("--methods", default="core", help=f"comma-separated: {', '.join(GROUPS)}, or names")
    parser.add_argument("--sweep-individuals", type=int, default=16)
    parser.add_argument("--sweep-starts", type=int, nargs="+", default=[0, 4, 8, 16, 28], help="S, of 50 steps")
    parser.add_argument("--sweep-layers", type=int, nargs="+", default=[4, 8, 10, 12, 14])
    parser.add_argument("--sweep-variants", nargs="+", choices=VARIANT_NAMES, default=["pinned"])
    parser.add_argument("--grid-cases", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after that")
    parser.add_argument("--dry-run", action="store_true", help="print the costs and stop")
    return parser.parse_args()


def chosen_methods(asked: str, settings: Settings, subject: str) -> dict[str, Method]:
    """Groups and names, separated by semicolons or commas -> methods. SystemExit for others."""
    known = real_methods(settings, subject)
    found: dict[str, Method] = {}
    # Names hold commas: one name alone is taken whole.
    parts = [asked] if asked in known else asked.split(";" if ";" in asked else ",")
    for name in map(str.strip, parts):
        if name in GROUPS:
            found |= GROUPS[name](settings, subject)
        elif name in known:
            found[name] = known[name]
        else:
            raise SystemExit(
                f"no method {name!r}; there are {', '.join(GROUPS)}; or, separated by ';': {'; '.join(known)}"
            )
    return found


def main() -> None:
    args = arguments()
    scaled = Settings(args.steps, args.guidance, 0, 0).paper_start
    settings = Settings(
        args.steps, args.guidance, scaled if args.start_step is None else args.start_step, args.start_layer
    )
    store, subject = Store(args.run), args.subject
    methods = chosen_methods(args.methods, settings, subject)
    starts = sorted({round(start * args.steps / PAPER_STEPS) for start in args.sweep_starts})
    cells = sweep_methods(subject, starts, args.sweep_layers, [VARIANT_NAMES[name] for name in args.sweep_variants])
    tasks = []
    for section in args.sections:
        if section == "model":
            tasks += missing_of_model(store, args.prompts, args.reconstructions)
        elif section == "sweep":
            tasks += missing(store, "sweep", cells, args.sweep_individuals)
        elif section != "report":
            pairs = synthesis_methods(settings, subject)
            fit = methods if section == "real" else {name: m for name, m in methods.items() if name in pairs}
            tasks += missing(store, section, fit, args.individuals)
    if tasks:
        sd = masa.load(args.checkpoint, device="cpu", progress=False)
        print(estimate(tasks, settings, speed(sd), args.workers), flush=True)
        if args.dry_run:
            return
        store.claim(about(sd, settings, subject))
        del sd
        deadline = time.time() + 60 * args.minutes
        run(tasks, Work(args.checkpoint, store, settings, subject, deadline), args.workers)
    if "report" in args.sections and not args.dry_run:
        write_report(args, store, settings)


def write_report(args: argparse.Namespace, store: Store, settings: Settings) -> None:
    """Tables, grids and heat maps of what the folder holds."""
    if not store.about:
        raise SystemExit(f"{store.folder} holds no pictures; run the sections first")
    args.out.mkdir(parents=True, exist_ok=True)
    order = list(real_methods(settings, args.subject))
    orders = {"real": order, "synthesis": order, "sweep": []}
    text, measured = report(store, load_pose_classifier(), orders, args.out)
    print(text)
    for section in ("real", "synthesis"):
        columns = ordered(store.methods(section), order)
        if columns:
            path = args.out / f"ground_truth_{section}.png"
            write_grid(path, store, section, columns, measured, args.grid_cases)
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


if __name__ == "__main__":
    main()
