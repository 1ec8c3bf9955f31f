"""The tables of bench_edit.py, from the lines of its CSV files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

Line = Mapping[str, Any]

# What is wanted of a CPU: the masa dtype, the peer, its dtype (None: masa's), and how many times faster at least.
SPEED_AIMS = (
    ("bfloat16", "published", "float32", 25.0),
    ("float32", "published", "float32", 6.0),
    ("bfloat16", "diffusers sdpa", "bfloat16", 2.3),
    ("float32", "diffusers sdpa", "float32", 2.3),
)
MEMORY_AIM = 0.4  # of the published flow's peak


def releases(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def shown(line: Line) -> str:
    """A run on one line of the terminal."""
    what = f"{line['case']:32s} {line['flow']:16s} {line['dtype']:9s}"
    return f"{what} {line['unet_rows']:5d} rows {float(line['total_s']):10.1f} s, peak {line['peak_mib']} MiB"


def report(runs: Sequence[Line], calls: Sequence[Line]) -> str:
    """Markdown: every case, the aims, and the networks' calls."""
    first = runs[0]
    measured = {line["steps_measured"] for line in runs}
    clock = "processor time" if first["clock"] == "cpu" else "elapsed time"
    where = f"{first['device']}, {first['threads']} threads" if first["threads"] else first["device"]
    packages = ", ".join(f"{name} {first[name]}" for name in ("torch", "diffusers", "transformers"))
    text = [f"# Whole edits: {where}\n"]
    text.append(
        f"{first['size']}x{first['size']} photograph, {first['edit_steps']} steps, guidance 7.5, "
        f"random weights of SD v1.5's size. Seconds are {clock}; {packages}; "
        f"commit {', '.join(sorted({line['commit'] for line in runs}))}.\n"
    )
    if any(str(steps) != str(first["edit_steps"]) for steps in measured):
        text.append(
            f"Extrapolated: {', '.join(sorted(map(str, measured)))} call of each kind of UNet, encoder and decoder "
            "was run, and counted as often as the whole run makes it. All else was run in full.\n"
        )
    loads = [float(line["load_average"]) for line in runs if line.get("load_average") not in (None, "")]
    if loads:
        text.append(f"Load average of the machine at the start of the flows: {min(loads):g} to {max(loads):g}.\n")
    for case in dict.fromkeys(line["case"] for line in runs):
        text += _case_table(case, [line for line in runs if line["case"] == case])
        if case == "edit":
            text += _rows([line for line in runs if line["case"] == case])
    if first["threads"]:  # a CPU's: a GPU's lines have none
        text += _aims([line for line in runs if line["case"] == "edit"])
    if calls:
        text += _calls_table(calls)
    return "\n".join(text) + "\n"


def _case_table(case: str, runs: Sequence[Line]) -> list[str]:
    """One case. Ratios are of the same turn, against masa in each dtype that it ran in."""
    text = [f"## {case[0].upper()}{case[1:]}\n"]
    text.append("| flow | dtype | UNet rows | s per row | run, s | its time over masa's | peak MiB | turns |")
    text.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for flow, dtype in dict.fromkeys((line["flow"], line["dtype"]) for line in runs):
        own = [line for line in runs if (line["flow"], line["dtype"]) == (flow, dtype)]
        ratios = {
            peer: pairwise(runs, (flow, dtype), ("masa", peer), "total_s")
            for peer in dict.fromkeys(line["dtype"] for line in runs if line["flow"] == "masa")
            if (flow, dtype) != ("masa", peer)
        }
        over = "; ".join(f"{span(found)} ({peer})" for peer, found in ratios.items() if found)
        text.append(
            f"| {flow} | {dtype} | {own[0]['unet_rows']} | {seconds_per_row(own)} | {middle(own, 'total_s'):.4g} | "
            f"{over} | {peak(own)} | {len(own)} |"
        )
    return [*text, ""]


def _rows(edits: Sequence[Line]) -> list[str]:
    """What the rows of one edit are, and what one of them costs each flow: speed apart from the number of rows."""
    text = [
        "With 50 steps masa runs 196: 50 of the inversion, without guidance's unconditional half, which at scale 1 "
        "has no weight; then 4 steps of 2 rows before MasaCtrl acts and 46 of 3, the source pinned to its inversion. "
        "The peers run 400: 100 of the inversion, of both halves of guidance; 100 of the picture of the target from "
        "the same noise without MasaCtrl, which `masa.edit` does not make; 200 of source and target with guidance.\n"
    ]
    apart = []
    for flow, dtype in dict.fromkeys((line["flow"], line["dtype"]) for line in edits):
        own = [line for line in edits if (line["flow"], line["dtype"]) == (flow, dtype) and line["unet_s"] != ""]
        each = sorted(float(line["unet_s"]) / int(line["unet_rows"]) for line in own)
        if each:
            ends = dict.fromkeys(f"{seconds:.1f}" for seconds in (each[0], each[-1]))
            apart.append(f"{flow} {dtype} {' to '.join(ends)}")
    if apart:
        text.append(
            f"Seconds per row of the batch: {'; '.join(apart)}. masa's rows share work: both halves of guidance are "
            "computed as one until they read their prompts, and a source leaves after the last layer that is read.\n"
        )
    return text


