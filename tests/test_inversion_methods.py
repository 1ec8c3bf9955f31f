"""Negative-prompt, null-text and edit-friendly inversion against naive loops, and what each one promises."""

from __future__ import annotations

import pytest
import torch
from published import Control, MutualAttention
from published_inversions import InversionOracle
from torch.utils.checkpoint import checkpoint

import masa
from masa.schedule import Schedule

SOURCE, TARGET, OTHER = "a photo of a sitting cat", "a photo of a running cat", "a red cat in the snow"
STEPS = 5
SIZE = {"height": 64, "width": 128}
METHODS = ("negative-prompt", "null-text", "edit-friendly", "noise")
TOLERANCE = 5e-4  # float32 rounding, as a fraction of the latents' standard deviation


@pytest.fixture(scope="module")
def oracle(tiny_folder, tiny):
    return InversionOracle(tiny_folder, tiny.tokenizer)


@pytest.fixture(scope="module")
def picture():
    return torch.rand(3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def trajectories(tiny, picture):
    """One per method, each made once."""
    settings = {"steps": STEPS, "seed": 3, "progress": False, **SIZE}
    return {m: masa.invert(tiny, picture, SOURCE, method=m, **settings) for m in ("ddim", *METHODS)}


def same(out: torch.Tensor, ref: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = (out - ref).abs().max() / ref.std()
    assert error < tolerance, f"error {error:.2e} of the latents' standard deviation"


def edit(tiny, trajectory, targets=(TARGET,), controls=None, **settings):
    controls = masa.MasaCtrl(2, 8) if controls is None else controls
    return masa.sample(tiny, target=targets, trajectory=trajectory, controls=controls, progress=False, **settings)


def ways(trajectory):
    return [z[None] for z in trajectory.latents]


# -------------------------------------------------------------------------------- against the published loops


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "free"])
def test_negative_prompt_equals_the_naive_loop(tiny, oracle, trajectories, pinned):
    trajectory = trajectories["negative-prompt"]
    way = oracle.invert(trajectory.latents[:1], SOURCE, STEPS, 1.0)
    same(trajectory.latents, torch.cat(way))
    with torch.no_grad():
        uncond = oracle.context([SOURCE])
    same(trajectory.context, uncond.expand(STEPS, -1, -1))
    reference = oracle.replay(
        way[-1].expand(3, -1, -1, -1),
        [SOURCE, TARGET, OTHER],
        STEPS,
        [7.5] * 3,
        [uncond] * STEPS,
        control=MutualAttention(range(2, STEPS), range(8, 16)),
        pinned=way if pinned else None,
    )
    same(edit(tiny, trajectory, (TARGET, OTHER), pin_source=pinned).latents, reference)


@pytest.mark.slow
def test_null_text_equals_the_naive_loop(tiny, oracle, trajectories):
    trajectory = trajectories["null-text"]
    assert torch.equal(trajectory.latents, trajectories["ddim"].latents)
    published = torch.cat(oracle.null_text(ways(trajectory), SOURCE, STEPS, 7.5))
    assert trajectory.context.shape == published.shape
    # Adam's first step is the gradient's sign: where a gradient is all but zero, rounding decides the sign.
    apart = (trajectory.context - published).abs()
    assert (apart > 1e-3).float().mean() < 0.01
    moved = (published - oracle.context([""])).abs().mean()
    assert apart.mean() < 0.01 * moved
    for pinned in (True, False):
        reference = oracle.replay(
            trajectory.latents[-1:].expand(2, -1, -1, -1),
            [SOURCE, TARGET],
            STEPS,
            [7.5] * 2,
            published.split(1),
            control=MutualAttention(range(2, STEPS), range(8, 16)),
            pinned=ways(trajectory) if pinned else None,
        )
        same(edit(tiny, trajectory, pin_source=pinned).latents, reference, 5e-3)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "free"])
