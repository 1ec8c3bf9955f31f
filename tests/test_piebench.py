"""PIE-Bench: the published layout read, edits made and taken up again, tables beside the published rows."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pie_cases import (
    EDITS,
    changed,
    picture,
    published_mask,
    rectangle,
    tiny_clip,
    tiny_dino,
    write_benchmark,
    write_mapping,
)
from PIL import Image

import masa
from masa.cli.arguments import build_parser
from masa.cli.commands import main
from masa.cli.control_arguments import build_controls
from masa.cli.idle_options import refuse_idle
from masa.metrics.networks import MetricNetworks
from masa.metrics.similarity import mean_squared_error, prompt_similarity, structural_similarity, structure_distance
from masa.workflows import piebench as workflow
from masa.workflows.piebench import clip_tokens
from masa.workflows.piebench_layout import decode_mask, find_picture, fit_result, plain_prompt, read_layout
from masa.workflows.piebench_methods import INVERTERS, METHODS, Plan, check_method
from masa.workflows.piebench_tables import METRICS, PUBLISHED, PieBench, Row

PLAIN = ["psnr_unedit_part", "mse_unedit_part", "ssim_unedit_part"]  # those that need no network
FAST = {"steps": 2, "guidance_scale": 3.0, "progress": False}


@pytest.fixture
def networks():
    """All but LPIPS's, with random weights; LPIPS as a function of its two pictures."""
    return MetricNetworks(tiny_dino(), lambda one, other: (one - other).square().mean().sqrt(), tiny_clip())


@pytest.fixture
def folder(tmp_path):
    """Three edits of pictures that are small enough to be made."""
    write_benchmark(tmp_path / "bench", side=64)
    return tmp_path / "bench"


@pytest.fixture
def results(tmp_path):
    """Three edits of 512x512 pictures, and results made elsewhere, under the sources' names."""
    bench, made = tmp_path / "whole", tmp_path / "made"
    for i, item in enumerate(write_benchmark(bench).values()):
        path = made / "annotation_images" / item["image_path"]
        path.parent.mkdir(parents=True)
        Image.fromarray(changed(picture(i), 10 + i)).save(path)
    return bench, made


# ------------------------------------------------------------------------------------------------------- layout


def test_layout_is_read(folder):
    mapping = json.loads((folder / "mapping_file.json").read_text())
    entries = read_layout(folder)
    assert [entry.id for entry in entries] == list(mapping)
    first = entries[0]
    assert first.source == "a cat sitting on the grass"
    assert first.target == "a dog sitting on the grass"
    assert first.blended_words == ("cat", "dog")
    assert entries[2].blended_words is None
    assert first.type_id == "1"
    np.testing.assert_array_equal(first.read_picture(), picture(0, 64))
    assert [entry.id for entry in read_layout(folder, ["2", "9"])] == list(mapping)[1:]


def test_square_brackets_are_removed():
    assert plain_prompt("a [cat] and [[two] dogs") == "a cat and two dogs"


@pytest.mark.parametrize(
    "runs",
    [
        [],
        rectangle(512, 100, 50, 30, 200),
        [512 * 512 - 5, 50],  # cut at the end
        [1000, 5000, 3000, 10_000],  # runs that overlap
        [512 * 512, 0],
    ],
    ids=["empty", "rectangle", "cut at the end", "overlapping", "behind the last pixel, without length"],
)
def test_masks_equal_the_published_decoder(runs):
    np.testing.assert_array_equal(decode_mask(runs, 512, 512), published_mask(runs))


def test_the_frame_may_always_change():
    mask = decode_mask([], 5, 7)
    assert mask.sum() == 2 * 7 + 2 * 3
    assert mask[1:-1, 1:-1].sum() == 0


