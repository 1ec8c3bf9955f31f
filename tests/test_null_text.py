"""Null-text inversion: what its inner steps buy, and the loss that it reaches."""

from __future__ import annotations

import pytest
import torch

import masa
from masa.cli.commands import main
from masa.io.pictures import to_pil
from masa.null_text import INNER_STEPS, learning_rate, tolerance
from masa.weights.demo.world import caption, render
from masa.weights.demo.world import sample as draw_sample
from masa.workflows.rerun import restore_trajectory

STEPS = 50  # the tolerance is made for these


@pytest.mark.slow
def test_20_inner_steps_retrace_a_picture_to_the_tolerance_on_the_demo_model():
    """And at least 3 dB better than DDIM, at guidance 7.5. With the published 10 the end is just above."""
    sd = masa.load(device="cpu", dtype="fp32", progress=False)
    drawn = draw_sample(4, ["cat"])
    image = render(drawn.appearance, drawn.pose, drawn.scene, sd.config.image_size)[0]
    prompt = caption(drawn.appearance, drawn.pose, drawn.scene)
    half = sd.config.image_size // 2
    settings = {"steps": STEPS, "height": half, "width": half, "progress": False}
    fitted = masa.invert(sd, image, prompt, method="null-text", inner_steps=20, **settings)
    unfitted = masa.Trajectory(fitted.latents, prompt, dict(fitted.settings) | {"method": "ddim"})

    def error(trajectory: masa.Trajectory) -> torch.Tensor:
        out = masa.sample(sd, trajectory=trajectory, guidance_scale=7.5, progress=False)
        return (out.latents - trajectory.latents[:1]).square().mean()

    assert error(fitted) < tolerance(STEPS - 1)
    gain = 10 * torch.log10(error(unfitted) / error(fitted))
    assert gain > 3.0, f"{gain:.1f} dB"


def test_tolerance_and_learning_rate_are_the_published_ones():
    """Loss below 1e-5 + i * 2e-5 stops step i; Adam's rate is 1e-2 * (1 - i / 100)."""
    assert [tolerance(step) for step in (0, 1, 49)] == pytest.approx([1e-5, 3e-5, 9.9e-4])
    assert [learning_rate(step) for step in (0, 1, 50)] == pytest.approx([1e-2, 9.9e-3, 5e-3])


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("null_text") / "real.png"
    to_pil(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[0].save(path)
    return path


def invert(tiny, picture, **settings) -> masa.Trajectory:
    return masa.invert(tiny, picture, "a photo of a cat", method="null-text", steps=2, progress=False, height=64,
                       width=64, **settings)  # fmt: skip


@pytest.mark.slow
def test_more_inner_steps_come_closer_and_the_published_ten_are_the_default(tiny, picture):
    usual = invert(tiny, picture)
    assert usual.settings["inner_steps"] == INNER_STEPS == 10

    def error(trajectory: masa.Trajectory) -> float:
        out = masa.sample(tiny, trajectory=trajectory, guidance_scale=7.5, progress=False)
        return float((out.latents - trajectory.latents[:1]).square().mean())

    assert error(invert(tiny, picture, inner_steps=20)) < error(usual) < error(invert(tiny, picture, inner_steps=1))


def test_a_loss_that_is_low_enough_ends_a_step(tiny, picture, monkeypatch):
    monkeypatch.setattr("masa.null_text.tolerance", lambda step: float("inf"))
    ended = invert(tiny, picture)
    monkeypatch.undo()
    assert torch.equal(ended.context, invert(tiny, picture, inner_steps=1).context)


def test_inner_steps_are_repeated_from_the_settings(tiny, picture):
    first = invert(tiny, picture, inner_steps=3)
    again = restore_trajectory(tiny, first.settings, picture, progress=False)
    assert again.settings["inner_steps"] == 3
    assert torch.equal(again.context, first.context)
    old = {name: value for name, value in first.settings.items() if name != "inner_steps"}
    assert restore_trajectory(tiny, old, picture, progress=False).settings["inner_steps"] == INNER_STEPS


def test_edits_and_the_command_line_pass_inner_steps_on(tiny, picture, tiny_folder, tmp_path):
    out = masa.edit(tiny, picture, "a dog", "a cat", controls=(), method="null-text", inner_steps=3,
                    steps=2, progress=False)  # fmt: skip
    assert out.settings["trajectory"]["inner_steps"] == 3
    path = tmp_path / "picture.safetensors"
    arguments = ["--method", "null-text", "--prompt", "a cat", "--inner-steps", "2", "--steps", "2"]
    assert main(["invert", str(picture), "-c", str(tiny_folder), "-o", str(path), *arguments]) == 0
    assert masa.Trajectory.load(path).settings["inner_steps"] == 2


@pytest.mark.parametrize("inner_steps", [0, -1, 2.5])
def test_bad_inner_steps_are_named(tiny, picture, inner_steps):
    with pytest.raises(masa.MasaError, match=f"inner_steps is {inner_steps}; expected a whole number, 1 or more"):
        invert(tiny, picture, inner_steps=inner_steps)
