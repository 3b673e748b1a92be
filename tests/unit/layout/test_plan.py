"""Plans between random layouts of every family, carried out on tensors.

In the first half a checkpoint tensor's elements get numbers that no other element has. Source parameters are filled from the source
blocks, the plan is carried out, and every destination parameter must then be what its own blocks say: right number, written once, padding
untouched. The round trip moves random bfloat16 bits through two plans.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.errors import ConfigError, RefitError
from megatron_r1z.layout.blocks import Block, Layout, engine_layout, hf_layout, megatron_layout
from megatron_r1z.layout.families import FAMILIES, ModelShape, hf_tensors
from megatron_r1z.layout.plan import DEFAULT_ROUND_BYTES, LIVE_ROUNDS, Copy, Edge, Plan, make_plan
from megatron_r1z.layout.topology import Topology

PADDING = -1
ITEMSIZE = 2
ONE_NODE = 64
"""More ranks than any layout here has."""
ROUND_TRIPS = 100
"""Per family."""
Parameters = dict[tuple[int, str], Tensor]


def box(tensor: Tensor, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))]


def checkpoint(shape: ModelShape) -> dict[str, Tensor]:
    tensors, first = {}, 0
    for spec in hf_tensors(shape):
        tensors[spec.name] = torch.arange(first, first + spec.numel).view(spec.shape)
        first += spec.numel
    return tensors


def empty(layout: Layout, value: int, dtype: torch.dtype = torch.int64) -> Parameters:
    return {(rank, name): torch.full(size, value, dtype=dtype) for rank, sizes in layout.parameters.items() for name, size in sizes.items()}


def filled(layout: Layout, tensors: dict[str, Tensor], padding: int = PADDING) -> Parameters:
    parameters = empty(layout, padding, next(iter(tensors.values())).dtype)
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
    parts = [plan.of_rank(rank) for rank in {*plan.source.parameters, *plan.destination.parameters}]
    assert all(part.buffer_bytes <= 2 * LIVE_ROUNDS * round_bytes for part in parts)


def check_balance(plan: Plan) -> None:
    """Ranks that hold the same boxes send the same number of bytes, give or take one copy; all ranks are in one node."""
    sent = Counter(dict.fromkeys(plan.source.parameters, 0))
    for copy in chain.from_iterable(plan.rounds):
        sent[copy.source_rank] += copy.nbytes
    boxes: dict[int, set[tuple[Any, ...]]] = defaultdict(set)
    for block in plan.source.blocks:
        boxes[block.rank].add((block.tensor, block.start, block.size))
    groups: dict[frozenset[tuple[Any, ...]], list[int]] = defaultdict(list)
    for rank, held in boxes.items():
        groups[frozenset(held)].append(sent[rank])
    largest_copy = max(math.prod(block.size) for block in plan.source.blocks) * ITEMSIZE
    assert all(max(loads) - min(loads) <= largest_copy for loads in groups.values())


Choose = Callable[[Sequence[Any]], Any]
"""Picks one of several values: hypothesis, which shrinks what fails, or a seeded generator."""


def random_shape(choose: Choose, family: str) -> ModelShape:
    kv_heads = choose([1, 2, 4])
    experts = choose([4, 2]) if FAMILIES[family].experts else 0
    return ModelShape(
        family=family,
        num_layers=choose([4, 5]),
        hidden_size=choose([5, 1, 2, 7]),
        num_heads=kv_heads * choose([4, 1, 2, 3]),
        num_kv_heads=kv_heads,
        head_dim=choose([1, 2, 3]),
        ffn_size=4 * choose([1, 2, 3]),
        vocab_size=choose([1, 3, 16, 64, 70]),
        tied_embeddings=choose([False, True]),
        qkv_bias=FAMILIES[family].qkv_bias,
        qk_norm=FAMILIES[family].qk_norm,
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-6,
        max_positions=128,
        num_experts=experts,
        experts_per_token=min(1, experts),
    )


def random_sizes(choose: Choose, num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Layers of each model chunk; empty where an even split is possible and chosen."""
    if num_layers % num_chunks == 0 and choose([True, False]):
        return ()
    sizes = [1] * num_chunks
    for _ in range(num_layers - num_chunks):
        sizes[choose(range(num_chunks))] += 1
    return tuple(sizes)