def break_mapping(folder: Path, **changes) -> None:
    mapping = json.loads((folder / "mapping_file.json").read_text())
    first = next(iter(mapping.values()))
    for name, value in changes.items():
        if value is None:
            del first[name]
        else:
            first[name] = value
    write_mapping(folder, mapping)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": None}, r"mapping_file.json, '000000000000' lacks mask"),
        ({"mask": [0, 10, 5]}, r"the mask is \[0, 10, 5\]; expected whole numbers from 0, in pairs"),
        ({"mask": [-1, 10]}, "expected whole numbers from 0, in pairs"),
        ({"mask": [0.5, 10]}, "expected whole numbers from 0, in pairs"),
        ({"mask": "0 10"}, "expected whole numbers from 0, in pairs"),
        ({"mask": [0, 3, 64 * 64 + 1, 3]}, r"'000000000000': the mask has a run from pixel 4097 on, .*64x64 = 4096"),
        ({"image_path": "../../secret.png"}, r"image_path is '../../secret.png', outside annotation_images/"),
        ({"image_path": "nowhere.png"}, r"no picture at .*nowhere.png, which mapping_file.json names for '0000"),
        ({"image_path": 3}, r"image_path is 3; expected a text"),
        ({"editing_type_id": "12"}, r"editing_type_id is '12'; expected '0' to '9'"),
    ],
)
def test_a_broken_entry_is_named(folder, changes, message):
    break_mapping(folder, **changes)
    with pytest.raises(masa.MasaError, match=message):
        read_layout(folder)


def test_other_mistakes_in_the_layout(folder, tmp_path):
    with pytest.raises(masa.MasaError, match=r"holds no mapping_file.json; expected PIE-Bench's folder, with mapping"):
        read_layout(tmp_path)
    with pytest.raises(masa.MasaError, match=r"editing types are \['10'\]; expected some of '0' \(random\)"):
        read_layout(folder, ["10"])
    with pytest.raises(masa.MasaError, match="has no edits of type 5"):
        read_layout(folder, ["5"])
    (folder / "annotation_images" / "9_made/1_artificial/000000000002.png").write_text("no picture")
    (folder / "annotation_images" / "2_made/1_artificial/000000000001.png").unlink()
    with pytest.raises(masa.MasaError, match=r"no picture at .*000000000001.png.* \(and 1 more entries are wrong\)"):
        read_layout(folder)
    for text, message in (("{", "is no whole JSON file"), ("[1]", "holds a list; expected an object"), ("{}", "no ed")):
        (folder / "mapping_file.json").write_text(text)
        with pytest.raises(masa.MasaError, match=message):
            read_layout(folder)
    write_mapping(folder, {"one": 3})
    with pytest.raises(masa.MasaError, match="'one' is 3; expected an object with image_path"):
        read_layout(folder)


def test_results_are_found_by_several_names(folder, tmp_path):
    entry, made = read_layout(folder)[0], tmp_path / "made"
    assert find_picture(made, entry) is None
    for name in (
        "000000000000.webp",
        "000000000000.png",
        f"{entry.image_path}",
        f"annotation_images/{entry.image_path}",
    ):
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(5, 64)).save(path)
        assert find_picture(made, entry) == path  # the one nearest to the published layout


def test_of_a_sheet_the_last_picture_counts():
    parts = [picture(i, 512) for i in range(4)]
    np.testing.assert_array_equal(fit_result(np.concatenate(parts, 1), (512, 512), "x.png"), parts[3])
    labelled = np.concatenate([np.zeros((40, 1024, 3), np.uint8), np.concatenate(parts[:2], 1)])
    np.testing.assert_array_equal(fit_result(labelled, (512, 512), "x.png"), parts[1])
    np.testing.assert_array_equal(fit_result(parts[0], (512, 512), "x.png"), parts[0])
    for wrong in (picture(0, 256), picture(0, 1024), np.zeros((300, 1024, 3), np.uint8)):
        with pytest.raises(masa.MasaError, match=r"x.png is .* pixels and its source 512x512; expected that size"):
            fit_result(wrong, (512, 512), "x.png")


