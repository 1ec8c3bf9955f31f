"""LoRA: every layout merged as diffusers, peft and the published scripts do, taken off to the bit, and repeated."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fake_checkpoints import key_list, write_sparse
from safetensors.torch import save_file
from transformers import CLIPTextModel

import masa
from masa.cli import main
from masa.cli.arguments import parse_lora
from masa.config import ModelConfig
from masa.output.result import Picture
from masa.runtime.lora import Lora, as_loras, open_loras
from masa.runtime.networks import meta_models

# Float32 sums of a few products, in another order.
ROUNDING = 2e-6
RANK, ALPHA = 3, 1.5
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SETTINGS = {"steps": 2, "height": 64, "width": 64, "progress": False, "controls": masa.MasaCtrl(1)}


def layers(folder, convolutions=False):
    """diffusers' and transformers' own names of what a LoRA changes, and the shapes of the weights."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    found = {}
    for name, module in unet.named_modules():
        attention = ".attn" in name and name.endswith(ATTENTION)
        other = ".resnets." in name or "samplers." in name or ".ff." in name or ".proj_" in name
        if hasattr(module, "weight") and module.weight.dim() >= 2 and (attention or (convolutions and other)):
            found["unet", name] = tuple(module.weight.shape)
    for name, module in text.named_modules():
        if name.endswith("_proj"):
            found["text_encoder", name.removeprefix("text_model.")] = tuple(module.weight.shape)
    return found


def factors(shapes, rank=RANK, seed=0, size=0.3):
    """Random (down, up) of each layer."""
    g = torch.Generator().manual_seed(seed)

    def pair(out, inner, *kernel):
        up = (out, rank, 1, 1) if kernel else (out, rank)
        return size * torch.randn((rank, inner, *kernel), generator=g), size * torch.randn(up, generator=g)

    return {layer: pair(*shape) for layer, shape in shapes.items()}


def kohya(pairs, alpha=ALPHA):
    state = {}
    for (part, name), (down, up) in pairs.items():
        stem = ("lora_unet_" if part == "unet" else "lora_te_text_model_") + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    return state


def diffusers1(pairs, prefix=""):
    state = {}
    for (part, name), (down, up) in pairs.items():
        if part == "unet":
            block, _, kind = name.removesuffix(".0").rpartition(".")
            stem = f"{prefix}{block}.processor.{kind}_lora"
        else:
            old = name.replace("out_proj", "to_out").replace("_proj", "").replace("self_attn.", "self_attn.to_")
            stem = f"text_encoder.text_model.{old.replace('to_to_', 'to_')}_lora"
        state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return state


def dotted(pairs, unet, text, down, up):
    state = {}
    for (part, name), (a, b) in pairs.items():
        stem = (unet if part == "unet" else text) + name
        state |= {f"{stem}.{down[part == 'text_encoder']}": a, f"{stem}.{up[part == 'text_encoder']}": b}
    return state


def diffusers2(pairs):
    down, up = (tuple(f"{kind}.{way}.weight" for kind in ("lora", "lora_linear_layer")) for way in ("down", "up"))
    return dotted(pairs, "unet.", "text_encoder.text_model.", down, up)


def diffusers3(pairs):
    return dotted(pairs, "unet.", "text_encoder.text_model.", ("lora_A.weight",) * 2, ("lora_B.weight",) * 2)


def numbered(folder, pairs, geglu=False, last=True):
    """cloneofsimo's numbers, by its own search through the modules: ancestors of a class, linear layers in them."""
    state, classes = {}, {"unet": ["CrossAttention", "Attention"], "text_encoder": ["CLIPAttention"]}
    classes["unet"] += ["GEGLU"] * geglu
    networks = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }
    for part, network in networks.items():
        found = []
        for outer, module in network.named_modules():
            if type(module).__name__ in classes[part]:
                inside = [n for n, inner in module.named_modules() if isinstance(inner, torch.nn.Linear)]
                found += [f"{outer}.{name}".removeprefix("text_model.") for name in inside]
        if geglu and not last and part == "unet":  # as diffusers registered them in early 2023: attn1, ff, attn2
            blocks = [found[i : i + 9] for i in range(0, len(found), 9)]
            found = [name for block in blocks for name in (*block[:4], block[8], *block[4:8])]
        for k, name in enumerate(found):
            down, up = pairs[part, name]
            state |= {f"{part}:{k}:down": down, f"{part}:{k}:up": up}
    return state, {part: json.dumps(names) for part, names in classes.items()}


