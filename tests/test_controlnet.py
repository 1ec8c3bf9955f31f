"""ControlNet: equal to diffusers' own, and what a control must be: alone = among others, absent at scale 0, .."""

from __future__ import annotations

import copy
from dataclasses import replace

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
    controlnet_residuals,
    differs,
    make_adapter,
    make_controlnet,
    picture,
    run,
    same,
    save,
    seen_steps,
)
from fake_checkpoints import key_list, write_sparse
from published import MutualAttention

import masa
from masa.config import UNetConfig
from masa.edits import Residuals
from masa.models.controlnet import ControlNetwork
from masa.models.unet import UNet
from masa.runtime.adapters import read_controlnet
from masa.runtime.compile import CompiledUNet
from masa.weights.adapters import open_controlnet, original_controlnet_name

SD = UNetConfig()


@pytest.fixture(scope="module")
def nets():
    return [make_controlnet(0), make_controlnet(1)]


@pytest.fixture(scope="module")
def files(nets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("controlnets")
    return [save(folder / f"net{i}.safetensors", net.state_dict()) for i, net in enumerate(nets)]


def original_keys(state):
    """A diffusers net's tensors under the original files' names, which diffusers' own converter must undo."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    renamed = {original_controlnet_name(name, 2): tensor for name, tensor in state.items()}
    undone = convert_controlnet_checkpoint(dict(renamed), {"layers_per_block": 2})
    assert undone.keys() == state.keys()
    assert all(torch.equal(undone[name], tensor) for name, tensor in state.items())
    return {f"control_model.{name}": tensor for name, tensor in renamed.items()}


# ------------------------------------------------------------------------------------------------- files and network


@pytest.mark.parametrize("layout", ["diffusers file", "diffusers folder", "original", "no prefix", "whole model"])
def test_residuals_equal_diffusers_from_every_layout(nets, tiny, tmp_path, generator, layout):
    net, path = nets[0], tmp_path / "net.safetensors"
    if layout == "diffusers folder":
        path = tmp_path / "folder"
        net.save_pretrained(path)
    elif layout == "diffusers file":
        save(path, net.state_dict())
    else:
        state = original_keys(net.state_dict())
        if layout == "no prefix":
            state = {key.removeprefix("control_model."): tensor for key, tensor in state.items()}
        if layout == "whole model":
            state |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "cond_stage_model.x": torch.zeros(1)}
        save(path, state)
        assert open_controlnet(path, 4, 16).unused == (2 if layout == "whole model" else 0)
    ours = read_controlnet(path, tiny.config.unet, torch.float32, CPU)
    assert_equal(ours, net, generator, 32, (16, 24))


def assert_equal(ours, net, generator, context_width, grid):
    x, context = torch.randn(2, 4, *grid, generator=generator), torch.randn(2, 77, context_width, generator=generator)
    size = (8 * grid[0], 8 * grid[1])
    shown = torch.stack([picture(0, size=size), picture(1, size=size)])
    with torch.no_grad():
        down, mid = net(x, 300, context, shown, return_dict=False)
        skips, middle = ours(x, 300, context, ours.encode(shown))
    assert len(skips) == len(down) == 12
    for out, ref in zip((*skips, middle), (*down, mid), strict=True):
        assert (out - ref).abs().max() / ref.abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["ldm_control_model", "diffusers"])
def test_published_key_lists_fit(tmp_path, layout):
    keys = key_list("controlnet_sd15")[layout]
    opened = open_controlnet(write_sparse(tmp_path / "net.safetensors", keys), 8, 32)
    assert opened.unet == SD
    with torch.device("meta"):
        net = ControlNetwork(SD)
    shapes = {opened.part.namer(name): list(tensor.shape) for name, tensor in net.state_dict().items()}
    assert shapes == {key: shape for key, (shape, _) in keys.items()}
    assert sum(p.numel() for p in net.parameters()) == 361_279_120


@pytest.mark.slow
def test_full_size_residuals_and_forward_equal_diffusers(tmp_path, generator):
    """At SD v1.5's widths: residuals, and one forward of the UNet with them, to 1e-4 of the largest."""
    from diffusers import UNet2DConditionModel

    widths = SD.block_out_channels
    net = make_controlnet(
        0, 0.1, block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32
    )
    path = save(tmp_path / "net.safetensors", net.state_dict())
    ours = read_controlnet(path, SD, torch.float32, CPU)
    assert_equal(ours, net, generator, 768, (16, 16))
    with torch.device("meta"):
        unet = UNet()
    theirs = UNet2DConditionModel(cross_attention_dim=768).eval()
    unet.load_state_dict(theirs.state_dict(), assign=True)
    x, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 768, generator=generator)
    with torch.no_grad():
        down, mid = net(x, 300, context, picture(0, size=(128, 128))[None], return_dict=False)
        skips, middle = ours(x, 300, context, ours.encode(picture(0, size=(128, 128))[None]))
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        ref = theirs(x, 300, context, **added).sample
        out, _ = unet(x, 300, context, residuals=Residuals(skips=skips, mid=middle))
    assert (out - ref).abs().max() / ref.abs().max() < 1e-4


