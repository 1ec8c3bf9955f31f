"""The edit benchmark: its peers compute what the library computes, and its extrapolation counts what is run."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import masa
from masa.models.winograd import Conv3x3

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import bench_edit
import edit_report
import harness
from call_timer import CallTimer, Kind, Seconds
from edit_flows import CACHED, TARGETS, CompiledMasa, DiffusersBest, MasaFlow, Plan, Published
from profile_unet import COUNTED, attention_operations, group_of, profile_call

STEPS = 6


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def free_source(tiny_folder, picture) -> masa.Result:
    """The library on the same job as the published flow: the source free, nothing else left out by choice."""
    return MasaFlow(tiny_folder, "cpu", torch.float32, STEPS).edit(picture, TARGETS[:1], pin_source=False)


@pytest.mark.slow
@pytest.mark.parametrize("peer", [Published, DiffusersBest])
def test_peer_computes_the_same_edit(tiny_folder, picture, free_source, peer):
    flow = peer(tiny_folder, "cpu", torch.float32, STEPS)
    (latents,) = flow.case("edit", picture)()
    start = flow.flow.invert(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, "")
    plain = flow.flow.sample(["", TARGETS[0]], start.expand(2, -1, -1, -1), control=False)
    scale = free_source.latents.abs().max()
    assert (latents - free_source.latents).abs().max() < 2e-4 * scale
    assert (latents[0] - plain[0]).abs().max() < 2e-4 * scale
    assert (latents[1] - plain[1]).abs().max() > 0.01 * scale


@pytest.mark.parametrize(
    ("build", "calls"),
    [
        (MasaFlow, {Kind("unet", 1): 50, Kind("unet", 2): 4, Kind("unet", 3, 6): 46, Kind("decoder", 1): 2}),
        (
            Published,
            {Kind("unet", 2): 100, Kind("unet", 4): 4, Kind("unet", 4, 6): 46}
            | {Kind("decoder", 1): 1, Kind("decoder", 2): 1},
        ),
    ],
)
def test_calls_are_counted_and_few_are_run(tiny_folder, build, calls):
    flow = build(tiny_folder, "cpu", torch.float32, 50)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    with CallTimer(flow.probes(), 1, "cpu") as timer:
        cost = timer.cost(flow.case("edit", picture))
    calls = calls | {Kind("encoder", 1): 1}
    assert cost.calls == calls
    assert cost.unet_rows == (196 if build is MasaFlow else 400)
    assert {kind: len(times) for kind, times in timer.times.items()} == dict.fromkeys(calls, 1)
    whole = sum(timer.times[kind][0].cpu * count for kind, count in calls.items())
    assert cost.total.cpu - cost.rest.cpu == pytest.approx(whole)
    assert cost.rest.wall > 0
    assert not any(probe.method in vars(probe.network) for probe in flow.probes())


def test_rows_of_the_other_cases(tiny_folder):
    """896 rows where the published flow runs 100 + 8 * 300."""
    cases = ("edit, 8 targets", "one more target", CACHED, "synthesis")
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    rows = {}
    for build in (MasaFlow, Published):
        flow = build(tiny_folder, "cpu", torch.float32, 50)
        with CallTimer(flow.probes(), 1, "cpu") as timer:
            for case in cases:
                rows[build, case] = timer.cost(flow.case(case, picture)).unet_rows
    assert [rows[MasaFlow, case] for case in cases] == [896, 146, 100, 200]
    assert [rows[Published, case] for case in cases] == [2500, 300, 300, 200]


def test_target_of_a_recorded_source_is_the_same(tiny_folder, picture):
    flow = MasaFlow(tiny_folder, "cpu", torch.float32, STEPS)
    anew, cached = (flow.case(case, picture)().latents for case in ("one more target", CACHED))
    assert (anew - cached).abs().max() < 1e-4 * anew.abs().max()


@pytest.mark.slow
def test_compiled_flow_is_compiled_timed_and_the_same(tiny_folder, picture):
    compiled = CompiledMasa(tiny_folder, "cpu", torch.float32, STEPS, compiler="eager")
    plain = MasaFlow(tiny_folder, "cpu", torch.float32, STEPS)
    assert type(compiled.sd.unet) is not type(plain.sd.unet)
    found = []
    with CallTimer(compiled.probes(), None, "cpu") as timer:
        cost = timer.cost(lambda: found.append(compiled.case("edit", picture)()))
    expected = plain.case("edit", picture)().latents
    assert cost.unet_rows == STEPS + 4 * 2 + (STEPS - 4) * 3
    assert (found[0].latents - expected).abs().max() < 1e-4 * expected.abs().max()
    assert [plan.flow for plan in bench_edit.plans("cuda", None)].count("masa compiled") == 1
    assert "masa compiled" not in [plan.flow for plan in bench_edit.plans("cpu", None)]


def test_every_call_is_run_where_all_are_asked_for(tiny_folder, picture):
    flow = MasaFlow(tiny_folder, "cpu", torch.float32, STEPS)
    outputs = []
    with CallTimer(flow.probes(), None, "cpu") as timer:
        cost = timer.cost(lambda: outputs.append(flow.edit(picture, TARGETS[:1])))
    assert torch.equal(outputs[0].latents, flow.edit(picture, TARGETS[:1]).latents)
    assert cost.total == cost.rest
    assert not timer.times


def test_typical_call_is_the_median():
    timer = CallTimer((), 3, "cpu")
    timer.times[Kind("unet", 1)] += [Seconds(3.0, 1.0), Seconds(1.0, 9.0), Seconds(2.0, 2.0)]
    assert timer.typical(Kind("unet", 1)) == Seconds(2.0, 2.0)


@pytest.mark.slow
def test_profile_groups_all_of_the_time(tiny):
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    lines = profile_call(lambda: tiny.unet(x, 1, context), seconds=2.0, dtype=torch.float32)
    assert sum(line["share"] for line in lines) == pytest.approx(1, abs=1e-3)
    assert sum(line["seconds"] for line in lines) == pytest.approx(2, abs=0.01)
    by_work = {line["work"]: line for line in lines}
    assert {*COUNTED, "norms", "activations", "copies"} <= set(by_work)
    assert all(by_work[work]["gflop"] != "" and by_work[work]["limit_gflops"] > 0 for work in COUNTED)


@pytest.mark.slow
@pytest.mark.parametrize("side", [8, 16])
def test_profile_counts_a_convolution_as_a_direct_one(side):
    layer = Conv3x3(256, 256).to(memory_format=torch.channels_last)
    x = torch.randn(1, 256, side, side).to(memory_format=torch.channels_last)
    lines = profile_call(lambda: layer(x), seconds=1.0, dtype=torch.float32)
    by_work = {line["work"]: line for line in lines}
    assert by_work["convolutions"]["gflop"] == round(2 * 9 * 256 * 256 * side**2 / 1e9, 1) > 0
    assert not {"linear layers", "attention", "copies"} & set(by_work)


def test_exponentials_count_as_free_where_the_clock_is_not_told():
    told = SimpleNamespace(multi_processor_count=100, clock_rate=2_000_000)  # kHz
    assert harness.specified_gigaexps(told) == 3200
    untold = harness.specified_gigaexps(SimpleNamespace(multi_processor_count=100))
    assert harness.Limits(1.0, 1.0, untold).floor(2e9, 1e6, 1e30) == 2
    assert harness.Limits(1.0, 1.0, 3200).floor(2e9, 1e6, 3.2e10) == 10


def test_operations_of_attention():
    assert attention_operations([(2, 8, 4096, 40), (2, 8, 77, 40)]) == 4 * 2 * 8 * 4096 * 77 * 40
    assert group_of("aten::mkldnn_convolution") == "convolutions"
    assert group_of("aten::nothing") == "other"


def test_report_pairs_by_turn():
    shared = {
        "case": "edit",
        "size": 384,
        "steps_measured": 1,
        "edit_steps": 50,
        "clock": "cpu",
        "threads": "1",
        "unet_s": 1.0,
    }
    shared |= {
        "device": "a CPU",
        "torch": "2",
        "diffusers": "0",
        "transformers": "5",
        "commit": "abc",
        "unet_rows": 196,
    }
    runs = [
        shared | {"flow": flow, "dtype": "float32", "pair": pair, "total_s": seconds, "peak_mib": peak}
        for pair, (ours, theirs) in enumerate([(10, 60), (20, 160), (10, 70)])
        for flow, seconds, peak in (("masa", ours, 40), ("published", theirs, 100))
    ]
    assert edit_report.pairwise(runs, ("published", "float32"), ("masa", "float32"), "total_s") == [6, 8, 7]
    text = edit_report.report(runs, [])
    assert "7.00x [6.00, 8.00]" in text
    assert "0.40x" in text
    assert "Extrapolated" in text
    assert "384x384" in text
    assert "not measured |" in text  # nothing ran in bfloat16, and no line says why
    assert "no bfloat16 products" not in text
    told = edit_report.report([line | {"bf16_products": "no"} for line in runs], [])
    assert told.count("not measured: the CPU has no bfloat16 products |") == 2
    assert "no float32 products" not in told
    assert "no bfloat16 products" not in edit_report.report([line | {"bf16_products": "yes"} for line in runs], [])
    assert "aims" in text
    assert "aims" not in edit_report.report([line | {"threads": "", "device": "a GPU"} for line in runs], [])


WANTED = {"size": 512, "edit_steps": 50, "steps_measured": 1, "threads": "1", "device": "a CPU", "commit": "abc"}


@pytest.mark.parametrize(
    "other",
    [{"size": 256}, {"edit_steps": 20}, {"steps_measured": 2}, {"threads": "2"}, {"device": "b"}, {"commit": "abd"}],
)
def test_lines_of_other_settings_are_measured_again(tmp_path, other):
    plan, cases = Plan("masa", "float32"), ["edit", "synthesis"]
    line = WANTED | {"case": "edit", "flow": "masa", "dtype": "float32", "pair": 0}
    file = tmp_path / "edit.csv"

    def left(written: dict, wanted: dict, pair: int = 0) -> list[str]:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(written))
            writer.writeheader()
            writer.writerow(written)
        return bench_edit.missing(plan, pair, cases, bench_edit.read_csv(file, wanted))

    assert left(line, WANTED) == ["synthesis"]
    assert left(line, WANTED, pair=1) == cases
    assert left(line, WANTED | other) == cases
    assert left(line | {"commit": "abc+changes"}, WANTED) == cases
    assert left(line | {"commit": "abc+changes"}, WANTED | {"commit": "abc+changes"}) == cases


def test_settings_count_all_steps_where_all_are_run():
    arguments = argparse.Namespace(size=64, edit_steps=50, steps=None)
    assert bench_edit.settings(arguments) == {"size": 64, "edit_steps": 50, "steps_measured": 50}
