"""IP-Adapter: equal to diffusers' own, plain and plus, and what a control must be."""

from __future__ import annotations

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
    differs,
    picture,
    run,
    same,
    save,
)
from diffusers import UNet2DConditionModel
from fake_checkpoints import key_list, write_sparse
from PIL import Image
from published import Oracle

import masa
from masa.config import IPAdapterConfig, UNetConfig
from masa.controls.ip_adapter import for_clip
from masa.models.ip_adapter import IPAdapterNetwork
from masa.models.unet import UNet
from masa.runtime.adapters import in_file_order
from masa.runtime.compile import CompiledUNet
from masa.weights.adapters import open_ip_adapter

WIDTH = 48  # of the tiny encoder's embedding
PLAIN = IPAdapterConfig(WIDTH, 32, 4)
PLUS = IPAdapterConfig(WIDTH, 32, 16, True, 4, 768, 64)


def make_state(config, widths, seed=0):
    """Random tensors under the published files' names; keys and values large enough to matter."""
    torch.manual_seed(seed)
    net = IPAdapterNetwork(config, widths)
    for name, parameter in net.named_parameters():
        if name.endswith("_ip.weight"):
            torch.nn.init.normal_(parameter, std=3 * parameter.shape[-1] ** -0.5)
        elif name == "image_proj.latents":
            torch.nn.init.normal_(parameter)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return net.state_dict()


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ip")
    widths = [site.width for site in in_file_order(tiny.unet.sites)]
    states = {"plain": make_state(PLAIN, widths), "plus": make_state(PLUS, widths, 1)}
    return {name: save(folder / f"{name}.safetensors", state) for name, state in states.items()}, states