# ------------------------------------------------------------------------------------------------------ methods


def plan(method: str, inverter: str, edit: int = 0, words: bool = True) -> Plan:
    source, target, type_id, blended = EDITS[edit]
    pair = tuple(blended.split())
    entry = workflow.Entry("x", Path("x"), "x", plain_prompt(source), plain_prompt(target), type_id, pair or None, ())
    return METHODS[method](entry, inverter, lambda prompt, word: words and word in prompt)


def test_methods_have_the_published_settings():
    assert plan("masactrl", "pinned") == Plan("", (masa.MasaCtrl(4, 10),))
    assert plan("masactrl", "null-text").source == "a cat sitting on the grass"
    blend = masa.LocalBlend("cat", "dog")
    p2p = masa.PromptToPrompt("refine", {"dog": 2.0}, 0.4, 0.6, local_blend=blend)
    assert plan("p2p", "pinned") == Plan("a cat sitting on the grass", (p2p,))
    bare = masa.PromptToPrompt("refine", {}, 0.4, 0.6)
    assert plan("p2p", "pinned", edit=2) == Plan("a bird on a branch", (bare,))
    assert plan("p2p", "pinned", words=False).controls == (bare,)
    assert plan("p2p", "edit-friendly").controls == (masa.PromptToPrompt("replace", {}, 0.4, 0.6),)
    assert plan("p2p", "edit-friendly", edit=1).controls == (bare,)
    assert plan("pnp", "ddim") == Plan("", (masa.PlugAndPlay(0.8, 0.5),), "ugly, blurry, black, low res, unrealistic")
    assert plan("pnp", "negative-prompt") == Plan("a cat sitting on the grass", (masa.PlugAndPlay(),))
    assert plan("sdedit", "noise") == Plan("", ())


def test_unknown_methods_and_inverters_are_named():
    assert check_method("p2p", None, None) == "pinned"
    assert check_method("p2p", "direct", None) == "pinned"
    assert check_method("sdedit", None, None) == "noise"
    with pytest.raises(masa.MasaError, match="method is 'pix2pix'; expected one of 'masactrl', 'p2p', 'pnp', 'sdedit'"):
        check_method("pix2pix", None, None)
    with pytest.raises(masa.MasaError, match="inverter is 'edict'; expected one of 'ddim', 'pinned'"):
        check_method("p2p", "edict", None)
    for inverter, controls in (("ddim", None), (None, [masa.MasaCtrl()])):
        with pytest.raises(masa.MasaError, match=r"would do nothing: SDEdit neither inverts nor controls"):
            check_method("sdedit", inverter, controls)


# -------------------------------------------------------------------------------------------------------- edits


def edited(out: Path, id: str = "000000000000") -> np.ndarray:
    return np.array(Image.open(out / "edits" / id / "target_0.png"))


def test_edits_equal_masa_edit(tiny, folder, tmp_path):
    found = masa.piebench(folder, tiny, method="p2p", out=tmp_path / "out", metrics=PLAIN, limit=1, **FAST)
    assert len(found.rows) == 1
    image = folder / "annotation_images" / "1_made/1_artificial/000000000000.png"
    expected = masa.edit(
        tiny,
        image,
        "a dog sitting on the grass",
        "a cat sitting on the grass",
        controls=masa.PromptToPrompt("refine", {"dog": 2.0}, 0.4, 0.6, local_blend=masa.LocalBlend("cat", "dog")),
        height=64,
        width=64,
        seed=1234,
        **FAST,
    )
    np.testing.assert_array_equal(edited(tmp_path / "out"), np.array(expected.targets[0]))


