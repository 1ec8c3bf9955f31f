"""Samplers: trajectories equal diffusers', histories belong to branches, and every way to run a model keeps them."""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict

import pytest
import torch
from rounding import same

import masa
from masa.controls.base import ActiveControl
from masa.controls.local_blend import ActiveBlend
from masa.output.result import read_settings
from masa.samplers import NAMES, choose_sampler
from masa.samplers.base import Levels
from masa.schedule import find_eps, predict_x0

SOURCE, TARGETS = "a photo of a sitting cat", ["a photo of a running cat", "a red cat in the snow"]
SETTINGS = {"steps": 4, "height": 128, "width": 128, "progress": False}
CONTROL = masa.MasaCtrl(1, 8)
SAMPLERS = {
    "2m": masa.DPMSolverPP(),
    "2m karras": masa.DPMSolverPP(karras=True, end="sigma_min"),
    "2m sde": masa.DPMSolverPP(sde=True),
    "unipc": masa.UniPC(),
    "unipc 3 karras": masa.UniPC(order=3, karras=True),
    "euler": masa.Euler(),
    "euler ancestral": masa.Euler(ancestral=True, karras=True),
    "lcm": masa.LCM(),
}
ON_A_TRAJECTORY = {
    **{name: SAMPLERS[name] for name in ("2m", "2m sde", "unipc", "euler")},
    "unipc 3": masa.UniPC(order=3),
    "euler ancestral": masa.Euler(ancestral=True),
}
SPACINGS = ("leading", "trailing", "linspace")
# Float32 rounding of two ways to write the same step, grown over a whole trajectory.
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'