def save(path, state, metadata=None):
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return path


def weights(unet, text):
    """All weights by part and name."""
    state = {f"unet.{name}": weight for name, weight in unet.state_dict().items()}
    return state | {
        f"text.{name.removeprefix('text_model.')}": weight
        for name, weight in text.state_dict().items()
        if "position_ids" not in name
    }


def ours(sd):
    return weights(sd.unet, sd.text_encoder.model)


def by_hand(sd, pairs, scale):
    """The weights with `scale * up @ down` added, written out."""
    state = {name: weight.clone() for name, weight in ours(sd).items()}
    for (part, name), (down, up) in pairs.items():
        key = f"{'unet' if part == 'unet' else 'text'}.{name}.weight"
        change = torch.einsum("or,r...->o...", up.flatten(1), down).reshape(state[key].shape)
        state[key] = state[key] + scale * change
    return state


def fused(folder, path, state=None, scale=1.0):
    """The weights as diffusers loads and fuses a file."""
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(path) if state is None else state)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return weights(pipeline.unet, pipeline.text_encoder)


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=ROUNDING, atol=ROUNDING), name


def changed(found, base):
    return {name for name, weight in base.items() if not torch.equal(found[name], weight)}


@pytest.fixture(scope="module")
def pairs(tiny_folder):
    return factors(layers(tiny_folder))


@pytest.fixture(scope="module")
def path(pairs, tmp_path_factory):
    return save(tmp_path_factory.mktemp("lora") / "kohya.safetensors", kohya(pairs))


LAYOUTS = {
    "kohya": (kohya, False),
    "kohya without alpha": (lambda pairs: kohya(pairs, None), False),
    "LoCon": (kohya, True),
    "diffusers 1": (lambda pairs: diffusers1(pairs, "unet."), False),
    "diffusers 2": (diffusers2, False),
    "diffusers 3": (diffusers3, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_diffusers(tiny, tiny_folder, tmp_path, layout):
    make, convolutions = LAYOUTS[layout]
    pairs = factors(layers(tiny_folder, convolutions))
    if layout == "diffusers 1":  # diffusers reads no text encoder in it any more
        pairs = {layer: pair for layer, pair in pairs.items() if layer[0] == "unet"}
    file = save(tmp_path / "lora.safetensors", make(pairs))
    found, expected = ours(tiny.with_lora(file, 0.7)), fused(tiny_folder, file, scale=0.7)
    agree(found, expected)
    assert len(changed(found, ours(tiny))) == len(pairs)
    scale = 0.7 * (ALPHA / RANK if make is kohya else 1)
    agree(found, by_hand(tiny, pairs, scale))


def test_the_first_layout_of_diffusers_as_it_was_written(tiny, pairs, tmp_path):
    """Without a prefix, which diffusers silently applies nothing of; and with a text encoder."""
    file = save(tmp_path / "lora.safetensors", diffusers1(pairs))
    agree(ours(tiny.with_lora(file)), by_hand(tiny, pairs, 1.0))


@pytest.mark.parametrize(("rslora", "scale"), [(False, ALPHA / RANK), (True, ALPHA / RANK**0.5)])
def test_diffusers_metadata_tell_alpha(tiny, tiny_folder, pairs, tmp_path, rslora, scale):
    told = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": rslora, "lora_dropout": 0.0}
    told |= {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "bias": "none"}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in told.items()})}
    unet = {layer: pair for layer, pair in pairs.items() if layer[0] == "unet"}
    file = save(tmp_path / "lora.safetensors", diffusers3(unet), metadata)
    found = ours(tiny.with_lora(file))
    agree(found, fused(tiny_folder, file))
    agree(found, by_hand(tiny, unet, scale))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_folders_equal_peft(tiny, tiny_folder, tmp_path, part, rslora):
    from peft import LoraConfig, get_peft_model

    if part == "unet":
        network, names = (
            UNet2DConditionModel.from_pretrained(tiny_folder / "unet"),
            ["to_q", "to_v", "to_out.0", "conv1"],
        )
    else:
        network, names = CLIPTextModel.from_pretrained(tiny_folder / "text_encoder"), ["q_proj", "v_proj", "fc1"]
    ranks, alphas = {names[0]: 2}, {names[1]: 5}
    settings = LoraConfig(
        r=RANK, lora_alpha=2, target_modules=names, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(network, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "lora")
    merged = wrapped.merge_and_unload()
    expected = ours(tiny) | {
        f"{'unet' if part == 'unet' else 'text'}.{name.removeprefix('text_model.')}": weight
        for name, weight in merged.state_dict().items()
        if "position_ids" not in name
    }
    for given in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        agree(ours(tiny.with_lora(given)), expected)
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="alpha is taken to be its rank"):
        tiny.with_lora(tmp_path / "lora")


