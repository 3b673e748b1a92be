"""What `auto` comes to, and what is refused: of the policy, and of the engine."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1z.config import OptimizerConfig, ParallelConfig, RolloutConfig, SpeedConfig
from megatron_r1z.errors import ConfigError
from megatron_r1z.speed import GPU_MACHINE, Choice, Machine, batched_tokens, choices, engine_speed, gradient_speed, model_speed

CPU = Machine(has_gpu=False, has_transformer_engine=False)
WITHOUT_TE = Machine(has_gpu=True, has_transformer_engine=False)
OPTIONS = ("overlap_grad_reduce", "overlap_param_gather", "overlap_p2p_comm", "gradient_accumulation_fusion", "swiglu_fusion")


def resolved(machine: Machine, *, distributed: bool = True, speed: dict[str, Any] | None = None, **degrees: int) -> dict[str, Choice]:
    degrees = {"num_ranks": 8, "pipeline_parallel_size": 2, "virtual_pipeline_size": 2} | degrees
    parallel = ParallelConfig(**degrees, speed=SpeedConfig(**speed or {}))
    return choices(model_speed(parallel, machine), gradient_speed(parallel, OptimizerConfig(distributed=distributed), machine))


def on(found: dict[str, Choice]) -> set[str]:
    return {name for name, choice in found.items() if choice}


def test_auto_is_all_there_is_on_a_gpu_and_nothing_without() -> None:
    assert on(resolved(GPU_MACHINE)) == set(OPTIONS)
    assert on(resolved(CPU)) == set()


@pytest.mark.parametrize(
    ("changed", "off", "why"),
    [
        ({"distributed": False}, {"overlap_param_gather"}, "optimizer.distributed is false"),
        ({"num_ranks": 2}, {"overlap_grad_reduce", "overlap_param_gather"}, "no other rank has the same weights"),
        ({"virtual_pipeline_size": 1}, {"overlap_p2p_comm"}, "parallel.virtual_pipeline_size is 1"),
        ({"speed": {"overlap_grad_reduce": False}}, {"overlap_grad_reduce", "overlap_param_gather"}, "overlap_grad_reduce is"),
        ({"speed": {"swiglu_fusion": False}}, {"swiglu_fusion"}, "parallel.speed.swiglu_fusion is false"),
    ],
)
def test_auto_is_off_where_it_cannot_be_or_is_of_no_use(changed: dict[str, Any], off: set[str], why: str) -> None:
    found = resolved(GPU_MACHINE, **changed)
    assert on(found) == set(OPTIONS) - off
    assert any(why in found[name].reason for name in off)


def test_context_parallel_ranks_share_weights_too() -> None:
    assert resolved(GPU_MACHINE, num_ranks=4, context_parallel_size=2)["overlap_grad_reduce"]


def test_layers_of_transformer_engine_add_up_gradients() -> None:
    assert on(resolved(WITHOUT_TE)) == set(OPTIONS) - {"gradient_accumulation_fusion"}


@pytest.mark.parametrize("name", ["overlap_grad_reduce", "overlap_p2p_comm", "swiglu_fusion"])
def test_what_is_of_no_use_on_a_cpu_can_be_asked_for(name: str) -> None:
    assert on(resolved(CPU, speed={name: True})) == {name}


@pytest.mark.parametrize(
    ("name", "machine", "changed", "why"),
    [
        ("overlap_p2p_comm", GPU_MACHINE, {"virtual_pipeline_size": 1}, "parallel.virtual_pipeline_size is 1"),
        ("overlap_param_gather", GPU_MACHINE, {"distributed": False}, "optimizer.distributed is false"),
        ("overlap_param_gather", CPU, {}, "parallel.speed.overlap_grad_reduce is off"),
        ("gradient_accumulation_fusion", CPU, {}, "there are no layers of Transformer Engine"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name: str, machine: Machine, changed: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.speed.{name} is true, but {why}.*; set it to auto or false"):
        resolved(machine, speed={name: True}, **changed)


def test_an_engine_has_graphs_on_a_gpu_and_shares_prompts() -> None:
    gpu, cpu = (engine_speed(RolloutConfig(), 100, machine) for machine in (GPU_MACHINE, CPU))
    assert (bool(gpu.cuda_graphs), bool(gpu.prefix_caching), gpu.max_num_batched_tokens) == (True, True, None)
    assert (bool(cpu.cuda_graphs), bool(cpu.prefix_caching), cpu.max_num_batched_tokens) == (False, True, 32768)
    off = engine_speed(RolloutConfig(enforce_eager=True, enable_prefix_caching=False, max_num_batched_tokens=512), 100, GPU_MACHINE)
    assert (bool(off.cuda_graphs), bool(off.prefix_caching), off.max_num_batched_tokens) == (False, False, 512)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"enforce_eager": False}, "rollout.enforce_eager is false, but CUDA graphs need a GPU"),
        ({"max_num_batched_tokens": 512}, "rollout.max_num_batched_tokens is 512, but without a GPU a sequence of 600 tokens"),
    ],
)
def test_an_engine_on_a_cpu_refuses_what_it_cannot(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        engine_speed(RolloutConfig(**settings), 600, CPU)


def test_a_batch_holds_a_token_of_every_sequence() -> None:
    with pytest.raises(ConfigError, match=r"less than a token for each of rollout.max_concurrent_sequences 256"):
        RolloutConfig(max_num_batched_tokens=255)


@pytest.mark.parametrize(("asked", "memory_gib", "tokens"), [("auto", 79.6, 16384), ("auto", 40.0, 8192), (2048, 79.6, 2048)])
def test_tokens_of_a_batch(asked: Any, memory_gib: float, tokens: int) -> None:
    assert batched_tokens(RolloutConfig(max_num_batched_tokens=asked), memory_gib) == tokens
