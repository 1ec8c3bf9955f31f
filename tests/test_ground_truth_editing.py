"""The benchmark of edits against their truth: cases, measures, intervals, stored runs."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_cases import make_adapter, save

from masa.weights.demo.between import Between
from masa.weights.demo.pool import FIRST_TRAINING_SEED
from masa.weights.demo.pose_classifier import load_pose_classifier

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import drawn_poses
import ground_truth_editing
from ground_truth.cases import CALIBRATION_SEEDS, MODEL_SEEDS, SWEEP_SEEDS, TABLE_SEEDS, Individual
from ground_truth.drawn import NEAR, candidates, drawn_cases, pose_error, seen_pose, summarise_drawn
from ground_truth.figures import write_curves, write_grid
from ground_truth.intervals import clustered, equal_error, share_interval, wilson
from ground_truth.measures import against_source, against_truth, appearance_error, palette_distance, psnr
from ground_truth.methods import GROUPS, Drawing, Editor, Method, Settings, fits_pairs, real_methods, synthesise
from ground_truth.report import Outcome, Threshold, summarise
from ground_truth.runs import Store, Task, calibration_pair, estimate, missing

SETTINGS = Settings(steps=20, guidance_scale=7.5, start_step=2, start_layer=8)
WHO = Individual.draw(TABLE_SEEDS)
POSE = WHO.target_poses[0]


@pytest.fixture(scope="module")
def classifier():
    return load_pose_classifier()


def test_individuals_are_held_out_and_keep_their_prompts_to_pose_and_direction():
    assert TABLE_SEEDS + 1000 < FIRST_TRAINING_SEED
    assert Individual.draw(TABLE_SEEDS) == WHO
    assert WHO.source_pose not in WHO.target_poses
    assert WHO.appearance.colour not in WHO.source_prompt
    for prompt, pose in zip(WHO.target_prompts, WHO.target_poses, strict=True):
        assert prompt.replace(pose, WHO.source_pose) == WHO.source_prompt


def test_the_truth_has_no_error_and_the_source_has_the_wrong_pose(classifier):
    perfect = against_truth(classifier, WHO, POSE, WHO.picture(POSE, 128))
    assert perfect.pose
    assert perfect.appearance == 0
    assert perfect.background == 0
    assert perfect.psnr == 100
    assert perfect.ssim == pytest.approx(1)
    unedited = against_truth(classifier, WHO, POSE, WHO.picture(WHO.source_pose, 128))
    assert not unedited.pose
    assert unedited.background == 0  # only the subject has moved


def test_another_individual_is_further_from_the_truth_than_the_same_one_blurred():
    who, pose, same, other = calibration_pair(400_003, "cat", 128)
    mask = who.mask(pose, 128)
    blurred = np.clip(same.astype(int) + np.random.default_rng(0).integers(-20, 21, same.shape), 0, 255)
    assert appearance_error(same, same, mask) == 0
    assert appearance_error(blurred, same, mask) < 5 < 20 < appearance_error(other, same, mask)


def test_appearance_error_is_the_shift_of_colour_inside_and_blind_outside():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 200, (64, 64, 3)).astype(np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[20:40, 16:50] = True
    assert appearance_error(truth + 10, truth, mask) == pytest.approx(10, abs=1e-3)
    outside = truth.copy()
    outside[~mask] = 0
    assert appearance_error(outside, truth, mask) == 0


def test_pairs_are_measured_on_where_the_subject_usually_is(classifier):
    source, target = WHO.picture(WHO.source_pose, 128), WHO.picture(POSE, 128)
    same = against_source(classifier, WHO, POSE, source, target)
    stranger = replace(WHO, appearance=Individual.draw(TABLE_SEEDS + 1).appearance)
    other = against_source(classifier, WHO, POSE, source, stranger.picture(POSE, 128))
    assert same.pose
    assert same.background < 1
    assert same.appearance < other.appearance


def test_palette_distance_ignores_places_and_sees_colours():
    pixels = np.random.default_rng(0).uniform(0, 255, (400, 3))
    assert palette_distance(pixels, pixels[::-1]) == 0
    assert palette_distance(pixels, pixels + 10) == pytest.approx(10)


def test_psnr_of_a_known_error():
    zeros = np.zeros((4, 4, 3), np.uint8)
    assert psnr(zeros + 255, zeros) == pytest.approx(0)
    assert psnr(zeros + 51, zeros) == pytest.approx(20 * np.log10(5))


def test_wilson_has_its_published_values():
    assert wilson(18, 24) == pytest.approx((0.5510, 0.8800), abs=1e-3)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)


def test_clustered_bootstrap_sees_that_copies_add_nothing():
    values = list(np.random.default_rng(0).normal(size=50))
    alone = clustered(values, list(range(50)))
    copied = clustered([v for v in values for _ in range(3)], [i for i in range(50) for _ in range(3)])
    assert copied == pytest.approx(alone)
    independent = clustered([v for v in values for _ in range(3)], list(range(150)))
    assert independent[1] - independent[0] < 0.7 * (alone[1] - alone[0])
    assert alone[0] < np.mean(values) < alone[1]
    half = 1.96 * np.std(values) / np.sqrt(50)
    assert alone[1] - alone[0] == pytest.approx(2 * half, rel=0.1)


def test_share_interval_is_never_narrower_than_either():
    hits = [True] * 12
    assert share_interval(hits, [i // 3 for i in range(12)]) == (pytest.approx(wilson(12, 12)[0]), 1.0)
    together = [i % 2 == 0 for i in range(20) for _ in range(3)]
    low, high = share_interval(together, [i for i in range(20) for _ in range(3)])
    assert high - low > wilson(30, 60)[1] - wilson(30, 60)[0]


def test_equal_error_lies_where_both_errors_meet():
    assert equal_error([1, 2, 3], [7, 8, 9]) == (5.0, 0.0, 0.0)
    threshold, refused, accepted = equal_error([1, 2, 3, 6], [4, 7, 8, 9])
    assert 4 < threshold < 6
    assert refused == accepted == 0.25
    with pytest.raises(ValueError, match="two different"):
        equal_error([1], [1])


def test_a_run_goes_on_where_it_stopped_and_refuses_other_settings(tmp_path):
    store, methods = Store(tmp_path), {"a": Method(), "b": Method(inversion="null-text")}
    assert [sorted(task.methods) for task in missing(store, "real", methods, {"a": 2, "b": 2})] == [["a", "b"]] * 2
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    store.save("real", "a", TABLE_SEEDS, pictures)
    np.testing.assert_array_equal(store.load("real", "a", TABLE_SEEDS), pictures)
    left = missing(store, "real", methods, {"a": 2, "b": 2})
    assert [sorted(task.methods) for task in left] == [["b"], ["a", "b"]]
    assert store.methods("real") == ["a"]
    assert "2 individuals" in estimate(left, SETTINGS, 40.0, 2)
    store.claim({"steps": 20})
    store.claim({"steps": 20})
    with pytest.raises(SystemExit, match="steps 20, not 50"):
        store.claim({"steps": 50})


def test_slow_methods_have_fewer_individuals(tmp_path):
    tasks = missing(Store(tmp_path), "real", {"a": Method(), "b": Method()}, {"a": 3, "b": 1})
    assert [sorted(task.methods) for task in tasks] == [["a", "b"], ["a"], ["a"]]
    assert missing(Store(tmp_path), "real", {"a": Method()}, {"a": 0}) == []


def test_costs_count_the_rows_of_the_network():
    assert Method().rows(20, 3, real=True) == 120  # a pinned source that nobody reads is not computed
    assert Method().rows(20, 3, real=False) == 160
    assert Method(strength=0.5).rows(20, 3, real=True) == 60
    one, both = ({"a": Method()}, {"a": Method(), "b": Method()})
    assert Task("real", 0, both).rows(SETTINGS) > Task("real", 0, one).rows(SETTINGS)
    # An inversion is shared: the second method of null-text costs no second fitting.
    null_text = dict(GROUPS["null-text"].methods(SETTINGS, "cat"))
    first = dict([next(iter(null_text.items()))])
    assert Task("real", 0, null_text).rows(SETTINGS) < 1.5 * Task("real", 0, first).rows(SETTINGS)


def test_the_table_holds_every_method_and_says_its_setting():
    real = real_methods(SETTINGS, "cat")
    plain = {"fixed seed", "SDEdit 0.5", "SDEdit 0.8", "Prompt-to-Prompt", "Plug-and-Play", "StyleTransfer S=2 L=8"}
    variants = {"MasaCtrl S=2 L=10"} | {
        f"MasaCtrl S=2 L=8{variant}" for variant in ("", ", free source", ", word masks", ", union")
    }
    others = {"Blended Latent Diffusion, true mask", "Prompt-to-Prompt, LocalBlend"}
    inverted = {
        f"{inversion}{control}"
        for inversion in ("negative-prompt", "null-text", "edit-friendly")
        for control in ("", ", MasaCtrl S=2 L=8", ", Prompt-to-Prompt")
    }
    drawn = {f"MasaCtrl S=2 L=8, {said} pose" for said in ("drawn", "drawn and named")}
    drawn |= {"fixed seed, drawn and named pose"}
    assert plain | variants | others | inverted | drawn | {"Prompt-to-Prompt, pose reweighted by 2"} == set(real)
    pairs = {name for name, method in real.items() if fits_pairs(method)}
    assert {"fixed seed", "MasaCtrl S=2 L=8", "Plug-and-Play"} < pairs
    assert not any(word in name for name in pairs for word in ("SDEdit", "null-text", "free", "Blended", "drawn"))


@pytest.mark.slow
def test_every_method_edits_and_no_two_alike(tiny, tmp_path):
    settings = Settings(steps=2, guidance_scale=4.0, start_step=1, start_layer=8)
    editor = Editor(tiny, WHO, settings)
    adapter = save(tmp_path / "lines.safetensors", make_adapter("full", 1).state_dict())  # the shipped one is wider
    methods = {
        name: method if method.drawing is None else replace(method, drawing=Drawing(adapter=str(adapter)))
        for name, method in real_methods(settings, "cat").items()
    }
    made = {name: editor.edit(method) for name, method in methods.items()}
    assert {pictures.shape for pictures in made.values()} == {(4, 128, 128, 3)}
    names = {pictures[1:].tobytes(): name for name, pictures in made.items()}
    assert set(made) == set(names.values()), "some edits are the same"
    again = synthesise(tiny, WHO, settings, Method())
    assert again.shape == (4, 128, 128, 3)


def test_an_edit_that_faces_the_other_way_is_also_judged_by_the_truth_that_does(classifier):
    turned = WHO.turned(-WHO.scene.facing)
    assert turned.turned(WHO.scene.facing) == WHO
    measures = against_truth(classifier, WHO, POSE, turned.picture(POSE, 128))
    assert measures.pose
    assert not measures.facing
    assert measures.appearance_as_seen == 0 < measures.appearance
    shares = Outcome(1, POSE, measures, measures.appearance / 2).shares
    assert shares["both right as seen"]
    assert not shares["both right"]
    straight = against_truth(classifier, WHO, POSE, WHO.picture(POSE, 128))
    assert straight.facing
    assert straight.appearance_as_seen == straight.appearance


def test_summary_counts_both_only_where_both_are_right(classifier):
    good = against_truth(classifier, WHO, POSE, WHO.picture(POSE, 128))
    cases = [
        Outcome(1, "a", good, 10.0),
        Outcome(1, "b", replace(good, pose=False), 10.0),
        Outcome(2, "a", replace(good, appearance=20.0), 10.0),
        Outcome(2, "b", replace(good, pose=False, appearance=20.0), 10.0),
    ]
    row = summarise("real", "m", cases)
    assert (row["cases"], row["individuals"]) == (4, 2)
    assert (row["pose"], row["appearance right"], row["both right"]) == (0.5, 0.5, 0.25)
    assert row["both right as seen"] == 0.5
    assert row["both right low"] <= 0.25 <= row["both right high"]
    assert row["appearance"] == 10
    assert row["appearance_as_seen"] == 0


# ---------------------------------------------------------------------------------------------- drawn poses


def test_poses_between_are_two_of_those_that_the_source_does_not_show():
    who = Individual.draw(TABLE_SEEDS, between=True)
    assert who.appearance == WHO.appearance
    assert len(who.target_poses) == 3
    for pose in who.target_poses:
        assert {pose.first, pose.second} < set(WHO.target_poses)
        assert who.prompt(pose) == who.prompt(pose.first)
    assert "," in WHO.prompt(None)
    assert not any(pose in WHO.prompt(None) for pose in (WHO.source_pose, *WHO.target_poses))


def test_the_nearest_render_tells_the_pose():
    for pose in (POSE, Between("sitting", "lying", 0.5), Between("standing", "jumping", 0.25)):
        exact = WHO.picture(pose, 128)
        noisy = np.clip(exact.astype(int) + np.random.default_rng(0).integers(-30, 31, exact.shape), 0, 255)
        assert seen_pose(WHO, noisy.astype(np.uint8)) == pose
    assert pose_error("cat", POSE, POSE) == 0
    ends = pose_error("cat", "sitting", "lying")
    assert pose_error("cat", "sitting", Between("sitting", "lying", 0.25)) == pytest.approx(ends / 4)
    apart = [pose_error("cat", a, b) for a in candidates("cat") for b in candidates("cat") if a != b]
    assert min(apart) > NEAR


def test_a_drawn_pose_is_the_targets_own():
    control = Drawing(weight=1.5, tau=0.5).control(WHO, 128)
    assert (control.weight, control.tau, str(control.path)) == (1.5, 0.5, "demo")
    for shown, pose in zip(control.target, WHO.target_poses, strict=True):
        assert np.array_equal(shown, WHO.stick(pose, 128))


def test_drawn_poses_are_right_where_pose_and_appearance_are(classifier, tmp_path):
    store, who = Store(tmp_path), Individual.draw(TABLE_SEEDS, between=True)
    truth = np.stack([who.picture(pose, 128) for pose in (who.source_pose, *who.target_poses)])
    store.save("between", "exact", TABLE_SEEDS, truth)
    store.save("between", "swapped", TABLE_SEEDS, truth[[0, 2, 3, 1]])
    limit = Threshold(17.0, 0.0, 0.0, 10)
    rows = [
        summarise_drawn("between", name, drawn_cases(store, classifier, "between", name, "cat", limit))
        for name in ("exact", "swapped")
    ]
    assert [row["pose"] for row in rows] == [1, 0]
    assert [row["both right"] for row in rows] == [1, 0]
    assert rows[0]["pose error"] == 0 < rows[1]["pose error"]


@pytest.mark.slow
def test_many_edits_of_one_run_are_those_of_one_each(tiny, tmp_path):
    adapter = save(tmp_path / "lines.safetensors", make_adapter("full", 1).state_dict())
    args = drawn_poses.arguments(
        ["sweep", "table", "--adapter", str(adapter), "--steps", "2", "-S", "1", "--sweep-weights", "0.5",
         "--sweep-taus", "0.5", "--sweep-starts", "0", "--sweep-guidances", "2"]
    )  # fmt: skip
    settings, store = Settings(2, 4.0, 1, 6), Store(tmp_path / "run")
    for section, seed in (("table", TABLE_SEEDS), ("sweep", SWEEP_SEEDS)):
        todo = drawn_poses.still_missing(args, store, section, seed)
        drawn_poses.make_edits(tiny, store, settings, todo)
        assert not drawn_poses.still_missing(args, store, section, seed)
        assert len({store.load(e.section, e.name, seed)[1:].tobytes() for e in todo}) == len(todo)  # no two alike
        for edits in todo[:: 1 if section == "table" else 5]:
            alone = Editor(tiny, edits.who, settings).edit(edits.method)
            together = store.load(edits.section, edits.name, seed)
            # Sums of other batches round otherwise: a grey value here and there.
            assert np.abs(alone.astype(int) - together).max() <= 1


# -------------------------------------------------------------------------------------------------- figures


def test_curves_count_the_cases_below_each_threshold(classifier, tmp_path):
    good = against_truth(classifier, WHO, POSE, WHO.picture(POSE, 128))
    cases = [
        Outcome(1, POSE, replace(good, appearance=error, appearance_as_seen=5.0, pose=error < 50), 17.3)
        for error in (10.0, 30.0, 51.0)
    ]
    rows = write_curves(tmp_path / "curves", "real", {("real", "m"): cases, ("sweep", "n"): cases})
    assert {row["method"] for row in rows} == {"m"}
    captioned = {row["threshold"]: row["both right"] for row in rows if row["truth"] == "as captioned"}
    assert [captioned[t] for t in (0.0, 10.0, 10.5, 17.3, 30.5, 60.0)] == [0, 0, 0.3333, 0.3333, 0.6667, 0.6667]
    seen = {row["threshold"]: row["both right"] for row in rows if row["truth"] == "direction as seen"}
    assert (seen[5.0], seen[5.5]) == (0, 0.6667)
    assert [row["threshold"] for row in rows if row["equal error"]] == [17.3, 17.3]
    with (tmp_path / "curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.csv", "curves.png"]
    assert write_curves(tmp_path / "none", "synthesis", {("real", "m"): cases}) == []


def test_a_grid_of_methods_with_no_individual_in_common_leaves_cells_empty(tmp_path):
    store = Store(tmp_path / "run")
    store.claim({"subject": "cat", "image_size": 32})
    for k, name in enumerate(("a", "b")):
        store.save("real", name, TABLE_SEEDS + k, np.zeros((4, 32, 32, 3), np.uint8))
    write_grid(tmp_path / "grid.png", store, "real", ["a", "b"], {}, 8)
    assert (tmp_path / "grid.png").exists()
    write_grid(tmp_path / "none.png", store, "real", ["c"], {}, 8)
    assert not (tmp_path / "none.png").exists()


def test_the_report_writes_all_its_files(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path / "run")
    store.claim({"subject": "cat", "image_size": 64, "steps": 20, "guidance_scale": 4.0, "checkpoint": "demo",
                 "fingerprint": "0"})  # fmt: skip
    for k in range(10):
        _, _, same, other = calibration_pair(CALIBRATION_SEEDS + k, "cat", 64)
        store.save("model", "same individual", CALIBRATION_SEEDS + k, same[None])
        store.save("model", "other individual", CALIBRATION_SEEDS + k, other[None])
    who = Individual.draw(MODEL_SEEDS)
    store.save("model", "round trip", MODEL_SEEDS, who.picture(who.source_pose, 64)[None])
    truth = np.stack([WHO.picture(pose, 64) for pose in (WHO.source_pose, *WHO.target_poses)])
    for section, name in (("real", "fixed seed"), ("real", "null-text"), ("real", "MasaCtrl S=9 L=9"),
                          ("synthesis", "fixed seed"), ("sweep", "MasaCtrl S=2 L=8")):  # fmt: skip
        store.save(section, name, 200_000 if section == "sweep" else TABLE_SEEDS, truth)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["x", "report", "--run", str(store.folder), "--out", str(out), "--steps", "20"])
    ground_truth_editing.main()
    wanted = {f"ground_truth_{name}" for name in (
        "editing.csv", "editing.json", "editing.md", "model.csv", "real.png", "real_further.png", "real_inversions.png",
        "synthesis.png", "sweep.csv", "sweep.png", "thresholds_real.csv", "thresholds_real.png",
        "thresholds_synthesis.csv", "thresholds_synthesis.png")}  # fmt: skip
    assert {path.name for path in out.iterdir()} == wanted
    text = capsys.readouterr().out
    assert "both right, direction as seen" in text
    assert "true mask" in text


# ---------------------------------------------------------------------------------------------- arguments


def test_groups_have_numbers_of_their_own(tmp_path):
    args = ground_truth_editing.arguments(
        ["real", "synthesis", "sweep", "--steps", "20", "-S", "2", "-L", "8", "--individuals", "3", "core=5",
         "null-text=1", "--pairs", "0", "core=2", "--sweep-individuals", "1", "--sweep-starts", "4",
         "--sweep-layers", "8"]
    )  # fmt: skip
    tasks = ground_truth_editing.plan(args, Store(tmp_path), SETTINGS)

    def count(section, name):
        return sum(task.section == section and name in task.methods for task in tasks)

    names = ("fixed seed", "MasaCtrl S=2 L=8, union", "edit-friendly", "null-text")
    assert [count("real", name) for name in names] == [5, 3, 3, 1]
    assert [count("synthesis", name) for name in names] == [2, 0, 0, 0]
    assert count("sweep", "MasaCtrl S=2 L=8") == 1
    usual = ground_truth_editing.plan(ground_truth_editing.arguments(["real"]), Store(tmp_path), SETTINGS)
    assert sum("null-text" in task.methods for task in usual) == GROUPS["null-text"].individuals
    assert len(usual) == GROUPS["core"].individuals


@pytest.mark.parametrize("asked", ["core;null-text", "core, null-text", "all", "MasaCtrl S=2 L=8, union", "fixed seed"])
def test_methods_are_chosen_by_group_or_name(asked):
    chosen = ground_truth_editing.choose(asked, SETTINGS, "cat")
    assert ("fixed seed" in chosen.methods) == ("union" not in asked)
    assert set(chosen.counts(dict.fromkeys(GROUPS, 1))) == set(chosen.methods)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], "--steps is 0; expected 1 or more"),
        (["--workers", "0"], "--workers is 0; expected 1 or more"),
        (["--guidance", "nan"], "--guidance is nan; expected a number"),
        (["--minutes", "-1"], "--minutes is -1.0; expected more than 0"),
        (["--subject", "cow"], "--subject is 'cow'; expected one of cat"),
        (["--steps", "20", "-S", "20"], "--start-step is 20; expected 0 to 19"),
        (["-L", "16"], "a first layer is 16; expected 0 to 15"),
        (["--sweep-layers", "-1"], "a first layer is -1"),
        (["--sweep-starts", "50"], "--sweep-starts holds 50"),
        (["--individuals", "core"], "--individuals: 'core' is no number and no group=number"),
        (["--individuals", "cores=3"], "the groups are core, further"),
        (["--pairs", "-2"], "'-2' is no number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_named(given, message, capsys):
    with pytest.raises(SystemExit):
        ground_truth_editing.arguments(["real", *given])
    assert message in capsys.readouterr().err


def test_unknown_methods_missing_models_and_empty_folders_are_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no method 'magic'; there are all, core"):
        ground_truth_editing.choose("magic", SETTINGS, "cat")
    run = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["x", "report", *run])
    with pytest.raises(SystemExit, match="holds no pictures; run the sections first"):
        ground_truth_editing.main()
    monkeypatch.setattr(sys, "argv", ["x", "real", *run, "-c", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="nowhere"):
        ground_truth_editing.main()
