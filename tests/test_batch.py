"""Batches: what single runs give, resumable, shared out, and refused before work where a line is wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import masa
from masa.cli.commands import main, shard_of_rank
from masa.io.folders import Claim
from masa.output.result import Result, file_names, read_saved
from masa.settings import describe
from masa.workflows import batch as batch_module
from masa.workflows.batch import Report
from masa.workflows.jobs import in_order, read_jobs, shard_of

ROOT = Path(__file__).parent.parent
CONTROL = {"kind": "MasaCtrl", "start_step": 0, "start_layer": 4}
SMALL = {"steps": 2, "height": 64, "width": 64}
SAMPLE = {"source": "a sitting cat", "target": "a cat", "seed": 1, "controls": [CONTROL], **SMALL}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder with two pictures in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for n, name in enumerate(("one.png", "two.jpg")):
        pixels = torch.randint(0, 256, (96, 128, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "data" / "pictures" / name)
    return tmp_path


def write_jobs(path, jobs):
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return path


def lines(folder):
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def states(folder):
    return {row["id"]: row["state"] for row in lines(folder)}


def run(jobs, out, sd, **more):
    return masa.batch(jobs, out, sd, progress=False, **more)


def counted(monkeypatch, name):
    """Calls of one of the batch's functions, which still works."""
    calls = []
    original = getattr(batch_module, name)

    def counting(*args, **more):
        calls.append((args, more))
        return original(*args, **more)

    monkeypatch.setattr(batch_module, name, counting)
    return calls


def test_results_are_those_of_single_runs(tiny, home, monkeypatch):
    """Also where an inversion or a source is shared; at 128 pixels bit for bit in float32, as `record` has it."""
    size = {"steps": 2, "height": 128, "width": 128, "guidance_scale": 3.0}
    image = {"image": "pictures/one.png", "source": "a cat", **size}
    blend = {"kind": "MasaCtrl", "start_step": 1, "start_layer": 8}
    jobs = [
        {"id": "edit", "target": "a dog", "controls": [CONTROL], **image},
        {"id": "other", "target": "a dog", "controls": [CONTROL], **image, "image": "pictures/two.jpg"},
        {"id": "fixed seed", "target": ["a dog", "a bird"], "controls": [], **image},
        {"id": "later", "target": "a bird", "controls": [blend], "seed": 7, **image},  # no noise is drawn with it
        {"id": "guided", "target": "a bird", "controls": [blend], **image, "guidance_scale": 5.0},
        {"id": "friendly", "target": "a dog", "controls": [CONTROL], "method": "edit-friendly", "seed": 3, **image},
        {"id": "sample", "target": "a dog", "source": "a cat", "controls": [CONTROL], "seed": 2, **size},
        {"id": "again", "target": "a bird", "source": "a cat", "controls": [blend], "seed": 2, **size},
        {"id": "alone", "source": "a cat", "seed": 2, **size},
    ]
    inversions, records = counted(monkeypatch, "invert"), counted(monkeypatch, "record")
    report = run(write_jobs(home / "data" / "jobs.jsonl", jobs), "out", tiny)
    assert report.done == [job["id"] for job in jobs]
    assert not report.failed
    assert len(inversions) == 1  # "edit", "fixed seed", "later" and "guided" share it; the others make their own
    assert len(records) == 2  # of the first three, and of the two that are synthesised from seed 2
    for job in jobs:
        given = {name: value for name, value in job.items() if name not in ("id", "image", "controls", "target")}
        controls = [masa.MasaCtrl(**{k: v for k, v in c.items() if k != "kind"}) for c in job.get("controls", [])]
        given |= {"controls": controls, "progress": False}
        if "image" in job:
            expected = masa.edit(tiny, home / "data" / job["image"], job["target"], **given)
        else:
            expected = masa.sample(tiny, target=job.get("target", ()), **given)
        found = Result.load(home / "out" / job["id"])
        assert torch.equal(found.latents, expected.latents), job["id"]
        assert [p.tobytes() for p in found.images] == [p.tobytes() for p in expected.images]
        if job["id"] == "later":
            again = masa.rerun(home / "out" / "later" / "target_0.png", tiny, progress=False)
            assert torch.equal(again.latents, expected.latents)
        told = {name for name in found.settings if found.settings[name] != expected.settings[name]}
        assert told <= {"trajectory"}  # its path, absolute in one and relative in the other