def test_edit_friendly_equals_the_naive_loop(tiny, oracle, trajectories, pinned):
    trajectory = trajectories["edit-friendly"]
    draws = torch.randn(STEPS, 4, 8, 16, generator=torch.Generator().manual_seed(3))
    xs, zs = oracle.edit_friendly(trajectory.latents[:1], draws, SOURCE, STEPS)
    same(trajectory.latents, torch.cat(xs))
    same(trajectory.noise, torch.cat(zs))
    reference = oracle.replay(
        xs[STEPS - 2].expand(2, -1, -1, -1),
        [SOURCE, TARGET],
        STEPS,
        [1.0, 7.5],
        control=Control(),
        skip=2,
        noise=zs,
        pinned=xs if pinned else None,
    )
    same(edit(tiny, trajectory, controls=[], pin_source=pinned, skip_steps=2).latents, reference)


def test_pinned_source_is_direct_inversion(tiny, oracle, trajectories):
    """2310.01506: step the source freely, add back how far it fell from the trajectory. The same, said otherwise."""
    trajectory = trajectories["ddim"]
    way = ways(trajectory)
    x = way[-1].expand(2, -1, -1, -1)
    oracle.hook(MutualAttention(range(2, STEPS), range(8, 16)))
    with torch.no_grad():
        cond, uncond = torch.cat([oracle.context([p]) for p in (SOURCE, TARGET)]), oracle.context([""])
    for i, t in enumerate(oracle.timesteps(STEPS)):
        moved = oracle.step(x, oracle.predict(x, t, uncond, cond, [7.5, 7.5]), t, STEPS)
        offset = way[STEPS - 1 - i] - moved[:1]
        x = torch.cat([moved[:1] + offset, moved[1:]])
    same(edit(tiny, trajectory).latents[1:], x[1:])


# ----------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "free"])
def test_edit_friendly_noise_replays_the_source(tiny, trajectories, pinned):
    trajectory = trajectories["edit-friendly"]
    z0 = trajectory.latents[:1]
    out = edit(tiny, trajectory, (SOURCE, TARGET), [], pin_source=pinned, guidance_scale=1.0, skip_steps=0)
    # Exact but for float32: the replay's batch is another, and guidance 1 leaves rounding to grow over 5 steps.
    same(out.latents[:2], z0.expand(2, -1, -1, -1))
    assert (out.latents[2:] - z0).abs().max() > 0.1
    same(masa.sample(tiny, trajectory=trajectory, progress=False).latents, z0)


def test_edit_friendly_noise_skips_12_of_50_steps(tiny, picture):
    trajectory = masa.invert(tiny, picture, steps=50, method="noise", progress=False, **SIZE)
    zeros = torch.zeros(50, 4, 8, 16)
    settings = dict(trajectory.settings) | {"method": "edit-friendly"}
    assert masa.Trajectory(trajectory.latents, "", settings, noise=zeros).skip_steps == 12
    assert trajectory.skip_steps == 0


def test_negative_prompt_source_takes_one_row_and_null_text_two(tiny, trajectories):
    def rows(method, **settings):
        counts = []
        handle = tiny.unet.register_forward_pre_hook(lambda module, args: counts.append(len(args[2])))
        edit(tiny, trajectories[method], **settings)
        handle.remove()
        return counts

    assert rows("negative-prompt") == [2, 2, 3, 3, 3]
    assert rows("null-text") == [2, 2, 4, 4, 4]
    assert rows("ddim") == [2, 2, 4, 4, 4]
    assert rows("noise", controls=[]) == [2] * 5  # nothing to reconstruct: its source is the picture itself
    assert rows("edit-friendly", skip_steps=3) == [4, 4]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_serves_every_control(tiny, trajectories, method):
    mask = torch.ones(8, 16)
    mask[:, :8] = 0.0
    trajectory = trajectories[method]
    outs = [
        edit(tiny, trajectory, controls=controls).latents[1]
        for controls in ([], masa.MasaCtrl(2, 8), masa.BlendedLatents(mask), masa.StyleTransfer())
    ]
    for i, one in enumerate(outs):
        assert one.isfinite().all()
        assert all((one - other).abs().max() > 1e-3 for other in outs[:i])


