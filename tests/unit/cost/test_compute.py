"""Arithmetic against a count over the checkpoint's matrices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.cost.compute import decode_flops, sample_flops
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.layout.families import hf_tensors
from tests.unit.cost.runs import SHAPE

MATRICES = sum(spec.numel for spec in hf_tensors(SHAPE) if ".layers." in spec.name and len(spec.shape) == 2)
HEAD = SHAPE.vocab_size * SHAPE.hidden_size


def attention_pairs(tokens: int) -> int:
    """Query-key pairs of a causal sequence, counted."""
    return sum(position + 1 for position in range(tokens))


@given(st.integers(2, 300), st.integers(1, 300))
def test_a_sample_multiplies_every_matrix_by_every_token(prompt: int, response: int) -> None:
    flops = sample_flops(SHAPE, Lengths(prompt, response, response))  # all responses are cut off: every sample is equal
    tokens = prompt + response
    pairs = 2 * 2 * attention_pairs(tokens) * SHAPE.num_heads * SHAPE.head_dim * SHAPE.num_layers
    expected = 2 * tokens * MATRICES + pairs
    assert SHAPE.num_layers * flops.layer.total == pytest.approx(expected, rel=1 / tokens)  # half the square against the triangle
    assert flops.layer.matrices * SHAPE.num_layers == 2 * tokens * MATRICES
    assert flops.head == (0, 2 * response * HEAD)


def test_what_is_computed_again() -> None:
    flops = sample_flops(SHAPE, Lengths(50, 100, 1000))
    assert flops.trained_layer("none") == flops.layer.times(3)
    assert flops.trained_layer("selective").total == pytest.approx(3 * flops.layer.total + flops.feed_forward)
    assert flops.trained_layer("full") == flops.layer.times(4)
    assert flops.model(8) == 3 * (8 * flops.layer.total + flops.head.total)


def test_decoding_a_sequence_is_a_forward_pass_in_pieces() -> None:
    tokens = 500
    pieces = sum(decode_flops(SHAPE, position + 1).total for position in range(tokens))
    flops = sample_flops(SHAPE, Lengths(1, tokens - 1, tokens - 1))
    assert pieces == pytest.approx(SHAPE.num_layers * flops.layer.total + flops.head.total, rel=0.01)
