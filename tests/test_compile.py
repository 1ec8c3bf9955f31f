"""The compiled UNet: equal to the plain one, compiled once per shape, captured once per structure of edits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from example_files import example
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import masa
from masa.edits import Edit, Mix, Record
from masa.models import rowwise
from masa.models.batch_rows import Retirement
from masa.runtime.compile import CompiledUNet, join, replayed, split

pytestmark = pytest.mark.slow

SETTINGS = {"steps": 3, "height": 64, "width": 64, "guidance_scale": 3.0, "progress": False}
SOURCE, TARGET = "a sitting cat", "a running cat"
CONTROLS = {
    "none": [],
    "masactrl": masa.MasaCtrl(start_step=1, start_layer=4),
    "union": masa.MasaCtrl(start_step=1, start_layer=4, union=True, source_weight=2.0),
    "words": masa.MasaCtrl(start_step=1, start_layer=8, mask=masa.WordMasks("cat", "cat")),
    "style aligned": example("style_aligned").StyleAligned(0.5),
    "free u": masa.FreeU(),
    "prompt-to-prompt": masa.PromptToPrompt("replace"),
    "plug-and-play": masa.PlugAndPlay(),
    "local blend": [masa.MasaCtrl(start_step=1, start_layer=4), *[masa.LocalBlend("cat", "cat", start=0.0)] * 2],
    "recorded attention": [masa.RecordAttention(self_attention=True)] * 2,
    "recorded queries": [masa.RecordQueries(steps=[0, 2])] * 2,
}

# Kinds of steps: before and under control, with queries and without, or as fractions of the steps say. Word masks
# are never captured.
CAPTURED = {
    "none": 1,
    "masactrl": 2,
    "union": 2,
    "words": 1,
    "style aligned": 1,
    "free u": 1,
    "prompt-to-prompt": 2,
    "plug-and-play": 3,
    "local blend": 2,
    "recorded attention": 1,
    "recorded queries": 2,
}


class Captures:
    """Stands in for CUDA graphs where there are none: a replay runs the forward on the captured inputs."""

    def __init__(self):
        self.count = 0

    def __call__(self, run, inputs):
        self.count += 1
        own = tuple(tensor.clone() for tensor in inputs)
        eps, tape = run(own)

        def replay():
            again, maps = run(own)
            eps.copy_(again)
            for key, value in maps.items():
                tape[key].copy_(value)

        return replayed(own, replay, (eps, tape))


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).abs().max() / ref.abs().max())


def captured(sd):
    """The model with a UNet whose forwards are captured, and the captures."""
    captures = Captures()
    return replace(sd, unet=CompiledUNet(sd.unet, "eager", captures)), captures


@pytest.mark.parametrize("name", CONTROLS)
def test_captured_runs_equal_plain_ones(tiny, name):
    sd, captures = captured(tiny)
    counts = []
    for seed, target in ((0, TARGET), (1, "a jumping cat")):
        run = {"controls": CONTROLS[name], "seed": seed, **SETTINGS}
        plain, found = masa.sample(tiny, SOURCE, target, **run), masa.sample(sd, SOURCE, target, **run)
        assert relative_error(found.latents, plain.latents) < 1e-5
        for recorded, bound in (("attention", 1e-5), ("queries", 1e-3)):  # queries are float16
            ours, theirs = getattr(found, recorded), getattr(plain, recorded)
            assert ours.keys() == theirs.keys() == (set(range(2)) if recorded in name else set())
            for place, maps in theirs.items():
                assert ours[place].keys() == maps.keys() != set()
                assert all(relative_error(ours[place][key].float(), maps[key].float()) < bound for key in maps)
        counts.append(captures.count)
    assert counts == [CAPTURED[name]] * 2


def records(first: str, second: str) -> dict[int, Edit]:
    """Edits that record, under two keys, the first tokens' attention and the next ones', and queries."""
    weights = torch.eye(77).expand(2, -1, -1)
    return {
        1: Edit(records=(Record(first, weights[:, :4]), Record(second, weights[:, 4:8]))),
        3: Edit(records=(Record(second, weights[:, :4]),), query_records=(first,)),
    }


def test_one_capture_serves_records_of_any_keys(tiny, generator):
    sd, captures = captured(tiny)
    context = torch.randn(2, 77, 32, generator=generator)
    for keys in (("a", "b"), ("c", "d"), ("b", "a")):
        x = torch.randn(2, 4, 8, 8, generator=generator)
        with torch.no_grad():
            plain, found = (m.unet(x, 500, context, records(*keys))[1] for m in (tiny, sd))
        assert found.keys() == plain.keys() == {(keys[0], 1), (keys[1], 1), (keys[1], 3), (keys[0], 3)}
        assert all(relative_error(found[key], plain[key]) < 1e-5 for key in plain)
    assert captures.count == 1
    with torch.no_grad():
        sd.unet(x, 500, context, records("a", "a"))  # one key is not two
    assert captures.count == 2


def test_the_oldest_captures_are_dropped(tiny, generator, monkeypatch):
    monkeypatch.setattr("masa.runtime.compile.MOST_GRAPHS", 2)
    sd, captures = captured(tiny)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    counts = []
    for site in (0, 2, 0, 4, 2, 0):  # the third serves again; the fourth costs the first its place, not the second
        edits = {site: Edit(k_from=(0, 0), v_from=(0, 0))}
        with torch.no_grad():
            plain, found = (m.unet(x, 500, context, edits)[0] for m in (tiny, sd))
        assert relative_error(found, plain) < 1e-5
        assert len(sd.unet.captured) <= 2
        counts.append(captures.count)
    assert counts == [1, 2, 2, 3, 3, 4]


def test_structures_that_differ_in_retirement_are_captured_apart(tiny, generator):
    sd, captures = captured(tiny)
    x, context = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 32, generator=generator)
    edits = {2: Edit(k_from=(0, 0, 0), v_from=(0, 0, 0))}
    counts = []
    for retire in (None, Retirement(1, (1, 2)), Retirement(1, (2, 1)), Retirement(4, (1, 2)), Retirement(1, (1, 2))):
        with torch.no_grad():
            plain, found = (m.unet(x, 500, context, edits, retire=retire)[0] for m in (tiny, sd))
        assert found.shape == plain.shape
        assert relative_error(found, plain) < 1e-5
        counts.append(captures.count)
    assert counts == [1, 2, 3, 4, 4]


def test_captures_are_dropped_with_the_weights_they_read(tiny, generator):
    base = replace(tiny, unet=copy.deepcopy(tiny.unet))
    sd, captures = captured(base)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)

    def run(dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return sd.unet(x.to(dtype), 500, context.to(dtype))[0]

    plain = run(torch.float32)
    with torch.no_grad():
        base.unet.conv_out.bias.add_(1.0)  # where it lies: graphs see it
    assert relative_error(run(torch.float32), plain + 1.0) < 1e-5
    assert captures.count == 1
    for unet in (base.unet, sd.unet):  # they share their weights: either moves both
        unet.double()
        assert relative_error(run(torch.float64), plain + 1.0) < 1e-4
        assert len(sd.unet.captured) == 1
        unet.float()
        assert relative_error(run(torch.float32), plain + 1.0) < 1e-5
        assert len(sd.unet.captured) == 1
    assert captures.count == 5


def test_an_edit_of_a_real_picture_is_captured_per_structure(tiny, monkeypatch):
    monkeypatch.setattr(rowwise, "applies", lambda x: False)  # compiled blocks take all rows at once
    sd, captures = captured(tiny)
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    counts = []
    for seed, target in ((0, TARGET), (1, "a jumping cat")):
        run = {"controls": CONTROLS["masactrl"], "seed": seed, **SETTINGS}
        plain = masa.edit(tiny, picture, target, **run)
        assert relative_error(masa.edit(sd, picture, target, **run).latents, plain.latents) < 1e-5
        counts.append(captures.count)
    # Inversion, targets alone, source and targets with the source retiring, and without at the last step.
    assert counts == [4, 4]


def test_blocks_compile_once_for_all_steps_prompts_seeds_and_controls(tiny):
    torch._dynamo.reset()
    counter = CompileCounter()
    sd = tiny.compile(compiler=counter)
    masa.sample(sd, SOURCE, TARGET, seed=0, controls=[], **SETTINGS)
    compiled = counter.frame_count
    # Of 22 residual blocks and 16 MLPs, those that differ in shape.
    assert 0 < compiled < 22 + 16
    for name in ("masactrl", "union", "words", "prompt-to-prompt"):
        masa.sample(sd, SOURCE, "a jumping cat", seed=1, controls=CONTROLS[name], **SETTINGS | {"steps": 4})
    assert counter.frame_count == compiled


def test_compiling_shares_weights_and_leaves_the_model_alone(tiny):
    sd = tiny.compile(compiler="eager")
    before, after = tiny.unet.state_dict(), sd.unet.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    assert sd.fingerprint == tiny.fingerprint
    assert type(tiny.unet) is not type(sd.unet)
    assert "forward" not in vars(tiny.unet.mid_block.resnets[0])
    assert isinstance(sd.unet, torch.nn.Module)
    assert sd.vae is tiny.vae


def test_gradients_flow_through_a_compiled_model(tiny, generator):
    x = torch.randn(1, 4, 8, 8, generator=generator)
    start = torch.randn(1, 77, 32, generator=generator)
    grads = []
    for sd in (tiny, captured(tiny)[0]):
        context = start.clone().requires_grad_()
        eps, _ = sd.unet(x, 500, context, checkpoint=True)
        grads.append(torch.autograd.grad(eps.square().sum(), context)[0])
    assert relative_error(grads[1], grads[0]) < 1e-4


def test_inductor_gives_the_same_block(tiny, generator):
    """One MLP and one residual block; a whole UNet takes the compiler minutes."""
    torch._dynamo.reset()
    sd = tiny.compile()
    x = torch.randn(2, 64, 32, generator=generator)
    plain, fast = (m.unet.down_blocks[0].attentions[0].transformer_blocks[0].ff for m in (tiny, sd))
    with torch.no_grad():
        assert relative_error(fast(x), plain(x)) < 1e-5
        x, emb = torch.randn(2, 32, 8, 8, generator=generator), torch.randn(2, 128, generator=generator)
        plain, fast = (m.unet.down_blocks[0].resnets[0] for m in (tiny, sd))
        assert relative_error(fast(x, emb), plain(x, emb)) < 1e-5


def test_bad_choices_are_refused(tiny):
    with pytest.raises(masa.MasaError, match=r"compiler is 'fast'; expected one of .*'inductor'"):
        tiny.compile(compiler="fast")
    with pytest.raises(masa.MasaError, match="the model is on cpu; load it with device='cuda'"):
        tiny.compile(cuda_graphs=True)
    with pytest.raises(masa.MasaError, match="compiled already"):
        tiny.compile(compiler="eager").compile(compiler="eager")


def test_structures_compare_without_tensors():
    def edits(seed: int, rows: tuple[int, ...] = (0, 0)) -> dict[int, Edit]:
        draws = torch.Generator().manual_seed(seed)
        mix = Mix((1,), (0,), torch.rand(1, 77, 77, generator=draws), torch.rand(1, 77, generator=draws))
        record = Record(("maps", 3), torch.rand(2, 1, 77, generator=draws))
        return {20: Edit(k_from=rows, v_from=rows), 21: Edit(mix=mix, records=(record,))}

    structure, tensors = split(edits(0))
    again, others = split(edits(1))
    assert structure == again
    assert hash(structure) == hash(again)
    assert structure != split(edits(0, rows=(0, 1)))[0]
    assert [t.shape for t in tensors] == [(1, 77, 77), (1, 77), (2, 1, 77)]
    rebuilt = join(structure, others)
    assert rebuilt[20] == edits(1)[20]
    assert torch.equal(rebuilt[21].mix.own, edits(1)[21].mix.own)
    assert torch.equal(rebuilt[21].records[0].token_weights, edits(1)[21].records[0].token_weights)
    assert rebuilt[21].records[0].key == ("maps", 3)