class Published:
    """A scheduler of diffusers, on latents as masa has them."""

    def __init__(self, sampler: masa.Sampler, steps: int | None, timesteps: list[int] | None = None) -> None:
        import diffusers

        training = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        grid = {"timestep_spacing": getattr(sampler, "spacing", None) or "trailing"}
        end = {"final_sigmas_type": getattr(sampler, "end", None) or "zero"}
        karras = {"use_karras_sigmas": getattr(sampler, "karras", False)}
        if isinstance(sampler, masa.LCM):
            self.scheduler = diffusers.LCMScheduler(**training)
        elif isinstance(sampler, masa.DPMSolverPP):
            kind = "sde-dpmsolver++" if sampler.sde else "dpmsolver++"
            self.scheduler = diffusers.DPMSolverMultistepScheduler(
                algorithm_type=kind, **training, **grid, **end, **karras
            )
        elif isinstance(sampler, masa.UniPC):
            self.scheduler = diffusers.UniPCMultistepScheduler(
                solver_order=sampler.order, **training, **grid, **end, **karras
            )
        elif sampler.ancestral:
            self.scheduler = diffusers.EulerAncestralDiscreteScheduler(**training, **grid)
        else:
            self.scheduler = diffusers.EulerDiscreteScheduler(**training, **grid, **karras)
        self.own_scale = isinstance(sampler, masa.Euler)  # latents over sqrt(alphas_cumprod)
        if isinstance(sampler, masa.DPMSolverPP):
            self.scheduler.set_timesteps(steps, timesteps=timesteps)
        else:
            self.scheduler.set_timesteps(steps)
            if timesteps is not None:
                self.scheduler.timesteps = torch.tensor(timesteps)
        self.timesteps = self.scheduler.timesteps

    def begin(self, noise: torch.Tensor) -> torch.Tensor:
        """A run's first latents, in its own scale."""
        return noise * self.scheduler.init_noise_sigma

    def seen(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """What the network is given."""
        return self.scheduler.scale_model_input(x, self.timesteps[i]) if self.own_scale else x

    def step(self, eps: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        drawn = noise.expand_as(x)
        if isinstance(self.scheduler, __import__("diffusers").DPMSolverMultistepScheduler):
            return self.scheduler.step(eps, self.timesteps[i], x, variance_noise=drawn).prev_sample
        module = sys.modules[type(self.scheduler).__module__]
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(module, "randn_tensor"):
                patch.setattr(module, "randn_tensor", lambda *args, **kwargs: drawn)
            return self.scheduler.step(eps, self.timesteps[i], x, return_dict=False)[0]


def oracle(sampler: masa.Sampler, steps: int | None, timesteps: list[int] | None = None) -> Published:
    return Published(sampler, steps, timesteps)


def every_grid() -> list[tuple[bool, str | None, str]]:
    plain = [(False, spacing, end) for spacing, end in itertools.product(SPACINGS, ("zero", "sigma_min"))]
    return [*plain, (True, None, "zero"), (True, None, "sigma_min")]


def every_sampler() -> list[masa.Sampler]:
    found: list[masa.Sampler] = [masa.LCM()]
    for karras, spacing, end in every_grid():
        grid = {"karras": karras, "spacing": spacing, "end": end}
        found += [masa.DPMSolverPP(**grid), masa.DPMSolverPP(sde=True, **grid)]
        found += [masa.UniPC(order=order, **grid) for order in (1, 2, 3)]
    for spacing in SPACINGS:
        found += [masa.Euler(spacing=spacing), masa.Euler(karras=True, spacing=spacing)]
        found.append(masa.Euler(ancestral=True, spacing=spacing))
    return found


def made_up_eps(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Smooth in x, and different at every timestep."""
    mixed = torch.einsum("ij,bjhw->bihw", torch.arange(16.0).reshape(4, 4).sin() * 0.3, x)
    return torch.tanh(mixed) * 0.7 + x * 0.5 * (timestep / 1000) + 0.05 * torch.sin(3 * x)


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out - ref).abs().max() / ref.std()).item()


# ---------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("sampler", every_sampler(), ids=str)
def test_grids_equal_diffusers(sampler):
    between = isinstance(sampler, masa.Euler) and (sampler.karras or sampler.spacing == "linspace")
    atol = 1e-3 if between else 0.0  # of timesteps that are no whole ones, in float32 at diffusers
    for steps in served(sampler, (1, 2, 3, 7, 12, 20, 25, 30, 50, 99, 333)):
        levels, published = sampler.levels(masa.Schedule(), steps), oracle(sampler, steps)
        ours = torch.tensor(levels.timesteps, dtype=torch.float64)
        assert torch.allclose(ours, published.timesteps.double(), rtol=0, atol=atol), steps
        if not isinstance(sampler, masa.LCM):
            sigmas = torch.tensor([((1 - a) / a) ** 0.5 for a in levels.alphas])
            assert torch.allclose(sigmas, published.scheduler.sigmas, rtol=1e-5, atol=0), steps


def served(sampler: masa.Sampler, steps: tuple[int, ...]) -> list[int]:
    """Numbers of steps that both sides serve."""
    few = isinstance(sampler, masa.LCM)
    # Where diffusers' UniPC ends where it begins, and takes no step at all.
    none = isinstance(sampler, masa.UniPC) and sampler.karras and sampler.end == "sigma_min"
    return [n for n in steps if not (few and n > 50) and not (none and n == 1)]


def test_leading_timesteps_have_the_schedules_offset():
    for kind in (masa.DPMSolverPP, masa.UniPC, masa.Euler):
        with_one, without = (
            kind(spacing="leading").levels(masa.Schedule(offset=offset), 12).timesteps for offset in (1, 0)
        )
        assert [t - 1 for t in with_one] == list(without)


@pytest.mark.parametrize("sampler", every_sampler(), ids=str)
def test_whole_trajectories_equal_diffusers(sampler):
    for steps in served(sampler, (1, 2, 3, 8, 14, 15, 16, 30, 50, 99)):
        levels, published = sampler.levels(masa.Schedule(), steps), oracle(sampler, steps)
        assert follow(sampler, levels, published) < TOLERANCE, steps


@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
@pytest.mark.parametrize(("steps", "first_step"), [(20, 0), (20, 7), (8, 3)])
def test_on_a_trajectorys_levels_it_equals_diffusers(sde, steps, first_step):
    """Also from a later step on, where its history is empty."""
    sampler = masa.DPMSolverPP(sde=sde, end="sigma_min")
    fixed = Levels.of_schedule(masa.Schedule(), steps)
    levels = sampler.levels(masa.Schedule(), steps, fixed)
    assert levels is fixed
    published = oracle(sampler, None, list(levels.timesteps))
    assert follow(sampler, levels, published, first_step) < TOLERANCE


@pytest.mark.parametrize("sampler", [masa.UniPC(order=3), masa.Euler(), masa.Euler(ancestral=True)], ids=str)
@pytest.mark.parametrize(("steps", "first_step"), [(20, 0), (20, 7), (8, 3)])
def test_on_a_trajectorys_levels_the_others_equal_diffusers(sampler, steps, first_step):
    """Whose schedulers take no timesteps: they are given these, with the levels."""
    fixed = Levels.of_schedule(masa.Schedule(), steps)
    levels = sampler.levels(masa.Schedule(), steps, fixed)
    assert levels is fixed
    published = oracle(sampler, steps)
    published.timesteps = published.scheduler.timesteps = torch.tensor(levels.timesteps, dtype=torch.float32)
    published.scheduler.sigmas = torch.tensor([((1 - a) / a) ** 0.5 for a in levels.alphas])
    assert follow(sampler, levels, published, first_step) < TOLERANCE


def follow(sampler, levels, published, first_step: int = 0) -> float:
    """The greatest difference in any step of two guided runs of a made-up network."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    ours, history, worst = noise * sampler.noise_scale(levels), (), 0.0
    theirs = published.begin(noise)
    if first_step:
        ours, theirs = noise, noise / (levels.alphas[first_step] ** 0.5 if published.own_scale else 1.0)
    solver = sampler.start(levels, 0.0)
    published.scheduler.set_begin_index(first_step)
    for step in range(first_step, levels.steps):
        timestep, a_next = levels.timesteps[step], levels.alphas[step + 1]
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        eps = guided_eps(ours, timestep)
        x0 = predict_x0(eps, ours, levels.alphas[step])
        ours, history = solver.step(step, ours, eps, x0, history, noise if solver.draws_noise else None)
        eps = guided_eps(published.seen(theirs, step), timestep)
        theirs = published.step(eps, step, theirs, noise)
        reached = theirs * a_next**0.5 if published.own_scale else theirs
        worst = max(worst, difference(ours, reached))
    return worst


def guided_eps(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A made-up network under guidance of 2.5."""
    uncond = made_up_eps(x, timestep)
    return uncond + 2.5 * (made_up_eps(0.9 * x, timestep) - uncond)


GUIDED = [*SAMPLERS.values(), masa.DPMSolverPP(spacing="linspace"), masa.Euler(karras=True, spacing="linspace")]
GUIDED.append(masa.Euler(ancestral=True, spacing="leading"))


@pytest.mark.parametrize("sampler", [s for s in GUIDED if s != SAMPLERS["euler ancestral"]], ids=str)
@torch.no_grad()
def test_guided_runs_equal_diffusers(tiny, sampler):
    """Of the network itself, and with the noise drawn after the start's."""
    steps = 16
    out = masa.sample(tiny, SOURCE, sampler=sampler, seed=5, **(SETTINGS | {"steps": steps}))
    published, generator = oracle(sampler, steps), torch.Generator().manual_seed(5)
    context = tiny.encode_prompt(["", SOURCE])
    x = published.begin(torch.randn(1, 4, 16, 16, generator=generator))
    noisy = sampler.start(sampler.levels(tiny.schedule, steps), 0.0).draws_noise
    for i, timestep in enumerate(published.timesteps):
        seen = published.seen(x, i).expand(2, -1, -1, -1)
        eps_u, eps_c = tiny.unet(seen, timestep, context)[0].chunk(2)
        noise = torch.randn(1, 4, 16, 16, generator=generator) if noisy else torch.zeros(1, 4, 16, 16)
        x = published.step(eps_u + 7.5 * (eps_c - eps_u), i, x, noise)
    # The random network multiplies float32 rounding, and guidance does again.
    assert difference(out.latents, x) < 5e-4


# ----------------------------------------------------------------------------------------------------- whole runs


def run(tiny, targets=TARGETS, **settings):
    return masa.sample(tiny, SOURCE, targets, **({"controls": CONTROL, "seed": 3} | SETTINGS | settings))


@pytest.fixture(scope="module")
def plain(tiny):
    return run(tiny)


@pytest.fixture(scope="module")
def sampled(tiny):
    return {name: run(tiny, sampler=sampler) for name, sampler in SAMPLERS.items()}


@pytest.fixture(scope="module")
def trajectory(tiny):
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return masa.invert(tiny, picture, SOURCE, **SETTINGS)


def test_each_field_changes_the_result(tiny, plain, sampled):
    changed = [masa.DPMSolverPP(karras=True), masa.DPMSolverPP(spacing="leading"), masa.DPMSolverPP(end="sigma_min")]
    changed += [masa.UniPC(order=1), masa.UniPC(spacing="linspace")]
    changed += [masa.UniPC(end="sigma_min"), masa.Euler(karras=True), masa.Euler(spacing="leading")]
    changed += [masa.Euler(spacing="linspace"), masa.Euler(ancestral=True)]
    results = [plain, *sampled.values(), *(run(tiny, sampler=sampler) for sampler in changed)]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert difference(one.latents, other.latents) > 1e-3


def test_the_third_order_changes_the_result_where_steps_allow_it(tiny):
    for steps, differ in ((5, True), (4, False)):
        two, three = (
            run(tiny, (), controls=[], steps=steps, sampler=masa.UniPC(order=order)).latents for order in (2, 3)
        )
        assert torch.equal(two, three) is not differ


def test_names_and_defaults_stand_for_values(tiny, plain, sampled):
    assert torch.equal(run(tiny, sampler="dpm++2m").latents, sampled["2m"].latents)
    explicit = masa.DPMSolverPP(spacing="trailing", end="zero")
    assert torch.equal(run(tiny, sampler=explicit).latents, sampled["2m"].latents)
    assert torch.equal(run(tiny, sampler="dpm++2m-sde").latents, sampled["2m sde"].latents)
    for sampler in ("ddim", masa.DDIM()):
        assert torch.equal(run(tiny, sampler=sampler).latents, plain.latents)
    assert torch.equal(run(tiny, sampler="unipc").latents, sampled["unipc"].latents)
    assert torch.equal(run(tiny, sampler="euler").latents, sampled["euler"].latents)
    assert torch.equal(run(tiny, sampler="lcm").latents, sampled["lcm"].latents)
    assert NAMES["euler-a"] == masa.Euler(ancestral=True)
    assert set(NAMES) == {"ddim", "dpm++2m", "dpm++2m-sde", "unipc", "euler", "euler-a", "lcm"}
    for spacing in ("leading", "trailing", "linspace"):
        levels = masa.DPMSolverPP(karras=True, spacing=spacing).levels(tiny.schedule, 8)
        assert levels == masa.DPMSolverPP(karras=True).levels(tiny.schedule, 8)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_targets_together_in_parts_and_alone_agree(tiny, name, guidance_scale):
    settings = {"sampler": SAMPLERS[name], "guidance_scale": guidance_scale}
    together = run(tiny, **settings).latents
    same(run(tiny, targets_at_once=1, **settings).latents, together)
    same(run(tiny, TARGETS[1:], **settings).latents, together[[0, 2]])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_cached_source_serves_it(tiny, sampled, name, tmp_path):
    made = {"controls": CONTROL, "seed": 3, "sampler": SAMPLERS[name], **SETTINGS}
    cache = masa.record(tiny, SOURCE, path=tmp_path / "cache.safetensors", **made)
    loaded = masa.SourceCache.load(tmp_path / "cache.safetensors", tiny)
    cached = masa.sample(tiny, target=TARGETS, controls=CONTROL, cache=loaded, progress=False)
    same(cached.latents, sampled[name].latents)
    assert cached.settings == sampled[name].settings
    # LocalBlend puts a region back on the source, in what the sampler remembers too: that is recorded.
    controls = [CONTROL, masa.LocalBlend("cat", "cat", threshold=0.95)]
    parts = masa.sample(tiny, target=TARGETS, controls=controls, cache=cache, targets_at_once=1, progress=False)
    same(parts.latents, run(tiny, controls=controls, sampler=SAMPLERS[name]).latents)
    kind = type(SAMPLERS[name]).__name__
    with pytest.raises(masa.MasaError, match=rf"sampler is DDIM\(\), but the cache was recorded with {kind}"):
        masa.sample(tiny, target=TARGETS, cache=cache, sampler="ddim")


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_cached_source_serves_starts_of_ones_own(tiny, sampler):
    """Given as they are, before a sampler weighs them."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    made = {"controls": CONTROL, "sampler": sampler, "latents": noise, **SETTINGS}
    cache = masa.record(tiny, SOURCE, **made)
    uncached = masa.sample(tiny, SOURCE, TARGETS, **made)
    for latents in (None, noise, noise.expand(3, -1, -1, -1)):
        cached = masa.sample(tiny, target=TARGETS, controls=CONTROL, cache=cache, latents=latents, progress=False)
        same(cached.latents, uncached.latents)


@pytest.mark.parametrize(
    ("name", "pinned"),
    [(name, pinned) for name in ("2m", "unipc", "euler") for pinned in (True, False)]
    + [("2m sde", True), ("euler ancestral", True)],
)
def test_a_pictures_cache_serves_it(tiny, trajectory, name, pinned):
    """From a later step on, of which the recording has one prediction less."""
    sampler = ON_A_TRAJECTORY[name]
    start = {"trajectory": trajectory, "pin_source": pinned, "sampler": sampler, "seed": 2, "skip_steps": 1}
    start["progress"] = False
    # A region that changes from step to step shows what was remembered where it was put back.
    controls = [CONTROL, masa.LocalBlend("cat", "cat", threshold=0.98, start=0.0)]
    uncached = masa.sample(tiny, target=TARGETS, controls=controls, **start)
    cache = masa.record(tiny, controls=CONTROL, **start)
    cached = masa.sample(tiny, target=TARGETS, controls=controls, cache=cache, seed=2, progress=False)
    same(cached.latents, uncached.latents)


@pytest.mark.parametrize("name", ["2m", "2m sde", "unipc", "unipc 3"])
@torch.no_grad()
def test_a_pinned_source_has_no_history(tiny, trajectory, name):
    """Its reconstruction is what its last step predicts, whatever came before."""
    start = {"trajectory": trajectory, "sampler": ON_A_TRAJECTORY[name], "controls": [], "seed": 0, "progress": False}
    out = masa.sample(tiny, target=TARGETS[0], **start)
    eps = tiny.unet(trajectory.latents[1][None].expand(2, -1, -1, -1), 1, tiny.encode_prompt(["", SOURCE]))[0]
    guided = eps[0] + 7.5 * (eps[1] - eps[0])
    m = predict_x0(guided, trajectory.latents[1], tiny.schedule.alpha(1))
    assert difference(out.latents[0], m) < 1e-4
    skipped = masa.sample(tiny, target=TARGETS[0], skip_steps=2, **start)
    same(skipped.latents[0], out.latents[0])


@pytest.mark.parametrize("name", ["dpm++2m", "unipc", "euler"])
def test_a_free_source_may_run_under_what_adds_no_noise(tiny, trajectory, name):
    free = masa.sample(tiny, trajectory=trajectory, sampler=name, progress=False)
    if name == "euler":  # which is DDIM's step, on the trajectory's levels
        same(free.latents, masa.sample(tiny, trajectory=trajectory, progress=False).latents)
        return
    assert not torch.equal(free.latents, masa.sample(tiny, trajectory=trajectory, progress=False).latents)


def test_a_compiled_model_agrees(tiny, sampled):
    compiled = tiny.compile(compiler="eager")
    for name, sampler in SAMPLERS.items():
        # Compiled convolutions are summed in another order: float32 rounding, grown over four steps.
        assert difference(run(compiled, sampler=sampler).latents, sampled[name].latents) < 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_is_written_down_and_runs_again(tiny, sampled, name, tmp_path):
    sampled[name].source.save(tmp_path / "source.png")
    again = masa.rerun(tmp_path / "source.png", tiny, progress=False)
    assert torch.equal(again.latents, sampled[name].latents)
    assert again.settings == sampled[name].settings
    written = read_settings(tmp_path / "source.png")["sampler"]
    assert written == {"kind": type(SAMPLERS[name]).__name__} | asdict(SAMPLERS[name])


def test_edits_take_it(tiny):
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    settings = {"steps": 4, "height": 64, "width": 64, "progress": False}
    for make in (
        lambda **kept: masa.edit(tiny, picture, TARGETS, controls=masa.MasaCtrl(1), **kept),
        lambda **kept: masa.sdedit(tiny, picture, TARGETS, 0.7, seed=0, **kept),
    ):
        out = make(sampler="dpm++2m", **settings)
        assert out.settings["sampler"]["kind"] == "DPMSolverPP"
        assert not torch.equal(out.latents[1:], make(**settings).latents[1:])


def test_noise_that_is_no_inversion_needs_not_be_retraced(tiny):
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noised = masa.invert(tiny, picture, method="noise", steps=4, seed=0, height=64, width=64, progress=False)
    start = {"trajectory": noised, "sampler": "dpm++2m-sde", "controls": [], "seed": 0, "progress": False}
    free = masa.sample(tiny, target="a cat", pin_source=False, **start)
    assert not torch.equal(free.latents[0], masa.sample(tiny, target="a cat", **start).latents[0])


# ------------------------------------------------------------------------------------------------- noise and levels


def test_one_noise_a_step_serves_all_branches(tiny):
    """Drawn after the start's, and also in the last step, which adds none."""
    generator = torch.Generator().manual_seed(3)
    out = run(tiny, sampler="dpm++2m-sde", seed=None, generator=generator, targets_at_once=1)
    same(out.latents, run(tiny, sampler="dpm++2m-sde").latents)
    counted = torch.Generator().manual_seed(3)
    for _ in range(1 + SETTINGS["steps"]):
        torch.randn(1, 4, 16, 16, generator=counted)
    assert torch.equal(generator.get_state(), counted.get_state())
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    given = [run(tiny, sampler="dpm++2m-sde", latents=noise, seed=seed).latents for seed in (1, 2)]
    assert not torch.equal(*given)


class Probe:
    """A control that sees the run, and may blend as told."""

    needs_targets = False

    def __init__(self, active: ActiveControl | None = None) -> None:
        self.active = active or ActiveControl()

    def begin(self, run):
        self.run = run
        return self.active


def test_controls_see_the_samplers_levels(tiny, trajectory):
    settings = {"controls": (probe := Probe()), "targets": (), "guidance_scale": 1.0}
    run(tiny, sampler="dpm++2m", **settings)
    trailing = [999, 749, 499, 249]
    assert probe.run.alphas == (*(tiny.schedule.alpha(t) for t in trailing), 1.0)
    run(tiny, **settings)
    assert probe.run.alphas == (*(tiny.schedule.alpha(t) for t in tiny.schedule.timesteps(4)), 1.0)
    masa.sample(tiny, target="a cat", trajectory=trajectory, sampler="dpm++2m", controls=probe, progress=False)
    assert probe.run.alphas == (*(tiny.schedule.alpha(t) for t in tiny.schedule.timesteps(4)), 1.0)


def test_eps_and_clean_latents_imply_each_other(generator):
    x, x0 = torch.randn(2, 1, 4, 8, 8, generator=generator)
    assert torch.allclose(predict_x0(find_eps(x0, x, 0.3), x, 0.3), x0, atol=1e-6)


# --------------------------------------------------------------------------------------- blending what is remembered


class PutBack(ActiveControl):
    """After step 1 the targets are where the source is."""

    def __init__(self, remembered: bool) -> None:
        self.step, self.remembered = -1, remembered

    def after_step(self, step, latents, tape, branches):
        self.step = step
        return self._put_back(latents)

    def blend(self, history):
        return self._put_back(history) if self.remembered else history

    def _put_back(self, latents):
        return latents[:1].expand_as(latents) if self.step == 1 else latents


def test_euler_on_a_trajectory_is_ddim(tiny, trajectory):
    start = {"trajectory": trajectory, "target": TARGETS, "controls": CONTROL, "seed": 0, "progress": False}
    for euler, eta in ((masa.Euler(), 0.0), (masa.Euler(ancestral=True), 1.0)):
        # Two ways to write a step: float32 rounding, which the random network multiplies.
        ddim = masa.sample(tiny, eta=eta, **start)
        assert difference(masa.sample(tiny, sampler=euler, **start).latents, ddim.latents) < 5e-4


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name.startswith(("2m", "unipc"))])
def test_what_is_put_back_goes_on_as_the_source_does(tiny, name):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    kept, forgotten = (
        run(tiny, SOURCE, sampler=SAMPLERS[name], latents=noise, controls=Probe(PutBack(remembered))).latents
        for remembered in (True, False)
    )
    same(kept[1], kept[0])
    assert difference(forgotten[1], forgotten[0]) > 0.01


@pytest.mark.parametrize("control", ["alone", "in Prompt-to-Prompt"])
def test_local_blend_blends_the_history_alike(tiny, monkeypatch, control):
    calls = []
    blend = ActiveBlend.blend

    def spy(self, history):
        out = blend(self, history)
        calls.append((history, out))
        return out

    monkeypatch.setattr(ActiveBlend, "blend", spy)
    blending = masa.LocalBlend("cat", "cat", threshold=0.98, start=0.5)
    chosen = blending if control == "alone" else masa.PromptToPrompt("replace", local_blend=blending)
    out = run(tiny, TARGETS[0], sampler="dpm++2m", controls=chosen)
    assert sorted(out.masks[0]) == [2, 3]
    mask = out.masks[0][3][1].bool()
    assert 0 < mask.float().mean() < 1
    history, blended = calls[-1]
    assert not torch.equal(history[1], history[0])
    assert torch.equal(blended[1][:, ~mask], history[0][:, ~mask])
    assert torch.allclose(blended[1][:, mask], history[1][:, mask], atol=1e-5)
    early, unchanged = calls[0]  # the first step's history, before blending begins
    assert unchanged is early


def test_blended_latents_blend_the_history_with_the_clean_picture(tiny, trajectory, generator):
    mask = torch.zeros(16, 16)
    mask[:, 5:] = 1.0
    probe = Probe()
    masa.sample(tiny, target="a cat", trajectory=trajectory, controls=probe, progress=False)
    active = masa.BlendedLatents(mask).begin(probe.run)
    history = torch.randn(2, 4, 16, 16, generator=generator)
    blended = active.blend(history)
    assert torch.equal(blended[1, :, :, :5], trajectory.latents[0, :, :, :5])
    assert torch.equal(blended[1, :, :, 5:], history[1, :, :, 5:])
    assert torch.equal(blended[0], history[0])


@pytest.mark.parametrize("name", ON_A_TRAJECTORY)
def test_a_picture_is_kept_outside_a_mask(tiny, trajectory, name):
    """Whatever the solver remembers, what BlendedLatents puts back is the clean picture in the end."""
    mask = torch.zeros(16, 16)
    mask[:, 5:] = 1.0
    start = {"trajectory": trajectory, "sampler": ON_A_TRAJECTORY[name], "seed": 0, "progress": False}
    out = masa.sample(tiny, target=TARGETS, controls=[CONTROL, masa.BlendedLatents(mask)], **start)
    for target in out.latents[1:]:
        assert torch.equal(target[:, :, :5], trajectory.latents[0, :, :, :5])
        assert difference(target[:, :, 5:], trajectory.latents[0, :, :, 5:]) > 0.1


def test_a_callback_leaves_the_history_alone(tiny):
    """Moving the latents in step 0 changes step 1 by the solver's own formula, from the prediction before the move."""
    seen = []

    def move(step, timestep, x):
        seen.append(x)
        return x + 1.0 if step == 0 else None

    recorder = masa.RecordPredictions([0])
    run(tiny, (), sampler="dpm++2m", controls=recorder, guidance_scale=1.0, callback=move)
    with torch.no_grad():
        levels = masa.DPMSolverPP().levels(tiny.schedule, 4)
        context, solver = tiny.encode_prompt([SOURCE]), masa.DPMSolverPP().start(levels, 0.0)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        eps = tiny.unet(x, levels.timesteps[0], context)[0]
        x, history = solver.step(0, x, eps, predict_x0(eps, x, levels.alphas[0]), (), None)
        moved = x + 1.0
        eps = tiny.unet(moved, levels.timesteps[1], context)[0]
        x, _ = solver.step(1, moved, eps, predict_x0(eps, moved, levels.alphas[1]), history, None)
    assert difference(seen[1], x) < 1e-4


def test_a_callback_is_told_whole_timesteps_and_the_network_those_between(tiny, monkeypatch):
    told, seen = [], []
    forward = type(tiny.unet).forward

    def spy(self, x, timestep, *args, **kwargs):
        seen.append(timestep)
        return forward(self, x, timestep, *args, **kwargs)

    monkeypatch.setattr(type(tiny.unet), "forward", spy)
    sampler = masa.Euler(karras=True)
    run(tiny, (), controls=[], sampler=sampler, callback=lambda step, timestep, x: told.append(timestep))
    assert tuple(seen) == sampler.levels(tiny.schedule, 4).timesteps
    assert any(timestep != round(timestep) for timestep in seen)
    assert told == [round(timestep) for timestep in seen]
    assert all(isinstance(timestep, int) for timestep in told)


def test_unipc_goes_on_from_what_a_callback_changed(tiny):
    """Its correction is of the latents that it is given: what was moved stays moved."""
    moved = run(tiny, (), controls=[], sampler="unipc", callback=lambda step, t, x: x + 1.0 if step == 1 else None)
    plain = run(tiny, (), controls=[], sampler="unipc")
    sampler = masa.UniPC()
    levels = sampler.levels(tiny.schedule, 4)
    solver = sampler.start(levels, 0.0)
    x, before = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    m, zero = torch.zeros_like(x), torch.zeros_like(x)
    one, _ = solver.step(1, x, zero, m, (before,), None)
    other, _ = solver.step(1, x + 1.0, zero, m, (before,), None)
    shrink = ((1 - levels.alphas[2]) / (1 - levels.alphas[1])) ** 0.5
    assert torch.allclose(other - one, torch.full_like(x, shrink), atol=1e-5)
    assert difference(moved.latents, plain.latents) > 1e-2


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sampler": "heun"},
            "sampler is 'heun'; expected one of 'ddim', 'dpm\\+\\+2m', .*'euler-a', 'lcm', or a value",
        ),
        ({"sampler": masa.DDIM}, "sampler is <class"),
        ({"sampler": 3}, "sampler is 3"),
        (
            {"sampler": "dpm++2m", "eta": 0.5},
            r"eta is 0\.5, which is DDIM's, and the sampler is DPMSolverPP; leave it out",
        ),
        ({"sampler": "dpm++2m", "steps": 0}, "steps is 0"),
        ({"sampler": masa.DPMSolverPP(karras=True), "steps": 1000}, "steps is 1000"),
        ({"sampler": masa.DPMSolverPP(spacing="leading"), "steps": 999}, "steps is 999; expected at most 998"),
        ({"sampler": "lcm", "steps": 51}, "steps is 51; LCM has at most 50"),
        ({"sampler": "euler", "steps": 0}, "steps is 0"),
        ({"sampler": "euler-a", "eta": 1.0}, r"eta is 1\.0, which is DDIM's, and the sampler is Euler"),
    ],
)
def test_bad_settings_are_named(tiny, settings, message):
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, **settings)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (masa.DPMSolverPP, {"sde": 1}, "DPMSolverPP sde is 1; expected True or False"),
        (masa.DPMSolverPP, {"karras": "yes"}, "karras is 'yes'"),
        (masa.DPMSolverPP, {"spacing": "even"}, "spacing is 'even'; expected one of 'leading', 'trailing', 'linspace'"),
        (masa.DPMSolverPP, {"end": 0}, "end is 0; expected one of 'zero', 'sigma_min'"),
        (masa.UniPC, {"order": 4}, "UniPC order is 4; expected one of 1, 2, 3"),
        (masa.UniPC, {"order": True}, "UniPC order is True"),
        (masa.UniPC, {"end": "one"}, "UniPC end is 'one'"),
        (masa.Euler, {"ancestral": 1}, "Euler ancestral is 1; expected True or False"),
        (masa.Euler, {"spacing": ""}, "Euler spacing is ''; expected one of"),
    ],
)
def test_bad_fields_are_named(kind, fields, message):
    with pytest.raises(masa.MasaError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": masa.DPMSolverPP(karras=True)}, r"DPMSolverPP\(karras=True\) asks for noise levels of its own"),
        ({"sampler": masa.DPMSolverPP(spacing="trailing")}, "spacing='trailing'"),
        ({"sampler": masa.DPMSolverPP(end="zero")}, "end='zero'"),
        ({"sampler": "dpm++2m-sde", "pin_source": False}, "DPMSolverPP adds noise, .* pin it"),
        ({"sampler": "euler-a", "pin_source": False}, "Euler adds noise, .* pin it"),
        ({"sampler": masa.UniPC(spacing="leading", end="zero")}, r"UniPC\(spacing='leading', end='zero'\) asks for"),
        ({"sampler": masa.Euler(karras=True)}, r"Euler\(karras=True\) asks for noise levels of its own"),
        ({"sampler": "lcm"}, "LCM jumps between timesteps of its own, .* edit the picture with sampler='ddim'"),
        ({"sampler": "unipc", "method": "edit-friendly"}, "edit-friendly noise was made for DDIM's steps"),
        ({"sampler": "dpm++2m", "method": "edit-friendly"}, "edit-friendly noise was made for DDIM's steps"),
        ({"sampler": "dpm++2m", "eta": 1.0}, r"eta is 1\.0, which is DDIM's"),
    ],
)
def test_what_a_trajectory_does_not_allow_is_named_before_inverting(tiny, monkeypatch, settings, message):
    monkeypatch.setattr(masa.sampling, "invert", lambda *args, **kwargs: pytest.fail("inverted first"))
    with pytest.raises(masa.MasaError, match=message):
        masa.edit(tiny, torch.zeros(3, 64, 64), "a cat", controls=[], steps=4, **settings)


def test_a_trajectory_refuses_the_same(tiny, trajectory):
    for settings, message in (
        ({"sampler": masa.DPMSolverPP(karras=True)}, "asks for noise levels of its own"),
        ({"sampler": "dpm++2m-sde"}, "DPMSolverPP adds noise"),  # without targets a source is free
    ):
        with pytest.raises(masa.MasaError, match=message):
            masa.sample(tiny, trajectory=trajectory, **settings)
    ends = masa.DPMSolverPP(end="sigma_min")
    out = masa.sample(tiny, target="a cat", trajectory=trajectory, sampler=ends, controls=[], progress=False)
    plain = masa.sample(tiny, target="a cat", trajectory=trajectory, sampler="dpm++2m", controls=[], progress=False)
    assert torch.equal(out.latents, plain.latents)
    assert choose_sampler(ends) is ends
