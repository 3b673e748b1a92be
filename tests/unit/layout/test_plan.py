"""Plans between random layouts, carried out on tensors of unique numbers.

A checkpoint tensor's elements get numbers that no other element has. Source parameters are filled from the source blocks, the plan is
carried out, and every destination parameter must then be what its own blocks say: right number, written once, padding untouched.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.errors import ConfigError, RefitError
from megatron_r1z.layout.blocks import Block, Layout, Spec, engine_layout, hf_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.plan import Copy, Plan, make_plan
from megatron_r1z.layout.topology import Topology

PADDING = -1
ITEMSIZE = 2
Parameters = dict[tuple[int, str], Tensor]


def box(tensor: Tensor, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))]


def checkpoint(shape: ModelShape) -> dict[str, Tensor]:
    tensors, first = {}, 0
    for spec in hf_tensors(shape):
        tensors[spec.name] = torch.arange(first, first + spec.numel).view(spec.shape)
        first += spec.numel
    return tensors


def empty(layout: Layout, value: int) -> Parameters:
    return {(rank, name): torch.full(size, value) for rank, sizes in layout.parameters.items() for name, size in sizes.items()}


def filled(layout: Layout, tensors: dict[str, Tensor]) -> Parameters:
    parameters = empty(layout, PADDING)
    for block in layout.blocks:
        box(parameters[block.rank, block.parameter], block.local_start, block.size).copy_(
            box(tensors[block.tensor], block.start, block.size)
        )
    return parameters


def carried_out(plan: Plan, tensors: dict[str, Tensor]) -> tuple[Parameters, Parameters]:
    """Destination parameters, and how often each element was written."""
    source, destination, writes = filled(plan.source, tensors), empty(plan.destination, PADDING), empty(plan.destination, 0)
    for copy in [*plan.local, *(copy for copies in plan.rounds for copy in copies)]:
        value = box(source[copy.source_rank, copy.source_parameter], copy.source_start, copy.size)
        assert value.shape == copy.size
        assert copy.nbytes == math.prod(copy.size) * ITEMSIZE
        key = copy.destination_rank, copy.destination_parameter
        box(destination[key], copy.destination_start, copy.size).copy_(value)
        box(writes[key], copy.destination_start, copy.size).add_(1)
    return destination, writes


def held_elsewhere(plan: Plan, tensors: dict[str, Tensor]) -> int:
    """Destination elements that their rank does not hold as a source: each must travel."""
    held: dict[tuple[int, str], Tensor] = {}
    for block in plan.source.blocks:
        mask = held.setdefault((block.rank, block.tensor), torch.zeros(tensors[block.tensor].shape, dtype=torch.bool))
        box(mask, block.start, block.size).fill_(True)

    def missing(block: Block) -> int:
        mask = held.get((block.rank, block.tensor))
        return math.prod(block.size) if mask is None else int((~box(mask, block.start, block.size)).sum())

    return sum(missing(block) for block in plan.destination.blocks)


def check_rounds(plan: Plan, round_bytes: int) -> None:
    for copies in plan.rounds:
        sent: dict[int, int] = defaultdict(int)
        received: dict[int, int] = defaultdict(int)
        for copy in copies:
            assert copy.source_rank != copy.destination_rank
            sent[copy.source_rank] += copy.nbytes
            received[copy.destination_rank] += copy.nbytes
        assert max([*sent.values(), *received.values()]) <= round_bytes
    assert all(copy.source_rank == copy.destination_rank for copy in plan.local)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    return ModelShape(
        family="qwen2",
        num_layers=4,
        hidden_size=draw(st.integers(1, 7)),
        num_heads=kv_heads * draw(st.sampled_from([4, 1, 2, 3])),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        ffn_size=4 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 70)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-6,
        max_positions=128,
    )


def policies(shape: ModelShape) -> st.SearchStrategy[Layout]:
    degrees = [
        (tp, pp, vpp)
        for tp in (1, 2, 4)
        for pp, vpp in ((1, 1), (2, 1), (2, 2), (4, 1))
        if 8 % (tp * pp) == 0 and shape.num_kv_heads % tp == 0
    ]
    spec: st.SearchStrategy[Spec] = st.sampled_from(["local", "te"])
    multiple = st.sampled_from([1, 3, 16])
    ranks = st.sampled_from([4, 8])
    return st.tuples(st.sampled_from(degrees), multiple, spec, ranks).map(
        lambda drawn: megatron_layout(shape, Topology(max(drawn[3], drawn[0][0] * drawn[0][1]), *drawn[0]), drawn[1], spec=drawn[2])
    )


def layouts(shape: ModelShape) -> st.SearchStrategy[Layout]:
    engines = [(ranks, tp) for ranks in (1, 4, 8) for tp in (1, 2, 4) if ranks % tp == 0 and shape.num_heads % tp == 0]
    return st.one_of(
        policies(shape),
        st.sampled_from(engines).map(lambda drawn: engine_layout(shape, *drawn)),
        st.integers(1, 5).map(lambda writers: hf_layout(shape, writers)),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_destination_element_is_written_exactly_once_with_the_right_value(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    source, destination = data.draw(layouts(shape)), data.draw(layouts(shape))
    round_bytes = data.draw(st.sampled_from([2, 7, 64, 1 << 20]))
    plan = make_plan(source, destination, ITEMSIZE, round_bytes, ranks_per_node=data.draw(st.sampled_from([1, 2, 8])))
    tensors = checkpoint(shape)
    found, writes = carried_out(plan, tensors)
    expected = filled(destination, tensors)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        assert torch.equal(writes[key], (value != PADDING).long()), key
    assert plan.sent_bytes == held_elsewhere(plan, tensors) * ITEMSIZE
    assert plan.nbytes == sum(math.prod(block.size) for block in destination.blocks) * ITEMSIZE
    check_rounds(plan, round_bytes)


SHAPE = ModelShape("llama", 4, 8, 8, 4, 4, 16, 100, False, False, False, 1e4, None, 1e-6, 128)


def test_equal_tensor_parallel_sizes_send_only_the_vocabulary() -> None:
    plan = make_plan(megatron_layout(SHAPE, Topology(4, tp=2), 128), engine_layout(SHAPE, 4, 2), ITEMSIZE)
    assert {copy.tensor for copies in plan.rounds for copy in copies} <= {"model.embed_tokens.weight", "lm_head.weight"}
    same_padding = make_plan(megatron_layout(SHAPE, Topology(4, tp=2), 32), engine_layout(SHAPE, 4, 2), ITEMSIZE)
    assert same_padding.rounds == ()


@pytest.mark.parametrize("ranks_per_node", [1, 8])
def test_holders_share_the_load(ranks_per_node: int) -> None:
    source, destination = megatron_layout(SHAPE, Topology(8, tp=2, pp=2), 1), engine_layout(SHAPE, 8, 1)
    sent: dict[int, int] = defaultdict(int)
    for copies in make_plan(source, destination, ITEMSIZE, ranks_per_node=ranks_per_node).rounds:
        for copy in copies:
            sent[copy.source_rank] += copy.nbytes
    for stage in (range(4), range(4, 8)):
        loads = [sent[rank] for rank in stage]
        assert max(loads) < 1.3 * min(loads)


def test_a_holder_on_the_node_is_preferred_to_one_elsewhere() -> None:
    source, destination = megatron_layout(SHAPE, Topology(8, tp=2), 1), engine_layout(SHAPE, 8, 1)
    copies = [copy for group in make_plan(source, destination, ITEMSIZE, ranks_per_node=2).rounds for copy in group]
    assert copies
    assert all(copy.source_rank // 2 == copy.destination_rank // 2 for copy in copies)


def test_a_part_for_each_rank_adds_up_to_the_plan() -> None:
    plan = make_plan(megatron_layout(SHAPE, Topology(4, tp=2, pp=2), 1), engine_layout(SHAPE, 4, 1), ITEMSIZE, round_bytes=300)
    parts = [plan.of_rank(rank) for rank in range(4)]
    assert sorted(copy for part in parts for copy in part.local) == sorted(plan.local)
    sends: dict[tuple[int, int, int], tuple[Copy, ...]] = {}
    receives: dict[tuple[int, int, int], tuple[Copy, ...]] = {}
    for part in parts:
        for exchange in part.exchanges:
            sends |= {(exchange.number, part.rank, peer): copies for peer, copies in exchange.sends.items()}
            receives |= {(exchange.number, peer, part.rank): copies for peer, copies in exchange.receives.items()}
    assert sends == receives
    assert sorted(copy for copies in sends.values() for copy in copies) == sorted(copy for copies in plan.rounds for copy in copies)


def test_plans_are_the_same_on_every_rank() -> None:
    def plan() -> Plan:
        return make_plan(megatron_layout(SHAPE, Topology(8, tp=2, pp=2), 1), engine_layout(SHAPE, 8, 4), ITEMSIZE, round_bytes=100)

    assert plan() == plan()


def test_a_source_that_lacks_a_tensor_is_refused() -> None:
    untied, tied = SHAPE, replace(SHAPE, tied_embeddings=True)
    with pytest.raises(
        RefitError, match=r"lacks part of tensor lm_head.weight \[0, 0\] \+ \[100, 8\], which rank 0 needs for lm_head.weight"
    ):
        make_plan(megatron_layout(tied, Topology(1), 1), engine_layout(untied, 1, 1), ITEMSIZE)


def test_a_source_whose_boxes_overlap_is_refused() -> None:
    whole, split = hf_layout(SHAPE, 1), megatron_layout(SHAPE, Topology(2, tp=2), 1)
    both = Layout("both", whole.blocks + split.blocks, {})
    with pytest.raises(RefitError, match=r"layout 'both' has overlapping boxes of tensor"):
        make_plan(both, engine_layout(SHAPE, 1, 1), ITEMSIZE)


def test_a_round_must_hold_an_element() -> None:
    with pytest.raises(ConfigError, match="round_bytes is 1"):
        make_plan(hf_layout(SHAPE, 1), hf_layout(SHAPE, 1), ITEMSIZE, round_bytes=1)


def test_a_70b_model_is_planned_quickly() -> None:
    shape = ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 128256, False, False, False, 5e5, None, 1e-5, 131072)
    start = time.perf_counter()
    source, destination = megatron_layout(shape, Topology(32, tp=8, pp=4, vpp=2)), engine_layout(shape, 32, 8)
    plan = make_plan(source, destination, itemsize=2)
    seconds = time.perf_counter() - start
    print(f"70B, TP8 PP4 VPP2 to TP8, 32 ranks: {seconds:.2f} s, {len(plan.rounds)} rounds, {plan.sent_bytes / 1e9:.0f} GB between ranks")
    check_rounds(plan, 256 << 20)
    assert seconds < 30  # far above what it takes, so that a busy machine does not fail the test
