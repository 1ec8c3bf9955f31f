"""T2I-Adapter, ControlNet and IP-Adapter beside every other control: equal to published loops, and still a control."""

from __future__ import annotations

import warnings
from dataclasses import replace

import published_p2p as published
import pytest
import torch
from adapter_cases import (
    ROUNDING,
    SteeredOracle,
    adapter_residuals,
    controlnet_residuals,
    differs,
    make_adapter,
    make_controlnet,
    original_adapter_keys,
    picture,
    same,
    save,
)
from published import MutualAttention
from test_compile import Captures

import masa
from masa.config import IPAdapterConfig
from masa.edits import Residuals
from masa.models.ip_adapter import IPAdapterNetwork
from masa.runtime.adapters import in_file_order
from masa.runtime.compile import CompiledUNet

SOURCE, TARGETS = "a photo of a siamese cat", ["a photo of a tabby cat", "a photo of a siamese dog"]
STEPS = 4
SIZE = (64, 128)
USUAL = {"steps": STEPS, "height": SIZE[0], "width": SIZE[1], "guidance_scale": 3.0, "progress": False}
INVERTED = {"steps": STEPS, "height": SIZE[0], "width": SIZE[1], "progress": False}
A, B, C = (picture(i, size=SIZE) for i in range(3))
EMBEDDINGS = [torch.randn(1, 48, generator=torch.Generator().manual_seed(i)) for i in range(2)]

