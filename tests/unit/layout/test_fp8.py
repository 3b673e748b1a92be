"""FP8 over layouts: what an engine gets is what it would get by quantising the whole matrix, or the matrix stays in bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.fp8.blocks import quantise_weight
from megatron_r1z.layout.blocks import Layout, box_slices, engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.fp8 import SCALES, by_format, fp8_matrices, left_out, modules_to_not_convert, quantization_config
from megatron_r1z.layout.plan import Plan, make_plan
from megatron_r1z.layout.topology import Topology

SHAPE = ModelShape("llama", 4, 256, 4, 2, 128, 512, 100, False, False, False, 1e4, None, 1e-6, 128)
Parameters = dict[tuple[int, str], Tensor]


def filled(layout: Layout, tensors: dict[str, Tensor]) -> Parameters:
    """Parameters of all ranks, padding -7."""
    found = {(rank, name): torch.full(size, -7.0) for rank, sizes in layout.parameters.items() for name, size in sizes.items()}
    for block in layout.blocks:
        target = found[block.rank, block.parameter][box_slices(block.local_start, block.size)]
        target.copy_(tensors[block.tensor][box_slices(block.start, block.size)])
    return found


def carried_out(plan: Plan, source: Parameters, dtype: torch.dtype) -> Parameters:
    found = {
        (rank, name): torch.zeros(size, dtype=dtype) for rank, sizes in plan.destination.parameters.items() for name, size in sizes.items()
    }
    for copy in [*plan.local, *(copy for copies in plan.rounds for copy in copies)]:
        target = found[copy.destination_rank, copy.destination_parameter][box_slices(copy.destination_start, copy.size)]
        target.copy_(source[copy.source_rank, copy.source_parameter][box_slices(copy.source_start, copy.size)])
    return found


@settings(max_examples=20)
@given(
    heads=st.sampled_from([(4, 2), (4, 4), (2, 1)]),
    head_dim=st.sampled_from([64, 128, 256]),
    hidden=st.sampled_from([128, 256, 320]),
    ffn=st.sampled_from([256, 512, 384]),
    tp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2]),
    engine_tp=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_quantised_on_the_source_is_quantised_as_a_whole(
    heads: tuple[int, int], head_dim: int, hidden: int, ffn: int, tp: int, pp: int, engine_tp: int, seed: int
) -> None:
    shape = replace(SHAPE, num_layers=2, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, hidden_size=hidden, ffn_size=ffn)
    if heads[1] % tp or heads[0] % engine_tp or ffn % engine_tp:
        return
    policy, engine = megatron_layout(shape, Topology(4, tp, pp), 1), engine_layout(shape, 4, engine_tp)
    matrices = fp8_matrices(shape, [policy, engine])
    generator = torch.Generator().manual_seed(seed)
    tensors = {spec.name: torch.randn(spec.shape, generator=generator) * 3 for spec in hf_tensors(shape)}
    whole = {name: quantise_weight(tensors[name]) for name in matrices}
    source, destination = by_format(policy, matrices), by_format(engine, matrices)
    quantised = {key: quantise_weight(tensor) for key, tensor in filled(source.data, tensors).items()}

    plan = make_plan(source.data, destination.data, 1, 100_000)
    found = carried_out(plan, {key: item.data for key, item in quantised.items()}, torch.float8_e4m3fn)
    wanted = filled(destination.data, {name: item.data.float() for name, item in whole.items()})
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key].float(), wanted[key]) for key in wanted)

    plan = make_plan(source.scales, destination.scales, 4, 1000)
    found = carried_out(plan, {(rank, name + SCALES): item.scale_inv for (rank, name), item in quantised.items()}, torch.float32)
    wanted = filled(destination.scales, {name + SCALES: item.scale_inv for name, item in whole.items()})
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    covered = [block.tensor for part in source for block in part.blocks]
    assert set(covered) == {spec.name for spec in hf_tensors(shape)} | {name + SCALES for name in matrices}
    assert {name for part in (source.plain, source.data) for name in part.parameters[0]} == policy.parameters[0].keys()
    assert len(covered) == len(policy.blocks) + sum(block.tensor in matrices for block in policy.blocks)


def names(shape: ModelShape, tp: int = 1, engine_tp: int = 1, bf16_layers: tuple[int, ...] = ()) -> set[str]:
    """Which kinds of matrices of layer 1 are in FP8."""
    found = fp8_matrices(shape, [megatron_layout(shape, Topology(4, tp), 1), engine_layout(shape, 4, engine_tp)], bf16_layers)
    return {name.split(".")[-2] for name in found if name.startswith("model.layers.1.")}


EVERY = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_what_can_be_cut_into_blocks() -> None:
    assert names(SHAPE) == names(SHAPE, tp=2, engine_tp=2) == names(SHAPE, engine_tp=4) == EVERY
    without_attention = {"gate_proj", "up_proj", "down_proj"}
    assert names(replace(SHAPE, head_dim=64)) == without_attention | {"o_proj"}  # q fits, but k of a group has 64 rows
    assert names(replace(SHAPE, head_dim=64), tp=1, engine_tp=4) == without_attention  # o has 64 columns a rank
    assert names(replace(SHAPE, ffn_size=384), engine_tp=2) == EVERY - without_attention
    assert names(replace(SHAPE, hidden_size=192)) == set()
    assert names(replace(SHAPE, qkv_bias=True)) == EVERY


def test_layers_that_the_policy_computes_in_bf16() -> None:
    assert names(SHAPE, bf16_layers=(1,)) == set()
    assert names(SHAPE, bf16_layers=(0, 3)) == EVERY


def test_what_stays_in_bf16_is_named() -> None:
    layouts = [megatron_layout(SHAPE, Topology(1), 1), engine_layout(SHAPE, 1, 1)]
    every = fp8_matrices(SHAPE, layouts)
    assert left_out(SHAPE, every) == []
    assert modules_to_not_convert(SHAPE, every) == ["lm_head"]
    some = fp8_matrices(SHAPE, layouts, bf16_layers=(0,))
    assert left_out(SHAPE, some)[0] == "model.layers.0.self_attn.q_proj.weight"
    assert modules_to_not_convert(SHAPE, some)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert len(modules_to_not_convert(SHAPE, some)) == 7 + 1
    small = replace(SHAPE, head_dim=64)
    kept = left_out(small, fp8_matrices(small, [megatron_layout(small, Topology(1), 1)]))
    assert kept == [f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv"]


def test_experts_stay_in_bf16() -> None:
    mixture = replace(SHAPE, family="mixtral", num_experts=4, experts_per_token=2)
    assert fp8_matrices(mixture, [megatron_layout(mixture, Topology(1), 1)]) == frozenset()


def test_transformers_reads_the_description() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.FineGrainedFP8Config(
        **{key: value for key, value in quantization_config(["lm_head"]).items() if key != "quant_method"}
    )
    assert tuple(config.weight_block_size) == (128, 128)
    assert config.modules_to_not_convert == ["lm_head"]