def random_policy(choose: Choose, shape: ModelShape) -> Layout:
    num_ranks = choose([8, 4, 2, 1])
    pp, vpp = choose([(pp, vpp) for pp, vpp in ((1, 1), (2, 1), (2, 2), (4, 1)) if num_ranks % pp == 0])
    sizes = [size for size in (1, 2, 4) if (num_ranks // pp) % size == 0]
    tp = choose([size for size in sizes if shape.num_kv_heads % size == 0])
    cp = choose([size for size in sizes if (num_ranks // pp) % (tp * size) == 0])
    ep, etp = 1, None
    if shape.num_experts:
        ep, etp = choose(
            [(ep, etp) for ep in sizes for etp in sizes if shape.num_experts % ep == 0 and (num_ranks // pp) % (ep * etp) == 0]
        )
    topology = Topology(num_ranks, tp, pp, vpp, cp, ep, etp, random_sizes(choose, shape.num_layers, pp * vpp))
    return megatron_layout(shape, topology, choose([1, 3, 16]), choose(["local", "te"]))


def random_engine(choose: Choose, shape: ModelShape) -> Layout:
    num_ranks = choose([4, 1, 8])
    tp = choose([size for size in (1, 2, 4) if num_ranks % size == 0 and shape.num_heads % size == 0])
    return engine_layout(shape, num_ranks, tp, first_rank=choose([0, 8, 2]))


def random_layout(choose: Choose, shape: ModelShape) -> Layout:
    makers: list[Callable[[], Layout]] = [
        lambda: random_policy(choose, shape),
        lambda: random_engine(choose, shape),
        lambda: hf_layout(shape, choose(range(1, 6))),
    ]
    return choose(makers)()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_destination_element_is_written_exactly_once_with_the_right_value(data: st.DataObject) -> None:
    def choose(options: Sequence[Any]) -> Any:
        return data.draw(st.sampled_from(options))

    shape = random_shape(choose, choose(list(FAMILIES)))
    source, destination = random_layout(choose, shape), random_layout(choose, shape)
    round_bytes, ranks_per_node = choose([2, 7, 64, 1 << 20]), choose([1, 2, 8, ONE_NODE])
    plan = make_plan(source, destination, ITEMSIZE, round_bytes, ranks_per_node)
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
    if ranks_per_node == ONE_NODE:
        check_balance(plan)


def bits(shape: ModelShape, seed: int) -> dict[str, Tensor]:
    """Random bfloat16 numbers by their bits, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randint(-(1 << 15), 1 << 15, spec.shape, generator=generator, dtype=torch.int16) for spec in hf_tensors(shape)}


def moved(plan: Plan, source: Parameters) -> Parameters:
    destination = empty(plan.destination, 0, torch.int16)
    for copy in [*plan.local, *chain.from_iterable(plan.rounds)]:
        value = box(source[copy.source_rank, copy.source_parameter], copy.source_start, copy.size)
        box(destination[copy.destination_rank, copy.destination_parameter], copy.destination_start, copy.size).copy_(value)
    return destination


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_keeps_every_bit(family: str) -> None:
    for seed in range(ROUND_TRIPS):
        choose = random.Random(f"{family}/{seed}").choice
        shape = random_shape(choose, family)
        first, second, third = (random_layout(choose, shape) for _ in range(3))
        tensors = bits(shape, seed)
        there = make_plan(first, second, ITEMSIZE, choose([64, 4096]), choose([2, 8]))
        back = make_plan(second, third, ITEMSIZE, choose([64, 4096]), choose([2, 8]))
        found = moved(back, moved(there, filled(first, tensors, 0)))
        expected = filled(third, tensors, 0)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), (
            f"seed {seed}: {first.name}, {second.name}, {third.name}"
        )


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


def test_edges() -> None:
    plan = make_plan(megatron_layout(SHAPE, Topology(4, tp=4), 1), engine_layout(SHAPE, 4, 1), ITEMSIZE)
    found = {(copy.source_rank, copy.destination_rank): copy.edge(2) for copy in [*plan.local, *chain.from_iterable(plan.rounds)]}
    assert {found[rank, rank] for rank in range(4)} == {Edge.LOCAL}
    assert (found[0, 1], found[1, 2], found[3, 0]) == (Edge.NODE, Edge.NETWORK, Edge.NETWORK)


def test_buffers_are_for_two_rounds_of_sending_and_receiving() -> None:
    plan = make_plan(megatron_layout(SHAPE, Topology(4, tp=4), 1), engine_layout(SHAPE, 4, 1), ITEMSIZE, round_bytes=400)
    sent, received = (
        [sum(copy.nbytes for copy in copies if getattr(copy, end) == 2) for copies in plan.rounds]
        for end in ("source_rank", "destination_rank")
    )
    assert plan.of_rank(2).buffer_bytes == 2 * (max(sent) + max(received)) > 2 * max(sent) > 0
    assert make_plan(hf_layout(SHAPE, 1), hf_layout(SHAPE, 1), ITEMSIZE).of_rank(0).buffer_bytes == 0


DENSE_70B = ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 128256, False, False, False, 5e5, None, 1e-5, 131072)
DENSE_405B = ModelShape("llama", 126, 16384, 128, 8, 128, 53248, 128256, False, False, False, 5e5, None, 1e-5, 131072)
MOE_30B = ModelShape("qwen3_moe", 48, 2048, 32, 4, 128, 768, 151936, False, False, True, 1e6, None, 1e-6, 40960, 128, 8)


@pytest.mark.parametrize(
    ("shape", "topology", "engines"),
    [
        (DENSE_70B, Topology(32, tp=8, pp=4, vpp=2), (32, 8, 0)),
        (DENSE_405B, Topology(128, tp=8, pp=16, chunk_layers=(7, *[8] * 14, 7)), (32, 16, 128)),
        (MOE_30B, Topology(16, tp=4, pp=2, ep=8, etp=1), (16, 4, 0)),
    ],
    ids=["70B TP8 PP4 VPP2 to TP8", "405B TP8 PP16 to two of TP16", "30B-A3B TP4 PP2 EP8 to TP4"],
)
def test_large_models_are_planned(shape: ModelShape, topology: Topology, engines: tuple[int, int, int]) -> None:
    plan = make_plan(megatron_layout(shape, topology, spec="te"), engine_layout(shape, *engines), ITEMSIZE)
    check_rounds(plan, DEFAULT_ROUND_BYTES)
