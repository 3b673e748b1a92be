"""What activations must satisfy whatever the model; how many bytes they are is measured in `tests/loop/test_cost.py`."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.cost.activations import TILE_BYTES, BatchSize, chunks_in_flight, head_bytes, tile_shape, token_bytes
from megatron_r1z.cost.formats import POLICY_FORMATS
from megatron_r1z.layout.topology import Topology
from megatron_r1z.policy import logprob
from tests.unit.cost.runs import SHAPE

BF16 = POLICY_FORMATS["bf16"]


@given(st.integers(0, 100_000), st.integers(1, 1 << 25))
def test_tiles_are_those_of_the_policy(rows: int, elements: int) -> None:
    assert tile_shape(rows, elements) == logprob.tile_shape(rows, elements)


def test_the_size_of_a_tile_is_the_policy_s() -> None:
    assert {"local": logprob.TILE_BYTES["cpu"], "te": logprob.TILE_BYTES["cuda"]} == TILE_BYTES


def test_sequence_parallelism_divides_everything_and_tensor_parallelism_alone_does_not() -> None:
    whole = token_bytes(SHAPE, 1, sequence_parallel=False, form=BF16, spec="te")
    split = token_bytes(SHAPE, 4, sequence_parallel=True, form=BF16, spec="te")
    partly = token_bytes(SHAPE, 4, sequence_parallel=False, form=BF16, spec="te")
    assert split.whole * 4 == pytest.approx(whole.whole)
    assert split.layer_input * 4 == whole.layer_input == partly.layer_input
    assert split.whole < partly.whole < whole.whole
    local = [token_bytes(SHAPE, 4, sequence_parallel=shared, form=BF16, spec="local") for shared in (True, False)]
    assert local[0].feed_forward == local[1].feed_forward  # Transformer Engine's has the norm before it


def test_recomputing_trades_what_is_kept_for_what_comes_back() -> None:
    token = token_bytes(SHAPE, 1, sequence_parallel=False, form=BF16, spec="te")
    kept = [token.kept(recompute) for recompute in ("none", "selective", "full")]
    back = [token.recomputed(recompute) for recompute in ("none", "selective", "full")]
    assert all(more > less for more, less in pairwise(kept))
    assert all(less < more for less, more in pairwise(back))
    assert kept[1] + back[1] == token.whole == back[2]


def outstanding(pp: int, stage: int, micro_batches: int) -> int:
    """Of the 1F1B schedule, walked through: forward passes that wait for their backward pass, at most."""
    warm_up = min(pp - 1 - stage, micro_batches)
    order = ["F"] * warm_up + ["F", "B"] * (micro_batches - warm_up) + ["B"] * warm_up
    waiting = most = 0
    for step in order:
        waiting += 1 if step == "F" else -1
        most = max(most, waiting)
    return most


@given(st.integers(1, 8), st.data())
def test_micro_batches_in_flight_are_those_of_the_schedule(pp: int, data: st.DataObject) -> None:
    stage, micro_batches = data.draw(st.integers(0, pp - 1)), data.draw(st.integers(1, 20))
    assert chunks_in_flight(Topology(pp, pp=pp), stage, micro_batches) == [outstanding(pp, stage, micro_batches)]


@given(st.integers(2, 6), st.integers(2, 4), st.data())
def test_interleaving_never_has_more_in_flight_than_there_are(pp: int, vpp: int, data: st.DataObject) -> None:
    stage, groups = data.draw(st.integers(0, pp - 1)), data.draw(st.integers(1, 5))
    waiting = chunks_in_flight(Topology(pp, pp=pp, vpp=vpp), stage, groups * pp)
    assert max(waiting) <= groups * pp
    assert sum(waiting) == min(2 * (pp - 1 - stage) + (vpp - 1) * pp + 1, groups * pp * vpp)
    assert waiting == sorted(waiting, reverse=True)


def test_the_head_does_not_grow_with_the_vocabulary_but_for_the_gradient_of_its_weights() -> None:
    batch = BatchSize(8192, 8192, 1)
    small, large = (head_bytes(SHAPE, columns, batch, hidden=SHAPE.hidden_size, itemsize=2, spec="te") for columns in (100_000, 200_000))
    assert small.forward == large.forward
    assert large.backward - small.backward == 100_000 * SHAPE.hidden_size * 2
