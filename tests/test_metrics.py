"""Metrics equal torchmetrics as PIE-Bench's evaluator calls it, and that evaluator's own arithmetic written out."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pie_cases import FusedViT, changed, picture, published_structure_distance, squeezenet, tiny_clip, tiny_dino

import masa
from masa.metrics import networks as networks_module
from masa.metrics.networks import load_networks
from masa.metrics.similarity import (
    mean_squared_error,
    peak_signal_to_noise,
    perceptual_distance,
    prompt_similarity,
    read_keys,
    structural_similarity,
    structure_distance,
    structure_size,
)
from masa.metrics.summary import summarise
from masa.workflows.piebench import clip_tokens

UNIT = 0.01  # of the published tables: what their last place shows

PAIRS = {
    "near": (picture(0), changed(picture(0), 1)),
    "far": (picture(0), picture(7, coarse=64)),
    "dark": (picture(0) // 16, changed(picture(0), 1) // 16),  # where SSIM's constants weigh most
    "narrow": (picture(3)[:, :200].copy(), changed(picture(3), 4)[:, :200].copy()),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


@pytest.fixture
def kept(pair):
    """Where a picture must not change: all but a rectangle and the frame, as PIE-Bench's masks are."""
    kept = np.ones(pair[0].shape[:2], np.uint8)
    kept[[0, -1], :] = kept[:, [0, -1]] = 0
    kept[100:300, 40:150] = 0
    return kept


def as_published(array: np.ndarray, kept: np.ndarray) -> torch.Tensor:
    """Divided, masked, (1, 3, h, w), as the evaluator hands it to torchmetrics."""
    masked = array.astype(np.float32) / 255 * kept[:, :, None].repeat(3, 2).astype(np.float32)
    return torch.tensor(masked).permute(2, 0, 1).unsqueeze(0)


@pytest.mark.slow
def test_noise_error_and_similarity_equal_torchmetrics(pair, kept):
    image = pytest.importorskip("torchmetrics.image")
    regression = pytest.importorskip("torchmetrics.regression")
    source, result = (as_published(array, kept) for array in pair)
    psnr = image.PeakSignalNoiseRatio(data_range=1.0)(result, source).item()
    mse = regression.MeanSquaredError()(result[0].contiguous(), source[0].contiguous()).item()
    ssim = image.StructuralSimilarityIndexMeasure(data_range=1.0)(result, source).item()
    assert peak_signal_to_noise(pair[1], pair[0], kept) == pytest.approx(psnr, abs=UNIT)
    assert 1e4 * mean_squared_error(pair[1], pair[0], kept) == pytest.approx(1e4 * mse, abs=UNIT)
    assert 1e2 * structural_similarity(pair[1], pair[0], kept) == pytest.approx(1e2 * ssim, abs=UNIT)


@pytest.mark.slow
def test_similarity_of_2023_leaves_the_border_out(pair, kept):
    """By the formula, window by window, in float64: torchmetrics' full picture, without 5 pixels on each side."""
    functional = pytest.importorskip("torchmetrics.functional.image")
    source, result = (as_published(array, kept) for array in pair)
    _, full = functional.structural_similarity_index_measure(result, source, data_range=1.0, return_full_image=True)
    expected = full[..., 5:-5, 5:-5].mean().item()
    found = structural_similarity(pair[1], pair[0], kept, libraries="2023")
    assert 1e2 * found == pytest.approx(1e2 * expected, abs=UNIT)
    assert found != structural_similarity(pair[1], pair[0], kept)