@pytest.mark.parametrize(("geglu", "last"), [(False, True), (True, True), (True, False)])
def test_numbered_layers_are_found_as_they_were_numbered(tiny, tiny_folder, tmp_path, geglu, last):
    shapes = {
        layer: shape
        for layer, shape in layers(tiny_folder, convolutions=True).items()
        if layer[0] != "unet" or layer[1].endswith((*ATTENTION, *["net.0.proj"] * geglu))
    }
    pairs = factors(shapes)
    state, metadata = numbered(tiny_folder, pairs, geglu, last)
    assert len(state) == 2 * len(pairs)
    file = save(tmp_path / "lora.safetensors", state, metadata)
    agree(ours(tiny.with_lora(file)), by_hand(tiny, pairs, 1.0))


def test_embeddings_beside_numbered_layers_are_named(tiny, tiny_folder, pairs, tmp_path):
    state, metadata = numbered(tiny_folder, pairs)
    file = save(tmp_path / "lora.safetensors", state | {"<s1>": torch.zeros(32)}, metadata | {"<s1>": "<embed>"})
    with pytest.warns(UserWarning, match=r"embeddings of words \(<s1>\), which are not loaded"):
        agree(ours(tiny.with_lora(file)), by_hand(tiny, pairs, 1.0))


def test_a_tucker_core_lies_between(tiny, tmp_path):
    g = torch.Generator().manual_seed(0)
    shapes = {"lora_up": (32, 2, 1, 1), "lora_mid": (2, 3, 3, 3), "lora_down": (3, 32, 1, 1)}
    up, mid, down = (torch.randn(shape, generator=g) for shape in shapes.values())
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    state = {f"{stem}.{kind}.weight": value for kind, value in zip(shapes, (up, mid, down), strict=True)}
    found = tiny.with_lora(save(tmp_path / "lora.safetensors", state | {f"{stem}.alpha": torch.tensor(1.0)}))
    name = "unet.down_blocks.0.resnets.0.conv1.weight"
    expected = ours(tiny)[name].clone()
    for a in range(2):
        for b in range(3):
            outer = up[:, a, 0, 0, None] * down[None, b, :, 0, 0]
            expected += outer[:, :, None, None] * mid[a, b] / 3
    agree({name: ours(found)[name]}, {name: expected})


