"""A control whose fields have a wrong type is refused when it is made, by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import masa
from masa.controls.base import Run

MASK = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (masa.MasaCtrl, {"start_step": "4"}, "MasaCtrl start_step is '4'; expected a whole number from 0"),
        (masa.MasaCtrl, {"start_step": 4.5}, "start_step is 4.5"),
        (masa.MasaCtrl, {"start_layer": True}, "start_layer is True"),
        (masa.MasaCtrl, {"start_layer": -1}, "start_layer is -1"),
        (masa.MasaCtrl, {"layers": 10}, "layers is 10; expected several whole numbers"),
        (masa.MasaCtrl, {"layers": "10-15"}, "layers is '10-15'"),
        (masa.MasaCtrl, {"layers": [10, "11"]}, "layers is .10, '11'."),
        (masa.MasaCtrl, {"steps": 4}, "MasaCtrl steps is 4"),
        (masa.MasaCtrl, {"mask": "mask.png"}, "mask is 'mask.png'; expected masa.WordMasks, masa.GivenMasks or None"),
        (masa.MasaCtrl, {"mask": masa.WordMasks}, "mask is <class"),
        (masa.MasaCtrl, {"union": 1}, "union is 1; expected True or False"),
        (masa.MasaCtrl, {"union": True, "source_weight": "2"}, "source_weight is '2'"),
        (masa.MasaCtrl, {"union": True, "source_weight": float("nan")}, "source_weight is nan"),
        (masa.StyleTransfer, {"start_step": None}, "StyleTransfer start_step is None"),
        (masa.StyleTransfer, {"start_layer": "all"}, "StyleTransfer start_layer is 'all'"),
        (masa.StyleTransfer, {"steps": 3}, "StyleTransfer steps is 3"),
        (masa.StyleTransfer, {"layers": 10}, "StyleTransfer layers is 10"),
        (masa.PlugAndPlay, {"feature_steps": "0.8"}, "feature_steps is '0.8'; expected a number from 0 to 1"),
        (masa.PlugAndPlay, {"attention_steps": (0, 1)}, "attention_steps is"),
        (masa.BlendedLatents, {"mask": MASK, "skip": "0.2"}, "skip is '0.2'"),
        (masa.WordMasks, {"source": "cat", "target": "cat", "threshold": "0.1"}, "threshold is '0.1'"),
        (masa.LocalBlend, {"source": "cat", "target": "cat", "start": None}, "LocalBlend start is None"),
        (masa.PromptToPrompt, {"reweight": ["cat", 2.0]}, "reweight is .'cat', 2.0.; expected a dict"),
        (masa.PromptToPrompt, {"reweight": {"cat": "2"}}, "reweight of 'cat' is '2'"),
        (masa.PromptToPrompt, {"self_replace_steps": None}, "self_replace_steps is None"),
        (masa.PromptToPrompt, {"cross_replace_steps": {"cat": None}}, "cross_replace_steps of 'cat' is None"),
        (masa.PromptToPrompt, {"local_blend": ("cat", "dog")}, "local_blend is"),
        (masa.RecordAttention, {"layers": 8}, "RecordAttention layers is 8"),
        (masa.RecordAttention, {"self_attention": "yes"}, "self_attention is 'yes'"),
        (masa.RecordQueries, {"layers": 7}, "RecordQueries layers is 7"),
        (masa.RecordQueries, {"steps": "0,1"}, "RecordQueries steps is '0,1'"),
        (masa.RecordPredictions, {"steps": 1.0}, "RecordPredictions steps is 1.0"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:40],
)
def test_a_wrong_type_is_named_at_once(kind, settings, message):
    with pytest.raises(masa.MasaError, match=message):
        kind(**settings)


def test_what_numpy_and_sets_hold_is_as_good():
    masa.MasaCtrl(np.int64(3), steps=np.arange(3), layers={4, 5}, union=np.bool_(True), source_weight=np.float32(2.0))
    masa.StyleTransfer(steps=range(3), layers=(1, 2))
    masa.PlugAndPlay(np.float64(0.3), 1)


@pytest.mark.parametrize(
    "control", [masa.RecordAttention(), masa.LocalBlend("cat", "cat")], ids=lambda value: type(value).__name__
)
def test_a_unet_without_the_sites_that_are_read_is_named(tiny, control):
    tokenizer = tiny.tokenizer
    run = Run(2, tiny.unet.sites, ("a cat", "a cat"), (8, 8), tiny.device, tokenizer.token_positions)
    control.begin(run)
    run = replace(run, sites=tuple(site for site in run.sites if site.downsample != 4))
    with pytest.raises(masa.MasaError, match="1/4 of the latents' size, which this UNet has not; "):
        control.begin(run)