def test_similarity_by_its_definition():
    """One window, by hand: means, variances and covariance under an 11x11 Gaussian of deviation 1.5."""
    one, other = picture(0, 32), changed(picture(0, 32), 1)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    padded = [np.pad(a / 255.0, ((5, 5), (5, 5), (0, 0)), mode="reflect") for a in (one, other)]
    values = []
    for y in range(32):
        for x in range(32):
            a, b = (p[y : y + 11, x : x + 11] for p in padded)
            mean_a, mean_b = ((window[..., None] * v).sum((0, 1)) for v in (a, b))
            var_a, var_b, covariance = (
                (window[..., None] * (u - mean_u) * (v - mean_v)).sum((0, 1))
                for u, mean_u, v, mean_v in ((a, mean_a, a, mean_a), (b, mean_b, b, mean_b), (a, mean_a, b, mean_b))
            )
            value = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
            values.append(value / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    found = structural_similarity(one, other, np.ones((32, 32), np.uint8))
    assert found == pytest.approx(np.mean(values), abs=1e-6)  # float32 pixels


def test_equal_pictures():
    one, everywhere = picture(0, 64), np.ones((64, 64), np.uint8)
    assert peak_signal_to_noise(one, one, everywhere) == math.inf
    assert mean_squared_error(one, one, everywhere) == 0.0
    assert structural_similarity(one, one, everywhere) == pytest.approx(1.0)
    assert structure_distance(one, one, tiny_dino()) == 0.0


def test_what_is_masked_out_does_not_count():
    one, kept = picture(0, 64), np.ones((64, 64), np.uint8)
    kept[10:30, 20:40] = 0
    other = one.copy()
    other[10:30, 20:40] = 255 - other[10:30, 20:40]
    assert mean_squared_error(one, other, kept) == 0.0
    other[0, 0] = one[0, 0] ^ 255
    # Of the whole frame: what is masked out counts as equal.
    expected = ((one[0, 0].astype(float) - other[0, 0]) ** 2).sum() / 255**2 / one.size
    assert mean_squared_error(one, other, kept) == pytest.approx(expected, rel=1e-6)  # float32 pixels


def test_perceptual_distance_equals_torchmetrics(kept, pair, monkeypatch):
    """LPIPS's own weights on a SqueezeNet with random ones; where torchvision is missing, its features written out."""
    lpip = pytest.importorskip("torchmetrics.functional.image.lpips")
    image = pytest.importorskip("torchmetrics.image.lpip")
    monkeypatch.setattr(lpip, "_get_tv_model_features", lambda net, pretrained=False: squeezenet())
    monkeypatch.setattr(image, "_TORCHVISION_AVAILABLE", True)
    lpips = image.LearnedPerceptualImagePatchSimilarity(net_type="squeeze")
    source, result = (as_published(array, kept) * 2 - 1 for array in pair)
    expected = lpips(result, source).item()
    assert 1e3 * perceptual_distance(pair[1], pair[0], kept, lpips) == pytest.approx(1e3 * expected, abs=UNIT)
    # It is LPIPS: unit features of each stage, squared differences, weighted, averaged over positions.
    total, x, y = 0.0, lpips.net.scaling_layer(result), lpips.net.scaling_layer(source)
    with torch.no_grad():
        for stage, weights in zip(lpips.net.net.slices, lpips.net.lins, strict=True):
            x, y = stage(x), stage(y)
            difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)) ** 2
            total += float((difference * weights.model[-1].weight.view(1, -1, 1, 1)).sum(1).mean())
    assert 1e3 * expected == pytest.approx(1e3 * total, abs=UNIT)


@pytest.mark.parametrize("libraries", ["current", "2023"])
def test_structure_distance_equals_the_published_hook(libraries):
    """On DINO's own form of the network: a fused projection, of which the hook cuts out the keys of each head."""
    vit = tiny_dino()
    fused = FusedViT(vit)
    # Sharp edges: smooth pictures would resize alike with and without smoothing.
    one, other = picture(0, coarse=400), changed(picture(0, coarse=400), 1)
    expected = published_structure_distance(other, one, fused, smooth=libraries == "current")
    found = structure_distance(other, one, vit, libraries=libraries)
    assert 1e3 * found == pytest.approx(1e3 * expected, abs=UNIT)
    assert 1e3 * expected > 10 * UNIT
    elsewhere = structure_distance(other, one, vit, libraries={"current": "2023", "2023": "current"}[libraries])
    assert 1e3 * abs(elsewhere - found) > UNIT


def test_divided_structure_distance_is_of_values_up_to_one():
    vit = tiny_dino()
    fused, (one, other) = FusedViT(vit), PAIRS["near"]
    expected = published_structure_distance(one / 255.0, other / 255.0, fused, smooth=True)
    divided = structure_distance(one, other, vit, divided=True)
    assert 1e3 * divided == pytest.approx(1e3 * expected, abs=UNIT)
    assert 1e3 * abs(divided - structure_distance(one, other, vit)) > UNIT


