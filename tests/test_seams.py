"""Every seam of `masa.edits` in whole runs: StyleAligned from examples/, residuals, joints, extra keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from example_files import example
from published import Oracle
from published_sharing import StyleAligned as PublishedStyleAligned
from published_sharing import shared_norms

import masa
from masa.controls import ActiveControl, Edit, ExtraKeys, Mix, Part, Residuals
from masa.models.batch_rows import Retirement

SOURCE, TARGETS = "a photo of a sitting cat", ["a photo of a running cat", "a red cat in the snow"]
STEPS = 3
# Float32 rounding, grown over a trajectory and by guidance: a fraction of the latents' standard deviation.
TOLERANCE = 5e-4


StyleAligned = example("style_aligned").StyleAligned


def same(out: torch.Tensor, ref: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = (out - ref).abs().max() / ref.std()
    assert error < tolerance, f"error {error:.2e} of the latents' standard deviation"


def differs(out: torch.Tensor, ref: torch.Tensor, least: float = 20 * TOLERANCE) -> None:
    assert (out - ref).abs().max() / ref.std() > least


# ------------------------------------------------------------------------------------------------- controls to try


@dataclass(frozen=True)
class AddResiduals:
    """Adds the latents, enlarged in channels, at every place that takes residuals; sees the step and the prompt."""

    needs_targets: ClassVar[bool] = False
    scale: float = 0.5
    places: tuple[str, ...] = ("down", "skips", "mid")
    branch: int | None = None

    def begin(self, run):
        active = _AddResiduals(self)
        active.source_condition = f"AddResiduals({self.scale})" if self.branch is None else None
        return active


class _AddResiduals(ActiveControl):
    name = "AddResiduals"

    def __init__(self, control):
        self.control = control

    def residuals(self, step, timestep, x, context, branches):
        scale = torch.tensor([self.control.branch in (None, row.branch) for row in branches.rows]).float()
        signal = x.mean(1, keepdim=True) + context.mean((1, 2))[:, None, None, None] + timestep / 1000 + step
        signal = self.control.scale * scale[:, None, None, None] * signal

        def at(channels, downsample):
            return torch.nn.functional.avg_pool2d(signal, downsample).expand(-1, channels, -1, -1)

        down, skips, mid = residual_shapes()
        return Residuals(
            tuple(at(*shape) for shape in down) if "down" in self.control.places else (),
            tuple(at(*shape) for shape in skips) if "skips" in self.control.places else (),
            at(*mid) if "mid" in self.control.places else None,
        )


def residual_shapes():
    """(channels, downsample) of the levels' ends, the skips and the middle of the tiny UNet."""
    widths = (32, 64, 64, 64)
    down = [(width, 2**level) for level, width in enumerate(widths)]
    skips = [(32, 1)]
    for level, width in enumerate(widths):
        skips += [(width, 2**level)] * 2
        if level < 3:
            skips.append((width, 2 ** (level + 1)))
    return down, skips, (64, 8)


