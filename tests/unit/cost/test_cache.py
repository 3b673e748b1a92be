"""A cache of what is left: as large as an iteration's fullest moment allows, and no larger than is of use."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1z.cost.cache import cache_beside
from megatron_r1z.cost.cluster import GIB
from megatron_r1z.cost.engine_memory import CACHE_UNIT
from megatron_r1z.layout.known import find_shape
from tests.unit.cost.runs import SHAPE, cluster, cost

LLAMA = find_shape("Llama-3.1-8B").shape
ROLLOUT: dict[str, Any] = {"kv_cache_bytes": "auto", "max_concurrent_sequences": 4096}


def test_plan_and_run_come_to_the_same_cache_which_fills_the_gpu() -> None:
    planned = cost(LLAMA, on=cluster(), parallel={"num_ranks": 8, "tensor_parallel_size": 4}, rollout=ROLLOUT)
    assert planned.cluster is not None
    memory = round(planned.cluster.gpu.memory_gib * GIB)
    assert planned.engine.cache_bytes == cache_beside(planned.config, LLAMA, memory, 0)
    spare = memory - planned.fullest.peak
    assert 0 <= spare < CACHE_UNIT + (1 << 30)  # refit buffers are taken at their bound


def test_what_others_take_of_the_gpu_counts_beyond_what_is_reserved() -> None:
    run = cost(LLAMA, on=cluster(), parallel={"num_ranks": 8, "tensor_parallel_size": 4}, rollout=ROLLOUT)
    alone, beside, crowded = (run.cache_beside(80 * GIB, outside) for outside in (0, 3 * GIB, 8 * GIB))
    assert alone == beside == crowded + 5 * GIB


def test_it_holds_one_sequence_at_least_and_all_of_them_at_most() -> None:
    run = cost(SHAPE, on=cluster(), rollout={"kv_cache_bytes": "auto", "max_concurrent_sequences": 4})
    one = -(-run.config.max_model_tokens // 16) * 16 * run.engine.cache_bytes_per_token
    assert run.cache_beside(10_000 * GIB) == 4 * one
    assert run.cache_beside(0) == one
    assert run.cache_beside(0) >= run.config.max_model_tokens * run.engine.cache_bytes_per_token


@pytest.mark.parametrize(("setting", "more"), [("parallel", False), ("rollout", True)])
def test_memory_follows_the_settings_for_speed(setting: str, more: bool) -> None:
    """A fused activation keeps less, and graphs take some."""
    off: dict[str, Any] = {"parallel": {"speed": {"swiglu_fusion": False}}, "rollout": {"enforce_eager": True}}[setting]
    fast, slow = cost(SHAPE, on=cluster()), cost(SHAPE, on=cluster(), **{setting: off})
    assert (fast.fullest.peak > slow.fullest.peak) == more


def test_time_follows_the_settings_for_speed() -> None:
    base = {"num_ranks": 8, "tensor_parallel_size": 2}
    overlaps = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    optimizer = {"distributed": True}
    fast = cost(SHAPE, on=cluster(), parallel=base, optimizer=optimizer)
    slow = cost(SHAPE, on=cluster(), parallel=base | {"speed": overlaps}, optimizer=optimizer)
    assert 0 < fast.time.gradient_sum < slow.time.gradient_sum == slow.update_time.whole_gradient_sum() * slow.steps
    eager = cost(SHAPE, on=cluster(), parallel=base, rollout={"enforce_eager": True})
    assert eager.time.rollout.decode.host > fast.time.rollout.decode.host
    apart = cost(SHAPE, on=cluster(), parallel=base, rollout={"enable_prefix_caching": False})
    assert apart.time.rollout.prefill == pytest.approx(fast.time.rollout.prefill * fast.config.rollout.samples_per_prompt)