def test_keys_are_the_last_layer_s_with_heads_side_by_side():
    vit = tiny_dino()
    fused = FusedViT(vit)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused(x)
        width = vit.config.hidden_size
        torch.testing.assert_close(read_keys(vit, x), fused.blocks[-1].kept[0, :, width : 2 * width])
    assert read_keys(vit, x).shape == (1 + 14 * 14, width)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 512), (224, 224)), ((512, 768), (224, 336)), ((768, 512), (336, 224)), ((200, 1000), (96, 480))],
)
def test_structure_is_read_at_torchvision_s_size(size, expected):
    assert structure_size(*size) == expected


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("masked", [False, True])
def test_prompt_similarity_equals_torchmetrics(name, masked):
    multimodal = pytest.importorskip("torchmetrics.multimodal")
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4, whose plain one works with Pillow
        from transformers import CLIPImageProcessor as Processor
    clip, seen = tiny_clip(), PAIRS[name][0]
    processor = Processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    prompt = "a fluffy cat's portrait, 4K"
    ids = clip_tokens(prompt)

    class Features:
        """The model as torchmetrics calls it; transformers 5 wraps what it gives."""

        config = clip.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            found = clip.get_image_features(pixels)
            return found if isinstance(found, torch.Tensor) else found.pooler_output

        def get_text_features(self, ids, attention):
            found = clip.get_text_features(ids, attention)
            return found if isinstance(found, torch.Tensor) else found.pooler_output

    def process(text=None, images=None, **_):
        if text is None:
            return processor(images=images, return_tensors="pt")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    score = multimodal.CLIPScore(model_name_or_path=lambda: (Features(), process))
    mask = np.zeros(seen.shape[:2], np.uint8)
    mask[50:400, 30:180] = 1
    shown = np.uint8(seen * mask[:, :, None].astype(np.float64)) if masked else seen
    with torch.no_grad():
        expected = score(torch.tensor(shown).permute(2, 0, 1), prompt).item()
    found = prompt_similarity(seen, ids, clip, mask if masked else None)
    assert found == pytest.approx(expected, abs=UNIT)
    assert found > 0.0


def test_prompt_similarity_is_not_below_zero(monkeypatch):
    clip = tiny_clip()
    features = torch.ones(1, 16)
    monkeypatch.setattr(clip, "get_image_features", lambda pixels: features)
    monkeypatch.setattr(clip, "get_text_features", lambda ids, attention: -features)
    assert prompt_similarity(picture(0), clip_tokens("a cat"), clip) == 0.0
    monkeypatch.setattr(clip, "get_text_features", lambda ids, attention: 3 * features)
    assert prompt_similarity(picture(0), clip_tokens("a cat"), clip) == pytest.approx(100.0)


def test_tokens_are_clip_s_own_and_cut_behind_77():
    ids = clip_tokens("a cat")
    assert ids.tolist() == [[49406, 320, 2368, 49407]]
    long = clip_tokens("cat " * 100)
    assert long.shape == (1, 77)
    assert long[0, -1] == 2368  # torchmetrics cuts the end token off


def test_pictures_of_two_sizes_are_refused():
    everywhere = np.ones((64, 64), np.uint8)
    with pytest.raises(masa.MasaError, match=r"\(64, 64\) and \(32, 32\) pixels; expected one size"):
        mean_squared_error(picture(0, 64), picture(0, 32), everywhere)
    with pytest.raises(masa.MasaError, match=r"the mask is \(32, 32\) and the picture \(64, 64\)"):
        mean_squared_error(picture(0, 64), picture(1, 64), everywhere[:32, :32])
    with pytest.raises(masa.MasaError, match=r"the picture is float64"):
        structure_distance(picture(0, 64) / 255.0, picture(1, 64), tiny_dino())
    with pytest.raises(masa.MasaError, match=r"\(11, 11\) pixels; SSIM's window wants 12"):
        structural_similarity(picture(0, 11), picture(1, 11), everywhere[:11, :11])


# ---------------------------------------------------------------------------------------------------- summaries


