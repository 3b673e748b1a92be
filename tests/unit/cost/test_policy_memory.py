"""Weights, gradients and optimizer over all ranks add up to the model's."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.config import OptimizerConfig, ParallelConfig
from megatron_r1z.cost.activations import BatchSize
from megatron_r1z.cost.formats import POLICY_FORMATS
from megatron_r1z.cost.policy_memory import PolicyMemory
from megatron_r1z.layout.families import ModelShape, hf_tensors
from tests.unit.cost.runs import SHAPE

BATCH = BatchSize(1024, 1024, 4)


def memory(shape: ModelShape = SHAPE, precision: str = "bf16", optimizer: OptimizerConfig | None = None, **parallel: int) -> PolicyMemory:
    return PolicyMemory(shape, ParallelConfig(**parallel), optimizer or OptimizerConfig(), POLICY_FORMATS[precision], BATCH)


def replicated(shape: ModelShape) -> int:
    """Parameters that every tensor-parallel rank has: norms."""
    return sum(spec.numel for spec in hf_tensors(shape) if len(spec.shape) == 1 and "bias" not in spec.name)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.booleans())
def test_the_stages_hold_the_model_once(tp: int, pp: int, tied: bool) -> None:
    shape = dataclasses.replace(SHAPE, tied_embeddings=tied)
    policy = memory(shape, num_ranks=tp * pp, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    padded = -(-shape.vocab_size // (128 * tp)) * 128 * tp
    embeddings = (2 if not tied or pp > 1 else 1) * padded * shape.hidden_size
    layers = sum(spec.numel for spec in hf_tensors(shape) if "vocab" not in spec.name and spec.shape[0] != shape.vocab_size)
    held = sum(item.total for item in policy.parameters) * tp
    assert held == embeddings + layers + (tp - 1) * replicated(shape)


@pytest.mark.parametrize(("precision", "weight", "state"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_bytes_of_a_parameter(precision: str, weight: int, state: int) -> None:
    policy = memory(precision=precision, num_ranks=1)
    total = policy.parameters[0].total
    assert (policy.weights(0), policy.gradients(0), policy.optimizer_state(0)) == (weight * total, 4 * total, state * total)


def test_the_distributed_optimizer_splits_its_state_alone() -> None:
    policy = memory(num_ranks=4, optimizer=OptimizerConfig(distributed=True))
    total = policy.parameters[0].total
    assert policy.optimizer_state(0) == 12 * -(-total // 4)
    assert policy.gradients(0) == 4 * total


def test_offload_moves_the_state_to_the_host_with_a_copy_of_the_gradients() -> None:
    policy = memory(num_ranks=2, optimizer=OptimizerConfig(distributed=True, offload_to_host=True))
    assert policy.optimizer_state(0) == 0
    assert policy.host_state(0) == 16 * -(-policy.parameters[0].total // 2)
    assert memory(num_ranks=2).host_state(0) == 0


def test_the_last_stage_has_the_head_and_the_first_keeps_most_micro_batches() -> None:
    policy = memory(num_ranks=4, pipeline_parallel_size=4)
    kept = [policy.kept(stage) for stage in range(4)]
    without_head = [*kept[:3], kept[3] - policy.head.kept]
    assert without_head == pytest.approx([kept[2] / 2 * count for count in (4, 3, 2, 1)])
    assert policy.logprobs(3) == max(policy.logprobs(0), policy.head.forward)


def test_offloaded_layers_keep_gate_and_up_projection_on_the_gpu() -> None:
    whole, two_away = memory(), memory(offload_layers=2)
    moved = whole.token.whole - 2 * SHAPE.ffn_size * 2
    for before, after in ((whole.kept(0), two_away.kept(0)), (whole.update(0), two_away.update(0))):
        assert before - after == pytest.approx(2 * moved * BATCH.tokens, abs=2)