def test_one_inversion_and_one_source_are_held_at_a_time(tiny, home, monkeypatch):
    """And the order is such that none is made twice."""
    held = []
    original = batch_module.invert

    def watched(*args, **more):
        assert not [one for one in held if one() is not None]
        trajectory = original(*args, **more)
        held.append(weakref.ref(trajectory))
        return trajectory

    monkeypatch.setattr(batch_module, "invert", watched)
    names = ["one.png", "two.jpg"]
    jobs = [
        {"id": f"{n}", "image": f"pictures/{names[n % 2]}", "target": f"a cat {n}", "controls": [CONTROL], **SMALL}
        for n in range(6)
    ]
    assert len(run(write_jobs(home / "data" / "jobs.jsonl", jobs), "out", tiny).done) == 6
    assert len(held) == 2


def test_a_second_call_does_what_is_left(tiny, home, monkeypatch):
    jobs = [{"id": name, **SAMPLE, "target": f"a {name}"} for name in ("cat", "dog", "bird")]
    assert list(run(jobs, "out", tiny).rows) == ["cat", "dog", "bird"]
    before = {name: (home / "out" / name / "target_0.png").stat().st_mtime_ns for name in ("cat", "bird")}
    (home / "out" / "dog" / "target_0.png").unlink()  # no longer whole
    with (home / "out" / "report.jsonl").open("a") as file:
        file.write('{"id": "dog", "sta')  # cut off by a kill
    runs = counted(monkeypatch, "sample")
    # What is not whole is somebody's, until it may be overwritten.
    assert "already holds source.png" in run(jobs, "out", tiny).failed["dog"]
    assert run(jobs, "out", tiny, overwrite=True).done == ["cat", "dog", "bird"]
    assert len(runs) == 1
    assert before == {name: (home / "out" / name / "target_0.png").stat().st_mtime_ns for name in before}
    assert [row["id"] for row in lines(home / "out")] == ["cat", "dog", "bird"]
    monkeypatch.setattr(batch_module, "load", lambda: pytest.fail("loaded, though all is done"))
    (home / "out" / "report.jsonl").unlink()
    assert masa.batch(jobs, "out", progress=False).done == ["cat", "dog", "bird"]
    assert states(home / "out") == dict.fromkeys(("cat", "dog", "bird"), "done")


def test_settings_that_changed_are_noticed(tiny, home):
    run([{"id": "a", **SAMPLE}], "out", tiny)
    changed = [{"id": "a", **SAMPLE, "seed": 2}]
    with pytest.raises(masa.MasaError, match="job 1: 'a' was done with other settings; give it another id"):
        run(changed, "out", tiny)
    assert Result.load("out/a").settings["seed"] == 1
    assert run(changed, "out", tiny, overwrite=True).done == ["a"]
    assert Result.load("out/a").settings["seed"] == 2


def test_bad_jobs_do_not_stop_the_rest(tiny, home, monkeypatch):
    """Those that the model or a missing file refuse fail at once; those that fail as they run, then."""
    (home / "data" / "pictures" / "damaged.png").write_bytes(b"no picture")
    edit = {"target": "a dog", "controls": [CONTROL], **SMALL}
    words = {"kind": "WordMasks", "source": "horse", "target": "cat"}
    jobs = [
        {"id": "breaks", **SAMPLE, "seed": 5},
        {"id": "good", **SAMPLE},
        {"id": "no picture", "image": "pictures/none.png", **edit},
        {"id": "damaged", "image": "pictures/damaged.png", **edit},
        {"id": "no word", **SAMPLE, "controls": [{**CONTROL, "mask": words}]},
        {"id": "also good", "image": "pictures/one.png", **edit},
    ]
    original = batch_module.sample

    def breaking(sd, *args, **more):
        if more["seed"] == 5:
            assert len(states(home / "out")) == 3  # what could be refused was, before the first run
            raise RuntimeError("something inside")
        return original(sd, *args, **more)

    monkeypatch.setattr(batch_module, "sample", breaking)
    report = run(write_jobs(home / "data" / "jobs.jsonl", jobs), "out", tiny)
    assert report.done == ["good", "also good"]
    assert list(report.failed) == ["breaks", "no picture", "damaged", "no word"]
    assert report.failed["breaks"] == "RuntimeError: something inside"
    assert "none.png; paths are relative to the job file" in report.failed["no picture"]
    assert "damaged.png cannot be read as a picture" in report.failed["damaged"]
    assert "'horse' is not in the prompt" in report.failed["no word"]
    assert [row["id"] for row in lines(home / "out")] == [job["id"] for job in jobs]
    assert all(row["seconds"] > 0 for row in lines(home / "out") if row["state"] == "done")
    # What failed is tried again.
    monkeypatch.setattr(batch_module, "sample", original)
    assert run(home / "data" / "jobs.jsonl", "out", tiny).done == ["breaks", "good", "also good"]