@pytest.mark.slow
def test_every_method_and_inverter_makes_edits_of_its_own(tiny, folder, tmp_path):
    pictures = {}
    for method in METHODS:
        for inverter in [None] if method == "sdedit" else INVERTERS:
            if (method, inverter) == ("pnp", "null-text"):  # as long as all others together
                continue
            out = tmp_path / f"{method}-{inverter}"
            steps = FAST | {"steps": 5}  # MasaCtrl begins at the fifth
            masa.piebench(folder, tiny, method=method, inverter=inverter, out=out, metrics=PLAIN, limit=1, **steps)
            pictures[method, inverter] = edited(out).tobytes()
            assert json.loads((out / "settings.json").read_text())["method"] == method
    assert len(set(pictures.values())) == len(pictures)


def test_sdedit_is_masa_sdedit(tiny, folder, tmp_path):
    masa.piebench(folder, tiny, method="sdedit", out=tmp_path / "out", metrics=PLAIN, limit=1, **FAST | {"steps": 5})
    image = folder / "annotation_images" / "1_made/1_artificial/000000000000.png"
    settings = FAST | {"steps": 5, "height": 64, "width": 64, "seed": 1234}
    expected = masa.sdedit(tiny, image, "a dog sitting on the grass", 0.8, **settings)
    np.testing.assert_array_equal(edited(tmp_path / "out"), np.array(expected.targets[0]))


@pytest.mark.slow
def test_controls_seed_and_steps_are_the_caller_s(tiny, folder, tmp_path):
    def run(name, **changes):
        out = tmp_path / name
        asked = {"controls": masa.MasaCtrl(0, 0), "inverter": "edit-friendly", "seed": 0} | FAST | changes
        found = masa.piebench(folder, tiny, out=out, metrics=PLAIN, limit=1, **asked)
        assert found.name == "edit-friendly + masactrl with own controls"
        return edited(out).tobytes()

    plain = run("plain")
    assert run("again") == plain
    assert run("reference", backend="reference") != b""
    others = [run("seed", seed=1), run("steps", steps=3), run("guidance", guidance_scale=5.0), run("none", controls=[])]
    assert plain not in others