@masa.register
@dataclass(frozen=True)
class ImagePrompt:
    """Extra keys at every cross-attention of the targets, as the IP-Adapter has them."""

    scale: float = 1.0
    seed: int = 0
    on_source: bool = False

    def begin(self, run):
        generator = torch.Generator().manual_seed(self.seed)
        extra = {}
        for site in run.sites:
            if site.kind == "cross":
                shape = (1, site.heads, 4, site.width // site.heads)
                extra[site.index] = torch.randn(2, *shape, generator=generator).to(run.device, run.dtype).unbind()
        return _ImagePrompt(extra, self.scale, self.on_source)


class _ImagePrompt(ActiveControl):
    name = "ImagePrompt"

    def __init__(self, extra, scale, on_source):
        self.extra, self.scale, self.on_source = extra, scale, on_source

    def edits(self, step, branches):
        reads = [(row.branch != 0 or self.on_source) and "cond" in row.halves for row in branches.rows]
        rows = tuple(0 if read else -1 for read in reads)
        return {site: Edit(extra=(ExtraKeys(k, v, rows, self.scale),)) for site, (k, v) in self.extra.items()}


@masa.register
@dataclass(frozen=True)
class Several:
    """Own keys beside some of the source's, by region and weight; contrast, a plain share, blended queries."""

    contrast: float = 1.0
    plain: float = 0.0
    blend: float = 0.0
    source_contrast: float = 1.0

    def begin(self, run):
        return _Several(self, [s.index for s in run.sites if s.kind == "self" and s.layer >= 8])


class _Several(ActiveControl):
    name = "Several"

    def __init__(self, control, sites):
        self.control, self.sites = control, sites

    def edits(self, step, branches):
        own = tuple(range(len(branches)))
        source = branches.source_rows
        others = tuple(-1 if read == row else read for row, read in enumerate(source))

        def left(tape, grid):
            visible = torch.zeros(grid, dtype=torch.bool)
            visible[:, : grid[1] // 2] = True
            return visible.flatten().expand(len(branches), -1)

        is_target = [row.branch != 0 for row in branches.rows]
        edit = Edit(
            parts=(Part(own), Part(others, weight=2.0, keys=left)),
            contrast=tuple(self.control.contrast if target else self.control.source_contrast for target in is_target),
            plain=tuple(self.control.plain if target else 0.0 for target in is_target),
            q_blend=(source, self.control.blend),
        )
        return dict.fromkeys(self.sites, edit)


@dataclass(frozen=True)
class MovesTheSource:
    """Changes the source's latents, before the first step or after each."""

    when: str

    def begin(self, run):
        return _MovesTheSource(self.when)


class _MovesTheSource(ActiveControl):
    name = "MovesTheSource"

    def __init__(self, when):
        self.when = when

    def start(self, latents):
        return latents * 1.01 if self.when == "start" else latents

    def after_step(self, step, latents, tape, branches):
        return latents * 1.01 if self.when == "after_step" else latents


CONTROLS = {
    "style aligned": StyleAligned(score_shift=0.5, score_scale=0.9),
    "residuals": AddResiduals(),
    "residuals of targets": [masa.MasaCtrl(1, 8), AddResiduals(branch=1)],
    "joints": masa.FreeU(),
    "extra keys": [masa.MasaCtrl(1, 8), ImagePrompt()],
    "several parts": Several(contrast=1.3, plain=0.3, blend=0.2),
}
USUAL = {"steps": STEPS, "height": 128, "width": 192, "progress": False}


def run(sd, controls, targets=TARGETS, **settings):
    start = {} if {"latents", "trajectory", "cache"} & {*settings} else {"seed": 3}
    return masa.sample(sd, SOURCE, targets, controls=controls, **(USUAL | start | settings))


@pytest.fixture(scope="module")
def plain(tiny):
    """Whole runs, by control and guidance."""
    return {
        (name, scale): run(tiny, controls, guidance_scale=scale).latents
        for name, controls in CONTROLS.items()
        for scale in (1.0, 5.0)
    }


@pytest.fixture(scope="module")
def trajectory(tiny):
    image = torch.rand(3, 128, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return masa.invert(tiny, image, SOURCE, steps=STEPS, progress=False)


# ------------------------------------------------------------------------------------------------------- StyleAligned


@pytest.mark.parametrize(
    ("control", "published", "norms", "guidance"),
    [
        (StyleAligned(), PublishedStyleAligned(), True, 5.0),
        (StyleAligned(share_norms=False), PublishedStyleAligned(), False, 5.0),
        (StyleAligned(0.7, 0.5), PublishedStyleAligned(0.7, 0.5), True, 5.0),
        (StyleAligned(), PublishedStyleAligned(halves=1), True, 1.0),
    ],
    ids=["published", "attention alone", "shift and scale", "no guidance"],
)
def test_style_aligned_equals_the_published_handler(tiny, tiny_folder, generator, control, published, norms, guidance):
    oracle = Oracle(tiny_folder, tiny.tokenizer)
    noise = torch.randn(3, 4, 16, 24, generator=generator)
    out = run(tiny, control, latents=noise, guidance_scale=guidance).latents
    with shared_norms(oracle.unet, 2 if guidance > 1 else 1) if norms else torch.no_grad():
        ref = oracle.sample([SOURCE, *TARGETS], noise, STEPS, guidance, published)[-1]
    same(out, ref)
    differs(out, run(tiny, [], latents=noise, guidance_scale=guidance).latents)


@pytest.mark.slow
def test_the_style_is_the_picture_without_control(tiny, plain):
    same(plain["style aligned", 5.0][:1], run(tiny, [], guidance_scale=5.0).latents[:1], 1e-5)


@pytest.mark.slow
def test_every_setting_of_style_aligned_matters(tiny, plain):
    for control in (StyleAligned(0.0, 0.9), StyleAligned(0.5), StyleAligned(0.5, 0.9, share_norms=False)):
        differs(run(tiny, control, guidance_scale=5.0).latents[1:], plain["style aligned", 5.0][1:])


# --------------------------------------------------------------------------------------------------------- every seam


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_it_changes_the_result(tiny, plain, name, guidance):
    baseline = [masa.MasaCtrl(1, 8)] if isinstance(CONTROLS[name], list) else []
    differs(plain[name, guidance][1], run(tiny, baseline, guidance_scale=guidance).latents[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_targets_together_equal_targets_alone(tiny, plain, name, guidance):
    several = plain[name, guidance]
    same(run(tiny, CONTROLS[name], guidance_scale=guidance, targets_at_once=1).latents, several)
    same(run(tiny, CONTROLS[name], TARGETS[:1], guidance_scale=guidance).latents, several[:2])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_a_pinned_source_serves(tiny, trajectory, name):
    """Its rows leave where nobody reads them; a free source, which stays, gives targets no others."""
    pinned = run(tiny, CONTROLS[name], trajectory=trajectory, guidance_scale=5.0)
    chunked = run(tiny, CONTROLS[name], trajectory=trajectory, guidance_scale=5.0, targets_at_once=1)
    same(chunked.latents, pinned.latents)
    seen = []

    def put_back(step, timestep, latents):
        seen.append(step)
        latents = latents.clone()
        latents[0] = trajectory.latents[STEPS - step - 1]
        return latents

    free = run(tiny, CONTROLS[name], trajectory=trajectory, guidance_scale=5.0, pin_source=False, callback=put_back)
    same(free.latents[1:], pinned.latents[1:])


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_recorded_source_serves(tiny, plain, name, guidance):
    """Recorded with the controls of the run: what they read of it is kept, what they do to it is done."""
    settings = {"guidance_scale": guidance, "seed": 3, **USUAL}
    cache = masa.record(tiny, SOURCE, controls=CONTROLS[name], **settings)
    out = masa.sample(tiny, target=TARGETS, controls=CONTROLS[name], cache=cache, progress=False)
    same(out.latents, plain[name, guidance])


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (masa.FreeU(), "FreeU changes what the source is"),
        (AddResiduals(), "AddResiduals changes what the source is"),
        (Several(source_contrast=1.5), "Several changes what the source is"),
        (ImagePrompt(on_source=True), "ImagePrompt changes what the source is"),
        (MovesTheSource("start"), "MovesTheSource changes the source's start"),
        (MovesTheSource("after_step"), "MovesTheSource changes the source's latents"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_would_change_a_recorded_source_is_refused(tiny, recorded, control, message):
    with pytest.raises(masa.MasaError, match=message):
        masa.sample(tiny, target=TARGETS, controls=[masa.MasaCtrl(1, 8), control], cache=recorded, progress=False)


@pytest.fixture(scope="module")
def recorded(tiny):
    return masa.record(tiny, SOURCE, controls=masa.MasaCtrl(1, 8), seed=3, **USUAL)


@pytest.mark.parametrize("name", CONTROLS)
def test_recorders_stand_beside(tiny, plain, name):
    controls = CONTROLS[name] if isinstance(CONTROLS[name], list) else [CONTROLS[name]]
    out = run(tiny, [*controls, masa.RecordAttention(), masa.RecordQueries()], guidance_scale=5.0)
    same(out.latents, plain[name, 5.0])
    assert out.attention[len(controls)][""].shape == (3, 77, 4, 6)


# ----------------------------------------------------------------------------------------------------------- residuals


def test_residuals_enter_where_diffusers_lets_them_in(tiny, tiny_folder, generator):
    """The down path at the ends of levels, the skips alone, the middle: one forward each, to 1e-4 of the largest."""
    oracle = Oracle(tiny_folder, tiny.tokenizer).unet
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 32, generator=generator)
    down, skips, mid = residual_shapes()

    def draw(shape):
        return torch.randn(2, shape[0], 16 // shape[1], 16 // shape[1], generator=generator)

    adapter, control, middle = [draw(shape) for shape in down], [draw(shape) for shape in skips], draw(mid)
    for given, theirs in (
        (Residuals(down=tuple(adapter)), {"down_intrablock_additional_residuals": [t.clone() for t in adapter]}),
        (
            Residuals(skips=tuple(control), mid=middle),
            {"down_block_additional_residuals": tuple(control), "mid_block_additional_residual": middle},
        ),
    ):
        with torch.no_grad():
            out, _ = tiny.unet(x, 300, context, residuals=given)
            ref = oracle(x, 300, context, **theirs).sample
        assert (out - ref).abs().max() / ref.abs().max() < 1e-4
        assert (out - tiny.unet(x, 300, context)[0]).abs().max() > 0.1


def test_residuals_follow_rows_that_share_work_and_that_leave(tiny, generator):
    x, context = torch.randn(2, 4, 16, 24, generator=generator), torch.randn(4, 77, 32, generator=generator)
    down, skips, mid = residual_shapes()

    def draw(shape):
        return torch.randn(4, shape[0], 16 // shape[1], 24 // shape[1], generator=generator)

    added = Residuals(tuple(map(draw, down)), tuple(map(draw, skips)), draw(mid))
    whole, _ = tiny.unet(x[[0, 1, 0, 1]], 300, context, residuals=added)
    shared, _ = tiny.unet(x, 300, context, copies=(0, 1, 0, 1), residuals=added)
    assert (shared - whole).abs().max() < 1e-4
    for layer in (2, 6, 9):
        left, _ = tiny.unet(x, 300, context, copies=(0, 1, 0, 1), retire=Retirement(layer, (1, 3)), residuals=added)
        assert (left - whole[[1, 3]]).abs().max() < 1e-4


@pytest.mark.slow
def test_residuals_of_several_controls_add_up(tiny):
    both = run(tiny, [AddResiduals(0.2, ("down",)), AddResiduals(0.3, ("skips", "mid"))]).latents
    at_once = run(tiny, [AddResiduals(0.2, ("down",)), AddResiduals(0.3, ("skips",)), AddResiduals(0.3, ("mid",))])
    same(at_once.latents, both)
    for place, scale in (("down", 0.3), ("skips", 0.3), ("mid", 30.0)):  # the middle's weighs little in this network
        differs(run(tiny, AddResiduals(scale, (place,))).latents, run(tiny, []).latents)
    assert torch.equal(run(tiny, AddResiduals(0.0)).latents, run(tiny, []).latents)


# --------------------------------------------------------------------------------------------------------------- joints


def test_free_u_equals_diffusers(tiny, tiny_folder, generator):
    oracle = Oracle(tiny_folder, tiny.tokenizer)
    oracle.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    # Their factors are chosen by the channels of SD's two deepest levels, 1280 and 640; these are the levels here.
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 32, generator=generator)
    from diffusers.utils.torch_utils import fourier_filter

    from masa.controls.freeu import scale_low_frequencies

    assert torch.allclose(fourier_filter(x, 1, 0.2), scale_low_frequencies(x, 0.2), atol=1e-6)
    with torch.no_grad():
        ref = oracle.unet(x, 300, context).sample
    active = masa.FreeU().begin(describe(tiny))
    out, _ = tiny.unet(x, 300, context, dict(active.edits(0, None)))
    assert (out - ref).abs().max() / ref.abs().max() < 1e-4


def describe(sd):
    from masa.checks import describe_run
    from masa.samplers.base import Levels

    return describe_run(sd, Levels.of_schedule(sd.schedule, STEPS), (SOURCE, *TARGETS), (16, 16))


def test_every_factor_of_free_u_matters(tiny):
    usual = run(tiny, masa.FreeU(), []).latents
    for control in (masa.FreeU((1.0, 1.6)), masa.FreeU((1.5, 1.0)), masa.FreeU(skip=(1.0, 0.2))):
        differs(run(tiny, control, []).latents, usual, 1e-3)
    same(run(tiny, masa.FreeU((1.0, 1.0), (1.0, 1.0)), []).latents, run(tiny, [], []).latents)
    with pytest.raises(masa.MasaError, match=r"FreeU skip is \(1.0,\); expected two numbers"):
        masa.FreeU(skip=(1.0,))


# ----------------------------------------------------------------------------------------------------- several parts


@pytest.mark.slow
def test_every_field_of_an_edit_matters(tiny, plain):
    usual = plain["several parts", 5.0]
    whole = Several(1.3, 0.3, 0.2)
    for control in (replace(whole, contrast=1.0), replace(whole, plain=0.0), replace(whole, blend=0.0)):
        differs(run(tiny, control, guidance_scale=5.0).latents[1:], usual[1:], 1e-3)
    same(run(tiny, Several(plain=1.0), guidance_scale=5.0).latents, run(tiny, [], guidance_scale=5.0).latents)


@pytest.mark.slow
def test_an_extra_scale_of_zero_is_none(tiny):
    same(run(tiny, ImagePrompt(0.0)).latents, run(tiny, []).latents, 1e-5)
    differs(run(tiny, ImagePrompt(0.5)).latents[1:], run(tiny, ImagePrompt(1.0)).latents[1:])
    same(run(tiny, ImagePrompt()).latents[:1], run(tiny, []).latents[:1], 1e-5)


def test_two_controls_that_say_what_is_read_are_refused(tiny):
    for other in (masa.MasaCtrl(0, 0), masa.MasaCtrl(0, 0, union=True)):
        with pytest.raises(masa.MasaError, match="two controls both set"):
            run(tiny, [StyleAligned(), other])


@dataclass(frozen=True)
class At:
    """Puts one edit at one site."""

    site: int
    edit: Edit

    def begin(self, run):
        active = ActiveControl()
        active.name, active.edits = "At", lambda step, branches: {self.site: self.edit}
        return active


@pytest.mark.parametrize(
    ("site", "edit", "message"),
    [
        (32, Edit(joint=lambda x, skip: (x, skip)), "sets joint at down_blocks.0.resnets.0, a site of kind 'res'"),
        (54, Edit(features_from=(0, 0, 2, 2)), "sets features_from at .*norm1, a site of kind 'norm'"),
        (120, Edit(norm_with=(0, 0, 2, 2)), r"sets norm_with at up_blocks\..*skip, a site of kind 'skip'"),
        (0, Edit(norm_with=(0, 0, 2, 2)), "sets norm_with at .*attn1, a site of kind 'self'"),
        (54, Edit(q_from=(0, 0, 2, 2)), "sets q_from at"),
        (127, Edit(), "the network has sites 0 to 126"),
        (0, Edit(mix=Mix((1,), (0,), torch.eye(77)[None])), "sets mix at .*attn1, a site of kind 'self'"),
        (1, Edit(k_from=(0, 0, 2, 2), v_from=(0, 0, 2, 2), mask=lambda tape, grid: None), "sets mask at .*attn2"),
    ],
)
def test_an_edit_that_its_site_cannot_carry_out_is_refused(tiny, site, edit, message):
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, At(site, edit), TARGETS[:1])


ROWS = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(k_from=[0, 0, 2, 2]), r"At, in step 0: k_from is \[0, 0, 2, 2\]; expected a tuple of 4 rows from 0 to 3"),
        (Edit(k_from=(0, 0, 2)), "k_from is .*; expected a tuple of 4 rows"),
        (Edit(q_from=(0, 0, 2, 4)), "q_from is .*; expected a tuple of 4 rows from 0 to 3"),
        (Edit(v_from=(0, -1, 2, 2)), "v_from is .* from 0 to 3"),
        (Edit(q_match=(-2, 0, 2, 2)), "q_match is .* from -1 to 3"),
        (Edit(q_blend=((0, 0), 0.5)), "q_blend's rows is"),
        (Edit(plain=0.5), "plain is 0.5; expected a tuple of 4 numbers"),
        (Edit(plain=(0.5,)), "plain is"),
        (Edit(contrast=(1.0, 2.0)), "contrast is .*; expected a number or a tuple of 4 numbers"),
        (Edit(parts=(Part(ROWS, weight=0.0),)), r"parts\[0\].weight is 0.0; expected a number or a tuple"),
        (Edit(parts=(Part(ROWS), Part((0, 0)))), r"parts\[1\].rows is \(0, 0\)"),
        (Edit(parts=(Part(ROWS, scale=(1.0,)),)), r"parts\[0\].scale is"),
        (Edit(parts=(Part(ROWS, match=(0, 0, 9, 2)),)), r"parts\[0\].match is"),
        (
            Edit(extra=(ExtraKeys(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), (0, 0, 0, 1)),)),
            r"extra\[0\].rows is",
        ),
    ],
)
def test_an_edit_that_does_not_fit_the_batch_names_its_control(tiny, monkeypatch, edit, message):
    monkeypatch.setattr(tiny.unet, "forward", lambda *args, **kwargs: pytest.fail("ran first"))
    with pytest.raises(masa.MasaError, match=message):
        run(tiny, At(0, edit), TARGETS[:1])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("begin", r"Gives.begin gave None; expected an ActiveControl"),
        ("edits", "Gives gave None as its edits"),
        ("start", r"Gives starts from NoneType; expected latents \(2, 4, 16, 24\)"),
        ("after_step", r"Gives gave NoneType after a step; expected latents \(2, 4, 16, 24\)"),
    ],
)
def test_a_control_that_gives_nothing_is_named(tiny, method, message):
    class Gives:
        def begin(self, run):
            active = ActiveControl()
            active.name = "Gives"
            if method != "begin":
                setattr(active, method, lambda *given: None)
            return None if method == "begin" else active

    with pytest.raises(masa.MasaError, match=message):
        run(tiny, Gives(), TARGETS[:1])


