"""Rename tables: every published key has exactly one name here, and back, and its shape fits the module."""

from __future__ import annotations

import math

import pytest
import torch
from fake_checkpoints import key_list

from masa.models.clip import TextEncoder
from masa.models.unet import UNet
from masa.models.vae import VAE
from masa.weights.layouts import (
    UNET_PREFIX,
    VAE_PREFIX,
    ldm_unet_name,
    ldm_vae_name,
    old_diffusers_vae_name,
    text_name,
)


@pytest.fixture(scope="module")
def shapes() -> dict[str, dict[str, list[int]]]:
    """Parameter shapes of the three networks at SD v1.5's widths."""
    with torch.device("meta"):
        text = TextEncoder()
        modules = {"unet": UNet(), "vae": VAE(), "text_encoder": text.model}
    states = {part: {k: list(v.shape) for k, v in module.state_dict().items()} for part, module in modules.items()}
    states["text_encoder"] = {k.removeprefix(text.state_prefix): v for k, v in states["text_encoder"].items()}
    return states


def test_parameter_counts_are_the_published_ones(shapes):
    counts = {part: sum(math.prod(shape) for shape in state.values()) for part, state in shapes.items()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


@pytest.mark.parametrize(("part", "keys"), [("unet", "unet"), ("vae", "vae")])
def test_our_names_and_shapes_are_diffusers(shapes, part, keys):
    assert shapes[part] == {name: shape for name, (shape, _) in key_list("sd15_diffusers")[keys].items()}


def test_old_vae_names_are_a_bijection(shapes):
    published = {name: shape for name, (shape, _) in key_list("sd15_diffusers")["vae_as_published"].items()}
    assert {old_diffusers_vae_name(name): shape for name, shape in shapes["vae"].items()} == published


@pytest.mark.parametrize("name", ["sd15_ldm", "sd15_ldm_full_with_ema"])
def test_ldm_unet_names_are_a_bijection(shapes, name):
    published = {k: shape for k, (shape, _) in key_list(name).items() if k.startswith(UNET_PREFIX)}
    assert {UNET_PREFIX + ldm_unet_name(k, 2): shape for k, shape in shapes["unet"].items()} == published


def test_ldm_vae_names_are_a_bijection(shapes):
    published = {k: shape for k, (shape, _) in key_list("sd15_ldm").items() if k.startswith(VAE_PREFIX)}

    def stored(name: str, shape: list[int]) -> list[int]:
        # LDM stores the attention's linear layers as 1x1 convolutions.
        return [*shape, 1, 1] if "attentions.0.to_" in name and len(shape) == 2 else shape

    ours = {VAE_PREFIX + ldm_vae_name(k): stored(k, shape) for k, shape in shapes["vae"].items()}
    assert ours == published


@pytest.mark.parametrize(
    "prefix",
    [
        "cond_stage_model.transformer.text_model.",
        "cond_stage_model.transformer.",
        "cond_stage_model.text_model.",
        "cond_stage_model.",
        "text_model.",
        "",
    ],
)
def test_text_names_lose_every_prefix(shapes, prefix):
    assert {text_name(prefix + name): shape for name, shape in shapes["text_encoder"].items()} == shapes["text_encoder"]


@pytest.mark.parametrize("key", ["logit_scale", "text_projection", "first_stage_model.encoder.conv_in.weight", "betas"])
def test_other_keys_are_no_text_encoders(key):
    assert text_name(key) is None


def test_a_name_that_is_no_parameter_has_no_ldm_name():
    with pytest.raises(KeyError, match="no LDM name"):
        ldm_unet_name("nonsense.weight", 2)
    with pytest.raises(KeyError, match="no LDM name"):
        ldm_vae_name("encoder.nonsense.weight")