def test_a_run_that_was_cut_off_goes_on(tiny, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    settings = {"controls": [], "out": out, "metrics": PLAIN} | FAST
    whole = masa.piebench(folder, tiny, **settings)
    before = {path: path.stat().st_mtime_ns for path in out.glob("edits/*/target_0.png")}
    assert len(before) == 3
    lost = out / "edits" / "000000000001"
    shutil.rmtree(lost)
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"id": "0000')  # as a kill may leave it
    again = masa.piebench(folder, tiny, **settings)
    assert again.rows == whole.rows
    changed_now = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed_now == {lost / "target_0.png"}

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(workflow.Measure, "take", refuse)
    assert masa.piebench(folder, tiny, **settings).rows == whole.rows
    with pytest.raises(AssertionError, match="measured again"):
        masa.piebench(folder, tiny, libraries="2023", **settings)


def test_edits_made_otherwise_are_not_mixed_in(tiny, folder, tmp_path):
    settings = {"controls": [], "out": tmp_path / "out", "metrics": PLAIN, "limit": 1} | FAST
    masa.piebench(folder, tiny, **settings)
    with pytest.raises(masa.MasaError, match="holds edits made with steps 2, not 3; give another -o"):
        masa.piebench(folder, tiny, **settings | {"steps": 3})
    with pytest.raises(masa.MasaError, match="holds edits made with inverter 'pinned', not 'ddim'"):
        masa.piebench(folder, tiny, **settings | {"inverter": "ddim"})
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(masa.MasaError, match=r"settings.json is damaged"):
        masa.piebench(folder, tiny, **settings)


def test_an_edit_that_fails_does_not_stop_the_others(tiny, folder, tmp_path):
    # The second edit adds a word, which a swap cannot.
    settings = {"controls": masa.PromptToPrompt("replace"), "metrics": PLAIN, "method": "p2p"} | FAST
    found = masa.piebench(folder, tiny, out=tmp_path / "out", types=["1", "2"], **settings)
    assert [row.id for row in found.rows] == ["000000000000"]
    assert "swaps word for word" in found.failed["000000000001"]
    assert "1 of 2 edits failed" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(masa.MasaError, match=r"all 1 edits failed; 000000000001: .*swaps word for word"):
        masa.piebench(folder, tiny, types=["2"], out=tmp_path / "other", **settings)


def test_a_picture_that_cannot_be_edited_at_its_size_is_named(tiny, folder, tmp_path):
    path = folder / "annotation_images" / "2_made/1_artificial/000000000001.png"
    Image.fromarray(picture(1, 100)).save(path)
    with pytest.raises(masa.MasaError, match=r"000000000001.png cannot be edited at its own size: height is 100; exp"):
        masa.piebench(folder, tiny, out=tmp_path / "out", **FAST)


def test_an_edit_can_be_run_again(tiny, folder, tmp_path):
    masa.piebench(folder, tiny, method="pnp", out=tmp_path / "out", metrics=PLAIN, limit=1, **FAST)
    again = masa.rerun(tmp_path / "out" / "edits" / "000000000000" / "target_0.png", tiny, progress=False)
    np.testing.assert_array_equal(edited(tmp_path / "out"), np.array(again.targets[0]))


# -------------------------------------------------------------------------------------------------- measurement


@pytest.mark.slow
def test_scores_are_those_of_the_metrics(results, networks, tmp_path):
    bench, made = results
    found = masa.piebench(bench, pictures=made, networks=networks, out=tmp_path / "out", progress=False)
    assert found.missing == found.failed == {}
    for row, entry in zip(found.rows, read_layout(bench), strict=True):
        source, mask = entry.read_picture(), entry.read_mask()
        result = np.array(Image.open(made / "annotation_images" / entry.image_path))
        kept, ids = 1 - mask, clip_tokens(entry.target)
        mse = mean_squared_error(result, source, kept)
        expected = {
            "structure_distance": structure_distance(result, source, networks.dino),
            "structure_distance_divided": structure_distance(result, source, networks.dino, divided=True),
            "mse_unedit_part": mse,
            "psnr_unedit_part": -10 * math.log10(mse),
            "ssim_unedit_part": structural_similarity(result, source, kept),
            "lpips_unedit_part": 2 * math.sqrt(mse),  # of values in [-1, 1]
            "clip_similarity_target_image": prompt_similarity(result, ids, networks.clip),
            "clip_similarity_target_image_edit_part": prompt_similarity(result, ids, networks.clip, mask),
        }
        assert set(row.scores) == set(expected)
        for name, value in expected.items():
            assert row.scores[name] == pytest.approx(value, rel=1e-5), name


def test_where_all_may_change_what_is_kept_has_no_score(results, networks, tmp_path):
    bench, made = results
    break_mapping(bench, mask=[0, 512 * 512])
    found = masa.piebench(bench, pictures=made, networks=networks, out=tmp_path / "out", progress=False)
    first = found.rows[0].scores
    unedited = [name for name in first if name.endswith("_unedit_part")]
    assert len(unedited) == 4
    assert all(math.isnan(first[name]) for name in unedited)
    assert not any(math.isnan(value) for name, value in first.items() if name not in unedited)
    others = [row.scores["mse_unedit_part"] for row in found.rows[1:]]
    assert found.summary("mse_unedit_part").n == 2
    assert found.summary("mse_unedit_part").mean == pytest.approx(1e4 * np.mean(others))
    assert found.scores_csv().splitlines()[1].split(",")[3] == "nan"


def test_metrics_without_their_networks_are_named_and_the_others_given(results, tmp_path):
    bench, made = results
    (tmp_path / "empty").mkdir()
    settings = {"pictures": made, "progress": False, "dino": tmp_path / "empty", "clip": tmp_path / "empty"}
    found = masa.piebench(bench, out=tmp_path / "out", **settings)
    assert {"psnr_unedit_part", "mse_unedit_part", "ssim_unedit_part"} <= set(found.rows[0].scores)
    assert "structure_distance" in found.missing
    assert "clip_similarity_target_image_edit_part" in found.missing
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Not measured:" in table
    assert "- structure_distance, structure_distance_divided: DINO ViT-B/8 could not be loaded from" in table
    with pytest.raises(masa.MasaError, match="cannot be taken: structure_distance: DINO"):
        masa.piebench(bench, metrics=["structure_distance"], out=tmp_path / "out", **settings)


def test_what_will_be_missing_is_said_before_the_edits(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "make_edits", lambda *_: pytest.fail("edits are made"))
    settings = {"networks": MetricNetworks(missing={"dino": "DINO is not here"}), "out": tmp_path / "out"} | FAST
    monkeypatch.setattr(workflow.warnings, "warn", lambda message, **_: said.append(message))
    said: list[str] = []
    with pytest.raises(pytest.fail.Exception, match="edits are made"):
        masa.piebench(folder, tiny, **settings)
    assert said == ["will not be measured: structure_distance, structure_distance_divided: DINO is not here"] + [
        f"will not be measured: {names}: networks hold none for it; see load_networks"
        for names in ["lpips_unedit_part, clip_similarity_target_image, clip_similarity_target_image_edit_part"]
    ]


def test_networks_from_folders_and_the_library_s_year(results, tmp_path):
    bench, made = results
    tiny_dino().save_pretrained(tmp_path / "dino")
    tiny_clip().save_pretrained(tmp_path / "clip")
    names = ["structure_distance", "clip_similarity_target_image", "ssim_unedit_part"]
    settings = {"pictures": made, "metrics": names, "limit": 1, "progress": False, "out": tmp_path / "out"}
    settings |= {"dino": tmp_path / "dino", "clip": tmp_path / "clip"}
    now = masa.piebench(bench, **settings).rows[0].scores
    entry = read_layout(bench)[0]
    source, result = entry.read_picture(), np.array(Image.open(made / "annotation_images" / entry.image_path))
    assert now["structure_distance"] == pytest.approx(structure_distance(result, source, tiny_dino()), rel=1e-4)
    ids = clip_tokens(entry.target)
    assert now["clip_similarity_target_image"] == pytest.approx(prompt_similarity(result, ids, tiny_clip()), abs=1e-4)
    then = masa.piebench(bench, libraries="2023", **settings).rows[0].scores
    assert then["ssim_unedit_part"] != now["ssim_unedit_part"]
    assert then["structure_distance"] != now["structure_distance"]
    assert then["clip_similarity_target_image"] == now["clip_similarity_target_image"]


def test_mistakes_in_a_call(results, folder, tiny, tmp_path):
    bench, made = results
    out = {"out": tmp_path / "out", "progress": False}
    with pytest.raises(masa.MasaError, match="the model is None; expected what"):
        masa.piebench(bench, **out)
    with pytest.raises(masa.MasaError, match="sd and method would do nothing: pictures were made already"):
        masa.piebench(bench, tiny, method="p2p", pictures=made, **out)
    with pytest.raises(masa.MasaError, match="no folder of pictures at"):
        masa.piebench(bench, pictures=tmp_path / "nowhere", **out)
    with pytest.raises(masa.MasaError, match=r"metrics are \['psnr'\]; expected some of 'structure_distance'"):
        masa.piebench(bench, pictures=made, metrics=["psnr"], **out)
    with pytest.raises(masa.MasaError, match="libraries is '2021'; expected 'current' or '2023'"):
        masa.piebench(bench, pictures=made, libraries="2021", **out)
    with pytest.raises(masa.MasaError, match="limit is 0; expected a number of edits from 1"):
        masa.piebench(bench, pictures=made, limit=0, **out)
    with pytest.raises(masa.MasaError, match="method is 'pix2pix'"):
        masa.piebench(folder, tiny, method="pix2pix", **out)
    next(made.rglob("*.png")).unlink()
    with pytest.raises(masa.MasaError, match=r"lacks 1 of 3 results, such as .*; add them, or choose fewer edits"):
        masa.piebench(bench, pictures=made, **out)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- tables


def scored(**changes: list[float]) -> PieBench:
    values = {metric.name: [0.01, 0.03] for metric in METRICS} | changes
    rows = [Row(str(i), "05"[i], {name: v[i] for name, v in values.items() if len(v) > i}) for i in range(2)]
    return PieBench("mine", tuple(rows), 2)


def test_tables_have_the_published_units_and_rows():
    table = scored().markdown().splitlines()
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[:2] == ["mine", "2"]
    means = [cell.split(" ")[0] for cell in cells[2:]]
    assert means == ["20.00", "0.02", "20.00", "200.00", "2.00", "0.02", "0.02", "20.00"]
    assert len(PUBLISHED) == 6
    for line, (name, values) in zip(table[3:9], PUBLISHED.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells == [name, "700", *(f"{value:.2f}" for value in values), "–"]
    assert "| 5 change pose | 1 |" in scored().markdown()


def test_published_numbers_are_the_specification_s():
    assert PUBLISHED["DDIM + MasaCtrl (SD 1.4)"] == (28.38, 22.17, 106.62, 86.97, 79.67, 23.96, 21.16)
    assert PUBLISHED["ViMAEdit (SD 1.5, IP-Adapter)"] == (12.43, 28.49, 44.39, 29.12, 86.38, 25.97, 22.85)


def test_csv_can_be_read_back(tmp_path):
    found = scored(psnr_unedit_part=[21.0, math.nan])
    paths = found.save(tmp_path)
    assert [path.name for path in paths] == ["table.md", "table.csv", "scores.csv"]
    rows = list(csv.DictReader(io.StringIO(paths[1].read_text(encoding="utf-8"))))
    of_psnr = [row for row in rows if row["metric"] == "psnr_unedit_part"]
    assert [(row["row"], row["editing_type"], row["n"]) for row in of_psnr[:3]] == [
        ("mine", "all", "1"),
        ("mine", "0", "1"),
        ("mine", "5", "0"),
    ]
    assert float(of_psnr[0]["mean"]) == 21.0
    assert math.isnan(float(of_psnr[2]["mean"]))
    assert float(of_psnr[3]["mean"]) == 22.17
    lines = list(csv.DictReader(io.StringIO(paths[2].read_text(encoding="utf-8"))))
    assert float(lines[1]["ssim_unedit_part"]) == 0.03
    assert lines[1]["editing_type_id"] == "5"


def test_bars_in_names_do_not_break_a_table():
    assert "a\\|b" in replace(scored(), name="a|b").markdown()


# ------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("masa.pipeline.cpu_has_bf16", lambda: False)
    return tmp_path


@pytest.mark.slow
def test_the_command_edits_measures_and_prints(home, folder, tiny_folder, tiny, capsys):
    argv = ["piebench", str(folder), "--steps", "2", "--guidance", "3", "--seed", "1234", "-q", "-c", str(tiny_folder)]
    argv += ["--metrics", ",".join(PLAIN), "--limit", "1"]
    assert main([*argv, "--method", "p2p", "--inverter", "direct"]) == 0
    printed = capsys.readouterr().out
    assert "| pinned + p2p | 1 |" in printed
    assert "DDIM + MasaCtrl (SD 1.4)" in printed
    out = home / "masa-out" / "piebench-pinned-p2p"
    assert f"{Path('masa-out/piebench-pinned-p2p/table.md')}\n" in printed
    expected = masa.piebench(folder, tiny, method="p2p", out=home / "own", metrics=PLAIN, limit=1, **FAST)
    np.testing.assert_array_equal(edited(out), edited(home / "own"))
    assert (out / "scores.csv").read_text() == expected.scores_csv()
    assert main([*argv, "--method", "masactrl", "--start-step", "1", "--start-layer", "6", "-o", "mine"]) == 0
    masa.piebench(folder, tiny, controls=masa.MasaCtrl(1, 6), out=home / "same", metrics=PLAIN, limit=1, **FAST)
    np.testing.assert_array_equal(edited(home / "mine"), edited(home / "same"))


def test_the_command_measures_what_was_made_elsewhere(home, results, capsys):
    bench, made = results
    argv = ["piebench", str(bench), "--pictures", str(made), "--metrics", "mse_unedit_part", "-q", "-o", "out"]
    assert main([*argv, "--types", "1,9", "--libraries", "2023"]) == 0
    printed = capsys.readouterr()
    assert "| pictures in made | 2 |" in printed.out
    assert "demo model" not in printed.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pictures", "made", "--method", "p2p"], "--method p2p would do nothing: the results of --pictures"),
        (["--pictures", "made", "--steps", "3"], "--steps 3 would do nothing"),
        (["--pictures", "made", "--start-step", "3"], "--pictures made would do nothing: controls make edits"),
        (["--cross-steps", "0.4"], "--cross-steps 0.4 is prompt-to-prompt's, which is not in use"),
        (["--method", "sdedit", "--inverter", "ddim"], "SDEdit neither inverts nor controls"),
        (["--types", "11"], "editing types are ['11']"),
        (["--method", "pix2pix"], "invalid choice: 'pix2pix'"),
        (["--set", "MasaCtrl.start_step=3"], "no MasaCtrl is in use"),
    ],
)
def test_mistakes_on_the_command_line(home, folder, tiny_folder, capsys, argv, message):
    Path("made").mkdir()
    model = [] if "--pictures" in argv else ["-c", str(tiny_folder)]
    try:
        code = main(["piebench", str(folder), *argv, *model, "-q"])
    except SystemExit as exit:  # argparse's own
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("masa-out").exists()