@pytest.mark.parametrize("alpha", [0.0, None, float(RANK)])
def test_an_alpha_of_nought_or_none_is_the_rank(tiny, pairs, tmp_path, alpha):
    agree(ours(tiny.with_lora(save(tmp_path / "l.safetensors", kohya(pairs, alpha)))), by_hand(tiny, pairs, 1.0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_an_alpha_may_be_a_whole_number(tiny, pairs, tmp_path, dtype):
    state = kohya(pairs, 2.0)
    whole = {key: value.to(dtype) if key.endswith(".alpha") else value for key, value in state.items()}
    agree(ours(tiny.with_lora(save(tmp_path / "l.safetensors", whole))), by_hand(tiny, pairs, 2.0 / RANK))
    factor = {key: value.to(dtype) if key.endswith("lora_down.weight") else value for key, value in state.items()}
    with pytest.raises(masa.CheckpointError, match=r"lora_down\.weight is [IU]\d+"):
        tiny.with_lora(save(tmp_path / "whole.safetensors", factor))


def test_weights_scale_each_part(tiny, pairs, path):
    unet, text = ({k: v for k, v in pairs.items() if (k[0] == "unet") == own} for own in (True, False))
    agree(ours(tiny.with_lora(path, -2)), by_hand(tiny, pairs, -2 * ALPHA / RANK))
    apart = tiny.with_lora(path, (0.5, 0))
    agree(ours(apart), by_hand(tiny, unet, 0.5 * ALPHA / RANK))
    assert apart.text_encoder is tiny.text_encoder
    apart = tiny.with_lora(path, (0, 0.5))
    agree(ours(apart), by_hand(tiny, text, 0.5 * ALPHA / RANK))
    assert apart.unet is tiny.unet


def test_several_are_summed_and_rounded_once(tiny_folder, pairs, path, tmp_path):
    sd = masa.load(tiny_folder, device="cpu", dtype="bf16")
    other = factors(layers(tiny_folder), seed=1)
    second = save(tmp_path / "second.safetensors", diffusers2(other))
    both = sd.with_lora(path, 0.5).with_lora(second, (0.25, 1))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    (a, b), (c, d) = pairs["unet", name], other["unet", name]
    weight = sd.unet.get_submodule(name).weight
    exact = weight.float() + 0.5 * ALPHA / RANK * (b @ a) + 0.25 * (d @ c)
    assert torch.equal(both.unet.get_submodule(name).weight, exact.bfloat16())
    twice = ((weight.float() + 0.5 * ALPHA / RANK * (b @ a)).bfloat16().float() + 0.25 * (d @ c)).bfloat16()
    assert not torch.equal(exact.bfloat16(), twice)
    again = masa.load(tiny_folder, device="cpu", dtype="bf16", lora=[(path, 0.5), (second, (0.25, 1))])
    assert not changed(ours(again), ours(both))
    assert again.fingerprint == both.fingerprint
    assert again.origin == both.origin
    assert again.unet.conv_in.weight.dtype == torch.bfloat16


def test_what_is_unchanged_is_shared_and_the_first_model_stays(tiny, tiny_folder, path, tmp_path):
    before = {name: weight.clone() for name, weight in ours(tiny).items()}
    merged = tiny.with_lora(path).with_lora(path, 0.3)
    assert merged.vae is tiny.vae
    assert merged.unet.conv_in.weight is tiny.unet.conv_in.weight
    named = "down_blocks.0.resnets.0.conv1"
    assert merged.unet.get_submodule(named).weight.data_ptr() == tiny.unet.get_submodule(named).weight.data_ptr()
    locon = save(tmp_path / "locon.safetensors", kohya(factors(layers(tiny_folder, convolutions=True))))
    for name, weight in ours(tiny.with_lora(locon)).items():
        assert weight.stride() == before[name].stride(), name  # as fast as it was
    assert not changed(ours(tiny), before)
    assert merged.without_lora() is tiny
    assert tiny.without_lora() is tiny
    assert not any(weight.requires_grad for weight in merged.unet.parameters())


def test_the_first_model_s_bits_come_back_after_loading(tiny_folder, path):
    for dtype in ("fp32", "bf16"):
        plain = masa.load(tiny_folder, device="cpu", dtype=dtype)
        back = masa.load(tiny_folder, device="cpu", dtype=dtype, lora=path).without_lora()
        assert not changed(ours(back), ours(plain))
        assert back.fingerprint == plain.fingerprint
        assert back.origin == plain.origin


def test_a_weight_of_nought_leaves_the_very_bits(tiny, path):
    idle = tiny.with_lora(path, 0)
    assert idle.unet is tiny.unet
    assert idle.fingerprint == tiny.fingerprint


def test_the_fingerprint_tells_files_and_weights_apart(tiny, pairs, path, tmp_path):
    faint = save(tmp_path / "faint.safetensors", kohya({k: (d, 1e-12 * u) for k, (d, u) in pairs.items()}))
    prints = {tiny.fingerprint, tiny.with_lora(faint).fingerprint}
    prints |= {tiny.with_lora(path, weight).fingerprint for weight in (1, 0.5, (1, 0.5), (0.5, 1))}
    assert len(prints) == 6


def test_it_changes_pictures_and_a_cache_of_the_first_model_is_refused(tiny, path):
    merged = tiny.with_lora(path, 0.5)
    first, second = (masa.sample(sd, "a cat", "a dog", seed=0, **SETTINGS) for sd in (tiny, merged))
    assert not torch.equal(first.latents, second.latents)
    assert torch.equal(masa.sample(merged.without_lora(), "a cat", "a dog", seed=0, **SETTINGS).latents, first.latents)
    cache = masa.record(tiny, "a cat", seed=0, **SETTINGS)
    with pytest.raises(masa.MasaError, match="cache was recorded with"):
        masa.sample(merged, target="a dog", cache=cache, progress=False)


def test_what_load_takes():
    assert as_loras(None) == ()
    assert as_loras("a") == (Lora("a"),)
    assert as_loras(("a", 0.5)) == as_loras([("a", 0.5)]) == (Lora("a", 0.5),)
    assert as_loras(("a", (1, 0.5))) == (Lora("a", (1, 0.5)),)
    assert as_loras(["a", ("b", 2)]) == as_loras(("a", ("b", 2))) == (Lora("a"), Lora("b", 2))
    assert as_loras(("a", "b")) == (Lora("a"), Lora("b"))
    for wrong in (3, [("a", 1, 2)], {"a": 1}, [1.0]):
        with pytest.raises(masa.MasaError, match="expected a path"):
            as_loras(wrong)
    for wrong in (float("nan"), True, [("a", "1")], (1, float("inf"))):
        with pytest.raises(masa.MasaError, match="LoRA's weight is"):
            as_loras(wrong if isinstance(wrong, list) else ("a", wrong))


# ------------------------------------------------------------------------------------------------ refusals


STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED = {
    "DoRA": ({f"{STEM}.dora_scale": (32, 1)}, "is a DoRA"),
    "peft's DoRA": ({"unet.x.lora_magnitude_vector": (32,)}, "is a DoRA"),
    "LoHa": ({f"{STEM}.hada_w1_a": (32, 2)}, "is a LoHa"),
    "LoKr": ({f"{STEM}.lokr_w1": (4, 4)}, "is a LoKr"),
    "OFT": ({f"{STEM}.oft_blocks": (4, 4, 4)}, "is an OFT"),
    "IA3": ({f"{STEM}.on_input": ()}, "is an IA3"),
    "GLoRA": ({f"{STEM}.a1.weight": (4, 4)}, "is a GLoRA"),
    "differences": ({f"{STEM}.diff": (32, 32)}, "whole differences"),
    "norms": ({f"{STEM}.w_norm": (32,)}, "whole differences"),
    "SDXL": ({"lora_te1_text_model_x.lora_up.weight": (4, 4)}, "for SDXL"),
    "diffusion transformer": ({"transformer.x.lora_A.weight": (4, 4)}, "diffusion transformer"),
    "Flux": ({"lora_unet_double_blocks_0.lora_up.weight": (4, 4)}, "diffusion transformer"),
    "full LCM": ({"unet.time_embedding.cond_proj.lora_A.weight": (4, 4)}, "whole LCM"),
    "SD 2": ({f"{STEM}.lora_up.weight".replace("1_to_q", "2_to_k"): (32, 2),
              f"{STEM}.lora_down.weight".replace("1_to_q", "2_to_k"): (2, 1024)}, "Stable Diffusion 2"),
    "ControlNet": ({"control_model.x": (4,)}, "is a ControlNet"),
    "embedding": ({"emb_params": (1, 32)}, "textual-inversion"),
    "whole model": ({"model.diffusion_model.x": (4,)}, "is a whole model"),
    "nothing": ({}, "holds no LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_by_name(tiny, tmp_path, kind):
    shapes, message = REFUSED[kind]
    file = save(tmp_path / "other.safetensors", {key: torch.zeros(shape) for key, shape in shapes.items()})
    with pytest.raises(masa.CheckpointError, match=message):
        tiny.with_lora(file)


def test_all_that_does_not_fit_is_listed_at_once(tiny, tiny_folder, pairs, tmp_path):
    state = kohya(pairs)
    alone = f"{STEM}.lora_up.weight"
    del state[alone]
    state["lora_unet_down_blocks_9_resnets_0_conv1.lora_up.weight"] = torch.zeros(4, 4)
    state["something.else"] = torch.zeros(1)
    long = STEM.replace("to_q", "to_v") + ".lora_down.weight"
    state[long] = torch.zeros(RANK, 33)
    flat = STEM.replace("to_q", "to_k")
    state[f"{flat}.lora_down.weight"] = state[f"{flat}.lora_down.weight"].to(torch.int64)
    file = save(tmp_path / "bad.safetensors", state)
    for attempt in (lambda: tiny.with_lora(file), lambda: masa.load(tiny_folder, device="cpu", lora=file)):
        with pytest.raises(masa.CheckpointError) as caught:
            attempt()
        for part in (f"{STEM}.lora_down.weight has no up", "blocks_9_resnets_0_conv1.lora_up.weight is of no layer",
                     "something.else is of no layer", f"{long} is [3, 33], for a weight [32, 32]", "I64"):  # fmt: skip
            assert part in str(caught.value)


def test_one_layer_named_twice_is_refused(tiny, pairs, tmp_path):
    state = kohya(pairs) | {key: value.clone() for key, value in diffusers2(pairs).items()}
    with pytest.raises(masa.CheckpointError, match=r"unet\..* names a layer that lora_unet_.* names too"):
        tiny.with_lora(save(tmp_path / "twice.safetensors", state))


def test_numbers_of_other_layers_are_refused(tiny, tiny_folder, pairs, tmp_path):
    state, metadata = numbered(tiny_folder, pairs)
    file = save(tmp_path / "more.safetensors", state, metadata | {"unet": '["Attention", "ResnetBlock2D"]'})
    with pytest.raises(masa.CheckpointError, match="together with those of ResnetBlock2D"):
        tiny.with_lora(file)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [("unet", "{", "no JSON"), ("unet", "{}", "a list"), ("lora_adapter_metadata", "3", "a dict")],
)
def test_metadata_that_say_nothing_are_refused(tiny, tiny_folder, pairs, tmp_path, key, text, message):
    state, _ = numbered(tiny_folder, pairs)
    with pytest.raises(masa.CheckpointError, match=message):
        tiny.with_lora(save(tmp_path / "odd.safetensors", state, {key: text}))


def test_values_that_are_not_finite_are_refused(tiny, tiny_folder, pairs, tmp_path):
    broken = {layer: (down, up * float("nan")) for layer, (down, up) in pairs.items()}
    with pytest.raises(masa.CheckpointError, match="not finite"):
        tiny.with_lora(save(tmp_path / "nan.safetensors", kohya(broken)))
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(masa.CheckpointError, match=rf"\.alpha is {alpha}, and should be a number"):
            tiny.with_lora(save(tmp_path / "alpha.safetensors", kohya(pairs, alpha)))
    with warnings.catch_warnings(action="ignore"):  # float16 is emulated
        half = masa.load(tiny_folder, device="cpu", dtype="fp16")
    with pytest.raises(masa.CheckpointError, match=r"not finite in torch\.float16"):
        half.with_lora(save(tmp_path / "large.safetensors", kohya(pairs)), 1e6)


def test_peft_settings_that_mean_more_are_refused(tiny, pairs, tmp_path):
    state = dotted(pairs, "base_model.model.", "base_model.model.", ("lora_A.weight",) * 2, ("lora_B.weight",) * 2)
    save(tmp_path / "adapter_model.safetensors", state)
    for key, value in {"use_dora": True, "peft_type": "LOHA", "bias": "all", "init_lora_weights": "pissa"}.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(masa.CheckpointError, match=f"has {key} = {value!r}"):
            tiny.with_lora(tmp_path)


def test_paths_that_hold_no_lora(tiny, path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA at nowhere"):
        tiny.with_lora("nowhere")
    with pytest.raises(masa.CheckpointError, match=r"should hold one LoRA's .safetensors file, and holds none"):
        tiny.with_lora(tmp_path)
    shutil.copy(path, tmp_path / "a.safetensors")
    assert tiny.with_lora(tmp_path).fingerprint == tiny.with_lora(path).fingerprint
    shutil.copy(path, tmp_path / "b.safetensors")
    with pytest.raises(masa.CheckpointError, match=r"holds a.safetensors, b.safetensors"):
        tiny.with_lora(tmp_path)
    (tmp_path / "old.bin").write_bytes(b"PK\x03\x04" + bytes(80))
    with pytest.raises(masa.CheckpointError, match="pickled"):
        tiny.with_lora(tmp_path / "old.bin")


def test_models_that_cannot_take_one(tiny_folder, tiny, path):
    with pytest.raises(masa.MasaError, match="offload=True on a CPU"):
        masa.load(tiny_folder, device="cpu", lora=path, offload=True)
    with pytest.raises(masa.MasaError, match="offload=True on a CPU"):
        masa.load(tiny_folder, device="cpu", offload=True).with_lora(path)
    compiled = tiny.compile(compiler="eager")
    with pytest.raises(masa.MasaError, match="merge it first, then compile"):
        compiled.with_lora(path)
    merged = tiny.with_lora(path)
    context, x = torch.zeros(1, 77, 32), torch.randn(1, 4, 8, 8)
    same = [sd.unet(x, 500, context)[0] for sd in (merged, merged.compile(compiler="eager"))]
    assert torch.allclose(*same, atol=1e-5)  # another order of sums
    assert not torch.allclose(same[0], tiny.unet(x, 500, context)[0], atol=1e-5)


def test_real_key_lists_fit_the_real_shapes(tmp_path):
    unet, _, text = meta_models(ModelConfig())
    modules = {"kohya": 264, "diffusers_processor_style(<=0.20)": 128, "diffusers_lora_down_up_style(0.21-0.24)": 128}
    for style, keys in key_list("lora_sd15_rank4").items():
        file = write_sparse(tmp_path / "lora.safetensors", keys)
        assert len(open_loras([Lora(str(file))], unet, text)[0].changes) == modules.get(style, 176)


# ------------------------------------------------------------------------------------------------ again


def test_a_run_is_repeated_with_its_loras(tiny, tiny_folder, path, tmp_path, monkeypatch):
    (tmp_path / "work" / "files").mkdir(parents=True)
    shutil.copy(path, tmp_path / "work" / "files" / "a.safetensors")
    monkeypatch.chdir(tmp_path / "work")
    sd = tiny.with_lora("files/a.safetensors", (0.5, 0.25))
    first = masa.sample(sd, "a cat", "a dog", seed=1, **SETTINGS)
    assert first.settings["lora"][0]["path"] == "files/a.safetensors"
    first.save("out")
    monkeypatch.chdir(tmp_path)  # it is found near the picture
    picture = tmp_path / "work" / "out" / "target_0.png"
    again = masa.rerun(picture, progress=False)
    assert torch.equal(again.latents, first.latents)
    assert again.settings["fingerprint"] == first.settings["fingerprint"]
    moved = picture.with_name("moved.png")  # as from a GPU, where an offloaded model takes one
    Picture.of(first.targets[0], first.settings | {"offload": True}).save(moved)
    assert torch.equal(masa.rerun(moved, progress=False).latents, first.latents)
    file = tmp_path / "work" / "files" / "a.safetensors"
    save(file, {key: 2 * value for key, value in kohya(factors(layers(tiny_folder))).items()})
    with pytest.raises(masa.MasaError, match=r"LoRA .*a.safetensors has changed since it made"):
        masa.rerun(picture, progress=False)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(masa.MasaError, match=r"a.safetensors has changed since it was merged"):
        sd.with_lora(path)
    file.unlink()
    with pytest.raises(
        masa.MasaError, match=r"the LoRA files/a.safetensors, which .* was made with, is not there any more"
    ):
        masa.rerun(picture, progress=False)


def test_a_picture_inverted_without_is_inverted_without_again(tiny, path, tmp_path):
    masa.sample(tiny, "a cat", seed=1, **(SETTINGS | {"controls": []})).source.save(tmp_path / "real.png")
    trajectory = masa.invert(tiny, tmp_path / "real.png", steps=2, height=64, width=64, progress=False)
    edit = masa.sample(tiny.with_lora(path), target="a dog", trajectory=trajectory, seed=2, **SETTINGS)
    edit.save(tmp_path / "out")
    again = masa.rerun(tmp_path / "out" / "target_0.png", progress=False)
    assert torch.equal(again.latents, edit.latents)
    other = masa.invert(tiny.with_lora(path), tmp_path / "real.png", steps=2, height=64, width=64, progress=False)
    assert not torch.equal(other.latents, trajectory.latents)


def test_pictures_from_before_there_were_loras_run_again(tiny, tmp_path):
    first = masa.sample(tiny, "a cat", "a dog", seed=1, **SETTINGS)
    old = {key: value for key, value in first.settings.items() if key != "lora"}
    Picture.of(first.targets[0], old).save(tmp_path / "old.png")
    assert torch.equal(masa.rerun(tmp_path / "old.png", progress=False).latents, first.latents)


def test_the_command_line(tiny_folder, path, tmp_path, monkeypatch, capsys):
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert parse_lora("C:/a.safetensors:-1,0.5") == ("C:/a.safetensors", (-1.0, 0.5))
    assert parse_lora("C:/a.safetensors") == ("C:/a.safetensors", 1.0)
    monkeypatch.chdir(tmp_path)
    run = ["sample", "a cat", "a dog", "-c", str(tiny_folder), "--steps", "2", "--height", "64", "--width", "64", "-q"]
    run += ["--seed", "3", "--device", "cpu", "--dtype", "fp32", "--start-step", "1"]
    assert main([*run, "-o", "with", "--lora", f"{path}:0.5", "--lora", f"{path}:0.25"]) == 0
    assert main([*run, "-o", "without"]) == 0
    found = masa.Result.load("with")
    assert [told["weight"] for told in found.settings["lora"]] == [0.5, 0.25]
    assert not torch.equal(found.latents, masa.Result.load("without").latents)
    assert main(["rerun", "with/target_0.png", "-o", "again", "-q"]) == 0
    assert torch.equal(masa.Result.load("again").latents, found.latents)
    capsys.readouterr()
    assert main([*run, "-o", "no", "--lora", "gone.safetensors:2"]) == 2
    assert "no LoRA at gone.safetensors" in capsys.readouterr().err
