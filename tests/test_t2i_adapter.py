"""T2I-Adapter: equal to diffusers' own, and what a control must be: alone = among others, absent at weight 0, .."""

from __future__ import annotations

import copy
import gc
import shutil
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import (
    CPU,
    ROUNDING,
    SOURCE,
    STEPS,
    TARGETS,
    USUAL,
    SteeredOracle,
    adapter_residuals,
    differs,
    in_patches,
    make_adapter,
    original_adapter_keys,
    picture,
    run,
    same,
    save,
    seen_steps,
)
from fake_checkpoints import key_list, write_sparse
from PIL import Image
from published import Control, MutualAttention

import masa
from masa.config import T2IAdapterConfig, UNetConfig
from masa.controls.conditions import load_condition
from masa.edits import Residuals
from masa.models.t2i_adapter import T2IAdapterNetwork
from masa.runtime import adapters
from masa.runtime.adapters import read_adapter
from masa.runtime.compile import CompiledUNet
from masa.weights.adapters import open_adapter


@pytest.fixture(scope="module")
def nets():
    return {"full": make_adapter("full"), "light": make_adapter("light", seed=1), "lines": make_adapter("full", 1, 2)}


@pytest.fixture(scope="module")
def files(nets, tmp_path_factory):
    """Each adapter as one file, in the published layout."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: save(folder / f"{name}.safetensors", original_adapter_keys(net.state_dict()))
        for name, net in nets.items()
    }


# ------------------------------------------------------------------------------------------------- files and network


@pytest.mark.parametrize("kind", ["full", "light", "lines"])
@pytest.mark.parametrize("layout", ["published", "prefixed", "diffusers file", "diffusers folder"])
def test_features_equal_diffusers_from_every_layout(nets, tiny, tmp_path, kind, layout):
    net, path = nets[kind], tmp_path / "adapter.safetensors"
    if layout == "diffusers folder":
        path = tmp_path / "folder"
        net.save_pretrained(path)
    elif layout == "diffusers file":
        save(path, net.state_dict())
    else:
        prefix = "adapter." if layout == "prefixed" else ""
        save(path, {prefix + key: tensor for key, tensor in original_adapter_keys(net.state_dict()).items()})
    ours = read_adapter(path, tiny.config.unet, torch.float32, CPU)
    shown = picture(0, ours.picture_channels)[None]
    with torch.no_grad():
        for out, ref in zip(ours(shown), net(shown), strict=True):
            assert out.shape == ref.shape
            assert (out - ref).abs().max() / ref.abs().max() < 1e-4


@pytest.mark.parametrize("kind", key_list("t2i_adapter_sd14v1"))
def test_published_key_lists_are_told_apart(tmp_path, kind):
    keys = dict(key_list("t2i_adapter_sd14v1")[kind])
    path = write_sparse(tmp_path / "adapter.safetensors", keys)
    if kind == "style":
        with pytest.raises(masa.CheckpointError, match="is a style adapter"):
            open_adapter(path)
        return
    opened = open_adapter(path)
    assert opened.config.light == ("light" in kind)
    assert opened.config.block_out_channels == (320, 640, 1280, 1280)
    with torch.device("meta"):
        net = T2IAdapterNetwork(opened.config)
    shapes = {opened.part.namer(name): list(tensor.shape) for name, tensor in net.state_dict().items()}
    assert shapes == {key: shape for key, (shape, _) in keys.items()}
    if "full" in kind:
        count = sum(p.numel() for p in net.parameters())
        assert count == {1: 77_000_640, 3: 77_369_280}[net.picture_channels]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "channels"), [("full", 1), ("light", 3)])
def test_full_size_features_equal_diffusers(tmp_path, kind, channels):
    net = make_adapter(kind, channels, widths=(320, 640, 1280, 1280))
    path = save(tmp_path / "adapter.safetensors", original_adapter_keys(net.state_dict()))
    ours = read_adapter(path, UNetConfig(), torch.float32, CPU)
    shown = picture(0, channels, (128, 128))[None]
    with torch.no_grad():
        for out, ref in zip(ours(shown), net(shown), strict=True):
            assert (out - ref).abs().max() / ref.abs().max() < 1e-4


def broken(tmp_path, keys, suffix=".safetensors"):
    return write_sparse(tmp_path / f"file{suffix}", keys)


REFUSED = {
    "SDXL": (
        lambda: {"conv_in.weight": ([320, 768, 3, 3], "F32"), "body.0.block1.weight": ([320, 320, 3, 3], "F32")},
        "adapter for another model, such as SDXL's",
    ),
    "CoAdapter": (lambda: {"task_embedding": ([16, 768], "F32")}, "fuser of several adapters"),
    "LoRA": (lambda: key_list("lora_sd15_rank4")[next(iter(key_list("lora_sd15_rank4")))], "is a LoRA"),
    "ControlNet": (lambda: key_list("controlnet_sd15")["diffusers"], "is a ControlNet"),
    "whole model": (lambda: key_list("sd15_ldm"), "is a whole model"),
    "nothing known": (lambda: {"weight": ([1], "F32")}, "holds no T2I-Adapter .its first tensors: weight"),
    "other widths": (lambda: key_list("t2i_adapter_sd14v1")["diffusers_full_cin3"], "made for a UNet of widths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(tiny, tmp_path, name):
    keys, message = REFUSED[name]
    path = write_sparse(tmp_path / "file.safetensors", keys())
    with pytest.raises(masa.CheckpointError, match=message):
        run(tiny, masa.T2IAdapter(path, target=picture(0)))


def test_a_pickle_a_missing_key_and_a_missing_file_are_refused(tiny, nets, tmp_path):
    torch.save(nets["full"].state_dict(), tmp_path / "adapter.pth")
    with pytest.raises(masa.CheckpointError, match="pickled"):
        run(tiny, masa.T2IAdapter(tmp_path / "adapter.pth", target=picture(0)))
    state = original_adapter_keys(nets["full"].state_dict())
    for lacking in ("body.3.block1.weight", "body.4.block1.weight", "conv_in.bias", "body.2.in_conv.weight"):
        some = {key: tensor for key, tensor in state.items() if key != lacking}
        with pytest.raises(masa.CheckpointError, match=f"T2I-Adapter for Stable .* 1 missing: {lacking}"):
            run(tiny, masa.T2IAdapter(save(tmp_path / "some.safetensors", some), target=picture(0)))
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors"):
        run(tiny, masa.T2IAdapter(tmp_path / "gone.safetensors", target=picture(0)))


# ------------------------------------------------------------------------------------------------- equal to diffusers


def test_one_forward_equals_diffusers(tiny, tiny_folder, nets, files, generator):
    oracle = SteeredOracle(tiny_folder, tiny.tokenizer, STEPS).unet
    ours = read_adapter(files["full"], tiny.config.unet, torch.float32, CPU)
    x, context = torch.randn(2, 4, 16, 24, generator=generator), torch.randn(2, 77, 32, generator=generator)
    shown = torch.stack([picture(0), picture(1)])
    with torch.no_grad():
        given = [level.clone() for level in nets["full"](shown)]  # diffusers pops the list and adds in place
        ref = oracle(x, 300, context, down_intrablock_additional_residuals=given).sample
        out, _ = tiny.unet(x, 300, context, residuals=Residuals(ours(shown)))
        plain, _ = tiny.unet(x, 300, context)
    assert (out - ref).abs().max() / ref.abs().max() < 1e-4
    assert (plain - ref).abs().max() / ref.abs().max() > 0.05


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    "case", ["targets' own", "source the same", "source its own", "one without", "two", "tau", "lines", "light"]
)
def test_trajectories_equal_the_published_loop(tiny, tiny_folder, nets, files, generator, case, guidance):
    a, b, c = picture(0), picture(1), picture(2)
    kind = case if case in ("lines", "light") else "full"
    each = {
        "source the same": [a, a, a],
        "source its own": [c, a, a],
        "one without": [None, a, None],
        "lines": [None, a[:1], b[:1]],
    }.get(case, [None, a, b])
    tau, end = (0.5, 2) if case == "tau" else (1.0, STEPS)
    shown = [None if p is None else in_patches(p) for p in each] if kind == "light" else each
    terms = [(nets[kind], shown, 0.8, end)]
    same_target = each[1] is each[2]
    controls = [masa.T2IAdapter(files[kind], each[0], each[1] if same_target else each[1:], 0.8, tau)]
    if case == "two":
        terms.append((nets["light"], [None, *[in_patches(c)] * 2], 0.5, STEPS))
        controls.append(masa.T2IAdapter(files["light"], target=c, weight=0.5))
    noise = torch.randn(3, 4, 16, 24, generator=generator)
    halves = 2 if guidance > 1 else 1
    oracle = SteeredOracle(tiny_folder, tiny.tokenizer, STEPS)
    oracle.residuals = adapter_residuals(terms, halves)
    steering = MutualAttention(range(1, STEPS), range(8, 16), halves=halves)
    ref = oracle.sample([SOURCE, *TARGETS], noise, STEPS, guidance, steering)[-1]
    masactrl = masa.MasaCtrl(1, 8)
    same(run(tiny, [masactrl, *controls], latents=noise, guidance_scale=guidance), ref)
    differs(run(tiny, masactrl, latents=noise, guidance_scale=guidance)[1], ref[1])


@pytest.mark.slow
def test_full_size_trajectory_of_one_step(nets):
    """At SD v1.5's widths one forward of the UNet with an adapter's features: 1e-4 of the largest."""
    from diffusers import UNet2DConditionModel

    from masa.models.unet import UNet

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(cross_attention_dim=768).eval()
    with torch.device("meta"):
        ours = UNet()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    net = make_adapter("full", widths=(320, 640, 1280, 1280))
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 768)
    with torch.no_grad():
        features = net(picture(0, 3, (128, 128))[None])
        out, _ = ours(x, 500, context, residuals=Residuals(tuple(features)))
        ref = theirs(x, 500, context, down_intrablock_additional_residuals=[f.clone() for f in features]).sample
    assert (out - ref).abs().max() / ref.abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.fixture(scope="module")
def steered(files):
    """MasaCtrl beside an adapter: the targets' own pictures, the source's another."""
    return [masa.MasaCtrl(1, 8), masa.T2IAdapter(files["full"], picture(2), [picture(0), picture(1)])]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_target_alone_is_the_same_among_others(tiny, files, steered, guidance):
    together = run(tiny, steered, guidance_scale=guidance)
    same(run(tiny, steered, guidance_scale=guidance, targets_at_once=1), together, ROUNDING)
    for i in range(2):
        alone = [steered[0], replace(steered[1], target=picture(i))]
        same(run(tiny, alone, TARGETS[i], guidance_scale=guidance), together[[0, i + 1]], ROUNDING)


def test_weight_zero_is_absent_and_two_halves_are_a_whole(tiny, files):
    absent = run(tiny, [])
    assert torch.equal(run(tiny, masa.T2IAdapter(files["full"], target=picture(0), weight=0.0)), absent)
    assert torch.equal(run(tiny, masa.T2IAdapter(files["full"], target=picture(0), tau=0.0)), absent)
    whole = run(tiny, masa.T2IAdapter(files["full"], target=picture(0)))
    differs(whole[1:], absent[1:])
    assert torch.equal(whole[:1], absent[:1])  # a source without a condition
    half = masa.T2IAdapter(files["full"], target=picture(0), weight=0.5)
    same(run(tiny, [half, half]), whole)
    differs(run(tiny, half)[1:], whole[1:])


@pytest.mark.parametrize(("tau", "active"), [(0.0, 0), (0.25, 1), (0.26, 2), (0.5, 2), (0.9, 4), (1.0, 4)])
def test_tau_ends_it_after_as_many_steps(tiny, files, tau, active):
    control = masa.T2IAdapter(files["full"], target=picture(0), tau=tau)
    assert seen_steps(tiny, control) == list(range(active))


@pytest.mark.parametrize(("steps", "tau", "active"), [(50, 0.9, 45), (20, 0.9, 18), (10, 0.3, 3), (7, 0.5, 4)])
def test_tau_has_no_float_faults(tiny, files, steps, tau, active):
    from masa.checks import describe_run
    from masa.samplers.base import Levels

    run_of = describe_run(tiny, Levels.of_schedule(tiny.schedule, steps), (SOURCE, "a dog"), (16, 24))
    assert masa.T2IAdapter(files["full"], target=picture(0), tau=tau).begin(run_of).steps == active


def test_it_serves_a_source_without_targets(tiny, files):
    alone = run(tiny, masa.T2IAdapter(files["full"], source=picture(0)), [])
    differs(alone, run(tiny, [], []))
    with pytest.raises(masa.MasaError, match="T2IAdapter acts on targets, and there are none"):
        run(tiny, masa.T2IAdapter(files["full"], target=picture(0)), [])


@pytest.fixture(scope="module")
def trajectory(tiny):
    image = torch.rand(3, 128, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return masa.invert(tiny, image, SOURCE, steps=STEPS, progress=False)


def test_a_pinned_source_serves(tiny, trajectory, steered):
    with pytest.warns(UserWarning, match="was inverted with no condition, and the run gives it T2IAdapter"):
        pinned = run(tiny, steered, trajectory=trajectory)
    same(run(tiny, steered, trajectory=trajectory, targets_at_once=1), pinned, ROUNDING)
    free = [steered[0], replace(steered[1], source=None)]
    differs(run(tiny, free, trajectory=trajectory)[1:], pinned[1:], 1e-3)


def test_a_source_cache_serves_any_conditions_of_targets(tiny, files, trajectory):
    masactrl = masa.MasaCtrl(1, 8)
    for start in ({"seed": 3}, {"trajectory": trajectory}):
        usual = {k: v for k, v in USUAL.items() if k not in ("height", "width")} if "trajectory" in start else USUAL
        cache = masa.record(tiny, SOURCE, controls=masactrl, **start, **usual)
        for shown in ([picture(0), None], picture(1)):
            controls = [masactrl, masa.T2IAdapter(files["full"], target=shown)]
            ref = masa.sample(tiny, SOURCE, TARGETS, controls=controls, **start, **usual).latents
            out = masa.sample(tiny, target=TARGETS, cache=cache, controls=controls, progress=False).latents
            same(out[1:], ref[1:], ROUNDING)


def test_a_source_cache_keeps_to_its_own_condition(tiny, files, steered, tmp_path):
    plain = masa.record(tiny, SOURCE, controls=steered[0], seed=3, **USUAL)
    with pytest.raises(masa.MasaError, match="T2IAdapter changes what the source is, and the cache was recorded w"):
        masa.sample(tiny, target=TARGETS, cache=plain, controls=steered, progress=False)
    path = tmp_path / "cache.safetensors"
    masa.record(tiny, SOURCE, controls=steered, seed=3, path=path, **USUAL)
    conditioned = masa.SourceCache.load(path, tiny)
    same(
        masa.sample(tiny, target=TARGETS, cache=conditioned, controls=steered, progress=False).latents[1:],
        run(tiny, steered)[1:],
        ROUNDING,
    )
    for changed in (replace(steered[1], source=picture(5)), replace(steered[1], weight=0.5)):
        with pytest.raises(masa.MasaError, match="changes what the source is"):
            masa.sample(tiny, target=TARGETS, cache=conditioned, controls=[steered[0], changed], progress=False)
    with pytest.raises(masa.MasaError, match="was recorded with T2IAdapter, which changes"):
        masa.sample(tiny, target=TARGETS, cache=conditioned, controls=steered[0], progress=False)
    weightless = [steered[0], replace(steered[1], weight=0.0)]  # as if it were not there
    masa.sample(tiny, target=TARGETS, cache=plain, controls=weightless, progress=False)


def test_a_compiled_model_serves(tiny, steered):
    sd = replace(tiny, unet=CompiledUNet(tiny.unet, "eager", None))
    same(run(sd, steered), run(tiny, steered), ROUNDING)


def test_features_are_computed_once_per_picture_and_run(tiny, files, monkeypatch):
    calls = []
    forward = T2IAdapterNetwork.forward
    monkeypatch.setattr(T2IAdapterNetwork, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    run(tiny, masa.T2IAdapter(files["full"], picture(0), [picture(0), picture(1)]), targets_at_once=1)
    assert calls == [1, 1]


# ------------------------------------------------------------------------------------------------------------ pictures


def test_every_kind_of_picture_is_the_same(tiny, files, tmp_path):
    x = picture(0)
    array = (x.permute(1, 2, 0) * 255).to(torch.uint8).numpy()
    Image.fromarray(array).save(tmp_path / "pose.png")
    ref = run(tiny, masa.T2IAdapter(files["full"], target=x))
    for shown in (array, Image.fromarray(array), tmp_path / "pose.png", torch.from_numpy(array)):
        assert torch.equal(run(tiny, masa.T2IAdapter(files["full"], target=shown)), ref)
    large = x.repeat_interleave(2, 1).repeat_interleave(2, 2)  # drawn: the nearest pixel
    assert torch.equal(run(tiny, masa.T2IAdapter(files["full"], target=large)), ref)
    clear = Image.fromarray(array).convert("RGBA")
    clear.putalpha(Image.fromarray(array.max(2)))  # transparent is black
    assert torch.equal(run(tiny, masa.T2IAdapter(files["full"], target=clear)), ref)


def test_shaded_pictures_are_averaged_and_cropped_in_the_middle(tiny):
    ramp = torch.linspace(0, 1, 256)[:, None].expand(256, 256)
    small = load_condition("it", ramp, (16, 16))[0, 0]
    assert torch.allclose(small[1:-1, 0], ramp.reshape(128, 2, 256)[1:-1, :, 0].mean(1), atol=2e-3)
    wide = torch.zeros(128, 384)
    wide[:, 128:256] = 1.0
    assert load_condition("it", wide, (16, 16)).min() == 1.0


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (3, "condition of int"),
        ([], "no condition picture"),
        ([None, None], "no condition picture"),
    ],
)
def test_what_is_no_picture_is_refused_at_once(shown, message):
    with pytest.raises(masa.MasaError, match=message):
        masa.T2IAdapter("a.safetensors", target=shown)


def test_one_without_a_picture_is_a_video_s_and_refused_by_a_run(tiny, files):
    steps = []
    with pytest.raises(masa.MasaError, match="T2IAdapter has no condition picture; give target="):
        run(tiny, masa.T2IAdapter(files["full"]), callback=lambda step, *_: steps.append(step))
    assert not steps


def test_bad_values_are_refused(tiny, files):
    for settings, message in (
        ({"weight": "1"}, "weight is '1'"),
        ({"tau": 1.5}, "tau is 1.5; expected a number from 0 to 1"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            masa.T2IAdapter(files["full"], target=picture(0), **settings)
    for shown, message in (
        (picture(0) * 2 - 1, r"values from -1 to 1; expected \[0, 1\]"),
        (torch.zeros(2, 8, 8), "condition of shape"),
        ([picture(0)], "target has 1 pictures and the run 2 targets"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            run(tiny, masa.T2IAdapter(files["full"], target=shown))


def test_a_photograph_where_lines_are_expected_is_a_warning(tiny, files):
    photo = np.random.default_rng(0).integers(0, 256, (128, 192, 3)).astype(np.uint8)
    with pytest.warns(UserWarning, match="looks like a photograph"):
        run(tiny, masa.T2IAdapter(files["lines"], target=photo), TARGETS[0])
    with pytest.warns(UserWarning, match="is the drawing inverted"):
        run(tiny, masa.T2IAdapter(files["lines"], target=1 - picture(0, 1)), TARGETS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tiny, masa.T2IAdapter(files["lines"], target=picture(0, 1)), TARGETS[0])
        run(tiny, masa.T2IAdapter(files["full"], target=photo), TARGETS[0])


# ------------------------------------------------------------------------------------------------------------ settings


def test_a_run_is_repeated_from_its_picture(tiny, nets, tmp_path):
    path = save(tmp_path / "adapter.safetensors", original_adapter_keys(nets["full"].state_dict()))
    Image.fromarray((picture(1).permute(1, 2, 0) * 255).to(torch.uint8).numpy()).save(tmp_path / "pose.png")
    controls = [masa.MasaCtrl(1, 8), masa.T2IAdapter(path, picture(2), [tmp_path / "pose.png", None], 0.7, 0.5)]
    out = masa.sample(tiny, SOURCE, TARGETS, controls=controls, seed=3, **USUAL)
    out.save(tmp_path / "out")
    (tmp_path / "pose.png").unlink()  # it is inside
    shown = tmp_path / "out" / "source.png"
    again = masa.rerun(shown, tiny, progress=False)
    assert torch.equal(again.latents, out.latents)
    changed = copy.deepcopy(nets["full"].state_dict())
    changed["adapter.conv_in.bias"] += 1.0
    save(path, original_adapter_keys(changed))
    with pytest.raises(masa.MasaError, match=r"adapter.safetensors has changed since"):
        masa.rerun(shown, tiny, progress=False)
    path.unlink()
    with pytest.raises(masa.MasaError, match=r"adapter.safetensors, which .* is not there any more"):
        masa.rerun(shown, tiny, progress=False)


def test_an_adapter_file_is_read_once_a_run_and_let_go(tiny, files, tmp_path, monkeypatch):
    path = Path(shutil.copy(files["full"], tmp_path))
    one = masa.T2IAdapter(path, target=picture(0))
    two = replace(one, weight=0.5)
    first = one.file.load(tiny.config.unet, torch.float32, CPU)
    assert two.file.load(tiny.config.unet, torch.float32, CPU) is first
    seen = weakref.ref(first)
    del first
    gc.collect()
    assert seen() is None  # though both controls live

    read = []
    loaded = adapters.load_parts
    monkeypatch.setattr(adapters, "load_parts", lambda *given, **named: read.append(1) or loaded(*given, **named))
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    usual = {"steps": 1, "height": 64, "width": 64, "progress": False}
    masa.edit(tiny, image, "a dog", controls=[replace(one, source=picture(1)), two], **usual)
    assert len(read) == 1  # checked, inverted and sampled
    with masa.keep_networks():
        for _ in range(2):
            masa.sample(tiny, SOURCE, "a dog", controls=one, **usual)
    assert len(read) == 2
    for _ in range(2):
        masa.sample(tiny, SOURCE, "a dog", controls=one, **usual)
    assert len(read) == 4
    assert not adapters._IN_USE


def test_a_colour_adapter_sees_squares_of_64_pixels(tiny, nets, files):
    """A photograph is the same to it as its squares; a full adapter sees all of it."""
    photo = torch.rand(3, 128, 192, generator=torch.Generator().manual_seed(3))
    shown = in_patches(photo)
    assert shown.flatten(1).unique(dim=1).shape[1] == 6
    ours = run(tiny, masa.T2IAdapter(files["light"], target=photo), TARGETS[0])
    same(run(tiny, masa.T2IAdapter(files["light"], target=shown), TARGETS[0]), ours, ROUNDING)
    differs(run(tiny, masa.T2IAdapter(files["light"], target=photo.flip(2)), TARGETS[0]), ours)
    full = run(tiny, masa.T2IAdapter(files["full"], target=photo), TARGETS[0])
    differs(run(tiny, masa.T2IAdapter(files["full"], target=shown), TARGETS[0]), full)


def test_the_plain_loop_is_the_oracles(tiny, tiny_folder, generator):
    """The oracle without residuals is the published one: what it adds is all that differs."""
    noise = torch.randn(2, 4, 16, 24, generator=generator)
    ref = SteeredOracle(tiny_folder, tiny.tokenizer, STEPS).sample([SOURCE, TARGETS[0]], noise, STEPS, 5.0, Control())
    same(run(tiny, [], TARGETS[0], latents=noise), ref[-1])
    assert T2IAdapterConfig().in_channels == 192


def test_a_condition_of_another_shape_is_said_to_be_cut():
    with pytest.warns(UserWarning, match="has 300x70 pixels and the run 64x64: 77% of it are cut away"):
        load_condition("T2IAdapter", Image.new("L", (300, 70)), (8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_condition("T2IAdapter", Image.new("L", (72, 64)), (8, 8))
