"""The text encoder equals transformers' own loading of the same folder, at every token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import masa
from masa.config import TextConfig
from masa.models.clip import TextEncoder

PROMPTS = ["a photo of a cat", "", "two dogs, in the snow!", "red " * 74]


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path):
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(tiny_folder / "text_encoder").float().eval()


def test_context_equals_transformers(tiny, theirs):
    ids = tiny.tokenizer(PROMPTS)
    with torch.no_grad():
        wanted = theirs(ids).last_hidden_state
    ours = tiny.encode_prompt(PROMPTS)
    assert ours.shape == (4, 77, 32)
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()
    # The prompts must differ, or equality would say little.
    assert (wanted[0] - wanted[2]).abs().max() > 0.1


def test_a_token_sees_only_what_is_before_it(tiny):
    one, other = tiny.encode_prompt(["a photo of a cat", "a photo of a dog"])
    assert torch.equal(one[:5], other[:5])
    assert not torch.allclose(one[5], other[5])


@pytest.mark.parametrize(
    "config",
    [
        TextConfig(vocab_size=100, width=32, intermediate_width=48, layers=1, heads=4),
        TextConfig(vocab_size=100, width=32, intermediate_width=48, layers=1, heads=4, activation="gelu"),
        TextConfig(vocab_size=100, width=32, intermediate_width=48, layers=1, heads=2),
        TextConfig(vocab_size=100, width=32, intermediate_width=48, layers=1, heads=4, norm_eps=0.1),
    ],
    ids=["base", "activation", "heads", "eps"],
)
def test_the_encoder_after_meta_construction_equals_one_built_in_memory(config):
    torch.manual_seed(0)
    built = TextEncoder(config).eval()
    with torch.device("meta"):
        empty = TextEncoder(config)
    empty.load_state_dict({k: torch.nn.Parameter(v.clone()) for k, v in built.state_dict().items()}, assign=True)
    empty.restore_buffers("cpu")
    ids = torch.randint(0, 100, (2, 77))
    with torch.no_grad():
        assert torch.equal(empty.eval()(ids), built(ids))
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))


def test_each_setting_changes_the_context():
    ids = torch.arange(77)[None]
    base = {"vocab_size": 100, "width": 32, "intermediate_width": 48, "layers": 1, "heads": 4}
    outputs = []
    for change in ({}, {"activation": "gelu"}, {"heads": 2}, {"norm_eps": 0.1}):
        torch.manual_seed(0)
        encoder = TextEncoder(TextConfig(**(base | change))).eval()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.copy_(torch.randn_like(parameter))
            outputs.append(encoder(ids))
    assert all(not torch.allclose(outputs[0], other) for other in outputs[1:])


def test_one_prompt_in_place_of_a_list_is_refused(tiny):
    with pytest.raises(masa.MasaError, match="takes a list"):
        tiny.encode_prompt("a photo of a cat")