def _aims(edits: Sequence[Line]) -> list[str]:
    text = ["## Against the aims for one edit on a CPU\n", "| aim | measured |", "|---|---|"]
    held = {(line["flow"], line["dtype"]) for line in edits}
    for dtype, flow, peer_dtype, aim in SPEED_AIMS:
        ratios = pairwise(edits, (flow, peer_dtype), ("masa", dtype), "total_s")
        if not ratios and dtype == "float32" and ("masa", "bfloat16") in held:
            continue  # bfloat16's line stands for it
        lacking = dtype == "bfloat16" and any(line.get("bf16_products") == "no" for line in edits)
        unknown = "not measured: the CPU has no bfloat16 products" if lacking else "not measured"
        found = span(ratios) if ratios else unknown
        text.append(f"| masa {dtype} at least {aim:g}x faster than {flow} {peer_dtype} | {found} |")
    for flow, dtype in sorted(flow for flow in held if flow[0].startswith("masa")):
        ratios = pairwise(edits, (flow, dtype), ("published", "float32"), "peak_mib")
        if ratios:
            text.append(f"| {flow} {dtype}: peak memory at most {MEMORY_AIM:g} of the published | {span(ratios)} |")
    return [*text, ""] if len(text) > 3 else []


def _calls_table(calls: Sequence[Line]) -> list[str]:
    text = ["## Calls\n", "| flow | dtype | network | rows | attentions edited | s per call | s per row |"]
    text.append("|---|---|---|---:|---:|---:|---:|")
    column = "cpu_s" if calls[0]["threads"] == "1" else "wall_s"
    keys = ("flow", "dtype", "network", "rows", "edited")
    kinds = dict.fromkeys(tuple(str(call[key]) for key in keys) for call in calls)
    for kind in sorted(kinds):
        own = [call for call in calls if tuple(str(call[key]) for key in keys) == kind]
        seconds = middle(own, column)
        text.append(f"| {' | '.join(kind)} | {seconds:.4g} | {seconds / int(kind[3]):.4g} |")
    return [*text, ""]


def profile_table(parts: Sequence[Line]) -> str:
    """Markdown: one table for each flow that was profiled."""
    first = parts[0]
    text = [f"# Where a UNet call spends its time: {first['device']}, {first['threads']} thread(s)\n"]
    text.append(
        "Shares by torch.profiler, of the seconds that the call takes without it. The limit is a square matrix "
        f"product, measured before and after the profiled call. torch {first['torch']}, commit {first['commit']}.\n"
    )
    timed = first.get("seconds_of") or first["commit"]
    if timed != first["commit"]:
        text.append(f"The seconds are of another run, of commit {timed}; shares and limit are of one process.\n")
    for flow, dtype in dict.fromkeys((part["flow"], part["dtype"]) for part in parts):
        own = [part for part in parts if (part["flow"], part["dtype"]) == (flow, dtype)]
        total, work = (sum(float(part[key] or 0) for part in own) for key in ("seconds", "gflop"))
        limit = float(own[0]["limit_gflops"])
        rows, edited = own[0]["rows"], own[0]["edited"]
        text.append(f"## {flow}, {dtype}: {rows} rows, {edited} attentions edited\n")
        rate = work / total
        text.append(f"Limit {limit:.4g} GFLOP/s; the whole call {rate:.4g}, {rate / limit:.0%} of it.\n")
        text.append("| work | share | s | GFLOP | GFLOP/s | of the limit |")
        text.append("|---|---:|---:|---:|---:|---:|")
        for part in own:
            of_limit = f"{float(part['of_limit']):.0%}" if part["of_limit"] != "" else ""
            text.append(
                f"| {part['work']} | {float(part['share']):.1%} | {float(part['seconds']):.2f} | {part['gflop']} | "
                f"{part['gflops']} | {of_limit} |"
            )
        text.append("")
    return "\n".join(text)


def pairwise(runs: Sequence[Line], over: tuple[str, str], under: tuple[str, str], column: str) -> list[float]:
    """The ratio of two (flow, dtype) in each turn that has both."""
    by_turn = {((line["flow"], line["dtype"]), int(line["pair"])): float(line[column]) for line in runs}
    turns = sorted({int(line["pair"]) for line in runs})
    return [
        by_turn[over, turn] / by_turn[under, turn]
        for turn in turns
        if (over, turn) in by_turn and (under, turn) in by_turn
    ]


def middle(lines: Sequence[Line], column: str) -> float:
    return statistics.median(float(line[column]) for line in lines)


def seconds_per_row(lines: Sequence[Line]) -> str:
    """Median seconds per UNet row; nothing where the whole run alone was timed."""
    timed = [float(line["unet_s"]) / int(line["unet_rows"]) for line in lines if line["unet_s"] != ""]
    return f"{statistics.median(timed):.3g}" if timed else ""


def peak(lines: Sequence[Line]) -> str:
    """The most memory of any turn; nothing where it was not measured."""
    found = [float(line["peak_mib"]) for line in lines if line["peak_mib"] != ""]
    return f"{max(found):.0f}" if found else ""


def span(ratios: Sequence[float]) -> str:
    """The median, and the range where there are several."""
    text = f"{statistics.median(ratios):.2f}x"
    return text if len(ratios) < 2 else f"{text} [{min(ratios):.2f}, {max(ratios):.2f}]"
