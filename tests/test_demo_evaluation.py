"""The evaluation of a training's present state."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from masa.config import UNetConfig, VAEConfig
from masa.models.tokenizer import Tokenizer
from masa.models.vae import VAE
from masa.weights.demo import evaluate
from masa.weights.demo.denoiser import Denoiser, UNetRecipe, train_unet
from masa.weights.demo.loop import Budget
from masa.weights.demo.pose_classifier import PoseClassifier, load_pose_classifier
from masa.weights.demo.train import PRESETS, text_config
from masa.weights.demo.vocabulary import write_tokenizer
from masa.weights.demo.world import SUBJECTS

TINY = replace(
    PRESETS["cpu"],
    size=64,
    vae=VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4),
    unet=UNetConfig(block_out_channels=(16, 16, 16, 16), context_width=16, heads=2, norm_groups=4),
    text_width=16,
    text_layers=1,
)


@pytest.fixture
def run(tmp_path):
    """A run's folder after a few steps."""
    torch.manual_seed(0)
    vae = VAE(TINY.vae)
    torch.save(vae.state_dict(), tmp_path / "vae_final.pt")
    vocabulary = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_folder(tmp_path / "tokenizer")
    model = Denoiser.build(TINY.unet, text_config(TINY, vocabulary), tokenizer, torch.device("cpu"))
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = ["a cat sitting, facing left"] * 2 + ["a cat sitting, facing right"] * 2
    trained = train_unet(latents, captions, model, UNetRecipe(batch=4), Budget(samples=8), tmp_path / "unet.pt",
                         threads=1)  # fmt: skip
    return tmp_path, vae, trained


def test_interval_holds_the_share_and_narrows():
    for right, of in ((0, 10), (5, 10), (10, 10), (190, 200)):
        low, high = evaluate.interval(right, of)
        assert 0 <= low <= right / of <= high <= 1
    low, high = evaluate.interval(95, 100)
    assert (low, high) == pytest.approx((0.888, 0.978), abs=1e-3)


def test_held_out_samples_say_what_is_judged():
    for subject in SUBJECTS:
        found = evaluate.held_out(subject, 5)
        assert len(set(found)) == 5
        for drawn in found:
            assert drawn.appearance.subject == subject
            assert drawn.pose in drawn.caption
            assert ("right" if drawn.scene.facing == 1 else "left") in drawn.caption


def test_present_state_is_the_trained_average(run):
    folder, vae, trained = run
    again, model = evaluate.load_run(folder, TINY)
    for mine, theirs in ((again, vae), (model.unet, trained.unet), (model.text, trained.text)):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), name


def test_evaluation_prints_every_figure(run, monkeypatch, capsys):
    folder, _, _ = run
    monkeypatch.setitem(evaluate.PRESETS, "cpu", TINY)
    sheet = folder / "sheet.png"
    monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(folder), "--count", "2", "--inversions", "1",
                                     "--sheet", str(sheet)])  # fmt: skip
    evaluate.main()
    facts = json.loads(capsys.readouterr().out)
    assert {"autoencoder_db", "inversion_db", "subject", "pose", "direction"} == set(facts)
    for part in ("subject", "pose", "direction"):
        assert 0 <= facts[part]["right"] <= facts[part]["of"] == 2 * len(SUBJECTS)
    assert sheet.exists()


def test_classifiers_of_other_widths_load(tmp_path):
    for widths in ((16, 24, 48, 80, 112), (24, 48, 80, 112)):
        model = PoseClassifier(widths)
        save_file(model.state_dict(), tmp_path / "c.safetensors")
        again = load_pose_classifier(tmp_path / "c.safetensors")
        assert again.size == model.size
        assert len(again.judge(torch.zeros(2, 3, 64, 64))) == 2
