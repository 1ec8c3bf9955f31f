"""The schedule and DDIM's two steps."""

from __future__ import annotations

import pytest
import torch

from masa import MasaError, Schedule
from masa.schedule import ddim_invert_step, ddim_step, predict_x0


def test_alphas_equal_diffusers():
    from diffusers import DDIMScheduler

    oracle = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(torch.tensor(Schedule().alphas_cumprod), oracle.alphas_cumprod)


def test_fifty_steps_are_the_published_ones():
    assert Schedule().timesteps(50) == tuple(range(981, 0, -20))
    assert Schedule(offset=0).timesteps(50) == tuple(range(980, -1, -20))


def test_steps_that_do_not_divide_start_lower():
    assert Schedule().timesteps(30)[0] == 958


def test_past_the_end_alpha_is_that_of_timestep_0():
    schedule = Schedule()
    assert schedule.alpha(-19) == schedule.alpha(0) < 1.0


def test_offset_0_ends_with_a_step_that_changes_nothing(generator):
    x, eps = torch.randn(2, 4, generator=generator)
    assert torch.allclose(Schedule(offset=0).step(eps, x, 0, 50), x, atol=1e-6)
    assert not torch.allclose(Schedule().step(eps, x, 1, 50), x, atol=1e-3)


def test_inverting_undoes_a_step(generator):
    x, eps = torch.randn(2, 4, generator=generator)
    back = ddim_invert_step(eps, ddim_step(eps, x, 0.5, 0.7), 0.7, 0.5)
    assert torch.allclose(back, x, atol=1e-6)


def test_predicted_x0_is_exact_for_the_true_noise(generator):
    x0, eps = torch.randn(2, 4, generator=generator)
    assert torch.allclose(predict_x0(eps, 0.3**0.5 * x0 + 0.7**0.5 * eps, 0.3), x0, atol=1e-5)


def test_full_eta_forgets_eps_down_to_its_posterior(generator):
    """eta = 1 is DDPM's posterior variance: the two noise terms together keep the level 1 - a_prev."""
    a_t, a_prev = 0.5, 0.7
    sigma2 = (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
    zero = torch.zeros(1)
    from_noise = ddim_step(zero, zero, a_t, a_prev, eta=1.0, noise=torch.ones(1))
    assert from_noise.item() == pytest.approx(sigma2**0.5)


@pytest.mark.parametrize("steps", [0, -1, 1000, 2.5, True])
def test_bad_steps_are_named(steps):
    with pytest.raises(MasaError, match=f"steps is {steps}"):
        Schedule().timesteps(steps)


def test_bad_offset_is_named():
    with pytest.raises(MasaError, match="offset is 2"):
        Schedule(offset=2)