def embedding(seed, kind="plain"):
    shape = (1, WIDTH) if kind == "plain" else (2, 9, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class IPOracle(Oracle):
    """The published loop on diffusers' UNet with its own IP-Adapter loaded, a row at a time; a picture or None each."""

    def __init__(self, folder, ids, state, scale):
        super().__init__(folder, ids)
        self.plain = Oracle(folder, ids).unet
        parts = {
            part: {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(part)}
            for part in ("image_proj", "ip_adapter")
        }
        self.unet._load_ip_adapter_weights([parts])
        for processor in self.unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [scale]

    @torch.no_grad()
    def run(self, prompts, x, guidance, pictures):
        for t in self.timesteps(STEPS):
            rows = []
            for i, prompt in enumerate(prompts):
                halves = [("", 0), (prompt, 1)] if guidance > 1 else [(prompt, 1)]
                found = []
                for text, half in halves:
                    context = self.context([text])
                    if pictures[i] is None:
                        found.append(self.plain(x[i : i + 1], t, context).sample)
                        continue
                    shown = pictures[i][half : half + 1] if len(pictures[i]) == 2 else half * pictures[i]
                    embeds = [shown[:, None]]
                    kwargs = {"image_embeds": embeds}
                    found.append(self.unet(x[i : i + 1], t, context, added_cond_kwargs=kwargs).sample)
                rows.append(found[0] + guidance * (found[1] - found[0]) if guidance > 1 else found[0])
            e = torch.cat(rows)
            a, a_prev = self.alpha(t), self.alpha(t - 1000 // STEPS)
            x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * e
        return x


@pytest.mark.parametrize("kind", ["plain", "plus"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_trajectories_equal_diffusers(tiny, tiny_folder, files, generator, kind, guidance):
    noise = torch.randn(3, 4, 16, 24, generator=generator)
    each = [embedding(0, kind), embedding(1, kind), None]
    oracle = IPOracle(tiny_folder, tiny.tokenizer, files[1][kind], 0.7)
    ref = oracle.run([SOURCE, *TARGETS], noise, guidance, each)
    out = run(tiny, masa.IPAdapter(files[0][kind], each[0], each[1:], 0.7), latents=noise, guidance_scale=guidance)
    same(out, ref)
    plain = run(tiny, [], latents=noise, guidance_scale=guidance)
    differs(plain[:2], ref[:2])
    assert torch.equal(out[2], plain[2])


@pytest.mark.slow
@pytest.mark.parametrize("plus", [False, True])
def test_full_size_forward_equals_diffusers(tmp_path, generator, plus):
    """At SD v1.5's and the published files' widths one forward, to 1e-4 of the largest."""
    from masa.branches import Branches
    from masa.controls.base import Run

    config = IPAdapterConfig(1280, 768, 16, True) if plus else IPAdapterConfig()
    with torch.device("meta"):
        ours = UNet()
    widths = [site.width for site in in_file_order(ours.sites)]
    state = make_state(config, widths)
    path = save(tmp_path / "ip.safetensors", state)
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(cross_attention_dim=768).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    parts = {
        part: {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    theirs._load_ip_adapter_weights([parts])
    x, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 768, generator=generator)
    shown = torch.randn((2, 257, 1280) if plus else (1, 1024), generator=generator)
    run_of = Run(1, ours.sites, (SOURCE,), (16, 16), CPU, lambda *_: ())
    active = masa.IPAdapter(path, source=shown).begin(run_of)
    with torch.no_grad():
        ref = theirs(x, 300, context, added_cond_kwargs={"image_embeds": [shown[-1:][:, None]]}).sample
        out, _ = ours(x, 300, context, dict(active.edits(0, Branches.build(0, guided=False))))
    assert (out - ref).abs().max() / ref.abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["ip-adapter_sd15", "ip-adapter-plus_sd15"])
def test_published_key_lists_fit(tmp_path, kind):
    lists = key_list("ip_adapter_sd15")
    opened = open_ip_adapter(write_sparse(tmp_path / "ip.safetensors", lists[kind]))
    assert opened.config == (IPAdapterConfig(1280, 768, 16, True) if "plus" in kind else IPAdapterConfig())
    with torch.device("meta"):
        sites = in_file_order(UNet(UNetConfig()).sites)
        net = IPAdapterNetwork(opened.config, [site.width for site in sites])
    assert {name: list(t.shape) for name, t in net.state_dict().items()} == {k: s for k, (s, _) in lists[kind].items()}
    assert {str(2 * i + 1): site.name for i, site in enumerate(sites)} == lists["index_to_layer"]


def published():
    return dict(key_list("ip_adapter_sd15")["ip-adapter_sd15"])


def wider():
    return {k: ([s[0], 2048], d) if "_ip." in k else (s, d) for k, (s, d) in published().items()}


REFUSED = {
    "FaceID": (lambda: published() | {"ip_adapter.0.to_q_lora.down.weight": ([8, 8], "F16")}, "for faces"),
    "full face": (lambda: published() | {"image_proj.proj.3.weight": ([8], "F16")}, '"full face" IP-Adapter'),
    "SDXL": (wider, "IP-Adapter for an SDXL model"),
    "LoRA": (lambda: key_list("lora_sd15_rank4")[next(iter(key_list("lora_sd15_rank4")))], "is a LoRA"),
    "ControlNet": (lambda: key_list("controlnet_sd15")["diffusers"], "is a ControlNet"),
    "whole model": (lambda: key_list("sd15_ldm"), "is a whole model"),
    "nothing known": (lambda: {"weight": ([1], "F32")}, "holds no IP-Adapter"),
    "another UNet": (published, "makes tokens of 768 features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(tiny, tmp_path, name):
    keys, message = REFUSED[name]
    path = write_sparse(tmp_path / "file.safetensors", keys())
    with pytest.raises(masa.CheckpointError, match=message):
        run(tiny, masa.IPAdapter(path, target=embedding(0)))


def test_a_missing_key_is_named(tiny, files, tmp_path):
    for kind, lacking in (("plain", "ip_adapter.7.to_v_ip.weight"), ("plus", "image_proj.layers.2.0.to_kv.weight")):
        some = {key: tensor for key, tensor in files[1][kind].items() if key != lacking}
        with pytest.raises(masa.CheckpointError, match=f"IP-Adapter for Stable .* 1 missing: {lacking}"):
            run(tiny, masa.IPAdapter(save(tmp_path / "some.safetensors", some), target=embedding(0, kind)))


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.fixture(scope="module")
def prompted(files):
    return [masa.MasaCtrl(1, 8), masa.IPAdapter(files[0]["plain"], embedding(2), [embedding(0), embedding(1)])]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_target_alone_is_the_same_among_others(tiny, prompted, guidance):
    together = run(tiny, prompted, guidance_scale=guidance)
    same(run(tiny, prompted, guidance_scale=guidance, targets_at_once=1), together, ROUNDING)
    alone = [prompted[0], replace(prompted[1], target=embedding(1))]
    same(run(tiny, alone, TARGETS[1], guidance_scale=guidance), together[[0, 2]], ROUNDING)


def test_scale_zero_is_absent_and_two_halves_are_a_whole(tiny, files):
    absent = run(tiny, [])
    one = masa.IPAdapter(files[0]["plain"], target=embedding(0))
    assert torch.equal(run(tiny, replace(one, scale=0.0)), absent)
    whole, half = run(tiny, one), replace(one, scale=0.5)
    assert torch.equal(whole[:1], absent[:1])
    same(run(tiny, [half, half]), whole)
    differs(run(tiny, half)[1:], whole[1:])


def test_a_source_keeps_its_halves_apart_and_serves_alone(tiny, files):
    one = masa.IPAdapter(files[0]["plain"], source=embedding(0))
    out = masa.sample(tiny, "", [], controls=one, seed=3, **USUAL).latents
    unguided = masa.sample(tiny, "", [], controls=one, seed=3, **(USUAL | {"guidance_scale": 1.0})).latents
    differs(out, unguided)
    with pytest.raises(masa.MasaError, match="IPAdapter acts on targets, and there are none"):
        run(tiny, replace(one, source=None, target=embedding(0)), [])


def test_a_source_cache_keeps_to_its_own_picture(tiny, prompted):
    recorded = masa.record(tiny, SOURCE, controls=prompted, seed=3, **USUAL)
    out = masa.sample(tiny, target=TARGETS, cache=recorded, controls=prompted, progress=False).latents
    same(out[1:], run(tiny, prompted)[1:], ROUNDING)
    other = [prompted[0], replace(prompted[1], source=embedding(9))]
    with pytest.raises(masa.MasaError, match="IPAdapter changes what the source is"):
        masa.sample(tiny, target=TARGETS, cache=recorded, controls=other, progress=False)
    plain = masa.record(tiny, SOURCE, controls=prompted[0], seed=3, **USUAL)
    free = [prompted[0], replace(prompted[1], source=None)]
    out = masa.sample(tiny, target=TARGETS, cache=plain, controls=free, progress=False).latents
    same(out[1:], run(tiny, free)[1:], ROUNDING)


def test_a_pinned_source_and_a_compiled_model_serve(tiny, prompted):
    image = torch.rand(3, 128, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1
    trajectory = masa.invert(tiny, image, SOURCE, controls=prompted[1], steps=STEPS, progress=False)
    pinned = run(tiny, prompted, trajectory=trajectory)
    same(run(tiny, prompted, trajectory=trajectory, targets_at_once=1), pinned, ROUNDING)
    sd = replace(tiny, unet=CompiledUNet(tiny.unet, "eager", None))
    same(run(sd, prompted, trajectory=trajectory), pinned, ROUNDING)


# --------------------------------------------------------------------------------------------------- encoder, settings


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=56,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    folder = tmp_path_factory.mktemp("encoder")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_pictures_go_through_the_encoder(tiny, files, encoder_folder, kind):
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    shown = Image.fromarray((picture(0, size=(240, 320)).permute(1, 2, 0) * 255).byte().numpy())
    pixels = CLIPImageProcessor()(shown, return_tensors="pt").pixel_values
    from masa.controls.conditions import read_picture

    assert (for_clip(read_picture("it", shown)) - pixels).abs().max() < 0.05  # one grey level of 255, resized
    encoder = CLIPVisionModelWithProjection.from_pretrained(encoder_folder).eval()
    mine = for_clip(read_picture("it", shown))
    with torch.no_grad():
        if kind == "plain":
            seen = encoder(mine).image_embeds
        else:
            both = [encoder(x, output_hidden_states=True).hidden_states[-2] for x in (torch.zeros_like(mine), mine)]
            seen = torch.cat(both)
    path = files[0][kind]
    out = run(tiny, masa.IPAdapter(path, target=shown, image_encoder=encoder_folder))
    same(out, run(tiny, masa.IPAdapter(path, target=seen)), ROUNDING)
    with pytest.raises(masa.MasaError, match="has a picture and no image_encoder"):
        run(tiny, masa.IPAdapter(path, target=shown))
    with pytest.raises(masa.MasaError, match="no image encoder that transformers can read"):
        run(tiny, masa.IPAdapter(path, target=shown, image_encoder=path.parent))


def test_an_encoder_without_its_projection_is_refused(tiny, files, encoder_folder, tmp_path):
    """transformers fills what is missing with random numbers, and two runs differ."""
    from transformers import CLIPVisionModel

    CLIPVisionModel.from_pretrained(encoder_folder).save_pretrained(tmp_path / "encoder")
    shown = (picture(0).permute(1, 2, 0) * 255).byte().numpy()
    with pytest.raises(masa.CheckpointError, match=r"is no whole image encoder: .*visual_projection"):
        run(tiny, masa.IPAdapter(files[0]["plain"], target=shown, image_encoder=tmp_path / "encoder"))


def test_a_run_is_repeated_from_its_picture(tiny, files, encoder_folder, tmp_path):
    import shutil

    encoder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    shown = (picture(0).permute(1, 2, 0) * 255).byte().numpy()
    controls = masa.IPAdapter(files[0]["plain"], embedding(1), [shown, None], 0.6, encoder)
    out = masa.sample(tiny, SOURCE, TARGETS, controls=controls, seed=3, **USUAL)
    out.save(tmp_path / "out")
    png = tmp_path / "out" / "source.png"
    assert torch.equal(masa.rerun(png, tiny, progress=False).latents, out.latents)
    save(encoder / "model.safetensors", {"changed": torch.zeros(1)})
    with pytest.raises(masa.MasaError, match="encoder has changed since"):
        masa.rerun(png, tiny, progress=False)


def test_the_encoder_sees_each_picture_once(tiny, files, encoder_folder, monkeypatch):
    """However often runs begin, and whoever of them shows it: until the encoder's files change."""
    from masa.controls import ip_adapter

    calls, encode = [], ip_adapter.encode
    monkeypatch.setattr(ip_adapter, "encode", lambda *given: calls.append(1) or encode(*given))
    one, two = (Image.fromarray((picture(i).permute(1, 2, 0) * 255).byte().numpy()) for i in (0, 1))
    usual = {"steps": 1, "progress": False}
    control = masa.IPAdapter(files[0]["plain"], one, [one, two], 0.6, encoder_folder)
    photo = torch.rand(3, 64, 64) * 2 - 1
    masa.edit(tiny, photo, TARGETS, SOURCE, controls=control, **usual)
    assert len(calls) == 2
    masa.sample(tiny, SOURCE, TARGETS, controls=control, height=64, width=64, **usual)
    assert len(calls) == 2
    changed = replace(control, source=two, target=None)
    masa.sample(tiny, SOURCE, controls=changed, height=64, width=64, **usual)
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("plus", [False, True])
def test_the_real_encoders_shape_fits(tmp_path, plus):
    """ViT-H/14 as published: its parameters are counted, and two of its 32 layers run, into a full-size adapter."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from masa.controls.ip_adapter import encode
    from masa.runtime.adapters import read_encoder

    published = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    }
    with torch.device("meta"):
        whole = CLIPVisionModelWithProjection(CLIPVisionConfig(**published, num_hidden_layers=32))
    assert sum(p.numel() for p in whole.parameters()) == 632_076_800
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**published, num_hidden_layers=2)).save_pretrained(tmp_path)
    encoder = read_encoder(tmp_path, UNetConfig(), torch.float32, CPU)
    with torch.no_grad():
        seen = encode(encoder, for_clip(picture(0, size=(300, 400))), plus)
        assert seen.shape == ((2, 257, 1280) if plus else (2, 1024))
        config = IPAdapterConfig(1280, 768, 16, True) if plus else IPAdapterConfig()
        net = IPAdapterNetwork(config, [320])
        net.load_state_dict(make_state(config, [320]))
        keys, _ = net(seen)[0]
    assert keys.shape == (2, 16 if plus else 4, 320)
    assert bool(torch.isfinite(keys).all())


def test_bad_values_are_refused(files):
    with pytest.raises(masa.MasaError, match="IPAdapter scale is 'x'"):
        masa.IPAdapter(files[0]["plain"], target=embedding(0), scale="x")
    with pytest.raises(masa.MasaError, match="IPAdapter has no condition picture"):
        masa.IPAdapter(files[0]["plain"])