@pytest.mark.slow
def test_the_command_says_when_edits_failed(home, folder, tiny_folder, capsys):
    argv = ["piebench", str(folder), "--method", "p2p", "--control", "prompt-to-prompt", "--types", "1,2", "-q"]
    assert main([*argv, "--steps", "2", "--metrics", "mse_unedit_part", "-c", str(tiny_folder)]) == 1
    assert "1 of 2 edits failed" in capsys.readouterr().out


def test_missing_folder_is_refused_before_the_model_is_loaded(home, monkeypatch, capsys):
    monkeypatch.setattr("masa.cli.commands.load_model", lambda args: pytest.fail("loaded"))
    assert main(["piebench", "nowhere"]) == 2
    assert "nowhere holds no mapping_file.json" in capsys.readouterr().err


def test_weights_stay_where_they_are_wanted():
    networks = MetricNetworks(tiny_dino())
    assert networks.to("cpu").dino is networks.dino
    moved = networks.to(torch.device("meta"))
    assert next(moved.dino.parameters()).device.type == "meta"


def test_edits_in_the_hands_of_another_run_are_named(tiny, folder, tmp_path, monkeypatch):
    batch = workflow.batch

    def leave_one(jobs, *rest, **given):
        return replace(batch(jobs[1:], *rest, **given), elsewhere=(jobs[0]["id"],))

    monkeypatch.setattr(workflow, "batch", leave_one)
    settings = {"controls": [], "metrics": PLAIN, "limit": 2} | FAST
    found = masa.piebench(folder, tiny, out=tmp_path / "out", **settings)
    assert found.failed == {"000000000000": "another run is at it; call again when that is done"}


def test_the_page_s_commands_are_understood():
    page = (Path(__file__).parent.parent / "docs" / "piebench.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("masa piebench ")]
    assert len(commands) == 5
    for command in commands:
        args = build_parser().parse_args(command.split()[1:])
        refuse_idle(args)
        assert build_controls(args) or args.control == []
