"""Whole edits at full size against the published flow and against diffusers at its best, in one run.

    python benchmarks/random_checkpoint.py sd15 --layout diffusers          # once: 2 GB of random weights
    python benchmarks/bench_edit.py sd15                                    # on a GPU: every step is run
    python benchmarks/bench_edit.py sd15 --device cpu --threads 1           # one UNet call of each kind is run

A 512x512 photograph, 50 steps, guidance 7.5. With --steps N (default on a CPU: 1) the first N calls of each kind
(UNet rows, controlled or not; pictures through the VAE) are computed and the rest are counted: a run's time is each
kind's median times its calls, plus all that is really run around them. Each flow runs in a process of its own, one
at a time, the flows in turn; a ratio is of two flows of the same turn. With one thread the clock is the processor
time of the process, which other processes on the machine hardly change, else elapsed time.

Writes edit_<device>.csv (runs), edit_<device>_calls.csv (calls) and edit_<device>.md; with --profile also
profile_<device>.csv. What the same commit has left in the CSV, with the same settings on the same device, is not run
again; other lines go, and so do all lines of a tree with changes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import edit_report
import harness
from call_timer import CallTimer, Seconds, peak_mib, reset_peak
from edit_flows import CASES, FLOWS, Plan, photograph
from profile_unet import profile_call

from masa.pipeline import cpu_has_bf16

EDIT_STEPS = 50
NETWORKS = ("unet", "encoder", "decoder")


def plans(device: str, dtype: str | None) -> list[Plan]:
    """The flows of a turn: all on a GPU; on a CPU nothing compiled, the published flow in float32, masa in each dtype,
    and offloaded in float32, whose memory is compared with the published flow's.

    Without a warm-up, as on a CPU, the compiler's own time would count as a call's.
    """
    if device == "cuda":
        return [Plan(flow, dtype or "float16") for flow in FLOWS]
    best = dtype or ("bfloat16" if cpu_has_bf16() else "float32")
    chosen = [Plan("masa", best), Plan("published", "float32"), Plan("diffusers sdpa", best)]
    others = [] if best == "float32" else [Plan("masa", "float32")]
    return [*chosen, *others, Plan("masa offloaded", "float32")]


# ---------------------------------------------------------------------------------------- one flow, in its process


def run_flow(plan: Plan, arguments: argparse.Namespace, cases: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Lines of the result files: the cases, the calls behind them, and the profile where one is asked for."""
    device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = "cpu" if device == "cpu" and torch.get_num_threads() == 1 else "wall"
    reset_peak(device)
    flow = plan.build(arguments.checkpoint, device, arguments.edit_steps)
    loading = peak_mib(device)
    picture = photograph(arguments.size)
    context = {"flow": plan.flow, "dtype": plan.dtype, "pair": arguments.pair} | settings(arguments)

    def chosen(spent: Seconds) -> float:
        return round(getattr(spent, clock), 3)

    measured = arguments.steps
    runs, calls, parts = [], [], []
    with CallTimer(flow.probes(), measured, device) as timer:
        for name in cases:
            case = flow.case(name, picture)
            if measured is None:
                case()  # warm-up
            cost = timer.cost(case)
            line: dict[str, Any] = {"case": name, **context, "clock": clock}
            unet_calls = sum(count for kind, count in cost.calls.items() if kind.network == "unet")
            line |= {"unet_rows": cost.unet_rows, "unet_calls": unet_calls}
            line |= {"total_s": chosen(cost.total), "wall_s": round(cost.total.wall, 3)}
            line |= {f"{name}_s": chosen(cost.seconds[name]) if name in cost.seconds else "" for name in NETWORKS}
            line |= {"rest_s": chosen(cost.rest)}
            line |= {"peak_mib": round(cost.peak), "loading_peak_mib": round(loading)}
            runs.append(line)
        for kind, times in timer.times.items():
            for spent in times:
                spending = {"cpu_s": round(spent.cpu, 3), "wall_s": round(spent.wall, 3)}
                calls.append(context | asdict(kind) | spending | {"peak_mib": round(timer.peaks[kind])})
        if arguments.profile and plan.flow in arguments.profile:
            kind = max(
                (k for k in timer.times if k.network == "unet" and k.rows <= 4), key=lambda k: (k.edited, k.rows)
            )
            seconds = getattr(timer.typical(kind), clock)
            found = profile_call(timer.again[kind], seconds, getattr(torch, plan.dtype))
            parts = [context | asdict(kind) | part for part in found]
    return {"runs": runs, "calls": calls, "profile": parts}


# ---------------------------------------------------------------------------------------------------- all flows


def settings(arguments: argparse.Namespace) -> dict[str, int]:
    """What every line says of how it was measured, beside the device and the releases."""
    steps = arguments.edit_steps
    return {"size": arguments.size, "edit_steps": steps, "steps_measured": arguments.steps or steps}