def test_a_control_that_starts_late_needs_latents_of_that_step(tiny, generator):
    class Late:
        def begin(self, run):
            active = ActiveControl()
            active.name, active.first_step = "Late", 1
            return active

    with pytest.raises(masa.MasaError, match="Late starts at step 1, from half noisy latents; give a trajectory"):
        run(tiny, Late(), TARGETS[:1])
    latents = torch.randn(1, 4, 16, 24, generator=generator)
    assert run(tiny, Late(), TARGETS[:1], latents=latents).settings["skip_steps"] == 1


def test_a_row_without_a_key_is_plain_though_another_part_has_no_region(tiny):
    """The source reads only the part whose region is empty; the target sees the source's keys alone."""

    def nothing(tape, grid):
        return torch.zeros(4, grid[0] * grid[1], dtype=torch.bool)

    edit = Edit(parts=(Part(ROWS, keys=nothing), Part((-1, 0, -1, 2))))
    ref = run(tiny, At(20, Edit(k_from=(0, 0, 2, 2), v_from=(0, 0, 2, 2))), TARGETS[:1]).latents
    same(run(tiny, At(20, edit), TARGETS[:1]).latents, ref)


def test_a_callback_does_not_change_a_recorded_source(tiny, recorded):
    def change(step, timestep, latents):
        return latents * torch.tensor([1.01, 1.0, 1.0])[:, None, None, None]

    settings = {"controls": masa.MasaCtrl(1, 8), "cache": recorded, "progress": False}
    with pytest.raises(masa.MasaError, match="the callback changes the source's latents"):
        masa.sample(tiny, target=TARGETS, callback=change, **settings)
    masa.sample(tiny, target=TARGETS, callback=lambda step, timestep, x: x.clone(), **settings)


