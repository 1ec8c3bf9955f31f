"""SDEdit and Blended Latent Diffusion: against naive loops, and at their limits."""

from __future__ import annotations

import pytest
import torch
from published import Control, MutualAttention
from published_inversions import InversionOracle

import masa

TARGET, OTHER, STEPS = "a photo of a running cat", "a red cat in the snow", 5
SETTINGS = {"steps": STEPS, "seed": 3, "height": 64, "width": 128, "progress": False}


@pytest.fixture(scope="module")
def oracle(tiny_folder, tiny):
    return InversionOracle(tiny_folder, tiny.tokenizer)


@pytest.fixture(scope="module")
def picture():
    return torch.rand(3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def clean(tiny, picture):
    return tiny.encode_image(picture, height=64, width=128)


def draw(count: int) -> list[torch.Tensor]:
    """The noise that the seed gives, as many times as asked."""
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    return [torch.randn(1, 4, 8, 16, generator=generator) for _ in range(count)]


def noised(oracle, clean, noise, t):
    return oracle.alpha(t).sqrt() * clean + (1 - oracle.alpha(t)).sqrt() * noise


def same(out: torch.Tensor, ref: torch.Tensor, tolerance: float = 5e-4) -> None:
    assert (out - ref).abs().max() / ref.std() < tolerance


@pytest.mark.parametrize("strength", [0.4, 0.6, 1.0])
def test_sdedit_equals_the_naive_loop(tiny, oracle, picture, clean, strength):
    out = masa.sdedit(tiny, picture, [TARGET, OTHER], strength, **SETTINGS)
    skip = STEPS - int(STEPS * strength + 1e-9)
    start = noised(oracle, clean, draw(1)[0], oracle.timesteps(STEPS)[skip])
    for branch, prompt in enumerate((TARGET, OTHER), start=1):
        same(out.latents[branch], oracle.replay(start, [prompt], STEPS, [7.5], skip=skip)[0])
    assert torch.equal(out.latents[:1], clean)


def test_strength_0_is_the_picture_through_the_autoencoder(tiny, picture, clean):
    out = masa.sdedit(tiny, picture, TARGET, 0.0, **SETTINGS)
    assert torch.equal(out.latents, clean.expand(2, -1, -1, -1))
    assert out.targets[0].tobytes() == tiny.decode_latents(clean)[0].tobytes()


def test_controls_read_the_noised_picture(tiny, oracle, picture, clean):
    """MasaCtrl on SDEdit: the source stands at every level where its own noise puts it."""
    out = masa.sdedit(tiny, picture, TARGET, 1.0, controls=masa.MasaCtrl(2, 8), **SETTINGS)
    noise = draw(1)[0]
    way = [clean, *(noised(oracle, clean, noise, t) for t in oracle.timesteps(STEPS)[::-1])]
    control = MutualAttention(range(2, STEPS), range(8, 16))
    start = way[-1].expand(2, -1, -1, -1)
    reference = oracle.replay(start, ["", TARGET], STEPS, [7.5] * 2, control=control, pinned=way)
    same(out.latents[1:], reference[1:])


@pytest.mark.parametrize(
    "change",
    [
        {"strength": 0.6},
        {"seed": 4},
        {"guidance_scale": 3.0},
        {"negative_prompt": "blurry"},
        {"steps": 4},
        {"schedule": masa.Schedule(offset=0)},
        {"seed": None, "generator": torch.Generator().manual_seed(8)},
        {"controls": masa.MasaCtrl(3, 8)},
        {"callback": lambda step, timestep, x: x * 0.9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_parameters_change_the_picture(tiny, picture, change):
    settings = SETTINGS | {"strength": 0.8}
    one, other = (masa.sdedit(tiny, picture, TARGET, **s).latents for s in (settings, settings | change))
    assert not torch.equal(one[1], other[1])


def test_an_sdedit_runs_again_from_its_picture(tiny, tmp_path):
    from masa.io.pictures import to_pil

    to_pil(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[0].save(tmp_path / "real.png")
    out = masa.sdedit(tiny, tmp_path / "real.png", TARGET, 0.5, steps=4, progress=False)
    out.save(tmp_path / "out")
    again = masa.rerun(tmp_path / "out" / "target_0.png", tiny, progress=False)
    assert torch.equal(again.latents, out.latents)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "half"])
def test_strength_out_of_range_is_refused(tiny, picture, strength):
    with pytest.raises(masa.MasaError, match="expected a number from 0"):
        masa.sdedit(tiny, picture, TARGET, strength, **SETTINGS)


def test_no_prompt_is_refused(tiny, picture):
    with pytest.raises(masa.MasaError, match="at least one prompt"):
        masa.sdedit(tiny, picture, [], 0.5, **SETTINGS)


# ------------------------------------------------------------------------------------------ blended latents


def half() -> torch.Tensor:
    """White on the left."""
    mask = torch.zeros(32, 64)
    mask[:, :32] = 1.0
    return mask


def blend(tiny, picture, mask, targets=(TARGET,), skip=0.25, extra=(), **settings):
    controls = [*extra, masa.BlendedLatents(mask, skip)]
    return masa.edit(tiny, picture, list(targets), controls=controls, **(SETTINGS | settings))


def test_blending_equals_the_naive_loop(tiny, oracle, picture, clean):
    out = blend(tiny, picture, half(), (TARGET, OTHER), skip=0.45)  # 2 of 5 steps
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., :8] = 1.0
    times = oracle.timesteps(STEPS)
    with torch.no_grad():
        uncond = oracle.context([""])
    oracle.hook(Control())
    for branch, prompt in enumerate((TARGET, OTHER), start=1):
        noise = draw(1 + STEPS - 2)
        x = noised(oracle, clean, noise.pop(0), times[2])
        with torch.no_grad():
            cond = oracle.context([prompt])
        for i in range(2, STEPS):
            x = oracle.step(x, oracle.predict(x, times[i], uncond, cond, [7.5]), times[i], STEPS)
            fresh = noise.pop(0)
            background = clean if i == STEPS - 1 else noised(oracle, clean, fresh, times[i + 1])
            x = mask * x + (1 - mask) * background
        same(out.latents[branch], x[0])


def test_outside_the_mask_the_picture_stays(tiny, picture, clean):
    out = blend(tiny, picture, half())
    assert torch.equal(out.latents[1, :, :, 8:], clean[0, :, :, 8:])
    assert (out.latents[1, :, :, :8] - clean[0, :, :, :8]).abs().max() > 0.1
    black = blend(tiny, picture, torch.zeros(8, 16))
    assert torch.equal(black.latents[1:], clean)
    assert set(out.masks[0]) == set(range(1, STEPS))


@pytest.mark.parametrize("settings", [{"skip": 0.4}, {"skip": 0.0, "skip_steps": 2}], ids=["its own", "the run's"])
def test_a_white_mask_is_sdedit(tiny, picture, settings):
    """Nothing is kept: the same start from the noised picture, the same steps, whoever leaves out the first."""
    out = blend(tiny, picture, torch.ones(8, 16), **settings)
    same(out.latents[1], masa.sdedit(tiny, picture, TARGET, 0.6, **SETTINGS).latents[1], 1e-4)


def test_blending_composes_with_masactrl(tiny, picture, clean):
    plain = blend(tiny, picture, half())
    both = blend(tiny, picture, half(), extra=[masa.MasaCtrl(2, 8)])
    assert torch.equal(both.latents[1, :, :, 8:], clean[0, :, :, 8:])
    assert (both.latents[1] - plain.latents[1]).abs().max() > 1e-3


@pytest.mark.parametrize("change", [{"skip": 0.6}, {"mask": half() * 0.5}, {"seed": 4}], ids=lambda c: next(iter(c)))
def test_blending_parameters_change_the_picture(tiny, picture, change):
    one, other = (blend(tiny, picture, **s).latents for s in ({"mask": half()}, {"mask": half()} | change))
    assert not torch.equal(one[1], other[1])


def test_a_blend_runs_again(tiny, tmp_path):
    from masa.io.pictures import to_pil

    to_pil(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[0].save(tmp_path / "real.png")
    settings = {"controls": masa.BlendedLatents(half()), "steps": 3, "progress": False}
    out = masa.edit(tiny, tmp_path / "real.png", TARGET, **settings)
    out.save(tmp_path / "out")
    again = masa.rerun(tmp_path / "out" / "grid.png", tiny, progress=False)
    assert torch.equal(again.latents, out.latents)


def test_controls_choose_among_the_steps_that_blending_leaves(tiny, picture):
    with pytest.raises(masa.MasaError, match="selects no step of a run of 5; expected numbers from 2 to 4"):
        blend(tiny, picture, half(), skip=0.45, extra=[masa.MasaCtrl(steps=[0, 1])])
    out = blend(tiny, picture, half(), skip=0.45, extra=[masa.RecordPredictions()])
    assert list(out.predictions[0]) == [2, 3, 4]


def test_blending_needs_a_picture(tiny):
    with pytest.raises(masa.MasaError, match="keeps a real picture"):
        masa.sample(tiny, "a cat", TARGET, controls=masa.BlendedLatents(half()), steps=2, progress=False)
    with pytest.raises(masa.MasaError, match=r"skip is 1\.0"):
        masa.BlendedLatents(half(), skip=1.0)


@pytest.mark.parametrize("method", ["noise", "edit-friendly"])
def test_no_noise_of_a_seed_serves_twice(tiny, generator, monkeypatch, method):
    """An inversion's noise and the sampling's after it are one seed's, one behind the other."""
    drawn = []
    draw = masa.noise.Noise.draw
    monkeypatch.setattr("masa.noise.Noise.draw", lambda self, shape: drawn.append(draw(self, shape)) or drawn[-1])
    picture = torch.rand(3, 128, 128, generator=generator) * 2 - 1
    controls = masa.BlendedLatents(torch.ones(16, 16), skip=0.0)  # draws at the start and after each step
    masa.edit(tiny, picture, "a cat", method=method, steps=3, skip_steps=0, seed=5, controls=controls, progress=False)
    inverted, passed_over, *fresh = drawn
    assert torch.equal(inverted, passed_over)
    expected = torch.randn(len(inverted) + len(fresh), *inverted.shape[1:], generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat([inverted, *fresh]), expected)
