"""Coordinates, model chunks and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.cost.refit_report import read_policy
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.topology import ExpertCoordinates, Topology


def test_tp_is_the_fastest_axis_and_pp_the_slowest() -> None:
    topology = Topology(num_ranks=8, tp=2, pp=2)
    assert topology.dp == 2
    found = [(where.tp_rank, where.dp_rank, where.pp_rank) for where in map(topology.coordinates, range(8))]
    assert found == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


def test_cp_is_the_axis_after_tp() -> None:
    topology = Topology(num_ranks=16, tp=2, pp=2, cp=2)
    assert topology.dp == 2
    expected = [(tp, cp, dp, pp) for pp in range(2) for dp in range(2) for cp in range(2) for tp in range(2)]
    assert [tuple(topology.coordinates(rank)) for rank in range(16)] == expected


@given(tp=st.integers(1, 4), cp=st.integers(1, 4), dp=st.integers(1, 4), pp=st.integers(1, 4))
def test_rank_of_inverts_coordinates(tp: int, cp: int, dp: int, pp: int) -> None:
    topology = Topology(tp * cp * dp * pp, tp, pp, cp=cp)
    assert topology.dp == dp
    places = [topology.coordinates(rank) for rank in range(topology.num_ranks)]
    assert [topology.rank_of(*place) for place in places] == list(range(topology.num_ranks))
    for axis, size in enumerate((tp, cp, dp, pp)):
        assert {place[axis] for place in places} == set(range(size))


def test_chunks_interleave() -> None:
    topology = Topology(num_ranks=2, pp=2, vpp=2)
    assert [list(chunk.layers) for chunk in topology.chunks(8, 0)] == [[0, 1], [4, 5]]
    assert [list(chunk.layers) for chunk in topology.chunks(8, 1)] == [[2, 3], [6, 7]]


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_every_layer_and_both_ends_exist_once(pp: int, vpp: int) -> None:
    topology = Topology(num_ranks=pp, pp=pp, vpp=vpp)
    chunks = [chunk for pp_rank in range(pp) for chunk in topology.chunks(24, pp_rank)]
    assert sorted(layer for chunk in chunks for layer in chunk.layers) == list(range(24))
    assert [0 in chunk.layers for chunk in chunks] == [chunk.is_first for chunk in chunks]
    assert [23 in chunk.layers for chunk in chunks] == [chunk.is_last for chunk in chunks]


@pytest.mark.parametrize(("num_ranks", "pp", "ep", "etp"), [(8, 1, 4, 2), (8, 2, 2, 1), (24, 2, 3, 2), (16, 4, 1, 4)])
def test_expert_ranks_are_numbered_etp_ep_edp_pp(num_ranks: int, pp: int, ep: int, etp: int) -> None:
    topology = Topology(num_ranks, pp=pp, ep=ep, etp=etp)
    edp = num_ranks // (etp * ep * pp)
    expected = [
        ExpertCoordinates(etp_rank, ep_rank, edp_rank)
        for _ in range(pp)
        for edp_rank in range(edp)
        for ep_rank in range(ep)
        for etp_rank in range(etp)
    ]
    assert [topology.expert_coordinates(rank) for rank in range(num_ranks)] == expected


def test_experts_are_split_like_the_rest_unless_etp_says_otherwise() -> None:
    assert Topology(4, tp=2).expert_tp == 2
    assert Topology(4, tp=2, etp=1).expert_tp == 1


def test_uneven_chunks_are_in_model_order() -> None:
    topology = Topology(num_ranks=2, pp=2, vpp=2, chunk_layers=(1, 2, 3, 1))
    assert [list(chunk.layers) for chunk in topology.chunks(7, 0)] == [[0], [3, 4, 5]]
    assert [list(chunk.layers) for chunk in topology.chunks(7, 1)] == [[1, 2], [6]]
    assert [(chunk.is_first, chunk.is_last) for chunk in topology.chunks(7, 1)] == [(False, False), (False, True)]


@pytest.mark.parametrize("num_layers", range(4, 30))
def test_the_example_of_an_error_works(num_layers: int) -> None:
    even = Topology(num_ranks=4, pp=4)
    if num_layers % 4 == 0:
        assert even.chunks(num_layers, 3)[0].is_last
        return
    with pytest.raises(ConfigError, match="for example") as caught:
        even.chunks(num_layers, 0)
    typed = re.search(r"typed as (layers=[\d:x]+)\)\.$", str(caught.value))
    assert typed
    sizes = read_policy(f"pp=4,{typed[1]}").chunk_layers
    assert max(sizes) - min(sizes) == 1
    assert Topology(4, pp=4, chunk_layers=sizes).chunks(num_layers, 3)[0].layers[-1] == num_layers - 1


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"num_ranks": 6, "tp": 2, "pp": 2}, r"6 ranks cannot be split into tp 2 x cp 1 x pp 2.*multiple of 4"),
        ({"num_ranks": 6, "tp": 2, "cp": 2}, r"6 ranks cannot be split into tp 2 x cp 2 x pp 1.*multiple of 4"),
        ({"num_ranks": 4, "cp": 0}, r"cp is 0"),
        ({"num_ranks": 0}, r"num_ranks is 0"),
        ({"num_ranks": 4, "tp": -1}, r"tp is -1"),
        ({"num_ranks": 2, "vpp": 2}, r"vpp is 2 and pp is 1"),
        ({"num_ranks": 4, "etp": 0}, r"etp is 0"),
        ({"num_ranks": 8, "tp": 2, "ep": 3}, r"8 ranks cannot be split into etp 2 x ep 3 x pp 1.*multiple of 6"),
        ({"num_ranks": 4, "pp": 4, "chunk_layers": (1, 2)}, r"chunk_layers is 1, 2; .*pp 4 x vpp 1 = 4 model chunks at least one layer"),
        ({"num_ranks": 2, "pp": 2, "chunk_layers": (0, 2)}, r"chunk_layers is 0, 2; .*at least one layer"),
    ],
)
def test_impossible_degrees_are_refused_with_the_numbers(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology(**degrees)


@pytest.mark.parametrize(
    ("topology", "num_layers", "message"),
    [
        (Topology(4, pp=4, vpp=2), 28, r"28 layers .* pp 4 x vpp 2 = 8 model chunks; set chunk_layers, for example 3 x 2, 4 x 4, 3 x 2 \("),
        (Topology(128, tp=8, pp=16), 126, r"126 layers .* set chunk_layers, for example 7, 8 x 14, 7 \(typed as layers=7:8x14:7\)\."),
        (Topology(4, pp=4), 3, r"3 layers cannot be split evenly .*; lower pp or vpp to at most 3 chunks\."),
        (Topology(2, pp=2, chunk_layers=(3, 4)), 8, r"chunk_layers 3, 4 adds up to 7, but the model has 8 layers; .* for example 4 x 2 \("),
    ],
)
def test_layers_that_cannot_be_split_are_refused_with_a_way_out(topology: Topology, num_layers: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        topology.chunks(num_layers, 0)


def test_unknown_rank() -> None:
    for place in (Topology(num_ranks=4).coordinates, Topology(num_ranks=4).expert_coordinates):
        with pytest.raises(ConfigError, match=r"rank 4 does not exist; there are 4 ranks"):
            place(4)