def test_a_full_disk_ends_the_batch(tiny, home, monkeypatch):
    def full(self, folder, overwrite=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    jobs = [{"id": name, **SAMPLE} for name in "abc"]
    runs = counted(monkeypatch, "sample")
    monkeypatch.setattr(Result, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(jobs, "out", tiny)
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is no JSON"),
        ("[1]", r"it is \[1\]; expected an object with an id"),
        ("[" * 100_000, "nested too deeply"),
        ('{"id": "a", "seed": NaN}', "NaN is no number"),
        ('{"id": "a", "id": "b"}', "'id' stands there twice"),
        ("\xff", "it is no UTF-8 text"),
        ({}, "its id is None; expected a text"),
        ({"id": "a", "stpes": 3}, "unknown 'stpes' .is 'steps' meant.*; expected id and arguments of masa.sample"),
        ({"id": "a", "method": "ddim"}, "unknown 'method'; .*of masa.sample, since there is no image"),
        (
            {"id": "a", "image": "a.png", "target": "b", "trajectory": "t"},
            "unknown 'trajectory'; .*of masa.edit, since there is an image",
        ),
        ({"id": "a", "image": "a.png"}, "target is empty"),
        ({"id": "a", "image": "a\0.png", "target": "b"}, "holds a NUL character"),
        ({"id": "a", "source": 3}, "source is 3; expected a text"),
        ({"id": "a", "target": ["b", 3]}, "a target is 3; expected a prompt"),
        ({"id": "a", "steps": 0}, "steps is 0; expected a whole number from 1"),
        ({"id": "a", "steps": 10**9}, "steps is 1000000000; expected at most 999"),
        ({"id": "a", "steps": 2.5}, "steps is 2.5; expected a whole number"),
        ({"id": "a", "steps": True}, "steps is true; expected a whole number"),
        ({"id": "a", "skip_steps": 51}, "skip_steps is 51; expected a number from 0 to 50"),
        ({"id": "a", "height": 100}, "height is 100; expected a multiple of 64"),
        ({"id": "a", "seed": -1}, "seed is -1"),
        ({"id": "a", "eta": 2}, "eta is 2; expected a number from 0"),
        ({"id": "a", "guidance_scale": "7"}, 'guidance_scale is "7"; expected a number'),
        ({"id": "a", "sampler": "fast"}, "sampler is 'fast'; expected one of"),
        ({"id": "a", "guidance": {"kind": "MasaCtrl"}}, "guidance is MasaCtrl"),
        ({"id": "a", "targets_at_once": 0}, "targets_at_once is 0"),
        ({"id": "a", "tiled": 1}, "tiled is 1; expected true or false"),
        ({"id": "a", "backend": "fast"}, "backend is 'fast'; expected one of auto"),
        ({"id": "a", "controls": [{"kind": "Magic"}]}, "'Magic', which this version of masa does not have"),
        ({"id": "a", "controls": [{"kind": "MasaCtrl", "start": 3}]}, "of which nothing can be made"),
        ({"id": "a", "controls": "MasaCtrl"}, "controls hold 'M'; expected controls"),
        ({"id": "a", "latents": {"packed": "xx"}}, "of which nothing can be made"),
        ({"id": "a", "image": "a.png", "target": "b", "method": "magic"}, "inversion method is 'magic'"),
        ({"id": "a", "image": "a.png", "target": "b", "method": "null-text"}, "with an empty prompt"),
        ({"id": "a", "image": "a.png", "target": "b", "inner_steps": 0}, "inner_steps is 0"),
        ({"id": "a", "function": "sweep"}, "these are the settings of masa.sweep"),
        ({"id": "a", "function": "sample", "trajectory": "t"}, "these settings are not whole"),
        ({"id": "a", "function": "sample", "trajectory": {"image": "a.png"}}, "these settings are not whole"),
        ('{"id": "a", "seed": 1' + "0" * 5000 + "}", "it is no JSON"),
        ('{"id": "a", "guidance_scale": 1e999}', "guidance_scale is inf"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else value[:30],
)
def test_a_bad_line_is_named_before_anything_runs(home, line, message):
    text = line if isinstance(line, str) else json.dumps(line)
    good = json.dumps({"id": "good", **SAMPLE})
    (home / "jobs.jsonl").write_text(f"{good}\n\n{text}\n", encoding="latin-1")
    with pytest.raises(masa.MasaError, match=rf"^jobs.jsonl, line 3: .*{message}"):
        masa.batch("jobs.jsonl", "out", lambda: pytest.fail("loaded"), progress=False)
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../up", "holds a character"),
        ("a/b", "holds a character"),
        ("a\\b", "holds a character"),
        ("/tmp/a", "holds a character"),
        ("C:", "holds a character"),
        ("a\0b", "holds a character"),
        ("a\nb", "holds a character"),
        ("..", "begins with a dot"),
        (".", "begins with a dot"),
        (".claims", "begins with a dot"),
        ("nul", "is the name of a device"),
        ("COM1.txt", "is the name of a device"),
        ("Report.jsonl", "is the report's name"),
        ("a" * 181, "is longer than 180 bytes"),
        ("ü" * 91, "is longer than 180 bytes"),
        ("a ", "begins or ends with a space"),
        ("a.", "ends with a dot"),
        ("", "expected a text"),
        (7, "its id is 7; expected a text"),
        ("GOOD", "the id 'GOOD' is taken by jobs.jsonl, line 1"),
    ],
)
def test_ids_name_folders_inside_the_output_folder(home, name, message):
    write_jobs(home / "jobs.jsonl", [{"id": "good", **SAMPLE}, {"id": name, **SAMPLE}])
    with pytest.raises(masa.MasaError, match=rf"^jobs.jsonl, line 2: .*{message}"):
        read_jobs("jobs.jsonl")