def with_key(key):
    return {**key_list("controlnet_sd15")["ldm_control_model"], key: ([1], "F32")}


def wider(width):
    keys = key_list("controlnet_sd15")["diffusers"]
    cross = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {k: ([s[0], width] if k.endswith(cross) else s, dtype) for k, (s, dtype) in keys.items()}


REFUSED = {
    "SD 2": (lambda: wider(1024), "ControlNet for a Stable Diffusion 2.x model"),
    "SDXL": (lambda: wider(2048), "ControlNet for an SDXL model"),
    "SDXL's classes": (lambda: with_key("control_model.label_emb.0.0.weight"), "conditioned on classes"),
    "Control-LoRA": (lambda: with_key("lora_controlnet"), "is a Control-LoRA"),
    "LLLite": (lambda: {"lllite_unet_input_blocks": ([1], "F32")}, "is a ControlNet-LLLite"),
    "LoRA": (lambda: key_list("lora_sd15_rank4")[next(iter(key_list("lora_sd15_rank4")))], "is a LoRA"),
    "T2I-Adapter": (lambda: key_list("t2i_adapter_sd14v1")["diffusers_full_cin3"], "is a T2I-Adapter"),
    "whole model": (lambda: key_list("sd15_ldm"), "is a whole model"),
    "nothing known": (lambda: {"weight": ([1], "F32")}, "holds no ControlNet .its first tensors: weight"),
    "another UNet": (lambda: key_list("controlnet_sd15")["diffusers"], "is a copy of another UNet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(tiny, tmp_path, name):
    keys, message = REFUSED[name]
    path = write_sparse(tmp_path / "file.safetensors", keys())
    with pytest.raises(masa.CheckpointError, match=message):
        run(tiny, masa.ControlNet(path, target=picture(0)))


def test_pickles_missing_keys_and_missing_files_are_refused(tiny, nets, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(masa.CheckpointError, match="pickled"):
        run(tiny, masa.ControlNet(tmp_path / "net.pth", target=picture(0)))
    for lacking in ("controlnet_mid_block.bias", "conv_in.weight", "controlnet_cond_embedding.blocks.3.weight"):
        some = {key: tensor for key, tensor in nets[0].state_dict().items() if key != lacking}
        with pytest.raises(masa.CheckpointError, match=f"ControlNet for Stable .* 1 missing: {lacking}"):
            run(tiny, masa.ControlNet(save(tmp_path / "some.safetensors", some), target=picture(0)))
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors"):
        run(tiny, masa.ControlNet(tmp_path / "gone.safetensors", target=picture(0)))


def test_a_folders_configuration_holds(tiny, tmp_path):
    make_controlnet(0, attention_head_dim=8).save_pretrained(tmp_path / "heads")
    with pytest.raises(masa.CheckpointError, match="is a copy of another UNet"):
        read_controlnet(tmp_path / "heads", tiny.config.unet, torch.float32, CPU)
    reversed_hint = make_controlnet(0, controlnet_conditioning_channel_order="bgr", global_pool_conditions=True)
    reversed_hint.save_pretrained(tmp_path / "bgr")
    ours = read_controlnet(tmp_path / "bgr", tiny.config.unet, torch.float32, CPU)
    shown = picture(0)[None]
    with torch.no_grad():
        assert torch.equal(ours.encode(shown), ours.controlnet_cond_embedding(shown.flip(1)))
        skips, mid = ours(torch.randn(1, 4, 16, 24), 3, torch.randn(1, 77, 32), ours.encode(shown))
    for r in (*skips, mid):  # the same everywhere
        assert torch.equal(r, r[:, :, :1, :1].expand_as(r))
    save(tmp_path / "control_shuffle.safetensors", make_controlnet(0).state_dict())
    assert read_controlnet(tmp_path / "control_shuffle.safetensors", tiny.config.unet, torch.float32, CPU).pooled


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_differences_are_to_the_model_before_any_lora(tiny, nets, files, tmp_path, prefix):
    """What the UNet has too is given as differences to it, all else as it stands."""
    base = tiny.unet.state_dict()
    state = nets[0].state_dict()
    deltas = {name: tensor - base[name] if name in base else tensor for name, tensor in state.items()}
    assert 100 < sum(name in base for name in state) < len(state)
    if prefix:
        deltas = {f"{prefix}{original_controlnet_name(name, 2)}": tensor for name, tensor in deltas.items()}
    path = save(tmp_path / "difference.safetensors", deltas | {"difference": torch.zeros(1)})
    assert open_controlnet(path, 4, 16).difference
    assert open_controlnet(path, 4, 16).unused == 0
    ref = run(tiny, masa.ControlNet(files[0], target=picture(0)))
    same(run(tiny, masa.ControlNet(path, target=picture(0))), ref, ROUNDING)

    changed = copy.deepcopy(tiny.unet)  # as a LoRA changes it
    with torch.no_grad():
        changed.conv_in.weight *= 1.1
    lora = replace(tiny, unet=changed, base=tiny)
    ref = run(lora, masa.ControlNet(files[0], target=picture(0)))
    same(run(lora, masa.ControlNet(path, target=picture(0))), ref, ROUNDING)
    other = replace(tiny, unet=changed)  # a model of its own: the same differences are another ControlNet
    assert (run(other, masa.ControlNet(path, target=picture(0))) - ref).abs().max() / ref.std() > 10 * ROUNDING


def test_differences_need_the_base_models_weights(tiny, tiny_folder, nets, tmp_path):
    path = save(tmp_path / "net.safetensors", nets[0].state_dict() | {"difference": torch.zeros(1)})
    with pytest.raises(masa.MasaError, match=r"holds differences .* offloaded on a CPU does not keep"):
        run(masa.load(tiny_folder, dtype="fp32", offload=True), masa.ControlNet(path, target=picture(0)))


# ------------------------------------------------------------------------------------------------- equal to diffusers


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("case", ["targets' own", "source the same", "one without", "two", "window"])
def test_trajectories_equal_the_published_loop(tiny, tiny_folder, nets, files, generator, case, guidance):
    a, b, c = picture(0), picture(1), picture(2)
    each = {"source the same": [a, a, a], "one without": [None, a, None]}.get(case, [None, a, b])
    (start, end), steps = ((0.25, 0.75), range(1, 3)) if case == "window" else ((0.0, 1.0), range(STEPS))
    terms = [(nets[0], each, 0.8, steps)]
    controls = [masa.ControlNet(files[0], each[0], each[1:], 0.8, start, end)]
    if case == "two":
        terms.append((nets[1], [None, c, c], 0.5, range(STEPS)))
        controls.append(masa.ControlNet(files[1], target=c, scale=0.5))
    noise = torch.randn(3, 4, 16, 24, generator=generator)
    halves = 2 if guidance > 1 else 1
    oracle = SteeredOracle(tiny_folder, tiny.tokenizer, STEPS)
    oracle.residuals = controlnet_residuals(terms, halves)
    steering = MutualAttention(range(1, STEPS), range(8, 16), halves=halves)
    ref = oracle.sample([SOURCE, *TARGETS], noise, STEPS, guidance, steering)[-1]
    masactrl = masa.MasaCtrl(1, 8)
    same(run(tiny, [masactrl, *controls], latents=noise, guidance_scale=guidance), ref)
    differs(run(tiny, masactrl, latents=noise, guidance_scale=guidance)[1], ref[1])


def test_guess_mode_steers_the_prompted_half_and_the_deep_most(tiny, nets, files, generator):
    from masa.branches import Branches
    from masa.checks import describe_run
    from masa.samplers.base import Levels

    control = masa.ControlNet(files[0], target=picture(0), scale=0.7, guess_mode=True)
    active = control.begin(describe_run(tiny, Levels.of_schedule(tiny.schedule, STEPS), (SOURCE, "a dog"), (16, 24)))
    x, context = torch.randn(4, 4, 16, 24, generator=generator), torch.randn(4, 77, 32, generator=generator)
    branches = Branches.build(1, guided=True)
    with torch.no_grad():
        found = active.residuals(0, 300, x, context, branches)
        down, mid = nets[0](x[3:], 300, context[3:], picture(0)[None], return_dict=False)
    for j, (out, ref) in enumerate(zip((*found.skips, found.mid), (*down, mid), strict=True)):
        assert not out[:3].any()  # only the target's prompted half
        assert (out[3:] - 0.7 * 0.825 ** (12 - j) * ref).abs().max() / ref.abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.fixture(scope="module")
def steered(files):
    """MasaCtrl beside a ControlNet: the targets' own hints, the source's another."""
    return [masa.MasaCtrl(1, 8), masa.ControlNet(files[0], picture(2), [picture(0), picture(1)])]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_target_alone_is_the_same_among_others(tiny, steered, guidance, guess_mode):
    controls = [steered[0], replace(steered[1], guess_mode=guess_mode)]
    together = run(tiny, controls, guidance_scale=guidance)
    same(run(tiny, controls, guidance_scale=guidance, targets_at_once=1), together, ROUNDING)
    alone = [controls[0], replace(controls[1], target=picture(1))]
    same(run(tiny, alone, TARGETS[1], guidance_scale=guidance), together[[0, 2]], ROUNDING)


def test_scale_zero_is_absent_and_two_halves_are_a_whole(tiny, files):
    absent = run(tiny, [])
    assert torch.equal(run(tiny, masa.ControlNet(files[0], target=picture(0), scale=0.0)), absent)
    whole = run(tiny, masa.ControlNet(files[0], target=picture(0)))
    differs(whole[1:], absent[1:])
    assert torch.equal(whole[:1], absent[:1])  # a source without a hint
    half = masa.ControlNet(files[0], target=picture(0), scale=0.5)
    same(run(tiny, [half, half]), whole)
    for other in (half, masa.ControlNet(files[0], target=picture(0), guess_mode=True)):
        differs(run(tiny, other)[1:], whole[1:])


@pytest.mark.parametrize(
    ("start", "end", "active"),
    [(0.0, 1.0, [0, 1, 2, 3]), (0.25, 1.0, [1, 2, 3]), (0.3, 1.0, [2, 3]), (0.0, 0.5, [0, 1]), (0.0, 0.6, [0, 1])],
)
def test_start_and_end_choose_the_steps(tiny, files, start, end, active):
    assert seen_steps(tiny, masa.ControlNet(files[0], target=picture(0), start=start, end=end)) == active


def test_it_adds_up_with_an_adapter(tiny, tmp_path, files):
    adapter = masa.T2IAdapter(save(tmp_path / "a.safetensors", make_adapter("full").state_dict()), target=picture(1))
    net = masa.ControlNet(files[0], target=picture(0))
    both = run(tiny, [net, adapter])
    same(run(tiny, [adapter, net]), both)
    for one in (net, adapter):
        differs(run(tiny, one)[1:], both[1:])


def test_it_serves_a_source_without_targets(tiny, files):
    differs(run(tiny, masa.ControlNet(files[0], source=picture(0)), []), run(tiny, [], []))
    with pytest.raises(masa.MasaError, match="ControlNet acts on targets, and there are none"):
        run(tiny, masa.ControlNet(files[0], target=picture(0)), [])


def test_a_source_of_one_prompt_keeps_two_halves_where_they_differ(tiny, files):
    """In guess mode the unprompted half has no hint: a source whose prompts are equal is not one row."""
    guess = masa.ControlNet(files[0], source=picture(0), guess_mode=True)
    usual = USUAL | {"seed": 3}
    merged = masa.sample(tiny, "", [], controls=replace(guess, guess_mode=False), **usual).latents
    unguided = masa.sample(tiny, "", [], controls=guess, **(usual | {"guidance_scale": 1.0})).latents
    apart = masa.sample(tiny, "", [], controls=guess, **usual).latents
    differs(apart, unguided)  # guidance has two different halves
    differs(apart, merged)


def test_a_pinned_source_and_a_source_cache_serve(tiny, files, steered):
    image = torch.rand(3, 128, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1
    trajectory = masa.invert(tiny, image, SOURCE, controls=steered[1], steps=STEPS, progress=False)
    pinned = run(tiny, steered, trajectory=trajectory)
    same(run(tiny, steered, trajectory=trajectory, targets_at_once=1), pinned, ROUNDING)
    usual = {k: v for k, v in USUAL.items() if k not in ("height", "width")}
    for guess_mode in (False, True):
        controls = [steered[0], replace(steered[1], guess_mode=guess_mode)]
        trajectory = masa.invert(tiny, image, SOURCE, controls=controls[1], steps=STEPS, progress=False)
        cache = masa.record(tiny, "", controls=controls, trajectory=trajectory, **usual)
        ref = run(tiny, controls, trajectory=trajectory)
        out = masa.sample(tiny, target=TARGETS, cache=cache, controls=controls, progress=False).latents
        same(out[1:], ref[1:], ROUNDING)
        other = [controls[0], replace(controls[1], source=picture(7))]
        with pytest.raises(masa.MasaError, match="ControlNet changes what the source is"):
            masa.sample(tiny, target=TARGETS, cache=cache, controls=other, progress=False)
    trajectory = masa.invert(tiny, image, SOURCE, steps=STEPS, progress=False)
    plain = masa.record(tiny, SOURCE, controls=steered[0], trajectory=trajectory, **usual)
    free = [steered[0], replace(steered[1], source=None)]
    out = masa.sample(tiny, target=TARGETS, cache=plain, controls=free, progress=False).latents
    same(out[1:], run(tiny, free, trajectory=trajectory)[1:], ROUNDING)


def test_a_compiled_model_serves(tiny, steered):
    sd = replace(tiny, unet=CompiledUNet(tiny.unet, "eager", None))
    same(run(sd, steered), run(tiny, steered), ROUNDING)


def test_hints_are_encoded_once_and_rows_without_one_left_out(tiny, files, monkeypatch):
    calls, rows = [], []
    encode, forward = ControlNetwork.encode, ControlNetwork.forward
    monkeypatch.setattr(ControlNetwork, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))

    def counted(self, x, timestep, context, hint, backend="auto"):
        rows.append(len(x))
        return forward(self, x, timestep, context, hint, backend)

    monkeypatch.setattr(ControlNetwork, "forward", counted)
    run(tiny, masa.ControlNet(files[0], target=[picture(0), None]))
    assert calls == [1]
    assert rows == [2] * STEPS


def test_bad_values_are_refused(files):
    for settings, message in (
        ({"scale": "1"}, "scale is '1'"),
        ({"start": 1.5}, "start is 1.5; expected a number from 0 to 1"),
        ({"end": -1}, "end is -1; expected a number from 0 to 1"),
        ({"start": 0.5, "end": 0.5}, "expected start below end"),
        ({"guess_mode": 1}, "guess_mode is 1; expected True or False"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            masa.ControlNet(files[0], target=picture(0), **settings)


def test_names_tell_which_hints_are_lines(tiny, nets, tmp_path):
    path = save(tmp_path / "control_v11p_sd15_canny.safetensors", nets[0].state_dict())
    with pytest.warns(UserWarning, match="looks like a photograph"):
        run(tiny, masa.ControlNet(path, target=torch.rand(3, 128, 192)), TARGETS[0])


def test_a_run_is_repeated_from_its_picture(tiny, nets, tmp_path):
    nets[0].save_pretrained(tmp_path / "net")
    controls = masa.ControlNet(tmp_path / "net", picture(2), [None, picture(1)], 0.7, 0.25, 0.9, True)
    out = masa.sample(tiny, SOURCE, TARGETS, controls=controls, seed=3, **USUAL)
    out.save(tmp_path / "out")
    shown = tmp_path / "out" / "source.png"
    assert torch.equal(masa.rerun(shown, tiny, progress=False).latents, out.latents)
    changed = copy.deepcopy(nets[0])
    with torch.no_grad():
        changed.conv_in.bias += 1.0
    changed.save_pretrained(tmp_path / "net")
    with pytest.raises(masa.MasaError, match=r"net has changed since"):
        masa.rerun(shown, tiny, progress=False)
