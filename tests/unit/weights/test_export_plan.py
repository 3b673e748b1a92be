"""Files and waves of an export: everything once, in order, bounded."""

from __future__ import annotations

from itertools import chain

import pytest

from megatron_r1z.errors import RefitError
from megatron_r1z.layout.blocks import Layout, hf_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, TensorSpec, hf_tensors
from megatron_r1z.layout.topology import Topology
from megatron_r1z.weights.export_plan import cut_waves, make_shards, plan_shards, plan_waves

SHAPE = ModelShape("llama", 4, 32, 4, 2, 8, 48, 70, False, False, False, 1e4, None, 1e-6, 128)


def test_shards_are_bounded_and_complete() -> None:
    shards = make_shards([hf_layout(SHAPE, 3)], [2], 5000)
    assert sorted(chain.from_iterable(shard.tensors for shard in shards)) == sorted(hf_tensors(SHAPE))
    assert all(shard.nbytes <= 5000 for shard in shards)
    assert [shard.file for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert [shard.file for shard in make_shards([hf_layout(SHAPE, 1)], [2], 10**9)] == ["model.safetensors"]


@pytest.mark.parametrize("limit", [1, 100, 128, 1000, 10**6])
def test_waves_hold_every_row_once_in_order(limit: int) -> None:
    tensors = [*hf_tensors(SHAPE), TensorSpec("one.row", (1, 300))]
    waves = list(cut_waves(tensors, 2, limit))
    rows = list(chain.from_iterable(waves))
    assert [(row.tensor, row.first_row + index) for row in rows for index in range(row.num_rows)] == [
        (tensor, index) for tensor in tensors for index in range(tensor.shape[0])
    ]
    for wave in waves:
        assert len({row.tensor.name for row in wave}) == len(wave)
        nbytes = sum(row.num_rows * row.tensor.numel // row.tensor.shape[0] * 2 for row in wave)
        assert nbytes <= limit or (len(wave) == 1 and wave[0].num_rows == 1)
    if limit == 1000:  # as few as there can be but for rows that do not fit
        assert len(waves) < 1.2 * sum(tensor.numel * 2 for tensor in tensors) / limit


@pytest.mark.parametrize("topology", [Topology(1), Topology(2, tp=2), Topology(8, tp=2, pp=2, vpp=2)])
@pytest.mark.parametrize("wave_bytes", [1, 700, 10**6])
def test_the_plans_of_all_waves_write_every_element_once_and_keep_to_the_bound(topology: Topology, wave_bytes: int) -> None:
    source = megatron_layout(SHAPE, topology, 8)
    waves = list(plan_waves(source, plan_shards(SHAPE, topology.num_ranks, 2, 5000), 2, wave_bytes, 8))
    assert sum(wave.nbytes for wave in waves) == sum(spec.numel for spec in hf_tensors(SHAPE)) * 2
    longest_row = max(spec.numel // spec.shape[0] for spec in hf_tensors(SHAPE)) * 2
    for wave in waves:
        for rank in range(topology.num_ranks):
            received = sum(copy.nbytes for copy in (*wave.local, *chain(*wave.rounds)) if copy.destination_rank == rank)
            assert received <= max(wave_bytes, longest_row)
        for copies in wave.rounds:
            for rank in range(topology.num_ranks):
                assert sum(copy.nbytes for copy in copies if copy.source_rank == rank) <= max(wave_bytes, 2)


def test_a_layout_that_lacks_a_tensor_is_refused() -> None:
    whole = megatron_layout(SHAPE, Topology(1), 8)
    source = Layout(whole.name, tuple(block for block in whole.blocks if block.tensor != "model.norm.weight"), whole.parameters)
    with pytest.raises(RefitError, match=r"lacks part of tensor model.norm.weight"):
        list(plan_waves(source, plan_shards(SHAPE, 1, 2, 5000), 2, 1000, 8))
