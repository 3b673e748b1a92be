"""Coordinates, model chunks and what is refused."""

from __future__ import annotations

import pytest

from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.topology import Topology


def test_tp_is_the_fastest_axis_and_pp_the_slowest() -> None:
    topology = Topology(num_ranks=8, tp=2, pp=2)
    assert topology.dp == 2
    found = [tuple(topology.coordinates(rank)) for rank in range(8)]
    assert found == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize(("num_ranks", "tp", "pp"), [(1, 1, 1), (8, 2, 2), (12, 3, 2), (64, 8, 4)])
def test_rank_of_inverts_coordinates(num_ranks: int, tp: int, pp: int) -> None:
    topology = Topology(num_ranks, tp, pp)
    assert [topology.rank_of(*topology.coordinates(rank)) for rank in range(num_ranks)] == list(range(num_ranks))


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


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"num_ranks": 6, "tp": 2, "pp": 2}, r"6 ranks cannot be split into tp 2 x pp 2.*multiple of 4"),
        ({"num_ranks": 0}, r"num_ranks is 0"),
        ({"num_ranks": 4, "tp": -1}, r"tp is -1"),
        ({"num_ranks": 2, "vpp": 2}, r"vpp is 2 and pp is 1"),
    ],
)
def test_impossible_degrees_are_refused_with_the_numbers(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology(**degrees)


def test_layers_must_split_evenly() -> None:
    with pytest.raises(ConfigError, match=r"28 layers .* pp 4 x vpp 2 = 8 model chunks"):
        Topology(num_ranks=4, pp=4, vpp=2).chunks(28, 0)


def test_unknown_rank() -> None:
    with pytest.raises(ConfigError, match=r"rank 4 does not exist; there are 4 ranks"):
        Topology(num_ranks=4).coordinates(4)
