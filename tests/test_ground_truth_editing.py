"""The benchmark of edits against their truth: cases, measures, intervals, stored runs."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.ground_truth.cases import TABLE_SEEDS, Individual
from benchmarks.ground_truth.intervals import clustered, equal_error, share_interval, wilson
from benchmarks.ground_truth.measures import against_source, against_truth, appearance_error, palette_distance, psnr
from benchmarks.ground_truth.methods import Method, Settings, real_methods, synthesis_methods
from benchmarks.ground_truth.report import Outcome, summarise
from benchmarks.ground_truth.runs import Store, Task, calibration_pair, estimate, missing
from masa.weights.demo.pool import FIRST_TRAINING_SEED
from masa.weights.demo.pose_classifier import load_pose_classifier

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
    assert [sorted(task.methods) for task in missing(store, "real", methods, 2)] == [["a", "b"]] * 2
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    store.save("real", "a", TABLE_SEEDS, pictures)
    np.testing.assert_array_equal(store.load("real", "a", TABLE_SEEDS), pictures)
    left = missing(store, "real", methods, 2)
    assert [sorted(task.methods) for task in left] == [["b"], ["a", "b"]]
    assert store.methods("real") == ["a"]
    assert "2 individuals" in estimate(left, SETTINGS, 40.0, 2)
    store.claim({"steps": 20})
    store.claim({"steps": 20})
    with pytest.raises(SystemExit, match="steps 20, not 50"):
        store.claim({"steps": 50})


def test_costs_count_the_rows_of_the_network():
    assert Method().rows(20, 3, real=True) == 120  # a pinned source that nobody reads is not computed
    assert Method().rows(20, 3, real=False) == 160
    assert Method(strength=0.5).rows(20, 3, real=True) == 60
    one, both = ({"a": Method()}, {"a": Method(), "b": Method()})
    assert Task("real", 0, both).rows(SETTINGS) > Task("real", 0, one).rows(SETTINGS)


def test_methods_name_their_setting_and_synthesis_needs_no_picture():
    real, pairs = real_methods(SETTINGS, "cat"), synthesis_methods(SETTINGS, "cat")
    assert {"fixed seed", "SDEdit 0.8", "MasaCtrl S=2 L=8", "MasaCtrl S=2 L=10", "null-text, MasaCtrl S=2 L=8"} <= set(
        real
    )
    assert set(pairs) < set(real)
    assert not any("SDEdit" in name or "null-text" in name for name in pairs)


def test_summary_counts_both_only_where_both_are_right(classifier):
    good = against_truth(classifier, WHO, POSE, WHO.picture(POSE, 128))
    cases = [
        Outcome(1, "a", good, True),
        Outcome(1, "b", replace(good, pose=False), True),
        Outcome(2, "a", good, False),
        Outcome(2, "b", replace(good, pose=False), False),
    ]
    row = summarise("real", "m", cases)
    assert (row["cases"], row["individuals"]) == (4, 2)
    assert (row["pose"], row["appearance right"], row["both right"]) == (0.5, 0.5, 0.25)
    assert row["both right low"] <= 0.25 <= row["both right high"]
    assert row["appearance"] == 0
