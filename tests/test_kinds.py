"""`masa inspect` names files beside a model: what they are, in which layout, of which shape, and what for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_cases import make_adapter, make_controlnet, save
from fake_checkpoints import key_list, write_sparse

from masa.cli.commands import main
from masa.weights.kinds import recognise

ADAPTERS = key_list("t2i_adapter_sd14v1")
LORAS = key_list("lora_sd15_rank4")
TAESD = {
    "encoder": {"0.weight": ([64, 3, 3, 3], "F32"), "1.conv.0.weight": ([64, 64, 3, 3], "F32")},
    "decoder": {"1.weight": ([64, 4, 3, 3], "F32"), "3.conv.0.weight": ([64, 64, 3, 3], "F32")},
    "diffusers": {
        "encoder.layers.1.conv.0.weight": ([64, 64, 3, 3], "F32"),
        "decoder.layers.2.conv.0.weight": ([64, 64, 3, 3], "F32"),
    },
}
CASES = {
    "full": (
        lambda: ADAPTERS["diffusers_full_cin3"],
        "T2I-Adapter",
        "diffusers'",
        "full, widths (320, 640, 1280, 1280)",
    ),
    "controlnet": (
        lambda: key_list("controlnet_sd15")["ldm_control_model"],
        *("ControlNet", "the original's, control_model.*", "channels (320, 640, 1280, 1280), context 768"),
    ),
    "controlnet diffusers": (
        lambda: key_list("controlnet_sd15")["diffusers"],
        *("ControlNet", "diffusers'", "channels (320, 640, 1280, 1280), context 768"),
    ),
    "ip": (
        lambda: key_list("ip_adapter_sd15")["ip-adapter_sd15"],
        *("IP-Adapter", "the published files'", "plain, 4 tokens of 768"),
    ),
    "ip plus": (
        lambda: key_list("ip_adapter_sd15")["ip-adapter-plus_sd15"],
        *("IP-Adapter", "the published files'", "plus, 16 tokens of 768"),
    ),
    "kohya": (lambda: LORAS["kohya"], "LoRA", "kohya's", "layers of the UNet"),
    "taesd encoder": (lambda: TAESD["encoder"], "TAESD", "the published files'", "encoder, on latents times"),
    "taesd decoder": (lambda: TAESD["decoder"], "TAESD", "the published files'", "decoder, on latents times"),
    "taesd diffusers": (lambda: TAESD["diffusers"], "TAESD", "diffusers'", "encoder and decoder"),
    "word": (
        lambda: {"emb_params": ([8, 768], "F32")},
        *("textual inversion", None, "file: 8 vectors of 768 (Stable Diffusion v1)"),
    ),
    "named word": (lambda: {"<cat-toy>": ([768], "F32")}, "textual inversion", None, "<cat-toy>: 1 vectors of 768"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_told_by_its_keys(tmp_path, name):
    keys, kind, layout, shape = CASES[name]
    lines = dict(recognise(write_sparse(tmp_path / "file.safetensors", keys())))
    assert (lines["kind"], lines.get("layout")) == (kind, layout)
    assert shape in lines["shape"]
    assert lines["tensors"].startswith(f"{len(keys())} tensors")
    assert lines["usable"].startswith("yes")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_say_what_they_read(tmp_path, kind):
    lines = dict(recognise(write_sparse(tmp_path / "file.safetensors", ADAPTERS[kind])))
    assert lines["kind"] == "T2I-Adapter"
    if kind == "style":
        assert lines["usable"].startswith("no: ")
        assert "style adapter" in lines["usable"]
    else:
        lines_read = "cin64" in kind or kind.endswith("cin1")
        told = "squares of 64" if "light" in kind else "lines, 1" if lines_read else "colours, 3"
        assert told in lines["reads"]


@pytest.mark.parametrize("layout", LORAS)
def test_loras_of_every_layout_are_counted(tmp_path, layout):
    lines = dict(recognise(write_sparse(tmp_path / "file.safetensors", LORAS[layout])))
    assert lines["kind"] == "LoRA"
    unet, text = (int(part.split()[0]) for part in lines["shape"].split(", "))
    ends = ("lora_down.weight", "lora.down.weight", "lora_A.weight", "lora_linear_layer.down.weight")
    assert unet + text == sum(key.endswith(ends) for key in LORAS[layout]) > 0
    assert "4" in lines["rank"].split(", ")
    assert lines["layout"] != "unknown"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"lora_unet_x.hada_w1_a": ([4, 4], "F32")}, "a LoHa"),
        ({"lora_unet_x.lora_down.weight": ([4, 4], "F32"), "lora_unet_x.dora_scale": ([4], "F32")}, "a DoRA"),
        ({"lllite_unet_input_blocks": ([1], "F32")}, "ControlNet-LLLite"),
        ({"body.0.block1.weight": ([320, 320, 3, 3], "F32"), "conv_in.weight": ([320, 768, 3, 3], "F32")}, "SDXL's"),
        ({"image_proj.proj.3.weight": ([8], "F16")}, "full face"),
        ({"ip_adapter.0.to_q_lora.down.weight": ([8, 8], "F16"), "image_proj.x": ([1], "F16")}, "FaceID"),
        ({"1.weight": ([64, 16, 3, 3], "F32"), "3.conv.0.weight": ([64, 64, 3, 3], "F32")}, "16 channels"),
        ({"w": ([1, 1024], "F32")}, "is for Stable Diffusion 2.x"),
    ],
)
def test_what_is_not_served_says_why(tmp_path, keys, reason):
    label, verdict = recognise(write_sparse(tmp_path / "file.safetensors", keys))[-1]
    assert label == "usable"
    assert verdict.startswith("no: ")
    assert reason in verdict


def test_models_and_other_files_are_none_of_these(tmp_path):
    for i, keys in enumerate((key_list("sd15_ldm"), key_list("sd15_diffusers")["vae"], {"w": ([3, 3], "F32")})):
        assert recognise(write_sparse(tmp_path / f"{i}.safetensors", keys)) is None
    (tmp_path / "text.safetensors").write_text(json.dumps({"not": "weights"}))
    assert recognise(tmp_path / "text.safetensors") is None
    assert recognise(tmp_path) is None


def test_the_command_prints_it_of_files_and_folders(tmp_path, capsys):
    make_adapter("light").save_pretrained(tmp_path / "adapter")
    state = make_controlnet().state_dict() | {"difference": torch.zeros(1)}
    net = save(tmp_path / "control_shuffle.safetensors", state)
    for path, told in (
        (tmp_path / "adapter", ("T2I-Adapter", "light", "masa.T2IAdapter")),
        (net, ("differences to its base model", "means (shuffle)", "masa.ControlNet")),
    ):
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert all(piece in out for piece in (str(Path(path)), *told))
