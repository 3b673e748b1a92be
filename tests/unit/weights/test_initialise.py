"""Random weights: the same model in every layout, with the spread that its matrices should have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_r1z.layout.blocks import Layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.topology import Topology
from megatron_r1z.weights.initialise import EMBEDDING_STD, LINEAR_GAIN, random_tensor, random_weights

QWEN2 = ModelShape("qwen2", 4, 32, 4, 2, 8, 48, 70, True, True, False, 1e4, None, 1e-6, 128)
QWEN3 = ModelShape("qwen3", 4, 32, 4, 2, 8, 48, 70, False, False, True, 1e4, None, 1e-6, 128)
TOPOLOGIES = [Topology(1), Topology(2, tp=2), Topology(2, pp=2), Topology(4, tp=2, pp=2), Topology(2, pp=2, vpp=2), Topology(2)]


def box(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))


def fill(shape: ModelShape, layout: Layout, seed: int) -> dict[int, dict[str, Tensor]]:
    """The parameters of every rank; what is not written stays NaN."""
    ranks = {rank: {name: torch.full(size, torch.nan) for name, size in sizes.items()} for rank, sizes in layout.parameters.items()}
    for rank, parameters in ranks.items():
        random_weights(shape, layout, rank, parameters, seed)
    return ranks


def gather(shape: ModelShape, layout: Layout, ranks: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Checkpoint tensors from the ranks' parameters; copies must agree."""
    tensors = {spec.name: torch.full(spec.shape, torch.nan) for spec in hf_tensors(shape)}
    for block in layout.blocks:
        there = tensors[block.tensor][box(block.start, block.size)]
        here = ranks[block.rank][block.parameter][box(block.local_start, block.size)]
        assert there.isnan().all() or torch.equal(there, here)
        there.copy_(here)
    return tensors


@pytest.mark.parametrize("shape", [QWEN2, QWEN3], ids=lambda shape: shape.family)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_every_layout_holds_the_same_model(shape: ModelShape, topology: Topology) -> None:
    layout = megatron_layout(shape, topology, 8)
    found = gather(shape, layout, fill(shape, layout, seed=3))
    for spec in hf_tensors(shape):
        assert torch.equal(found[spec.name], random_tensor(spec, 3)), spec.name


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_padding_is_zero_and_nothing_is_left_unset(topology: Topology) -> None:
    layout = megatron_layout(QWEN2, topology, 64)
    for rank, parameters in fill(QWEN2, layout, seed=3).items():
        is_padding = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in parameters.items()}
        for block in layout.blocks_of(rank):
            is_padding[block.parameter][box(block.local_start, block.size)] = False
        for name, tensor in parameters.items():
            assert not tensor[is_padding[name]].any(), name
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("shape", [QWEN2, QWEN3], ids=lambda shape: shape.family)
def test_spread(shape: ModelShape) -> None:
    for spec in hf_tensors(shape):
        tensor = random_tensor(spec, 0)
        assert tensor.dtype == torch.float32
        if spec.name.endswith(".bias"):
            assert not tensor.any(), spec.name
        elif "norm" in spec.name:
            assert torch.equal(tensor, torch.ones(spec.shape)), spec.name
        else:
            is_vocabulary = spec.name in ("model.embed_tokens.weight", "lm_head.weight")
            std = EMBEDDING_STD if is_vocabulary else LINEAR_GAIN / math.sqrt(spec.shape[1])
            bound = 5 / math.sqrt(spec.numel)  # five standard errors; the std's own is smaller by a factor of sqrt(2)
            assert tensor.std().item() / std == pytest.approx(1, abs=bound), spec.name
            assert tensor.mean().item() / std == pytest.approx(0, abs=bound), spec.name


def test_tensors_differ_from_one_another_and_between_seeds() -> None:
    matrices = [random_tensor(spec, seed).flatten()[:512] for seed in (0, 1) for spec in hf_tensors(QWEN3) if len(spec.shape) == 2]
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == len(matrices)


def test_weights_take_the_format_of_the_parameters() -> None:
    layout = megatron_layout(QWEN2, Topology(1), 8)
    parameters = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in layout.parameters[0].items()}
    random_weights(QWEN2, layout, 0, parameters, 3)
    exact = fill(QWEN2, layout, seed=3)[0]
    assert all(torch.equal(parameters[name], exact[name].bfloat16()) for name in exact)


def test_no_global_generator_is_touched() -> None:
    before = torch.random.get_rng_state()
    random_tensor(hf_tensors(QWEN2)[0], 0)
    assert torch.equal(torch.random.get_rng_state(), before)
