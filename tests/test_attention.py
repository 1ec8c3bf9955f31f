"""attend(): the one call site, with hand-made edits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from masa import MasaError
from masa.attention import Call, MaskPlan, attend
from masa.edits import PLAIN, Edit, Part, Record, Site, take

SELF = Site(20, 10, "up_blocks.2.attentions.1.transformer_blocks.0.attn1", "up", "self", 2, 2)
CROSS = Site(21, 10, "up_blocks.2.attentions.1.transformer_blocks.0.attn2", "up", "cross", 2, 2)


@pytest.fixture
def qkv(generator):
    return torch.randn(3, 3, 2, 12, 8, generator=generator).unbind()


def run(qkv, edit, site=SELF, **call):
    q_rows, k_rows, v_rows = edit.read_rows(3)
    carried = Call({site.index: edit}, {}, **call)
    out = attend(take(qkv[0], q_rows), take(qkv[1], k_rows), take(qkv[2], v_rows), 3, site, (3, 4), carried)
    return out, carried.tape


@pytest.mark.parametrize(
    ("q_from", "k_from", "v_from"),
    [
        ((0, 1, 2),) * 3,
        ((0, 1, 2), (0, 0, 0), (0, 0, 0)),
        ((0, 0, 2), (0, 0, 2), (0, 1, 2)),
        ((2, 1, 0), (1, 2, 0), (0, 0, 1)),
    ],
)
def test_rows_read_what_the_edit_says(qkv, q_from, k_from, v_from):
    q, k, v = qkv
    out, _ = run(qkv, Edit(q_from=q_from, k_from=k_from, v_from=v_from))
    expected = F.scaled_dot_product_attention(q[list(q_from)], k[list(k_from)], v[list(v_from)])
    assert torch.allclose(out, expected, atol=1e-6)


def test_union_sees_both_rows(qkv):
    q, k, v = qkv
    out, _ = run(qkv, Edit(parts=(Part((0, 0, 0)), Part((-1, 1, 2)))))
    both = torch.cat([k[:1], k[1:2]], 2), torch.cat([v[:1], v[1:2]], 2)
    assert torch.allclose(out[0], F.scaled_dot_product_attention(q[:1], k[:1], v[:1])[0], atol=1e-6)
    assert torch.allclose(out[1], F.scaled_dot_product_attention(q[1:2], *both)[0], atol=1e-6)


def test_keys_and_values_of_different_rows_are_not_masked_or_united(qkv):
    plan = MaskPlan.build(torch.ones(1, 12, dtype=torch.bool), torch.ones(3, 12))
    with pytest.raises(MasaError, match="cannot be masked"):
        run(qkv, Edit(k_from=(0, 0, 0), v_from=(0, 1, 2), mask=lambda tape, grid: plan))
    with pytest.raises(MasaError, match="leave k_from and v_from out"):
        Edit(k_from=(0, 0, 0), v_from=(0, 1, 2), parts=(Part((0, 0, 0)), Part((-1, 1, 2))))


def test_masks_are_planned_once_per_forward(qkv):
    calls = []
    plan = MaskPlan.build(torch.ones(3, 12, dtype=torch.bool), torch.ones(3, 12))

    def mask(tape, grid):
        calls.append(grid)
        return plan

    call = Call({20: Edit(mask=mask)}, {})
    for _ in range(3):
        attend(*qkv, 3, SELF, (3, 4), call)
    assert calls == [(3, 4)]
    call.tape["more", 0] = torch.zeros(1)
    attend(*qkv, 3, SELF, (3, 4), call)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "edit", [PLAIN, Edit(), Edit(records=(Record("cat", torch.ones(3, 1, 12)),))], ids=["none", "plain", "recorded"]
)
def test_a_backend_asked_for_by_name_is_used_everywhere(qkv, edit):
    with pytest.raises(RuntimeError, match="'triton' cannot serve"):
        run(qkv, edit, CROSS, backend="triton")
    out, _ = run(qkv, edit, CROSS, backend="reference")
    assert torch.allclose(out, F.scaled_dot_product_attention(*qkv), atol=1e-6)


def test_records_are_head_means_of_the_weighted_tokens(qkv, generator):
    q, k, _ = qkv
    weights = torch.rand(3, 2, 12, generator=generator)
    out, tape = run(qkv, Edit(records=(Record("a", weights[:, :1]), Record("b", weights[:, 1:]))), CROSS)
    probabilities = (q @ k.mT / 8**0.5).softmax(-1).mean(1)
    for i, key in enumerate("ab"):
        expected = torch.einsum("bnk,bk->bn", probabilities, weights[:, i])
        assert torch.allclose(tape[key, CROSS.index][:, 0], expected, atol=1e-6)
    assert torch.allclose(out, F.scaled_dot_product_attention(*qkv), atol=1e-6)


def test_keys_and_values_of_two_rows_go_through_every_form(qkv):
    """k_from and v_from are told apart where probabilities are changed too."""
    q, k, v = qkv
    for k_from, v_from in (((0, 0, 0), None), (None, (0, 0, 0)), ((1, 2, 0), (0, 0, 1))):
        keys, values = (x[list(rows or (0, 1, 2))] for x, rows in ((k, k_from), (v, v_from)))
        probabilities = (q @ keys.mT / 8**0.5).softmax(-1)
        spread = (1 / 12 + 1.67 * (probabilities - 1 / 12)).clamp(0, 1)
        out, _ = run(qkv, Edit(k_from=k_from, v_from=v_from, contrast=1.67))
        assert torch.allclose(out, spread @ values, atol=1e-5)
