"""A rank's memory by phase, and the refit's part against the planner."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_r1z.cost.assumptions import DEFAULT
from megatron_r1z.cost.checks import check_engine_room
from megatron_r1z.cost.cluster import GIB
from megatron_r1z.cost.formats import ENGINE_FORMATS
from megatron_r1z.cost.memory import Phase
from megatron_r1z.cost.run_cost import MAX_BUFFER_BYTES
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.known import find_shape
from megatron_r1z.layout.plan import make_plan
from tests.unit.cost.runs import SHAPE, cluster, cost


def test_a_phase_has_what_is_always_there_and_its_own() -> None:
    rank = cost().ranks[0]
    resident = sum(item.nbytes for item in rank.items if item.phase is None)
    own = {phase: sum(item.nbytes for item in rank.items if item.phase is phase) for phase in Phase}
    assert {phase: rank.total(phase) for phase in Phase} == {phase: resident + own[phase] for phase in Phase}
    assert rank.peak == max(rank.total(phase) for phase in Phase)
    assert all(own.values())


def test_the_fullest_stage_is_the_one_that_counts() -> None:
    run = cost(parallel={"pipeline_parallel_size": 4})
    assert run.fullest.peak == max(rank.peak for rank in run.ranks)
    assert len(run.ranks) == 4


@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}])
def test_refit_buffers_and_seconds_are_those_of_the_plan(parallel: dict[str, int]) -> None:
    run = cost(parallel=parallel, rollout={"tensor_parallel_size": 2})
    topology = run.config.parallel.topology
    plan = make_plan(megatron_layout(SHAPE, topology, 128, "te"), engine_layout(SHAPE, 8, 2), 2)
    buffers = next(item.nbytes for item in run.ranks[0].items if item.name == "refit buffers")
    assert buffers == max(plan.of_rank(rank).buffer_bytes for rank in range(8)) <= MAX_BUFFER_BYTES
    digests = 2 * run.engine.weights / (3000e9 * DEFAULT.memory_share)
    assert run.time.refit == pytest.approx(run.refit.seconds + digests)


@pytest.mark.parametrize("policy", [(1, 1), (4, 1), (2, 2), (8, 2), (1, 8)])
@pytest.mark.parametrize("tp", [1, 4])
def test_without_a_plan_the_buffers_are_bounded_and_the_seconds_rough(policy: tuple[int, int], tp: int) -> None:
    parallel = {"num_ranks": 16, "tensor_parallel_size": policy[0], "pipeline_parallel_size": policy[1]}
    run = cost(find_shape("Llama-3.1-8B").shape, on=cluster(nodes=2), parallel=parallel, rollout={"tensor_parallel_size": tp})
    rough = dataclasses.replace(run, plans_refit=False)
    assert rough.fullest.peak >= run.fullest.peak
    assert 0.25 < rough.time.refit / run.time.refit < 2  # rounds are as slow as their slowest rank, which the rough one leaves out


def test_an_engine_that_repacks_its_weights_has_them_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cost()
    before = plain.fullest.peak
    monkeypatch.setitem(ENGINE_FORMATS, "bf16", dataclasses.replace(ENGINE_FORMATS["bf16"], is_staged=True))  # type: ignore[arg-type]
    assert cost().fullest.peak - before == plain.engine.weights


def test_the_cache_of_a_token_and_how_many_sequences_that_is() -> None:
    run = cost()
    assert run.engine.cache_bytes_per_token == 2 * 8 * 4 * 32 * 2
    assert run.engine.concurrent(1100) == min(256, (1 << 30) // run.engine.cache_bytes_per_token // 1100)
    copied = cost(rollout={"tensor_parallel_size": 8})
    assert copied.engine.cache_bytes_per_token == 2 * 8 * 1 * 32 * 2  # eight ranks, four heads: each has one


def test_an_engine_on_a_small_gpu_computes_fewer_tokens_at_once() -> None:
    shape = find_shape("Llama-3.1-8B").shape
    large, small = cost(shape), cost(shape, on=cluster(memory_gib=40.0))
    assert (large.engine.batch_tokens, small.engine.batch_tokens) == (16384, 8192)
    assert small.engine.work < large.engine.work


def test_why_it_does_not_fit() -> None:
    assert cost().shortfall() is None
    small = cost(on=cluster(memory_gib=4.5)).shortfall()
    assert small is not None
    assert small.startswith("a rank of pipeline stage 0 needs ")
    assert "and a test has 4.5" in small
    few = cost(parallel={"num_ranks": 16}).shortfall()
    assert few == "parallel.num_ranks is 16, but the cluster has 1 x 8 GPUs"
    offload = {"distributed": True, "offload_to_host": True}
    host = cost(on=cluster(host_memory_gib=0.01), optimizer=offload).shortfall()
    assert host is not None
    assert host.startswith("optimizer.offload_to_host needs 0 GiB of a node's memory")


def test_what_is_reserved_is_counted() -> None:
    assert next(item.nbytes for item in cost().ranks[0].items if item.name == "reserved") == DEFAULT.reserved_gib * GIB


def test_an_engine_without_room_beside_the_policy_is_refused_with_what_would_do() -> None:
    engine = cost(rollout={"kv_cache_bytes": 3 * GIB}).engine
    needed = engine.weights + 3 * GIB
    check_engine_room(engine, needed)
    with pytest.raises(ConfigError, match=r"lower rollout.kv_cache_bytes to at most (\d+) ") as caught:
        check_engine_room(engine, needed - GIB)
    assert f"takes {needed / GIB:.1f} GiB of each rank, 3.0 of them for its cache" in str(caught.value)
    smaller = cost(rollout={"kv_cache_bytes": int(str(caught.value).split("at most ")[1].split(" ")[0])}).engine
    check_engine_room(smaller, needed - GIB)  # what it says does
    with pytest.raises(ConfigError, match=r"GiB left; raise rollout.tensor_parallel_size"):
        check_engine_room(engine, engine.weights)