LEFT = torch.zeros(SIZE[0] // 8, SIZE[1] // 8)
LEFT[:, :8] = 1.0
MASKS = masa.GivenMasks(LEFT, 1.0 - LEFT)
CONTROLS = {
    "masactrl": masa.MasaCtrl(1, 8),
    "union": masa.MasaCtrl(1, 8, union=True, source_weight=2.0),
    "masks": masa.MasaCtrl(1, 8, mask=MASKS),
    "words": masa.MasaCtrl(1, 8, mask=masa.WordMasks("cat", "photo")),
    "style": masa.StyleTransfer(1, 8),
    "prompt-to-prompt": masa.PromptToPrompt("replace", self_replace_steps=0.5),
    "plug-and-play": masa.PlugAndPlay(),
    "free u": masa.FreeU(),
    "local blend": [masa.MasaCtrl(1, 8), masa.LocalBlend("cat", "photo", start=0.0)],
    "blended latents": [masa.MasaCtrl(1, 8), masa.BlendedLatents(LEFT.repeat_interleave(8, 0).repeat_interleave(8, 1))],
}


@pytest.fixture(scope="module")
def nets():
    return make_adapter("full"), make_controlnet(0, 0.5)


@pytest.fixture(scope="module")
def files(nets, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    ip = IPAdapterNetwork(IPAdapterConfig(48, 32, 4), [site.width for site in in_file_order(tiny.unet.sites)])
    return {
        "adapter": save(folder / "adapter.safetensors", original_adapter_keys(nets[0].state_dict())),
        "net": save(folder / "net.safetensors", nets[1].state_dict()),
        "ip": save(folder / "ip.safetensors", ip.state_dict()),
    }


@pytest.fixture(scope="module")
def adapters(files):
    """Each with a picture of its own for either target; the source has none."""
    return [
        masa.T2IAdapter(files["adapter"], target=[A, B], weight=0.7, tau=0.75),
        masa.ControlNet(files["net"], target=[C, None], scale=0.6, start=0.25),
        masa.IPAdapter(files["ip"], target=[None, EMBEDDINGS[0]], scale=0.8),
    ]


@pytest.fixture(scope="module")
def conditioned(files):
    """The same of the source, which a real picture is inverted and pinned with."""
    return [
        masa.T2IAdapter(files["adapter"], C, [A, B], weight=0.7, tau=0.75),
        masa.ControlNet(files["net"], A, [C, None], scale=0.6, start=0.25),
    ]


@pytest.fixture(scope="module")
def image():
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def of_target(controls, i):
    return [replace(control, target=control.target[i]) for control in controls if control.target[i] is not None]


def listed(control):
    return list(control) if isinstance(control, list) else [control]


def run(sd, controls, targets=TARGETS, **settings):
    start = {} if {"latents", "trajectory", "cache"} & {*settings} else {"seed": 3}
    usual = {k: v for k, v in USUAL.items() if "trajectory" not in settings or k not in ("height", "width", "steps")}
    return masa.sample(sd, SOURCE, targets, controls=controls, **(usual | start | settings)).latents


# -------------------------------------------------------------------------------------------- equal to published loops


class SteeredEdits(SteeredOracle, published.EditOracle):
    """The published edits with residuals of an adapter and a ControlNet beside."""


def published_control(name, ids):
    if name == "style":
        return published.SourceLayout(range(1, STEPS), range(8, 16)), {}
    if name == "plug-and-play":
        return published.SourceLayout(range(2), range(8, 16)), {"feature_steps": 3}
    if name == "prompt-to-prompt":
        edit = published.replace(torch.stack([published.replacement_mapper(ids, SOURCE, target) for target in TARGETS]))
        return published.PromptToPrompt(edit, published.schedule(STEPS, 2, (0, 0.8)), (0, 2)), {}
    given = {"union": {"union": True}, "masks": {"masks": (LEFT, 1.0 - LEFT), "aspect": (1, 2)}}.get(name, {})
    return MutualAttention(range(1, STEPS), range(8, 16), **given), {}


@pytest.mark.parametrize("name", ["masactrl", "union", "masks", "style", "prompt-to-prompt", "plug-and-play"])
@pytest.mark.parametrize("of_source", [False, True])
def test_steered_edits_equal_the_published_loops(tiny, tiny_folder, nets, files, generator, name, of_source):
    """An adapter and a ControlNet beside; the source without conditions, and with its own."""
    source = C if of_source else None
    noise = torch.randn(3, 4, 8, 16, generator=generator)
    terms = adapter_residuals([(nets[0], [source, A, B], 0.7, 3)], 2)
    hints = controlnet_residuals([(nets[1], [source, C, None], 0.6, range(1, STEPS))], 2)
    oracle = SteeredEdits(tiny_folder, tiny.tokenizer, STEPS)
    oracle.residuals = lambda *given: {**terms(*given), **hints(*given)}
    control, more = published_control(name, tiny.tokenizer)
    ref = oracle.run([SOURCE, *TARGETS], noise, STEPS, 3.0, control, **more)
    ours = {"union": masa.MasaCtrl(1, 8, union=True)}.get(name, CONTROLS[name])
    steering = [
        masa.T2IAdapter(files["adapter"], source, [A, B], 0.7, 0.75),
        masa.ControlNet(files["net"], source, [C, None], 0.6, 0.25),
    ]
    same(run(tiny, [ours, *steering], latents=noise), ref)
    differs(run(tiny, ours, latents=noise)[1:], ref[1:])


@pytest.mark.parametrize("union", [False, True])
def test_a_pinned_source_with_its_condition_equals_the_published_loop(
    tiny, tiny_folder, nets, conditioned, image, union
):
    oracle = SteeredEdits(tiny_folder, tiny.tokenizer, STEPS)
    trajectory = masa.invert(tiny, image, SOURCE, controls=conditioned, **INVERTED)
    terms = adapter_residuals([(nets[0], [C, A, B], 0.7, 3)], 2)
    hints = controlnet_residuals([(nets[1], [A, C, None], 0.6, range(1, STEPS))], 2)
    oracle.residuals = lambda *given: {**terms(*given), **hints(*given)}
    control = MutualAttention(range(1, STEPS), range(8, 16), union=union)
    start = trajectory.latents[-1:].expand(3, -1, -1, -1)
    pinned = [x[None] for x in trajectory.latents]
    ref = oracle.run([SOURCE, *TARGETS], start, STEPS, 3.0, control, pinned=pinned)
    out = run(tiny, [masa.MasaCtrl(1, 8, union=union), *conditioned], trajectory=trajectory)
    same(out[1:], ref[1:])


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", CONTROLS)
def test_adapters_beside_a_control_stay_with_their_targets(tiny, adapters, image, name):
    """All three change the targets, and not a source without conditions; a target alone is the same among others."""
    start = {}
    if name == "blended latents":
        start = {"trajectory": masa.invert(tiny, image, SOURCE, **INVERTED), "seed": 3}
    control = listed(CONTROLS[name])
    together = run(tiny, [*control, *adapters], **start)
    plain = run(tiny, control, **start)
    assert torch.equal(together[:1], plain[:1])
    differs(together[1], plain[1], 2e-3)
    differs(together[2], plain[2], 2e-3)
    same(run(tiny, [*control, *adapters], targets_at_once=1, **start), together, ROUNDING)
    alone = run(tiny, [*control, *of_target(adapters, 1)], TARGETS[1], **start)
    same(alone, together[[0, 2]], ROUNDING)


@pytest.mark.parametrize("name", CONTROLS)
def test_without_weight_they_are_absent_beside_any_control(tiny, adapters, image, name):
    start = {}
    if name == "blended latents":
        start = {"trajectory": masa.invert(tiny, image, SOURCE, **INVERTED), "seed": 3}
    nothing = [replace(adapters[0], weight=0.0), replace(adapters[1], scale=0.0), replace(adapters[2], scale=0.0)]
    control = listed(CONTROLS[name])
    assert torch.equal(run(tiny, [*control, *nothing], **start), run(tiny, control, **start))


@pytest.mark.parametrize("name", ["masactrl", "union", "style", "prompt-to-prompt", "plug-and-play", "local blend"])
def test_a_recorded_source_serves_targets_with_adapters(tiny, adapters, name):
    control = listed(CONTROLS[name])
    cache = masa.record(tiny, SOURCE, controls=control, seed=3, **USUAL)
    out = masa.sample(tiny, target=TARGETS, cache=cache, controls=[*control, *adapters], progress=False).latents
    same(out[1:], run(tiny, [*control, *adapters])[1:], ROUNDING)


@pytest.mark.parametrize("sampler", ["dpm++2m", masa.DPMSolverPP(karras=True)])
@pytest.mark.parametrize("pinned", [False, True])
def test_other_samplers_serve(tiny, conditioned, image, sampler, pinned):
    """Of a drifting source the reconstruction, of a pinned one the retiring rows; each target as if it were alone."""
    controls = [masa.MasaCtrl(1, 8), *conditioned]
    if isinstance(sampler, masa.DPMSolverPP):
        start = {"sampler": sampler}
    else:
        trajectory = masa.invert(tiny, image, SOURCE, controls=conditioned, **INVERTED)
        start = {"sampler": sampler, "trajectory": trajectory, "pin_source": pinned}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = run(tiny, controls, **start)
    plain = run(tiny, controls, **(start | {"sampler": "ddim"}))
    differs(together[1:], plain[1:], 1e-3)
    same(run(tiny, controls, targets_at_once=1, **start), together, ROUNDING)
    alone = [controls[0], *(replace(control, target=control.target[0]) for control in conditioned)]
    same(run(tiny, alone, TARGETS[0], **start), together[[0, 1]], ROUNDING)


@pytest.mark.parametrize("method", ["negative-prompt", "null-text", "edit-friendly", "noise"])
def test_every_inversion_serves_an_edit_with_conditions(tiny, conditioned, image, method):
    controls = [masa.MasaCtrl(1, 8), *conditioned]
    usual = {"method": method, "seed": 3, "guidance_scale": 3.0, "inner_steps": 1, **INVERTED}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = masa.edit(tiny, image, TARGETS, SOURCE, controls=controls, **usual)
    assert len(out.settings["trajectory"]["source_conditions"]) == (0 if method == "noise" else 2)
    plain = masa.edit(tiny, image, TARGETS, SOURCE, controls=controls[0], **usual)
    differs(out.latents[1:], plain.latents[1:], 1e-3)


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
def test_a_compiled_model_serves(tiny, adapters):
    torch._dynamo.reset()
    controls = [masa.MasaCtrl(1, 8), *adapters]
    same(run(tiny.compile(compiler="aot_eager"), controls), run(tiny, controls), ROUNDING)


def test_captured_runs_with_residuals_equal_plain_ones(tiny, adapters):
    captures = Captures()
    sd = replace(tiny, unet=CompiledUNet(tiny.unet, "eager", captures))
    counts = []
    for shown in (adapters, [replace(adapters[0], target=[C, A]), replace(adapters[1], target=[B, None]), adapters[2]]):
        controls = [masa.MasaCtrl(1, 8), *shown]
        same(run(sd, controls), run(tiny, controls), ROUNDING)
        counts.append(captures.count)
    # Before MasaCtrl without hints, then with both, then behind tau: other pictures are the same kinds of steps.
    assert counts == [3, 3]


def test_a_captures_key_covers_residuals(tiny, generator):
    """Which features have one, and of which shape, tells captures apart; what is in it is copied in."""
    captures = Captures()
    sd = replace(tiny, unet=CompiledUNet(tiny.unet, "eager", captures))
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)

    def down(levels):
        widths = ((32, 8), (64, 4), (64, 2), (64, 1))
        made = [torch.randn(2, width, side, side, generator=generator) for width, side in widths]
        return Residuals(down=tuple(made[i] if i in levels else None for i in range(4)))

    def middle():
        return Residuals(mid=torch.randn(2, 64, 1, 1, generator=generator))

    counts, kinds = [], (lambda: None, lambda: down((0, 2)), lambda: down((0, 2)), lambda: down((0, 1)), middle, middle)
    for kind in (*kinds, lambda: None):
        residuals = kind()
        with torch.no_grad():
            plain, found = (m.unet(x, 500, context, residuals=residuals)[0] for m in (tiny, sd))
        assert (found - plain).abs().max() / plain.abs().max() < 1e-5
        counts.append(captures.count)
    assert counts == [1, 2, 2, 3, 4, 4, 4]