def test_the_longest_id_serves_and_links_do_not_lead_out(tiny, home):
    name = "ü" * 90
    assert run([{"id": name, **SAMPLE}], "out", tiny).done == [name]
    (home / "elsewhere").mkdir()
    (home / "out" / "a").symlink_to(home / "elsewhere")
    with pytest.raises(masa.MasaError, match="is a link; results stay inside the output folder"):
        run([{"id": "a", **SAMPLE}], "out", tiny)
    assert not list((home / "elsewhere").iterdir())


def test_several_bad_lines_are_counted(home):
    write_jobs(home / "jobs.jsonl", [{"id": "a", "seed": -1}, {"id": "b"}, {}, {"id": "b"}])
    with pytest.raises(masa.MasaError, match=r"^jobs.jsonl, line 1: seed .* \(and 2 more lines are wrong\)$"):
        read_jobs("jobs.jsonl")
    (home / "jobs.jsonl").write_text("\n")
    with pytest.raises(masa.MasaError, match="holds no jobs"):
        read_jobs("jobs.jsonl")
    with pytest.raises(masa.MasaError, match="no job file at none"):
        read_jobs("none")


@pytest.mark.parametrize("kind", ["sample", "edit", "edit-friendly"])
def test_a_result_s_settings_are_a_job(tiny, home, kind):
    controls = [masa.MasaCtrl(0, 4, mask=masa.GivenMasks(torch.ones(8, 8), torch.ones(8, 8)))]
    given = {"controls": controls, "guidance_scale": 3.0, "progress": False, **SMALL}
    given |= {"sampler": "dpm++2m", "guidance": masa.RescaledGuidance(0.5), "negative_prompt": "blurry"}
    if kind == "sample":
        first = masa.sample(tiny, "a cat", ["a dog", "a bird"], seed=4, **given)
    else:
        given |= {"sampler": "ddim"} if kind == "edit-friendly" else {}
        method = "ddim" if kind == "edit" else kind
        first = masa.edit(tiny, "data/pictures/one.png", "a dog", "a cat", method=method, **given)
    job = json.loads(json.dumps({"id": "again", **first.settings}))
    assert run([job], "out", tiny).done == ["again"]
    again = Result.load("out/again")
    assert torch.equal(again.latents, first.latents)
    assert again.settings["controls"] == first.settings["controls"]
    with Image.open("out/again/target_0.png") as picture:
        assert picture.tobytes() == first.targets[0].tobytes()


