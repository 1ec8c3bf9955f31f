"""The demo model's training: losses fall, resuming changes nothing, the written folder is the trained model."""

import json
from dataclasses import replace

import pytest
import torch

from masa.config import TextConfig, UNetConfig, VAEConfig
from masa.models.tokenizer import Tokenizer
from masa.models.vae import VAE
from masa.weights.demo.autoencoder import (
    VAERecipe,
    encode,
    polish_decoder,
    reconstruct,
    start_near_identity,
    train_vae,
    whiten,
)
from masa.weights.demo.denoiser import Denoiser, UNetRecipe, draw, noised_twins, stratified_timesteps, train_unet
from masa.weights.demo.export import export
from masa.weights.demo.loop import Average, Budget, Progress, SpareCores, learning_rate
from masa.weights.demo.pool import render_pool
from masa.weights.demo.train import PRESETS, cached_latents
from masa.weights.demo.vocabulary import write_tokenizer
from masa.weights.demo.widen import widen
from masa.weights.demo.world import render, sample, turned

TINY_VAE = VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4)
TINY_UNET = UNetConfig(block_out_channels=(16, 16, 16, 16), context_width=16, heads=2, norm_groups=4)


@pytest.fixture(scope="module")
def pool():
    return render_pool(range(24), 64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def denoiser(tokenizer):
    torch.manual_seed(0)
    text = TextConfig(vocab_size=tokenizer.vocab_size, width=16, intermediate_width=32, layers=1, heads=2)
    return Denoiser.build(TINY_UNET, text, tokenizer, torch.device("cpu"))


def test_pool_does_not_depend_on_who_renders(pool):
    again = render_pool(range(24), 64, workers=1)
    assert torch.equal(pool.pictures, again.pictures)
    assert pool.captions == again.captions


def test_twins_differ_in_the_direction_they_face(pool):
    twins = render_pool(range(24), 64, twins=True)
    for seed, (picture, caption) in enumerate(zip(twins.pictures, twins.captions, strict=True)):
        drawn = turned(sample(seed))
        assert caption == drawn.caption
        assert torch.equal(picture, torch.tensor(render(*drawn_parts(drawn), 64)[0]).permute(2, 0, 1))
        assert not torch.equal(picture, pool.pictures[seed])


def drawn_parts(drawn):
    return drawn.appearance, drawn.pose, drawn.scene


def test_alike_twins_share_noisy_latents_and_each_gets_its_own_back():
    draws = torch.Generator().manual_seed(0)
    clean = torch.randn(6, 4, 8, 8, generator=draws)
    noise = torch.randn(3, 4, 8, 8, generator=draws)
    alpha = torch.tensor([0.1, 0.3, 0.6]).repeat(2)
    noisy, target = noised_twins(clean, noise, alpha, torch.tensor([True, False, True]))
    a = alpha.view(-1, 1, 1, 1)
    torch.testing.assert_close((noisy - (1 - a).sqrt() * target) / a.sqrt(), clean)  # every row's noise is its own
    torch.testing.assert_close(target[:3], noise)
    for pair, alike in enumerate((True, False, True)):
        assert torch.equal(noisy[pair], noisy[pair + 3]) == alike
        assert torch.equal(target[pair], target[pair + 3]) != alike


def test_vae_learns_and_resumes_exactly(pool, tmp_path):
    recipe = VAERecipe(batch=1, checkpoint_minutes=1e9)

    def train(samples, name):
        return train_vae(pool.pictures, pool.pictures[:2], TINY_VAE, recipe, Budget(samples=samples),
                         tmp_path / name, threads=1)  # fmt: skip

    whole = train(120, "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    untrained = VAE(TINY_VAE)
    start_near_identity(untrained)
    picture = pool.pictures.float() / 127.5 - 1
    with torch.no_grad():
        before = (untrained(picture) - picture).abs().mean()
        after = (reconstruct(whole, pool.pictures) - picture).abs().mean()
    assert after < 0.9 * before
    assert state["progress"]["samples"] == 120


def test_wider_network_begins_as_the_narrower_one(pool):
    torch.manual_seed(0)
    narrow = VAE(replace(TINY_VAE, block_out_channels=(8, 16, 8, 16)))
    wide = VAE(replace(TINY_VAE, block_out_channels=(16, 32, 24, 16)))
    widen(narrow.state_dict(), wide)
    narrow.requires_grad_(False)
    wide.requires_grad_(False)
    torch.testing.assert_close(
        reconstruct(wide, pool.pictures[:2]), reconstruct(narrow, pool.pictures[:2]), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="no divisor of 12"):
        widen(narrow.state_dict(), VAE(replace(TINY_VAE, block_out_channels=(12, 16, 8, 16))))


def test_training_begins_with_a_given_autoencoder(pool, tmp_path):
    torch.manual_seed(0)
    start = VAE(TINY_VAE)
    recipe = VAERecipe(batch=1, peak_rate=0.0)
    trained = train_vae(pool.pictures, pool.pictures[:2], TINY_VAE, recipe, Budget(samples=4), tmp_path / "v.pt",
                        threads=1, start=start)  # fmt: skip
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor)


def test_latents_are_made_once_and_only_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("masa.weights.demo.train.SHARD", 4)
    torch.manual_seed(0)
    vae = VAE(TINY_VAE).requires_grad_(False)
    preset = replace(PRESETS["cpu"], size=64, unet_pictures=4)
    some, captions = cached_latents(tmp_path, vae, preset, torch.device("cpu"), 0)
    assert some.shape == (8, 4, 8, 8)
    assert len(captions) == 8
    assert not torch.equal(some[0], some[4])  # its twin
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    more, names = cached_latents(tmp_path, vae, replace(preset, unet_pictures=8), torch.device("cpu"), 0)
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
    assert torch.equal(more[[0, 1, 2, 3, 8, 9, 10, 11]], some)
    assert names[:4] + names[8:12] == captions
    vae.quant_conv.weight.data += 1  # another encoder: other latents
    assert not torch.equal(cached_latents(tmp_path, vae, preset, torch.device("cpu"), 0)[0], some)


@pytest.mark.slow
def test_resumed_unet_training_is_bit_identical(pool, tokenizer, tmp_path):
    latents = torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    recipe = UNetRecipe(batch=4, checkpoint_minutes=0.0, checkpoints_per_report=1)  # a checkpoint after every step
    stopped = []

    class Stop(Exception):
        pass

    def stop_after(steps):
        def report(model, at):
            stopped.append(at)
            if at == steps:
                raise Stop

        return report

    def train(name, report=None):
        return train_unet(latents, pool.captions, denoiser(tokenizer), recipe, Budget(samples=24), tmp_path / name,
                          threads=1, report=report)  # fmt: skip

    whole = train("whole.pt")
    with pytest.raises(Stop):
        train("broken.pt", stop_after(3))
    torch.manual_seed(99)  # whatever the second process's global state is
    resumed = train("broken.pt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_twins_that_the_caption_tells_apart_are_made_alike(tokenizer, tmp_path):
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    untold = ["a cat sitting"] * 8
    told = [f"a cat sitting, facing {way}" for way in ("left", "right") for _ in range(4)]

    def train(captions, alike):
        recipe = UNetRecipe(batch=4, alike=alike, warmup=1)
        path = tmp_path / f"{len(captions[0])}{alike}.pt"
        model = train_unet(latents, captions, denoiser(tokenizer), recipe, Budget(samples=12), path, threads=1)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(train(untold, 0.0), train(untold, 1.0))
    assert not torch.equal(train(told, 0.0), train(told, 1.0))


@pytest.mark.slow
def test_unet_loss_falls(pool, tokenizer, tmp_path):
    latents = torch.full((24, 4, 8, 8), 1.0)  # nothing to learn but one value
    recipe = UNetRecipe(batch=4, peak_rate=3e-3, warmup=5)
    train_unet(
        latents, pool.captions, denoiser(tokenizer), recipe, Budget(samples=4 * 100), tmp_path / "u.pt", threads=1
    )
    losses = torch.load(tmp_path / "u.pt", weights_only=True)["progress"]["losses"]
    assert losses[1] < 0.8 * losses[0]


def test_whitening_keeps_pictures_and_makes_latents_white(pool):
    torch.manual_seed(0)
    vae = VAE(TINY_VAE)
    start_near_identity(vae)
    vae.requires_grad_(False)
    before = reconstruct(vae, pool.pictures)
    whiten(vae, pool.pictures)
    assert torch.allclose(reconstruct(vae, pool.pictures), before, atol=1e-3)
    flat = encode(vae, pool.pictures, exactly=True).transpose(0, 1).flatten(1)
    assert flat.mean(1).abs().max() < 1e-3
    assert torch.allclose(torch.cov(flat), torch.eye(4), atol=1e-2)


def test_polishing_touches_the_decoder_only(pool, tmp_path):
    torch.manual_seed(0)
    vae = VAE(TINY_VAE)
    start_near_identity(vae)
    vae.requires_grad_(False)
    whiten(vae, pool.pictures)
    polished = polish_decoder(vae, pool.pictures, pool.pictures[:2], VAERecipe(batch=2), Budget(samples=20),
                              tmp_path / "p.pt", threads=1)  # fmt: skip
    assert torch.equal(encode(vae, pool.pictures), encode(polished, pool.pictures))
    assert not torch.equal(reconstruct(vae, pool.pictures), reconstruct(polished, pool.pictures))


def test_written_folder_is_the_model_and_loads_in_diffusers(tokenizer, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = denoiser(tokenizer)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    vae = VAE(TINY_VAE)
    export(tmp_path, vae, model, size=64)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with torch.no_grad():
        mine = model.unet.eval()(x, 500, context)[0]
        assert torch.allclose(theirs(x, 500, context).sample, mine, atol=5e-3)
        auto = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
        assert torch.allclose(auto.decode(x / 0.18215).sample, vae.decode(x), atol=2e-2)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
        ids = tokenizer(["a cat sitting"])
        assert torch.allclose(pipeline.text_encoder(ids).last_hidden_state, model.text.eval()(ids), atol=5e-3)
    names = json.loads((tmp_path / "model_index.json").read_text())
    assert names["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_drawing_gives_one_latent_per_prompt(tokenizer):
    model = denoiser(tokenizer)
    for network in (model.unet, model.text):
        network.eval()
    noise = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    assert draw(model, ["a cat", "a dog"], noise, steps=2).shape == (2, 4, 8, 8)


def test_learning_rate_warms_up_then_falls_to_the_floor():
    assert learning_rate(1.0, 0, 0.0, 10, 0.1) == pytest.approx(0.1)
    assert learning_rate(1.0, 100, 0.0, 10, 0.1) == pytest.approx(1.0)
    assert learning_rate(1.0, 100, 1.0, 10, 0.1) == pytest.approx(0.1)
    assert learning_rate(1.0, 100, 7.0, 10, 0.1) == pytest.approx(0.1)
    assert learning_rate(1.0, 100, 0.6, 10, 0.1, hold=0.6) == pytest.approx(1.0)
    assert learning_rate(1.0, 100, 0.8, 10, 0.1, hold=0.6) == pytest.approx(0.55)
    assert learning_rate(1.0, 100, 1.0, 10, 0.1, hold=0.6) == pytest.approx(0.1)


def test_average_follows_quickly_at_first_and_slowly_later():
    parameter = torch.zeros(3)
    average = Average([parameter], decay=0.99)
    parameter += 1
    average.update([parameter], step=0)
    assert average.values[0][0] == pytest.approx(0.9)
    parameter += 1
    average.update([parameter], step=100_000)
    assert average.values[0][0] == pytest.approx(0.9 + 0.01 * 1.1)


def test_every_noise_level_is_in_every_batch():
    t = stratified_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert (t // 100).tolist() == list(range(10))


def test_budget_is_minutes_or_samples():
    assert Budget(minutes=2).fraction(Progress(seconds=60)) == 0.5
    assert Budget(samples=10).fraction(Progress(samples=5)) == 0.5
    with pytest.raises(ValueError, match="minutes or samples"):
        Budget()


def test_fixed_number_of_threads_stays():
    before = torch.get_num_threads()
    assert SpareCores(1)() == 1
    assert SpareCores(None)() >= 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(("batch", "latents"), [(3, 24), (4, 23)])
def test_pairs_that_do_not_come_out_are_named(pool, tokenizer, tmp_path, batch, latents):
    recipe = UNetRecipe(batch=batch)
    captions = pool.captions[:latents]
    with pytest.raises(ValueError, match="expected even numbers"):
        train_unet(
            torch.zeros(latents, 4, 8, 8), captions, denoiser(tokenizer), recipe, Budget(samples=4), tmp_path / "u.pt"
        )
