"""sample() and edit() against the published loops, and the properties that every run keeps."""

from __future__ import annotations

import pytest
import torch
from published import Control, MutualAttention, Oracle

import masa

SOURCE, TARGET, OTHER = "a photo of a sitting cat", "a photo of a running cat", "a red cat in the snow"
STEPS = 7
# Float32 rounding, grown over a trajectory and by guidance: a fraction of the latents' standard deviation.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def oracle(tiny_folder, tiny):
    return Oracle(tiny_folder, tiny.tokenizer)


@pytest.fixture
def noise(generator):
    return torch.randn(1, 4, 8, 24, generator=generator)


def same(out: torch.Tensor, ref: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = (out - ref).abs().max() / ref.std()
    assert error < tolerance, f"error {error:.2e} of the latents' standard deviation"


def run(tiny, noise, targets=(TARGET,), **settings):
    defaults = {"source": SOURCE, "steps": STEPS, "height": 64, "width": 192, "progress": False}
    return masa.sample(tiny, target=targets, latents=noise, **(defaults | settings))


def masks():
    source, target = torch.zeros(40, 60), torch.zeros(33, 47)
    source[5:30, 10:50] = 1.0
    target[10:, 5:30] = 1.0
    return source, target


CASES = {
    "plain": (masa.MasaCtrl(4, 10), lambda: MutualAttention(range(4, STEPS), range(10, 16)), {}),
    "lists": (
        masa.MasaCtrl(steps=[1, 5, 6], layers=[0, 6, 9, 14]),
        lambda: MutualAttention([1, 5, 6], [0, 6, 9, 14]),
        {},
    ),
    "union": (
        masa.MasaCtrl(2, 8, union=True),
        lambda: MutualAttention(range(2, STEPS), range(8, 16), union=True),
        {},
    ),
    "given masks": (
        masa.MasaCtrl(2, 8, mask=masa.GivenMasks(*masks())),
        lambda: MutualAttention(range(2, STEPS), range(8, 16), masks=masks(), aspect=(1, 3)),
        {},
    ),
    "word masks": (
        masa.MasaCtrl(2, 10, mask=masa.WordMasks("cat", "cat", threshold=0.4)),
        lambda: MutualAttention(range(2, STEPS), range(10, 16), tokens=([6], [6]), threshold=0.4, aspect=(1, 3)),
        {},
    ),
    "word masks, early layer": (
        masa.MasaCtrl(2, 8, mask=masa.WordMasks([5, 6], [1], threshold=0.4)),
        lambda: MutualAttention(range(2, STEPS), range(8, 16), tokens=([5, 6], [1]), threshold=0.4, aspect=(1, 3)),
        {},
    ),
    "no guidance": (
        masa.MasaCtrl(4, 10),
        lambda: MutualAttention(range(4, STEPS), range(10, 16), halves=1),
        {"guidance_scale": 1.0},
    ),
    "negative prompt": (
        masa.MasaCtrl(4, 10),
        lambda: MutualAttention(range(4, STEPS), range(10, 16)),
        {"negative_prompt": "blurry"},
    ),
    "empty source": (masa.MasaCtrl(4, 10), lambda: MutualAttention(range(4, STEPS), range(10, 16)), {"source": ""}),
    "fixed seed": ([], Control, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_loop(tiny, oracle, noise, case):
    targets = (TARGET, "a photo of a jumping cat")
    controls, published, settings = CASES[case]
    out = run(tiny, noise, targets, controls=controls, **settings)
    prompts = [settings.get("source", SOURCE), *targets]
    reference = oracle.sample(
        prompts,
        noise.expand(len(prompts), -1, -1, -1),
        STEPS,
        settings.get("guidance_scale", 7.5),
        published(),
        negative=settings.get("negative_prompt", ""),
    )
    same(out.latents, reference[-1])


@pytest.mark.slow
def test_the_cases_differ_by_far_more_than_the_tolerance(tiny, noise):
    """Else equality with the published loop would say nothing."""
    controls = [CASES[name][0] for name in ("plain", "lists", "union", "given masks", "word masks", "fixed seed")]
    controls.append(masa.MasaCtrl(2, 8))
    latents = [run(tiny, noise, controls=control).latents[1] for control in controls]
    for i, one in enumerate(latents):
        for other in latents[:i]:
            assert (one - other).abs().max() / one.std() > 20 * TOLERANCE


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "free"])
@pytest.mark.parametrize("prompt", ["", SOURCE], ids=["empty prompt", "prompt"])
def test_editing_a_picture_equals_the_published_loop(tiny, oracle, generator, pinned, prompt):
    picture = torch.rand(3, 64, 192, generator=generator) * 2 - 1
    trajectory = masa.invert(tiny, picture, prompt, steps=STEPS, height=64, width=192, progress=False)
    way = oracle.invert(tiny.encode_image(picture, height=64, width=192), prompt, STEPS, 1.0)
    same(trajectory.latents, torch.cat(way))

    prompts = [prompt, TARGET, OTHER]
    reference = oracle.sample(
        prompts,
        way[-1].expand(3, -1, -1, -1),
        STEPS,
        7.5,
        MutualAttention(range(4, STEPS), range(10, 16)),
        pinned=way if pinned else None,
    )
    out = masa.sample(tiny, target=[TARGET, OTHER], trajectory=trajectory, pin_source=pinned, progress=False)
    same(out.latents, reference[-1])
    assert out.settings["controls"][0]["start_step"] == 4


def test_edit_is_invert_then_sample(tiny, generator):
    picture = torch.rand(3, 128, 128, generator=generator) * 2 - 1
    trajectory = masa.invert(tiny, picture, SOURCE, steps=5, progress=False)
    parts = masa.sample(tiny, target=TARGET, trajectory=trajectory, controls=masa.MasaCtrl(1), progress=False)
    whole = masa.edit(tiny, picture, TARGET, SOURCE, steps=5, controls=masa.MasaCtrl(1), progress=False)
    assert torch.equal(parts.latents, whole.latents)


def test_edit_inverts_and_samples_with_its_schedule_and_backend(tiny, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    settings = {"steps": 3, "controls": masa.MasaCtrl(1), "height": 64, "width": 64, "progress": False}
    schedule = masa.Schedule(masa.ScheduleConfig(beta_end=0.02), offset=0)
    out = masa.edit(tiny, picture, TARGET, schedule=schedule, backend="reference", **settings)
    for made_with in (out.settings, out.settings["trajectory"]):
        assert made_with["schedule"] == schedule.describe()
        assert made_with["backend"] == "reference"
    trajectory = masa.invert(tiny, picture, steps=3, height=64, width=64, schedule=schedule, progress=False)
    again = masa.sample(tiny, target=TARGET, trajectory=trajectory, controls=masa.MasaCtrl(1), progress=False)
    same(out.latents, again.latents)


@pytest.mark.parametrize("steps", [1, 7, 30, 999])
def test_timesteps_match_the_published_ones(tiny, oracle, steps):
    assert list(tiny.schedule.timesteps(steps)) == oracle.timesteps(steps)


# ---------------------------------------------------------------------------------------- exact savings


class Rows:
    """Counts the rows of every UNet call, as a user's hook would."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.counts: list[int] = []
        self.handle = unet.register_forward_pre_hook(lambda module, args: self.counts.append(len(args[2])))

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()


@pytest.mark.slow
def test_one_edit_costs_196_rows(tiny, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    with Rows(tiny.unet) as rows:
        masa.edit(tiny, picture, TARGET, height=64, width=64, progress=False)
    assert rows.counts == [1] * 50 + [2] * 4 + [3] * 46  # 196; the published flow runs 400
    with Rows(tiny.unet) as rows:
        masa.edit(tiny, picture, TARGET, height=64, width=64, pin_source=False, progress=False)
    assert sum(rows.counts) == 200


def test_without_control_a_pinned_source_is_computed_once(tiny, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    with Rows(tiny.unet) as rows:
        masa.edit(tiny, picture, TARGET, steps=5, controls=[], height=64, width=64, progress=False)
    assert rows.counts == [1] * 5 + [2] * 4 + [3]


@pytest.mark.parametrize("layers", [[2, 3], [6], [10, 12]])
def test_leaving_rows_out_changes_nothing(tiny, oracle, generator, layers):
    """Layer and step lists end early, so that the source retires early and returns for the last step."""
    picture = torch.rand(3, 64, 128, generator=generator) * 2 - 1
    trajectory = masa.invert(tiny, picture, SOURCE, steps=6, height=64, width=128, progress=False)
    out = masa.sample(
        tiny, target=TARGET, trajectory=trajectory, controls=masa.MasaCtrl(steps=[1, 3], layers=layers), progress=False
    )
    way = [z[None] for z in trajectory.latents]
    reference = oracle.sample(
        [SOURCE, TARGET], way[-1].expand(2, -1, -1, -1), 6, 7.5, MutualAttention([1, 3], layers), pinned=way
    )
    same(out.latents, reference[-1])


# ------------------------------------------------------------------------------------------- properties


def test_source_is_unchanged_by_control(tiny, noise):
    plain = run(tiny, noise, controls=[])
    controlled = run(tiny, noise, controls=masa.MasaCtrl(0, 0))
    same(controlled.latents[0], plain.latents[0], 1e-4)
    assert (controlled.latents[1] - plain.latents[1]).abs().max() > 0.01


def test_targets_together_equal_targets_alone(tiny, noise):
    controls = masa.MasaCtrl(2, 8, mask=masa.WordMasks("cat", "cat", threshold=0.4))
    together = run(tiny, noise, (TARGET, OTHER), controls=controls)
    for i, prompt in enumerate((TARGET, OTHER)):
        alone = run(tiny, noise, (prompt,), controls=controls)
        same(together.latents[1 + i], alone.latents[1], 1e-4)


def test_a_control_used_twice_gives_the_same(tiny, noise):
    control = masa.MasaCtrl(2, 6, mask=masa.WordMasks("cat", "cat"))
    assert torch.equal(run(tiny, noise, controls=control).latents, run(tiny, noise, controls=control).latents)


def test_union_with_a_great_source_weight_is_the_plain_control(tiny, noise):
    plain = run(tiny, noise, controls=masa.MasaCtrl(2, 10))
    union = run(tiny, noise, controls=masa.MasaCtrl(2, 10, union=True, source_weight=1e9))
    same(union.latents, plain.latents, 1e-3)


def test_seed_decides_the_noise(tiny):
    def latents(**start):
        return masa.sample(tiny, SOURCE, steps=2, height=64, width=64, progress=False, **start).latents

    assert torch.equal(latents(seed=3), latents(seed=3))
    assert not torch.equal(latents(seed=3), latents(seed=4))
    assert torch.equal(latents(seed=3), latents(generator=torch.Generator().manual_seed(3)))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(latents(seed=3), latents(latents=noise))
    seeded = masa.sample(tiny, SOURCE, steps=2, height=64, width=64, progress=False)
    assert torch.equal(seeded.latents, latents(seed=seeded.settings["seed"]))


def test_latents_may_differ_by_branch(tiny, generator):
    noise = torch.randn(2, 4, 8, 24, generator=generator)
    out = run(tiny, noise, controls=[])
    same(out.latents[1:], run(tiny, noise[1:], source=TARGET, targets=()).latents, 1e-4)


def test_eta_adds_noise_that_the_seed_decides(tiny, noise):
    plain = run(tiny, noise)
    noisy = run(tiny, noise, eta=1.0, seed=1)
    assert torch.equal(noisy.latents, run(tiny, noise, eta=1.0, seed=1).latents)
    assert not torch.equal(noisy.latents, run(tiny, noise, eta=1.0, seed=2).latents)
    assert not torch.equal(noisy.latents, plain.latents)


@torch.no_grad()
def test_eta_equals_diffusers(tiny, oracle, noise):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(5)
    x = noise
    oracle.hook(Control())
    for t in scheduler.timesteps:
        e = oracle.eps(x, int(t), [SOURCE], 7.5)
        fresh = torch.randn(x.shape, generator=generator)
        x = scheduler.step(e, t, x, eta=0.6, variance_noise=fresh).prev_sample
    same(run(tiny, noise, (), eta=0.6, seed=5).latents, x)


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance_scale", 3.0), ("negative_prompt", "dog"), ("steps", 9), ("schedule", masa.Schedule(offset=0))],
)
def test_settings_change_the_result(tiny, noise, name, value):
    assert not torch.equal(run(tiny, noise).latents, run(tiny, noise, **{name: value}).latents)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_backends_agree(tiny, noise, backend):
    control = masa.MasaCtrl(2, 8, mask=masa.GivenMasks(*masks()))
    same(run(tiny, noise, controls=control, backend=backend).latents, run(tiny, noise, controls=control).latents)


def test_callback_sees_and_may_change_latents(tiny, noise):
    seen = []
    out = run(tiny, noise, callback=lambda step, timestep, x: seen.append((step, timestep, x.clone())))
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [timestep for _, timestep, _ in seen] == list(tiny.schedule.timesteps(STEPS))
    assert torch.equal(seen[-1][2], out.latents)
    zeroed = run(tiny, noise, callback=lambda step, timestep, x: x * 0 if step == STEPS - 1 else None)
    assert zeroed.latents.abs().max() == 0


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 100}, "height is 100; expected a multiple of 64"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1000}, "steps is 1000"),
        ({"controls": masa.MasaCtrl(start_step=STEPS)}, "selects no step"),
        ({"controls": masa.MasaCtrl(layers=[16])}, "transformer blocks from 0 to 15"),
        ({"controls": masa.MasaCtrl(mask=masa.WordMasks("dog", "cat"))}, "'dog' is not in the prompt"),
        ({"controls": masa.MasaCtrl(layers=[1], mask=masa.WordMasks("cat", "cat"))}, "WordMasks needs"),
        ({"controls": [masa.MasaCtrl(), masa.MasaCtrl(2)]}, "two controls both set k_from"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator"),
        ({"eta": -1.0}, r"eta is -1\.0"),
        ({"eta": 1.5}, r"eta is 1\.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5'"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"controls": None}, "controls hold None"),
        ({"controls": masa.MasaCtrl}, "controls hold <class"),
        ({"targets": (3,)}, "a target is 3"),
        ({"backend": "triton"}, "backend 'triton' cannot serve"),
        ({"callback": lambda step, timestep, x: 3}, "the callback returned int"),
        ({"callback": lambda step, timestep, x: x[:1]}, r"the callback returned \(1, 4, 8, 24\); .* \(2, 4, 8, 24\)"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_settings_are_named(tiny, noise, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tiny, noise, **settings)


def test_latents_of_another_size_are_refused(tiny):
    with pytest.raises(masa.MasaError, match=r"latents are \(1, 4, 8, 8\); expected \(1, 4, 8, 24\)"):
        run(tiny, torch.zeros(1, 4, 8, 8))


def test_latents_that_are_no_numbers_are_refused(tiny):
    with pytest.raises(masa.MasaError, match="latents hold NaN"):
        run(tiny, torch.full((1, 4, 8, 24), torch.nan))


def test_results_that_are_no_numbers_are_refused(tiny, noise):
    def spoil_one(step: int, timestep: int, x: torch.Tensor) -> None:
        if step == STEPS - 1:
            x[1, 2, 3, 4] = torch.nan

    for callback in (lambda step, timestep, x: x * torch.inf, spoil_one):
        with pytest.raises(masa.MasaError, match="became NaN or infinite"):
            run(tiny, noise, callback=callback)


def test_whole_numbers_may_be_latents(tiny, noise):
    whole = (noise * 2).round()
    out = run(tiny, whole.to(torch.int64), controls=[])
    assert out.latents.dtype == torch.float32
    assert torch.equal(out.latents, run(tiny, whole, controls=[]).latents)
    untouched = run(tiny, whole.to(torch.int64), controls=[], skip_steps=STEPS).latents
    assert untouched.dtype == torch.float32
    assert torch.equal(untouched[:1], whole)


def test_arguments_that_contradict_the_trajectory_are_refused(tiny, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    trajectory = masa.invert(tiny, picture, steps=4, height=64, width=64, progress=False)
    for name, value in (("steps", 5), ("height", 128), ("schedule", masa.Schedule(offset=0))):
        with pytest.raises(masa.MasaError, match="the trajectory was made with"):
            masa.sample(tiny, target=TARGET, trajectory=trajectory, **{name: value})
    with pytest.raises(masa.MasaError, match="leave one out"):
        masa.sample(tiny, target=TARGET, trajectory=trajectory, latents=torch.zeros(1, 4, 8, 8))


def test_edit_refuses_before_inverting(tiny, generator, monkeypatch):
    monkeypatch.setattr(masa.sampling, "invert", lambda *args, **kwargs: pytest.fail("inverted first"))
    picture = torch.rand(3, 64, 64, generator=generator)
    with pytest.raises(masa.MasaError, match="is not in the prompt"):
        masa.edit(tiny, picture, TARGET, SOURCE, controls=masa.MasaCtrl(mask=masa.WordMasks("dog", "cat")))
    with pytest.raises(masa.MasaError, match="skip_steps is 60; expected a number from 0 to 50"):
        masa.edit(tiny, picture, TARGET, skip_steps=60)
    with pytest.raises(masa.MasaError, match="selects no step of a run of 5; expected numbers from 1 to 4"):
        masa.edit(tiny, picture, TARGET, steps=5, method="edit-friendly", controls=masa.MasaCtrl(steps=[0]))


def test_arguments_that_agree_with_the_trajectory_are_taken(tiny, generator):
    picture = torch.rand(3, 64, 128, generator=generator) * 2 - 1
    schedule = masa.Schedule(offset=0)
    settings = {"steps": 3, "height": 64, "width": 128, "schedule": schedule, "progress": False}
    trajectory = masa.invert(tiny, picture, SOURCE, **settings)
    use = {"target": TARGET, "trajectory": trajectory, "controls": masa.MasaCtrl(1)}
    plain = masa.sample(tiny, progress=False, **use)
    assert torch.equal(masa.sample(tiny, source=SOURCE, **use, **settings).latents, plain.latents)


def test_a_source_alone_denoises_freely(tiny, generator):
    """There is nobody to read it: what is asked for is what the model makes of the noise."""
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    trajectory = masa.invert(tiny, picture, SOURCE, steps=3, height=64, width=64, progress=False)
    alone = masa.sample(tiny, trajectory=trajectory, progress=False)
    free = masa.sample(tiny, target=TARGET, trajectory=trajectory, controls=[], pin_source=False, progress=False)
    same(alone.latents, free.latents[:1], 1e-4)
    assert (alone.latents[0] - trajectory.latents[0]).abs().max() > 0.01


def test_an_unguided_inversion_costs_one_row_a_step(tiny, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    for guidance_scale, expected in ((1.0, [1, 1]), (2.0, [2, 2])):
        with Rows(tiny.unet) as rows:
            masa.invert(
                tiny, picture, SOURCE, steps=2, guidance_scale=guidance_scale, height=64, width=64, progress=False
            )
        assert rows.counts == expected


AT_ODDS = [masa.StyleTransfer(steps=[3], layers=[12]), masa.MasaCtrl(2, 10)]


def test_controls_at_odds_in_a_late_step_are_refused_before_the_first(tiny, noise, generator, monkeypatch):
    for name in ("invert", "denoise"):
        monkeypatch.setattr(masa.sampling, name, lambda *args, **kwargs: pytest.fail("ran first"))
    message = r"both set k_from at .* \(layer 12\) in step 3: StyleTransfer and MasaCtrl"
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, noise, controls=AT_ODDS)
    with pytest.raises(masa.MasaError, match=message):
        masa.edit(tiny, torch.rand(3, 64, 64, generator=generator), TARGET, controls=AT_ODDS, steps=5)


def test_controls_may_be_at_odds_in_steps_that_are_left_out(tiny, generator):
    picture = torch.rand(3, 64, 64, generator=generator) * 2 - 1
    settings = {"steps": 5, "height": 64, "width": 64, "progress": False}
    edit = masa.PromptToPrompt("refine", cross_replace_steps=1.0, self_replace_steps=0.4)
    controls = [edit, masa.MasaCtrl(1, 10)]
    with pytest.raises(masa.MasaError, match="in step 1: PromptToPrompt and MasaCtrl"):
        masa.edit(tiny, picture, TARGET, SOURCE, controls=controls, **settings)
    out = masa.edit(tiny, picture, TARGET, SOURCE, controls=controls, skip_steps=2, **settings)
    assert out.settings["skip_steps"] == 2


def test_what_controls_set_may_depend_on_the_pictures_size(tiny, generator, monkeypatch):
    """Where the picture is wide, layer 10 has more tokens than Prompt-to-Prompt's self-attention reaches."""
    monkeypatch.setattr(masa.sampling, "invert", lambda *args, **kwargs: pytest.fail("not refused"))
    edit = masa.PromptToPrompt("refine", self_replace_steps=0.8, self_replace_tokens=8 * 8)
    settings = {"controls": [edit, masa.MasaCtrl(1, layers=[10])], "steps": 4}
    with pytest.raises(masa.MasaError, match="PromptToPrompt and MasaCtrl"):
        masa.edit(tiny, torch.rand(3, 128, 128, generator=generator), TARGET, SOURCE, **settings)
    with pytest.raises(pytest.fail.Exception, match="not refused"):
        masa.edit(tiny, torch.rand(3, 128, 256, generator=generator), TARGET, SOURCE, **settings)
