"""Attention over several rows' keys in one softmax, against every score written out in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from part_cases import NAMES, ROWS, part, part_cases, part_tensors, written_out

from masa.kernels.attention_over_parts import attention_over_parts, moments
from masa.kernels.mutual_attention import mutual_attention

# SDPA's fused kernel in float32 against float64.
TOLERANCE = 2e-6


@pytest.fixture
def tensors(generator):
    return part_tensors(generator)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_every_form_equals_the_scores_written_out(tensors, generator, name, backend):
    q, k, v = tensors
    parts = part_cases(k, v, generator)[name]
    out = attention_over_parts(q, parts, backend=backend)
    assert (out.double() - written_out(q, parts)).abs().max() < TOLERANCE


@pytest.mark.parametrize("contrast", [(1.67, 1.67, 1.67), (1.0, 0.5, 3.0)])
def test_contrast_spreads_probabilities_around_their_mean(tensors, generator, contrast):
    q, k, v = tensors
    for name in ("union", "weighted", "regions"):
        parts = part_cases(k, v, generator)[name]
        out = attention_over_parts(3 * q, parts, contrast=contrast)
        assert (out.double() - written_out(3 * q, parts, contrast)).abs().max() < TOLERANCE
    plain = attention_over_parts(q, parts)
    assert torch.equal(attention_over_parts(q, parts, contrast=(1.0,) * ROWS), plain)


def test_the_order_of_parts_does_not_matter(tensors, generator):
    q, k, v = tensors
    parts = part_cases(k, v, generator)["three"]
    out = attention_over_parts(q, parts)
    assert torch.allclose(attention_over_parts(q, parts[::-1]), out, atol=TOLERANCE)


def test_equal_parts_of_a_share_each_are_one(tensors):
    q, k, v = tensors
    several = [part(k, v, (3, 3, 3), weight=1 / 3) for _ in range(3)]
    assert torch.allclose(attention_over_parts(q, several), attention_over_parts(q, several[:1]), atol=TOLERANCE)
    # As many copies of all keys change nothing; beside another part they count.
    assert torch.allclose(
        attention_over_parts(q, several), mutual_attention(q, k, v, kv_index=(3, 3, 3)), atol=TOLERANCE
    )


def test_a_part_without_a_visible_key_is_left_out(tensors):
    q, k, v = tensors
    visible = torch.ones(ROWS, 24, dtype=torch.bool)
    visible[1] = False
    parts = [part(k, v, (0, 1, 2)), part(k, v, (3, 3, 3), visible=visible)]
    out = attention_over_parts(q, parts)
    alone = attention_over_parts(q, parts[:1])
    assert torch.allclose(out[1], alone[1], atol=TOLERANCE)
    assert not torch.allclose(out[0], alone[0], atol=1e-2)
    for backend in ("sdpa", "reference"):  # and a row without any key gives zeros
        assert not attention_over_parts(q, parts[1:], backend=backend)[1].any()


def test_gradients_pass(tensors, generator):
    q, k, v = tensors
    parts = part_cases(k.double().requires_grad_(), v.double(), generator)["weighted"]
    q = q.double().requires_grad_()
    attention_over_parts(q, parts).sum().backward()
    q2, k2 = q.detach().clone().requires_grad_(), parts[0].k.detach().clone().requires_grad_()
    written_out(q2, [replace(p, k=k2) for p in parts]).sum().backward()
    assert torch.allclose(q.grad, q2.grad)
    assert torch.allclose(parts[0].k.grad, k2.grad)


def test_moments_are_the_published_ones(tensors):
    q, _, _ = tensors
    mean, deviation = moments(q)
    assert torch.allclose(mean, q.mean(2))
    assert torch.allclose(deviation, (q.var(2, unbiased=True) + 1e-5).sqrt())


def test_a_single_position_has_no_deviation():
    """A 1x1 map, as in the middle of a 64x64 picture: statistics are finite, and all backends agree."""
    mean, deviation = moments(torch.full((1, 2, 1, 4), 3.0))
    assert torch.equal(mean, torch.full((1, 2, 4), 3.0))
    assert torch.allclose(deviation, torch.full((1, 2, 4), 1e-5**0.5))


def test_triton_is_refused_where_it_cannot_serve(tensors):
    q, k, v = tensors
    with pytest.raises(RuntimeError, match="'triton' cannot serve"):
        attention_over_parts(q, [part(k, v, (0, 1, 2))], backend="triton")