def test_a_recording_keeps_the_settings_of_what_changes_its_source(tiny):
    """Those of a class that is not registered would be lost, and another value of it taken for the same."""

    class Unknown(Several):
        pass

    with pytest.raises(masa.MasaError, match=r"Unknown.*make it known with masa.register"):
        masa.record(tiny, SOURCE, controls=Unknown(source_contrast=1.5), seed=3, **USUAL)


def test_a_mask_beside_more_keys_is_refused_by_name(tiny):
    masked = masa.MasaCtrl(0, 10, mask=masa.WordMasks("cat", "cat"))
    with pytest.raises(masa.MasaError, match=r"At and another control, at .*attn1: one masks the keys"):
        run(tiny, [masked, At(20, Edit(plain=(0.0, 0.5, 0.0, 0.5)))], TARGETS[:1])


def test_residuals_need_a_row_each(tiny):
    class One:
        needs_targets = False

        def begin(self, run):
            active = ActiveControl()
            active.name = "One"
            active.residuals = lambda *given: Residuals(mid=torch.zeros(1, 64, 2, 3))
            return active

    with pytest.raises(masa.MasaError, match=r"One adds residuals \(1, 64, 2, 3\) to 6 rows"):
        run(tiny, One())


def test_what_a_call_of_some_targets_lacks_is_refused_before_the_run(tiny, monkeypatch):
    class ReadsTheSecond:
        def begin(self, run):
            active = ActiveControl()
            active.name = "ReadsTheSecond"
            active.edits = lambda step, branches: {} if step < 2 else {0: Edit(k_from=branches.rows_of(2))}
            return active

    monkeypatch.setattr(tiny.unet, "forward", lambda *args, **kwargs: pytest.fail("ran first"))
    with pytest.raises(masa.MasaError, match="reads branch 2, and this call of the network has"):
        run(tiny, ReadsTheSecond(), targets_at_once=1)