def commit() -> str:
    """The commit, and whether anything but result files differs from it: a run writes those itself."""
    git = ["git", "-C", str(harness.RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    outside = ["--", ":/", f":(exclude,top)benchmarks/{harness.RESULTS.name}"]
    changed = subprocess.run([*git, "status", "--porcelain", *outside], capture_output=True, text=True)
    if head.returncode:
        return "uncommitted"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def measured_alike(line: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a line is of a commit without changes and agrees in all that is wanted."""
    committed = "+" not in line["commit"] and line["commit"] != "uncommitted"
    return committed and all(line.get(key) == str(value) for key, value in wanted.items())


def read_csv(path: Path, wanted: Mapping[str, Any]) -> list[dict[str, str]]:
    """The lines of a result file that need not be measured again."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [line for line in csv.DictReader(file) if measured_alike(line, wanted)]


def missing(plan: Plan, pair: int, cases: list[str], done: list[dict[str, Any]]) -> list[str]:
    """The cases of this turn that none of the lines holds yet; all of them are measured alike."""
    turn = (plan.flow, plan.dtype, str(pair))
    found = {line["case"] for line in done if (line["flow"], line["dtype"], str(line["pair"])) == turn}
    return [case for case in cases if case not in found]


def run_apart(
    plan: Plan, pair: int, cases: list[str], arguments: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """run_flow in a process of its own: its peak memory is its own, and the next flow finds the machine empty."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, str(arguments.checkpoint), "--device", arguments.device]
        command += ["--worker", str(out), "--flows", plan.flow, "--dtype", plan.dtype, "--pair", str(pair)]
        command += ["--cases", *cases, "--size", str(arguments.size), "--edit-steps", str(arguments.edit_steps)]
        command += ["--steps", str(arguments.steps or "all")]
        environment = dict(os.environ)
        if arguments.threads:
            command += ["--threads", str(arguments.threads)]
            environment["OMP_NUM_THREADS"] = str(arguments.threads)
        if arguments.profile and pair == 0:
            command += ["--profile", *arguments.profile]
        subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a diffusers-layout folder of SD v1.5's size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: the device's fastest")
    parser.add_argument("--steps", help="calls of each kind to compute, or 'all' (default: 1 on a CPU, else all)")
    parser.add_argument("--edit-steps", type=int, default=EDIT_STEPS, help="steps of the whole edit (default 50)")
    parser.add_argument("--pairs", type=int, default=3, help="turns of all flows (default 3)")
    parser.add_argument("--flows", nargs="+", choices=list(FLOWS), default=list(FLOWS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, help="of a CPU; default torch's")
    parser.add_argument("--size", type=int, default=512, help="side of the photograph (default 512)")
    parser.add_argument("--profile", nargs="*", choices=list(FLOWS), help="flows whose UNet call is profiled (CPU)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pair", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    default_steps = "1" if arguments.device == "cpu" else "all"
    steps = arguments.steps or default_steps
    arguments.steps = None if steps == "all" else int(steps)

    if arguments.worker:
        plan = Plan(arguments.flows[0], arguments.dtype)
        arguments.worker.write_text(json.dumps(run_flow(plan, arguments, arguments.cases)))
        return

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    context = harness.environment(arguments.device) | edit_report.releases("diffusers", "transformers")
    context["commit"] = commit()
    context["bf16_products"] = "" if arguments.device == "cuda" else ("yes" if cpu_has_bf16() else "no")
    stem = f"edit_{arguments.device}"
    files = {"runs": stem, "calls": f"{stem}_calls", "profile": f"profile_{arguments.device}"}
    paths = {name: arguments.results / f"{file}.csv" for name, file in files.items()}
    lines: dict[str, list[dict[str, Any]]] = {
        name: list(read_csv(path, context | settings(arguments))) for name, path in paths.items()
    }
    for pair in range(arguments.pairs):
        for plan in plans(arguments.device, arguments.dtype):
            cases = missing(plan, pair, arguments.cases, lines["runs"])
            if plan.flow not in arguments.flows or not cases:
                continue
            load = {} if arguments.device == "cuda" else {"load_average": round(os.getloadavg()[0], 2)}
            found = run_apart(plan, pair, cases, arguments)
            for name, path in paths.items():
                lines[name] += [line | load | context for line in found[name]]
                if lines[name]:
                    harness.write_csv(path, lines[name])
            for line in found["runs"]:
                print(edit_report.shown(line), flush=True)
    text = edit_report.report(lines["runs"], lines["calls"])
    (arguments.results / f"{stem}.md").write_text(text, encoding="utf-8")
    if lines["profile"]:
        profiled = edit_report.profile_table(lines["profile"])
        (arguments.results / f"profile_{arguments.device}.md").write_text(profiled, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