def test_settings_that_a_job_cannot_say_are_refused(tiny, home):
    plain = {"id": "a", "progress": False, "controls": [masa.MasaCtrl(0)], **SMALL}
    given = {name: value for name, value in plain.items() if name != "id"}
    seeded = masa.sample(tiny, "a cat", "a dog", generator=torch.Generator(), **given).settings
    trajectory = masa.invert(tiny, "data/pictures/one.png", "a cat", progress=False, **SMALL)
    given = {"controls": [masa.MasaCtrl(0)], "progress": False}
    other = masa.sample(tiny, "a sitting cat", "a dog", trajectory=trajectory, **given).settings
    pixels = masa.edit(tiny, Image.new("RGB", (64, 64)), "a dog", **given, **SMALL).settings
    mine = masa.sample(tiny, "a cat", seed=1, progress=False, **SMALL).settings | {"fingerprint": "0" * 16}
    for settings, message in (
        (seeded, "took their noise from a generator"),
        (other, "inverted with another source than it was edited with"),
        (pixels, "was no file"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            read_jobs([{"id": "a", **settings}])
    assert "are of another model" in run([{"id": "a", **mine}], "out", tiny).failed["a"]


def test_python_s_own_jobs_hold_controls_and_trajectories(tiny, home):
    trajectory = masa.invert(tiny, "data/pictures/one.png", "a cat", progress=False, **SMALL)
    trajectory.save("t.safetensors")
    jobs = [
        {"id": "a", "target": "a dog", "trajectory": Path("t.safetensors"), "controls": masa.MasaCtrl(0)},
        {"id": "b", "target": ("a bird",), "trajectory": "t.safetensors", "controls": [masa.MasaCtrl(1, 8)]},
        {"id": "c", "trajectory": "none.safetensors"},
    ]
    report = run(jobs, "out", tiny)
    assert report.done == ["a", "b"]
    assert "no trajectory at none.safetensors" in report.failed["c"]
    expected = masa.sample(tiny, target="a dog", trajectory=trajectory, controls=masa.MasaCtrl(0), progress=False)
    # Up to rounding: at 64 pixels a cached source's rows may be multiplied otherwise.
    assert torch.allclose(Result.load("out/a").latents, expected.latents, atol=1e-4)


def test_pictures_of_controls_lie_beside_the_job_file(home):
    """Also where a file of the same name is in the working folder; a missing one is named."""
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(home / "data" / name)
    Image.new("L", (8, 8), 255).save(home / "a.png")
    drawn = {"kind": "T2IAdapter", "path": "demo", "source": "a.png", "target": ["b.png", None]}
    masked = {"kind": "MasaCtrl", "mask": {"kind": "GivenMasks", "source": "a.png", "target": ["b.png", "a.png"]}}
    blended = {"kind": "BlendedLatents", "mask": "b.png"}
    lost = {"kind": "BlendedLatents", "mask": "c.png"}
    job = {"target": ["a cat", "a dog"], **SMALL}
    found, missing = read_jobs(
        write_jobs(
            home / "data" / "jobs.jsonl",
            [{"id": "1", **job, "controls": [drawn, masked, blended]}, {"id": "2", **job, "controls": lost}],
        )
    )
    a, b = home / "data" / "a.png", home / "data" / "b.png"
    adapter, control, blend = found.arguments()["controls"]
    assert (adapter.source, adapter.target) == (a, (b, None))
    assert (control.mask.source, control.mask.target) == (a, (b, a))
    assert blend.mask == b
    with pytest.raises(masa.MasaError, match=r"no c\.png, which BlendedLatents names; paths are relative to the job"):
        missing.arguments()


def test_shards_are_parts_that_make_the_whole(home):
    jobs = [{"id": f"{n}", "image": f"pictures/{n % 3}.png", "target": "a cat", **SMALL} for n in range(10)]
    ordered = in_order(read_jobs(jobs))
    assert [job.id for job in ordered] == ["0", "3", "6", "9", "1", "4", "7", "2", "5", "8"]
    for parts in (1, 3, 4, 12):
        shards = [shard_of(ordered, (part, parts)) for part in range(1, parts + 1)]
        assert [job for shard in shards for job in shard] == ordered
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for bad in ((0, 2), (3, 2), (1, 0)):
        with pytest.raises(masa.MasaError, match="expected I/N with I from 1 to N"):
            shard_of(ordered, bad)


def test_an_inversion_that_a_condition_steers_is_not_shared(home):
    """`edit` gives the source's condition to its inversion: another job's targets would start elsewhere."""
    drawing = describe(masa.T2IAdapter("demo", source=Image.new("L", (8, 8))))
    edit = {"target": "a cat", "image": "a.png", **SMALL}
    plain, steered, single = read_jobs(
        [{"id": "1", **edit}, {"id": "2", **edit, "controls": [drawing]}, {"id": "3", **edit, "controls": drawing}]
    )
    assert plain.inversion is not None
    assert (steered.inversion, steered.source) == (single.inversion, single.source) == (None, None)


def test_jobs_that_share_a_source_stay_beside_each_other(home):
    edit = {"target": "a cat", "image": "a.png", **SMALL}
    jobs = [
        {"id": "1", **edit},
        {"id": "2", **edit, "guidance_scale": 3},
        {"id": "3", **SAMPLE},
        {"id": "4", **edit, "target": "a dog"},
        {"id": "5", **edit, "steps": 3},
        {"id": "6", **edit, "guidance_scale": 3, "controls": []},
        {"id": "7", **SAMPLE, "target": "a bird"},
    ]
    ordered = in_order(read_jobs(jobs))
    assert [job.id for job in ordered] == ["1", "4", "2", "6", "3", "7", "5"]
    unseeded = read_jobs([{"id": "1", "target": "a cat"}, {"id": "2", **edit, "method": "edit-friendly"}])
    assert [(job.inversion, job.source) for job in unseeded] == [(None, None)] * 2
    adapter = {"kind": "T2IAdapter", "path": "t.safetensors", "source": None, "target": "pose.png"}
    steered = read_jobs(
        [
            {"id": "1", **edit, "controls": [adapter]},
            {"id": "2", **edit, "controls": [adapter | {"source": "pose.png"}]},
        ]
    )
    assert [job.inversion is None for job in steered] == [False, True]  # an adapter of the source steers its inversion
    noisy = {"sampler": "dpm++2m-sde", **edit}
    friendly = {"method": "edit-friendly", **edit}
    fitted = {"method": "null-text", "source": "a cat", "guidance_scale": 3, **edit}
    for one, other, inversion, source in (
        ({"seed": 1, **edit}, {"seed": 2, **edit}, True, True),
        ({"seed": 1, **noisy}, {"seed": 2, **noisy}, True, False),
        ({"seed": 1, **friendly}, {"seed": 2, **friendly}, False, False),
        ({"seed": 1, **friendly}, {"seed": 1, **friendly}, True, True),
        (edit, {**edit, "negative_prompt": "blurry"}, True, False),
        (fitted, {**fitted, "guidance_scale": 4}, False, False),
        (edit, {**edit, "tiled": True}, False, False),
    ):
        first, second = read_jobs([{"id": "1", **one}, {"id": "2", **other}])
        assert (first.inversion == second.inversion, first.source == second.source) == (inversion, source)


def test_two_processes_do_no_job_twice(tiny, home):
    """A claimed job is left alone; one whose claimant died, or gave it back, is done."""
    jobs = [{"id": name, **SAMPLE} for name in "ab"]
    (home / "out" / ".claims").mkdir(parents=True)
    claim = Claim.take(home / "out" / ".claims" / "a")
    report = run(jobs, "out", tiny)
    assert (report.done, report.elsewhere) == (["b"], ("a",))
    assert read_saved("out/a") is None
    os.close(claim.handle)  # as when its process dies: the file stays
    report = run(jobs, "out", tiny)
    assert (report.done, report.elsewhere) == (["a", "b"], ())
    assert sorted(p.name for p in (home / "out").iterdir()) == ["a", "b", "report.jsonl"]


def test_what_a_killed_process_left_is_removed_with_its_job(tiny, home):
    for name in (".a.0123abcd.unfinished", ".a.b.0123abcd.unfinished", ".ab.0123abcd.unfinished"):
        (home / "out" / name).mkdir(parents=True)
        (home / "out" / name / "source.png").touch()
    assert run([{"id": "a", **SAMPLE}], "out", tiny).done == ["a"]
    left = [".a.b.0123abcd.unfinished", ".ab.0123abcd.unfinished", "a", "report.jsonl"]
    assert sorted(p.name for p in (home / "out").iterdir()) == left


def test_the_report_survives_what_a_kill_leaves(tmp_path):
    report = Report(tmp_path, ["b", "a"])
    for name, state in (("a", "failed"), ("b", "done"), ("a", "done")):
        report.add({"id": name, "state": state, "seconds": 1.0, "error": None})
    with report.path.open("a") as file:
        file.write('{"id": "c", "sta')
    report.add({"id": "d", "state": "done", "seconds": 1.0, "error": None})
    assert list(report.tidy()) == ["b", "a", "d"]
    assert [(row["id"], row["state"]) for row in lines(tmp_path)] == [("b", "done"), ("a", "done"), ("d", "done")]


def test_the_command_line(home, tiny_folder, capsys, monkeypatch):
    jobs = [{"id": "a", **SAMPLE}, {"id": "b", **SAMPLE, "target": "a dog"}]
    write_jobs(home / "data" / "jobs.jsonl", jobs)
    command = ["batch", "data/jobs.jsonl", "-c", str(tiny_folder), "--dtype", "fp32", "-q", "-o"]
    assert main([*command, "out", "--shard", "2/2"]) == 0
    assert capsys.readouterr().out == "1 done, 0 failed: out/report.jsonl\n"
    assert sorted(p.name for p in Path("out").iterdir()) == ["b", "report.jsonl"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, "out"]) == 0
    assert {p.name for p in Path("out/a").iterdir()} == set(file_names(1))
    monkeypatch.undo()
    monkeypatch.chdir(home)
    write_jobs(home / "data" / "jobs.jsonl", [*jobs, {"id": "c", "image": "none.png", "target": "a cat"}])
    assert main([*command, "out"]) == 1
    captured = capsys.readouterr()
    assert captured.out.endswith("2 done, 1 failed: out/report.jsonl\n")
    assert captured.err == "masa: c: no picture at data/none.png; paths are relative to the job file\n"
    changed = [{"id": "a", **SAMPLE, "seed": 9}]
    write_jobs(home / "data" / "jobs.jsonl", changed)
    for argv, message in (
        ([*command, "out"], "'a' was done with other settings"),
        (["batch", "data/none.jsonl", "-o", "out"], "no job file at data/none.jsonl"),
        (["batch", "data/jobs.jsonl"], "masa batch needs -o"),
        ([*command, "new", "--workers", "2"], "workers is 2, which is Ray's"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main([*command, "out", "--overwrite"]) == 0
    assert Result.load("out/a").settings["seed"] == 9


def test_torchrun_s_ranks():
    assert shard_of_rank({}) == (1, 1)
    assert shard_of_rank({"RANK": "2", "WORLD_SIZE": "4"}) == (3, 4)
    with pytest.raises(masa.MasaError, match="RANK or WORLD_SIZE is no number"):
        shard_of_rank({"RANK": "first"})


@pytest.mark.slow
def test_a_killed_batch_loses_the_job_in_hand_at_most(home, tiny_folder):
    """SIGKILL as soon as so many jobs are done; SIGTERM cleans up."""
    jobs = [{"id": f"{n}", **SAMPLE, "target": f"a cat {n}"} for n in range(12)]
    write_jobs(home / "jobs.jsonl", jobs)
    command = [sys.executable, "-m", "masa", "batch", "jobs.jsonl", "-o", "out", "-c", str(tiny_folder), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for enough, sign in ((1, signal.SIGKILL), (4, signal.SIGTERM), (6, signal.SIGKILL)):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while len(list(Path("out").glob("[!.]*/result.safetensors"))) < enough:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(sign)
        process.wait()
        whole = [p for p in Path("out").iterdir() if p.is_dir() and not p.name.startswith(".")]
        assert all(read_saved(p) for p in whole)
        assert len(whole) >= enough
        for folder in whole:
            Result.load(folder)
        if sign == signal.SIGTERM:
            assert process.returncode == 143
            assert process.stderr.read().endswith("masa: terminated; nothing unfinished was written\n")
    before = {p.parent.name: p.stat().st_mtime_ns for p in Path("out").glob("[!.]*/result.safetensors")}
    subprocess.run(command, env=environment, check=True)
    after = {p.parent.name: p.stat().st_mtime_ns for p in Path("out").glob("[!.]*/result.safetensors")}
    assert sorted(after) == sorted(job["id"] for job in jobs)
    assert before == {name: after[name] for name in before}
    assert {p.name for p in Path("out").iterdir()} == {*after, "report.jsonl"}  # nothing hidden is left
    assert [row["id"] for row in lines(Path("out"))] == [job["id"] for job in jobs]


def dying_once(folder, out, marker):
    """What loads the model in a worker; the first worker to begin a step once two jobs are done dies in it."""

    def load():
        sd = masa.load(folder, device="cpu", dtype="fp32", progress=False)

        def die(*_):
            if len(list(out.glob("[!.]*/result.safetensors"))) >= 2:
                with suppress(FileExistsError):
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), signal.SIGKILL)

        sd.unet.register_forward_pre_hook(die)
        return sd

    return load


@pytest.mark.slow
def test_ray_s_workers_share_the_jobs_and_one_may_die(home, tiny, tiny_folder):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'masa[ray]'")
    jobs = [
        {"id": f"{n}", "image": f"pictures/{('one.png', 'two.jpg')[n % 2]}", "target": f"a cat {n}", **SMALL}
        for n in range(8)
    ]
    jobs = [{**job, "controls": [CONTROL]} for job in jobs] + [{"id": "bad", "image": "none.png", "target": "a cat"}]
    write_jobs(home / "data" / "jobs.jsonl", jobs)
    out, marker = home / "out", home / "died"
    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning")
    try:
        with pytest.raises(masa.MasaError, match="workers is 3; expected a number from 1 to 2, the CPUs"):
            run("data/jobs.jsonl", out, None, ray=True, workers=3)
        report = run("data/jobs.jsonl", out, dying_once(tiny_folder, out, marker), ray=True, workers=2)
        assert marker.exists()
        assert report.done == [str(n) for n in range(8)]
        assert list(report.failed) == ["bad"]
        assert [row["id"] for row in lines(out)] == [job["id"] for job in jobs]
        assert sorted(p.name for p in out.iterdir() if not p.name.endswith(".unfinished")) == sorted(
            [*report.done, "report.jsonl"]
        )
        expected = masa.edit(
            tiny,
            home / "data" / "pictures" / "two.jpg",
            "a cat 3",
            controls=masa.MasaCtrl(0, 4),
            progress=False,
            **SMALL,
        )
        # Up to rounding: at 64 pixels a cached source's rows may be multiplied otherwise.
        assert torch.allclose(Result.load(out / "3").latents, expected.latents, atol=1e-4)
        with pytest.raises(FileNotFoundError, match=r"^no checkpoint at"):
            run([{"id": "new", **SAMPLE}], out, partial(masa.load, "none.safetensors"), ray=True)
    finally:
        ray.shutdown()


def test_what_ray_s_cluster_has_room_for():
    from masa.workflows.ray_workers import choose_workers

    assert choose_workers({"CPU": 16.0, "GPU": 4.0}, None) == (4, {"num_gpus": 1, "num_cpus": 1})
    assert choose_workers({"CPU": 2.0, "GPU": 4.0}, 3) == (3, {"num_gpus": 1, "num_cpus": 0})
    assert choose_workers({"CPU": 16.0}, None) == (1, {"num_gpus": 0, "num_cpus": 1})
    assert choose_workers({"CPU": 16.0}, 8) == (8, {"num_gpus": 0, "num_cpus": 1})
    for resources, workers in (({"CPU": 16.0, "GPU": 4.0}, 5), ({"CPU": 2.0}, 0), ({"CPU": 2.0}, 3)):
        with pytest.raises(masa.MasaError, match=f"workers is {workers}; expected a number from 1 to"):
            choose_workers(resources, workers)


def test_ray_loads_a_model_of_its_own_in_each_worker(tiny, home, monkeypatch):
    with pytest.raises(masa.MasaError, match="with ray=True sd is a function"):
        run([{"id": "a", **SAMPLE}], "out", tiny, ray=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(masa.MasaError, match=r"needs Ray: pip install 'masa\[ray\]'"):
        run([{"id": "a", **SAMPLE}], "out", masa.load, ray=True)


@pytest.mark.slow
def test_the_page_s_commands_run(home, monkeypatch):
    """The Python blocks run in test_docs; the commands here, on the first block's files."""
    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    first = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(first[1], {})
    commands = re.findall(r"^masa (batch .*)$", text, re.M)
    assert len(commands) == 3
    for command in commands:
        assert main([*command.split(), "-q"]) == 0
    for folder in ("out", "parts"):
        assert {p.name for p in Path(folder).iterdir()} == {"jumping", "standing", "plain", "report.jsonl"}


ODD = (None, True, -1, 0, 3, 10**30, 0.5, -1e300, "", "a", "\0", "\ud800", "../x", "x" * 10_000, [], [[]], ["a", 1], {})
ODD += (
    {"kind": "MasaCtrl"},
    {"kind": "MasaCtrl", "mask": 3},
    {"kind": "Magic", "own": True},
    {"kind": []},
    {"packed": 3},
)
ODD += (
    {"kind": "mapping"},
    {"kind": "mapping", "items": [1]},
    {"kind": "DDIM"},
    {"kind": "ScheduleConfig"},
    [{"kind": 1}],
)


def error_of(path):
    try:
        in_order(read_jobs(path))
    except masa.MasaError as error:
        return str(error)
    return None


def test_whatever_a_line_holds_it_is_a_job_or_one_clear_error(home):
    """800 lines, of jobs and of pasted settings, with odd values, keys and cuts."""
    chance = random.Random(0)
    settings = {"function": "sample", "fingerprint": "0" * 16, "dtype": "float32", "seed": 3, "source": "a cat"}
    made_from = {"image": "a.png", "method": "ddim", "guidance_scale": 1.0, "prompt": "a cat", "steps": 2}
    pasted = {**settings, "steps": 2, "target": ["a"], "trajectory": made_from, "controls": [CONTROL]}
    edit = {"image": "a.png", "method": "null-text", "source": "a cat", "target": "b", "sampler": {"kind": "DDIM"}}
    taken = 0
    for number in range(800):
        job = json.loads(json.dumps({"id": "a", **chance.choice((SAMPLE, pasted, edit, settings))}))
        places = [job, *(job[name] for name in ("trajectory",) if name in job), *job.get("controls", [])]
        for place in chance.choices(places, k=chance.choice((1, 1, 2))):
            names = [*place, "schedule", "guidance", "latents", "skip_steps", "eta", "tiled"]
            place[chance.choice(names)] = chance.choice(ODD)
        line = json.dumps(job)
        if number % 10 == 0:
            line = line[: chance.randrange(len(line))]
        (home / "jobs.jsonl").write_text(line + "\n")
        told = error_of("jobs.jsonl")
        assert told is None or (told.startswith("jobs.jsonl") and len(told) <= 300 and "\n" not in told), told
        taken += told is None
    assert 80 < taken < 700