def test_means_leave_nan_out():
    found = summarise([1.0, math.nan, 3.0, 5.0])
    assert (found.n, found.mean) == (3, 3.0)
    assert math.isnan(summarise([math.nan]).mean)
    assert summarise([]).n == 0
    alone = summarise([2.0, math.nan])
    assert alone.mean == 2.0
    assert math.isnan(alone.low)
    endless = summarise([1.0, math.inf])
    assert endless.mean == math.inf
    assert math.isnan(endless.low)


def test_intervals_hold_the_mean_as_often_as_they_say():
    """Of 200 samples of 40 skewed values; a binomial with 95 % is below 89 % once in a thousand times."""
    generator = np.random.default_rng(0)
    samples = generator.exponential(2.0, (200, 40))
    inside = [(s := summarise(list(values))).low < 2.0 < s.high for values in samples[:200]]
    assert 0.87 <= np.mean(inside) <= 0.99


def test_intervals_are_near_the_t_distribution_s():
    values = np.random.default_rng(1).normal(20.0, 3.0, 700)
    found = summarise(list(values))
    half = 1.963 * values.std(ddof=1) / math.sqrt(700)  # t of 699 degrees of freedom
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert summarise(list(values)) == found
    assert summarise(list(values), seed=1) != found
    narrow = summarise(list(values), confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


# ----------------------------------------------------------------------------------------------------- networks


def test_networks_are_loaded_from_folders(tmp_path):
    tiny_dino().save_pretrained(tmp_path / "dino")
    tiny_clip().save_pretrained(tmp_path / "clip")
    found = load_networks(["dino", "clip"], dino=tmp_path / "dino", clip=tmp_path / "clip")
    assert found.missing == {}
    assert found.lpips is None
    one, other = PAIRS["near"]
    expected = structure_distance(one, other, tiny_dino())
    assert structure_distance(one, other, found.dino) == pytest.approx(expected, rel=1e-4)
    ids = clip_tokens("a cat")
    expected = prompt_similarity(one, ids, tiny_clip())
    assert prompt_similarity(one, ids, found.clip) == pytest.approx(expected, abs=1e-4)  # float32, other alignment


def test_missing_networks_say_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    found = load_networks(["dino", "clip"], dino=tmp_path / "empty", clip="nobody/has-this")
    assert found.dino is None
    assert found.clip is None
    assert "DINO ViT-B/8 could not be loaded from" in found.missing["dino"]
    assert "give its folder: clip= (--clip)" in found.missing["clip"]
    with pytest.raises(
        masa.MasaError, match=r"metric networks are \['vgg'\]; expected some of 'dino', 'lpips', 'clip'"
    ):
        load_networks(["vgg"])


@pytest.mark.parametrize("lacking", ["torchmetrics", "torchvision"])
def test_lpips_without_a_library_says_what_to_install(monkeypatch, lacking):
    """An import of what stands as None in sys.modules fails, as that of a missing package does."""
    if lacking == "torchmetrics":
        for name in [name for name in sys.modules if name.startswith("torchmetrics.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
    else:
        lpip = pytest.importorskip("torchmetrics.functional.image.lpips")
        pytest.importorskip("torchmetrics.image.lpip")
        monkeypatch.setattr(lpip, "_TORCHVISION_AVAILABLE", False)
        monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", False)
    found = load_networks(["lpips"])
    assert found.lpips is None
    assert "LPIPS needs torchmetrics (pip install 'masa[bench]') and torchvision" in found.missing["lpips"]


def test_a_torchvision_that_fails_to_import_is_named(tmp_path, monkeypatch):
    """As one of another build of torch does: RuntimeError, of an operator that is not there."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    found = load_networks()
    assert set(found.missing) == {"dino", "lpips", "clip"}
    for reason in found.missing.values():
        assert "torchvision does not work beside torch" in reason
        assert "torchvision::nms does not exist" in reason
        assert "install the torchvision that belongs to this torch" in reason


def test_a_download_that_fails_is_named(monkeypatch):
    def fail():
        raise OSError("urlopen error: no route to host")

    monkeypatch.setattr(networks_module, "_load_lpips", fail)
    monkeypatch.setattr(networks_module, "_broken_torchvision", lambda: None)
    assert "SqueezeNet could not be loaded (OSError: urlopen" in load_networks(["lpips"]).missing["lpips"]
