"""The shipped pose classifier, and the measures of the benchmark that uses it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from masa.weights.demo.pool import render_pool
from masa.weights.demo.pose_classifier import CLASSES, WEIGHTS, accuracy, degrade, labels, load_pose_classifier
from masa.weights.demo.world import POSES


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "ground_truth_editing.py"
    spec = importlib.util.spec_from_file_location("ground_truth_editing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pose_is_a_class():
    assert len(CLASSES) == sum(len(poses) for poses in POSES.values())


def test_shipped_classifier_is_right_on_held_out_renders():
    seeds = range(3000, 3100)
    pool, truth = render_pool(seeds, 128), labels(seeds)
    model = load_pose_classifier()
    assert accuracy(model, pool.pictures, truth)["pose"] >= 0.95  # of 100; the card's figure is over 1000
    assert accuracy(model, pool.pictures, truth, torch.Generator().manual_seed(0))["pose"] >= 0.93
    verdicts = model.judge(pool.pictures[:4].float() / 127.5 - 1, subject="cat")
    assert all(v.subject == "cat" and v.pose in POSES["cat"] and 0 <= v.confidence <= 1 for v in verdicts)


def test_card_holds_the_accuracy_and_the_file_is_small():
    card = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert card["held_out"]["pose"] >= 0.97
    assert card["held_out_degraded"]["pose"] >= 0.97
    assert WEIGHTS.stat().st_size < 1_000_000


def test_degraded_pictures_stay_in_range_and_change():
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    worse = degrade(pictures, torch.Generator().manual_seed(1))
    assert worse.shape == pictures.shape
    assert worse.abs().max() <= 1
    assert not torch.equal(worse, pictures)


def test_truth_itself_is_right_and_the_source_is_not(benchmark):
    classifier = load_pose_classifier()
    case = benchmark.Case.draw(100_001, "cat")
    truth = case.truth(case.target_pose, 128)[0]
    perfect = benchmark.against_truth(classifier, case, truth)
    assert perfect.right
    assert perfect.colour == 0
    assert perfect.background == 0
    assert perfect.ssim == pytest.approx(1)
    unedited = benchmark.against_truth(classifier, case, case.truth(case.source_pose, 128)[0])
    assert not unedited.pose
    assert not unedited.right


def test_palette_distance_ignores_places_and_sees_colours(benchmark):
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (400, 3))
    assert benchmark.palette_distance(pixels, pixels[::-1]) == 0
    assert benchmark.palette_distance(pixels, pixels + 10) == pytest.approx(10)


def test_wilson_interval_holds_the_share_and_narrows(benchmark):
    low, high = benchmark.share_interval(18, 24)
    assert low < 0.75 < high
    wide = benchmark.share_interval(180, 240)
    assert wide[1] - wide[0] < high - low
    assert benchmark.share_interval(0, 10)[0] == 0