SHORT = {"prompt": SOURCE, "steps": 2, "seed": 3, "progress": False, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def short(tiny, picture):
    """One of two steps per method, each made once."""
    return {method: masa.invert(tiny, picture, method=method, **SHORT) for method in METHODS}


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("negative-prompt", {"prompt": TARGET}),
        ("edit-friendly", {"seed": 4}),
        ("edit-friendly", {"guidance_scale": 4.0}),
        ("edit-friendly", {"seed": None, "generator": torch.Generator().manual_seed(9)}),
        ("noise", {"seed": 4}),
        ("null-text", {"edit_guidance_scale": 3.0}),
        ("null-text", {"guidance_scale": 3.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else " and ".join(value),
)
def test_parameters_change_the_trajectory(tiny, picture, short, method, change):
    parts = [short[method], masa.invert(tiny, picture, **(SHORT | {"method": method} | change))]
    one, other = (torch.cat([t.flatten() for t in (p.latents, p.context, p.noise) if t is not None]) for p in parts)
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_computing_activations_again_changes_nothing(tiny, picture, short, monkeypatch):
    """As large latents do, which would not all fit into memory."""
    calls = []

    def recompute(module, *inputs, **settings):
        calls.append(module)
        return checkpoint(module, *inputs, **settings)

    monkeypatch.setattr("masa.models.batch_rows.recompute", recompute)
    monkeypatch.setattr("masa.null_text.KEPT", 8 * 8)
    masa.invert(tiny, picture, method="null-text", **SHORT)
    assert not calls
    monkeypatch.setattr("masa.null_text.KEPT", 8 * 8 - 1)
    again = masa.invert(tiny, picture, method="null-text", **SHORT)
    assert calls
    assert torch.allclose(again.context, short["null-text"].context, atol=1e-5)


def test_skipping_steps_changes_the_edit(tiny, trajectories):
    trajectory = trajectories["ddim"]
    assert not torch.equal(edit(tiny, trajectory).latents[1], edit(tiny, trajectory, skip_steps=1).latents[1])
    # By default edit-friendly noise leaves out 12 of 50: 1 of 5.
    usual = edit(tiny, trajectories["edit-friendly"])
    assert usual.settings["skip_steps"] == 1
    assert torch.equal(usual.latents, edit(tiny, trajectories["edit-friendly"], skip_steps=1).latents)


# --------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("method", METHODS)
def test_trajectories_come_back_whole(tiny, trajectories, tmp_path, method):
    first = trajectories[method]
    first.save(tmp_path / "t.safetensors")
    back = masa.Trajectory.load(tmp_path / "t.safetensors")
    assert back.method == method
    for name in ("latents", "context", "noise"):
        one, other = getattr(first, name), getattr(back, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    out, again = edit(tiny, first), edit(tiny, back)
    assert torch.equal(out.latents, again.latents)
    again.save(tmp_path / "out")
    assert torch.equal(masa.rerun(tmp_path / "out" / "source.png", tiny, progress=False).latents, out.latents)


@pytest.mark.parametrize("method", ["null-text", "edit-friendly", "noise"])
def test_an_edit_runs_again_from_its_picture(tiny, tmp_path, method):
    from masa.io.pictures import to_pil

    to_pil(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[0].save(tmp_path / "real.png")
    settings = {"steps": 2, "controls": masa.MasaCtrl(1), "progress": False, "height": 64, "width": 64}
    out = masa.edit(tiny, tmp_path / "real.png", TARGET, SOURCE, method=method, guidance_scale=5.0, **settings)
    out.save(tmp_path / "edit")
    again = masa.rerun(tmp_path / "edit" / "target_0.png", tiny, progress=False)
    assert torch.equal(again.latents, out.latents)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "expected one of 'ddim', 'negative-prompt'"),
        ({"method": "null-text", "prompt": ""}, "null-text inversion with an empty prompt"),
        ({"method": "negative-prompt", "prompt": ""}, "negative-prompt inversion with an empty prompt"),
        ({"method": "null-text", "steps": 101}, "100 steps at most"),
        ({"method": "null-text", "edit_guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"method": "null-text", "edit_guidance_scale": 1.0}, "expected more than 1"),
        ({"method": "edit-friendly", "schedule": Schedule(offset=0)}, "offset 1"),
        ({"method": "noise", "seed": 1, "generator": torch.Generator()}, "leave one out"),
    ],
)
def test_bad_inversions_are_named(tiny, picture, settings, message):
    with pytest.raises(masa.MasaError, match=message):
        masa.invert(tiny, picture, **({"prompt": SOURCE, "steps": 2, "progress": False} | settings))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("null-text", {"negative_prompt": "blurry"}, "no place for negative_prompt='blurry'"),
        ("negative-prompt", {"negative_prompt": "blurry"}, "no place for negative_prompt"),
        ("edit-friendly", {"eta": 0.5}, "the trajectory's noise was made for 1.0"),
        ("ddim", {"skip_steps": 6}, "skip_steps is 6; expected a number from 0 to 5"),
        ("ddim", {"skip_steps": 4, "controls": masa.MasaCtrl(steps=[2])}, "expected numbers from 4 to 4"),
    ],
)
def test_contradictions_are_named(tiny, trajectories, method, settings, message):
    with pytest.raises(masa.MasaError, match=message):
        edit(tiny, trajectories[method], **settings)


def test_skipping_steps_of_pure_noise_is_refused(tiny):
    with pytest.raises(masa.MasaError, match="half noisy latents"):
        masa.sample(tiny, SOURCE, steps=3, skip_steps=1, progress=False)


def test_edit_refuses_a_negative_prompt_before_inverting(tiny, picture, monkeypatch):
    monkeypatch.setattr(masa.sampling, "invert", lambda *args, **kwargs: pytest.fail("inverted first"))
    with pytest.raises(masa.MasaError, match="no place for"):
        masa.edit(tiny, picture, TARGET, SOURCE, method="null-text", negative_prompt="blurry")


def test_embeddings_of_another_model_are_refused(tiny, trajectories):
    t = trajectories["negative-prompt"]
    wide = masa.Trajectory(t.latents, t.prompt, t.settings, torch.zeros(STEPS, 77, 768))
    with pytest.raises(masa.MasaError, match="invert with the model that edits"):
        edit(tiny, wide)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_guided_inversion_s_source_is_replayed_under_its_guidance(tiny, picture, guidance_scale):
    """Whatever the targets are guided by: its noise makes up for that prediction and no other."""
    settings = {"steps": STEPS, "seed": 3, "progress": False, **SIZE}
    trajectory = masa.invert(tiny, picture, SOURCE, method="edit-friendly", guidance_scale=3.0, **settings)
    out = edit(tiny, trajectory, controls=[], pin_source=False, skip_steps=0, guidance_scale=guidance_scale)
    same(out.latents[:1], trajectory.latents[:1])


def test_guidance_has_no_say_in_a_negative_prompt_inversion(tiny, picture, trajectories):
    """Both halves have the picture's prompt: one row, and the trajectory of guidance 1."""
    settings = {"steps": STEPS, "progress": False, **SIZE}
    guided = masa.invert(tiny, picture, SOURCE, method="negative-prompt", guidance_scale=5.0, **settings)
    assert torch.equal(guided.latents, trajectories["negative-prompt"].latents)
    assert not torch.equal(masa.invert(tiny, picture, SOURCE, guidance_scale=5.0, **settings).latents, guided.latents)
